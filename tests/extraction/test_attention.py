from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from featstore.extraction.attention import as_maps, mean_probabilities


def test_probabilities_against_loops_over_every_number() -> None:
    torch.manual_seed(0)
    query, key, heads = torch.randn(2, 6, 8), torch.randn(2, 5, 8), 4
    found = mean_probabilities(query, key, heads)
    assert found.shape == (2, 6, 5)
    for b in range(2):
        for n in range(6):
            expected = [0.0] * 5
            for head in range(heads):
                scores = []
                for m in range(5):
                    dot = sum(float(query[b, n, head * 2 + i]) * float(key[b, m, head * 2 + i]) for i in range(2))
                    scores.append(math.exp(dot / math.sqrt(2)))
                for m in range(5):
                    expected[m] += scores[m] / sum(scores) / heads
            torch.testing.assert_close(found[b, n], torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_probabilities_are_those_inside_scaled_dot_product_attention() -> None:
    torch.manual_seed(1)
    query, key, heads = torch.randn(3, 64, 40), torch.randn(3, 77, 40), 5
    split = [t.unflatten(2, (heads, 8)).transpose(1, 2) for t in (query, key)]
    # With the identity for values, attention returns its own probabilities.
    values = torch.eye(77).expand(3, heads, 77, 77)
    expected = functional.scaled_dot_product_attention(*split, values).mean(dim=1)
    torch.testing.assert_close(mean_probabilities(query, key, heads), expected, rtol=1e-5, atol=1e-6)


def test_half_precision_scores_do_not_overflow() -> None:
    query = torch.full((1, 2, 4), 300.0, dtype=torch.float16)
    key = torch.cat([query, -query], dim=1)
    found = mean_probabilities(query, key, 1)
    torch.testing.assert_close(found, torch.tensor([[[0.5, 0.5, 0.0, 0.0]] * 2]))


def test_maps_have_a_channel_a_token_and_keep_positions() -> None:
    probabilities = torch.arange(2 * 6 * 5).reshape(2, 6, 5).float()
    maps = as_maps(probabilities, 2, 3)
    assert maps.shape == (2, 5, 2, 3)
    for token in range(5):
        for y in range(2):
            for x in range(3):
                assert maps[1, token, y, x] == probabilities[1, y * 3 + x, token]


@pytest.mark.parametrize("positions", [1, 5, 24])
@pytest.mark.parametrize("bias_rows", [None, 1, 24])
@pytest.mark.parametrize("keep", [slice(None), slice(10), slice(10, None)])
def test_chunks_of_images_and_positions_have_the_values_of_the_whole(
    positions: int, bias_rows: int | None, keep: slice
) -> None:
    torch.manual_seed(2)
    query, key, heads = torch.randn(3, 24, 8), torch.randn(3, 33, 8), 2
    bias = None if bias_rows is None else torch.where(torch.rand(3, bias_rows, 33) < 0.3, -10000.0, 0.5)
    scores = torch.einsum("bnhd,bmhd->bhnm", query.view(3, 24, 2, 4), key.view(3, 33, 2, 4)) / 4**0.5
    masked = scores if bias is None else scores + bias[:, None]
    expected = masked.softmax(-1).mean(1)[..., keep]
    found = mean_probabilities(query, key, heads, bias=bias, keep=keep, scores_bytes=positions * 33 * 4)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_chunks_do_not_depend_on_the_place_in_the_batch() -> None:
    torch.manual_seed(3)
    query, key = torch.randn(3, 24, 8), torch.randn(3, 33, 8)
    order = [2, 0, 1]
    found = mean_probabilities(query, key, 2, scores_bytes=7 * 33 * 4)
    assert torch.equal(mean_probabilities(query[order], key[order], 2, scores_bytes=7 * 33 * 4), found[order])


def test_no_more_scores_at_once_than_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    softmax = torch.softmax

    def watched(scores: torch.Tensor, dim: int) -> torch.Tensor:
        seen.append(scores.numel() * scores.element_size())
        return softmax(scores, dim=dim)

    monkeypatch.setattr(torch, "softmax", watched)
    mean_probabilities(torch.randn(2, 24, 8), torch.randn(2, 33, 8), 2, scores_bytes=1000)
    # 7 positions of 33 scores of 4 bytes; four steps an image and head.
    assert max(seen) == 7 * 33 * 4
    assert len(seen) == 2 * 2 * 4
