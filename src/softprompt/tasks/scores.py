"""Scores of words → scores of the labels that they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch.nn import functional

from softprompt.text.tokens import Tokens


def label_scores(scores: torch.Tensor, owners: Sequence[int]) -> torch.Tensor:
    """Log of the summed probabilities of each label's words; differentiable.

    The words of each label are gathered side by side and added up at once: no loop over labels, nothing that waits for
    a GPU, and on each device the same bits every time, which sums scattered by index would not give.

    Args:
        scores: float ``[N, W]``, log-probabilities of words.
        owners: the label's index of each of the ``W`` words.

    Returns:
        ``[N, labels]``; ``-inf`` for a label without a word.
    """
    places = _places(tuple(owners), scores.device)
    gathered = functional.pad(scores, (0, 1), value=-torch.inf).index_select(1, places.flatten())
    return gathered.view(len(scores), *places.shape).logsumexp(dim=-1)


@cache  # never freed: captured CUDA graphs go on reading it
def _places(owners: Tokens, device: torch.device) -> torch.Tensor:
    """int64 ``[labels, M]``, the places of each label's words, and behind fewer than ``M`` that of a word without
    probability, ``W``."""
    words: list[list[int]] = [[] for _ in range(max(owners) + 1)]
    for word, owner in enumerate(owners):
        words[owner].append(word)
    most = max(map(len, words))
    return torch.tensor([places + [len(owners)] * (most - len(places)) for places in words], device=device)
