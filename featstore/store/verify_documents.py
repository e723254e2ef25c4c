"""Checking what describes features: documents of data sets, runs, groups and arrays, bases, and their copies."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from featstore.errors import CorruptError, FeatstoreError, IncompatibleError, NotFoundError
from featstore.recipe import slug
from featstore.store import arrays, basis, catalog, layout, metadata
from featstore.store.dataset import StoredDataset, group_attributes, groups_below
from featstore.store.findings import UNREADABLE, Findings, check_document
from featstore.store.objects import Objects
from featstore.store.orphans import Checked
from featstore.store.run import Run
from featstore.store.store import Store
from featstore.store.verify_samples import check_samples

_DEPTH = 3
"""Levels of a run's path below its data set."""


def data_sets(store: Store) -> list[str]:
    """Data sets of the store, also those whose own document is gone but not its copy."""
    names = store.objects.names(layout.CATALOG) if store.objects.can_list else []
    copies = [name.removesuffix(".json") for name in names if name.endswith(".json") and "~" not in name]
    return sorted({*store.datasets(), *(name for name in copies if layout.is_segment(name))})


def run_paths(objects: Objects, name: str) -> list[str]:
    """Paths of the runs of a data set, those that the catalog has lost included."""
    paths = [name] if objects.can_list else []
    for _ in range(_DEPTH):
        paths = [f"{path}/{level}" for path in paths for level in objects.names(path) if layout.is_segment(level)]
    found = [path for path in paths if objects.exists(f"{path}/{layout.ROOT}")]
    return sorted({*catalog.paths(objects, name), *found})


def check_dataset(store: Store, name: str, findings: Findings) -> Checked:
    """Check a data set's document and table and its runs' documents; what of it is sound or could be restored."""
    if not _check_with_copy(store.objects, name, findings):
        return Checked(name=name)
    try:
        dataset = store.dataset(name)
    except FeatstoreError as error:
        findings.broken(error)
        return Checked(name=name)
    sound = check_samples(dataset, findings)
    paths, runs = run_paths(store.objects, name), []
    for path in paths:
        if _check_with_copy(store.objects, path, findings) and (run := _open(dataset, path, findings)) is not None:
            runs.append(run)
    # Without the digests of its images nothing can be said of a run's features.
    return Checked(name=name, paths=paths, runs=runs, n_images=len(dataset.samples)) if sound else Checked(name=name)


def _check_with_copy(objects: Objects, path: str, findings: Findings) -> bool:
    """Check the document of a data set or run and its copy, restore either from the other; whether it can be used."""
    key = f"{path}/{layout.ROOT}"
    document: dict[str, Any] | None = None
    damage: FeatstoreError | None = None
    try:
        document = metadata.read(objects, key)
    except IncompatibleError as error:
        findings.incomplete.append(f"{key} was not checked: {error}")
        return False
    except UNREADABLE as error:
        damage = CorruptError(str(error), hint=metadata.remedy(key))
    if document is not None:
        _check_copy(objects, path, document, findings)
        return True
    assert damage is not None
    try:
        copy = _copy_of(objects, path)
        restored = layout.group_document(copy["kind"], copy)
    except (*UNREADABLE, IncompatibleError, KeyError, TypeError):
        damage.hint = f"delete {path}/ and extract again: its copy in catalog/ is lost too"
        findings.broken(damage)
        return False
    findings.broken(damage, lambda: metadata.write(objects, key, restored))
    return findings.repair


def _check_copy(objects: Objects, path: str, document: dict[str, Any], findings: Findings) -> None:
    """Check the copy of a document that is sound, and write it anew where it is not one."""
    copy_key, key = layout.catalog_key(path), f"{path}/{layout.ROOT}"
    try:
        if _copy_of(objects, path) == catalog.entry(path, document)["copy"]:
            return
        # A writer puts the one after the other, and may be between the two.
        document = metadata.read(objects, key)
        if _copy_of(objects, path) == catalog.entry(path, document)["copy"]:
            return
        damage = CorruptError(f"{copy_key} is no copy of {key}", hint=metadata.remedy(copy_key))
    except NotFoundError:
        damage = CorruptError(f"{copy_key} is gone", hint=metadata.remedy(copy_key))
    except (*UNREADABLE, IncompatibleError, KeyError, TypeError) as error:
        damage = CorruptError(str(error), hint=metadata.remedy(copy_key))
    findings.broken(damage, lambda: catalog.put_entry(objects, path, document))


