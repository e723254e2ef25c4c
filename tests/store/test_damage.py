"""Files that are broken on purpose: found by `verify` and by the read that touches them, and mended."""

from __future__ import annotations

import random

import numpy as np
import pytest

import featstore.store as fs
from featstore.errors import CorruptError, FeatstoreError, NotFoundError, StorageError
from featstore.store.verify import verify

N = 70

KINDS = {
    "root": "zarr.json",
    "dataset": "toy/zarr.json",
    "model": "toy/reference/zarr.json",
    "technique": "toy/reference/{family}/zarr.json",
    "run": "{run}/zarr.json",
    "layer": "{run}/up1/zarr.json",
    "shard": "{run}/up1/c.0.0.0.0",
    "last shard": "{run}/up1/c.1.0.0.0",
    "committed group": "{run}/committed/zarr.json",
    "committed": "{run}/committed/up1/zarr.json",
    "record": "{run}/committed/up1/c.0",
    "table": "toy/samples/zarr.json",
    "key array": "toy/samples/key/zarr.json",
    "split array": "toy/samples/split/zarr.json",
    "digest array": "toy/samples/digest/zarr.json",
    "keys": "toy/samples/key/c.0",
    "splits": "toy/samples/split/c.0",
    "digests": "toy/samples/digest/c.0.0",
    "copy of keys": "catalog/toy~samples~key~0",
    "copy of splits": "catalog/toy~samples~split~0",
    "copy of digests": "catalog/toy~samples~digest~0",
    "copy of the run": "catalog/toy~reference~{family}~t050.json",
    "copy of the data set": "catalog/toy.json",
    "note of complete blocks": "catalog/toy~reference~{family}~t050.complete",
    "mark": "catalog/toy~reference~{family}~t050.mark",
    "catalog snapshot": "catalog.json",
}
READ = {"dataset", "run", "layer", "shard", "last shard", "committed", "record", "keys", "splits", "digests"}
"""What a user's reads touch; the rest is there for other readers, for planning, or to restore something from."""


def path_of(kind, run):
    return KINDS[kind].format(run=run.path, family=run.path.split("/")[2])


def read_all(url):
    """Everything that a user reads: the way from the URL to every value."""
    dataset = fs.open(url).dataset("toy")
    assert len(dataset.samples.table()) == N
    run = dataset.run("controlnet:canny+lora")
    assert run.valid(list(run.layers)).all()
    return {layer: run.numpy(layer, range(run.n_images)) for layer in run.layers}


def check(url):
    return verify(fs.open(url))


def extract_again(url, lab):
    store, run = lab.start(url, N)
    lab.fill(run)
    store.finish([run])


def full_with_mark(url, lab):
    """A complete store of which something was uncommitted once: an image had changed for a while."""
    lab.full(url, N)
    lab.full(url, N, changed=[3])
    return lab.full(url, N)


def test_a_sound_store(tmp_path, lab):
    lab.full(tmp_path / "s", N)
    seen = []
    report = verify(fs.open(tmp_path / "s"), progress=lambda done, total: seen.append((done, total)))
    image_bytes = (3 * 4 * 4 + 2 * 8 * 8) * 2
    assert report.to_json() == {
        "checked_images": N,
        "checked_bytes": N * image_bytes,
        "corrupt": [],
        "incomplete": [],
        "nonfinite": [],
        "orphans": [],
        "ok": True,
    }
    assert seen == [(i, 4) for i in range(1, 5)]
    before = lab.files(tmp_path / "s")
    assert verify(fs.create(tmp_path / "s"), repair=True).repaired == 0
    assert lab.files(tmp_path / "s") == before


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bits(tmp_path, lab, kind):
    """Each bit is found by `verify` and by the read that touches it, and repair plus extract restore all."""
    _, run = full_with_mark(tmp_path / "s", lab)
    pristine, values = lab.files(tmp_path / "s"), read_all(tmp_path / "s")
    name = path_of(kind, run)
    path = tmp_path / "s" / name
    sound = path.read_bytes()
    rng = random.Random(kind)
    for turn in range(40):
        data = bytearray(sound)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        if kind == "root":
            for function in (fs.open, fs.create):
                with pytest.raises(FeatstoreError) as caught:
                    function(tmp_path / "s")
                assert caught.value.hint
            continue
        report = check(tmp_path / "s")
        assert not report.ok
        assert report.corrupt
        assert all(name in text or "zarr.json" in text for text in report.corrupt[:1])
        assert "verify --repair" in report.corrupt[0]
        if kind in READ:
            with pytest.raises(CorruptError) as caught:
                read_all(tmp_path / "s")
            assert "verify --repair" in caught.value.hint
        else:
            got = read_all(tmp_path / "s")
            assert all(np.array_equal(got[layer], values[layer]) for layer in values)
        if turn % 8 == 0:
            assert verify(fs.create(tmp_path / "s"), repair=True).repaired
            after = check(tmp_path / "s")
            assert not after.corrupt
            assert bool(after.incomplete) == (kind in ("shard", "last shard", "record"))
            extract_again(tmp_path / "s", lab)
            assert check(tmp_path / "s").ok
            assert lab.files(tmp_path / "s") == pristine
            sound = path.read_bytes()  # A note and a mark are not the same ones.
    path.write_bytes(sound)
    assert check(tmp_path / "s").ok


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "root"])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99, None])
def test_truncated_and_missing_files(tmp_path, lab, kind, keep):
    _, run = full_with_mark(tmp_path / "s", lab)
    pristine = lab.files(tmp_path / "s")
    name = path_of(kind, run)
    path = tmp_path / "s" / name
    if keep is None:
        path.unlink()
    else:
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * keep)])
    report = check(tmp_path / "s")
    if keep is None and kind in ("catalog snapshot", "note of complete blocks", "mark"):
        assert report.ok  # A finished extraction writes the first two, and a note without its mark counts for nothing.
    else:
        assert not report.ok
        assert report.corrupt
    if kind in READ:
        with pytest.raises((FeatstoreError, AssertionError)):
            read_all(tmp_path / "s")
    verify(fs.create(tmp_path / "s"), repair=True)
    extract_again(tmp_path / "s", lab)
    assert check(tmp_path / "s").ok
    assert lab.files(tmp_path / "s") == pristine


