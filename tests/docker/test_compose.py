"""The compose file: of the specification's form, of services that fit together, and of commands that exist."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer.main
import yaml

from featstore.cli.app import app

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker" / "compose.yaml"
FEATSTORE = ("scheduler", "worker", "worker-gpu", "client", "notebook")


@pytest.fixture(scope="module")
def services():
    return yaml.safe_load(COMPOSE.read_text())["services"]


def tool(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name(name)), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def options(command: click.Command) -> set[str]:
    return {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}


def test_it_is_of_the_specification_and_the_check_looks(tmp_path):
    done = tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", COMPOSE)
    assert done.returncode == 0, done.stdout
    wrong = tmp_path / "compose.yaml"
    wrong.write_text(COMPOSE.read_text().replace("healthcheck:", "healthchek:"))
    done = tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", wrong)
    assert done.returncode == 1
    assert "healthchek" in done.stdout


def test_what_services_wait_for_is_there_and_can_be_known(services):
    volumes = yaml.safe_load(COMPOSE.read_text())["volumes"]
    for name, service in services.items():
        for other, how in service.get("depends_on", {}).items():
            if how["condition"] == "service_healthy":
                assert "healthcheck" in services[other], (name, other)
            else:
                assert services[other]["restart"] == "no"
        for mount in service.get("volumes", ()):
            assert mount.partition(":")[0] in volumes


def test_images_are_pinned_and_all_of_featstore_is_of_one_version(services):
    for name, service in services.items():
        if name in FEATSTORE:
            build = service["build"]
            assert (COMPOSE.parent / build["context"]).resolve() == ROOT
            dockerfile = (ROOT / build["dockerfile"]).read_text()
            if "target" in build:
                assert f" AS {build['target']}\n" in dockerfile
        else:
            assert re.fullmatch(r"[a-z/]+:v\d+\.\d+\.\d+", service["image"]), name
    assert services["client"]["image"] == services["worker"]["image"] == services["scheduler"]["image"]


def test_ports_are_open_to_this_machine_only(services):
    ports = [port for service in services.values() for port in service.get("ports", ())]
    assert len(ports) == 3
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_secrets_have_no_defaults(services):
    asked = set(re.findall(r"\$\{(\w+):\?", COMPOSE.read_text()))
    assert asked == {"S3_ACCESS_KEY", "S3_SECRET_KEY", "NOTEBOOK_TOKEN"}
    example = dict(
        line.split("=", 1) for line in (ROOT / "docker" / ".env.example").read_text().splitlines() if "=" in line[:20]
    )
    assert example == dict.fromkeys(asked, "")
    keys = re.compile("KEY|SECRET|TOKEN|PASSWORD")
    for name, service in services.items():
        for variable, value in service.get("environment", {}).items():
            if keys.search(variable):
                assert re.fullmatch(r"\$\{\w+:\?.+\}", value), (name, variable)
    done = subprocess.run(["git", "check-ignore", "-q", "docker/.env"], cwd=ROOT, check=False)
    assert done.returncode == 0


def test_variables_are_those_that_the_program_reads(services):
    named = {name for service in services.values() for name in service.get("environment", {}) if "FEATSTORE" in name}
    assert named == {"FEATSTORE_STORE"}
    for name in FEATSTORE:
        variables = services[name]["environment"]
        assert variables["AWS_ENDPOINT_URL"] == "http://s3:7070"
        assert services["s3"]["environment"]["VGW_REGION"] == variables["AWS_REGION"]
        assert variables["FEATSTORE_STORE"].startswith("s3://features/")
    assert "/buckets/features" in services["bucket"]["entrypoint"][-1]


def test_commands_of_dask_have_these_options(services):
    from distributed.cli.dask_scheduler import main as scheduler
    from distributed.cli.dask_worker import main as worker

    for name, command in (("scheduler", scheduler), ("worker", worker), ("worker-gpu", worker)):
        assert services[name]["entrypoint"] == ["tini", "--", "dask", name.removesuffix("-gpu")]
        words = services[name]["command"]
        with command.make_context("dask", list(words), resilient_parsing=False) as context:
            assert context.params
    assert services["worker"]["command"][0] == "tcp://scheduler:8786"


def test_what_is_tried_in_the_images_is_what_compose_starts(services):
    tried = runpy.run_path(str(ROOT / "docker" / "try_cluster.py"))
    for name in ("scheduler", "worker"):
        words = [word for word in services[name]["command"] if word.startswith("--")]
        assert set(words) <= set(tried[name.upper()])
        assert tried[name.upper()][:2] == services[name]["entrypoint"][2:]


def commands_of_the_client() -> list[list[str]]:
    text = "\n".join(
        path.read_text().replace("\\\n", " ")
        for path in (COMPOSE, ROOT / "docs" / "containers.md", ROOT / "docker" / "example.ipynb")
    )
    return [shlex.split(found.strip("`. #")) for found in re.findall(r"run --rm client ([a-z][^`\n]+)", text)]


def test_commands_that_are_shown_have_these_options():
    shown = [words for words in commands_of_the_client() if words[0] != "COMMAND"]
    assert len(shown) >= 3
    group = typer.main.get_command(app)
    for words in shown:
        command = group.commands[words[0]]
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert given <= options(command), words
