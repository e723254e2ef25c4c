"""Noise that belongs to an image: the same on every machine, in every order, in every batch."""

from __future__ import annotations

import hashlib
import re

import numpy as np
import torch

from featstore.errors import BadRequestError


def noise(seed: int, digest: str, timestep: int, shape: tuple[int, ...], draw: int = 0) -> torch.Tensor:
    """Standard normal noise, decided by the seed, the image, the timestep and the draw alone.

    numpy's counter-based Philox generator makes it, keyed with SHA-256 of them: torch's own CPU generator
    takes other paths, with other last bits, on machines with other vector units.

    Args:
        seed: seed of the run.
        digest: SHA-256 of the image's bytes, 64 hex digits.
        timestep: 0..999.
        shape: shape of one image's latents, (C, h, w).
        draw: which of several draws for one image, from 0 on.

    Returns:
        float32 tensor of that shape, on the CPU.
    """
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise BadRequestError(f"image digest {digest!r} is not a SHA-256 in lower-case hex")
    words = f"featstore noise|{seed}|{digest}|{timestep}" + (f"|{draw}" if draw else "")
    key = hashlib.sha256(words.encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "big")))
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
