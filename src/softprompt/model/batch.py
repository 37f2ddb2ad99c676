"""Token sequences → padded tensors. One batch type serves training, scoring and mixed requests: rows, each pointing
at a prefix.

A row holds the tokens after its shared prefix. Behind them hang the continuations to be scored (one target, or every
word of a verbalizer) as a trie, so that words share their common beginnings and the row itself is computed once. Each
trie node sees the row and its own ancestors only, which makes one forward pass give exactly what a pass for each word
would give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from softprompt.text.tokens import SOFT, Tokens


@dataclass(frozen=True)
class Trie:
    """Continuations of a row, depth first: each node's descendants follow it.

    The last token of a word is only predicted, never read, so it is no node; a word of one token adds none.

    Attributes:
        tokens: the token of each node.
        depths: how many tokens behind the row's last token each node stands, from 1.
        ends: the number behind each node's last descendant: node ``i`` sees node ``j`` if ``j <= i < ends[j]``.
        steps: ``(node, token, word)``: log P(word) is the sum over its steps of log P(token | node); node -1 is the
            row's last token. Tokens that are given have none.
        num_words: how many words there are.
    """

    tokens: Tokens
    depths: tuple[int, ...]
    ends: tuple[int, ...]
    steps: tuple[tuple[int, int, int], ...]
    num_words: int

    def path(self, node: int) -> Tokens:
        """The tokens from behind the row up to a node, its own the last."""
        return tuple(self.tokens[j] for j in range(node + 1) if node < self.ends[j])


@lru_cache(maxsize=256)  # label sets, which come with row after row
def build_trie(words: tuple[Tokens, ...], scored_from: tuple[int, ...] = ()) -> Trie:
    """Builds the trie of ``words``, each a non-empty tuple of token ids.

    Args:
        words: the words.
        scored_from: how many of each word's first tokens are given, not scored; fewer than it has. Empty: none.
    """
    tokens: list[int] = []
    ends: list[int] = []
    depths: list[int] = []
    steps: list[list[tuple[int, int, int]]] = [[] for _ in words]
    path: list[int] = []  # the nodes of the latest word
    before: Tokens = ()
    for index in sorted(range(len(words)), key=lambda i: words[i]):
        word = words[index]
        common = 0
        while common < min(len(path), len(word) - 1) and before[common] == word[common]:
            common += 1
        for node in path[common:]:
            ends[node] = len(tokens)
        del path[common:]
        for token in word[common:-1]:
            path.append(len(tokens))
            tokens.append(token)
            depths.append(len(path))
            ends.append(0)
        before = word
        given = scored_from[index] if scored_from else 0
        steps[index] = [(node, token, index) for node, token in zip((-1, *path), word, strict=True)][given:]
    for node in path:
        ends[node] = len(tokens)
    flat = tuple(step for of_word in steps for step in of_word)
    return Trie(tuple(tokens), tuple(depths), tuple(ends), flat, len(words))


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

SHORTEST_STREAM, FEWEST_READS = 128, 16
"""Of padded streams: tokens, and places that are read."""

BESIDES_ATTENTION = 400
"""What a token costs besides its attention, in tokens that it looks at: a round number for SmolLM2-135M on a CPU, where
200 and 800 give steps as fast."""


@dataclass(frozen=True)
class Batch:
    """Rows as integers of ``B`` lines, padded on the right, in one of two layouts.

    *Lines*: each line holds one row or several that share a prefix, and the prefixes have been computed before.
    *Stream*: one line holds the prefixes too, each before its rows, so that one pass computes all.

    All tensors are int64.

    Attributes:
        ids: ``[B, T]``; any token where a soft prompt's vector stands.
        positions: ``[B, T]``, counted from the start of a row's whole sequence, prefix included.
        ends: ``[B, T]``: token ``i`` of a line sees token ``j`` if ``j <= i < ends[j]``. A prefix ends with its last
            row, a row with its last token, and what a word shares with others with the last of those.
        prefix_lengths: ``[B]``, tokens in the prefix of each line, all of which its tokens see.
        prefix_rows: ``[B]``, the prefix of each line; None if all lines share prefix 0.
        soft: ``[S]``, in a stream the columns of the vectors of its soft prompts, one after the other.
        read_lines, read_columns: ``[M]``, the places whose hidden states are read.
        step_read, step_token, step_slot: ``[N]``: step ``s`` reads place ``step_read[s]``, predicts
            ``step_token[s]`` and counts for word ``step_slot[s] % num_words`` of row ``step_slot[s] // num_words``;
            what is padded counts for a row behind the last.
        word_counts: ``[rows]``, how many words each row has; 0 of one that is padding.
        width: tokens in the longest prefix that was computed before.
        num_words: the most words that a row has.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    ends: torch.Tensor
    prefix_lengths: torch.Tensor
    prefix_rows: torch.Tensor | None
    soft: torch.Tensor | None
    read_lines: torch.Tensor
    read_columns: torch.Tensor
    step_read: torch.Tensor
    step_token: torch.Tensor
    step_slot: torch.Tensor
    word_counts: torch.Tensor
    width: int
    num_words: int

    @property
    def size(self) -> int:
        """How many rows there are."""
        return len(self.word_counts)

    @property
    def sees(self) -> torch.Tensor:
        """bool ``[B, T, W + T]``: the token may look at that token of its prefix (padded to ``width``) or of its line;
        never at another row's."""
        places = torch.arange(self.ids.shape[1], device=self.ids.device)
        own = (places <= places[:, None]) & (places[:, None] < self.ends[:, None])
        before = torch.arange(self.width, device=self.ids.device) < self.prefix_lengths[:, None]
        return torch.cat([before[:, None].expand(-1, len(places), -1), own], dim=2)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Those that there are, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}

    def to(self, device: torch.device) -> Batch:
        """The same on ``device``, by one copy."""
        if device == self.ids.device:
            return self
        flat = torch.cat([tensor.flatten() for tensor in self.tensors.values()])
        if device.type == "cuda":
            flat = flat.pin_memory()
        return self.filled(flat.to(device, non_blocking=True))

    def filled(self, flat: torch.Tensor) -> Batch:
        """The same with other numbers: those of all ``tensors`` one after the other."""
        parts = torch.split(flat, [tensor.numel() for tensor in self.tensors.values()])
        new: dict[str, Any] = {
            name: part.view(old.shape) for (name, old), part in zip(self.tensors.items(), parts, strict=True)
        }
        return replace(self, **new)


