"""Continuing requests token by token: rows of any lengths and prefixes share each forward pass, and join and leave
between passes.

A row's keys and values, those of its shared prefix included, lie in a slot of its own (``RowKV``): the prefix is copied
there once, when the row joins, and each pass appends to the slots in place. Nothing is stacked or gathered from pass to
pass, so rows of 32 soft prompts cost what rows of one cost.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from softprompt.attention import PrefixKV
from softprompt.batch import Tokens, micro_batches

if TYPE_CHECKING:
    from softprompt.frozen import FrozenLM, Sampling

CHUNK = 512
"""The most tokens of one row's input in one pass: a long input neither holds up the other rows for long nor needs
attention scores of its whole length squared."""

JOIN_TOKENS = 2048
"""Tokens, padding included, of the inputs that join in one pass."""

READ_EVERY = 2
"""Passes over the rows that have begun for one over input that joined. On a CPU each takes most of its time for the
weights alone, so that input of several rows is read together rather than each as it comes, and waits a pass for it."""

EVEN_TOKENS = 4
"""Tokens that are read in a pass are padded to a multiple of this many a row. In 16 bits, attention on a CPU rounds one
to three queries otherwise than more, and an answer should not depend on how long the other rows are."""

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


@dataclass(frozen=True)
class Generated:
    """A continuation.

    Attributes:
        text: decoded, without special tokens, cut before a stop string.
        ids: the generated tokens, the end-of-sequence token not included.
        finish: ``stop`` (end-of-sequence or a stop string) or ``length``.
    """

    text: str
    ids: Tokens
    finish: str


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


class RowKV:
    """Keys and values of rows of any lengths in every layer; stands where transformers expects its cache.

    Token ``t`` of row ``i``, counted from the start of its prefix, is column ``t`` of slot ``i``. What lies behind a
    row's last token is stale and no token looks at it; it is finite, since its weight of 0 must not meet a NaN.

    Attributes:
        lengths: tokens of each row.
        width: columns of a slot. A pass looks at all of them: matrix products of a part would copy it first.
    """

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.width = 0
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = []  # [R, H_kv, width, D] each
        self._places: Any = None  # index of the current pass's tokens in them

    def add(self, starts: Sequence[PrefixKV], ahead: int) -> None:
        """Rows that begin with the tokens of ``starts`` (one row each), behind those that are there.

        Args:
            starts: copied.
            ahead: tokens of each row in the next pass.
        """
        rows, longest = len(self.lengths) + len(starts), max(*self.lengths, *(start.width for start in starts), 0)
        if not self._layers:
            self._layers = [
                (key.new_empty(0, key.shape[1], 0, key.shape[3]), value.new_empty(0, value.shape[1], 0, value.shape[3]))
                for key, value in zip(starts[0].keys, starts[0].values, strict=True)
            ]
        if rows > len(self._layers[0][0]) or longest + ahead > self.width:
            self._lay_out(rows, longest + ahead)
        for start in starts:
            slot, length = len(self.lengths), start.width
            for (keys, values), key, value in zip(self._layers, start.keys, start.values, strict=True):
                keys[slot, :, :length], keys[slot, :, length:] = key[0], 0
                values[slot, :, :length], values[slot, :, length:] = value[0], 0
            self.lengths.append(length)

    def row(self, index: int) -> PrefixKV:
        """A row so far; a view."""
        length = self.lengths[index]
        return PrefixKV(
            keys=tuple(keys[index : index + 1, :, :length] for keys, _ in self._layers),
            values=tuple(values[index : index + 1, :, :length] for _, values in self._layers),
            lengths=(length,),
        )

    def remove(self, index: int) -> None:
        """Takes a row out; the last row takes its slot."""
        last = self.lengths.pop()
        if index < len(self.lengths):
            self.lengths[index] = last
            for layer in self._layers:
                for tensor in layer:
                    tensor[index] = tensor[len(self.lengths)]

    def extend(self, counts: Sequence[int], tokens: int) -> torch.Tensor:
        """Makes place for a pass over ``tokens`` tokens a row, of which row ``i`` keeps the first ``counts[i]``.

        Returns:
            int64 ``[B, tokens]`` on the CPU, the column of each token.
        """
        needed = max(self.lengths) + tokens
        if needed > self.width or 2 * _rounded(needed, 32) <= self.width:
            self._lay_out(len(counts), needed)
        columns = torch.tensor(self.lengths)[:, None] + torch.arange(tokens)
        device = self._layers[0][0].device
        self._places = (torch.arange(len(counts), device=device)[:, None], slice(None), columns.to(device))
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        return columns

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Transformers' call in each layer: takes a pass's ``[B, H_kv, T, D]``, returns ``[B, H_kv, width, D]``. A row
        alone may come twice."""
        rows = len(self.lengths)
        keys, values = self._layers[layer]
        keys[self._places] = key[:rows].transpose(1, 2)
        values[self._places] = value[:rows].transpose(1, 2)
        return keys[:rows].expand(len(key), -1, -1, -1), values[:rows].expand(len(key), -1, -1, -1)

    def get_seq_length(self, layer: int = 0) -> int:
        """Transformers asks it where positions are not given; ours are."""
        return self.width

    def _lay_out(self, rows: int, columns: int) -> None:
        """New slots, up to twice ``rows`` but few more, and a few columns wider, so that it is seldom done."""
        rows, columns = min(_rounded(rows, 8), 2 * rows), _rounded(columns, 32)
        kept = min(columns, self.width)

        def anew(tensor: torch.Tensor) -> torch.Tensor:
            new = tensor.new_empty((rows, tensor.shape[1], columns, tensor.shape[3]))
            old = tensor[: len(self.lengths)]
            new[: len(old), :, :kept], new[: len(old), :, kept:] = old[:, :, :kept], 0
            return new

        self._layers = [(anew(keys), anew(values)) for keys, values in self._layers]
        self.width = columns


