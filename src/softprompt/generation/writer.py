"""One continuation in the making: tokens picked, ends known, text made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from softprompt.model.frozen import FrozenLM
    from softprompt.model.request import Sampling

NUCLEUS = 1024
"""How many of the most probable tokens nucleus sampling looks at before it sorts the whole vocabulary."""


LEAST_TEMPERATURE = 1e-6
"""Temperatures below count as this one: logits divided by less overflow in float32, and nothing could be drawn."""


@dataclass(frozen=True)
class TokenLogprob:
    """A generated token and what else could have stood there.

    Attributes:
        text: the token, decoded alone; special tokens as they are spelled.
        logprob: natural logarithm of its probability, before temperature and nucleus.
        top: the most probable tokens with theirs, the best first.
    """

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...]


class Writer:
    """One continuation in the making: picks tokens, knows when to stop and which text can no longer change.

    Attributes:
        ids: the tokens so far, the end-of-sequence token not included.
        count: how many tokens were picked, the end-of-sequence token included.
        text: the text so far, whole characters only, cut before a stop string.
        finish: empty, or ``stop`` (end-of-sequence or a stop string), ``length``, or ``error`` (the model's scores
            are not numbers).
        ends: the end-of-sequence tokens.
    """

    def __init__(
        self, lm: FrozenLM, sampling: Sampling, seed: int, *, lead: str = "", top_logprobs: int | None = None
    ) -> None:
        """Begins a continuation.

        Args:
            lm: the base model.
            sampling: how to choose and when to stop; its own ``seed`` is not looked at.
            seed: seeds the draws.
            lead: left out if the text begins with it.
            top_logprobs: how many of the most probable tokens to note beside each token; None: note nothing.
        """
        self.ids: list[int] = []
        self.count = 0
        self.text = ""
        self.finish = ""
        self._sampling = sampling
        self._top_logprobs = top_logprobs
        self._lead = lead
        self._stops = tuple(stop for stop in sampling.stop if stop)
        self.ends = _end_tokens(lm)
        self._tokenizer = lm.tokenizer
        self._characters = _Characters(lm.tokenizer)
        self._generator = torch.Generator().manual_seed(seed)
        self._released = 0
        self._noted: list[TokenLogprob] = []

    @property
    def done(self) -> bool:
        return bool(self.finish)

    def take(self, logits: torch.Tensor) -> int:
        """Chooses the next token from float32 ``[V]`` logits."""
        best, likeliest = logits.max(dim=-1)
        if best.isnan():
            self.finish = "error"
            return int(likeliest)
        token = int(likeliest) if self._sampling.temperature == 0 else draw(logits, self._sampling, self._generator)
        noted = self._top_logprobs is not None and token not in self.ends
        self.put(token, self._note(logits, token, self._top_logprobs or 0) if noted else None)
        return token

    def put(self, token: int, note: TokenLogprob | None) -> None:
        """Appends a token that was chosen.

        Args:
            token: its id.
            note: what to note beside it; not looked at if it ends the text.
        """
        self.count += 1
        if token in self.ends:
            self._end("stop")
            return
        self.ids.append(token)
        if note is not None:
            self._noted.append(note)
        self._grow(self._characters.push(token))
        if not self.done and len(self.ids) >= self._sampling.max_new_tokens:
            self._end("length")

    def release(self) -> tuple[str, tuple[TokenLogprob, ...]]:
        """The text since the last call that no stop string can take back any more, and the tokens noted since then."""
        end = len(self.text)
        if not self.done:
            most = min(max(map(len, self._stops), default=1) - 1, end - self._released)
            held = (n for n in range(most, 0, -1) if any(stop.startswith(self.text[end - n :]) for stop in self._stops))
            end -= next(held, 0)
            if end == self._released:
                return "", ()
        text, self._released = self.text[self._released : end], end
        noted, self._noted = tuple(self._noted), []
        return text, noted

    def _note(self, logits: torch.Tensor, token: int, top: int) -> TokenLogprob:
        logprobs = logits.log_softmax(dim=-1)
        values, ids = logprobs.topk(min(top, len(logprobs)))
        return self.note(token, float(logprobs[token]), list(zip(ids.tolist(), values.tolist(), strict=True)))

    def note(self, token: int, logprob: float, top: Sequence[tuple[int, float]]) -> TokenLogprob:
        """A token and others by id as what is told of them, each with its log-probability."""
        others = tuple((self._tokenizer.decode([id]), value) for id, value in top)
        return TokenLogprob(self._tokenizer.decode([token]), logprob, others)

    def _grow(self, piece: str) -> None:
        if piece and self._lead:
            piece, self._lead = piece.removeprefix(self._lead), ""
        if self._sampling.skip_blank and not self.text:
            piece = piece.lstrip()
        before = len(self.text)
        self.text += piece
        found = (self.text.find(stop, max(0, before - len(stop) + 1)) for stop in self._stops)
        cuts = [at for at in found if at >= 0]
        if cuts:
            self.text, self.finish = self.text[: min(cuts)], "stop"

    def _end(self, finish: str) -> None:
        self._grow(self._characters.flush())
        self.finish = self.finish or finish


def draw(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """An index of float32 ``[V]`` logits, drawn by temperature (above 0) and nucleus."""
    probabilities = (logits.cpu() / max(sampling.temperature, LEAST_TEMPERATURE)).softmax(dim=-1)
    if sampling.top_p == 1:
        return int(torch.multinomial(probabilities, 1, generator=generator))
    kept, order = probabilities.topk(min(NUCLEUS, len(probabilities)))
    if float(kept.sum()) < sampling.top_p:
        kept, order = probabilities.sort(descending=True)
    kept[kept.cumsum(dim=0) - kept >= sampling.top_p] = 0
    return int(order[torch.multinomial(kept, 1, generator=generator)])


class _Characters:
    """Tokens → text as it grows. A character whose bytes are spread over several tokens comes out whole.

    Only the last few tokens are decoded again: those since the last whole character, and those of the piece before,
    which tell the tokenizer that no text starts here.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = 0
        self._before = ""

    def push(self, token: int) -> str:
        """The text that one more token completes; may be empty."""
        self._ids.append(token)
        text = self._decode()
        if len(text) <= len(self._before) or text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        return self._advance(text)

    def flush(self) -> str:
        """What is left at the end, incomplete characters as replacement characters."""
        return self._advance(self._decode())

    def _advance(self, text: str) -> str:
        piece = text[len(self._before) :]
        self._ids, self._context = self._ids[self._context :], len(self._ids) - self._context
        self._before = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return piece

    def _decode(self) -> str:
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return text


def _end_tokens(lm: FrozenLM) -> set[int]:
    configured = getattr(getattr(lm.model, "generation_config", None), "eos_token_id", None)
    ends = configured if isinstance(configured, list) else [configured]
    return {token for token in (*ends, lm.tokenizer.eos_token_id) if token is not None}
