"""The named layers of an unconditional UNet (diffusers' ``UNet2DModel``), as data, from its ``config.json``. No torch.

Names are those of `featstore.models.layers`, as far as such a UNet has them:

- ``{down,up}-level{i}-repeat{j}-res-{out,increment}``, ``mid-repeat{j}-res-..``: ResNet blocks.
- ``..-repeat{j}-vit-out``, ``mid-vit-out``: what attention gives, with what it was given added.
- ``..-vit-self-{q,k,v}``: its projections, all heads side by side; ``..-vit-self-map``: its probabilities, mean over
  heads, one channel a key position. Attention is a module of its own here, without a transformer around it that
  could have several blocks: no ``block{k}`` stands in its names.
- ``{down,up}-level{i}-{downsampler,upsampler}-out``, whether the sampler is a convolution or a ResNet block;
  ``unet-in``, ``unet-after-conv-in``, ``unet-out``.
- ``attn-{down,mid,up}-self-{image side / map side}``: probabilities, mean over heads and over all attention of that
  stage and size.

guided-diffusion, and ddpm-segmentation after it, counts the decoder's blocks through all levels: block ``b`` is
repeat ``b % n`` of level ``b // n``, where a level has ``n`` (``layers_per_block`` + 1) repeats. Its output is what
comes after the repeat's attention, and after the upsampler where the repeat is the last of a level that has one.
`decoder_blocks` gives those layers in their order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from featstore.errors import BadRequestError
from featstore.models.layers import Read, Tap

SEGMENTATION_BLOCKS = (5, 6, 7, 8, 12)
"""Decoder blocks that ddpm-segmentation reads (Baranchuk et al., ICLR 2022), at timesteps 50, 150 and 250."""

_DOWN_TYPES = {"DownBlock2D": False, "AttnDownBlock2D": True, "ResnetDownsampleBlock2D": False}
_UP_TYPES = {"UpBlock2D": False, "AttnUpBlock2D": True, "ResnetUpsampleBlock2D": False}
_MID_TYPES = ("UNetMidBlock2D", None)
_OLD_PREFIX = "UNetRes"
"""Early versions of diffusers wrote it before the names of blocks."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Level:
    """One down, mid or up block of the UNet."""

    stage: str
    prefix: str
    module: str
    repeats: int
    attends: bool
    channels: int
    factor: int
    sampler: str | None


def taps(unet_config: Mapping[str, Any]) -> dict[str, Tap]:
    """All layers of a UNet by name, in the order in which a forward pass makes them, aggregated attention last.

    Args:
        unet_config: content of the UNet's ``config.json``.

    Raises:
        BadRequestError: if the UNet has blocks of other kinds.
    """
    first = unet_config["block_out_channels"][0]
    found = [
        _tap("unet-in", "conv_in", Read.INPUT, unet_config["in_channels"], 1),
        _tap("unet-after-conv-in", "conv_in", Read.OUTPUT, first, 1),
    ]
    members: dict[tuple[str, int], list[str]] = {}
    for level in _levels(unet_config):
        found.extend(_level_taps(level, unet_config))
        modules = [module for module, _ in _attentions(level)]
        if modules:
            members.setdefault((level.stage, level.factor), []).extend(modules)
    found.append(_tap("unet-out", "conv_out", Read.OUTPUT, unet_config["out_channels"], 1))
    for (stage, factor), names in members.items():
        layer = f"attn-{stage}-self-{factor}"
        found.append(Tap(layer=layer, modules=tuple(names), read=Read.ATTENTION, channels=0, factor=factor))
    return {tap.layer: tap for tap in found}


