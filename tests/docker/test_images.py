"""The Dockerfiles hold what is promised of them: pinned, small, nobody's root, and copies of files that exist."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = ("cpu.Dockerfile", "cuda.Dockerfile")
PIN = re.compile(r"^([A-Za-z0-9_.-]+)==(\S+)", re.MULTILINE)


def instructions(name: str) -> list[tuple[str, str]]:
    """(instruction, rest) of a Dockerfile, continued lines joined, comments gone."""
    lines = [line for line in (DOCKER / name).read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def pins(*names: str) -> dict[str, Version]:
    return {name: Version(version) for file in names for name, version in PIN.findall((DOCKER / file).read_text())}


def ignored(path: str) -> bool:
    """What .dockerignore says of a path: the last line that fits it or a folder above it decides."""
    verdict = False
    above = [path, *(parent.as_posix() for parent in Path(path).parents)][:-1]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!").removeprefix("**/")
            names = [Path(one).name for one in above] if "**/" in line else above
            if any(fnmatch.fnmatchcase(one, pattern) for one in names):
                verdict = not line.startswith("!")
    return verdict


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_has_nothing_to_say(name):
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, DOCKER / name], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_hadolint_looks(tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM debian\nRUN cd /tmp && sudo true\n")
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, tmp_path / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "DL3006" in done.stdout


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_is_copied_is_there_and_reaches_the_engine(name):
    copied = [shlex.split(rest)[:-1] for word, rest in instructions(name) if word == "COPY" and "--from" not in rest]
    paths = [path for one in copied for path in one]
    assert {"pyproject.toml", "featstore", "pipelines", "cli", "docker/requirements.txt"} <= set(paths)
    for path in paths:
        assert (ROOT / path).exists(), path
        assert not ignored(path), path


def test_nothing_else_reaches_the_engine():
    for path in (".git", ".venv", "docs", "tests", "docker/.env", "docker/compose.yaml", "data", "features.zarr"):
        assert ignored(path), path
    assert ignored("featstore/__pycache__")
    assert not ignored("featstore/models/reference")


@pytest.mark.parametrize("name", DOCKERFILES)
def test_bases_are_dated_users_are_nobody_and_weights_stay_outside(name):
    steps = instructions(name)
    (base,) = [rest for word, rest in steps if word == "ARG"]
    assert re.fullmatch(r"BASE=debian:bookworm-\d{8}-slim", base)
    stages = {"build", "build-notebook", "runtime", "notebook", "featstore"}
    for word, rest in steps:
        if word == "FROM":
            source, _, stage = rest.split()
            assert source == "${BASE}" or source in stages
            assert stage in stages
    assert [rest for word, rest in steps if word == "USER"] == ["1000:1000"]
    assert [rest for word, rest in steps if word == "VOLUME"] == ["/data"]
    assert [json.loads(rest) for word, rest in steps if word == "ENTRYPOINT"][-1] == ["tini", "--", "featstore"]
    # What installs is not in the stages that are shipped.
    shipped = "\n".join(f"{word} {rest}" for word, rest in steps).partition("AS runtime")[2]
    assert not re.search(r"\bpip\b|venv|gcc|build-essential", shipped)
    for word, rest in steps:
        if word == "RUN" and "apt-get install" in rest:
            assert "--no-install-recommends" in rest
            assert re.search(r"--mount=type=cache,id=\S+,target=/var/cache/apt", rest)


def test_the_two_dockerfiles_differ_where_they_say():
    cpu, cuda = ([f"{word} {rest}" for word, rest in instructions(name)] for name in DOCKERFILES)
    alike = [line for line in cpu if line in cuda]
    other = [line for line in cpu if line not in cuda]
    assert len(alike) >= 20
    for line in other:
        assert re.search("torch-cpu|notebook|device=|jupyter|8888|HF_HOME|tini", line), line


@pytest.mark.parametrize("name", DOCKERFILES)
def test_variables_are_those_that_the_program_reads(name):
    (environment,) = [rest for word, rest in instructions(name) if word == "ENV"]
    named = set(re.findall(r"FEATSTORE_[A-Z_]+", environment))
    assert named == {"FEATSTORE_STORE", "FEATSTORE_DATA", "FEATSTORE_WEIGHTS"}
    code = "\n".join(
        path.read_text() for top in ("featstore", "pipelines", "cli") for path in (ROOT / top).rglob("*.py")
    )
    for variable in named:
        assert f'"{variable}"' in code, variable


def test_pinned_packages_are_what_the_project_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"]]
    wanted += [one for extra in ("speed", "datasets", "browse") for one in project["optional-dependencies"][extra]]
    for lists in (("requirements.txt", "torch-cpu.txt"), ("requirements.txt", "torch-cuda.txt")):
        there = pins(*lists)
        for text in wanted:
            requirement = Requirement(text)
            assert there[requirement.name] in requirement.specifier, text
    cpu, cuda = pins("torch-cpu.txt"), pins("torch-cuda.txt")
    assert set(cpu) == {"torch", "torchvision"}
    assert cpu == {name: cuda[name] for name in cpu}
    assert any(name.startswith("nvidia-") for name in cuda)
    assert not any(name.startswith(("nvidia-", "torch==")) for name in pins("requirements.txt"))
    assert "jupyterlab" in pins("notebook.txt")
    assert not set(pins("notebook.txt")) & set(pins("requirements.txt"))


@pytest.mark.parametrize("name", ["requirements.txt", "torch-cuda.txt", "notebook.txt", "build.txt"])
def test_every_package_has_digests(name):
    text = (DOCKER / name).read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert lines
    for line in lines:
        assert re.fullmatch(r"\S+==\S+(\s+--hash=sha256:[0-9a-f]{64})+", line), line


def test_the_script_of_the_check_is_sound():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, DOCKER / "check.sh"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
