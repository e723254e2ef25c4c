"""LoRAs on a loaded model: folded into copies of the weights that they touch, which stand in for them on demand.

``W' = W + sum of scale * alpha / r * B A`` (Hu et al., 2021, section 4.1): products and sums in float32, rounded once
to the model's type. A merged checkpoint M counts as ``scale * (M - W)``. The passes then run on plain modules, as fast
as without a LoRA.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from featstore.models.lora_files import Tensors, read_lora
from featstore.models.lora_layout import Layout, LowRank
from featstore.models.merged_layout import Replacement

Loras = tuple[tuple[str, float], ...]
"""LoRAs that act together: (name from `Adapters.load`, scale)."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Lora:
    layout: Layout
    tensors: Tensors


@dataclasses.dataclass(slots=True, kw_only=True)
class _Weight:
    """One parameter of the model while LoRAs are folded into it."""

    owner: nn.Module
    name: str
    folded: torch.Tensor

    @property
    def parameter(self) -> nn.Parameter:
        # Asked for anew each time: moving a module to another device may make new ones.
        return self.owner.get_parameter(self.name)


class Adapters:
    """The LoRAs of one model.

    Outside of `enabled` the model's own tensors are in place, never written to: it computes bit for bit what it
    computed before any LoRA was loaded, and what a set of LoRAs gives does not depend on those used before.

    Memory beside the model: the files' tensors, and a copy of every weight that the last set of LoRAs touches. It is
    kept, so that going in and out of the same set costs next to nothing; another set is folded anew.

    Args:
        modules: what a LoRA can change, by the name that files give it: ``unet`` or ``transformer``, then
            ``text_encoder``, ``text_encoder_2``. Sums are formed on the device of the first.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules: dict[str, nn.Module] | None = dict(modules)
        # Now, for other techniques may add parameters of their own later.
        self._shapes = {
            component: {name: tuple(value.shape) for name, value in module.named_parameters()}
            for component, module in modules.items()
        }
        self._loras: dict[str, _Lora] = {}
        self._folded: tuple[Loras, list[_Weight]] = ((), [])
        self._acting = False

    def load(self, path: Path, digest: str) -> str:
        """Load a LoRA file, once for each digest, and return its name; the model stays as it is.

        Raises:
            NotFoundError: if there is no such file.
            BadRequestError: if it is damaged, holds no LoRA, or does not fit the model with all of its tensors.
        """
        self._open_modules()
        if digest not in self._loras:
            found, tensors = read_lora(path, self._shapes)
            self._loras[digest] = _Lora(layout=found, tensors=tensors)
        return digest

    @contextlib.contextmanager
    def enabled(self, loras: Sequence[tuple[str, float]]) -> Iterator[None]:
        """Context in which exactly these LoRAs act, each with its scale."""
        self._open_modules()
        if self._acting:
            raise RuntimeError("LoRAs are enabled already; one set acts at a time")
        if not loras:
            yield
            return
        own: list[tuple[_Weight, torch.Tensor]] = []
        self._acting = True
        try:
            for weight in self._weights(tuple(loras)):
                parameter = weight.parameter
                weight.folded = _beside(weight.folded, parameter)
                own.append((weight, parameter.data))
                parameter.data = weight.folded
            yield
        finally:
            self._acting = False
            for weight, tensor in own:
                parameter = weight.parameter
                parameter.data = _beside(tensor, parameter)

    def clear(self) -> None:
        """Forget the modules."""
        self._modules = None
        self._loras.clear()
        self._folded = ((), [])

    def _open_modules(self) -> dict[str, nn.Module]:
        if self._modules is None:
            raise RuntimeError("the backbone is closed; load it again")
        return self._modules

    def _weights(self, loras: Loras) -> list[_Weight]:
        """The weights that a set of LoRAs touches, folded."""
        if self._folded[0] != loras:
            # The memory of the last set first.
            self._folded = ((), [])
            self._folded = (loras, self._fold(loras))
        return self._folded[1]

    def _fold(self, loras: Loras) -> list[_Weight]:
        modules = self._open_modules()
        # One device whatever has been moved where in the meantime: others round sums otherwise.
        device = next(next(iter(modules.values())).parameters()).device
        acting: dict[tuple[str, str], list[tuple[LowRank | Replacement, Tensors, float]]] = {}
        for name, scale in loras:
            lora = self._loras[name]
            changes: tuple[LowRank | Replacement, ...] = (*lora.layout.replaced, *lora.layout.low_rank)
            for part in changes:
                acting.setdefault((part.component, part.parameter), []).append((part, lora.tensors, scale))
        weights = []
        with torch.inference_mode(False), torch.no_grad(), _full_precision():
            for (component, parameter), parts in acting.items():
                path, _, name = parameter.rpartition(".")
                owner = modules[component].get_submodule(path)
                own = owner.get_parameter(name).data
                # Of W + scale (M - W) the W's first: at scale 1 nothing of them is left, and M stays what it is.
                total = own.to(device).float() * (
                    1.0 - sum(scale for part, _, scale in parts if isinstance(part, Replacement))
                )
                for part, tensors, scale in parts:
                    total += scale * _change(part, tensors, device).reshape(own.shape)
                # As the model's own lies in memory, so that the same kernels are chosen.
                folded = torch.empty_like(own, device=device).copy_(total)
                weights.append(_Weight(owner=owner, name=name, folded=folded))
        return weights


def _change(part: LowRank | Replacement, tensors: Tensors, device: torch.device) -> torch.Tensor:
    return _product(part, tensors, device) if isinstance(part, LowRank) else _whole(part, tensors, device)


def _product(part: LowRank, tensors: Tensors, device: torch.device) -> torch.Tensor:
    """``alpha / r * up (mid) down`` in float32, (out, in) or (out, in, kh, kw)."""
    down, up = (tensors[name].to(device).float() for name in (part.down, part.up))
    rank = down.shape[0]
    factor = part.factor if part.alpha is None else float(tensors[part.alpha]) / rank
    if part.mid is None:
        product = (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])
    else:
        mid = tensors[part.mid].to(device).float()
        product = torch.einsum("oa,abhw,bi->oihw", up.flatten(1), mid, down.flatten(1))
    return product * factor


def _whole(part: Replacement, tensors: Tensors, device: torch.device) -> torch.Tensor:
    value = tensors[part.stored.key].to(device).float()
    if part.stored.third is not None:
        value = value.chunk(3)[part.stored.third]
    return value.T if part.stored.transposed else value


def _beside(tensor: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """The tensor on the parameter's device."""
    with torch.inference_mode(False):
        return tensor.to(parameter.device)


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Products in float32 as such, whatever short cuts are allowed elsewhere."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
