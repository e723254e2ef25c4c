"""Stage `image-encoder`: a small CLIP vision model, trained against the captions of the pool.

The text side is the pipeline's text encoder, which stays frozen, under a head that is thrown away afterwards. What
the head was good for is noted once: coats and captions, found with no example (zero shot).

Legend: `B` pictures of a batch, `L` tokens of the longest caption, `D` width of the embedding.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPVisionModelWithProjection

from featstore.datasets import toyhorse
from featstore.pipelines.reference.config import TrainConfig
from featstore.pipelines.reference.data import CaptionTable, caption_table, to_pixels
from featstore.pipelines.reference.export import (
    IMAGE_ENCODER,
    IP_ADAPTER,
    PIPELINE,
    half_copy,
    load_pipeline,
    replace_folder,
)
from featstore.pipelines.reference.loop import Groups, Loop
from featstore.pipelines.reference.lora import tokenize
from featstore.pipelines.reference.networks import build_image_encoder
from featstore.pipelines.reference.pool import VALIDATION, Pool, PoolRender, split_pictures

logger = logging.getLogger(__name__)

PLAIN, DETAILED = 1, 2
"""Kinds of captions, as `CaptionTable` counts them."""
PLAIN_ODDS = 0.1
"""How often a picture goes with its plain caption; with the detailed one else."""
SHIFT_PX = 4
"""Pictures are moved by so much at most while training."""
ZERO_SHOT = "image-encoder-zero-shot.json"
"""Name of the note in the folder of logs."""


class TextHead(nn.Module):
    """Embeds what a text encoder says of captions: attention of one query, and a projection."""

    def __init__(self, width: int, outside: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1, width) * width**-0.5)
        self.enter = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.pool = nn.MultiheadAttention(width, heads, batch_first=True)
        self.leave = nn.Linear(width, outside, bias=False)
        self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, words: Tensor, padding: Tensor) -> Tensor:
        """Embeddings (B, D) of hidden states (B, L, width); ``padding`` (B, L) is true where there is no word."""
        entered = self.enter(words)
        query = self.query.expand(len(words), -1, -1)
        pooled, _ = self.pool(query, entered, entered, key_padding_mask=padding, need_weights=False)
        embedded: Tensor = self.leave(pooled[:, 0])
        return embedded


def clip_pixels(images: Tensor) -> Tensor:
    """(B, 64, 64, 3) uint8 to (B, 3, 64, 64) float32, as CLIP's image processor with its own mean and deviation."""
    mean, deviation = (torch.tensor(value, device=images.device)[:, None, None] for value in _statistics())
    return (to_pixels(images) * 0.5 + 0.5 - mean) / deviation


def _statistics() -> tuple[list[float], list[float]]:
    processor = CLIPImageProcessor()
    return list(processor.image_mean), list(processor.image_std)


@torch.no_grad()
def embed(encoder: CLIPVisionModelWithProjection, images: Any, device: str, *, batch: int = 512) -> Tensor:
    """Embeddings (N, D) float32 of (N, 64, 64, 3) uint8 images."""
    rows = [
        encoder(clip_pixels(torch.from_numpy(np.array(images[start : start + batch])).to(device))).image_embeds
        for start in range(0, len(images), batch)
    ]
    return torch.cat(rows)


def contrastive_loss(seen: Tensor, said: Tensor, scale: Tensor, ids: Tensor) -> Tensor:
    """CLIP's loss, in which equal captions are each other's truth, too.

    Args:
        seen: (B, D) embeddings of pictures.
        said: (B, D) embeddings of their captions.
        scale: () logarithm of the inverse temperature.
        ids: (B, L) the captions' tokens.
    """
    logits = F.normalize(seen, dim=1) @ F.normalize(said, dim=1).T * scale.clamp(max=math.log(100)).exp()
    same = (ids[:, None] == ids[None]).all(dim=2).float()
    truth = same / same.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2


