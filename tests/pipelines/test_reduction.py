"""``--precision int8`` and ``--reduce pca:N`` through the whole pipeline."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from sklearn.decomposition import PCA

import featstore
from featstore.errors import BadRequestError, CorruptError, IncompatibleError, StorageError
from featstore.extraction.reduce import some_pixels
from featstore.pipelines import reduction
from featstore.pipelines.extract import execute, extract
from featstore.pipelines.plan import make_plan
from featstore.pipelines.progress import Silent
from featstore.store.precision import quantise
from featstore.store.verify import verify

pytestmark = pytest.mark.usefixtures("tiny")

LAYERS = "up-level1-upsampler-out,up-level3-repeat2-vit-out,attn-up-cross-2"
BIG, SMALL, ATTENTION = LAYERS.split(",")


def run_of(config, **changes):
    return featstore.open(config.store).dataset("photos").run("basic", **changes)


@pytest.fixture
def whole(config, tmp_path):
    """The maps of all images as the model has them, by layer."""
    wanted = config(layers=LAYERS, precision="float32", store=str(tmp_path / "whole"))
    extract(wanted)
    run = run_of(wanted)
    return {layer: run.numpy(layer, range(10)) for layer in run.layers}


def test_int8_is_the_quantised_features(config, whole):
    wanted = config(layers=LAYERS, precision="int8")
    plan = make_plan(wanted)
    values = sum(maps[0].size + 4 * len(maps[0]) for maps in whole.values())
    assert plan.bytes_todo == 10 * values
    report = execute(plan, Silent())
    assert report.to_json()["runs"][0]["bytes"] == 10 * values
    run = run_of(wanted)
    for layer, maps in whole.items():
        expected = quantise(maps)
        stored = run.reader(layer).stored(range(10))
        np.testing.assert_array_equal(stored.values, expected.values)
        np.testing.assert_array_equal(stored.scales, expected.scales)
    assert verify(featstore.open(wanted.store)).ok
    assert extract(wanted).passes == 0


def test_compression_changes_no_value_and_a_run_keeps_it(config, whole, tmp_path):
    plain, packed = config(layers=LAYERS), config(layers=LAYERS, compress=True, store=str(tmp_path / "packed"))
    assert make_plan(packed).bytes_todo == make_plan(plain).bytes_todo
    extract(config(layers=LAYERS, compress=True, limit=4, store=packed.store))
    for wanted in (plain, config(layers=LAYERS, store=packed.store)):
        plan = make_plan(wanted)
        assert plan.compressed(plan.runs[0]) is (wanted.store == packed.store)
        execute(plan, Silent())
    runs = [run_of(wanted) for wanted in (plain, packed)]
    assert [run.compressed for run in runs] == [False, True]
    assert runs[0].fingerprint == runs[1].fingerprint
    for layer in whole:
        assert runs[0].numpy(layer, range(10)).tobytes() == runs[1].numpy(layer, range(10)).tobytes()
    assert verify(featstore.open(packed.store)).ok


def test_precisions_are_runs_of_their_own(config):
    extract(config(layers=BIG))
    extract(config(layers=BIG, precision="int8"))
    with pytest.raises(BadRequestError, match="precision=int8"):
        run_of(config())


def reference_of(maps, digests, layer, components, seed=0):
    """The projection of all images, with scikit-learn's PCA of the same places of the same maps."""
    count = reduction.SAMPLE_VECTORS // len(maps)
    vectors = np.concatenate([some_pixels(one, d, layer, seed, count) for one, d in zip(maps, digests, strict=True)])
    pca = PCA(components, svd_solver="covariance_eigh").fit(vectors.astype(np.float64))
    signs = np.sign(pca.components_[np.arange(components), np.abs(pca.components_).argmax(axis=1)])
    axes = pca.components_ * signs[:, None]
    out = np.einsum("nc,bchw->bnhw", axes, maps.astype(np.float64) - pca.mean_[:, None, None])
    return out, pca.explained_variance_ratio_.sum()


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_layers_are_projected_onto_their_principal_components(config, whole, precision):
    channels = {layer: maps.shape[1] for layer, maps in whole.items()}
    components = channels[SMALL]
    assert channels[BIG] > components
    wanted = config(layers=LAYERS, precision=precision, reduce=f"pca:{components}")
    plan = make_plan(wanted)
    assert plan.runs[0].reduced == [BIG]
    assert plan.fit_passes == 10
    assert plan.to_json()["runs"][0]["fit_images"] == 10
    report = execute(plan, Silent()).to_json()["runs"][0]
    assert report["layers"][BIG][0] == components
    assert report["layers"][SMALL] == list(whole[SMALL].shape[1:])
    run = run_of(wanted)
    digests = run.dataset.samples.digests
    expected, explained = reference_of(whole[BIG], digests, BIG, components)
    assert report["reduced"] == {BIG: {"channels": channels[BIG], "explained": pytest.approx(explained, abs=1e-6)}}
    read = run.numpy(BIG, range(10)).astype(np.float64)
    scale = np.abs(expected).max(axis=(2, 3), keepdims=True) / 127
    tolerance = 1e-4 * np.abs(expected).max() if precision == "float32" else 0.6 * scale + 1e-3 * np.abs(expected).max()
    assert (np.abs(read - expected) <= tolerance).all()
    if precision == "float32":
        for layer in (SMALL, ATTENTION):
            np.testing.assert_array_equal(run.numpy(layer, range(10)), whole[layer])
    assert verify(featstore.open(wanted.store)).ok


