"""Checkpoints of guided-diffusion's ``UNetModel``, read from their keys and shapes: what they are in diffusers' words.

A state dict does not say how the UNet was built, but its keys and shapes do, nearly: only the width of an attention
head and the size of the images cannot be told from them. No torch.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from featstore.errors import BadRequestError

Shapes = Mapping[str, tuple[int, ...]]
"""Shape of each tensor of a state dict."""

_GROUPS = 32
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ATTENTION = {"norm": "group_norm", "proj_out": "to_out.0"}
_QKV = ("to_q", "to_k", "to_v")
_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What the keys and shapes of a checkpoint tell."""

    in_channels: int
    """Channels of the images."""
    out_channels: int
    """Channels of the prediction: noise, and as many again where the variance is learned."""
    widths: tuple[int, ...]
    """Channels of each level, from the largest maps on."""
    attends: tuple[bool, ...]
    """Whether each level has attention."""
    resnets: int
    """ResNet blocks of an encoder's level; a decoder's has one more."""
    scale_shift: bool
    """Whether the timestep scales and shifts, rather than being added."""
    resnet_samplers: bool
    """Whether ResNet blocks change the size of maps, rather than convolutions."""

    def unet_config(self, *, image_size_px: int, head_channels: int) -> dict[str, Any]:
        """Arguments of diffusers' ``UNet2DModel`` that make the same network.

        Raises:
            BadRequestError: if a size or width of heads does not fit the architecture.
        """
        step = 2 ** (len(self.widths) - 1)
        if image_size_px < step or image_size_px % step:
            raise BadRequestError(f"--image-size {image_size_px} is no multiple of {step}, which the UNet needs")
        heads = [width for width, attends in zip(self.widths, self.attends, strict=True) if attends]
        for width in (*heads, self.widths[-1]):
            if head_channels < 1 or width % head_channels:
                raise BadRequestError(
                    f"--head-channels {head_channels} does not divide attention of {width} channels",
                    hint="it is `num_head_channels` of the training, or the width divided by its `num_heads`",
                )
        plain = ("Resnet{}sampleBlock2D", "{}Block2D")[0 if self.resnet_samplers else 1]
        kinds = ["Attn{}Block2D" if attends else plain for attends in self.attends]
        sampler = "resnet" if self.resnet_samplers else "conv"
        return {
            "sample_size": image_size_px,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "block_out_channels": list(self.widths),
            "layers_per_block": self.resnets,
            "down_block_types": [kind.format("Down") for kind in kinds],
            "up_block_types": [kind.format("Up") for kind in reversed(kinds)],
            "downsample_type": sampler,
            "upsample_type": sampler,
            "downsample_padding": 1,
            "attention_head_dim": head_channels,
            "norm_num_groups": _GROUPS,
            "attn_norm_num_groups": _GROUPS,
            "norm_eps": 1e-5,
            "resnet_time_scale_shift": "scale_shift" if self.scale_shift else "default",
            "add_attention": True,
            "center_input_sample": False,
            "time_embedding_type": "positional",
            "flip_sin_to_cos": True,
            "freq_shift": 0,
        }


