"""Stores that mean no good: errors of ours, in bounded memory and time, and nothing beside them is touched."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from crc32c import crc32c

import featstore.store as fs
from featstore.errors import BadRequestError, CorruptError, FeatstoreError, StorageError
from featstore.recipe import canonical_json, sha256_hex
from featstore.store import basis, layout, metadata
from featstore.store.local import LocalObjects
from featstore.store.objects import INTERNAL, LOCKS
from tests.store import rich
from tests.store.probe import strange

MEMORY_BYTES = 700 << 20
"""What a probe may take beyond what the process has when it starts."""
SECONDS = 60


@pytest.fixture(scope="module")
def built(tmp_path_factory, lab):
    url = tmp_path_factory.mktemp("rich") / "s"
    rich.build(url, lab)
    return rich.files(url)


@pytest.fixture
def root(built, tmp_path):
    """A store of every kind in a folder of its own, with something beside it that must stay as it is."""
    folder = tmp_path / "inner" / "s"
    for name, data in built.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (tmp_path / "secret.txt").write_bytes(b"not yours")
    (tmp_path / "inner" / "zarr.json").write_bytes(b"not yours either")
    return folder


@pytest.fixture(scope="module")
def seen():
    """What came of the stores that were tried: class of error or ``ok``, by how often."""
    return Counter()


@pytest.fixture
def harmless(workers, tmp_path, root, seen):
    """Does everything with the store, in a process with little memory; what the calls gave."""

    def outside():
        return {
            str(path): path.read_bytes()
            for path in tmp_path.rglob("*")
            if path.is_file() and not path.is_relative_to(root)
        }

    def attempt(*, write=True):
        before = outside()
        result, status = workers.run(url=root, probe=True, write=write, memory_bytes=MEMORY_BYTES, cpu_seconds=SECONDS)
        assert status == 0, status  # neither out of memory nor out of time
        assert outside() == before
        assert not strange(result["outcomes"])
        seen["stores"] += 1
        seen.update(result["outcomes"].values())
        return result["outcomes"]

    return attempt


def one(root, pattern):
    return sorted(root.glob(pattern))[0]


def edit(path, change):
    """Change featstore's own part of a document and seal it, as a stranger would."""
    document = json.loads(path.read_bytes())
    own = document["attributes"]["featstore"] if "attributes" in document else document
    change(own)
    path.write_bytes(metadata.seal(document))


def with_checksum(data):
    return data + int(crc32c(data)).to_bytes(4, "little")


def some(values, step):
    """Parameters of which every ``step``-th is tried each time, and the others where counts are to be full."""
    return [
        pytest.param(
            *_tuple(value), id=f"{number} {ascii(value)[:30]}", marks=pytest.mark.full if number % step else ()
        )
        for number, value in enumerate(values)
    ]


def _tuple(value):
    return value if isinstance(value, tuple) else (value,)


TRAVERSAL = [
    "..",
    ".",
    "",
    "/",
    "../../inner",
    "a/b",
    "/etc",
    "\0",
    "a\0b",
    "..\\..",
    "%2e%2e",
    "x" * 300,
    "~",
    " ",
    "\n",
]


@pytest.mark.parametrize("name", TRAVERSAL)
def test_names_that_lead_elsewhere_are_refused_at_every_door(root, name):
    store = fs.create(root)
    dataset = store.dataset("toy")
    for call in (
        lambda: store.dataset(name),
        lambda: store.put_samples(name, dataset.samples.table(), source=""),
        lambda: layout.run_path(name, "a/b/t000"),
        lambda: layout.run_path("toy", f"{name}/b/t000"),
        lambda: layout.run_path("toy", f"a/b/{name}"),
        lambda: dataset.create_run(dataset.runs()[0].recipe, {name: (1, 1, 1)}, batch_size=1, provenance={}),
    ):
        with pytest.raises(BadRequestError):
            call()
    with pytest.raises(FeatstoreError):
        dataset.open_run(f"toy/../{name}")


PLACES = ["data set", "layer", "reduced layer", "copy", "catalog", "catalog of data sets", "note"]


