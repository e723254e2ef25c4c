"""`featstore train-lora`: the loss and the file against diffusers' own, where it is found, what is refused."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from PIL import Image
from safetensors import safe_open

import featstore.models
import featstore.store
from featstore.datasets import DatasetInfo, Sample
from featstore.errors import BadRequestError, FeatstoreError, NotFoundError
from featstore.models.source import ModelSource
from featstore.pipelines.extract import extract
from featstore.pipelines.lora_file import lora_bytes
from featstore.pipelines.lora_plan import TrainLoraConfig, make_lora_plan
from featstore.pipelines.lora_pupil import Pupil
from featstore.pipelines.lora_training import Once, Training
from featstore.pipelines.plan import ExtractConfig, make_plan
from featstore.pipelines.progress import Silent
from featstore.pipelines.train_lora import train_lora
from tests.tiny_models import TextDataset, build_tiny_sd
from tests.tiny_sdxl import build_tiny_sd21, build_tiny_sdxl
from tests.tiny_transformers import build_tiny_pixart, build_tiny_sd3

FILE = "pytorch_lora_weights.safetensors"


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def home(weights_root, tmp_path, monkeypatch):
    """A weights root of the test's own, with the tiny stand-in of `reference`."""
    root = tmp_path / "weights"
    shutil.copytree(weights_root, root)
    monkeypatch.setenv("FEATSTORE_WEIGHTS", str(root))
    return root


@pytest.fixture
def photos(photos):
    """Five of the pictures: two to train on, three that say when to stop."""
    for path in sorted(photos.iterdir())[5:]:
        path.unlink()
    return photos


@pytest.fixture
def config(photos):
    """Makes the configuration of a short training on ``photos``, with a few changes."""

    def make(**changes):
        values = {
            "dataset": f"folder:{photos}",
            "model": "reference",
            "images": 2,
            "steps": 3,
            "rank": 4,
            "alpha": 2,
            "learning_rate": 0.02,
            "text_learning_rate": 0.02,
            "batch_size": 2,
            "device": "cpu",
        }
        return TrainLoraConfig(**(values | changes))

    return make


@pytest.fixture
def untouched(monkeypatch):
    """Fails the test if weights are loaded."""

    def load(self, *_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(ModelSource, "weights_digest", property(load))
    for family in ("StableDiffusion", "StableDiffusionXL"):
        monkeypatch.setattr(f"featstore.models.families.{_MODULES[family]}.{family}.load", load)


_MODULES = {"StableDiffusion": "stable_diffusion", "StableDiffusionXL": "sdxl"}


class Told(Silent):
    """Remembers what it is told; at the given step it is interrupted."""

    def __init__(self, interrupt_at=None):
        self.steps, self.notes, self.titles = 0, [], []
        self._interrupt_at, self._stage = interrupt_at, ""

    def start(self, title, total, unit):
        self._stage = title

    def advance(self, steps=1):
        self.steps += steps * (self._stage == "train")
        if self.steps == self._interrupt_at:
            raise KeyboardInterrupt

    def describe(self, title):
        self.titles.append(title)

    def note(self, text):
        self.notes.append(text)


# loss and file


class Diffusers:
    """The same loss, from a pipeline of diffusers."""

    def __init__(self, folder):
        kind = json.loads((folder / "model_index.json").read_text())["_class_name"]
        self.xl = kind == "StableDiffusionXLPipeline"
        pipeline = StableDiffusionXLPipeline if self.xl else StableDiffusionPipeline
        logging.disable(logging.WARNING)  # of parts that the tiny models do without
        try:
            self.pipe = pipeline.from_pretrained(
                folder,
                local_files_only=True,
                **({} if self.xl else {"safety_checker": None, "feature_extractor": None}),
            )
        finally:
            logging.disable(logging.NOTSET)
        self.scheduler = DDPMScheduler.from_config(self.pipe.scheduler.config)

    @torch.no_grad()
    def loss(self, latents, noise, timesteps, texts):
        rows = []
        for clean, draw, timestep, text in zip(latents, noise, timesteps, texts, strict=True):
            clean, draw, timestep = clean[None], draw[None], timestep[None]
            encoded = self.pipe.encode_prompt(
                text, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
            )
            added = None
            if self.xl:
                sizes = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]])
                added = {"text_embeds": encoded[2], "time_ids": sizes}
            noised = self.scheduler.add_noise(clean, draw, timestep)
            predicted = self.pipe.unet(noised, timestep, encoded[0], added_cond_kwargs=added).sample
            target = draw
            if self.scheduler.config.prediction_type == "v_prediction":
                target = self.scheduler.get_velocity(clean, draw, timestep)
            rows.append((predicted - target).square().mean())
        return torch.stack(rows)


