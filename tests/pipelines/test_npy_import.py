"""Folders of .npy files of other code, brought into a store."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import zipfile
import zlib

import numpy as np
import pytest

import featstore
from featstore.errors import BadRequestError, CorruptError, NotCommittedError, NotFoundError, StorageError
from featstore.pipelines import npy_import, space
from featstore.pipelines.npy_files import UnusableMapError, read_map
from featstore.pipelines.npy_import import ImportConfig, execute, import_npy, make_plan
from featstore.pipelines.progress import Silent
from featstore.pipelines.reading import BucketConfig, open_bucket
from featstore.recipe import canonical_json
from tests.store import worker

UP, ATTN = "up-level1-upsampler-out", "attn"
SHAPES = {UP: (3, 4, 4), ATTN: (2, 8, 8), "aggregate": (5, 8, 8)}
SAID = {"model": "sd15", "technique": "prompt", "timestep": 51, "image_size_px": 512}


def map_of(key, layer, dtype=np.float16):
    rng = np.random.default_rng(zlib.crc32(f"{key} {layer}".encode()))
    return rng.standard_normal(SHAPES[layer]).astype(dtype)


class Place:
    """A folder of images, and a folder of features of them."""

    def __init__(self, root):
        self.images, self.folder, self.store = root / "photos", root / "features", root / "s.zarr"

    def add_images(self, *keys):
        """Not even images: nobody decodes them."""
        for key in keys:
            path = self.images / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(f"image {key}".encode())

    def save(self, path, array):
        path = self.folder / f"{path}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, array)
        return path

    def fill(self, keys, pattern="{layer}/{name}", layers=(UP, ATTN), name=lambda key: key.rsplit(".", 1)[0]):
        """Features of ``keys`` as the public code leaves them."""
        for key in keys:
            for layer in layers:
                self.save(pattern.format(layer=layer, name=name(key)), map_of(key, layer))

    def config(self, **changes):
        values = {"folder": self.folder, "dataset": f"folder:{self.images}", "store": str(self.store), **SAID}
        return ImportConfig(**(values | changes))

    def run(self, **changes):
        return import_npy(self.config(**changes))

    def stored(self, technique="prompt", **which):
        return featstore.open(self.store).dataset("photos").run(technique, **which)


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


@pytest.fixture
def few(place):
    """Four images and their features, as the public code leaves them by default."""
    place.keys = [f"{index:02d}.png" for index in range(4)]
    place.add_images(*place.keys)
    place.fill(place.keys)
    return place


def check(run, layers, keys):
    """Every one of ``keys``, and no other image, has its own map in every layer; names differ where renamed."""
    rows = [run.dataset.row_of[key] for key in keys]
    for stored, layer in layers.items():
        assert np.array_equal(run.numpy(stored, rows), np.stack([map_of(key, layer) for key in keys])), stored
    assert np.flatnonzero(run.valid(list(layers))).tolist() == sorted(rows)


LAYERS = {UP: UP, "attn-all": ATTN}
PATTERNS = {"layer-first": "{layer}/{name}", "image-first": "{name}/{layer}"}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("keys", [("a.jpg", "b.JPEG", "c.v2.png"), ("cats/1.jpg", "dogs/1.jpg", "dogs/2.jpg")])
def test_layouts_with_the_images_own_names(place, pattern, keys):
    place.add_images(*keys)
    place.fill(keys, PATTERNS[pattern])
    report = place.run()
    assert (report.imported, report.complete) == (3, True)
    assert (report.plan.survey.assigned.layout, report.plan.survey.assigned.names) == (pattern, "stem")
    assert dict(report.plan.layers) == {UP: (3, 4, 4), "attn-all": (2, 8, 8)}
    check(place.stored(timestep=51), LAYERS, keys)


@pytest.mark.parametrize("keys", [("a.jpg", "b.png"), ("cats/1.jpg", "dogs/1.jpg")])
def test_aggregated_features_lie_beside_each_other(place, keys):
    place.add_images(*keys)
    place.fill(keys, "{name}", ["aggregate"])
    assert place.run().plan.survey.assigned.layout == "aggregate"
    check(place.stored(), {"aggregate": "aggregate"}, keys)


def test_names_in_sub_folders_are_found_without_them(place):
    keys = [f"{split}/{name}.png" for split, name in (("train", "a"), ("train", "b"), ("test", "c"))]
    place.add_images(*keys)
    place.fill(keys, name=lambda key: key.split("/")[1][:-4])
    assert place.run().complete
    check(place.stored(), LAYERS, keys)


@pytest.mark.parametrize("pattern", [*PATTERNS.values(), "{name}"])
def test_positions_count_the_images_of_a_split_in_the_order_of_their_paths(place, pattern):
    keys = [f"{split}/{index}.png" for split, count in (("train", 12), ("test", 3)) for index in range(count)]
    place.add_images(*keys)
    names = {}
    for split in ("train", "test"):
        for position, key in enumerate(sorted(key for key in keys if key.startswith(split))):
            names[key] = f"{split}{position}"
    assert names["train/10.png"] == "train2"
    layers = (UP, ATTN) if "layer" in pattern else ["aggregate"]
    place.fill(keys, pattern, layers, names.get)
    report = place.run()
    assert report.complete
    assert report.plan.survey.assigned.names == "position"
    check(place.stored(), LAYERS if "layer" in pattern else {"aggregate": "aggregate"}, keys)


def test_positions_in_a_data_set_without_splits_count_all_of_it(few):
    few.folder.rename(few.folder.with_name("other"))
    few.fill(few.keys, name=lambda key: f"train{int(key[:2])}")
    assert few.run().complete
    check(few.stored(), LAYERS, few.keys)


@pytest.mark.parametrize("count", [3, 5])
def test_positions_that_count_other_images_are_refused_until_they_are_insisted_on(few, count):
    few.folder.rename(few.folder.with_name("other"))
    for position in range(count):
        few.save(f"{UP}/train{position}", map_of(f"{position:02d}.png", UP))
    with pytest.raises(BadRequestError, match="count images, but not those of split 'all': it has 4") as refused:
        few.run()
    assert "--names position" in refused.value.hint
    assert not few.store.exists()
    report = few.run(names="position")
    assert report.imported == min(count, 4)
    assert not report.complete
    assert report.plan.survey.assigned.strangers == ((f"{UP}/train4.npy",) if count == 5 else ())
    check(few.stored(), {UP: UP}, few.keys[:count])


def test_a_name_that_fits_two_images_needs_the_split(place):
    keys = ["train/1.png", "test/1.png"]
    place.add_images(*keys)
    place.fill(keys[1:], name=lambda key: "1")
    with pytest.raises(BadRequestError, match=r"files called '1' fit 2 images: 'test/1\.png', 'train/1\.png'"):
        place.run()
    assert place.run(split="test").complete
    check(place.stored(), LAYERS, ["test/1.png"])


def test_layouts_that_both_fit_need_the_one_meant(place):
    place.add_images("a.png", "b.png")
    place.save("x/a", map_of("a.png", UP))
    place.save("b/y", map_of("b.png", UP))
    with pytest.raises(BadRequestError, match=r"several layouts: layer-first \(1 files\), image-first \(1 files\)"):
        place.run()
    assert place.run(layout="layer-first").plan.survey.assigned.strangers == ("b/y.npy",)


def test_an_explicit_layout_takes_a_layer_that_is_called_like_an_image(place):
    place.add_images("attn.png", "b.png")
    place.fill(["attn.png", "b.png"], layers=[ATTN])
    with pytest.raises(BadRequestError, match="none of 2 files"):
        place.run()
    place.run(layout="layer-first")
    check(place.stored(), {"attn-all": ATTN}, ["attn.png", "b.png"])


def test_two_files_of_one_map_are_refused(few):
    few.save(f"{UP}/00.png", map_of("00.png", UP))
    with pytest.raises(BadRequestError, match=f"'{UP}/00.npy' and '{UP}/00.png.npy' are both layer"):
        few.run()


def test_layers_are_chosen_and_renamed(few):
    few.run(renamed={UP: "mine"}, layers=("mine",))
    check(few.stored(), {"mine": UP}, few.keys)
    with pytest.raises(BadRequestError, match=f"no files of layer '{ATTN}'; there are: attn-all, {UP}"):
        few.run(layers=(ATTN,))
    (few.folder / UP).rename(few.folder / "__up")
    with pytest.raises(BadRequestError, match="cannot be a name in a store") as refused:
        few.run()
    assert refused.value.hint == "--rename __up=NAME gives it another"
    few.run(renamed={"__up": "up"})


def test_what_is_not_known_is_not_claimed(few):
    few.run(prompt="a horse", denoise_from=60)
    run = few.stored()
    files = {
        path.relative_to(few.folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in few.folder.rglob("*.npy")
    }
    digest = hashlib.sha256(canonical_json({"featstore_import": 1, "files": files})).hexdigest()
    assert run.recipe.to_json() == {
        "model": "sd15",
        "weights_digest": digest,
        "technique": "prompt",
        "parameters": {"import": {"format": "npy", "layout": "layer-first", "names": "stem"}, "prompt": "a horse"},
        "timestep": 51,
        "denoise_from": 60,
        "scheduler": "imported",
        "seed": 0,
        "noise_ensemble": 1,
        "height_px": 512,
        "width_px": 512,
        "resampling": "bicubic",
        "compute_dtype": "float16",
        "precision": "float16",
        "reduce": None,
        "meaning": 0,
    }
    (made,) = run.provenance
    assert made["imported"] == {"from": str(few.folder), "files": 8}
    assert {"packages", "host", "user", "created"} <= made.keys()


def test_the_folder_is_the_identity_and_not_what_was_taken_of_it(few):
    """Layers are never part of a recipe, nor are the images that were asked for; every byte of the folder is."""
    first = make_plan(few.config()).recipe
    assert make_plan(few.config(layers=(UP,), limit=1)).recipe == first
    few.run(layers=(UP,), limit=1)
    report = few.run()
    assert (report.imported, report.plan.reused) == (4, 0)
    assert set(few.stored().layers) == {UP, "attn-all"}
    assert len(featstore.open(few.store).dataset("photos").runs()) == 1
    few.add_images("04.png")
    assert make_plan(few.config()).recipe == first
    path = few.folder / UP / "00.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\x11")
    assert make_plan(few.config()).recipe != first


def test_the_precision_is_that_of_the_whole_folder(few):
    few.save(f"{ATTN}/03", map_of("03.png", ATTN, np.float32))
    first = make_plan(few.config()).recipe
    assert first.precision == "float32"
    assert make_plan(few.config(layers=(UP,), limit=1)).recipe == first


def test_what_positions_count_is_part_of_the_identity(few):
    few.folder.rename(few.folder.with_name("other"))
    few.fill(few.keys[:3], name=lambda key: f"train{int(key[:2])}")
    first = make_plan(few.config(names="position")).recipe
    few.add_images("000.png")
    second = make_plan(few.config(names="position"))
    assert second.recipe.weights_digest == first.weights_digest
    assert second.recipe.fingerprint != first.fingerprint
    assert second.survey.assigned.files[UP] == {0: f"{UP}/train0.npy", 1: f"{UP}/train1.npy", 2: f"{UP}/train2.npy"}
    assert second.table.keys[:2] == ("00.png", "000.png")


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


def header(shape, descr="'<f2'", after=b""):
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + after


def archive():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("a.npy", header((3, 4, 4), after=bytes(96)))
    return file.getvalue()


def saved(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


GOOD = map_of("01.png", UP)
DAMAGED = {
    "empty": (b"", "it is no .npy file"),
    "text": (b"not an array at all", "it is no .npy file"),
    "archive": (archive(), "it is no .npy file"),
    "pickle": (pickle.dumps(Bomb()), "it is no .npy file"),
    "objects": (saved(np.array([Bomb()], object), allow_pickle=True), "it holds Python objects"),
    "nested header": (b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535, "it is no .npy file"),
    "code in the header": (header("__import__('os').mkdir('exploded')"), "it is no .npy file"),
    "version": (b"\x93NUMPY\x03\x00" + saved(GOOD)[8:], "it is of version 3.0"),
    "cut off in the array": (saved(GOOD)[:-1], "it is cut off: 95 bytes, where (3, 4, 4) float16 takes 96"),
    "cut off in the header": (saved(GOOD)[:40], "it is no .npy file"),
    "more than it says": (saved(GOOD) + b"x", "something follows the array: 97 bytes"),
    "absurd": (header((1 << 40, 1 << 20, 1 << 20)), "which no sound map has"),
    "negative": (header((-1, 4, 4)), "a map has three axes"),
    "two axes": (saved(GOOD[0]), "its shape is (4, 4); a map has three axes, (channel, y, x)"),
    "four axes": (saved(GOOD[None]), "its shape is (1, 3, 4, 4)"),
    "no elements": (saved(GOOD[:0]), "a map has three axes"),
    "another shape": (saved(GOOD[:2]), "its shape is (2, 4, 4), that of the others (3, 4, 4)"),
    "integers": (saved(GOOD.astype(np.int32)), "its element type is int32"),
    "complex": (saved(GOOD.astype(np.complex64)), "its element type is complex64"),
    "records": (saved(np.zeros((3, 4, 4), "f2,f2")), "its element type is"),
    "NaN": (saved(np.where(np.arange(48).reshape(3, 4, 4) == 7, np.float16(np.nan), GOOD)), "NaN or infinity"),
    "infinity": (saved(np.where(np.arange(48).reshape(3, 4, 4) == 7, np.float16(-np.inf), GOOD)), "NaN or infinity"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_file_that_holds_no_map_is_reported_and_the_others_are_imported(few, kind, monkeypatch):
    monkeypatch.chdir(few.folder)
    content, reason = DAMAGED[kind]
    (few.folder / UP / "01.npy").write_bytes(content)
    report = few.run()
    assert list(report.failed) == ["01.png"]
    assert report.failed["01.png"].startswith(f"{UP}/01.npy: ")
    assert reason in report.failed["01.png"]
    assert (report.imported, report.complete) == (3, False)
    check(few.stored(), LAYERS, [key for key in few.keys if key != "01.png"])
    assert not (few.folder / "exploded").exists()
    # A call that changes nothing says so again, and copies nothing.
    again = few.run()
    assert (again.imported, again.plan.reused, again.failed) == (0, 3, report.failed)


def test_what_is_no_regular_file_is_never_waited_for(few):
    path = few.folder / UP / "01.npy"
    path.unlink()
    os.mkfifo(path)
    (few.folder / UP / "02.npy").unlink()
    (few.folder / UP / "02.npy").symlink_to(few.folder / "nowhere")
    failed = few.run().failed
    assert failed == dict.fromkeys(["01.png", "02.png"], f"it has no file of layer {UP!r}")
    with pytest.raises(UnusableMapError, match="no regular file"):
        read_map(path)


def test_a_value_beyond_the_precision_is_reported(few):
    array = map_of("01.png", UP, np.float32)
    array[1, 2, 3] = -1e5
    few.save(f"{UP}/01", array)
    failed = few.run(precision="float16").failed
    assert failed == {"01.png": f"{UP}/01.npy: overflow of float16 (magnitude 1e+05)"}
    assert few.run().complete
    run = few.stored(fingerprint=make_plan(few.config()).recipe.fingerprint)
    assert run.numpy(UP, [1])[0, 1, 2, 3] == -1e5


def test_images_without_files_and_files_without_images(few):
    few.add_images("04.png", "05.png")
    few.save(f"{UP}/04", map_of("04.png", UP))
    few.save(f"{UP}/unknown", GOOD)
    few.save("lost", GOOD)
    report = few.run()
    told = report.to_json()
    assert told["failed"] == [{"key": "04.png", "reason": "it has no file of layer 'attn-all'"}]
    assert told["without_files"] == ["05.png"]
    assert told["strangers"] == ["lost.npy", f"{UP}/unknown.npy"]
    assert (told["images"], told["imported"], report.complete) == (6, 4, False)
    check(few.stored(), LAYERS, few.keys)


def test_images_that_are_not_asked_for_are_not_missed(few):
    few.add_images("04.png")
    report = few.run(limit=3)
    assert (report.imported, report.complete) == (3, True)
    check(few.stored(), LAYERS, few.keys[:3])


@pytest.mark.parametrize(
    "array",
    [np.asfortranarray(GOOD), GOOD.astype(">f2"), GOOD.astype(">f4"), GOOD.astype(np.float64)],
    ids=["column-major", "big-endian", "big-endian float32", "float64"],
)
def test_element_types_and_orders(place, array):
    place.add_images("01.png")
    place.save(f"{UP}/01", array)
    report = place.run()
    wide = array.dtype.itemsize > 2
    assert report.plan.recipe.precision == ("float32" if wide else "float16")
    stored = place.stored().numpy(UP, [0])[0]
    assert stored.dtype == (np.float32 if wide else np.float16)
    assert np.array_equal(stored, GOOD)
    notes = [note for note in report.plan.notes if "rounded" in note]
    assert notes == (["maps of float64 are rounded to float32"] if array.dtype.itemsize == 8 else [])


def test_int8_keeps_half_the_bytes(few):
    few.run(precision="int8")
    got = few.stored().numpy(UP, range(4))
    wanted = np.stack([map_of(key, UP) for key in few.keys]).astype(np.float32)
    scale = np.abs(wanted).max(axis=(2, 3), keepdims=True) / 127
    assert (np.abs(got - wanted) <= scale * 0.51).all()
    assert not np.array_equal(got, wanted)


def test_the_same_folder_again_copies_nothing(few):
    few.run()
    before = worker.files(few.store)
    report = few.run()
    assert (report.imported, report.plan.reused, report.plan.bytes_todo) == (0, 4, 0)
    after = worker.files(few.store)
    assert {name for name in after if after[name] != before.get(name)} <= {"catalog.json"}


class Stop(Silent):
    """Interrupts once so many steps of importing are done."""

    def __init__(self, after):
        self.left, self.title = after, None

    def start(self, title, total, unit):
        self.title = title

    def advance(self, steps=1):
        self.left -= steps * (self.title == "importing")
        if self.left < 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", [0, 64, 100, 170, 250])
def test_an_interrupted_import_goes_on_where_it_was(place, after, monkeypatch):
    keys = [f"{index:03d}.png" for index in range(130)]
    place.add_images(*keys)
    place.fill(keys)
    with pytest.raises(KeyboardInterrupt):
        import_npy(place.config(), Stop(after))
    read = []
    genuine = npy_import.read_map
    monkeypatch.setattr(npy_import, "read_map", lambda path: read.append(path) or genuine(path))
    report = place.run()
    assert report.complete
    assert len(read) == report.plan.maps_todo < 260
    check(place.stored(), LAYERS, keys)


def test_a_file_that_changes_while_the_folder_is_read_is_left_out(few):
    plan = make_plan(few.config())
    few.save(f"{UP}/02", map_of("another", UP))
    (few.folder / UP / "03.npy").unlink()
    failed = execute(plan).failed
    assert failed == {
        "02.png": f"{UP}/02.npy: it has changed while the folder was read",
        "03.png": f"{UP}/03.npy: No such file or directory",
    }
    check(few.stored(), LAYERS, few.keys[:2])


def test_an_image_that_changed_is_imported_again(few):
    few.run()
    (few.images / "02.png").write_bytes(b"another image")
    report = few.run()
    assert (report.imported, report.plan.reused) == (1, 3)
    check(few.stored(), LAYERS, few.keys)


def test_rows_keep_their_place_in_a_store_that_lists_the_images_otherwise(few):
    """A store's rows never move, so what sorts first by name may come last there."""
    few.run(limit=1)
    few.add_images("000.png", "0.png")
    few.fill(["000.png", "0.png"])
    few.run()
    run = few.stored(fingerprint=make_plan(few.config()).recipe.fingerprint)
    assert run.dataset.samples.keys[4:] == ("0.png", "000.png")
    check(run, LAYERS, [*few.keys, "0.png", "000.png"])


