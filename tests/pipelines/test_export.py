"""Features of a store as files."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path, PurePosixPath

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

import featstore.store
from featstore.errors import BadRequestError, CorruptError, NotCommittedError, NotFoundError, StorageError
from featstore.pipelines import export_plan, space
from featstore.pipelines.export import FORMATS, ExportConfig, execute, export, make_plan
from featstore.pipelines.export_npy import file_name
from featstore.pipelines.npy_import import ImportConfig, import_npy
from featstore.pipelines.progress import Silent
from featstore.store import SampleTable
from tests.store import worker

RUN = worker.recipe()
FOLDER = RUN.path.replace("/", "-")
LAYERS = tuple(worker.LAYERS)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A hundred images in two blocks, two layers; read only."""
    url = tmp_path_factory.mktemp("export") / "s.zarr"
    worker.full(url)
    return url


@pytest.fixture
def own(tmp_path):
    """Five images in a store of their own."""
    url = tmp_path / "own.zarr"
    worker.full(url, 5)
    return url


@pytest.fixture
def config(tmp_path, store):
    def make(form="npy", **changes):
        values = {
            "out": tmp_path / "out",
            "dataset": worker.DATASET,
            "techniques": RUN.technique,
            "format": form,
            "store": str(store),
        }
        return ExportConfig(**(values | changes))

    return make


def stored(url, **which):
    return featstore.store.open(url).dataset(worker.DATASET).run(RUN.technique, **which)


def manifest(folder):
    return json.loads((folder / "featstore.json").read_text())


def listed(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def load_npy(folder, keys):
    return {layer: np.stack([np.load(folder / layer / f"{key}.npy") for key in keys]) for layer in LAYERS}


def load_safetensors(folder, keys):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(path, "numpy") as file:
            told = json.loads(file.metadata()["featstore"])
            for place, key in enumerate(told["keys"]):
                found[key] = {layer: file.get_slice(layer)[place] for layer in file.keys()}  # noqa: SIM118
    return {layer: np.stack([found[key][layer] for key in keys]) for layer in LAYERS}


def load_datasets(folder, keys):
    import datasets

    data = datasets.load_from_disk(folder)
    place = {key: index for index, key in enumerate(data["key"])}
    rows = [data[place[key]] for key in keys]
    return {layer: np.stack([row[layer] for row in rows]) for layer in LAYERS}


LOAD = {"npy": load_npy, "safetensors": load_safetensors, "datasets": load_datasets}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("precision", ["float16", "float32", "int8"])
def test_every_format_holds_what_readers_of_the_store_get(form, precision, config, tmp_path, own):
    url = tmp_path / "p.zarr"
    _, run = worker.full(url, precision=precision)
    report = export(config(form, store=str(url)))
    folder = tmp_path / "out" / run.recipe.path.replace("/", "-")
    keys = run.dataset.samples.keys
    found = LOAD[form](folder, keys)
    for layer in LAYERS:
        wanted = run.numpy(layer, range(100))
        assert found[layer].dtype == wanted.dtype == (np.float32 if precision == "float32" else np.float16)
        assert np.array_equal(found[layer], wanted)
    assert report.complete
    assert report.bytes == sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert [(line["key"], line["split"], line["sha256"]) for line in listed(folder)] == [
        *zip(keys, run.dataset.samples.splits, run.dataset.samples.digests, strict=True)
    ]
    told = manifest(folder)
    assert (told["recipe"], told["fingerprint"], told["images"]) == (run.recipe.to_json(), run.fingerprint, 100)
    assert told["layers"]["up1"] == {"shape": [3, 4, 4], "dtype": wanted.dtype.name}
    assert [one["folder"] for one in manifest(tmp_path / "out")["runs"]] == [folder.name]


@pytest.mark.parametrize("form", FORMATS)
def test_the_size_that_is_said_is_about_what_is_written(form, config):
    plan = make_plan(config(form))
    report = execute(plan)
    assert 0.8 * report.bytes < plan.bytes + 32_000 < 1.6 * report.bytes + 32_000


def test_npy_lies_as_layer_and_key(config, tmp_path):
    export(config())
    out = tmp_path / "out"
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    maps = {f"{FOLDER}/{layer}/img{row:04d}.npy" for layer in LAYERS for row in range(100)}
    assert files == maps | {"featstore.json", f"{FOLDER}/featstore.json", f"{FOLDER}/samples.jsonl"}


def test_a_safetensors_file_is_a_block(config, tmp_path, store):
    export(config("safetensors"))
    folder = tmp_path / "out" / FOLDER
    names = [f"features-{number:05d}-of-00002.safetensors" for number in range(2)]
    assert [path.name for path in sorted(folder.glob("*.safetensors"))] == names
    tensors = safetensors.torch.load_file(folder / names[1])
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        layer: ((36, *shape), torch.float16) for layer, shape in worker.LAYERS.items()
    }
    with safetensors.safe_open(folder / names[1], "numpy") as file:
        assert list(file.metadata()) == ["featstore"]
        told = json.loads(file.metadata()["featstore"])
    samples = stored(store).dataset.samples
    assert told == {
        "dataset": "toy",
        "recipe": RUN.to_json(),
        "fingerprint": RUN.fingerprint,
        "keys": list(samples.keys[64:]),
        "splits": list(samples.splits[64:]),
        "sha256": list(samples.digests[64:]),
    }
    assert [line["file"] for line in listed(folder)] == [names[0]] * 64 + [names[1]] * 36


