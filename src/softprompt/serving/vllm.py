"""One vLLM server as a client sees it: sequences of token ids, or whole embedded sequences, go in; token ids come out.

vLLM's completions endpoint takes a sequence that the caller has embedded (``prompt_embeds``, a server started with
``--enable-prompt-embeds``), and gives token ids and log-probabilities by token id, so that text is made on our side.
Its chat endpoint takes embeddings in the place of a message's content, and the other messages as text.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio
import httpx
import torch

from softprompt.errors import ConfigError
from softprompt.model.embedder import Embedder
from softprompt.model.request import Sampling
from softprompt.text.spliced import Splice
from softprompt.text.tokens import SOFT

log = logging.getLogger("softprompt.upstream")

CONNECT_SECONDS = 5.0
"""What a connection may take."""

LOOK_SECONDS = 10.0
"""What an answer to a look may take; a busy server is slow to say that it is there."""

CHECK_SECONDS = 60.0
"""What two requests for one token may take; a server's first ones are slow."""

PROBE_TOKENS = 8
"""Tokens that are scored as ids and as embeddings, to see whether both servers have the same embedding table."""

PROBE_TOLERANCE = 0.5
"""Difference in log-probability, natural logarithm: far above what a 16-bit dtype makes of the same numbers, far below
what another table does."""

MAX_WANTED = 128
"""The most tokens that vLLM scores by id in one request."""

