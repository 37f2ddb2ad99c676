"""Prefixes that are kept to be used again."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable

import torch

from softprompt.model.state.prefix import PrefixState, apart
from softprompt.text.tokens import SOFT, Tokens

PrefixOf = Callable[[Tokens, torch.Tensor | None], PrefixState]
"""Token ids, and the vectors that stand at ``SOFT`` (or None) → what they leave behind: ``FrozenLM.prefix_kv``, or a
``PrefixCache`` of its results."""


class PrefixCache:
    """Prefixes by content: the token ids and the numbers of the vectors between them, so that vectors changed in place
    are others. The least recently used go first.

    Attributes:
        nbytes: bytes held.
        queries: tokens of all prefixes that were asked for.
        hits: tokens of those that were there.
    """

    def __init__(self, compute: PrefixOf, *, most: int | None = None, capacity: int | None = None) -> None:
        """
        Args:
            compute: what is not there; called without gradient.
            most: how many prefixes to keep; None: any number.
            capacity: how many bytes to keep; None: any number.
        """
        self._compute = compute
        self._most = most
        self._capacity = capacity
        self._held: OrderedDict[tuple[str, Tokens], PrefixState] = OrderedDict()
        self.nbytes = 0
        self.queries = 0
        self.hits = 0

    @property
    def count(self) -> int:
        """How many prefixes are held."""
        return len(self._held)

    def holds(self, ids: Tokens, content: str) -> bool:
        """Whether a prefix is there."""
        return (content if SOFT in ids else "", ids) in self._held

    def __call__(self, ids: Tokens, vectors: torch.Tensor | None, content: str = "") -> PrefixState:
        """What ``ids`` leave behind, computed if it is not there.

        Args:
            ids: token ids, ``SOFT`` where ``vectors`` stand.
            vectors: the soft prompt, or None.
            content: what tells ``vectors`` from all others; by default a digest of their numbers.
        """
        if vectors is None or SOFT not in ids:
            content = ""
        elif not content:
            content = _digest(vectors)
        key = content, ids
        found = self._held.get(key)
        if found is not None:
            self._held.move_to_end(key)
            self.hits += found.width
        else:
            with torch.no_grad():
                found = apart(self._compute(ids, vectors))
            self._keep(key, found)
        self.queries += found.width
        return found

    def _keep(self, key: tuple[str, Tokens], prefix: PrefixState) -> None:
        if self._capacity is not None and prefix.nbytes > self._capacity:
            return
        self._held[key] = prefix
        self.nbytes += prefix.nbytes
        while self._too_much():
            _, oldest = self._held.popitem(last=False)
            self.nbytes -= oldest.nbytes

    def _too_much(self) -> bool:
        too_many = self._most is not None and len(self._held) > self._most
        return too_many or (self._capacity is not None and self.nbytes > self._capacity)


def _digest(vectors: torch.Tensor) -> str:
    """Hex digest of dtype, shape and every bit."""
    found = hashlib.sha256(f"{vectors.dtype} {list(vectors.shape)}".encode())
    found.update(vectors.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
