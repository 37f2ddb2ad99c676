"""Attention of a stream on a GPU: PyTorch's flex attention, which leaves out the blocks in which no token sees
another."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, TypeVar

import torch

from softprompt.model.fast.compiled import compiled_if_possible

F = TypeVar("F", bound=Callable[..., Any])

BLOCK = 128
"""Tokens in a block; a stream's length must be a multiple."""


def can_use_blocks(device: torch.device) -> bool:
    """Whether flex attention has a backward pass here."""
    return device.type == "cuda" and find_spec("triton") is not None


def block_mask(ends: torch.Tensor, positions: torch.Tensor, window: int | None = None) -> Any:
    """Which tokens of a stream see which.

    Args:
        ends: int64 ``[T]``: token ``i`` sees token ``j`` if ``j <= i < ends[j]``.
        positions: int64 ``[T]``.
        window: how many positions, its own included, a token sees; None: all.

    Returns:
        A ``BlockMask`` of shape ``[1, 1, T, T]``, made on the device without waiting for it.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(batch: Any, head: Any, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        own = (j <= i) & (i < ends[j])
        return own if window is None else own & (positions[i] - positions[j] < window)

    length = len(ends)
    return create_block_mask(sees, None, None, length, length, device=str(ends.device), BLOCK_SIZE=BLOCK)


def _apart(call: F) -> F:
    """Compiled layers leave it out: it is compiled by itself, with static shapes."""
    disabled: F = torch.compiler.disable(call, recursive=False)  # type: ignore[no-untyped-call]
    return disabled


class BlockAttention:
    """Flex attention, compiled where that works; else as it is, slowly and with a ``SoftPromptWarning``."""

    def __init__(self) -> None:
        self._attend: Callable[..., torch.Tensor] | None = None

    @_apart
    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scaling: float
    ) -> torch.Tensor:
        """
        Args:
            query: ``[1, H_q, T, D]``.
            key, value: ``[1, H_kv, T, D]``; ``H_q`` is a multiple of ``H_kv``.
            mask: what ``block_mask`` made.
            scaling: factor on the scores.

        Returns:
            ``[1, T, H_q, D]``.
        """
        from torch.nn.attention.flex_attention import flex_attention

        if self._attend is None:
            plain: Callable[..., torch.Tensor] = flex_attention
            if query.device.type == "cuda":
                plain = compiled_if_possible(plain, self._give_up, what="the attention of a stream", dynamic=False)
            self._attend = plain
        grouped = query.shape[1] != key.shape[1]
        out = self._attend(query, key, value, block_mask=mask, scale=scaling, enable_gqa=grouped)
        return out.transpose(1, 2)

    def _give_up(self) -> None:
        from torch.nn.attention.flex_attention import flex_attention

        self._attend = flex_attention


attend_blocks = BlockAttention()
