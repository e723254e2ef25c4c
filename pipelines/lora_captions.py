"""The texts that a LoRA is trained with, one an image."""

from __future__ import annotations

import abc
import shlex
from collections.abc import Sequence
from pathlib import Path

from featstore.datasets import Dataset, UnreadableImageError
from featstore.datasets.captions import Captions as CaptionFile
from featstore.datasets.captions import load_captions
from featstore.errors import BadRequestError, unknown_name
from featstore.models.digests import file_sha256

KINDS = ("empty", "tags", "sentences")
"""What `--captions` takes beside a file."""

_ARTICLES = frozenset({"a", "an", "the"})
_BACKGROUND = "background"
_CAPTION_KIND = "fine"


class LoraCaptions(abc.ABC):
    """A text for each image."""

    kind: str
    """How they were made, for the notes beside a LoRA."""

    @abc.abstractmethod
    def text(self, key: str) -> str:
        """The text of one image."""

    def check(self, keys: Sequence[str]) -> None:  # noqa: B027 - most kinds have a text for every image
        """Refuse images without a text.

        Raises:
            BadRequestError: if there are some.
        """


def open_captions(kind: str, dataset: Dataset, named: str) -> LoraCaptions:
    """The texts that ``--captions`` asks for.

    Args:
        kind: ``empty``: no text. ``tags``: the words of the data set's plain prompt and the names of the classes that
            the image's mask shows, where both are known. ``sentences``: the data set's own captions, else its plain
            prompt. Anything else is the path of a caption file.
        dataset: what the images are from.
        named: how the user named it.

    Raises:
        BadRequestError: for an unknown kind, or a file that holds no captions.
        NotFoundError: if there is no such file.
    """
    if kind == "empty":
        return _Fixed("empty", "")
    if kind == "tags":
        return _Tags(dataset)
    if kind == "sentences":
        return _Fixed(kind, dataset.info.plain_prompt) if dataset.caption_source is None else _Own(dataset)
    path = Path(kind).expanduser()
    if path.suffix or "/" in kind or path.exists():
        return _File(load_captions(path), dataset, named)
    raise unknown_name("kind of captions", kind, [*KINDS, "FILE"])


class _Fixed(LoraCaptions):
    """One text for all."""

    def __init__(self, kind: str, text: str) -> None:
        self.kind, self._text = kind, text

    def text(self, key: str) -> str:
        return self._text


class _Own(LoraCaptions):
    """The data set's captions."""

    kind = "sentences"

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def text(self, key: str) -> str:
        return self._dataset.caption(key, _CAPTION_KIND)


class _Tags(LoraCaptions):
    """The plain prompt without its articles, and the classes in sight."""

    kind = "tags"

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        words = [word for word in dataset.info.plain_prompt.split() if word.lower() not in _ARTICLES]
        self._subject = " ".join(words)

    def text(self, key: str) -> str:
        return ", ".join(dict.fromkeys([self._subject, *self._classes(key)]))

    def _classes(self, key: str) -> list[str]:
        info = self._dataset.info
        try:
            mask = self._dataset.mask(key) if info.classes else None
        except UnreadableImageError:
            mask = None
        if mask is None:
            return []
        seen = sorted(set(mask.ravel().tolist()) - {info.ignore_label})
        names = [info.classes[label] for label in seen if label < len(info.classes)]
        return [name for name in names if name != _BACKGROUND]


class _File(LoraCaptions):
    """Texts of a caption file."""

    def __init__(self, captions: CaptionFile, dataset: Dataset, named: str) -> None:
        self._captions, self._dataset, self._named = captions, dataset, named
        # Its digest, for its path means nothing elsewhere.
        self.kind = f"file {file_sha256(captions.path)}"

    def check(self, keys: Sequence[str]) -> None:
        words = ["--dataset", self._named, "--captioner", "PATH_OR_ID", "--out", str(self._captions.path)]
        remedy = shlex.join(["featstore", "caption", *words])
        self._captions.check([sample.key for sample in self._dataset.samples], keys, remedy=remedy)

    def text(self, key: str) -> str:
        try:
            return self._captions.texts[key]
        except KeyError:
            raise BadRequestError(f"captions file {self._captions.path} has no text for image {key!r}") from None
