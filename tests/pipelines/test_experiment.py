"""An experiment from end to end, small: every feature once, every setting once, compared on the same splits."""

from __future__ import annotations

import csv
import json
import shutil
import statistics

import numpy as np
import pytest
from PIL import Image

import featstore
from featstore.content_shift import laplacian_norm
from featstore.errors import BadRequestError, NotCommittedError
from featstore.pipelines.experiment import file, planning, results, running
from featstore.pipelines.experiment.config import ExperimentConfig
from featstore.pipelines.experiment.planning import make_experiment_plan
from featstore.pipelines.experiment.running import run_experiment

LAYER = "up-level3-repeat2-vit-out"
TEXT = """
title = "Discs | and what a prompt does"
dataset = "folder:{folder}"
model = "reference"

[extract]
prompt = "a horse, high quality"
layers = "up-level3-repeat2-vit-out"

[head]
ensemble = 2
splits = 3
max_steps = 30

[axes]
extract.techniques = ["basic", "prompt", "basic,prompt"]
extract.timesteps = [50, 201]

[[compare]]
along = "techniques"
to = "basic"
"""

pytestmark = pytest.mark.usefixtures("tiny")


@pytest.fixture
def config(labelled, tmp_path):
    def make(text=TEXT, **changes):
        values = {
            "experiment": file.parse("discs", text.replace("{folder}", str(labelled))),
            "store": str(tmp_path / "s.zarr"),
            "out": tmp_path / "out",
            "device": "cpu",
        }
        return ExperimentConfig(**(values | changes))

    return make


@pytest.fixture
def trained(monkeypatch):
    """Counts the settings that are trained."""
    counted = []
    inner = running.train_head

    def count(training, progress):
        counted.append(training)
        return inner(training, progress)

    monkeypatch.setattr(running, "train_head", count)
    return counted


def runs_of(store, dataset="discs"):
    return featstore.open(str(store)).dataset(dataset).runs()


def test_every_feature_is_extracted_once_and_every_setting_trained_once(config, trained, tmp_path):
    plan = make_experiment_plan(config())
    # four runs and two buckets of both: 4 * 8 + 2 * 2 * 8 images
    assert (plan.passes_asked, plan.passes_made, plan.passes_todo) == (64, 32, 32)
    assert plan.trainings_todo == 18
    assert plan.training_seconds is None
    assert not (tmp_path / "s.zarr").exists()
    first = run_experiment(config(), plan)
    assert first.passes_now == 32
    assert len(runs_of(tmp_path / "s.zarr")) == 4
    assert len(trained) == 6
    assert not any(one.reused for one in first.outcomes)

    again = make_experiment_plan(config())
    assert (again.passes_asked, again.passes_made, again.passes_todo) == (64, 32, 0)
    assert again.trainings_todo == 0
    second = run_experiment(config(), again)
    assert second.passes_now == 0
    assert len(trained) == 6
    assert all(one.reused for one in second.outcomes)
    assert [one.scores for one in second.outcomes] == [one.scores for one in first.outcomes]
    assert second.compared == first.compared


def test_settings_are_compared_on_the_same_splits(config):
    result = run_experiment(config())
    scored = {one.planned.setting.name: one.scores.metrics["miou"] for one in result.outcomes}
    assert [(one.a, one.b) for one in result.compared] == [
        (f"{name}, t{timestep}", f"basic, t{timestep}") for name in ("prompt", "basic,prompt") for timestep in (50, 201)
    ]
    for one in result.compared:
        pairs = zip(scored[one.a].splits, scored[one.b].splits, strict=True)
        assert one.found.difference == pytest.approx(statistics.fmean(a - b for a, b in pairs))
        assert one.found.pairs == 3
    assert len({one.planned.training.seed for one in result.outcomes}) == 1
    alone = run_experiment(config(only=("prompt, t50",), out=config().out / "alone"))
    assert alone.outcomes[0].scores.metrics["miou"] == scored["prompt, t50"]
    assert alone.compared == ()


