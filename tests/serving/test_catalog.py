"""What a server holds in memory of many soft prompts, and what it reads from their files again."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from softprompt.data.example import Example
from softprompt.generation.decoder import generate
from softprompt.model.request import Sampling
from softprompt.serving import catalog
from softprompt.serving.catalog import Catalog, content_of
from softprompt.serving.openai_api import ApiError, Message
from softprompt.serving.served import Wish
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.soft_prompts.store import Store
from softprompt.tasks.task import Task
from tests.servers import Running, fill, make_lm, serving, soft_prompt

TEXT = {"input": "a good film"}


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for one soft prompt: that which was asked last."""
    monkeypatch.setattr(catalog, "HELD_BYTES", 1)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    found = Store(tmp_path)
    fill(found, make_lm())
    return found


@pytest.fixture
def running(store: Store, little: None) -> Iterator[Running]:
    with serving(store.home, allow_loading=True) as found:
        yield found


def text_of(running: Running, name: str) -> Any:
    body = {"model": name, "prompt": TEXT["input"], "max_tokens": 6, "temperature": 0}
    answer = running.post("/v1/completions", body)
    return answer["choices"][0]["text"], answer["system_fingerprint"]


def test_what_is_read_again_is_the_same(store: Store, little: None) -> None:
    found = Catalog(make_lm(), store, 64)
    found.sync()
    first = {name: found.get(name) for name in store.names()}
    for name, before in first.items():
        again = found.get(name)
        assert again is not before
        assert again.vectors is not None
        assert before.vectors is not None
        assert again.vectors.equal(before.vectors)
        assert (again.content, again.card) == (before.content, before.card)
        assert found.get(name) is again  # asked last


def test_vectors_of_soft_prompts_that_nobody_asks_are_not_in_memory(store: Store, monkeypatch: Any) -> None:
    lm = make_lm()
    size = 20 * lm.hidden_size * 4
    monkeypatch.setattr(catalog, "HELD_BYTES", 3 * (size + catalog.BESIDE_VECTORS))
    found = Catalog(lm, store, 64)
    alive = []
    for number in range(12):
        name = f"more-{number}"
        store.save(soft_prompt(lm, name, "{soft_prompt}{input}{target}", length=20, seed=number))
        model = found.load(name, store.path(name))
        assert model.vectors is not None
        assert model.vectors.nbytes == size
        alive.append(weakref.ref(model.vectors))
        del model
    gc.collect()
    assert [vectors() is not None for vectors in alive] == [False] * 9 + [True] * 3
    found.get("more-9")  # now the one asked last; the next to go is more-10
    found.get("more-0")
    gc.collect()
    assert [vectors() is not None for vectors in alive] == [False] * 9 + [True, False, True]
    assert [entry.name for entry in found.entries()[1:]] == sorted(f"more-{number}" for number in range(12))


def test_a_job_keeps_the_vectors_it_began_with(store: Store, little: None) -> None:
    found = Catalog(make_lm(), store, 64)
    found.sync()
    model = found.get("write")
    job = model.write(TEXT, Wish()).job
    store.save(soft_prompt(make_lm(), "write", "{soft_prompt}{input} {target}", seed=9), overwrite=True)
    found.get("film")
    after = found.get("write")
    assert after.vectors is not None
    assert model.vectors is not None
    assert job.vectors is model.vectors
    assert not after.vectors.equal(model.vectors)
    assert job.content == model.content != after.content
    assert found.entry("write").content == after.content


def test_a_damaged_or_missing_file_is_said_when_it_is_needed(store: Store, little: None) -> None:
    found = Catalog(make_lm(), store, 64)
    found.sync()
    found.get("write")
    store.path("write").write_bytes(b"half a file")
    found.get("write")  # still in memory
    found.get("film")
    with pytest.raises(ApiError) as refused:
        found.get("write")
    assert (refused.value.status, refused.value.code) == (503, "not_readable")
    assert refused.value.message.startswith("'write' cannot be read again: ")
    store.path("film").unlink()
    found.get("sst2")
    with pytest.raises(ApiError, match="'film' cannot be read again: There is no soft prompt at"):
        found.get("film")
    found.sync()
    with pytest.raises(ApiError) as gone:
        found.get("film")
    assert gone.value.status == 404


def save(path: Path, seed: int) -> None:
    soft_prompt(make_lm(), "write", "{soft_prompt}{input} {target}", seed=seed).save(path)


def content_at(path: Path) -> str:
    return content_of(SoftPrompt.load(path), 64)


def test_what_is_served_follows_its_own_file_and_no_other_of_its_name(store: Store, tmp_path: Path) -> None:
    found, own = Catalog(make_lm(), store, 64), tmp_path / "elsewhere" / "write.safetensors"
    save(own, 21)
    found.load("write", own)
    (refused,) = (error for _, error in found.sync() if error is not None)  # the store has another one
    assert str(own) in str(refused)
    assert str(store.path("write")) in str(refused)
    assert found.entry("write").content == content_at(own) != content_at(store.path("write"))
    save(store.path("write"), 22)
    assert len(found.sync()) == 1
    assert found.sync() == []
    assert found.entry("write").content == content_at(own)
    save(own, 23)
    assert found.sync() == [("reloaded write", None)]
    assert found.entry("write").content == content_at(own)
    own.unlink()
    assert [what for what, _ in found.sync()] == ["unloaded write, whose file has gone"]
    assert found.sync() == []
    save(store.path("write"), 24)
    assert found.sync() == [("loaded write", None)]


