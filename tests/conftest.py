"""Settings for all tests: one thread a process, an own cache folder, no network."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

# Before torch is imported anywhere: several workers run side by side, and OpenMP threads that
# wait for a busy core slow each other down a hundredfold.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("FEATSTORE_STORE", None)
os.environ.pop("FEATSTORE_DATA", None)

import numpy as np
import pytest
from PIL import Image

from tests.store.s3_server import s3, s3_server  # noqa: F401 - fixtures
from tests.tiny_models import build_tiny_reference


@pytest.fixture
def told(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Says something about a test in the summary: what it has counted, say."""
    return lambda text: record_property("told", text)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what passed tests have told; unlike standard output it comes through from other processes, too."""
    reports = [report for report in terminalreporter.stats.get("passed", []) if report.when == "call"]
    lines = [(report.nodeid, text) for report in reports for name, text in report.user_properties if name == "told"]
    if lines:
        terminalreporter.section("counts")
    for test, text in lines:
        terminalreporter.write_line(f"{test}: {text}")


@pytest.fixture(scope="session")
def weights_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights root with a tiny random stand-in of `reference`; read only."""
    return build_tiny_reference(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="session")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random captioner; read only."""
    from tests.tiny_captioners import build_tiny_blip

    return build_tiny_blip(tmp_path_factory.mktemp("captioners") / "blip")


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests remember (digests, rates) stays out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def tiny(weights_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`reference` is the tiny random model in this test."""
    monkeypatch.setenv("FEATSTORE_WEIGHTS", str(weights_root))


@pytest.fixture
def lora(weights_root: Path) -> str:
    """Technique expression of a LoRA that a folder of images has to name."""
    return f"lora:{weights_root}/reference/lora"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of ten small random pictures."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(10):
        coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((80, 60), Image.Resampling.BICUBIC).save(folder / f"{index:02d}.png")
    return folder


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures with masks: 5 train, 3 test, two classes and unlabelled pixels; read only."""
    folder = tmp_path_factory.mktemp("data") / "discs"
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:64, :64]
    for index in range(8):
        place = folder / ("train" if index < 5 else "test")
        place.mkdir(parents=True, exist_ok=True)
        disc = (y - rng.integers(20, 44)) ** 2 + (x - rng.integers(20, 44)) ** 2 < 16**2
        colour = np.where(disc[..., None], [210, 120, 40], [60, 90, 160]) + rng.integers(-30, 30, (64, 64, 3))
        Image.fromarray(colour.clip(0, 255).astype(np.uint8)).save(place / f"{index}.png")
        mask = disc.astype(np.uint8)
        mask[:2] = 255
        np.save(place / f"{index}.npy", mask)
    return folder


@pytest.fixture(scope="session")
def features(labelled: Path, weights_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with ``labelled`` extracted by the tiny model: basic and prompt; read only."""
    from featstore.pipelines.extract import extract
    from featstore.pipelines.plan import ExtractConfig
    from featstore.techniques import SteeringOptions

    store = tmp_path_factory.mktemp("store") / "features.zarr"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEATSTORE_WEIGHTS", str(weights_root))
        extract(
            ExtractConfig(
                dataset=f"folder:{labelled}",
                techniques="basic,prompt",
                store=str(store),
                model="reference",
                steering=SteeringOptions(prompt="a horse, high quality"),
                device="cpu",
                batch_size=4,
            )
        )
    return store
