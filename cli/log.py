"""`featstore log`: what was extracted into a store, when and by whom, and what came of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer

import featstore.store
from featstore.cli import console
from featstore.cli.options import DEFAULT_STORE, AnySeedOption, DebugOption, JsonOption, StoreOption
from featstore.store.run_logs import LogEntry, find_log, log_entries, log_entry, log_lines

_SHOWN_FAILURES = 20
_COLUMNS = ("log", "state", "user", "data set", "techniques", "passes", "cached", "failed", "workers", "time")


@console.handled
def log(
    entry: Annotated[
        str | None,
        typer.Argument(metavar="ID", help="One log, by the beginning or the end of its name.", show_default=False),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=1, help="The newest N logs.")] = 20,
    store: StoreOption = DEFAULT_STORE,
    seed: AnySeedOption = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """The last extractions into the store; with an ID, what happened in one of them.

    **Examples**

    `featstore log --store features.zarr`

    `featstore log 1a2b3c4d --json`
    """
    objects = featstore.store.open(store).objects
    if entry is None:
        entries = log_entries(objects, limit=limit)
        if as_json:
            console.print_json({"store": store, "logs": [one.to_json() for one in entries]})
            return
        console.print_table(f"{store}: the last extractions", _COLUMNS, [_row(one) for one in entries])
        return
    name = find_log(objects, entry)
    found, lines = log_entry(objects, name), log_lines(objects, name)
    if as_json:
        console.print_json({"store": store, **found.to_json(), "lines": list(lines)})
        return
    _print(found)
    for line in lines:
        rest = {key: value for key, value in line.items() if key not in ("time", "kind")}
        if line.get("kind") != "start":  # said above
            console.say((f"{line.get('time')} ", "dim"), f"{line.get('kind')}: {_words(rest)}", to=console.out)


def _mapping(value: object) -> Mapping[str, Any]:
    """``value`` if it is one; a store may be a stranger's."""
    return value if isinstance(value, Mapping) else {}


def _number(value: object) -> str:
    return str(value) if isinstance(value, int) else ""


def _row(entry: LogEntry) -> tuple[str, ...]:
    facts = entry.facts
    runs = _mapping(facts.get("plan")).get("of_runs")
    names = [str(_mapping(run).get("technique")) for run in runs] if isinstance(runs, list) else []
    workers = facts.get("workers")
    seconds = facts.get("seconds")
    return (
        entry.id,
        entry.state,
        str(facts.get("user", "")),
        str(facts.get("dataset", "")),
        ",".join(dict.fromkeys(names)),
        _number(facts.get("computed")),
        _number(facts.get("cached")),
        _number(_mapping(facts.get("failed")).get("count")),
        str(len(workers) or 1) if isinstance(workers, list) else "",
        console.human_seconds(seconds) if isinstance(seconds, int | float) else "",
    )


def _print(entry: LogEntry) -> None:
    """What is known of an extraction as a whole."""
    facts = entry.facts
    console.say((entry.id, "bold"), f": {entry.state}", to=console.out)
    for name in ("command", "start", "end", "host", "user", "pid", "model", "device", "error"):
        if facts.get(name) is not None:
            console.say((f"  {name}: ", "dim"), str(facts[name]), to=console.out)
    plan = _mapping(facts.get("plan"))
    counts = {name: plan.get(name) for name in ("images", "runs", "passes", "bytes")} if plan else {}
    more = ("computed", "cached", "retries", "passes_per_second", "peak_rss_bytes", "peak_device_bytes")
    for title, shown in (("plan", counts), ("did", {name: facts[name] for name in more if name in facts})):
        if shown:
            console.say((f"  {title}: ", "dim"), _words(shown), to=console.out)
    workers = facts.get("workers")
    for worker in workers if isinstance(workers, list) else []:
        did = {key: value for key, value in _mapping(worker).items() if key != "worker"}
        console.say(("  worker ", "dim"), f"{_mapping(worker).get('worker')}: {_words(did)}", to=console.out)
    failed = _mapping(facts.get("failed"))
    images = failed.get("images")
    for image in (images if isinstance(images, list) else [])[:_SHOWN_FAILURES]:
        one = _mapping(image)
        console.say(("  failed ", "red"), f"{one.get('key')} in {one.get('run')}: {one.get('reason')}", to=console.out)
    count = failed.get("count")
    if isinstance(count, int) and count > _SHOWN_FAILURES:
        console.say(f"  and {count - _SHOWN_FAILURES} more", to=console.out)


def _words(facts: Mapping[str, Any]) -> str:
    """Facts in a line: ``computed 80, failed 0``."""
    return ", ".join(f"{name} {_word(value)}" for name, value in facts.items())


def _word(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)
