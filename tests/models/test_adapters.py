"""LoRAs against sums that the tests work out themselves, and against diffusers' own loader with peft."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_open_clip_checkpoint
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from featstore import models
from featstore.errors import BadRequestError, NotFoundError
from featstore.models import ModelSource
from featstore.models.adapters import Adapters
from featstore.models.digests import file_sha256
from featstore.models.ldm_names import unet_names

Factors = tuple[torch.Tensor, torch.Tensor, float]
"""down (r, in, ..), up (out, r, ..), alpha."""
Spec = dict[tuple[str, str], Factors]
"""Factors by component and module."""

BLOCK = "mid_block.attentions.0.transformer_blocks.0"
ATTENTION = [
    ("unet", f"{BLOCK}.attn1.to_q"),
    ("unet", f"{BLOCK}.attn2.to_k"),
    ("unet", f"{BLOCK}.attn2.to_out.0"),
    ("text_encoder", "encoder.layers.0.self_attn.v_proj"),
    ("text_encoder", "encoder.layers.1.self_attn.out_proj"),
]
LINEAR = [
    *ATTENTION,
    ("unet", f"{BLOCK}.ff.net.0.proj"),
    ("unet", "down_blocks.0.attentions.1.proj_in"),
    ("unet", "up_blocks.2.resnets.0.time_emb_proj"),
    ("unet", "time_embedding.linear_1"),
    ("text_encoder", "encoder.layers.1.mlp.fc1"),
]
CONVOLUTIONS = [
    ("unet", "conv_in"),
    ("unet", "down_blocks.1.resnets.0.conv1"),
    ("unet", "down_blocks.1.resnets.0.conv_shortcut"),
    ("unet", "down_blocks.0.downsamplers.0.conv"),
    ("unet", "up_blocks.0.upsamplers.0.conv"),
]


@pytest.fixture(scope="module")
def source(weights_root: Path) -> ModelSource:
    return models.resolve("reference", weights_root=weights_root)


@pytest.fixture(scope="module")
def networks(source: ModelSource) -> dict[str, nn.Module]:
    backbone: Any = source.load()
    return {"unet": backbone.unet, "text_encoder": backbone.text_encoder}


@pytest.fixture
def adapters(networks: dict[str, nn.Module]) -> Iterator[Adapters]:
    """On shared networks, whose every bit is looked at afterwards."""
    before = bits(networks)
    yield Adapters(networks)
    assert_equal(bits(networks), before)


def bits(networks: dict[str, nn.Module]) -> dict[tuple[str, str], torch.Tensor]:
    return {(c, name): value.data.clone() for c, net in networks.items() for name, value in net.named_parameters()}


def assert_equal(one: dict[Any, torch.Tensor], other: dict[Any, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def weight(networks: dict[str, nn.Module], component: str, module: str) -> torch.Tensor:
    return networks[component].get_parameter(f"{module}.weight").data


def random_spec(
    networks: dict[str, nn.Module], places: list[tuple[str, str]], *, seed: int = 0, alpha: bool = True
) -> Spec:
    """Factors of another rank and alpha for each module; convolutions as LoCon has them."""
    generator = torch.Generator().manual_seed(seed)
    spec: Spec = {}
    for index, (component, module) in enumerate(places):
        out, *into = weight(networks, component, module).shape
        rank = 2 + index % 3
        down = torch.randn(rank, *into, generator=generator) * 0.2
        up = torch.randn(out, rank, *([1] * (len(into) - 1)), generator=generator) * 0.2
        spec[component, module] = (down, up, 0.5 + index % 2 if alpha else float(rank))
    return spec


def expected_change(factors: Factors) -> torch.Tensor:
    down, up, alpha = factors
    product = torch.tensordot(up.reshape(up.shape[0], -1), down.reshape(down.shape[0], -1), dims=1)
    return alpha / len(down) * product.reshape(up.shape[0], *down.shape[1:])


# How files are written


def peft_file(spec: Spec) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    tensors: dict[str, torch.Tensor] = {}
    metadata: dict[str, Any] = {}
    for component in dict.fromkeys(component for component, _ in spec):
        own = {module: factors for (c, module), factors in spec.items() if c == component}
        config = LoraConfig(
            r=1,
            lora_alpha=77,
            target_modules=list(own),
            rank_pattern={module: len(down) for module, (down, _, _) in own.items()},
            alpha_pattern={module: alpha for module, (_, _, alpha) in own.items()},
        ).to_dict() | {"target_modules": list(own)}
        metadata |= {f"{component}.{key}": value for key, value in config.items()}
        for module, (down, up, _) in own.items():
            tensors |= {
                f"{component}.{module}.lora_A.weight": down,
                f"{component}.{module}.lora_B.weight": up,
            }
    return tensors, {"format": "pt", "lora_adapter_metadata": json.dumps(metadata)}


def diffusers_file(spec: Spec) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    tensors = {}
    for (component, module), (down, up, _) in spec.items():
        name = f"text_encoder.text_model.{module}.lora_linear_layer" if "text" in component else f"unet.{module}.lora"
        tensors |= {f"{name}.down.weight": down, f"{name}.up.weight": up}
    return tensors, {}


def processor_file(spec: Spec) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    tensors = {}
    for (component, module), (down, up, _) in spec.items():
        module = module.replace("to_out.0", "to_out").replace(".attn1.", ".attn1.processor.")
        module = module.replace(".attn2.", ".attn2.processor.").replace("v_proj", "to_v").replace("out_proj", "to_out")
        name = f"{component}.{'text_model.' if component == 'text_encoder' else ''}{module}_lora"
        tensors |= {f"{name}.down.weight": down, f"{name}.up.weight": up}
    return tensors, {}


def attention_processors_file(spec: Spec) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    tensors, _ = processor_file({key: value for key, value in spec.items() if key[0] == "unet"})
    return {key.removeprefix("unet."): value for key, value in tensors.items()}, {}


def kohya_file(spec: Spec) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    tensors = {}
    for (component, module), (down, up, alpha) in spec.items():
        name = f"te_text_model.{module}" if component == "text_encoder" else f"unet.{module}"
        name = "lora_" + name.replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors, {"ss_network_module": "networks.lora"}


def lycoris_file(spec: Spec) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Without the text encoder; the first convolution stands for all of kohya's matrices that are 1 x 1 kernels."""
    tensors, metadata = kohya_file({key: value for key, value in spec.items() if key[0] == "unet"})
    for key, value in tensors.items():
        if "to_q" in key and value.ndim:
            tensors[key] = value[:, :, None, None]
    return {key.replace("lora_unet_", "lycoris_"): value for key, value in tensors.items()}, metadata


