"""A trained head from its folder, and the runs that it was trained on found again in a store."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featstore.errors import IncompatibleError
from featstore.heads.features import FeaturesSpec
from featstore.pipelines.reading import BesideConfig, BucketConfig, OpenBucket, open_bucket
from featstore.pipelines.tasks import TASKS
from featstore.pipelines.tasks.base import TaskKind
from featstore.recipe import Recipe

if TYPE_CHECKING:
    from featstore.heads.base import Head


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OpenHead:
    """What ``head.json`` says; the weights are loaded by `load`."""

    folder: Path
    task: str
    """Name of its task in `TASKS`."""
    features: FeaturesSpec
    """The features that it reads."""
    facts: dict[str, Any]
    """See `featstore.heads.base.Head.facts`."""
    made: dict[str, Any]
    """How it was trained: what `featstore.pipelines.train_head` keeps beside it."""

    @property
    def kind(self) -> TaskKind:
        """Its task."""
        return TASKS[self.task]

    @property
    def recipes(self) -> list[Recipe]:
        """Recipes of the runs of its bucket."""
        return [Recipe.from_json(value) for value in self.made["recipes"]]

    def load(self, device: str) -> Head:
        """The head itself."""
        from featstore.heads import load_head

        return load_head(self.folder, device=device)

    def bucket_config(self, **changes: Any) -> BucketConfig:
        """The runs that it was trained on, in the data set and store that it was trained on unless changed."""
        values = {
            "dataset": self.made["dataset"],
            "dataset_name": self.made["dataset_name"],
            "techniques": self.made["techniques"],
            "timesteps": tuple(self.made["timesteps"]),
            "layers": ",".join(self.features.layers),
            "beside": tuple(BesideConfig(**_tuples(one)) for one in self.made["beside"]),
            "fingerprints": tuple(run.fingerprint for run in self.features.runs if run.fingerprint is not None),
        }
        return BucketConfig(**(values | changes))

    def open_bucket(self, config: BucketConfig) -> OpenBucket:
        """The runs of ``config``, which are those that the head was trained on.

        Raises:
            IncompatibleError: if a run's recipe is another.
            NotCommittedError: if a run is not there, with the command that extracts it.
        """
        bucket = open_bucket(config)
        if len(bucket.runs) != len(self.features.runs) or len(bucket.beside) != len(self.features.beside):
            self.features.check_runs(*bucket.refs())
        # Names that the head knows its runs by; whether they are its runs, their fingerprints say.
        bucket = dataclasses.replace(
            bucket,
            titles=tuple(run.name for run in self.features.runs),
            beside=tuple(
                dataclasses.replace(one, title=mine.run.name)
                for one, mine in zip(bucket.beside, self.features.beside, strict=True)
            ),
        )
        self.features.check_runs(*bucket.refs())
        shapes = {name: bucket.runs[0].layers[name].shape for name in bucket.maps}
        if shapes != dict(self.features.layers):
            raise IncompatibleError(f"the head reads layers {dict(self.features.layers)}, the runs have {shapes}")
        return bucket


def _tuples(value: dict[str, Any]) -> dict[str, Any]:
    """JSON as it was before it was JSON: its lists were tuples."""
    return {name: tuple(one) if isinstance(one, list) else one for name, one in value.items()}


def open_head(folder: Path) -> OpenHead:
    """What a head's folder says of it, checked; no weights are loaded.

    Raises:
        NotFoundError: if there is no head.
        CorruptError: if its files are damaged.
        IncompatibleError: if it is of another version, or was not written by train-head.
    """
    from featstore.heads import read_head_json

    document = read_head_json(folder)
    made = document["extra"]
    try:
        opened = OpenHead(
            folder=folder,
            task=made["task"],
            features=FeaturesSpec.from_json(document["features"]),
            facts=document["facts"],
            made=made,
        )
        assert opened.kind
        assert opened.recipes
        assert opened.bucket_config()
    except (KeyError, TypeError, ValueError) as error:
        raise IncompatibleError(
            f"the head in {folder} does not say what it was trained on", hint="train it with `featstore train-head`"
        ) from error
    return opened
