"""What an experiment would do: every feature that any setting reads, once, and which heads are still to be trained."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import featstore.datasets
import featstore.models
from featstore.pipelines.experiment.config import (
    TRAINED,
    ExperimentConfig,
    ExperimentPlan,
    PlannedSetting,
    ScoredRuns,
    Scores,
)
from featstore.pipelines.experiment.settings import Setting
from featstore.pipelines.plan import Plan, PlannedRun, make_plan
from featstore.pipelines.rates import Rates
from featstore.pipelines.reading import BucketConfig
from featstore.pipelines.recipe_file import Extraction
from featstore.pipelines.reproduce import extract_config, training_key
from featstore.pipelines.space import require_space
from featstore.pipelines.train_head import Metric, TrainHeadConfig
from featstore.store.urls import local_path
from featstore.techniques import parse


@dataclasses.dataclass(frozen=True, slots=True)
class _Want:
    """One run that somebody reads, before anything is known of its recipe."""

    dataset: str
    seed: int
    options: Extraction
    """Without techniques, timesteps and layers."""
    technique: str
    timestep: int


def make_experiment_plan(config: ExperimentConfig) -> ExperimentPlan:
    """Find out what the chosen settings read and what of it is there; nothing has been started then.

    Raises:
        NotFoundError: if data or weights are absent; the hint says how to get them.
        BadRequestError: for whatever is wrong in the experiment.
        StorageError: if the disk cannot hold all of it.
    """
    probes = _probes(config)
    extracted = [(one, _with_model(config, one.extract)) for one in config.chosen]
    extracted += [(one, extract) for one, _, *three in probes for extract in three]
    plans, found = _extractions(config, extracted)
    settings = tuple(_setting(config, one, found) for one in config.chosen)
    runs = {f"{run.recipe.fingerprint} {plan.dataset_name}": len(plan.wanted) for plan in plans for run in plan.runs}
    read = {(one.setting.dataset, run) for one in settings for run in one.runs}
    extra = {
        (one.dataset, found[want][0].recipe.fingerprint): found[want][1]
        for one, _, *three in probes
        for extract in three
        for want in _wants(config, one, extract)
    }
    return ExperimentPlan(
        config=config,
        extractions=plans,
        settings=settings,
        scored=tuple(
            ScoredRuns(
                setting=one.name,
                over=over.name,
                run=_bucket(config, one, one.extract, found),
                reference=_bucket(config, one, reference, found),
                anchor=_bucket(config, one, anchor, found),
                origin=_bucket(config, one, origin, found),
            )
            for one, over, reference, anchor, origin in probes
        ),
        passes_asked=sum(len(one.runs) * one.images for one in settings)
        + sum(images for run, images in extra.items() if run not in read),
        passes_made=sum(runs.values()),
        runs=runs,
    )


def _with_model(config: ExperimentConfig, extract: Extraction) -> Extraction:
    return dataclasses.replace(extract, model=extract.model or config.experiment.model)


def _probes(config: ExperimentConfig) -> list[tuple[Setting, Setting, Extraction, Extraction, Extraction]]:
    """Settings whose features get a score, those that gains are over; then reference, anchor and origin."""
    asked = config.experiment.correlate
    if asked is None:
        return []
    found = []
    for one in config.chosen:
        over = config.experiment.partner(one, "techniques", asked.to)
        if over is None or over is one or over not in config.chosen:
            continue
        plain = dataclasses.replace(_with_model(config, over.extract), layers=one.extract.layers)
        reference, anchor = (
            dataclasses.replace(plain, timesteps=(timestep,)) for timestep in (asked.reference, asked.anchor)
        )
        origin = dataclasses.replace(_with_model(config, one.extract), timesteps=(asked.reference,))
        found.append((one, over, reference, anchor, origin))
    return found


def _wants(config: ExperimentConfig, setting: Setting, extract: Extraction) -> list[_Want]:
    seed = config.seed if setting.seed is None else setting.seed
    options = dataclasses.replace(_with_model(config, extract), techniques="", timesteps=(), layers=None)
    return [
        _Want(setting.dataset, seed, options, technique.expression, timestep)
        for technique in parse(extract.techniques)
        for timestep in extract.timesteps
    ]


Found = dict[_Want, tuple[PlannedRun, int]]
"""The run that answers a wish, and how many images are extracted for it."""


def _extractions(
    config: ExperimentConfig, extracted: Sequence[tuple[Setting, Extraction]]
) -> tuple[tuple[Plan, ...], Found]:
    """Plans that make every run once, with every layer that anybody reads of it."""
    layers: dict[tuple[str, str | None, str, int], dict[str | None, None]] = {}
    wants: dict[_Want, None] = {}
    for setting, extract in extracted:
        for want in _wants(config, setting, extract):
            wants[want] = None
            # Texts and scales may or may not be part of a recipe: one that does not depend on them is one run.
            place = (want.dataset, want.options.model, want.technique, want.timestep)
            layers.setdefault(place, {})[extract.layers] = None
    stages: dict[tuple[str, int, Extraction], dict[str, list[int]]] = {}
    for want in wants:
        read = _joined(want, layers[want.dataset, want.options.model, want.technique, want.timestep])
        stage = (want.dataset, want.seed, dataclasses.replace(want.options, layers=read))
        stages.setdefault(stage, {}).setdefault(want.technique, []).append(want.timestep)
    plans: list[Plan] = []
    found: Found = {}
    first: dict[tuple[str, str], PlannedRun] = {}
    for (dataset, seed, options), techniques in stages.items():
        for timesteps in dict.fromkeys(tuple(sorted(one)) for one in techniques.values()):
            same = [name for name, one in techniques.items() if tuple(sorted(one)) == timesteps]
            asked = dataclasses.replace(options, techniques=",".join(same), timesteps=timesteps)
            plan = make_plan(
                extract_config(
                    asked,
                    dataset=dataset,
                    model=asked.model,
                    store=config.store,
                    limit=config.limit,
                    device=config.device,
                    seed=seed,
                    data_root=config.data_root,
                )
            )
            own = []
            for run in plan.runs:
                at = (plan.dataset_name, run.recipe.fingerprint)
                if at not in first:
                    first[at] = run
                    own.append(run)
                bare = dataclasses.replace(options, layers=None)
                want = _Want(dataset, seed, bare, run.recipe.technique, run.recipe.timestep)
                found[want] = (first[at], len(plan.wanted))
            if own:
                plans.append(_of_runs(plan, own))
    if "://" not in config.store:
        total = sum(plan.bytes_todo for plan in plans)
        require_space(local_path(config.store), total, what="features", hint="--store names another place")
    return tuple(plans), found


def _joined(want: _Want, layers: Iterable[str | None]) -> str | None:
    """All of several comma lists of layers; None, where nobody names any, for the model's default."""
    if set(layers) == {None}:
        return None
    texts = dict.fromkeys(_layers(want.dataset, want.options.model, text) for text in layers)
    return ",".join(dict.fromkeys(name.strip() for text in texts for name in text.split(",")))


