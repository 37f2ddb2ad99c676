"""Ensembles over HTTP against the library's own, and against the probabilities of each member over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from softprompt.data.example import Example
from softprompt.errors import ConfigError, StoreError
from softprompt.serving.jobs import Limits
from softprompt.serving.openai_api import ApiError
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tasks.ensemble import Ensemble
from tests.servers import Running, serving
from tests.tasks.test_ensemble import members

TEXTS = ("a stirring , funny film", "dull", "the worst of the year")
NAMES = ["seed0", "seed1", "seed2"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("store"), limits=Limits(rows=6, waiting=128)) as running:
        for one in members(running.lm):
            running.catalog.load(one.name, running.catalog.store.save(one))
        running.catalog.join("films", NAMES)
        running.catalog.join("voted", NAMES, "majority")
        yield running


def expected(server: Running, vote: str) -> list[dict[str, float]]:
    several = [SoftPrompt.load(server.catalog.store.path(name)) for name in NAMES]
    rows = [Example({"input": text}, None) for text in TEXTS]
    return [one.probabilities or {} for one in Ensemble.of(server.lm, several, vote).predict(rows)]


@pytest.mark.parametrize(("name", "vote"), [("films", "mean"), ("voted", "majority")])
def test_classify_gives_the_joint_probabilities_and_each_answer(server: Running, name: str, vote: str) -> None:
    found = server.post("/v1/classify", {"model": [name, *NAMES], "input": list(TEXTS)})
    for number, wanted in enumerate(expected(server, vote)):
        together, *alone = found["data"][4 * number : 4 * number + 4]
        assert together["model"] == name
        assert together["probabilities"] == pytest.approx(wanted, abs=1e-4)
        assert together["label"] == max(wanted, key=wanted.__getitem__)
        assert together["members"] == {one["model"]: one["label"] for one in alone}
        assert together["disagreement"] == pytest.approx(1 / 3)
        assert "members" not in alone[0]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_writing_gives_the_joint_label(server: Running, path: str) -> None:
    asked: dict[str, Any] = {"model": "films", "n": 2, "logprobs": True}
    asked |= {"prompt": TEXTS[0], "logprobs": 2}
    if "chat" in path:
        asked = {"model": "films", "messages": [{"role": "user", "content": TEXTS[0]}], "n": 2}
    found = server.post(path, asked)
    (wanted, *_) = expected(server, "mean")
    texts = [one["text"] if "text" in one else one["message"]["content"] for one in found["choices"]]
    assert texts == [max(wanted, key=wanted.__getitem__)] * 2
    alone = [server.post(path, {**asked, "model": name})["usage"]["prompt_tokens"] for name in NAMES]
    assert found["usage"]["prompt_tokens"] == sum(alone)
    chunks = server.stream(path, asked)
    streamed = [one["choices"][0] for one in chunks if one["choices"]]
    assert {one["index"] for one in streamed} == {0, 1}


def test_labels_are_drawn_from_the_joint_probabilities(server: Running) -> None:
    """Over 200 seeds both labels come, each within 5 standard errors of its probability."""
    (wanted, *_) = expected(server, "mean")
    body = {"model": "films", "prompt": TEXTS[0], "temperature": 1, "n": 100}
    choices = [
        one["text"] for seed in (0, 1000) for one in server.post("/v1/completions", {**body, "seed": seed})["choices"]
    ]
    share = choices.count("good") / 200
    assert abs(share - wanted["good"]) < 5 * (wanted["good"] * wanted["bad"] / 200) ** 0.5


def test_an_ensemble_is_listed_with_its_members(server: Running) -> None:
    card = server.http.get("/v1/models/films").json()
    assert card["ensemble"] == NAMES
    assert card["vote"] == "mean"
    assert set(card["labels"]) == {"good", "bad"}
    assert card["num_virtual_tokens"] == 3 + 4 + 5
    assert server.http.get("/v1/soft_prompts/films/inspection").status_code == 400


def test_what_one_soft_prompt_can_and_several_cannot(server: Running) -> None:
    for field in ("raw", "base_only"):
        answer = server.post("/v1/completions", {"model": "films", "prompt": "a", field: True}, 400)
        assert answer["error"]["param"] == field
        assert "'films', an ensemble" in answer["error"]["message"]
    answer = server.post("/v1/classify", {"model": "films", "input": "a", "base_only": True}, 400)
    assert answer["error"]["param"] == "base_only"


def test_a_member_that_is_not_served_any_more_is_named(server: Running) -> None:
    catalog = server.catalog
    catalog.load("late", catalog.store.path("seed1"))
    catalog.join("passing", ["seed0", "late"])
    catalog.unload("late")
    answer = server.post("/v1/classify", {"model": "passing", "input": "a"}, 404)
    assert "'late'" in answer["error"]["message"]
    catalog.unload("passing")
    assert "passing" not in {entry.name for entry in catalog.entries()}


def test_another_soft_prompt_in_a_members_place_is_asked_next(server: Running) -> None:
    catalog, (one, other, _) = server.catalog, members(server.lm)
    changing = catalog.store.save(SoftPrompt(**{**one.__dict__, "name": "changing"}))
    catalog.load("changing", changing)
    catalog.join("pair", ["changing", "seed1"])
    before = server.http.get("/v1/models/pair").json()["content_hash"]
    SoftPrompt(**{**other.__dict__, "name": "changing", "vectors": 2 * other.vectors}).save(changing)
    catalog.load("changing", changing)
    found = server.post("/v1/classify", {"model": ["pair", "changing", "seed1"], "input": TEXTS[0]})["data"]
    for label, probability in found[0]["probabilities"].items():
        assert probability == pytest.approx(sum(each["probabilities"][label] for each in found[1:]) / 2, abs=1e-5)
    assert found[0]["content_hash"] != before
    for name in ("pair", "changing"):
        catalog.unload(name)


def test_no_ensemble_of_others(server: Running) -> None:
    catalog = server.catalog
    for names, error in (
        (["seed0", "write"], ConfigError),
        (["seed0", "sst2"], ConfigError),
        (["seed0"], ConfigError),
        (["seed0", "seed0"], ConfigError),
        (["films", "seed0"], ConfigError),
        (["seed0", "nowhere"], ApiError),
    ):
        with pytest.raises(error):
            catalog.join("none", names)
    for taken in ("seed0", "films", catalog.base.name):
        with pytest.raises(StoreError, match="served already"):
            catalog.join(taken, ["seed0", "seed1"])
    with pytest.raises(StoreError, match="ensemble's"):
        catalog.load("films", catalog.store.path("seed0"))
    assert "none" not in {entry.name for entry in catalog.entries()}
