"""A server that answers as vLLM's completions and chat endpoints do, by transformers' own forward of a tiny model, and
fails as it is told to."""

from __future__ import annotations

import asyncio
import base64
import copy
import hashlib
import io
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.conftest import make_model


@dataclass
class Fake:
    """What the tests see and set.

    Attributes:
        url: where it is.
        model: transformers' model.
        mode: how it fails: ``500``, ``503``, ``400``, ``hang up`` after two tokens, ``short``: ends after two tokens,
            ``error``: tells of one after two tokens, ``noise``: sends what is no JSON; empty: not at all.
        seconds: what each token takes.
        per_chunk: tokens in a chunk of a stream.
        tokenizer: with the chat template that its chat endpoint goes by; None: it takes no embeddings there.
        block: tokens in a block of its prefix cache; 0: it has none.
        keys_rows: whether a block of token ids and embeddings is known by the embeddings, as vLLM's is. In no case is
            it known by which of the two counts where (https://github.com/vllm-project/vllm/issues/56655).
        keys_salt: whether the cache looks at ``cache_salt``.
        bodies: the requests that it got, without embeddings.
        lengths: tokens of each.
        active: requests that it works on.
        by_id: those of them that ask for the probabilities of tokens by id.
        most_active: the most at once so far.
        dropped: requests that were given up before they were done.
        stop: ends it, breaking off what it works on.
    """

    url: str
    model: Any
    key: str | None = None
    takes_embeds: bool = True
    window: int | None = 128
    mode: str = ""
    seconds: float = 0.0
    per_chunk: int = 1
    tokenizer: Any = None
    block: int = 0
    keys_rows: bool = True
    keys_salt: bool = True
    blocks: dict[Any, torch.Tensor] = field(default_factory=dict)
    cached: int = 4
    bodies: list[dict[str, Any]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    active: int = 0
    by_id: int = 0
    most_active: int = 0
    dropped: int = 0
    stop: Any = None

    @property
    def written(self) -> list[dict[str, Any]]:
        """The requests to write, without those that only score."""
        return [body for body in self.bodies if body.get("stream")]

    def _sequence(self, body: dict[str, Any]) -> torch.Tensor:
        """``[T, H]``."""
        embeds = body.pop("prompt_embeds", None)
        assert (embeds is None) != (body.get("prompt") is None)
        if embeds is None:
            found: torch.Tensor = self.model.get_input_embeddings().weight[torch.tensor(body["prompt"])]
            return self._through_cache(found, body["prompt"], None, None)
        tensor = _tensor(embeds)
        return self._through_cache(tensor, [0] * len(tensor), tensor, None)

    def _conversation(self, body: dict[str, Any]) -> tuple[torch.Tensor, list[int]]:
        """``[T, H]``, and the token ids that it tells of them: vLLM's renderer of a chat template that takes texts."""
        tokenizer = copy.deepcopy(self.tokenizer)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<prompt_embeds>"]})
        place = tokenizer.convert_tokens_to_ids("<prompt_embeds>")
        tensors, conversation = [], []
        for message in body["messages"]:
            content = message["content"]
            if not isinstance(content, str):
                (part,) = content
                assert part.keys() == {"type", "data"}
                tensors.append(_tensor(part.pop("data")))
                content = "<prompt_embeds>"
            conversation.append({"role": message["role"], "content": content})
        ids = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
        (tensor,) = tensors
        (start,) = (number for number, token in enumerate(ids) if token == place)
        told = [*ids[:start], *[place] * len(tensor), *ids[start + 1 :]]
        known = [0 if token == place else token for token in told]
        rows = torch.zeros(len(told), tensor.shape[1])
        rows[start : start + len(tensor)] = tensor
        sequence = self.model.get_input_embeddings().weight[torch.tensor(known)].detach().clone()
        sequence[start : start + len(tensor)] = tensor
        return self._through_cache(sequence, known, rows if self.keys_rows else None, body.get("cache_salt")), told

    def _through_cache(
        self, sequence: torch.Tensor, ids: list[int], rows: torch.Tensor | None, salt: str | None
    ) -> torch.Tensor:
        """The sequence whose keys and values are computed with: where the cache finds a block of an earlier one, that
        block."""
        if not self.block:
            return sequence
        sequence, key, self.cached = sequence.detach().clone(), None, 0
        for start in range(0, len(ids) - self.block, self.block):
            end = start + self.block
            digest = None if rows is None else hashlib.sha256(rows[start:end].numpy().tobytes()).digest()
            key = (key, tuple(ids[start:end]), digest, salt if start == 0 and self.keys_salt else None)  # type: ignore[assignment]
            if key in self.blocks:
                self.cached += self.block
            sequence[start:end] = self.blocks.setdefault(key, sequence[start:end].clone())
        return sequence

    @torch.no_grad()
    def _logits(self, sequence: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(inputs_embeds=sequence[None]).logits[0, -1]
        return logits

    def _told(self, body: dict[str, Any], logits: torch.Tensor, token: int) -> dict[str, Any] | None:
        if body.get("logprobs") is None:
            return None
        assert body["return_tokens_as_token_ids"]
        logprobs = logits.log_softmax(dim=-1)
        wanted = body.get("logprob_token_ids") or logprobs.topk(body["logprobs"]).indices.tolist()
        if self.by_id and body["logprobs"] and not body.get("logprob_token_ids"):
            logprobs[wanted] = logprobs[wanted].where(torch.tensor(wanted) == token, -torch.inf)  # as vLLM 0.32 does
        listed = {f"token_id:{id}": max(float(logprobs[id]), -9999.0) for id in (token, *wanted)}
        return {
            "text_offset": [0],
            "token_logprobs": [float(logprobs[token])],
            "tokens": [f"token_id:{token}"],
            "top_logprobs": [listed],
        }

    async def complete(self, body: dict[str, Any]) -> Response:
        """``POST /v1/completions``."""
        if "prompt_embeds" in body and not self.takes_embeds:
            return _error(400, "You must set `--enable-prompt-embeds` to input `prompt_embeds`.")
        if self.mode in ("400", "500", "503"):
            return _error(int(self.mode), "as it was told")
        if body["model"] != "base":
            return _error(404, f"The model `{body['model']}` does not exist.")
        sequence = self._sequence(body)
        self.bodies.append(body)
        self.lengths.append(len(sequence))
        if sequence.shape[1] != self.model.config.hidden_size:
            return _error(400, "`prompt_embeds` hidden_size does not match the model's hidden_size.")
        steps = self._steps(body, sequence)
        if body.get("stream"):
            assert body["stream_options"] == {"include_usage": True}
            return StreamingResponse(self._chunks(steps, len(sequence)), media_type="text/event-stream")
        (choice,) = [choice async for choice in steps]
        return JSONResponse({"choices": [choice], "usage": {"prompt_tokens": len(sequence)}})

    async def chat(self, body: dict[str, Any]) -> Response:
        """``POST /v1/chat/completions``."""
        if self.tokenizer is None:
            return _error(400, "Unsupported chat content part type: 'prompt_embeds'.")
        if self.mode in ("400", "500", "503"):
            return _error(int(self.mode), "as it was told")
        sequence, told = self._conversation(body)
        self.bodies.append(body)
        self.lengths.append(len(sequence))
        assert body["stream"]
        assert body["return_token_ids"]
        head = {"prompt_token_ids": told, "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
        chunks = self._chunks(self._steps(body, sequence), len(sequence))

        async def headed() -> AsyncIterator[str]:
            yield f"data: {json.dumps(head)}\n\n"
            async for chunk in chunks:
                yield chunk.replace('"text": "its own', '"delta": "its own')

        return StreamingResponse(headed(), media_type="text/event-stream")

    async def _steps(self, body: dict[str, Any], sequence: torch.Tensor) -> AsyncIterator[dict[str, Any]]:
        """A choice for each token."""
        assert body["ignore_eos"]
        assert (body["top_k"], body["min_p"], body["repetition_penalty"]) == (0, 0, 1)
        generator = torch.Generator().manual_seed(body.get("seed") or 0)
        table = self.model.get_input_embeddings().weight
        self.active += 1
        self.by_id += "logprob_token_ids" in body
        self.most_active = max(self.active, self.most_active)
        done = False
        try:
            for number in range(body["max_tokens"]):
                await asyncio.sleep(self.seconds)
                logits = await asyncio.to_thread(self._logits, sequence)
                token = int(logits.argmax())
                if "allowed_token_ids" in body:
                    allowed = body["allowed_token_ids"]
                    token = allowed[int(logits[allowed].argmax())]
                if body["temperature"] > 0:
                    assert body["top_p"] == 1
                    probabilities = (logits / body["temperature"]).softmax(dim=-1)
                    token = int(torch.multinomial(probabilities, 1, generator=generator))
                finish = "stop" if token in body.get("stop_token_ids", ()) else None
                finish = finish or ("length" if number + 1 == body["max_tokens"] else None)
                done = finish is not None
                yield {
                    "index": 0,
                    "text": "its own text is not looked at",
                    "logprobs": self._told(body, logits, token),
                    "finish_reason": finish,
                    "token_ids": [token] if body.get("return_token_ids") else None,
                }
                if done:
                    return
                sequence = torch.cat([sequence, table[token][None]])
        finally:
            self.active -= 1
            self.by_id -= "logprob_token_ids" in body
            self.dropped += not done

    async def _chunks(self, steps: AsyncIterator[dict[str, Any]], prompt_tokens: int) -> AsyncIterator[str]:
        held: list[dict[str, Any]] = []
        count = 0
        try:
            async for choice in steps:
                count += 1
                if count == 3 and self.mode:
                    if self.mode == "hang up":
                        raise RuntimeError("hanging up, as it was told")
                    if self.mode == "short":
                        yield "data: [DONE]\n\n"
                        return
                    if self.mode == "error":
                        yield 'data: {"error": {"message": "EngineDead", "code": 500}}\n\n'
                        return
                    yield "data: {noise\n\n"
                held.append(choice)
                if len(held) == self.per_chunk or choice["finish_reason"]:
                    yield f"data: {json.dumps({'choices': [_joined(held)]})}\n\n"
                    held = []
            usage = {"prompt_tokens": prompt_tokens, "prompt_tokens_details": {"cached_tokens": self.cached}}
            yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            await steps.aclose()  # type: ignore[attr-defined]


def _tensor(data: str) -> torch.Tensor:
    """``[T, H]`` as it was sent."""
    tensor = torch.load(io.BytesIO(base64.b64decode(data, validate=True)), weights_only=True)
    assert isinstance(tensor, torch.Tensor)
    assert tensor.dim() == 2
    assert tensor.untyped_storage().nbytes() == tensor.nbytes  # no table behind it
    return tensor.float()


def _joined(held: list[dict[str, Any]]) -> dict[str, Any]:
    whole = {**held[-1], "token_ids": [token for choice in held for token in choice["token_ids"]]}
    if whole["logprobs"] is not None:
        whole["logprobs"] = {
            name: [value for choice in held for value in choice["logprobs"][name]] for name in whole["logprobs"]
        }
    return whole


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": "Error", "code": status}}, status)


def _app(fake: Fake) -> Starlette:
    def refused(request: Request) -> Response | None:
        if fake.key is not None and request.headers.get("authorization") != f"Bearer {fake.key}":
            return _error(401, "Unauthorized")
        return None

    async def models(request: Request) -> Response:
        cards = [{"id": "an-adapter", "parent": "base"}, {"id": "base", "parent": None, "max_model_len": fake.window}]
        return refused(request) or JSONResponse({"object": "list", "data": cards})

    async def health(request: Request) -> Response:
        return Response(status_code=503 if fake.mode == "503" else 200)

    async def completions(request: Request) -> Response:
        return refused(request) or await fake.complete(await request.json())

    async def chat(request: Request) -> Response:
        return refused(request) or await fake.chat(await request.json())

    return Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/models", models),
            Route("/health", health),
            Route("/v1/completions", completions, methods=["POST"]),
        ]
    )


@contextmanager
def fake_vllm(model: Any = None, port: int = 0, **options: Any) -> Iterator[Fake]:
    """Runs one on a port of this machine."""
    listener = socket.create_server(("127.0.0.1", port))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    fake = Fake(url, make_model("llama").eval() if model is None else model, **options)
    config = uvicorn.Config(_app(fake), log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=0)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()

    def stop() -> None:
        server.should_exit = server.force_exit = True
        thread.join(20)
        assert not thread.is_alive()
        listener.close()

    fake.stop = stop
    until = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < until
        time.sleep(0.005)
    try:
        yield fake
    finally:
        stop()
