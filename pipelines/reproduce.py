"""Experiments run from end to end: everything checked and sized first, extracted once, every head trained once."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from featstore.datasets import resolve
from featstore.errors import BadRequestError, StorageError, unknown_name
from featstore.pipelines.extract import execute
from featstore.pipelines.memory import peak_rss_bytes
from featstore.pipelines.plan import ExtractConfig, Plan, make_plan
from featstore.pipelines.progress import Progress, Silent
from featstore.pipelines.reading import BesideConfig, BucketConfig
from featstore.pipelines.recipe_file import Extraction, HeadTraining, RecipeFile
from featstore.pipelines.space import require_space
from featstore.pipelines.train_head import Metric, TrainHeadConfig, train_head
from featstore.recipe import canonical_json, sha256_hex
from featstore.store.urls import local_path
from featstore.techniques import SteeringOptions, parse
from featstore.whole_file import write_whole

_RESULT = "result.json"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ReproduceConfig:
    """Which experiment, where, and how much of it."""

    recipe: RecipeFile
    store: str = "features.zarr"
    """URL of the store."""
    out: Path = Path("reproduced")
    """Folder of heads and results, one a head below the experiment's name."""
    heads: tuple[str, ...] = ()
    """Only these heads; empty: all."""
    splits: int | None = None
    """Splits of every head; None: as the experiment says. So with the other three."""
    ensemble: int | None = None
    max_steps: int | None = None
    limit: int | None = None
    """Only the first so many images are extracted, and heads leave the others out."""
    device: str | None = None
    data_root: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse an unknown head."""
        for name in self.heads:
            if name not in self.recipe.head:
                raise unknown_name("head", name, self.recipe.head)

    @property
    def chosen(self) -> dict[str, HeadTraining]:
        """The heads that are to be trained."""
        return {name: head for name, head in self.recipe.head.items() if not self.heads or name in self.heads}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HeadOutcome:
    """What one head scored."""

    name: str
    training: HeadTraining
    metrics: Mapping[str, Metric]
    folder: Path
    seconds: float
    reused: bool
    """Whether it had been trained before, on the same features in the same way."""

    def to_json(self) -> dict[str, Any]:
        """The outcome as plain JSON."""
        return {
            "name": self.name,
            "task": self.training.task,
            "metrics": {name: dataclasses.asdict(metric) for name, metric in self.metrics.items()},
            "reported": dict(self.training.reported),
            "note": self.training.note,
            "head": str(self.folder),
            "seconds": self.seconds,
            "reused": self.reused,
        }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reproduction:
    """Everything that an experiment gave; `to_json` is what ``--json`` prints."""

    recipe: RecipeFile
    outcomes: tuple[HeadOutcome, ...]
    passes: int
    """Forward passes that were run."""
    failed: Mapping[str, str]
    """Images that could not be extracted, with the reason."""
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON."""
        return {
            "experiment": self.recipe.name,
            "title": self.recipe.title,
            "source": self.recipe.source,
            "dataset": self.recipe.dataset,
            "heads": [outcome.to_json() for outcome in self.outcomes],
            "passes": self.passes,
            "failed": [{"key": key, "reason": reason} for key, reason in self.failed.items()],
            "seconds": self.seconds,
            "peak_rss_bytes": peak_rss_bytes(),
        }


def make_plans(config: ReproduceConfig) -> dict[str, Plan]:
    """The plan of every extraction that the chosen heads read, by name; nothing has been started then.

    Raises:
        NotFoundError: if data or weights are absent; the hint says how to get them.
        BadRequestError: for whatever is wrong in the experiment.
        StorageError: if the disk cannot hold all of it.
    """
    needed = {
        source
        for head in config.chosen.values()
        for source in (head.source, *(one.source for one in head.beside or ()))
    }
    plans = {
        name: make_plan(_extract_config(config, stage))
        for name, stage in config.recipe.extract.items()
        if name in needed
    }
    for name, head in config.chosen.items():
        _check_choice(name, head, config.recipe.extract[head.source])
    if "://" not in config.store:
        total = sum(plan.bytes_todo for plan in plans.values())
        require_space(local_path(config.store), total, what="features", hint="--store names another place")
    return plans


def reproduce(
    config: ReproduceConfig, plans: Mapping[str, Plan] | None = None, progress: Progress | None = None
) -> Reproduction:
    """Run an experiment. What has been extracted or trained before, in the same way, is not done again.

    Args:
        config: which one.
        plans: of `make_plans`, where they have been made already.
        progress: told of every stage.
    """
    start = time.perf_counter()
    progress = progress or Silent()
    plans = make_plans(config) if plans is None else plans
    failed: dict[str, str] = {}
    passes = 0
    for plan in plans.values():
        if plan.passes_todo:
            report = execute(plan, progress)
            failed |= report.failed
            passes += report.passes
    outcomes = tuple(_head(config, name, head, plans, progress) for name, head in config.chosen.items())
    return Reproduction(
        recipe=config.recipe, outcomes=outcomes, passes=passes, failed=failed, seconds=time.perf_counter() - start
    )


def _extract_config(config: ReproduceConfig, stage: Extraction) -> ExtractConfig:
    return extract_config(
        stage,
        dataset=config.recipe.dataset,
        model=stage.model or config.recipe.model,
        store=config.store,
        limit=config.limit,
        device=config.device,
        seed=config.seed,
        data_root=config.data_root,
    )


