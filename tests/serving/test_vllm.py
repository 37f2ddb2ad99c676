"""Serving through a real vLLM server on the CPU: what a soft prompt gives there is what it gives here."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from softprompt.data.example import Example
from softprompt.exchange.check import TEXTS as CHECKED
from softprompt.exchange.exporting import export
from softprompt.exchange.vllm_request import saved
from softprompt.generation.decoder import generate
from softprompt.model.frozen import FrozenLM
from softprompt.model.request import Request, Sampling
from softprompt.serving.jobs import Limits
from softprompt.soft_prompts.store import Store
from softprompt.tasks.predict import Query, predict
from softprompt.tasks.task import Task
from softprompt.text.spliced import Splicer
from softprompt.tuning.start import initial_vectors
from tests.servers import Running, serving, soft_prompt

pytestmark = pytest.mark.vllm

PYTHON = Path(__file__).parents[2] / ".venv-vllm/bin/python"
BLOCK = 32  # the least that vLLM's attention on the CPU takes
PATIENCE = 900  # seconds for vLLM to start; it compiles nothing, but imports a lot
TEXTS = ("a stirring , funny and finally transporting film", "dull .", "The capital of France is", "Once upon a time")
LABELS = {"positive": ("positive", "great"), "negative": ("negative", "bad", "utterly forgettable")}
ASKED = "<|im_end|>\n<|im_start|>user\n{input}<|im_end|>\n<|im_start|>assistant\n{target}"
TEMPLATES: dict[str, tuple[str, dict[str, tuple[str, ...]] | None, int]] = {
    "fits": ("{soft_prompt}{input}\nLabel: {target}", LABELS, BLOCK),
    "short": ("Review:{soft_prompt} {input}\nLabel: {target}", {"good": ("good",), "poor": ("poor",)}, 5),
    "behind": ("{input}{soft_prompt} {target}", {"yes": ("yes",), "no": ("no", "never")}, 9),
    "writes": ("{soft_prompt}{input} {target}", None, 20),
    "chats": (f"<|im_start|>system\n{{soft_prompt}}{ASKED}", None, 40),
    "chats-too": (f"<|im_start|>system\n{{soft_prompt}}{ASKED}", None, 40),
    "zeros": (f"<|im_start|>system\n{{soft_prompt}}{ASKED}", None, 40),
    "pads": (f"<|im_start|>system\n{'<|endoftext|>' * 40}{{input}}{ASKED.replace('input', 'soft_prompt')}", None, 6),
}
"""The last four go through the chat endpoint; of these, two have the same token ids, as vLLM caches them, over a block:
the token 0, and vectors of zeros."""


def load() -> FrozenLM:
    return FrozenLM.load("smollm2-135m", dtype="fp32", device="cpu")


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a vLLM server."""
    assert PYTHON.exists(), "there is no .venv-vllm; run make test-vllm, which makes it"
    folder = load().tokenizer.name_or_path
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--served-model-name", "base"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--enable-prompt-embeds", "--enable-prompt-tokens-details", "--max-model-len", "1024"]
    command += ["--block-size", str(BLOCK)]
    cpu = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    log = tmp_path_factory.mktemp("vllm") / "log"
    url = f"http://127.0.0.1:{port}"
    with (
        log.open("wb") as file,
        subprocess.Popen(
            list(map(str, command)), stdout=file, stderr=file, env=os.environ | cpu, start_new_session=True
        ) as process,
    ):
        try:
            _wait(url, process, log)
            yield url
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + PATIENCE
    while True:
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        assert process.poll() is None, log.read_text(errors="replace")[-5000:]
        assert time.monotonic() < until, log.read_text(errors="replace")[-5000:]
        time.sleep(1)


