"""Rows that are continued token by token at fixed addresses, so that a captured graph runs a pass over them."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence

import torch

from softprompt.model.fast.graphs import Graphs, sent
from softprompt.model.state.slots import RowKV, rounded

LEAST_COLUMNS = 128
"""Columns of the narrowest slots; wider ones have a power of two times as many."""

FEW_ROWS = 8
"""Up to as many rows, graphs are for a power of two of them; beyond, for a multiple."""

Layers = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Of each layer keys and values, ``[R, H_kv, W, D]`` each."""


class LastTokens:
    """Stands where transformers expects its cache, in a pass over one token of each row.

    Attributes:
        width: columns of a slot.
    """

    def __init__(self, layers: Layers, columns: torch.Tensor) -> None:
        """
        Args:
            layers: the slots, written to.
            columns: int64 ``[R, 1]`` on the device, where each row's token stands.
        """
        self.width = layers[0][0].shape[2]
        self._layers = layers
        rows = torch.arange(len(columns), device=columns.device)[:, None]
        self._places = (rows, slice(None), columns)

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Transformers' call in each layer: takes ``[R, H_kv, 1, D]``, returns ``[R, H_kv, W, D]``."""
        keys, values = self._layers[layer]
        keys[self._places], values[self._places] = key.transpose(1, 2), value.transpose(1, 2)
        return keys, values

    def get_seq_length(self, layer: int = 0) -> int:
        """Transformers asks it where positions are not given; ours are."""
        return self.width


class Memory:
    """One stretch of memory for the keys, and one for the values, of each layer: slots of any shape begin there.

    Attributes:
        moved: how often it was laid elsewhere, since it was too small.
    """

    def __init__(self) -> None:
        self.moved = 0
        self._held: dict[int, torch.Tensor] = {}

    def shaped(self, place: int, like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """The beginning of a stretch, as that shape; what lies there is anything, but finite."""
        numbers = math.prod(shape)
        held = self._held.get(place)
        if held is None or len(held) < numbers:
            self.moved += held is not None
            held = self._held[place] = like.new_zeros(1 << (numbers - 1).bit_length())
        return held[:numbers].view(shape)


class FixedKV(RowKV):
    """``RowKV`` in a ``Memory``: slots of the same shape lie at the same address. There are few shapes.

    Attributes:
        memory: where they lie.
    """

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.memory = memory

    @property
    def rows(self) -> int:
        """Rows that a pass computes; those behind the last one are for nothing."""
        return rounded_rows(len(self.lengths))

    def layers(self) -> Layers:
        """The slots of that many rows."""
        return [(keys[: self.rows], values[: self.rows]) for keys, values in self._layers]

    def join(self, others: object) -> RowKV:
        """As ``RowKV``, but they are always copied."""
        assert isinstance(others, RowKV), "rows of another kind need slots of another kind"
        self._copy(others)
        return self

    def advance(self) -> list[int]:
        """Makes place for one token of each row.

        Returns:
            Its column in each slot.
        """
        self._make_room(1)
        columns = self.lengths
        self.lengths = [length + 1 for length in columns]
        return columns

    def _lay_out(self, rows: int, columns: int) -> None:
        """As ``RowKV``, in the memory, over what lies there."""
        rows, columns = rounded_rows(rows), LEAST_COLUMNS << max(0, (columns - 1) // LEAST_COLUMNS).bit_length()
        count, kept = len(self.lengths), min(columns, self.width)

        def anew(place: int, tensor: torch.Tensor) -> torch.Tensor:
            old = tensor[:count, :, :kept].clone()
            new = self.memory.shaped(place, tensor, (rows, tensor.shape[1], columns, tensor.shape[3]))
            new[:count, :, :kept], new[:count, :, kept:] = old, 0
            return new

        self._layers = [
            (anew(2 * layer, keys), anew(2 * layer + 1, values)) for layer, (keys, values) in enumerate(self._layers)
        ]
        self.width = columns


class FixedRows:
    """The fixed rows of a model, and the graphs of passes over their last tokens.

    Attributes:
        wanted: whether rows are to be fixed.
        graphs: the graphs.
    """

    def __init__(self, *, wanted: bool) -> None:
        self.wanted = wanted
        self.graphs = Graphs(
            "a pass that continues texts could not be captured as a CUDA graph ({reason}); generation goes on without "
            "it, and takes longer"
        )
        self._memory = Memory()
        self._moved = 0
        self._user: weakref.ref[FixedKV] | None = None

    def without(self, reason: str) -> None:
        """Notes that a model's rows cannot be fixed."""
        if self.wanted:
            self.graphs.without(reason)

    def free(self) -> None:
        """Gives the memory back, unless it is in use."""
        if self._user is None or self._user() is None:
            self.graphs.forget()
            self._memory, self._moved = Memory(), 0

    def take_back(self, slots: object) -> None:
        """Others may have the fixed slots from now on; who had them, uses them no more."""
        if self._user is not None and self._user() is slots:
            self._user = None

    def slots(self) -> RowKV:
        """Fixed ones; others while somebody has them, or where they are not wanted."""
        if not self.wanted or (self._user is not None and self._user() is not None):
            return RowKV()
        slots = FixedKV(self._memory)
        self._user = weakref.ref(slots)
        return slots

    def run(
        self,
        kv: FixedKV,
        tokens: Sequence[int],
        run: Callable[[torch.Tensor, torch.Tensor, LastTokens], torch.Tensor],
        device: torch.device,
    ) -> torch.Tensor:
        """A pass over one token more of each row.

        Args:
            kv: the rows.
            tokens: one a row.
            run: logits ``[R, V]`` of tokens int64 ``[R, 1]`` in columns int64 ``[R, 1]`` of a cache.
            device: where it runs.

        Returns:
            Logits of each row's token.
        """
        columns, layers = kv.advance(), kv.layers()
        if kv.memory.moved != self._moved:
            self.graphs.forget()
            self._moved = kv.memory.moved
        nothing = [0] * (kv.rows - len(tokens))
        given = sent(torch.tensor([[*tokens, *nothing], [*columns, *nothing]]), device)

        def whole(given: torch.Tensor) -> tuple[torch.Tensor]:
            ids, places = given[0][:, None], given[1][:, None]
            return (run(ids, places, LastTokens(layers, places)),)

        (logits,) = self.graphs((kv.rows, kv.width), whole, given)
        return logits[: len(tokens)]


def rounded_rows(rows: int) -> int:
    """The next number of rows that graphs are captured for."""
    return 1 << (rows - 1).bit_length() if rows <= FEW_ROWS else rounded(rows, FEW_ROWS)