NEUTRAL = {
    "return_tokens_as_token_ids": True,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""Said each time: penalties may be set for a server by the model's own files."""


class Unreachable(Exception):
    """Nothing came back: another server may be asked."""


class UpstreamError(Exception):
    """A server failed in what it had begun, or refused it; one sentence for the client."""


class RefusedThere(UpstreamError):
    """A server will not take a request as it is."""


@dataclass(frozen=True)
class Chat:
    """A sequence as messages, of which one's content is embedded, and that as a part of what vLLM caches it by.

    Attributes:
        splice: the messages.
        salt: what tells the embeddings, and where they stand, from all others. vLLM up to 0.32 caches a prefix by its
            token ids, with zeros where embeddings stand, and by its embeddings, with zeros where token ids stand, but
            not by which of them counts (https://github.com/vllm-project/vllm/issues/56655).
    """

    splice: Splice
    salt: str


class _OtherTokens(Exception):
    """A server made other tokens of messages than ours."""


@dataclass(frozen=True)
class Chosen:
    """Tokens that a server chose.

    Attributes:
        ids: the tokens, end-of-sequence tokens included.
        logprobs: for each, its log-probability and the most probable tokens with theirs, the best first; empty unless
            asked for.
        cached: tokens of the sequence that had been computed before; told once, if at all.
        more: whether the continuation is whole, and only that is still to be told.
    """

    ids: Sequence[int]
    logprobs: Sequence[tuple[float, list[tuple[int, float]]]]
    cached: int
    more: bool


class Vllm:
    """A vLLM server. All of it is used from one event loop.

    Attributes:
        url: where it is, without ``/v1``.
        alive: whether it was there when it was last asked, and serves this base model.
        load: requests that are there now.
        model: what it calls the base model.
        window: the most tokens of a sequence there; None before it has told.
    """

    def __init__(self, url: str, embedder: Embedder, api_key: str | None = None) -> None:
        """A server that nothing is known of yet.

        Args:
            url: where it is, with or without ``/v1``.
            embedder: of the base model that it is to serve.
            api_key: what it wants as Bearer token, if anything.
        """
        self.url = url.rstrip("/").removesuffix("/v1")
        self.alive = False
        self.load = 0
        self.model = ""
        self.window: int | None = None
        self._embedder = embedder
        self._checked = ""
        self._chats = True  # whether its chat endpoint makes our tokens of messages, as far as is known
        # vLLM's first model runner (0.32 takes it where there is no Triton) loses the most probable tokens of a request
        # that shares a pass with one that asks for tokens by id: so the one kind is not sent while the other is there.
        self._noting = 0
        self._by_id = 0
        self._none_by_id = asyncio.Event()
        self._none_by_id.set()
        timeout = httpx.Timeout(None, connect=CONNECT_SECONDS)
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        # Connections are given up before vLLM does so after 5 seconds, which could meet a request on its way.
        unbounded = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2.0)
        self._http = httpx.AsyncClient(base_url=self.url, headers=headers, timeout=timeout, limits=unbounded)

    async def close(self) -> None:
        """Gives its connections back."""
        await self._http.aclose()

    async def look(self) -> None:
        """Sees whether it is there and serves this base model.

        Raises:
            Unreachable: it does not answer, or not yet.
            ConfigError: it takes no embeddings, or serves another base model.
        """
        try:
            await self._see()
        except (Unreachable, ConfigError):
            self.alive, self._checked = False, ""
            raise
        self.alive = True

    async def _see(self) -> None:
        try:
            answer = await self._http.get("/v1/models", timeout=LOOK_SECONDS)
            if answer.status_code in (401, 403):
                raise ConfigError(
                    f"Expected an upstream that takes our key, found {self.url}, which answers {answer.status_code}; "
                    f"give its key with --upstream-api-key."
                )
            healthy = await self._http.get("/health", timeout=LOOK_SECONDS)
            answer.raise_for_status()
            healthy.raise_for_status()
            served = next(card for card in answer.json()["data"] if not card.get("parent"))
            self.model, self.window = str(served["id"]), served.get("max_model_len")
        except httpx.HTTPError as error:
            raise Unreachable(f"The upstream {self.url} does not answer: {_reason(error)}.") from error
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"Expected a vLLM server at {self.url}, found one whose /v1/models lists no model; correct the URL."
            ) from error
        if self._checked != self.model:
            try:
                with anyio.fail_after(CHECK_SECONDS):  # asyncio.wait_for's own task could fail unseen at shutdown
                    await self._check()
            except TimeoutError as error:
                raise Unreachable(f"The upstream {self.url} does not answer in time.") from error
            self._checked, self._chats = self.model, True

    async def _check(self) -> None:
        """The same tokens as ids and as embeddings must get the same scores."""
        step = len(self._embedder.embedding) // PROBE_TOKENS
        ids = [step * number for number in range(PROBE_TOKENS)]
        try:
            by_ids, _ = await self.next_logprobs(ids, None, ids)
            embedded, _ = await self.next_logprobs([SOFT], self._embedder.embed(ids, None), ids)
        except UpstreamError as error:
            raise ConfigError(
                f"Expected a vLLM server with --enable-prompt-embeds and this base model at {self.url}, found one that "
                f"refuses our sequences: {error.__cause__}; see its log."
            ) from error
        if max(abs(by_ids[token] - embedded[token]) for token in ids) > PROBE_TOLERANCE:
            raise ConfigError(
                f"Expected the base model {self._embedder.name} at {self.url}, found {self.model}, whose token "
                f"embeddings are others; start vLLM with the same model, or give it as --base."
            )

    async def write(
        self,
        ids: Sequence[int],
        vectors: torch.Tensor | None,
        sampling: Sampling,
        ends: Sequence[int],
        top_logprobs: int | None,
        chat: Chat | None = None,
    ) -> AsyncGenerator[Chosen, None]:
        """Continues a sequence; closing the iterator ends the request there.

        Args:
            ids: token ids, ``SOFT`` where ``vectors`` stand.
            vectors: the soft prompt, or None.
            sampling: how to choose; its stop strings are not looked at.
            ends: the end-of-sequence tokens.
            top_logprobs: how many of the most probable tokens to tell beside each token; None: no log-probabilities.
            chat: the sequence as messages, if it is to be sent so. It is sent whole where the server does not make the
                same tokens of them.

        Raises:
            Unreachable: nothing came back.
            UpstreamError: it failed.
        """
        wish = {
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
            "stop_token_ids": list(ends),
            "ignore_eos": True,  # the ends above are what counts
            "return_token_ids": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if chat is not None and self._chats and top_logprobs is None:
            try:
                async with aclosing(self._chat(ids, vectors, wish, chat)) as chunks:
                    async for chunk in chunks:
                        yield chunk
                return
            except (RefusedThere, _OtherTokens) as error:  # before anything was told
                self._chats = False
                log.warning(
                    f"the upstream {self.url} gets whole sequences instead of messages: {error.__cause__ or error}"
                )
        noting = bool(top_logprobs)
        self._noting += noting
        try:
            if noting:
                await self._none_by_id.wait()
            body = await self._body(ids, vectors, {**wish, "logprobs": top_logprobs})
            async with self._posted(body) as response:
                async for document in _streamed(response):
                    yield _chosen(document, top_logprobs)
        finally:
            self._noting -= noting

    async def _chat(
        self, ids: Sequence[int], vectors: torch.Tensor | None, wish: dict[str, Any], chat: Chat
    ) -> AsyncGenerator[Chosen, None]:
        """Continues a sequence that is sent as messages.

        Raises:
            _OtherTokens: the server makes other tokens of them; nothing has been told yet.
        """
        splice = chat.splice
        embedded = self._embedder.embed(splice.content(ids), vectors)
        data = await asyncio.to_thread(_saved, embedded)
        body = {"model": self.model, "messages": splice.conversation(data), "cache_salt": chat.salt, **NEUTRAL, **wish}
        async with self._posted(json.dumps(body).encode(), "/v1/chat/completions") as response:
            known = False
            async for document in _streamed(response):
                if not known and not _same(document.get("prompt_token_ids"), ids, splice, len(embedded)):
                    raise _OtherTokens("its tokens of them are not ours")
                known = True
                yield _chosen(document, None)

    async def next_logprobs(
        self, ids: Sequence[int], vectors: torch.Tensor | None, wanted: Sequence[int]
    ) -> tuple[dict[int, float], int]:
        """Log-probabilities of some tokens as the next one of a sequence, natural logarithm.

        Args:
            ids: token ids, ``SOFT`` where ``vectors`` stand.
            vectors: the soft prompt, or None.
            wanted: the tokens; one that stands twice is told once.

        Returns:
            Each one's, and how many tokens of the sequence had been computed before, as far as the server tells.

        Raises:
            Unreachable: nothing came back.
            UpstreamError: it failed.
        """
        wanted = list(dict.fromkeys(wanted))
        found: dict[int, float] = {}
        cached = 0
        while len(found) < len(wanted):
            if self._noting:  # the token that is chosen is told anyway, with its probability among all
                part = list(wanted[len(found) : len(found) + 1])
                told, more = await self._next(ids, vectors, {"allowed_token_ids": part})
            else:
                part = list(wanted[len(found) : len(found) + MAX_WANTED])
                self._by_id += 1
                self._none_by_id.clear()
                try:
                    told, more = await self._next(ids, vectors, {"logprob_token_ids": part})
                finally:
                    self._by_id -= 1
                    if not self._by_id:
                        self._none_by_id.set()
            found |= {token: told[token] for token in part}
            cached = cached or more
        return found, cached

    async def _next(
        self, ids: Sequence[int], vectors: torch.Tensor | None, wish: dict[str, Any]
    ) -> tuple[dict[int, float], int]:
        """Log-probabilities of one more token and of those that are told with it; tokens that were cached."""
        wish = {"max_tokens": 1, "temperature": 0.0, "top_p": 1.0, "ignore_eos": True, "logprobs": 0, **wish}
        async with self._posted(await self._body(ids, vectors, wish)) as response:
            document = _document((await response.aread()).decode())
            told = _by_id(document["choices"][0]["logprobs"]["top_logprobs"][0])
            return told, _cached(document)

    async def _body(self, ids: Sequence[int], vectors: torch.Tensor | None, wish: dict[str, Any]) -> bytes:
        if SOFT in ids:  # megabytes, which must not hold up the event loop
            sequence = {"prompt_embeds": await asyncio.to_thread(lambda: _saved(self._embedder.embed(ids, vectors)))}
        else:
            sequence = {"prompt": list(ids)}  # type: ignore[dict-item]
        return json.dumps({"model": self.model, **sequence, **NEUTRAL, **wish}).encode()

    @asynccontextmanager
    async def _posted(self, body: bytes, path: str = "/v1/completions") -> AsyncIterator[httpx.Response]:
        """The answer to a request, once its head is there; what goes wrong later is ``UpstreamError``."""
        headers = {"Content-Type": "application/json"}
        request = self._http.build_request("POST", path, content=body, headers=headers)
        try:
            response = await self._http.send(request, stream=True)
        except httpx.TransportError as error:
            raise Unreachable(f"The upstream {self.url} does not answer: {_reason(error)}.") from error
        try:
            if response.status_code == 503:
                raise Unreachable(f"The upstream {self.url} takes no requests now (503).")
            if response.status_code != 200:
                told = _message((await response.aread()).decode(errors="replace"))
                log.error(f"the upstream {self.url} answered {response.status_code}: {told}")
                kind = UpstreamError if response.is_server_error else RefusedThere
                raise kind(
                    f"An upstream server refused or failed the request ({response.status_code}); this server's log "
                    f"says why."
                ) from _Told(told)
            yield response
        except httpx.TransportError as error:
            log.error(f"the upstream {self.url} broke off: {_reason(error)}")
            raise UpstreamError("An upstream server broke off in the middle of the answer; try again.") from error
        except (LookupError, TypeError, ValueError) as error:
            log.error(f"the upstream {self.url} answered what is not understood", exc_info=error)
            raise UpstreamError(
                "An upstream server answered what is not understood; this server's log says what."
            ) from error
        finally:
            await response.aclose()


class _Told(Exception):
    """What a server says of an error."""


def _saved(embedded: torch.Tensor) -> str:
    """A tensor as vLLM reads it: what ``torch.save`` writes, in base64."""
    file = io.BytesIO()
    torch.save(embedded.cpu(), file)
    return base64.b64encode(file.getbuffer()).decode()


def _message(text: str) -> str:
    """What the body of an error says."""
    try:
        return str(json.loads(text)["error"]["message"])[:500].rstrip(".")
    except (ValueError, LookupError, TypeError):
        return text[:500]


def _document(text: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(text)
    if "error" in document:  # in the middle of a stream
        raise ValueError(str(document["error"])[:500])
    return document


async def _streamed(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The documents of a stream of server-sent events."""
    async for line in response.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield _document(line[6:])


def _same(told: Sequence[int] | None, ids: Sequence[int], splice: Splice, length: int) -> bool:
    """Whether a server's tokens of messages are those of a sequence, with one and the same token in the place of all
    ``length`` embeddings."""
    if told is None or len(told) != splice.before + length + splice.behind:
        return False
    end = splice.before + length
    around = [*told[: splice.before], *told[end:]]
    wanted = [*ids[: splice.before], *ids[len(ids) - splice.behind :]]
    return around == wanted and len(set(told[splice.before : end])) == 1


def _chosen(chunk: dict[str, Any], top_logprobs: int | None) -> Chosen:
    """A chunk of a stream; the first one of a chat has no tokens, the last one, with the usage, no choice."""
    ids: list[int] = []
    logprobs: list[tuple[float, list[tuple[int, float]]]] = []
    for choice in chunk["choices"]:
        ids += choice.get("token_ids", ()) if "delta" in choice else choice["token_ids"]
        if top_logprobs is not None:
            told = choice["logprobs"]
            for value, others in zip(told["token_logprobs"], told["top_logprobs"], strict=True):
                best = sorted(_by_id(others).items(), key=lambda pair: -pair[1])[:top_logprobs]
                logprobs.append((value, best))
    return Chosen(ids, logprobs, _cached(chunk), any(choice.get("finish_reason") for choice in chunk["choices"]))


def _cached(document: dict[str, Any]) -> int:
    """Tokens that had been computed before; told only by a server with ``--enable-prompt-tokens-details``."""
    details = (document.get("usage") or {}).get("prompt_tokens_details") or {}
    return details.get("cached_tokens") or 0


def _by_id(told: dict[str, float]) -> dict[int, float]:
    """Log-probabilities by token, as told with ``return_tokens_as_token_ids``."""
    return {int(name.removeprefix("token_id:")): value for name, value in told.items()}


def _reason(error: Exception) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        return f"status {error.response.status_code}"
    return str(error) or type(error).__name__
