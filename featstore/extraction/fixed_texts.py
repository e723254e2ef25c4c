"""Keys and values of a fixed prompt, computed once a batch and not once a row.

A prompt that is the same for all images has the same keys and values in every row's cross-attention. A fixed text
goes through ``to_k`` and ``to_v`` alone, in a product of its own shape, and its rows share the result. So what a
row gets does not depend on whether the rows beside it have the same text, another one, or a caption of their own.

Shapes: B rows of a batch, L tokens, D width of a text.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Self

import torch
from torch import nn


class FixedTexts:
    """Hooks on the cross-attention of stock networks, in place between ``__enter__`` and ``__exit__``.

    Only projections that are fed the text as it was encoded take part; a network that projects texts first (PixArt)
    is left as it is.

    Args:
        networks: a denoiser and the ControlNets that act on it.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        self._networks = tuple(networks)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._states: torch.Tensor | None = None
        self._shared = False
        self._firsts: dict[Hashable, list[int]] = {}

    def __enter__(self) -> Self:
        for network in self._networks:
            for attention in network.modules():
                if getattr(attention, "is_cross_attention", False):
                    for projection in (attention.to_k, attention.to_v):
                        self._handles.append(projection.register_forward_pre_hook(self._narrow))  # type: ignore[union-attr]
                        self._handles.append(projection.register_forward_hook(self._widen))  # type: ignore[union-attr]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._states = None

    def speak(self, states: torch.Tensor | None, texts: Sequence[Hashable]) -> None:
        """Say what the rows of the next forward are told.

        Args:
            states: (B, L, D), the very tensor that the networks are given; None: they take no text.
            texts: for each row, what names its fixed text, None where it has a text of its own.
        """
        self._states = states
        self._firsts = {}
        for row, text in enumerate(texts):
            if text is not None:
                self._firsts.setdefault(text, []).append(row)
        self._shared = len(self._firsts) == 1 and None not in texts

    def _narrow(self, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        states = self._states
        if states is None or not self._shared or inputs[0] is not states:
            return None
        return (states[:1], *inputs[1:])

    def _widen(self, projection: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        states = self._states
        if states is None or not self._firsts:
            return None
        if self._shared:
            if inputs[0].data_ptr() != states.data_ptr() or len(output) != 1:
                return None
            wide = output.expand(len(states), *output.shape[1:])
            return wide.contiguous() if wide.is_cuda else wide
        if inputs[0] is not states:
            return None
        mixed = output.clone()
        for rows in self._firsts.values():
            # Not called but forwarded: these hooks are on it.
            mixed[rows] = projection.forward(states[rows[0] : rows[0] + 1])
        return mixed
