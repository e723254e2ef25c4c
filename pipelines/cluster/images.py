"""The images of a block on a worker: those alone, whatever the data set's size."""

from __future__ import annotations

from pathlib import Path

from typing_extensions import override

import featstore.datasets
from featstore.datasets import DATASETS, Dataset, DatasetInfo, Sample
from featstore.datasets.base import UInt8Array
from featstore.datasets.files import FileDataset, FileItem
from featstore.errors import BadRequestError
from featstore.pipelines.cluster.job import Images, Job


class BlockDataset(Dataset):
    """A few images of a data set, each checked to be the one that the client has listed.

    Args:
        info: facts of the whole data set.
        images: which ones.
        source: reads them by their keys.
    """

    def __init__(self, info: DatasetInfo, images: Images, source: Dataset) -> None:
        self._info = info
        self._source = source
        pairs = list(zip(images.keys, images.digests, strict=True))
        self._digests = dict(pairs)
        self._samples = tuple(Sample(key=key, digest=digest, split="all") for key, digest in pairs)
        self._texts = {kind: dict(zip(images.keys, texts, strict=True)) for kind, texts in images.texts.items()}

    @property
    @override
    def info(self) -> DatasetInfo:
        return self._info

    @property
    @override
    def samples(self) -> tuple[Sample, ...]:
        return self._samples

    @override
    def image(self, key: str) -> UInt8Array:
        return self._source.image_as(key, self._digests[key])

    @override
    def mask(self, key: str) -> UInt8Array | None:
        raise BadRequestError(f"labels of {key!r}: workers of an extraction have images alone")

    @override
    def caption(self, key: str, kind: str) -> str:
        return self._texts[kind][key]


class ImageSource:
    """Opens what a job's blocks name: single files below a root, or the data set by its name."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._root = None if job.root is None else _root(job, Path(job.root))
        self._whole: Dataset | None = None

    def of(self, images: Images) -> BlockDataset:
        """The images of a block.

        Raises:
            NotFoundError, BadRequestError: if the data set is not on this machine.
        """
        if images.files is not None and self._root is not None:
            items = [
                FileItem(key=key, image=self._root / file, mask=None, split="all")
                for key, file in zip(images.keys, images.files, strict=True)
            ]
            return BlockDataset(self._job.info, images, FileDataset(self._job.info, self._root, items))
        if self._whole is None:
            config = self._job.config
            self._whole = featstore.datasets.resolve(config.dataset, data_root=config.data_root)
        return BlockDataset(self._job.info, images, self._whole)


def _root(job: Job, there: Path) -> Path:
    """Folder of the data set's files: that of the client, else, of a data set with a name, where it lies here."""
    name = job.config.dataset
    if there.is_dir() or name not in DATASETS:
        return there
    here = DATASETS[name].where(None)
    return there if here is None or not here.is_dir() else here
