"""Token sequences → padded tensors. One batch type serves training, scoring and mixed requests: rows, each pointing
at a prefix.

A row holds the tokens after its shared prefix. Behind them hang the continuations to be scored (one target, or every
word of a verbalizer) as a trie, so that words share their common beginnings and the row itself is computed once. Each
trie node sees the row and its own ancestors only, which makes one forward pass give exactly what a pass for each word
would give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch

from softprompt.text.tokens import Tokens


@dataclass(frozen=True)
class Trie:
    """Continuations of a row.

    The last token of a word is only predicted, never read, so it is no node; a word of one token adds none.

    Attributes:
        tokens: the token of each of the ``N`` nodes; an ancestor comes before its descendants.
        depths: how many tokens behind the row's last token each node stands, from 1.
        orders: the node's number, depth first: its descendants have those directly behind it.
        sizes: how many nodes its subtree has, itself included.
        steps: ``(node, token, word)``: log P(word) is the sum over its steps of log P(token | node); node -1 is the
            row's last token.
        num_words: how many words there are.
    """

    tokens: Tokens
    depths: tuple[int, ...]
    orders: tuple[int, ...]
    sizes: tuple[int, ...]
    steps: tuple[tuple[int, int, int], ...]
    num_words: int

    @property
    def sees(self) -> np.ndarray:
        """bool ``[N, N]``; node ``i`` sees node ``j``, which is an ancestor or itself. It is made anew each time, since
        tries are kept, and those of long texts have millions of such pairs."""
        orders, sizes = (np.asarray(values, dtype=np.int64) for values in (self.orders, self.sizes))
        seen: np.ndarray = (orders <= orders[:, None]) & (orders[:, None] < orders + sizes)
        return seen


@lru_cache(maxsize=256)  # label sets, which come with row after row
def build_trie(words: tuple[Tokens, ...], scored_from: tuple[int, ...] = ()) -> Trie:
    """Builds the trie of ``words``, each a non-empty tuple of token ids.

    Args:
        words: the words.
        scored_from: how many of each word's first tokens are given, not scored; fewer than it has. Empty: none.
    """
    nodes: dict[tuple[int, int], int] = {}  # of a parent and a token
    tokens: list[int] = []
    parents: list[int] = []
    depths: list[int] = []
    steps: list[tuple[int, int, int]] = []
    for index, word in enumerate(words):
        node, given = -1, scored_from[index] if scored_from else 0
        for depth, token in enumerate(word):
            if depth:
                parent, node = node, nodes.setdefault((node, word[depth - 1]), len(tokens))
                if node == len(tokens):
                    tokens.append(word[depth - 1])
                    parents.append(parent)
                    depths.append(depth)
            if depth >= given:
                steps.append((node, token, index))
    sizes, orders = [1] * len(tokens), [0] * len(tokens)
    for node in reversed(range(len(tokens))):
        if parents[node] >= 0:
            sizes[parents[node]] += sizes[node]
    free = [0] * (len(tokens) + 1)  # the next number in each node's subtree; the last entry is that of node -1
    for node, parent in enumerate(parents):
        orders[node] = free[parent]
        free[parent] += sizes[node]
        free[node] = orders[node] + 1
    return Trie(tuple(tokens), tuple(depths), tuple(orders), tuple(sizes), tuple(steps), len(words))


@dataclass(frozen=True)
class Row:
    """One example on its way into a batch, or several with a common beginning.

    Attributes:
        ids: the tokens after the shared prefix, at least one.
        words: the continuations to score; ``((),)``-free, may be empty when the row only starts a generation.
        prefix: index of the row's shared prefix.
        scored_from: how many of each word's first tokens are given and not scored; empty where all are scored.
    """

    ids: Tokens
    words: tuple[Tokens, ...] = ()
    prefix: int = 0
    scored_from: tuple[int, ...] = ()

    @cached_property
    def trie(self) -> Trie:
        """What hangs behind the row."""
        return build_trie(self.words, self.scored_from)

    @property
    def length(self) -> int:
        """Tokens that a forward pass computes for this row."""
        return len(self.ids) + len(self.trie.tokens)


LONGEST_LINE = 256
"""Tokens in the longest line that rows are packed into, unless one of them is longer."""

BESIDES_ATTENTION = 400
"""What a token costs besides its attention, in tokens that it looks at: a round number for SmolLM2-135M on a CPU, where
200 and 800 give steps as fast."""


@dataclass(frozen=True)
class Batch:
    """Rows as tensors of ``B`` lines, each holding one row or several that share a prefix, padded on the right.

    Attributes:
        ids: int64 ``[B, T]``.
        positions: int64 ``[B, T]``, counted from the start of a row's whole sequence, prefix included.
        sees: bool ``[B, T, W + T]``: the token may look at that token of its prefix (padded to width ``W``) or of its
            line; never at another row's.
        prefix_rows: int64 ``[B]``, the prefix of each line; None if all lines share prefix 0.
        read_lines, read_columns: int64 ``[M]``, the places whose hidden states are read.
        step_read, step_token, step_slot: int64 ``[S]``: step ``s`` reads place ``step_read[s]``, predicts
            ``step_token[s]`` and counts for word ``step_slot[s] % num_words`` of row ``step_slot[s] // num_words``.
        num_words: the most words that a row has.
        word_counts: int64 ``[rows]``, how many words each row has.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    sees: torch.Tensor
    prefix_rows: torch.Tensor | None
    read_lines: torch.Tensor
    read_columns: torch.Tensor
    step_read: torch.Tensor
    step_token: torch.Tensor
    step_slot: torch.Tensor
    num_words: int
    word_counts: torch.Tensor

    @property
    def size(self) -> int:
        """How many rows there are."""
        return len(self.word_counts)


