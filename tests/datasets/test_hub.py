"""Tables of the library ``datasets``, from folders: nothing is fetched."""

from __future__ import annotations

import hashlib
import io
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
from datasets import ClassLabel, DatasetDict, Features, Value
from datasets import Dataset as Table
from datasets import Image as ImageColumn
from PIL import Image

from featstore.datasets import UnreadableImageError, resolve
from featstore.datasets.hub import HubName
from featstore.errors import BadRequestError, NotFoundError

NAMES = ["cat", "dog"]


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def labels_of(seed: int) -> np.ndarray:
    return np.full((5, 7), seed, np.uint8)


def table(seeds: range, *, image: str = "image", label: str | None = "label", mask: str | None = None) -> Table:
    columns = {"number": [*seeds], image: [{"bytes": png(picture(seed)), "path": None} for seed in seeds]}
    features = {"number": Value("int64"), image: ImageColumn()}
    if label is not None:
        columns[label], features[label] = [seed % 2 for seed in seeds], ClassLabel(names=NAMES)
    if mask is not None:
        columns[mask] = [{"bytes": png(labels_of(seed)), "path": None} for seed in seeds]
        features[mask] = ImageColumn()
    return Table.from_dict(columns, features=Features(features))


def write_as_it_is(one: Table, folder: Path) -> None:
    """As parquet, without what the library's own writers do: they fetch what rows name, and put it into the file."""
    folder.mkdir()
    pyarrow.parquet.write_table(one.data.table, folder / "train.parquet")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "My Cats"
    DatasetDict(train=table(range(3)), validation=table(range(3, 5)), test=table(range(5, 6))).save_to_disk(folder)
    return folder


def test_what_save_to_disk_wrote(saved: Path) -> None:
    dataset = resolve(f"hub:{saved}")
    assert [(one.key, one.split) for one in dataset.samples] == [
        *((f"train/{k:06d}", "train") for k in range(3)),
        *((f"validation/{k:06d}", "val") for k in range(2)),
        ("test/000000", "test"),
    ]
    for seed, one in enumerate(dataset.samples):
        assert one.digest == hashlib.sha256(png(picture(seed))).hexdigest()
        np.testing.assert_array_equal(dataset.image(one.key), picture(seed))
        assert dataset.image_label(one.key) == seed % 2
        assert dataset.mask(one.key) is None
    assert dataset.info.image_classes == tuple(NAMES)
    assert dataset.info.name == "my_cats"


def test_a_folder_of_parquet_files(tmp_path: Path) -> None:
    for split, seeds in (("train", range(4)), ("test", range(4, 6))):
        (tmp_path / "parquet" / "data").mkdir(parents=True, exist_ok=True)
        table(seeds).to_parquet(tmp_path / "parquet" / "data" / f"{split}-00000-of-00001.parquet")
    dataset = resolve(f"hub:{tmp_path / 'parquet'}")
    assert [one.split for one in dataset.samples] == ["train"] * 4 + ["test"] * 2
    np.testing.assert_array_equal(dataset.image("test/000001"), picture(5))
    assert dataset.image_label("test/000001") == 1


def test_a_table_without_splits(tmp_path: Path) -> None:
    table(range(2)).save_to_disk(tmp_path / "one")
    assert [(one.key, one.split) for one in resolve(f"hub:{tmp_path / 'one'}").samples] == [
        ("all/000000", "all"),
        ("all/000001", "all"),
    ]


@pytest.mark.parametrize(
    ("image", "label", "mask"),
    [
        ("img", "fine_label", "annotation"),
        ("photo", None, "segmentation"),
        ("image", "label", "Mask"),
        ("mask", "x", None),
    ],
)
def test_columns_are_found_by_type_and_name(tmp_path: Path, image: str, label: str | None, mask: str | None) -> None:
    table(range(3), image=image, label=label, mask=mask).save_to_disk(tmp_path / "set")
    dataset = resolve(f"hub:{tmp_path / 'set'}")
    np.testing.assert_array_equal(dataset.image("all/000002"), picture(2))
    assert dataset.image_label("all/000001") == (None if label is None else 1)
    found = dataset.mask("all/000002")
    assert found is None if mask is None else (found == 2).all()


def test_a_better_known_column_goes_first(tmp_path: Path) -> None:
    one = table(range(2), image="thumbnail", label="coarse_label")
    one = one.add_column("image", [{"bytes": png(picture(9)), "path": None}] * 2, feature=ImageColumn())
    one = one.add_column("label", [1, 0], feature=ClassLabel(names=["x", "y"]))
    one.save_to_disk(tmp_path / "set")
    dataset = resolve(f"hub:{tmp_path / 'set'}")
    np.testing.assert_array_equal(dataset.image("all/000000"), picture(9))
    assert dataset.info.image_classes == ("x", "y")
    assert dataset.image_label("all/000000") == 1


