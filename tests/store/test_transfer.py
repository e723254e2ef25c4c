"""Copying between stores: what arrives, what stays, and what a copy that is cut off leaves behind."""

from __future__ import annotations

import dataclasses
import random
import threading
import time

import numpy as np
import pytest

import featstore.store as fs
from featstore.errors import BadRequestError, StorageError
from featstore.recipe import pca_of
from featstore.store import copying, leases, store
from featstore.store.basis import Basis
from featstore.store.digest import run_digest
from featstore.store.meaning import Query
from featstore.store.objects import INTERNAL
from featstore.store.parallel import MAX_BYTES, at_once
from featstore.store.transfer import compare_digests, plan_transfer, transfer
from featstore.store.verify import verify
from tests.store.fake_remote import FakeRemote

N = 150


def nothing(_):
    pass


def copy(source, target, **options):
    """Everything that push does; the outcome by path of the run."""
    there = fs.create(target)
    plan = plan_transfer(fs.open(source), there, **options)
    copies = transfer(plan, there, nothing)
    compare_digests(plan, fs.open(target), copies, nothing)
    return {one.lack.run.path: one for one in copies}


def only(copies):
    (one,) = copies.values()
    return one


def check_rows(url, lab):
    """Every row that counts as valid holds the bytes of its image; how many there are."""
    count = 0
    for run in fs.open(url).find():
        for layer in run.layers:
            rows = np.flatnonzero(run.valid([layer]))
            if len(rows):
                np.testing.assert_array_equal(run.numpy(layer, rows), lab.maps_of(run, rows, layer))
            count += len(rows)
    return count


@pytest.fixture
def remote(monkeypatch):
    """A store behind requests that are counted, at fake://."""
    there = FakeRemote()
    genuine = store.objects_at
    monkeypatch.setattr(store, "objects_at", lambda url: there if str(url).startswith("fake://") else genuine(url))
    return there


def test_all_arrives_byte_for_byte_and_is_not_copied_twice(tmp_path, lab, remote):
    opened, run = lab.full(tmp_path / "a", N)
    lab.fill(lab.start(tmp_path / "a", N, technique="basic", timestep=3)[1], rows=range(40, 90))
    opened.finish(fs.open(tmp_path / "a").find())
    there = copy(tmp_path / "a", "fake://x")
    assert [(one.copied, one.problems) for one in there.values()] == [(2 * 2, []), (2 * 3, [])]
    back = copy("fake://x", tmp_path / "b")
    for path, one in there.items():
        assert one.digests[0] == one.digests[1] == back[path].digests[0] == back[path].digests[1]
    assert lab.files(tmp_path / "a") == lab.files(tmp_path / "b")
    assert not [key for key in remote.content if key.startswith(f"{INTERNAL}/leases/")]
    before = {key: data for key, data in remote.content.items() if not key.startswith(INTERNAL)}
    again = copy(tmp_path / "a", "fake://x")
    assert [(one.copied, one.bytes, one.lack.blocks()) for one in again.values()] == [(0, 0, (0, 4)), (0, 0, (0, 6))]
    assert {key: data for key, data in remote.content.items() if not key.startswith(INTERNAL)} == before
    assert again[run.path].digests == there[run.path].digests


def test_a_whole_block_takes_few_requests(tmp_path, lab, remote):
    lab.full("fake://x", 6 * 64)
    plan = plan_transfer(fs.open("fake://x"), None)
    remote.requests.clear()
    transfer(plan, fs.create(tmp_path / "b"), nothing)
    # A block of a layer: its record, index and images in one request each, and the record once more. The rest
    # is the table, and what every run has once.
    assert remote.requests["read"] <= 4 * (6 * 2) + 10
    assert check_rows(tmp_path / "b", lab) == 6 * 64 * 2


def shuffled(lab, n, seed):
    order = list(range(n))
    random.Random(seed).shuffle(order)
    table = lab.table(n)
    return fs.SampleTable(
        **{name: tuple(getattr(table, name)[i] for i in order) for name in ("keys", "digests", "splits")}
    )