def test_datasets_opens_it_memory_mapped_with_typed_columns(config, tmp_path, store):
    import datasets

    export(config("datasets"))
    data = datasets.load_from_disk(tmp_path / "out" / FOLDER)
    assert data.features == datasets.Features(
        {
            **dict.fromkeys(("key", "split", "sha256"), datasets.Value("string")),
            **{layer: datasets.Array3D(shape, "float16") for layer, shape in worker.LAYERS.items()},
        }
    )
    assert len(data.cache_files) == 2
    samples = stored(store).dataset.samples
    assert tuple(data["sha256"]) == samples.digests
    assert data[70]["split"] == samples.splits[70]
    assert data[0]["up1"].dtype == np.float16
    batch = data.with_format("torch")[60:70]["up1"]
    assert np.array_equal(batch.numpy(), stored(store).numpy("up1", range(60, 70)).astype(np.float32))
    assert RUN.fingerprint in data.info.description


def test_datasets_never_takes_results_cached_for_one_export_for_those_of_another(config, tmp_path):
    """It finds cached results by the fingerprint of what they were made from."""
    import datasets

    seen = []
    for number, changes in enumerate(({}, {}, {"limit": 99}, {"layers": "up1"})):
        out = tmp_path / f"out{number}"
        export(config("datasets", out=out, **changes))
        seen.append(datasets.load_from_disk(out / FOLDER)._fingerprint)
    assert seen[0] == seen[1]
    assert len(set(seen)) == 3


def test_datasets_leaves_nothing_behind_and_shows_no_bars_of_its_own(config, tmp_path, capfd):
    import datasets

    export(config("datasets"))
    files = {path.name for path in (tmp_path / "out" / FOLDER).iterdir()}
    arrows = {f"data-0000{number}-of-00002.arrow" for number in range(2)}
    assert files == arrows | {"state.json", "dataset_info.json", "featstore.json", "samples.jsonl"}
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()


def test_without_the_package_it_says_how_to_get_it(config, tmp_path, monkeypatch):
    genuine = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "datasets" else genuine(name))
    with pytest.raises(BadRequestError, match="needs the package `datasets`") as refused:
        export(config("datasets"))
    assert refused.value.hint == "pip install 'featstore[datasets]'"
    assert not (tmp_path / "out").exists()


