"""Prompts as text encoders see them: in chunks, and which word stands at which position. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_tokenizer(folder: Path, name: str = "tokenizer") -> Any:
    """The CLIP tokenizer of a pipeline folder, or another one of its CLIP tokenizers."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder / name, local_files_only=True)


def load_t5_tokenizer(folder: Path, name: str = "tokenizer") -> Any:
    """The T5 tokenizer in a folder of a pipeline: a ``tokenizer.json``, or a SentencePiece model (``spiece.model``)."""
    from transformers import T5Tokenizer

    return T5Tokenizer.from_pretrained(folder / name, local_files_only=True)


def chunked_ids(tokenizer: Any, text: str, length: int, chunks: int) -> tuple[list[list[int]], list[int]]:
    """Token ids of a text in chunks that CLIP takes one by one, and the ids that did not fit.

    The ids of the whole text are cut into consecutive pieces of ``length - 2`` (75 for CLIP), wherever that falls, and
    each piece gets a start and an end token of its own, as in training. Pieces that the text does not fill are those
    of the empty text. The first chunk is what the text alone would be encoded as if the rest were cut off.

    The seed code cuts ids that already have their one start and one end token into pieces of 77, so that all but its
    first piece begin without a start token, all but its last end without an end token, and a short last piece is not
    padded; for more than 75 tokens its embeddings are others than these, and their number varies with the text.

    Returns:
        ``chunks`` lists, each of 2 to ``length`` ids, not padded; and the ids left over.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    room = length - tokenizer.num_special_tokens_to_add()
    pieces = [ids[room * chunk : room * (chunk + 1)] for chunk in range(chunks)]
    return [[tokenizer.bos_token_id, *piece, tokenizer.eos_token_id] for piece in pieces], ids[room * chunks :]


def words(tokenizer: Any, text: str, length: int, chunks: int = 1) -> list[str]:
    """What each of the ``length * chunks`` positions of an encoded text stands for; "" for start, end and padding."""
    if chunks == 1:
        rows = [tokenizer(text, padding="max_length", max_length=length, truncation=True).input_ids]
    else:
        rows = chunked_ids(tokenizer, text, length, chunks)[0]
    special = set(tokenizer.all_special_ids)
    names = [["" if number in special else tokenizer.decode([number]).strip() for number in ids] for ids in rows]
    return [name for row in names for name in (*row, *[""] * (length - len(row)))]