def presets(unet_config: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Named choices of layers, the default one first.

    ``ddpm-segmentation``, where the UNet is deep enough: the decoder blocks that the paper reads. ``legacy``: the last
    output of every level of the upsampling stage. ``full``: every layer but the aggregated attention, maps included.
    """
    known, blocks = taps(unet_config), decoder_blocks(unet_config)
    ups = [level for level in _levels(unet_config) if level.stage == "up"]
    result: dict[str, tuple[str, ...]] = {}
    if len(blocks) > max(SEGMENTATION_BLOCKS):
        result["ddpm-segmentation"] = tuple(blocks[block] for block in SEGMENTATION_BLOCKS)
    result["legacy"] = tuple(_outputs(level)[-1] for level in ups)
    result["full"] = tuple(name for name in known if not name.startswith("attn-"))
    return result


def decoder_blocks(unet_config: Mapping[str, Any]) -> tuple[str, ...]:
    """The layer that each block of guided-diffusion's decoder (its ``output_blocks``) puts out, in their order."""
    ups = (level for level in _levels(unet_config) if level.stage == "up")
    return tuple(layer for level in ups for layer in _outputs(level))


def _outputs(level: _Level) -> list[str]:
    """The layer that each repeat of a level ends with."""
    kind = "vit" if level.attends else "res"
    names = [f"{level.prefix}-repeat{j}-{kind}-out" for j in range(level.repeats)]
    if level.sampler:
        names[-1] = f"{level.prefix}-{level.sampler}-out"
    return names


def _tap(layer: str, module: str, read: Read, channels: int, factor: int) -> Tap:
    return Tap(layer=layer, modules=(module,), read=read, channels=channels, factor=factor)


def _levels(config: Mapping[str, Any]) -> Iterator[_Level]:
    """The blocks of the UNet in the order of the forward pass."""
    widths = list(config["block_out_channels"])
    last, repeats = len(widths) - 1, config.get("layers_per_block", 2)
    factor = 1
    for i, kind in enumerate(config["down_block_types"]):
        yield _Level(
            stage="down", prefix=f"down-level{i}", module=f"down_blocks.{i}", repeats=repeats,
            attends=_attends(kind, _DOWN_TYPES), channels=widths[i], factor=factor,
            sampler=None if i == last else "downsampler",
        )  # fmt: skip
        factor *= 1 if i == last else 2
    middle = config.get("mid_block_type", _MID_TYPES[0])
    if middle not in _MID_TYPES:
        raise _unknown_block(middle, _MID_TYPES)
    if middle is not None:
        yield _Level(
            stage="mid", prefix="mid", module="mid_block", repeats=2,
            attends=config.get("add_attention", True), channels=widths[-1], factor=factor, sampler=None,
        )  # fmt: skip
    for i, kind in enumerate(config["up_block_types"]):
        yield _Level(
            stage="up", prefix=f"up-level{i}", module=f"up_blocks.{i}", repeats=repeats + 1,
            attends=_attends(kind, _UP_TYPES), channels=widths[::-1][i], factor=factor,
            sampler=None if i == last else "upsampler",
        )  # fmt: skip
        factor //= 1 if i == last else 2


def _attends(kind: str, known: Mapping[str, bool]) -> bool:
    name = str(kind).removeprefix(_OLD_PREFIX)
    if name not in known:
        raise _unknown_block(kind, known)
    return known[name]


def _unknown_block(kind: object, known: Any) -> BadRequestError:
    names = ", ".join(str(name) for name in known)
    return BadRequestError(f"the UNet has a block of type {kind!r}; those that have named layers: {names}")


def _attentions(level: _Level) -> list[tuple[str, str]]:
    """Dotted name and layer prefix of the level's attention; the middle block has one, after its first ResNet block."""
    if not level.attends:
        return []
    if level.stage == "mid":
        return [(f"{level.module}.attentions.0", "mid-vit")]
    return [(f"{level.module}.attentions.{j}", f"{level.prefix}-repeat{j}-vit") for j in range(level.repeats)]


def _level_taps(level: _Level, config: Mapping[str, Any]) -> Iterator[Tap]:
    c, f = level.channels, level.factor
    attentions = _attentions(level)
    head = config.get("attention_head_dim", 8) or c
    for j in range(level.repeats):
        module, layer = f"{level.module}.resnets.{j}", f"{level.prefix}-repeat{j}-res"
        yield _tap(f"{layer}-increment", f"{module}.conv2", Read.BRANCH, c, f)
        yield _tap(f"{layer}-out", module, Read.OUTPUT, c, f)
        if j < len(attentions):
            attention, prefix = attentions[j]
            for name in ("q", "k", "v"):
                yield _tap(f"{prefix}-self-{name}", f"{attention}.to_{name}", Read.TOKENS, c // head * head, f)
            yield _tap(f"{prefix}-self-map", attention, Read.ATTENTION, 0, f)
            yield _tap(f"{prefix}-out", attention, Read.OUTPUT, c, f)
    if level.sampler:
        side = f * 2 if level.sampler == "downsampler" else f // 2
        yield _tap(f"{level.prefix}-{level.sampler}-out", f"{level.module}.{level.sampler}s.0", Read.OUTPUT, c, side)
