"""A model before it is loaded: its layers and sizes, and what steers it. No torch."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from featstore.errors import BadRequestError, NotFoundError, unknown_name
from featstore.models.layers import Shape, Tap
from featstore.models.pipeline_folder import PipelineFolder
from featstore.models.trained import find_trained, trained_variants

if TYPE_CHECKING:
    from featstore.models.backbones.base import Backbone

Place = Path | Callable[[], Path]
"""A folder, or what finds (and perhaps fetches) it when it is asked for."""


class ModelSource(PipelineFolder):
    """A model in a pipeline folder; each family of models is a subclass.

    Creating one reads configuration files only and refuses what is no folder of its family.

    Args:
        name: see `PipelineFolder`.
        folder: see `PipelineFolder`.
        controlnets: the model's own ControlNets by variant.
        loras: the model's own LoRAs by (data set, variant).
        allow_pickle: see `PipelineFolder`.
        absent: see `PipelineFolder`.

    Raises:
        NotFoundError: if the folder or one of its configuration files is absent.
        BadRequestError: if it holds a model of another kind.
    """

    techniques: ClassVar[frozenset[str]]
    """Names of the techniques that can steer the family; ``basic`` always can."""
    unsupported: ClassVar[Mapping[str, str]] = {}
    """Why some of the other techniques cannot, for people."""
    scheduler: ClassVar[str] = "ddpm-forward"
    """How latents are noised, as recipes say it."""
    chunked_text: ClassVar[bool] = False
    """Whether long texts can be encoded in chunks side by side: where CLIP's are the only text encoders."""
    default_layers = "legacy"
    """Layers that are extracted unless others are asked for."""
    weights_root: Path | None = None
    """Folder that LoRAs trained for the model are looked for in; None: ``$FEATSTORE_WEIGHTS``, else ``./weights``."""

    def __init__(
        self,
        name: str,
        folder: Path,
        *,
        controlnets: Mapping[str, Place] | None = None,
        loras: Mapping[tuple[str, str | None], Path] | None = None,
        allow_pickle: bool = False,
        absent: NotFoundError | None = None,
    ) -> None:
        self._controlnets = dict(controlnets or {})
        self._loras = dict(loras or {})
        super().__init__(name, folder, allow_pickle=allow_pickle, absent=absent)

    # what a family gives

    @property
    @abc.abstractmethod
    def text_tokens(self) -> int:
        """Length of an encoded prompt: the number of channels of cross-attention maps; 0 for models without text."""

    @property
    @abc.abstractmethod
    def denoiser_config(self) -> Mapping[str, Any]:
        """Configuration of the network that layers are read from."""

    @property
    @abc.abstractmethod
    def latent_channels(self) -> int:
        """Channels of what is noised."""

    @property
    @abc.abstractmethod
    def latent_factor(self) -> int:
        """Image side / latent side; 1 for models of pixels."""

    @property
    @abc.abstractmethod
    def size_multiple_px(self) -> int:
        """Image sides are multiples of this."""

    @property
    @abc.abstractmethod
    def default_image_size_px(self) -> int:
        """Side of the images that the model was trained on."""

    @functools.cached_property
    @abc.abstractmethod
    def taps(self) -> Mapping[str, Tap]:
        """All layers by name."""

    @functools.cached_property
    @abc.abstractmethod
    def presets(self) -> Mapping[str, tuple[str, ...]]:
        """Named choices of layers; the default one first."""

    @abc.abstractmethod
    def load(self, device: str = "cpu", compute_dtype: str = "float32") -> Backbone:
        """Load the weights, frozen, onto a device.

        Args:
            device: a torch device, e.g. ``cpu`` or ``cuda:0``.
            compute_dtype: ``float32``, ``float16`` or ``bfloat16``.

        Raises:
            BadRequestError: for a device or type that is not there.
            NotFoundError: if weights are missing.
        """

    # sizes

    def check_image_size(self, height_px: int, width_px: int) -> None:
        """Refuse image sizes that the model cannot take.

        Raises:
            BadRequestError: with the nearest sizes that it can.
        """
        step = self.size_multiple_px
        for side, value in (("height", height_px), ("width", width_px)):
            if value < step or value % step:
                lower = max(step, value // step * step)
                near = sorted({lower, max(step, -(-value // step) * step)})
                raise BadRequestError(
                    f"image {side} {value} px: model {self.name!r} takes multiples of {step} px, from {step} px on",
                    hint="nearest: " + " or ".join(f"{size} px" for size in near),
                )

    def check_prompt_chunks(self, chunks: int) -> None:
        """Refuse to encode texts in several chunks where that means nothing.

        Raises:
            BadRequestError: with the reason.
        """
        if chunks > 1 and not self.chunked_text:
            takes = f"encodes texts of up to {self.text_tokens} tokens whole" if self.text_tokens else "takes no text"
            raise BadRequestError(
                f"--prompt-chunks {chunks}: model {self.name!r} ({type(self).__name__}) {takes}; chunks are for models "
                "whose text encoders are all CLIP's"
            )

    # layers

    def layer_names(self, height_px: int, width_px: int, prompt_chunks: int = 1) -> dict[str, Shape]:
        """All layers with the shape (C, H, W) that their maps have for images of this size and texts of so many chunks.

        Raises:
            BadRequestError: if the model cannot take the size.
        """
        self.check_image_size(height_px, width_px)
        height, width = height_px // self.latent_factor, width_px // self.latent_factor
        return {name: tap.shape(height, width, prompt_chunks) for name, tap in self.taps.items()}

    def expand_layers(self, text: str) -> tuple[str, ...]:
        """Layer names of a comma list of presets and names, each once, in the order given.

        Raises:
            BadRequestError: for an unknown name, with the nearest; for an empty list.
        """
        names: dict[str, None] = {}
        for part in text.split(","):
            item = part.strip()
            if item in self.presets:
                names.update(dict.fromkeys(self.presets[item]))
            elif item in self.taps:
                names[item] = None
            else:
                raise self._unknown_layer(item)
        return tuple(names)

    def resolve_layers(self, text: str, height_px: int, width_px: int, prompt_chunks: int = 1) -> dict[str, Shape]:
        """`expand_layers`, with the shapes of `layer_names`."""
        shapes = self.layer_names(height_px, width_px, prompt_chunks)
        return {name: shapes[name] for name in self.expand_layers(text)}

    def _unknown_layer(self, name: str) -> BadRequestError:
        error = unknown_name("layer", name, [*self.presets, *self.taps])
        message = f"unknown layer {name!r} of model {self.name!r}; presets: {', '.join(self.presets)}"
        hint = f"`featstore models {self.name} --layers` lists all {len(self.taps)}"
        return BadRequestError(message, hint=f"{error.hint} {hint}" if error.hint else hint)

    def tokens(self, text: str, prompt_chunks: int = 1) -> list[str]:
        """The word at each position of an encoded text, i.e. at each channel of a cross-attention map; "" for none.

        Imports transformers; loads no weights.

        Raises:
            NotFoundError: if the tokenizer is not on this machine.
        """
        if self.absent is not None:
            raise self.absent
        from featstore.models.tokens import load_tokenizer, words

        return words(load_tokenizer(self.folder), text, self.text_tokens, prompt_chunks)

    # what steers the model and belongs to it

    def controlnet_folder(self, variant: str) -> Path | None:
        """Folder of the model's own ControlNet of this variant, if it has one; fetched from the Hub if need be.

        For a model that is given by its folder that is ``controlnet-<variant>`` in or beside the folder.

        Raises:
            NotFoundError: if it has one that is not on this machine and cannot be fetched.
        """
        place = self._controlnets.get(variant)
        if callable(place):
            place = self._controlnets[variant] = place()
        if place is None:
            name = f"controlnet-{variant}"
            near = (self.folder / name, self.folder.parent / name)
            place = next((folder for folder in near if (folder / "config.json").is_file()), None)
        return place

    @property
    def controlnet_variants(self) -> tuple[str, ...]:
        """Variants that `controlnet_folder` has."""
        return tuple(self._controlnets)

    def ip_adapter_folder(self) -> Path | None:
        """Folder of the model's own IP-Adapter, beside the pipeline's, if it is there."""
        folder = self.folder.parent / "ip-adapter"
        return folder if folder.is_dir() else None

    @property
    def own_parts(self) -> dict[str, tuple[str, ...]]:
        """Techniques that can steer the model, with what comes with it for each: variants, data sets, or nothing.

        Looks at names only: nothing is fetched, and of a shipped LoRA it says the data set and its variant.
        """
        loras = tuple(f"{name}:{variant}" if variant else name for name, variant in self._loras)
        adapter = ("its own",) if self.ip_adapter_folder() is not None else ()
        own = {"controlnet": self.controlnet_variants, "lora": loras, "ip-adapter": adapter}
        order = ("prompt", "controlnet", "lora", "ip-adapter", "cfg")
        return {"basic": ()} | {name: own.get(name, ()) for name in order if name in self.techniques}

    def lora_folder(self, dataset_name: str, variant: str | None) -> Path | None:
        """Folder of the LoRA for a data set: the one that the model ships, else the one that was trained here.

        Args:
            dataset_name: name of the data set.
            variant: e.g. ``overfit``; None: the well-trained one.
        """
        shipped = self._loras.get((dataset_name, variant))
        if self.ships_lora(dataset_name, variant):
            return shipped
        return find_trained(self.name, dataset_name, variant, self.weights_root) or shipped

    @property
    def trains_lora(self) -> bool:
        """Whether `featstore train-lora` trains LoRAs for the model: it does for Stable Diffusion's UNets."""
        return "lora" in self.techniques and "unet" in self.weighted

    def ships_lora(self, dataset_name: str, variant: str | None) -> bool:
        """Whether the model comes with a LoRA for a data set, which one trained here never replaces."""
        shipped = self._loras.get((dataset_name, variant))
        return shipped is not None and shipped.exists()

    def lora_variants(self, dataset_name: str) -> tuple[str, ...]:
        """Named variants that `lora_folder` has for a data set."""
        shipped = [variant for name, variant in self._loras if name == dataset_name and variant]
        trained = trained_variants(self.name, dataset_name, self.weights_root)
        return tuple(dict.fromkeys([*shipped, *trained]))
