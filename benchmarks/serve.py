"""The server under load: many soft prompts against one, against PEFT switching adapters, against none; loading, memory,
and a long mixed load with clients that misbehave.

    python -m benchmarks.serve --data sst2/test.jsonl --num-virtual-tokens 100 --batch-size 32 --dtype bf16 --json
    python -m benchmarks.serve --data sst2/test.jsonl --only soak --minutes 10 --dtype fp32 --json

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
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.server import Setting, complete, first_token, load
from benchmarks.soak import soak
from softprompt.data.reading import read_dataset
from softprompt.generation.decoder import generate as generate_texts
from softprompt.model.frozen import FrozenLM
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.soft_prompts.store import Store
from softprompt.text.tokens import SOFT

PARTS = ("throughput", "ttft", "loading", "memory", "soak")


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
