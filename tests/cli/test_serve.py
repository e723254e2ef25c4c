"""`featstore serve`: what it prints, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

# A test run that was itself started in the background has SIGINT ignored, and its children inherit that.
_MAIN = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from featstore.cli import main
main()
"""


@pytest.fixture
def serving(features):
    """Starts `featstore serve` in a process of its own and ends it with Ctrl-C."""
    processes = []

    def start(*words, **environment):
        process = subprocess.Popen(
            [sys.executable, "-c", _MAIN, "serve", "--store", str(features), "--port", "0", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | environment,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def interrupted(process):
    """(standard output, standard error) after Ctrl-C, which must end it promptly and as an interruption."""
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    texts = process.communicate(timeout=30)
    assert process.returncode == 130
    assert time.monotonic() - begin < 15
    return texts


def read_json(process):
    """The one JSON object, of which the last line is a lone bracket."""
    lines = []
    while not lines or lines[-1] != "}\n":
        lines.append(process.stdout.readline())
        assert lines[-1], process.communicate()
    return json.loads("".join(lines))


def fetch(url, token=None):
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as answer:
        return answer.read()


def test_it_prints_what_a_colleague_types_and_ends_with_ctrl_c(serving, features):
    process = serving()
    url = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())[0]
    assert process.stdout.readline() == f"  featstore info --store {url}\n"
    assert fetch(f"{url}/zarr.json") == (features / "zarr.json").read_bytes()
    out, err = interrupted(process)
    assert (out, err) == ("", "stopped\n")


def test_ctrl_c_does_not_wait_for_slow_clients(serving):
    process = serving("--json")
    port = int(read_json(process)["url"].rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port)) as silent, socket.create_connection(("127.0.0.1", port)) as half:
        half.sendall(b"GET /zarr.json HT")
        assert silent.fileno() > 0
        out, err = interrupted(process)
    assert (out, err) == ("", "stopped\n")


@pytest.mark.parametrize("by_option", [True, False])
def test_the_token_is_asked_for_and_not_printed(serving, by_option):
    token = "horse-battery-staple"
    process = serving("--token", token) if by_option else serving(FEATSTORE_TOKEN=token)
    url = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())[0]
    assert "export FEATSTORE_TOKEN=" in process.stdout.readline()
    with pytest.raises(urllib.error.HTTPError, match="401"):
        fetch(f"{url}/zarr.json")
    assert fetch(f"{url}/zarr.json", token)
    out, err = interrupted(process)
    assert token not in out + err


def test_an_open_address_without_a_token_is_warned_of(serving):
    process = serving("--host", "0.0.0.0", "--json")
    report = read_json(process)
    assert not report["token"]
    out, err = interrupted(process)
    assert out == ""
    assert err == "warning: without --token everybody in the network can read this store\nstopped\n"


def test_an_open_address_with_a_token_is_not(serving):
    process = serving("--host", "0.0.0.0", "--json", "--token", "horse-battery")
    assert read_json(process)["token"] is True
    assert interrupted(process) == ("", "stopped\n")


def test_bad_requests(refused, features, tmp_path):
    assert "there is no store" in refused("serve", "--store", tmp_path / "none.zarr", "--port", "0")
    assert not (tmp_path / "none.zarr").exists()
    assert "token" in refused("serve", "--store", features, "--port", "0", "--token", "two words")
    refused("serve", "--store", features, "--port", "65536")
    refused("serve", "--store", features, "--host", "no such host", "--port", "0")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        message = refused("serve", "--store", features, "--port", taken.getsockname()[1])
    assert "in use" in message
    assert "choose another --port" in message


@pytest.fixture
def at(serving):
    """URL of a server of the store."""
    return read_json(serving("--json"))["url"]


def comparable(value):
    """A command's JSON without what is allowed to differ."""
    return {
        key: one for key, one in value.items() if key not in ("store", "seconds", "peak_rss_bytes", "head", "picture")
    }


def test_every_reading_command_takes_the_url(run_json, at, features, labelled, tmp_path):
    heads = ("--dataset", f"folder:{labelled}", "--techniques", "basic,prompt")
    few = ("--splits", "1", "--ensemble", "1", "--max-steps", "3", "--device", "cpu", "--out", tmp_path / "head")
    for words in (("info",), ("verify",), ("train-head", *heads, *few), ("show", *heads, "--out", tmp_path / "a.png")):
        here = run_json(*words, "--store", features)
        picture = (tmp_path / "a.png").read_bytes() if words[0] == "show" else b""
        there = run_json(*words, "--store", at)
        assert comparable(there) == comparable(here)
        assert words[0] != "show" or (tmp_path / "a.png").read_bytes() == picture


def test_a_cache_serves_the_second_training_from_the_local_disk(run, at, features, labelled, tmp_path):
    words = ("train-head", "--dataset", f"folder:{labelled}", "--techniques", "basic,prompt", "--splits", "1")
    words += ("--ensemble", "1", "--max-steps", "3", "--device", "cpu", "--out", tmp_path / "head")
    cached = (*words, "--store", at, "--cache", tmp_path / "cache", "--cache-bytes", "1GB")
    first, second = run(*cached), run(*cached)
    assert second.stdout == first.stdout == run(*words, "--store", features).stdout
    pattern = r"cache: (.*) read from .*cache, (.*) fetched"
    assert re.search(pattern, first.stderr)[2] != "0 B"
    hit, missed = re.search(pattern, second.stderr).groups()
    assert hit != "0 B"
    assert missed == "0 B"


@pytest.mark.usefixtures("tiny")
def test_nothing_can_be_written_to_it(run, refused, at, labelled):
    before = fetch(f"{at}/catalog.json")
    words = ("--dataset", f"folder:{labelled}", "--techniques", "basic", "--model", "reference", "--device", "cpu")
    words += ("--timesteps", "77")
    assert "can only be read" in run("extract", *words, "--store", at, code=2).stderr
    assert "can only be read" in refused("verify", "--repair", "--store", at)
    assert fetch(f"{at}/catalog.json") == before


def test_a_reader_gives_the_token_in_the_environment(run_json, refused, serving, features, monkeypatch):
    url = read_json(serving("--json", "--token", "horse-battery"))["url"]
    assert "FEATSTORE_TOKEN" in refused("info", "--store", url)
    monkeypatch.setenv("FEATSTORE_TOKEN", "wrong")
    assert "FEATSTORE_TOKEN" in refused("info", "--store", url)
    monkeypatch.setenv("FEATSTORE_TOKEN", "horse-battery")
    assert comparable(run_json("info", "--store", url)) == comparable(run_json("info", "--store", features))
