"""A forward pass of a Stable Diffusion UNet written out by hand, which keeps every layer under its name.

Imports nothing of featstore. Only leaf modules (convolutions, norms, linear maps) of the stock UNet are called;
ResNet blocks, transformers, attention, skips and resampling are written here from their definitions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional

Maps = dict[str, torch.Tensor]


def forward(
    unet: Any,
    latents: torch.Tensor,
    timestep: int,
    text: torch.Tensor,
    down_residuals: list[torch.Tensor] | None = None,
    mid_residual: torch.Tensor | None = None,
    pooled: torch.Tensor | None = None,
    sizes: list[int] | None = None,
) -> Maps:
    """All layers of the UNet at noised latents (B, 4, h, w), with text (B, tokens, width).

    SDXL's are also told the pooled text (B, P) and the six sizes of the image.
    """
    maps: Maps = {"unet-in": latents}
    probabilities: dict[str, list[torch.Tensor]] = {}
    time = time_embedding(unet, timestep, len(latents))
    if pooled is not None and sizes is not None:
        waves = torch.cat([wave(size, unet.config.addition_time_embed_dim) for size in sizes])
        added = torch.cat([pooled, waves.expand(len(latents), -1)], 1)
        time = time + unet.add_embedding.linear_2(functional.silu(unet.add_embedding.linear_1(added)))
    x = maps["unet-after-conv-in"] = unet.conv_in(latents)
    skips = [x]
    for i, block in enumerate(unet.down_blocks):
        for j, resnet in enumerate(block.resnets):
            x = residual(resnet, x, time, maps, f"down-level{i}-repeat{j}-res")
            if hasattr(block, "attentions"):
                name = f"down-level{i}-repeat{j}-vit"
                x = transformer(block.attentions[j], x, text, maps, name, probabilities, f"down|{factor(latents, x)}")
            skips.append(x)
        if block.downsamplers is not None:
            x = maps[f"down-level{i}-downsampler-out"] = functional.conv2d(
                x, block.downsamplers[0].conv.weight, block.downsamplers[0].conv.bias, stride=2, padding=1
            )
            skips.append(x)
    if down_residuals is not None:
        skips = [skip + more for skip, more in zip(skips, down_residuals, strict=True)]
    x = residual(unet.mid_block.resnets[0], x, time, maps, "mid-repeat0-res")
    x = transformer(unet.mid_block.attentions[0], x, text, maps, "mid-vit", probabilities, f"mid|{factor(latents, x)}")
    x = residual(unet.mid_block.resnets[1], x, time, maps, "mid-repeat1-res")
    if mid_residual is not None:
        x = x + mid_residual
    for i, block in enumerate(unet.up_blocks):
        for j, resnet in enumerate(block.resnets):
            x = residual(resnet, torch.cat([x, skips.pop()], 1), time, maps, f"up-level{i}-repeat{j}-res")
            if hasattr(block, "attentions"):
                name = f"up-level{i}-repeat{j}-vit"
                x = transformer(block.attentions[j], x, text, maps, name, probabilities, f"up|{factor(latents, x)}")
        if block.upsamplers is not None:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            x = maps[f"up-level{i}-upsampler-out"] = block.upsamplers[0].conv(x)
    maps["unet-out"] = unet.conv_out(functional.silu(unet.conv_norm_out(x)))
    for key, members in probabilities.items():
        stage, side, kind = key.split("|")
        maps[f"attn-{stage}-{kind}-{side}"] = torch.stack(members).mean(0)
    return maps


def factor(latents: torch.Tensor, x: torch.Tensor) -> int:
    return latents.shape[-1] // x.shape[-1]


def time_embedding(unet: Any, timestep: int, count: int) -> torch.Tensor:
    waves = wave(timestep, unet.config.block_out_channels[0])[None].repeat(count, 1)
    return unet.time_embedding.linear_2(functional.silu(unet.time_embedding.linear_1(waves)))


def wave(number: int, width: int) -> torch.Tensor:
    """Cosines, then sines, of a number at ``width / 2`` frequencies from 1 down to almost 1 / 10000."""
    half = width // 2
    angles = number * torch.exp(-math.log(10000) * torch.arange(half) / half)
    return torch.cat([angles.cos(), angles.sin()])


def residual(block: Any, x: torch.Tensor, time: torch.Tensor, maps: Maps, name: str) -> torch.Tensor:
    h = block.conv1(functional.silu(block.norm1(x)))
    h = h + block.time_emb_proj(functional.silu(time))[:, :, None, None]
    h = maps[f"{name}-increment"] = block.conv2(functional.silu(block.norm2(h)))
    shortcut = x if block.conv_shortcut is None else block.conv_shortcut(x)
    maps[f"{name}-out"] = shortcut + h
    return maps[f"{name}-out"]


def transformer(
    module: Any, x: torch.Tensor, text: torch.Tensor, maps: Maps, name: str, probabilities: dict[str, Any], key: str
) -> torch.Tensor:
    height, width = x.shape[-2:]

    def to_map(tokens: torch.Tensor) -> torch.Tensor:
        rows = [tokens[:, y * width : (y + 1) * width].permute(0, 2, 1) for y in range(height)]
        return torch.stack(rows, 2)

    def project(layer: Any, image: torch.Tensor) -> torch.Tensor:
        """A 1 x 1 convolution, which newer models write as a linear map of each position."""
        return torch.einsum("oc,bchw->bohw", layer.weight.flatten(1), image) + layer.bias[:, None, None]

    h = project(module.proj_in, module.norm(x)).flatten(2).permute(0, 2, 1)
    for k, block in enumerate(module.transformer_blocks):
        prefix = f"{name}-block{k}"
        for kind, norm, attention in (("self", block.norm1, block.attn1), ("cross", block.norm2, block.attn2)):
            seen = norm(h)
            context = seen if kind == "self" else text
            q, k_, v = attention.to_q(seen), attention.to_k(context), attention.to_v(context)
            out, mean = attend(q, k_, v, attention.heads)
            h = h + attention.to_out[0](out)
            maps[f"{prefix}-{kind}-q"] = to_map(q)
            if kind == "self":
                maps[f"{prefix}-self-k"], maps[f"{prefix}-self-v"] = to_map(k_), to_map(v)
            maps[f"{prefix}-{kind}-map"] = to_map(mean)
            probabilities.setdefault(f"{key}|{kind}", []).append(to_map(mean))
        gate, value = block.ff.net[0].proj(block.norm3(h)).chunk(2, -1)[::-1]
        inner = value * functional.gelu(gate)
        maps[f"{prefix}-ffn-inner"] = to_map(inner)
        h = h + block.ff.net[2](inner)
        maps[f"{prefix}-out"] = to_map(h)
    maps[f"{name}-out"] = x + project(module.proj_out, to_map(h))
    return maps[f"{name}-out"]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Output of attention (B, N, D), and its probabilities averaged over heads (B, N, M)."""
    outputs, maps = [], []
    for query, key, value in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        scores = torch.einsum("bnd,bmd->bnm", query, key) / math.sqrt(query.shape[-1])
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        outputs.append(torch.einsum("bnm,bmd->bnd", weights, value))
        maps.append(weights)
    return torch.cat(outputs, -1), torch.stack(maps).mean(0)
