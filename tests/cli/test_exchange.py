"""`featstore import-npy` and `featstore export` as scripts and people see them."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tests.store import worker

TECHNIQUE = worker.recipe().technique


@pytest.fixture
def store(tmp_path):
    """Five images of a data set that only the store knows."""
    worker.full(tmp_path / "s.zarr", 5)
    return tmp_path / "s.zarr"


@pytest.fixture
def npy(tmp_path, photos):
    """Features of ten pictures, as the public code leaves them."""
    folder = tmp_path / "npy"
    for layer, shape in (("up-level1-upsampler-out", (3, 4, 4)), ("attn", (2, 8, 8))):
        (folder / layer).mkdir(parents=True)
        for index in range(10):
            np.save(folder / layer / f"{index:02d}.npy", np.full(shape, index, np.float16))
    return folder


@pytest.fixture
def words(npy, photos, tmp_path):
    """The command line that imports them."""
    said = ("--model", "sd15", "--technique", "prompt", "--timestep", "51", "--image-size", "512")
    return ("import-npy", npy, "--dataset", f"folder:{photos}", *said, "--store", tmp_path / "i.zarr")


def exporting(store, out, *more):
    return ("export", out, "--dataset", "toy", "--techniques", TECHNIQUE, "--store", store, *more)


def test_import_says_what_it_takes_the_folder_for_before_it_starts(run, words, tmp_path):
    result = run(*words, "--dry-run")
    assert result.stdout.splitlines() == [
        f"{tmp_path}/npy: layer-first, images named by stem",
        "  layers: attn-all 2x8x8, up-level1-upsampler-out 3x4x4",
        result.stdout.splitlines()[2],
    ]
    assert "sd15 prompt t051 of photos, run " in result.stdout
    assert "0 there already, 10 to import, 3.5 kB in float16" in result.stdout
    assert not (tmp_path / "i.zarr").exists()
    result = run(*words)
    assert re.fullmatch(r"10 images imported in [0-9]+ s\n", result.stdout)
    assert "10 to import" in result.stderr
    assert "importing: 20 of 20 maps" in result.stderr
    assert "10 there already, 0 to import\n" in run(*words).stderr


def test_import_as_json(run_json, words, npy, photos):
    plan = run_json(*words, "--dry-run")
    assert (plan["import"], plan["reused"], plan["bytes"]) == (10, 0, 10 * 2 * (48 + 128))
    done = run_json(*words)
    assert done["layers"] == {"attn-all": [2, 8, 8], "up-level1-upsampler-out": [3, 4, 4]}
    assert (done["imported"], done["failed"], done["layout"], done["names"]) == (10, [], "layer-first", "stem")
    assert set(plan) - set(done) == {"import"}
    (npy / "attn" / "03.npy").write_bytes(b"")
    (photos / "04.png").unlink()
    done = run_json(*words, code=1)
    assert [one["key"] for one in done["failed"]] == ["03.png"]
    assert done["strangers"] == ["attn/04.npy", "up-level1-upsampler-out/04.npy"]


def test_import_lists_what_is_wrong_and_fails(run, words, npy):
    for index in range(3, 10):
        (npy / "attn" / f"{index:02d}.npy").unlink()
    np.save(npy / "attn" / "unknown.npy", np.zeros((2, 8, 8), np.float16))
    result = run(*words, code=1)
    assert "  7 images cannot be imported\n  1 files are of no image\n" in result.stderr
    assert "failed: 05.png: it has no file of layer 'attn-all'" in result.stderr
    assert "of no image: attn/unknown.npy" in result.stderr


def test_import_with_other_names(run_json, words):
    done = run_json(*words, "--rename", "attn=attn-up", "--rename", "up-level1-upsampler-out=up1", "--layers", "up1")
    assert set(done["layers"]) == {"up1"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--rename", "attn"), "--rename 'attn' gives no layer another name"),
        (("--rename", "a=b", "--rename", "a=c"), "--rename 'a=c' gives no layer another name"),
        (("--layout", "rows"), "unknown layout 'rows'"),
        (("--precision", "float8"), "unknown precision"),
        (("--split", "test"), "unknown split 'test'"),
        (("--limit", "0"), "Invalid value for '--limit'"),
        (("--image-size", "big"), "image size 'big'"),
    ],
)
def test_import_refuses(refused, words, more, message, tmp_path):
    assert message in refused(*words, *more)
    assert not (tmp_path / "i.zarr").exists()


def test_import_needs_to_know_what_the_files_do_not_say(refused, npy, photos):
    shown = refused("import-npy", npy, "--dataset", f"folder:{photos}")
    assert "--model, --technique, --timestep, --image-size must" in shown
    assert "there is no folder" in refused("import-npy", npy / "x", "--dataset", f"folder:{photos}")


@pytest.mark.parametrize("form", ["npy", "safetensors", "datasets"])
def test_export_says_the_size_first_and_then_what_it_wrote(run, run_json, store, tmp_path, form):
    out = tmp_path / "out"
    result = run(*exporting(store, out, "--format", form, "--dry-run"))
    assert result.stdout.startswith(f"{out}: {form}, about ")
    assert f"  reference {TECHNIQUE} t050 of toy: 5 images, 2 layers, " in result.stdout
    assert not out.exists()
    plan = run_json(*exporting(store, out, "--format", form, "--dry-run"))
    assert (plan["format"], plan["runs"][0]["images"]) == (form, 5)
    result = run(*exporting(store, out, "--format", form))
    assert re.fullmatch(rf"[0-9.]+ kB written in [0-9]+ s to {re.escape(str(out))}\n", result.stdout)
    assert "exporting: 5 of 5 images" in result.stderr
    done = run_json(*exporting(store, out, "--format", form, "--overwrite"))
    assert done["bytes"] == sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert set(done) - set(plan) == {"seconds"}


def test_export_and_import_again(run_json, store, tmp_path):
    run_json(*exporting(store, tmp_path / "out", "--format", "npy", "--layers", "up1"))
    done = run_json("import-npy", tmp_path / "out", "--dataset", "toy", "--store", store)
    assert (done["imported"], done["names"], done["technique"]) == (5, "listed", TECHNIQUE)


def test_an_incomplete_export_fails_and_names_what_it_lacks(run, run_json, tmp_path):
    _, features = worker.start(tmp_path / "part.zarr", 30)
    worker.fill(features, rows=range(3))
    words = exporting(tmp_path / "part.zarr", tmp_path / "out", "--format", "npy", "--overwrite")
    assert run_json(*words, code=1)["runs"][0]["left_out"][0] == "img0003"
    result = run(*words, code=1)
    assert "3 images, 2 layers" in result.stderr
    assert "27 left out" in result.stderr
    assert "left out, as it has no features of today's image: img0003: reference-" in result.stderr
    assert "and 7 more, all of them with --json" in result.stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--format", "parquet"), "unknown format 'parquet'; known: datasets, npy, safetensors"),
        (("--format", "npy", "--timesteps", "51"), "no features of data set 'toy'"),
        (("--format", "npy", "--timesteps", "x"), "are not integers"),
        (("--format", "npy", "--layers", "up7"), "unknown layer 'up7'"),
        (("--format", "npy", "--split", "val"), "unknown split 'val'; known: test, train"),
        (("--format", "npy", "--fingerprint", "0000"), "0000"),
    ],
)
def test_export_refuses(refused, store, tmp_path, more, message):
    assert message in refused(*exporting(store, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_export_does_not_touch_what_is_there(refused, store, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    for more in ((), ("--overwrite",)):
        assert "is no earlier export" in refused(*exporting(store, tmp_path / "out", "--format", "npy", *more))
    assert (tmp_path / "out" / "thesis.tex").exists()
