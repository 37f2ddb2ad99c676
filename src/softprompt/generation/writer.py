"""One continuation in the making: tokens picked, ends known, text made."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from softprompt.model.fast.graphs import sent

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
    continuation ends. All rows are worked on at once where the logits are, and read by the host once; another time
    where ``NUCLEUS`` tokens are too few for a draw.

    Args:
        writers: ``B`` continuations.
        logits: float32 ``[B, V]``, of each one's next token.

    Returns:
        The tokens.
    """
    drawing = [i for i, writer in enumerate(writers) if writer.sampling.temperature > 0]
    noting = [i for i, writer in enumerate(writers) if writer.top_logprobs is not None]
    best, chosen = logits.max(dim=-1)
    draws = None
    if drawing:
        ways = [(writers[i].sampling, writers[i].generator) for i in drawing]
        draws = _Draws(_rows(logits, drawing), ways)
        chosen = chosen.index_copy(0, sent(torch.tensor(drawing), logits.device), draws.chosen)
    # Numbers of tokens are exact in float32: below 2^24.
    told = [chosen.float(), best.isnan().float()]
    if draws is not None:
        told.append(draws.short.float())
    if noting:
        told.append(_noted(logits, chosen, noting, max(writers[i].top_logprobs or 0 for i in noting)).flatten())
    numbers: list[float] = torch.cat(told).tolist()
    rows = len(writers)
    tokens, failed, rest = list(map(int, numbers[:rows])), numbers[rows : 2 * rows], numbers[2 * rows :]
    again = []
    if draws is not None:
        again = [n for n, (i, short) in enumerate(zip(drawing, rest, strict=False)) if short and not failed[i]]
        rest = rest[len(drawing) :]
        for n in again:
            tokens[drawing[n]] = draws.from_all(n)
    if noting and again:
        found = sent(torch.tensor(tokens), logits.device)
        rest = _noted(logits, found, noting, max(writers[i].top_logprobs or 0 for i in noting)).flatten().tolist()
    each = len(rest) // max(1, len(noting))
    notes = {i: rest[n * each : (n + 1) * each] for n, i in enumerate(noting)}
    for i, writer in enumerate(writers):
        if failed[i]:
            writer.finish = "error"
        else:
            writer.put(tokens[i], _note(writer, tokens[i], notes[i]) if i in notes else None)
    return tokens


def _rows(tensor: torch.Tensor, chosen: Sequence[int]) -> torch.Tensor:
    return tensor if len(chosen) == len(tensor) else tensor[sent(torch.tensor(chosen), tensor.device)]


def _noted(logits: torch.Tensor, chosen: torch.Tensor, noting: Sequence[int], most: int) -> torch.Tensor:
    """What is noted beside the tokens of the rows ``noting``, float32 ``[N, 1 + 2K]``: the log-probability of the token
    ``chosen``, then those of the ``K`` most probable ones, then which these are."""
    logprobs = _rows(logits, noting).log_softmax(dim=-1)
    values, ids = logprobs.topk(min(most, logprobs.shape[1]))
    own = logprobs.gather(1, _rows(chosen, noting)[:, None])
    return torch.cat([own, values, ids.to(own.dtype)], dim=1)


def _note(writer: Writer, token: int, numbers: Sequence[float]) -> TokenLogprob | None:
    """A row of ``_noted`` in words; None for a token that ends the text."""
    if token in writer.ends:
        return None
    width = (len(numbers) - 1) // 2
    others = zip(map(int, numbers[1 + width :]), numbers[1 : 1 + width], strict=True)
    return writer.note(token, numbers[0], list(others)[: writer.top_logprobs])


def draw(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """An index of float32 ``[V]`` logits, drawn by temperature (above 0) and nucleus."""
    draws = _Draws(logits[None], [(sampling, generator)])
    return draws.from_all(0) if bool(draws.short[0]) else int(draws.chosen[0])


class _Draws:
    """An index of each row of float32 ``[B, V]`` logits, each drawn in its own way, all at once.

    A draw is the largest of the probabilities divided by exponential noise, as ``torch.multinomial`` draws. The noise
    is the CPU's, whatever the device: a row draws the same everywhere, and in any company.

    Attributes:
        chosen: int64 ``[B]``, the indices.
        short: bool ``[B]``, where the ``NUCLEUS`` most probable ones are too few; ``from_all`` has the index there.
    """

    def __init__(self, logits: torch.Tensor, ways: Sequence[tuple[Sampling, torch.Generator]]) -> None:
        device = logits.device
        settings = [(max(sampling.temperature, LEAST_TEMPERATURE), sampling.top_p) for sampling, _ in ways]
        temperatures, limits = sent(torch.tensor(settings), device).unbind(dim=1)
        self._ways = ways
        self._probabilities = (logits / temperatures[:, None]).softmax(dim=-1)
        self._before: dict[int, torch.Tensor] = {}  # the generator's state
        nucleus = [i for i, (sampling, _) in enumerate(ways) if sampling.top_p < 1]
        whole = [i for i, (sampling, _) in enumerate(ways) if sampling.top_p >= 1]
        chosen, short = list[torch.Tensor](), list[torch.Tensor]()
        if nucleus:
            self._before = {i: ways[i][1].get_state() for i in nucleus}
            values, ids = _rows(self._probabilities, nucleus).topk(min(NUCLEUS, logits.shape[1]))
            limits = _rows(limits, nucleus)
            kept = values.masked_fill(values.cumsum(dim=1) - values >= limits[:, None], 0)
            best = (kept / self._noise(nucleus, kept)).argmax(dim=1, keepdim=True)
            chosen.append(ids.gather(1, best)[:, 0])
            short.append(values.sum(dim=1) < limits)
        if whole:
            kept = _rows(self._probabilities, whole)
            chosen.append((kept / self._noise(whole, kept)).argmax(dim=1))
            short.append(torch.zeros(len(whole), dtype=torch.bool, device=device))
        order = [*nucleus, *whole]
        places = sorted(range(len(order)), key=order.__getitem__)
        self.chosen, self.short = torch.cat(chosen), torch.cat(short)
        if nucleus and whole:
            index = sent(torch.tensor(places), device)
            self.chosen, self.short = self.chosen[index], self.short[index]

    def _noise(self, rows: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        """Exponential noise for some of the rows, ``[N, M]`` as ``like``; made while the device computes."""
        noise = [torch.empty(like.shape[1]).exponential_(generator=self._ways[i][1]) for i in rows]
        return sent(torch.stack(noise), like.device)

    def from_all(self, row: int) -> int:
        """The index that a row draws from all of its tokens in order."""
        sampling, generator = self._ways[row]
        if row in self._before:
            generator.set_state(self._before[row])
        kept, order = self._probabilities[row].cpu().sort(descending=True)
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
