"""The gate as a whole: what it plans, finds and refuses, and that what cannot help is found out."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from featstore.content_shift import shift
from featstore.errors import BadRequestError
from featstore.pipelines.extract import extract
from featstore.pipelines.gate import GateConfig, Verdict, gate, make_gate_plan
from featstore.pipelines.gate.run import PICTURE_FILE
from featstore.pipelines.gate.statistics import Difference
from featstore.pipelines.gate.verdict import _decide
from featstore.pipelines.plan import ExtractConfig
from featstore.pipelines.progress import Silent
from featstore.techniques import SteeringOptions
from tests.tiny_transformers import build_tiny_pixart

PROMPT = SteeringOptions(prompt="a horse, high quality")
QUICK = {"steps": 4, "strength": 0.75, "device": "cpu"}


@pytest.fixture
def ask(photos):
    """Makes the configuration of a gate on ``photos`` with a few changes."""

    def make(**changes):
        values = {"dataset": f"folder:{photos}", "techniques": "prompt", "model": "reference", "limit": 4}
        return GateConfig(**({**values, **QUICK, "steering": PROMPT} | changes))

    return make


@pytest.fixture
def own_weights(monkeypatch):
    """`reference` is the embedded model, not the tiny stand-in."""
    monkeypatch.delenv("FEATSTORE_WEIGHTS", raising=False)


def run(config):
    return gate(make_gate_plan(config), Silent())


def by_name(report):
    return {(one.technique, one.timestep): one for one in report.judgements}


# what is planned


def test_images_are_spread_over_the_data_set_and_basic_is_always_judged(tiny, ask):
    plan = make_gate_plan(ask(techniques="prompt,cfg", timesteps=(50, 200)))
    assert plan.techniques == ("basic", "prompt", "cfg")
    assert [sample.key for sample in plan.samples] == ["00.png", "03.png", "06.png", "09.png"]
    assert plan.anchor == ("basic", 501)
    assert plan.layers
    assert not any(layer.startswith("attn-") for layer in plan.layers)
    assert {run.recipe.timestep for run in plan.extract.runs} == {0, 50, 200, 501}
    assert make_gate_plan(ask(techniques="prompt,basic")).techniques == ("basic", "prompt")
    assert len(make_gate_plan(ask(limit=99)).samples) == 10
    assert make_gate_plan(ask(layers="legacy")).layers != plan.layers


@pytest.mark.parametrize(
    ("anchor", "found"),
    [("basic@501", ("basic", 501)), ("300", ("basic", 300)), ("prompt", ("prompt", 501)), ("cfg@9", ("cfg", 9))],
)
def test_anchors(tiny, ask, anchor, found):
    assert make_gate_plan(ask(anchor=anchor)).anchor == found
    assert ask(anchor="controlnet@0.5@200").anchor_parts[0].expression == "controlnet@0.5"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"limit": 1}, "--limit 1 is not 2 or more"),
        ({"strength": 0.0}, "--strength 0 is not above 0"),
        ({"strength": 1.5}, "--strength 1.5"),
        ({"steps": 1}, "no step"),
        ({"timesteps": (0,)}, "--timesteps 0"),
        ({"timesteps": (50, 50)}, "listed twice"),
        ({"timesteps": (1000,)}, "timestep 1000 is outside"),
        ({"anchor": "basic@0"}, "no content shift"),
        ({"anchor": "basic@1000"}, "timestep 1000 is outside"),
        ({"anchor": "bassic@501"}, "unknown technique 'bassic'"),
        ({"anchor": "prompt,cfg@501"}, "2 passes"),
        ({"techniques": "promt"}, "unknown technique 'promt'"),
        ({"layers": "up-level9"}, "unknown layer 'up-level9'"),
        ({"layers": "mid-repeat0-res-out"}, "2 x 2"),
        ({"split": "tset"}, "unknown split 'tset'"),
    ],
)
def test_bad_requests_are_refused_before_a_weight_is_loaded(tiny, ask, monkeypatch, changes, words):
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(BadRequestError, match=words):
        make_gate_plan(ask(**changes))


# what is found


def test_scores_are_those_of_stored_features(tiny, ask, tmp_path):
    """The same figures from a store that an extraction wrote, in float32, by the formula written out."""
    config = ask(techniques="prompt,cfg", timesteps=(50, 200), limit=10)
    report = run(config)
    stored = extract(
        ExtractConfig(
            dataset=config.dataset, techniques="basic,prompt,cfg", model="reference", timesteps=(0, 50, 200, 501),
            store=str(tmp_path / "s.zarr"), precision="float32", steering=PROMPT, device="cpu", batch_size=8,
        )
    )  # fmt: skip
    runs = {(one.planned.recipe.technique, one.planned.recipe.timestep): one.run for one in stored.outcomes}
    features = {
        key: {layer: np.asarray(one.numpy(layer, np.arange(10))) for layer in report.plan.layers}
        for key, one in runs.items()
    }
    planned = stored.outcomes[0].planned
    reference, anchor = features["basic", 0], features["basic", 501]
    for key, one in by_name(report).items():
        scores = [
            1 - shift(reference[layer], features[key][layer]) / shift(reference[layer], anchor[layer])
            for layer in report.plan.layers
        ]
        assert one.score.mean == pytest.approx(np.mean(scores), abs=1e-4)
        assert list(one.layer_scores.values()) == pytest.approx([value.mean() for value in scores], abs=1e-4)
        patterns = [
            1 - shift(reference[layer], features[key][layer], pattern=True)
            / shift(reference[layer], anchor[layer], pattern=True)
            for layer in report.plan.layers
        ]  # fmt: skip
        assert one.pattern_score.mean == pytest.approx(np.mean(patterns), abs=1e-4)
        assert one.score.ci95[0] <= one.score.mean <= one.score.ci95[1]
        assert one.bytes_per_image == 2 * sum(int(np.prod(shape)) for shape in planned.layers.values())


def test_the_report_is_whole_and_repeats_to_the_bit(tiny, ask, tmp_path):
    config = ask(techniques="prompt,controlnet,cfg", out=tmp_path / "out")
    report = run(config)
    found = json.loads((tmp_path / "out" / "gate.json").read_text())
    assert found["anchor"] == "basic@501"
    assert [one["technique"] for one in found["techniques"]] == ["basic", "prompt", "controlnet", "cfg"]
    for one in found["techniques"]:
        assert {"score", "score_ci95", "ssim", "psnr_db", "closer_than_reference", "suppresses"} <= set(one)
        assert one["seconds_per_pass"] > 0
        assert one["bytes_per_image"] > 0
        assert one["verdict"] in {verdict.value for verdict in Verdict}
    assert found["img2img"]["pipelines"] == [
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionControlNetImg2ImgPipeline",
    ]
    assert found["img2img"]["scheduler"] == "PNDMScheduler"
    assert found["images"] == ["00.png", "03.png", "06.png", "09.png"]
    assert "lpips" not in found["techniques"][0]
    assert sum("lpips, clip, dino" in note for note in found["notes"]) == 1
    with Image.open(tmp_path / "out" / PICTURE_FILE) as picture:
        assert picture.width > picture.height  # five columns, four rows
    again = run(config)
    for one, other in zip(report.judgements, again.judgements, strict=True):
        assert (one.score, one.measures, one.closeness) == (other.score, other.measures, other.closeness)
    other = run(ask(techniques="prompt", seed=1))
    assert other.judgements[0].measures != again.judgements[0].measures


def test_a_family_without_img2img_is_judged_by_its_features_and_says_so(ask, tmp_path):
    folder = build_tiny_pixart(tmp_path / "pixart")
    report = run(ask(model=str(folder), techniques="prompt", limit=2, out=tmp_path / "out"))
    one = report.to_json()["techniques"][1]
    assert one["ssim"] is one["psnr_db"] is one["closer_than_reference"] is None
    assert np.isfinite(one["score"])
    assert "no Img2Img" in report.notes[0]
    assert not (tmp_path / "out" / PICTURE_FILE).exists()


def test_an_image_that_cannot_be_read_is_left_out_and_named(tiny, ask, photos):
    (photos / "03.png").write_bytes(b"no picture")
    report = run(ask())
    assert report.images == ("00.png", "06.png", "09.png")
    assert list(report.failed) == ["03.png"]
    for name in ("00.png", "06.png"):
        (photos / name).write_bytes(b"no picture either")
    with pytest.raises(BadRequestError, match="1 of the images"):
        run(ask())


# what cannot help


def test_what_has_no_strength_changes_nothing(tiny, ask, lora):
    report = run(ask(techniques=f"{lora}@0,controlnet@0"))
    for one in report.judgements[1:]:
        assert one.score_difference.ci95 == (0.0, 0.0)
        assert one.closeness.ci95 == (0.0, 0.0)
        assert one.pattern_difference.ci95 == (0.0, 0.0)
        assert one.score_difference.p == one.pattern_difference.p == one.closeness.p == 1.0
        assert not one.suppresses
        assert not one.closer_than_reference
        assert one.verdict is Verdict.NO_HELP
        assert "changes nothing" in one.advice
    assert report.extract_command.endswith(
        "--techniques basic --model reference --prompt 'a horse, high quality' --device cpu"
    )


def test_a_controlnet_fed_another_images_edges_does_not_help_and_its_own_do(own_weights):
    values = {"dataset": "toyhorse", "techniques": "controlnet,lora@0", "limit": 6, **QUICK, "steps": 8}
    own, other = run(GateConfig(**values)), run(GateConfig(**values, misled=True))
    good, bad = by_name(own)["controlnet", 50], by_name(other)["controlnet", 50]
    assert good.verdict is Verdict.HELPS
    assert good.closer_than_reference
    assert good.closeness.mean > 1
    assert all(one.above for one in good.differences.values())
    assert own.extract_command.startswith("featstore extract --dataset toyhorse --techniques controlnet")
    assert bad.verdict is Verdict.NO_HELP
    assert not bad.suppresses
    assert not bad.closer_than_reference
    assert bad.pattern_difference.ci95[1] <= 0
    assert bad.pattern_score.mean < good.pattern_score.mean
    assert bad.closeness.mean < good.closeness.ci95[0]
    assert by_name(own)["lora@0", 50].closeness.ci95 == (0.0, 0.0)


# what is concluded


def estimated(mean, half, spread=1.0):
    return Difference(mean=mean, ci95=(mean - half, mean + half), p=0.5, spread=spread)


@pytest.mark.parametrize(
    ("score", "since_0", "pictures", "verdict", "words"),
    [
        ((0.2, 0.1), (0.2, 0.1), (0.5, 0.1), Verdict.HELPS, "features and pictures come closer"),
        ((0.2, 0.1), (0.2, 0.1), None, Verdict.HELPS, "features come closer"),
        ((-0.2, 0.1), (0.1, 0.2), (0.5, 0.1), Verdict.HELPS, "pictures come closer"),
        ((-0.2, 0.1), (-0.2, 0.1), (0.5, 0.1), Verdict.UNCLEAR, "train a head"),
        ((-0.2, 0.1), (-0.2, 0.1), (0.0, 0.1), Verdict.NO_HELP, "features go farther"),
        ((0.0, 0.1), (0.0, 0.1), (-0.5, 0.1), Verdict.NO_HELP, "pictures go farther"),
        ((0.0, 0.0), (0.0, 0.0), (0.0, 0.0), Verdict.NO_HELP, "changes nothing"),
        ((-0.1, 0.2), (0.0, 0.2), (-0.1, 0.9), Verdict.NO_HELP, "no gain is seen"),
        ((0.001, 0.005), (0.0, 0.1), (0.01, 0.05), Verdict.NO_HELP, "next to nothing"),
        ((-0.1, 0.2), (0.0, 0.2), (0.4, 0.6), Verdict.UNCLEAR, "--limit 25"),
    ],
)
def test_verdicts(score, since_0, pictures, verdict, words):
    found, advice, more = _decide(
        "prompt", 16, estimated(*score), estimated(*since_0), None if pictures is None else estimated(*pictures)
    )
    assert (found, words in advice) == (verdict, True), advice
    assert (more is not None) == ("--limit" in advice)
