"""The engine: one thread owns the base model, and requests of any soft prompts, and of the bare base model, share its
forward passes.

Between two passes rows join and leave, labels are scored, rows whose client has gone are dropped. Tasks that wait take
turns, so that none is held up by another's crowd. A soft prompt's prefix is computed once and kept while there is room.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from softprompt.attention import PrefixKV
from softprompt.batch import Tokens
from softprompt.decoding import JOIN_TOKENS, Continuation, Decoder, TokenLogprob, Writer
from softprompt.errors import ConfigError
from softprompt.frozen import KV_TOKENS, FrozenLM, Request, Sampling
from softprompt.template import SOFT

log = logging.getLogger("softprompt.engine")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the engine may use.

    Attributes:
        rows: the most continuations in one forward pass.
        tokens: the most tokens that the rows have keys and values for, each row counted as long as the longest may
            become; also the most tokens of one request. It bounds memory, and what padding costs.
        waiting: the most requests that wait; more are refused.
        seconds: what a request may take, waiting included.
        prefix_bytes: the most bytes of prefixes to keep.
    """

    rows: int = 32
    tokens: int = KV_TOKENS
    waiting: int = 256
    seconds: float = 120.0
    prefix_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        for name in ("rows", "tokens", "waiting"):
            if getattr(self, name) < 1:
                raise ConfigError(f"The server's limit on {name} must be at least 1, not {getattr(self, name)}.")
        if not self.seconds > 0:
            raise ConfigError(f"The server's limit on seconds must be above 0, not {self.seconds}.")
        if self.prefix_bytes < 0:
            raise ConfigError(f"The server's limit on prefix_bytes must be 0 or more, not {self.prefix_bytes}.")

    def window(self, lm: FrozenLM) -> int:
        """The most tokens of one request, input and output."""
        return min(lm.window, self.tokens)


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """One sequence to continue, or one whose words are to be scored.

    Attributes:
        request: the sequence; its ``prompt`` is not looked at.
        task: whose turn it takes while it waits: the name of the soft prompt, or of the base model.
        prompt_tokens: tokens of the sequence, virtual ones included.
        vectors: the soft prompt; None for the bare base model.
        content: what tells these vectors from all others.
        sampling: how to continue; None: score the request's words.
        lead: left out of the continuation if it begins with it.
        top_logprobs: how many of the most probable tokens to tell beside each token; None: tell nothing.
        stream: tell each piece as it comes, not only the whole at the end.
        answer: of a job whose words are scored, what its ``Scores`` are told as; None: as they are.
    """

    request: Request
    task: str
    prompt_tokens: int
    vectors: torch.Tensor | None = None
    content: str = ""
    sampling: Sampling | None = None
    lead: str = ""
    top_logprobs: int | None = None
    stream: bool = False
    answer: Callable[[Scores], Piece] | None = None


@dataclass(frozen=True)
class Piece:
    """What a continuation has grown by.

    Attributes:
        text: text that will not change any more.
        tokens: its tokens, if they were asked for.
        count: tokens generated since the beginning, the end-of-sequence token included.
        finish: ``stop`` or ``length`` with the last piece, empty before.
    """

    text: str
    tokens: tuple[TokenLogprob, ...]
    count: int
    finish: str


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of a request's words, natural logarithm, summed over a word's tokens."""

    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Failure:
    """Why a job will not be done.

    Attributes:
        reason: ``timeout``, ``error``, or ``upstream``: the server that was to compute it failed.
        message: one sentence.
    """

    reason: str
    message: str


Event = Piece | Scores | Failure


CLOSED = "The server is shutting down; send the request to another one."


class Refused(Exception):
    """No job is taken now.

    Attributes:
        code: what a program can tell the reason by.
    """

    code = ""


class Busy(Refused):
    """As many requests wait as may."""

    code = "overloaded"


class Closed(Refused):
    """The engine takes no more requests."""

    code = "shutting_down"


class NoUpstream(Refused):
    """None of the servers that are to compute answers."""

    code = "no_upstream"


@dataclass(eq=False)
class Ticket:
    """A job in the engine; times are of ``time.monotonic``.

    Attributes:
        job: the job.
        notify: called by the engine's thread with each event.
        on_cancel: called by whoever cancels it.
        submitted: when it came.
        started: when it left the line.
        first: when its first token, or its scores, were there.
        cached: tokens of its prefix that had been computed before.
    """

    job: Job
    notify: Callable[[Event], None]
    on_cancel: Callable[[], None] = lambda: None
    submitted: float = field(default_factory=time.monotonic)
    started: float | None = None
    first: float | None = None
    cached: int = 0
    cancelled: bool = False

    def cancel(self) -> None:
        """Nobody waits for it any more: no event will be told, and its row is free from the next pass on."""
        self.cancelled = True
        self.on_cancel()

    def tell(self, event: Event) -> None:
        """Hands an event over, if anybody waits for it."""
        if self.cancelled:
            return
        if isinstance(event, Scores) and self.job.answer is not None:
            event = self.job.answer(event)
        try:
            self.notify(event)
        except Exception as error:  # who asked has gone, which must not harm the others
            log.error("an answer could not be handed over", exc_info=error)
            self.cancel()

    @property
    def room(self) -> int:
        """The most tokens that its row will have."""
        return self.job.prompt_tokens + (0 if self.job.sampling is None else self.job.sampling.max_new_tokens)


def tickets_of(jobs: Sequence[Job], notify: Callable[[int, Event], None]) -> list[Ticket]:
    """A ticket for each job, whose events go to ``notify`` with the job's index."""

    def teller(index: int) -> Callable[[Event], None]:
        return lambda event: notify(index, event)

    return [Ticket(job, teller(index)) for index, job in enumerate(jobs)]


