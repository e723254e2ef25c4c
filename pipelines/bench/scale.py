"""What a large store costs: opening, finding, planning, resuming and committing, from 1,000 images on."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

import featstore.store
from featstore.datasets import Dataset, DatasetInfo, Sample, UnreadableImageError
from featstore.errors import NotFoundError
from featstore.pipelines.bench.config import BenchConfig
from featstore.pipelines.bench.timing import seconds
from featstore.pipelines.presence import Presence
from featstore.pipelines.progress import Progress, Silent
from featstore.recipe import Recipe
from featstore.store import Run, SampleTable, Store

_DATASET = "many"
_TECHNIQUES = ("basic", "prompt", "controlnet")
_LAYERS = {f"layer{number}": (1, 1, 1) for number in range(5)}
_DEFAULT_IMAGES = 10_000
_COMMITS = 9

Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]
"""Title, column heads, rows of texts."""


def bench_scale(config: BenchConfig, folder: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Stores of 3 techniques and 5 layers of tiny maps: 1,000 images, ten times as many, and so on.

    Each row says how long it takes, in seconds, with so many images there already, to

    - *open* the store, its data set and one run;
    - *find* the run of a recipe;
    - *read* one image of one layer of a run that was just opened;
    - *plan* one run of all the images, which are complete: what a finished extraction does first;
    - *resume*: plan one run of which one block is missing;
    - *commit* one block of one layer (median of 9, without fsync, as the disk is not what is asked about);
    - *grow* the sample table by 64 images;
    - *finish* with what the next plan goes by, after one block.

    Planning an extraction reads the whole sample table, as all its images are asked for.
    """
    progress = progress or Silent()
    most = config.images or _DEFAULT_IMAGES
    sizes = [size for size in (1_000, 10_000, 100_000, 1_000_000) if size < most] + [most]
    rows = []
    for size in sizes:
        progress.note(f"a store of {size} images")
        rows.append(_measure(folder / f"{size}.zarr", size))
    return {"sizes": rows}


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """The curves for people: a row a size, milliseconds."""
    columns = tuple(figures["sizes"][0])
    cells: list[Sequence[str]] = [
        tuple(f"{value * 1e3:.1f}" if isinstance(value, float) else f"{value:,}" for value in row.values())
        for row in figures["sizes"]
    ]
    return [("milliseconds by images there", columns, cells)]


def _measure(url: Path, size: int) -> dict[str, int | float]:
    dataset = Many(size)
    store, runs = _fill(url, dataset)
    first = runs[0]
    state: dict[str, Any] = {}
    wanted = range(size)

    def opened() -> None:
        state["run"] = featstore.store.open(url).dataset(_DATASET).open_run(first.path)

    def planned() -> None:
        stored = featstore.store.open(url).dataset(_DATASET)
        run = stored.find(first.recipe)
        lacking = Presence(dataset, wanted, stored).missing(run, list(_LAYERS))
        state["lacking"] = int(np.logical_or.reduce(list(lacking.values())).sum())

    row: dict[str, int | float] = {"images": size, "blocks": first.n_blocks * len(_LAYERS) * len(runs)}
    row["open"] = seconds(opened)
    row["find"] = seconds(lambda: state["run"].dataset.find(runs[1].recipe))
    row["read"] = seconds(lambda: state["run"].numpy("layer0", [size // 2]))
    row["plan"] = seconds(planned)
    _expect(state["lacking"], 0)
    block = first.n_blocks // 2
    first.uncommit(first.block_rows(block))
    store.finish([first])
    row["resume"] = seconds(planned)
    _expect(state["lacking"], len(first.block_rows(block)))
    row["commit"] = statistics.median(_commits(first, block))
    larger = _table(Many(size + 64))
    row["grow"] = seconds(lambda: store.put_samples(_DATASET, larger, source="made up"))
    row["finish"] = seconds(lambda: store.finish([first]))
    return row


def _expect(found: int, wanted: int) -> None:
    if found != wanted:
        raise NotFoundError(f"a plan found {found} images to compute, not {wanted}")


def _commits(run: Run, block: int) -> list[float]:
    rows = list(run.block_rows(block))
    maps = {"layer0": np.zeros((len(rows), 1, 1, 1), dtype=np.float16)}
    times = []
    for _ in range(_COMMITS):
        run.uncommit(rows, ["layer0"])
        times.append(seconds(lambda: run.write_block(block, rows, maps)))
    return times


def _fill(url: Path, dataset: Dataset) -> tuple[Store, list[Run]]:
    """A store with all features of ``dataset``, zeros, written without fsync."""
    store = featstore.store.create(url)
    store.objects.durable = False  # type: ignore[attr-defined]
    stored = store.put_samples(_DATASET, _table(dataset), source="made up")
    runs = [
        stored.create_run(_recipe(technique), _LAYERS, batch_size=1, provenance={"who": "bench"})
        for technique in _TECHNIQUES
    ]
    for run in runs:
        for block in range(run.n_blocks):
            rows = list(run.block_rows(block))
            maps = np.zeros((len(rows), 1, 1, 1), dtype=np.float16)
            run.write_block(block, rows, dict.fromkeys(_LAYERS, maps))
    store.finish(runs)
    return store, runs


class Many(Dataset):
    """Images that nobody ever looks at."""

    def __init__(self, count: int) -> None:
        names = (f"train/image-{number:08d}.jpg" for number in range(count))
        self._samples = tuple(
            Sample(key=name, digest=hashlib.sha256(name.encode()).hexdigest(), split="all") for name in names
        )

    @property
    @override
    def info(self) -> DatasetInfo:
        return DatasetInfo(name=_DATASET, title="many images", plain_prompt="", source="made up")

    @property
    @override
    def samples(self) -> tuple[Sample, ...]:
        return self._samples

    @override
    def image(self, key: str) -> np.ndarray:
        raise UnreadableImageError(f"{key} is made up")

    @override
    def mask(self, key: str) -> None:
        return None


def _table(dataset: Dataset) -> SampleTable:
    return SampleTable(
        keys=tuple(sample.key for sample in dataset.samples),
        digests=tuple(sample.digest for sample in dataset.samples),
        splits=tuple(sample.split for sample in dataset.samples),
    )


def _recipe(technique: str) -> Recipe:
    return Recipe(
        model="none",
        weights_digest="0" * 64,
        technique=technique,
        parameters={},
        timestep=50,
        height_px=64,
        width_px=64,
    )
