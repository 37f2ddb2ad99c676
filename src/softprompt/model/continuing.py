"""What comes behind rows that grow, token by token.

Here, ``lm`` is a ``FrozenLM``, whose module imports this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from softprompt.model.fast.fixed_rows import FixedKV, LastTokens
from softprompt.model.state.recurrent import Slots


def next_logits(lm: Any, kv: Slots, embedded: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Runs the next tokens of every row behind those in ``kv``, and appends them there.

    Args:
        lm: the model.
        kv: the rows so far, ``B`` of them.
        embedded: ``[B, T, H]``, or what is read of tokens where that is more, padded on the right.
        counts: how many of the ``T`` tokens are each row's own, at least one; all, in a recurrent model.

    Returns:
        float32 ``[B, V]``, the logits after each row's last token.
    """
    columns = kv.extend(counts, embedded.shape[1])
    alone = lm.avoids_one_row and embedded.shape[:2] == (1, 1) and not lm.recurrent
    if alone:
        embedded, columns, counts = embedded.expand(2, -1, -1), columns.expand(2, -1), [*counts, *counts]
    own = torch.tensor(counts)
    padding = torch.arange(embedded.shape[1]) >= own[:, None]
    columns, padding = columns.to(lm.device), padding.to(lm.device)
    hidden = lm.passes.behind(kv, embedded, columns, columns.masked_fill(padding, 0))
    logits: torch.Tensor = lm.logits(hidden[torch.arange(len(own)), own - 1])
    return logits[:1] if alone else logits


def last_logits(lm: Any, kv: Slots, tokens: Sequence[int]) -> torch.Tensor:
    """The same of one token a row, by id. On a GPU it is one captured graph, for which nothing waits.

    Args:
        lm: the model.
        kv: the rows so far; those of ``slots(fixed=True)``.
        tokens: one a row.

    Returns:
        float32 ``[B, V]``.
    """
    found: torch.Tensor
    if isinstance(kv, FixedKV):

        def run(ids: torch.Tensor, columns: torch.Tensor, cache: LastTokens) -> torch.Tensor:
            logits: torch.Tensor = lm.logits(lm.passes.behind(cache, lm.read(ids), columns, columns)[:, 0])
            return logits

        return lm.fixed_rows.run(kv, tokens, run, lm.device)  # type: ignore[no-any-return]
    ids = torch.tensor([[token] for token in tokens], device=lm.device)
    found = lm.next_logits(kv, lm.read(ids), [1] * len(tokens))
    return found
