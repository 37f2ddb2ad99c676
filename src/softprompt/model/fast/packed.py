"""Frozen weights packed once for a CPU's bf16 products of few rows, which would otherwise lay them out each time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from softprompt.model.coded import CodedLinear
from softprompt.model.quantized import is_quantized

MOST_BYTES = 1 << 30
"""Bytes of all copies: they lie beside the plain weights, which training, digests and the embedding table need."""


SAMPLE = 1024
"""Numbers of a weight by which a change of it is noticed that torch does not count, one made through ``.data``."""


class PackedWeights:
    """Copies of the weights of a model's linear layers in oneDNN's own layout, made when they are first used. Of those
    in ``int4``, the codes are copied.

    ``benchmarks/packed.py`` measures what they gain. They give the bits of the plain product.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = [layer for layer in _plain_layers(model) if type(layer.weight) is nn.Parameter]  # whole, not divided
        fitting = sum(layer.weight.nbytes for layer in layers) <= MOST_BYTES
        self._layers = layers if fitting and can_pack(model) else []
        coded = [layer for layer in model.modules() if isinstance(layer, CodedLinear)]
        small = sum(layer.codes.nbytes for layer in coded) <= MOST_BYTES
        self._coded = coded if small and computes_bf16() else []
        self._laid_out: dict[CodedLinear, tuple[tuple[int, int], tuple[torch.Tensor, torch.Tensor] | None]] = {}
        """Of each layer in few bits: where its codes are and how often torch saw them change, and what it lays out."""
        self._copies: dict[nn.Linear, tuple[tuple[int, int], torch.Tensor, torch.Tensor]] = {}
        """Of each layer: where its weight is and how often torch saw it change, some of its numbers, and the copy."""
        self._users = 0

    @contextmanager
    def used(self) -> Iterator[None]:
        """Inside, passes without gradient compute with the copies, where the model can be packed. It may be entered
        again. A weight that is not what it was (merged with an adapter, say) is packed anew the next time."""
        self._users += 1
        if self._users == 1:
            for layer in self._layers:
                if "forward" not in vars(layer) and not layer.weight.requires_grad:
                    layer.forward = partial(_forward, self._copy(layer), layer)  # type: ignore[method-assign]
            for coded in self._coded:
                coded.packed = self._layout(coded)
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                for layer in self._layers:
                    if isinstance(vars(layer).get("forward"), partial):
                        del layer.forward
                for coded in self._coded:
                    coded.packed = None

    def _layout(self, layer: CodedLinear) -> tuple[torch.Tensor, torch.Tensor] | None:
        codes = layer.codes
        state = (codes.data_ptr(), 0 if codes.is_inference() else codes._version)
        found = self._laid_out.get(layer)
        if found is None or found[0] != state:
            found = self._laid_out[layer] = state, layer.lay_out()
        return found[1]

    def _copy(self, layer: nn.Linear) -> torch.Tensor:
        weight = layer.weight.detach()
        state = (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
        some = weight.flatten()[:: max(1, weight.numel() // SAMPLE)]
        found = self._copies.get(layer)
        if found is None or found[0] != state or not torch.equal(found[1], some):
            copy = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
            found = self._copies[layer] = state, some.clone(), copy
        return found[2]


def _plain_layers(model: nn.Module) -> list[nn.Linear]:
    """Linear layers whose weights are not quantised."""
    linear = (module for module in model.modules() if type(module) is nn.Linear)
    return [layer for layer in linear if not is_quantized(layer)]


def can_pack(model: nn.Module) -> bool:
    """Whether it is a bf16 model on a CPU whose library computes in bf16."""
    weights = [layer.weight for layer in _plain_layers(model)]
    ours = bool(weights) and all(w.device.type == "cpu" and w.dtype == torch.bfloat16 for w in weights)
    return ours and computes_bf16()


def computes_bf16() -> bool:
    """Whether this processor's library does."""
    return bool(torch._C._has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _forward(copy: torch.Tensor, layer: nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor
    if torch.is_grad_enabled():
        found = nn.functional.linear(inputs, layer.weight, layer.bias)
    else:
        found = torch.ops.mkldnn._linear_pointwise(inputs, copy, layer.bias, "none", [], "")
    return found