@pytest.mark.parametrize("build", [build_tiny_sd, build_tiny_sd21, build_tiny_sdxl])
@pytest.mark.filterwarnings("ignore:.*CLIPTextModel.*:FutureWarning")
def test_loss_and_file_are_those_of_diffusers(build, tmp_path, config):
    folder = build(tmp_path / "model")
    source = featstore.models.resolve(str(folder))
    settings = config(rank=3, alpha=6.0)
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn((3, 4, 16, 16), generator=generator) for _ in range(2))
    batch = (latents, noise, torch.tensor([3, 400, 990]), ["a horse", "", "horse, the best"])
    other = Diffusers(folder)
    with source.load() as backbone:
        pupil = Pupil(backbone, settings, (64, 64))
        with torch.no_grad():
            before = pupil.loss(*batch)
        torch.testing.assert_close(before, other.loss(*batch), rtol=1e-4, atol=1e-5)
        training = Training(pupil, latents, batch[3], None, plain_prompt="a horse", config=settings)
        course = training.run(4, Silent(), stop_early=True)
        with torch.no_grad():
            after = pupil.loss(*batch)
        file = tmp_path / FILE
        file.write_bytes(lora_bytes(pupil))
        bases = {n: p for n, p in backbone.unet.named_parameters() if "lora" not in n}
        for name, own in other.pipe.unet.named_parameters():
            stem, dot, last = name.rpartition(".")
            assert torch.equal(own, bases.get(name, bases.get(f"{stem}.base_layer{dot}{last}")))
        # The second matrices begin as zeros.
        learnt = {
            name: any(bool(p.any()) for key, p in module.named_parameters() if "lora_B" in key)
            for name, module in pupil.modules.items()
        }
    assert learnt == dict.fromkeys(["unet", "text_encoder", *(["text_encoder_2"] if other.xl else [])], True)
    assert course.after < course.before
    assert (after - before).abs().min() > 1e-4
    other.pipe.load_lora_weights(tmp_path, weight_name=FILE, local_files_only=True)
    torch.testing.assert_close(after, other.loss(*batch), rtol=1e-4, atol=1e-5)
    # through featstore's own technique
    with source.load() as backbone, backbone.adapted([(backbone.lora(file, "0" * 64), 1.0)]), torch.no_grad():
        same = Pupil.__new__(Pupil)
        same.backbone, same._size_px, same._cache, same.modules = backbone, (64, 64), None, {}
        torch.testing.assert_close(after, same.loss(*batch), rtol=1e-4, atol=1e-5)
    with safe_open(file, framework="np") as opened:
        tensors = [opened.get_slice(key) for key in list(opened.keys())]
        shapes = [tensor.get_shape() for tensor in tensors]
        assert {tensor.get_dtype() for tensor in tensors} == {"F16"}
    plan = make_lora_plan(config(model=str(folder), rank=3, out=tmp_path / "elsewhere"))
    assert plan.parameters == sum(int(np.prod(shape)) for shape in shapes)
    assert plan.file_bytes < file.stat().st_size < 2 * plan.file_bytes + 100_000


def trained(source, config, *, dtype="float32"):
    """The pupil's file and the course after two steps on random latents, and the type of what was trained."""
    latents = torch.randn((2, 4, 16, 16), generator=torch.Generator().manual_seed(0))
    with source.load("cpu", dtype) as backbone:
        pupil = Pupil(backbone, config, (64, 64))
        training = Training(
            pupil, latents.to(backbone.dtype), ["a horse", ""], None, plain_prompt="a horse", config=config
        )
        course = training.run(2, Silent(), stop_early=False)
        return lora_bytes(pupil), course, {parameter.dtype for parameter in pupil.all_parameters}


