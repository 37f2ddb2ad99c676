"""Rows for models whose memory is a state: in a line stands one row alone, and each word that goes another way is a
line of its own, since a state can neither be shared by two rows nor branch off."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from softprompt.model.batch import Batch, Row
from softprompt.text.tokens import Tokens

LEAST_TOKENS = 2
"""Of a line: with one token alone, some layers change their state in place, through which no gradient goes."""


def chains(words: Sequence[Tokens]) -> list[Tokens]:
    """The fewest chains of tokens in which every word but for its last token is a beginning; the words' own order."""
    starts = list(dict.fromkeys(tuple(word[:-1]) for word in words))
    return [a for a in starts if not any(len(a) < len(b) and b[: len(a)] == a for b in starts)] or [()]


def collate_chains(rows: Sequence[Row], prefix_lengths: Sequence[int], device: torch.device) -> Batch:
    """As ``collate``, for such models. Padding stands on the right, where no token that is read sees it.

    Args:
        rows: at least one.
        prefix_lengths: tokens in each shared prefix that ``Row.prefix`` may name; ``(0,)`` where there is none.
        device: where the tensors shall lie.
    """
    lines: list[tuple[Tokens, int]] = []
    reads: dict[tuple[int, int], int] = {}
    steps: list[tuple[int, int, int]] = []
    num_words = max(len(row.words) for row in rows)
    for index, row in enumerate(rows):
        first, ways = len(lines), chains(row.words)
        lines += [(row.ids + way, row.prefix) for way in ways]
        for number, word in enumerate(row.words):
            line = first + next(i for i, way in enumerate(ways) if way[: len(word) - 1] == word[:-1])
            given = row.scored_from[number] if row.scored_from else 0
            for depth, token in enumerate(word[given:], start=given):
                place = line, len(row.ids) - 1 + depth
                steps.append((reads.setdefault(place, len(reads)), token, index * num_words + number))
    length = max(LEAST_TOKENS, *(len(ids) for ids, _ in lines))
    ids = np.zeros((len(lines), length), dtype=np.int64)
    starts = np.asarray([prefix_lengths[prefix] for _, prefix in lines], dtype=np.int64)[:, None]
    for number, (own, _) in enumerate(lines):
        ids[number, : len(own)] = own

    def tensor(values: object) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values, dtype=np.int64), device=device)

    read = np.asarray(list(reads), dtype=np.int64).reshape(-1, 2)
    step = np.asarray(steps, dtype=np.int64).reshape(-1, 3)
    return Batch(
        ids=tensor(ids),
        positions=tensor(starts + np.arange(length)[None]),
        ends=tensor(np.full((len(lines), length), length)),
        prefix_lengths=tensor(starts[:, 0]),
        prefix_rows=tensor([prefix for _, prefix in lines]),
        soft=None,
        read_lines=tensor(read[:, 0]),
        read_columns=tensor(read[:, 1]),
        step_read=tensor(step[:, 0]),
        step_token=tensor(step[:, 1]),
        step_slot=tensor(step[:, 2]),
        word_counts=tensor([len(row.words) for row in rows]),
        width=max(prefix_lengths),
        num_words=num_words,
    )
