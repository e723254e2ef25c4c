import hashlib
import json

import pytest

from featstore.errors import BadRequestError, IncompatibleError
from featstore.recipe import Recipe, canonical_json, pca_of, slug


def recipe(**changes):
    values = {
        "model": "reference",
        "weights_digest": "ab" * 32,
        "technique": "controlnet:canny+lora",
        "parameters": {"prompt": "a horse", "controlnets": [{"digest": "cd" * 32, "scale": 1.0}]},
        "timestep": 50,
        "height_px": 64,
        "width_px": 64,
    }
    return Recipe(**(values | changes))


def test_the_fingerprint_is_the_sha256_of_the_sorted_json():
    one = recipe()
    text = json.dumps(one.to_json(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert one.fingerprint == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"weights_digest": "cd" * 32},
        {"technique": "basic"},
        {"parameters": {}},
        {"timestep": 51},
        {"denoise_from": 60},
        {"scheduler": "ddim"},
        {"seed": 1},
        {"noise_ensemble": 8},
        {"height_px": 128},
        {"width_px": 128},
        {"compute_dtype": "float16"},
        {"precision": "float32"},
        {"reduce": pca_of(16, "ef" * 32)},
        {"meaning": 0},
    ],
)
def test_everything_in_a_recipe_changes_its_fingerprint(change):
    assert recipe(**change).fingerprint != recipe().fingerprint


def test_timesteps_of_one_recipe_share_their_family():
    assert recipe(timestep=51).family_digest == recipe().family_digest
    assert recipe(seed=1).family_digest != recipe().family_digest
    assert recipe().path == f"reference/controlnet_canny_lora-{recipe().family_digest}/t050"


def test_json_goes_round():
    assert Recipe.from_json(json.loads(json.dumps(recipe().to_json()))) == recipe()


def test_a_recipe_with_other_fields_is_of_another_version():
    with pytest.raises(IncompatibleError, match="novelty"):
        Recipe.from_json(recipe().to_json() | {"novelty": 1})


@pytest.mark.parametrize("timestep", [-1, 1000])
def test_a_timestep_outside_the_schedule_is_refused(timestep):
    with pytest.raises(BadRequestError, match=r"0\.\.999"):
        recipe(timestep=timestep)


@pytest.mark.parametrize("change", [{"precision": "bfloat16"}, {"compute_dtype": "int8"}, {"resampling": "magic"}])
def test_values_outside_the_allowed_are_named(change):
    with pytest.raises(BadRequestError, match=next(iter(change.values()))):
        recipe(**change)


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"method": "pca", "components": 16},
        {"method": "svd", "components": 16, "sample": "ef" * 32},
        {"method": "pca", "components": 0, "sample": "ef" * 32},
        {"method": "pca", "components": "16", "sample": "ef" * 32},
        {"method": "pca", "components": 16, "sample": "ef"},
        {"method": "pca", "components": 16, "sample": "ef" * 32, "more": 1},
    ],
)
def test_a_reduction_is_a_pca_of_a_sample_that_has_a_digest(value):
    with pytest.raises(BadRequestError, match="PCA"):
        recipe(reduce=value)
    assert recipe(reduce=pca_of(16, "ef" * 32)).components == 16
    assert recipe().components == 0


def test_what_cannot_be_digested_is_refused():
    with pytest.raises(TypeError):
        recipe(parameters={"model": object()})
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"scale": float("nan")})
    with pytest.raises(BadRequestError, match="digest"):
        recipe(weights_digest="unknown")


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("basic", "basic"),
        ("controlnet:canny+lora", "controlnet_canny_lora"),
        ("lora:./weights/My Horse.safetensors", "lora_my_horse"),
        ("lora:/a/b/horse/", "lora_horse"),
        ("lora:" + "x" * 100, ("lora_" + "x" * 100)[:60]),
    ],
)
def test_slugs(expression, expected):
    assert slug(expression) == expected