class _Layout:
    """Lines of tokens that are being filled."""

    def __init__(self, lines: int, length: int, num_words: int) -> None:
        self.ids = np.zeros((lines, length), dtype=np.int64)
        self.positions = np.zeros((lines, length), dtype=np.int64)
        # Padding sees itself: the softmax of a token that saw nothing would be undefined.
        self.ends = np.tile(np.arange(1, length + 1), (lines, 1))
        self._num_words = num_words
        self._reads: dict[tuple[int, int], int] = {}
        self._steps: list[tuple[int, int, int]] = []
        self._counts: dict[int, int] = {}

    def row(self, row: Row, index: int, line: int, begin: int, before: int) -> int:
        """Lays the row of that index into a line from column ``begin`` on, behind a prefix of ``before`` tokens.

        Returns:
            The column behind it.
        """
        trie = row.trie
        own, end = begin + len(row.ids), begin + row.length
        self.ids[line, begin:end] = row.ids + trie.tokens
        self.positions[line, begin:own] = np.arange(before, before + len(row.ids))
        self.positions[line, own:end] = np.asarray(trie.depths, dtype=np.int64) + (before + len(row.ids) - 1)
        self.ends[line, begin:own] = end
        self.ends[line, own:end] = np.asarray(trie.ends, dtype=np.int64) + own
        self._counts[index] = trie.num_words
        for node, token, word in trie.steps:
            place = self._reads.setdefault((line, own + node), len(self._reads))
            self._steps.append((place, token, index * self._num_words + word))
        return end

    def batch(
        self,
        lengths: Sequence[int],
        width: int,
        chosen: Sequence[int] | None,
        soft: Sequence[int] | None,
        *,
        fixed: bool,
        least_rows: int = 0,
    ) -> Batch:
        """All of it on the CPU; ``fixed``: reads and steps are padded to one of a few numbers, and rows to
        ``least_rows``."""
        rows = max(len(self._counts), least_rows if fixed else 0)
        reads, steps = list(self._reads), self._steps
        if fixed:
            reads += [(0, 0)] * (rounded_up(len(reads), FEWEST_READS) - len(reads))
            steps = steps + [(0, 0, rows * self._num_words)] * (rounded_up(len(steps), FEWEST_READS) - len(steps))
        read = np.asarray(reads, dtype=np.int64).reshape(-1, 2)
        step = np.asarray(steps, dtype=np.int64).reshape(-1, 3)

        def tensor(values: object) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64))

        return Batch(
            ids=tensor(self.ids),
            positions=tensor(self.positions),
            ends=tensor(self.ends),
            prefix_lengths=tensor(lengths),
            prefix_rows=None if chosen is None else tensor(chosen),
            soft=None if soft is None else tensor(soft),
            read_lines=tensor(read[:, 0]),
            read_columns=tensor(read[:, 1]),
            step_read=tensor(step[:, 0]),
            step_token=tensor(step[:, 1]),
            step_slot=tensor(step[:, 2]),
            word_counts=tensor([self._counts.get(index, 0) for index in range(rows)]),
            width=width,
            num_words=self._num_words,
        )


