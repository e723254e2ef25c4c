"""Images of one data set, treated like those of another: its texts, model and sizes, and its LoRAs."""

from __future__ import annotations

import dataclasses

from typing_extensions import override

from featstore.datasets.base import Dataset, DatasetInfo, Sample, UInt8Array


class Like(Dataset):
    """``images`` with the facts of ``info`` where those decide how features are extracted.

    A head that was trained on one data set reads new images' features only if they were made in the same way.
    """

    def __init__(self, images: Dataset, info: DatasetInfo) -> None:
        self.images = images
        """The data set whose images they are."""
        own = images.info
        self._info = dataclasses.replace(info, name=own.name, title=own.title, source=own.source)

    @property
    @override
    def info(self) -> DatasetInfo:
        return self._info

    @property
    @override
    def samples(self) -> tuple[Sample, ...]:
        return self.images.samples

    @override
    def image(self, key: str) -> UInt8Array:
        return self.images.image(key)

    @override
    def image_as(self, key: str, digest: str) -> UInt8Array:
        return self.images.image_as(key, digest)

    @override
    def mask(self, key: str) -> UInt8Array | None:
        return self.images.mask(key)