@pytest.mark.parametrize(("where", "name"), some(product(PLACES, TRAVERSAL), 16))
def test_names_in_documents_that_lead_elsewhere(root, harmless, where, name):
    if where == "data set":
        edit(root / "toy" / "zarr.json", lambda own: own.update(name=name))
    elif where == "layer":
        edit(one(root, "toy/*/*/t050/zarr.json"), lambda own: own["layers"].update({name: [1, 1, 1]}))
    elif where == "reduced layer":
        path = next(path for path in root.glob("toy/*/*/t050/zarr.json") if b'"method":"pca"' in path.read_bytes())
        edit(path, lambda own: own["reduced"].update({name: own["reduced"]["up1"]}))
    elif where == "copy":
        edit(one(root, "catalog/toy~*.json"), lambda own: own.update(path=name))
    elif where == "catalog":
        edit(
            root / "catalog.json", lambda own: [run.update(path=f"toy/{name}/a/b", dataset=name) for run in own["runs"]]
        )
    elif where == "catalog of data sets":
        edit(root / "catalog.json", lambda own: own["datasets"].update({name: 5}))
    else:
        edit(one(root, "catalog/*.complete"), lambda own: own.update(path=name))
    outcomes = harmless()
    if where in ("data set", "layer"):
        assert "CorruptError" in outcomes.values()


@pytest.mark.parametrize(
    "name",
    some(
        [
            "toy~..~..~etc.json",
            "..~a~b~c.json",
            "toy~a~b~.c.json",
            "~.json",
            ".json",
            "..json",
            "toy~samples~key~99999999999",
            "toy~samples~..~0",
            "a b.json",
            "é.json",
            "toy~__a~b~c.json",
            "toy~~~.json",
            "toy~reference~x-12345678~t999.complete",
        ],
        5,
    ),
)
def test_files_in_the_catalog_whose_names_are_none(root, harmless, name):
    (root / "catalog" / name).write_bytes(
        metadata.seal({"format": layout.FORMAT, "path": "../..", "copy": {"kind": "run"}})
    )
    assert harmless()["verify"] == "ok"


SHAPES = [
    [1 << 30, 1 << 30, 1],
    [1, 1],
    [1, 1, 1, 1],
    [0, 1, 1],
    [-1, 1, 1],
    ["1", 1, 1],
    [1.5, 1, 1],
    [1, None, 1],
    None,
    {},
    [1 << 62, 1, 1],
    [2**64, 1, 1],
    [True, 4, 4],
    [10**3000, 1, 1],
    [(1 << 30) - 1, 1, 1],
    [1 << 15, 1 << 15, 1],
]


@pytest.mark.parametrize(("documents", "shape"), some(product([False, True], SHAPES), 9))
def test_shapes_that_are_absurd(root, harmless, documents, shape):
    """Also where the array's own document tells the same lie: then its shard gives it away, before memory is taken."""
    run = next(path for path in sorted(root.glob("toy/*/*/t050/zarr.json")) if b'"float16"' in path.read_bytes())
    edit(run, lambda own: own["layers"].update(up1=shape))
    if documents and isinstance(shape, list) and len(shape) == 3 and all(type(n) is int for n in shape):
        path = run.parent / "up1" / "zarr.json"
        path.write_bytes(metadata.seal(layout.layer_document(rich.N, 64, tuple(shape), np.dtype("<f2"))))
    harmless()


@pytest.mark.parametrize(
    "changes",
    some(
        [
            *({"block_length": value} for value in (0, -1, 65, 2**40, "64", 1.5, None, [], True)),
            *({"batch_size": value} for value in (0, -1, 2**70, "8", None)),
            *({"images": value} for value in (2**31, 2**39, 2**40, 2**64, -1, 1e300, "70")),
            *({"provenance": value} for value in (5, "x", [1, 2], [None] * 10**5, {"a": 1}, [{"layers": 5}])),
            *({"layers": value} for value in (5, [], {}, {f"l{i}": [1, 1, 1] for i in range(10**5)}, {"up1": {}})),
            *(
                {"reduced": value}
                for value in (5, None, {"up1": 5}, {"up1": {"channels": 1, "explained": "x", "sha256": 5}})
            ),
            *({"kind": value} for value in (5, None, "store", ["run"])),
            *({"compress": value} for value in (5, "yes", None, [1])),
            *({"fingerprint": value} for value in (5, None, "0" * 64, "x" * 10**6)),
        ],
        11,
    ),
)
def test_values_that_are_absurd(root, harmless, changes):
    name = "toy/zarr.json" if "images" in changes else "toy/*/*/t050/zarr.json"
    for path in root.glob(name):
        edit(path, lambda own: own.update(changes))
    harmless()


