"""`featstore train-lora` as people call it: the plan, the report, and the way there from a technique without a LoRA."""

from __future__ import annotations

import re
import shlex
import shutil

import pytest

FILE = "pytorch_lora_weights.safetensors"
SHORT = ("--images", "2", "--steps", "1", "--rank", "2", "--device", "cpu")


@pytest.fixture
def home(weights_root, tmp_path, monkeypatch):
    """A weights root of the test's own, with the tiny stand-in of `reference`."""
    root = tmp_path / "weights"
    shutil.copytree(weights_root, root)
    monkeypatch.setenv("FEATSTORE_WEIGHTS", str(root))
    return root


@pytest.fixture
def nothing_starts(monkeypatch):
    def execute(*_):
        raise AssertionError("it began to train")

    monkeypatch.setattr("featstore.cli.train_lora.execute_lora", execute)


def test_the_hint_of_a_missing_lora_is_the_command_that_trains_it(run, refused, home, photos, tmp_path):
    extract = ("extract", "--dataset", f"folder:{photos}", "--techniques", "lora", "--store", tmp_path / "s.zarr")
    message = refused(*extract)
    assert "model 'reference' has no LoRA for data set 'photos'" in message
    command = re.search(r"`([^`]*)`", message).group(1)
    assert command == f"featstore train-lora --dataset folder:{photos} --model reference"
    assert f"{command} --overfit`" in refused(*extract[:4], "lora:overfit", *extract[5:])

    trained = run(*shlex.split(command)[1:], *SHORT)
    file = home / "reference" / "loras" / "photos" / FILE
    assert f"lora: {file}" in trained.stdout
    assert "photos: 2 of 10 images, 64 x 64 px, model reference, on cpu" in trained.stderr
    use = trained.stderr.splitlines()[-1].removeprefix("use it: ")
    assert use == f"featstore extract --dataset folder:{photos} --techniques lora --model reference"
    assert "10 passes stored" in run(*shlex.split(use)[1:], "--store", tmp_path / "s.zarr").stderr


def test_the_plan_is_shown_and_nothing_is_done(run, run_json, home, photos, nothing_starts, tmp_path):
    words = ("train-lora", "--dataset", f"folder:{photos}", "--device", "cpu", "--dry-run")
    shown = run(*words).stdout
    plan = run_json(*words)
    folder = home / "reference" / "loras" / "photos"
    assert "photos: 10 of 10 images" in shown
    assert "1000 steps of 1 image" in shown
    assert f"{plan['parameters']:,} trainable parameters" in shown
    assert plan["lora"] == str(folder / FILE)
    assert plan["bytes"] == 2 * plan["parameters"]
    assert run_json(*words, "--overfit")["lora"] == str(folder / "overfit" / FILE)
    assert run_json(*words, "--overfit")["steps"] == 3000
    assert run_json(*words, "--out", tmp_path / "own")["technique"] == f"lora:{tmp_path / 'own'}"
    assert not (home / "reference" / "loras").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--images", "0"), "--images 0 is not 1 or more"),
        (("--model", "referense"), "did you mean 'reference'?"),
        (("--captions", "sentense"), "did you mean 'sentences'?"),
        (("--split", "train"), "unknown split 'train'; known: all"),
        (("--device", "cuda:99"), "cuda:99"),
        (("--image-size", "100"), "image height 100 px"),
        (("--image-size", "wide"), "'wide'"),
        (("--dataset", "toyhorse"), "--out DIR"),
    ],
)
def test_bad_requests(refused, home, photos, nothing_starts, words, said):
    assert said in refused("train-lora", "--dataset", f"folder:{photos}", *words)


def test_an_interruption_says_that_nothing_was_written(run_json, home, photos, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("featstore.pipelines.train_lora._train", interrupted)
    error = run_json("train-lora", "--dataset", f"folder:{photos}", *SHORT, code=130)["error"]
    assert (error["message"], error["hint"]) == ("interrupted", "nothing was written; the same command begins anew")
    assert not (home / "reference" / "loras").exists()


def test_the_report_is_one_json_object(run_json, home, photos, tmp_path):
    report = run_json("train-lora", "--dataset", f"folder:{photos}", *SHORT, "--out", tmp_path / "own")
    assert report["lora"] == str(tmp_path / "own" / FILE)
    assert (report["images"], report["steps"], report["unreadable"]) == (2, 1, [])
    assert set(report["loss"]) == {"before", "after"} == set(report["held_out_loss"])
