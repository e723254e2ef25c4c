"""What decides the bytes of a row, and what must not."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

from featstore import models
from featstore.errors import BadRequestError
from featstore.extraction.forward import Extractor
from featstore.models import ModelSource
from featstore.models.backbones.stable_diffusion import StableDiffusionBackbone as Backbone
from featstore.techniques import Steering, parse, resolve
from tests.tiny_models import TextDataset

N = 7
ALL = "basic,controlnet+prompt,lora,prompt:caption,lora:overfit+controlnet"
LAYERS = "legacy,mid-vit-block0-cross-q,attn-down-self-4,up-level3-repeat0-res-increment"
Maps = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def source(weights_root: Path) -> ModelSource:
    return models.resolve("reference", weights_root=weights_root)


@pytest.fixture(scope="module")
def backbone(source: ModelSource) -> Backbone:
    return source.load()


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    data = TextDataset()
    return np.stack([data.image(str(n)) for n in range(N)])


DIGESTS = [hashlib.sha256(b"%d" % n).hexdigest() for n in range(N)]
CAPTIONS = [f"a horse {n}" for n in range(N)]


def steerings(source: ModelSource, text: str) -> list[Steering]:
    return [resolve(t, dataset=TextDataset(), model=source) for t in parse(text)]


def extractor(backbone: Backbone, text: str = ALL, *, batch_size: int = 4, **options: str) -> Extractor:
    source = backbone.source
    layers = source.expand_layers(options.pop("layers", LAYERS))
    return Extractor(
        backbone, steerings(source, text), layers, batch_size=batch_size, height_px=64, width_px=64, **options
    )


def rows_of(
    one: Extractor, steering: int, images: np.ndarray, rows: list[int], timestep: int = 50, seed: int = 0
) -> Maps:
    latents = one.encode(images[rows])
    digests, captions = [DIGESTS[r] for r in rows], [CAPTIONS[r] for r in rows]
    maps, bad = one.run(steering, latents, images[rows], digests, timestep, seed, captions)
    assert bad == {}
    return maps


def same(a: Maps, b: Maps) -> bool:
    return set(a) == set(b) and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("steering", range(5))
def test_bytes_do_not_depend_on_order_padding_or_company(backbone: Backbone, images: np.ndarray, steering: int) -> None:
    one = extractor(backbone, precision="float32")
    whole = rows_of(one, steering, images, list(range(N)))
    order = [4, 0, 6, 2, 5, 1, 3]
    shuffled = rows_of(one, steering, images, order)
    assert same({k: v[order] for k, v in whole.items()}, shuffled)
    # Alone in its batch, padded with itself; and a short block with rows missing.
    for rows in ([5], [6, 1, 2]):
        assert same({k: v[rows] for k, v in whole.items()}, rows_of(one, steering, images, rows))


def test_bytes_do_not_depend_on_other_techniques_or_loaded_loras(source: ModelSource, images: np.ndarray) -> None:
    alone = {}
    for text in ALL.split(","):
        with source.load() as fresh:
            alone[text] = rows_of(extractor(fresh, text), 0, images, [0, 1, 2])
    with source.load() as shared:
        together = extractor(shared)
        for turn in (range(5), reversed(range(5))):
            for index in turn:
                found = rows_of(together, index, images, [0, 1, 2])
                assert same(found, alone[ALL.split(",")[index]]), ALL.split(",")[index]
        names = list(alone)
        for i, a in enumerate(names):
            assert not any(same(alone[a], alone[b]) for b in names[:i]), "two techniques give the same"


def test_batch_sizes_agree_to_a_thousandth(backbone: Backbone, images: np.ndarray) -> None:
    for index in range(5):
        many, single = (
            rows_of(extractor(backbone, batch_size=size, precision="float32"), index, images, list(range(N)))
            for size in (16, 1)
        )
        for layer in many:
            for row in range(N):
                difference = np.linalg.norm(many[layer][row] - single[layer][row])
                assert difference <= 1e-3 * np.linalg.norm(many[layer][row]), (layer, row)


def test_what_decides_the_bytes_changes_them(backbone: Backbone, images: np.ndarray) -> None:
    one = extractor(backbone, "basic")
    base = rows_of(one, 0, images, [0])
    assert same(base, rows_of(one, 0, images, [0]))
    assert not same(base, rows_of(one, 0, images, [0], timestep=51))
    assert not same(base, rows_of(one, 0, images, [0], seed=1))
    latents = one.encode(images[:1])
    other, _ = one.run(0, latents, images[:1], [DIGESTS[1]], 50, 0)
    assert not same(base, other)


def test_every_forward_has_the_one_batch_shape_and_stops_early(backbone: Backbone, images: np.ndarray) -> None:
    calls: dict[str, list[tuple[int, ...]]] = {"vae": [], "unet": [], "controlnet": [], "last": []}

    def recorder(name: str) -> Callable[..., None]:
        return lambda _, inputs, *rest: calls[name].append(tuple(inputs[0].shape))

    one = extractor(backbone, "controlnet", batch_size=4, layers="up-level1-upsampler-out")
    ref = one.steerings[0].controlnets[0]
    controlnet = backbone.controlnet(ref.folder, ref.digest)
    handles = [
        backbone.vae.encoder.register_forward_pre_hook(recorder("vae")),
        backbone.unet.conv_in.register_forward_pre_hook(recorder("unet")),
        controlnet.conv_in.register_forward_pre_hook(recorder("controlnet")),
        backbone.unet.up_blocks[2].resnets[0].register_forward_pre_hook(recorder("last")),
    ]
    try:
        rows_of(one, 0, images, list(range(N)))
    finally:
        for handle in handles:
            handle.remove()
    latents = [(4, 4, 16, 16)] * 2
    assert calls == {"vae": [(4, 3, 64, 64)] * 2, "unet": latents, "controlnet": latents, "last": []}


def test_hooks_are_gone_even_after_an_error(backbone: Backbone, images: np.ndarray) -> None:
    one = extractor(backbone, "lora")
    latents = one.encode(images)

    def fail(*_: object) -> None:
        raise MemoryError

    before = rows_of(extractor(backbone, "basic"), 0, images, [0])
    handle = backbone.unet.up_blocks[1].register_forward_hook(fail)
    with pytest.raises(MemoryError):
        one.run(0, latents, images, DIGESTS, 50, 0)
    handle.remove()
    hooks = [h for m in backbone.unet.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
    assert hooks == []
    assert same(before, rows_of(extractor(backbone, "basic"), 0, images, [0])), "the LoRA is still enabled"


def test_a_bad_row_is_reported_and_touches_no_other(backbone: Backbone, images: np.ndarray) -> None:
    one = extractor(backbone, "controlnet", layers="down-level0-repeat0-res-out,up-level1-upsampler-out")
    latents = one.encode(images)
    good, none = one.run(0, latents, images, DIGESTS, 50, 0)
    assert none == {}
    spoilt = latents.clone()
    spoilt[1, 0, 3, 3] = float("nan")
    spoilt[6] = float("inf")
    maps, bad = one.run(0, spoilt, images, DIGESTS, 50, 0)
    reason = "NaN or infinity in down-level0-repeat0-res-out"
    assert bad == {1: reason, 6: reason}
    rest = [0, 2, 3, 4, 5]
    assert same({k: v[rest] for k, v in good.items()}, {k: v[rest] for k, v in maps.items()})


def test_overflow_of_half_precision_is_told_from_nan(source: ModelSource, images: np.ndarray) -> None:
    with source.load() as loud:
        with torch.no_grad():
            loud.unet.up_blocks[1].upsamplers[0].conv.weight[0] *= 1e6
        half = extractor(loud, "basic", layers="up-level0-upsampler-out,up-level1-upsampler-out")
        latents = half.encode(images)
        _, bad = half.run(0, latents, images, DIGESTS, 50, 0)
        assert set(bad) == set(range(N))
        assert bad[0].startswith("overflow of float16 (magnitude ")
        assert bad[0].endswith("in up-level1-upsampler-out")
        full = extractor(loud, "basic", layers="up-level1-upsampler-out", precision="float32")
        assert full.run(0, latents, images, DIGESTS, 50, 0)[1] == {}


def test_half_precision_on_disk_is_the_rounded_float32(backbone: Backbone, images: np.ndarray) -> None:
    half = rows_of(extractor(backbone, "basic"), 0, images, [0, 1])
    full = rows_of(extractor(backbone, "basic", precision="float32"), 0, images, [0, 1])
    for layer, value in full.items():
        assert half[layer].dtype == np.float16
        assert value.dtype == np.float32
        assert np.array_equal(half[layer], value.astype(np.float16))


def test_half_precision_compute_is_near(source: ModelSource, backbone: Backbone, images: np.ndarray) -> None:
    full = rows_of(extractor(backbone, "controlnet+lora", precision="float32"), 0, images, [0, 1])
    with source.load("cpu", "bfloat16") as half:
        near = rows_of(extractor(half, "controlnet+lora", precision="float32"), 0, images, [0, 1])
    for layer, value in full.items():
        assert 0 < np.linalg.norm(near[layer] - value) / np.linalg.norm(value) < 0.1, layer


def test_latents_are_the_scaled_posterior_mean(backbone: Backbone, source: ModelSource, images: np.ndarray) -> None:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(source.folder / "vae", use_safetensors=True).eval()
    pixels = torch.from_numpy(images[:3].astype(np.float32)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        expected = 0.7 * vae.quant_conv(vae.encoder(pixels)).chunk(2, dim=1)[0]
    found = extractor(backbone, "basic").encode(images[:3])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert extractor(backbone, "basic").encode(images[:0]).shape == (0, 4, 16, 16)


# texts


def test_embeddings_are_those_of_diffusers_pipeline(source: ModelSource, backbone: Backbone) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(
        source.folder, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    for text in ("a horse, high quality", "", "horse " * 100):
        expected, _ = pipeline.encode_prompt(text, "cpu", 1, do_classifier_free_guidance=False)
        torch.testing.assert_close(backbone.encode_text(text)["encoder_hidden_states"], expected, rtol=1e-5, atol=1e-6)


def test_a_prompt_that_is_cut_off_is_warned_of(backbone: Backbone, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        backbone.encode_text("horse " * 75)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        backbone.encode_text("horse " * 75 + "tail")
    assert "prompt cut after 75 tokens" in caplog.text
    assert "tail" in caplog.text


def test_each_text_is_encoded_once(backbone: Backbone, images: np.ndarray) -> None:
    calls: list[int] = []
    handle = backbone.text_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        one = extractor(backbone, "basic,controlnet,lora,prompt:caption")
        assert len(calls) == 2, "the plain text, without and with the LoRA"
        latents = one.encode(images)
        for steering in range(4):
            one.run(steering, latents, images, DIGESTS, 50, 0, [CAPTIONS[n % 2] for n in range(N)])
        assert len(calls) == 4
    finally:
        handle.remove()


# bad requests


def test_bad_requests(backbone: Backbone, images: np.ndarray) -> None:
    source = backbone.source
    plain = steerings(source, "basic")

    def make(**changes: object) -> Extractor:
        options = {"batch_size": 2, "height_px": 64, "width_px": 64} | changes
        return Extractor(backbone, plain, options.pop("layers", ["unet-in"]), **options)  # type: ignore[arg-type]

    for changes, message in (
        ({"batch_size": 0}, "batch size 0 is below 1"),
        ({"precision": "int4"}, "unknown precision 'int4'; known: float16, float32, int8"),
        ({"layers": []}, "no layers"),
        ({"layers": ["up-level9-out"]}, "unknown layer 'up-level9-out'"),
        ({"height_px": 65}, "multiples of 32 px"),
    ):
        with pytest.raises(BadRequestError, match=message):
            make(**changes)
    one = extractor(backbone, "basic,prompt:caption")
    latents = one.encode(images)
    for timestep in (-1, 1000):
        with pytest.raises(BadRequestError, match=r"outside 0\.\.999"):
            one.run(0, latents, images, DIGESTS, timestep, 0)
    with pytest.raises(BadRequestError, match="rows do not match"):
        one.run(0, latents, images, DIGESTS[:2], 50, 0)
    with pytest.raises(BadRequestError, match="caption"):
        one.run(1, latents, images, DIGESTS, 50, 0)
    with pytest.raises(BadRequestError, match=r"uint8 \(n, 64, 64, 3\)"):
        one.encode(images[:, :32])
