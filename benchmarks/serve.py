"""The server under load: many soft prompts against one, against PEFT switching adapters, against none; loading, memory,
and a long mixed load with clients that misbehave.

    python benchmarks/serve.py --data sst2/test.jsonl --num-virtual-tokens 100 --batch-size 32 --dtype bf16 --json
    python benchmarks/serve.py --data sst2/test.jsonl --only soak --minutes 10 --dtype fp32 --json

The server is the real one, ``softprompt serve`` as a process of its own, and is asked over HTTP; PEFT runs in this
process without any HTTP. What is compared takes turns, round by round, on the same machine; a ratio is the median of
the rounds' ratios. The soft prompts are untrained: the embeddings of random tokens.

Each part prints its numbers; ``ratio`` is ours over the other's, above 1: ours is better.

throughput  32 requests at a time over 32 soft prompts; the same over one soft prompt; PEFT's ``set_adapter`` and
            ``generate`` for one request after another. Tokens generated a second.
ttft        time to the first token of one request at a time, with a soft prompt whose prefix is known, and without it
loading     from ``load_soft_prompt`` to the first answer, less a second answer, less the computation of a prefix
memory      the server's anonymous memory with 1 soft prompt, with many, and after each has been asked
soak        a mixed load: right answers are known beforehand (greedy; use fp32), so that one that is lost, or is another
            task's, is seen; some clients go away, send bad bodies, name unknown models or load soft prompts anew
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch

from softprompt.data.reading import read_dataset
from softprompt.generation.decoder import generate as generate_texts
from softprompt.model.frozen import FrozenLM
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.soft_prompts.store import Store
from softprompt.text.template import DEFAULT_TEMPLATE
from softprompt.text.tokens import SOFT
from softprompt.tuning.start import initial_vectors

PARTS = ("throughput", "ttft", "loading", "memory", "soak")


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


# --- throughput ------------------------------------------------------------------------------------------------------


def peft_generator(setting: Setting, names: list[str]) -> Callable[[str, str, int], list[int]]:
    """PEFT with an adapter for each soft prompt: name and text → the ids of a greedy completion."""
    from peft import PromptTuningConfig, get_peft_model

    lm = FrozenLM.load(setting.options.base, dtype=setting.options.dtype, device="cpu")
    lm.model.set_attn_implementation("sdpa")
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=setting.options.num_virtual_tokens)
    model: Any = get_peft_model(lm.model, config, adapter_name=names[0]).eval()
    for name in names[1:]:
        model.add_adapter(name, config)
    for name in names:
        with torch.no_grad():
            model.prompt_encoder[name].embedding.weight.copy_(setting.store.load(name).vectors)
    from softprompt.data.example import Example
    from softprompt.tasks.task import Task

    task = Task.of(lm, setting.store.load(names[0]))

    def generate(name: str, text: str, tokens: int) -> list[int]:
        ids = torch.tensor([[t for t in task.open_request(Example({"input": text}, None), 1).ids if t != SOFT]])
        model.set_adapter(name)
        with torch.no_grad():
            found = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=lm.tokenizer.eos_token_id,
            )
        return found[0, ids.shape[1] :].tolist()  # type: ignore[no-any-return]

    return generate


def talkative(setting: Setting, texts: list[str]) -> list[str]:
    """Stores soft prompts whose answers seldom end early, so that all sides do the same work.

    Returns:
        Their names, as many as there are clients.
    """
    from softprompt.data.example import Example
    from softprompt.model.request import Sampling
    from softprompt.tasks.task import Task

    options, count = setting.options, setting.options.batch_size
    sampling, found, first = Sampling(max_new_tokens=options.max_tokens), list[SoftPrompt](), 0

    def ends_late(soft_prompts: list[SoftPrompt], several: list[list[str]]) -> list[bool]:
        requests = [
            Task.of(setting.lm, soft_prompt).open_request(Example({"input": text}, None), options.max_tokens, place)
            for place, soft_prompt in enumerate(soft_prompts)
            for text in several[place]
        ]
        answers = generate_texts(setting.lm, requests, [each.vectors for each in soft_prompts], sampling)
        late = dict.fromkeys(range(len(soft_prompts)), True)
        for request, answer in zip(requests, answers, strict=True):
            late[request.prompt or 0] &= answer.finish == "length"
        return list(late.values())

    while len(found) < count:
        tried = [setting.soft_prompt(number) for number in range(first, first + count)]
        late = ends_late(tried, [texts[: len(texts) // count]] * count)
        for soft_prompt in (each for each, is_late in zip(tried, late, strict=True) if is_late):
            if found or ends_late([soft_prompt], [texts])[0]:  # the first one answers all texts
                found.append(soft_prompt)
        first += count
    for soft_prompt in found[:count]:
        setting.store.save(soft_prompt, overwrite=True)
    return [soft_prompt.name for soft_prompt in found[:count]]


async def throughput(setting: Setting) -> dict[str, Any]:
    """Many soft prompts against one, and against PEFT."""
    options = setting.options
    texts = setting.texts[: options.requests]
    names = talkative(setting, texts)
    peft = peft_generator(setting, names)
    draw = random.Random(0)  # answers end at different times, the same on both sides
    lengths = [draw.randint(options.max_tokens // 2, options.max_tokens) for _ in texts]
    many = [(names[i % len(names)], text, length) for i, (text, length) in enumerate(zip(texts, lengths, strict=True))]
    one = [(names[0], text, length) for _, text, length in many]
    rates: dict[str, list[float]] = {"many": [], "one": [], "peft": []}
    with setting.server("--max-rows", str(options.batch_size)) as server:
        async with server.client() as client:
            for jobs in (many, one):  # every prefix is computed before anything is timed
                await load(client, [(name, text, 2) for name, text, _ in jobs], options.batch_size)
            compared = many[: options.peft_requests]
            answers = [await complete(client, *job) for job in compared]
            same = sum(
                answer["choices"][0]["text"] == decoded(setting.lm, peft(*job))
                for answer, job in zip(answers, compared, strict=True)
            )
            for _ in range(options.rounds):
                rates["many"].append(await load(client, many, options.batch_size))
                rates["one"].append(await load(client, one, options.batch_size))
                began, generated = time.perf_counter(), 0
                for job in compared:
                    generated += len(peft(*job))
                rates["peft"].append(generated / (time.perf_counter() - began))
    return {
        "ratio": median_ratio(rates["many"], rates["peft"]),
        "ratio_many_to_one": median_ratio(rates["many"], rates["one"]),
        "tokens_per_second": rates,
        "soft_prompts": len(names),
        "requests": len(texts),
        "same_text_as_peft": f"{same} of {len(compared)}",
    }


def decoded(lm: FrozenLM, ids: list[int]) -> str:
    """Generated ids as the server shows them: without the template's own space."""
    return str(lm.tokenizer.decode(ids, skip_special_tokens=True)).removeprefix(" ")


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


