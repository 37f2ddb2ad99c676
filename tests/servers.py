"""A server on a real socket in this process, with a tiny base model and a few soft prompts."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from openai import OpenAI

from softprompt.model.embedder import Embedder
from softprompt.model.frozen import FrozenLM
from softprompt.serving.catalog import Catalog
from softprompt.serving.engine import Engine
from softprompt.serving.jobs import Limits
from softprompt.serving.server import create_app
from softprompt.serving.upstream import Upstreams, check_model
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.soft_prompts.store import Store
from tests.conftest import make_model, make_tokenizer

CHAT = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' and not loop.first %}{{ raise_exception('the system speaks first') }}{% endif %}"
    "{{ message['role'] }}:\n{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
CREATED = "2026-11-01T10:00:00+00:00"
METRIC = {"split": "validation", "metric": "accuracy", "value": 0.9, "stderr": 0.03, "n": 100}


def make_lm(device: str = "cpu") -> FrozenLM:
    """A tiny base model with a chat template; not shared, since the engine's thread works with it."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    return FrozenLM(make_model("llama"), tokenizer, name="tiny", dtype="fp32", device=device)


def soft_prompt(
    lm: FrozenLM,
    name: str,
    template: str,
    labels: Mapping[str, tuple[str, ...]] | None = None,
    *,
    length: int = 5,
    seed: int = 0,
    **options: Any,
) -> SoftPrompt:
    """Random vectors of the size of the embeddings."""
    return SoftPrompt(
        vectors=0.15 * torch.randn(length, lm.hidden_size, generator=torch.Generator().manual_seed(seed)),
        name=name,
        template=template,
        verbalizer=labels,
        **{
            "base": lm.name,
            "base_fingerprint": lm.fingerprint,
            "tokenizer_fingerprint": lm.tokenizer_fingerprint,
            "metrics": (METRIC,),
            "created": CREATED,
        }
        | options,
    )


def fill(store: Store, lm: FrozenLM) -> None:
    """Two classifiers, one of two fields, and one that writes."""
    sst2 = {"positive": ("positive",), "negative": ("negative", "bad")}
    for one in (
        soft_prompt(lm, "sst2", "{soft_prompt}{input}\nAnswer: {target}", sst2, length=7, seed=1),
        soft_prompt(
            lm, "film", "Review :{soft_prompt} {input} {target}", {"good": ("great",), "bad": ("awful",)}, seed=2
        ),
        soft_prompt(
            lm, "nli", "{soft_prompt}{premise} ? {hypothesis} {target}", {"y": ("very",), "n": ("no",)}, seed=3
        ),
        soft_prompt(lm, "write", "{soft_prompt}{input} {target}", length=9, seed=4),
    ):
        store.save(one)


@contextmanager
def slowed(lm: FrozenLM, seconds: float = 0.01) -> Iterator[None]:
    """Every pass of the model takes longer."""
    whole = lm.next_logits

    def slow(*arguments: Any) -> torch.Tensor:
        time.sleep(seconds)
        return whole(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm, "next_logits", slow)
        yield


@dataclass
class Running:
    """A server that runs.

    Attributes:
        url: where.
        engine: its own ``Engine``, or ``Upstreams``.
        catalog: its own.
        lm: another copy of its base model, to compare with.
        http: a client.
        openai: OpenAI's client, without retries.
        stop: shuts it down and waits for its end.
    """

    url: str
    engine: Any
    catalog: Catalog
    lm: FrozenLM
    http: httpx.Client
    openai: OpenAI
    stop: Callable[[], None]

    def post(self, path: str, body: object, status: int = 200, **options: Any) -> Any:
        """The JSON answer, which must have this status."""
        answer = self.http.post(path, json=body, **options)
        assert answer.status_code == status, answer.text
        return answer.json()

    def stream(self, path: str, body: Mapping[str, Any]) -> list[Any]:
        """The chunks of a stream, which must end with ``[DONE]``."""
        with self.http.stream("POST", path, json={**body, "stream": True}) as answer:
            assert answer.status_code == 200
            assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
            lines = [line for line in answer.iter_lines() if line]
        assert all(line.startswith("data: ") for line in lines)
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line[6:]) for line in lines[:-1]]

    def settle(self) -> None:
        """Waits until nothing runs or waits."""
        until = time.monotonic() + 20
        while self.engine.running or self.engine.waiting:
            assert time.monotonic() < until, "rows are still running"
            time.sleep(0.005)


@contextmanager
def serving(
    folder: Path,
    *,
    limits: Limits | None = None,
    api_key: str | None = None,
    upstreams: Sequence[str] = (),
    load: Callable[[], FrozenLM] = make_lm,
    **options: Any,
) -> Iterator[Running]:
    """Serves the soft prompts of a store, which is filled if it is empty; options are ``create_app``'s.

    With ``upstreams``, servers at these URLs compute; ``load`` gives the base model.
    """
    lm, store = load(), Store(folder)
    if not store.names():
        fill(store, lm)
    engine: Engine | Upstreams
    if upstreams:
        embedder = Embedder.of(lm, own_table=True)
        engine = Upstreams(embedder, upstreams, limits)
        catalog = Catalog(embedder, store, engine.window, check=partial(check_model, 16))
    else:
        engine = Engine(lm, limits)
        catalog = Catalog(lm, store, engine.limits.window(lm))
    assert all(error is None for _, error in catalog.sync())
    app = create_app(engine, catalog, api_key=api_key, **options)
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=20)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}

    def stop() -> None:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
        assert not engine.alive

    try:
        with (
            httpx.Client(base_url=url, headers=headers, timeout=60) as http,
            OpenAI(base_url=f"{url}/v1", api_key=api_key or "none", max_retries=0, timeout=60) as openai,
        ):
            yield Running(url, engine, catalog, load(), http, openai, stop)
    finally:
        stop()
