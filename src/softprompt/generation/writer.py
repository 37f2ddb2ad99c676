"""One continuation in the making: tokens picked, ends known, text made."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
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
        sampling: how to choose and when to stop.
        top_logprobs: how many of the most probable tokens to note beside each token; None: note nothing.
        generator: draws.
    """

    def __init__(
        self,
        tokenizer: Any,
        ends: Collection[int],
        sampling: Sampling,
        seed: int,
        *,
        lead: str = "",
        top_logprobs: int | None = None,
    ) -> None:
        """Begins a continuation.

        Args:
            tokenizer: makes text of tokens.
            ends: the end-of-sequence tokens.
            sampling: how to choose and when to stop; its own ``seed`` is not looked at.
            seed: seeds the draws.
            lead: left out if the text begins with it.
            top_logprobs: how many of the most probable tokens to note beside each token; None: note nothing.
        """
        self.ids: list[int] = []
        self.count = 0
        self.text = ""
        self.finish = ""
        self.sampling = sampling
        self.top_logprobs = top_logprobs
        self.generator = torch.Generator().manual_seed(seed)
        self._lead = lead
        self._stops = tuple(stop for stop in sampling.stop if stop)
        self.ends = frozenset(ends)
        self._tokenizer = tokenizer
        self._characters = _Characters(tokenizer)
        self._released = 0
        self._noted: list[TokenLogprob] = []

    @property
    def done(self) -> bool:
        return bool(self.finish)

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
        if not self.done and len(self.ids) >= self.sampling.max_new_tokens:
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

    def note(self, token: int, logprob: float, top: Sequence[tuple[int, float]]) -> TokenLogprob:
        """A token and others by id as what is told of them, each with its log-probability."""
        others = tuple((self._tokenizer.decode([id]), value) for id, value in top)
        return TokenLogprob(self._tokenizer.decode([token]), logprob, others)

    def _grow(self, piece: str) -> None:
        if piece and self._lead:
            piece, self._lead = piece.removeprefix(self._lead), ""
        if self.sampling.skip_blank and not self.text:
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


def take(writers: Sequence[Writer], logits: torch.Tensor) -> list[int]:
    """Chooses the next token of each continuation and appends it there; where its scores are not numbers, the
    continuation ends. All rows are worked on at once, and read by the host once; once more where tokens are drawn, and
    where log-probabilities are noted.

    Args:
        writers: ``B`` continuations.
        logits: float32 ``[B, V]``, of each one's next token.

    Returns:
        The tokens.
    """
    best, likeliest = logits.max(dim=-1)
    tokens: list[int]
    tokens, failed = torch.stack([likeliest, best.isnan().long()]).tolist()
    drawing = [i for i, writer in enumerate(writers) if writer.sampling.temperature > 0 and not failed[i]]
    if drawing:
        ways = [(writers[i].sampling, writers[i].generator) for i in drawing]
        for i, token in zip(drawing, _draw(_rows(logits, drawing), ways), strict=True):
            tokens[i] = token
    noting = [
        i
        for i, writer in enumerate(writers)
        if writer.top_logprobs is not None and not failed[i] and tokens[i] not in writer.ends
    ]
    notes = dict(zip(noting, _notes(logits, noting, writers, tokens), strict=True))
    for i, writer in enumerate(writers):
        if failed[i]:
            writer.finish = "error"
        else:
            writer.put(tokens[i], notes.get(i))
    return tokens


def _rows(logits: torch.Tensor, chosen: Sequence[int]) -> torch.Tensor:
    return logits if len(chosen) == len(logits) else logits[torch.tensor(chosen, device=logits.device)]


def _notes(
    logits: torch.Tensor, noting: Sequence[int], writers: Sequence[Writer], tokens: Sequence[int]
) -> list[TokenLogprob]:
    """What is noted beside the tokens of the rows ``noting``."""
    if not noting:
        return []
    tops = [writers[i].top_logprobs or 0 for i in noting]
    logprobs = _rows(logits, noting).log_softmax(dim=-1)
    values, ids = logprobs.topk(min(max(tops), logprobs.shape[1]))
    own = logprobs.gather(1, torch.tensor([[tokens[i]] for i in noting], device=logits.device))
    numbers = torch.cat([own, values, ids.to(own.dtype)], dim=1).tolist()  # ids are exact in float32: below 2^24
    width, notes = values.shape[1], []
    for i, row, top in zip(noting, numbers, tops, strict=True):
        others = zip(map(int, row[1 + width :]), row[1 : 1 + width], strict=True)
        notes.append(writers[i].note(tokens[i], row[0], list(others)[:top]))
    return notes


def draw(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """An index of float32 ``[V]`` logits, drawn by temperature (above 0) and nucleus."""
    return _draw(logits[None], [(sampling, generator)])[0]


def _draw(logits: torch.Tensor, ways: Sequence[tuple[Sampling, torch.Generator]]) -> list[int]:
    """An index of each row of float32 ``[B, V]`` logits, each drawn in its own way. Draws are the CPU's, whatever the
    device, and of a nucleus only the most probable tokens come there."""
    temperatures = [max(sampling.temperature, LEAST_TEMPERATURE) for sampling, _ in ways]
    probabilities = (logits / torch.tensor(temperatures, device=logits.device)[:, None]).softmax(dim=-1)
    drawn: dict[int, int] = {}
    nucleus = [i for i, (sampling, _) in enumerate(ways) if sampling.top_p < 1]
    if nucleus:
        values, ids = _rows(probabilities, nucleus).topk(min(NUCLEUS, logits.shape[1]))
        for i, kept, order in zip(nucleus, values.cpu(), ids.cpu(), strict=True):
            sampling, generator = ways[i]
            if float(kept.sum()) < sampling.top_p:
                kept, order = probabilities[i].cpu().sort(descending=True)
            kept[kept.cumsum(dim=0) - kept >= sampling.top_p] = 0
            drawn[i] = int(order[torch.multinomial(kept, 1, generator=generator)])
    whole = [i for i in range(len(ways)) if i not in drawn]
    for i, row in zip(whole, _rows(probabilities, whole).cpu() if whole else (), strict=True):
        drawn[i] = int(torch.multinomial(row, 1, generator=ways[i][1]))
    return [drawn[i] for i in range(len(ways))]


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