def test_large_pictures_and_half_precision_change_little(home, config, monkeypatch):
    source = featstore.models.resolve("reference")
    plain, course, _ = trained(source, config())
    monkeypatch.setattr("featstore.pipelines.lora_pupil._PLAIN_PIXELS", 0)
    calls = []
    checkpoint = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **k: calls.append(1) or checkpoint(*a, **k))
    again, _, _ = trained(source, config())
    assert calls
    assert again == plain
    _, half, types = trained(source, config(), dtype="bfloat16")
    assert types == {torch.float32}
    assert half.before == pytest.approx(course.before, rel=0.03)
    assert half.after == pytest.approx(course.after, rel=0.03)


def test_text_encoders_are_left_alone_at_rate_zero(home, config):
    report = train_lora(config(text_learning_rate=0.0, steps=1))
    with safe_open(report.lora, framework="np") as opened:
        keys = list(opened.keys())
        count = sum(int(np.prod(opened.get_slice(key).get_shape())) for key in keys)
    assert all(key.startswith("unet.") for key in keys)
    assert make_lora_plan(config(text_learning_rate=0.0, out=home / "x")).parameters == count


# where it goes and how it is found


def test_a_trained_lora_is_what_the_technique_finds(home, config, photos, tmp_path):
    files = sorted(path for path in home.rglob("*") if path.is_file())
    before = [sha256(path) for path in files]
    told = Told()
    report = train_lora(config(), told)
    file = home / "reference" / "loras" / "photos" / FILE
    assert report.lora == file
    assert [sha256(path) for path in files] == before
    assert sorted(path for path in home.rglob("*") if path.is_file() and path not in files) == sorted(
        [file, file.parent / "training.json"]
    )
    assert told.steps == 3
    assert all(title.startswith("train, loss ") for title in told.titles)

    notes = json.loads((file.parent / "training.json").read_text())
    assert notes["weights_sha256"] == sha256(file)
    assert str(tmp_path) not in json.dumps(notes)
    digests = {path.name: sha256(path) for path in photos.iterdir()}
    assert len(notes["images"]) == 2
    assert all(digests[one["key"]] == one["digest"] for one in notes["images"] + notes["held_out"])
    used = [one["key"] for one in notes["images"] + notes["held_out"]]
    assert sorted(used) == sorted(digests)
    assert notes["weights_digest"] == featstore.models.resolve("reference").weights_digest
    assert notes["hyperparameters"]["rank"] == 4
    assert notes["course"]["after"] == report.to_json()["loss"]["after"]

    # same seed, same bytes; another seed, other images
    again = train_lora(config(out=tmp_path / "again"))
    assert again.lora.read_bytes() == file.read_bytes()
    assert again.technique == f"lora:{tmp_path / 'again'}"
    chosen = [tuple(s.key for s in make_lora_plan(config(seed=n, out=tmp_path / "x")).candidates[:2]) for n in range(4)]
    assert chosen[0] == tuple(used[:2])
    assert len(set(chosen)) > 1

    train_lora(config(overfit=True))
    assert featstore.models.resolve("reference").lora_variants("photos") == ("overfit",)
    store = str(tmp_path / "features.zarr")
    extract(
        ExtractConfig(
            dataset=f"folder:{photos}",
            techniques="basic,lora,lora:overfit",
            store=store,
            model="reference",
            device="cpu",
            batch_size=4,
            limit=2,
        )
    )
    stored = featstore.store.open(store).dataset("photos")
    basic, well, over = (run for run in stored.bucket(["basic", "lora", "lora:overfit"]).runs)
    assert [run.recipe.parameters["loras"][0]["digest"] for run in (well, over)] == [
        sha256(file),
        sha256(file.parent / "overfit" / FILE),
    ]
    for layer in basic.layers:
        maps = [run.numpy(layer, [0, 1]) for run in (basic, well, over)]
        assert not np.allclose(maps[0], maps[1])
        # Without an early stop, three steps are three steps: the two are one training here.
        assert np.array_equal(maps[1], maps[2])


