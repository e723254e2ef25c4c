"""Stage `ip-adapter`: diffusers' plain IP-Adapter on the frozen denoiser, fed by the exported image encoder."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from featstore.models.quiet import quiet
from featstore.pipelines.reference.config import ModelConfig, TrainConfig
from featstore.pipelines.reference.data import add_noise, latent_pool
from featstore.pipelines.reference.export import (
    IMAGE_ENCODER,
    IP_ADAPTER,
    IP_ADAPTER_FILE,
    PIPELINE,
    load_pipeline,
    pack,
)
from featstore.pipelines.reference.image_encoder import embed, load_image_encoder
from featstore.pipelines.reference.loop import Groups, Loop, amp
from featstore.pipelines.reference.networks import build_scheduler
from featstore.pipelines.reference.pool import PoolRender

logger = logging.getLogger(__name__)

EMPTY_CAPTION_ODDS = 0.5
"""Share of empty captions, so that the picture is looked at and not only the words."""
UNSEEN_ODDS = 0.08
"""Share of pictures that are not shown, for guidance: their embedding is zero, as in diffusers' pipelines."""


def cross_attentions(unet: UNet2DConditionModel) -> dict[str, int]:
    """The denoiser's cross-attentions by the name of their processor, with the number they have in files."""
    names = [name for name in unet.attn_processors if not name.endswith("attn1.processor")]
    return {name: 2 * place + 1 for place, name in enumerate(names)}


def give_ip_adapter(unet: UNet2DConditionModel, config: ModelConfig) -> list[torch.nn.Parameter]:
    """Let diffusers' loader give the denoiser a fresh IP-Adapter, and return what is trained of it.

    Its keys start as those of the words, its values at zero: at first it changes nothing.
    """
    width, tokens = config.text_width, config.image_tokens
    projection = torch.nn.Linear(config.vision_width, tokens * width)
    image_proj = {
        "proj.weight": projection.weight.detach(),
        "proj.bias": projection.bias.detach(),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    attentions = {}
    for name, number in cross_attentions(unet).items():
        keys = unet.get_submodule(name.removesuffix(".processor")).to_k.weight.detach()
        attentions[f"{number}.to_k_ip.weight"] = keys.cpu().clone()
        attentions[f"{number}.to_v_ip.weight"] = torch.zeros_like(keys, device="cpu")
    with quiet():
        unet._load_ip_adapter_weights([{"image_proj": image_proj, "ip_adapter": attentions}], low_cpu_mem_usage=False)
    unet.requires_grad_(False)
    parts = [unet.encoder_hid_proj, *(unet.attn_processors[name] for name in cross_attentions(unet))]
    parameters = [parameter for part in parts for parameter in part.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters


def ip_adapter_tensors(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """The denoiser's IP-Adapter in float16, under the names that it is published and loaded by."""
    layer = unet.encoder_hid_proj.image_projection_layers[0]
    tensors = {
        "image_proj.proj.weight": layer.image_embeds.weight,
        "image_proj.proj.bias": layer.image_embeds.bias,
        "image_proj.norm.weight": layer.norm.weight,
        "image_proj.norm.bias": layer.norm.bias,
    }
    for name, number in cross_attentions(unet).items():
        processor = unet.attn_processors[name]
        tensors[f"ip_adapter.{number}.to_k_ip.weight"] = processor.to_k_ip[0].weight
        tensors[f"ip_adapter.{number}.to_v_ip.weight"] = processor.to_v_ip[0].weight
    return {name: value.detach().to("cpu", torch.float16).contiguous() for name, value in tensors.items()}


def export_ip_adapter(folder: Path, unet: UNet2DConditionModel) -> None:
    """Write the denoiser's IP-Adapter beside its image encoder, by rename."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{IP_ADAPTER_FILE}.partial"
    save_file(ip_adapter_tensors(unet), partial)
    partial.replace(folder / IP_ADAPTER_FILE)


def load_ip_adapter(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Load an exported IP-Adapter and its image encoder by diffusers' own loader."""
    with quiet():
        pipeline.load_ip_adapter(
            str(folder), subfolder="", weight_name=IP_ADAPTER_FILE, image_encoder_folder=IMAGE_ENCODER,
            local_files_only=True, low_cpu_mem_usage=False,
        )  # fmt: skip
    pipeline.unet.requires_grad_(False)
    pipeline.image_encoder.requires_grad_(False).eval()


def train_ip_adapter(config: TrainConfig, render: PoolRender, *, stop_at: int | None = None) -> StableDiffusionPipeline:
    """Train to the end, export, and return the pipeline with the averaged IP-Adapter on it."""
    torch.manual_seed(config.seed + 5)
    device, batch = config.device, config.ip_adapter.batch
    pipeline = load_pipeline(config.out / PIPELINE, device)
    encoder = load_image_encoder(config.out / IP_ADAPTER / IMAGE_ENCODER, device)
    pictures = render.wait(min(config.ip_adapter_images, config.pool_images))
    embeddings = embed(encoder, pictures.images, device)
    pool = latent_pool(pictures, pipeline.vae, pipeline.tokenizer, device)
    unet = pipeline.unet
    loop = Loop("ip-adapter", config, [Groups(parameters=give_ip_adapter(unet, config.model))])
    alphas = build_scheduler().alphas_cumprod.to(device)

    def loss_of(rng: torch.Generator) -> Tensor:
        rows, latents = pool.draw(batch, rng)
        ids = pool.captions.draw(rows, rng, empty_odds=EMPTY_CAPTION_ODDS)
        noise = torch.randn(latents.shape, generator=rng, device=device)
        timesteps = torch.randint(1000, (batch,), generator=rng, device=device)
        unseen = torch.rand(batch, generator=rng, device=device) < UNSEEN_ODDS
        seen = embeddings[rows].masked_fill(unseen[:, None], 0.0)[:, None]
        noisy = add_noise(latents, noise, alphas, timesteps)
        with amp(device):
            with torch.no_grad():
                words = pipeline.text_encoder(ids)[0]
            predicted = unet(noisy, timesteps, words, added_cond_kwargs={"image_embeds": [seen]}, return_dict=False)[0]
        return F.mse_loss(predicted.float(), noise)

    def export() -> None:
        with loop.averaged():
            export_ip_adapter(config.out / IP_ADAPTER, unet)
        pack(config)

    if not loop.done:
        loop.run(loss_of, stop_at=stop_at, on_checkpoint=export)
    export()
    loop.averaged().__enter__()  # for good
    unet.requires_grad_(False).eval()
    logger.info("ip-adapter: %s", loop.summary())
    return pipeline
