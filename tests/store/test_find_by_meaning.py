"""Runs found by what they mean, and told apart by what differs."""

from __future__ import annotations

import json

import pytest

import featstore.store as fs
from featstore.errors import BadRequestError, NotCommittedError, NotFoundError
from featstore.store.catalog import describe
from featstore.store.differences import differences, in_words, leaves, short, told_apart
from featstore.store.meaning import Query
from featstore.store.provenance import joined

RECIPES = (
    {"technique": "basic", "parameters": {"prompt": "a horse", "controlnets": []}},
    {"technique": "basic", "parameters": {"prompt": "a horse", "controlnets": []}, "timestep": 200},
    {"technique": "basic", "parameters": {"prompt": "a horse", "controlnets": []}, "seed": 3},
    {"technique": "prompt", "parameters": {"prompt": "a fine horse", "controlnets": []}},
    {"technique": "prompt", "parameters": {"prompt": "an old horse", "controlnets": []}},
    {
        "technique": "controlnet",
        "parameters": {"prompt": "a horse", "controlnets": [{"digest": "cd" * 32, "scale": 0.5}]},
    },
    {
        "technique": "controlnet",
        "parameters": {"prompt": "a horse", "controlnets": [{"digest": "cd" * 32, "scale": 1.0}]},
    },
    {"technique": "basic", "parameters": {"prompt": "a horse"}, "model": "sd15", "precision": "float32"},
)


@pytest.fixture
def store(tmp_path, lab):
    for number, changes in enumerate(RECIPES):
        layers = lab.LAYERS if number else {**lab.LAYERS, "down0": (1, 2, 2)}
        lab.start(tmp_path / "s", 5, layers=layers, **changes)
    made = fs.create(tmp_path / "s")
    dogs = made.put_samples("dogs", lab.table(3), source="made up")
    dogs.create_run(lab.recipe(technique="basic", timestep=7), lab.LAYERS, batch_size=8, provenance={})
    return fs.open(tmp_path / "s")


def seen(runs):
    """Number of each run's recipe in `RECIPES`; ``dogs`` for the other data set's."""

    def same(run, changes):
        recipe = run.recipe.to_json()
        defaults = {"timestep": 50, "seed": 0, "model": "reference"}
        return all(recipe[name] == value for name, value in (defaults | changes).items())

    return [
        "dogs" if run.dataset.name == "dogs" else next(n for n, c in enumerate(RECIPES) if same(run, c)) for run in runs
    ]


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({}, {"dogs", *range(len(RECIPES))}),
        ({"technique": "basic"}, {"dogs", 0, 1, 2, 7}),
        ({"technique": "basic", "dataset": "toy", "timestep": 50}, {0, 2, 7}),
        ({"technique": "basic", "dataset": "toy", "timestep": 50, "model": "reference"}, {0, 2}),
        ({"technique": "basic", "seed": 3}, {2}),
        ({"seed": "3"}, {2}),
        ({"prompt": "an old horse"}, {4}),
        ({"precision": "float32"}, {7}),
        ({"layers": ["up1", "down0"]}, {0}),
        ({"controlnets.0.scale": 1}, {6}),
        ({"controlnets.0.scale": "0.5"}, {5}),
        ({"technique": "prompt", "timestep": 200}, set()),
        ({"dataset": "dogs"}, {"dogs"}),
    ],
)
def test_find(store, asked, found):
    assert set(seen(store.find(**asked))) == found


def test_find_by_the_first_digits_of_a_fingerprint(store):
    for run in store.find(dataset="toy"):
        assert [one.path for one in store.find(fingerprint=run.fingerprint[:10])] == [run.path]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"technique": "promt"}, ["'promt'", "basic, controlnet, prompt", "did you mean 'prompt'"]),
        ({"model": "sd51"}, ["'sd51'", "reference, sd15", "did you mean 'sd15'"]),
        ({"timestep": 20}, ["timestep '20'", "200, 50, 7", "did you mean '200'"]),
        ({"layers": ["up2"]}, ["'up2'", "up1", "did you mean 'up1'"]),
        ({"fingerprint": "xyz"}, ["fingerprint 'xyz'"]),
        ({"promt": "a horse"}, ["field of a recipe 'promt'", "did you mean 'prompt'"]),
        ({"prompt": "an odd horse"}, ["'an odd horse'", "a fine horse", "did you mean 'an old horse'"]),
        ({"seed": 4}, ["seed '4'", "0, 3"]),
    ],
)  # fmt: skip
def test_what_no_run_has_is_said_with_the_nearest(store, asked, said):
    with pytest.raises(BadRequestError) as caught:
        store.find(**asked)
    message = f"{caught.value} {caught.value.hint}"
    for part in said:
        assert part in message


def test_an_unknown_data_set_and_an_empty_store(store, tmp_path):
    with pytest.raises(NotFoundError, match="dogs, toy"):
        store.find(dataset="cats")
    assert fs.create(tmp_path / "empty").find(technique="prompt") == []


def test_a_query_that_asks_nothing_is_false():
    assert not Query()
    assert Query(timesteps=(0,))
    assert Query(fields={"seed": 0})