def test_it_is_found_by_the_name_that_it_was_given(home, config, photos):
    train_lora(config(dataset_name="horses", steps=1))

    def planned(**names):
        settings = {"dataset": f"folder:{photos}", "techniques": "lora", "model": "reference", "device": "cpu"}
        return make_plan(ExtractConfig(**settings, **names)).runs[0].steering.loras[0].path

    assert planned(dataset_name="horses") == home / "reference" / "loras" / "horses" / FILE
    with pytest.raises(NotFoundError, match="no LoRA for data set 'photos'") as caught:
        planned()
    assert f"`featstore train-lora --dataset folder:{photos} --model reference`" in caught.value.hint


def test_without_a_variable_it_lies_in_the_folder_weights(weights_root, config, tmp_path, monkeypatch):
    monkeypatch.delenv("FEATSTORE_WEIGHTS", raising=False)
    monkeypatch.chdir(tmp_path)
    source = featstore.models.resolve(str(weights_root / "reference" / "pipeline"))
    assert source.lora_folder("photos", None) is None
    report = train_lora(config(model=str(source.folder), steps=1))
    assert (tmp_path / report.lora).resolve() == tmp_path / "weights" / "pipeline" / "loras" / "photos" / FILE
    assert source.lora_folder("photos", None) == report.lora.parent
    assert source.lora_folder("photos", "overfit") is None
    assert source.lora_folder("..", None) is None
    assert source.lora_folder("photos", "..") is None


def test_a_weights_root_with_trained_loras_only_hides_no_model(config, tmp_path, monkeypatch):
    monkeypatch.setenv("FEATSTORE_WEIGHTS", str(tmp_path / "root"))
    here = featstore.models.resolve("reference").folder
    place = tmp_path / "root" / "reference" / "loras" / "photos"
    place.mkdir(parents=True)
    (place / FILE).touch()
    source = featstore.models.resolve("reference")
    assert source.folder == here
    assert source.lora_folder("photos", None) == place


def test_what_a_model_ships_stays_its_default(home, config, untouched, tmp_path):
    shipped = home / "reference" / "lora"
    trained = home / "reference" / "loras" / "toyhorse"
    trained.mkdir(parents=True)
    (trained / FILE).touch()
    source = featstore.models.resolve("reference")
    assert source.lora_folder("toyhorse", None) == shipped
    with pytest.raises(BadRequestError, match=r"comes with a LoRA for data set 'toyhorse'") as caught:
        make_lora_plan(config(dataset="toyhorse"))
    assert "--out DIR" in caught.value.hint
    with pytest.raises(BadRequestError, match=r"comes with a LoRA overfit for data set 'toyhorse'"):
        make_lora_plan(config(dataset="toyhorse", overfit=True))
    plan = make_lora_plan(config(dataset="toyhorse", out=tmp_path / "own"))
    assert plan.file == tmp_path / "own" / FILE
    shutil.rmtree(shipped)
    assert source.lora_folder("toyhorse", None) == trained


def test_a_lora_of_another_model_of_the_same_name_is_refused(home, config, photos):
    train_lora(config(steps=1))
    shutil.rmtree(home / "reference" / "pipeline")
    build_tiny_sd(home / "reference" / "pipeline", seed=77)
    settings = {"dataset": f"folder:{photos}", "model": "reference", "device": "cpu"}
    with pytest.raises(BadRequestError, match="trained on another model that is called 'reference' too") as caught:
        make_plan(ExtractConfig(techniques="lora", **settings))
    expression = caught.value.hint.split()[-1]
    assert make_plan(ExtractConfig(techniques=expression, **settings)).runs[0].steering.loras


# what is there already, and what goes wrong