def test_a_layer_that_is_called_like_a_column(tmp_path, config):
    _, run = worker.start(tmp_path / "k.zarr", 3, layers={"split": (1, 2, 2)})
    run.write_block(0, [0], {"split": np.ones((1, 1, 2, 2), np.float16)})
    with pytest.raises(BadRequestError, match="layer 'split' is called like a column"):
        export(config("datasets", store=str(tmp_path / "k.zarr")))
    export(config("safetensors", store=str(tmp_path / "k.zarr")))


def test_npy_comes_back_bit_for_bit(config, tmp_path, store):
    export(config())
    other = featstore.store.create(tmp_path / "other.zarr")
    other.put_samples(worker.DATASET, worker.table(100), source="made up")
    report = import_npy(
        ImportConfig(folder=tmp_path / "out", dataset=worker.DATASET, store=str(tmp_path / "other.zarr"))
    )
    assert report.complete
    first, second = stored(store), stored(tmp_path / "other.zarr")
    for layer in LAYERS:
        assert first.numpy(layer, range(100)).tobytes() == second.numpy(layer, range(100)).tobytes()
    claimed = ("model", "technique", "timestep", "height_px", "width_px", "compute_dtype", "precision")
    assert [getattr(second.recipe, name) for name in claimed] == [getattr(RUN, name) for name in claimed]
    assert second.recipe.parameters["prompt"] == "a horse"
    assert second.recipe.parameters["import"]["names"] == "listed"
    # It was computed by featstore once, but files can be edited: nobody vouches for them.
    assert (second.recipe.scheduler, second.recipe.meaning) == ("imported", 0)
    assert second.recipe.weights_digest != RUN.weights_digest


def test_an_image_that_changed_since_its_export_is_not_imported(config, tmp_path, own):
    export(config(store=str(own)))
    featstore.store.create(own).put_samples(worker.DATASET, worker.table(5, changed=[3]), source="made up")
    report = import_npy(ImportConfig(folder=tmp_path / "out", dataset=worker.DATASET, store=str(own)))
    assert report.failed == {"img0003": "the image has changed since its features were exported"}
    assert report.imported == 4


def test_an_export_of_several_runs_or_to_another_format_is_not_imported(config, tmp_path, own):
    _, run = worker.start(own, 5, timestep=200)
    worker.fill(run)
    export(config(store=str(own), timesteps=(50, 200)))
    names = [FOLDER, f"{FOLDER[:-4]}t200"]
    taken = ImportConfig(folder=tmp_path / "out", dataset=worker.DATASET, store=str(own))
    with pytest.raises(BadRequestError, match=f"export of 2 runs; one at a time is imported: {', '.join(names)}"):
        import_npy(taken)
    report = import_npy(
        ImportConfig(folder=tmp_path / "out" / names[1], dataset=worker.DATASET, store=str(own), timestep=201)
    )
    assert report.plan.recipe.timestep == 201, "what the user says goes before what the list says"
    export(config("safetensors", store=str(own), out=tmp_path / "tensors"))
    with pytest.raises(BadRequestError, match=r"to 'safetensors', which holds no \.npy files"):
        import_npy(ImportConfig(folder=tmp_path / "tensors", dataset=worker.DATASET, store=str(own)))


ODD = ("../../up.png", "/etc/passwd", "a/b.png", "a/./b.png", "A/B.PNG", ".hidden", "%41", "..", "a:b*?", "é/日本.jpg",
       "x" * 300, "x" * 299 + "y", "new\nline", "a\\b", "a//b", "tail.npy")  # fmt: skip