def check_room(waiting: int, more: int, limits: Limits) -> None:
    """Raises ``Busy`` if ``more`` requests cannot wait beside those that do."""
    if waiting + more > limits.waiting:
        raise Busy(f"{waiting} requests wait already, of {limits.waiting} that may; try again in a moment.")


def too_long(limits: Limits) -> Failure:
    """The time of a request is over."""
    sentence = f"The request took longer than {limits.seconds:g} s; ask for less, or try again later."
    return Failure("timeout", sentence)


class FairQueue:
    """Tickets that wait, in a line for each task. The tasks take turns."""

    def __init__(self) -> None:
        self._lines: OrderedDict[str, deque[Ticket]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def push(self, ticket: Ticket) -> None:
        """Puts a ticket at the end of its task's line; a task that had none is last to have its turn."""
        self._lines.setdefault(ticket.job.task, deque()).append(ticket)

    def first(self) -> Ticket | None:
        """The ticket whose turn it is."""
        return next(iter(self._lines.values()))[0] if self._lines else None

    def pop(self) -> Ticket:
        """Takes out the ticket whose turn it is; its task is the last to have another turn."""
        task, line = next(iter(self._lines.items()))
        ticket = line.popleft()
        self._lines.move_to_end(task)
        if not line:
            del self._lines[task]
        return ticket

    def sift(self, keep: Callable[[Ticket], bool]) -> None:
        """Leaves only the tickets that are to be kept."""
        for task, line in list(self._lines.items()):
            kept = deque(ticket for ticket in line if keep(ticket))
            if kept:
                self._lines[task] = kept
            else:
                del self._lines[task]


class CacheCounts(Protocol):
    """What a cache of prefixes tells of itself: bytes held, and tokens asked for and found."""

    nbytes: int
    queries: int
    hits: int


class Backend(Protocol):
    """What answers the jobs of a server: an ``Engine`` here, or servers elsewhere (``upstream.Upstreams``)."""

    limits: Limits

    @property
    def prefixes(self) -> CacheCounts: ...
    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    def check(self) -> None: ...
    def submit(self, jobs: Sequence[Job], notify: Callable[[int, Event], None]) -> list[Ticket]: ...
    def close(self) -> None: ...


class PrefixCache:
    """Prefixes by content: the least recently used go first when their bytes exceed a cap.

    Attributes:
        nbytes: bytes held.
        queries: tokens of all prefixes that were asked for.
        hits: tokens of those that were there.
    """

    def __init__(self, lm: FrozenLM, capacity: int) -> None:
        self._lm = lm
        self._capacity = capacity
        self._held: OrderedDict[tuple[str, Tokens], PrefixKV] = OrderedDict()
        self.nbytes = 0
        self.queries = 0
        self.hits = 0

    def __len__(self) -> int:
        return len(self._held)

    def holds(self, ids: Tokens, content: str) -> bool:
        """Whether a prefix is there."""
        return self._key(ids, content) in self._held

    def get(self, ids: Tokens, vectors: torch.Tensor | None, content: str) -> PrefixKV:
        """The keys and values of ``ids``, computed if they are not there.

        Args:
            ids: token ids, ``SOFT`` where ``vectors`` stand.
            vectors: the soft prompt, or None.
            content: what tells ``vectors`` from all others.
        """
        key = self._key(ids, content)
        found = self._held.get(key)
        if found is not None:
            self._held.move_to_end(key)
            self.hits += found.width
        else:
            found = _apart(self._lm.prefix_kv(ids, vectors))
            self._keep(key, found)
        self.queries += found.width
        return found

    def _keep(self, key: tuple[str, Tokens], prefix: PrefixKV) -> None:
        if prefix.nbytes > self._capacity:
            return
        self._held[key] = prefix
        self.nbytes += prefix.nbytes
        while self.nbytes > self._capacity:
            _, oldest = self._held.popitem(last=False)
            self.nbytes -= oldest.nbytes

    def _key(self, ids: Tokens, content: str) -> tuple[str, Tokens]:
        return (content if SOFT in ids else "", ids)


def _apart(prefix: PrefixKV) -> PrefixKV:
    """A copy that holds no more memory than its own numbers: some models hand out views of larger tensors."""
    keys, values = (
        tuple(tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors)
        for tensors in (prefix.keys, prefix.values)
    )
    return PrefixKV(keys, values, prefix.lengths)


class Engine:
    """Takes jobs from any thread and tells their events from its own.

    Attributes:
        lm: the base model, which nobody else may use meanwhile.
        limits: what it may use.
        prefixes: the prefixes that were computed.
    """

    def __init__(self, lm: FrozenLM, limits: Limits | None = None) -> None:
        self.lm = lm
        self.limits = limits or Limits()
        self.prefixes = PrefixCache(lm, self.limits.prefix_bytes)
        self._changed = threading.Condition()
        self._to_write = FairQueue()
        self._to_score = FairQueue()
        self._decoder = Decoder(lm)
        self._rows: dict[Continuation, Ticket] = {}
        self._scoring = 0
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """How many jobs are being worked on."""
        return len(self._rows) + self._scoring

    @property
    def waiting(self) -> int:
        """How many jobs wait."""
        return len(self._to_write) + len(self._to_score)

    @property
    def alive(self) -> bool:
        """Whether the engine takes jobs."""
        return self._thread.is_alive() and not self._closing

    def check(self) -> None:
        """Raises ``Closed`` if the engine takes no jobs any more."""
        if not self.alive:
            raise Closed(CLOSED)

    def submit(self, jobs: Sequence[Job], notify: Callable[[int, Event], None]) -> list[Ticket]:
        """Takes all of the jobs, or none.

        Args:
            jobs: none longer than ``Limits.window``.
            notify: called by the engine's thread with a job's index and its event; the last event of a job is a
                ``Piece`` with ``finish``, ``Scores`` or a ``Failure``.

        Raises:
            Busy: too many would wait.
            Closed: the engine is closing.
        """
        tickets = tickets_of(jobs, notify)
        with self._changed:
            self.check()
            check_room(self.waiting, len(jobs), self.limits)
            for ticket in tickets:
                (self._to_score if ticket.job.sampling is None else self._to_write).push(ticket)
            self._changed.notify()
        return tickets

    def close(self) -> None:
        """Refuses new jobs, and returns when all that were taken are done."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    # --- the thread --------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        with torch.no_grad():
            while self._has_work():
                with self._changed:
                    self._sweep()
                    scoring, joining = self._pick_scoring(), self._pick_joining()
                self._score(scoring)
                self._join(joining)
                self._step()

    def _has_work(self) -> bool:
        """Waits for a job; False when there will be none any more."""
        with self._changed:
            while not (self.waiting or self._rows or self._closing):
                self._changed.wait()
            return bool(self.waiting or self._rows)

    def _sweep(self) -> None:
        """Drops jobs that nobody waits for, and those whose time is over."""
        latest = time.monotonic() - self.limits.seconds

        def keep(ticket: Ticket) -> bool:
            if not ticket.cancelled and ticket.submitted < latest:
                ticket.tell(too_long(self.limits))
                ticket.cancel()
            return not ticket.cancelled

        for queue in (self._to_write, self._to_score):
            queue.sift(keep)
        gone = [row for row, ticket in self._rows.items() if not keep(ticket)]
        if gone:
            self._decoder.drop(gone)
            for row in gone:
                del self._rows[row]

    def _pick_scoring(self) -> list[Ticket]:
        picked: list[Ticket] = []
        tokens = 0
        while (ticket := self._to_score.first()) is not None:
            tokens += sum(map(len, ticket.job.request.words)) + len(ticket.job.request.ids)
            if picked and tokens > 2 * self.lm.tokens_at_once:
                break
            picked.append(self._to_score.pop())
        self._scoring = len(picked)
        return picked

    def _pick_joining(self) -> list[Ticket]:
        picked: list[Ticket] = []
        tokens = 0
        widest = max((ticket.room for ticket in self._rows.values()), default=0)
        while (ticket := self._to_write.first()) is not None:
            rows, widest = len(self._rows) + len(picked) + 1, max(widest, ticket.room)
            if rows > self.limits.rows or (rows > 1 and rows * widest > self.limits.tokens):
                break  # nobody overtakes it, or it might wait forever
            request = ticket.job.request
            known = self.prefixes.holds(request.ids[: request.shared], ticket.job.content)
            tokens += len(request.ids) - request.shared if known else ticket.job.prompt_tokens
            if picked and tokens > JOIN_TOKENS:
                break
            picked.append(self._to_write.pop())
        return picked

    def _score(self, tickets: Sequence[Ticket]) -> None:
        if not tickets:
            return
        prompts = {ticket.job.content: ticket.job.vectors for ticket in tickets if ticket.job.vectors is not None}
        places = {content: place for place, content in enumerate(prompts)}
        contents = {id(vectors): content for content, vectors in prompts.items()}

        def prefix_of(ids: Tokens, vectors: torch.Tensor | None) -> PrefixKV:
            return self.prefixes.get(ids, vectors, contents.get(id(vectors), ""))

        requests = [replace(ticket.job.request, prompt=places.get(ticket.job.content)) for ticket in tickets]
        now = time.monotonic()
        for ticket in tickets:
            ticket.started = now
            shared = ticket.job.request.ids[: ticket.job.request.shared]
            if self.lm.shares_prefix and self.prefixes.holds(shared, ticket.job.content):
                ticket.cached = ticket.job.prompt_tokens - len(ticket.job.request.ids) + len(shared)
        try:
            scores = self.lm.score(requests, list(prompts.values()), prefix_of=prefix_of)
        except Exception as error:
            self._fail(tickets, error)
        else:
            now = time.monotonic()
            for ticket, row in zip(tickets, scores.tolist(), strict=True):
                ticket.first = now
                found = tuple(row[: len(ticket.job.request.words)])
                sound = max(found) > -math.inf and not any(map(math.isnan, found))
                ticket.tell(Scores(found) if sound else _no_numbers(self.lm))
        finally:
            self._scoring = 0

    def _join(self, tickets: Sequence[Ticket]) -> None:
        rows = []
        for ticket in tickets:
            job = ticket.job
            ticket.started = time.monotonic()
            assert job.sampling is not None

            def prefix_of(ids: Tokens, vectors: torch.Tensor | None, ticket: Ticket = ticket) -> PrefixKV:
                hits = self.prefixes.hits
                found = self.prefixes.get(ids, vectors, ticket.job.content)
                ticket.cached = self.prefixes.hits - hits
                return found

            writer = Writer(self.lm, job.sampling, job.sampling.seed, lead=job.lead, top_logprobs=job.top_logprobs)
            try:
                row = self.lm.continuation(job.request, job.vectors, writer, prefix_of)
            except Exception as error:
                self._fail([ticket], error)
            else:
                self._rows[row] = ticket
                rows.append(row)
        self._decoder.join(rows)

    def _step(self) -> None:
        try:
            for row in self._decoder.step():
                self._report(row, self._rows[row])
        except Exception as error:
            self._fail(list(self._rows.values()), error)
            self._rows.clear()
            self._decoder = Decoder(self.lm)

    def _report(self, row: Continuation, ticket: Ticket) -> None:
        writer = row.writer
        ticket.first = ticket.first or time.monotonic()
        if writer.done:
            del self._rows[row]
        if writer.finish == "error":
            ticket.tell(_no_numbers(self.lm))
        elif writer.done or ticket.job.stream:
            text, tokens = writer.release()
            if text or writer.done:
                ticket.tell(Piece(text, tokens, writer.count, writer.finish))

    def _fail(self, tickets: Sequence[Ticket], error: Exception) -> None:
        log.error("a forward pass failed", exc_info=error)
        for ticket in tickets:
            ticket.tell(Failure("error", "The server failed to compute the answer; its log says why."))


def _no_numbers(lm: FrozenLM) -> Failure:
    return Failure("error", f"The base model's scores are not numbers in {lm.dtype}; serve it with --dtype fp32.")