def test_a_lora_that_is_there_is_replaced_only_on_demand(home, config, monkeypatch):
    first = train_lora(config(steps=1))
    before = first.lora.read_bytes()
    with pytest.raises(BadRequestError, match=r"there is a LoRA in .*trained on 2 images of 'photos'") as caught:
        make_lora_plan(config())
    assert "--overwrite" in caught.value.hint
    with pytest.raises(KeyboardInterrupt, match="nothing was written"):
        train_lora(config(overwrite=True), Told(interrupt_at=2))
    assert first.lora.read_bytes() == before
    with pytest.raises(FeatstoreError, match=r"the loss is (nan|inf) at step") as caught:
        train_lora(config(overwrite=True, learning_rate=1e30, steps=5))
    assert "--learning-rate" in caught.value.hint
    assert first.lora.read_bytes() == before
    assert sorted(path.name for path in first.lora.parent.iterdir()) == [FILE, "training.json"]
    assert train_lora(config(overwrite=True)).lora.read_bytes() != before


def test_an_interruption_leaves_nothing(home, config):
    files = sorted(home.rglob("*"))
    with pytest.raises(KeyboardInterrupt):
        train_lora(config(), Told(interrupt_at=1))
    assert sorted(home.rglob("*")) == files


def test_unreadable_images_are_left_out(home, config, photos):
    broken = "02.png"
    (photos / broken).write_bytes((photos / broken).read_bytes()[:60])
    seed = next(n for n in range(99) if make_lora_plan(config(seed=n)).candidates[0].key == broken)
    told = Told()
    report = train_lora(config(steps=1, seed=seed), told)
    assert report.images == 2
    assert report.unreadable == (broken,)
    assert [note for note in told.notes if broken in note]
    notes = json.loads((report.lora.parent / "training.json").read_text())
    assert broken not in {one["key"] for one in notes["images"] + notes["held_out"]}
    for path in photos.iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(FeatstoreError, match="none of the 5 images"):
        train_lora(config(overwrite=True))


@pytest.mark.parametrize(
    ("changes", "error", "message", "hint"),
    [
        ({"images": 0}, BadRequestError, "--images 0 is not 1 or more", ""),
        ({"steps": 0}, BadRequestError, "--steps 0", ""),
        ({"rank": -1}, BadRequestError, "--rank -1", ""),
        ({"batch_size": 0}, BadRequestError, "--batch-size 0", ""),
        ({"alpha": 0.0}, BadRequestError, "--alpha 0.0 is not a positive number", ""),
        ({"learning_rate": float("nan")}, BadRequestError, "--learning-rate nan", ""),
        ({"text_learning_rate": -1.0}, BadRequestError, "--text-learning-rate -1.0 is not a positive number or 0", ""),
        ({"schedule": "cosin"}, BadRequestError, "unknown schedule 'cosin'", "'cosine'"),
        ({"model": "referense"}, BadRequestError, "'referense'", "'reference'"),
        ({"dataset": "toyhorses"}, BadRequestError, "'toyhorses'", "'toyhorse'"),
        ({"dataset": "folder:absent"}, BadRequestError, "'absent' does not exist", ""),
        ({"split": "test"}, BadRequestError, "unknown split 'test'; known: all", ""),
        ({"captions": "tag"}, BadRequestError, "unknown kind of captions 'tag'", "'tags'"),
        ({"captions": "absent.json"}, NotFoundError, "absent.json", ""),
        ({"image_size_px": 100}, BadRequestError, "image height 100 px", "96 px or 128 px"),
        ({"device": "tpu"}, BadRequestError, "'tpu'", ""),
        ({"dataset_name": "../x"}, BadRequestError, "'../x'", ""),
    ],
)
def test_bad_requests_are_refused_before_anything_is_loaded(
    home, config, untouched, changes, error, message, hint, tmp_path
):
    with pytest.raises(error) as caught:
        make_lora_plan(config(**changes))
    assert message in str(caught.value)
    assert hint in (caught.value.hint or "")
    assert not (home / "reference" / "loras").exists()