def _pack(rows: Sequence[Row], width: int, least: int) -> list[list[int]]:
    """Lines of rows with the same prefix, of the length which is the cheapest: padding costs, and in a long line tokens
    are held against rows that they may not see. ``width`` is the longest prefix; there are at least ``least`` lines, or
    one for each row."""
    lengths, prefixes = [row.length for row in rows], [row.prefix for row in rows]
    longest = max(lengths)
    capacities = range(longest, max(longest, LONGEST_LINE) + 1, 8)

    def cost(lines: list[list[int]]) -> int:
        length = max(sum(lengths[index] for index in line) for line in lines)
        return len(lines) * length * (BESIDES_ATTENTION + width + length)

    found = (_first_fit(lengths, prefixes, capacity) for capacity in capacities)
    return min((lines for lines in found if len(lines) >= min(least, len(rows))), key=cost)


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


def collate(rows: Sequence[Row], prefix_lengths: Sequence[int], device: torch.device, *, least_lines: int = 1) -> Batch:
    """Lays ``rows`` out as lines.

    Args:
        rows: at least one.
        prefix_lengths: tokens in each shared prefix that ``Row.prefix`` may name; ``(0,)`` where there is none.
        device: where the tensors shall lie.
        least_lines: how many lines there are at least, if there are as many rows.
    """
    width = max(prefix_lengths)
    lines = _pack(rows, width, least_lines)
    layout = _Layout(len(lines), max(sum(rows[i].length for i in line) for line in lines), _most_words(rows))
    lengths = [prefix_lengths[rows[line[0]].prefix] for line in lines]
    for number, line in enumerate(lines):
        begin = 0
        for index in line:
            begin = layout.row(rows[index], index, number, begin, lengths[number])
    shared = all(row.prefix == 0 for row in rows) and len(prefix_lengths) == 1
    chosen = None if shared else [rows[line[0]].prefix for line in lines]
    return layout.batch(lengths, width, chosen, None, fixed=False).to(device)


def stream(rows: Sequence[Row], prefixes: Sequence[tuple[Tokens, int]], *, fixed: bool, least_rows: int = 0) -> Batch:
    """Lays prefixes and rows out as one stream: ``[prefix 0 | its rows | prefix 1 | its rows | …]``.

    Args:
        rows: at least one.
        prefixes: of each prefix that ``Row.prefix`` may name, its token ids with one ``SOFT``, and how many vectors
            stand there.
        fixed: pad to one of a few shapes, so that few CUDA graphs serve all batches.
        least_rows: the rows to pad to, where rows hold several requests and their number varies.

    Returns:
        A batch on the CPU.
    """
    starts = [len(ids) - 1 + count for ids, count in prefixes]
    length = sum(starts) + sum(row.length for row in rows)
    words = _most_words(rows)
    if fixed and least_rows > len(rows):
        words = 1 << (words - 1).bit_length()
    layout = _Layout(1, rounded_up(length, SHORTEST_STREAM) if fixed else length, words)
    soft: list[int] = []
    begin = 0
    for number, (ids, count) in enumerate(prefixes):
        place, end = ids.index(SOFT), begin + starts[number]
        layout.ids[0, begin:end] = (*ids[:place], *[0] * count, *ids[place + 1 :])
        layout.positions[0, begin:end] = np.arange(end - begin)
        soft += range(begin + place, begin + place + count)
        first, begin = begin, end
        for index, row in enumerate(rows):
            if row.prefix == number:
                begin = layout.row(row, index, 0, begin, starts[number])
        layout.ends[0, first:end] = begin
    return layout.batch([0], 0, None, soft, fixed=fixed, least_rows=least_rows)


def _most_words(rows: Sequence[Row]) -> int:
    return max(len(row.words) for row in rows)


def rounded_up(number: int, least: int) -> int:
    """The next of a few sizes: multiples of ``least``, and further apart the larger they are, at most an eighth."""
    unit = max(least, 1 << max(0, number.bit_length() - 4))
    return -(-number // unit) * unit


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


def without_lone_rows(groups: Sequence[Sequence[int]]) -> list[list[int]]:
    """Groups of ``micro_batches`` of which none has a single row where that can be: one that would, takes in the
    shortest of the group before it, if that has more than two. Its rows and their padding stay within the limit."""
    found = [list(group) for group in groups]
    for before, group in pairwise(found):
        if len(group) == 1 and len(before) > 2:
            group.insert(0, before.pop())
    return found
