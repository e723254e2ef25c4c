"""The report of a store, heads, a gate and an experiment: what it says, and what it refuses."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

import featstore.store
from featstore.errors import BadRequestError, CorruptError, NotFoundError
from featstore.pipelines.extract import extract
from featstore.pipelines.plan import ExtractConfig
from featstore.pipelines.reading import BucketConfig
from featstore.pipelines.report import ReportConfig, make_report
from featstore.pipelines.report.stores import Sampling, pictured_runs
from featstore.pipelines.train_head import TrainHeadConfig, train_head
from featstore.techniques import SteeringOptions

NASTY = "<img src=x onerror=alert(1)>&\"'</details>"
GATE = {
    "anchor": "basic@501",
    "images": 16,
    "techniques": [
        {
            "technique": "controlnet",
            "score": 0.523,
            "score_ci95": [0.49, 0.55],
            "ssim": 0.61,
            "psnr_db": 19.9,
            "closer_than_reference": True,
            "suppresses": True,
            "verdict": "helps",
        },
        {
            "technique": "lora:./x.safetensors",
            "score": -0.05,
            "score_ci95": [-0.1, 0.02],
            "ssim": None,
            "psnr_db": None,
            "closer_than_reference": None,
            "suppresses": False,
        },
    ],
    "extract_command": "featstore extract --techniques controlnet",
    "something new": {"a": [1]},
}
EXPERIMENT = {
    "title": "techniques by timestep",
    "settings": [
        {"name": "basic", "axes": {"t": 51}, "metrics": {"miou": {"mean": 0.614, "std": 0.011, "splits": [0.6, 0.62]}}},
        {"name": "controlnet", "metrics": {"miou": {"mean": 0.645, "std": 0.012, "splits": [0.63, 0.65]}}},
    ],
    "comparisons": [
        {"a": "controlnet", "b": "basic", "metric": "miou", "difference": 0.031, "ci95": [0.012, 0.048], "p": 0.03}
    ],
    "correlation": {
        "metric": "miou",
        "settings": [],
        "correlations": [{"of": "score and gain in miou", "rho": -0.481, "p": 0.0172, "settings": 24}, "torn"],
    },
    "passes_asked": 1920,
    "passes_made": 640,
}


def written(folder, name, value):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(value))
    return folder / name


def words(path):
    """The text of the page, tags taken out."""
    text = re.sub(r"<style>.*?</style>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return html.unescape(re.sub(r"<wbr>", "", re.sub(r"<(?!wbr)[^>]*>", " ", text)))


def images(path):
    """(alternative text, picture) of all pictures of the page."""
    found = re.findall(r'<img alt="([^"]*)" src="data:image/png;base64,([^"]*)">', path.read_text(encoding="utf-8"))
    return {
        html.unescape(name): np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
        for name, data in found
    }


@pytest.fixture(scope="module")
def head(labelled, features, tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads") / "both"
    bucket = BucketConfig(dataset=f"folder:{labelled}", techniques="basic,prompt", store=str(features))
    train_head(TrainHeadConfig(bucket=bucket, splits=2, ensemble=1, max_steps=5, device="cpu", out=folder))
    return folder


def test_a_store(features, labelled, tmp_path):
    sampling = Sampling(dataset=f"folder:{labelled}", images=3)
    result = make_report(ReportConfig(store=str(features), sampling=sampling, out=tmp_path / "r.html"))
    text = words(result.path)
    run = featstore.store.open(str(features)).dataset("discs").run("prompt")
    for part in (
        "discs: 8 images, 2 runs",
        "8\u00a0of\u00a08",
        run.fingerprint[:8],
        "up-level1-upsampler-out",
        "float16",
    ):
        assert part in text, part
    assert '"prompt": "a horse, high quality"' in text
    assert run.recipe.weights_digest in text
    assert "without features" not in text
    seen = images(result.path)
    assert len(seen) == 3 * 3
    for key in ("test/5.png", "train/4.png"):
        assert f"basic, t = 50: {key}" in seen
        np.testing.assert_array_equal(seen[f"input: {key}"], np.asarray(Image.open(labelled / key)))
    assert result.size_bytes == result.path.stat().st_size
    assert result.sections[0] == "discs: 8 images, 2 runs"


def test_without_the_images_at_hand_features_are_shown_alone(features, tmp_path):
    result = make_report(ReportConfig(store=str(features), sampling=Sampling(images=2), out=tmp_path / "r.html"))
    assert {name.split(":")[0] for name in images(result.path)} == {"basic, t = 50", "prompt, t = 50"}


def test_pictures_can_be_left_out(features, tmp_path):
    result = make_report(ReportConfig(store=str(features), sampling=Sampling(images=0), out=tmp_path / "r.html"))
    assert images(result.path) == {}


@pytest.mark.usefixtures("tiny")
def test_what_is_missing_is_listed_and_left_out_of_the_pictures(photos, tmp_path):
    store = str(tmp_path / "s.zarr")
    config = {"dataset": f"folder:{photos}", "store": store, "model": "reference", "device": "cpu"}
    extract(ExtractConfig(techniques="basic", **config))
    extract(ExtractConfig(techniques="prompt", limit=4, steering=SteeringOptions(prompt="a photo"), **config))
    extract(ExtractConfig(techniques="controlnet", limit=1, layers="attn-up-cross-2", **config))
    result = make_report(ReportConfig(store=store, out=tmp_path / "r.html"))
    text = words(result.path)
    assert "photos: images without features" in text
    assert "04.png, 05.png, 06.png and 3 more" in text
    runs, layers, rows = pictured_runs(featstore.store.open(store).dataset("photos").runs())
    assert [run.recipe.technique for run in runs] == ["basic", "prompt"]
    assert list(rows) == [0, 1, 2, 3]
    assert layers
    assert not [name for name in layers if name.startswith("attn")]
    assert "Not shown, for they have other layers or images: 1 of 3 runs" in text
    shown = {name.partition(": ")[2] for name in images(result.path)}
    assert shown == {"00.png", "01.png", "02.png", "03.png"}


def test_a_store_with_nothing_in_it(tmp_path):
    featstore.store.create(str(tmp_path / "s.zarr"))
    result = make_report(ReportConfig(store=str(tmp_path / "s.zarr"), out=tmp_path / "r.html"))
    assert "0 runs of 0 data sets" in words(result.path)


def test_heads(head, tmp_path):
    metrics = json.loads((head / "head.json").read_text())["metrics"]["splits"]
    result = make_report(ReportConfig(heads=(head,), out=tmp_path / "r.html"))
    text = words(result.path)
    assert "discs: segmentation, mIoU" in text
    assert f"{100 * metrics['miou']['mean']:.1f}" in text
    assert "2 splits" in text
    assert "both: basic,prompt at t = 50" in text
    assert "What the assigners of both chose" in text
    assert '"n_assigners": ' in text or '"assigners": ' in text


def test_a_gate(tmp_path):
    path = written(tmp_path / "g", "gate.json", GATE)
    for given in (path, path.parent):
        result = make_report(ReportConfig(gate=given, out=tmp_path / "r.html"))
        text = words(result.path)
        for part in ("0.523", "0.490 to 0.550", "-0.050", "19.900", "basic@501", "helps", "something new"):
            assert part in text, part
        assert "content shift is suppressed by controlnet." in text
        assert "featstore extract --techniques controlnet" in text


def test_a_gate_at_two_timesteps_says_which_and_shows_the_score_that_decides(tmp_path):
    strong = {"technique": "controlnet", "score": -0.231, "score_ci95": [-0.3, -0.1], "ssim": 0.43, "psnr_db": 16.4}
    rows = [
        {**strong, "timestep": 51, "pattern_score": -0.024, "pattern_score_ci95": [-0.06, 0.01], "suppresses": False},
        {**strong, "timestep": 501, "pattern_score": 0.144, "pattern_score_ci95": [0.097, 0.193], "suppresses": True},
    ]
    path = written(tmp_path, "gate.json", {"anchor": "basic@501", "techniques": rows})
    text = words(make_report(ReportConfig(gate=path, out=tmp_path / "r.html")).path)
    assert "content shift is suppressed by controlnet, t = 501." in text
    # once in the table of either score, once with the pictures' measures
    assert text.count("controlnet, t = 51 ") == 3
    assert text.index("0.097 to 0.193") < text.index("-0.300 to -0.100")
    assert text.index("Decides whether") < text.index("The paper's score.")


def test_an_experiment(tmp_path):
    written(tmp_path / "e", "results.json", EXPERIMENT)
    plot = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(plot).save(tmp_path / "e" / "results.png")
    result = make_report(ReportConfig(experiment=tmp_path / "e", out=tmp_path / "r.html"))
    text = words(result.path)
    for part in ("61.4", "64.5", "± 1.2", "controlnet against basic", "0.012 to 0.048", "p = 0.03", "67 % saved"):
        assert part in text, part
    for part in (
        "techniques by timestep: mIoU",
        "rank correlations",
        "score and gain in miou",
        "-0.481",
        "2 settings.",
    ):
        assert part in text, part
    np.testing.assert_array_equal(images(result.path)["plot of techniques by timestep"], plot)
    (tmp_path / "e" / "results.png").write_bytes(b"no picture")
    assert images(make_report(ReportConfig(experiment=tmp_path / "e", out=tmp_path / "r.html")).path) == {}


@pytest.mark.usefixtures("tiny")
def test_hostile_names_are_shown_as_text(photos, lora, tmp_path):
    folder = photos.rename(tmp_path / "ph<b>otos")
    (folder / "00.png").rename(folder / "00 <script>alert(1)<!-- '\".png")
    store = str(tmp_path / "s.zarr")
    technique = f"lora:{tmp_path / '<i>x'}.safetensors"
    shutil.copy(lora.removeprefix("lora:") + "/pytorch_lora_weights.safetensors", technique.removeprefix("lora:"))
    config = {"dataset": f"folder:{folder}", "store": store, "model": "reference", "device": "cpu", "limit": 2}
    extract(ExtractConfig(techniques=f"basic,{technique}", dataset_name="photos", **config))
    gate = written(
        tmp_path, "gate.json", {"anchor": NASTY, "techniques": [{"technique": NASTY, "score": NASTY, NASTY: NASTY}]}
    )
    results = {
        "title": NASTY,
        "settings": [{"name": NASTY, "metrics": {NASTY: {"mean": 0.5}}}, NASTY, {"metrics": NASTY}],
        "comparisons": [{"a": NASTY, "metric": NASTY, "difference": NASTY, "ci95": [NASTY, 1], "p": NASTY}],
    }
    written(tmp_path / "e", "results.json", results)
    result = make_report(
        ReportConfig(store=store, gate=gate, experiment=tmp_path / "e", title=NASTY, out=tmp_path / "r.html")
    )
    page = result.path.read_text(encoding="utf-8")
    tags = set(re.findall(r"<([a-zA-Z]+)", page))
    assert "script" not in tags
    assert tags <= {
        *("html", "head", "meta", "title", "style", "body", "main", "section", "h", "p", "table", "thead", "tbody"),
        *("tr", "th", "td", "div", "span", "b", "small", "img", "wbr", "details", "summary", "pre", "dl", "dt", "dd"),
    }
    assert " onerror" not in re.sub(r">[^<]*<", "><", page)
    text = words(result.path)
    assert "00 <script>alert(1)<!-- '\".png" in text
    assert text.count(NASTY) >= 8


def test_what_is_not_there_or_not_what_it_was_said_to_be(tmp_path, features, head):
    out = tmp_path / "r.html"
    with pytest.raises(BadRequestError, match="about nothing"):
        ReportConfig(out=out)
    with pytest.raises(BadRequestError, match=r"does not end in \.html"):
        ReportConfig(store=str(features), out=tmp_path / "r.pdf")
    with pytest.raises(BadRequestError, match=r"65 images.*0\.\.64"):
        ReportConfig(store=str(features), sampling=Sampling(images=65))
    with pytest.raises(NotFoundError, match=r"nowhere\.zarr"):
        make_report(ReportConfig(store=str(tmp_path / "nowhere.zarr"), out=out))
    with pytest.raises(NotFoundError, match=r"gate\.json") as caught:
        make_report(ReportConfig(gate=tmp_path / "gate.json", out=out))
    assert "featstore gate" in caught.value.hint
    for content, said in (("{", "no JSON"), ("[1]", "no JSON object"), ("{}", "lists no techniques")):
        (tmp_path / "gate.json").write_text(content)
        with pytest.raises(BadRequestError, match=said):
            make_report(ReportConfig(gate=tmp_path / "gate.json", out=out))
    (tmp_path / "gate.json").write_text("[" * 200_000)
    with pytest.raises(BadRequestError, match="no JSON"):
        make_report(ReportConfig(gate=tmp_path / "gate.json", out=out))
    with pytest.raises(NotFoundError, match=r"results\.json"):
        make_report(ReportConfig(experiment=tmp_path, out=out))
    with pytest.raises(NotFoundError, match="head"):
        make_report(ReportConfig(heads=(tmp_path,), out=out))
    damaged = shutil.copytree(head, tmp_path / "damaged")
    (damaged / "head.json").write_text((damaged / "head.json").read_text().replace("basic", "basis"))
    with pytest.raises(CorruptError, match="digest"):
        make_report(ReportConfig(heads=(damaged,), out=out))
    with pytest.raises(BadRequestError, match="'toyhorse' is not in the store; it has discs"):
        make_report(ReportConfig(store=str(features), sampling=Sampling(dataset="toyhorse"), out=out))
    assert not out.exists()
