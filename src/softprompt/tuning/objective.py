"""What is learned from a batch: its loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from softprompt.model.request import Request
from softprompt.tasks.scores import label_scores


@dataclass(frozen=True)
class Objective:
    """The loss of examples as requests.

    Attributes:
        labels: for the loss over labels, label index of each word; None for the loss of all target tokens.
    """

    labels: tuple[int, ...] | None = None

    def loss(self, scores: torch.Tensor, gold: torch.Tensor) -> torch.Tensor:
        """Sum over rows of the negative log-probability of the gold word or label.

        Args:
            scores: float32 ``[B, W]``, log-probabilities of words.
            gold: int64 ``[B]``, index of a word or, for the loss over labels, of a label.
        """
        if self.labels is not None:
            scores = label_scores(scores, self.labels).log_softmax(dim=1)
        return -scores.gather(1, gold[:, None]).sum()

    def weight(self, requests: Sequence[Request]) -> int:
        """By what the summed loss is divided: target tokens, or examples for the loss over labels."""
        return len(requests) if self.labels is not None else sum(len(r.words[0]) for r in requests)
