"""Killed at any moment and run again, an extraction ends with the bytes of an undisturbed one."""

from __future__ import annotations

import os
import random
import signal
import sys
import time

import pytest

import featstore
from featstore.pipelines.extract import extract
from featstore.pipelines.plan import ExtractConfig, make_plan
from featstore.store.verify import verify
from tests.pipelines import killing


def ends_the_same(tmp_path, config, deaths):
    """Kill as often as ``deaths`` says, rerun, compare; returns how many processes were really killed by kind."""
    context = killing.server()
    quiet, stormy = tmp_path / "quiet.zarr", tmp_path / "stormy.zarr"
    killed: dict[str, int] = {}
    for store, plan in ((quiet, [None]), (stormy, [*deaths, None])):
        for death in plan:
            process = context.Process(target=killing.run, args=(config(store), death, dict(os.environ)))
            process.start()
            process.join(600)
            if death is None:
                assert process.exitcode == 0, (store, process.exitcode)
            elif process.exitcode == -signal.SIGKILL:
                killed[death[0]] = killed.get(death[0], 0) + 1
            else:
                assert process.exitcode == 0, process.exitcode  # it was done before its moment came
    expected, found = killing.arrays(quiet), killing.arrays(stormy)
    assert expected.keys() == found.keys()
    assert expected == found
    assert expected
    assert verify(featstore.open(str(stormy))).ok
    assert make_plan(config(stormy)).passes_todo == 0
    return killed


def test_a_few_kills(tmp_path, config, tiny, lora):
    def wanted(store):
        return config(store=str(store), techniques=f"basic,controlnet,{lora}")

    deaths = [("during", 1), ("during", 9), ("after", 2), ("after", 5), ("seconds", 1.0)]
    killed = ends_the_same(tmp_path, wanted, deaths)
    assert killed["during"] == 2
    assert killed["after"] == 2


@pytest.mark.full
def test_twenty_kills_of_the_embedded_model(tmp_path):
    """toyhorse with prompt, controlnet and lora: 7 kills in a write, 7 before a commit, 6 at random moments."""

    def wanted(store):
        return ExtractConfig(dataset="toyhorse", techniques="prompt,controlnet,lora", store=str(store), device="cpu")

    shuffle = random.Random(0)
    # Early moments: the whole extraction takes seconds, and all twenty are to find it unfinished.
    deaths = [("during", shuffle.randint(1, 2)) for _ in range(7)]
    deaths += [("after", shuffle.randint(1, 2)) for _ in range(7)]
    deaths += [("seconds", shuffle.uniform(0.3, 1.8)) for _ in range(6)]
    shuffle.shuffle(deaths)
    killed = ends_the_same(tmp_path, wanted, deaths)
    assert sum(killed.values()) == 20
    assert killed["during"] >= 5
    assert killed["after"] >= 5


def test_a_leftover_of_a_killed_writer_is_not_read(tmp_path, config, tiny):
    context = killing.server()
    wanted = config(store=str(tmp_path / "s.zarr"))
    process = context.Process(target=killing.run, args=(wanted, ("during", 1), dict(os.environ)))
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    assert make_plan(wanted).passes_todo == 10
    assert extract(wanted).passes == 10
    leftovers = list((tmp_path / "s.zarr").rglob("*.partial"))
    assert leftovers == []


@pytest.mark.full
def test_two_hundred_kills_at_random_moments(tmp_path, wanted, capsys):
    """Each store is killed ten times and then left alone; in between nobody cleans up."""
    began = time.monotonic()
    extract(wanted(tmp_path / "first.zarr"))
    seconds = time.monotonic() - began
    shuffle, killed, stores = random.Random(1), 0, 0
    while killed < 200:
        folder = tmp_path / str(stores)
        folder.mkdir()
        # Late moments only come true if the time until then is computed anew each time.
        deaths = [("seconds", shuffle.uniform(0.05, seconds)) for _ in range(10)]
        killed += ends_the_same(folder, wanted, deaths).get("seconds", 0)
        stores += 1
    with capsys.disabled():
        sys.stdout.write(f"\n{killed} extractions killed at random moments, {stores} stores with equal bytes\n")
