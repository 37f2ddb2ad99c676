"""Token ids: of one example, of words, and the vocabulary's frequent ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

Tokens = tuple[int, ...]


FREQUENT_TOKENS = 5000
"""How many of the vocabulary's first tokens count as frequent (Lester et al. 2021, §3.2): merges are learned most
frequent first."""


def frequent_tokens(tokenizer: Any, rows: int, seed: int) -> list[int]:
    """The first ``FREQUENT_TOKENS`` of the vocabulary that are not special and below ``rows``, those of the
    embedding table, in a seeded random order."""
    special = set(tokenizer.all_special_ids)
    frequent = [t for t in range(min(rows, FREQUENT_TOKENS + len(special))) if t not in special]
    order = torch.randperm(len(frequent), generator=torch.Generator().manual_seed(seed)).tolist()
    return [frequent[i] for i in order]


SOFT = -1
"""Stands in a sequence of token ids for the place of the soft prompt: one entry for all of its virtual tokens."""


@dataclass(frozen=True)
class TokenSequence:
    """One example as tokens.

    Attributes:
        ids: token ids before the target; may hold one ``SOFT``.
        shared: how many of the first entries of ``ids`` do not depend on the example (``SOFT`` counts 1).
        target_ids: the target's token ids, with the end-of-sequence token where it was asked for; empty without target.
        truncated: whether tokens of the input fields were cut.
    """

    ids: tuple[int, ...]
    shared: int
    target_ids: tuple[int, ...]
    truncated: bool


def around(bare: list[int], full: list[int]) -> tuple[Tokens, Tokens]:
    """What stands before and behind ``bare`` in ``full``, the same text with special tokens around it."""
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return tuple(full[:start]), tuple(full[start + len(bare) :])
    return (), ()


def overlap(words: Iterable[tuple[int, ...]] | Iterable[str]) -> bool:
    """Whether one of the words, as token ids or text, is the start of another: then the longer one can never be the
    more probable of the two, unless both have an end."""
    ordered: list[Any] = sorted(words)
    return any(second[: len(first)] == first for first, second in pairwise(ordered))
