from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from featstore.errors import BadRequestError
from featstore.extraction.noise import noise
from featstore.models.backbones.schedules import Diffusion

DIGEST = hashlib.sha256(b"an image").hexdigest()
SHAPE = (4, 16, 16)


def test_noise_is_decided_by_seed_image_and_timestep() -> None:
    first = noise(0, DIGEST, 50, SHAPE)
    assert first.shape == SHAPE
    assert first.dtype == torch.float32
    assert torch.equal(first, noise(0, DIGEST, 50, SHAPE))
    others = [
        noise(1, DIGEST, 50, SHAPE),
        noise(0, DIGEST, 51, SHAPE),
        noise(0, hashlib.sha256(b"another").hexdigest(), 50, SHAPE),
    ]
    for other in others:
        correlation = torch.corrcoef(torch.stack([first.flatten(), other.flatten()]))[0, 1]
        assert abs(correlation) < 0.15


def test_noise_is_that_of_philox_keyed_with_sha256() -> None:
    key = int(hashlib.sha256(f"featstore noise|7|{DIGEST}|301".encode()).hexdigest()[:32], 16)
    expected = np.random.Generator(np.random.Philox(key=key)).standard_normal(SHAPE, dtype=np.float32)
    assert np.array_equal(noise(7, DIGEST, 301, SHAPE).numpy(), expected)


def test_noise_stays_what_it_was() -> None:
    # These numbers are in every store: a change of them is a new meaning of recipes, not a fix.
    values = noise(0, "0" * 64, 50, (4,))
    torch.testing.assert_close(values, torch.tensor(GOLDEN), rtol=0, atol=1e-7)


GOLDEN = [1.14006162, 0.62853807, 0.7848981, 0.47848666]


def test_noise_is_standard_normal() -> None:
    values = noise(3, DIGEST, 0, (400, 400)).double()
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01
    assert abs((values.abs() < 1).double().mean() - 0.6827) < 0.005


@pytest.mark.parametrize("digest", ["", "abc", "G" * 64, DIGEST.upper(), DIGEST + "\n"])
def test_what_is_no_digest_is_refused(digest: str) -> None:
    with pytest.raises(BadRequestError, match="not a SHA-256"):
        noise(0, digest, 50, SHAPE)


@pytest.mark.parametrize("timestep", [0, 1, 50, 301, 999])
def test_adding_noise_is_that_of_diffusers(timestep: int) -> None:
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    latents, drawn = torch.randn(3, *SHAPE), torch.randn(3, *SHAPE)
    schedule = Diffusion(scheduler.alphas_cumprod)
    ours = schedule.noised(latents, drawn, timestep)
    theirs = scheduler.add_noise(latents, drawn, torch.full((3,), timestep))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    half = schedule.noised(latents.half(), drawn, timestep)
    assert half.dtype == torch.float16
