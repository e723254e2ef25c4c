"""IP-Adapters on a loaded UNet: loaded once by diffusers, acting only in the passes that ask for them.

Shapes: B rows of a batch, D width of the image encoder's embedding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.loaders import IPAdapterMixin
from diffusers.models.embeddings import ImageProjection
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from featstore.errors import BadRequestError
from featstore.models.backbones.loading import errors_about, freeze, pretrained_text
from featstore.models.files import TRANSFORMERS_STEM, weight_files
from featstore.models.quiet import quiet

if TYPE_CHECKING:
    from featstore.datasets.base import UInt8Array


class _Host(IPAdapterMixin):  # type: ignore[misc]
    """What diffusers' loader takes for a pipeline: the one module that an IP-Adapter changes."""

    def __init__(self, unet: Any) -> None:
        self.unet = unet


class _Loaded:
    """One IP-Adapter: what stands in the UNet while it acts, and the model that sees for it."""

    def __init__(self, processors: dict[str, Any], projection: Any, eyes: _Eyes) -> None:
        self.processors = processors
        self.projection = projection
        self.eyes = eyes


class IPAdapters:
    """The IP-Adapters of one UNet. With none acting it computes bit for bit what it computed before any was loaded.

    Args:
        unet: a stock UNet2DConditionModel, frozen.
    """

    def __init__(self, unet: Any) -> None:
        self._unet = unet
        self._loaded: dict[str, _Loaded] = {}

    def load(self, path: Path, image_encoder: Path, digest: str) -> None:
        """Load the IP-Adapter in a file, once for each digest; it does not act yet.

        Args:
            path: the .safetensors file, as published for diffusers.
            image_encoder: folder of the CLIP vision model that it was trained with.
            digest: names it from now on.

        Raises:
            BadRequestError: if it does not fit the model, or needs more than an image (FaceID).
        """
        if digest in self._loaded:
            return
        unet = self._unet
        processors, projection = unet.attn_processors, unet.encoder_hid_proj
        kind = unet.config.encoder_hid_dim_type
        try:
            with quiet(), errors_about(f"IP-Adapter {path}"):
                _Host(unet).load_ip_adapter(
                    str(path.parent), subfolder="", weight_name=path.name, image_encoder_folder=None,
                    local_files_only=True, low_cpu_mem_usage=False,
                )  # fmt: skip
                unet.to(dtype=unet.dtype, device=unet.device).requires_grad_(False)
            found = _Loaded(unet.attn_processors, unet.encoder_hid_proj, _Eyes(image_encoder, unet))
            found.eyes.check(path, found.projection.image_projection_layers[0])
            self._loaded[digest] = found
        finally:
            self._put(processors, projection, kind)

    @contextlib.contextmanager
    def acting(self, digest: str, scale: float) -> Iterator[None]:
        """Context in which one IP-Adapter acts on the UNet with a scale."""
        unet, chosen = self._unet, self._loaded[digest]
        before = (unet.attn_processors, unet.encoder_hid_proj, unet.config.encoder_hid_dim_type)
        for processor in chosen.processors.values():
            if hasattr(processor, "to_k_ip"):
                processor.scale = [scale]
        try:
            self._put(chosen.processors, chosen.projection, "ip_image_proj")
            yield
        finally:
            self._put(*before)

    def see(self, digest: str, image: UInt8Array | None) -> torch.Tensor:
        """What the IP-Adapter is fed for one image, or for none, as guidance needs it.

        Args:
            digest: of the IP-Adapter.
            image: uint8 (H, W, 3), RGB; None: nothing is seen.

        Returns:
            (1, 1, D), or (1, 1, tokens, D) for adapters of the "plus" kind, in the UNet's dtype.
        """
        chosen = self._loaded[digest]
        plain = isinstance(chosen.projection.image_projection_layers[0], ImageProjection)
        return chosen.eyes.see(image, hidden=not plain)

    def clear(self) -> None:
        """Forget the modules."""
        self._loaded.clear()
        self._unet = None

    def _put(self, processors: dict[str, Any], projection: Any, kind: str | None) -> None:
        # The setter empties the dictionary that it is given.
        self._unet.set_attn_processor(dict(processors))
        self._unet.encoder_hid_proj = projection
        self._unet.register_to_config(encoder_hid_dim_type=kind)


class _Eyes:
    """A CLIP vision model; each image is seen alone, so that what it sees does not depend on others."""

    def __init__(self, folder: Path, unet: Any) -> None:
        weights = weight_files(folder, TRANSFORMERS_STEM)
        self._model = freeze(pretrained_text(CLIPVisionModelWithProjection, folder, weights, unet.dtype), unet.device)
        self._unet = unet
        side = self._model.config.image_size
        with errors_about(f"image encoder {folder}"):
            if (folder / "preprocessor_config.json").is_file():
                self._prepare: Any = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
            else:
                self._prepare = CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side)

    def check(self, path: Path, layer: Any) -> None:
        """Refuse an image encoder of another width than the IP-Adapter was trained with."""
        config = self._model.config
        if isinstance(layer, ImageProjection):
            wanted, given = layer.image_embeds.in_features, config.projection_dim
        elif hasattr(layer, "proj_in"):
            wanted, given = layer.proj_in.in_features, config.hidden_size
        else:
            raise BadRequestError(f"IP-Adapter {path} is of a kind that needs more than the image itself")
        if wanted != given:
            raise BadRequestError(
                f"IP-Adapter {path} takes embeddings of width {wanted}, its image encoder makes {given}",
                hint="the folder image_encoder beside it must hold the CLIP vision model that it was trained with",
            )

    def see(self, image: UInt8Array | None, *, hidden: bool) -> torch.Tensor:
        """See `IPAdapters.see`."""
        side = self._model.config.image_size
        if image is None:
            pixels = torch.zeros(1, 3, side, side)
        else:
            pixels = self._prepare(image, return_tensors="pt").pixel_values
        pixels = pixels.to(self._unet.device, self._model.dtype)
        with torch.inference_mode():
            seen = self._model(pixels, output_hidden_states=hidden)
        value = seen.hidden_states[-2] if hidden else seen.image_embeds
        # Nothing seen is no embedding for the plain kind, and the encoder's view of black for the other, as in
        # diffusers' pipelines.
        value = torch.zeros_like(value) if image is None and not hidden else value
        return value[None].to(self._unet.dtype)