RECIPE = {
    "model": ["../..", "", "a" * 5000, 5, None, ["reference"]],
    "technique": ["../..", "", "x" * 10**6, "\x1b[2J", 5, None, {"a": 1}],
    "timestep": [-1, 10**30, "50", 1.5, None, True],
    "weights_digest": ["", "x", 5, None, "0" * 64],
    "parameters": [5, None, [], "x", {"a": {"b": {"c": [1] * 10**4}}}],
    "precision": ["float64", "object", 5, None, ["int8"]],
    "reduce": [5, [], "pca", {}, {"method": "pca", "components": -1, "sample": "x"}, {"components": 2**70}],
    "seed": ["x", None, 1e308],
    "height_px": ["x", -5, None, 10**30],
    "scheduler": ["imported", 5, None],
    "meaning": ["x", None, 10**9],
}


@pytest.mark.parametrize(("field", "value"), some([(f, v) for f, values in RECIPE.items() for v in values], 11))
def test_recipes_that_are_absurd(root, harmless, field, value):
    """With a fingerprint that fits them."""

    def change(own):
        own["recipe"][field] = value
        own["fingerprint"] = sha256_hex(canonical_json(own["recipe"]))

    for path in root.glob("toy/*/*/t050/zarr.json"):
        edit(path, change)
    harmless()


@pytest.mark.parametrize(
    "fields",
    some(
        [
            {"data_type": "object"},
            {"data_type": {"name": "numpy.datetime64", "configuration": {}}},
            {"data_type": "float16\0"},
            {"codecs": [{"name": "numcodecs.pickle"}]},
            {"codecs": [{"name": "../../evil", "configuration": {"x": 1}}]},
            {"codecs": []},
            {"codecs": 5},
            {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [0, 0, 0, 0]}}},
            {"chunk_grid": {"name": "rectilinear"}},
            {"chunk_key_encoding": {"name": "default", "configuration": {"separator": "/../"}}},
            {"storage_transformers": [{"name": "evil"}]},
            {"fill_value": 7},
            {"shape": [2**62, 3, 4, 4]},
            {"shape": []},
            {"shape": None},
            {"shape": ["70", 3, 4, 4]},
            {"node_type": "group"},
            {"zarr_format": 2},
            {"must_understand": True},
        ],
        6,
    ),
)
def test_arrays_that_say_other_things(root, harmless, fields):
    """Nothing in a document decides what code runs: an array's says exactly what its run says, or is refused."""
    for pattern in (
        "toy/*/*/t050/up1/zarr.json",
        "toy/samples/digest/zarr.json",
        "toy/*/*/t050/committed/up1/zarr.json",
    ):
        for path in root.glob(pattern):
            path.write_bytes(metadata.seal(json.loads(path.read_bytes()) | fields))
    outcomes = harmless(write=False)
    assert outcomes["verify"] == "ok"  # it reports, and raises nothing
    if fields != {"shape": [2**62, 3, 4, 4]}:
        numbers = [name for name in outcomes if name.startswith("numpy toy") and name.endswith("up1")]
        assert {outcomes[name] for name in numbers} == {"CorruptError"}


JUNK = {
    "deep": b"[" * 200_000 + b"]" * 200_000,
    "deep object": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "many": b"[" + b"[]," * 500_000 + b"[]]",
    "long number": b'{"zarr_format":' + b"9" * 100_000 + b"}",
    "huge float": b'{"zarr_format":1e999999}',
    "NaN": b'{"zarr_format":NaN,"attributes":{"featstore":{"metadata_sha256":"x"}}}',
    "surrogate": b'{"zarr_format":3,"attributes":{"featstore":{"metadata_sha256":"\\ud800"}}}',
    "twice": b'{"zarr_format":3,"zarr_format":4,"attributes":{"featstore":{}},"attributes":{"featstore":5}}',
    "no UTF-8": b'{"a":"\xff\xfe"}',
    "UTF-16": '{"zarr_format": 3}'.encode("utf-16"),
    "nothing": b"",
    "zeros": bytes(10_000),
    "a string": b'"zarr_format"',
    "attributes of a string": b'{"zarr_format":3,"attributes":"featstore"}',
    "another format": b'{"zarr_format":3,"attributes":{"featstore":{"format":99}}}',
    "a format that is none": b'{"zarr_format":3,"attributes":{"featstore":{"format":true}}}',
}