Writer = Callable[[Spec], tuple[dict[str, torch.Tensor], dict[str, str]]]


def write(path: Path, file: tuple[dict[str, torch.Tensor], dict[str, str]], dtype: torch.dtype | None = None) -> Path:
    tensors, metadata = file
    save_file({key: value.to(dtype or value.dtype).contiguous() for key, value in tensors.items()}, path, metadata)
    return path


def load(adapters: Adapters, path: Path) -> str:
    return adapters.load(path, file_sha256(path))


@pytest.mark.parametrize(
    ("writer", "places", "alpha"),
    [
        (peft_file, LINEAR + CONVOLUTIONS, True),
        (diffusers_file, LINEAR + CONVOLUTIONS, False),
        (processor_file, ATTENTION, False),
        (attention_processors_file, ATTENTION[:3], False),
        (kohya_file, LINEAR, True),
        (kohya_file, LINEAR + CONVOLUTIONS, True),
        (kohya_file, [place for place in LINEAR if place[0] == "text_encoder"], True),
        (lycoris_file, ATTENTION[:3] + CONVOLUTIONS, True),
    ],
    ids=["peft", "diffusers", "processors", "attn-procs", "kohya", "locon", "text-only", "lycoris"],
)
def test_every_format_is_the_low_rank_sum_and_leaves_no_trace(
    adapters: Adapters, networks: dict[str, nn.Module], tmp_path: Path, writer: Writer, places: Any, alpha: bool
) -> None:
    spec, before = random_spec(networks, places, alpha=alpha), bits(networks)
    name = load(adapters, write(tmp_path / "x.safetensors", writer(spec)))
    assert_equal(bits(networks), before)
    with adapters.enabled([(name, 0.7)]):
        now = bits(networks)
    assert_equal(bits(networks), before)
    for component, parameter in before:
        module, _, kind = parameter.rpartition(".")
        if (component, module) in spec and kind == "weight":
            wanted = before[component, parameter] + 0.7 * expected_change(spec[component, module])
            torch.testing.assert_close(now[component, parameter], wanted, rtol=1e-5, atol=1e-6)
            assert (wanted - before[component, parameter]).abs().max() > 1e-3
        else:
            assert torch.equal(now[component, parameter], before[component, parameter]), parameter


