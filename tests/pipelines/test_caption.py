"""Captioning: what is kept, what is made anew, what an interruption leaves, and what extraction does with it."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import featstore
from featstore.datasets.captions import read_document
from featstore.errors import BadRequestError, NotFoundError, StorageError
from featstore.models.backbones.captioner import Captioner
from featstore.models.captioners import CaptionerSource
from featstore.pipelines import caption as captioning
from featstore.pipelines.caption import CaptionConfig, caption, plan_captions
from featstore.pipelines.extract import execute, extract
from featstore.pipelines.plan import make_plan
from featstore.pipelines.progress import Silent
from featstore.techniques import SteeringOptions


@pytest.fixture
def job(photos, blip, tmp_path):
    """Makes the configuration of captioning ``photos`` with a few changes."""

    def make(**changes):
        values = {
            "dataset": f"folder:{photos}",
            "captioner": str(blip),
            "out": tmp_path / "captions.json",
            "batch_size": 4,
            "max_new_tokens": 5,
            "device": "cpu",
        }
        return CaptionConfig(**(values | changes))

    return make


@pytest.fixture
def no_weights(monkeypatch):
    def load(self, *_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(CaptionerSource, "load", load)


@pytest.fixture
def seen(monkeypatch):
    """How many images the captioner was shown, by batch."""
    counts = []
    genuine = Captioner.captions

    def counting(self, images, **options):
        counts.append(len(images))
        return genuine(self, images, **options)

    monkeypatch.setattr(Captioner, "captions", counting)
    return counts


def test_every_image_gets_the_text_that_the_captioner_writes_for_it_alone(job, photos, blip, seen):
    report = caption(job())
    assert seen == [4, 4, 2]
    written = json.loads(job().out.read_text(encoding="utf-8"))
    keys = [f"{n:02d}.png" for n in range(10)]
    assert list(written) == ["texts", "digests", "captioner"]
    assert list(written["texts"]) == list(written["digests"]) == keys
    captioner = CaptionerSource("x", blip).load("cpu", "float32")
    for key in keys:
        image = np.asarray(Image.open(photos / key).convert("RGB"))
        (text,) = captioner.captions([image], prompt="", max_new_tokens=5, batch_size=1)
        assert written["texts"][key] == text
    assert len(set(written["texts"].values())) > 2
    value = report.to_json()
    assert (value["images"], value["captioned"], value["reused"], value["failed"]) == (10, 10, 0, [])
    assert written["captioner"] == {
        "name": str(blip),
        "digest": CaptionerSource("x", blip).digest,
        "prompt": "",
        "max_new_tokens": 5,
    }


def test_a_finished_job_loads_nothing_and_writes_nothing(job, no_weights, request):
    out = job().out
    texts = {f"{n:02d}.png": f"by hand {n}" for n in range(10)}
    out.write_text(json.dumps(texts))
    before = out.read_bytes()
    report = caption(job())
    assert (report.captioned, report.to_json()["reused"]) == (0, 10)
    assert out.read_bytes() == before


def test_texts_stay_unless_their_image_has_changed(job, photos, seen):
    caption(job(limit=6))
    out = job().out
    document = json.loads(out.read_text(encoding="utf-8"))
    document["texts"] |= {"01.png": "corrected by hand", "09.png": "by hand", "elsewhere.png": "of another set"}
    out.write_text(json.dumps(document))
    shutil.copy(photos / "03.png", photos / "02.png")
    seen.clear()
    report = caption(job())
    # 02 has changed; 06, 07 and 08 were never seen.
    assert sum(seen) == report.captioned == 4
    after = read_document(out)
    assert list(after.texts) == [*(f"{n:02d}.png" for n in range(10)), "elsewhere.png"]
    assert after.texts["01.png"] == "corrected by hand"
    assert after.texts["09.png"] == "by hand"
    assert after.texts["02.png"] == after.texts["03.png"]
    assert after.digests["02.png"] == after.digests["03.png"]
    assert {"09.png", "elsewhere.png"}.isdisjoint(after.digests)


def test_an_interrupted_job_goes_on_and_ends_in_the_same_file(job, monkeypatch, tmp_path, seen):
    caption(job(out=tmp_path / "whole.json"))
    seen.clear()
    monkeypatch.setattr(captioning, "SAVE_EVERY_IMAGES", 4)
    states = []

    class Impatient(Silent):
        def advance(self, steps=1):
            states.append(job().out.exists())
            if len(states) == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        caption(job(), Impatient())
    assert states == [False, True], "the first batch was not saved before the second was through"
    assert len(read_document(job().out).texts) == 8
    assert seen == [4, 4]
    caption(job())
    assert seen == [4, 4, 2]
    assert job().out.read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_a_broken_image_is_named_and_tried_again(job, photos, seen):
    whole = (photos / "03.png").read_bytes()
    (photos / "03.png").write_bytes(whole[:200])
    (photos / "08.png").write_bytes(b"no picture")
    report = caption(job())
    assert list(report.failed) == ["03.png", "08.png"]
    assert {one["key"] for one in report.to_json()["failed"]} == {"03.png", "08.png"}
    assert seen == [4, 4]
    assert len(read_document(job().out).texts) == 8
    (photos / "03.png").write_bytes(whole)
    assert caption(job()).captioned == 1


def test_the_prompt_begins_texts_without_being_in_them(job, tmp_path):
    caption(job())
    caption(job(prompt="a photo of", out=tmp_path / "asked.json"))
    plain, asked = read_document(job().out), read_document(tmp_path / "asked.json")
    assert plain.texts != asked.texts
    assert asked.captioner["prompt"] == "a photo of"
    assert not any(text.startswith("a photo of") for text in asked.texts.values())


def test_two_captioners_do_not_share_a_file(job, blip, tmp_path, no_weights):
    other = shutil.copytree(blip, tmp_path / "other")
    out = job().out
    digest = CaptionerSource("x", blip).digest
    made = {"name": "before", "digest": digest, "prompt": "", "max_new_tokens": 5}
    out.write_text(json.dumps({"texts": {"00.png": "x"}, "captioner": made}))
    assert len(plan_captions(job(captioner=str(other))).todo) == 9, "the same captioner in another place is another"
    for changes in ({"prompt": "a"}, {"max_new_tokens": 6}):
        with pytest.raises(BadRequestError, match="written by 'before' with other settings") as caught:
            plan_captions(job(**changes))
        assert next(iter(changes)) in str(caught.value)
        assert "--out" in str(caught.value.hint)
    (other / "vocab.txt").write_text("more")
    with pytest.raises(BadRequestError, match="digest"):
        plan_captions(job(captioner=str(other)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"captioner": "./nowhere"}, "nowhere"),
        ({"dataset": "toyhorses"}, "toyhorse"),
        ({"split": "dev"}, "dev"),
        ({"limit": 0}, "--limit 0"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"max_new_tokens": -1}, "--max-new-tokens -1"),
        ({"device": "tpu"}, "tpu"),
    ],
)
def test_bad_requests_name_the_value_before_any_weight_loads(job, changes, message, no_weights):
    with pytest.raises((BadRequestError, NotFoundError), match=message):
        plan_captions(job(**changes))
    assert not job().out.exists()


def test_places_that_are_none(job, tmp_path, no_weights):
    with pytest.raises(BadRequestError, match="is a folder"):
        plan_captions(job(out=tmp_path))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot be written") as caught:
        plan_captions(job(out=tmp_path / "file" / "captions.json"))
    assert caught.value.exit_code == 2
    plan_captions(job(out=tmp_path / "new" / "folder" / "captions.json"))
    (tmp_path / "captions.json").write_text("{")
    with pytest.raises(BadRequestError, match="no JSON"):
        plan_captions(job())
    assert (tmp_path / "captions.json").read_text() == "{"


# extraction


@pytest.mark.usefixtures("tiny")
def test_extraction_takes_each_images_own_text(config, tmp_path):
    file = tmp_path / "captions.json"
    words = ["horse", "a", "b", "c", "d", "e", "f", "g", "h", "i"]
    file.write_text(json.dumps({f"{n:02d}.png": f"a {word}" for n, word in enumerate(words)}))
    wanted = config(techniques="prompt:caption", steering=SteeringOptions(captions=file))
    assert extract(wanted).passes == 10
    run = featstore.open(wanted.store).dataset("photos").run("prompt:caption")
    for row in (0, 7):
        alone = config(
            techniques="prompt", steering=SteeringOptions(prompt=f"a {words[row]}"), store=str(tmp_path / str(row))
        )
        extract(alone)
        fixed = featstore.open(alone.store).dataset("photos").run("prompt")
        for layer in run.layers:
            assert np.array_equal(run.numpy(layer, [row]), fixed.numpy(layer, [row])), layer
            assert not np.array_equal(run.numpy(layer, [5]), fixed.numpy(layer, [5])), layer
    # Nothing is left to do, in whatever form the same texts come; another text is another run.
    lines = [json.dumps({"key": key, "text": text}) for key, text in json.loads(file.read_text()).items()]
    file.write_text("\n".join(reversed(lines)))
    assert make_plan(wanted).passes_todo == 0
    file.write_text(file.read_text().replace("a horse", "the horse"))
    assert make_plan(wanted).passes_todo == 10


@pytest.mark.usefixtures("tiny")
def test_a_text_is_missing(config, photos, tmp_path, caplog):
    file = tmp_path / "some captions.json"
    file.write_text(json.dumps({f"{n:02d}.png": "a horse" for n in range(8)} | {"gone.png": "x"}))
    steering = SteeringOptions(captions=file)
    with pytest.raises(BadRequestError, match=r"no text for 2 of 10 images: '08.png', '09.png'") as caught:
        make_plan(config(techniques="basic,prompt:caption", steering=steering))
    assert f"featstore caption --dataset folder:{photos} --captioner" in str(caught.value.hint)
    assert f"--out '{file}'" in str(caught.value.hint)
    make_plan(config(techniques="basic,prompt:caption", steering=steering, limit=8))
    assert "1 of its texts belong to no image of the data set: 'gone.png'" in caplog.text
    with pytest.raises(BadRequestError, match="no pass of 'basic,cfg' takes its texts") as caught:
        make_plan(config(techniques="basic,cfg", steering=steering))
    assert "prompt:caption" in str(caught.value.hint)


@pytest.mark.usefixtures("tiny")
def test_prompts_in_chunks_are_runs_of_their_own(config):
    text = "horse " * 70 + "a b c d e f g h"
    one = config(techniques="prompt", limit=2, steering=SteeringOptions(prompt=text))
    two = config(techniques="prompt", limit=2, steering=SteeringOptions(prompt=text, prompt_chunks=2))
    for wanted, tokens in ((one, 77), (two, 154)):
        plan = make_plan(wanted)
        assert plan.passes_todo == 2
        assert plan.runs[0].layers["attn-up-cross-2"][0] == tokens
        execute(plan, Silent())
        (run,) = [
            run
            for run in featstore.open(wanted.store).dataset("photos").runs()
            if run.recipe.parameters.get("prompt_chunks", 1) == tokens // 77
        ]
        maps = run.numpy("attn-up-cross-2", [0, 1]).astype(np.float64)
        assert maps.shape[1] == tokens
        np.testing.assert_allclose(maps.sum(axis=1), 1.0, atol=5e-3)
        assert make_plan(wanted).passes_todo == 0
        assert make_plan(wanted).runs[0].layers["attn-up-cross-2"][0] == tokens