@pytest.mark.parametrize("block_length", [64, 5])
def test_rows_find_their_places_by_key(tmp_path, lab, monkeypatch, block_length):
    """The target has the images in another order, some rows already, and blocks of another length."""
    lab.full(tmp_path / "a", N)
    target = fs.create(tmp_path / "b")
    dataset = target.put_samples("toy", shuffled(lab, N, 1), source="made up")
    monkeypatch.setattr("featstore.store.layout.BLOCK_MAX_IMAGES", block_length)
    run = dataset.create_run(lab.recipe(), lab.LAYERS, batch_size=8, provenance={"who": "another"})
    assert run.block_length == block_length
    monkeypatch.undo()
    lab.fill(run, rows=range(3, 70))
    before = run.numpy("up1", range(3, 70))
    one = only(copy(tmp_path / "a", tmp_path / "b"))
    assert one.problems == []
    assert one.digests[0] == one.digests[1]
    assert one.lack.images == N - 67
    after = fs.open(tmp_path / "b").dataset("toy").runs()[0]
    assert after.dataset.samples.keys == shuffled(lab, N, 1).keys
    np.testing.assert_array_equal(after.numpy("up1", range(3, 70)), before)
    assert check_rows(tmp_path / "b", lab) == 2 * N
    assert run_digest(after) == run_digest(fs.open(tmp_path / "a").dataset("toy").runs()[0]) == one.digests[0]


def test_images_that_one_side_lacks_are_appended(tmp_path, lab):
    lab.full(tmp_path / "a", 100)
    lab.full(tmp_path / "b", 30)
    one = only(copy(tmp_path / "a", tmp_path / "b"))
    assert one.digests[0] == one.digests[1]
    assert fs.open(tmp_path / "b").dataset("toy").samples.keys == lab.table(100).keys
    assert check_rows(tmp_path / "b", lab) == 200
    # What the other side has beyond that does not matter to the digests, and nothing of it is touched.
    more = only(copy(tmp_path / "b", lab_subset(tmp_path, lab)))
    assert more.digests[0] == more.digests[1]


def lab_subset(tmp_path, lab):
    lab.full(tmp_path / "c", 120)
    return tmp_path / "c"


def test_rows_that_both_sides_have_stay_as_they_are(tmp_path, lab):
    """Extracted on two machines: other last bits. Each side keeps its own, and the digests say so."""
    lab.full(tmp_path / "a", 20)
    _, run = lab.start(tmp_path / "b", 20)
    own = {layer: lab.maps_of(run, range(8), layer) + np.float16(1) for layer in lab.LAYERS}
    run.write_block(0, range(8), own)
    one = only(copy(tmp_path / "a", tmp_path / "b"))
    after = fs.open(tmp_path / "b").dataset("toy").runs()[0]
    for layer in lab.LAYERS:
        np.testing.assert_array_equal(after.numpy(layer, range(8)), own[layer])
        np.testing.assert_array_equal(after.numpy(layer, range(8, 20)), lab.maps_of(run, range(8, 20), layer))
    assert one.problems == []
    assert one.digests[0] != one.digests[1]
    assert one.digests[1] == run_digest(after)


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
        return
    if how == "cut":
        del data[-40:]
    else:
        data[{"first": 3, "last": -3}[how]] ^= 16
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("file", "how"),
    [
        ("up1/c.1.0.0.0", "first"),
        ("up1/c.1.0.0.0", "last"),
        ("up1/c.1.0.0.0", "cut"),
        ("up1/c.1.0.0.0", "gone"),
        ("committed/up1/c.1", "first"),
    ],
)
def test_a_damaged_block_is_named_and_all_others_are_copied(tmp_path, lab, file, how):
    _, run = lab.full(tmp_path / "a", N)
    damage(tmp_path / "a" / run.path / file, how)
    one = only(copy(tmp_path / "a", tmp_path / "b"))
    (problem,) = one.problems
    assert f"{run.path}/{file}" in problem
    assert "verify --repair" in problem
    assert one.copied == 5
    assert check_rows(tmp_path / "b", lab) == 2 * N - 64
    there = fs.open(tmp_path / "b").dataset("toy").runs()[0]
    assert not there.committed("up1")[64:128].any()
    # Once it is mended, the same call brings the rest.
    verify(fs.create(tmp_path / "a"), repair=True)
    lab.fill(run)
    one = only(copy(tmp_path / "a", tmp_path / "b"))
    assert (one.problems, one.digests[0]) == ([], one.digests[1])


