"""Prefixes that are kept to be used again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch

from softprompt.model.state.kv import PrefixKV
from softprompt.text.tokens import Tokens

PrefixOf = Callable[[Tokens, torch.Tensor | None], PrefixKV]
"""``FrozenLM.prefix_kv``, or what keeps its results."""


class KeptPrefixes:
    """Computes prefixes, and keeps the last ones asked for.

    A kept one is used only where the vectors still hold the numbers that it was computed from: they may have been
    changed in place, or be others at the same address.
    """

    def __init__(self, compute: Callable[[Tokens, torch.Tensor | None], PrefixKV], most: int | None) -> None:
        """
        Args:
            compute: token ids and vectors (or None) → the prefix.
            most: how many to keep; None: all.
        """
        self._compute = compute
        self._most = most
        self._held: OrderedDict[tuple[Tokens, int | None], tuple[torch.Tensor | None, PrefixKV]] = OrderedDict()

    def __call__(self, ids: Tokens, vectors: torch.Tensor | None) -> PrefixKV:
        """The prefix of ``ids``, with ``vectors`` where ``SOFT`` stands."""
        key = ids, None if vectors is None else id(vectors)
        found = self._held.get(key)
        if found is None or not _same(found[0], vectors):
            found = None if vectors is None else vectors.detach().clone(), self._compute(ids, vectors)
        self._held[key] = found
        self._held.move_to_end(key)
        if self._most is not None and len(self._held) > self._most:
            self._held.popitem(last=False)
        return found[1]


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