def test_the_samples_of_the_store_are_enough(few, tmp_path):
    few.run(limit=1)
    few.images.rename(tmp_path / "gone")
    report = few.run(dataset="photos")
    assert (report.imported, report.plan.reused, report.complete) == (3, 1, True)
    with pytest.raises(BadRequestError, match="unknown data set 'potos'"):
        few.run(dataset="potos")


def test_a_run_is_told_apart_from_one_that_featstore_computed(few):
    few.run()
    stored = featstore.store.create(few.store).dataset("photos")
    computed = worker.recipe(model="sd15", technique="prompt", timestep=51)
    stored.create_run(computed, {UP: (3, 4, 4)}, batch_size=1, provenance={})
    with pytest.raises(BadRequestError, match=r"2 runs .*scheduler=imported"):
        few.stored(timestep=51)
    assert few.stored(fingerprint=computed.fingerprint[:9]).recipe == computed


def test_a_head_finds_it_by_its_names(few):
    few.run()
    bucket = open_bucket(
        BucketConfig(dataset=f"folder:{few.images}", techniques="prompt", timesteps=(51,), store=str(few.store))
    )
    assert (bucket.maps, bucket.beside[0].layers) == ((UP,), ("attn-all",))
    assert bucket.complete().all()


def test_rows_that_are_not_there_are_said_to_be_imported(few):
    few.run(limit=2)
    with pytest.raises(NotCommittedError) as absent:
        few.stored().numpy(UP, [3])
    assert absent.value.hint.startswith("featstore import-npy FOLDER --dataset photos --model sd15")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None, "timestep": None}, "--model, --timestep must"),
        ({"technique": "promt"}, "unknown technique 'promt'"),
        ({"technique": "basic,prompt"}, "lists 2 passes; a folder holds the features of one"),
        ({"timestep": 1000}, "timestep 1000 is outside"),
        ({"denoise_from": 40}, "--denoise-from 40 is outside 52..999"),
        ({"image_size_px": 0}, "is not positive"),
        ({"compute_dtype": "fp16"}, "unknown compute dtype 'fp16'"),
        ({"split": "train"}, "unknown split 'train'; known: all"),
        ({"limit": 0}, "--limit 0"),
        ({"dataset": "folder:nowhere"}, "'nowhere' does not exist"),
    ],
)
def test_bad_requests_start_nothing(few, changes, message):
    with pytest.raises(BadRequestError, match=message):
        few.run(**changes)
    assert not few.store.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": "layers-first"}, "unknown layout 'layers-first'"),
        ({"names": "number"}, "unknown way of naming images"),
        ({"precision": "float8"}, "unknown precision 'float8'"),
    ],
)
def test_values_that_cannot_be(few, changes, message):
    with pytest.raises(BadRequestError, match=message):
        few.config(**changes)


