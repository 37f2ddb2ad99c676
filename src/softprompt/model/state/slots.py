"""Keys and values of rows that grow."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from softprompt.model.state.kv import PrefixKV
from softprompt.model.state.prefix import PrefixState


class RowKV:
    """Keys and values of rows of any lengths in every layer; stands where transformers expects its cache.

    Token ``t`` of row ``i``, counted from the start of its prefix, is column ``t`` of slot ``i``. What lies behind a
    row's last token is stale and no token looks at it; it is finite, since its weight of 0 must not meet a NaN.

    Attributes:
        lengths: tokens of each row.
        width: columns of a slot. A pass looks at all of them: matrix products of a part would copy it first.
    """

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.width = 0
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = []  # [R, H_kv, width, D] each
        self._reads: tuple[int, ...] = ()  # as of ``PrefixKV``
        self._places: Any = None  # index of the current pass's tokens in them

    def add(self, prefixes: Sequence[PrefixState], ahead: int) -> None:
        """Rows that begin with the tokens of ``prefixes`` (one row each), behind those that are there.

        Args:
            prefixes: ``PrefixKV``; copied.
            ahead: tokens of each row in the next pass.
        """
        starts = [prefix for prefix in prefixes if isinstance(prefix, PrefixKV)]
        assert len(starts) == len(prefixes), "rows of another kind need slots of another kind"
        rows, longest = len(self.lengths) + len(starts), max(*self.lengths, *(start.width for start in starts), 0)
        if not self._layers:
            self._reads = starts[0].reads
            self._layers = [
                (key.new_empty(0, key.shape[1], 0, key.shape[3]), value.new_empty(0, value.shape[1], 0, value.shape[3]))
                for key, value in zip(starts[0].keys, starts[0].values, strict=True)
            ]
        if rows > len(self._layers[0][0]) or longest + ahead > self.width:
            self._lay_out(rows, longest + ahead)
        for start in starts:
            slot, length = len(self.lengths), start.width
            for (keys, values), key, value in zip(self._layers, start.keys, start.values, strict=True):
                keys[slot, :, :length], keys[slot, :, length:] = key[0], 0
                values[slot, :, :length], values[slot, :, length:] = value[0], 0
            self.lengths.append(length)

    def join(self, others: object) -> RowKV:
        """Rows that have grown in slots of their own, behind those that are there; copied, unless there are none.

        Args:
            others: ``RowKV``.

        Returns:
            Where all of them are now.
        """
        assert isinstance(others, RowKV), "rows of another kind need slots of another kind"
        if not self.lengths:
            return others
        self._copy(others)
        return self

    def _copy(self, others: RowKV) -> None:
        rows, new = len(self.lengths), len(others.lengths)
        if not self._layers:
            self._reads = others._reads
            self._layers = [(key[:0, :, :0], value[:0, :, :0]) for key, value in others._layers]
        longest = max(*self.lengths, *others.lengths, 0) + 1
        if rows + new > len(self._layers[0][0]) or longest > self.width:
            self._lay_out(rows + new, longest)
        common = min(self.width, others.width)
        for own, given in zip(self._layers, others._layers, strict=True):
            for into, tensor in zip(own, given, strict=True):
                into[rows : rows + new, :, :common], into[rows : rows + new, :, common:] = tensor[:new, :, :common], 0
        self.lengths += others.lengths

    def row(self, index: int) -> PrefixKV:
        """A row so far; a view."""
        length = self.lengths[index]
        return PrefixKV(
            keys=tuple(keys[index : index + 1, :, :length] for keys, _ in self._layers),
            values=tuple(values[index : index + 1, :, :length] for _, values in self._layers),
            lengths=(length,),
            reads=self._reads,
        )

    def remove(self, index: int) -> None:
        """Takes a row out; the last row takes its slot."""
        last = self.lengths.pop()
        if index < len(self.lengths):
            self.lengths[index] = last
            for layer in self._layers:
                for tensor in layer:
                    tensor[index] = tensor[len(self.lengths)]

    def extend(self, counts: Sequence[int], tokens: int) -> torch.Tensor:
        """Makes place for a pass over ``tokens`` tokens a row, of which row ``i`` keeps the first ``counts[i]``.

        Returns:
            int64 ``[B, tokens]`` on the CPU, the column of each token.
        """
        self._make_room(tokens)
        columns = torch.tensor(self.lengths)[:, None] + torch.arange(tokens)
        device = self._layers[0][0].device
        self._places = (torch.arange(len(counts), device=device)[:, None], slice(None), columns.to(device))
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        return columns

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Transformers' call in each layer that has its own: takes a pass's ``[B, H_kv, T, D]``, returns ``[B, H_kv,
        width, D]``. A row alone may come twice."""
        rows = len(self.lengths)
        keys, values = self._layers[self._reads[layer] if self._reads else layer]
        keys[self._places] = key[:rows].transpose(1, 2)
        values[self._places] = value[:rows].transpose(1, 2)
        return keys[:rows].expand(len(key), -1, -1, -1), values[:rows].expand(len(key), -1, -1, -1)

    def get_seq_length(self, layer: int = 0) -> int:
        """Transformers asks it where positions are not given; ours are."""
        return self.width

    def _make_room(self, tokens: int) -> None:
        """For so many tokens more of each row."""
        needed = max(self.lengths) + tokens
        if needed > self.width or 2 * rounded(needed, 32) <= self.width:
            self._lay_out(len(self.lengths), needed)

    def _lay_out(self, rows: int, columns: int) -> None:
        """New slots, up to twice ``rows`` but few more, and a few columns wider, so that it is seldom done."""
        rows, columns = min(rounded(rows, 8), 2 * rows), rounded(columns, 32)
        kept = min(columns, self.width)

        def anew(tensor: torch.Tensor) -> torch.Tensor:
            new = tensor.new_empty((rows, tensor.shape[1], columns, tensor.shape[3]))
            old = tensor[: len(self.lengths)]
            new[: len(old), :, :kept], new[: len(old), :, kept:] = old[:, :, :kept], 0
            return new

        self._layers = [(anew(keys), anew(values)) for keys, values in self._layers]
        self.width = columns


def give_back_freed() -> None:
    """Gives freed memory back to the operating system. Layouts of long rows leave holes in what glibc keeps, in which
    the next ones, a few columns wider, have no room."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # of glibc only
        ctypes.CDLL(None).malloc_trim(0)


def rounded(number: int, unit: int) -> int:
    return -(-number // unit) * unit
