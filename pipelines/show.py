"""Pictures of stored features: PCA to RGB with one basis for all runs, attention by token, content shift, assigners."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from featstore import pictures
from featstore.errors import BadRequestError, unknown_name
from featstore.pictures.files import figure_format
from featstore.pipelines.reading import BucketConfig, OpenBucket, open_bucket
from featstore.pipelines.show_panels import attention_panels, every_attention, pca_of_runs, shift_panels

KINDS = {
    "overview": "input, labels, PCA of each run, attention of a few words",
    "pca": "PCA with one basis, a row a technique, a column a timestep",
    "attention": "where each token of the prompt is looked for",
    "shift": "where features differ from the unsteered ones at t = 0",
    "assigners": "what the assigners of a trained head chose",
}
"""What can be drawn."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ShowConfig:
    """What to make pictures of."""

    bucket: BucketConfig
    """The runs."""
    kind: str = "overview"
    """One of `KINDS`, but not ``assigners`` (`show_assigners`)."""
    keys: tuple[str, ...] = ()
    """Images; empty: the first ``count`` that all runs have."""
    count: int = 4
    """How many images, where no keys are given."""
    out: Path = Path("features.png")
    """The PNG or SVG file to write."""
    seed: int = 0
    """Seed of the positions that the PCA is fitted on."""

    def __post_init__(self) -> None:
        """Refuse an unknown kind, and a file that is neither PNG nor SVG."""
        if self.kind not in KINDS:
            raise unknown_name("kind of picture", self.kind, KINDS)
        figure_format(self.out)


def show(config: ShowConfig) -> Path:
    """Write one picture, a row an image; its columns are what `KINDS` says.

    Raises:
        BadRequestError: for an unknown key.
        NotCommittedError: if features are missing, with the command that makes them.
    """
    bucket = open_bucket(config.bucket)
    known = [sample.key for sample in bucket.dataset.samples]
    for key in config.keys:
        if key not in known:
            raise unknown_name("image", key, known)
    keys = list(config.keys) or _first_complete(bucket, known, config.count)
    rows = bucket.require(keys or known[:1], config.bucket)
    images = [bucket.dataset.image(key) for key in keys]
    inputs = pictures.Panel(title="input", pictures=tuple(images))
    first = bucket.runs[0].recipe
    title = f"{bucket.stored.name}, {first.model}, t = {', '.join(map(str, config.bucket.timesteps))}"
    if config.kind == "overview":
        panels, legend = _overview(bucket, rows, keys, images, config.seed)
        return pictures.save_grid(config.out, panels, row_titles=keys, title=title, legend=legend)
    if config.kind == "pca":
        panels, row_titles = _by_timestep(bucket, rows, keys, images, config.seed)
        return pictures.save_grid(config.out, panels, row_titles=row_titles, title=f"{bucket.stored.name}: PCA")
    if config.kind == "attention":
        panels = every_attention(bucket, rows, images)
        if not panels:
            command = bucket.extract_command(dataclasses.replace(config.bucket, layers="attn-up-cross-2"))
            raise BadRequestError("none of these runs has attention layers", hint=f"run: {command}")
        return pictures.save_grid(config.out, [inputs, *panels], row_titles=keys, title=f"{title}: attention")
    panels = shift_panels(bucket, config.bucket, rows, images)
    return pictures.save_grid(config.out, [inputs, *panels], row_titles=keys, title="content shift to t = 0, and mean")


def _overview(
    bucket: OpenBucket, rows: np.ndarray, keys: list[str], images: list[np.ndarray], seed: int
) -> tuple[list[pictures.Panel], list[tuple[str, tuple[int, int, int]]]]:
    truth = [bucket.dataset.mask(key) for key in keys]
    features = pca_of_runs(bucket, rows, seed=seed)
    panels = pictures.segmentation_panels(images, truth, features=features, predictions={})
    shown = [mask for mask in truth if mask is not None]
    classes = bucket.dataset.info.classes
    return panels + attention_panels(bucket, rows, images), pictures.legend(classes, shown) if shown and classes else []


def _by_timestep(
    bucket: OpenBucket, rows: np.ndarray, keys: list[str], images: list[np.ndarray], seed: int
) -> tuple[list[pictures.Panel], list[str]]:
    """Columns of timesteps and titles of rows, which are techniques by image; the input stands beside the first."""
    features = pca_of_runs(bucket, rows, seed=seed)
    place = {
        (run.recipe.technique, run.recipe.timestep): title
        for title, run in zip(bucket.titles, bucket.runs, strict=True)
    }
    techniques = list(dict.fromkeys(technique for technique, _ in place))
    inputs = tuple(None if number else image for image in images for number in range(len(techniques)))
    panels = [pictures.Panel(title="input", pictures=inputs)]
    for timestep in dict.fromkeys(timestep for _, timestep in place):
        cells = tuple(features[place[one, timestep]][row] for row in range(len(keys)) for one in techniques)
        panels.append(pictures.Panel(title=f"t = {timestep}", pictures=cells))
    return panels, [f"{key} {technique}" for key in keys for technique in techniques]


def show_assigners(head: Path, out: Path) -> Path:
    """Draw what the assigners of the head in folder ``head`` chose: mean weights of its runs.

    Raises:
        NotFoundError: if the folder holds no head.
        BadRequestError: if the head amalgamates nothing.
    """
    figure_format(out)
    from featstore.heads.files import read_head_json

    document = read_head_json(head)
    weights = document["metrics"].get("first_split", {}).get("assigner_weights")
    runs = [run["name"] for run in document["features"]["runs"]]
    if not weights or len(runs) < 2:
        raise BadRequestError(
            f"the head in {str(head)!r} has no assigners: it was trained on one run",
            hint="train one on several: featstore train-head --techniques basic,prompt,controlnet",
        )
    extra = document["extra"]
    return pictures.save_assigners(out, weights, runs, title=f"{extra['dataset_in_store']}: {extra['task']}")


def _first_complete(bucket: OpenBucket, known: list[str], count: int) -> list[str]:
    missing = set(bucket.missing(known))
    return [key for key in known if key not in missing][:count]