def test_folders_that_hold_nothing_of_use(few, tmp_path):
    with pytest.raises(NotFoundError, match="there is no folder"):
        few.run(folder=tmp_path / "absent")
    (tmp_path / "bare").mkdir()
    with pytest.raises(NotFoundError, match=r"there is no \.npy file"):
        few.run(folder=tmp_path / "bare")
    np.save(tmp_path / "bare" / "x.npy", GOOD)
    with pytest.raises(BadRequestError, match=r"none of 1 files .* is called like one of the 4 images"):
        few.run(folder=tmp_path / "bare")
    for key in few.keys:
        (few.folder / UP / f"{key[:2]}.npy").write_bytes(b"")
    with pytest.raises(BadRequestError, match=r"none has usable files .* it is no \.npy file"):
        few.run()
    assert not few.store.exists()


def test_an_export_says_itself_what_its_files_are(few):
    (few.folder / "featstore.json").write_text(json.dumps({"featstore_export": 1, "format": "npy"}))
    for changes in ({"names": "stem"}, {"layout": "aggregate"}):
        with pytest.raises(BadRequestError, match="is an export, whose list says what its files are"):
            few.run(**changes)


def test_links_that_lead_back_up_are_followed_once(few):
    (few.folder / UP / "again").symlink_to(few.folder)
    assert few.run().complete


