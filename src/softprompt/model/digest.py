"""A hash of a tensor's bytes, computed where they are."""

from __future__ import annotations

import torch

HASHED_AT_ONCE = 1 << 25
"""Bytes, so that what is held meanwhile stays small."""


def device_hash(content: torch.Tensor) -> int:
    """A 64-bit hash of bytes, computed where they are: the sum of SplitMix64 (Steele et al. 2014) of all words of 8
    bytes, each with its place added in.

    SplitMix64 is a bijection, so another value of one word is noticed for sure. What changes in several words, swapped
    ones included, goes unnoticed with a chance of 2^-64.

    Args:
        content: uint8 ``[N]``, contiguous.

    Returns:
        0 to 2^64 - 1.
    """

    def shifted(words: torch.Tensor, bits: int) -> torch.Tensor:
        return (words >> bits) & ((1 << (64 - bits)) - 1)  # without the sign

    total = torch.zeros((), dtype=torch.int64, device=content.device)
    for start in range(0, len(content), HASHED_AT_ONCE):
        some = content[start : start + HASHED_AT_ONCE]
        if len(some) % 8 or some.storage_offset() % 8:
            some = torch.nn.functional.pad(some, (0, -len(some) % 8))
        words = some.view(torch.int64)
        first = start // 8 + 1
        places = torch.arange(first, first + len(words), device=content.device)
        words = words + places * -0x61C8864680B583EB  # 0x9E3779B97F4A7C15, the golden ratio's, as a signed number
        words = (words ^ shifted(words, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
        words = (words ^ shifted(words, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
        total += (words ^ shifted(words, 31)).sum()
    return int(total) % (1 << 64)