def give_back_freed() -> None:
    """Gives freed memory back to the operating system. Layouts of long rows leave holes in what glibc keeps, in which
    the next ones, a few columns wider, have no room."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # of glibc only
        ctypes.CDLL(None).malloc_trim(0)


def _rounded(number: int, unit: int) -> int:
    return -(-number // unit) * unit


@dataclass(eq=False)
class Continuation:
    """One row to be continued.

    Attributes:
        writer: what becomes of it.
        embedded: ``[T, H]``, the tokens that have not been run yet, at least one; without a prefix, the whole sequence.
        prefix: keys and values of the tokens before; None for a model that runs whole sequences.
        token: the last token that was picked.
    """

    writer: Writer
    embedded: torch.Tensor
    prefix: PrefixKV | None
    token: int = -1


class Decoder:
    """Rows that are being continued."""

    def __init__(self, lm: FrozenLM) -> None:
        self._lm = lm
        self._running: list[Continuation] = []
        self._kv = RowKV()  # row i of it is self._running[i]
        self._new: list[Continuation] = []
        self._joining: deque[tuple[list[Continuation], RowKV]] = deque()
        self._unread = 0  # passes since input was read
        self._whole: list[Continuation] = []

    def __len__(self) -> int:
        return len(self._running) + len(self._whole) + len(self._new) + sum(len(rows) for rows, _ in self._joining)

    def join(self, rows: Sequence[Continuation]) -> None:
        """Takes rows in."""
        self._whole += [row for row in rows if row.prefix is None]
        self._new += [row for row in rows if row.prefix is not None]

    def step(self) -> list[Continuation]:
        """Runs the last token of every row that has begun; every ``READ_EVERY`` times, or if there is no such row, also
        a chunk of input of the rows that joined first.

        Returns:
            The rows that picked a token; those of them that are done have left.
        """
        found = self._decode()
        self._unread += 1
        if not found or self._unread >= READ_EVERY:
            found, self._unread = [*found, *self._read()], 0
        return [*found, *self._decode_whole()]

    def drop(self, rows: Collection[Continuation]) -> None:
        """Takes rows out before they are done."""
        gone = {id(row) for row in rows}
        for index in reversed(range(len(self._running))):
            if id(self._running[index]) in gone:
                _remove(self._running, self._kv, index)
        for members, kv in list(self._joining):
            for index in reversed(range(len(members))):
                if id(members[index]) in gone:
                    _remove(members, kv, index)
        self._joining = deque((members, kv) for members, kv in self._joining if members)
        self._new = [row for row in self._new if id(row) not in gone]
        self._whole = [row for row in self._whole if id(row) not in gone]

    def _group(self) -> None:
        """Puts the rows that are new in line: short inputs together, a long one alone, to be read in chunks."""
        for several in (True, False):
            fitting = [row for row in self._new if (len(row.embedded) <= CHUNK) == several]
            lengths = [len(row.embedded) for row in fitting]
            for group in micro_batches(lengths, JOIN_TOKENS if several else 1):
                self._begin([fitting[i] for i in group])
        self._new = []

    def _begin(self, rows: list[Continuation]) -> None:
        prefixes = [row.prefix for row in rows if row.prefix is not None]
        kv = RowKV()
        kv.add(prefixes, _rounded(min(CHUNK, max(len(row.embedded) for row in rows)), EVEN_TOKENS))
        for row in rows:
            row.prefix = None  # its copy is in use now
        self._joining.append((rows, kv))

    def _decode(self) -> list[Continuation]:
        rows = list(self._running)
        if not rows:
            return []
        tokens = torch.tensor([[row.token] for row in rows], device=self._lm.device)
        embedded = self._lm.look_up(tokens)
        self._take(rows, self._lm.next_logits(self._kv, embedded, [1] * len(rows)))
        for index in reversed(range(len(rows))):
            if rows[index].writer.done:
                _remove(self._running, self._kv, index)
        return rows

    def _read(self) -> list[Continuation]:
        """Runs a chunk of the rows that are first in line; rows whose input has been read begin."""
        self._group()
        if not self._joining:
            return []
        rows, kv = self._joining.popleft()
        chunks = [row.embedded[:CHUNK] for row in rows]
        padded = nn.utils.rnn.pad_sequence(chunks, batch_first=True)
        padded = nn.functional.pad(padded, (0, 0, 0, -padded.shape[1] % EVEN_TOKENS))
        logits = self._lm.next_logits(kv, padded, [len(chunk) for chunk in chunks])
        for row in rows:
            row.embedded = row.embedded[CHUNK:]
        if len(rows[0].embedded):  # a long one, alone
            self._joining.append((rows, kv))
            return []
        self._take(rows, logits)
        going = list(rows)
        for index in reversed(range(len(rows))):
            if rows[index].writer.done:
                _remove(going, kv, index)
        if going and self._running:
            self._kv.add([kv.row(index) for index in range(len(going))], 1)
        elif going:
            self._kv = kv
        self._running += going
        return rows

    def _decode_whole(self) -> list[Continuation]:
        """Runs whole sequences again for each token: slow, and right for every architecture."""
        rows = self._whole
        if not rows:
            return []
        logits = self._lm.run_whole([row.embedded for row in rows], [1] * len(rows))
        self._take(rows, [of_row[0] for of_row in logits])
        self._whole = [row for row in rows if not row.writer.done]
        for row in self._whole:
            row.embedded = torch.cat([row.embedded, self._lm.embed([row.token], None)])
        return rows

    def _take(self, rows: Sequence[Continuation], logits: torch.Tensor | Sequence[torch.Tensor]) -> None:
        for row, of_row in zip(rows, logits, strict=True):
            row.token = row.writer.take(of_row)


def _remove(rows: list[Continuation], kv: RowKV, index: int) -> None:
    """Takes a row out; the last takes its place."""
    kv.remove(index)
    last = rows.pop()
    if index < len(rows):
        rows[index] = last
