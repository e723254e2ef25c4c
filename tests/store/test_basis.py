"""What reduced a run's layers: written once, the same for all, checked, and restored from its copy."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tensorstore
import zarr

import featstore.store as fs
from featstore.errors import BadRequestError, CorruptError, IncompatibleError
from featstore.recipe import pca_of
from featstore.store import basis as bases
from featstore.store import metadata
from featstore.store.basis import Basis
from featstore.store.verify import verify

LAYERS = {"up1": (3, 4, 4), "attn-up-cross-2": (2, 8, 8)}
REDUCE = pca_of(3, "12" * 32)


def basis_of(seed, components=3, channels=8):
    rng = np.random.default_rng(seed)
    rows, _ = np.linalg.qr(rng.standard_normal((channels, channels)))
    return Basis(
        mean=rng.standard_normal(channels).astype(np.float32),
        components=np.ascontiguousarray(rows[:components], np.float32),
        explained=0.75,
    )


def create(root, lab, basis, reduce=REDUCE, layers=LAYERS):
    store = fs.create(root)
    dataset = store.put_samples("toy", lab.table(10), source="made up")
    options = {"batch_size": 8, "provenance": {}, "bases": {} if basis is None else {"up1": basis}}
    return dataset.create_run(lab.recipe(reduce=reduce), layers, **options)


def same(one, other):
    return one.mean.tobytes() == other.mean.tobytes() and one.components.tobytes() == other.components.tobytes()


@pytest.fixture
def run(tmp_path, lab):
    return create(tmp_path / "s", lab, basis_of(0))


@pytest.fixture
def files(run):
    root = run.dataset.objects.root
    return root / run.path / "reduce" / "up1" / "c.0.0", root / bases.copy_key(run.path, "up1")


def test_the_basis_is_kept_with_the_run_and_other_readers_open_it(run):
    kept, reduced = run.basis("up1"), run.layers["up1"].reduced
    assert same(kept, basis_of(0))
    assert (reduced.channels, reduced.explained, kept.explained) == (8, 0.75, 0.75)
    assert run.basis("attn-up-cross-2") is None
    path = run.dataset.objects.root / run.path / "reduce" / "up1"
    array = zarr.open_array(path, mode="r")
    assert (array.dtype, array.metadata.dimension_names) == (np.float32, ("row", "channel"))
    np.testing.assert_array_equal(array[:], np.vstack([basis_of(0).mean[None], basis_of(0).components]))
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    np.testing.assert_array_equal(tensorstore.open(spec, read=True).result().read().result(), array[:])


def test_the_first_basis_counts(run, lab):
    again = create(run.dataset.objects.root, lab, basis_of(1))
    assert same(again.basis("up1"), basis_of(0))
    assert again.layers["up1"].reduced == run.layers["up1"].reduced


def test_a_basis_of_a_writer_that_died_before_it_created_the_run_is_used(tmp_path, lab):
    path = create(tmp_path / "other", lab, basis_of(5)).path
    objects = fs.create(tmp_path / "s").objects
    bases.keep(objects, path, "up1", basis_of(0))
    run = create(tmp_path / "s", lab, basis_of(1))
    assert same(run.basis("up1"), basis_of(0))
    assert verify(fs.open(tmp_path / "s")).corrupt == ()


def test_a_run_is_adopted_with_its_basis_or_not_at_all(run, tmp_path, lab):
    def dataset(name):
        return fs.create(tmp_path / name).put_samples("toy", lab.table(10), source="made up")

    adopted = dataset("t").adopt(run, ["up1", "attn-up-cross-2"])
    assert same(adopted.basis("up1"), basis_of(0))
    assert adopted.layers == run.layers
    for basis in (basis_of(1), Basis(mean=basis_of(0).mean, components=basis_of(1).components, explained=0.75)):
        name = f"other{basis.components[0, 0]}{basis.mean[0]}"
        bases.keep(dataset(name).objects, run.path, "up1", basis)  # of a writer that died before it created the run
        with pytest.raises(IncompatibleError, match="different bases"):
            dataset(name).adopt(run, ["up1"])


def test_a_broken_basis_that_nothing_goes_by_is_replaced(tmp_path, lab):
    path = create(tmp_path / "other", lab, basis_of(5)).path
    objects = fs.create(tmp_path / "s").objects
    objects.put(bases.basis_key(path, "up1"), b"half of it")
    run = create(tmp_path / "s", lab, basis_of(1))
    assert same(run.basis("up1"), basis_of(1))


def test_layers_that_are_added_bring_their_own(run, lab):
    again = create(run.dataset.objects.root, lab, None, layers={"up2": (5, 2, 2)})
    assert again.layers["up2"].reduced is None
    assert same(again.basis("up1"), basis_of(0))


@pytest.mark.parametrize(
    ("basis", "reduce"),
    [
        (basis_of(0, components=2), REDUCE),
        (basis_of(0, components=3, channels=3), REDUCE),
        (basis_of(0), pca_of(4, "12" * 32)),
        (basis_of(0), None),
        (Basis(mean=np.full(8, np.nan, np.float32), components=basis_of(0).components, explained=0.5), REDUCE),
    ],
)
def test_bases_that_do_not_fit_are_refused(tmp_path, lab, basis, reduce):
    with pytest.raises(BadRequestError, match="layer 'up1'"):
        create(tmp_path / "s", lab, basis, reduce)


def test_every_flipped_bit_is_found_and_restored(run, files):
    root = run.dataset.objects.root
    for number, file in enumerate(files):
        whole = file.read_bytes()
        assert len(whole) == 4 * 4 * 8 + 4
        for place in range(0, len(whole), 1 + 9 * number):
            broken = bytearray(whole)
            broken[place] ^= 1 << (place % 8)
            file.write_bytes(broken)
            if number == 0:
                with pytest.raises(CorruptError, match="does not match its crc32c") as error:
                    run.basis("up1")
                assert "verify --repair" in error.value.hint
            assert any("crc32c" in text for text in verify(fs.open(root)).corrupt)
            assert verify(fs.create(root), repair=True).corrupt
            assert file.read_bytes() == whole
    assert verify(fs.open(root)).corrupt == ()


def test_a_sound_basis_of_another_run_is_refused(run, files, tmp_path, lab):
    other = create(tmp_path / "t", lab, basis_of(1))
    foreign = (tmp_path / "t" / bases.basis_key(other.path, "up1")).read_bytes()
    files[0].write_bytes(foreign)
    with pytest.raises(CorruptError, match="not the basis that its run's features were made with"):
        run.basis("up1")
    verify(fs.create(run.dataset.objects.root), repair=True)
    assert same(run.basis("up1"), basis_of(0))


def test_features_are_read_without_it_and_its_loss_is_said(run, files, lab):
    lab.fill(run)
    before = run.numpy("up1", range(10))
    for file in files:
        file.unlink()
    np.testing.assert_array_equal(run.numpy("up1", range(10)), before)
    with pytest.raises(CorruptError, match="is gone"):
        run.basis("up1")
    report = verify(fs.create(run.dataset.objects.root), repair=True)
    assert any("both damaged" in text and "extract it again" in text for text in report.corrupt)


def test_a_damaged_document_is_written_anew(run):
    file = run.dataset.objects.root / bases.document_key(run.path, "up1")
    whole = file.read_bytes()
    for data in (whole.replace(b"float32", b"float64"), b"", metadata.seal(bases.document(2, 8))):
        file.write_bytes(data)
        assert any("reduce/up1/zarr.json" in text for text in verify(fs.open(run.dataset.objects.root)).corrupt)
        verify(fs.create(run.dataset.objects.root), repair=True)
        assert file.read_bytes() == whole


@pytest.mark.parametrize(
    "value",
    [5, {"up1": 5}, {"up1": {}}, {"up1": {"channels": -1, "explained": 0.5, "sha256": "ab" * 32}},
     {"up1": {"channels": 1 << 40, "explained": 0.5, "sha256": "ab" * 32}},
     {"up1": {"channels": 8, "explained": "x", "sha256": "ab" * 32}},
     {"up1": {"channels": 8, "explained": 0.5, "sha256": "../../x"}},
     {"up1": {"channels": 8, "explained": 0.5, "sha256": 5}}],
)  # fmt: skip
def test_documents_that_describe_no_basis_are_refused(run, value):
    file = run.dataset.objects.root / run.path / "zarr.json"
    document = json.loads(file.read_bytes())
    document["attributes"]["featstore"]["reduced"] = value
    file.write_bytes(metadata.seal(document))
    with pytest.raises(CorruptError, match=r"basis|does not describe a run"):
        run.dataset.open_run(run.path)
