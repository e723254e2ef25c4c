"""Prompts to token ids, with a warning for what a text encoder cannot take."""

from __future__ import annotations

import logging
from typing import Any

from featstore.models.tokens import chunked_ids

logger = logging.getLogger(__name__)


def clip_tokens(tokenizer: Any, text: str, length: int, *, warn: bool = True) -> Any:
    """Token ids (1, length) and attention mask of a text, padded and cut as diffusers' pipelines do.

    A text that does not fit is cut, with a warning that shows the tail; ``warn`` is for the first of several encoders
    that cut it at the same place.
    """
    tokens = tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    room = length - tokenizer.num_special_tokens_to_add()
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if warn:
        _warn_of_cut(tokenizer, room, ids[room:])
    return tokens


def clip_chunks(tokenizer: Any, text: str, length: int, chunks: int = 1, *, warn: bool = True) -> list[Any]:
    """A text in chunks to be encoded one by one and put side by side: `clip_tokens` of each, in order.

    One chunk is `clip_tokens` itself. More are cut by `featstore.models.tokens.chunked_ids`; what does not fit into
    them is left out, with a warning that shows it. What a text has one of, like SDXL's pooled embedding, is taken
    from the first chunk.

    Args:
        tokenizer: CLIP's.
        text: of any length.
        length: tokens of a chunk, 77 for CLIP.
        chunks: how many there are, however short the text.
        warn: see `clip_tokens`.
    """
    if chunks == 1:
        return [clip_tokens(tokenizer, text, length, warn=warn)]
    rows, left = chunked_ids(tokenizer, text, length, chunks)
    if warn:
        _warn_of_cut(tokenizer, chunks * (length - tokenizer.num_special_tokens_to_add()), left)
    padding: dict[str, Any] = {"padding": "max_length", "max_length": length, "return_tensors": "pt", "verbose": False}
    return [tokenizer.pad({"input_ids": [ids]}, **padding) for ids in rows]


def _warn_of_cut(tokenizer: Any, room: int, left: list[int]) -> None:
    if left:
        logger.warning("prompt cut after %d tokens; left out: %r", room, tokenizer.decode(left))
