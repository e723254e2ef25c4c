import json

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from featstore.errors import CorruptError, IncompatibleError, NotFoundError, StorageError
from featstore.heads import load_head, read_head_json, save_head
from featstore.recipe import canonical_json, sha256_hex
from tests.heads.test_head import SPEC, features, head

NOT_READ = [{"featstore_head": 3}, {"featstore_head": 3, "facts": {}}, {"featstore_head": 1}, {"kind": "hologram"}]
NOT_BUILT = [{"config": {"members": 3, "temperature": 1.0}}, {"facts": {"classes": ["a", "b"]}}]


@pytest.fixture
def saved(tmp_path):
    return save_head(tmp_path / "deep" / "head", head(), metrics={"miou": 0.25}, extra={"dataset": "toyhorse"})


def test_a_loaded_head_predicts_bit_for_bit_the_same(saved):
    maps, attention = features()
    before, after = head().predict(maps, attention), load_head(saved).predict(maps, attention)
    for name in ("labels", "member_labels", "uncertainty", "weights", "assigner_weights"):
        np.testing.assert_array_equal(getattr(before, name), getattr(after, name))
    assert load_head(saved).spec == SPEC
    assert load_head(saved).config == head().config


def test_the_json_says_what_the_head_needs_and_scored(saved):
    document = read_head_json(saved)
    assert document["metrics"] == {"miou": 0.25}
    assert document["extra"] == {"dataset": "toyhorse"}
    assert document["features"]["runs"][1] == {"name": "prompt", "fingerprint": "1" * 64}
    assert document["facts"]["classes"] == ["a", "b", "c", "d"]
    assert document["versions"]["torch"] == torch.__version__
    assert sorted(path.name for path in saved.iterdir()) == ["head.json", "head.safetensors"]


@pytest.mark.parametrize("name", ["head.json", "head.safetensors"])
def test_any_flipped_bit_is_found(saved, name):
    path = saved / name
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for place in rng.integers(0, len(good), 60):
        bad = bytearray(good)
        bad[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(bad))
        try:
            load_head(saved)
        except (CorruptError, IncompatibleError):
            refused += 1  # a flip in the format's number reads as a newer format
        else:
            # white space between JSON values carries nothing; everything else must be noticed
            assert json.loads(bytes(bad)) == json.loads(good)
    assert refused > 40
    path.write_bytes(good)
    load_head(saved)


@pytest.mark.parametrize("name", ["head.json", "head.safetensors"])
def test_a_truncated_file_is_corrupt_and_a_missing_one_not_found(saved, name):
    path = saved / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CorruptError, match=name):
        load_head(saved)
    path.unlink()
    with pytest.raises(NotFoundError, match=name):
        load_head(saved)


def rewrite(folder, **changes):
    """Change head.json and make its digest right again."""
    document = json.loads((folder / "head.json").read_text())
    del document["sha256"]
    document.update(changes)
    document["sha256"] = sha256_hex(canonical_json(document))
    (folder / "head.json").write_text(json.dumps(document))


def test_weights_of_another_head_are_found(saved):
    tensors = load((saved / "head.safetensors").read_bytes())
    (saved / "head.safetensors").write_bytes(save({name: value + 1 for name, value in tensors.items()}))
    with pytest.raises(CorruptError, match="does not match the digest"):
        load_head(saved)


@pytest.mark.parametrize("changes", NOT_READ)
def test_a_newer_format_or_another_kind_is_refused_as_such(saved, changes):
    rewrite(saved, **changes)
    with pytest.raises(IncompatibleError, match="this version reads"):
        load_head(saved)


def test_a_newer_format_with_another_digest_is_still_called_newer(saved):
    document = json.loads((saved / "head.json").read_text())
    document["featstore_head"] = 7
    (saved / "head.json").write_text(json.dumps(document))
    with pytest.raises(IncompatibleError, match="format 7"):
        load_head(saved)


@pytest.mark.parametrize("changes", NOT_BUILT)
def test_a_head_that_does_not_build_is_incompatible(saved, changes):
    rewrite(saved, **changes)
    with pytest.raises(IncompatibleError, match="cannot be used"):
        load_head(saved)


def test_what_is_no_head_is_refused(tmp_path):
    with pytest.raises(NotFoundError, match="no head"):
        load_head(tmp_path)
    (tmp_path / "head.json").write_text("[]")
    with pytest.raises(CorruptError, match="describes no head"):
        load_head(tmp_path)


def test_saving_again_replaces_and_a_failed_save_leaves_the_old_head(saved, tmp_path):
    save_head(saved, head(), metrics={"miou": 0.5})
    assert read_head_json(saved)["metrics"] == {"miou": 0.5}
    with pytest.raises(ValueError, match="JSON"):
        save_head(saved, head(), metrics={"miou": float("nan")})
    assert read_head_json(saved)["metrics"] == {"miou": 0.5}
    load_head(saved)


def test_an_unwritable_place_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot write"):
        save_head(tmp_path / "file" / "head", head())
