"""The named layers of an SD-shaped UNet, as data: derived from its ``config.json``, without torch.

Names (those of the seed code, known to its users):

- ``{down,up}-level{i}-repeat{j}-res-{out,increment}``: a ResNet block's output, and what it adds to its
  shortcut: ``out = shortcut / output_scale_factor + increment``.
- ``..-vit-out``: a transformer's output; ``..-vit-block{k}-out``: that of one of its blocks;
  ``..-vit-block{k}-{self-q,self-k,self-v,cross-q,ffn-inner}``: projections inside it, all heads side by side
  (ffn-inner: after the gate); ``..-vit-block{k}-{self,cross}-map``: attention probabilities, mean over heads,
  one channel per key token.
- ``{down,up}-level{i}-{downsampler,upsampler}-out``; ``mid-repeat{j}-res-..``, ``mid-vit-..``;
  ``unet-in``, ``unet-after-conv-in``, ``unet-out``.
- ``attn-{down,mid,up}-{cross,self}-{latent side / map side}``: attention probabilities, mean over heads and
  over all layers of that stage and size.

"level" is the index of the block among the down or up blocks, "repeat" the index within it. Cross-attention keys
and values are not layers: they are functions of the text alone and have no place in the image.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from featstore.errors import BadRequestError

Shape = tuple[int, int, int]
"""(C, H, W) of one image's map."""

_DOWN_TYPES = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
_UP_TYPES = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}
_MID_TYPES = {None: None, "UNetMidBlock2D": False, "UNetMidBlock2DCrossAttn": True}
_FFN_FACTOR = 4


class Read(enum.Enum):
    """How a layer's map is read at its module."""

    OUTPUT = "output"
    """The module's output, (B, C, H, W)."""
    INPUT = "input"
    """The module's first input, (B, C, H, W)."""
    BRANCH = "branch"
    """The module's output divided by the ``output_scale_factor`` of the ResNet block it is in."""
    TOKENS = "tokens"
    """The module's output (B, H * W, C), turned into a map."""
    ATTENTION = "attention"
    """Mean attention probabilities over the heads of all attention modules named, one channel a key token."""


class Keys(enum.Enum):
    """Which key tokens of an attention module a map shows."""

    ALL = "all"
    """All of them."""
    IMAGE = "image"
    """Those of the image, in joint attention over image and text."""
    TEXT = "text"
    """Those of the text, in joint attention over image and text."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tap:
    """Where one layer is read: declared data, resolved to hooks by `featstore.extraction.taps`."""

    layer: str
    """Public name."""
    modules: tuple[str, ...]
    """Dotted names of modules of a stock UNet or transformer; one, except for aggregated attention."""
    read: Read
    """What is taken there."""
    channels: int
    """Channels of the map; 0: as many as the map has positions (self-attention)."""
    factor: int
    """Latent side / map side."""
    output: int = 0
    """Which of the module's outputs is taken, where it returns several."""
    keys: Keys = Keys.ALL
    """Which keys an attention map shows; rows of maps of some of them add up to less than 1."""

    def shape(self, latent_height: int, latent_width: int, prompt_chunks: int = 1) -> Shape:
        """(C, H, W) of one image's map for latents of this size and texts of so many chunks."""
        height, width = latent_height // self.factor, latent_width // self.factor
        # The channels of attention are key tokens; those of cross-attention are the text's.
        chunks = prompt_chunks if self.read is Read.ATTENTION else 1
        return self.channels * chunks or height * width, height, width


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Level:
    """One down, mid or up block of the UNet."""

    stage: str
    prefix: str
    module: str
    repeats: int
    depths: tuple[int, ...]
    """Blocks of each transformer; empty: the level has none."""
    channels: int
    factor: int
    sampler: str | None


