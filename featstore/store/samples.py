"""The sample table of a data set: which image each row of every run is of."""

from __future__ import annotations

import dataclasses
import re

from featstore.errors import BadRequestError, CorruptError

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SampleTable:
    """N images in their order; row i of every array of the data set belongs to entry i."""

    keys: tuple[str, ...]
    """Name of each image, unique in the table."""
    digests: tuple[str, ...]
    """SHA-256 of each image's bytes, 64 lower-case hex digits."""
    splits: tuple[str, ...]
    """Split that each image belongs to, e.g. ``train``."""

    def __post_init__(self) -> None:
        """Refuse tables whose columns do not fit each other."""
        if not len(self.keys) == len(self.digests) == len(self.splits):
            raise BadRequestError(
                f"a sample table of {len(self.keys)} keys, {len(self.digests)} digests and {len(self.splits)} splits"
            )
        if len(set(self.keys)) != len(self.keys):
            seen: set[str] = set()
            twice = next(key for key in self.keys if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise BadRequestError(f"key {twice!r} occurs twice in a sample table; keys are unique")
        for key, digest in zip(self.keys, self.digests, strict=True):
            if not key or not _DIGEST.fullmatch(digest):
                raise BadRequestError(f"digest {digest!r} of image {key!r} is not a SHA-256 in lower-case hex")

    def __len__(self) -> int:
        """N."""
        return len(self.keys)

    @classmethod
    def checked(
        cls, keys: tuple[str, ...], digests: tuple[str, ...], splits: tuple[str, ...], name: str
    ) -> SampleTable:
        """The table of these columns, which come from a store; ``name`` is their place, for messages.

        Raises:
            CorruptError: if they make none.
        """
        try:
            return cls(keys=keys, digests=digests, splits=splits)
        except BadRequestError as error:
            raise CorruptError(f"{name} holds no sound sample table: {error}") from None