def test_damage_costs_no_rows_of_other_blocks_where_rows_lie_in_other_places(tmp_path, lab):
    _, run = lab.full(tmp_path / "a", N)
    damage(tmp_path / "a" / run.path / "up1/c.0.0.0.0", "first")
    fs.create(tmp_path / "b").put_samples("toy", shuffled(lab, N, 2), source="made up")
    one = only(copy(tmp_path / "a", tmp_path / "b"))
    assert {problem.partition(" is damaged")[0] for problem in one.problems} == {f"{run.path}/up1/c.0.0.0.0"}
    there = fs.open(tmp_path / "b").dataset("toy").runs()[0]
    lost = [key for key, valid in zip(there.dataset.samples.keys, there.valid(["up1"]), strict=True) if not valid]
    assert "img0000" in lost
    assert set(lost) <= set(lab.table(64).keys)
    assert there.valid(["attn-up-cross-2"]).all()


def test_damage_in_the_target_is_named_and_left_to_its_owner(tmp_path, lab):
    lab.full(tmp_path / "a", N)
    _, run = lab.start(tmp_path / "b", N)
    lab.fill(run, rows=range(70))
    damage(tmp_path / "b" / run.path / "up1/c.1.0.0.0", "first")
    before = lab.files(tmp_path / "b" / run.path / "up1")["c.1.0.0.0"]
    one = only(copy(tmp_path / "a", tmp_path / "b"))
    (problem,) = one.problems
    assert f"verify --repair --store {tmp_path / 'b'}" in problem
    assert lab.files(tmp_path / "b" / run.path / "up1")["c.1.0.0.0"] == before
    assert fs.open(tmp_path / "b").dataset("toy").runs()[0].valid(["attn-up-cross-2"]).all()


@pytest.mark.parametrize("update", [False, True])
def test_images_that_are_not_the_same_on_both_sides(tmp_path, lab, update):
    lab.full(tmp_path / "a", 20, changed=[3, 5])
    lab.full(tmp_path / "b", 20, layers={"up1": lab.LAYERS["up1"]})
    plan = plan_transfer(fs.open(tmp_path / "a"), fs.open(tmp_path / "b"), update_images=update)
    assert plan.datasets[0].differing == ("img0003", "img0005")
    one = only(copy(tmp_path / "a", tmp_path / "b", update_images=update))
    assert (one.problems, one.digests[0]) == ([], one.digests[1])
    run = fs.open(tmp_path / "b").dataset("toy").runs()[0]
    table = lab.table(20, [3, 5] if update else [])
    assert run.dataset.samples.digests == table.digests
    assert run.valid(["up1"]).all()
    assert run.valid(["attn-up-cross-2"]).tolist() == [update or row not in (3, 5) for row in range(20)]
    check_rows(tmp_path / "b", lab)


def test_nothing_of_an_image_that_the_target_has_is_changed_by_new_ones(tmp_path, lab):
    """The first image differs, and stands in another split there; the last is new."""
    lab.full(tmp_path / "a", 11, changed=[0])
    table = lab.table(10)
    there = fs.create(tmp_path / "b")
    there.put_samples("toy", dataclasses.replace(table, splits=("val",) * 10), source="made up")
    copy(tmp_path / "a", tmp_path / "b")
    samples = fs.open(tmp_path / "b").dataset("toy").samples
    assert samples.keys == lab.table(11).keys
    assert samples.digests == lab.table(11).digests
    assert samples.splits == ("val",) * 10 + lab.table(11).splits[10:]


