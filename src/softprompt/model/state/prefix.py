"""What a prefix leaves behind in a model for the tokens that follow it, whatever kind of memory the model has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import torch

if TYPE_CHECKING:
    from typing_extensions import Self


class PrefixState(Protocol):
    """What ``K`` shared prefixes leave behind. Only the model's layers look inside.

    A state is never changed in place: rows share it.
    """

    @property
    def lengths(self) -> tuple[int, ...]:
        """The length in tokens of each prefix, ``K`` of them."""

    @property
    def width(self) -> int:
        """Length in tokens of the longest prefix."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All numbers in it, floating-point, in the model's dtype."""

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> Self:
        """The same with other numbers, in the order and shapes of ``tensors``."""

    def select(self, prefixes: Sequence[int]) -> Self:
        """Some of the prefixes, by index, in that order."""

    def join(self, behind: Self) -> Self:
        """One prefix from two: this one and, computed behind it, another. Both are ``K = 1``."""

    def stack(self, others: Sequence[Self]) -> Self:
        """The prefixes of all states beside each other, these ones first; they may differ in length."""


S = TypeVar("S", bound=PrefixState)


def apart(state: S) -> S:
    """A copy that holds no more memory than its own numbers: some models hand out views of larger tensors."""
    return state.with_tensors([t.clone(memory_format=torch.contiguous_format) for t in state.tensors])


class Detached(Generic[S]):
    """A state cut off from its graph, so that passes behind it can run one after the other: their gradients add up in
    float32, and ``backward`` carries the sum on through the prefix."""

    def __init__(self, state: S) -> None:
        self._state = state
        self._leaves = [tensor.detach().float().requires_grad_() for tensor in state.tensors]

    def leaves(self) -> S:
        """The state for one pass, in its own dtype; backward from there ends in it."""
        tensors = [leaf.to(own.dtype) for leaf, own in zip(self._leaves, self._state.tensors, strict=True)]
        return self._state.with_tensors(tensors)

    def backward(self, again: S | None = None, prefixes: Sequence[int] = ()) -> None:
        """Backward from the state, once, with the gradients that passes behind it have left.

        Args:
            again: some of its prefixes, computed anew with their graph, where the state has none; None: all of them.
            prefixes: which they are.
        """
        state, leaves = again, self._leaves
        found: Sequence[torch.Tensor] = [leaf if leaf.grad is None else leaf.grad for leaf in leaves]
        if state is None:
            state = self._state
        else:
            found = self._state.with_tensors(found).select(prefixes).tensors
        pairs = [
            (own, gradient.to(own.dtype))
            for own, gradient, leaf in zip(state.tensors, found, leaves, strict=True)
            if own.requires_grad and leaf.grad is not None
        ]
        torch.autograd.backward([own for own, _ in pairs], [gradient for _, gradient in pairs])