def architecture(shapes: Shapes) -> Architecture:
    """What a checkpoint holds.

    Raises:
        BadRequestError: if it is no unconditional UNet of guided-diffusion; names the key that says so.
    """
    _refuse_others(shapes)
    decoders = sorted({int(key.split(".")[1]) for key in shapes if re.match(r"output_blocks\.\d+\.", key)})
    count = len(decoders)
    ends = [block for block in decoders if _upsampler(shapes, block)]
    repeats = ends[0] + 1 if ends else count
    if repeats < 2 or count % repeats:
        raise odd_key(f"output_blocks.{decoders[-1] if decoders else 0}.0.in_layers.0.weight", "makes uneven levels")
    resnets, levels = repeats - 1, count // repeats
    firsts = [1 + level * repeats for level in range(levels)]
    widths = tuple(_shape(shapes, f"input_blocks.{block}.0.out_layers.3.weight", 4)[0] for block in firsts)
    for block, width in zip(firsts, widths, strict=True):
        if width % _GROUPS:
            raise odd_key(f"input_blocks.{block}.0.out_layers.3.weight", f"has {width} channels, no multiple of 32")
    stem, base = _shape(shapes, "input_blocks.0.0.weight", 4), _shape(shapes, "time_embed.0.weight", 2)
    if base[1] != stem[0] or stem[0] != widths[0]:
        raise odd_key("time_embed.0.weight", f"is made for {base[1]} channels, the first level has {widths[0]}")
    if stem[1] != 3:
        raise odd_key("input_blocks.0.0.weight", f"takes {stem[1]} channels; models of RGB images are taken")
    return Architecture(
        in_channels=stem[1],
        out_channels=_shape(shapes, "out.2.weight", 4)[0],
        widths=widths,
        attends=tuple(any(key.startswith(f"input_blocks.{block}.1.") for key in shapes) for block in firsts),
        resnets=resnets,
        scale_shift=_shape(shapes, "input_blocks.1.0.emb_layers.1.weight", 2)[0] == 2 * widths[0],
        resnet_samplers=levels == 1 or f"input_blocks.{repeats}.0.in_layers.0.weight" in shapes,
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a tensor of diffusers' UNet comes from."""

    key: str
    """Key in guided-diffusion's state dict."""
    part: int | None = None
    """0, 1, 2: the rows of queries, keys or values, which lie together in one tensor, head by head; None: all."""


def origins(made: Architecture) -> dict[str, Origin]:
    """Where each tensor of diffusers' state dict comes from; shortcuts of all ResNet blocks are listed."""
    found: dict[str, Origin] = {}
    for old, new in _modules(made):
        for kind in ("weight", "bias"):
            found[f"{new}.{kind}"] = Origin(key=f"{old}.{kind}")
    for old, new in _attentions(made):
        for part, name in enumerate(_QKV):
            for kind in ("weight", "bias"):
                found[f"{new}.{name}.{kind}"] = Origin(key=f"{old}.qkv.{kind}", part=part)
    return found


def rows_of_part(width: int, head_channels: int, part: int) -> list[slice]:
    """Rows of the queries (0), keys (1) or values (2) of each head in a ``qkv`` of 3 x ``width`` rows.

    Heads are split before queries, keys and values are (guided-diffusion's ``QKVAttentionLegacy``): a head's three
    parts lie side by side.
    """
    starts = range(part * head_channels, 3 * width, 3 * head_channels)
    return [slice(start, start + head_channels) for start in starts]


def odd_key(key: str, what: str) -> BadRequestError:
    """The error for a key by which a checkpoint is none that can be converted."""
    return BadRequestError(
        f"the checkpoint does not fit: {key!r} {what}",
        hint="state dicts of guided-diffusion's unconditional UNetModel are converted, such as its LSUN ones and "
        "those of ddpm-segmentation",
    )


def _refuse_others(shapes: Shapes) -> None:
    for key in ("time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.1.qkv.weight", "out.2.weight"):
        if key not in shapes:
            raise odd_key(key, f"is not among its {len(shapes)} keys, of which one is {next(iter(shapes), None)!r}")
    if "label_emb.weight" in shapes:
        raise odd_key("label_emb.weight", "makes it a model of classes, which an image alone does not give")


def _shape(shapes: Shapes, key: str, axes: int) -> tuple[int, ...]:
    if key not in shapes:
        raise odd_key(key, "is missing")
    if len(shapes[key]) != axes or not math.prod(shapes[key]):
        raise odd_key(key, f"has shape {tuple(shapes[key])}, where {axes} axes are expected")
    return shapes[key]


def _upsampler(shapes: Shapes, block: int) -> bool:
    """Whether a block of the decoder ends with an upsampler: a module beside its ResNet block and attention."""
    tails = ("in_layers.0.weight", "conv.weight")
    return any(f"output_blocks.{block}.{place}.{tail}" in shapes for place in (1, 2) for tail in tails)


def _blocks(made: Architecture) -> Iterator[tuple[str, str, str]]:
    """Modules of the UNet: prefix in guided-diffusion, prefix in diffusers, kind."""
    last, repeats = len(made.widths) - 1, made.resnets + 1
    sampler = "resnet" if made.resnet_samplers else "convolution"
    for i, attends in enumerate(made.attends):
        for j in range(made.resnets):
            block = f"input_blocks.{1 + i * repeats + j}"
            yield f"{block}.0", f"down_blocks.{i}.resnets.{j}", "resnet"
            if attends:
                yield f"{block}.1", f"down_blocks.{i}.attentions.{j}", "attention"
        if i < last:
            yield f"input_blocks.{(i + 1) * repeats}.0", f"down_blocks.{i}.downsamplers.0", sampler
    for j in range(2):
        yield f"middle_block.{2 * j}", f"mid_block.resnets.{j}", "resnet"
    yield "middle_block.1", "mid_block.attentions.0", "attention"
    for i, attends in enumerate(reversed(made.attends)):
        for j in range(repeats):
            block = f"output_blocks.{i * repeats + j}"
            yield f"{block}.0", f"up_blocks.{i}.resnets.{j}", "resnet"
            if attends:
                yield f"{block}.1", f"up_blocks.{i}.attentions.{j}", "attention"
        if i < last:
            yield f"{block}.{2 if attends else 1}", f"up_blocks.{i}.upsamplers.0", sampler


def _modules(made: Architecture) -> Iterator[tuple[str, str]]:
    """Modules that have a counterpart: prefix in guided-diffusion, prefix in diffusers."""
    yield from _ENDS.items()
    for old, new, kind in _blocks(made):
        if kind == "convolution":
            yield f"{old}.{'op' if 'downsamplers' in new else 'conv'}", f"{new}.conv"
        else:
            names = _RESNET if kind == "resnet" else _ATTENTION
            yield from ((f"{old}.{a}", f"{new}.{b}") for a, b in names.items())


def _attentions(made: Architecture) -> Iterator[tuple[str, str]]:
    return ((old, new) for old, new, kind in _blocks(made) if kind == "attention")
