"""What is found out about workers before the first block: versions, devices, and whether they see what they need."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import featstore.errors
from featstore.errors import BadRequestError, FeatstoreError, IncompatibleError, StorageError
from featstore.pipelines.cluster import facts as by_value
from featstore.pipelines.cluster.job import Parcel
from featstore.store.objects import Objects

if TYPE_CHECKING:
    from distributed import Client

    from featstore.pipelines.cluster.seen import Problem

PACKAGES = ("featstore", "torch", "diffusers", "zarr", "numpy", "distributed")
"""What must be of one version everywhere: the bytes of features, and what processes tell each other."""
_SHOWN = 3


def check_versions(client: Client) -> None:
    """Make sure that all workers run the Python and the packages of this process.

    Raises:
        IncompatibleError: naming workers, what they have and what is here.
    """
    python = ".".join(platform.python_version_tuple()[:2])
    seen = client.get_versions(check=False)["workers"]
    _require_same("Python", {name: _python(one) for name, one in seen.items()}, python)
    found = _facts(client)
    for package in PACKAGES:
        here = importlib.metadata.version(package)
        _require_same(package, {name: one["packages"][package] for name, one in found.items()}, here)


def cores_for_each(client: Client) -> int:
    """Cores of a worker's machine for each of its workers there; of the machine that has the fewest."""
    found = _facts(client).values()
    there = Counter(one["host"] for one in found)
    least: int = min(one["cores"] // there[one["host"]] for one in found)
    return max(1, least)


def devices(client: Client, name: str | None) -> str:
    """What workers compute on: ``name``, or a GPU if all of them have one.

    Raises:
        BadRequestError: if some do not have it.
        IncompatibleError: if some have GPUs and others do not, and ``name`` is None.
    """
    from featstore.pipelines.cluster.seen import device_of

    answers = client.run(device_of, name, on_error="return")
    for worker, answer in answers.items():
        if isinstance(answer, BaseException):
            hint = answer.hint if isinstance(answer, FeatstoreError) else None
            raise BadRequestError(f"worker at {worker}: {answer}", hint=hint) from None
    kinds = defaultdict(list)
    for worker, answer in answers.items():
        kinds[answer].append(worker)
    if len(kinds) > 1:
        text = "; ".join(f"{device} at {some(workers)}" for device, workers in sorted(kinds.items()))
        raise IncompatibleError(
            f"workers compute on different devices, which give other bytes: {text}",
            hint="--device cpu works everywhere, or stop the workers without a GPU",
        )
    device: str = next(iter(kinds))
    return device


def check_workers(client: Client, parcel: Parcel, objects: Objects) -> None:
    """Make sure that each worker can do a job; what they have put into the store is looked for here, and deleted.

    Args:
        client: of the workers.
        parcel: the job; its `Job.mark` lies in the store.
        objects: of the store, as this process sees it.

    Raises:
        FeatstoreError: of a class that says what is missing; it names the workers.
    """
    from featstore.pipelines.cluster.worker import look

    answers = client.run(look, parcel, on_error="return")
    problems: dict[tuple[str, str, str | None], list[str]] = defaultdict(list)
    for worker, answer in answers.items():
        if isinstance(answer, str):
            if not objects.exists(answer):
                message = f"what they put into store {objects.url!r} does not arrive here"
                problems["StorageError", message, "name one place that all machines see as the same"].append(worker)
            objects.delete(answer, durable=False)
        elif isinstance(answer, BaseException):
            text = f"{type(answer).__name__}: {' '.join(str(answer).split())[:300]}"
            problems["StorageError", text, None].append(worker)
        else:
            problems[answer.kind, answer.message, answer.hint].append(worker)
    if problems:
        (kind, message, hint), workers = max(problems.items(), key=lambda item: len(item[1]))
        error = _error(kind, f"{_workers(workers)}: {message}", hint)
        error.exit_code = 2  # Nothing was started.
        raise error


def problem_line(worker: str, problem: Problem) -> str:
    """For a worker that came later and cannot do the job."""
    return f"worker at {worker} gets no blocks: {problem.message}"


def some(workers: list[str]) -> str:
    """A few addresses of workers."""
    left = len(workers) - _SHOWN
    return ", ".join(sorted(workers)[:_SHOWN]) + (f" and {left} more" if left > 0 else "")


@contextlib.contextmanager
def marked(objects: Objects, key: str, content: bytes) -> Iterator[None]:
    """An object in the store that workers look for; deleted in the end, with what they have put beside it."""
    objects.put(key, content, durable=False)
    folder, _, own = key.rpartition("/")
    try:
        yield
    finally:
        with contextlib.suppress(FeatstoreError):
            for name in objects.names(folder):
                if name.startswith(own):
                    objects.delete(f"{folder}/{name}", durable=False)


def _error(kind: str, message: str, hint: str | None) -> FeatstoreError:
    found = getattr(featstore.errors, kind, StorageError)
    made: FeatstoreError = found(message, hint=hint)
    return made


def _facts(client: Client) -> Mapping[str, Mapping[str, Any]]:
    import cloudpickle

    # By value: where featstore is not installed, the answer is to be that it is not.
    cloudpickle.register_pickle_by_value(by_value)
    try:
        found: Mapping[str, Mapping[str, Any]] = client.run(by_value.facts, PACKAGES)
    finally:
        cloudpickle.unregister_pickle_by_value(by_value)
    return found


def _python(versions: Mapping[str, Any]) -> str:
    return ".".join(str(versions["host"]["python"]).split(".")[:2])


def _require_same(what: str, found: Mapping[str, str | None], here: str) -> None:
    others = {worker: version for worker, version in found.items() if version != here}
    if not others:
        return
    version = next(iter(others.values()))
    workers = [worker for worker, one in others.items() if one == version]
    has = "lack" if len(workers) > 1 else "lacks"
    had = "have" if len(workers) > 1 else "has"
    text = f"{has} {what}" if version is None else f"{had} {what} {version}"
    raise IncompatibleError(
        f"{_workers(workers)} {text}; this process has {here}",
        hint="install the same versions everywhere, e.g. from one container image or one lock file",
    )


def _workers(workers: list[str]) -> str:
    return f"worker{'s' if len(workers) > 1 else ''} at {some(workers)}"