def test_a_disk_that_is_too_small_is_refused_before_it_is_full(few, monkeypatch):
    monkeypatch.setattr(space.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(StorageError, match=r"0\.0 GB free") as refused:
        few.run()
    assert refused.value.exit_code == 2
    assert not few.store.exists()


def test_a_model_that_nobody_knows_is_noted(few):
    assert few.run().plan.notes == ()
    assert "did you mean 'sd15'?" in few.run(model="sd-15").plan.notes[0]
    assert make_plan(few.config(model="flux")).recipe.model == "flux"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "describes no export"),
        ("{", "cannot be read"),
        (json.dumps({"featstore_export": 1, "runs": [{"folder": "../features"}]}), "lists no folders of runs"),
        (json.dumps({"featstore_export": 1, "runs": [{"folder": ".."}]}), "lists no folders of runs"),
        (json.dumps({"featstore_export": 1, "runs": 7}), "lists no folders of runs"),
        (json.dumps({"featstore_export": 1, "runs": [{"folder": "gone"}]}), "is gone"),
        (json.dumps({"featstore_export": 1, "format": "npy", "recipe": []}), "has no recipe"),
    ],
)
def test_a_list_of_an_export_that_is_damaged_or_hostile(few, content, message):
    (few.folder / "featstore.json").write_text(content)
    with pytest.raises(CorruptError, match=message):
        few.run()