def test_rows_without_label_or_image(tmp_path: Path) -> None:
    features = Features({"image": ImageColumn(), "label": ClassLabel(names=NAMES)})
    files = tmp_path / "a.png"
    files.write_bytes(png(picture(1)))
    cells = [
        {"bytes": png(picture(0)), "path": None},
        {"bytes": None, "path": str(files)},
        None,
        {"bytes": None, "path": "https://example.org/a.png"},
        {"bytes": None, "path": str(tmp_path / "gone.png")},
        {"bytes": b"no picture", "path": None},
    ]
    one = Table.from_dict({"image": cells, "label": [-1, 0, 1, None, 1, 0]}, features=features)
    write_as_it_is(one, tmp_path / "set")
    dataset = resolve(f"hub:{tmp_path / 'set'}")
    keys = [sample.key for sample in dataset.samples]
    assert [dataset.image_label(key) for key in keys] == [None, 0, 1, None, 1, 0]
    np.testing.assert_array_equal(dataset.image(keys[1]), picture(1))
    assert len({sample.digest for sample in dataset.samples}) == 6
    for key, reason in zip(keys[2:], ["no image there", "not fetched", "No such file", "not an image"], strict=True):
        with pytest.raises(UnreadableImageError, match=reason):
            dataset.image(key)
    # the file that a row names may change without the table
    files.write_bytes(png(picture(7)))
    again = resolve(f"hub:{tmp_path / 'set'}").samples
    assert [a.digest == b.digest for a, b in zip(again, dataset.samples, strict=True)] == [True, False, *[True] * 4]


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    for split, name, seed in (("train", "cat", 0), ("train", "dog", 1), ("test", "dog", 3)):
        (tmp_path / "set" / split / name).mkdir(parents=True)
        (tmp_path / "set" / split / name / "a.png").write_bytes(png(picture(seed)))
    dataset = resolve(f"hub:{tmp_path / 'set'}")
    assert dataset.info.image_classes == ("cat", "dog")
    np.testing.assert_array_equal(dataset.image("test/000000"), picture(3))
    assert [dataset.image_label(one.key) for one in dataset.samples] == [0, 1, 1]


def test_digests_are_kept_until_the_table_changes(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = resolve(f"hub:{saved}").samples
    with monkeypatch.context() as patch:
        patch.setattr("featstore.datasets.hub._bytes", lambda *_: pytest.fail("read again"))
        assert resolve(f"hub:{saved}").samples == first
    DatasetDict(train=table(range(1, 4))).save_to_disk(saved.with_name("new"))
    (saved / "train" / "data-00000-of-00001.arrow").write_bytes(
        (saved.with_name("new") / "train" / "data-00000-of-00001.arrow").read_bytes()
    )
    assert resolve(f"hub:{saved}").samples[0].digest == first[1].digest


def test_unknown_keys_are_refused(saved: Path) -> None:
    dataset = resolve(f"hub:{saved}")
    for key in ("train/000003", "train/3", "train/-00001", "other/000000", "000000"):
        with pytest.raises(BadRequestError, match=f"no image '{key}'") as caught:
            dataset.image(key)
        assert "train, validation, test" in caught.value.hint


def test_a_table_without_images_is_refused(tmp_path: Path) -> None:
    Table.from_dict({"text": ["a"], "label": [0]}).save_to_disk(tmp_path / "texts")
    with pytest.raises(BadRequestError, match="no column of type Image; its columns: text, label"):
        resolve(f"hub:{tmp_path / 'texts'}")
    DatasetDict().save_to_disk(tmp_path / "empty")
    with pytest.raises(BadRequestError, match="holds no rows"):
        resolve(f"hub:{tmp_path / 'empty'}")


def test_scripts_are_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "scripted"
    folder.mkdir()
    target = tmp_path / "touched"
    (folder / "scripted.py").write_text(f"import pathlib\npathlib.Path({str(target)!r}).touch()\n")
    with pytest.raises((BadRequestError, NotFoundError), match="cannot read"):
        resolve(f"hub:{folder}")
    assert not target.exists()


def test_what_cannot_be_reached_is_not_found() -> None:
    with pytest.raises(NotFoundError, match="cannot read 'hub:nobody/nothing'") as caught:
        resolve("hub:nobody/nothing")
    assert "network" in caught.value.hint


def test_an_unknown_configuration_is_a_bad_request(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    table(range(2)).to_parquet(tmp_path / "set" / "train.parquet")
    with pytest.raises(BadRequestError, match="colours") as caught:
        resolve(f"hub:{tmp_path / 'set'}#colours")
    assert "#CONFIG" in caught.value.hint


def test_names_are_taken_apart(tmp_path: Path) -> None:
    assert HubName.parse("a/b") == HubName(name="a/b")
    assert HubName.parse("a/b@v1.0#fine") == HubName(name="a/b", revision="v1.0", config="fine")
    assert HubName.parse("beans#x") == HubName(name="beans", config="x")
    odd = tmp_path / "a@b#c"
    odd.mkdir()
    assert HubName.parse(str(odd)) == HubName(name=str(odd))
    assert HubName.parse(f"{odd}#d") == HubName(name=str(odd), config="d")
    for text in ("", "a/b/c", "../a", "@v1", "a b/c", str(tmp_path / "absent")):
        with pytest.raises(BadRequestError, match="names no data set of the Hub and no folder"):
            HubName.parse(text)
    with pytest.raises(BadRequestError, match="has no revision 'v1'"):
        HubName.parse(f"{tmp_path}@v1")


def test_names_in_a_store() -> None:
    assert HubName.parse("Uoft-CS/Cifar10").store_name(frozenset()) == "uoft-cs--cifar10"
    assert HubName.parse("a/b#Plain Text").store_name(frozenset()) == "a--b--plain_text"
    assert HubName.parse("cifar10").store_name(frozenset({"cifar10"})) == "hub-cifar10"


def test_without_the_library_the_hint_says_how_to_get_it(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BadRequestError, match="needs the library `datasets`") as caught:
        resolve(f"hub:{saved}")
    assert caught.value.hint == "pip install 'featstore[datasets]'"


@pytest.mark.parametrize("name", ["hub", "hub:"])
def test_the_prefix_alone_is_refused(name: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        resolve(name)
    assert "hub:OWNER/NAME" in caught.value.hint + str(caught.value)