@pytest.mark.parametrize("form", FORMATS)
def test_keys_of_a_stranger_lead_nowhere_and_come_back(form, tmp_path, config):
    store = featstore.store.create(tmp_path / "odd.zarr")
    table = SampleTable(keys=ODD, digests=tuple(map(worker.digest, range(len(ODD)))), splits=("all",) * len(ODD))
    run = store.put_samples(worker.DATASET, table, source="made up").create_run(
        RUN, worker.LAYERS, batch_size=1, provenance={}
    )
    worker.fill(run)
    place = tmp_path / "deep" / "deeper"
    export(config(form, store=str(tmp_path / "odd.zarr"), out=place / "out"))
    assert [path.name for path in tmp_path.iterdir() if path.name != "odd.zarr"] == ["deep"]
    assert [path.name for path in place.iterdir()] == ["out"]
    if form != "npy":
        found = LOAD[form](place / "out" / FOLDER, ODD)
        assert all(np.array_equal(found[layer], run.numpy(layer, range(len(ODD)))) for layer in LAYERS)
        return
    other = featstore.store.create(tmp_path / "deep" / "other.zarr")
    other.put_samples(worker.DATASET, table, source="made up")
    taken = ImportConfig(folder=place / "out", dataset=worker.DATASET, store=other.url)
    assert import_npy(taken).complete
    for layer in LAYERS:
        assert np.array_equal(stored(other.url).numpy(layer, range(len(ODD))), run.numpy(layer, range(len(ODD))))


@hypothesis.given(st.lists(st.text(min_size=1, max_size=12), min_size=2, max_size=6, unique=True))
@hypothesis.example(["%2E", "."])
@hypothesis.example(["a//b", "a/%/b", "a/b"])
def test_file_names_are_safe_and_all_different(keys):
    names = [file_name(key) for key in keys]
    assert len(set(names)) == len(names)
    for name in names:
        parts = PurePosixPath(name).parts
        assert "/".join(parts) == name, "no absolute path, no empty level"
        assert not any(part.startswith(".") or len(part.encode("utf-8", "surrogatepass")) > 250 for part in parts)
        assert not any(ord(letter) < 32 for letter in name)


def test_which_runs_layers_and_images(config, tmp_path, store):
    plan = make_plan(config(layers="up1", split="train", limit=30))
    (run,) = plan.runs
    assert (list(run.layers), run.rows.tolist()) == (["up1"], list(range(1, 61, 2)))
    export(config(layers="up1", split="train", limit=30))
    folder = tmp_path / "out" / FOLDER
    assert [path.name for path in sorted(folder.iterdir())] == ["featstore.json", "samples.jsonl", "up1"]
    assert len(list((folder / "up1").iterdir())) == 30


def test_runs_that_are_called_the_same_are_told_apart_by_their_fingerprint(config, tmp_path, own):
    _, second = worker.start(own, 5, seed=7)
    worker.fill(second)
    with pytest.raises(BadRequestError, match="seed"):
        make_plan(config(store=str(own)))
    (run,) = make_plan(config(store=str(own), fingerprint=second.fingerprint[:10])).runs
    assert run.run.recipe.seed == 7


def test_a_data_set_may_be_named_as_it_was_to_extract_it(config, tmp_path, own):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "a.png").write_bytes(b"")
    for changes in ({"dataset": f"folder:{tmp_path / 'toy'}"}, {"dataset": "x", "dataset_name": "toy"}):
        assert make_plan(config(store=str(own), **changes)).dataset == "toy"
    with pytest.raises(BadRequestError, match="unknown data set 'toi'"):
        make_plan(config(store=str(own), dataset="toi"))


@pytest.mark.parametrize("form", FORMATS)
def test_images_without_features_of_today_are_left_out_and_named(form, config, tmp_path):
    url = tmp_path / "part.zarr"
    store, run = worker.start(url, 8)
    worker.fill(run, rows=range(6))
    run.write_block(0, [6], {"up1": worker.maps_of(run, [6], "up1")})
    store.put_samples(worker.DATASET, worker.table(8, changed=[2]), source="made up")
    report = export(config(form, store=str(url)))
    assert report.plan.runs[0].left_out == ("img0002", "img0006", "img0007")
    assert not report.complete
    folder = tmp_path / "out" / FOLDER
    keys = [f"img{row:04d}" for row in (0, 1, 3, 4, 5)]
    assert [line["key"] for line in listed(folder)] == keys
    assert np.array_equal(LOAD[form](folder, keys)["up1"], run.numpy("up1", [0, 1, 3, 4, 5]))
    assert (manifest(folder)["images"], manifest(folder)["left_out"]) == (5, 3)


