"""Where the files of known data sets come from: one archive for one set or for several.

A new data set with an archive is one line here. Sizes are what the publishers say or mirrors report; only those of the
server are relied on. Digests were published by others who use the same files: torchvision for CIFAR-10, gluon-cv for
ADE20K.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from featstore.datasets import ade20k, cifar10, label_scarce, spair71k

_MB = 10**6


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Archive:
    """A file to be downloaded, and what it unpacks to."""

    url: str
    """http or https; the last part of its path is the archive's name and ends in .zip, .tar.gz, .tgz or .tar."""
    folders: Mapping[str, str]
    """The folder of each data set in it, by the set's name; the same below the data root."""
    download_bytes: int
    """About how long it is. More than twice as much is refused."""
    unpacked_bytes: int
    """About how much the files in it take, for a look at the disk beforehand."""
    unpacked_limit_bytes: int
    """What its files must not exceed, whatever it says."""
    entries_limit: int
    """How many files and folders it may hold."""
    digest: str | None = None
    """``ALGORITHM:HEX`` where it is known; None: the first download is trusted, and later ones have to be equal."""

    @property
    def name(self) -> str:
        """The file's name."""
        return PurePosixPath(urlsplit(self.url).path).name


_LABEL_SCARCE = Archive(
    url=label_scarce.ARCHIVE_URL,
    folders={name: spec.folder for name, spec in label_scarce.SPECS.items()},
    download_bytes=47 * _MB,
    unpacked_bytes=250 * _MB,
    unpacked_limit_bytes=4_000 * _MB,
    entries_limit=50_000,
)

ARCHIVES: dict[str, Archive] = {
    **dict.fromkeys(label_scarce.SPECS, _LABEL_SCARCE),
    "cifar10": Archive(
        url=cifar10.ARCHIVE_URL,
        folders={"cifar10": cifar10.PICKLES},
        download_bytes=170_498_071,
        unpacked_bytes=187 * _MB,
        unpacked_limit_bytes=400 * _MB,
        entries_limit=100,
        digest="md5:c58f30108f718f92721af3b95e74349a",
    ),
    "spair71k": Archive(
        url=spair71k.ARCHIVE_URL,
        folders={"spair71k": "SPair-71k"},
        download_bytes=230 * _MB,
        unpacked_bytes=800 * _MB,
        unpacked_limit_bytes=4_000 * _MB,
        entries_limit=300_000,
    ),
    "ade20k": Archive(
        url=ade20k.ARCHIVE_URL,
        folders={"ade20k": ade20k.FOLDER},
        download_bytes=967_382_037,
        unpacked_bytes=1_050 * _MB,
        unpacked_limit_bytes=4_000 * _MB,
        entries_limit=200_000,
        digest="sha1:219e1696abb36c8ba3a3afe7fb2f4b4606a897c7",
    ),
}
"""By the data set's name; sets that share an archive have the same one."""

BY_HAND: dict[str, str] = {
    "cityscapes": "its publishers ask for an account and for their terms to be accepted",
}
"""Data sets whose files nobody can fetch without a person: why not. How to get them says their `DatasetEntry`."""
