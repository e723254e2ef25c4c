"""Reading layers out of a stock network by forward hooks, which are always removed again.

Shapes: B images in the batch, C channels, H W map height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import nn

from featstore.extraction.attention import as_maps
from featstore.extraction.probe import AttentionProbe
from featstore.models.layers import Keys, Read, Tap

Maps = dict[str, torch.Tensor]
"""Maps by layer name, each (B, C, H, W)."""


class _AllReadError(Exception):
    """Raised out of the last hook that is needed: the rest of the network has nothing to add."""


class TapSession:
    """Hooks on a network for some layers, in place between ``__enter__`` and ``__exit__``.

    Modules are looked up when the session is entered, so layers that a LoRA has wrapped meanwhile are read with
    it. Nothing of the network is patched, and a session that ends by an exception removes its hooks too.

    Args:
        network: a stock UNet or transformer.
        taps: the layers to read.
    """

    def __init__(self, network: nn.Module, taps: Sequence[Tap]) -> None:
        self._network = network
        self._taps = tuple(taps)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._maps: Maps = {}
        self._aggregates: list[_Aggregate] = []
        self._pending = 0
        self._events = 0
        self._latent_size = (0, 0)
        self._active = False

    def __enter__(self) -> Self:
        try:
            attention: dict[str, list[_Aggregate]] = {}
            for tap in self._taps:
                if tap.read is Read.ATTENTION:
                    aggregate = _Aggregate(tap)
                    self._aggregates.append(aggregate)
                    for module in tap.modules:
                        attention.setdefault(module, []).append(aggregate)
                else:
                    self._hook(tap)
            for name, aggregates in attention.items():
                self._hook_attention(self._network.get_submodule(name), aggregates)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def run(self, latent_size: tuple[int, int], **inputs: Any) -> Maps:
        """One forward pass, as far as the last layer that is read.

        Args:
            latent_size: (h, w) of what is denoised.
            **inputs: all arguments of the network's ``forward``.

        Returns:
            The maps of all layers of the session, in the order asked for.
        """
        self._maps, self._pending = {}, self._events
        self._latent_size = latent_size
        for aggregate in self._aggregates:
            aggregate.reset()
        self._active = True
        try:
            self._network(return_dict=False, **inputs)
        except _AllReadError:
            pass
        finally:
            self._active = False
        maps, self._maps = self._maps, {}
        if self._pending:
            missing = ", ".join(tap.layer for tap in self._taps if tap.layer not in maps)
            raise RuntimeError(f"the forward pass ended without passing {missing}")
        return {tap.layer: maps[tap.layer] for tap in self._taps}

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._aggregates.clear()
        self._maps = {}
        self._events = 0

    def _size(self, tap: Tap) -> tuple[int, int]:
        return self._latent_size[0] // tap.factor, self._latent_size[1] // tap.factor

    def _event(self, handle: Callable[..., None]) -> Callable[..., None]:
        """A hook body that counts itself as done and stops the pass after the last one."""
        self._events += 1

        def hook(*arguments: Any) -> None:
            if not self._active:
                return
            handle(*arguments)
            self._pending -= 1
            if self._pending == 0:
                raise _AllReadError

        return hook

    def _hook(self, tap: Tap) -> None:
        module = self._network.get_submodule(tap.modules[0])
        if tap.read is Read.INPUT:

            def read_input(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
                self._maps[tap.layer] = inputs[0]

            self._handles.append(module.register_forward_pre_hook(self._event(read_input)))
            return
        scale = 1.0
        if tap.read is Read.BRANCH:
            scale = float(self._network.get_submodule(tap.modules[0].rpartition(".")[0]).output_scale_factor)  # type: ignore[arg-type]

        def read_output(_: nn.Module, __: object, output: Any) -> None:
            value: torch.Tensor = output[tap.output] if isinstance(output, tuple) else output
            if tap.read is Read.TOKENS:
                value = value.transpose(1, 2).reshape(value.shape[0], -1, *self._size(tap))
            self._maps[tap.layer] = value / scale if scale != 1.0 else value

        self._handles.append(module.register_forward_hook(self._event(read_output)))

    def _hook_attention(self, attention: Any, aggregates: Sequence[_Aggregate]) -> None:
        probe = AttentionProbe(attention)

        def begin(_: nn.Module, __: object, arguments: Mapping[str, Any]) -> None:
            probe.begin(arguments.get("attention_mask"))

        self._handles.append(attention.register_forward_pre_hook(self._event(begin), with_kwargs=True))
        for name, module in probe.sources.items():

            def take(_: nn.Module, __: object, output: torch.Tensor, name: str = name) -> None:
                if probe.take(name, output):
                    self._put(probe, aggregates)

            self._handles.append(module.register_forward_hook(self._event(take)))

    def _put(self, probe: AttentionProbe, aggregates: Sequence[_Aggregate]) -> None:
        wanted = {aggregate.tap.keys for aggregate in aggregates}
        keys = wanted.pop() if len(wanted) == 1 else Keys.ALL
        probabilities = probe.probabilities(keys)
        for aggregate in aggregates:
            tap = aggregate.tap
            part = probabilities if tap.keys is keys else probabilities[..., probe.span(tap.keys)]
            mean = aggregate.add(as_maps(part, *self._size(tap)))
            if mean is not None:
                self._maps[tap.layer] = mean
        probe.end()


class _Aggregate:
    """The mean of the maps of one tap's attention modules, in the order of the forward pass."""

    def __init__(self, tap: Tap) -> None:
        self.tap = tap
        self.reset()

    def reset(self) -> None:
        """Forget what a pass that broke off left."""
        self._total: torch.Tensor | None = None
        self._count = 0

    def add(self, maps: torch.Tensor) -> torch.Tensor | None:
        """Take one module's maps; the mean once all modules have been seen."""
        self._total = maps if self._total is None else self._total + maps
        self._count += 1
        if self._count < len(self.tap.modules):
            return None
        mean = self._total / self._count
        self.reset()
        return mean


def select(taps: Mapping[str, Tap], layers: Sequence[str]) -> tuple[Tap, ...]:
    """The taps of these layers, which must be names of ``taps``."""
    return tuple(taps[layer] for layer in layers)
