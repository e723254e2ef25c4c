from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from featstore import models
from featstore.errors import BadRequestError, NotFoundError, StorageError
from featstore.models import MODELS, ModelEntry
from featstore.models.families import open_folder
from featstore.models.hub import HubId
from tests.models.fake_hub import FakeHub, commit_of

UNET = "unet/diffusion_pytorch_model.safetensors"
NEEDED = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "unet/config.json",
    UNET,
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
}


@pytest.fixture
def folder(weights_root: Path, tmp_path: Path) -> Path:
    """The tiny pipeline as people upload them, with much that is not needed."""
    folder = shutil.copytree(weights_root / "reference" / "pipeline", tmp_path / "uploaded")
    for name in (
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/pytorch_model.bin",
        "safety_checker/model.safetensors",
        "v1-5-pruned.ckpt",
        "v1-5-pruned.safetensors",
        "README.md",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not needed")
    return folder


@pytest.fixture
def hub(folder: Path, weights_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with ``tiny/sd`` and ``tiny/control``, and an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEATSTORE_WEIGHTS", raising=False)
    with FakeHub() as hub:
        hub.connect(monkeypatch, tmp_path)
        hub.add("tiny/sd", folder)
        hub.add("tiny/control", weights_root / "reference" / "controlnet-canny")
        yield hub


def test_what_is_needed_is_fetched_once_and_then_no_network_is(
    hub: FakeHub, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = models.resolve("tiny/sd")
    assert hub.fetched() == NEEDED
    assert [r.message for r in caplog.records if "fetching 3 weight files of tiny/sd" in r.message]
    assert source.name == "tiny_sd"
    assert source.weights_digest == open_folder("m", folder).weights_digest
    hub.stop()
    hub.log.clear()
    again = models.resolve("tiny/sd")
    assert again.folder == source.folder
    assert again.weights_digest == source.weights_digest
    assert not hub.log
    assert models.public_name("tiny/sd@main") == source.name


def test_a_revision_is_a_model_of_its_own(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "scheduler" / "scheduler_config.json").write_text(
        (folder / "scheduler" / "scheduler_config.json").read_text().replace("0.012", "0.013")
    )
    hub.add("tiny/sd", other, "v2")
    plain = models.resolve("tiny/sd")
    for revision in ("v2", commit_of("v2")):
        source = models.resolve(f"tiny/sd@{revision}")
        assert source.name == plain.name
        assert source.weights_digest == open_folder("m", other).weights_digest != plain.weights_digest
    with pytest.raises(NotFoundError, match=r"tiny/sd has no revision 'v3' on the Hub") as caught:
        models.resolve("tiny/sd@v3")
    assert "main, v2" in str(caught.value.hint)


def test_a_folder_goes_before_the_cache_and_the_cache_before_the_network(
    hub: FakeHub, folder: Path, weights_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder, tmp_path / "weights" / "tiny_sd" / "pipeline")
    assert models.resolve("tiny/sd").folder == Path("weights/tiny_sd/pipeline")
    assert not hub.log
    monkeypatch.setenv("FEATSTORE_WEIGHTS", str(tmp_path / "elsewhere"))
    shutil.copytree(folder, tmp_path / "elsewhere" / "tiny_sd" / "pipeline")
    assert models.resolve("tiny/sd").folder == tmp_path / "elsewhere" / "tiny_sd" / "pipeline"
    # A folder of weights has no revision: it is not taken for one.
    assert models.resolve("tiny/sd@main").folder.is_relative_to(tmp_path / "hub cache")
    # What is written as a path is one, and a folder that is there goes before an id.
    hub.log.clear()
    shutil.copytree(folder, tmp_path / "tiny" / "sd")
    assert models.resolve("tiny/sd").folder == Path("tiny/sd")
    assert models.public_name("tiny/sd") == "sd"
    for path in ("./tiny/sd2", str(tmp_path / "tiny" / "sd2"), "tiny/sd/unet2"):
        with pytest.raises(NotFoundError, match="there is no folder"):
            models.resolve(path)
    with pytest.raises(BadRequestError, match="is a file"):
        models.resolve("tiny/sd/README.md")
    assert not hub.log


def test_named_models_find_their_parts_and_controlnets_only_when_asked(
    hub: FakeHub, weights_root: Path, tmp_path: Path
) -> None:
    entry = ModelEntry(
        name="toy",
        title="a toy",
        family="Stable Diffusion",
        hub={"pipeline": "tiny/sd", "controlnet-canny": "tiny/control", "controlnet-depth": "tiny/absent"},
    )
    root = tmp_path / "root"
    assert entry.there(root) is None
    assert not hub.log
    source = entry.source(root)
    assert (source.name, entry.there(root)) == ("toy", "hub cache")
    assert not any("tiny/control" in line for line in hub.log)
    assert set(source.controlnet_variants) == {"canny", "depth"}
    found = source.controlnet_folder("canny")
    assert found is not None
    for file in (weights_root / "reference" / "controlnet-canny").iterdir():
        assert (found / file.name).read_bytes() == file.read_bytes()
    with pytest.raises(NotFoundError, match="tiny/absent"):
        source.controlnet_folder("depth")
    assert source.controlnet_folder("hed") is None
    shutil.copytree(weights_root / "reference", root / "toy")
    assert entry.there(root) == "folder"
    own = entry.source(root)
    assert (own.folder, own.controlnet_folder("canny")) == (
        root / "toy" / "pipeline",
        root / "toy" / "controlnet-canny",
    )


def test_ids_that_the_hub_does_not_give(hub: FakeHub) -> None:
    with pytest.raises(NotFoundError, match="no model 'stable-diffusion-v15/stable-diffusion-v1-5'") as caught:
        models.resolve("stable-diffusion-v15/stable-diffusion-v1-5")
    assert "did you mean 'stable-diffusion-v1-5/stable-diffusion-v1-5'?" in str(caught.value.hint)
    assert "hf auth login" in str(caught.value.hint)
    hub.gated.add("tiny/sd")
    with pytest.raises(NotFoundError, match="tiny/sd is gated") as caught:
        models.resolve("tiny/sd")
    assert "https://huggingface.co/tiny/sd, then `hf auth login`" in str(caught.value.hint)
    for status, message in ((401, "HTTP 401"), (403, "HTTP 403")):
        hub.closed["tiny/sd"] = status
        with pytest.raises(NotFoundError, match=message) as caught:
            models.resolve("tiny/sd")
        assert "hf auth login" in str(caught.value.hint)
    hub.closed["tiny/sd"] = 502
    with pytest.raises(StorageError, match="HTTP 502"):
        models.resolve("tiny/sd")


@pytest.mark.parametrize("switched_off", [True, False])
def test_without_a_network_the_folder_and_the_command_are_named(
    hub: FakeHub, switched_off: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.stop()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", switched_off)
    for ask in (models.resolve, models.describe):
        with pytest.raises(NotFoundError, match=r"neither in weights/tiny_sd@v2/pipeline nor, as tiny/sd@v2") as caught:
            ask("tiny/sd@v2")
        assert ("HF_HUB_OFFLINE is set" if switched_off else "ConnectError") in str(caught.value)
        assert "hf download tiny/sd --revision v2 " in str(caught.value.hint)
        assert "--local-dir weights/tiny_sd@v2/pipeline" in str(caught.value.hint)


def test_an_interrupted_download_goes_on(hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 256)
    hub.failing.add("vae/diffusion_pytorch_model.safetensors")
    with pytest.raises(StorageError, match="tiny/sd") as caught:
        models.resolve("tiny/sd")
    assert caught.value.hint == "the same command goes on from there"
    have = {name for name in NEEDED if HubId(repo="tiny/sd").snapshot(name)}
    assert {"model_index.json", "tokenizer/tokenizer.json", UNET} <= have < NEEDED
    # Offline, half a copy is none.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NotFoundError, match=r"no weights in .*vae"):
        models.resolve("tiny/sd")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.failing.clear()
    hub.log.clear()
    hub.cut["vae/diffusion_pytorch_model.safetensors"] = 1000
    source = models.resolve("tiny/sd")
    assert hub.fetched() == NEEDED - have
    assert any("vae/" in line and line.endswith("bytes=768-") for line in hub.log)
    assert source.weights_digest == open_folder("m", folder).weights_digest


def test_half_precision_and_shards_are_fetched_where_there_is_nothing_else(hub: FakeHub, folder: Path) -> None:
    unet, text = folder / "unet", folder / "text_encoder"
    (unet / "diffusion_pytorch_model.safetensors").replace(unet / "diffusion_pytorch_model.fp16.safetensors")
    shard = "model-00001-of-00001.safetensors"
    (text / "model.safetensors").rename(text / shard)
    index = text / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard}}))
    source = models.resolve("tiny/sd")
    assert {name for name in hub.fetched() if name.endswith((".safetensors", ".bin"))} == {
        "unet/diffusion_pytorch_model.fp16.safetensors",
        f"text_encoder/{shard}",
        "vae/diffusion_pytorch_model.safetensors",
    }
    assert source.component_weights["unet"].variant == "fp16"
    index.write_text(json.dumps({"weight_map": {"a": shard, "b": "model-00002-of-00002.safetensors"}}))
    hub.add("tiny/partial", folder)
    with pytest.raises(NotFoundError, match=r"tiny/partial, text_encoder, are incomplete: model-00002-of-00002"):
        models.resolve("tiny/partial")


