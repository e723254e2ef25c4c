"""Every command explains itself."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import typer

from featstore.cli.app import COMMANDS, app, command_name

NAMES = [command_name(command) for command in COMMANDS]
COMMON = {"--store", "--json", "--debug", "--seed"}


def parameters(name):
    return typer.main.get_command(app).commands[name].params


def test_the_list_of_commands_has_a_line_on_each(run):
    shown = run("--help").stdout
    for name in NAMES:
        assert re.search(rf"^│ {name} +[A-Z]", shown, re.MULTILINE), name


@pytest.mark.parametrize("name", NAMES)
def test_help_describes_the_command_and_gives_an_example_that_parses(run, name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown = run(*name.split(), "--help").stdout
    examples = re.findall(rf"featstore {name}[^\n]*", shown.split("Options")[0])[1:]
    assert examples, shown
    command = typer.main.get_command(app).commands[name]
    for example in examples:
        command.make_context(name, example.removeprefix(f"featstore {name}").split(), resilient_parsing=False)


@pytest.mark.parametrize("name", NAMES)
def test_every_option_is_described_in_a_sentence_without_a_dangling_end(name):
    for parameter in parameters(name):
        if parameter.name != "help":
            assert parameter.help, parameter.name
            assert parameter.help[0].islower() or parameter.help[0].isupper()


@pytest.mark.parametrize("name", NAMES)
def test_every_command_takes_the_common_options(name):
    assert {option for parameter in parameters(name) for option in parameter.opts} >= COMMON


def test_version(run):
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert run("--version").stdout == f"featstore {project['version']}\n"


def test_without_a_command_the_help_is_shown(run):
    assert "train-head" in run(code=2).stdout
