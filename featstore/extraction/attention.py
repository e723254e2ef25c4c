"""Attention probabilities from a layer's queries and keys.

Shapes: B images, N query positions = H * W, M key tokens, D width of all heads together.
"""

from __future__ import annotations

import torch

SCORES_BYTES = 256 * 2**20
"""Scores (float32) that are formed at once at most; about three arrays of this size are held meanwhile."""

_ALL = slice(None)


def mean_probabilities(
    query: torch.Tensor,
    key: torch.Tensor,
    heads: int,
    *,
    bias: torch.Tensor | None = None,
    keep: slice = _ALL,
    scores_bytes: int = SCORES_BYTES,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(d) + bias) of each head, averaged over the heads.

    It is what scaled dot-product attention forms inside; heads are taken one at a time, so that a large
    self-attention map is held once and not once a head. Where the scores of one head would not fit, images are taken
    one by one, each in steps of as many positions as fit: an image's steps do not depend on its place in the batch.

    Args:
        query: (B, N, D), output of the attention's ``to_q``.
        key: (B, M, D), output of its ``to_k``.
        heads: number of heads, a divisor of D.
        bias: (B, 1 or N, M), added to the scores of every head: very negative where a key is masked; None: nothing is.
        keep: the keys whose probabilities are returned; the softmax is over all of them.
        scores_bytes: scores that are formed at once at most.

    Returns:
        (B, N, M), float32; rows add up to 1, or (B, N, keys kept).
    """
    images, positions, tokens = len(query), query.shape[1], key.shape[1]
    step = max(1, scores_bytes // (tokens * 4))
    if images * positions <= step:
        return _mean(query, key, heads, bias, keep)
    kept = len(range(*keep.indices(tokens)))
    result = torch.empty((images, positions, kept), dtype=torch.float32, device=query.device)
    for image in range(images):
        row = slice(image, image + 1)
        for start in range(0, positions, step):
            part = slice(start, start + step)
            # A bias of one row holds for all positions.
            own = bias if bias is None else bias[row, part if bias.shape[1] > 1 else _ALL]
            result[row, part] = _mean(query[row, part], key[row], heads, own, keep)
    return result


def _mean(query: torch.Tensor, key: torch.Tensor, heads: int, bias: torch.Tensor | None, keep: slice) -> torch.Tensor:
    width = query.shape[-1] // heads
    total: torch.Tensor | None = None
    for head in range(heads):
        span = slice(head * width, (head + 1) * width)
        # In float32: half-precision scores overflow before the softmax.
        scores = query[..., span].float() @ key[..., span].float().transpose(1, 2)
        scores = scores * width**-0.5
        if bias is not None:
            scores = scores + bias.float()
        probabilities = torch.softmax(scores, dim=-1)[..., keep]
        total = probabilities if total is None else total.add_(probabilities)
    if total is None:
        raise ValueError(f"an attention layer of {heads} heads")
    return total / heads


def as_maps(probabilities: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, H * W, M) to (B, M, H, W): one channel a key token, seen from every position."""
    count, _, tokens = probabilities.shape
    return probabilities.transpose(1, 2).reshape(count, tokens, height, width)