def extract_config(
    stage: Extraction,
    *,
    dataset: str,
    model: str | None,
    store: str,
    limit: int | None = None,
    device: str | None = None,
    seed: int = 0,
    data_root: Path | None = None,
) -> ExtractConfig:
    """What ``featstore extract`` is asked for by an extraction of a file, and by what is the same for all of them."""
    return ExtractConfig(
        dataset=dataset,
        techniques=stage.techniques,
        store=store,
        model=model,
        timesteps=stage.timesteps,
        layers=stage.layers,
        image_size_px=stage.image_size,
        limit=limit,
        precision=stage.precision,
        reduce=stage.reduce,
        device=device,
        steering=SteeringOptions(
            prompt=stage.prompt,
            prompt_chunks=stage.prompt_chunks,
            controlnet_scale=stage.controlnet_scale,
            lora_scale=stage.lora_scale,
            ip_adapter_scale=stage.ip_adapter_scale,
            guidance_scale=stage.guidance_scale,
        ),
        denoise_from=stage.denoise_from,
        noise_ensemble=stage.noise_ensemble,
        seed=seed,
        data_root=data_root,
    )


def _check_choice(name: str, head: HeadTraining, stage: Extraction) -> None:
    """Refuse a head that reads what its extraction does not make."""
    made = [technique.expression for technique in parse(stage.techniques)]
    for technique in parse(head.techniques or stage.techniques):
        if technique.expression not in made:
            raise BadRequestError(f"[head.{name}]: {unknown_name('technique', technique.expression, made)}")
    for timestep in head.timesteps or ():
        if timestep not in stage.timesteps:
            raise BadRequestError(f"[head.{name}]: timestep {timestep} is none of {list(stage.timesteps)}")


def _head(
    config: ReproduceConfig, name: str, head: HeadTraining, plans: Mapping[str, Plan], progress: Progress
) -> HeadOutcome:
    """Train one head, or find it trained."""
    stage = config.recipe.extract[head.source]
    techniques = head.techniques or stage.techniques
    timesteps = head.timesteps or stage.timesteps
    beside = None
    if head.beside is not None:
        beside = tuple(
            BesideConfig(
                techniques=config.recipe.extract[one.source].techniques,
                model=config.recipe.extract[one.source].model,
                timesteps=config.recipe.extract[one.source].timesteps,
                layers=one.layers,
                fingerprints=_fingerprints(plans[one.source]),
            )
            for one in head.beside
        )
    wanted = [technique.expression for technique in parse(techniques)]
    folder = config.out / config.recipe.name / name.replace("/", "_")
    training = TrainHeadConfig(
        bucket=BucketConfig(
            dataset=config.recipe.dataset,
            techniques=techniques,
            store=config.store,
            model=stage.model or config.recipe.model,
            timesteps=timesteps,
            layers=head.layers or (_map_layers(plans[head.source]) if beside is not None else None),
            data_root=config.data_root,
            fingerprints=tuple(
                run.recipe.fingerprint
                for run in plans[head.source].runs
                if run.recipe.technique in wanted and run.recipe.timestep in timesteps
            ),
            beside=beside,
        ),
        task=head.task,
        head=head.head,
        assigners=head.assigners,
        per_channel=head.per_channel,
        ensemble=config.ensemble or head.ensemble,
        splits=config.splits or head.splits,
        max_steps=config.max_steps or head.max_steps,
        skip_missing=True,
        device=config.device,
        out=folder,
        seed=config.seed,
    )
    key = _key(training, plans)
    if (known := _known(folder, key)) is not None:
        metrics = {metric: Metric(**{**value, "splits": tuple(value["splits"])}) for metric, value in known.items()}
        return HeadOutcome(name=name, training=head, metrics=metrics, folder=folder, seconds=0.0, reused=True)
    progress.note(f"{config.recipe.name}: {name}")
    report = train_head(training, progress)
    kept = {metric: dataclasses.asdict(value) for metric, value in report.metrics.items()}
    document = json.dumps({"key": key, "metrics": kept}, indent=1).encode() + b"\n"
    try:
        write_whole(folder / _RESULT, document)
    except OSError as error:
        raise StorageError(f"cannot write {folder / _RESULT}: {error}", hint="check space and permissions") from error
    return HeadOutcome(
        name=name, training=head, metrics=report.metrics, folder=folder, seconds=report.seconds, reused=False
    )


def _fingerprints(plan: Plan) -> tuple[str, ...]:
    return tuple(run.recipe.fingerprint for run in plan.runs)


def _map_layers(plan: Plan) -> str:
    """The convolutional layers of a plan, where what stands beside them is named apart."""
    return ",".join(name for name in plan.runs[0].layers if not name.startswith("attn-"))


def _key(training: TrainHeadConfig, plans: Mapping[str, Plan]) -> str:
    runs = sorted({one for plan in plans.values() for one in _fingerprints(plan)})
    return training_key(training, runs, [len(plan.wanted) for plan in plans.values()])


def training_key(training: TrainHeadConfig, runs: Sequence[str], wanted: Sequence[int]) -> str:
    """Digest of all that decides a head: how it is trained, on which runs, of which images with which labels.

    Args:
        training: of the head; where its features lie decides nothing.
        runs: fingerprints.
        wanted: how many images were asked for, of each extraction.
    """
    value = dataclasses.asdict(training)
    for place in ("store", "data_root", "cache", "cache_bytes"):
        value["bucket"].pop(place)
    value.pop("out")
    dataset = resolve(training.bucket.dataset, data_root=training.bucket.data_root)
    images = [[sample.key, sample.digest, sample.split] for sample in dataset.samples]
    return sha256_hex(canonical_json({"training": value, "images": images, "runs": list(runs), "wanted": list(wanted)}))


def _known(folder: Path, key: str) -> dict[str, Any] | None:
    """The metrics of a head that was trained before with the same key."""
    try:
        value = json.loads((folder / _RESULT).read_bytes())
        metrics: dict[str, Any] = value["metrics"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return metrics if value["key"] == key and (folder / "head.json").exists() else None
