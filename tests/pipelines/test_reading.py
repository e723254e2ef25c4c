from __future__ import annotations

import shlex
import shutil

import pytest
from PIL import Image

import featstore.models
from featstore.errors import BadRequestError, NotCommittedError
from featstore.pipelines.reading import BucketConfig, extract_command, model_name, open_bucket


@pytest.fixture
def bucket(labelled, features):
    def make(**changes):
        values = {"dataset": f"folder:{labelled}", "techniques": "basic,prompt", "store": str(features)}
        return BucketConfig(**(values | changes))

    return make


def test_a_bucket_says_what_it_holds(bucket):
    opened = open_bucket(bucket())
    assert opened.titles == ("basic", "prompt")
    assert len(opened.maps) == 4
    assert [(one.title, one.layers) for one in opened.beside] == [("basic", ("attn-up-cross-2", "attn-up-cross-4"))]
    assert opened.beside[0].run == opened.runs[0]
    assert opened.complete().all()
    chosen = open_bucket(bucket(layers="attn-up-cross-4,up-level1-upsampler-out"))
    assert (chosen.maps, chosen.beside[0].layers) == (("up-level1-upsampler-out",), ("attn-up-cross-4",))


def test_presets_stand_for_their_layers_where_the_model_is_at_hand(bucket, tiny, absent):
    opened = open_bucket(bucket(layers="legacy"))
    assert len(opened.maps) == 4
    absent("reference")
    with pytest.raises(NotCommittedError, match="'legacy'"):
        open_bucket(bucket(layers="legacy"))


def test_a_name_that_is_not_there_is_said_with_the_command_that_makes_it(bucket, tmp_path):
    for changes, said in (
        ({"layers": "up-level1-upsampler-oot"}, "up-level1-upsampler-oot"),
        ({"techniques": "basic,controlnet"}, "controlnet"),
        ({"timesteps": (100,)}, "100"),
        ({"dataset_name": "cats"}, "cats"),
        ({"store": str(tmp_path / "none")}, "none"),
    ):
        with pytest.raises(NotCommittedError, match=said) as caught:
            open_bucket(bucket(**changes))
        assert caught.value.hint.startswith("run: featstore extract --dataset folder:")
    with pytest.raises(BadRequestError, match="convolutional"):
        open_bucket(bucket(layers="attn-up-cross-2"))


def test_a_changed_image_is_not_taken_for_the_one_that_was_extracted(bucket, labelled, features, tmp_path):
    folder = shutil.copytree(labelled, tmp_path / "discs")
    Image.new("RGB", (64, 64)).save(folder / "train" / "1.png")
    opened = open_bucket(bucket(dataset=f"folder:{folder}"))
    assert opened.missing([sample.key for sample in opened.dataset.samples]) == ["train/1.png"]


def test_the_command_names_whatever_is_no_default(bucket, tmp_path):
    config = bucket(
        timesteps=(50, 100), model="./my models/sd", data_root=tmp_path, dataset_name="x", layers="practical"
    )
    words = shlex.split(extract_command(config))
    options = dict(zip(words[2::2], words[3::2], strict=True))
    assert words[:2] == ["featstore", "extract"]
    assert options == {
        "--dataset": config.dataset,
        "--techniques": "basic,prompt",
        "--timesteps": "50,100",
        "--model": "./my models/sd",
        "--layers": "practical",
        "--data-root": str(tmp_path),
        "--dataset-name": "x",
        "--store": config.store,
    }
    opened = open_bucket(bucket())
    assert shlex.split(opened.extract_command(bucket()))[-4:] == [
        "--prompt",
        "a horse, high quality",
        "--image-size",
        "64",
    ]


def test_a_model_s_folder_stands_for_its_name(weights_root, tmp_path, monkeypatch):
    folder = shutil.copytree(weights_root / "reference" / "pipeline", tmp_path / "Stable Diffusion v1.5")
    assert model_name(str(folder)) == featstore.models.resolve(str(folder)).name
    monkeypatch.chdir(tmp_path)
    assert model_name("Stable Diffusion v1.5") == model_name(str(folder))
    assert model_name("reference") == "reference"
    assert model_name("somebody-elses") == "somebody-elses"