def test_a_new_run_is_made_like_the_one_that_is_copied(tmp_path, lab, monkeypatch):
    monkeypatch.setattr("featstore.store.layout.BLOCK_MAX_IMAGES", 7)
    _, run = lab.full(tmp_path / "a", 20)
    lab.start(tmp_path / "a", 20, layers={"later": (1, 2, 2)})
    monkeypatch.undo()
    copy(tmp_path / "a", tmp_path / "b", query=Query(layers=("up1",)))
    new = fs.open(tmp_path / "b").dataset("toy").runs()[0]
    assert (new.path, new.block_length, new.batch_size, list(new.layers)) == (run.path, 7, 8, ["up1"])
    assert new.provenance == ({"who": "a test", "layers": ["up1"]},)
    copy(tmp_path / "a", tmp_path / "b")
    new = fs.open(tmp_path / "b").dataset("toy").runs()[0]
    assert set(new.layers) == {*lab.LAYERS, "later"}
    assert [entry["layers"] for entry in new.provenance] == [["up1"], ["attn-up-cross-2"], ["later"]]
    before = lab.files(tmp_path / "b")
    copy(tmp_path / "a", tmp_path / "b")
    assert lab.files(tmp_path / "b") == before


def test_a_run_that_is_there_learns_who_made_what_comes(tmp_path, lab):
    lab.full(tmp_path / "a", 20)
    dataset = fs.create(tmp_path / "b").put_samples("toy", lab.table(20), source="made up")
    run = dataset.create_run(lab.recipe(), lab.LAYERS, batch_size=4, provenance={"who": "another"})
    lab.fill(run, rows=range(5))
    copy(tmp_path / "a", tmp_path / "b")
    after = fs.open(tmp_path / "b").dataset("toy").runs()[0]
    assert after.batch_size == 4
    assert after.provenance == (
        {"who": "another", "layers": sorted(lab.LAYERS)},
        {"who": "a test", "layers": sorted(lab.LAYERS), "batch_size": 8},
    )


def test_int8_travels_with_its_scales(tmp_path, lab, remote):
    _, run = lab.full(tmp_path / "a", 70, precision="int8")
    copy(tmp_path / "a", "fake://x")
    one = only(copy("fake://x", tmp_path / "b"))
    assert one.digests[0] == one.digests[1]
    assert lab.files(tmp_path / "a" / run.path) == lab.files(tmp_path / "b" / run.path)
    scales = next(key for key in remote.content if "/scales/up1/c.0.0" in key)
    other = bytearray(remote.content[scales])
    other[3] ^= 1
    remote.content[scales] = bytes(other)
    one = only(copy("fake://x", tmp_path / "c"))
    assert "scales" in one.problems[0]
    assert one.digests[0] != one.digests[1]


@pytest.mark.parametrize("packed", [(True, False), (False, True), (True, True)])
def test_packed_maps_and_those_that_are_not_are_the_same_features(tmp_path, lab, packed):
    for side, compress in zip("ab", packed, strict=True):
        dataset = fs.create(tmp_path / side).put_samples("toy", lab.table(20), source="made up")
        options = {"batch_size": 8, "provenance": {}, "compress": compress}
        run = dataset.create_run(lab.recipe(), lab.LAYERS, **options)
        lab.fill(run, rows=range(20) if side == "a" else range(6))
    one = only(copy(tmp_path / "a", tmp_path / "b"))
    assert (one.problems, one.digests[0]) == ([], one.digests[1])
    there = fs.open(tmp_path / "b").dataset("toy").runs()[0]
    assert there.compressed == packed[1]
    assert check_rows(tmp_path / "b", lab) == 40
    copy(tmp_path / "a", tmp_path / "c")
    assert fs.open(tmp_path / "c").dataset("toy").runs()[0].compressed == packed[0]


def reduced(url, lab, seed):
    """A run whose first layer has 3 of 8 channels, of a basis of its own."""
    rows, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((8, 8)))
    basis = Basis(mean=np.ones(8, np.float32), components=rows[:3].astype(np.float32), explained=0.5)
    dataset = fs.create(url).put_samples("toy", lab.table(20), source="made up")
    recipe = lab.recipe(reduce=pca_of(3, "12" * 32))
    options = {"batch_size": 8, "provenance": {}, "bases": {"up1": basis}}
    return dataset.create_run(recipe, lab.LAYERS, **options)