def test_a_tucker_convolution_is_three_convolutions_in_a_row(
    adapters: Adapters, networks: dict[str, nn.Module], tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(1)
    base = weight(networks, "unet", "down_blocks.1.resnets.0.conv1").clone()
    down, mid, up = (
        torch.randn(shape, generator=generator) for shape in ((3, base.shape[1], 1, 1), (2, 3, 3, 3), (16, 2, 1, 1))
    )
    name = "lora_unet_down_blocks_1_resnets_0_conv1"
    tensors = {"lora_down": down, "lora_mid": mid, "lora_up": up}
    file = {f"{name}.{key}.weight": value for key, value in tensors.items()} | {f"{name}.alpha": torch.tensor(6.0)}
    lora = load(adapters, write(tmp_path / "tucker.safetensors", (file, {})))
    x = torch.randn(1, base.shape[1], 7, 7, generator=generator)
    conv = nn.functional.conv2d
    wanted = conv(x, base, padding=1) + 0.5 * 6.0 / 3 * conv(conv(conv(x, down), mid, padding=1), up)
    with adapters.enabled([(lora, 0.5)]):
        folded = weight(networks, "unet", "down_blocks.1.resnets.0.conv1")
        torch.testing.assert_close(conv(x, folded, padding=1), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_and_models_are_summed_in_float32_and_rounded_once(
    networks: dict[str, nn.Module], tmp_path: Path, dtype: torch.dtype
) -> None:
    layer = nn.Linear(24, 8, dtype=dtype)
    unet = nn.ModuleDict({"conv_in": layer})
    base = layer.weight.data.clone()
    spec = {("unet", "conv_in"): (torch.randn(4, 24).to(dtype), torch.randn(8, 4).to(dtype), 3.0)}
    adapters = Adapters({"unet": unet})
    names = [load(adapters, write(tmp_path / f"{writer.__name__}.st.safetensors", writer(spec), dtype))
             for writer in (kohya_file, peft_file)]  # fmt: skip
    down, up, alpha = spec["unet", "conv_in"]
    exact = base.double() + (0.3 + 1.5) * alpha / 4 * up.double() @ down.double()
    with adapters.enabled(list(zip(names, (0.3, 1.5), strict=True))):
        assert layer.weight.dtype == dtype
        # To the nearest number of the type; a second rounding would show as a whole step.
        step = torch.finfo(dtype).eps * exact.abs()
        assert ((layer.weight.data.double() - exact).abs() <= 0.5001 * step).all()
    assert torch.equal(layer.weight.data, base)


def test_sets_do_not_depend_on_the_sets_before_them(
    adapters: Adapters, networks: dict[str, nn.Module], tmp_path: Path
) -> None:
    names = []
    for seed, places in enumerate((LINEAR, LINEAR[2:] + CONVOLUTIONS, CONVOLUTIONS)):
        path = write(tmp_path / f"{seed}.safetensors", kohya_file(random_spec(networks, places, seed=seed)))
        names.append(load(adapters, path))
    sets = [[(names[0], 1.0)], [(names[1], 0.5)], [(names[0], 1.0), (names[1], 0.5), (names[2], -2.0)], [(names[0], 2)]]
    fresh = []
    for loras in sets:
        alone = Adapters(networks)
        for seed in range(3):
            load(alone, tmp_path / f"{seed}.safetensors")
        with alone.enabled(loras):
            fresh.append(bits(networks))
    plain = bits(networks)
    for index in (0, 0, 1, 2, 0, 3, 3, 2, 1):
        with torch.inference_mode(), adapters.enabled(sets[index]):
            assert_equal(bits(networks), fresh[index])
        with torch.inference_mode(), adapters.enabled([]):
            assert_equal(bits(networks), plain)
    assert len({float(state["unet", f"{LINEAR[2][1]}.weight"].sum()) for state in [plain, *fresh]}) == 5


def test_errors_and_moves_inside_leave_the_models_own_weights(
    adapters: Adapters, networks: dict[str, nn.Module], tmp_path: Path
) -> None:
    name = load(adapters, write(tmp_path / "x.safetensors", kohya_file(random_spec(networks, LINEAR))))
    before = bits(networks)
    with pytest.raises(KeyError), adapters.enabled([(name, 1.0)]):
        raise KeyError
    assert_equal(bits(networks), before)
    with adapters.enabled([(name, 1.0)]):
        for parameter in networks["text_encoder"].parameters():
            # What moving to another device does: other memory, the same numbers.
            parameter.data = parameter.data.clone()
        with pytest.raises(RuntimeError, match="one set acts at a time"), adapters.enabled([]):
            pass
    assert_equal(bits(networks), before)
    with pytest.raises(KeyError), adapters.enabled([("never loaded", 1.0)]):
        pass
    with adapters.enabled([(name, 1.0)]):
        assert not torch.equal(weight(networks, *LINEAR[0]), before["unet", f"{LINEAR[0][1]}.weight"])


def test_going_in_and_out_of_one_set_folds_once(
    adapters: Adapters, networks: dict[str, nn.Module], tmp_path: Path
) -> None:
    name = load(adapters, write(tmp_path / "x.safetensors", kohya_file(random_spec(networks, LINEAR))))
    seen = []
    for _ in range(3):
        with adapters.enabled([(name, 1.0)]):
            seen.append(weight(networks, *LINEAR[0]).data_ptr())
        with adapters.enabled([]):
            pass
    assert len(set(seen)) == 1


# Against diffusers' own way: peft layers beside the weights


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("writers", [(peft_file,), (diffusers_file, kohya_file)], ids=["peft", "diffusers+kohya"])
def test_folded_passes_equal_those_of_diffusers_pipeline_with_peft(
    source: ModelSource, networks: dict[str, nn.Module], adapters: Adapters, tmp_path: Path, writers: tuple[Writer, ...]
) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(source.folder, safety_checker=None, feature_extractor=None)
    loras = []
    for index, writer in enumerate(writers):
        spec = random_spec(networks, LINEAR + CONVOLUTIONS[:3], seed=index, alpha=writer is not diffusers_file)
        if writer is kohya_file:
            # diffusers leaves all alphas but one aside in attention and text encoders.
            spec = {key: (down, up, 1.5) for key, (down, up, _) in spec.items()}
        path = write(tmp_path / f"{index}.safetensors", writer(spec))
        pipe.load_lora_weights(str(tmp_path), weight_name=path.name, adapter_name=f"n{index}", local_files_only=True)
        loras.append((load(adapters, path), (0.8, 1.3)[index]))
    pipe.set_adapters([f"n{index}" for index in range(len(loras))], [scale for _, scale in loras])
    theirs = features({"unet": pipe.unet, "text_encoder": pipe.text_encoder}, networks)
    plain = features(networks, networks)
    with adapters.enabled(loras):
        ours = features(networks, networks)
    assert len(ours) > 300
    for name, value in ours.items():
        assert (value - theirs[name]).norm() <= 1e-4 * theirs[name].norm(), name
    last = "unet.conv_out"
    assert (ours[last] - plain[last]).norm() > 1e-2 * plain[last].norm()


@torch.inference_mode()
def features(networks: dict[str, nn.Module], named_after: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    """What every module of both networks gives, by the names of modules without adapters."""
    found: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(_: nn.Module, __: object, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                found[name] = output.clone()

        return keep

    handles = [
        networks[component].get_submodule(name).register_forward_hook(hook(f"{component}.{name}"))
        for component, network in named_after.items()
        for name, _ in network.named_modules()
        if name
    ]
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 60, (1, 77), generator=generator)
    try:
        text = networks["text_encoder"](tokens)[0]
        latents = torch.randn(1, 4, 16, 16, generator=generator)
        networks["unet"](latents, torch.tensor(50), encoder_hidden_states=text)
    finally:
        for handle in handles:
            handle.remove()
    return found


# SDXL: two text encoders, and modules under older names


@pytest.fixture(scope="module")
def sdxl() -> dict[str, nn.Module]:
    torch.manual_seed(3)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 12, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3),
        cross_attention_dim=12,
        attention_head_dim=2,
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=30,
    )
    config = CLIPTextConfig(
        vocab_size=60, hidden_size=6, intermediate_size=8, projection_dim=6, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=9, bos_token_id=58, eos_token_id=59,
    )  # fmt: skip
    second = CLIPTextModelWithProjection(config)
    return {"unet": unet, "text_encoder": CLIPTextModel(config), "text_encoder_2": second}


def test_kohyas_names_for_sdxl(sdxl: dict[str, nn.Module], tmp_path: Path) -> None:
    # As in files that kohya's scripts wrote for SDXL; see `StableDiffusionXLPipeline` for the names of today.
    names = {
        "unet_input_blocks_0_0": ("unet", "conv_in"),
        "unet_input_blocks_3_0_op": ("unet", "down_blocks.0.downsamplers.0.conv"),
        "unet_input_blocks_4_0_skip_connection": ("unet", "down_blocks.1.resnets.0.conv_shortcut"),
        "unet_input_blocks_4_1_proj_in": ("unet", "down_blocks.1.attentions.0.proj_in"),
        "unet_input_blocks_8_1_transformer_blocks_2_attn1_to_out_0": (
            "unet",
            "down_blocks.2.attentions.1.transformer_blocks.2.attn1.to_out.0",
        ),
        "unet_middle_block_2_emb_layers_1": ("unet", "mid_block.resnets.1.time_emb_proj"),
        "unet_middle_block_1_transformer_blocks_1_ff_net_0_proj": (
            "unet",
            "mid_block.attentions.0.transformer_blocks.1.ff.net.0.proj",
        ),
        "unet_output_blocks_2_2_conv": ("unet", "up_blocks.0.upsamplers.0.conv"),
        "unet_output_blocks_5_1_transformer_blocks_1_attn2_to_k": (
            "unet",
            "up_blocks.1.attentions.2.transformer_blocks.1.attn2.to_k",
        ),
        "unet_output_blocks_6_0_in_layers_2": ("unet", "up_blocks.2.resnets.0.conv1"),
        "unet_label_emb_0_2": ("unet", "add_embedding.linear_2"),
        "unet_time_embed_0": ("unet", "time_embedding.linear_1"),
        "unet_out_2": ("unet", "conv_out"),
        "te1_text_model_encoder_layers_1_self_attn_k_proj": ("text_encoder", "encoder.layers.1.self_attn.k_proj"),
        "te2_text_model_encoder_layers_0_mlp_fc2": ("text_encoder_2", "text_model.encoder.layers.0.mlp.fc2"),
        "te2_text_projection": ("text_encoder_2", "text_projection"),
    }
    spec = random_spec(sdxl, list(names.values()))
    file = {}
    for name, place in names.items():
        down, up, alpha = spec[place]
        file |= {f"lora_{name}.lora_down.weight": down, f"lora_{name}.lora_up.weight": up}
        file[f"lora_{name}.alpha"] = torch.tensor(alpha)
    adapters, before = Adapters(sdxl), bits(sdxl)
    name = load(adapters, write(tmp_path / "xl.safetensors", (file, {})))
    with adapters.enabled([(name, 1.0)]):
        now = bits(sdxl)
    assert_equal(bits(sdxl), before)
    changed = {(c, p.removesuffix(".weight")) for c, p in before if not torch.equal(now[c, p], before[c, p])}
    assert changed == set(names.values())
    for (component, module), factors in spec.items():
        key = component, f"{module}.weight"
        torch.testing.assert_close(now[key], before[key] + expected_change(factors), rtol=1e-5, atol=1e-6)


# Merged checkpoints


def old_names(unet: nn.Module) -> dict[str, torch.Tensor]:
    """A UNet as its checkpoint names it; that these names are right is checked by reading them with diffusers."""
    names = unet_names({name.rpartition(".")[0] for name, _ in unet.named_parameters()})
    return {
        f"model.diffusion_model.{names[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": torch.randn_like(value)
        for name, value in unet.named_parameters()
    }


@pytest.mark.parametrize("which", ["networks", "sdxl"])
def test_old_names_are_those_that_diffusers_reads(which: str, request: pytest.FixtureRequest) -> None:
    unet = request.getfixturevalue(which)["unet"]
    checkpoint = old_names(unet)
    read = convert_ldm_unet_checkpoint(checkpoint, unet.config)
    assert read.keys() == dict(unet.named_parameters()).keys()
    assert len(checkpoint) == len(read)
    own = {name.rpartition(".")[0] for name in read}
    for name, value in read.items():
        old = f"model.diffusion_model.{unet_names(own)[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}"
        assert value is checkpoint[old]


def merged_sd(networks: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    torch.manual_seed(4)
    checkpoint = old_names(networks["unet"])
    for name, value in networks["text_encoder"].named_parameters():
        checkpoint[f"cond_stage_model.transformer.text_model.{name}"] = torch.randn_like(value)
    # What else is in such files.
    extra = {
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "first_stage_model.encoder.conv_in.weight": torch.zeros(3),
        "model_ema.decay": torch.tensor(0.9),
        "betas": torch.zeros(1000),
    }
    return checkpoint | extra


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_a_merged_checkpoint_replaces_what_it_holds(
    adapters: Adapters, networks: dict[str, nn.Module], tmp_path: Path, suffix: str
) -> None:
    checkpoint = {k: v.half() if v.is_floating_point() else v for k, v in merged_sd(networks).items()}
    path = tmp_path / f"merged.{suffix}"
    if suffix == "ckpt":
        torch.save({"state_dict": checkpoint, "global_step": 7}, path)
    else:
        save_file(checkpoint, path)
    name, before = load(adapters, path), bits(networks)
    wanted = {
        ("unet", n): v.float() for n, v in convert_ldm_unet_checkpoint(checkpoint, networks["unet"].config).items()
    }
    for component, parameter in before:
        if component == "text_encoder":
            stored = checkpoint[f"cond_stage_model.transformer.text_model.{parameter}"]
            wanted[component, parameter] = stored.float()
    with adapters.enabled([(name, 1.0)]):
        assert_equal(bits(networks), {key: wanted[key] for key in before})
    spec = random_spec(networks, LINEAR)
    lora = load(adapters, write(tmp_path / "lora.safetensors", kohya_file(spec)))
    with adapters.enabled([(lora, 2.0), (name, 0.25)]):
        for key, value in bits(networks).items():
            mixed = 0.75 * before[key] + 0.25 * wanted[key]
            place = key[0], key[1].removesuffix(".weight")
            mixed += 2.0 * expected_change(spec[place]) if place in spec else 0.0
            torch.testing.assert_close(value, mixed, rtol=1e-5, atol=1e-5)


def test_a_merged_checkpoint_with_a_text_encoder_in_openclips_names(sdxl: dict[str, nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(5)
    checkpoint, text = old_names(sdxl["unet"]), "conditioner.embedders.1.model."
    width = 6
    shapes = {
        "positional_embedding": (9, width),
        "token_embedding.weight": (60, width),
        "text_projection": (width, width),
    }
    shapes |= {"ln_final.weight": (width,), "ln_final.bias": (width,), "logit_scale": ()}
    for layer in range(2):
        block = f"transformer.resblocks.{layer}"
        shapes |= {f"{block}.attn.in_proj_weight": (18, width), f"{block}.attn.in_proj_bias": (18,)}
        shapes |= {f"{block}.attn.out_proj.weight": (width, width), f"{block}.attn.out_proj.bias": (width,)}
        shapes |= {f"{block}.mlp.c_fc.weight": (8, width), f"{block}.mlp.c_fc.bias": (8,)}
        shapes |= {f"{block}.mlp.c_proj.weight": (width, 8), f"{block}.mlp.c_proj.bias": (width,)}
        shapes |= {f"{block}.ln_{n}.{kind}": (width,) for n in (1, 2) for kind in ("weight", "bias")}
    checkpoint |= {text + name: torch.randn(shape) for name, shape in shapes.items()}
    save_file(checkpoint, tmp_path / "merged.safetensors")
    wanted = convert_open_clip_checkpoint(sdxl["text_encoder_2"], checkpoint, prefix=text)
    adapters, before = Adapters(sdxl), bits(sdxl)
    with adapters.enabled([(load(adapters, tmp_path / "merged.safetensors"), 1.0)]):
        now = bits(sdxl)
    assert_equal(bits(sdxl), before)
    for key, value in now.items():
        if key[0] == "text_encoder_2":
            assert torch.equal(value, wanted[key[1]]), key
        assert torch.equal(value, before[key]) == (key[0] == "text_encoder"), key


# What is refused, with the model left as it was


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickles_run_nothing(adapters: Adapters, networks: dict[str, nn.Module], tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    torch.save({"state_dict": merged_sd(networks), "callbacks": Trap(sprung)}, tmp_path / "trap.ckpt")
    with pytest.raises(BadRequestError, match="cannot be read as plain weights") as caught:
        load(adapters, tmp_path / "trap.ckpt")
    assert "safetensors" in str(caught.value.hint)
    assert not sprung.exists()
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(BadRequestError, match="holds no tensors by name"):
        load(adapters, tmp_path / "list.pt")
    (tmp_path / "text.bin").write_text("no pickle")
    with pytest.raises(BadRequestError, match="cannot be read as plain weights"):
        load(adapters, tmp_path / "text.bin")
    # A LoRA in a pickle is one all the same.
    torch.save(kohya_file(random_spec(networks, LINEAR))[0], tmp_path / "lora.bin")
    before = weight(networks, *LINEAR[0]).clone()
    with adapters.enabled([(load(adapters, tmp_path / "lora.bin"), 1.0)]):
        assert not torch.equal(weight(networks, *LINEAR[0]), before)


def test_what_only_the_numbers_show(adapters: Adapters, networks: dict[str, nn.Module], tmp_path: Path) -> None:
    tensors, _ = kohya_file(random_spec(networks, LINEAR))
    up = next(key for key in tensors if "lora_up" in key)
    bad = {"not finite": tensors | {up: tensors[up] * float("nan")}, "int32": tensors | {up: tensors[up].int()}}
    for message, file in bad.items():
        with pytest.raises(BadRequestError, match=message):
            load(adapters, write(tmp_path / "x.safetensors", (file, {})))
    with pytest.raises(NotFoundError, match="there is no LoRA"):
        adapters.load(tmp_path / "absent.safetensors", "0" * 64)
