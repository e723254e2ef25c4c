"""Write the lists of pinned packages that the images install: ``python docker/lock.py`` in the repository's root.

``requirements.txt`` is what both images have in common, ``torch-cpu.txt`` and ``torch-cuda.txt`` where they differ,
``notebook.txt`` what the notebook adds and ``build.txt`` the tools of the build stage, which stay behind there. All are
resolved together by uv, for Python 3.11 on Linux, and every file but those of PyTorch's own index carries digests.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
EXTRAS = ("speed", "datasets", "browse")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
"""Where PyTorch publishes wheels without CUDA; the same versions as on PyPI, told apart by ``+cpu``."""
OF_TORCH = re.compile(r"(torch|torchvision|triton|nvidia-.+|cuda-.+)==")
"""Packages that come with torch's CUDA build, and are left out on a CPU."""
HEAD = "# Made by `make docker-lock`; do not edit.\n"


def resolve(*arguments: str, text: str | None = None) -> list[str]:
    """One entry a package: ``name==version`` and its digests, as pip reads them."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--generate-hashes", "--no-header"]
    command += ["--no-annotate", "--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28", *arguments]
    done = subprocess.run(command, cwd=ROOT, input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"uv could not resolve the packages: {done.stderr.strip()}")
    return re.findall(r"^\S+==(?:.*\\\n)*.*", done.stdout, flags=re.MULTILINE)


def write(name: str, entries: Iterable[str], *, above: str = "") -> None:
    """Put one list into ``docker/``."""
    (DOCKER / name).write_text(HEAD + above + "".join(f"{entry}\n" for entry in entries), encoding="utf-8")


def pin(entry: str) -> str:
    """``name==version`` of an entry."""
    return entry.split(maxsplit=1)[0]


def main() -> None:
    """Resolve and write all five lists."""
    entries = resolve("pyproject.toml", *(word for extra in EXTRAS for word in ("--extra", extra)))
    with_torch = [entry for entry in entries if OF_TORCH.match(entry)]
    common = [entry for entry in entries if not OF_TORCH.match(entry)]
    write("requirements.txt", common)
    write("torch-cuda.txt", with_torch)
    torch = [pin(entry) for entry in with_torch if re.match(r"torch(vision)?==", entry)]
    write("torch-cpu.txt", torch, above=f"--index-url {CPU_INDEX}\n")
    there = {pin(entry) for entry in common}
    notebook = resolve("--constraint", "docker/requirements.txt", "-", text="jupyterlab\n")
    write("notebook.txt", (entry for entry in notebook if pin(entry) not in there))
    write("build.txt", resolve("-", text="pip\nsetuptools>=77\n"))


if __name__ == "__main__":
    main()