def _copy_of(objects: Objects, path: str) -> Any:
    key = layout.catalog_key(path)
    entry = metadata.read(objects, key)
    if entry.get("path") != path:
        raise CorruptError(f"{key} is of {entry.get('path')!r}", hint=metadata.remedy(key))
    return entry["copy"]


def _open(dataset: StoredDataset, path: str, findings: Findings) -> Run | None:
    """A run, the groups on the way to it checked."""
    try:
        run = dataset.open_run(path)
    except IncompatibleError as error:
        findings.incomplete.append(f"{path} was not checked: {error}")
        return None
    except FeatstoreError as error:
        findings.broken(error)
        return None
    levels = path.split("/")
    above = [("/".join(levels[:2]), "model"), ("/".join(levels[:3]), "technique")]
    for folder, kind in above + groups_below(path, run.recipe):
        document = layout.group_document(kind, group_attributes(kind, run.recipe))
        check_document(
            dataset.objects,
            f"{folder}/{layout.ROOT}",
            document,
            functools.partial(_is_group, wanted=document),
            findings,
        )
    return run


def _is_group(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether a group's document is the one that belongs there."""
    own, own_wanted = metadata.own(found), metadata.own(wanted)
    if own_wanted["kind"] != "model":
        return found == metadata.unseal(metadata.seal(wanted), str(own_wanted["kind"]))
    # Two models may have names that make one path, and one document.
    return own.get("kind") == "model" and slug(str(own.get("model"))) == slug(own_wanted["model"])


def check_run_documents(run: Run, layer: str, findings: Findings) -> None:
    """The array documents of a layer, and what reduced it."""
    _check_basis(run, layer, findings)
    objects, pairs = run.dataset.objects, run.array_documents(layer)
    for key, make in pairs:
        try:
            images = arrays.length(objects, key, make)
            if images < run.n_images:
                damage = f"{key} speaks of {images} images of {run.n_images}"
                raise CorruptError(damage, hint="`featstore verify --repair` lengthens it")  # noqa: TRY301
        except CorruptError as error:
            findings.broken(error, lambda: arrays.mend(objects, run.path, pairs, run.n_images))


def _check_basis(run: Run, layer: str, findings: Findings) -> None:
    """The basis of a layer that is reduced, its copy in the catalog and its array document."""
    objects, said, components = run.dataset.objects, run.layers[layer].reduced, run.layers[layer].shape[0]
    if said is None:
        return
    for check in (basis.load, basis.check_copy):
        try:
            check(objects, run.path, layer, said, components)
        except CorruptError as error:
            findings.broken(error, lambda: basis.restore(objects, run.path, layer, said, components))
    key, document = basis.document_key(run.path, layer), basis.document(components, said.channels)
    wanted = metadata.unseal(metadata.seal(document), key)
    check_document(objects, key, document, lambda found: found == wanted, findings)


def check_snapshot(store: Store, runs: Sequence[Run] | None, findings: Findings) -> None:
    """``catalog.json``, where there is one, and that what it says of ``runs`` holds; None: not all were checked."""
    try:
        document = metadata.read(store.objects, layout.CATALOG_FILE)
        said = {entry["path"]: entry["fingerprint"] for entry in document["runs"]}
        there = {run.path: run.fingerprint for run in runs or ()}
        wrong = [path for path in said if there.get(path, said[path]) != said[path]]
        gone = [path for path in said if runs is not None and not store.objects.exists(f"{path}/{layout.ROOT}")]
        if not wrong and not gone:
            return
        damage = CorruptError(
            f"{layout.CATALOG_FILE} speaks of runs that are not there: {', '.join((wrong + gone)[:3])}",
            hint=metadata.remedy(layout.CATALOG_FILE),
        )
    except NotFoundError:
        return
    except (*UNREADABLE, IncompatibleError) as error:
        damage = CorruptError(str(error), hint=metadata.remedy(layout.CATALOG_FILE))
    except (KeyError, TypeError, AttributeError) as error:
        damage = CorruptError(
            f"{layout.CATALOG_FILE} does not say what is in the store: {error!r}",
            hint=metadata.remedy(layout.CATALOG_FILE),
        )
    findings.broken(damage, store.finish)
