"""A server process of untrained soft prompts, for what is measured of it, and what its clients do."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from softprompt.model.frozen import FrozenLM
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.soft_prompts.store import Store
from softprompt.text.template import DEFAULT_TEMPLATE
from softprompt.tuning.start import initial_vectors


@dataclass
class Setting:
    """What every part works with.

    Attributes:
        options: of the command line.
        lm: the base model in this process.
        store: where the server finds its soft prompts.
        texts: input texts.
    """

    options: argparse.Namespace
    lm: FrozenLM
    store: Store
    texts: list[str]

    def soft_prompt(self, number: int, *, version: int = 0, labels: bool = False) -> SoftPrompt:
        """An untrained soft prompt, ``task-0`` and so on; another version is another content of the same name."""
        length = self.options.num_virtual_tokens
        return SoftPrompt(
            vectors=initial_vectors(self.lm, length, init="vocab", seed=10_000 * version + number),
            name=f"task-{number}",
            base=self.lm.name,
            base_fingerprint=self.lm.fingerprint,
            tokenizer_fingerprint=self.lm.tokenizer_fingerprint,
            template=DEFAULT_TEMPLATE,
            verbalizer={"positive": ("positive",), "negative": ("negative",)} if labels else None,
        )

    @contextmanager
    def server(self, *extra: str) -> Iterator[Server]:
        """A server of the store; it must end by itself, with 0, when it is asked to."""
        command = [sys.executable, "-m", "softprompt", "serve", "--port", "0", "--allow-loading"]
        command += ["--base", self.options.base, "--dtype", self.options.dtype, "--device", "cpu", *extra]
        environment = {**os.environ, "SOFTPROMPT_HOME": str(self.store.home)}
        with tempfile.TemporaryFile("w+") as log:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
            try:
                assert process.stdout is not None
                line = process.stdout.readline()
                if not line.startswith("listening on "):
                    log.seek(0)
                    raise SystemExit(f"the server did not start:\n{log.read()[-2000:]}")
                yield Server(process, line.removeprefix("listening on ").strip())
                process.send_signal(signal.SIGTERM)
                if process.wait(180) != 0:
                    log.seek(0)
                    raise SystemExit(f"the server ended with {process.returncode}:\n{log.read()[-2000:]}")
            finally:
                process.kill()


@dataclass
class Server:
    """A server process.

    Attributes:
        process: the process.
        url: where it listens.
    """

    process: subprocess.Popen[str]
    url: str

    def client(self) -> httpx.AsyncClient:
        """A client that keeps as many connections as it needs."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        return httpx.AsyncClient(base_url=self.url, timeout=300, limits=limits)

    @property
    def memory(self) -> int:
        """Its anonymous resident memory in bytes: without the weights' file and the libraries."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError("no RssAnon in /proc")


async def complete(client: httpx.AsyncClient, model: str, text: str, tokens: int, **more: object) -> Any:
    """One greedy completion."""
    body = {"model": model, "prompt": text, "max_tokens": tokens, **more}
    answer = await client.post("/v1/completions", json=body)
    answer.raise_for_status()
    return answer.json()


async def first_token(client: httpx.AsyncClient, model: str, text: str, **more: object) -> float:
    """Seconds to the first token of a stream of two."""
    body = {"model": model, "prompt": text, "max_tokens": 2, "stream": True, **more}
    began = time.perf_counter()
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        lines = answer.aiter_lines()
        await anext(lines)
        found = time.perf_counter() - began
        async for _ in lines:
            pass
    return found


Ask = tuple[str, str, int]
"""Model, text, and the most tokens of the answer."""


async def load(client: httpx.AsyncClient, jobs: list[Ask], at_once: int) -> float:
    """Generated tokens a second of ``at_once`` clients that share the jobs."""
    waiting = iter(jobs)
    generated = 0

    async def work() -> None:
        nonlocal generated
        for job in waiting:
            found = await complete(client, *job)
            generated += found["usage"]["completion_tokens"]  # no await in here: others add meanwhile

    began = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(at_once)))
    return generated / (time.perf_counter() - began)
