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
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from softprompt.generation.decoder import JOIN_TOKENS, Continuation, Decoder, continuation
from softprompt.model.frozen import FrozenLM
from softprompt.model.state.prefix import PrefixState
from softprompt.serving.jobs import (
    CLOSED,
    Closed,
    Event,
    Failure,
    FairQueue,
    Job,
    Limits,
    Piece,
    Scores,
    Ticket,
    check_room,
    tickets_of,
    too_long,
    writer_of,
)
from softprompt.text.tokens import Tokens

log = logging.getLogger("softprompt.engine")


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
        self.prefixes = lm.kept_prefixes(capacity=self.limits.prefix_bytes)
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
        with torch.no_grad(), self.lm.packed.used():
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

        def prefix_of(ids: Tokens, vectors: torch.Tensor | None) -> PrefixState:
            return self.prefixes(ids, vectors, contents.get(id(vectors), ""))

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

            def prefix_of(ids: Tokens, vectors: torch.Tensor | None, ticket: Ticket = ticket) -> PrefixState:
                hits = self.prefixes.hits
                found = self.prefixes(ids, vectors, ticket.job.content)
                ticket.cached = self.prefixes.hits - hits
                return found

            writer = writer_of(self.lm, job)
            try:
                row = continuation(self.lm, job.request, job.vectors, writer, prefix_of)
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
            self._decoder.close()
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