@pytest.mark.parametrize("build", [build_tiny_pixart, build_tiny_sd3])
def test_other_families_are_refused(build, config, photos, tmp_path):
    folder = build(tmp_path / "model")
    with pytest.raises(BadRequestError, match="LoRAs are trained for Stable Diffusion's UNets; model 'model' is none"):
        make_lora_plan(config(model=str(folder)))
    with pytest.raises(FeatstoreError) as caught:
        make_plan(ExtractConfig(dataset=f"folder:{photos}", techniques="lora", model=str(folder), device="cpu"))
    assert "train-lora" not in caught.value.hint


def test_a_folder_that_cannot_be_is_refused(home, config, tmp_path, untouched):
    (tmp_path / "file").touch()
    with pytest.raises(BadRequestError, match="is a file"):
        make_lora_plan(config(out=tmp_path / "file" / "lora"))


# images and texts


class Split(TextDataset):
    """So many images a split, with captions of their own."""

    def __init__(self, counts, **options):
        super().__init__(**options)
        self._counts = counts

    @property
    def info(self):
        info = super().info
        return DatasetInfo(
            name="drawn",
            title=info.title,
            plain_prompt="a photo of the horse",
            source=info.source,
            classes=("background", "head", "tail", "leg"),
        )

    @property
    def samples(self):
        names = [(split, n) for split, count in self._counts.items() for n in range(count)]
        return tuple(
            Sample(key=f"{s}{n}", digest=hashlib.sha256(f"{s}{n}".encode()).hexdigest(), split=s) for s, n in names
        )

    def mask(self, key):
        return None if key == "train0" else np.array([[0, 3], [1, 255]], dtype=np.uint8)


@pytest.mark.parametrize(
    ("counts", "changes", "splits", "others", "stops"),
    [
        ({"train": 3, "val": 2, "test": 4}, {}, {"train"}, 2, True),
        ({"train": 3, "val": 2, "test": 4}, {"images": 2}, {"train"}, 0, True),
        ({"train": 3, "test": 4}, {}, {"train"}, 0, False),
        ({"all": 3, "test": 4}, {"images": 2}, {"all"}, 0, True),
        ({"train": 3, "test": 4}, {"split": "test"}, {"test"}, 0, False),
        ({"train": 3, "val": 2}, {"overfit": True}, {"train"}, 2, False),
    ],
)
def test_splits(home, config, monkeypatch, untouched, counts, changes, splits, others, stops):
    monkeypatch.setattr("featstore.datasets.resolve", lambda *_, **__: Split(counts))
    plan = make_lora_plan(config(**({"images": 30, "steps": None} | changes)))
    assert {sample.split for sample in plan.candidates} == splits
    assert plan.images == min(changes.get("images", 30), len(plan.candidates))
    assert {sample.split for sample in plan.others} <= {"val"}
    assert (len(plan.others), plan.stops_early) == (others, stops)
    assert plan.steps == plan.images * 100 * (3 if "overfit" in changes else 1)


def test_only_a_test_split_is_not_trained_on(home, config, monkeypatch, untouched):
    monkeypatch.setattr("featstore.datasets.resolve", lambda *_, **__: Split({"test": 4}))
    with pytest.raises(NotFoundError, match="no images to train on: only test") as caught:
        make_lora_plan(config())
    assert "--split" in caught.value.hint


def test_texts(home, config, monkeypatch, untouched, tmp_path):
    file = tmp_path / "captions.json"
    file.write_text(json.dumps({"train0": "one", "train1": "two"}))

    def texts(kind, **options):
        monkeypatch.setattr("featstore.datasets.resolve", lambda *_, **__: Split({"train": 2}, **options))
        captions = make_lora_plan(config(captions=kind)).captions
        return [captions.text(key) for key in ("train0", "train1")]

    assert texts("empty") == ["", ""]
    assert texts("tags") == ["photo of horse", "photo of horse, head, leg"]
    assert texts("sentences") == ["a fine horse train0", "a fine horse train1"]
    assert texts("sentences", captions=False) == ["a photo of the horse"] * 2
    assert texts(str(file)) == ["one", "two"]
    file.write_text(json.dumps({"train0": "one"}))
    with pytest.raises(BadRequestError, match="no text for 1 of 2 images: 'train1'"):
        texts(str(file))


