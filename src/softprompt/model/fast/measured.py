"""How much a pass with gradient computes at once on a GPU, from what its first passes took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from softprompt.model.memory import MOST_TOKENS

FITS = 0.8
"""Share of the free memory that a micro-batch may take, once it is known how much a token takes: there are holes in it,
and rows differ."""

MEASURED_PASSES = 2
"""Passes that are measured; the first one's memory holds what libraries keep, and later ones may be longer."""


@dataclass(frozen=True)
class MicroBatch:
    """What a pass with gradient computes at once, from measured memory.

    Attributes:
        tokens: the most tokens, padding included.
        recomputed: whether activations are to be computed again in the backward pass.
        bytes_a_token: what a token took.
        free_bytes: what was free on the device when the passes had ended.
    """

    tokens: int
    recomputed: bool
    bytes_a_token: int
    free_bytes: int

    def as_dict(self) -> dict[str, int | bool]:
        """JSON values."""
        return {
            "tokens": self.tokens,
            "activation_checkpointing": self.recomputed,
            "bytes_a_token": self.bytes_a_token,
            "free_bytes": self.free_bytes,
        }


def micro_batch(
    passes: Sequence[tuple[int, int]], free: int, longest: int, *, recomputed: bool, may_recompute: bool
) -> MicroBatch:
    """The micro-batch that fits.

    Args:
        passes: tokens of each pass that was measured, and by how many bytes it raised the allocated memory.
        free: bytes that are free between passes.
        longest: tokens of the longest row, which a pass cannot divide.
        recomputed: whether the passes computed activations again.
        may_recompute: whether passes may.
    """
    a_token = max(1, *(-(-peak // tokens) for tokens, peak in passes))
    fitting = int(FITS * free) // a_token
    again = recomputed or (may_recompute and fitting < longest)
    done = max(tokens for tokens, _ in passes)  # so many did fit
    return MicroBatch(min(max(fitting, done), max(MOST_TOKENS, done)), again, a_token, free)


class Gauge:
    """Reads a CUDA device's memory, without waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0

    def begin(self) -> None:
        """A pass begins."""
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_allocated(self._device)

    def raised(self) -> int:
        """By how many bytes the pass raised what is allocated, at its highest."""
        return torch.cuda.max_memory_allocated(self._device) - self._before

    def free(self) -> int:
        """Bytes that are free now; what the allocator keeps for later is given back first."""
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(self._device)[0])


class Measuring:
    """Finds the micro-batch of a training in its first passes.

    Attributes:
        found: what was found; None before that.
    """

    def __init__(self, gauge: Gauge | None, *, may_recompute: bool) -> None:
        """
        Args:
            gauge: reads the device; None where nothing is measured.
            may_recompute: whether activations may be computed again.
        """
        self.found: MicroBatch | None = None
        self._gauge, self._may_recompute = gauge, may_recompute
        self._passes: list[tuple[int, int]] = []
        self._told = False

    @property
    def recomputes(self) -> bool:
        """Whether activations are to be computed again, as was found."""
        return self.found is not None and self.found.recomputed

    def news(self) -> dict[str, dict[str, int | bool]]:
        """What was found, as a field of a log, for the first time that it is asked for afterwards; else none."""
        if self.found is None or self._told:
            return {}
        self._told = True
        return {"micro_batch": self.found.as_dict()}

    def stop(self) -> None:
        """Measures no more: a pass did not fit, and goes on as it was divided then."""
        self._gauge = None

    def begin(self) -> None:
        """Passes begin."""
        if self._gauge is not None and self.found is None:
            self._gauge.begin()

    def end(self, tokens: int, longest: int, *, recomputed: bool) -> MicroBatch | None:
        """Passes of at most so many tokens have ended, in rows of at most ``longest``; what is decided now. Where
        activations are to be computed again from now on, that is measured once more."""
        if self._gauge is None or self.found is not None:
            return None
        self._passes.append((tokens, self._gauge.raised()))
        if len(self._passes) < MEASURED_PASSES:
            return None
        now = micro_batch(
            self._passes, self._gauge.free(), longest, recomputed=recomputed, may_recompute=self._may_recompute
        )
        self._passes = []
        if now.recomputed == recomputed:
            self.found = now
        return now
