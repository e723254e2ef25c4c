from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from featstore import models
from featstore.errors import BadRequestError, NotFoundError
from featstore.models import ModelSource
from featstore.models.backbones.stable_diffusion import StableDiffusionBackbone as Backbone
from featstore.models.backbones.transfer import to_device
from featstore.models.digests import file_sha256
from featstore.models.families import open_folder
from tests.tiny_models import LORA_ALPHA, LORA_RANK, build_tiny_lora, build_tiny_sd


@pytest.fixture
def source(weights_root: Path) -> ModelSource:
    return models.resolve("reference", weights_root=weights_root)


@pytest.fixture
def backbone(source: ModelSource) -> Backbone:
    return source.load()


def lora_file(root: Path) -> Path:
    return root / "reference" / "lora" / "pytorch_lora_weights.safetensors"


def unet_output(backbone: Backbone) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(2, 4, 16, 16, generator=generator)
    text = torch.randn(2, 77, 16, generator=generator)
    with torch.inference_mode():
        return backbone.unet(latents, torch.tensor(50), encoder_hidden_states=text).sample


def test_weights_are_those_of_the_folder_frozen_and_without_a_decoder(source: ModelSource, backbone: Backbone) -> None:
    stored = load_file(source.folder / "unet" / "diffusion_pytorch_model.safetensors")
    loaded = backbone.unet.state_dict()
    assert set(stored) == set(loaded)
    assert all(torch.equal(stored[k], loaded[k]) for k in stored)
    assert not any(name.startswith(("decoder", "post_quant")) for name, _ in backbone.vae.named_parameters())
    whole = AutoencoderKL.from_pretrained(source.folder / "vae", use_safetensors=True)
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in backbone.vae.state_dict().items())
    for module in (backbone.unet, backbone.vae, backbone.text_encoder):
        assert not module.training
        assert not any(p.requires_grad for p in module.parameters())
    assert backbone.latent_scale == 0.7
    assert backbone.latent_shift == 0.0


def test_the_schedule_is_the_models_own(source: ModelSource, backbone: Backbone) -> None:
    own = PNDMScheduler.from_pretrained(source.folder / "scheduler")
    torch.testing.assert_close(backbone.schedule.alphas_cumprod, own.alphas_cumprod, rtol=0, atol=0)
    assert not torch.equal(backbone.schedule.alphas_cumprod, DDPMScheduler().alphas_cumprod)


def test_loading_writes_nothing_to_the_terminal(source: ModelSource, capfd: pytest.CaptureFixture[str]) -> None:
    source.load()
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_devices_and_types_that_are_not_there(source: ModelSource) -> None:
    with pytest.raises(BadRequestError, match="'float8' is not one of float32"):
        source.load("cpu", "float8")
    with pytest.raises(BadRequestError, match="no torch device"):
        source.load("gpu")
    with pytest.raises(BadRequestError, match="CUDA"):
        source.load("cuda:99")


def test_compute_types(source: ModelSource) -> None:
    half = source.load("cpu", "bfloat16")
    assert {p.dtype for p in half.unet.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in half.text_encoder.parameters()} == {torch.bfloat16}
    # The tiny VAE says, as Stable Diffusion's do by default, that it must run in float32.
    assert {p.dtype for p in half.vae.parameters()} == {torch.float32}


def test_half_precision_files_are_loaded_as_float32(tmp_path: Path) -> None:
    folder = build_tiny_sd(tmp_path / "sd")
    whole = open_folder("m", folder).load()
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    halves = {k: v.half() for k, v in load_file(file).items()}
    file.unlink()
    save_file(halves, file.with_name("diffusion_pytorch_model.fp16.safetensors"), metadata={"format": "pt"})
    loaded = open_folder("m", folder).load()
    for name, value in loaded.unet.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, whole.unet.state_dict()[name], rtol=1e-3, atol=1e-6)