class _Captions:
    """Captions of pictures as the frozen text encoder says them, cut to the longest there is."""

    def __init__(self, table: CaptionTable, text_encoder: CLIPTextModel) -> None:
        self._table, self._text_encoder = table, text_encoder
        self._longest = int(table.lengths.max() + table.suffix_lengths.max()) + 1

    def draw(self, rows: Tensor, rng: torch.Generator) -> Tensor:
        """Tokens (B, L) of a caption of each picture that says more than that there is a horse, quality included."""
        table, device = self._table, rows.device
        plain = torch.rand(len(rows), generator=rng, device=device) < PLAIN_ODDS
        which = torch.where(plain, PLAIN, DETAILED)
        suffix = torch.multinomial(table.suffix_odds[table.levels[rows]], 1, generator=rng)[:, 0]
        ids = table.join(table.tokens[rows, which].long(), table.lengths[rows, which], suffix)
        return ids[:, : self._longest]

    @torch.no_grad()
    def said(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """See `_said`."""
        return _said(self._text_encoder, ids, self._table.end)


def train_image_encoder(
    config: TrainConfig, render: PoolRender, *, stop_at: int | None = None
) -> CLIPVisionModelWithProjection:
    """Train to the end, export, and return the averaged encoder."""
    torch.manual_seed(config.seed + 4)
    device, batch = config.device, config.image_encoder.batch
    pipeline = load_pipeline(config.out / PIPELINE, device)
    pool = render.wait()
    captions = _Captions(caption_table(pool, pipeline.tokenizer, device), pipeline.text_encoder)
    encoder = build_image_encoder(config.model).to(device)
    head = TextHead(config.model.text_width, config.model.vision_width, config.model.heads).to(device)
    loop = Loop("image-encoder", config, [Groups(parameters=[*encoder.parameters(), *head.parameters()])])

    def loss_of(rng: torch.Generator) -> Tensor:
        rows = torch.randint(len(pool.images), (batch,), generator=rng, device=device)
        ids = captions.draw(rows, rng)
        said = head(*captions.said(ids))
        seen = encoder(_moved(_pixels(pool, rows), rng)).image_embeds
        return contrastive_loss(seen, said, head.scale, ids)

    if not loop.done:
        loop.run(loss_of, stop_at=stop_at)
    loop.averaged().__enter__()  # for good
    encoder.requires_grad_(False).eval()
    export_image_encoder(config.out / IP_ADAPTER / IMAGE_ENCODER, encoder)
    note = zero_shot(config, encoder, head, pipeline)
    (config.work / "logs" / ZERO_SHOT).write_text(json.dumps(note), encoding="utf-8")
    logger.info("image-encoder: %s, zero shot %s", loop.summary(), note)
    return encoder


def _pixels(pool: Pool, rows: Tensor) -> Tensor:
    return clip_pixels(torch.from_numpy(pool.images[rows.cpu().numpy()]).to(rows.device))


def _moved(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """All (B, 3, H, W) pixels moved by the same few pixels, edges repeated."""
    height, width = pixels.shape[2:]
    top, left = torch.randint(2 * SHIFT_PX + 1, (2,), generator=rng, device=pixels.device).tolist()
    wide = F.pad(pixels, (SHIFT_PX,) * 4, mode="replicate")
    return wide[:, :, top : top + height, left : left + width]


def export_image_encoder(folder: Path, encoder: CLIPVisionModelWithProjection) -> None:
    """Write the encoder in float16 with its image processor, as transformers has it."""
    side = encoder.config.image_size

    def write(target: Path) -> None:
        half_copy(encoder).save_pretrained(target)
        CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side).save_pretrained(target)

    folder.parent.mkdir(parents=True, exist_ok=True)
    replace_folder(folder, write)


def load_image_encoder(folder: Path, device: str) -> CLIPVisionModelWithProjection:
    """The exported encoder in float32, frozen."""
    encoder = CLIPVisionModelWithProjection.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return encoder.to(device).requires_grad_(False).eval()


@torch.no_grad()
def zero_shot(
    config: TrainConfig, encoder: CLIPVisionModelWithProjection, head: TextHead, pipeline: Any
) -> dict[str, float]:
    """What words find in the 30 validation pictures with no example: shares whose own coat, and own caption, fit best.

    Coats are told apart by `a <coat> horse`; captions are the pictures' detailed ones.
    """
    pictures, coats = split_pictures(VALIDATION), list(toyhorse.COATS)
    seen = F.normalize(embed(encoder, np.stack([p.image for p in pictures]), config.device), dim=1)
    texts = {"coat": [f"a {coat} horse" for coat in coats], "caption": [p.fine_caption for p in pictures]}
    truth = {"coat": [coats.index(p.coat) for p in pictures], "caption": list(range(len(pictures)))}
    result = {}
    for name, lines in texts.items():
        ids = tokenize(pipeline, lines)
        said = F.normalize(head(*_said(pipeline.text_encoder, ids, int(pipeline.tokenizer.eos_token_id))), dim=1)
        guess = (seen @ said.T).argmax(dim=1).cpu()
        result[name] = float((guess == torch.tensor(truth[name])).float().mean())
        result[f"{name} by chance"] = 1 / len(lines)
    return result


def _said(text_encoder: CLIPTextModel, ids: Tensor, end: int) -> tuple[Tensor, Tensor]:
    """Hidden states (B, L, width) of tokens (B, L), and where there are none (B, L); the first end token is one."""
    return text_encoder(ids)[0], (ids == end).cumsum(dim=1) > 1
