"""Sample tables, finding runs, and what the store says it holds."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import pytest

import featstore.store as fs
from featstore.errors import (
    BadRequestError,
    CorruptError,
    IncompatibleError,
    NotCommittedError,
    NotFoundError,
    StorageError,
)
from featstore.store import metadata
from featstore.store.catalog import describe


def test_a_table_only_ever_grows(tmp_path, lab):
    store = fs.create(tmp_path / "s")
    one = fs.SampleTable(keys=("a", "b"), digests=(lab.digest(0), lab.digest(1)), splits=("train", "train"))
    store.put_samples("d", one, source="here")
    two = fs.SampleTable(keys=("c", "b"), digests=(lab.digest(2), lab.digest(1, 1)), splits=("test", "val"))
    dataset = store.put_samples("d", two, source="here")
    assert dataset.samples.keys == ("a", "b", "c")
    assert dataset.samples.digests == (lab.digest(0), lab.digest(1, 1), lab.digest(2))
    assert dataset.samples.splits == ("train", "val", "test")
    assert dataset.row_of == {"a": 0, "b": 1, "c": 2}
    assert fs.open(tmp_path / "s").dataset("d").samples.table() == dataset.samples.table()


def test_another_data_set_of_the_same_name_is_refused(tmp_path, lab):
    store = fs.create(tmp_path / "s")
    store.put_samples("d", lab.table(3), source="here")
    other = fs.SampleTable(keys=("x",), digests=(lab.digest(0),), splits=("train",))
    before = lab.files(tmp_path / "s")
    with pytest.raises(BadRequestError, match="another data set 'd'"):
        store.put_samples("d", other, source="there")
    assert lab.files(tmp_path / "s") == before


@pytest.mark.parametrize(
    "columns",
    [
        {"keys": ("a", "a"), "digests": ("0" * 64, "1" * 64), "splits": ("train", "train")},
        {"keys": ("a",), "digests": ("0" * 63,), "splits": ("train",)},
        {"keys": ("a",), "digests": ("A" * 64,), "splits": ("train",)},
        {"keys": ("",), "digests": ("0" * 64,), "splits": ("train",)},
        {"keys": ("a", "b"), "digests": ("0" * 64,), "splits": ("train",)},
    ],
)
def test_tables_that_cannot_be(columns):
    with pytest.raises(BadRequestError):
        fs.SampleTable(**columns)


def test_a_digest_of_zeros_is_not_taken_for_absent(tmp_path, lab):
    store = fs.create(tmp_path / "s")
    table = fs.SampleTable(keys=("a",), digests=("0" * 64,), splits=("train",))
    run = store.put_samples("d", table, source="").create_run(
        lab.recipe(), {"up1": (3, 4, 4)}, batch_size=1, provenance={}
    )
    assert not run.valid(["up1"]).any()
    run.write_block(0, [0], {"up1": lab.maps_of(run, [0], "up1")})
    assert run.committed("up1").tolist() == [1]
    assert run.valid(["up1"]).all()


def test_changed_images_are_recomputed_alone(tmp_path, lab):
    lab.full(tmp_path / "s", 100)
    _, run = lab.start(tmp_path / "s", 100, changed=[5, 80])
    assert (~run.valid(list(lab.LAYERS))).nonzero()[0].tolist() == [5, 80]
    lab.fill(run)
    lab.full(tmp_path / "fresh", 100, changed=[5, 80])
    for layer in lab.LAYERS:
        a, b = run.numpy(layer, range(100)), lab.maps_of(run, range(100), layer)
        assert a.tobytes() == b.tobytes()
    assert lab.files(tmp_path / "s").keys() == lab.files(tmp_path / "fresh").keys()


@pytest.fixture
def several(tmp_path, lab):
    for technique in ("basic", "prompt"):
        for timestep in (0, 50):
            lab.start(tmp_path / "s", 5, technique=technique, timestep=timestep)
    lab.start(tmp_path / "s", 5, technique="basic", model="other", timestep=50)
    return fs.open(tmp_path / "s").dataset("toy")


def test_run_by_meaning(several, lab):
    assert len(several.runs()) == 5
    run = several.run("prompt", timestep=50)
    assert (run.recipe.technique, run.recipe.timestep) == ("prompt", 50)
    assert several.run("basic", timestep=50, model="other").recipe.model == "other"
    assert several.run("basic", fingerprint=run.fingerprint[:0], timestep=0).recipe.timestep == 0
    assert several.find(run.recipe).path == run.path
    assert several.find(lab.recipe(technique="lora")) is None


def test_a_run_that_is_not_there_lists_those_that_are(several):
    with pytest.raises(NotCommittedError, match=r"basic at 0 .reference., basic at 50 .other., basic at 50") as caught:
        several.run("lora", timestep=50, model="other")
    assert caught.value.hint == "featstore extract --dataset toy --techniques lora --timesteps 50 --model other"


def test_an_ambiguous_run_says_what_differs(several):
    with pytest.raises(BadRequestError, match=r"2 runs.*model=other.*model=reference") as caught:
        several.run("basic", timestep=50)
    for run in several.runs():
        if run.recipe.technique == "basic" and run.recipe.timestep == 50:
            assert run.fingerprint[:12] in str(caught.value)
            assert several.run("basic", fingerprint=run.fingerprint[:12]).path == run.path
    assert "prompt" not in str(caught.value)


def test_bucket_is_technique_major(several):
    bucket = several.bucket(["prompt", "basic"], timesteps=(50, 0), model="reference")
    assert [(r.recipe.technique, r.recipe.timestep) for r in bucket.runs] == [
        ("prompt", 50),
        ("prompt", 0),
        ("basic", 50),
        ("basic", 0),
    ]


def test_describe_counts_rows_valid_in_every_layer(tmp_path, lab):
    store, run = lab.start(tmp_path / "s", 100)
    lab.fill(run, rows=range(70))
    run.write_block(1, [80], {"up1": lab.maps_of(run, [80], "up1")})  # in one of the two layers only
    lab.start(tmp_path / "s", 100, changed=[1, 2], technique="basic")
    store.put_samples("empty", lab.table(3), source="made up")
    seen = describe(fs.open(tmp_path / "s"))
    assert json.loads(json.dumps(seen)) == seen
    assert [(d["name"], d["images"], len(d["runs"])) for d in seen["datasets"]] == [("empty", 3, 0), ("toy", 100, 2)]
    entry = next(e for e in seen["datasets"][1]["runs"] if e["technique"] == run.recipe.technique)
    assert (entry["committed"], entry["images"]) == (68, 100)
    assert (entry["model"], entry["timestep"], entry["fingerprint"]) == ("reference", 50, run.fingerprint)
    shards = sum(p.stat().st_size for p in (tmp_path / "s" / run.path / "up1").glob("c.*"))
    assert entry["layers"]["up1"] == {"shape": [3, 4, 4], "dtype": "float16", "bytes": shards}
    every = sum(p.stat().st_size for p in (tmp_path / "s").rglob("c.*.0.0.0"))
    assert seen["bytes"] == every
    assert describe(store, "empty")["datasets"][0]["name"] == "empty"
    with pytest.raises(NotFoundError, match="empty, toy"):
        describe(store, "nope")


def test_catalog_snapshot_tells_a_reader_that_cannot_list(tmp_path, lab):
    _, run = lab.full(tmp_path / "s", 7)
    document = json.loads((tmp_path / "s" / "catalog.json").read_bytes())
    assert document["datasets"] == {"toy": 7}
    assert [entry["path"] for entry in document["runs"]] == [run.path]
    assert document["runs"][0]["recipe"] == run.recipe.to_json()
    assert document["runs"][0]["layers"] == {layer: list(shape) for layer, shape in lab.LAYERS.items()}


def test_a_folder_of_another_machine():
    for function in (fs.open, fs.create):
        with pytest.raises(BadRequestError, match="no folder of this machine"):
            function("file://host/x")


def test_urls_of_one_folder(tmp_path, lab, monkeypatch):
    lab.start(tmp_path / "a b", 3)
    monkeypatch.chdir(tmp_path)
    for url in ("a b", tmp_path / "a b", str(tmp_path / "a b"), f"file://{tmp_path}/a%20b"):
        assert fs.open(url).datasets() == ["toy"]


def test_what_is_no_store(tmp_path):
    with pytest.raises(NotFoundError, match="no store"):
        fs.open(tmp_path / "absent")
    (tmp_path / "photo.jpg").write_bytes(b"x")
    with pytest.raises(BadRequestError, match=r"photo\.jpg"):
        fs.create(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["photo.jpg"]


def test_a_newer_format_is_refused_before_anything_is_written(tmp_path, lab):
    lab.full(tmp_path / "s", 3)
    path = tmp_path / "s" / "zarr.json"
    document = json.loads(path.read_bytes())
    document["attributes"]["featstore"]["format"] = 3
    for data in (
        metadata.seal(document),
        json.dumps({**document, "attributes": {"featstore": {"format": 3}}}).encode(),
    ):
        path.write_bytes(data)
        before = lab.files(tmp_path / "s")
        for function in (fs.open, fs.create):
            with pytest.raises(IncompatibleError, match="of store format 3; this version reads format 2"):
                function(tmp_path / "s")
        assert lab.files(tmp_path / "s") == before


def test_a_run_of_a_newer_version_does_not_hide_the_others(tmp_path, lab, caplog):
    _, run = lab.start(tmp_path / "s", 3)
    _, newer = lab.start(tmp_path / "s", 3, technique="basic")
    path = tmp_path / "s" / newer.path / "zarr.json"
    document = json.loads(path.read_bytes())
    document["attributes"]["featstore"]["recipe"]["invented"] = 1
    path.write_bytes(metadata.seal(document))
    dataset = fs.open(tmp_path / "s").dataset("toy")
    assert [r.path for r in dataset.runs()] == [run.path]
    assert "invented" in caplog.text
    with pytest.raises(IncompatibleError):
        dataset.find(newer.recipe)


@pytest.mark.parametrize(
    "change",
    [
        {"block_length": 0},
        {"block_length": 10**9},
        {"block_length": "64"},
        {"layers": {"../../../etc": [1, 1, 1]}},
        {"layers": {"up1": [1, 1]}},
        {"layers": {"up1": [1 << 30, 1 << 30, 1]}},
        {"layers": 5},
        {"provenance": 5},
        {"recipe": {}},
        {"recipe": None},
        {"fingerprint": "0" * 64},
        {"kind": "dataset"},
    ],
)
def test_a_hostile_run_is_refused(tmp_path, lab, change):
    """Sealed correctly, so only the content gives it away."""
    _, run = lab.start(tmp_path / "s", 3)
    path = tmp_path / "s" / run.path / "zarr.json"
    document = json.loads(path.read_bytes())
    document["attributes"]["featstore"].update(change)
    path.write_bytes(metadata.seal(document))
    with pytest.raises((CorruptError, IncompatibleError)):
        fs.open(tmp_path / "s").dataset("toy").find(lab.recipe())


def test_hostile_names_in_the_catalog_are_passed_over(tmp_path, lab):
    _, run = lab.start(tmp_path / "s", 3)
    for name in ("toy~..~..~etc", "toy~a~b~.c", "..~a~b~c", "toy~a~b", "toy~__a~b~c"):
        (tmp_path / "s" / "catalog" / f"{name}.json").write_bytes(b"{}")
    assert [r.path for r in fs.open(tmp_path / "s").dataset("toy").runs()] == [run.path]


def test_unwritable_places(tmp_path, lab, workers):
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(StorageError, match="Not a directory") as caught:
        fs.create(tmp_path / "file" / "store")
    assert "choose another --store" in caught.value.hint
    assert caught.value.exit_code == 2
    # As another user: root may write everywhere.
    folder = Path(tempfile.mkdtemp())  # Not in tmp_path, where another user cannot even look.
    try:
        lab.start(folder / "s", 3)
        for path in (folder, folder / "s", *(folder / "s").iterdir()):
            path.chmod(0o555 if path.is_dir() else 0o444)
        before = lab.files(folder)
        for url in (folder / "s", folder / "new"):
            result, _ = workers.run(url=url, n=3, uid=65534)
            _refused(result)
        assert lab.files(folder) == before
    finally:
        for path in (folder, folder / "s", folder / "s" / ".featstore"):
            path.chmod(0o755)
        shutil.rmtree(folder)


def _refused(result):
    assert result["error"] == "StorageError"
    assert "Permission denied" in result["message"]
    assert "permissions" in result["hint"]
