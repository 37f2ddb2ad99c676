"""Keys and values of prefixes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

KEYS, VALUES = "keys", "values"
"""What the tensors of a trained state are called, behind their layer's number."""


@dataclass(frozen=True)
class PrefixKV:
    """Keys and values of ``K`` shared prefixes in every layer: what attention leaves behind (a ``PrefixState``).

    Attributes:
        keys: a tensor ``[K, H_kv, P, D]`` for each layer that has its own, in the model's dtype, after any rotary
            embedding; prefixes shorter than the longest are padded on the right. ``H_kv`` and ``D`` may differ between
            layers. Where attention keeps latents (DeepSeek), those.
        values: likewise; their ``D`` may be another, and of latents they are the keys' rotary part.
        lengths: the length in tokens of each prefix, ``K`` of them.
        reads: which of them each layer reads, where some read those of others (Gemma 3n, Gemma 4); else empty.
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    lengths: tuple[int, ...]
    reads: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.lengths)

    @classmethod
    def of_numbers(cls, numbers: torch.Tensor) -> PrefixKV:
        """One prefix, from ``[P, L, 2, H_kv, D]``; differentiable."""
        layers = numbers.permute(1, 2, 3, 0, 4)  # [L, 2, H_kv, P, D]
        return cls(tuple(layers[:, :1]), tuple(layers[:, 1:]), (len(numbers),))

    def numbers(self) -> torch.Tensor:
        """``[P, L, 2, H_kv, D]`` of one prefix; the reverse of ``of_numbers``."""
        layers = [torch.cat(pair) for pair in zip(self.keys, self.values, strict=True)]
        return torch.stack(layers).permute(3, 0, 1, 2, 4)

    def named(self, layers: Sequence[int] | None = None) -> dict[str, torch.Tensor]:
        """Of one prefix, the keys and values by name, in the order of ``tensors``: ``layers.I.keys`` and
        ``layers.I.values`` ``[P, H_kv, D]``.

        Args:
            layers: the numbers of the layers that have their own; None: as ``reads`` tells.
        """
        pairs = zip(self._names(layers), self.tensors, strict=True)
        return {name: tensor[0].transpose(0, 1) for name, tensor in pairs}

    def with_named(self, named: Mapping[str, torch.Tensor], layers: Sequence[int] | None = None) -> PrefixKV:
        """One prefix with other numbers, as ``named`` gives them; differentiable. Dtypes are those that it has."""
        pairs = zip(self._names(layers), self.tensors, strict=True)
        tensors = [named[name].transpose(0, 1)[None].to(own.device, own.dtype) for name, own in pairs]
        return replace(self.with_tensors(tensors), lengths=(tensors[0].shape[2] if tensors else 0,))

    def _names(self, layers: Sequence[int] | None) -> list[str]:
        if layers is None:
            own = range(len(self.keys))
            layers = [self.reads.index(place) for place in own] if self.reads else own
        return [f"layers.{layer}.{which}" for which in (KEYS, VALUES) for layer in layers]

    @property
    def width(self) -> int:
        """Length in tokens of the longest prefix."""
        return max(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes held by keys and values."""
        return sum(t.nbytes for t in self.tensors)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All keys, then all values."""
        return (*self.keys, *self.values)

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> PrefixKV:
        """The same with other numbers, in the order and shapes of ``tensors``."""
        count = len(self.keys)
        return replace(self, keys=tuple(tensors[:count]), values=tuple(tensors[count:]))

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values that one layer reads, ``[K, H_kv, P, D]`` each."""
        place = self.reads[index] if self.reads else index
        return self.keys[place], self.values[place]

    def select(self, prefixes: Sequence[int]) -> PrefixKV:
        """Some of the prefixes, by index, in that order, as wide as the longest of them."""
        lengths = tuple(self.lengths[i] for i in prefixes)
        chosen, width = list(prefixes), max(lengths)
        return replace(self.with_tensors([t[chosen, :, :width] for t in self.tensors]), lengths=lengths)

    def join(self, behind: PrefixKV) -> PrefixKV:
        """One prefix from two, ``behind`` after this one."""
        assert len(self) == len(behind) == 1, "padding would lie between the two"
        joined = [torch.cat(pair, dim=2) for pair in zip(self.tensors, behind.tensors, strict=True)]
        return replace(self.with_tensors(joined), lengths=(self.width + behind.width,))

    def stack(self, others: Sequence[PrefixKV]) -> PrefixKV:
        """Prefixes of any lengths beside each other, these ones first, padded on the right to the longest."""
        if not others:
            return self
        states = (self, *others)
        width = max(state.width for state in states)

        def beside(parts: Sequence[torch.Tensor]) -> torch.Tensor:
            return torch.cat([nn.functional.pad(t, (0, 0, 0, width - t.shape[2])) for t in parts])

        stacked = [beside(parts) for parts in zip(*(state.tensors for state in states), strict=True)]
        return replace(self.with_tensors(stacked), lengths=tuple(n for state in states for n in state.lengths))


class Kept:
    """Stands where transformers expects its cache, in a pass over a prefix: takes down what each layer would keep.

    Attributes:
        layers: for each layer, the pairs that it handed over.
    """

    def __init__(self, layers: int) -> None:
        self.layers: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(layers)]

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Transformers' call in each layer."""
        self.layers[layer].append((key, value))
        return key, value

    def get_seq_length(self, layer: int = 0) -> int:
        """Transformers asks it where positions are not given; ours are."""
        return 0

    def prefix(self, *lengths: int) -> PrefixKV:
        """The first tokens of each row, so many of them. A layer that handed over another's tensors reads those."""
        pairs, width = [layer[0] for layer in self.layers], max(lengths)
        places: dict[tuple[int, int], int] = {}
        reads = tuple(places.setdefault((id(key), id(value)), len(places)) for key, value in pairs)
        own = [pairs[reads.index(place)] for place in range(len(places))]
        keys, values = (tuple(pair[i][:, :, :width] for pair in own) for i in (0, 1))
        return PrefixKV(keys, values, lengths, reads if len(own) < len(pairs) else ())