def test_what_is_not_there_names_the_command_that_makes_it(config, tmp_path):
    worker.start(tmp_path / "bare.zarr", 3)
    with pytest.raises(NotCommittedError, match="of 3 images asked for, none has features") as absent:
        export(config(store=str(tmp_path / "bare.zarr")))
    assert absent.value.hint.startswith("featstore extract --dataset toy --model reference")
    with pytest.raises(NotCommittedError, match="unknown layer 'up7'"):
        make_plan(config(layers="up7"))
    with pytest.raises(NotCommittedError, match="no features of data set 'toy' with technique 'basic'"):
        make_plan(config(techniques="basic"))
    with pytest.raises(NotFoundError, match="there is no store"):
        make_plan(config(store=str(tmp_path / "absent.zarr")))
    with pytest.raises(BadRequestError, match="unknown format 'parquet'"):
        config("parquet")
    with pytest.raises(BadRequestError, match="timestep 1000"):
        config(timesteps=(1000,))
    assert not (tmp_path / "out").exists()


def test_a_place_that_is_taken_is_not_touched(config, tmp_path, own):
    out = tmp_path / "out"
    out.mkdir()
    export(config(store=str(own)))  # an empty folder is no harm
    first = worker.files(out)
    with pytest.raises(BadRequestError, match="exists already") as refused:
        export(config("safetensors"))
    assert "--overwrite" in refused.value.hint
    assert worker.files(out) == first
    export(config("safetensors", overwrite=True))
    assert manifest(out)["format"] == "safetensors"
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out"]
    for content in (None, "{}", '{"featstore_export": 1}', "?"):
        mine = tmp_path / "mine"
        mine.mkdir(exist_ok=True)
        (mine / "thesis.tex").write_text("years of work")
        if content is not None:
            (mine / "featstore.json").write_text(content)
        with pytest.raises(BadRequestError, match="is no earlier export, and is not replaced"):
            export(config(out=mine, overwrite=True))
        assert (mine / "thesis.tex").exists()
    with pytest.raises(BadRequestError, match="is a file"):
        export(config(out=mine / "thesis.tex", overwrite=True))


class Stop(Silent):
    """Interrupts the first step, and looks at what is there then."""

    def __init__(self, out):
        self.out, self.there = out, None

    def advance(self, steps=1):
        self.there = self.out.exists() and sorted(self.out.iterdir())
        raise KeyboardInterrupt


@pytest.mark.parametrize("form", FORMATS)
def test_an_interrupted_export_leaves_what_was_there_before(form, config, tmp_path):
    out = tmp_path / "out"
    stop = Stop(out)
    with pytest.raises(KeyboardInterrupt):
        export(config(form), stop)
    assert stop.there is False
    assert list(tmp_path.iterdir()) == []
    export(config("npy", limit=2))
    before = worker.files(out)
    with pytest.raises(KeyboardInterrupt):
        export(config(form, overwrite=True), Stop(out))
    assert worker.files(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_damaged_features_are_never_exported(config, tmp_path, own):
    (shard,) = own.glob(f"toy/{RUN.path}/up1/c.0.0.0.0")
    data = bytearray(shard.read_bytes())
    data[100] ^= 4
    shard.write_bytes(data)
    with pytest.raises(CorruptError, match=r"image 'img000[01]'"):
        export(config(store=str(own)))
    assert [path.name for path in tmp_path.iterdir()] == ["own.zarr"]


DIE = """
import os, signal, sys
from pathlib import Path
from featstore.pipelines import export, export_npy
from featstore.store import partial
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[3] == "writing":
    genuine = export_npy.NpyWriter.write
    export_npy.NpyWriter.write = lambda self, chunk: (genuine(self, chunk), die())
else:
    Path.rename = die
export.export(export.ExportConfig(out=Path(sys.argv[1]), dataset="toy", techniques="controlnet:canny+lora",
                                  format="npy", store=sys.argv[2]))
"""


@pytest.mark.parametrize("moment", ["writing", "renaming"])
def test_a_killed_export_does_not_look_finished_and_the_next_one_tidies_up(config, tmp_path, store, moment):
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", DIE, out, store, moment], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out-")
    assert len(list(left.rglob("*.npy"))) >= 128
    stranger = tmp_path / ".out-of-somebody-else.partial"
    stranger.mkdir()
    export(config(out=tmp_path / "other", limit=1))
    assert left.exists(), "another export's"
    export(config())
    assert sorted(path.name for path in tmp_path.iterdir()) == [stranger.name, "other", "out"]


