"""Each detector with random weights under the names of the real files, against controlnet-aux' own objects."""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessor

from featstore.errors import BadRequestError
from featstore.extraction import detectors
from featstore.extraction.conditioning import ImageConditions
from featstore.extraction.detectors import Detectors, edges
from featstore.techniques.detectors import DetectorRef, find

CPU = torch.device("cpu")


def aux(module: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"controlnet_aux.{module}")


def drawing(height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(height * 1000 + width)
    image = np.full((height, width, 3), 200, np.uint8)
    for _ in range(6):
        centre = (int(rng.integers(0, width)), int(rng.integers(0, height)))
        cv2.circle(image, centre, int(rng.integers(4, 20)), rng.integers(0, 256, 3).tolist(), -1)
    return np.clip(image + rng.integers(-10, 10, image.shape), 0, 255).astype(np.uint8)


def random_state(network: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights that keep signals about as large as they are; in small files, since values overlap in memory."""
    torch.manual_seed(seed)
    state = {}
    for name, value in network.state_dict().items():
        if value.ndim != 4:
            state[name] = torch.randn(value.shape) * 0.1
            continue
        strides = (7, 5, 3, 1)
        length = 1 + sum((side - 1) * stride for side, stride in zip(value.shape, strides, strict=True))
        fan_in = value[0].numel()
        state[name] = (torch.randn(length) * (2 / fan_in) ** 0.5).as_strided(value.shape, strides)
    return state


def meta(make: Any) -> Any:
    with torch.device("meta"):
        return make()


@pytest.fixture(scope="module")
def annotators(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights root with HED and both of the line drawings' networks."""
    root = tmp_path_factory.mktemp("weights")
    folder = root / "annotators"
    folder.mkdir()
    hed = random_state(meta(aux("hed").ControlNetHED_Apache2), 1)
    hed["norm"] = torch.full((1, 3, 1, 1), 128.0)
    for number in range(1, 6):
        hed[f"block{number}.projection.weight"] = hed[f"block{number}.projection.weight"] / 100
    torch.save(hed, folder / "ControlNetHED.pth")
    for seed, name in enumerate(("sk_model.pth", "sk_model2.pth")):
        torch.save(random_state(meta(lambda: aux("lineart").Generator(3, 1, 3)), 2 + seed), folder / name)
    return root


@pytest.fixture
def weights(annotators: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEATSTORE_WEIGHTS", str(annotators))
    return annotators / "annotators"


def see(name: str, image: np.ndarray) -> np.ndarray:
    return Detectors(CPU).see(image, find(name, allow_pickle=True))


THEIRS = {"hed": ("hed", "HEDdetector"), "lineart": ("lineart", "LineartDetector")}


@pytest.mark.parametrize("name", THEIRS)
def test_networks_see_what_controlnet_aux_sees_where_it_does_not_resize(weights: Path, name: str) -> None:
    image = drawing(64, 128)
    theirs = getattr(aux(THEIRS[name][0]), THEIRS[name][1]).from_pretrained(str(weights))
    expected = theirs(image, detect_resolution=64, image_resolution=64, output_type="np")
    found = see(name, image)
    assert found.dtype == np.uint8
    assert np.array_equal(found, expected)
    assert len(np.unique(found)) > 20, "not the grey of a network that sees nothing"


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("size", [(96, 64), (32, 40)])
def test_other_sizes_come_back_as_they_were(weights: Path, name: str, size: tuple[int, int]) -> None:
    image = drawing(*size)
    theirs = getattr(aux(THEIRS[name][0]), THEIRS[name][1]).from_pretrained(str(weights))
    # The last row and column go on up to multiples of 64 px; what was seen there is cut off.
    height, width = size
    continued = image[np.minimum(np.arange(-(-height // 64) * 64), height - 1)]
    continued = continued[:, np.minimum(np.arange(-(-width // 64) * 64), width - 1)]
    side = min(continued.shape[:2])
    expected = theirs(continued, detect_resolution=side, image_resolution=side, output_type="np")[:height, :width]
    found = see(name, image)
    assert found.shape == (height, width, 3)
    assert np.array_equal(found, expected)


def test_canny_is_that_of_controlnet_aux_where_it_does_not_resize() -> None:
    for size in ((64, 64), (64, 128), (192, 128)):
        image = drawing(*size)
        theirs = aux("canny").CannyDetector()
        side = min(size)
        expected = theirs(image, 100, 200, detect_resolution=side, image_resolution=side, output_type="np")
        assert np.array_equal(see("canny", image), expected)
        assert 20 < (expected[:, :, 0] == 255).sum() < 0.5 * size[0] * size[1]
    odd = drawing(96, 40)
    assert np.array_equal(edges(odd)[:, :, 0], cv2.Canny(odd, 100, 200))
    assert edges(odd).shape == (96, 40, 3)


# poses


class TinyHand(nn.Module):
    """A hand network of one layer: maps of 21 joints and the background, at an eighth of the size."""

    def __init__(self) -> None:
        super().__init__()
        self.model1_0 = nn.Sequential(nn.Conv2d(3, 22, 8, stride=8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model1_0(x)


class TinyFace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 71, 8, stride=8)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.conv(x)]


def body_that_sees_people(image: np.ndarray) -> dict[str, torch.Tensor]:
    """Random weights whose last layer is moved so that each joint stands out somewhere in this image."""
    model = aux("open_pose.model").bodypose_model
    state = random_state(meta(model), 5)
    network = meta(model)
    joints, limbs = "model6_2.Mconv7_stage6_L2", "model6_1.Mconv7_stage6_L1"
    state[f"{limbs}.weight"] = torch.zeros(1).expand(state[f"{limbs}.weight"].shape)
    state[f"{limbs}.bias"] = torch.full((38,), 0.7)
    network.load_state_dict({k: v.contiguous() for k, v in state.items()}, assign=True)
    outputs = []
    handle = network.get_submodule(joints).register_forward_hook(lambda *call: outputs.append(call[2].clone()))
    small = cv2.resize(np.ascontiguousarray(image[:, :, ::-1]), (image.shape[1] * 184 // image.shape[0], 184))
    small = np.pad(small, ((0, 0), (0, -small.shape[1] % 8), (0, 0)), mode="edge")
    with torch.no_grad():
        network(torch.from_numpy(small).permute(2, 0, 1)[None].float() / 256 - 0.5)
    handle.remove()
    (maps,) = outputs
    spread = maps.std(dim=(0, 2, 3))
    state[f"{joints}.weight"] = state[f"{joints}.weight"] / spread[:, None, None, None] * 0.1
    highest = maps.amax(dim=(0, 2, 3)) - state[f"{joints}.bias"]
    state[f"{joints}.bias"] = 0.3 - highest / spread * 0.1
    return {name.partition(".")[2]: value for name, value in state.items()}


@pytest.fixture
def people(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, np.ndarray]:
    """Weights of poses, hands and faces (the latter two of tiny networks), and an image that they see people in."""
    monkeypatch.setenv("FEATSTORE_WEIGHTS", str(tmp_path))
    pose = aux("open_pose")
    for module in ("open_pose.model", "open_pose.hand"):
        monkeypatch.setattr(aux(module), "handpose_model", TinyHand)
    monkeypatch.setattr(aux("open_pose.face"), "FaceNet", TinyFace)
    # Where hands and faces are looked for follows from joints that random weights put anywhere. One person's suffice.
    seen: list[np.ndarray] = []

    def hands(body: Any, image: np.ndarray) -> list[tuple[int, int, int, bool]]:
        first = not any(image is other for other in seen)
        seen.append(image)
        return [(4, 10, 40, True), (20, 60, 32, False)] if first else []

    monkeypatch.setattr(pose.util, "handDetect", hands)
    monkeypatch.setattr(pose.util, "faceDetect", lambda body, image: (8, 100, 48))
    folder = tmp_path / "annotators"
    folder.mkdir()
    image = drawing(256, 64)
    torch.save(body_that_sees_people(image), folder / "body_pose_model.pth")
    torch.manual_seed(7)
    hand, face = TinyHand().state_dict(), TinyFace().state_dict()
    torch.save({name.partition(".")[2]: value for name, value in hand.items()}, folder / "hand_pose_model.pth")
    torch.save(face, folder / "facenet.pth")
    return folder, image


def test_poses_are_those_of_controlnet_aux(people: tuple[Path, np.ndarray]) -> None:
    folder, image = people
    pose = aux("open_pose")
    body, hand, face = (folder / name for name in ("body_pose_model.pth", "hand_pose_model.pth", "facenet.pth"))
    theirs = pose.OpenposeDetector(pose.Body(str(body)), pose.Hand(str(hand)), pose.Face(str(face)))
    found, expected = {}, {}
    for name, whole in (("openpose", False), ("openpose-full", True)):
        found[name] = see(name, image)
        sizes = {"detect_resolution": 64, "image_resolution": 64, "output_type": "np"}
        expected[name] = theirs(image, include_hand=whole, include_face=whole, **sizes)
        assert np.array_equal(found[name], expected[name])
        assert found[name].any(), "nobody was seen"
    assert (found["openpose"] != found["openpose-full"]).any(), "neither hands nor faces were seen"


# depth


class TinyMidas(nn.Module):
    """In the place of MiDaS' half a gigabyte: depth (B, H, W), never negative."""

    def __init__(self, path: str | None = None, *, backbone: str, non_negative: bool) -> None:
        assert (path, backbone, non_negative) == (None, "vitb_rn50_384", True)
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 5, padding=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).relu().squeeze(dim=1)


@pytest.mark.parametrize("training", [False, True])
def test_midas_is_that_of_controlnet_aux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, training: bool) -> None:
    monkeypatch.setenv("FEATSTORE_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(aux("midas.midas.dpt_depth"), "DPTDepthModel", TinyMidas)
    torch.manual_seed(0)
    network = TinyMidas(backbone="vitb_rn50_384", non_negative=True)
    state = network.state_dict()
    folder = tmp_path / "annotators"
    folder.mkdir()
    saved = {"model": state, "optimizer": {"step": 1}} if training else state
    torch.save(saved, folder / "dpt_hybrid-midas-501f0c75.pt")
    image = drawing(64, 128)
    expected = aux("midas").MidasDetector(network)(image, detect_resolution=64, image_resolution=64)
    found = see("depth", image)
    assert np.array_equal(found, expected)
    assert (found.min(), found.max()) == (0, 255)
    odd = see("depth", drawing(96, 40))
    assert odd.shape == (96, 40, 3)
    assert (odd.min(), odd.max()) == (0, 255), "the range is that of the picture, not of what continues it"
    torch.save({name: value * 0 for name, value in state.items()}, folder / "dpt_hybrid-midas-501f0c75.pt")
    assert not see("depth", image).any(), "a flat depth is drawn as black"


def test_the_network_of_midas_runs_with_the_libraries_of_today() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = meta(lambda: aux("midas.midas.dpt_depth").DPTDepthModel(backbone="vitb_rn50_384", non_negative=True))
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 64, 128, device="meta")).shape == (1, 64, 128)


@pytest.fixture
def dpt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A weights root with a tiny depth network of transformers."""
    monkeypatch.setenv("FEATSTORE_WEIGHTS", str(tmp_path))
    torch.manual_seed(0)
    config = DPTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        is_hybrid=False,
        use_auxiliary_head=False,
    )
    folder = tmp_path / "annotators" / "depth"
    network = DPTForDepthEstimation(config)
    # The default initialisation is too small to see anything with.
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    network.save_pretrained(folder)
    DPTImageProcessor(size={"height": 48, "width": 48}).save_pretrained(folder)
    return folder


def test_depth_of_transformers(dpt: Path) -> None:
    network = DPTForDepthEstimation.from_pretrained(dpt).eval()
    processor = DPTImageProcessor.from_pretrained(dpt)
    for size in ((64, 128), (96, 40)):
        image = drawing(*size)
        pixels = processor(images=image, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            depth = network(pixels).predicted_depth
        depth = nn.functional.interpolate(depth[None], size=size, mode="bicubic")[0, 0]
        grey = (depth - depth.min()) / (depth.max() - depth.min())
        found = see("depth", image)
        assert found.shape == (*size, 3)
        assert np.array_equal(found[:, :, 1], (grey.numpy() * 255).astype(np.uint8))
        assert len(np.unique(found)) > 20


# weights


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: state | {"norm": torch.full((1, 3, 1, 1), float("nan"))}, r"NaN or infinity \(norm\)"),
        (lambda state: state | {"norm": torch.zeros(1, 1, 1, 1)}, "size mismatch|Error.*state_dict"),
        (lambda state: {"norm": state["norm"]}, "Missing key|Error.*state_dict"),
        (lambda state: {**state, "run": Path("x")}, "cannot be loaded: UnpicklingError"),
    ],
)
def test_spoilt_weights_are_refused(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Any, message: str
) -> None:
    state = torch.load(weights / "ControlNetHED.pth", weights_only=True)
    (tmp_path / "annotators").mkdir()
    torch.save(spoil(state), tmp_path / "annotators" / "ControlNetHED.pth")
    monkeypatch.setenv("FEATSTORE_WEIGHTS", str(tmp_path))
    with pytest.raises(BadRequestError, match=message) as caught:
        Detectors(CPU).load(find("hed", allow_pickle=True))
    assert "ControlNetHED.pth" in str(caught.value)


def test_a_truncated_file_is_refused(weights: Path, tmp_path: Path) -> None:
    file = tmp_path / "ControlNetHED.pth"
    file.write_bytes((weights / "ControlNetHED.pth").read_bytes()[:1000])
    with pytest.raises(BadRequestError, match="cannot be loaded"):
        Detectors(CPU).load(DetectorRef(name="hed", files=(file,), digest="0" * 64))


def test_converted_weights_see_the_same(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = drawing(64, 64)
    expected = see("lineart", image)
    state = torch.load(weights / "sk_model.pth", weights_only=True)
    monkeypatch.setenv("FEATSTORE_WEIGHTS", str(tmp_path))
    (tmp_path / "annotators").mkdir()
    whole = {name: value.contiguous() for name, value in state.items()}
    save_file(whole, tmp_path / "annotators" / "sk_model.safetensors")
    assert np.array_equal(Detectors(CPU).see(image, find("lineart")), expected)


# company


def test_an_image_is_seen_alone_and_once(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.stack([drawing(64, 64 * n)[:, :64] for n in (1, 2, 3)])
    hed, canny = find("hed", allow_pickle=True), find("canny")
    eyes = Detectors(CPU)
    alone = [ImageConditions(images[n : n + 1]).rows(eyes, hed, [0]) for n in range(3)]
    conditions = ImageConditions(images)
    calls: list[str] = []
    seeing = eyes.see
    monkeypatch.setattr(eyes, "see", lambda image, ref: calls.append(ref.name) or seeing(image, ref))
    together = conditions.rows(eyes, hed, [2, 0, 1, 1])
    again = conditions.rows(eyes, hed, [1, 2])
    lines = conditions.rows(eyes, canny, [1])
    assert calls == ["hed"] * 3 + ["canny"]
    assert together.shape == (4, 3, 64, 64)
    assert together.dtype == torch.float32
    assert torch.equal(together, torch.cat([alone[n] for n in (2, 0, 1, 1)]))
    assert torch.equal(again, together[[2, 0]])
    assert torch.equal(together[3, 0], torch.from_numpy(seeing(images[1], hed)[:, :, 0]).float() / 255)
    assert set(lines.unique().tolist()) == {0.0, 1.0}


def test_settings_of_the_passes_do_not_reach_detectors(weights: Path) -> None:
    image = drawing(64, 64)
    expected = see("hed", image)
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.benchmark = True
    try:
        with torch.inference_mode():
            assert np.array_equal(see("hed", image), expected)
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cudnn.benchmark
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.benchmark = False


def test_importing_controlnet_aux_says_nothing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("KMP_DUPLICATE_LIB_OK", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "controlnet_aux"]:
        monkeypatch.delitem(sys.modules, name)
    hed = detectors._aux("hed")
    assert hed.HEDdetector is not None
    assert "KMP_DUPLICATE_LIB_OK" not in detectors.os.environ
    assert tuple(capfd.readouterr()) == ("", "")
