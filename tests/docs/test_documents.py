"""Every command and every program in the documents runs, in the order in which a reader meets them."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from featstore.cli.app import app
from featstore.datasets import DATASETS
from featstore.pipelines.convert_ddpm import ConvertDDPMConfig, convert_ddpm
from tests.models.handwritten_ddpm import Guided

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

COMMANDS = ("featstore ", "make ", "python ", "pip ", "git ", "cd ", "docker ")
NOT_RUN = {
    "make demo": "installs and takes minutes; tests/pipelines/test_demo.py runs the demo in small",
    "make test": "is what runs this test",
    "make lint": "is a part of `make test`",
    "make install": "is a part of `make test`",
    "docker ": "needs an engine; tests/docker checks what stands in the files and on these lines",
    "featstore demo": "takes minutes; tests/pipelines/test_demo.py runs it in small",
    "featstore bench": "takes minutes; tests/benchmarks runs it in small",
    "featstore datasets fetch cifar10": "downloads 170 MB; tests/cli/test_fetch.py runs it in small",
    "featstore browse": "runs until it is stopped; tests/pipelines/test_browse_chromium.py runs it",
    "featstore serve": "runs until it is stopped; tests/cli/test_serve.py runs it",
    "featstore extract --scheduler": "needs a cluster; tests/pipelines/cluster starts one",
    "featstore convert-ddpm": "needs a checkpoint of 2 GB; tests/cli/test_convert_ddpm.py runs it in small",
    "python -m featstore.pipelines.train_reference": "takes hours; tests/pipelines/reference runs it in small",
    "python -m featstore.pipelines.experiment.findings": "takes most of an hour; "
    "tests/pipelines/test_experiment_findings.py runs it in small",
    "python -m featstore.pipelines.reference.compare": "takes minutes; tests/pipelines/reference runs it in small",
}
"""Beginnings of commands that are not run here, with the reason."""
SHORTER = {
    "gate": ("--limit", "2", "--steps", "4"),
    "train-head": ("--max-steps", "20"),
    "reproduce": ("--max-steps", "5", "--splits", "1", "--ensemble", "2"),
    "experiment": ("--max-steps", "5", "--splits", "1", "--ensemble", "2"),
}
"""Options that keep a command short; all else is run as it is written."""


def blocks(document):
    """(line, language, text) of each fenced block."""
    language, first, lines = None, 0, []
    for number, line in enumerate(document.read_text(encoding="utf-8").splitlines(), 1):
        if not line.startswith("```"):
            lines.append(line)
        elif language is None:
            language, first, lines = line[3:].strip(), number + 1, []
        else:
            yield first, language, "\n".join(lines)
            language = None
    assert language is None, f"{document}: a block is not closed"


def steps():
    """(place, kind, text) of all there is to run: commands one by one, programs as a whole."""
    for document in DOCUMENTS:
        for line, language, text in blocks(document):
            place = f"{document.relative_to(ROOT)}:{line}"
            if language == "python":
                yield place, "program", text
            if language in ("python", "text"):  # text is what some command printed
                continue
            joined = text.replace("\\\n", " ")
            commands = [one for one in joined.splitlines() if one.startswith(COMMANDS)]
            assert language not in ("sh", "bash", "shell", "console") or commands, place
            if commands:
                assert len(commands) == len([one for one in joined.splitlines() if one.strip()]), place
            yield from ((place, "command", one) for one in commands)


@pytest.fixture
def workplace(weights_root, photos, blip, lab_bucket, tmp_path, monkeypatch):
    """What the documents take for granted: photos, models' folders, a LoRA, a captioner, a downloaded data set."""
    monkeypatch.chdir(tmp_path)
    # A copy, because `train-lora` writes there.
    shutil.copytree(weights_root, "weights-root")
    monkeypatch.setenv("FEATSTORE_WEIGHTS", str(tmp_path / "weights-root"))
    shutil.copytree(blip, "blip")
    unet = Guided()
    unet.forward(torch.zeros(1, 3, 32, 32), 0)
    torch.save(unet.state, "lsun_horse.pt")
    convert_ddpm(
        ConvertDDPMConfig(
            checkpoint=Path("lsun_horse.pt"),
            folder=Path("weights/ddpm-horse"),
            allow_pickle=True,
            image_size_px=32,
            head_channels=16,
        )
    )
    shutil.copytree(weights_root / "reference" / "pipeline", "stable-diffusion-v1-5")
    shutil.copy(weights_root / "reference" / "lora" / "pytorch_lora_weights.safetensors", "horse.safetensors")
    rng = np.random.default_rng(0)
    for index in range(4):
        folder = Path("data/horse_21/real") / ("train" if index < 2 else "test")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{index}.png")
        np.save(folder / f"{index}.npy", rng.integers(0, 21, (64, 64), dtype=np.uint8))
    for layer in ("up-level1-upsampler-out", "attn"):
        Path("seed-features", layer).mkdir(parents=True)
        for split in ("train", "test"):
            for position in range(2):
                array = rng.standard_normal((4, 8, 8)).astype(np.float16)
                np.save(Path("seed-features", layer, f"{split}{position}.npy"), array)
    assert photos == tmp_path / "photos"
    return tmp_path


def test_everything_in_the_documents_runs(workplace):
    ran = {"command": 0, "program": 0}
    for place, kind, text in steps():
        if kind == "command" and text.startswith(tuple(NOT_RUN)):
            continue
        if kind == "program":
            try:
                exec(compile(text, place, "exec"), {})
            except Exception as error:  # noqa: BLE001 - whatever it is, say where
                pytest.fail(f"{place}: {error!r}")
        else:
            name, *words = shlex.split(text)
            assert name == "featstore", f"{place}: nobody knows how to try {text!r}"
            result = CliRunner().invoke(app, [*words, *SHORTER.get(words[0], ())])
            assert result.exit_code == 0, f"{place}: {text}\n{result.stderr}\n{result.exception!r}"
        ran[kind] += 1
    assert ran["command"] >= 10
    assert ran["program"] >= 3
    for left in ("horses.png", "features.png", "heads/head/head.json"):
        assert (workplace / left).exists()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(document):
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?://|#|mailto:", target):
            assert (document.parent / target.partition("#")[0]).exists(), target


def test_the_readme_names_every_data_set_and_command():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in DATASETS:
        assert name in text, name
    for command in ("demo", "datasets", "models", "extract", "info", "train-head", "show", "verify"):
        assert re.search(rf"(featstore|make) {command}", text), command


def test_nothing_is_left_to_fill_in():
    for document in DOCUMENTS:
        assert document.stat().st_size > 100, document
        assert not re.search(r"TO-BE-FILLED|TODO|FIXME|XXX", document.read_text(encoding="utf-8")), document