def test_repair_recomputes_nothing_but_the_broken_row(tmp_path, lab):
    _, run = lab.full(tmp_path / "s", N)
    pristine = lab.files(tmp_path / "s")
    path = tmp_path / "s" / run.path / "up1" / "c.0.0.0.0"
    data = bytearray(path.read_bytes())
    data[5 * 100] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptError, match=r"'img0005'.*crc32c"):
        run.numpy("up1", range(10))
    np.testing.assert_array_equal(run.numpy("up1", [4, 6]), lab.maps_of(run, [4, 6], "up1"))
    with pytest.raises(StorageError, match="reading only"):
        verify(fs.open(tmp_path / "s"), repair=True)
    report = verify(fs.create(tmp_path / "s"), repair=True)
    assert report.repaired == 1
    assert "'img0005': its bytes do not match their crc32c; uncommitted" in report.corrupt[0]
    assert report.incomplete == (f"{run.path}/up1: 1 absent of {N} images",)
    assert np.flatnonzero(~run.valid(list(lab.LAYERS))).tolist() == [5]
    extract_again(tmp_path / "s", lab)
    assert lab.files(tmp_path / "s") == pristine


def test_nan_and_inf_are_found(tmp_path, lab):
    _, run = lab.start(tmp_path / "s", 10)
    maps = {layer: lab.maps_of(run, range(10), layer) for layer in lab.LAYERS}
    maps["up1"][3, 0, 1, 2] = np.nan
    maps["up1"][7, 2, 0, 0] = -np.inf
    run.write_block(0, range(10), maps)
    report = verify(fs.create(tmp_path / "s"))
    assert not report.corrupt
    assert len(report.nonfinite) == 1
    assert "'img0003', 'img0007': NaN or inf" in report.nonfinite[0]
    verify(fs.create(tmp_path / "s"), repair=True)
    assert np.flatnonzero(run.committed("up1") == 0).tolist() == [3, 7]
    assert run.committed("attn-up-cross-2").all()


def test_incomplete_layers_are_counted(tmp_path, lab):
    _, run = lab.start(tmp_path / "s", N)
    lab.fill(run, rows=range(60))
    store = fs.create(tmp_path / "s")
    store.put_samples("toy", lab.table(N, changed=[1]), source="made up")
    report = verify(store)
    assert not report.ok
    assert report.incomplete == tuple(
        f"{run.path}/{layer}: 10 absent and 1 stale of {N} images" for layer in sorted(lab.LAYERS)
    )
    assert report.checked_images == 60


def test_the_root_can_be_copied_from_another_store(tmp_path, lab):
    lab.full(tmp_path / "s", 10)
    lab.start(tmp_path / "other", 3, seed=3)
    root = tmp_path / "s" / "zarr.json"
    root.unlink()
    for function in (fs.open, fs.create):
        with pytest.raises(CorruptError, match=r"zarr\.json of store .* is gone") as caught:
            function(tmp_path / "s")
        assert "from another store" in caught.value.hint
    root.write_bytes((tmp_path / "other" / "zarr.json").read_bytes())
    assert check(tmp_path / "s").ok


def test_a_swapped_shard_is_found(tmp_path, lab):
    """Sound bytes in the wrong place: shards of another layer's size, and a block that holds fewer rows."""
    _, run = lab.full(tmp_path / "s", 128)
    folder = tmp_path / "s" / run.path
    (folder / "up1" / "c.0.0.0.0").write_bytes((folder / "attn-up-cross-2" / "c.0.0.0.0").read_bytes())
    report = check(tmp_path / "s")
    assert "its index is broken" in report.corrupt[0]
    with pytest.raises(CorruptError, match="its index is broken"):
        run["up1"].compute(scheduler="sync")


def test_verify_one_data_set(tmp_path, lab):
    lab.full(tmp_path / "s", 10)
    fs.create(tmp_path / "s").put_samples("other", lab.table(3), source="made up")
    (tmp_path / "s" / "toy" / "zarr.json").write_bytes(b"{}")
    assert verify(fs.open(tmp_path / "s"), dataset="other").ok
    assert not verify(fs.open(tmp_path / "s"), dataset="toy").ok
    with pytest.raises(NotFoundError, match="there are"):
        verify(fs.open(tmp_path / "s"), dataset="nope")


def test_a_run_that_the_catalog_lost_and_its_own_document_broke(tmp_path, lab):
    _, run = lab.full(tmp_path / "s", 10)
    (tmp_path / "s" / run.path / "zarr.json").write_bytes(b"{}")
    entry = next((tmp_path / "s" / "catalog").glob("toy~reference~*.json"))
    entry.write_bytes(b"{}")
    report = verify(fs.create(tmp_path / "s"), repair=True)
    assert any(f"delete {run.path}/ and extract again" in text for text in report.corrupt)