def test_only_the_files_that_were_chosen_are_followed(store: Store, tmp_path: Path) -> None:
    found, own = Catalog(make_lm(), store, 64), tmp_path / "elsewhere" / "write.safetensors"
    files = {"write": own, "film": store.path("film")}
    assert found.sync(files) == [("loaded film", None)]
    save(own, 21)
    assert found.sync(files) == [("loaded write", None)]
    own.unlink()
    found.sync(files)
    save(store.path("write"), 22)
    assert found.sync(files) == []
    save(own, 23)
    assert found.sync(files) == [("loaded write", None)]
    assert found.entry("write").content == content_at(own)
    assert [entry.name for entry in found.entries()] == ["tiny", "film", "write"]


@pytest.mark.parametrize("elsewhere", [False, True])
def test_what_was_unloaded_stays_away_until_its_file_changes(store: Store, tmp_path: Path, elsewhere: bool) -> None:
    found = Catalog(make_lm(), store, 64)
    found.sync()
    if elsewhere:
        save(tmp_path / "elsewhere" / "other.safetensors", 21)
        found.load("write", tmp_path / "elsewhere" / "other.safetensors")
    save(store.path("write"), 22)  # nobody has looked at it when it is unloaded
    found.unload("write")
    assert found.sync() == []
    save(store.path("write"), 23)
    assert found.sync() == [("loaded write", None)]
    assert found.entry("write").content == content_at(store.path("write"))


def test_a_file_under_two_names_is_followed_under_both(store: Store) -> None:
    found = Catalog(make_lm(), store, 64)
    found.sync()
    found.load("twin", store.path("write"))
    save(store.path("write"), 31)
    assert sorted(found.sync()) == [("reloaded twin", None), ("reloaded write", None)]
    assert found.entry("twin").content == found.entry("write").content == content_at(store.path("write"))


def test_a_file_that_cannot_be_loaded_is_told_once(store: Store) -> None:
    found = Catalog(make_lm(), store, 64)
    found.sync()
    store.path("write").write_bytes(b"half a file")
    store.path("tiny").write_bytes(store.path("film").read_bytes())  # the base model's name
    assert {what for what, error in found.sync() if error is not None} == {"write", "tiny"}
    assert found.sync() == []


def test_a_server_with_little_memory_answers_as_the_base_model_itself(running: Running, store: Store) -> None:
    soft, lm = store.load("write"), running.lm
    request = Task.of(lm, soft).open_request(Example(TEXT, None), 1)
    expected = generate(lm, [request], [soft.vectors], Sampling(max_new_tokens=6))[0].text.removeprefix(" ")
    body = {"model": ["film", "sst2"], "input": TEXT["input"]}
    labelled = [(entry["label"], entry["probabilities"]) for entry in running.post("/v1/classify", body)["data"]]
    for _ in range(2):
        assert text_of(running, "write")[0] == expected
        again = running.post("/v1/classify", body)["data"]
        assert [(entry["label"], entry["probabilities"]) for entry in again] == labelled


def test_a_file_changed_meanwhile_is_answered_with_and_said(running: Running, store: Store) -> None:
    before = text_of(running, "write")
    store.save(soft_prompt(running.lm, "write", "{soft_prompt}{input} {target}", seed=77), overwrite=True)
    assert text_of(running, "write") == before  # in memory
    running.post("/v1/classify", {"model": "film", "input": TEXT["input"]})
    after = text_of(running, "write")
    assert after != before
    card = running.http.get("/v1/models/write").json()
    assert after[1] == f"sp-{card['content_hash'][:12]}"
    assert running.post("/v1/load_soft_prompt", {"name": "write", "load_inplace": True}) == card


def test_a_token_that_the_base_model_does_not_know_is_the_clients_mistake(store: Store) -> None:
    lm = make_lm()
    lm.tokenizer.add_tokens(["worse"])
    lm.tokenizer_fingerprint = make_lm().tokenizer_fingerprint  # of the soft prompts, which never saw such a text
    found = Catalog(lm, store, 64)
    found.sync()
    asked: list[Callable[[], object]] = [
        lambda: found.get("sst2").label({"input": "much worse"}, truncate=True),
        lambda: found.base.write_raw("much worse", Wish()),
        lambda: found.converse(found.base, [Message(role="user", content="much worse")], Wish()),
    ]
    for ask in asked:
        with pytest.raises(ApiError) as error:
            ask()
        assert error.value.status == 400
        assert "found 'worse', number 320 of its tokenizer" in str(error.value)


def test_one_of_several_fields_may_be_blank(running: Running) -> None:
    """As in the rows that a soft prompt was tuned on, say instructions without further input."""
    blank, text = {"premise": "it rains", "hypothesis": ""}, {"premise": " ", "hypothesis": "\n"}
    answer = running.post("/v1/completions", {"model": "nli", "fields": blank, "max_tokens": 2})
    assert answer["choices"][0]["finish_reason"] in ("stop", "length")
    refused = running.post("/v1/completions", {"model": "nli", "fields": text}, status=400)
    assert "text for {premise}, {hypothesis}, found only blanks" in refused["error"]["message"]