def test_a_reduced_run_goes_on_with_the_basis_it_has(config, photos, monkeypatch):
    extract(config(layers=BIG, reduce="pca:4", limit=3))
    before = run_of(config())
    rows = {row: before.numpy(BIG, [row]) for row in range(3)}
    basis = before.basis(BIG)
    calls = []
    monkeypatch.setattr(reduction, "sample_of", lambda *args: calls.append(args) or range(10))
    report = extract(config(layers=BIG, reduce="pca:4"))
    assert (report.outcomes[0].computed, report.plan.fit_passes, calls) == (7, 0, [])
    after = run_of(config())
    for row, maps in rows.items():
        np.testing.assert_array_equal(after.numpy(BIG, [row]), maps)
    assert after.basis(BIG).components.tobytes() == basis.components.tobytes()


def test_the_sample_does_not_depend_on_limit_or_split_and_bytes_not_on_order(config, tmp_path):
    one = config(layers=BIG, reduce="pca:4", store=str(tmp_path / "one"))
    other = config(layers=BIG, reduce="pca:4", store=str(tmp_path / "other"))
    extract(one)
    extract(config(layers=BIG, reduce="pca:4", limit=2, store=other.store))
    extract(config(layers=BIG, reduce="pca:4", techniques="controlnet,basic", store=other.store))
    runs = [run_of(one), run_of(other)]
    assert runs[0].fingerprint == runs[1].fingerprint
    for row in range(10):
        assert runs[0].numpy(BIG, [row]).tobytes() == runs[1].numpy(BIG, [row]).tobytes()


def test_a_data_set_that_grows_keeps_its_run_but_takes_no_new_layer_of_a_changed_sample(config, photos):
    extract(config(layers=BIG, reduce="pca:4"))
    path = run_of(config()).path
    shutil.copy(photos / "03.png", photos / "99.png")
    report = extract(config(layers=BIG, reduce="pca:4"))
    assert [outcome.computed for outcome in report.outcomes] == [1]
    assert run_of(config()).path == path
    # The sample of then is still there: a layer can be added, fitted on it alone.
    report = extract(config(layers=f"{BIG},mid-repeat0-res-out", reduce="pca:4"))
    assert report.plan.fit_passes == 10
    assert run_of(config()).path == path
    shutil.copy(photos / "05.png", photos / "00.png")
    assert [outcome.computed for outcome in extract(config(layers=BIG, reduce="pca:4")).outcomes] == [1]
    with pytest.raises(IncompatibleError, match="no layer can be added"):
        make_plan(config(layers="up-level2-upsampler-out", reduce="pca:4"))


