"""What a head reads: lazy maps of a bucket of runs, and what stands beside them.

N images, K runs in the bucket, C channels, H W map height and width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

from featstore.errors import BadRequestError, IncompatibleError

Layers = Mapping[str, Any]
"""Layer name to ``dask.array`` (N, C, H, W), float16 or float32."""
Shapes = Mapping[str, tuple[int, int, int]]
"""Layer name to (C, H, W)."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunRef:
    """A run that a head reads, by name for people and by fingerprint for checking."""

    name: str
    """For tables and plots, e.g. ``prompt`` or ``controlnet:canny t50``."""
    fingerprint: str | None = None
    """Fingerprint of the run's recipe; None for arrays that came from no store."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """Layers of one run that are concatenated after the amalgamation: attention maps, another model's features."""

    run: RunRef
    layers: Layers


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BesideSpec:
    """`Beside` without its arrays."""

    run: RunRef
    layers: Shapes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FeaturesSpec:
    """What a head was trained on, and therefore needs."""

    layers: Shapes
    """Amalgamated layers, in the order of their channels; the same in all runs."""
    runs: tuple[RunRef, ...]
    """The K runs of the bucket, in order."""
    beside: tuple[BesideSpec, ...] = ()
    """What is concatenated after the amalgamation, in order."""

    @property
    def channels(self) -> int:
        """Channels of a run's pixel vector, C."""
        return sum(shape[0] for shape in self.layers.values())

    @property
    def beside_layers(self) -> dict[str, tuple[int, int, int]]:
        """All layers beside the bucket by ``RUN/LAYER``, in the order of their channels."""
        return {f"{one.run.name}/{name}": shape for one in self.beside for name, shape in one.layers.items()}

    @property
    def beside_channels(self) -> int:
        """Channels that are concatenated after the amalgamation, A."""
        return sum(shape[0] for shape in self.beside_layers.values())

    def to_json(self) -> dict[str, Any]:
        """The specification as plain JSON; `from_json` is its inverse."""
        return {
            "layers": _listed(self.layers),
            "runs": [dataclasses.asdict(run) for run in self.runs],
            "beside": [{"run": dataclasses.asdict(one.run), "layers": _listed(one.layers)} for one in self.beside],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The specification that `to_json` described; KeyError, TypeError or ValueError if it is none."""
        return cls(
            layers=_shapes(value["layers"]),
            runs=tuple(RunRef(**run) for run in value["runs"]),
            beside=tuple(
                BesideSpec(run=RunRef(**one["run"]), layers=_shapes(one["layers"])) for one in value["beside"]
            ),
        )

    def check_runs(self, runs: Sequence[RunRef], beside: Sequence[RunRef] = ()) -> None:
        """Refuse runs whose fingerprints are not those that the head was trained on.

        Raises:
            IncompatibleError: naming the first run that differs.
        """
        for what, mine, theirs in (
            ("runs", self.runs, runs),
            ("runs beside them", [one.run for one in self.beside], beside),
        ):
            if len(mine) != len(theirs):
                raise IncompatibleError(f"the head was trained on {len(mine)} {what}, not on {len(theirs)}")
            for one, other in zip(mine, theirs, strict=True):
                if one.fingerprint != other.fingerprint:
                    raise IncompatibleError(
                        f"run {other.name!r} has fingerprint {other.fingerprint}, "
                        f"the head was trained on {one.name!r} with {one.fingerprint}",
                        hint="extract the runs that the head names, or train a head on these",
                    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """Lazy features of N images. Arrays need not come from a store.

    Raises:
        BadRequestError: if arrays do not fit together.
    """

    maps: Sequence[Layers]
    """The bucket: for each of K runs its layers. All runs have the same layers with the same shapes."""
    runs: Sequence[RunRef] = ()
    """Names and fingerprints of the K runs; empty: ``run 0`` and so on."""
    beside: Sequence[Beside] = ()
    """What is concatenated after the amalgamation."""

    def __post_init__(self) -> None:
        """Name the runs and check all shapes."""
        if not self.maps or not self.maps[0]:
            raise BadRequestError("a bucket needs at least one run with at least one layer")
        if not self.runs:
            object.__setattr__(self, "runs", tuple(RunRef(name=f"run {k}") for k in range(len(self.maps))))
        if len(self.runs) != len(self.maps):
            raise BadRequestError(f"{len(self.runs)} names for {len(self.maps)} runs")
        first = self.maps[0]
        for run, layers in zip(self.runs, self.maps, strict=True):
            if set(layers) != set(first):
                odd = ", ".join(sorted(set(layers) ^ set(first)))
                raise BadRequestError(f"the runs of a bucket need the same layers; run {run.name} differs in {odd}")
            for name, array in layers.items():
                if array.shape[1:] != first[name].shape[1:]:
                    raise BadRequestError(
                        f"layer {name} is {first[name].shape[1:]} in run {self.runs[0].name} and {array.shape[1:]} in "
                        f"run {run.name}",
                        hint="amalgamate runs of one model at one image size",
                    )
        for what, array in self.arrays():
            if array.ndim != 4 or array.dtype.kind != "f":
                raise BadRequestError(f"{what} is (N, C, H, W) of floats, not {array.shape} {array.dtype}")
            if array.shape[0] != self.images:
                raise BadRequestError(
                    f"{what} has {array.shape[0]} images, the first one has {self.images}",
                    hint="all features of a bucket are of one data set",
                )

    @property
    def images(self) -> int:
        """N."""
        count: int = next(iter(self.maps[0].values())).shape[0]
        return count

    def arrays(self) -> Iterator[tuple[str, Any]]:
        """Every array, with what messages call it."""
        for run, layers in zip(self.runs, self.maps, strict=True):
            yield from ((f"layer {name} of run {run.name}", array) for name, array in layers.items())
        for one in self.beside:
            yield from ((f"layer {name} of run {one.run.name}", array) for name, array in one.layers.items())

    def spec(self) -> FeaturesSpec:
        """What a head that is trained on these needs."""
        return FeaturesSpec(
            layers={name: tuple(array.shape[1:]) for name, array in self.maps[0].items()},
            runs=tuple(self.runs),
            beside=tuple(
                BesideSpec(run=one.run, layers={name: tuple(array.shape[1:]) for name, array in one.layers.items()})
                for one in self.beside
            ),
        )


def _listed(layers: Shapes) -> list[list[Any]]:
    return [[name, *shape] for name, shape in layers.items()]


def _shapes(value: Sequence[Sequence[Any]]) -> dict[str, tuple[int, int, int]]:
    return {name: (channels, height, width) for name, channels, height, width in value}
