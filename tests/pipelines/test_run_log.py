"""What an extraction leaves in its log: the plan, what came of it, which images failed and why."""

from __future__ import annotations

import dataclasses
import os
import signal

import pytest

import featstore
from featstore.errors import StorageError
from featstore.pipelines import run_log as logging
from featstore.pipelines.extract import execute, extract
from featstore.pipelines.plan import make_plan
from featstore.pipelines.report import ReportConfig, make_report
from featstore.pipelines.report.failures import reasons_of
from featstore.pipelines.report.stores import Sampling
from featstore.pipelines.run_log import command_of, without_secrets
from featstore.store.local import LocalObjects
from featstore.store.run_logs import log_entries, log_lines
from featstore.techniques import SteeringOptions
from tests.pipelines import killing

pytestmark = pytest.mark.usefixtures("tiny")


def entries(config):
    return log_entries(featstore.open(config.store).objects, limit=10)


def test_every_extraction_leaves_a_log_of_what_it_did(config):
    extract(config(limit=4))
    extract(config(techniques="basic,controlnet"))
    extract(config(techniques="basic,controlnet"))
    newest, second, first = entries(config())
    assert [one.state for one in (newest, second, first)] == ["done"] * 3
    assert [(one.facts["computed"], one.facts["cached"]) for one in (first, second, newest)] == [
        (4, 0),
        (16, 4),
        (0, 20),
    ]
    plan = second.facts["plan"]
    assert (plan["images"], plan["passes"], plan["runs"]) == (10, 16, 2)
    assert [(run["technique"], run["compute"]) for run in plan["of_runs"]] == [("basic", 6), ("controlnet", 10)]
    assert first.facts["peak_rss_bytes"] > 1 << 20
    assert first.facts["passes_per_second"] > 0
    lines = list(log_lines(featstore.open(config().store).objects, first.id))
    assert [one["kind"] for one in lines] == ["start", "stage", "progress", "end"]
    assert lines[2]["computed"] == 4


def test_the_command_asks_for_the_same_thing(config):
    steering = SteeringOptions(prompt="a horse's head")
    wanted = config(timesteps=(50, 200), seed=3, steering=steering, precision="int8", overwrite=True, split="train")
    words = command_of(wanted)
    for part in ("--timesteps 50,200", "--seed 3", "--precision int8", "--overwrite", "--split train", "head"):
        assert part in words
    assert "--limit" not in words


def test_no_password_gets_into_a_log(config):
    assert without_secrets("tcp://ada:secret@host:1 s3://b/x?token=secret'") == "tcp://..@host:1 s3://b/x?..'"
    wanted = dataclasses.replace(config(), store="https://ada:secret@host/x?sig=secret")
    assert "secret" not in command_of(wanted)


def test_images_that_fail_are_there_with_the_reason_until_they_are_done(config, photos, tmp_path):
    whole = (photos / "05.png").read_bytes()
    (photos / "05.png").write_bytes(whole[:100])
    report = extract(config(techniques="basic,controlnet"))
    (entry,) = entries(config())
    assert entry.facts["failed"]["count"] == 2
    assert {one["key"] for one in entry.facts["failed"]["images"]} == {"05.png"}
    reason = report.failed["05.png"]
    assert entry.facts["failed"]["images"][0]["reason"] == reason
    page = tmp_path / "r.html"
    wanted = ReportConfig(store=config().store, sampling=Sampling(images=0), out=page)
    assert "photos: images that failed, and why" in make_report(wanted).sections
    assert page.read_text().count(entry.id) == 2
    (photos / "05.png").write_bytes(whole)
    extract(config(techniques="basic,controlnet"))
    assert "photos: images that failed, and why" not in make_report(wanted).sections


def test_a_report_does_without_logs_that_cannot_be_read(config, monkeypatch):
    extract(config(limit=1))
    store = featstore.open(config().store)

    def broken(*_, **__):
        raise StorageError("gone")

    monkeypatch.setattr("featstore.pipelines.report.failures.log_entries", broken)
    assert reasons_of(store) == {}


def test_a_place_that_takes_no_logs_takes_features_all_the_same(config, monkeypatch):
    put_new = LocalObjects.put_new

    def refuse(self, key, *buffers, durable=True):
        if "/log/" in key:
            raise StorageError("no logs here")
        return put_new(self, key, *buffers, durable=durable)

    monkeypatch.setattr(LocalObjects, "put_new", refuse)
    notes = []

    class Told:
        note = notes.append

        def __getattr__(self, _):
            return lambda *_: None

    assert execute(make_plan(config()), Told()).passes == 10
    assert len([one for one in notes if "no logs here" in one]) == 1
    assert entries(config()) == []


def test_what_stops_an_extraction_is_in_its_log(config, monkeypatch):
    def broken(*_, **__):
        raise StorageError("the disk is full")

    monkeypatch.setattr("featstore.pipelines.extract._compute", broken)
    with pytest.raises(StorageError):
        extract(config())
    (entry,) = entries(config())
    assert (entry.state, entry.facts["error"]) == ("failed", "StorageError: the disk is full")


def test_a_killed_extraction_is_known_by_its_log(tmp_path, config):
    wanted = config(store=str(tmp_path / "s.zarr"))
    process = killing.server().Process(target=killing.run, args=(wanted, ("after", 1), dict(os.environ)))
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    (entry,) = entries(wanted)
    assert entry.state == "killed"
    assert entry.facts["plan"]["passes"] == 10


def test_how_far_it_is_is_said_again_and_again(config, monkeypatch):
    original = logging.ExtractionLog
    monkeypatch.setattr("featstore.pipelines.extract.ExtractionLog", lambda *args: original(*args, part_seconds=0.05))
    extract(config(techniques="basic,controlnet"))
    (entry,) = entries(config())
    lines = [one for one in log_lines(featstore.open(config().store).objects, entry.id) if one["kind"] == "progress"]
    assert len(lines) >= 3
    assert [one["computed"] for one in lines] == sorted(one["computed"] for one in lines)
    assert lines[-1]["computed"] == 20
