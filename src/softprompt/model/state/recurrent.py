"""What recurrent layers leave behind, next to the keys and values of those with attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from softprompt.model.state.kv import PrefixKV
from softprompt.model.state.prefix import PrefixState
from softprompt.model.state.slots import RowKV

WINDOW, RECURRENCE = "window", "recurrence"

KEYS, VALUES = "keys", "values"
STORED = {WINDOW: "window", RECURRENCE: "state"}
"""What the tensors of a trained state are called, behind their layer's number."""

Part = tuple[str, int]
"""A kind of memory, ``WINDOW`` or ``RECURRENCE``, and the layer whose it is."""


@dataclass(frozen=True)
class RecurrentState:
    """What ``K`` prefixes leave behind in a model some or all of whose layers are recurrent (a ``PrefixState``).

    Attributes:
        kv: keys and values of the layers with attention; of no layers, it still knows the lengths.
        attention: which layers those are.
        parts: whose the other memories are.
        memories: for each part ``[K, …]``: the inputs of a convolution that it still sees, or a recurrent state.
    """

    kv: PrefixKV
    attention: tuple[int, ...]
    parts: tuple[Part, ...]
    memories: tuple[torch.Tensor, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """The length in tokens of each prefix, ``K`` of them."""
        return self.kv.lengths

    @property
    def width(self) -> int:
        """Length in tokens of the longest prefix."""
        return self.kv.width

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Keys, values, then the other memories."""
        return (*self.kv.tensors, *self.memories)

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> RecurrentState:
        """The same with other numbers, in the order and shapes of ``tensors``."""
        count = len(self.kv.tensors)
        return replace(self, kv=self.kv.with_tensors(tensors[:count]), memories=tuple(tensors[count:]))

    def named(self) -> dict[str, torch.Tensor]:
        """Of one prefix, what there is of each layer by name, in the order of ``tensors``: ``layers.I.keys`` and
        ``layers.I.values`` ``[P, H_kv, D]``, ``layers.I.state`` ``[…]``, and ``layers.I.window`` ``[C, W - 1]``,
        without the oldest input, which no token behind it sees."""
        pairs = zip(self._names(), self.tensors, strict=True)
        return {name: _stored(name, tensor) for name, tensor in pairs}

    def with_named(self, named: Mapping[str, torch.Tensor]) -> RecurrentState:
        """One prefix with other numbers, as ``named`` gives them; differentiable. Dtypes are those that it has."""
        pairs = zip(self._names(), self.tensors, strict=True)
        tensors = [_unstored(name, named[name]).to(own.device, own.dtype) for name, own in pairs]
        length = next((tensor.shape[2] for tensor in tensors[: len(self.kv.keys)]), 0)
        made = self.with_tensors(tensors)
        return replace(made, kv=replace(made.kv, lengths=(length,)))

    def _names(self) -> list[str]:
        kv = [f"layers.{layer}.{which}" for which in (KEYS, VALUES) for layer in self.attention]
        return kv + [f"layers.{layer}.{STORED[part]}" for part, layer in self.parts]

    def select(self, prefixes: Sequence[int]) -> RecurrentState:
        """Some of the prefixes, by index, in that order."""
        chosen = list(prefixes)
        return replace(self, kv=self.kv.select(prefixes), memories=tuple(t[chosen] for t in self.memories))

    def join(self, behind: RecurrentState) -> RecurrentState:
        """One prefix from two: this one and, computed behind it, another, whose memories hold both."""
        return replace(behind, kv=self.kv.join(behind.kv))

    def stack(self, others: Sequence[RecurrentState]) -> RecurrentState:
        """The prefixes of all states beside each other, these ones first; they may differ in length."""
        beside = zip(*(state.memories for state in (self, *others)), strict=True)
        kv = self.kv.stack([other.kv for other in others])
        return replace(self, kv=kv, memories=tuple(torch.cat(parts) for parts in beside))


def _stored(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor ``[1, …]`` of a state as ``named`` has it."""
    if name.endswith((KEYS, VALUES)):
        return tensor[0].transpose(0, 1)
    return tensor[0, ..., 1:] if name.endswith(STORED[WINDOW]) else tensor[0]


def _unstored(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The reverse of ``_stored``."""
    if name.endswith((KEYS, VALUES)):
        return tensor.transpose(0, 1)[None]
    return (nn.functional.pad(tensor, (1, 0)) if name.endswith(STORED[WINDOW]) else tensor)[None]


class _Memories:
    """What recurrent layers of transformers ask of their cache. Nothing that they get is written to by others."""

    def __init__(self, memories: dict[Part, torch.Tensor]) -> None:
        self.memories = memories

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """Transformers' call: the inputs that a convolution still sees, ``[B, C, W]``."""
        return self.memories.get((WINDOW, layer_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """Transformers' call: the recurrent state, ``[B, …]``."""
        return self.memories.get((RECURRENCE, layer_idx))

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, *, conv_kernel_size: int, **kwargs: Any
    ) -> torch.Tensor:
        """Transformers' call: takes a pass's inputs ``[B, C, T]``, returns them behind those that are still seen. Its
        own cache would copy them in place, through which no gradient goes."""
        before = self.get_conv_state(layer_idx)
        if before is None:
            seen = nn.functional.pad(conv_states, (max(0, conv_kernel_size - conv_states.shape[-1]), 0))
        else:
            seen = torch.cat([before, conv_states], dim=-1)
        self.memories[WINDOW, layer_idx] = seen[..., -conv_kernel_size:]
        return seen

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        """Transformers' call: the state after a pass."""
        self.memories[RECURRENCE, layer_idx] = recurrent_states
        return recurrent_states

    def is_recording_past(self, layer_idx: int) -> bool:
        """Transformers asks whether to spare it the kernel that changes a convolution's window in place: yes."""
        return True

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int = 0) -> bool:
        """Transformers asks it to leave out a mask of padding; there is none."""
        return bool(self.memories)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Transformers asks it where positions are not given; ours are."""
        return 0


class Pass(_Memories):
    """Stands where transformers expects its cache, in one pass behind prefixes, which it leaves as they are."""

    def __init__(self, prefix: RecurrentState | None, rows: torch.Tensor) -> None:
        """
        Args:
            prefix: ``K`` of them, or None.
            rows: int64 ``[B]``, the prefix of each row.
        """
        self._prefix, self._rows = prefix, rows
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        super().__init__({})
        if prefix is not None:
            # An index copies: some layers change a state of one token in place.
            self.memories = {part: t[rows] for part, t in zip(prefix.parts, prefix.memories, strict=True)}

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Transformers' call in each layer with attention: ``[B, H_kv, T, D]`` behind those of the prefix."""
        self._kept[layer] = key, value
        if self._prefix is None:
            return key, value
        before = self._prefix.kv.layer(self._prefix.attention.index(layer))
        keys, values = (
            torch.cat([known[self._rows], own], dim=2) for known, own in zip(before, (key, value), strict=True)
        )
        return keys, values

    def left(self, length: int) -> RecurrentState:
        """What the pass's one row leaves behind, of ``length`` tokens; of none, only the shapes are taken, from a
        throw-away token: nothing before is the same as zeros."""
        layers = tuple(sorted(self._kept))
        keys, values = (tuple(self._kept[layer][i][:, :, :length] for layer in layers) for i in (0, 1))
        parts = tuple(sorted(self.memories))
        memories = [self.memories[part] for part in parts]
        if not length:
            memories = [torch.zeros_like(memory) for memory in memories]
        return RecurrentState(PrefixKV(keys, values, (length,)), layers, parts, tuple(memories))


class RowStates(_Memories):
    """Rows that grow, of a model with recurrent layers, as ``RowKV`` is of one without; each pass has as many tokens of
    each row.

    Attributes:
        lengths: tokens of each row.
    """

    def __init__(self) -> None:
        super().__init__({})
        self.lengths: list[int] = []
        self._kv = RowKV()
        self._attention: tuple[int, ...] = ()
        self._parts: tuple[Part, ...] = ()

    @property
    def width(self) -> int:
        """Columns of a slot of keys and values."""
        return self._kv.width

    def add(self, prefixes: Sequence[PrefixState], ahead: int) -> None:
        """Rows that begin with ``prefixes`` (one row each, copied), behind those that are there; ``ahead`` tokens of
        each follow in the next pass."""
        starts = [prefix for prefix in prefixes if isinstance(prefix, RecurrentState)]
        assert len(starts) == len(prefixes), "rows of another kind need slots of another kind"
        self._attention, self._parts = starts[0].attention, starts[0].parts
        if self._attention:
            self._kv.add([start.kv for start in starts], ahead)
        self.lengths += [start.width for start in starts]
        for index, part in enumerate(self._parts):
            held = [self.memories[part]] if part in self.memories else []
            self.memories[part] = torch.cat([*held, *(start.memories[index] for start in starts)])

    def join(self, others: object) -> RowStates:
        """As ``RowKV.join``; ``others`` are ``RowStates``."""
        assert isinstance(others, RowStates), "rows of another kind need slots of another kind"
        if not self.lengths:
            return others
        self.add([others.row(index) for index in range(len(others.lengths))], 1)
        return self

    def row(self, index: int) -> RecurrentState:
        """A row so far; a view."""
        kv = self._kv.row(index) if self._attention else PrefixKV((), (), (self.lengths[index],))
        memories = tuple(self.memories[part][index : index + 1] for part in self._parts)
        return RecurrentState(kv, self._attention, self._parts, memories)

    def remove(self, index: int) -> None:
        """Takes a row out; the last row takes its slot."""
        if self._attention:
            self._kv.remove(index)
        rows = list(range(len(self.lengths)))
        rows[index] = rows[-1]
        self.lengths[index] = self.lengths[-1]
        self.lengths.pop()
        self.memories = {part: memory[rows[:-1]] for part, memory in self.memories.items()}

    def extend(self, counts: Sequence[int], tokens: int) -> torch.Tensor:
        """Makes place for a pass over ``tokens`` tokens of every row.

        Returns:
            int64 ``[B, tokens]`` on the CPU, the position of each token.
        """
        assert all(count == tokens for count in counts), "a padding token would go into the state"
        if self._attention:
            self._kv.extend(counts, tokens)
        positions = torch.tensor(self.lengths)[:, None] + torch.arange(tokens)
        self.lengths = [length + tokens for length in self.lengths]
        return positions

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Transformers' call in each layer with attention."""
        return self._kv.update(key, value, self._attention.index(layer))


Slots = RowKV | RowStates
"""Where rows grow."""
