"""``folder:PATH``: what is taken for an image, for a mask, for a split; and what is refused."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featstore.datasets import UnreadableImageError, resolve
from featstore.datasets.folder import FolderDataset
from featstore.errors import BadRequestError


def save_image(path: Path, *, height: int = 6, width: int = 8, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def save_mask(path: Path, *, height: int = 6, width: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = (np.arange(height * width) % 5).astype(np.uint8).reshape(height, width)
    if path.suffix == ".npy":
        np.save(path, labels)
    else:
        Image.fromarray(labels).save(path)
    return path


def keys_of(folder: Path) -> list[str]:
    return [sample.key for sample in resolve(f"folder:{folder}").samples]


def test_images_of_every_suffix_in_order_of_their_path(tmp_path: Path) -> None:
    names = ["b.JPG", "a.jpeg", "sub/c.png", "sub/deep/d.webp", "e.bmp", "f.tif", "g.TIFF", "Z.jpg"]
    for name in names:
        save_image(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    save_image(tmp_path / ".hidden.png")
    save_image(tmp_path / ".hidden" / "h.png")
    assert keys_of(tmp_path) == sorted(names)


def test_digests_are_of_the_files_bytes(tmp_path: Path) -> None:
    for number in range(20):
        save_image(tmp_path / f"{number:02d}.png", seed=number)
    for sample in resolve(f"folder:{tmp_path}").samples:
        assert sample.digest == hashlib.sha256((tmp_path / sample.key).read_bytes()).hexdigest()


def test_unicode_names(tmp_path: Path) -> None:
    names = ["写真/馬.png", "Pferd ü.png", "emoji 🐴.png", "a'b\"c$d.png", "new\nline.png"]
    for name in names:
        save_image(tmp_path / "Пони" / name)
        save_mask((tmp_path / "Пони" / name).with_suffix(".npy"))
    dataset = resolve(f"folder:{tmp_path / 'Пони'}")
    assert [sample.key for sample in dataset.samples] == sorted(names)
    for name in names:
        assert dataset.image(name).shape == (6, 8, 3)
        assert dataset.mask(name) is not None
    assert dataset.info.name.startswith("folder-")


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    os.rename(os.fsencode(tmp_path / "a.png"), os.fsencode(tmp_path) + b"/\xff.png")  # noqa: PTH104 - bytes
    with pytest.raises(BadRequestError, match="not UTF-8"):
        resolve(f"folder:{tmp_path}")


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("a.jpg", "a.npy"),
        ("a.jpg", "a_mask.png"),
        ("a.png", "a_mask.PNG"),
        ("sub/a.jpg", "sub/masks/a.png"),
        ("sub/a.jpg", "sub/masks/a.npy"),
        ("a.b.jpg", "a.b.npy"),
        ("images/a.jpg", "masks/a.png"),
        ("train/images/a.jpg", "train/masks/a.npy"),
    ],
)
def test_where_masks_lie(tmp_path: Path, image: str, mask: str) -> None:
    save_image(tmp_path / image)
    save_mask(tmp_path / mask)
    dataset = resolve(f"folder:{tmp_path}")
    assert [sample.key for sample in dataset.samples] == [image]
    found = dataset.mask(image)
    assert found is not None
    np.testing.assert_array_equal(found, (np.arange(48) % 5).reshape(6, 8))


def test_an_image_is_not_mistaken_for_a_mask(tmp_path: Path) -> None:
    save_image(tmp_path / "a.jpg")
    save_image(tmp_path / "a.png")  # an image of the same stem
    save_image(tmp_path / "venetian_mask.png")  # there is no image called venetian
    dataset = resolve(f"folder:{tmp_path}")
    assert [sample.key for sample in dataset.samples] == ["a.jpg", "a.png", "venetian_mask.png"]
    assert all(dataset.mask(sample.key) is None for sample in dataset.samples)


def test_arrays_that_belong_to_no_image_are_left_alone(tmp_path: Path) -> None:
    save_image(tmp_path / "a.jpg")
    np.save(tmp_path / "embeddings.npy", np.zeros((7, 512), np.float32))
    assert keys_of(tmp_path) == ["a.jpg"]


def test_two_masks_of_one_image_are_refused(tmp_path: Path) -> None:
    save_image(tmp_path / "a.jpg")
    save_mask(tmp_path / "a.npy")
    save_mask(tmp_path / "a_mask.png")
    with pytest.raises(BadRequestError, match=r"more than one mask: a\.npy, a_mask\.png"):
        resolve(f"folder:{tmp_path}")


def test_a_folder_of_masks_of_which_none_fits_is_refused(tmp_path: Path) -> None:
    save_image(tmp_path / "a.jpg")
    save_mask(tmp_path / "masks" / "a_labels.png")
    with pytest.raises(BadRequestError, match=r"1 masks, e\.g\. 'masks/a_labels\.png', but none belongs"):
        resolve(f"folder:{tmp_path}")


def test_a_mask_of_another_size_is_found_from_the_headers_alone(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", height=64, width=48)
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[:200])  # its header is whole, its pixels are not
    mask = save_mask(tmp_path / "a.npy", height=48, width=64)
    with pytest.raises(BadRequestError) as caught:
        resolve(f"folder:{tmp_path}")
    message = str(caught.value)
    assert str(mask) in message
    assert "64 x 48 px" in message
    assert "48 x 64 px" in message
    save_mask(tmp_path / "a.npy", height=64, width=48)
    with pytest.raises(UnreadableImageError):
        resolve(f"folder:{tmp_path}").image("a.png")


def test_a_mask_fits_the_image_as_it_is_shown(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "a.jpg", exif=exif)
    save_mask(tmp_path / "a.npy", height=30, width=20)
    dataset = resolve(f"folder:{tmp_path}")
    mask = dataset.mask("a.jpg")
    assert mask is not None
    assert dataset.image("a.jpg").shape[:2] == mask.shape == (30, 20)


def test_a_mask_that_is_none_is_refused(tmp_path: Path) -> None:
    save_image(tmp_path / "a.jpg")
    save_image(tmp_path / "a_mask.png")
    with pytest.raises(BadRequestError, match="holds colours"):
        resolve(f"folder:{tmp_path}")


def test_splits_come_from_the_top_folders(tmp_path: Path) -> None:
    for name in ("train/a.png", "Test/deep/b.png", "val/c.png", "other/d.png", "e.png", "train.png"):
        save_image(tmp_path / name)
    splits = {sample.key: sample.split for sample in resolve(f"folder:{tmp_path}").samples}
    assert splits == {
        "train/a.png": "train",
        "Test/deep/b.png": "test",
        "val/c.png": "val",
        "other/d.png": "all",
        "e.png": "all",
        "train.png": "all",
    }


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(BadRequestError) as caught:
        resolve(f"folder:{tmp_path}")
    assert str(tmp_path) in str(caught.value)
    assert ".jpg, .jpeg, .png, .webp, .bmp, .tif, .tiff" in str(caught.value)
    assert caught.value.hint


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRequestError, match="does not exist"):
        resolve(f"folder:{tmp_path / 'absent'}")
    image = save_image(tmp_path / "a.png")
    with pytest.raises(BadRequestError, match="is a file"):
        resolve(f"folder:{image}")


def test_broken_files_are_samples_that_fail_when_read(tmp_path: Path) -> None:
    save_image(tmp_path / "good.jpg", height=64, width=64)
    whole = (tmp_path / "good.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("Dear diary")
    (tmp_path / "broken.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")
    dataset = resolve(f"folder:{tmp_path}")
    assert [sample.key for sample in dataset.samples] == ["broken.png", "cut.jpg", "good.jpg", "text.png"]
    assert len({sample.digest for sample in dataset.samples}) == 4
    assert dataset.image("good.jpg").shape == (64, 64, 3)
    for key, reason in (
        ("cut.jpg", "truncated"),
        ("text.png", "not an image"),
        ("broken.png", r"broken link .*nowhere"),
    ):
        with pytest.raises(UnreadableImageError, match=reason):
            dataset.image(key)


def test_a_repaired_file_has_another_digest(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to(tmp_path / "later.dat")
    (before,) = resolve(f"folder:{tmp_path}").samples
    save_image(tmp_path / "b.png").rename(tmp_path / "later.dat")
    (after,) = resolve(f"folder:{tmp_path}").samples
    assert before.digest != after.digest


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    save_image(tmp_path / "outside" / "a.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train").symlink_to(tmp_path / "outside")
    (tmp_path / "outside" / "back").symlink_to(tmp_path / "set")
    assert keys_of(tmp_path / "set") == ["train/a.png"]


def test_an_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    save_image(tmp_path / "horse.png")
    dataset = resolve(f"folder:{tmp_path}")
    for read in (dataset.image, dataset.mask):
        with pytest.raises(BadRequestError, match=r"horses\.png") as caught:
            read("horses.png")
        assert caught.value.hint == "did you mean 'horse.png'?"


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("Photos", "photos"),
        ("My Photos (2)", "my_photos__2_"),
        ("toyhorse", "folder-toyhorse"),
        ("catalog", "folder-catalog"),
        ("__meta", "meta"),
        ("x" * 80, "x" * 60),
    ],
)
def test_the_name_in_the_store(tmp_path: Path, folder: str, name: str) -> None:
    save_image(tmp_path / folder / "a.png")
    assert resolve(f"folder:{tmp_path / folder}").info.name == name.rstrip("_.")


def test_captions_are_refused(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    dataset = FolderDataset(tmp_path)
    assert dataset.caption_source is None
    with pytest.raises(BadRequestError, match="no captions"):
        dataset.caption("a.png", "fine")


def image_labels(folder: Path) -> tuple[tuple[str, ...], dict[str, int | None]]:
    dataset = resolve(f"folder:{folder}")
    return dataset.info.image_classes, {sample.key: dataset.image_label(sample.key) for sample in dataset.samples}


def test_images_that_are_sorted_into_folders_have_classes(tmp_path: Path) -> None:
    for name in ("dog/a.png", "cat/b.png", "dog/c.jpg"):
        save_image(tmp_path / "plain" / name)
        save_image(tmp_path / "split" / "train" / name)
    save_image(tmp_path / "split" / "Test" / "horse" / "d.png")
    save_mask(tmp_path / "plain" / "dog" / "a.npy")
    assert image_labels(tmp_path / "plain") == (("cat", "dog"), {"cat/b.png": 0, "dog/a.png": 1, "dog/c.jpg": 1})
    assert image_labels(tmp_path / "split") == (
        ("cat", "dog", "horse"),
        {"Test/horse/d.png": 2, "train/cat/b.png": 0, "train/dog/a.png": 1, "train/dog/c.jpg": 1},
    )


@pytest.mark.parametrize(
    "names",
    [
        ["a.png", "cat/b.png"],
        ["train/a.png", "test/b.png"],
        ["train/cat/a.png", "test/b.png"],
        ["train/cat/a.png", "cat/b.png"],
        ["train/cat/a.png", "other/cat/b.png"],
        ["cat/sub/a.png", "dog/b.png"],
        ["train/images/a.png", "test/images/b.png"],
        ["images/a.png"],
    ],
    ids=" ".join,
)
def test_other_folders_have_none(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        save_image(tmp_path / name)
    assert image_labels(tmp_path) == ((), dict.fromkeys(sorted(names)))


def test_the_class_of_an_unknown_image_is_refused(tmp_path: Path) -> None:
    save_image(tmp_path / "cat" / "a.png")
    with pytest.raises(BadRequestError, match="unknown image"):
        resolve(f"folder:{tmp_path}").image_label("cat/b.png")
