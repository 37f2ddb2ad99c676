"""The part soak of ``benchmarks.serve``: a long mixed load with clients that misbehave."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from benchmarks.server import Setting, complete


class Soak:
    """A mixed load whose right answers are known."""

    def __init__(self, setting: Setting, client: httpx.AsyncClient) -> None:
        self._setting = setting
        self._client = client
        self._tokens = setting.options.max_tokens
        self._texts = setting.texts[:8]
        self._names = [f"task-{i}" for i in range(8)]
        self._fixed = self._names[:6]
        self._reloaded = self._names[6:]  # these have two versions
        self._expected: dict[tuple[str, str], str] = {}  # system fingerprint and text → answer
        self._of_fingerprint: dict[str, str] = {}
        self.counts: Counter[str] = Counter()
        self.wrong: list[dict[str, Any]] = []

    async def learn(self) -> None:
        """Asks for every right answer alone, and checks that no two tasks share one."""
        for name in self._names:
            for version in (0, 1) if name in self._reloaded else (0,):
                await self._load(name, version)
                for text in self._texts:
                    answer = await complete(self._client, name, text, self._tokens)
                    self._expected[answer["system_fingerprint"], text] = answer["choices"][0]["text"]
                    self._of_fingerprint[answer["system_fingerprint"]] = name
        answers = Counter((text, answer) for (_, text), answer in self._expected.items())
        self.counts["answers that two tasks share"] = sum(count - 1 for count in answers.values())

    async def run(self, until: float, seed: int) -> None:
        """One client: at random, one thing after another."""
        draw = random.Random(seed)
        actions: list[tuple[Callable[[random.Random], Awaitable[None]], int]] = [
            *((self._ask, 10), (self._stream, 6), (self._vanish, 3), (self._classify, 3)),
            *((self._bad_body, 2), (self._unknown, 1), (self._reload, 1), (self._look, 1)),
        ]
        while time.monotonic() < until:
            (action,) = draw.choices([a for a, _ in actions], [weight for _, weight in actions])
            try:
                await action(draw)
            except (httpx.HTTPError, KeyError, ValueError, AssertionError) as error:
                self.counts["lost"] += 1
                self.wrong.append({"action": action.__name__, "error": repr(error)[:300]})

    def _check(self, name: str, text: str, fingerprint: str, found: str) -> None:
        self.counts["answers"] += 1
        if self._of_fingerprint.get(fingerprint) == name and self._expected[fingerprint, text] == found:
            return
        others = {self._of_fingerprint[mark] for (mark, _), answer in self._expected.items() if answer == found}
        self.counts["crossed" if others - {name} else "different"] += 1
        self.wrong.append(
            {"task": name, "text": text, "found": found, "expected": self._expected.get((fingerprint, text))}
        )

    async def _ask(self, draw: random.Random) -> None:
        name, text = draw.choice(self._names), draw.choice(self._texts)
        body = {"model": name, "prompt": text, "max_tokens": self._tokens}
        answer = await self._client.post("/v1/completions", json=body)
        if self._was_refused(answer):
            return
        document = answer.json()
        self._check(name, text, document["system_fingerprint"], document["choices"][0]["text"])

    async def _stream(self, draw: random.Random) -> None:
        name, text = draw.choice(self._names), draw.choice(self._texts)
        body = {"model": name, "prompt": text, "max_tokens": self._tokens, "stream": True}
        found, fingerprint, finished = "", "", False
        async with self._client.stream("POST", "/v1/completions", json=body) as answer:
            if self._was_refused(answer):
                return
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    finished = True
                elif line:
                    chunk = json.loads(line.removeprefix("data: "))
                    fingerprint, found = chunk["system_fingerprint"], found + chunk["choices"][0]["text"]
        assert finished, "a stream without its end"
        self._check(name, text, fingerprint, found)

    async def _vanish(self, draw: random.Random) -> None:
        """Goes away while it waits, or in the middle of the stream."""
        body = {"model": draw.choice(self._names), "prompt": draw.choice(self._texts), "max_tokens": 200, "n": 2}
        self.counts["vanished"] += 1
        if draw.random() < 0.5:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._client.post("/v1/completions", json=body), draw.random() * 0.3)
        else:
            async with self._client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
                async for _ in answer.aiter_lines():
                    if draw.random() < 0.3:
                        break

    async def _classify(self, draw: random.Random) -> None:
        names = draw.sample(self._fixed, 2)
        texts = draw.sample(self._texts, 2)
        answer = await self._client.post("/v1/classify", json={"model": names, "input": texts})
        if self._was_refused(answer):
            return
        data = answer.json()["data"]
        assert [(entry["index"], entry["model"]) for entry in data] == [(i, name) for i in range(2) for name in names]
        self.counts["labels"] += len(data)

    async def _bad_body(self, draw: random.Random) -> None:
        content = draw.choice(
            [b"{", b"\xff\x00", b"[]", b'{"model": 3}', b'{"model": "task-0", "prompt_embeds": "gASV"}']
        )
        answer = await self._client.post(
            "/v1/completions", content=content, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 400, answer.text
        self.counts["bad bodies refused"] += 1

    async def _unknown(self, draw: random.Random) -> None:
        answer = await self._client.post("/v1/completions", json={"model": f"no-{draw.random()}", "prompt": "x"})
        assert answer.status_code == 404, answer.text
        self.counts["unknown models refused"] += 1

    async def _reload(self, draw: random.Random) -> None:
        await self._load(draw.choice(self._reloaded), draw.randrange(2))
        self.counts["reloads"] += 1

    async def _look(self, draw: random.Random) -> None:
        for path in ("/metrics", "/v1/models", "/health"):
            (await self._client.get(path)).raise_for_status()

    async def _load(self, name: str, version: int) -> None:
        number = int(name.removeprefix("task-"))
        soft_prompt = self._setting.soft_prompt(number, version=version, labels=True)
        path = Path(self._setting.store.home) / f"{name}.{version}.safetensors"
        if not path.exists():
            soft_prompt.save(path)
        body = {"name": name, "path": str(path), "load_inplace": True}
        (await self._client.post("/v1/load_soft_prompt", json=body)).raise_for_status()

    def _was_refused(self, answer: httpx.Response) -> bool:
        if answer.status_code == 503:
            self.counts["refused, too many waiting"] += 1
            return True
        answer.raise_for_status()
        return False


async def soak(setting: Setting) -> dict[str, Any]:
    """A mixed load for some minutes; then the server is asked to end while requests are under way."""
    options = setting.options
    with setting.server("--prompts", "all") as server:
        async with server.client() as client:
            soaking = Soak(setting, client)
            await soaking.learn()
            seconds = 60 * options.minutes
            until = time.monotonic() + seconds
            sizes: list[int] = []

            async def watch() -> None:
                while time.monotonic() < until:
                    sizes.append(server.memory)
                    await asyncio.sleep(max(0.2, seconds / 120))

            await asyncio.gather(watch(), *(soaking.run(until, seed) for seed in range(options.batch_size)))
            last = [
                asyncio.create_task(complete(client, f"task-{i % 6}", setting.texts[i % 8], options.max_tokens))
                for i in range(options.batch_size)
            ]
            await asyncio.sleep(2)  # so that all have connected, on a busy machine too
            server.process.send_signal(signal.SIGTERM)
            drained = await asyncio.gather(*last, return_exceptions=True)
    third = max(1, len(sizes) // 3)
    early, late = statistics.median(sizes[third : 2 * third] or sizes), statistics.median(sizes[-third:])
    return {
        "minutes": options.minutes,
        **soaking.counts,
        "lost": soaking.counts["lost"],
        "crossed": soaking.counts["crossed"],
        "different": soaking.counts["different"],
        "wrong": soaking.wrong[:10],
        "bytes_middle_third": early,
        "bytes_last_third": late,
        "bytes_grown": late - early,
        "answered_while_draining": f"{sum(isinstance(answer, dict) for answer in drained)} of {len(drained)}",
    }
