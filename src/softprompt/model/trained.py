"""Trained prefixes: the numbers that a soft prompt has in every layer of a base model, in place of vectors before the
first.

Where all layers keep keys and values of one size, they are those, ``[P, L, 2, H_kv, D]`` (Li and Liang 2021, §4).
Everywhere else they are the tensors of the state's ``named``, one after the other, ``[N]``: a *trained state*. Of
recurrent layers it holds what they start from (S₀ tuning, arXiv 2604.01168); of layers with attention the keys and
values, each of its own size, or the latents that they keep in their place (DeepSeek). Layers that read the keys and
values of others (Gemma 3n, Gemma 4) have nothing of their own. ``P`` counts the keys and values of a layer with
attention; without any, it is 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from softprompt.errors import BaseModelError, ConfigError
from softprompt.model.state.kv import KEYS, VALUES, PrefixKV
from softprompt.model.state.prefix import PrefixState
from softprompt.model.state.recurrent import RecurrentState

Shapes = dict[str, tuple[int, ...]]
"""The shape of each tensor of a trained state by its name, in the order of their numbers."""


class TrainedPrefixes:
    """What a base model can take as a trained prefix."""

    def __init__(self, lm: Any) -> None:
        """
        Args:
            lm: a ``FrozenLM``, whose module imports this one.
        """
        self._lm = lm

    @cached_property
    def why_none(self) -> str:
        """Why this model can have no trained prefix, in plain words; empty if it can."""
        return "" if self.is_state else self.why_no_kv

    @property
    def is_state(self) -> bool:
        """Whether a trained prefix of this model is a trained state."""
        return bool(self._lm.shares_prefix) and self._lm.world.shard != "tp" and bool(self.why_no_kv)

    @cached_property
    def why_no_kv(self) -> str:
        """Why keys and values alone cannot be one, in plain words; empty if they can."""
        lm = self._lm
        if lm.world.shard == "tp":
            return "its heads are divided over several processes"
        if not lm.shares_prefix or lm.recurrent or lm.keeps_latents:
            return str(lm.why_whole_sequences) or "not all of its layers keep keys and values, but a state or latents"
        assert isinstance(self._empty, PrefixKV)
        if self._empty.reads:
            return "some of its layers read the keys and values of others"
        shapes = {tensor.shape for tensor in self._empty.tensors}
        return "the keys and values of its layers differ in size" if len(shapes) > 1 else ""

    @cached_property
    def _empty(self) -> PrefixKV | RecurrentState:
        """A prefix of no tokens."""
        with torch.no_grad(), self._lm.eager():
            empty: PrefixKV | RecurrentState = self._lm.prefix_kv((), None)
        return empty

    @cached_property
    def kv_shape(self) -> tuple[int, ...]:
        """``(L, 2, H_kv, D)``, the shape of a virtual token of a KV prefix; only without ``why_no_kv``."""
        assert isinstance(self._empty, PrefixKV)
        return tuple(self._empty.numbers().shape[1:])

    def shapes(self, num_virtual_tokens: int) -> Shapes:
        """What a trained state of so many virtual tokens consists of; nothing where a trained prefix is none."""
        if not self.is_state:
            return {}
        shapes = {name: tuple(tensor.shape) for name, tensor in self._empty.named().items()}
        return {
            name: (num_virtual_tokens, *shape[1:]) if name.endswith((KEYS, VALUES)) else shape
            for name, shape in shapes.items()
        }

    def shape(self, num_virtual_tokens: int) -> tuple[int, ...]:
        """The shape of a trained prefix of so many virtual tokens; only without ``why_none``."""
        if self.is_state:
            return (sum(map(math.prod, self.shapes(num_virtual_tokens).values())),)
        return (num_virtual_tokens, *self.kv_shape)

    def length(self, shape: Sequence[int]) -> int:
        """``P``: of numbers of this shape, how many places they take in a sequence.

        Args:
            shape: ``(P, H)``, ``(P, L, 2, H_kv, D)`` or ``(N,)``.
        """
        if len(shape) > 1 or not self.is_state:
            return int(shape[0])
        none, one = self.shape(0)[0], self.shape(1)[0]
        return (int(shape[0]) - none) // (one - none) if one > none else 0

    def places(self, num_virtual_tokens: int) -> int:
        """How many places a trained prefix that starts from so many virtual tokens takes: as many, or none where no
        layer has attention."""
        return self.length(self.shape(num_virtual_tokens)) if self.is_state else num_virtual_tokens

    def require(self, name: str, parts: Mapping[str, Sequence[int]], num_virtual_tokens: int) -> None:
        """Sees whether a trained state has the tensors that this model's layers start from.

        Args:
            name: of the soft prompt.
            parts: its tensors' shapes by name.
            num_virtual_tokens: ``P``.

        Raises:
            BaseModelError: a tensor is missing, is not wanted or has another shape.
        """
        wanted = self.shapes(num_virtual_tokens)
        for part in dict.fromkeys((*wanted, *parts)):
            shapes = [list(found[part]) if part in found else "nothing" for found in (wanted, parts)]
            if shapes[0] != shapes[1]:
                raise BaseModelError(
                    f"Expected {shapes[0]} as {part} for {self._lm.name} in this release of transformers, found "
                    f"{shapes[1]} in the trained state {name!r}; use the release that it was trained with, or train "
                    f"it again."
                )

    def state(self, numbers: torch.Tensor) -> PrefixState:
        """A trained prefix as what it leaves behind; differentiable.

        Args:
            numbers: float, of the shape ``shape(P)``.

        Raises:
            ConfigError: this model can have no such prefix.
        """
        lm, length = self._lm, self.length(numbers.shape)
        if self.is_state and tuple(numbers.shape) == self.shape(length):
            return self._empty.with_named(apart(numbers, self.shapes(length)))
        if not self.why_no_kv and numbers.dim() == 5:
            return PrefixKV.of_numbers(numbers.to(lm.device, lm.dtype))
        kind = "a trained KV prefix" if numbers.dim() == 5 else "a trained state"
        why = self.why_none or (self.why_no_kv if numbers.dim() == 5 else "its layers start from no state of that size")
        raise ConfigError(
            f"Expected vectors as a soft prompt for {lm.name}, found {kind}, which it cannot take: {why}."
        )

    @torch.no_grad()
    def numbers(self, ids: Sequence[int], vectors: torch.Tensor | None, behind: int = 0) -> torch.Tensor:
        """A prefix as the numbers of a trained one.

        Args:
            ids, vectors: as for ``FrozenLM.prefix_kv``; only without ``why_none``.
            behind: how many of its first tokens to leave out. A state holds them all the same.

        Returns:
            float32, of the shape ``shape(P)``, of the other tokens; keys after any rotary embedding.
        """
        with self._lm.eager():
            prefix = self._lm.prefix_kv(ids, vectors)
        if not self.is_state:
            assert isinstance(prefix, PrefixKV)
            return prefix.numbers()[behind:].float().contiguous()
        kept = [t[behind:] if name.endswith((KEYS, VALUES)) else t for name, t in prefix.named().items()]
        return torch.cat([tensor.float().flatten() for tensor in kept])


def apart(numbers: torch.Tensor, shapes: Shapes) -> dict[str, torch.Tensor]:
    """The tensors of a trained state by name; views of its numbers ``[N]``."""
    parts = torch.split(numbers, [math.prod(shape) for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