# the loop


class Scripted:
    """A pupil whose losses on held-out pictures are given beforehand; what it learns is the number of the step."""

    def __init__(self, held_out):
        self.parameter = torch.nn.Parameter(torch.zeros(()))
        self.modules, self.all_parameters = {"unet": None}, [self.parameter]
        self.backbone = type("Backbone", (), {"timesteps": 1000})()
        self._held_out, self.seen = iter(held_out), []

    def parameters(self, name):
        return self.all_parameters

    def loss(self, latents, noise, timesteps, texts):
        self.seen.append(latents.flatten().tolist())
        return (self.parameter - 100.0).expand(len(latents)) ** 2

    def mean_loss(self, latents, text, *, seed):
        return 1.0 if len(latents) > 1 else next(self._held_out)


def run(pupil, steps, *, stop_early, schedule="constant"):
    settings = TrainLoraConfig(dataset="x", learning_rate=0.01, schedule=schedule, batch_size=2)
    latents, held_out = torch.arange(5.0).view(5, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    training = Training(pupil, latents, [""] * 5, held_out, plain_prompt="x", config=settings)
    return training.run(steps, Silent(), stop_early=stop_early)


def test_training_stops_when_the_loss_on_held_out_pictures_no_longer_falls():
    # before; looks at steps 10, 20, ..; after
    pupil = Scripted([9.0, 5.0, 4.0, 4.5, 4.2, 4.1, 4.0])
    course = run(pupil, 120, stop_early=True)
    assert (course.steps, course.kept_step) == (50, 20)
    assert (course.held_out_before, course.held_out_after) == (9.0, 4.0)
    assert [(entry["step"], entry["held_out"]) for entry in course.history] == [
        (10, 5.0), (20, 4.0), (30, 4.5), (40, 4.2), (50, 4.1),
    ]  # fmt: skip
    # AdamW takes steps of the learning rate along a gradient of one sign.
    assert pupil.parameter.item() == pytest.approx(20 * 0.01, rel=0.02)
    # Every picture comes up once before one comes up again.
    drawn = [value for batch in pupil.seen for value in batch]
    assert all(sorted(drawn[start : start + 5]) == [0, 1, 2, 3, 4] for start in range(0, 100, 5))


def test_overfitting_goes_on_to_the_end():
    pupil = Scripted([9.0, 8.0])
    course = run(pupil, 50, stop_early=False)
    assert (course.steps, course.kept_step) == (50, 50)
    assert all("held_out" not in entry for entry in course.history)
    assert pupil.parameter.item() == pytest.approx(0.5, rel=0.02)


def test_a_cosine_schedule_takes_half_the_way():
    pupil = Scripted([9.0, 8.0])
    run(pupil, 100, stop_early=False, schedule="cosine")
    assert pupil.parameter.item() == pytest.approx(0.5, rel=0.05)


def test_a_message_passes_once(caplog):
    logger = logging.getLogger("featstore.models.backbones.text")
    once = Once()
    logger.addFilter(once)
    try:
        for text in ("cut", "cut", "other", "cut"):
            logger.warning("prompt %s", text)
    finally:
        logger.removeFilter(once)
    assert [record.getMessage() for record in caplog.records] == ["prompt cut", "prompt other"]


def test_the_embedded_model_learns_its_images(config, tmp_path, monkeypatch):
    monkeypatch.delenv("FEATSTORE_WEIGHTS", raising=False)
    folder = tmp_path / "stripes"
    folder.mkdir()
    for n in range(2):
        picture = np.zeros((64, 64, 3), dtype=np.uint8)
        picture[:, n :: 8 + n] = [250, 40 * n, 200]
        Image.fromarray(picture).save(folder / f"{n}.png")
    report = train_lora(
        config(
            dataset=f"folder:{folder}", images=2, rank=16, alpha=8, steps=20, learning_rate=2e-3,
            text_learning_rate=1e-3, out=tmp_path / "lora",
        )
    )  # fmt: skip
    assert report.course.after < 0.9 * report.course.before
