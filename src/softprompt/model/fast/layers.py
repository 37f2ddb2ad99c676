"""How decoder layers run in training: as they are, compiled, or with activations that are computed again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from softprompt.model.fast.compiled import compiled_if_possible


class LayerModes:
    """Switches the ways of a model's decoder layers; without gradient they always run as they are.

    Attributes:
        compiled: whether they are compiled (``torch.compile``, dynamic shapes). All layers but the first, whose input
            needs no gradient, which would make another graph for one layer. Where the compiler turns out not to work,
            all go on as they are, with a ``SoftPromptWarning``.
        recomputed: whether the backward pass computes each layer's activations again instead of keeping them
            (activation checkpointing, Chen et al. 2016, arXiv:1604.06174): a third more computation, and the memory of
            one layer in place of all. The gradient is the same.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        self._layers = layers
        self.compiled = False
        self.recomputed = False

    def set(self, *, compiled: bool | None = None, recomputed: bool | None = None) -> None:
        """Switches those that are given."""
        wanted = (
            self.compiled if compiled is None else compiled,
            self.recomputed if recomputed is None else recomputed,
        )
        if wanted == (self.compiled, self.recomputed):
            return
        self.compiled, self.recomputed = wanted
        for index, layer in enumerate(self._layers):
            vars(layer).pop("forward", None)
            forward = layer.forward
            if self.compiled and index:
                forward = compiled_if_possible(forward, lambda: self.set(compiled=False))
            if self.recomputed:
                forward = _computed_again(forward)
            if forward != layer.forward:
                layer.forward = forward

    def make_ready(self) -> None:
        """Puts the last layer's weights together, where they are in parts (FSDP2): a backward pass that begins at keys
        and values inside it does not come by its output, at which the others' weights are put together."""
        put_together = getattr(self._layers[-1], "unshard", None)
        if put_together is not None:
            put_together()

    def eager(self) -> contextlib.AbstractContextManager[Any]:
        """Inside, layers are not compiled."""
        return torch.compiler.set_stance("force_eager") if self.compiled else contextlib.nullcontext()


def _computed_again(forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return call
