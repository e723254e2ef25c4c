"""Forward passes of PixArt and Stable Diffusion 3 written out by hand, which keep every layer under its name.

Imports nothing of featstore. Only leaf modules (linear maps, norms over channels, the patch convolution) of the stock
transformers are called; positions, modulation, norms of queries and keys, attention and blocks are written here from
their definitions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional

Maps = dict[str, torch.Tensor]


def pixart(
    model: Any, latents: torch.Tensor, timestep: int, text: torch.Tensor, mask: torch.Tensor, size: tuple[int, int]
) -> Maps:
    """All layers at noised latents (B, 4, h, w), with text (B, tokens, width) and mask (B, tokens), 1 where it is text.

    Models that are told it also see ``size``, height and width of the image.
    """
    config, count = model.config, len(latents)
    emb = model.adaln_single.emb
    base, scale = config.sample_size // config.patch_size, max(config.sample_size // 64, 1)
    maps, x, to_map = start(model, latents, lambda n: torch.arange(n) / (n / base) / scale)
    time = mlp(emb.timestep_embedder, wave(timestep))
    if hasattr(emb, "resolution_embedder"):
        sizes = [mlp(emb.resolution_embedder, wave(side)) for side in size]
        time = time + torch.cat([*sizes, mlp(emb.aspect_ratio_embedder, wave(size[0] / size[1]))])
    shared = model.adaln_single.linear(functional.silu(time)).reshape(6, -1)
    caption = model.caption_projection
    text = caption.linear_2(functional.gelu(caption.linear_1(text), approximate="tanh"))
    hidden = torch.where(mask.bool(), 0.0, -math.inf)[:, None]
    for i, block in enumerate(model.transformer_blocks):
        name = f"vit-block{i}"
        shift, scale_, gate, shift_ff, scale_ff, gate_ff = block.scale_shift_table + shared
        seen = normal(x) * (1 + scale_) + shift
        out = attention(block.attn1, seen, seen, to_map, maps, f"{name}-self")
        x = x + gate * block.attn1.to_out[0](out)
        out = attention(block.attn2, x, text, to_map, maps, f"{name}-cross", hidden)
        x = x + block.attn2.to_out[0](out)
        x = x + gate_ff * feed_forward(block.ff, normal(x) * (1 + scale_ff) + shift_ff, to_map, maps, name)
        maps[f"{name}-out"] = to_map(x)
        del maps[f"{name}-cross-k"], maps[f"{name}-cross-v"]
    assert x.shape[0] == count
    return averaged(maps, config.patch_size)


def sd3(model: Any, latents: torch.Tensor, timestep: int, text: torch.Tensor, pooled: torch.Tensor) -> Maps:
    """All layers at noised latents (B, C, h, w), with text (B, tokens, width) and pooled text (B, P)."""
    config = model.config
    base, most = config.sample_size // config.patch_size, config.pos_embed_max_size

    def centred(n: int) -> torch.Tensor:
        first = (most - n) // 2
        return torch.arange(first, first + n) * (base / most)

    maps, x, to_map = start(model, latents, centred)
    words = model.time_text_embed.text_embedder
    time = mlp(model.time_text_embed.timestep_embedder, wave(timestep))
    time = functional.silu(time + words.linear_2(functional.silu(words.linear_1(pooled))))[:, None]
    y = model.context_embedder(text)
    for i, block in enumerate(model.transformer_blocks):
        name, last = f"vit-block{i}", i == len(model.transformer_blocks) - 1
        parts = block.norm1.linear(time).chunk(9 if i in config.dual_attention_layers else 6, -1)
        shift, scale, gate, shift_ff, scale_ff, gate_ff = parts[:6]
        seen = normal(x) * (1 + scale) + shift
        if last:
            scale_y, shift_y = block.norm1_context.linear(time).chunk(2, -1)
        else:
            shift_y, scale_y, gate_y, shift_y_ff, scale_y_ff, gate_y_ff = block.norm1_context.linear(time).chunk(6, -1)
        seen_y = normal(y) * (1 + scale_y) + shift_y
        x_out, y_out = joint_attention(block.attn, seen, seen_y, to_map, maps, name)
        old = x
        x = x + gate * block.attn.to_out[0](x_out)
        if len(parts) == 9:
            shift2, scale2, gate2 = parts[6:]
            seen = normal(old) * (1 + scale2) + shift2
            out = attention(block.attn2, seen, seen, to_map, maps, f"{name}-self2")
            x = x + gate2 * block.attn2.to_out[0](out)
        x = x + gate_ff * feed_forward(block.ff, normal(x) * (1 + scale_ff) + shift_ff, to_map, maps, name)
        if not last:
            y = y + gate_y * block.attn.to_add_out(y_out)
            y = y + gate_y_ff * feed_forward(block.ff_context, normal(y) * (1 + scale_y_ff) + shift_y_ff)
        maps[f"{name}-out"] = to_map(x)
    return averaged(maps, config.patch_size)


def start(model: Any, latents: torch.Tensor, places: Any) -> tuple[Maps, torch.Tensor, Any]:
    """The first layers, the tokens (B, N, C), and what makes tokens a map."""
    patches = model.pos_embed.proj(latents)
    height, width = patches.shape[-2:]
    channels = patches.shape[1]
    first, second = places(width), places(height)
    positions = torch.stack(
        [
            torch.stack([torch.cat([waves(x, channels // 2), waves(y, channels // 2)]) for x in first.tolist()])
            for y in second.tolist()
        ]
    )
    patches = patches + positions.permute(2, 0, 1)

    def to_map(tokens: torch.Tensor) -> torch.Tensor:
        rows = [tokens[:, y * width : (y + 1) * width].permute(0, 2, 1) for y in range(height)]
        return torch.stack(rows, 2)

    tokens = torch.cat([patches[:, :, y] for y in range(height)], 2).permute(0, 2, 1)
    return {"latent-in": latents, "patch-embed-out": patches}, tokens, to_map


def waves(place: float, width: int) -> torch.Tensor:
    """Sines, then cosines, of a place at ``width / 2`` frequencies from 1 down to almost 1 / 10000."""
    half = width // 2
    angles = torch.tensor([place / 10000 ** (n / half) for n in range(half)])
    return torch.cat([angles.sin(), angles.cos()])


def wave(number: float, width: int = 256) -> torch.Tensor:
    """Cosines, then sines, of a number at ``width / 2`` frequencies from 1 down to almost 1 / 10000."""
    half = width // 2
    angles = number * torch.exp(-math.log(10000) * torch.arange(half) / half)
    return torch.cat([angles.cos(), angles.sin()])


def mlp(embedder: Any, numbers: torch.Tensor) -> torch.Tensor:
    return embedder.linear_2(functional.silu(embedder.linear_1(numbers)))


def normal(x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def rms(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """Of each head's (.., d); the identity without a norm."""
    return x if norm is None else x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight


def split(x: torch.Tensor, heads: int) -> torch.Tensor:
    return torch.stack(x.chunk(heads, -1), 1)


def merged(x: torch.Tensor) -> torch.Tensor:
    return torch.cat(list(x.unbind(1)), -1)


def attention(
    module: Any, x: torch.Tensor, context: torch.Tensor, to_map: Any, maps: Maps, name: str, bias: Any = 0.0
) -> torch.Tensor:
    q, k, v = module.to_q(x), module.to_k(context), module.to_v(context)
    # Text has no place in the image: the caller drops its keys and values.
    maps[f"{name}-q"] = to_map(q)
    maps[f"{name}-k"], maps[f"{name}-v"] = (to_map(k), to_map(v)) if context.shape == x.shape else (k, v)
    q, k, v = (split(one, module.heads) for one in (q, k, v))
    q, k = rms(module.norm_q, q), rms(module.norm_k, k)
    scores = torch.einsum("bhnd,bhmd->bhnm", q, k) / math.sqrt(q.shape[-1])
    weights = (scores + (bias[:, None] if isinstance(bias, torch.Tensor) else bias)).softmax(-1)
    maps[f"{name}-map"] = to_map(weights.mean(1))
    return merged(weights @ v)


def joint_attention(
    module: Any, x: torch.Tensor, y: torch.Tensor, to_map: Any, maps: Maps, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = module.to_q(x), module.to_k(x), module.to_v(x)
    for letter, value in zip("qkv", (q, k, v), strict=True):
        maps[f"{name}-self-{letter}"] = to_map(value)
    image = [split(one, module.heads) for one in (q, k, v)]
    projections = (module.add_q_proj, module.add_k_proj, module.add_v_proj)
    text = [split(project(y), module.heads) for project in projections]
    queries = torch.cat([rms(module.norm_q, image[0]), rms(module.norm_added_q, text[0])], 2)
    keys = torch.cat([rms(module.norm_k, image[1]), rms(module.norm_added_k, text[1])], 2)
    weights = (torch.einsum("bhnd,bhmd->bhnm", queries, keys) / math.sqrt(queries.shape[-1])).softmax(-1)
    n = x.shape[1]
    mean = weights[:, :, :n].mean(1)
    maps[f"{name}-self-map"], maps[f"{name}-cross-map"] = to_map(mean[..., :n]), to_map(mean[..., n:])
    out = merged(weights @ torch.cat([image[2], text[2]], 2))
    return out[:, :n], out[:, n:]


def feed_forward(
    module: Any, x: torch.Tensor, to_map: Any = None, maps: Maps | None = None, name: str = ""
) -> torch.Tensor:
    inner = functional.gelu(module.net[0].proj(x), approximate="tanh")
    if maps is not None:
        maps[f"{name}-ffn-inner"] = to_map(inner)
    return module.net[2](inner)


def averaged(maps: Maps, patch: int) -> Maps:
    for kind in ("self", "cross"):
        members = [value for name, value in maps.items() if name.endswith(f"-{kind}-map")]
        maps[f"attn-{kind}-{patch}"] = torch.stack(members).mean(0)
    return maps