def taps(unet_config: Mapping[str, Any], *, text_tokens: int) -> dict[str, Tap]:
    """All layers of a UNet by name, in the order in which a forward pass makes them, aggregated attention last.

    Args:
        unet_config: content of the UNet's ``config.json``.
        text_tokens: length of an encoded prompt, the number of channels of cross-attention maps.

    Raises:
        BadRequestError: if the UNet has blocks of other kinds than Stable Diffusion's.
    """
    first = unet_config["block_out_channels"][0]
    found = [
        _tap("unet-in", "conv_in", Read.INPUT, unet_config["in_channels"], 1),
        _tap("unet-after-conv-in", "conv_in", Read.OUTPUT, first, 1),
    ]
    members: dict[tuple[str, int, str], list[str]] = {}
    for level in _levels(unet_config):
        found.extend(_level_taps(level, text_tokens))
        for name, depth in _transformers(level):
            for kind, attention in (("cross", "attn2"), ("self", "attn1")):
                blocks = [f"{name}.transformer_blocks.{k}.{attention}" for k in range(depth)]
                members.setdefault((level.stage, level.factor, kind), []).extend(blocks)
    found.append(_tap("unet-out", "conv_out", Read.OUTPUT, unet_config["out_channels"], 1))
    for (stage, factor, kind), modules in members.items():
        channels = text_tokens if kind == "cross" else 0
        layer = f"attn-{stage}-{kind}-{factor}"
        found.append(Tap(layer=layer, modules=tuple(modules), read=Read.ATTENTION, channels=channels, factor=factor))
    return {tap.layer: tap for tap in found}


PRACTICAL = (
    "up-level1-repeat1-vit-block0-cross-q",
    "up-level1-repeat2-res-out",
    "up-level2-repeat1-vit-block0-cross-q",
    "up-level3-repeat0-vit-block0-self-k",
)
"""The seed code's hand-picked layers of Stable Diffusion 1."""


def presets(
    unet_config: Mapping[str, Any], *, text_tokens: int, practical: tuple[str, ...] = PRACTICAL
) -> dict[str, tuple[str, ...]]:
    """Named choices of layers.

    ``legacy``: the last output of every level of the upsampling stage, and its cross-attention at half and a
    quarter of the latent side (the seed code's choice). ``practical``: hand-picked layers, where the UNet has them
    all. ``full``: every layer but the aggregated attention, maps included.
    """
    known = taps(unet_config, text_tokens=text_tokens)
    ups = [level for level in _levels(unet_config) if level.stage == "up"]
    legacy = [f"{level.prefix}-upsampler-out" for level in ups if level.sampler]
    last = ups[-1]
    legacy.append(f"{last.prefix}-repeat{last.repeats - 1}-{'vit' if last.depths else 'res'}-out")
    legacy += [name for name in ("attn-up-cross-2", "attn-up-cross-4") if name in known]
    result = {"legacy": tuple(legacy)}
    if all(name in known for name in practical):
        result["practical"] = practical
    result["full"] = tuple(name for name in known if not name.startswith("attn-"))
    return result


def _tap(layer: str, module: str, read: Read, channels: int, factor: int) -> Tap:
    return Tap(layer=layer, modules=(module,), read=read, channels=channels, factor=factor)


