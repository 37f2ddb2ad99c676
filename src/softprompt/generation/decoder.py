"""Continuing requests token by token: rows of any lengths and prefixes share each forward pass, and join and leave
between passes.

A row's keys and values, those of its shared prefix included, lie in a slot of its own (``RowKV``): the prefix is copied
there once, when the row joins, and each pass appends to the slots in place. Nothing is stacked or gathered from pass to
pass, so rows of 32 soft prompts cost what rows of one cost. On a GPU, rows that have begun move to slots at fixed
addresses (``FixedKV``), and a pass over their last tokens is one captured graph.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn

from softprompt.errors import ConfigError
from softprompt.generation.writer import Writer, take
from softprompt.model.batch import micro_batches
from softprompt.model.frozen import FrozenLM
from softprompt.model.prefixes import PrefixOf
from softprompt.model.request import Request, Sampling, prompt_of
from softprompt.model.state.prefix import PrefixState
from softprompt.model.state.recurrent import Slots
from softprompt.model.state.slots import give_back_freed, rounded
from softprompt.text.tokens import Tokens

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


@dataclass(eq=False)
class Continuation:
    """One row to be continued.

    Attributes:
        writer: what becomes of it.
        embedded: ``[T, H]``, the tokens that have not been run yet, at least one; without a prefix, the whole sequence.
        prefix: what the tokens before left behind; None for a model that runs whole sequences.
        whole: makes what is read of the whole sequence, ``[T, H]``, before anything is written.
        token: the last token that was picked.
        ahead: ``[N, H]``, what stands before the input of an encoder–decoder's decoder; None where there is none.
    """

    writer: Writer
    embedded: torch.Tensor
    prefix: PrefixState | None
    whole: Callable[[], torch.Tensor]
    token: int = -1
    ahead: torch.Tensor | None = None


class Decoder:
    """Rows that are being continued."""

    def __init__(self, lm: FrozenLM) -> None:
        self._lm = lm
        self._running: list[Continuation] = []
        self._kv = lm.slots(fixed=True)  # row i of it is self._running[i]
        self._new: list[Continuation] = []
        self._joining: deque[tuple[list[Continuation], Slots]] = deque()
        self._unread = 0  # passes since input was read
        self._whole: list[Continuation] = []
        self._growing = lm.whole.growing()  # row i of it is self._whole[i]

    def __len__(self) -> int:
        return len(self._running) + len(self._whole) + len(self._new) + sum(len(rows) for rows, _ in self._joining)

    def join(self, rows: Sequence[Continuation]) -> None:
        """Takes rows in."""
        whole = [row for row in rows if row.prefix is None]
        self._whole += whole
        some = any(row.ahead is not None for row in whole)
        ahead = [row.embedded[:0] if row.ahead is None else row.ahead for row in whole] if some else None
        self._growing.add([row.embedded for row in whole], ahead)
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
        self._keep_whole([i for i, row in enumerate(self._whole) if id(row) not in gone])

    def close(self) -> None:
        """Gives its slots back, after an error, say; it is used no more."""
        self._lm.fixed_rows.take_back(self._kv)

    def _group(self) -> None:
        """Puts the rows that are new in line: short inputs together, a long one alone, to be read in chunks."""
        for several in (True, False):
            fitting = [row for row in self._new if (len(row.embedded) <= CHUNK) == several]
            lengths = [len(row.embedded) for row in fitting]
            for group in micro_batches(lengths, JOIN_TOKENS if several else 1):
                for rows in self._alike([fitting[i] for i in group]):
                    self._begin(rows)
        self._new = []

    def _alike(self, rows: list[Continuation]) -> list[list[Continuation]]:
        """The rows that can be read together: where layers are recurrent, those of one length, since padding would go
        into their state."""
        if not self._lm.recurrent:
            return [rows]
        lengths = dict.fromkeys(len(row.embedded) for row in rows)
        return [[row for row in rows if len(row.embedded) == length] for length in lengths]

    def _begin(self, rows: list[Continuation]) -> None:
        prefixes = [row.prefix for row in rows if row.prefix is not None]
        kv = self._lm.slots()
        kv.add(prefixes, rounded(min(CHUNK, max(len(row.embedded) for row in rows)), EVEN_TOKENS))
        for row in rows:
            row.prefix = None  # its copy is in use now
        self._joining.append((rows, kv))

    def _decode(self) -> list[Continuation]:
        self._leave_shared()
        rows = list(self._running)
        if not rows:
            return []
        self._take(rows, self._lm.last_logits(self._kv, [row.token for row in rows]))
        for index in reversed(range(len(rows))):
            if rows[index].writer.done:
                _remove(self._running, self._kv, index)
        return rows

    def _leave_shared(self) -> None:
        """Rows that become too long for what they began with go on as whole sequences."""
        for index in reversed(range(len(self._running))):
            if self._kv.lengths[index] >= self._lm.longest_steady:
                row = self._running[index]
                written = torch.tensor(row.writer.ids, dtype=torch.long, device=self._lm.device)
                self._whole.append(row)
                self._growing.add([torch.cat([row.whole(), self._lm.read(written)])])
                _remove(self._running, self._kv, index)

    def _read(self) -> list[Continuation]:
        """Runs a chunk of the rows that are first in line; rows whose input has been read begin."""
        self._group()
        if not self._joining:
            return []
        rows, kv = self._joining.popleft()
        chunks = [row.embedded[:CHUNK] for row in rows]
        padded = nn.utils.rnn.pad_sequence(chunks, batch_first=True)
        if not self._lm.recurrent:
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
        if going:
            self._kv = self._kv.join(kv)
        self._running += going
        return rows

    def _decode_whole(self) -> list[Continuation]:
        """Runs the rows of a model that shares no prefix, each as the model does by itself."""
        rows = self._whole
        if not rows:
            return []
        self._take(rows, self._growing.logits())
        self._growing.append([row.token for row in rows])
        self._keep_whole([i for i, row in enumerate(rows) if not row.writer.done])
        return rows

    def _keep_whole(self, places: Sequence[int]) -> None:
        if len(places) < len(self._whole):
            self._whole = [self._whole[i] for i in places]
            self._growing.keep(places)

    def _take(self, rows: Sequence[Continuation], logits: torch.Tensor) -> None:
        for row, token in zip(rows, take([row.writer for row in rows], logits), strict=True):
            row.token = token


def _remove(rows: list[Continuation], kv: Slots, index: int) -> None:
    """Takes a row out; the last takes its place."""
    kv.remove(index)
    last = rows.pop()
    if index < len(rows):
        rows[index] = last


KV_TOKENS = 32_768
"""Tokens that rows being continued may have keys and values for, each row counted as long as the longest may become."""


@torch.no_grad()
def generate(
    lm: FrozenLM,
    requests: Sequence[Request],
    soft_prompts: Sequence[torch.Tensor] = (),
    sampling: Sampling | None = None,
    *,
    batch_size: int = 32,
    prefix_of: PrefixOf | None = None,
) -> list[Generated]:
    """Continues each request; every request may use another soft prompt.

    Args:
        requests: what to continue; their ``words`` are ignored.
        soft_prompts: as for ``score``.
        sampling: greedy, 64 tokens, by default.
        batch_size: the most requests in one forward pass; fewer where they are so long that their keys and values
            would take more than ``KV_TOKENS``.
        prefix_of: where prefixes come from; by default each is computed once.

    Returns:
        One result a request, in order.
    """
    sampling, world = sampling or Sampling(), lm.world
    if not world.divides_scoring:
        return _generated(lm, requests, range(len(requests)), soft_prompts, sampling, batch_size, prefix_of)
    dealt = world.deal([len(request.ids) for request in requests])
    own = dealt[world.rank]
    mine = [requests[i] for i in own]
    written = world.each(lambda: _generated(lm, mine, own, soft_prompts, sampling, batch_size, prefix_of))
    found = dict(zip(chain(*dealt), chain(*written), strict=True))
    return [found[i] for i in range(len(requests))]


def _generated(
    lm: FrozenLM,
    requests: Sequence[Request],
    numbers: Sequence[int],
    soft_prompts: Sequence[torch.Tensor],
    sampling: Sampling,
    batch_size: int,
    prefix_of: PrefixOf | None,
) -> list[Generated]:
    """The same in this process; ``numbers`` are the requests' places among all, which their seeds go by."""
    prefix_of = prefix_of or lm.kept_prefixes()
    ends = lm.end_tokens
    writers = [Writer(lm.tokenizer, ends, sampling, sampling.seed + i) for i in numbers]
    prompts = [prompt_of(request, soft_prompts) for request in requests]
    rooms = [
        len(request.ids) + (0 if vectors is None else lm.trained.length(vectors.shape)) + sampling.max_new_tokens
        for request, vectors in zip(requests, prompts, strict=True)
    ]
    waiting = sorted(range(len(requests)), key=rooms.__getitem__)
    running: list[int] = []
    decoder = Decoder(lm)
    with lm.eager(), lm.packed.used():
        while waiting or len(decoder):
            running = [i for i in running if not writers[i].done]
            longest = max((rooms[i] for i in (*running, *waiting[-1:])), default=1)
            rows = min(batch_size, max(1, KV_TOKENS // longest))
            joining = [waiting.pop() for _ in range(min(len(waiting), rows - len(running)))]
            running += joining
            decoder.join([continuation(lm, requests[i], prompts[i], writers[i], prefix_of) for i in joining])
            decoder.step()
    give_back_freed()
    if any(writer.finish == "error" for writer in writers):
        raise ConfigError(f"The base model's scores are not numbers in {lm.dtype}; load it with dtype fp32.")
    return [Generated(writer.text, tuple(writer.ids), writer.finish) for writer in writers]


def continuation(
    lm: FrozenLM,
    request: Request,
    vectors: torch.Tensor | None,
    writer: Writer,
    prefix_of: PrefixOf,
) -> Continuation:
    """A request as a row for a ``Decoder``.

    Args:
        request: what to continue; its ``words`` and ``prompt`` are not looked at.
        vectors: the request's soft prompt, or None.
        writer: writes the continuation.
        prefix_of: where its prefix comes from.
    """

    def whole() -> torch.Tensor:
        return lm.rows(request.ids, vectors)

    length = 0 if vectors is None else lm.trained.length(vectors.shape)
    if not lm.shares_prefix or len(request.ids) + length > lm.longest_steady:
        embedded, ahead = lm.inputs(request, vectors)
        return Continuation(writer, embedded, None, whole, ahead=ahead if len(ahead) else None)
    shared = min(request.shared, len(request.ids) - 1)
    prefix = prefix_of(request.ids[:shared], vectors)
    return Continuation(writer, lm.rows(request.ids[shared:], vectors), prefix, whole)
