"""Which images of a data set are meant by a split and a limit."""

from __future__ import annotations

from collections.abc import Sequence

from featstore.errors import BadRequestError, unknown_name


def select_rows(splits: Sequence[str], *, split: str | None, limit: int | None) -> list[int]:
    """Row numbers of the images of ``split`` (all if None), the first ``limit`` of them.

    Args:
        splits: split of each row.
        split: the one asked for.
        limit: how many at most.

    Raises:
        BadRequestError: if no image has that split, or for a limit below 1.
    """
    if limit is not None and limit < 1:
        raise BadRequestError(f"--limit {limit} is not 1 or more")
    if split is not None and split not in set(splits):
        raise unknown_name("split", split, set(splits))
    return [row for row, own in enumerate(splits) if split in (None, own)][:limit]
