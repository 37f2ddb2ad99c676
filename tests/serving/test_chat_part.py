"""Serving through vLLM's chat endpoint: only the soft prompt is sent as embeddings where that gives the same tokens.
And no sequence gets the cached prefix of another one."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt.data.example import Example
from softprompt.generation.decoder import generate
from softprompt.model.request import Request, Sampling
from softprompt.soft_prompts.store import Store
from softprompt.tasks.task import Task
from tests.conftest import make_tokenizer
from tests.fake_vllm import Fake, fake_vllm
from tests.servers import CHAT, Running, make_lm, serving, soft_prompt

SYSTEM = "system:\n{soft_prompt}</s>user:\n{input}</s>assistant:\n{target}"
PADS = "system:\n<pad><pad><pad><pad><pad><pad><pad><pad>{input}</s>user:\n{soft_prompt}</s>assistant:\n{target}"
LENGTH = 8
PROMPTS = {
    "one": (SYSTEM, 1.0),
    "other": (SYSTEM, 1.0),
    "loud": (SYSTEM, 4.0),
    "zeros": (SYSTEM, 0.0),
    "pads": (PADS, 1.0),
    "beside": ("system:\nbe{soft_prompt}brief</s>user:\nText: {input}</s>assistant:\n{target}", 1.0),
    "within": ("user:\n{soft_prompt}{input}</s>assistant:\n{target}", 1.0),
    "plain": ("{soft_prompt}{input}\nAnswer:{target}", 1.0),
    "labels": (SYSTEM, 1.0),
}
AS_MESSAGES = ("one", "other", "loud", "zeros", "pads", "beside")
TEXTS = ("a dull , badly written mess", "one of the best movies", " the plot\n", "a")
WHOLE = " gets whole sequences instead of messages: "


def chat_tokenizer(template: str = CHAT) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@contextmanager
def gateway(folder: Path, **options: Any) -> Iterator[tuple[Running, Fake]]:
    """A server, and the one behind it, which is a stand-in of vLLM."""
    store, lm = Store(folder), make_lm()
    for seed, (name, (template, scale)) in enumerate(PROMPTS.items()):
        labels = {"good": ("great",), "bad": ("awful",)} if name == "labels" else None
        made = soft_prompt(lm, name, template, labels, length=LENGTH, seed=seed)
        store.save(replace(made, vectors=scale * made.vectors if scale else torch.zeros_like(made.vectors)))
    options.setdefault("tokenizer", chat_tokenizer())
    with fake_vllm(**options) as fake, serving(folder, upstreams=[fake.url]) as running:
        fake.bodies.clear()
        yield running, fake


def ask(running: Running, name: str, text: str | list[int], **more: Any) -> str:
    body: dict[str, Any] = {"model": name, "prompt": text, "max_tokens": 8, **more}
    return str(running.post("/v1/completions", body)["choices"][0]["text"])


def alone(running: Running, name: str, text: str | list[int], tokens: int = 8) -> str:
    """The answer by the engine, with nothing else in its cache."""
    prompts: list[torch.Tensor] = []
    if isinstance(text, str):
        soft = running.catalog.store.load(name)
        request, prompts = Task.of(running.lm, soft).open_request(Example({"input": text}, None), 8), [soft.vectors]
    else:
        request = Request(tuple(text), 0)
    return generate(running.lm, [request], prompts, Sampling(max_new_tokens=tokens))[0].text


def plain_ids(running: Running, text: str) -> list[int]:
    """Tokens over the same places: those that stand around a soft prompt, and the token 0 in its place."""
    before, behind = SYSTEM.removesuffix("{target}").split("{soft_prompt}")
    tokenizer = running.lm.tokenizer
    around = [tokenizer(piece).input_ids for piece in (before, behind.replace("{input}", text))]
    return [*around[0], *[0] * LENGTH, *around[1]]


def test_only_the_soft_prompt_is_embedded_where_the_tokens_are_the_same(tmp_path: Path) -> None:
    with gateway(tmp_path) as (running, fake):
        for name in AS_MESSAGES:
            for text in TEXTS:
                assert ask(running, name, text, max_tokens=3) == alone(running, name, text, 3)
        assert len(fake.bodies) == len(AS_MESSAGES) * len(TEXTS)
        assert all("messages" in body for body in fake.bodies)
        first, beside = fake.bodies[0], fake.bodies[-4]
    part = [{"type": "prompt_embeds"}]  # the stand-in takes the data out
    assert first["messages"] == [{"role": "system", "content": part}, {"role": "user", "content": TEXTS[0]}]
    assert beside["messages"][1] == {"role": "user", "content": f"Text: {TEXTS[0]}"}
    salts = [{body["cache_salt"] for body in fake.bodies[start : start + 4]} for start in range(0, 24, 4)]
    assert [len(salt) for salt in salts] == [1, 1, 1, 1, 4, 1]  # behind a text, the place differs
    assert len(set.union(*salts)) == 9
    assert (first["temperature"], first["max_tokens"], first["stop_token_ids"]) == (0, 3, [1])


def test_a_stream_and_drawn_texts_are_those_of_whole_sequences(tmp_path: Path) -> None:
    with gateway(tmp_path / "chat") as (running, fake):
        body = {"model": "one", "prompt": TEXTS[0], "max_tokens": 8, "temperature": 1.2, "seed": 5, "n": 2}
        found = [choice["text"] for choice in running.post("/v1/completions", body)["choices"]]
        texts = ["", ""]
        for chunk in running.stream("/v1/completions", body):
            texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
        assert all("messages" in body for body in fake.bodies)
    with gateway(tmp_path / "whole", tokenizer=None) as (running, _):
        assert [choice["text"] for choice in running.post("/v1/completions", body)["choices"]] == found == texts


@pytest.mark.parametrize(
    ("name", "text", "more"),
    [
        ("within", TEXTS[0], {}),  # a line break would stand between the two
        ("plain", TEXTS[0], {}),
        ("one", "</s>", {}),  # vLLM takes it for a special token
        ("one", "<prompt_embeds>", {}),
        ("one", TEXTS[0], {"logprobs": 2}),
    ],
)
def test_all_else_is_embedded_whole(tmp_path: Path, name: str, text: str, more: dict[str, Any]) -> None:
    with gateway(tmp_path) as (running, fake):
        assert ask(running, name, text, **more) == alone(running, name, text)
        ask(running, "labels", text)
        assert not any("messages" in body for body in fake.bodies)
        assert ask(running, "one", "a") == alone(running, "one", "a")
        assert "messages" in fake.bodies[-1]


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        (chat_tokenizer("{{ 'x' }}" + CHAT), "its tokens of them are not ours"),
        (None, "Unsupported chat content part type: 'prompt_embeds'"),
    ],
)
def test_a_server_that_makes_other_tokens_gets_whole_sequences(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, tokenizer: Any, reason: str
) -> None:
    with gateway(tmp_path, tokenizer=tokenizer) as (running, fake):
        for text in TEXTS[:2]:
            assert ask(running, "one", text) == alone(running, "one", text)
        assert "messages" not in fake.bodies[-1]
    assert [message for message in caplog.messages if WHOLE in message] == [
        f"the upstream {fake.url}{WHOLE}{reason}",
    ]


def interleaved(running: Running) -> list[tuple[str, str | list[int]]]:
    """Soft prompts, others of the same length, and plain tokens over the same places, each twice."""
    names = ("one", "other", "zeros", "pads", "within")
    asked: list[tuple[str, str | list[int]]] = [(name, text) for text in TEXTS[:2] for name in names]
    asked += [("tiny", plain_ids(running, text)) for text in TEXTS[:2]]
    return [*asked, *reversed(asked)]


@pytest.mark.parametrize("keys_rows", [True, False])
def test_no_sequence_gets_the_cached_prefix_of_another(tmp_path: Path, keys_rows: bool) -> None:
    with gateway(tmp_path, block=4, keys_rows=keys_rows) as (running, fake):
        asked = interleaved(running)
        expected = [alone(running, *one) for one in asked[: len(asked) // 2]]
        assert [ask(running, *one) for one in asked] == [*expected, *reversed(expected)]
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(lambda one: ask(running, *one), asked[: len(expected)])) == expected
        fake.blocks.clear()
        ask(running, "one", TEXTS[0])
        ask(running, "one", TEXTS[1])
        assert fake.cached >= LENGTH  # the soft prompt was found
    assert len(set(expected)) > len(TEXTS)


@pytest.mark.parametrize("keys_rows", [True, False])
def test_without_the_salt_they_would(tmp_path: Path, keys_rows: bool) -> None:
    with gateway(tmp_path, block=4, keys_rows=keys_rows, keys_salt=False) as (running, _):
        asked = interleaved(running)
        wrong = {name for name, text in asked if ask(running, name, text) != alone(running, name, text)}
    assert wrong if keys_rows else wrong & {"one", "other"}


def test_a_vector_of_zeros_is_no_token(tmp_path: Path) -> None:
    """What the two rest on: zeros and the token 0 give other answers."""
    with gateway(tmp_path) as (running, _):
        ids = plain_ids(running, TEXTS[0])
        assert not torch.any(running.catalog.store.load("zeros").vectors)
        assert alone(running, "zeros", TEXTS[0]) != alone(running, "tiny", ids)
