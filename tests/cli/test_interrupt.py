"""Ctrl-C: exit status 130, and the same command goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

# A test run that was itself started in the background has SIGINT ignored, and its children inherit that.
_MAIN = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from featstore.cli import main
main()
"""

pytestmark = pytest.mark.usefixtures("tiny")


def test_an_interruption_is_reported_in_every_form(run, run_json, features, monkeypatch):
    import featstore.cli.store as commands

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "describe", interrupted)
    result = run("info", "--store", features, code=130)
    assert result.stderr.startswith("error: interrupted\nhint: what was committed stays")
    assert run_json("info", "--store", features, code=130)["error"]["kind"] == "KeyboardInterrupt"


def test_a_real_signal_in_the_middle_of_an_extraction(run_json, tmp_path):
    # Many runs, so that much is left to do whenever the signal arrives.
    words = ("extract", "--dataset", "toyhorse", "--techniques", "basic,prompt", "--timesteps", "50,60,70,80,90,100")
    words += ("--batch-size", "8", "--store", tmp_path / "s.zarr", "--device", "cpu")
    command = [sys.executable, "-c", _MAIN, *map(str, words), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ, text=True)
    deadline = time.monotonic() + 120

    def a_block_is_complete():
        records = list((tmp_path / "s.zarr").glob("toyhorse/*/basic-*/t050/committed/*/zarr.json"))
        return len(records) > 1 and all((path.parent / "c.0").exists() for path in records)

    while not a_block_is_complete():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert '"KeyboardInterrupt"' in out
    assert "Traceback" not in err
    assert "interrupted" in err

    report = run_json(*words)
    assert len(report["runs"]) == 12
    assert 0 < sum(run["reused"] for run in report["runs"]) < 12 * 160
    assert all(run["computed"] + run["reused"] == 160 for run in report["runs"])
    assert run_json("verify", "--store", tmp_path / "s.zarr")["ok"]
    assert [run["computed"] for run in run_json(*words)["runs"]] == [0] * 12