# --- time to first token, loading, memory ----------------------------------------------------------------------------


async def ttft(setting: Setting) -> dict[str, Any]:
    """One request at a time, with a soft prompt and without, in turns."""
    setting.store.save(setting.soft_prompt(0), overwrite=True)
    seconds: dict[str, list[float]] = {"with": [], "without": []}
    with setting.server() as server:
        async with server.client() as client:
            for number, text in enumerate(setting.texts[: setting.options.requests]):
                for side in ("with", "without"):
                    found = await first_token(client, "task-0", text, base_only=side == "without")
                    if number >= 3:
                        seconds[side].append(found)
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    return {
        "ratio": medians["without"] / medians["with"],
        "time_with_over_without": medians["with"] / medians["without"],
        "seconds": medians,
        "requests": len(seconds["with"]),
    }


async def loading(setting: Setting) -> dict[str, Any]:
    """From the order to load a soft prompt to its first answer."""
    with torch.no_grad():
        times = []
        for number in range(8):
            vectors = setting.soft_prompt(number).vectors
            began = time.perf_counter()
            setting.lm.prefix_kv((SOFT,), vectors)
            times.append(time.perf_counter() - began)
    prefix = statistics.median(times[2:])
    beyond = []
    setting.store.save(setting.soft_prompt(0), overwrite=True)
    with setting.server() as server:
        async with server.client() as client:
            text = setting.texts[0]
            await complete(client, "task-0", text, 1)
            for number in range(1000, 1000 + setting.options.rounds * 5):
                soft_prompt = setting.soft_prompt(number)
                setting.store.save(soft_prompt, overwrite=True)
                began = time.perf_counter()
                answer = await client.post("/v1/load_soft_prompt", json={"name": soft_prompt.name})
                answer.raise_for_status()
                await complete(client, soft_prompt.name, text, 1)
                first = time.perf_counter() - began
                began = time.perf_counter()
                await complete(client, soft_prompt.name, text, 1)
                beyond.append(first - (time.perf_counter() - began) - prefix)
                setting.store.remove(soft_prompt.name)
    return {
        "milliseconds_beyond_prefix": 1000 * statistics.median(beyond),
        "milliseconds_of_prefix": 1000 * prefix,
        "most_milliseconds_beyond_prefix": 1000 * max(beyond),
        "loads": len(beyond),
    }


