"""What the server and whatever answers its requests have in common: jobs, events, limits, turns."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from softprompt.generation.writer import TokenLogprob, Writer
from softprompt.model.embedder import Embedder
from softprompt.model.request import Request, Sampling
from softprompt.serving.limits import Limits as Limits
from softprompt.text.template import Template

log = logging.getLogger("softprompt.engine")


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
        template: what the whole sequence was made of, where it has a soft prompt; None where that is not known, or the
            end of a text was cut.
        fields: the texts in the template.
        answer: of a job whose words are scored, what its ``Scores`` are to a client; None: as they are.
        others: jobs whose words are scored, too, where several soft prompts answer together: their scores come with
            this job's.
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
    template: Template | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    answer: Callable[[Scores], Piece] | None = None
    others: tuple[Job, ...] = ()


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
    """Log-probabilities of a request's words, natural logarithm, summed over a word's tokens.

    Attributes:
        logprobs: one a word.
        others: the same of ``Job.others``.
    """

    logprobs: tuple[float, ...]
    others: tuple[tuple[float, ...], ...] = ()


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


def writer_of(lm: Embedder, job: Job) -> Writer:
    """What writes the continuation of a job that is not to score words."""
    assert job.sampling is not None
    return Writer(
        lm.tokenizer, lm.end_tokens, job.sampling, job.sampling.seed, lead=job.lead, top_logprobs=job.top_logprobs
    )


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
