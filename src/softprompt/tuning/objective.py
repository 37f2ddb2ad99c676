"""The loss of a batch and its gradient: the shared prefix once, the rows in micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from softprompt.model.batch import collate, micro_batches
from softprompt.model.frozen import FrozenLM
from softprompt.model.joined import Joined, apart, join
from softprompt.model.prefixes import PrefixOf
from softprompt.model.request import Request
from softprompt.model.state.prefix import Detached
from softprompt.tasks.scores import label_scores
from softprompt.text.tokens import SOFT


@dataclass(frozen=True)
class Objective:
    """The loss of examples as requests, and how to get its gradient by the path that serves them.

    Attributes:
        lm: the frozen base model.
        labels: for the loss over labels, label index of each word; None for the loss of all target tokens.
        max_tokens: the most tokens, padding included, in one micro-batch, and in a row of several answers of one
            conversation; by default ``lm.tokens_at_once``.
    """

    lm: FrozenLM
    labels: Sequence[int] | None = None
    max_tokens: int | None = None

    def micro_batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Rows of these lengths, in tokens, in groups that one pass computes: lists of indices."""
        return micro_batches(lengths, self.max_tokens or self.lm.tokens_at_once)

    def shares(self, requests: Sequence[Request]) -> bool:
        """Whether these requests are computed behind a prefix that runs once."""
        return self.lm.shares_prefix and all(request.shares_prefix for request in requests)

    def join(self, requests: Sequence[Request]) -> list[Joined]:
        """The requests as rows: answers of a conversation together, where a prefix runs once."""
        if not self.shares(requests):
            return [Joined((place,), (request,)) for place, request in enumerate(requests)]
        return join(requests, self.max_tokens or self.lm.tokens_at_once)

    def tokens(self, requests: Sequence[Request]) -> int:
        """Tokens that a forward pass runs behind the shared prefix."""
        return sum(one.row().length for one in self.join(requests))

    def saved(self, requests: Sequence[Request]) -> int:
        """Tokens that it does not run, since the answers of a conversation share what they begin with."""
        return sum(one.saved for one in self.join(requests))

    @cached_property
    def _text_before(self) -> PrefixOf:
        """The template's text before the soft prompt, which no step changes."""
        return self.lm.kept_prefixes(1)

    def loss(self, scores: torch.Tensor, gold: Sequence[int]) -> torch.Tensor:
        """Sum over rows of the negative log-probability of the gold word or label.

        Args:
            scores: float32 ``[B, W]``, log-probabilities of words.
            gold: ``B`` indices, of a word or, for the loss over labels, of a label.
        """
        if self.labels is not None:
            scores = label_scores(scores, self.labels).log_softmax(dim=1)
        return -scores.gather(1, torch.tensor(gold, device=scores.device)[:, None]).sum()

    def weight(self, requests: Sequence[Request]) -> int:
        """By what the summed loss is divided: target tokens, or examples for the loss over labels."""
        return len(requests) if self.labels is not None else sum(len(r.words[0]) for r in requests)

    def backward(self, requests: Sequence[Request], gold: Sequence[int], vectors: torch.Tensor) -> tuple[float, int]:
        """Adds the gradient of the mean loss to ``vectors.grad``; returns the mean loss and the tokens computed.

        With a shared prefix it goes in two stages. The prefix runs once, its text before the soft prompt in the first
        step only; micro-batches of rows, one row for the answers of a conversation, send their gradients into its
        detached keys and values, where they add up in fp32. One backward pass then carries the sum to ``vectors``; for
        a KV prefix, through the template's text behind it only.

        Args:
            requests: a whole batch, all with the same shared prefix.
            gold: as for ``loss``.
            vectors: float32 ``[P, H]`` or ``[P, L, 2, H_kv, D]``, a leaf.
        """
        weight = self.weight(requests)
        if not self.shares(requests):
            return self._backward_concatenated(requests, gold, vectors, weight)
        shared = requests[0].ids[: requests[0].shared]
        place = shared.index(SOFT)
        before = self._text_before(shared[:place], None) if place else None
        prefix = self.lm.prefix_kv(shared[place:], vectors, before)
        detached = Detached(prefix)
        joined = self.join(requests)
        rows = [one.row() for one in joined]
        losses = []
        for group in self.micro_batches([row.length for row in rows]):
            batch = collate([rows[i] for i in group], prefix.lengths, self.lm.device)
            members = [joined[i] for i in group]
            scores = apart(self.lm.score_batch(batch, detached.leaves()), members)
            loss = self.loss(scores, [gold[place] for one in members for place in one.places]) / weight
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        detached.backward()
        return _sum(losses), prefix.lengths[0] + sum(row.length for row in rows)

    def _backward_concatenated(
        self, requests: Sequence[Request], gold: Sequence[int], vectors: torch.Tensor, weight: int
    ) -> tuple[float, int]:
        losses, width = [], vectors.shape[0]
        lengths = [sum(len(r.ids) - 1 + width + len(word) for word in r.words) for r in requests]
        for group in self.micro_batches(lengths):
            scores = self.lm.score_concatenated([requests[i] for i in group], [vectors])
            loss = self.loss(scores, [gold[i] for i in group]) / weight
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        return _sum(losses), sum(lengths)


def _sum(losses: Sequence[torch.Tensor]) -> float:
    """Read all at once: a GPU is waited for one time."""
    return float(sum(torch.stack(list(losses)).tolist()))