def test_another_number_of_components_is_another_run(config):
    extract(config(layers=BIG, reduce="pca:4"))
    extract(config(layers=BIG, reduce="pca:5"))
    with pytest.raises(BadRequestError, match=r"reduce\.components=5"):
        run_of(config())


def test_images_that_cannot_be_used_are_left_out_of_the_fit(config, photos):
    (photos / "04.png").write_bytes(b"no picture")
    report = extract(config(layers=BIG, reduce="pca:4"))
    assert set(report.failed) == {"04.png"}
    assert report.outcomes[0].computed == 9
    for file in photos.iterdir():
        file.write_bytes(b"no picture")
    with pytest.raises(BadRequestError, match="none of the 10 images that --reduce is fitted on can be used"):
        extract(config(layers=BIG, reduce="pca:6"))


def test_an_interrupted_fit_leaves_nothing_that_is_in_the_way(config, monkeypatch):
    def cut(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(reduction, "_images", cut)
        with pytest.raises(KeyboardInterrupt):
            extract(config(layers=BIG, reduce="pca:4"))
    assert featstore.open(config().store).dataset("photos").runs() == []
    # A basis without a run, as a writer leaves it that dies between the two.
    with monkeypatch.context() as patch:
        patch.setattr("featstore.store.catalog.put_entry", cut)
        patch.setattr("featstore.store.dataset.StoredDataset._run_document", cut)
        with pytest.raises(KeyboardInterrupt):
            extract(config(layers=BIG, reduce="pca:4"))
    assert extract(config(layers=BIG, reduce="pca:4")).outcomes[0].computed == 10
    assert verify(featstore.open(config().store)).ok


def test_a_damaged_basis_stops_the_run_before_weights_are_loaded(config, monkeypatch):
    wanted = config(layers=BIG, reduce="pca:4", limit=2)
    extract(wanted)
    run = run_of(wanted)
    file = run.dataset.objects.root / run.path / "reduce" / BIG / "c.0.0"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CorruptError, match="does not match its crc32c") as error:
        make_plan(config(layers=BIG, reduce="pca:4"))
    assert "verify --repair" in error.value.hint
    assert make_plan(wanted).passes_todo == 0  # nothing to compute: nothing needs it
    verify(featstore.store.create(wanted.store), repair=True)
    assert extract(config(layers=BIG, reduce="pca:4")).outcomes[0].computed == 8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reduce": "pac:4"}, "unknown reduction 'pac'"),
        ({"reduce": "pca"}, "names no number"),
        ({"reduce": "pca:-4"}, "names no number"),
        ({"reduce": "pca:0"}, "names no number"),
        ({"reduce": "pca:four"}, "names no number"),
        ({"precision": "int4"}, "int4"),
    ],
)
def test_what_cannot_be_is_refused(config, changes, words):
    with pytest.raises(BadRequestError, match=words):
        config(**changes)


def test_the_plan_refuses_what_the_disk_cannot_hold_at_the_precision_asked_for(config, monkeypatch):
    asked = {name: make_plan(config(precision=name)).bytes_todo for name in ("float16", "int8")}
    reduced = make_plan(config(precision="int8", reduce="pca:4")).bytes_todo
    assert reduced < asked["int8"] < asked["float16"]

    def full(free_bytes):
        usage = type("Usage", (), {"free": free_bytes})
        monkeypatch.setattr("shutil.disk_usage", lambda _: usage)

    full(asked["int8"])
    make_plan(config(precision="int8"))
    with pytest.raises(StorageError, match="GB free"):
        make_plan(config())
    full(asked["int8"] - 1)
    with pytest.raises(StorageError, match="GB free"):
        make_plan(config(precision="int8"))
    make_plan(config(precision="int8", reduce="pca:4"))