DOCUMENTS = [
    "zarr.json",
    "toy/zarr.json",
    "toy/*/*/t050/zarr.json",
    "toy/*/*/t050/up1/zarr.json",
    "catalog/*.json",
    "catalog.json",
    "catalog/*.complete",
    "catalog/*.mark",
    "toy/samples/key/zarr.json",
]


@pytest.mark.parametrize(("junk", "name"), some(product(JUNK, DOCUMENTS), 19))
def test_documents_that_are_junk(root, harmless, junk, name):
    for path in root.glob(name):
        path.write_bytes(JUNK[junk])
    harmless()


FILES = [
    "zarr.json",
    "toy/zarr.json",
    "catalog.json",
    "toy/samples/digest/c.0.0",
    "catalog/*",
    "toy/*/*/t050/committed/up1/c.0",
    "toy/*/*/t050/up1/c.0.0.0.0",
    "toy/*/*/t050/scales/up1/c.0.0",
    "toy/*/*/t050/reduce/up1/c.0.0",
]


@pytest.mark.parametrize(("pattern", "size"), some(product(FILES, [1 << 31, 1 << 40]), 7))
def test_files_that_are_huge(root, harmless, pattern, size):
    """Holes without end: looked at before they are read."""
    for path in root.glob(pattern):
        os.truncate(path, size)
    harmless()


THINGS = [
    "zarr.json",
    "toy/zarr.json",
    "catalog.json",
    "toy/samples/digest/c.0.0",
    "catalog/*",
    "toy/*/*/t050/zarr.json",
    "toy/*/*/t050/up1/zarr.json",
    "toy/*/*/t050/committed/up1/c.0",
    "toy/*/*/t050/up1/c.0.0.0.0",
]


KINDS = ["folder", "pipe", "loop", "dangling", "device"]


@pytest.mark.parametrize(("pattern", "kind"), some(product(THINGS, KINDS), 11))
def test_things_that_are_no_files(root, harmless, pattern, kind):
    """Nobody waits for the other end of a pipe, or reads a device to its end."""
    for path in root.glob(pattern):
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "loop":
            path.symlink_to(path)
        elif kind == "dangling":
            path.symlink_to("/nonexistent/x")
        else:
            path.symlink_to("/dev/zero")
    harmless()


def shard(entries, *, body=b"", label=None, place=b"\0" * 8):
    """A shard with a checksum that fits whatever it says."""
    index = np.full((64, 2), 2**64 - 1, dtype="<u8")
    for slot, entry in enumerate(entries):
        index[slot] = entry
    said = (np.zeros(64, dtype="<u8") if label is None else np.asarray(label, dtype="<u8")).tobytes() + place
    return body + with_checksum(said) + with_checksum(index.tobytes())


INDICES = [
    [(0, 2**63)],
    [(2**63, 100)],
    [(2**64 - 2, 100)],
    [(2**64 - 100, 200)],
    [(0, 0)],
    [(0, 100)] * 64,
    [(0, 2**64 - 1)],
    [(2**64 - 1, 5)],
    [(50, 100), (0, 100)],
    [(0, 1 << 40)] * 64,
]


@pytest.mark.parametrize(("entries", "body_bytes"), some(product(INDICES, [0, 200, 20_000]), 13))
def test_indices_that_lie(root, harmless, entries, body_bytes):
    """Lengths that would take all memory, places outside, images on top of each other: in every kind of shard."""
    for path in root.glob("toy/*/*/t050/up1/c.0.0.0.0"):
        key = str(path.relative_to(root))
        record = np.frombuffer((path.parents[1] / "committed" / "up1" / "c.0").read_bytes()[:-4], dtype="<u8")
        place = bytes.fromhex(sha256_hex(key.encode()))[:8]
        path.write_bytes(shard(entries, body=bytes(body_bytes), label=record, place=place))
    for path in root.glob("toy/*/*/t050/scales/up1/c.0.0"):
        path.write_bytes(shard(entries, body=bytes(body_bytes)))
    outcomes = harmless(write=False)
    numbers = [name for name in outcomes if name.startswith("numpy toy") and name.endswith("up1")]
    assert {outcomes[name] for name in numbers} == {"CorruptError"}
    harmless()


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"x" * 50,
        bytes.fromhex("28b52ffd") + b"\xff" * 60,
        # A frame that says that it holds 2^62 bytes.
        bytes.fromhex("28b52ffd") + b"\xe0" + struct.pack("<Q", 1 << 62) + b"\x01\x00\x00",
        # One that holds 128 MiB of zeros in blocks of one repeated byte.
        bytes.fromhex("28b52ffd")
        + b"\xa0"
        + struct.pack("<I", 1 << 27)
        + (struct.pack("<I", (1 << 17 << 3) | 2)[:3] + b"\0") * 1024,
    ],
    ids=["nothing", "junk", "broken", "2^62 bytes", "a bomb"],
)
def test_packed_maps_that_lie(root, harmless, frame):
    """What unpacks to something else than one map is refused, and takes no more room than one."""
    path = next(p for p in sorted(root.glob("toy/*/basic-*/t050/up1/c.0.0.0.0")))
    key = str(path.relative_to(root))
    record = np.frombuffer((path.parents[1] / "committed" / "up1" / "c.0").read_bytes()[:-4], dtype="<u8")
    body = with_checksum(frame) + bytes(4)
    place = bytes.fromhex(sha256_hex(key.encode()))[:8]
    path.write_bytes(shard([(0, len(frame) + 4)] * 64, body=body, label=record, place=place))
    outcomes = harmless(write=False)
    name = next(name for name in outcomes if name.startswith("numpy toy/reference/basic") and name.endswith("up1"))
    assert outcomes[name] == "CorruptError"