def test_an_interrupted_experiment_goes_on_where_it_was(config, monkeypatch):
    count = 0
    inner = running.train_head

    def interrupted(training, progress):
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return inner(training, progress)

    monkeypatch.setattr(running, "train_head", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(config())
    plan = make_experiment_plan(config())
    assert (plan.passes_todo, plan.trainings_todo) == (0, 12)
    assert plan.training_seconds > 0
    assert [one.reused for one in run_experiment(config(), plan).outcomes] == [True, True, False, False, False, False]


def test_what_decides_a_score_decides_whether_it_is_made_again(config, labelled, trained, tmp_path):
    run_experiment(config())
    for changes, anew in (
        ({"splits": 2}, 6),
        ({"ensemble": 1}, 6),
        ({"max_steps": 10}, 6),
        ({"max_steps": 1000}, 0),  # no setting has as many
        ({"seed": 1}, 6),
    ):
        assert sum(one.known is None for one in make_experiment_plan(config(**changes)).settings) == anew, changes
    folder = shutil.copytree(labelled, tmp_path / "own" / "discs")
    own = config(
        experiment=file.parse("discs", TEXT.replace("{folder}", str(folder))), store=str(tmp_path / "own.zarr")
    )
    run_experiment(own)
    shutil.copy(folder / "train" / "0.png", folder / "train" / "1.png")
    changed = make_experiment_plan(own)
    assert changed.passes_todo == 4
    assert all(one.known is None for one in changed.settings)


def test_damaged_scores_are_made_again(config, trained):
    result = run_experiment(config(only=("basic, t50",)))
    planned = result.outcomes[0].planned
    for damage in (b"", b"[]", b"{}", json.dumps({"key": planned.key, "metrics": 3}).encode()):
        planned.file.write_bytes(damage)
        assert planning.read_scores(planned.file, planned.key) is None


def test_a_run_that_does_not_depend_on_what_differs_is_one(config, tmp_path):
    text = TEXT.replace('prompt = "a horse, high quality"\n', "").replace(
        "extract.timesteps = [50, 201]", 'extract.prompt = { low = "a bad horse", high = "a good horse" }'
    )
    plan = make_experiment_plan(config(text))
    # basic does not read the text: one run of it, two of prompt
    assert (plan.passes_asked, plan.passes_made) == (64, 24)
    assert sum(len(one.runs) for one in plan.extractions) == 3
    result = run_experiment(config(text), plan)
    assert result.passes_now == 24
    scored = {one.planned.setting.name: one for one in result.outcomes}
    basic, prompt = ([scored[f"{name}, prompt {text}"] for text in ("low", "high")] for name in ("basic", "prompt"))
    assert basic[0].planned.key == basic[1].planned.key
    assert basic[0].scores == basic[1].scores
    texts = {run.fingerprint: run.recipe.parameters["prompt"] for run in runs_of(tmp_path / "s.zarr")}
    assert [texts[one.planned.runs[0]] for one in prompt] == ["a bad horse", "a good horse"]
    assert prompt[0].scores != prompt[1].scores


def test_layers_that_settings_read_are_taken_in_one_pass(config, tmp_path):
    text = TEXT.replace('layers = "up-level3-repeat2-vit-out"\n', "").replace(
        "extract.timesteps = [50, 201]",
        'extract.layers = ["up-level3-repeat2-vit-out", "up-level1-upsampler-out,up-level3-repeat2-vit-out"]',
    )
    result = run_experiment(config(text))
    assert (result.plan.passes_asked, result.plan.passes_made, result.passes_now) == (64, 16, 16)
    assert all(set(run.layers) == {LAYER, "up-level1-upsampler-out"} for run in runs_of(tmp_path / "s.zarr"))
    read = [one.planned.training.bucket.layers for one in result.outcomes]
    assert read[0] == LAYER
    assert read[1] == f"up-level1-upsampler-out,{LAYER}"


def test_only_what_is_asked_for_is_extracted(config):
    text = TEXT.replace('["basic", "prompt", "basic,prompt"]', '["basic"]').replace("[50, 201]", "[50]")
    text += '\n[[setting]]\nname = "late"\nextract = { techniques = "prompt" }\n'
    # the axis goes before the setting's own technique, so this is basic at 50 alone
    assert make_experiment_plan(config(text)).passes_made == 8
    plan = make_experiment_plan(config(only=("basic, t50", "prompt, t201")))
    made = {(run.recipe.technique, run.recipe.timestep) for one in plan.extractions for run in one.runs}
    assert made == {("basic", 50), ("prompt", 201)}
    with pytest.raises(BadRequestError, match=r"unknown setting 'basic, t51'.*basic, t50"):
        config(only=("basic, t51",))


def test_an_image_that_fails_stops_the_comparison(config, labelled, tmp_path):
    folder = shutil.copytree(labelled, tmp_path / "own" / "discs")
    (folder / "test" / "7.png").write_bytes((folder / "test" / "7.png").read_bytes()[:200])
    with pytest.raises(NotCommittedError, match=r"1 images cannot be extracted.*7"):
        run_experiment(config(experiment=file.parse("discs", TEXT.replace("{folder}", str(folder)))))


def test_settings_are_trained_side_by_side(config, tmp_path):
    one = run_experiment(config(only=("basic, t50", "prompt, t50")))
    two = run_experiment(config(only=("basic, t50", "prompt, t50"), workers=2, trained=tmp_path / "other"))
    assert not any(outcome.reused for outcome in two.outcomes)
    for a, b in zip(one.outcomes, two.outcomes, strict=True):
        assert a.planned.setting.name == b.planned.setting.name
        assert b.scores.metrics["miou"].splits == pytest.approx(a.scores.metrics["miou"].splits, abs=0.02)


def test_the_files_say_what_came_out(config):
    result = run_experiment(config())
    written = results.write_results(result, config().out)
    assert [path.name for path in written] == ["results.json", "results.csv", "results.md", "results.png"]
    value = json.loads(written[0].read_text())
    assert value["title"] == "Discs | and what a prompt does"
    assert (value["passes_asked"], value["passes_made"], value["passes_now"]) == (64, 32, 32)
    assert value["settings"][0]["axes"] == {"techniques": "basic", "timesteps": "50"}
    assert set(value["settings"][0]["metrics"]["miou"]) == {"mean", "std", "splits"}
    assert set(value["comparisons"][0]) == {"a", "b", "metric", "difference", "ci95", "p", "pairs"}
    rows = list(csv.DictReader(written[1].read_text().splitlines()))
    assert len(rows) == 6 * 3 * 3
    assert float(rows[0]["value"]) == value["settings"][0]["metrics"]["miou"]["splits"][0]
    text = written[2].read_text()
    assert "64 passes asked for, 32 made: 50 % saved; heads of 2 members, 30 steps." in text
    mean = value["settings"][0]["metrics"]["miou"]["mean"]
    assert f"| basic, t50 | miou | {100 * mean:.2f} |" in text
    assert f"| prompt, t50 | basic, t50 | miou | {100 * value['comparisons'][0]['difference']:+.2f} |" in text
    picture = np.asarray(Image.open(written[3]).convert("RGB"))
    assert picture.std() > 5


SCORED = """
[correlate]
to = "basic"
reference = 0
anchor = 501
"""


def test_scores_of_features_are_correlated_with_gains(config, tmp_path):
    text = TEXT.replace('["basic", "prompt", "basic,prompt"]', '["basic", "prompt", "controlnet"]') + SCORED
    result = run_experiment(config(text))
    # six runs, all three at 0, and basic at 501
    assert (result.plan.passes_asked, result.plan.passes_made) == (80, 80)
    found = result.correlated
    assert [row.setting for row in found.rows] == ["prompt, t50", "prompt, t201", "controlnet, t50", "controlnet, t201"]
    assert set(found.found) == {
        "score and gain in miou", "gain in score and gain in miou", "own score and gain in miou", "score and miou",
        "score of patterns and gain in miou", "gain in score of patterns and gain in miou",
    }  # fmt: skip
    dataset = featstore.open(str(tmp_path / "s.zarr")).dataset("discs")

    def maps(technique, timestep):
        return np.asarray(dataset.run(technique, timestep=timestep)[LAYER]).astype(np.float64)

    def by_hand(technique, timestep, origin="basic", *, pattern=False):
        names = (("basic", 0), ("basic", 501), (technique, timestep), (origin, 0))
        norms = [laplacian_norm(maps(*at)) for at in names]
        if pattern:
            norms = [np.stack([image / image.mean() for image in one]) for one in norms]
        zero, most, one, begin = norms
        far = np.abs(zero - most).sum((1, 2))
        return float(np.mean((far - np.abs(begin - one).sum((1, 2))) / far))

    scored = {one.planned.setting.name: one.scores.metrics["miou"].mean for one in result.outcomes}
    for row, at in zip(found.rows, [(name, t) for name in ("prompt", "controlnet") for t in (50, 201)], strict=True):
        assert row.score == pytest.approx(by_hand(*at), rel=1e-9)
        assert row.own_score == pytest.approx(by_hand(*at, origin=at[0]), rel=1e-9)
        assert row.score_gain == pytest.approx(by_hand(*at) - by_hand("basic", at[1]), abs=1e-9)
        assert row.pattern_score == pytest.approx(by_hand(*at, pattern=True), rel=1e-9)
        assert row.pattern_gain == pytest.approx(row.pattern_score - by_hand("basic", at[1], pattern=True), abs=1e-9)
        assert row.gain == pytest.approx(scored[row.setting] - scored[row.over])
    json.dumps(result.to_json(), allow_nan=False)
    text = results.markdown(result)
    assert f"| prompt, t50 | {found.rows[0].score:+.3f} |" in text


def test_the_anchor_has_a_score_of_0_and_the_reference_of_1(config):
    text = TEXT.replace('["basic", "prompt", "basic,prompt"]', '["basic", "prompt"]') + SCORED
    plan = make_experiment_plan(config(text))
    run_experiment(config(text), plan)
    first = plan.scored[0]
    assert running.content_score(first.reference, first.reference, first.anchor) == 1
    assert running.content_score(first.anchor, first.reference, first.anchor) == 0
    with pytest.raises(BadRequestError, match="the anchor has no content shift"):
        running.content_score(first.run, first.reference, first.reference)


def test_a_limit_leaves_images_out_of_every_setting(config):
    result = run_experiment(config(limit=7))
    assert {one.planned.images for one in result.outcomes} == {7}
    assert result.passes_now == 28
