"""Jobs for vLLM servers elsewhere: what stands in the place of the engine where another one computes.

Each job goes to one of the servers, that which its soft prompt always goes to while it is there and has room: its
prefix lies in that server's cache. What is waited for, in which turn and for how long is as with the engine; and text
is made here, from the token ids that come back, so that it is the engine's text.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from softprompt.data.example import Example
from softprompt.errors import ConfigError, TemplateError
from softprompt.model.batch import build_trie
from softprompt.model.embedder import Embedder
from softprompt.serving.jobs import (
    CLOSED,
    Closed,
    Event,
    Failure,
    FairQueue,
    Job,
    Limits,
    NoUpstream,
    Piece,
    Scores,
    Ticket,
    check_room,
    tickets_of,
    too_long,
    writer_of,
)
from softprompt.serving.vllm import Chat, Unreachable, UpstreamError, Vllm
from softprompt.text.spliced import Splicer
from softprompt.text.tokens import SOFT

if TYPE_CHECKING:
    from softprompt.serving.served import Model

log = logging.getLogger("softprompt.upstream")

LOOK_SECONDS = 2.0
"""How often each server is asked whether it is there."""

_NONE = "No upstream server answers; try again in a moment."


@dataclass
class Counts:
    """Tokens that were sent, and those of them that the servers say they had computed before.

    Attributes:
        nbytes: 0; the prefixes lie elsewhere.
        queries: tokens of all sequences.
        hits: tokens of those that were cached.
    """

    nbytes: int = 0
    queries: int = 0
    hits: int = 0


class Upstreams:
    """Takes jobs from any thread, as ``Engine`` does, and has them done by vLLM servers.

    Attributes:
        limits: what it may use; ``rows`` is the most jobs at one server at once.
        prefixes: what the servers' caches are known to have done.
        window: the most tokens of one request.
    """

    def __init__(
        self, embedder: Embedder, urls: Sequence[str], limits: Limits | None = None, *, api_key: str | None = None
    ) -> None:
        """Looks at every server once; one that is not there is asked again every ``LOOK_SECONDS``.

        Args:
            embedder: of the base model that they serve.
            urls: where they are.
            limits: what it may use.
            api_key: what they want as Bearer token, if anything.

        Raises:
            ConfigError: one of them cannot be used as it is.
        """
        self.limits = limits or Limits()
        self.prefixes = Counts()
        self._embedder = embedder
        self._splicer = Splicer(embedder.tokenizer)  # of the thread alone
        self._lock = threading.Lock()  # of the line and of closing
        self._line = FairQueue()
        self._turns: dict[Ticket, asyncio.Future[None]] = {}
        self._running: set[Ticket] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False
        self._watching: asyncio.Task[None] | None = None
        self._loop = asyncio.new_event_loop()
        self._servers = [Vllm(url, embedder, api_key) for url in dict.fromkeys(urls)]
        self._thread = threading.Thread(target=self._loop.run_forever, name="upstreams", daemon=True)
        self._thread.start()
        try:
            self._call(self._open())
        except ConfigError:
            self.close()
            raise
        for server in self._servers:
            if not server.alive:
                log.warning(f"the upstream {server.url} does not answer yet; it is asked every {LOOK_SECONDS:g} s")
        windows = [server.window for server in self._servers if server.window is not None]
        self.window = min([self.limits.window(embedder), *windows])

    @property
    def running(self) -> int:
        """How many jobs are at the servers."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """How many jobs wait."""
        with self._lock:
            return len(self._line)

    @property
    def alive(self) -> bool:
        """Whether jobs are taken."""
        return not self._closing and any(server.alive for server in self._servers)

    def check(self) -> None:
        """Sees whether jobs are taken.

        Raises:
            Closed: it is closing.
            NoUpstream: no server is there.
        """
        if self._closing:
            raise Closed(CLOSED)
        if not self.alive:
            raise NoUpstream(_NONE)

    def submit(self, jobs: Sequence[Job], notify: Callable[[int, Event], None]) -> list[Ticket]:
        """Takes all of the jobs, or none; see ``Engine.submit``.

        Raises:
            Busy: too many would wait.
            Closed: it is closing.
            NoUpstream: no server is there.
        """
        tickets = tickets_of(jobs, notify)
        with self._lock:
            self.check()
            check_room(len(self._line), len(jobs), self.limits)
            for ticket in tickets:
                self._line.push(ticket)
            self._loop.call_soon_threadsafe(self._begin, tickets)
        return tickets

    def close(self) -> None:
        """Refuses new jobs, and returns when all that were taken are done."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # --- the thread --------------------------------------------------------------------------------------------------

    async def _open(self) -> None:
        async def one(server: Vllm) -> None:
            with contextlib.suppress(Unreachable):
                await server.look()

        await asyncio.gather(*map(one, self._servers))
        self._watching = self._loop.create_task(self._watch())

    async def _watch(self) -> None:
        """Asks the servers again and again, and tells of changes."""

        async def one(server: Vllm) -> None:
            known = server.alive
            said = ""
            while True:
                await asyncio.sleep(LOOK_SECONDS)
                try:
                    await server.look()
                    said = ""
                except (Unreachable, ConfigError) as error:
                    if str(error) != said:
                        log.warning(said := str(error))
                except Exception as error:  # whatever it is, the next look may find things in order
                    log.error(f"the upstream {server.url} could not be looked at", exc_info=error)
                if server.alive and not known:
                    log.info(f"the upstream {server.url} is there")
                known = server.alive

        await asyncio.gather(*map(one, self._servers))

    async def _end(self) -> None:
        while self._tasks:
            await asyncio.wait(self._tasks)
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        await asyncio.gather(*(server.close() for server in self._servers))

    def _begin(self, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            task = self._loop.create_task(self._serve(ticket))
            self._tasks.add(task)
            task.add_done_callback(partial(self._done, ticket))
            ticket.on_cancel = partial(self._cancel, task)
            if ticket.cancelled:
                task.cancel()
        self._advance()

    def _cancel(self, task: asyncio.Task[None]) -> None:
        with contextlib.suppress(RuntimeError):  # all is done and the loop has ended
            self._loop.call_soon_threadsafe(task.cancel)

    def _done(self, ticket: Ticket, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._running.discard(ticket)
        self._turns.pop(ticket, None)
        with self._lock:
            self._line.sift(lambda other: other is not ticket)
        self._advance()

    def _advance(self) -> None:
        """Gives those their turn for whom there is room."""
        room = self.limits.rows * max(1, sum(server.alive for server in self._servers))
        with self._lock:
            while len(self._running) < room and self._line.first() is not None:
                ticket = self._line.pop()
                self._running.add(ticket)
                turn = self._turn(ticket)
                if not turn.done():
                    turn.set_result(None)

    def _turn(self, ticket: Ticket) -> asyncio.Future[None]:
        """Done when it is the ticket's turn; it may come between ``submit`` and ``_begin``."""
        return self._turns.setdefault(ticket, self._loop.create_future())

    async def _serve(self, ticket: Ticket) -> None:
        left = ticket.submitted + self.limits.seconds - time.monotonic()
        event: Event
        try:
            event = await asyncio.wait_for(self._answer(ticket), left)
        except asyncio.TimeoutError:
            event = too_long(self.limits)
        except UpstreamError as error:
            event = Failure("upstream", str(error))
        except NoUpstream as error:
            event = Failure(error.code, str(error))
        except Exception as error:
            log.error("a job failed", exc_info=error)
            event = Failure("error", "The server failed to compute the answer; its log says why.")
        ticket.tell(event)

    async def _answer(self, ticket: Ticket) -> Event:
        await self._turn(ticket)
        ticket.started = time.monotonic()
        for server in self._candidates(ticket.job):
            server.load += 1
            try:
                return await (self._score if ticket.job.sampling is None else self._write)(ticket, server)
            except Unreachable as error:  # nothing has been sent back, so another may do it
                server.alive = False
                log.warning(str(error))
            finally:
                server.load -= 1
        raise NoUpstream(_NONE)

    def _candidates(self, job: Job) -> list[Vllm]:
        """The servers that are there, in the order in which they are to be tried.

        A soft prompt's are ranked by rendezvous hashing (Thaler and Ravishankar 1998): when a server comes or goes,
        only its own soft prompts move. The bare base model's are ranked by load.
        """

        def rank(server: Vllm) -> tuple[bool, int]:
            if not job.content:
                return False, server.load
            digest = hashlib.sha256(f"{job.content} {server.url}".encode()).digest()
            return server.load >= self.limits.rows, int.from_bytes(digest[:8], "big")

        return sorted((server for server in self._servers if server.alive), key=rank)

    async def _write(self, ticket: Ticket, server: Vllm) -> Piece:
        job = ticket.job
        assert job.sampling is not None
        writer = writer_of(self._embedder, job)
        self.prefixes.queries += job.prompt_tokens
        chat = self._chat(job)
        answer = server.write(job.request.ids, job.vectors, job.sampling, sorted(writer.ends), job.top_logprobs, chat)
        async with contextlib.aclosing(answer) as chunks:
            async for chunk in chunks:
                self._cached(ticket, chunk.cached)
                if chunk.ids:
                    ticket.first = ticket.first or time.monotonic()
                for place, token in enumerate(chunk.ids):
                    if not writer.done:
                        note = writer.note(token, *chunk.logprobs[place]) if chunk.logprobs else None
                        writer.put(token, note)
                if writer.done and not chunk.more:
                    break
                if job.stream and not writer.done:
                    text, tokens = writer.release()
                    if text:
                        ticket.tell(Piece(text, tokens, writer.count, ""))
        if not writer.done:
            raise UpstreamError("An upstream server broke off in the middle of the answer; try again.")
        text, tokens = writer.release()
        return Piece(text, tokens, writer.count, writer.finish)

    def _chat(self, job: Job) -> Chat | None:
        """A job's sequence as messages, where only the soft prompt, and literal text beside it, is to be embedded then
        and the tokens are the same."""
        if job.template is None:
            return None
        try:
            messages = self._splicer.messages(job.template)
            if any(message.has_soft_prompt and message.fields for message in messages):
                return None  # its text would have to be embedded, too
            splice = self._splicer.splice(job.template, job.fields, job.request.ids)
        except TemplateError:
            return None
        place = f"{job.content} {splice.before} {len(splice.content(job.request.ids))}"
        return Chat(splice, hashlib.sha256(place.encode()).hexdigest())

    async def _score(self, ticket: Ticket, server: Vllm) -> Scores:
        """Log-probabilities of the request's words: one request for each place at which they part."""
        job = ticket.job
        trie = build_trie(job.request.words)
        wanted: dict[int, dict[int, None]] = {}
        for node, token, _ in trie.steps:
            wanted.setdefault(node, {})[token] = None
        self.prefixes.queries += job.prompt_tokens

        async def at(node: int) -> dict[int, float]:
            ids = job.request.ids
            if node >= 0:
                ids += trie.path(node)
            found, cached = await server.next_logprobs(ids, job.vectors, list(wanted[node]))
            if node < 0:
                self._cached(ticket, cached)
            return found

        asked = {node: asyncio.ensure_future(at(node)) for node in wanted}
        try:
            await asyncio.gather(*asked.values())
        finally:
            for task in asked.values():
                task.cancel()
        ticket.first = time.monotonic()
        scores = [0.0] * trie.num_words
        for node, token, word in trie.steps:
            scores[word] += asked[node].result()[token]
        if any(map(math.isnan, scores)):
            raise UpstreamError("The base model's scores at an upstream server are not numbers; give it another dtype.")
        return Scores(tuple(scores))

    def _cached(self, ticket: Ticket, tokens: int) -> None:
        self.prefixes.hits += tokens
        ticket.cached += tokens


def check_model(block_size: int, model: Model) -> None:
    """Sees whether a soft prompt can be served through vLLM, and warns if its prefix does not fill vLLM's blocks.

    Nothing can be done about the latter here: each token more, whatever its vector, is one that the others attend to.

    Raises:
        ConfigError: it cannot.
    """
    task, vectors = model.task, model.vectors
    assert task is not None
    assert vectors is not None
    if vectors.dim() != 2:
        kind = "trained KV prefix" if vectors.dim() == 5 else "trained state"
        raise ConfigError(
            f"Expected vectors in the place of tokens for vLLM, found a {kind} in {model.name!r}; serve it "
            f"without --backend vllm."
        )
    request = task.open_request(Example(dict.fromkeys(task.template.fields, "a"), None), 1)
    shared = request.ids[: request.shared]
    if SOFT not in shared:
        log.warning(f"{model.name}: the soft prompt stands behind input text, where vLLM's cache seldom holds it")
        return
    length = task.num_virtual_tokens
    prefix = len(shared) - 1 + length
    rest = prefix % block_size
    if rest:
        fitting = [length - rest] * (length > rest) + [length + block_size - rest]
        log.warning(
            f"{model.name}: of the {prefix} tokens that its requests begin with, vLLM's cache of blocks of "
            f"{block_size} holds {prefix - rest}, and {rest} are computed each time; a soft prompt of "
            f"{' or '.join(map(str, fitting))} virtual tokens would fill its blocks"
        )