@pytest.mark.parametrize(
    ("components", "channels"),
    some(product([3, 1 << 10, (1 << 24) - 1], [1, 8, (1 << 24) - 1, 1 << 24, 2**40]), 4),
)
def test_bases_that_are_absurd(root, harmless, components, channels):
    run = next(path for path in root.glob("toy/*/*/t050/zarr.json") if b'"method":"pca"' in path.read_bytes())

    def change(own):
        own["reduced"]["up1"]["channels"] = channels
        own["layers"]["up1"][0] = components

    edit(run, change)
    size = min(4 * (1 + components) * channels + 4, 1 << 42)
    os.truncate(run.parent / "reduce" / "up1" / "c.0.0", size)
    harmless()


def test_a_basis_that_nobody_would_read_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(basis, "MAX_BYTES", 4 * 3 * 8 - 1)
    one = basis.Basis(mean=np.zeros(8, np.float32), components=np.eye(8, dtype=np.float32)[:2], explained=0.5)
    objects = LocalObjects(tmp_path)
    with pytest.raises(BadRequestError, match="96 bytes"):
        basis.keep(objects, "toy/reference/basic-00000000/t050", "up1", one)
    assert objects.names("") == []


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    objects = LocalObjects(tmp_path)
    for read in (objects.get, objects.open):
        with pytest.raises(CorruptError, match="no file"):
            read("pipe")
    assert not objects.exists("pipe")


def test_a_folder_for_unfinished_files_that_lies_elsewhere_is_refused(root, tmp_path):
    shutil.rmtree(root / INTERNAL, ignore_errors=True)
    (tmp_path / "elsewhere").mkdir()
    (root / INTERNAL).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="is a link"):
        fs.create(root)
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert fs.open(root).datasets() == ["other", "toy"]


def test_a_lock_behind_a_link_is_refused_and_creates_nothing(tmp_path):
    objects = LocalObjects(tmp_path / "s")
    (tmp_path / "s" / INTERNAL).mkdir(parents=True)
    for number in range(2 * LOCKS):
        (tmp_path / "s" / INTERNAL / f"lock-{number:02d}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError), objects.lock("toy"):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_a_store_inside_a_link_stays_where_it_is(root, tmp_path, harmless):
    """Links are followed, as people lay parts of a store on other disks, but none that is put is written through."""
    target = tmp_path / "secret.txt"
    path = Path(one(root, "catalog/*.mark"))
    path.unlink()
    path.symlink_to(target)
    edit(root / "toy" / "zarr.json", lambda own: None)
    harmless(write=True)
    assert target.read_bytes() == b"not yours"


def test_a_sound_store_is_refused_nothing(harmless, seen, told):
    """Else that there are errors of ours only would say nothing. It comes last, to tell what came of the others."""
    others = {name: count for name, count in seen.items() if name != "stores"}
    told(f"{seen['stores']} hostile stores, each with all that one can do with it: {others}; no other error")
    outcomes = harmless()
    ambiguous = {name for name, text in outcomes.items() if text == "BadRequestError"}
    assert all(name.startswith(("run ", "bucket ")) for name in ambiguous)
    assert {text for name, text in outcomes.items() if name not in ambiguous} <= {"ok", "NotCommittedError"}
    assert Counter(outcomes.values())["ok"] > 50
