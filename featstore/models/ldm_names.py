"""How the Stable Diffusion checkpoints of the first hour (CompVis, Stability) name what diffusers names otherwise.

Their names live on in merged checkpoints and in the LoRAs that kohya's scripts train for SDXL. No torch.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Collection, Iterator

_PLAIN = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_IN_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_IN_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_OPEN_CLIP_PLAIN = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """Where a checkpoint holds a parameter."""

    key: str
    """Name of the tensor."""
    third: int | None = None
    """Which third of its rows is the parameter; None: all of them."""
    transposed: bool = False
    """Whether its rows are the parameter's columns."""


def unet_names(modules: Collection[str]) -> dict[str, str]:
    """The old name of each module of a diffusers UNet, by its name.

    Args:
        modules: names of the UNet's modules that have parameters.
    """
    blocks = dict(_block_names(modules))
    names = {}
    for module in modules:
        if module in _PLAIN:
            names[module] = _PLAIN[module]
            continue
        # down_blocks.0.resnets.1 and mid_block.resnets.1 are blocks; what follows is inside them.
        parts = module.split(".")
        depth = 3 if parts[0] == "mid_block" else 4
        block, inner = ".".join(parts[:depth]), ".".join(parts[depth:])
        if block in blocks:
            inner = _IN_RESNET.get(inner, inner) if parts[depth - 2] == "resnets" else inner
            # A downsampler's convolution is the block itself.
            inner = "" if parts[depth - 2] == "downsamplers" else inner
            names[module] = f"{blocks[block]}.{inner}".rstrip(".")
    return names


def _block_names(modules: Collection[str]) -> Iterator[tuple[str, str]]:
    def has(prefix: str) -> bool:
        return any(module.startswith(f"{prefix}.") for module in modules)

    def count(prefix: str) -> int:
        return next(number for number in itertools.count() if not has(f"{prefix}.{number}"))

    at = 1
    for level in range(count("down_blocks")):
        block = f"down_blocks.{level}"
        for layer in range(count(f"{block}.resnets")):
            yield f"{block}.resnets.{layer}", f"input_blocks.{at}.0"
            yield f"{block}.attentions.{layer}", f"input_blocks.{at}.1"
            at += 1
        if has(f"{block}.downsamplers.0"):
            yield f"{block}.downsamplers.0", f"input_blocks.{at}.0.op"
            at += 1
    yield from (("mid_block.resnets.0", "middle_block.0"), ("mid_block.attentions.0", "middle_block.1"))
    yield "mid_block.resnets.1", "middle_block.2"
    at = 0
    for level in range(count("up_blocks")):
        block = f"up_blocks.{level}"
        for layer in range(count(f"{block}.resnets")):
            yield f"{block}.resnets.{layer}", f"output_blocks.{at}.0"
            yield f"{block}.attentions.{layer}", f"output_blocks.{at}.1"
            at += 1
        # It stands in the last layer's list, after the attention if there is one.
        yield f"{block}.upsamplers.0", f"output_blocks.{at - 1}.{2 if has(f'{block}.attentions.0') else 1}"


def text_stored(parameter: str, prefix: str, *, open_clip: bool) -> list[Stored]:
    """Where a checkpoint may hold a parameter of a CLIP text encoder; the first that is there does.

    Args:
        parameter: its name in transformers, without ``text_model.``.
        prefix: what the names of the text encoder begin with in the checkpoint.
        open_clip: whether the checkpoint has it as OpenCLIP names it, not as transformers does.
    """
    if not open_clip:
        return [Stored(key=f"{prefix}text_model.{parameter}"), Stored(key=f"{prefix}{parameter}")]
    if parameter in _OPEN_CLIP_PLAIN:
        return [Stored(key=prefix + _OPEN_CLIP_PLAIN[parameter])]
    if parameter == "text_projection.weight":
        return [Stored(key=f"{prefix}text_projection", transposed=True)]
    match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", parameter)
    if match is None:
        return []
    layer, module, kind = match.groups()
    block = f"{prefix}transformer.resblocks.{layer}"
    for third, name in enumerate(("q", "k", "v")):
        if module == f"self_attn.{name}_proj":
            return [Stored(key=f"{block}.attn.in_proj_{kind}", third=third)]
    return [Stored(key=f"{block}.{_IN_OPEN_CLIP.get(module, module)}.{kind}")]
