"""The example notebook runs against a store that has been extracted, and draws what it says."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib as mpl
import nbformat
import numpy as np
from typer.testing import CliRunner

from featstore.cli.app import app

NOTEBOOK = Path(__file__).parents[2] / "docker" / "example.ipynb"


def test_its_cells_run_on_a_store(tmp_path, monkeypatch, capsys):
    store = tmp_path / "toyhorse.zarr"
    words = ["extract", "--dataset", "toyhorse", "--techniques", "prompt", "--limit", "4", "--store", str(store)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.stderr
    monkeypatch.setenv("FEATSTORE_STORE", str(store))
    mpl.use("agg")
    names: dict[str, object] = {}
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, f"{NOTEBOOK.name}:{cell.id}", "exec"), names)
    assert "toyhorse prompt t=50" in capsys.readouterr().out
    maps, pictures = names["maps"], names["pictures"]
    assert maps.shape[0] == 4
    assert np.isfinite(maps).all()
    assert pictures.shape == (4, *maps.shape[2:], 3)
    assert pictures.std() > 20
    mpl.pyplot.close("all")


def test_it_is_kept_without_outputs():
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
