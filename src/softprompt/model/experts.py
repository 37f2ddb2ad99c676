"""Mixtures of experts in few bits: the experts of a layer, whose weights transformers holds together, as linear layers
of codes for each expert by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

UNMARKED = {"Llama4TextExperts": True, "Step3p7Experts": False}
"""Classes of experts that transformers has not marked as such, and whether their weights are ``[E, in, out]``."""

WITHIN = r".*\.experts\.\d+\.(up\.\d+|down)"
"""The names of the linear layers within ``CodedExperts``, which plain experts do not have."""

Make = Callable[[torch.Tensor, torch.Tensor | None], nn.Module | None]
"""The layer of a weight ``[out, in]`` and a bias ``[out]``, or None where there is none."""


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds the weights of all experts of a layer together, and computes with them in a way that
    ``CodedExperts`` knows: that of transformers' ``use_experts_implementation``, or of a class of ``UNMARKED``."""
    marked = hasattr(module, "is_transposed") and hasattr(module, "has_bias")
    if not marked and type(module).__name__ not in UNMARKED:
        return False
    own = dict(module.named_parameters(recurse=False))
    into, out = (own.get(name) for name in matrices_of(module))
    return into is not None and out is not None and into.dim() == out.dim() == 3 and len(into) == len(out)


def holds_coded_experts(model: nn.Module) -> bool:
    """Whether some experts of a model are in codes."""
    return any(isinstance(module, CodedExperts) for module in model.modules())


def matrices_of(module: nn.Module) -> tuple[str, str]:
    """The names of the weights that lead into the experts of a layer, and out of them."""
    return "gate_up_proj" if hasattr(module, "gate_up_proj") else "up_proj", "down_proj"


def is_transposed(module: Any) -> bool:
    """Whether the weights of experts are ``[E, in, out]``."""
    return bool(getattr(module, "is_transposed", UNMARKED.get(type(module).__name__)))


def is_separable(module: Any) -> bool:
    """Whether the first half of what leads into an expert is its gate, and not every second number."""
    return bool(getattr(module, "is_concatenated", not hasattr(module, "_apply_gate")))


class Expert(nn.Module):
    """One expert.

    Attributes:
        up: the linear layers that lead into it, whose outputs lie side by side.
        down: the linear layer that leads out of it.
    """

    def __init__(self, up: Sequence[nn.Module], down: nn.Module) -> None:
        super().__init__()
        self.up, self.down = nn.ModuleList(up), down


class CodedExperts(nn.Module):
    """The experts of a layer, each with linear layers of its own, ``0``, ``1``, …: what the module computes that they
    come from, one expert after the other, and only those that tokens are sent to. No more than one weight is made
    numbers at a time.

    Attributes:
        inner: the module, without the weights: what it does between the layers of an expert, and behind them.
    """

    def __init__(self, module: nn.Module, experts: Iterable[Expert]) -> None:
        """
        Args:
            module: of transformers; its weights are taken out.
            experts: all, in order.
        """
        super().__init__()
        self._gated = "gate_up_proj" in matrices_of(module)
        take_out(module)
        for index, expert in enumerate(experts):
            self.add_module(str(index), expert)
        self._count = len(self._modules)
        self.inner = module

    @classmethod
    def of(cls, module: nn.Module, make: Make) -> CodedExperts | None:
        """The experts of a module.

        Args:
            module: for which ``is_fused``; its weights are taken out.
            make: makes each layer.

        Returns:
            None, and the module is as it was, if there is no such layer for one of the weights.
        """
        experts = list[Expert]()
        for index in range(len(getattr(module, matrices_of(module)[0]))):
            up, down = (make(*_matrix(module, name, index)) for name in matrices_of(module))
            if up is None or down is None:
                return None
            experts.append(Expert([up], down))
        return cls(module, experts)

    def forward(
        self, states: torch.Tensor, chosen: torch.Tensor | None = None, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Args:
            states: ``[T, in]``.
            chosen: int64 ``[T, K]``, the experts of each token; a number that no expert has stands for none. None, as
                in Llama 4: the first of ``E`` equal parts of the states is for the first expert, and so on.
            weights: ``[T, K]``, how much each counts.

        Returns:
            ``[T, out]``.
        """
        if chosen is None or weights is None:
            equal = states.view(self._count, -1, states.shape[-1])
            return torch.cat([self._one(index, part) for index, part in enumerate(equal)])
        each, flat = chosen.shape[1], chosen.reshape(-1)
        by_expert = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=self._count).tolist()
        parts = torch.split(states[by_expert // each], counts)
        found = [self._one(index, part) for index, part in enumerate(parts[: self._count]) if len(part)]
        found += [torch.zeros_like(part) for part in parts[self._count :]]
        outputs = torch.cat(found) if found else states[:0]
        inner: Any = self.inner
        if getattr(inner, "has_post_expert_norm", False):
            outputs = inner.post_expert_norm(outputs)
        back = torch.empty_like(by_expert)
        back[by_expert] = torch.arange(len(flat), device=flat.device)
        outputs = outputs[back] * weights.reshape(-1, 1)
        return outputs.view(len(states), each, outputs.shape[-1]).sum(dim=1).to(states.dtype)

    def _one(self, index: int, states: torch.Tensor) -> torch.Tensor:
        """What an expert makes of the states ``[n, in]``."""
        expert: Any = self._modules[str(index)]
        between: Any = self.inner
        outputs = [layer(states) for layer in expert.up]
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        if not self._gated:
            joined = between.act_fn(joined)
        elif hasattr(between, "_apply_gate"):
            joined = between._apply_gate(joined)
        else:
            gate, up = joined.chunk(2, dim=-1)
            joined = between.act_fn(gate) * up
        found: torch.Tensor = expert.down(joined)
        return found


def take_out(module: nn.Module) -> None:
    """Takes the weights and biases of experts out of a module, if it has them."""
    for name in matrices_of(module):
        for own in (name, f"{name}_bias"):
            if own in module._parameters:
                delattr(module, own)


def _matrix(module: nn.Module, name: str, index: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight ``[out, in]`` of an expert, and its bias ``[out]`` or None."""
    weight, biases = getattr(module, name)[index].detach(), getattr(module, f"{name}_bias", None)
    return weight.T if is_transposed(module) else weight, None if biases is None else biases[index].detach()
