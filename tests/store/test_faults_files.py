"""Files that change behind the store's back: a bit, a length, another file's bytes. Each is found."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter, defaultdict

import pytest

import featstore.store as fs
from featstore.errors import CorruptError, FeatstoreError
from featstore.store.verify import verify
from tests.store import rich


@pytest.fixture(scope="module")
def sound(tmp_path_factory, lab):
    """The store, what its files hold, and what is read of it; each test leaves it as it was."""
    url = tmp_path_factory.mktemp("rich") / "s"
    rich.build(url, lab)
    assert verify(fs.open(url)).ok
    files = rich.files(url)
    kinds = defaultdict(list)
    for name in files:
        kinds[rich.kind_of(name)].append(name)
    assert kinds.keys() == rich.KINDS.keys()
    return url, files, dict(kinds), rich.read_all(url)


def found_by_verify(url):
    try:
        return not verify(fs.open(url)).ok
    except FeatstoreError:
        return True  # The root itself, without which nothing is looked at.


def outcome_of_reading(url, values):
    """``refused`` or ``true``: never a value that is not what was stored."""
    try:
        got = rich.read_all(url)
    except CorruptError as error:
        return "refused" if error.hint else "refused without a hint"
    assert got == values
    return "true"


def same_meaning(before, after):
    """Whether JSON says the same in other characters (1e-05 and 1E-05)."""
    try:
        return json.loads(before) == json.loads(after)
    except ValueError:
        return False


def damaged(sound, rng, count, damage):
    """Damage one file after the other, kinds in turn; (kind, found by verify, outcome of reading, same meaning)."""
    url, files, kinds, values = sound
    for turn in range(count):
        kind = sorted(kinds)[turn % len(kinds)]
        name = rng.choice(kinds[kind])
        data = damage(rng, name, files[name])
        if data == files[name]:
            continue
        path = url / name
        path.write_bytes(data)
        try:
            yield kind, found_by_verify(url), outcome_of_reading(url, values), same_meaning(files[name], data)
        finally:
            path.write_bytes(files[name])


def count_flips(sound, told, count):
    def flip(rng, name, data):
        changed = bytearray(data)
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(changed)

    flips = found = refused = unread = unchanged = 0
    for kind, seen, outcome, same in damaged(sound, random.Random(1), count, flip):
        flips += 1
        if same:
            unchanged += 1
            assert outcome == "true"
            continue
        found += seen
        assert seen, kind
        assert outcome == ("refused" if kind in rich.READ else "true"), kind
        refused += outcome == "refused"
        unread += outcome == "true"
    told(
        f"bits flipped over {len(rich.KINDS)} kinds of files: verify found {found} of {flips - unchanged}; {refused} "
        f"were refused by the read that touches them, {unread} lie in files that reads do without, which gave the "
        f"true values; {unchanged} more left the meaning as it was"
    )
    assert flips == count


def test_flipped_bits(sound, told):
    count_flips(sound, told, 4 * len(rich.KINDS))


@pytest.mark.full
def test_a_thousand_flipped_bits(sound, told):
    count_flips(sound, told, 1000)


def count_lengths(sound, told, count):
    def cut_or_grow(rng, name, data):
        if rng.random() < 0.2:
            return data + rng.randbytes(rng.randrange(1, 40))
        if rng.random() < 0.2:
            return bytes(len(data))
        return data[: rng.choice([0, 1, len(data) - 1, rng.randrange(len(data)), rng.randrange(len(data))])]

    seen = Counter()
    for kind, found, outcome, same in damaged(sound, random.Random(2), count, cut_or_grow):
        assert found or same, kind
        assert outcome == ("refused" if kind in rich.READ and not same else "true"), kind
        seen["same" if same else outcome] += 1
    told(
        f"files cut, lengthened or zeroed: verify found {seen['refused'] + seen['true']} of "
        f"{seen['refused'] + seen['true']}; {seen['refused']} were refused by the read that touches them"
    )


def test_other_lengths(sound, told):
    count_lengths(sound, told, 4 * len(rich.KINDS))


@pytest.mark.full
def test_a_thousand_other_lengths(sound, told):
    count_lengths(sound, told, 1000)


def test_each_file_that_is_gone(sound, told):
    """A note and its mark, and the catalog's snapshot, are there to save time: without them all is true, too."""
    url, files, _, values = sound
    spare = {"note", "mark", "catalog.json"}
    for name, data in files.items():
        kind = rich.kind_of(name)
        (url / name).unlink()
        try:
            assert found_by_verify(url) == (kind not in spare), name
            if kind in rich.READ:
                with pytest.raises(FeatstoreError):
                    rich.read_all(url)
            elif kind == "copy of a document":
                assert rich.read_all(url).items() <= values.items()  # A run that the catalog lacks is not listed.
            else:
                assert rich.read_all(url) == values
        finally:
            (url / name).write_bytes(data)
    told(f"each of {len(files)} files gone, one at a time: verify found all but those that only save time")


def only_longer(source, target):
    """Whether an array's document is put in the place of one that differs in saying that there are fewer images."""
    try:
        found = [json.loads(data) for data in (source, target)]
        lengths = [document["shape"][0] for document in found]
    except (ValueError, KeyError):
        return False
    for document in found:
        document["shape"][0] = document["attributes"]["featstore"]["metadata_sha256"] = None
    return found[0] == found[1] and lengths[0] >= lengths[1]


def count_swaps(sound, told, count):
    """One file's bytes in another's place: sound by every checksum of its own."""
    url, files, kinds, values = sound
    rng = random.Random(3)
    names = sorted(files)
    seen = Counter()
    while seen.total() < count:
        target = rng.choice(kinds[rng.choice(sorted(kinds))])
        # Half of the time of the same kind, where a mistake is least conspicuous.
        source = rng.choice(kinds[rich.kind_of(target)] if rng.random() < 0.5 else names)
        if files[source] == files[target] or only_longer(files[source], files[target]):
            continue
        shutil.copyfile(url / source, url / target)
        try:
            found = found_by_verify(url)
            try:
                outcome = "true" if rich.read_all(url) == values else "another value"
            except (FeatstoreError, AssertionError):
                outcome = "refused"
        finally:
            (url / target).write_bytes(files[target])
        assert found, (source, target)
        # A sample table of another data set is whole in itself: then features are refused or the same, image by image.
        assert outcome != "another value" or rich.kind_of(target) in ("keys", "splits", "digests"), (source, target)
        seen[outcome] += 1
    told(
        f"files copied over others: verify found {seen.total()} of {seen.total()}; {seen['refused']} reads were refused"
    )


def test_swapped_files(sound, told):
    count_swaps(sound, told, 80)


@pytest.mark.full
def test_a_thousand_swapped_files(sound, told):
    count_swaps(sound, told, 1000)
