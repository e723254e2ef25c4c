"""Extraction with weights of the Hugging Face Hub, and with pickled ones."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file

import featstore
from featstore.errors import BadRequestError
from featstore.pipelines.extract import extract
from featstore.pipelines.plan import make_plan
from featstore.techniques import SteeringOptions
from tests.models.fake_hub import FakeHub

LAYERS = "up-level2-upsampler-out,attn-up-cross-2"


def maps(config, technique):
    run = featstore.open(config.store).dataset("photos").run(technique)
    return {layer: run.numpy(layer, list(range(10))).tobytes() for layer in run.layers}


def test_a_model_of_the_hub_is_fetched_once(config, weights_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipeline = weights_root / "reference" / "pipeline"
    with FakeHub() as hub:
        hub.connect(monkeypatch, tmp_path)
        hub.add("tiny/sd", pipeline)
        wanted = {"model": "tiny/sd", "layers": LAYERS}
        for wrong in ({"layers": "up-level9"}, {"image_size_px": 65}, {"split": "none"}, {"device": "cuda:99"}):
            with pytest.raises(BadRequestError):
                make_plan(config(**(wanted | wrong)))
        assert not any(name.endswith(".safetensors") for name in hub.fetched())
        first = extract(config(**wanted))
        assert first.plan.source.name == "tiny_sd"
        hub.stop()
        hub.log.clear()
        again = extract(config(**wanted))
    assert (first.passes, again.passes) == (10, 0)
    assert not hub.log
    own = config(**wanted | {"model": str(pipeline), "store": str(tmp_path / "own.zarr")})
    extract(own)
    assert maps(config(**wanted), "basic") == maps(own, "basic")


def test_pickled_weights_give_the_features_of_their_twin(config, weights_root, tmp_path):
    twin, pickled = weights_root / "reference", shutil.copytree(weights_root / "reference", tmp_path / "pickled")
    for file in (
        *(pickled / "pipeline").rglob("*.safetensors"),
        *(pickled / "controlnet-canny").rglob("*.safetensors"),
    ):
        name = "pytorch_model.bin" if file.stem == "model" else f"{file.stem}.bin"
        torch.save(load_file(file), file.with_name(name))
        file.unlink()

    def wanted(root, **changes):
        technique = f"controlnet:{root / 'controlnet-canny'}"
        store = str(tmp_path / f"{root.parent.name}.zarr")
        values = {"model": str(root / "pipeline"), "techniques": technique, "store": store, "layers": LAYERS}
        return config(**(values | changes))

    with pytest.raises(BadRequestError, match="only as a pickle") as caught:
        make_plan(wanted(pickled))
    assert "--allow-pickle" in caught.value.hint
    allowed = wanted(pickled, steering=SteeringOptions(allow_pickle=True))
    plain = wanted(twin, steering=SteeringOptions(allow_pickle=True))
    reports = [extract(one) for one in (allowed, plain)]
    assert [report.passes for report in reports] == [10, 10]
    assert maps(allowed, allowed.techniques) == maps(plain, plain.techniques)
    # Safetensors are what they were, whatever is allowed.
    assert extract(wanted(twin)).passes == 0