def test_what_cannot_be_used_is_refused_before_weights_are_fetched(hub: FakeHub, folder: Path) -> None:
    (folder / UNET).unlink()
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    with pytest.raises(BadRequestError, match=r"tiny/sd, unet has its weights only as a pickle") as caught:
        models.resolve("tiny/sd")
    assert "--allow-pickle" in str(caught.value.hint)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    hub.add("tiny/flux", folder)
    with pytest.raises(BadRequestError, match="is a FluxPipeline"):
        models.resolve("tiny/flux")
    (folder / "model_index.json").unlink()
    hub.add("tiny/single", folder)
    with pytest.raises(BadRequestError, match=r"tiny/single has no model_index\.json") as caught:
        models.resolve("tiny/single")
    assert "-diffusers" in str(caught.value.hint)
    assert not any(name.endswith((".safetensors", ".bin", ".ckpt")) for name in hub.fetched())


def test_a_full_disk_is_told_before(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featstore.models.hub.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(StorageError, match=r"tiny/sd takes 0\.00 GB and .* has 0\.00 GB free"):
        models.resolve("tiny/sd")
    assert not hub.fetched()


def test_a_description_fetches_no_weights(hub: FakeHub) -> None:
    source = models.describe("tiny/sd")
    assert source.layer_names(64, 64)["mid-repeat0-res-out"] == (24, 2, 2)
    assert hub.fetched() == {name for name in NEEDED if name.endswith(".json")}
    for use in (lambda: source.weights_digest, source.load, lambda: source.tokens("a")):
        with pytest.raises(NotFoundError, match="tiny_sd' is not on this machine"):
            use()
    hub.stop()
    assert models.describe("tiny/sd").presets == source.presets


def test_pickles_are_read_only_if_they_are_allowed(weights_root: Path, tmp_path: Path) -> None:
    twin = weights_root / "reference" / "pipeline"
    folder = shutil.copytree(twin, tmp_path / "pickled")
    for part, stem in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "")):
        (file,) = (folder / part).glob("*.safetensors")
        torch.save(load_file(file), file.with_name(f"{stem or 'pytorch_model'}.bin"))
        file.unlink()
    with pytest.raises(BadRequestError, match="only as a pickle"):
        _ = models.resolve(str(folder)).weights_digest
    source = models.resolve(str(folder), allow_pickle=True)
    digest = source.weights_digest
    assert digest != open_folder("m", twin).weights_digest
    with source.load() as pickled, open_folder("m", twin).load() as plain:
        for ours, theirs in ((pickled.denoiser, plain.denoiser), (pickled.text_encoder, plain.text_encoder)):
            state = theirs.state_dict()
            assert state
            assert all(torch.equal(value, state[key]) for key, value in ours.state_dict().items())
        pixels = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
        assert torch.equal(pickled.encode_images(pixels), plain.encode_images(pixels))
    text = folder / "text_encoder" / "pytorch_model.bin"
    whole = torch.load(text, weights_only=True)
    lost = next(key for key in whole if key.endswith("token_embedding.weight"))
    torch.save({key: value for key, value in whole.items() if key != lost}, text)
    with pytest.raises(NotFoundError, match=r"text_encoder lack 1 tensors \(.*token_embedding\.weight"):
        models.resolve(str(folder), allow_pickle=True).load()
    torch.save(whole, text)
    weights = folder / "unet" / "diffusion_pytorch_model.bin"
    state = torch.load(weights, weights_only=True)
    state["conv_in.bias"] += 1
    torch.save(state, weights)
    assert models.resolve(str(folder), allow_pickle=True).weights_digest != digest
    del state["conv_in.bias"]
    torch.save(state, weights)
    with pytest.raises(NotFoundError, match=r"lack 1 tensors \(conv_in\.bias"):
        models.resolve(str(folder), allow_pickle=True).load()
    torch.save({"conv_in.bias": _Harmful(tmp_path / "run")}, weights)
    with pytest.raises(BadRequestError, match="cannot be loaded"):
        models.resolve(str(folder), allow_pickle=True).load()
    assert not (tmp_path / "run").exists()


class _Harmful:
    """What pickles can do: unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.mkdir, (self.path,)


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [
        ("a/b", "a/b", None),
        ("Owner-1/some.name_2@refs/pr/3", "Owner-1/some.name_2", "refs/pr/3"),
        ("a/b@v1@2", "a/b", "v1@2"),
        *((text, None, None) for text in ("a", "./a/b", "/a/b", "~/a", "a/b/c", "a/b@", "a/..", "a/b.", "a/x.ckpt")),
        *((text, None, None) for text in ("a/b--c", f"a/{'b' * 96}", "a b/c", "")),
    ],
)
def test_ids(text: str, repo: str | None, revision: str | None) -> None:
    found = HubId.parse(text)
    assert found == (None if repo is None else HubId(repo=repo, revision=revision))


def test_every_entry_has_a_hub_id_or_an_opener() -> None:
    for entry in MODELS.values():
        assert (entry.opener is None) == ("pipeline" in entry.hub)
        for part, hub in entry.hub.items():
            assert part == "pipeline" or part.startswith("controlnet-")
            assert HubId.parse(hub) is not None
