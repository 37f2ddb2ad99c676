"""Keys and values of prefixes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class PrefixKV:
    """Keys and values of ``K`` shared prefixes in every layer.

    Attributes:
        keys: a tensor ``[K, H_kv, P, D]`` for each layer, in the model's dtype, after any rotary embedding; prefixes
            shorter than the longest are padded on the right.
        values: likewise.
        lengths: the length in tokens of each prefix, ``K`` of them.
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    lengths: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def width(self) -> int:
        """Length in tokens of the longest prefix."""
        return max(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes held by keys and values."""
        return sum(t.nbytes for t in (*self.keys, *self.values))


def in_a_row(first: PrefixKV | None, second: PrefixKV) -> PrefixKV:
    """One prefix from two, the second behind the first, if there is one."""
    if first is None:
        return second

    def join(one: tuple[torch.Tensor, ...], two: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(torch.cat(pair, dim=2) for pair in zip(one, two, strict=True))

    lengths = (first.width + second.width,)
    return PrefixKV(join(first.keys, second.keys), join(first.values, second.values), lengths)


def stack_prefixes(prefixes: list[PrefixKV]) -> PrefixKV:
    """Stands prefixes of any lengths beside each other, padded on the right to the longest."""
    if len(prefixes) == 1:
        return prefixes[0]
    width = max(p.width for p in prefixes)

    def stack(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([nn.functional.pad(t, (0, 0, 0, width - t.shape[2])) for t in parts])

    layers = range(len(prefixes[0].keys))
    return PrefixKV(
        keys=tuple(stack([p.keys[i] for p in prefixes]) for i in layers),
        values=tuple(stack([p.values[i] for p in prefixes]) for i in layers),
        lengths=tuple(n for p in prefixes for n in p.lengths),
    )