async def memory(setting: Setting) -> dict[str, Any]:
    """Many soft prompts registered, and each asked twice. One alone is asked as often before, so that what rows need
    while they are computed has been taken by then."""
    count, cap = setting.options.registered, 64
    setting.store.save(setting.soft_prompt(0), overwrite=True)
    with setting.server("--prefix-cache", str(cap)) as server:
        async with server.client() as client:
            jobs = [(f"task-{i}", setting.texts[i % len(setting.texts)], 1) for i in range(count)]
            await load(client, [("task-0", text, tokens) for _, text, tokens in jobs], setting.options.batch_size)
            before = server.memory
            for number in range(1, count):
                soft_prompt = setting.soft_prompt(number)
                path = setting.store.save(soft_prompt, overwrite=True)
                body = {"name": soft_prompt.name, "path": str(path)}
                (await client.post("/v1/load_soft_prompt", json=body)).raise_for_status()
            registered = server.memory
            asked = []
            for _ in range(2):
                await load(client, jobs, setting.options.batch_size)
                asked.append(server.memory)
            metrics = (await client.get("/metrics")).text
    kept = next(
        float(line.split()[-1]) for line in metrics.splitlines() if line.startswith("softprompt:prefix_cache_bytes{")
    )
    for number in range(1, count):
        setting.store.remove(f"task-{number}")
    vectors = setting.soft_prompt(0).vectors
    return {
        "soft_prompts": count,
        "bytes_before": before,
        "bytes_for_each_registered": (registered - before) / max(1, count - 1),
        "bytes_of_the_vectors_of_one": vectors.numel() * setting.lm.embedding.element_size(),
        "bytes_beyond_prefixes_after_asking_each": asked[0] - registered - kept,
        "bytes_more_after_asking_each_again": asked[1] - asked[0],
        "prefix_bytes": kept,
        "prefix_cap": cap << 20,
    }


# --- soak ------------------------------------------------------------------------------------------------------------


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


# --- the whole -------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="rows with an input field, for their texts")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--num-virtual-tokens", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=32, help="clients at once, and soft prompts")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS[:-1]))
    parser.add_argument("--requests", type=int, default=96, help="in a round of throughput, and of ttft")
    parser.add_argument("--peft-requests", type=int, default=8, help="of these by PEFT, in a round")
    parser.add_argument("--max-tokens", type=int, default=32, help="generated for a request; throughput: half to all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--registered", type=int, default=1000, help="soft prompts of the part memory")
    parser.add_argument("--minutes", type=float, default=10, help="of the part soak")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    data = read_dataset(options.data, fields=("input",), require_target=False)
    texts = [example.fields["input"] for example in data.examples]
    random.Random(0).shuffle(texts)
    parts = {"throughput": throughput, "ttft": ttft, "loading": loading, "memory": memory, "soak": soak}
    found: dict[str, Any] = {}
    for name in options.only:
        with tempfile.TemporaryDirectory() as home:
            lm = FrozenLM.load(options.base, dtype=options.dtype, device="cpu")
            room = lm.window - options.num_virtual_tokens - options.max_tokens - 20
            fitting = [text for text in texts[:4000] if len(lm.tokenizer(text).input_ids) <= room]
            found[name] = asyncio.run(parts[name](Setting(options, lm, Store(Path(home)), fitting)))
            print(f"{name}: {json.dumps(found[name])}", file=sys.stderr)
    document = {
        "ratio": found.get("throughput", {}).get("ratio"),
        **found,
        "base": options.base,
        "num_virtual_tokens": options.num_virtual_tokens,
        "batch_size": options.batch_size,
        "max_tokens": options.max_tokens,
        "dtype": options.dtype,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    if options.json:
        print(json.dumps(document))
    else:
        for key, value in document.items():
            print(f"{key}: {value}")


if __name__ == "__main__":
    main()
