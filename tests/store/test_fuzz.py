"""Documents and files that mean no good: soundly sealed, so that no digest hides what reads them."""

from __future__ import annotations

import copy
import json
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from featstore.recipe import canonical_json, sha256_hex
from featstore.store import metadata
from featstore.store import store as stores
from featstore.store.objects import INTERNAL
from tests.store import probe, rich
from tests.store.test_faults_power import Memory

DOCUMENTS = tuple(kind for kind in rich.KINDS if rich.KINDS[kind].endswith(("json", "complete", "mark")))


@pytest.fixture(scope="module")
def content(tmp_path_factory, lab):
    """Files of a store that has every kind, by name."""
    url = tmp_path_factory.mktemp("rich") / "s"
    rich.build(url, lab)
    return rich.files(url)


@pytest.fixture
def hostile(content, monkeypatch):
    """Tries a store with some files replaced, in memory; refuses whatever is no error of ours."""

    def attempt(changes, *, write=False, listed=True):
        objects = Memory()
        objects.content = content | changes
        objects.can_list = listed  # Else the catalog says what there is, as over HTTP.
        with monkeypatch.context() as patch:
            patch.setattr(stores, "objects_at", lambda url: objects)
            outcomes = probe.everything("x", write=write)
        assert not probe.strange(outcomes)
        known = content.keys() | changes.keys()
        strangers = [key for key in objects.content if key not in known and not key.startswith((INTERNAL, "catalog"))]
        assert all(key.split("/")[0] in ("toy", "other") for key in strangers), strangers
        return outcomes

    return attempt


def sealed(document):
    """The document with its digest, as a stranger would seal it; where it cannot be sealed, as it is."""
    try:
        return metadata.seal(document)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return json.dumps(document).encode("utf-8", "surrogatepass")


NAMES = st.sampled_from(
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "/etc/passwd",
        "zarr.json",
        "c",
        "committed",
        "up1",
        "toy",
        "x" * 300,
        "\0",
        "é",
        "__x",
    ]
)
NUMBERS = st.sampled_from([0, 1, -1, 2, 64, 65, 2**31, 2**40, 2**63, 2**64, 10**30, -(2**63), 0.5, 1e308, -0.0])
LEAVES = st.none() | st.booleans() | NUMBERS | st.integers() | st.floats() | NAMES | st.text(max_size=8)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES | st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)


def places(value, path=()):
    """Paths of all values inside a document."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


@st.composite
def changed_documents(draw, document):
    """A real document in which a few values are gone, others, doubled, or under another name."""
    found = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        where = [path for path in places(found) if path and path[-1] != metadata.DIGEST]
        if not where:
            break
        path = draw(st.sampled_from(where))
        holder = found
        for key in path[:-1]:
            holder = holder[key]
        kind = draw(st.sampled_from(["set", "set", "set", "drop", "add", "swap"]))
        if kind == "set":
            holder[path[-1]] = draw(VALUES)
        elif kind == "drop":
            del holder[path[-1]]
        elif kind == "add" and isinstance(holder, dict):
            holder[draw(NAMES)] = draw(VALUES)
        elif kind == "add":
            holder.insert(0, draw(VALUES))
        else:
            other = draw(st.sampled_from(where))
            value = found
            for key in other:
                try:
                    value = value[key]
                except (KeyError, IndexError, TypeError):
                    break
            holder[path[-1]] = copy.deepcopy(value)
    return found


def consistent(document):
    """A run's document as a stranger would make it who knows how: the fingerprint is that of the recipe."""
    try:
        own = document["attributes"]["featstore"]
        own["fingerprint"] = sha256_hex(canonical_json(own["recipe"]))
    except (KeyError, TypeError, ValueError):
        pass
    return document


def count_documents(content, hostile, told, kind, limits):
    """Documents of a kind with other values in them, as many as ``limits`` say: each leaves errors of ours or none."""
    names = sorted(name for name in content if rich.kind_of(name) == kind)
    seen = Counter()

    @limits
    @given(data=st.data())
    def each(data):
        name = data.draw(st.sampled_from(names))
        document = data.draw(changed_documents(json.loads(content[name])))
        if kind == "run" and data.draw(st.booleans()):
            document = consistent(document)
        how = data.draw(st.sampled_from([{}, {"write": True}, {"listed": False}]))
        outcomes = hostile({name: sealed(document)}, **how)
        seen["refused somewhere" if set(outcomes.values()) - usual else "harmless"] += 1

    usual = {*hostile({}).values(), *hostile({}, listed=False).values()}
    each()
    told(f"{seen.total()} documents of kind {kind!r}: {dict(seen)}")


FEW = settings(
    max_examples=10,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
MANY = settings(FEW, max_examples=200)


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_documents(content, hostile, told, kind):
    count_documents(content, hostile, told, kind, FEW)


@pytest.mark.full
@pytest.mark.parametrize("kind", DOCUMENTS)
def test_many_documents(content, hostile, told, kind):
    count_documents(content, hostile, told, kind, MANY)
