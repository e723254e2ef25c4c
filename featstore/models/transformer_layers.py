"""The named layers of a diffusion transformer, as data: derived from its ``config.json``, without torch.

Names follow those of transformers inside a UNet (see `featstore.models.layers`), without a stage, a level or a repeat:

- ``latent-in``: what is noised, as it goes in; ``patch-embed-out``: its patches, embedded, with their positions.
- ``vit-block{i}-out``: a block's output; ``vit-block{i}-{self-q,self-k,self-v,cross-q,ffn-inner}``: projections inside
  it, all heads side by side (queries and keys before their norms, where a model has some; ffn-inner: after the
  activation); ``vit-block{i}-{self,cross}-map``: attention probabilities, after the norms and under the mask that the
  model gives, mean over heads, one channel per key token.
- Joint attention (Stable Diffusion 3) has one softmax over the tokens of the image and of the text. ``self-q``,
  ``self-k`` and ``self-v`` are those of the image; ``self-map`` is the part of the probabilities that falls on the
  image, ``cross-map`` that on the text: together, not each, they add up to 1. Its query is one and the same for both,
  so there is no ``cross-q``.
- ``vit-block{i}-self2-{q,k,v,map}``: the second attention, of the image alone, in blocks that have one.
- ``attn-{self,cross}-{latent side / map side}``: attention probabilities, mean over heads and over all blocks (the
  second attention apart). All maps of a transformer have one size, so the number is the side of its patches.

Tokens become maps in the order of the patches, row by row. What a transformer ends in is no map of tokens and no
layer. Keys and values of the text, and what becomes of it from block to block, have no place in the image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator

from featstore.models.layers import Keys, Read, Tap

_FFN_FACTOR = 4
_QUARTERS = 4


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Transformer:
    """What the layers of a stock transformer follow from."""

    blocks: int
    """Number of ``transformer_blocks``."""
    width: int
    """Channels of the image's tokens."""
    latent_channels: int
    """Channels of what is noised."""
    patch: int
    """Latent side / token side."""
    text_tokens: int
    """Length of an encoded prompt."""
    joint: bool
    """One attention over image and text (``attn``) instead of one each (``attn1``, ``attn2``)."""
    second: Collection[int] = ()
    """Blocks with a second attention, of the image alone (``attn2``); in joint transformers only."""


def taps(transformer: Transformer) -> dict[str, Tap]:
    """All layers by name, in the order in which a forward pass makes them, aggregated attention last."""
    t = transformer
    found = [
        _tap("latent-in", "pos_embed", Read.INPUT, t.latent_channels, 1),
        _tap("patch-embed-out", "pos_embed", Read.TOKENS, t.width, t.patch),
    ]
    for block in range(t.blocks):
        found.extend(_block_taps(t, block))
    for kind in ("cross", "self"):
        members = [tap for tap in found if tap.layer.endswith(f"-{kind}-map")]
        modules = tuple(module for tap in members for module in tap.modules)
        found.append(dataclasses.replace(members[0], layer=f"attn-{kind}-{t.patch}", modules=modules))
    return {tap.layer: tap for tap in found}


def presets(transformer: Transformer) -> dict[str, tuple[str, ...]]:
    """Named choices of layers.

    ``legacy``: the outputs of the blocks at a quarter, a half and three quarters of the depth and of the last one, and
    the aggregated cross-attention: what stands for the UNet's preset of that name, which takes the outputs of the four
    levels of its upsampling stage. ``full``: every layer but the aggregated attention, maps included.
    """
    quarters = [max(transformer.blocks * part // _QUARTERS - 1, 0) for part in range(1, _QUARTERS + 1)]
    legacy = [*(f"vit-block{block}-out" for block in dict.fromkeys(quarters)), f"attn-cross-{transformer.patch}"]
    full = [name for name in taps(transformer) if not name.startswith("attn-")]
    return {"legacy": tuple(legacy), "full": tuple(full)}


def _block_taps(t: Transformer, block: int) -> Iterator[Tap]:
    module, layer = f"transformer_blocks.{block}", f"vit-block{block}"
    attention = f"{module}.attn" if t.joint else f"{module}.attn1"
    yield from _attention_taps(f"{layer}-self", attention, t, Keys.IMAGE if t.joint else Keys.ALL)
    if t.joint:
        yield _map(f"{layer}-cross-map", attention, t, t.text_tokens, Keys.TEXT)
        if block in t.second:
            yield from _attention_taps(f"{layer}-self2", f"{module}.attn2", t, Keys.ALL)
    else:
        yield _tap(f"{layer}-cross-q", f"{module}.attn2.to_q", Read.TOKENS, t.width, t.patch)
        yield _map(f"{layer}-cross-map", f"{module}.attn2", t, t.text_tokens, Keys.ALL)
    yield _tap(f"{layer}-ffn-inner", f"{module}.ff.net.0", Read.TOKENS, _FFN_FACTOR * t.width, t.patch)
    # A joint block returns the text's tokens, then the image's.
    yield dataclasses.replace(_tap(f"{layer}-out", module, Read.TOKENS, t.width, t.patch), output=1 if t.joint else 0)


def _attention_taps(layer: str, module: str, t: Transformer, keys: Keys) -> Iterator[Tap]:
    for name in ("q", "k", "v"):
        yield _tap(f"{layer}-{name}", f"{module}.to_{name}", Read.TOKENS, t.width, t.patch)
    yield _map(f"{layer}-map", module, t, 0, keys)


def _map(layer: str, module: str, t: Transformer, channels: int, keys: Keys) -> Tap:
    return dataclasses.replace(_tap(layer, module, Read.ATTENTION, channels, t.patch), keys=keys)


def _tap(layer: str, module: str, read: Read, channels: int, factor: int) -> Tap:
    return Tap(layer=layer, modules=(module,), read=read, channels=channels, factor=factor)
