"""What one attention module attends with, gathered from hooks on the parts it calls.

Shapes: B images, N query positions, M key tokens, D width of all heads together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from featstore.extraction.attention import mean_probabilities
from featstore.models.layers import Keys


class AttentionProbe:
    """Queries, keys and mask of one attention module, gathered while it computes.

    Norms of queries and keys act before their product, so the norms' outputs are taken where there are some. In joint
    attention the image's queries see the image's keys and, after them, the text's.

    Args:
        attention: a stock ``Attention`` of diffusers.
    """

    def __init__(self, attention: Any) -> None:
        self._heads: int = attention.heads
        self._joint = getattr(attention, "add_k_proj", None) is not None
        self.sources: dict[str, nn.Module] = {
            "query": attention.to_q if attention.norm_q is None else attention.norm_q,
            "key": attention.to_k if attention.norm_k is None else attention.norm_k,
        }
        """Modules that make it, in the order in which they are called."""
        if self._joint:
            added = attention.norm_added_k
            self.sources["text key"] = attention.add_k_proj if added is None else added
        self._mask: torch.Tensor | None = None
        self._seen: dict[str, torch.Tensor] = {}

    def begin(self, mask: torch.Tensor | None) -> None:
        """The module is called, with this bias on its scores."""
        self._mask, self._seen = mask, {}

    def end(self) -> None:
        """Forget what a call has left."""
        self._mask = None
        self._seen = {}

    def take(self, name: str, output: torch.Tensor) -> bool:
        """Note what a source has made; whether it was the last of them."""
        # A norm's output has the heads on an axis of their own: (B, heads, N, width).
        self._seen[name] = output.transpose(1, 2).flatten(2) if output.ndim == 4 else output
        return len(self._seen) == len(self.sources)

    def span(self, keys: Keys) -> slice:
        """Where these keys are among all."""
        if keys is Keys.ALL:
            return slice(None)
        if not self._joint:
            raise RuntimeError(f"keys of the {keys.value} are asked of attention that is not joint")
        images = self._seen["key"].shape[1]
        return slice(images) if keys is Keys.IMAGE else slice(images, None)

    def probabilities(self, keys: Keys) -> torch.Tensor:
        """(B, N, keys asked for), float32."""
        query, *parts = (self._seen[name] for name in self.sources)
        key = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        bias = None if self._mask is None else self._mask.reshape(len(key), -1, key.shape[1])
        return mean_probabilities(query, key, self._heads, bias=bias, keep=self.span(keys))
