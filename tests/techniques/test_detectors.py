from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from featstore.errors import BadRequestError, NotFoundError
from featstore.techniques.detectors import DETECTORS, annotators_folder, find

FILES = {
    "depth": ["dpt_hybrid-midas-501f0c75.pt"],
    "hed": ["ControlNetHED.pth"],
    "lineart": ["sk_model.pth"],
    "openpose": ["body_pose_model.pth"],
    "openpose-full": ["body_pose_model.pth", "hand_pose_model.pth", "facenet.pth"],
}


@pytest.fixture
def annotators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of annotators with files of a few bytes, which planning does not look into."""
    monkeypatch.setenv("FEATSTORE_WEIGHTS", str(tmp_path))
    folder = tmp_path / "annotators"
    folder.mkdir()
    for name in {name for names in FILES.values() for name in names}:
        (folder / name).write_bytes(name.encode())
    return folder


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_canny_needs_no_weights_and_its_numbers_are_part_of_recipes() -> None:
    assert find("canny").parameters() == {"detector": "canny", "low": 100, "high": 200}


@pytest.mark.parametrize("name", FILES)
def test_weights_are_digested(annotators: Path, name: str) -> None:
    found = find(name, allow_pickle=True)
    assert list(found.files) == [annotators / file for file in FILES[name]]
    listed = json.dumps(sorted([file, sha256(file.encode())] for file in FILES[name]), separators=(",", ":"))
    assert found.parameters() == {"detector": name, "digest": sha256(listed.encode())}
    (annotators / FILES[name][-1]).write_bytes(b"other")
    assert find(name, allow_pickle=True).digest != found.digest


@pytest.mark.parametrize("name", FILES)
def test_pickles_need_to_be_allowed(annotators: Path, name: str) -> None:
    with pytest.raises(BadRequestError, match=FILES[name][0]) as caught:
        find(name)
    assert "--allow-pickle" in str(caught.value.hint)
    for file in FILES[name]:
        (annotators / file).with_suffix(".safetensors").write_bytes(b"safe")
    assert {file.suffix for file in find(name).files} == {".safetensors"}
    assert find(name, allow_pickle=True) == find(name), "a safe file goes before a pickle"


def test_what_is_missing_is_named_with_its_place(annotators: Path) -> None:
    (annotators / "facenet.pth").unlink()
    (annotators / "hand_pose_model.pth").unlink()
    for allowed in (True, False):
        with pytest.raises(NotFoundError, match=f"no hand_pose_model.pth, facenet.pth in {annotators}") as caught:
            find("openpose-full", allow_pickle=allowed)
        assert 'hf download lllyasviel/Annotators --include "body_pose_model.pth"' in str(caught.value.hint)
        assert "--allow-pickle" in str(caught.value.hint)
        assert "$FEATSTORE_WEIGHTS" in str(caught.value.hint)
        assert ("cannot be reached" in str(caught.value)) == allowed, "only what may be read is fetched"
    (annotators / "dpt_hybrid-midas-501f0c75.pt").unlink()
    with pytest.raises(NotFoundError) as caught:
        find("depth")
    assert str(annotators / "depth") in str(caught.value.hint)
    with pytest.raises(BadRequestError, match="unknown detector 'het'"):
        find("het")


def test_weights_in_the_cache_of_the_hub_are_found(
    annotators: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = find("hed", allow_pickle=True)
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    repository = cache / "models--lllyasviel--Annotators"
    snapshot = repository / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c" * 40)
    (annotators / "ControlNetHED.pth").rename(snapshot / "ControlNetHED.pth")
    found = find("hed", allow_pickle=True)
    assert found.files == (snapshot / "ControlNetHED.pth",)
    assert found.digest == expected.digest, "another place is another digest"
    with pytest.raises(BadRequestError, match="is a pickle"):
        find("hed")


def test_the_folder_is_below_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEATSTORE_WEIGHTS", raising=False)
    assert annotators_folder() == Path("weights/annotators")
    monkeypatch.setenv("FEATSTORE_WEIGHTS", "elsewhere")
    assert annotators_folder() == Path("elsewhere/annotators")
    (tmp_path / "weights" / "annotators").mkdir(parents=True)
    assert annotators_folder() == Path("weights/annotators")
    (tmp_path / "elsewhere" / "annotators").mkdir(parents=True)
    assert annotators_folder() == Path("elsewhere/annotators")
    assert annotators_folder(tmp_path) == Path("weights/annotators")
    (tmp_path / "annotators").mkdir()
    assert annotators_folder(tmp_path) == tmp_path / "annotators"


def depth_network(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    architectures = {"architectures": ["DPTForDepthEstimation"]}
    (folder / "config.json").write_text(json.dumps(architectures | config))
    (folder / "preprocessor_config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_a_depth_network_of_transformers_goes_before_midas(annotators: Path) -> None:
    folder = depth_network(annotators / "depth")
    found = find("depth")
    assert found.folder == folder
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(before + b" ")
        assert find("depth").digest != found.digest
        (folder / name).write_bytes(before)
    assert find("depth") == found


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["ZoeDepthForDepthEstimation"]}, "holds a ZoeDepthForDepthEstimation; depth comes from DPT"),
        ({"architectures": None}, "network of no name"),
        ({"depth_estimation_type": "metric"}, "estimates metres"),
    ],
)
def test_depth_networks_of_other_kinds(annotators: Path, config: dict[str, Any], message: str) -> None:
    depth_network(annotators / "depth", **config)
    with pytest.raises(BadRequestError, match=message):
        find("depth")


def test_every_detector_says_what_it_sees() -> None:
    assert list(DETECTORS) == ["canny", *FILES]
    assert all(detector.title for detector in DETECTORS.values())
