"""Several processes extract the same runs at once: all finish, the work is shared, the bytes are those of one."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import featstore
import featstore.store
from featstore.pipelines.extract import extract
from featstore.pipelines.plan import ExtractConfig
from featstore.store import leases
from featstore.store.verify import verify
from tests.pipelines import killing

IMAGES = 200


def work(config: ExtractConfig, report: Path, environment: dict[str, str]) -> None:
    """Extract and write down what was computed. Target of the processes."""
    os.environ.clear()
    os.environ.update(environment)
    done = extract(config).to_json()
    report.write_text(json.dumps([[run["computed"], run["reused"], len(run["failed"])] for run in done["runs"]]))


def together(context, configs, tmp_path: Path) -> list[list[list[int]]]:
    reports = [tmp_path / f"report-{number}.json" for number in range(len(configs))]
    processes = [
        context.Process(target=work, args=(config, report, dict(os.environ)))
        for config, report in zip(configs, reports, strict=True)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    return [json.loads(report.read_text()) for report in reports]


def test_processes_share_the_blocks_of_the_same_runs(tmp_path, many, wanted):
    alone, shared = tmp_path / "alone.zarr", tmp_path / "shared.zarr"
    extract(wanted(alone))
    counts = together(killing.server(), [wanted(shared)] * 3, tmp_path)
    for run in range(2):
        # Each image was computed by exactly one of them: nothing twice, nothing left out.
        assert sum(count[run][0] for count in counts) == IMAGES
        assert all(computed + reused == IMAGES and not failed for computed, reused, failed in (c[run] for c in counts))
    assert killing.arrays(shared) == killing.arrays(alone)
    assert verify(featstore.open(str(shared))).ok
    for run in featstore.open(str(shared)).dataset(many.name).runs():
        assert leases.held(run.dataset.objects, run.path) == []


def test_processes_with_other_parts_of_a_block_and_other_techniques(tmp_path, wanted):
    alone, shared = tmp_path / "alone.zarr", tmp_path / "shared.zarr"
    extract(wanted(alone))
    configs = [wanted(shared, limit=90, techniques="controlnet"), wanted(shared), wanted(shared, techniques="basic")]
    together(killing.server(), configs, tmp_path)
    extract(wanted(shared))
    assert killing.arrays(shared) == killing.arrays(alone)


def test_the_blocks_of_a_process_that_was_killed_are_taken_over_at_once(tmp_path, wanted):
    shared = tmp_path / "shared.zarr"
    context = killing.server()
    process = context.Process(target=killing.run, args=(wanted(shared), ("after", 3), dict(os.environ)))
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    store = featstore.open(str(shared))
    left = store.objects.names(f"{featstore.store.objects.INTERNAL}/leases")
    assert left  # it died with its leases
    before = time.monotonic()
    extract(wanted(shared))
    assert time.monotonic() - before < leases.TTL_SECONDS / 2
    assert verify(featstore.open(str(shared))).ok


def test_a_block_that_another_machine_holds_is_waited_for_until_its_lease_is_over(tmp_path, many, wanted, monkeypatch):
    """The lease of another machine cannot be asked whether its process lives: it is over when its time is."""
    store = tmp_path / "shared.zarr"
    extract(wanted(store, limit=1))
    run = featstore.open(str(store)).dataset(many.name).run("basic")
    with monkeypatch.context() as patch:
        patch.setattr(leases.partial, "place", lambda: "0" * 12)
        patch.setattr(leases, "TTL_SECONDS", 3.0)
        lease = leases.acquire(featstore.store.create(str(store)).objects, run.path, 1)
        assert isinstance(lease, leases.Lease)
    notes = []

    class Told(featstore.pipelines.progress.Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    began = time.monotonic()
    report = extract(wanted(store), Told())
    assert time.monotonic() - began > 1.0
    assert [run["computed"] for run in report.to_json()["runs"]] == [IMAGES - 1, IMAGES - 1]
    assert any("waiting for 1 block" in note for note in notes)
    assert verify(featstore.open(str(store))).ok


def test_overwriting_computes_everything_anew_and_changes_no_byte(tmp_path, wanted):
    store = tmp_path / "shared.zarr"
    extract(wanted(store))
    before = killing.arrays(store)
    report = extract(wanted(store, overwrite=True)).to_json()
    assert [run["computed"] for run in report["runs"]] == [IMAGES, IMAGES]
    assert killing.arrays(store) == before
    assert [run["computed"] for run in extract(wanted(store)).to_json()["runs"]] == [0, 0]


def test_rows_that_another_writer_replaced_are_made_once_more(tmp_path, wanted, monkeypatch):
    """Two holders of a block on a store without locks: the other one's record drops our rows as we finish."""
    store = tmp_path / "shared.zarr"
    alone = tmp_path / "alone.zarr"
    extract(wanted(alone))
    genuine, times = featstore.pipelines.here.compute, []

    def disturbed(plan, outcomes, model, progress):
        genuine(plan, outcomes, model, progress)
        times.append(len(times))
        if len(times) == 1:
            outcomes[0].run.uncommit(range(64, 100))

    monkeypatch.setattr(featstore.pipelines.here, "compute", disturbed)
    report = extract(wanted(store)).to_json()
    assert times == [0, 1]
    assert [run["computed"] for run in report["runs"]] == [IMAGES, IMAGES]
    assert killing.arrays(store) == killing.arrays(alone)


def test_four_blocks(many, tmp_path, wanted):
    """What the counts above rely on."""
    extract(wanted(tmp_path / "s.zarr", limit=1))
    run = featstore.open(str(tmp_path / "s.zarr")).dataset(many.name).run("basic")
    assert run.n_blocks == 4