def test_incomplete_and_damaged_weights_are_refused(tmp_path: Path) -> None:
    folder = build_tiny_sd(tmp_path / "sd")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["conv_in.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(NotFoundError, match=r"lack 1 tensors \(conv_in\.weight"):
        open_folder("m", folder).load()
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(BadRequestError, match="cannot be loaded"):
        open_folder("m", folder).load()


def test_a_closed_backbone_lets_go_of_its_modules(weights_root: Path, backbone: Backbone) -> None:
    backbone.lora(lora_file(weights_root), "a" * 64)
    backbone.controlnet(weights_root / "reference" / "controlnet-canny", "b" * 64)
    kept = [weakref.ref(m) for m in (backbone.unet, backbone.vae, backbone.text_encoder)]
    kept += [weakref.ref(m) for m in backbone._controlnets.values()]
    assert len(kept) == 4
    backbone.close()
    gc.collect()
    assert [ref() for ref in kept] == [None] * 4
    backbone.close()
    with pytest.raises(RuntimeError, match="closed; load it again"):
        backbone.lora(lora_file(weights_root), "a" * 64)


# LoRAs


def test_a_disabled_lora_changes_no_bit_and_an_enabled_one_is_the_low_rank_sum(
    source: ModelSource, backbone: Backbone, weights_root: Path
) -> None:
    before = unet_output(backbone)
    path = lora_file(weights_root)
    name = backbone.lora(path, file_sha256(path))
    assert backbone.lora(path, file_sha256(path)) == name
    assert torch.equal(unet_output(backbone), before)
    with backbone.adapted([(name, 0.5)]):
        steered = unet_output(backbone)
    assert torch.equal(unet_output(backbone), before)
    # By hand: W + scale * alpha / rank * B A, in a fresh UNet that knows nothing of peft.
    fused = UNet2DConditionModel.from_pretrained(source.folder / "unet", use_safetensors=True)
    state, tensors = fused.state_dict(), load_file(path)
    pairs = [k for k in tensors if k.startswith("unet.") and k.endswith("lora_A.weight")]
    assert len(pairs) == 4 * 2 * 16
    for key in pairs:
        target = key.removeprefix("unet.").removesuffix(".lora_A.weight") + ".weight"
        product = tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
        state[target] += 0.5 * LORA_ALPHA / LORA_RANK * product
    fused.load_state_dict(state)
    backbone.denoiser = fused.eval()
    expected = unet_output(backbone)
    torch.testing.assert_close(steered, expected, rtol=1e-4, atol=1e-5)
    assert (steered - before).norm() / before.norm() > 1e-2


def test_loras_are_enabled_together_apart_and_not_after_an_error(backbone: Backbone, weights_root: Path) -> None:
    first = backbone.lora(lora_file(weights_root), "1" * 64)
    alone = {}
    with backbone.adapted([(first, 1.0)]):
        alone["first"] = unet_output(backbone)
    other = weights_root / "reference" / "lora-overfit" / "pytorch_lora_weights.safetensors"
    second = backbone.lora(other, "2" * 64)
    plain = unet_output(backbone)
    with backbone.adapted([(first, 1.0)]):
        assert torch.equal(unet_output(backbone), alone["first"]), "a second LoRA loaded beside shows"
    with backbone.adapted([(second, 1.0)]):
        alone["second"] = unet_output(backbone)
    with backbone.adapted([(first, 1.0), (second, 1.0)]):
        both = unet_output(backbone)
    with pytest.raises(KeyError), backbone.adapted([(first, 0.3)]):
        raise KeyError
    assert torch.equal(unet_output(backbone), plain)
    outputs = [plain, alone["first"], alone["second"], both]
    assert not any(torch.allclose(a, b, rtol=1e-3) for i, a in enumerate(outputs) for b in outputs[:i])
    with backbone.adapted([(first, 1.0)]):
        assert torch.equal(unet_output(backbone), alone["first"]), "the scale of an earlier pass stays"


@pytest.mark.parametrize(("model", "file"), [("float32", "float16"), ("bfloat16", "float32")])
def test_a_lora_computes_in_the_models_type(
    source: ModelSource, weights_root: Path, tmp_path: Path, model: str, file: str
) -> None:
    path = tmp_path / "lora.safetensors"
    tensors = {k: v.to(getattr(torch, file)) for k, v in load_file(lora_file(weights_root)).items()}
    # Without the metadata of the file alpha is the rank.
    save_file(tensors, path)
    backbone, name = source.load("cpu", model), "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    weight = backbone.unet.get_parameter(f"{name}.weight")
    before = weight.clone()
    with backbone.adapted([(backbone.lora(path, "3" * 64), 0.5)]):
        up, down = (tensors[f"unet.{name}.lora_{factor}.weight"].float() for factor in "BA")
        torch.testing.assert_close(weight.data, (before.float() + 0.5 * up @ down).to(getattr(torch, model)))
        assert {p.dtype for p in (*backbone.unet.parameters(), *backbone.text_encoder.parameters())} == {before.dtype}
    assert torch.equal(weight, before)


def test_a_lora_without_a_text_encoder_part(backbone: Backbone, source: ModelSource, tmp_path: Path) -> None:
    folder = build_tiny_lora(tmp_path / "unet-only", source.folder, seed=9, text_encoder=False)
    name = backbone.lora(folder / "pytorch_lora_weights.safetensors", "4" * 64)
    before = unet_output(backbone)
    with backbone.adapted([(name, 1.0)]):
        assert not torch.allclose(unet_output(backbone), before)


def test_loras_that_do_not_fit_leave_the_model_as_it_was(
    backbone: Backbone, weights_root: Path, tmp_path: Path
) -> None:
    before = unet_output(backbone)
    tensors = load_file(lora_file(weights_root))
    wide = {k: (torch.zeros(v.shape[0], 7) if "lora_A" in k else v) for k, v in tensors.items()}
    elsewhere = {k.replace("to_q", "to_elsewhere"): v for k, v in tensors.items()}
    for name, value, message in (
        ("wide", wide, "does not fit"),
        ("elsewhere", elsewhere, "fit"),
        ("nothing", {"weight": torch.zeros(2)}, "holds no LoRA"),
    ):
        path = tmp_path / f"{name}.safetensors"
        save_file(value, path)
        with pytest.raises(BadRequestError, match=message):
            backbone.lora(path, name)
        assert torch.equal(unet_output(backbone), before), name
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no safetensors")
    with pytest.raises(BadRequestError, match="cannot be read"):
        backbone.lora(broken, "5" * 64)
    good = backbone.lora(lora_file(weights_root), "6" * 64)
    with backbone.adapted([(good, 1.0)]):
        assert not torch.allclose(unet_output(backbone), before)


def test_copies_to_a_gpu_are_pinned_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        calls.append(("pinned",))
        return tensor

    def to(tensor: torch.Tensor, device: torch.device, *, non_blocking: bool = False) -> torch.Tensor:
        calls.append((device, non_blocking))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    tensor, gpu, cpu = torch.zeros(2), torch.device("cuda:0"), torch.device("cpu")
    to_device(tensor, gpu)
    assert calls == [("pinned",), (gpu, True)]
    calls.clear()
    to_device(tensor, cpu)
    assert calls == [(cpu, False)]
