"""``GET /v1/soft_prompts/NAME/inspection``: the views without a model, from a thread of its own, each content once."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from softprompt.inspection.answers import document
from softprompt.inspection.report import inspect_vectors
from softprompt.inspection.vocabulary import Vocabulary
from softprompt.serving import inspector
from softprompt.tasks.task import Task
from tests.servers import Running, serving


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    with serving(tmp_path, api_key="sesame") as running:
        yield running


def look(server: Running, name: str, status: int = 200) -> Any:
    answer = server.http.get(f"/v1/soft_prompts/{name}/inspection")
    assert answer.status_code == status, answer.text
    return answer.json()


def test_it_is_what_inspect_says_without_a_model(server: Running) -> None:
    """With a start that the record makes again, too."""
    store = server.catalog.store
    record = {"num_virtual_tokens": 7, "init": "vocab", "init_text": None, "seed": 0}
    store.save(replace(store.load("sst2"), name="begun", training=record))
    server.catalog.load("begun", store.path("begun"))
    vocabulary = Vocabulary.of(server.lm)
    for name in ("sst2", "begun"):
        found, stored = look(server, name), store.load(name)
        expected = document(inspect_vectors(stored, Task.of(server.lm, stored), vocabulary))
        assert (found.pop("id"), found.pop("object")) == (name, "soft_prompt.inspection")
        assert found.pop("content_hash") == server.catalog.get(name).content
        assert found == json.loads(json.dumps({key: expected[key] for key in found}))
        assert set(found) >= {"warning", "answers", "nearest", "words", "norms", "map"}
        assert (found["added"] is None) == (name == "sst2")
    assert server.catalog.get("sst2").content == server.catalog.get("begun").content  # told apart by their starts


def test_what_cannot_be_looked_into_is_refused(server: Running) -> None:
    assert look(server, "tiny", 400)["error"]["message"] == "Expected a soft prompt, found the base model 'tiny'."
    assert look(server, "none", 404)["error"]["code"] == "model_not_found"
    bare = httpx.get(f"{server.url}/v1/soft_prompts/sst2/inspection")
    assert bare.status_code == 401
    stored = server.catalog.store.load("sst2")
    prefix = torch.zeros(2, *server.lm.trained.kv_shape)
    server.catalog.store.save(replace(stored, name="kv", vectors=prefix, parametrisation="prefix"))
    server.catalog.load("kv", server.catalog.store.path("kv"))
    assert look(server, "kv", 400)["error"]["message"] == (
        "Reading a soft prompt needs vectors of the embedding width, but 'kv' is a trained KV prefix, which has none; "
        "inspect one of another parametrisation."
    )


def test_a_file_that_changed_since_it_was_loaded_is_not_shown_for_it(server: Running) -> None:
    store = server.catalog.store
    stored = store.load("sst2")
    store.save(replace(stored, vectors=stored.vectors + 1), overwrite=True)
    assert look(server, "sst2", 409)["error"]["message"] == (
        "The file of 'sst2' was changed since it was loaded; load it again."
    )
    server.catalog.load("sst2", store.path("sst2"))
    look(server, "sst2")
    path = store.path("sst2")
    path.unlink()
    assert look(server, "sst2", 400)["error"]["message"].startswith(f"There is no soft prompt at {path}; ")


def test_others_are_answered_meanwhile_and_nothing_is_computed_twice(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked, may_go_on = [], threading.Event()

    def slow(soft_prompt: Any, *rest: Any) -> Any:
        looked.append(soft_prompt.name)
        assert may_go_on.wait(60)
        return inspect_vectors(soft_prompt, *rest)

    monkeypatch.setattr(inspector, "inspect_vectors", slow)
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(look, server, "film") for _ in range(3)]
        until = time.monotonic() + 60
        while not looked and time.monotonic() < until:
            time.sleep(0.005)
        assert server.post("/v1/classify", {"model": "sst2", "input": "film"})["data"]
        assert not any(answer.done() for answer in answers)
        may_go_on.set()
        assert [answer.result() for answer in answers] == [look(server, "film")] * 3
    assert looked == ["film"]
    monkeypatch.setattr(inspector, "MOST", 1)
    for name in ("sst2", "film"):
        look(server, name)
    assert looked == ["film", "sst2", "film"]  # only the last is kept