def _levels(config: Mapping[str, Any]) -> Iterator[_Level]:
    """The blocks of the UNet in the order of the forward pass."""
    widths = list(config["block_out_channels"])
    count = len(widths)
    repeats = _per_level(config.get("layers_per_block", 2), count)
    depths = _per_level(config.get("transformer_layers_per_block", 1), count)
    up_depths = config.get("reverse_transformer_layers_per_block") or depths[::-1]
    factor = 1
    for i, kind in enumerate(config["down_block_types"]):
        attends, last = _attends(kind, _DOWN_TYPES), i == count - 1
        yield _Level(
            stage="down", prefix=f"down-level{i}", module=f"down_blocks.{i}", repeats=repeats[i],
            depths=_depths(depths[i], repeats[i]) if attends else (), channels=widths[i], factor=factor,
            sampler=None if last else "downsampler",
        )  # fmt: skip
        factor *= 1 if last else 2
    middle = config.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    attends_mid = _attends(middle, _MID_TYPES)
    if attends_mid is not None:
        yield _Level(
            stage="mid", prefix="mid", module="mid_block", repeats=2 if attends_mid else 1,
            depths=_depths(depths[-1], 1) if attends_mid else (), channels=widths[-1], factor=factor, sampler=None,
        )  # fmt: skip
    for i, kind in enumerate(config["up_block_types"]):
        attends, last = _attends(kind, _UP_TYPES), i == count - 1
        yield _Level(
            stage="up", prefix=f"up-level{i}", module=f"up_blocks.{i}", repeats=repeats[::-1][i] + 1,
            depths=_depths(up_depths[i], repeats[::-1][i] + 1) if attends else (), channels=widths[::-1][i],
            factor=factor,
            sampler=None if last else "upsampler",
        )  # fmt: skip
        factor //= 1 if last else 2


def _per_level(value: Any, count: int) -> list[Any]:
    return [value] * count if isinstance(value, int) else list(value)


def _depths(value: int | Sequence[int], transformers: int) -> tuple[int, ...]:
    """Blocks of each of a level's transformers, for which the configuration has one number or one each."""
    return (value,) * transformers if isinstance(value, int) else tuple(value[:transformers])


def _attends(kind: str | None, known: Mapping[Any, Any]) -> Any:
    if kind not in known:
        names = ", ".join(str(name) for name in known)
        raise BadRequestError(f"the UNet has a block of type {kind!r}; those that have named layers: {names}")
    return known[kind]


def _transformers(level: _Level) -> list[tuple[str, int]]:
    """Dotted names of the level's transformers, each with its number of blocks.

    The middle block has one, between its two ResNet blocks.
    """
    return [(f"{level.module}.attentions.{j}", depth) for j, depth in enumerate(level.depths)]


def _level_taps(level: _Level, text_tokens: int) -> Iterator[Tap]:
    c, f = level.channels, level.factor
    transformers = _transformers(level)
    for j in range(level.repeats):
        module, layer = f"{level.module}.resnets.{j}", f"{level.prefix}-repeat{j}-res"
        yield _tap(f"{layer}-increment", f"{module}.conv2", Read.BRANCH, c, f)
        yield _tap(f"{layer}-out", module, Read.OUTPUT, c, f)
        if j < len(transformers):
            prefix = "mid-vit" if level.stage == "mid" else f"{level.prefix}-repeat{j}-vit"
            transformer, depth = transformers[j]
            for k in range(depth):
                yield from _block_taps(f"{prefix}-block{k}", f"{transformer}.transformer_blocks.{k}", c, f, text_tokens)
            yield _tap(f"{prefix}-out", transformer, Read.OUTPUT, c, f)
    if level.sampler:
        side = f * 2 if level.sampler == "downsampler" else f // 2
        yield _tap(f"{level.prefix}-{level.sampler}-out", f"{level.module}.{level.sampler}s.0", Read.OUTPUT, c, side)


def _block_taps(layer: str, module: str, c: int, f: int, text_tokens: int) -> Iterator[Tap]:
    for name in ("q", "k", "v"):
        yield _tap(f"{layer}-self-{name}", f"{module}.attn1.to_{name}", Read.TOKENS, c, f)
    yield _tap(f"{layer}-self-map", f"{module}.attn1", Read.ATTENTION, 0, f)
    yield _tap(f"{layer}-cross-q", f"{module}.attn2.to_q", Read.TOKENS, c, f)
    yield _tap(f"{layer}-cross-map", f"{module}.attn2", Read.ATTENTION, text_tokens, f)
    yield _tap(f"{layer}-ffn-inner", f"{module}.ff.net.0", Read.TOKENS, _FFN_FACTOR * c, f)
    yield _tap(f"{layer}-out", module, Read.TOKENS, c, f)