@pytest.fixture(scope="module")
def server(vllm: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    store, lm = Store(tmp_path_factory.mktemp("store")), load()
    for number, (name, (template, labels, length)) in enumerate(TEMPLATES.items()):
        made = soft_prompt(lm, name, template, labels, length=length)
        vectors = initial_vectors(lm, length, init="vocab", seed=number)
        store.save(replace(made, vectors=torch.zeros_like(vectors) if name == "zeros" else vectors))
    with serving(store.home, limits=Limits(rows=16, seconds=600), upstreams=[vllm], load=load) as running:
        running.http.timeout = httpx.Timeout(600)
        yield running


def alone(server: Running, name: str, text: str, tokens: int) -> str:
    soft = server.catalog.store.load(name)
    task, example = Task.of(server.lm, soft), Example({"input": text}, None)
    if task.verbalizer is not None:
        return predict([Query(task, example, soft.vectors)])[0].text
    request = task.open_request(example, tokens)
    (found,) = generate(server.lm, [request], [soft.vectors], Sampling(max_new_tokens=tokens))
    return found.text.removeprefix(" ") if soft.template.endswith(" {target}") else found.text


def bare(server: Running, ids: list[int], tokens: int) -> str:
    return generate(server.lm, [Request(tuple(ids), 0)], (), Sampling(max_new_tokens=tokens))[0].text


def test_a_mixed_batch_is_one_request_at_a_time(server: Running) -> None:
    """Completions and chat, of every soft prompt and of the bare base model, all at once, streamed and whole."""
    tokenizer = server.lm.tokenizer
    expected, asked = [], []
    for text in TEXTS:
        for name in TEMPLATES:
            expected.append(alone(server, name, text, 12))
            asked.append(("/v1/completions", {"model": name, "prompt": text, "max_tokens": 12}))
        message = [{"role": "user", "content": text}]
        expected.append(alone(server, "writes", text, 12))
        asked.append(("/v1/chat/completions", {"model": "writes", "messages": message, "max_tokens": 12}))
        rendered = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        expected.append(bare(server, tokenizer(rendered, add_special_tokens=False).input_ids, 12))
        asked.append(("/v1/chat/completions", {"model": "smollm2-135m", "messages": message, "max_tokens": 12}))
        expected.append(bare(server, tokenizer(text).input_ids, 12))
        asked.append(("/v1/completions", {"model": "smollm2-135m", "prompt": text, "max_tokens": 12}))

    def whole(place: tuple[str, dict[str, Any]]) -> str:
        choice = server.post(*place)["choices"][0]
        return str(choice["message"]["content"] if "message" in choice else choice["text"])

    def streamed(place: tuple[str, dict[str, Any]]) -> str:
        choices = [chunk["choices"][0] for chunk in server.stream(*place)]
        return "".join(choice["delta"]["content"] if "delta" in choice else choice["text"] for choice in choices)

    with ThreadPoolExecutor(len(asked)) as pool:
        assert list(pool.map(whole, asked)) == expected
        assert list(pool.map(streamed, asked)) == expected
    assert len(set(expected)) > len(TEXTS)


def test_no_sequence_gets_the_cached_prefix_of_another(
    server: Running, vllm: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Soft prompts, others of the same length, and plain tokens over the same places, again and again."""
    tokenizer = server.lm.tokenizer
    names = ["chats", "chats-too", "zeros", "pads", "writes"]
    asked = [(name, text) for text in TEXTS for name in names]
    expected = [alone(server, name, text, 12) for name, text in asked]
    bodies: list[dict[str, Any]] = [{"model": name, "prompt": text, "max_tokens": 12} for name, text in asked]
    before, behind = TEMPLATES["zeros"][0].removesuffix("{target}").split("{soft_prompt}")
    for text in TEXTS:
        ids = [*tokenizer(before).input_ids, *[0] * 40, *tokenizer(behind.replace("{input}", text)).input_ids]
        expected.append(bare(server, ids, 12))
        bodies.append({"model": "smollm2-135m", "prompt": ids, "max_tokens": 12})

    def text_of(body: dict[str, Any]) -> str:
        return str(server.post("/v1/completions", body)["choices"][0]["text"])

    def chats() -> float:
        lines = httpx.get(f"{vllm}/metrics").text.splitlines()
        found = (line for line in lines if line.startswith("http_requests_total{") and "/v1/chat/completions" in line)
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)

    before_all = chats()
    assert [text_of(body) for body in bodies] == expected
    assert chats() - before_all == 4 * len(TEXTS)  # all but those of "writes" and of the base model
    assert [text_of(body) for body in reversed(bodies)] == expected[::-1]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(text_of, bodies)) == expected
    assert not [message for message in caplog.messages if "whole sequences instead of messages" in message]
    answer = server.post("/v1/completions", bodies[0])
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= BLOCK


def test_without_a_salt_vllm_takes_zeros_for_a_token(server: Running, vllm: str) -> None:
    """https://github.com/vllm-project/vllm/issues/56655: when this fails, the salt may go."""
    splicer = Splicer(server.lm.tokenizer)

    def text_of(name: str, salt: dict[str, str]) -> str:
        soft = server.catalog.store.load(name)
        task, example = Task.of(server.lm, soft), Example({"input": TEXTS[0]}, None)
        request = task.open_request(example, 12)
        splice = splicer.splice(task.template, example.fields, request.ids)
        data = saved(server.lm.embed(splice.content(request.ids), soft.vectors))
        body = {"model": "base", "messages": splice.conversation(data), "max_tokens": 12, "temperature": 0, **salt}
        answer = httpx.post(f"{vllm}/v1/chat/completions", json=body, timeout=600)
        return str(answer.json()["choices"][0]["message"]["content"])

    ours = {name: alone(server, name, TEXTS[0], 12) for name in ("zeros", "pads")}
    assert {name: text_of(name, {"cache_salt": name}) for name in ours} == ours
    assert {name: text_of(name, {}) for name in ours} != ours


@pytest.mark.parametrize("template", ["chats", "writes"])
def test_exported_requests_give_our_answers(server: Running, vllm: str, tmp_path: Path, template: str) -> None:
    soft = server.catalog.store.load(template)
    export(server.lm, soft, "vllm", tmp_path / "out", checked=False)
    for file, path in (("request.json", "completions"), ("chat.json", "chat/completions")):
        if template == "chats" or file == "request.json":
            body = json.loads((tmp_path / "out" / file).read_text()) | {"model": "base", "max_tokens": 12}
            choice = httpx.post(f"{vllm}/v1/{path}", json=body, timeout=600).json()["choices"][0]
            found = choice["text"] if "text" in choice else choice["message"]["content"]
            assert found.strip() == alone(server, template, CHECKED[0], 12).strip()
    assert (tmp_path / "out" / "chat.json").exists() == (template == "chats")


@pytest.mark.parametrize("base_only", [False, True])
def test_labels_have_the_probabilities_of_predict(server: Running, base_only: bool) -> None:
    names = [name for name, (_, labels, _) in TEMPLATES.items() if labels]
    answer = server.post("/v1/classify", {"model": names, "input": list(TEXTS), "base_only": base_only})
    differences = []
    for entry in answer["data"]:
        soft = server.catalog.store.load(entry["model"])
        task, example = Task.of(server.lm, soft), Example({"input": TEXTS[entry["index"]]}, None)
        query = Query(task.without_soft_prompt(), example) if base_only else Query(task, example, soft.vectors)
        (expected,) = predict([query])
        assert entry["label"] == expected.text
        assert expected.probabilities is not None
        differences += [abs(expected.probabilities[label] - value) for label, value in entry["probabilities"].items()]
    assert len(differences) == 2 * len(TEXTS) * len(names)
    assert max(differences) < 1e-3


def test_drawn_texts_are_the_same_streamed_and_whole(server: Running) -> None:
    body = {
        "model": "writes",
        "prompt": TEXTS[0],
        "max_tokens": 16,
        "temperature": 1.0,
        "top_p": 0.9,
        "seed": 3,
        "n": 3,
    }
    whole = [choice["text"] for choice in server.post("/v1/completions", body)["choices"]]
    texts = ["", "", ""]
    for chunk in server.stream("/v1/completions", body):
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == whole
    assert len(set(whole)) == 3


def test_log_probabilities_are_the_models_while_labels_are_scored(server: Running) -> None:
    soft = server.catalog.store.load("writes")
    task = Task.of(server.lm, soft)
    request = task.open_request(Example({"input": TEXTS[1]}, None), 12)
    (written,) = generate(server.lm, [request], [soft.vectors], Sampling(max_new_tokens=12))
    with torch.no_grad():
        embedded = server.lm.embed((*request.ids, *written.ids), soft.vectors)
        logits = server.lm.model(inputs_embeds=embedded[None], use_cache=False).logits[0, -len(written.ids) - 1 :]
    logprobs = logits[:-1].float().log_softmax(dim=-1)
    body = {"model": "writes", "prompt": TEXTS[1], "max_tokens": 12, "logprobs": 4}
    label = {"model": ["fits", "short"], "input": list(TEXTS)}
    with ThreadPoolExecutor(6) as pool:
        others = [pool.submit(server.post, "/v1/classify", label) for _ in range(3)]
        answers = [pool.submit(server.post, "/v1/completions", body) for _ in range(3)]
        found = [answer.result()["choices"][0]["logprobs"] for answer in answers]
        labelled = [answer.result()["data"] for answer in others]
    own = [float(row[token]) for row, token in zip(logprobs, written.ids, strict=True)]
    for told in found:
        assert told["token_logprobs"][: len(own)] == pytest.approx(own, abs=1e-3)
        for row, listed in zip(logprobs, told["top_logprobs"], strict=False):
            assert sorted(listed.values(), reverse=True) == pytest.approx(row.topk(4).values.tolist(), abs=1e-3)
    for others_found in labelled[1:]:
        for one, other in zip(labelled[0], others_found, strict=True):
            assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-3)


def test_a_prefix_that_fills_the_blocks_is_cached_there(server: Running) -> None:
    cached = {}
    for name in ("fits", "writes", "behind"):
        for text in ("first of all " * 9, "then something else " * 9):
            answer = server.post("/v1/completions", {"model": name, "prompt": text, "max_tokens": 1})
            cached[name] = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached == {"fits": BLOCK, "writes": 0, "behind": 0}


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_stop_string_or_a_client_that_goes_ends_the_request_there(server: Running, vllm: str) -> None:
    def running() -> float:
        lines = httpx.get(f"{vllm}/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("vllm:num_requests_running{"))

    body = {"model": "writes", "prompt": TEXTS[3], "max_tokens": 500, "temperature": 2.0, "seed": 1}
    with server.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        lines = answer.iter_lines()  # which would end the request if nothing held it
        next(lines)
        until(lambda: running() == 1)
    until(lambda: running() == 0)
    whole = alone(server, "writes", TEXTS[0], 24)
    stop = whole[len(whole) // 2 :][:4]
    stopped = server.post("/v1/completions", {"model": "writes", "prompt": TEXTS[0], "max_tokens": 24, "stop": stop})
    assert stopped["choices"][0]["text"] == whole[: whole.find(stop)]


def test_an_input_that_vllm_could_not_take_is_refused_here(server: Running) -> None:
    assert server.http.get("/v1/models/smollm2-135m").json()["max_model_len"] == 1024
    error = server.post("/v1/completions", {"model": "writes", "prompt": "the film " * 1000}, 400)["error"]
    assert error["code"] == "context_length_exceeded"
