"""What is read off the logits of a batch."""

from __future__ import annotations

import torch

from softprompt.model.batch import Batch


def summed(batch: Batch, logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities float32 ``[B, W]`` of each row's words from logits ``[M, V]`` where they are read."""
    picked = logits.log_softmax(dim=-1)[batch.step_read, batch.step_token]
    scores = torch.zeros((batch.size + 1) * batch.num_words, device=logits.device)
    scores = scores.index_add(0, batch.step_slot, picked).view(-1, batch.num_words)
    return scores[: batch.size].masked_fill(_absent(batch), -torch.inf)


def greedy_words(batch: Batch, logits: torch.Tensor) -> torch.Tensor:
    """Whether each token of a word is the most probable one, bool ``[B, W]``, from the same logits."""
    others = (logits.argmax(dim=-1)[batch.step_read] != batch.step_token).float()
    count = torch.zeros(batch.size * batch.num_words, device=logits.device).index_add(0, batch.step_slot, others)
    return (count.view(batch.size, batch.num_words) == 0) & ~_absent(batch)


def _absent(batch: Batch) -> torch.Tensor:
    return torch.arange(batch.num_words, device=batch.ids.device) >= batch.word_counts[:, None]
