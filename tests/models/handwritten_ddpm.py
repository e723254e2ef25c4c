"""Forward passes of unconditional UNets of pixels, written out by hand; each keeps every layer under its name.

Imports nothing of featstore. `Guided` is guided-diffusion's UNet (Dhariwal and Nichol, 2021) on a plain dictionary of
tensors under its own keys; `plain` is that of Ho et al. (2020) on the leaf modules of a stock ``UNet2DModel``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional

Maps = dict[str, torch.Tensor]


class Guided:
    """guided-diffusion's UNet; its random weights are made, under their keys, by the first forward pass."""

    def __init__(
        self,
        *,
        channels: int = 32,
        mult: tuple[int, ...] = (1, 1, 2, 2, 2),
        resnets: int = 2,
        attends: tuple[bool, ...] = (False, False, False, True, True),
        head: int = 16,
        resblock_updown: bool = True,
        scale_shift: bool = True,
        out: int = 6,
        seed: int = 0,
        meta: bool = False,
    ) -> None:
        self.channels, self.mult, self.resnets, self.attends = channels, mult, resnets, attends
        self.head, self.resblock_updown, self.scale_shift, self.out = head, resblock_updown, scale_shift, out
        self.state: dict[str, torch.Tensor] = {}
        self.random = torch.Generator().manual_seed(seed)
        self.device = "meta" if meta else "cpu"

    def weights(self, key: str, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        if f"{key}.weight" not in self.state:
            if self.device == "meta":
                made = torch.empty(shape, device="meta"), torch.empty(shape[0], device="meta")
            else:
                weight, bias = (torch.randn(size, generator=self.random) for size in (shape, shape[:1]))
                weight = 1 + 0.3 * weight if len(shape) == 1 else weight / math.sqrt(math.prod(shape[1:]))
                made = weight, 0.3 * bias
            self.state[f"{key}.weight"], self.state[f"{key}.bias"] = made
        return self.state[f"{key}.weight"], self.state[f"{key}.bias"]

    def norm(self, key: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weights(key, x.shape[1])
        return group_norm(x, weight, bias, 32, 1e-5)

    def conv(self, key: str, x: torch.Tensor, out: int, size: int = 3, stride: int = 1) -> torch.Tensor:
        weight, bias = self.weights(key, out, x.shape[1], size, size)
        return functional.conv2d(x, weight, bias, stride=stride, padding=size // 2)

    def linear(self, key: str, x: torch.Tensor, out: int) -> torch.Tensor:
        weight, bias = self.weights(key, out, x.shape[-1])
        return x @ weight.T + bias

    def forward(self, x: torch.Tensor, timestep: int) -> tuple[Maps, list[torch.Tensor]]:
        """All layers, and the output of every block of the decoder."""
        maps: Maps = {"unet-in": x}
        probabilities: dict[str, list[torch.Tensor]] = {}
        half = self.channels // 2
        angles = timestep * torch.exp(-math.log(10000) * torch.arange(half) / half)
        emb = torch.cat([angles.cos(), angles.sin()])[None].to(x.device)
        emb = self.linear("time_embed.0", emb, 4 * self.channels)
        emb = self.linear("time_embed.2", functional.silu(emb), 4 * self.channels)
        side, block, last = x.shape[-1], 1, len(self.mult) - 1
        x = maps["unet-after-conv-in"] = self.conv("input_blocks.0.0", x, self.channels * self.mult[0])
        skips = [x]
        for i, mult in enumerate(self.mult):
            for j in range(self.resnets):
                name = f"down-level{i}-repeat{j}"
                x = self.residual(f"input_blocks.{block}.0", x, emb, mult * self.channels, maps, f"{name}-res")
                if self.attends[i]:
                    key = f"down|{side // x.shape[-1]}"
                    x = self.attention(f"input_blocks.{block}.1", x, maps, f"{name}-vit", probabilities, key)
                skips.append(x)
                block += 1
            if i < last:
                x = maps[f"down-level{i}-downsampler-out"] = self.sampler(f"input_blocks.{block}.0", x, emb, pooled)
                skips.append(x)
                block += 1
        x = self.residual("middle_block.0", x, emb, x.shape[1], maps, "mid-repeat0-res")
        x = self.attention("middle_block.1", x, maps, "mid-vit", probabilities, f"mid|{side // x.shape[-1]}")
        x = self.residual("middle_block.2", x, emb, x.shape[1], maps, "mid-repeat1-res")
        blocks: list[torch.Tensor] = []
        for i in range(last + 1):
            width, attends = self.mult[last - i] * self.channels, self.attends[last - i]
            for j in range(self.resnets + 1):
                name, key = f"up-level{i}-repeat{j}", f"output_blocks.{len(blocks)}"
                x = self.residual(f"{key}.0", torch.cat([x, skips.pop()], 1), emb, width, maps, f"{name}-res")
                if attends:
                    stage = f"up|{side // x.shape[-1]}"
                    x = self.attention(f"{key}.1", x, maps, f"{name}-vit", probabilities, stage)
                if j == self.resnets and i < last:
                    tail = f"{key}.{2 if attends else 1}"
                    x = maps[f"up-level{i}-upsampler-out"] = self.sampler(tail, x, emb, doubled)
                blocks.append(x)
        maps["unet-out"] = self.conv("out.2", functional.silu(self.norm("out.0", x)), self.out)
        for key, members in probabilities.items():
            stage, factor = key.split("|")
            maps[f"attn-{stage}-self-{factor}"] = torch.stack(members).mean(0)
        return maps, blocks

    def sampler(self, key: str, x: torch.Tensor, emb: torch.Tensor, change: Any) -> torch.Tensor:
        if self.resblock_updown:
            return self.residual(key, x, emb, x.shape[1], change=change)
        if change is pooled:
            return self.conv(f"{key}.op", x, x.shape[1], stride=2)
        return self.conv(f"{key}.conv", doubled(x), x.shape[1])

    def residual(
        self,
        key: str,
        x: torch.Tensor,
        emb: torch.Tensor,
        out: int,
        maps: Maps | None = None,
        name: str = "",
        change: Any = None,
    ) -> torch.Tensor:
        h = functional.silu(self.norm(f"{key}.in_layers.0", x))
        if change is not None:
            h, x = change(h), change(x)
        h = self.conv(f"{key}.in_layers.2", h, out)
        time = self.linear(f"{key}.emb_layers.1", functional.silu(emb), 2 * out if self.scale_shift else out)
        time = time[:, :, None, None]
        if self.scale_shift:
            h = self.norm(f"{key}.out_layers.0", h) * (1 + time[:, :out]) + time[:, out:]
        else:
            h = self.norm(f"{key}.out_layers.0", h + time)
        h = self.conv(f"{key}.out_layers.3", functional.silu(h), out)
        if x.shape[1] != out:
            x = self.conv(f"{key}.skip_connection", x, out, size=1)
        if maps is not None:
            maps[f"{name}-increment"], maps[f"{name}-out"] = h, x + h
        return x + h

    def attention(
        self, key: str, x: torch.Tensor, maps: Maps, name: str, probabilities: dict[str, Any], stage: str
    ) -> torch.Tensor:
        height, width, c = *x.shape[-2:], x.shape[1]
        weight, bias = self.weights(f"{key}.qkv", 3 * c, c, 1)
        seen = self.norm(f"{key}.norm", x).flatten(2)
        qkv = torch.einsum("oc,bcn->bon", weight[:, :, 0], seen) + bias[:, None]
        parts: list[list[torch.Tensor]] = [[], [], [], [], []]
        # Heads first: each has its queries, keys and values side by side.
        for start in range(0, 3 * c, 3 * self.head):
            q, k, v = (qkv[:, start + n * self.head : start + (n + 1) * self.head] for n in range(3))
            attended = (torch.einsum("bdn,bdm->bnm", q, k) / math.sqrt(self.head)).softmax(-1)
            for part, value in zip(parts, (q, k, v, attended, torch.einsum("bnm,bdm->bdn", attended, v)), strict=True):
                part.append(value)
        for letter, part in zip("qkv", parts, strict=False):
            maps[f"{name}-self-{letter}"] = torch.cat(part, 1).unflatten(2, (height, width))
        mean = torch.stack(parts[3]).mean(0).transpose(1, 2).unflatten(2, (height, width))
        maps[f"{name}-self-map"] = mean
        probabilities.setdefault(stage, []).append(mean)
        weight, bias = self.weights(f"{key}.proj_out", c, c, 1)
        out = torch.einsum("oc,bcn->bon", weight[:, :, 0], torch.cat(parts[4], 1)) + bias[:, None]
        maps[f"{name}-out"] = x + out.unflatten(2, (height, width))
        return maps[f"{name}-out"]


def group_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float) -> torch.Tensor:
    grouped = x.unflatten(1, (groups, -1)).flatten(2)
    centred = grouped - grouped.mean(2, keepdim=True)
    grouped = centred / (centred.square().mean(2, keepdim=True) + eps).sqrt()
    return grouped.reshape(x.shape) * weight[:, None, None] + bias[:, None, None]


def pooled(x: torch.Tensor) -> torch.Tensor:
    return (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4


def doubled(x: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def plain(unet: Any, x: torch.Tensor, timestep: int, *, groups: int, eps: float) -> Maps:
    """All layers of a stock UNet as Ho et al. have it: sine first, added time, one head, padding at the end."""
    maps: Maps = {"unet-in": x}
    probabilities: dict[str, list[torch.Tensor]] = {}
    side = x.shape[-1]

    def norm(module: Any, x: torch.Tensor) -> torch.Tensor:
        return group_norm(x, module.weight, module.bias, groups, eps)

    def residual(block: Any, x: torch.Tensor, name: str) -> torch.Tensor:
        h = block.conv1(functional.silu(norm(block.norm1, x)))
        h = h + block.time_emb_proj(functional.silu(emb))[:, :, None, None]
        h = maps[f"{name}-increment"] = block.conv2(functional.silu(norm(block.norm2, h)))
        maps[f"{name}-out"] = (x if block.conv_shortcut is None else block.conv_shortcut(x)) + h
        return maps[f"{name}-out"]

    def attention(module: Any, x: torch.Tensor, name: str, stage: str) -> torch.Tensor:
        height, width = x.shape[-2:]
        seen = norm(module.group_norm, x).flatten(2).transpose(1, 2)
        q, k, v = module.to_q(seen), module.to_k(seen), module.to_v(seen)
        attended = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1)
        named = {"self-q": q, "self-k": k, "self-v": v, "self-map": attended}
        named["out"] = x.flatten(2).transpose(1, 2) + module.to_out[0](attended @ v)
        for kind, value in named.items():
            maps[f"{name}-{kind}"] = value.transpose(1, 2).unflatten(2, (height, width))
        probabilities.setdefault(f"{stage}|{side // width}", []).append(maps[f"{name}-self-map"])
        return maps[f"{name}-out"]

    half = unet.config.block_out_channels[0] // 2
    angles = timestep * torch.exp(-math.log(10000) * torch.arange(half) / (half - 1))
    emb = torch.cat([angles.sin(), angles.cos()])[None]
    emb = unet.time_embedding.linear_2(functional.silu(unet.time_embedding.linear_1(emb)))
    x = maps["unet-after-conv-in"] = unet.conv_in(x)
    skips = [x]
    for i, block in enumerate(unet.down_blocks):
        for j, resnet in enumerate(block.resnets):
            x = residual(resnet, x, f"down-level{i}-repeat{j}-res")
            if hasattr(block, "attentions"):
                x = attention(block.attentions[j], x, f"down-level{i}-repeat{j}-vit", "down")
            skips.append(x)
        if block.downsamplers is not None:
            conv = block.downsamplers[0].conv
            x = functional.conv2d(functional.pad(x, (0, 1, 0, 1)), conv.weight, conv.bias, stride=2)
            maps[f"down-level{i}-downsampler-out"] = x
            skips.append(x)
    x = residual(unet.mid_block.resnets[0], x, "mid-repeat0-res")
    x = attention(unet.mid_block.attentions[0], x, "mid-vit", "mid")
    x = residual(unet.mid_block.resnets[1], x, "mid-repeat1-res")
    for i, block in enumerate(unet.up_blocks):
        for j, resnet in enumerate(block.resnets):
            x = residual(resnet, torch.cat([x, skips.pop()], 1), f"up-level{i}-repeat{j}-res")
            if hasattr(block, "attentions"):
                x = attention(block.attentions[j], x, f"up-level{i}-repeat{j}-vit", "up")
        if block.upsamplers is not None:
            x = maps[f"up-level{i}-upsampler-out"] = block.upsamplers[0].conv(doubled(x))
    maps["unet-out"] = unet.conv_out(functional.silu(norm(unet.conv_norm_out, x)))
    for key, members in probabilities.items():
        stage, factor = key.split("|")
        maps[f"attn-{stage}-self-{factor}"] = torch.stack(members).mean(0)
    return maps