def test_what_channels_were_projected_onto_travels_and_decides_what_goes_together(tmp_path, lab):
    run = reduced(tmp_path / "a", lab, seed=0)
    lab.fill(run)
    one = only(copy(tmp_path / "a", tmp_path / "b"))
    assert (one.problems, one.digests[0]) == ([], one.digests[1])
    there = fs.open(tmp_path / "b").dataset("toy").runs()[0]
    assert there.layers == run.layers
    np.testing.assert_array_equal(there.basis("up1").components, run.basis("up1").components)
    # Fitted anew on another machine: the same recipe, and features that cannot stand side by side.
    other = reduced(tmp_path / "c", lab, seed=1)
    lab.fill(other, rows=range(5))
    one = only(copy(tmp_path / "a", tmp_path / "c"))
    (problem,) = one.problems
    assert f"{run.path}/up1" in problem
    assert "different bases" in problem
    there = fs.open(tmp_path / "c").dataset("toy").runs()[0]
    assert there.valid(["up1"]).sum() == 5
    assert there.valid(["attn-up-cross-2"]).all()


def test_only_what_is_asked_for(tmp_path, lab):
    for technique in ("basic", "prompt"):
        for timestep in (0, 50):
            lab.full(tmp_path / "a", 5, technique=technique, timestep=timestep)
    fs.create(tmp_path / "a").put_samples("empty", lab.table(3), source="made up")
    copy(tmp_path / "a", tmp_path / "b", query=Query(techniques=("basic",), timesteps=(50,)), dataset="toy")
    assert [(run.recipe.technique, run.recipe.timestep) for run in fs.open(tmp_path / "b").find()] == [("basic", 50)]
    assert fs.open(tmp_path / "b").datasets() == ["toy"]
    with pytest.raises(BadRequestError, match=r"'promt'.*basic, prompt"):
        plan_transfer(fs.open(tmp_path / "a"), None, query=Query(techniques=("promt",)))


def test_another_data_set_of_the_same_name_is_refused_before_anything_is_written(tmp_path, lab):
    lab.full(tmp_path / "a", 5)
    other = fs.SampleTable(keys=("x",), digests=(lab.digest(0),), splits=("train",))
    fs.create(tmp_path / "b").put_samples("toy", other, source="there")
    before = lab.files(tmp_path / "b")
    with pytest.raises(BadRequestError, match="another data set 'toy'"):
        plan_transfer(fs.open(tmp_path / "a"), fs.open(tmp_path / "b"))
    assert lab.files(tmp_path / "b") == before


def test_a_block_that_somebody_is_writing_is_waited_for(tmp_path, lab, monkeypatch):
    monkeypatch.setattr(copying, "_LOOK_AGAIN_SECONDS", 0.01)
    _, run = lab.full(tmp_path / "a", N)
    target = fs.create(tmp_path / "b")
    lease = leases.acquire(target.objects, run.path, 1)
    timer = threading.Timer(0.3, lease.release)
    timer.start()
    one = only(copy(tmp_path / "a", tmp_path / "b"))
    timer.join()
    assert (one.problems, one.copied) == ([], 6)
    monkeypatch.setattr(copying, "_PATIENCE_SECONDS", 0.05)
    lease = leases.acquire(fs.create(tmp_path / "c").objects, run.path, 1)
    one = only(copy(tmp_path / "a", tmp_path / "c"))
    (problem,) = one.problems
    assert f"{run.path} block 1 is being written by" in problem
    assert check_rows(tmp_path / "c", lab) == 2 * (N - 64)
    lease.release()
    assert only(copy(tmp_path / "a", tmp_path / "c")).problems == []


def test_images_that_change_in_the_target_after_the_plan_are_left_out(tmp_path, lab):
    lab.full(tmp_path / "a", 20)
    target = fs.create(tmp_path / "b")
    target.put_samples("toy", lab.table(20), source="made up")
    plan = plan_transfer(fs.open(tmp_path / "a"), target)
    target.put_samples("toy", lab.table(20, [7]), source="made up")
    (one,) = transfer(plan, target, nothing)
    assert ["1 images changed in the target meanwhile" in problem for problem in one.problems] == [True, True]
    run = fs.open(tmp_path / "b").dataset("toy").runs()[0]
    assert run.valid(list(lab.LAYERS)).tolist() == [row != 7 for row in range(20)]