def test_everything_is_on_the_disk_before_the_folder_has_its_name(config, tmp_path, own, monkeypatch):
    synced, steps, genuine = set(), [], Path.rename

    def fsync(handle):
        found = os.fstat(handle)
        synced.add(found.st_ino)
        steps.append("folder" if stat.S_ISDIR(found.st_mode) else "file")

    def rename(self, target):
        steps.append("rename")
        assert {path.stat().st_ino for path in [self, *self.rglob("*")]} <= synced
        return genuine(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    export(config(store=str(own)))
    assert steps[-2:] == ["rename", "folder"]


FULL = """
import resource, signal, sys
from pathlib import Path
from featstore.errors import StorageError
from featstore.pipelines import export
plan = export.make_plan(export.ExportConfig(out=Path(sys.argv[1]), dataset="toy", techniques="controlnet:canny+lora",
                                            format=sys.argv[3], store=sys.argv[2]))
if sys.argv[3] == "datasets":
    import datasets
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
try:
    export.execute(plan)
except StorageError as error:
    print(error, "|", error.hint)
"""


@pytest.mark.parametrize("form", FORMATS)
def test_a_full_disk_is_an_error_and_leaves_nothing(form, tmp_path, store):
    """The limit on a process's files stands in for the end of the disk."""
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", FULL, out, store, form], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"cannot write {out}" if form != "safetensors" else "cannot write features-00000")
    assert "free space or name another folder" in done.stdout
    assert os.strerror(errno.EFBIG) in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(config, tmp_path, monkeypatch):
    monkeypatch.setattr(space.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10_000}))
    with pytest.raises(StorageError, match="the exported files take") as refused:
        export(config(out=tmp_path / "a" / "b" / "out"))
    assert refused.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_in_memory_at_once_is_bounded(form, config, tmp_path, store, monkeypatch):
    image_bytes = sum(int(np.prod(shape)) * 2 for shape in worker.LAYERS.values())
    monkeypatch.setattr(export_plan, "CHUNK_MAX_BYTES", 10 * image_bytes + 1)
    (planned,) = make_plan(config(form)).runs
    assert [len(rows) for rows in planned.chunks()] == [10] * 6 + [4] + [10] * 3 + [6]
    export(config(form))
    run = stored(store)
    found = LOAD[form](tmp_path / "out" / FOLDER, run.dataset.samples.keys)
    assert all(np.array_equal(found[layer], run.numpy(layer, range(100))) for layer in LAYERS)
    monkeypatch.setattr(export_plan, "CHUNK_MAX_BYTES", 1)
    assert {len(rows) for rows in planned.chunks()} == {1}


def test_an_export_of_real_features(features, labelled, tmp_path):
    """Extracted by a model, exported for a head elsewhere: presets name layers, splits choose images."""
    report = export(
        ExportConfig(
            out=tmp_path / "out",
            dataset=f"folder:{labelled}",
            techniques="basic,prompt",
            format="safetensors",
            store=str(features),
            split="test",
        )
    )
    assert [(run.run.recipe.technique, len(run.rows)) for run in report.plan.runs] == [("basic", 3), ("prompt", 3)]
    for run in report.plan.runs:
        (path,) = (tmp_path / "out" / run.folder).glob("*.safetensors")
        tensors = safetensors.torch.load_file(path)
        assert set(tensors) == set(run.run.layers)
        for layer, tensor in tensors.items():
            assert torch.equal(tensor, run.run.torch(layer, run.rows))
