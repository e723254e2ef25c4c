"""``hub:OWNER/NAME``: data sets of the Hugging Face Hub, by the library ``datasets``; no script is ever run.

``@REVISION`` and ``#CONFIG`` may follow, in this order. A folder in place of the name is what ``save_to_disk`` wrote,
or anything that ``datasets.load_dataset`` reads from a folder, such as parquet files. Nothing is fetched for that.

The image is the first column of type ``Image`` (one called ``image`` or ``img`` before others), the label the first
of type ``ClassLabel`` (``label`` before others), masks an ``Image`` column with one of `MASK_COLUMNS` as its name.
Keys are ``SPLIT/NUMBER``; the digest of a sample is that of its image's bytes as they are stored.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from typing_extensions import override

from featstore import cache
from featstore.datasets.base import Dataset, DatasetInfo, Sample, UInt8Array, UnreadableImageError, other_bytes
from featstore.datasets.entries import DatasetEntry
from featstore.datasets.pixels import decode_image, decode_mask
from featstore.errors import BadRequestError, FeatstoreError, NotFoundError

PREFIX = "hub:"
MASK_COLUMNS = frozenset(
    {"annotation", "annotations", "label", "labels", "mask", "masks", "seg", "segmentation", "segmentation_mask"}
    | {"semantic", "semantic_segmentation"}
)
"""Names of ``Image`` columns that hold labels of pixels."""
_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "labels", "fine_label")
_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
_SPLITS |= dict.fromkeys(("validation", "val", "valid", "dev"), "val")
_HASHED_ROWS = 64


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HubName:
    """What is written after ``hub:``."""

    name: str
    """``OWNER/NAME``, or a folder."""
    revision: str | None = None
    config: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubName:
        """Take ``NAME[@REVISION][#CONFIG]`` apart; a folder's own name may hold both signs.

        Raises:
            BadRequestError: for no name, or one that is neither a folder nor ``OWNER/NAME``.
        """
        hint = "write hub:OWNER/NAME, hub:OWNER/NAME@REVISION#CONFIG or hub:FOLDER"
        if text and Path(text).expanduser().is_dir():
            return cls(name=str(Path(text).expanduser()))
        rest, sign, config = text.rpartition("#")
        rest, config = (rest, config) if sign else (text, "")
        if rest and Path(rest).expanduser().is_dir():
            return cls(name=str(Path(rest).expanduser()), config=config or None)
        name, _, revision = rest.partition("@")
        if name and revision and Path(name).expanduser().is_dir():
            raise BadRequestError(f"the folder {name!r} has no revision {revision!r}", hint=hint)
        if not re.fullmatch(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", name):
            raise BadRequestError(f"'hub:{text}' names no data set of the Hub and no folder", hint=hint)
        return cls(name=name, revision=revision or None, config=config or None)

    @property
    def folder(self) -> Path | None:
        """The folder that it names; None: it is on the Hub."""
        return Path(self.name) if Path(self.name).is_dir() else None

    def store_name(self, taken: frozenset[str]) -> str:
        """Its name in a store's paths: ``owner--name``, and ``--config`` where there is one."""
        own = self.name if self.folder is None else self.folder.resolve().name
        words = "--".join(own.split("/") + ([self.config] if self.config else []))
        name = re.sub(r"[^a-z0-9._-]", "_", words.lower())[:60].lstrip("._-").rstrip("_.") or "data"
        return f"hub-{name}" if name in taken else name


class HubDataset(Dataset):
    """Images in a table of the library ``datasets``, which maps them from disk.

    Raises:
        BadRequestError: without that library, for an unknown configuration, for a table without images.
        NotFoundError: if the data set is not there, or cannot be reached.
    """

    def __init__(self, text: str, *, taken_names: frozenset[str] = frozenset()) -> None:
        where = HubName.parse(text)
        self._splits = _load(where)
        features = next(iter(self._splits.values())).features
        self._columns = _Columns.of(features, text)
        names = () if self._columns.label is None else tuple(features[self._columns.label].names)
        self._tables = {split: self._columns.undecoded(table) for split, table in self._splits.items()}
        self._labels: dict[str, list[int | None]] = {}
        self._samples: tuple[Sample, ...] | None = None
        self._info = DatasetInfo(
            name=where.store_name(taken_names),
            title=f"images of {where.name}",
            image_classes=names,
            plain_prompt="a photo",
            source=f"the data set {PREFIX}{text}, read by the library `datasets`",
        )

    @property
    @override
    def info(self) -> DatasetInfo:
        return self._info

    @property
    @override
    def samples(self) -> tuple[Sample, ...]:
        if self._samples is None:
            self._samples = tuple(
                Sample(key=f"{split}/{number:06d}", digest=digest, split=_SPLITS.get(split.lower(), "all"))
                for split, table in self._tables.items()
                for number, digest in enumerate(_digests(table, self._columns.image))
            )
        return self._samples

    @override
    def image(self, key: str) -> UInt8Array:
        return decode_image(_bytes(self._row(key)[self._columns.image], key), key)

    @override
    def image_as(self, key: str, digest: str) -> UInt8Array:
        data = _bytes(self._row(key)[self._columns.image], key)
        if hashlib.sha256(data).hexdigest() != digest:
            raise other_bytes(key)
        return decode_image(data, key)

    @override
    def mask(self, key: str) -> UInt8Array | None:
        row = self._row(key)
        if self._columns.mask is None or row[self._columns.mask] is None:
            return None
        return decode_mask(_bytes(row[self._columns.mask], key), key)

    @override
    def image_label(self, key: str) -> int | None:
        split, number = self._place(key)
        if self._columns.label is None:
            return None
        if split not in self._labels:  # the column alone: rows would bring their images along
            self._labels[split] = list(self._tables[split][self._columns.label])
        label = self._labels[split][number]
        return None if label is None or label < 0 else int(label)  # -1 is how test splits without labels are written

    def _row(self, key: str) -> Mapping[str, Any]:
        split, number = self._place(key)
        row: Mapping[str, Any] = self._tables[split][number]
        return row

    def _place(self, key: str) -> tuple[str, int]:
        """Split and row of an image."""
        split, _, number = key.rpartition("/")
        table = self._tables.get(split)
        if table is None or not re.fullmatch(r"\d{6,}", number) or int(number) >= len(table):
            raise BadRequestError(
                f"data set {self._info.name!r} has no image {key!r}",
                hint=f"keys are SPLIT/000000 and so on; splits: {', '.join(self._tables)}",
            )
        return split, int(number)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Columns:
    """Which columns hold what."""

    image: str
    label: str | None
    mask: str | None

    @classmethod
    def of(cls, features: Mapping[str, Any], text: str) -> _Columns:
        images = _typed(features, "Image")
        if not images:
            raise BadRequestError(
                f"'{PREFIX}{text}' has no column of type Image; its columns: {', '.join(features)}",
                hint="cast the column of images to datasets.Image() and save the data set again",
            )
        masks = [name for name in images if name.lower() in MASK_COLUMNS]
        pictures = [name for name in images if name not in masks] or masks[:1]
        image = next((name for name in _IMAGE_COLUMNS if name in pictures), pictures[0])
        labels = _typed(features, "ClassLabel")
        return cls(
            image=image,
            label=next((name for name in _LABEL_COLUMNS if name in labels), labels[0] if labels else None),
            mask=next((name for name in masks if name != image), None),
        )

    def undecoded(self, table: Any) -> Any:
        """The three columns of ``table``, images as bytes and not as pixels."""
        from datasets import Image

        chosen = [name for name in (self.image, self.label, self.mask) if name is not None]
        table = table.select_columns(chosen)
        for name in (self.image, self.mask):
            table = table if name is None else table.cast_column(name, Image(decode=False))
        return table


def _typed(features: Mapping[str, Any], kind: str) -> list[str]:
    return [name for name, feature in features.items() if type(feature).__name__ == kind]


def _load(where: HubName) -> dict[str, Any]:
    """The tables of a data set by split, mapped from disk."""
    try:
        import datasets
    except ImportError as error:
        raise BadRequestError(
            f"'{PREFIX}{where.name}' needs the library `datasets`, which is not installed",
            hint="pip install 'featstore[datasets]'",
        ) from error
    folder = where.folder
    with _translated(where):
        if folder is not None and any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
            loaded = datasets.load_from_disk(folder)
        else:
            # never trust_remote_code: from version 4 the library runs no scripts of data sets at all
            loaded = datasets.load_dataset(where.name, name=where.config, revision=where.revision)
    tables = loaded if isinstance(loaded, dict) else {str(loaded.split or "all"): loaded}
    if not any(len(table) for table in tables.values()):
        raise BadRequestError(f"'{PREFIX}{where.name}' holds no rows", hint="name another configuration")
    return dict(tables)


@contextlib.contextmanager
def _translated(where: HubName) -> Iterator[None]:
    """The library's errors as those of this package."""
    try:
        yield
    except FeatstoreError:
        raise
    except (FileNotFoundError, ConnectionError) as error:
        raise NotFoundError(
            f"cannot read '{PREFIX}{where.name}': {_first_line(error)}",
            hint="check the name and the network; private data sets need `hf auth login`",
        ) from error
    except Exception as error:  # the library raises whatever its readers raise
        raise BadRequestError(
            f"cannot read '{PREFIX}{where.name}': {_first_line(error)}",
            hint="name its configuration as hub:OWNER/NAME#CONFIG, or save it with save_to_disk and name the folder",
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _bytes(cell: Mapping[str, Any] | None, key: str) -> bytes:
    """The bytes of an undecoded image: in the table, or in a file on this machine that it names."""
    if cell is None or (cell["bytes"] is None and not cell["path"]):
        raise UnreadableImageError(f"{key}: the table has no image there")
    if cell["bytes"] is not None:
        data: bytes = cell["bytes"]
        return data
    if "://" in cell["path"]:
        raise UnreadableImageError(f"{key}: the table only has the address {cell['path']}, which is not fetched")
    try:
        return Path(cell["path"]).read_bytes()
    except OSError as error:
        raise UnreadableImageError(f"{key}: {cell['path']}: {error.strerror or error}") from error


def _digests(table: Any, column: str) -> list[str]:
    """SHA-256 (hex) of each image's bytes; kept in the user's cache as long as the table's files stay as they are."""
    stats = [(one["filename"], Path(one["filename"]).stat()) for one in table.cache_files]
    identity = json.dumps([column, *((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)])
    known = cache.load("hub-digests", identity) if stats else None
    if isinstance(known, list) and len(known) == len(table):
        return known
    digests, inside = [], True
    for batch in table.select_columns([column]).iter(batch_size=_HASHED_ROWS):
        for cell in batch[column]:
            inside = inside and cell is not None and cell["bytes"] is not None
            try:
                digests.append(hashlib.sha256(_bytes(cell, "")).hexdigest())
            except UnreadableImageError:
                place = f"featstore: row {len(digests)} has no image {cell and cell['path']}"
                digests.append(hashlib.sha256(place.encode()).hexdigest())
    if stats and inside:  # images in files of their own may change without the table
        cache.save("hub-digests", identity, digests)
    return digests


def _open(_where: Path | None) -> Dataset:
    raise BadRequestError("hub:OWNER/NAME stands for a data set of the Hub", hint="e.g. hub:uoft-cs/cifar10")


ENTRY = DatasetEntry(
    title="data sets of the Hugging Face Hub, or folders that its library `datasets` wrote",
    how_to_get="write its name in place of OWNER/NAME, e.g. hub:uoft-cs/cifar10; pip install 'featstore[datasets]'",
    opener=_open,
)
