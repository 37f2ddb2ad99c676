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
        shared = _shared(jobs)
        if len(shared) > engine.limits.waiting:
            raise ApiError(
                400,
                f"Expected at most {engine.limits.waiting} answers a request, found {len(shared)}; send more requests.",
            )
        self._jobs = jobs
        self._metrics = metrics
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def notify(number: int, event: Event) -> None:
            for index in shared[number]:
                loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        try:
            tickets = engine.submit([jobs[same[0]] for same in shared], notify)
        except Refused as error:
            raise ApiError(503, str(error), code=error.code) from error
        self._tickets = [ticket for ticket, same in zip(tickets, shared, strict=True) for _ in same]
        self._open = dict(enumerate(self._tickets))
        self._counts = [0] * len(jobs)

    async def events(self) -> AsyncIterator[tuple[int, Piece | Scores]]:
        """Each job's index and event, until all are done.

        Raises:
            ApiError: 504, the time is over; 503 or 502, a server behind this one is not there or failed; 500, this
                one did.
        """
        while self._open:
            index, event = await self._events.get()
            answer = self._jobs[index].answer
            if isinstance(event, Scores) and answer is not None:
                event = answer(event)
            if isinstance(event, Failure):
                self._end(index, event.reason)
                raise ApiError(_STATUS[event.reason], event.message, code=event.reason)
            if isinstance(event, Piece):
                self._counts[index] = event.count
            if isinstance(event, Scores) or event.finish:
                self._end(index, event.finish if isinstance(event, Piece) else "scored")
            yield index, event

    def cancel(self) -> None:
        """Gives up what is not done."""
        for index, ticket in list(self._open.items()):
            ticket.cancel()
            self._end(index, "abort")

    def latency_ms(self, index: int) -> float:
        """From a job's arrival to its first token or scores, in milliseconds."""
        ticket = self._tickets[index]
        return round(1000 * ((ticket.first or time.monotonic()) - ticket.submitted), 3)

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return sum(self._counts)

    def usage(self, choices: int) -> dict[str, Any]:
        """Tokens of all jobs; those read are counted once for the ``choices`` jobs of one text."""
        texts = self._tickets[::choices]
        prompt_tokens = sum(ticket.job.prompt_tokens for ticket in texts)
        return api.usage(prompt_tokens, self.generated, sum(ticket.cached for ticket in texts))

    def _end(self, index: int, reason: str) -> None:
        self._metrics.finished(self._open.pop(index), self._counts[index], reason)


def _shared(jobs: Sequence[Job]) -> list[list[int]]:
    """The jobs' indices, those together that stand beside each other and are answered by the same scores: the choices
    of a request for a label."""
    found: list[list[int]] = []
    for index, job in enumerate(jobs):
        before = jobs[index - 1]
        if index and job.sampling is None and job.request is before.request and job.vectors is before.vectors:
            found[-1].append(index)
        else:
            found.append([index])
    return found


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
