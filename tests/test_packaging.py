"""A wheel holds all three floors under one name, the embedded model, and the configurations of the others."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_a_wheel_is_complete_and_leaves_no_other_top_level_package(tmp_path):
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "demo", "*.zarr")
    shutil.copytree(ROOT, source, ignore=ignore)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("featstore-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"featstore"}
    for folder, package in (("featstore", "featstore"), ("cli", "featstore/cli"), ("pipelines", "featstore/pipelines")):
        modules = [path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*.py")]
        assert modules
        assert {f"{package}/{module.as_posix()}" for module in modules} <= set(names)
    for data in ("reference/weights", "configs"):
        files = [path for path in (ROOT / "featstore" / "models" / data).rglob("*") if path.is_file()]
        assert files
        assert {path.relative_to(ROOT).as_posix() for path in files} <= set(names)