def _layers(dataset: str, model: str | None, text: str | None) -> str:
    if text is not None:
        return text
    return featstore.models.describe(model or featstore.datasets.resolve(dataset).info.model).default_layers


def _of_runs(plan: Plan, runs: Sequence[PlannedRun]) -> Plan:
    """The plan of some of a plan's runs."""
    seconds = Rates.load().estimate_seconds(
        (Rates.key(run.recipe, plan.device), int(run.todo.sum()) + run.fit_images) for run in runs if run.todo.any()
    )
    return dataclasses.replace(plan, runs=tuple(runs), seconds=seconds)


def _bucket(config: ExperimentConfig, setting: Setting, extract: Extraction, found: Found) -> BucketConfig:
    """What reads exactly the runs of an extraction."""
    model = extract.model or config.experiment.model
    return BucketConfig(
        dataset=setting.dataset,
        techniques=extract.techniques,
        store=config.store,
        model=model,
        timesteps=extract.timesteps,
        layers=setting.head.layers or _layers(setting.dataset, model, extract.layers),
        data_root=config.data_root,
        fingerprints=tuple(found[want][0].recipe.fingerprint for want in _wants(config, setting, extract)),
    )


def _setting(config: ExperimentConfig, setting: Setting, found: Found) -> PlannedSetting:
    head = setting.head
    bucket = _bucket(config, setting, setting.extract, found)
    images = found[_wants(config, setting, setting.extract)[0]][1]
    steps = [one for one in (head.max_steps, config.max_steps) if one is not None]
    training = TrainHeadConfig(
        bucket=bucket,
        task=head.task,
        head=head.head,
        # One run has nothing to weigh: settings that differ in this alone are one.
        assigners=head.assigners if len(bucket.fingerprints) > 1 else 1,
        per_channel=head.per_channel,
        ensemble=config.ensemble or head.ensemble,
        splits=config.splits or head.splits,
        max_steps=min(steps) if steps else None,
        # Those beyond a limit; an image that fails stops the experiment.
        skip_missing=True,
        device=config.device,
        seed=config.seed if setting.seed is None else setting.seed,
    )
    key = training_key(training, sorted(bucket.fingerprints), [images])
    file = (config.trained or config.out / TRAINED) / f"{key[:16]}.json"
    return PlannedSetting(
        setting=setting,
        training=training,
        runs=bucket.fingerprints,
        images=images,
        file=file,
        key=key,
        known=read_scores(file, key),
    )


def read_scores(file: Path, key: str) -> Scores | None:
    """The scores that were written with the same key; None if there are none."""
    try:
        value = json.loads(file.read_bytes())
        if value["key"] != key:
            return None
        metrics = {
            name: Metric(mean=float(one["mean"]), std=float(one["std"]), splits=tuple(one["splits"]))
            for name, one in value["metrics"].items()
        }
        return Scores(metrics=metrics, seconds=float(value["seconds"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
