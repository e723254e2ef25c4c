"""push, pull, rm, and finding runs by what they mean, as they are typed."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
from rich.console import Console

import featstore.store as fs
from featstore.cli import console
from featstore.store import leases

RUN_KEYS = {
    "path", "dataset", "model", "technique", "timestep", "fingerprint", "images", "blocks", "copied", "skipped",
    "corrupt", "bytes", "digests",
}  # fmt: skip


def content(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and "lock-" not in p.name
    }


def test_push_and_pull_as_json(run_json, features, tmp_path):
    plan = run_json("push", tmp_path / "there", "--store", features, "--dry-run")
    assert not (tmp_path / "there").exists()
    assert set(plan) == {"source", "target", "datasets", "runs", "bytes"}
    assert plan["datasets"] == [{"name": "discs", "images": 8, "new_images": 8, "differing_images": []}]
    first = run_json("push", tmp_path / "there", "--store", features)
    assert set(first) == {*plan, "copied", "skipped", "corrupt", "seconds", "digests"}
    assert [set(one) for one in first["runs"]] == [RUN_KEYS] * 2
    assert (first["bytes"], first["copied"], first["skipped"], first["corrupt"]) == (plan["bytes"], 12, 0, [])
    assert first["digests"]["source"] == first["digests"]["target"]
    for one in first["runs"]:
        assert (one["images"], one["blocks"], one["copied"]) == (8, 6, 6)
        assert one["digests"]["source"] == one["digests"]["target"]
    again = run_json("push", tmp_path / "there", "--store", features)
    assert (again["bytes"], again["copied"], again["skipped"]) == (0, 0, 12)
    assert again["digests"] == first["digests"]
    back = run_json("pull", tmp_path / "there", "--store", tmp_path / "back", "--no-digests")
    assert (back["source"], back["target"]) == (str(tmp_path / "there"), str(tmp_path / "back"))
    assert (back["digests"], back["runs"][0]["digests"]) == (None, None)
    assert run_json("info", "--store", tmp_path / "back")["bytes"] == run_json("info", "--store", features)["bytes"]


def test_sizes_are_said_before_and_digests_after(run, features, tmp_path):
    words = ("push", tmp_path / "there", "--store", features)
    dry = run(*words, "--dry-run")
    assert dry.stderr == ""
    lines = dry.stdout.splitlines()
    assert lines[0] == f"{features} to {tmp_path / 'there'}"
    assert lines[1] == "  discs: 8 images, 8 new there"
    assert re.fullmatch(r"    basic t050 [0-9a-f]{8}: 0 blocks are there, 6 to copy with 8 images, [\d.]+ kB", lines[2])
    assert re.fullmatch(r"  in all [\d.]+ kB to copy", lines[-1])
    result = run(*words)
    assert result.stderr.startswith(dry.stdout)
    assert re.search(r"^copying: ([\d.]+ kB) of \1 in \d+ s$", result.stderr, re.MULTILINE)
    assert re.search(r"^comparing: 24 of 24 layers in \d+ s$", result.stderr, re.MULTILINE)
    copied, *digests, verdict = result.stdout.splitlines()
    assert re.fullmatch(r"12 blocks copied, 0 were there already, [\d.]+ kB in \d+ s \([\d.]+ [kM]B/s\)", copied)
    assert len({line.rpartition(" ")[2] for line in digests}) == 1
    assert verdict == "both sides hold the same"


def test_only_some_runs(run_json, features, tmp_path):
    words = ("push", tmp_path / "there", "--store", features, "--dataset", "discs", "--technique", "Prompt")
    words += ("--layers", "attn-up-cross-2,up-level1-upsampler-out", "--timesteps", "50", "--model", "reference")
    (one,) = run_json(*words)["runs"]
    assert (one["technique"], one["copied"]) == ("prompt", 2)
    (there,) = run_json("info", "--store", tmp_path / "there")["datasets"][0]["runs"]
    assert set(there["layers"]) == {"attn-up-cross-2", "up-level1-upsampler-out"}


def test_damage_is_named_and_the_exit_status_says_so(run, run_json, own_features, tmp_path):
    (shard, *_) = sorted(own_features.glob("discs/reference/basic-*/t050/up-level1-upsampler-out/c.0.0.0.0"))
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    result = run("push", tmp_path / "there", "--store", own_features, code=1)
    line = next(line for line in result.stdout.splitlines() if line.startswith("not copied: "))
    assert str(shard.relative_to(own_features)) in line
    assert "verify --repair" in line
    assert "both sides" not in result.stdout
    report = run_json("push", tmp_path / "there", "--store", own_features, code=1)
    assert len(report["corrupt"]) == 1
    assert report["skipped"] == 11


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["push", "{store}"], ["are the same store"]),
        (["push", "{tmp}/x", "--dataset", "disks"], ["'disks'", "discs"]),
        (["push", "{tmp}/x", "--technique", "promt"], ["'promt'", "did you mean 'prompt'"]),
        (["push", "{tmp}/x", "--technique", "controlnet"], ["'controlnet'", "basic, prompt"]),
        (["push", "{tmp}/x", "--layers", "up-level1-upsampler-ou"], ["did you mean 'up-level1-upsampler-out'"]),
        (["push", "{tmp}/x", "--timesteps", "fifty"], ["'fifty'", "--timesteps 50,200"]),
        (["push", "{tmp}/x", "--where", "seed"], ["'seed'", "NAME=VALUE"]),
        (["push", "{tmp}/x", "--where", "sead=3"], ["'sead'", "did you mean 'seed'"]),
        (["push", "{tmp}/x", "--where", "seed=3"], ["seed '3'", "known: 0"]),
        (["push", "{tmp}/x", "--run", "zz"], ["fingerprint 'zz'"]),
        (["pull", "{tmp}/nowhere"], ["nowhere"]),
        (["push", "gopher://x/y"], ["gopher"]),
        (["rm"], ["no run is named", "info --long", "--all"]),
        (["rm", "--all"], ["--all", "--dataset"]),
        (["rm", "basic", "--all", "--dataset", "discs"], ["--all", "leave out"]),
        (["rm", "basic", "--dataset", "disks"], ["'disks'", "discs"]),
        (["rm", "contrlnet"], ["'contrlnet'", "basic, prompt"]),
        (["rm", "discs/reference/basic-00000000/t050"], ["discs/reference/basic-"]),
        (["rm", "basic", "--timesteps", "51"], ["timestep '51'", "50"]),
        (["info", "--technique", "promt"], ["'promt'", "did you mean 'prompt'"]),
        (["info", "--model", "referense"], ["'referense'", "did you mean 'reference'"]),
    ],
)  # fmt: skip
def test_bad_requests(refused, own_features, tmp_path, words, said):
    before = content(own_features)
    filled = [word.format(store=own_features, tmp=tmp_path) for word in words]
    message = refused(*filled, "--store", own_features)
    for part in said:
        assert part in message
    assert content(own_features) == before
    assert not (tmp_path / "x").exists()


def test_a_disk_that_cannot_hold_it_is_refused_before(refused, features, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    assert "GB free and the features to copy take" in refused("push", tmp_path / "x", "--store", features)
    assert not (tmp_path / "x").exists()


def paths(url):
    return [run.path for run in fs.open(url).find()]


def test_rm_says_what_would_go_and_goes_on_only_if_told(run, run_json, refused, own_features):
    before = content(own_features)
    basic, prompt = paths(own_features)
    words = ("rm", "basic", "--store", own_features)
    dry = run(*words, "--dry-run")
    assert dry.stderr == ""
    listed, total = dry.stdout.splitlines()
    assert re.fullmatch(rf"  {re.escape(basic)}: 8 images, [\d.]+ kB", listed)
    assert re.fullmatch(r"  in all 1 run, [\d.]+ kB", total)
    result = run(*words, code=2)
    assert "this would remove 1 run" in result.stderr
    assert basic in result.stderr
    assert "--yes" in result.stderr
    assert "this would remove" in run_json(*words, code=2)["error"]["message"]
    plan = run_json(*words, "--dry-run")
    assert plan["removed"] is False
    assert content(own_features) == before
    report = run_json(*words, "--yes")
    assert report == plan | {"removed": True}
    (one,) = report["runs"]
    assert set(one) == {"path", "model", "technique", "timestep", "fingerprint", "images", "bytes"}
    assert (one["path"], one["images"]) == (basic, 8)
    assert one["bytes"] == report["bytes"] == sum(len(data) for name, data in before.items() if name.startswith(basic))
    assert paths(own_features) == [prompt]
    assert run_json("verify", "--store", own_features)["ok"]


@pytest.mark.parametrize("answer", ["y", "n", ""])
def test_rm_asks_on_a_terminal(own_features, monkeypatch, answer):
    from typer.testing import CliRunner

    from featstore.cli.app import app

    class Terminal(type(console.err)):
        is_terminal = True

    monkeypatch.setattr(console, "err", Terminal(stderr=True))
    monkeypatch.setattr(
        "featstore.cli.transfer.sys", type("Sys", (), {"stdin": type("In", (), {"isatty": lambda: True})})
    )
    before = paths(own_features)
    words = ["rm", before[0], "--store", str(own_features)]
    result = CliRunner().invoke(app, words, input=f"{answer}\n" if answer else "")
    assert "Remove 1 run for good? [y/N]" in result.stderr
    assert result.exit_code == {"y": 0, "n": 1, "": 130}[answer]
    assert paths(own_features) == (before[1:] if answer == "y" else before)


def test_rm_by_path_fingerprint_and_filters(run, own_features, tmp_path):
    basic, prompt = fs.open(own_features).find()
    for words in (
        [basic.path],
        [f"/{basic.path}/"],
        [basic.fingerprint[:8]],
        ["basic", "--timesteps", "50", "--model", "reference"],
        ["--where", f"prompt={basic.recipe.parameters['prompt']}"],
    ):
        store = shutil.copytree(own_features, tmp_path / "copy")
        assert "removed 1 run" in run("rm", *words, "--store", store, "--yes").stdout
        assert paths(store) == [prompt.path], words
        shutil.rmtree(store)
    run("rm", "basic", prompt.fingerprint[:6], "--store", own_features, "--yes")
    assert paths(own_features) == []
    assert fs.open(own_features).datasets() == ["discs"]


def test_rm_of_a_whole_data_set_and_of_a_name_that_two_have(run, run_json, refused, own_features):
    table = fs.open(own_features).dataset("discs").samples.table()
    opened = fs.create(own_features)
    old = opened.find(technique="basic")[0]
    new = opened.put_samples("more", table, source="made up")
    new.create_run(old.recipe, {"up1": (1, 2, 2)}, batch_size=4, provenance={})
    message = refused("rm", "basic", "--store", own_features, "--dry-run")
    assert "several data sets: discs, more" in message
    assert "--dataset" in message
    run("rm", "basic", "--dataset", "more", "--store", own_features, "--yes")
    assert paths(own_features) == [run.path for run in opened.find()]
    report = run_json("rm", "--all", "--dataset", "discs", "--store", own_features, "--yes")
    assert len(report["runs"]) == 2
    assert fs.open(own_features).datasets() == ["more"]
    assert run_json("verify", "--store", own_features)["ok"]


def test_rm_of_what_is_being_written(run, own_features):
    path = paths(own_features)[0]
    lease = leases.acquire(fs.create(own_features).objects, path, 0)
    result = run("rm", path, "--store", own_features, "--yes", code=1)
    assert f"{path} is being written by" in result.stderr
    assert path in paths(own_features)
    lease.release()
    run("rm", path, "--store", own_features, "--yes")


@pytest.fixture
def several(run, labelled, own_features, monkeypatch, weights_root):
    """Two runs of `prompt` in one store, with other texts."""
    monkeypatch.setenv("FEATSTORE_WEIGHTS", str(weights_root))
    words = ("extract", "--dataset", f"folder:{labelled}", "--techniques", "prompt", "--store", own_features)
    run(*words, "--prompt", "an old grey horse", "--batch-size", "4", "--device", "cpu")
    return own_features


def test_info_tells_runs_apart_by_what_differs(run, run_json, several):
    shown = run("info", "--store", several).stdout
    assert re.search(r"prompt +50 .*prompt=a horse, high quality\s*$", shown, re.MULTILINE)
    assert re.search(r"prompt +50 .*prompt=an old grey horse\s*$", shown, re.MULTILINE)
    assert "differs" not in run("info", "--technique", "basic", "--store", several).stdout
    (one,) = run_json("info", "--where", "prompt=an old grey horse", "--store", several)["datasets"][0]["runs"]
    assert one["differs"] == {"prompt": "an old grey horse"}
    assert one["provenance"][0]["device"] == "cpu"
    # Nothing has both: no error, and nothing listed.
    words = ("info", "--technique", "basic", "--where", "prompt=an old grey horse", "--store", several)
    assert run_json(*words)["datasets"] == []
    assert "no run has all of that" in run(*words).stdout


def test_info_says_who_made_a_run_when_with_what_and_where_it_lies(run, run_json, features):
    shown = run("info", "--long", "--technique", "basic", "--store", features).stdout
    (one,) = run_json("info", "--technique", "basic", "--store", features)["datasets"][0]["runs"]
    (made,) = one["provenance"]
    for part in (
        one["path"],
        one["fingerprint"],
        made["user"],
        made["host"],
        made["created"],
        made["packages"]["torch"],
    ):
        assert part in shown
    assert "basic at 50, reference" in shown
    assert "images: 8 of 8" in shown
    assert re.search(r"up-level1-upsampler-out: \d+ x \d+ x \d+ float16, [\d.]+ kB", shown)
    assert "prompt-" not in shown


def test_one_of_several_runs_is_chosen_by_its_fingerprint(run, run_json, refused, several, labelled, tmp_path):
    words = ("--dataset", f"folder:{labelled}", "--techniques", "basic,prompt", "--store", several)
    short = ("--splits", "1", "--ensemble", "1", "--max-steps", "5", "--device", "cpu", "--out", tmp_path / "head")
    for command, rest in (("train-head", short), ("show", ("--count", "1", "--out", tmp_path / "x.png"))):
        message = refused(command, *words, *rest)
        assert "prompt=an old grey horse" in message
        assert "--run" in message
        for one in fs.open(several).find(technique="prompt"):
            run(command, *words, *rest, "--run", one.fingerprint[:10])
            if command == "train-head":
                head = json.loads((tmp_path / "head/head.json").read_text())
                assert one.fingerprint in json.dumps(head)
        assert "'0123456789'" in refused(command, *words, *rest, "--run", "0123456789")


def test_a_push_that_is_killed_goes_on(run_json, features, s3):
    """To a bucket, by a process of its own that is killed at its first shard."""
    words = [sys.executable, "-m", "featstore.cli", "push", s3.url, "--store", str(features)]
    s3.proxy.fail(times=1, method="PUT", path="/c.0.0.0.0", delay_seconds=5, pass_on=True, drop=True)
    process = subprocess.Popen(words, env=os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not any(one.method == "PUT" and "/c.0.0.0.0" in one.path for one in s3.proxy.log):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not all(one.valid(list(one.layers)).all() for one in fs.open(s3.url).find())
    report = run_json("push", s3.url, "--store", features)
    assert report["corrupt"] == []
    assert report["digests"]["source"] == report["digests"]["target"]
    assert all(one.valid(list(one.layers)).all() for one in fs.open(s3.url).find())
    assert run_json("verify", "--store", s3.url)["ok"]


def test_bytes_on_a_terminal_are_said_as_people_say_them(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(console, "err", Console(stderr=True, file=screen, force_terminal=True, width=120))
    bar = console.Bar()
    bar.start("copying", 2_500_000, "bytes")
    bar.advance(1_500_000)
    bar.stop()
    assert "1.5 MB of 2.5 MB" in screen.getvalue()
    assert re.search(r"[kMG]?B/s", screen.getvalue())
    assert "1500000" not in screen.getvalue()