def _pack(rows: Sequence[Row], width: int) -> list[list[int]]:
    """Lines of rows with the same prefix, of the length which is the cheapest: padding costs, and in a long line tokens
    are held against rows that they may not see. ``width`` is the longest prefix."""
    lengths, prefixes = [row.length for row in rows], [row.prefix for row in rows]
    longest = max(lengths)
    capacities = range(longest, max(longest, LONGEST_LINE) + 1, 8)

    def cost(lines: list[list[int]]) -> int:
        length = max(sum(lengths[index] for index in line) for line in lines)
        return len(lines) * length * (BESIDES_ATTENTION + width + length)

    return min((_first_fit(lengths, prefixes, capacity) for capacity in capacities), key=cost)


def _first_fit(lengths: Sequence[int], prefixes: Sequence[int], capacity: int) -> list[list[int]]:
    """The longest row first, each into the first line of its prefix with room (first-fit decreasing)."""
    lines: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for number, line in enumerate(lines):
            if room[number] >= lengths[index] and prefixes[line[0]] == prefixes[index]:
                line.append(index)
                room[number] -= lengths[index]
                break
        else:
            lines.append([index])
            room.append(capacity - lengths[index])
    return lines


def collate(rows: Sequence[Row], prefix_lengths: Sequence[int], device: torch.device) -> Batch:
    """Lays ``rows`` out as one batch.

    Args:
        rows: at least one.
        prefix_lengths: tokens in each shared prefix that ``Row.prefix`` may name; ``(0,)`` where there is none.
        device: where the tensors shall lie.
    """
    tries = [row.trie for row in rows]
    seen = {id(trie): trie.sees for trie in {id(trie): trie for trie in tries}.values()}  # label sets: one for all
    width = max(prefix_lengths)
    lines = _pack(rows, width)
    length = max(sum(rows[i].length for i in line) for line in lines)
    ids = np.zeros((len(lines), length), dtype=np.int64)
    positions = np.zeros((len(lines), length), dtype=np.int64)
    sees = np.zeros((len(lines), length, width + length), dtype=bool)
    num_words = max(trie.num_words for trie in tries)
    reads: dict[tuple[int, int], int] = {}
    steps: list[tuple[int, int, int]] = []
    for number, line in enumerate(lines):
        start, begin = prefix_lengths[rows[line[0]].prefix], 0
        sees[number, :, :start] = True
        for index in line:
            row, trie = rows[index], tries[index]
            own, end = begin + len(row.ids), begin + row.length
            ids[number, begin:end] = row.ids + trie.tokens
            positions[number, begin:own] = np.arange(start, start + len(row.ids))
            positions[number, own:end] = np.asarray(trie.depths, dtype=np.int64) + (start + len(row.ids) - 1)
            columns = sees[number, :, width:]
            columns[begin:own, begin:own] = np.tri(len(row.ids), dtype=bool)
            columns[own:end, begin:own] = True
            columns[own:end, own:end] = seen[id(trie)]
            for node, token, word in trie.steps:
                place = (number, own + node)
                steps.append((reads.setdefault(place, len(reads)), token, index * num_words + word))
            begin = end
        sees[number, begin:, width] = True  # padding: a token that saw nothing would make its softmax undefined

    def tensor(values: object) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values, dtype=np.int64), device=device)

    read = np.asarray(list(reads), dtype=np.int64).reshape(-1, 2)
    step = np.asarray(steps, dtype=np.int64).reshape(-1, 3)
    shared = all(row.prefix == 0 for row in rows) and len(prefix_lengths) == 1
    return Batch(
        ids=tensor(ids),
        positions=tensor(positions),
        sees=torch.from_numpy(sees).to(device),
        prefix_rows=None if shared else tensor([rows[line[0]].prefix for line in lines]),
        read_lines=tensor(read[:, 0]),
        read_columns=tensor(read[:, 1]),
        step_read=tensor(step[:, 0]),
        step_token=tensor(step[:, 1]),
        step_slot=tensor(step[:, 2]),
        num_words=num_words,
        word_counts=tensor([trie.num_words for trie in tries]),
    )


def micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Splits rows into groups of similar length, longest first.

    Args:
        lengths: tokens of each row.
        max_tokens: the most tokens in one group, counting each row as long as the group's longest; a longer row stands
            alone.

    Returns:
        Indices into ``lengths``, each exactly once.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= max_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
