"""Passes through a model that shares prefixes: over the prefixes, over rows behind them, over rows that grow."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from softprompt.model.attention import Masks
from softprompt.model.batch import Batch
from softprompt.model.per_layer import arguments
from softprompt.model.state.kv import Kept, PrefixKV
from softprompt.model.state.prefix import PrefixState
from softprompt.model.state.recurrent import Pass, RecurrentState


@dataclass(frozen=True)
class Passes:
    """How a model computes with shared prefixes. What goes in is what is read of tokens, ``[…, H]`` or wider
    (``per_layer.read``); what comes out is what prefixes leave behind, or hidden states after the last layer's norm.

    Attributes:
        core: the language model without its head.
        layers: how many.
        mask: makes its attention masks.
        recurrent: whether some of its layers have a state of one size for a memory.
        latent: whether its layers with attention keep latents.
        by_blocks: whether attention in a stream goes by blocks.
    """

    core: Any
    layers: int
    mask: Masks
    recurrent: bool
    latent: bool
    by_blocks: bool

    def prefix(self, embedded: torch.Tensor, length: int, before: PrefixState | None) -> PrefixState:
        """What the first ``length`` tokens of a row ``[T, H]`` leave behind. They see ``before``, which is left out."""
        if not self.recurrent:
            assert before is None or isinstance(before, PrefixKV)
            return self.prefixes([embedded], [length], before)
        assert before is None or isinstance(before, RecurrentState)
        positions, mask = self._behind_all(embedded[None], before)
        cache = Pass(before, torch.zeros(1, dtype=torch.long, device=embedded.device))
        self._run_caching(embedded[None], mask, positions, cache)
        return cache.left(length)

    def prefixes(self, rows: Sequence[torch.Tensor], lengths: Sequence[int], before: PrefixKV | None) -> PrefixKV:
        """Keys and values of the first tokens of rows ``[T, H]``, beside each other; they see ``before``."""
        embedded = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        positions, mask = self._behind_all(embedded, before)
        kept = Kept(self.layers)
        # A cache is asked in code that knows its layer's number, which would be compiled for each layer anew.
        keeping: dict[str, Any] = {"past_key_values": kept} if self.latent else {"keep": kept.layers}
        self._run(embedded, mask, positions, prefix=before, **keeping)
        return kept.prefix(*lengths)

    def _behind_all(self, embedded: torch.Tensor, before: PrefixState | None) -> tuple[torch.Tensor, Any]:
        """Positions int64 ``[B, T]`` and the mask of rows that stand behind a prefix and see all of it."""
        start = 0 if before is None else before.width
        seen = torch.arange(start + embedded.shape[1], device=embedded.device).expand(len(embedded), -1)
        positions = seen[:, start:]
        return positions, self.mask(positions[..., None] >= seen[:, None], positions, seen)

    def batch(self, batch: Batch, embedded: torch.Tensor, prefix: PrefixState | None) -> torch.Tensor:
        """Hidden states ``[B, T, H]`` of a batch's tokens, ``embedded``, behind their rows' prefixes."""
        if batch.soft is not None and self.by_blocks:
            mask = self.mask.blocks(batch.ends[0], batch.positions[0])
        else:
            before = torch.arange(batch.width, device=embedded.device).expand(len(batch.ids), -1)
            mask = self.mask(batch.sees, batch.positions, torch.cat([before, batch.positions], dim=1))
        if isinstance(prefix, RecurrentState):
            assert batch.prefix_rows is not None
            return self._run_caching(embedded, mask, batch.positions, Pass(prefix, batch.prefix_rows))
        return self._run(embedded, mask, batch.positions, prefix=prefix, prefix_rows=batch.prefix_rows)

    def behind(self, kv: Any, embedded: torch.Tensor, columns: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Hidden states ``[B, T, H]`` of tokens that stand in those columns of their slots, both int64 ``[B, T]``."""
        places = torch.arange(kv.width, device=embedded.device)[None]
        mask = self.mask(columns[..., None] >= places[:, None], positions, places)
        return self._run_caching(embedded, mask, positions, kv)

    def _run(self, embedded: torch.Tensor, mask: Any, positions: torch.Tensor, **ours: Any) -> torch.Tensor:
        """Hidden states ``[B, T, H]``, where our attention does the rest."""
        given = arguments(self.core, embedded)
        out = self.core(**given, attention_mask=mask, position_ids=positions, use_cache=False, **ours)
        return out.last_hidden_state  # type: ignore[no-any-return]

    def _run_caching(self, embedded: torch.Tensor, mask: Any, positions: torch.Tensor, cache: Any) -> torch.Tensor:
        """The same, with what stands where transformers expects its own cache."""
        takes = inspect.signature(self.core.forward).parameters
        options = {"cache_params" if "cache_params" in takes else "past_key_values": cache}  # Mamba says the former
        if "position_ids" in takes:
            options["position_ids"] = positions
        out = self.core(**arguments(self.core, embedded), attention_mask=mask, use_cache=True, **options)
        return out.last_hidden_state  # type: ignore[no-any-return]