def test_a_target_that_fails_ends_the_copy_and_keeps_what_is_committed(tmp_path, lab, remote, monkeypatch):
    lab.full(tmp_path / "a", 6 * 64)
    puts = []

    def ask(kind, key):
        if kind == "put" and "/up1/c." in key:
            puts.append(key)
            if len(puts) > 3:
                raise StorageError("no room there", hint="make some")

    monkeypatch.setattr(remote, "ask", ask)
    with pytest.raises(StorageError, match="no room there"):
        copy(tmp_path / "a", "fake://x")
    assert not [key for key in remote.content if key.startswith(f"{INTERNAL}/leases/")]
    monkeypatch.undo()
    monkeypatch.setattr(store, "objects_at", lambda url: remote if str(url) == "fake://x" else LOCAL(url))
    check_rows("fake://x", lab)
    one = only(copy(tmp_path / "a", "fake://x"))
    assert (one.problems, one.digests[0]) == ([], one.digests[1])


LOCAL = store.objects_at


def kill_at_random(tmp_path, lab, workers, kills):
    rng = random.Random(kills)
    techniques = [f"controlnet:c{i}" for i in range(4)]
    for technique in techniques:
        lab.full(tmp_path / "a", 200, technique=technique)
    begin = time.perf_counter()
    result, _ = workers.run(**{"from": str(tmp_path / "a")}, url=tmp_path / "undisturbed")
    seconds = {"pid": time.perf_counter() - begin, "filling": result["seconds"]}
    killed = tries = 0
    urls, copied = {}, []
    while killed < kills:
        # Every few deaths begin with nothing again, so that there is something left to copy.
        url = tmp_path / f"b{tries // 4}"
        urls[url] = None
        phase = "filling" if tries % 3 else "pid"
        tries += 1
        when = rng.uniform(0, seconds[phase] * 0.6)
        killed += workers.kill_after(phase, when, **{"from": str(tmp_path / "a")}, url=url)
        copied.append(check_rows(url, lab) if (url / "zarr.json").exists() else 0)
    theirs = {n: d for n, d in lab.files(tmp_path / "undisturbed").items() if INTERNAL not in n}
    for url in urls:
        result, _ = workers.run(**{"from": str(tmp_path / "a")}, url=url)
        assert result["error"] is None
        for one in copy(tmp_path / "a", url).values():
            assert (one.copied, one.problems, one.digests[0]) == (0, [], one.digests[1])
        ours = lab.files(url)
        assert not [name for name in ours if name.endswith(".partial")]
        assert {name: data for name, data in ours.items() if INTERNAL not in name} == theirs
    return sum(0 < rows < 2 * 200 * len(techniques) for rows in copied)


def test_killed_at_random_moments_and_resumed_equals_undisturbed(tmp_path, lab, workers):
    assert kill_at_random(tmp_path, lab, workers, 20) > 0  # deaths in the middle of it


def test_so_much_is_under_way_at_once_and_no_more():
    lock, held, most = threading.Lock(), [], []

    def do(size):
        with lock:
            held.append(size)
            most.append((len(held), sum(held)))
        time.sleep(0.005)
        with lock:
            held.remove(size)
        return -size

    half = MAX_BYTES // 2
    sizes = [half, half, 3 * half, 1, 1, 1, 1, 1, half + 1, half]
    done = list(at_once(do, iter(sizes), size=lambda size: size, count=3))
    assert sorted(done) == sorted((size, -size) for size in sizes)
    assert max(count for count, _ in most) == 3
    assert all(total <= MAX_BYTES or count == 1 for count, total in most)


def test_an_error_waits_for_what_is_under_way():
    ended = []

    def do(number):
        if number == 0:
            raise ValueError("the first")
        time.sleep(0.05)
        ended.append(number)

    with pytest.raises(ValueError, match="the first"):
        list(at_once(do, range(100), size=lambda _: 1, count=4))
    assert 1 <= len(ended) <= 6