def test_runs_are_told_apart_by_what_differs(store):
    two = store.find(technique="controlnet")
    scales = [run.recipe.parameters["controlnets"][0]["scale"] for run in two]
    assert differences(two) == [{"controlnets.0.scale": scale} for scale in scales]
    assert told_apart(two) == "; ".join(
        f"{run.fingerprint[:12]} (controlnets.0.scale={scale})" for run, scale in zip(two, scales, strict=True)
    )
    one, other = store.find(dataset="toy", technique="basic", model="sd15") + two[:1]
    odd = differences([one, other])
    assert odd[0]["controlnets.0.digest"] is None
    assert odd[1]["controlnets.0.digest"] == "cd" * 32
    assert odd[0]["model"] == "sd15"
    assert "seed" not in odd[0]
    assert differences(two[:1]) == [{}]


def test_names_of_values(lab):
    recipe = lab.recipe(parameters={"seed": "a parameter's", "empty": {}, "list": [], "deep": {"a": [1, {"b": 2}]}})
    flat = leaves(recipe)
    assert flat["seed"] == 0
    assert flat["parameters.seed"] == "a parameter's"
    assert (flat["empty"], flat["list"], flat["deep.a.0"], flat["deep.a.1.b"]) == ({}, [], 1, 2)
    assert flat["denoise_from"] is None
    assert leaves(lab.recipe(parameters={}))["timestep"] == 50


def test_values_for_people():
    assert short("cd" * 32) == "cd" * 6
    assert short("x" * 100) == "x" * 57 + "..."
    assert short({"b": 1, "a": None}) == '{"a":null,"b":1}'
    assert in_words({"seed": 3, "prompt": "a horse"}) == "seed=3, prompt=a horse"


def test_describe_says_what_differs_among_runs_of_one_name(store):
    content = describe(store, "toy")
    assert json.loads(json.dumps(content)) == content
    by_path = {run["path"]: run for run in content["datasets"][0]["runs"]}
    for run in store.find(dataset="toy"):
        entry = by_path[run.path]
        assert entry["recipe"] == run.recipe.to_json()
        assert entry["provenance"] == [{"who": "a test", "layers": sorted(run.layers)}]
        (number,) = seen([run])
        changes = RECIPES[number]
        assert entry["differs"] == {
            0: {"seed": 0},
            2: {"seed": 3},
            3: {"prompt": "a fine horse"},
            4: {"prompt": "an old horse"},
            5: {"controlnets.0.scale": 0.5},
            6: {"controlnets.0.scale": 1.0},
        }.get(number, {}), changes


def test_describe_takes_a_query(store):
    content = describe(store, query=Query(timesteps=(7,)))
    assert [(one["name"], len(one["runs"])) for one in content["datasets"]] == [("dogs", 1)]
    assert describe(store, "toy", Query(techniques=("prompt",), timesteps=(200,)))["datasets"] == []
    # What tells a run from its like does not depend on what is asked for.
    (entry,) = describe(store, query=Query(fields={"seed": 3}))["datasets"][0]["runs"]
    assert entry["differs"] == {"seed": 3}


def test_one_of_several_runs_is_named_by_its_fingerprint(store):
    toy = store.dataset("toy")
    prompts = {run.recipe.parameters["prompt"]: run for run in store.find(technique="prompt")}
    for prompt in prompts:
        with pytest.raises(BadRequestError, match=f"2 runs.*prompt={prompt}"):
            toy.bucket(["prompt"])
    basic = next(run for run in store.find(technique="basic", seed=3))
    with pytest.raises(BadRequestError, match=r"2 runs.*seed=0.*seed=3") as caught:
        toy.bucket(["basic"], model="reference")
    assert "--run" in caught.value.hint
    for chosen in prompts.values():
        bucket = toy.bucket(
            ["basic", "prompt"], model="reference", fingerprints=(basic.fingerprint[:8], chosen.fingerprint[:8])
        )
        assert [run.path for run in bucket.runs] == [basic.path, chosen.path]
    # Only what needs a choice is chosen; a name that is of no use is refused.
    assert toy.bucket(["basic"], timesteps=(200,)).runs[0].recipe.timestep == 200
    with pytest.raises(BadRequestError, match=f"unknown fingerprint '{basic.fingerprint[:8]}'"):
        toy.bucket(["basic"], timesteps=(200,), fingerprints=(basic.fingerprint[:8],))
    with pytest.raises(NotCommittedError, match="there are"):
        toy.bucket(["lora"], fingerprints=(basic.fingerprint[:8],))


def test_provenance_is_told_once():
    mine, hers = {"who": "me", "layers": ["a", "b"]}, {"who": "her", "layers": ["b", "c"]}
    assert joined((), [mine, hers], ["a", "b", "c"]) == [mine, hers]
    assert joined([mine], [mine], ["a", "b"]) == [mine]
    assert joined([{"who": "me", "layers": ["a"]}], [mine], ["a", "b"]) == [
        {"who": "me", "layers": ["a"]},
        {"who": "me", "layers": ["b"]},
    ]
    assert joined([mine], [hers], ["c"]) == [mine, {"who": "her", "layers": ["c"]}]
    assert joined([mine], [hers], ["a"]) == [mine]
    assert joined([], [{"who": "him"}], ["a"]) == [{"who": "him", "layers": []}]
    assert joined([{"who": "him", "layers": []}], [{"who": "him"}], ["a"]) == [{"who": "him", "layers": []}]
