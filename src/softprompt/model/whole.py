"""Running whole sequences by a model's own forward: what serves every architecture, and the reference for what is
faster. For each token that is written, all of its row runs again."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn

from softprompt.model.per_layer import arguments, read
from softprompt.text.tokens import Tokens

Ahead = Sequence[torch.Tensor] | None
"""Of each row, vectors ``[N, H]`` before its decoder's input, which only encoder–decoders have; None: nowhere any."""


class Growing(Protocol):
    """Rows that are continued, token by token, in the order in which they came."""

    def add(self, rows: Sequence[torch.Tensor], ahead: Ahead = None) -> None:
        """Takes embedded rows ``[T, H]`` in, behind those that are there; computes nothing."""

    def logits(self) -> torch.Tensor:
        """Logits float32 ``[B, V]`` of each row's next token; at least one row."""

    def append(self, tokens: Sequence[int]) -> None:
        """The next token of each row."""

    def keep(self, places: Sequence[int]) -> None:
        """Only the rows at these places stay, in this order."""


class Whole(Protocol):
    """How a model computes rows that share nothing: each an embedded input ``[T, H]``, or what is read of
    each token where that is more (``per_layer.read``)."""

    def score(
        self, rows: Sequence[torch.Tensor], words: Sequence[Sequence[Tokens]], *, compare: bool, ahead: Ahead = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probabilities float32 ``[B, W]`` of each row's words, as ``FrozenLM.score`` gives them, differentiable in
        the rows and in ``ahead``; and with ``compare`` bool ``[B, W]``, whether each token of a word is the most
        probable one."""

    def tokens(self, length: int, words: Sequence[Tokens]) -> int:
        """How many tokens ``score`` computes for an input of ``length`` tokens with these words."""

    def growing(self) -> Growing:
        """No rows yet, to be continued."""

    def layer_states(self, embedded: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Hidden states ``[T, H]`` of a row before the first layer that reads it, and behind each layer."""

    def attention(self, embedded: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """For each layer the attention ``[heads, T]`` that the place of a row's next token pays to its tokens; empty
        where the model gives none."""


class WholeSequences:
    """A causal language model: each word of each row is a whole sequence of its own."""

    def __init__(self, model: Any, longest_steady: int) -> None:
        """
        Args:
            model: of transformers.
            longest_steady: tokens up to which a sequence does not change what others beside it give.
        """
        self._model = model
        self._longest_steady = longest_steady

    def score(
        self, rows: Sequence[torch.Tensor], words: Sequence[Sequence[Tokens]], *, compare: bool, ahead: Ahead = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See ``Whole``."""
        assert ahead is None, "it has no decoder of its own"
        device = rows[0].device
        places = [(r, w, word) for r, several in enumerate(words) for w, word in enumerate(several)]
        whole = [
            torch.cat([rows[r], self._look_up(word[:-1], device)]) if word[1:] else rows[r] for r, _, word in places
        ]
        width = max(map(len, words))
        scores: list[list[torch.Tensor | float]] = [[-torch.inf] * width for _ in rows]
        greedy = torch.zeros(len(rows), width, dtype=torch.bool, device=device) if compare else None
        for (r, w, word), part in zip(places, self._run(whole, [len(word) for _, _, word in places]), strict=True):
            read = torch.tensor(word, device=device)
            scores[r][w] = part.log_softmax(dim=-1).gather(1, read[:, None]).sum()
            if greedy is not None:
                greedy[r, w] = (part.argmax(dim=-1) == read).all()
        return torch.stack([torch.stack([torch.as_tensor(s, device=device) for s in row]) for row in scores]), greedy

    def tokens(self, length: int, words: Sequence[Tokens]) -> int:
        """See ``Whole``."""
        return sum(length + len(word) for word in words)

    def growing(self) -> Growing:
        """See ``Whole``."""
        return _Repeated(self)

    def layer_states(self, embedded: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See ``Whole``."""
        out = self._model(**arguments(self._model, embedded[None]), use_cache=False, output_hidden_states=True)
        # Gemma 3n has several states of a token, of which the first becomes the next layer's attention.
        return tuple(state[0] if state.dim() == 3 else state[0, 0] for state in out.hidden_states)

    def attention(self, embedded: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See ``Whole``."""
        out = self._model(**arguments(self._model, embedded[None]), use_cache=False, output_attentions=True)
        layers = tuple(getattr(out, "attentions", None) or ())
        return () if any(layer is None for layer in layers) else tuple(layer[0, :, -1] for layer in layers)

    def _look_up(self, ids: Tokens, device: torch.device) -> torch.Tensor:
        return read(self._model, torch.tensor(ids, device=device))

    def _run(self, rows: Sequence[torch.Tensor], last: Sequence[int]) -> Sequence[torch.Tensor]:
        """Logits float32 ``[last, V]`` at so many last places of each embedded sequence ``[T, H]``. Where the angles of
        positions depend on the longest sequence of a pass, long ones run alone."""
        short = [place for place, row in enumerate(rows) if len(row) <= self._longest_steady]
        groups = [short] if short else []
        groups += [[place] for place in range(len(rows)) if place not in short]
        found = dict[int, torch.Tensor]()
        for group in groups:
            parts = self._run_together([rows[place] for place in group], [last[place] for place in group])
            found |= dict(zip(group, parts, strict=True))
        return [found[place] for place in range(len(rows))]

    def _run_together(self, rows: Sequence[torch.Tensor], last: Sequence[int]) -> Sequence[torch.Tensor]:
        """The same in one pass of the model's own forward. Its head leaves out what lies before them in all rows: over
        a large vocabulary it would cost more than all layers."""
        embedded, mask = padded(rows)
        first = min(len(row) - count for row, count in zip(rows, last, strict=True))
        can_leave_out = "logits_to_keep" in inspect.signature(self._model.forward).parameters
        options = {"logits_to_keep": embedded.shape[1] - first} if can_leave_out else {}
        logits = self._model(
            **arguments(self._model, embedded), attention_mask=mask, use_cache=False, **options
        ).logits.float()
        left_out = embedded.shape[1] - logits.shape[1]
        ends = [len(row) - left_out for row in rows]
        return [line[end - count : end] for line, end, count in zip(logits, ends, last, strict=True)]


class _Repeated:
    """Rows that run again from the start for each token: slow, and right for every architecture."""

    def __init__(self, whole: WholeSequences) -> None:
        self._whole = whole
        self._rows: list[torch.Tensor] = []

    def add(self, rows: Sequence[torch.Tensor], ahead: Ahead = None) -> None:
        """See ``Growing``."""
        assert ahead is None, "it has no decoder of its own"
        self._rows += rows

    def logits(self) -> torch.Tensor:
        """See ``Growing``."""
        return torch.cat(list(self._whole._run(self._rows, [1] * len(self._rows))))

    def append(self, tokens: Sequence[int]) -> None:
        """See ``Growing``."""
        device = self._rows[0].device
        new = [self._whole._look_up((token,), device) for token in tokens]
        self._rows = [torch.cat(pair) for pair in zip(self._rows, new, strict=True)]

    def keep(self, places: Sequence[int]) -> None:
        """See ``Growing``."""
        self._rows = [self._rows[i] for i in places]


def padded(rows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Embedded rows ``[T_i, H]`` beside each other ``[B, T, H]``, padded on the right, and their mask, int64
    ``[B, T]``."""
    embedded = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=embedded.device)
    return embedded, (torch.arange(embedded.shape[1], device=embedded.device) < lengths[:, None]).long()
