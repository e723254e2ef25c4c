"""What makes features smaller, as people and scripts see it."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.usefixtures("tiny")

LAYERS = "up-level1-upsampler-out,up-level3-repeat2-vit-out,attn-up-cross-2"
BIG, SMALL, ATTENTION = LAYERS.split(",")


@pytest.fixture
def words(photos, tmp_path):
    return (
        *("extract", "--dataset", f"folder:{photos}", "--techniques", "basic", "--model", "reference"),
        *("--layers", LAYERS, "--limit", "4", "--store", tmp_path / "s.zarr", "--device", "cpu"),
    )


def test_the_plan_says_what_is_reduced_and_what_it_costs(run, run_json, words):
    whole = run_json(*words, "--dry-run")
    assert "reduced" not in whole["runs"][0]
    plan = run_json(*words, "--reduce", "pca:4", "--dry-run")
    assert (plan["runs"][0]["reduced"], plan["runs"][0]["fit_images"]) == ([BIG, SMALL], 10)
    assert plan["runs"][0]["layers"][BIG] == [4, *whole["runs"][0]["layers"][BIG][1:]]
    assert plan["bytes"] < whole["bytes"]
    text = run(*words, "--reduce", "pca:4", "--dry-run").stdout
    assert f"2 of 3 layers reduced to 4 channels; fitted on 10 images, a pass each; as they are: {ATTENTION}" in text
    assert "4 passes and 10 to fit what reduces channels" in text


def test_the_report_says_how_much_variance_is_kept(run, run_json, words):
    first = run(*words, "--reduce", "pca:4", "--precision", "int8")
    assert first.stdout == ""
    assert f"basic t050 {BIG}: " in first.stderr
    assert "channels reduced to 4, " in first.stderr
    assert "% of the variance kept" in first.stderr
    again = run_json(*words, "--reduce", "pca:4", "--precision", "int8")
    (one,) = again["runs"]
    assert (one["computed"], set(one["reduced"])) == (0, {BIG, SMALL})
    assert all(0.0 < value["explained"] <= 1.0 and value["channels"] > 4 for value in one["reduced"].values())
    (stored,) = run_json("info", "--store", words[words.index("--store") + 1])["datasets"][0]["runs"]
    assert {(layer["dtype"], layer["read_dtype"]) for layer in stored["layers"].values()} == {("int8", "float16")}
    assert stored["layers"][BIG]["shape"][0] == 4


def test_compressed_runs_are_bounded_above(run, words):
    assert "at most " in run(*words, "--compress", "--dry-run").stdout
    run(*words)
    plan = run(*words[:-6], "--store", words[-3], "--limit", "6", "--compress", "--dry-run").stdout
    assert "was created without --compress, and goes on so" in plan
    assert "at most" not in plan


@pytest.mark.parametrize(
    ("options", "words_of_error"),
    [
        (("--reduce", "pcs:4"), "unknown reduction 'pcs'"),
        (("--reduce", "pca:no"), "names no number of components"),
        (("--precision", "int9"), "did you mean 'int8'"),
    ],
)
def test_what_cannot_be_is_refused(refused, words, options, words_of_error):
    assert words_of_error in refused(*words, *options)
    assert not words[words.index("--store") + 1].exists()
