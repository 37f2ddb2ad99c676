"""From the engine's events to responses: whole, as a stream, and given up when the client goes away."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from softprompt.serving import openai_api as api
from softprompt.serving.jobs import Backend, Event, Failure, Job, Piece, Refused, Scores
from softprompt.serving.openai_api import ApiError
from softprompt.serving.telemetry import Metrics

_STATUS = {"timeout": 504, "no_upstream": 503, "upstream": 502, "error": 500}
_Result = TypeVar("_Result")


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Answers:
    """Jobs in the engine, as the event loop sees them."""

    def __init__(self, engine: Backend, metrics: Metrics, jobs: Sequence[Job]) -> None:
        """Submits the jobs.

        Raises:
            ApiError: 503, the engine takes none now; 400, it never takes so many.
        """
        computed, places = _computed(jobs)
        if len(computed) > engine.limits.waiting:
            raise ApiError(
                400,
                f"Expected at most {engine.limits.waiting} answers a request, found {len(computed)}; send more "
                f"requests.",
            )
        self._jobs = jobs
        self._places = places
        self._metrics = metrics
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def notify(number: int, event: Event) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, (number, event))

        try:
            self._tickets = engine.submit(computed, notify)
        except Refused as error:
            raise ApiError(503, str(error), code=error.code) from error
        self._open = set(range(len(jobs)))
        self._counts = [0] * len(jobs)

    async def events(self) -> AsyncIterator[tuple[int, Piece | Scores]]:
        """Each job's index and event, until all are done.

        Raises:
            ApiError: 504, the time is over; 503 or 502, a server behind this one is not there or failed; 500, this
                one did.
        """
        scored: dict[int, Scores] = {}
        while self._open:
            number, event = await self._events.get()
            if isinstance(event, Scores):
                scored[number] = event
            for index in sorted(self._open):
                places = self._places[index]
                if number not in places:
                    continue
                if isinstance(event, Failure):
                    self._end(index, event.reason)
                    raise ApiError(_STATUS[event.reason], event.message, code=event.reason)
                if isinstance(event, Piece) or all(place in scored for place in places):
                    yield index, self._answer(index, event, [scored[place] for place in places if place in scored])

    def _answer(self, index: int, event: Piece | Scores, scored: Sequence[Scores]) -> Piece | Scores:
        """What an event is to the job: with the scores of all that answer together."""
        answer = self._jobs[index].answer
        if isinstance(event, Scores):
            event = Scores(scored[0].logprobs, tuple(one.logprobs for one in scored[1:]))
            event = event if answer is None else answer(event)
        if isinstance(event, Piece):
            self._counts[index] = event.count
        if isinstance(event, Scores) or event.finish:
            self._end(index, event.finish if isinstance(event, Piece) else "scored")
        return event

    def cancel(self) -> None:
        """Gives up what is not done."""
        for index in sorted(self._open):
            for place in self._places[index]:
                self._tickets[place].cancel()
            self._end(index, "abort")

    def latency_ms(self, index: int) -> float:
        """From a job's arrival to its first token or scores, in milliseconds."""
        tickets = [self._tickets[place] for place in self._places[index]]
        return round(1000 * max((each.first or time.monotonic()) - each.submitted for each in tickets), 3)

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return sum(self._counts)

    def usage(self, choices: int) -> dict[str, Any]:
        """Tokens of all jobs; those read are counted once for the ``choices`` jobs of one text."""
        texts = [self._tickets[place] for places in self._places[::choices] for place in places]
        prompt_tokens = sum(ticket.job.prompt_tokens for ticket in texts)
        return api.usage(prompt_tokens, self.generated, sum(ticket.cached for ticket in texts))

    def _end(self, index: int, reason: str) -> None:
        self._open.remove(index)
        for number, place in enumerate(self._places[index]):
            self._metrics.finished(self._tickets[place], 0 if number else self._counts[index], reason)


def _computed(jobs: Sequence[Job]) -> tuple[list[Job], list[tuple[int, ...]]]:
    """The jobs to compute, and where among them each job's own and its ``others`` are: what is answered by the same
    scores, as the choices of a request for a label are, is computed once."""
    computed: list[Job] = []
    places: list[tuple[int, ...]] = []
    known: dict[tuple[int, int], int] = {}
    for job in jobs:
        own = []
        for part in (job, *job.others):
            place = len(computed)
            if part.sampling is None:
                place = known.setdefault((id(part.request), id(part.vectors)), place)
            if place == len(computed):
                computed.append(part)
            own.append(place)
        places.append(tuple(own))
    return computed, places


async def chunks(
    answers: Answers, head: dict[str, Any], form: api.Form, noted: bool, choices: int, with_usage: bool
) -> AsyncIterator[str]:
    """A stream's server-sent events."""
    letters: dict[int, int] = {}
    more: dict[str, Any] = {"usage": None} if with_usage else {}
    try:
        async for index, piece in answers.events():
            assert isinstance(piece, Piece)
            tokens = piece.tokens if noted else None
            choice = form.delta(index, piece.text, tokens, piece.finish or None, letters.get(index, -1))
            letters[index] = letters.get(index, 0) + sum(len(token.text) for token in piece.tokens)
            yield _sent({**head, "choices": [choice], **more})
        if with_usage:
            yield _sent({**head, "choices": [], "usage": answers.usage(choices)})
    except ApiError as error:
        yield _sent(error.body)
    yield "data: [DONE]\n\n"


def _sent(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False, separators=(',', ':'))}\n\n"


class EventStream(StreamingResponse):
    """Server-sent events; when it ends, for whatever reason, so do the jobs behind it."""

    def __init__(self, chunks: AsyncIterator[str], answers: Answers) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(chunks, media_type="text/event-stream", headers=headers)
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it while the client is there, also while there is nothing to send."""
        try:
            await while_connected(receive, self.stream_response(send))
        finally:
            self._answers.cancel()


async def while_connected(receive: Receive, work: Coroutine[Any, Any, _Result]) -> _Result:
    """The result of ``work``, which is given up when the client goes away.

    Raises:
        ClientGone: it did.
    """

    async def leave() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(leave())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
