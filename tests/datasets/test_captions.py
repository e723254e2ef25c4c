"""Caption files: three forms, one identity, and everything that can be wrong with one."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import pytest

from featstore.datasets import captions
from featstore.datasets.captions import CaptionDocument, load_captions, read_document, write_document
from featstore.errors import BadRequestError, NotFoundError, StorageError

TEXTS = {"b.png": "a “fine” horse\u2028on a mat", "train/ä.jpg": "", "a.png": "a cat\nand a dog"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "captions.json"


def test_all_forms_hold_the_same_texts_and_have_the_same_identity(file: Path) -> None:
    lines = [json.dumps({"key": key, "text": text}, ensure_ascii=False) for key, text in TEXTS.items()]
    forms = {
        "plain": json.dumps(TEXTS),
        "pretty, of another order": json.dumps(dict(reversed(TEXTS.items())), indent=4, ensure_ascii=False),
        "with a mark": "\ufeff" + json.dumps(TEXTS),
        "lines": "\n".join(lines),
        "lines with gaps": "\n" + "\r\n\r\n".join(lines) + "\n",
        "written": json.dumps({"captioner": {"name": "x"}, "texts": TEXTS, "digests": {"a.png": "0" * 64}}),
    }
    # Sorted names, no spaces, UTF-8: written out here.
    inside = ",".join(
        f"{json.dumps(k, ensure_ascii=False)}:{json.dumps(TEXTS[k], ensure_ascii=False)}" for k in sorted(TEXTS)
    )
    source = "captions/" + hashlib.sha256(f"{{{inside}}}".encode()).hexdigest()
    for form, content in forms.items():
        file.write_bytes(content.encode())
        found = load_captions(file)
        assert found.texts == TEXTS, form
        assert found.source == source, form
    for changed in (TEXTS | {"a.png": "a cat"}, TEXTS | {"new.png": "x"}, dict(list(TEXTS.items())[1:])):
        file.write_text(json.dumps(changed))
        assert load_captions(file).source != source


def test_one_line_is_a_line_and_not_an_image_called_key(file: Path) -> None:
    file.write_text('{"key": "a.png", "text": "a cat"}')
    assert load_captions(file).texts == {"a.png": "a cat"}
    file.write_text('{"key": "a.png", "text": "a cat", "other": "x"}')
    assert set(load_captions(file).texts) == {"key", "text", "other"}
    file.write_text('{"texts": "an image of this name"}')
    assert load_captions(file).texts == {"texts": "an image of this name"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no JSON"),
        (b'{"a.png": "a cat"', "no JSON"),
        (b"[1, 2]", "a JSON list and no object"),
        (b'{"a.png": 3}', "the text of 'a.png' is no text: 3"),
        (b'{"a.png": null}', "the text of 'a.png' is no text"),
        (b'{"a.png": "x", "b.png": "y", "a.png": "z"}', "'a.png' is in it twice"),
        (b'{"texts": {"a.png": "x", "a.png": "z"}}', "'a.png' is in it twice"),
        (b'{"texts": {"a.png": ["x"]}}', "the text of 'a.png' is no text: ['x']"),
        (b'{"texts": {}, "digests": {"a.png": 1}}', "'digests'"),
        (b'{"texts": {}, "captioner": "me"}', "'captioner'"),
        (b'{"key": "a", "text": "x"}\n{"key": "a", "text": "y"}', "'a' is in it twice"),
        (b'{"key": "a", "text": "x"}\n{"key": "b"}', "line 2 is not"),
        (b'{"key": "a", "text": "x"}\n{"key": 1, "text": "y"}', "line 2 is not"),
        (b'{"key": "a", "text": "x"}\n{"key": "b", "text": 1}', "the text of 'b' is no text: 1"),
        (b'{"key": "a", "text": "x"}\nwhat', "no JSON"),
        (b'{"a.png": "\xff"}', "no UTF-8"),
        (b'{"a.png": "\\ud800"}', "half a character"),
        (b"[" * 100_000, "no JSON"),
        (json.dumps({"a.png": "x" * 10_001}).encode(), "10001 characters; 10000 are taken"),
    ],
)  # fmt: skip
def test_what_is_no_caption_file(file: Path, content: bytes, said: str) -> None:
    file.write_bytes(content)
    with pytest.raises(BadRequestError) as caught:
        load_captions(file)
    assert said in str(caught.value)
    assert str(file) in str(caught.value)
    assert len(str(caught.value)) < 400


def test_files_that_are_absent_or_too_large(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFoundError, match="no captions file") as caught:
        load_captions(file)
    assert f"--out {file}" in str(caught.value.hint)
    with pytest.raises(BadRequestError, match="directory"):
        load_captions(file.parent)
    file.write_text(json.dumps(TEXTS))
    monkeypatch.setattr(captions, "FILE_MAX_BYTES", 10)
    with pytest.raises(BadRequestError, match="larger than"):
        load_captions(file)


def test_every_wanted_image_has_a_text(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file.write_text(json.dumps({f"{n}.png": "x" for n in range(6)}))
    found = load_captions(file)
    keys = [f"{n}.png" for n in range(10)]
    found.check(keys, keys[:6], remedy="do it")
    assert not caplog.records
    with pytest.raises(BadRequestError, match=r"no text for 4 of 9 images: '6.png', '7.png', '8.png', \.\.$") as caught:
        found.check(keys, keys[1:], remedy="do it")
    assert caught.value.hint == "`do it` adds them"
    with caplog.at_level(logging.WARNING):
        found.check(keys[2:], keys[2:4], remedy="do it")
    assert "2 of its texts belong to no image of the data set: '0.png', '1.png'" in caplog.text


def test_what_is_written_is_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = CaptionDocument(texts=TEXTS, digests={"a.png": "0" * 64}, captioner={"name": "x", "prompt": ""})
    write_document(file, document)
    assert read_document(file) == document
    assert [path.name for path in file.parent.iterdir()] == [file.name]

    def fail(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(StorageError, match="No space left"):
        write_document(file, CaptionDocument())
    assert read_document(file) == document
    assert [path.name for path in file.parent.iterdir()] == [file.name]
