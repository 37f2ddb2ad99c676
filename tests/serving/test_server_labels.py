"""Labels over the endpoints that write: the answer is a label, with its probability where that is asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest

from softprompt.data.example import Example
from softprompt.serving.jobs import Limits
from softprompt.tasks.predict import Query, predict
from softprompt.tasks.task import Task
from tests.servers import Running, serving, soft_prompt

TEXT = "a stirring , funny film"
TEXTS = (TEXT, "dull", "the worst of the year", "very good")
FIELDS = {"premise": "the plot is thin", "hypothesis": "it is good"}
GRADES = {grade: (grade,) for grade in ("very good", "bad", "is the best", "no")}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("store"), limits=Limits(rows=6, waiting=128)) as running:
        yield running


@pytest.fixture
def grades(server: Running) -> Iterator[None]:
    """Four labels, some of several tokens; other modules run these tests with servers of their own."""
    path = server.catalog.store.home.parent / "grades.safetensors"
    soft_prompt(server.lm, "grades", "{soft_prompt}{input} {target}", GRADES, seed=8).save(path)
    server.catalog.load("grades", path)
    yield
    server.catalog.unload("grades")


def expected_of(server: Running, name: str, fields: dict[str, str], base_only: bool = False) -> dict[str, float]:
    """The probabilities of the labels, by the library alone."""
    model = server.catalog.get(name)
    assert model.task is not None
    task = Task(server.lm, model.task.template, model.task.verbalizer, model.task.num_virtual_tokens, 128)
    query = Query(task, Example(fields, None), model.vectors)
    if base_only:
        query = Query(task.without_soft_prompt(), Example(fields, None))
    found = predict([query])[0].probabilities
    assert found is not None
    return found


def words_of(server: Running, name: str) -> dict[str, int]:
    """Tokens of each label's first word."""
    task = server.catalog.get(name).task
    assert task is not None
    return {label: len(task.words[task.label_of_word.index(i)]) for i, label in enumerate(task.labels)}


def text_of(choice: Any) -> str:
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


def streamed(server: Running, path: str, body: dict[str, Any]) -> list[tuple[str, list[str | None]]]:
    """For each choice its text and the reasons to finish that its chunks give."""
    texts = [""] * int(body.get("n", 1))
    reasons: list[list[str | None]] = [[] for _ in texts]
    for chunk in server.stream(path, body):
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "") if "delta" in choice else choice["text"]
        reasons[choice["index"]].append(choice["finish_reason"])
    return list(zip(texts, reasons, strict=True))


@pytest.mark.parametrize("base_only", [False, True])
@pytest.mark.parametrize("name", ["sst2", "film", "nli", "grades"])
def test_the_answer_is_the_most_probable_label(server: Running, grades: None, name: str, base_only: bool) -> None:
    """Whole and streamed, chat and completion; neither ``max_tokens`` nor ``stop`` cuts it."""
    for text in TEXTS[:2]:
        fields = FIELDS if name == "nli" else {"input": text}
        found = expected_of(server, name, fields, base_only)
        label = max(found, key=found.__getitem__)
        options: dict[str, Any] = {"model": name, "base_only": base_only, "max_tokens": 1, "stop": [label[0], " "]}
        asked = {"fields": fields} if name == "nli" else {}
        message = {"messages": [{"role": "user", "content": text}]}
        prompt = {} if name == "nli" else {"prompt": text}
        for path, body in (
            ("/v1/completions", {**options, **prompt, **asked}),
            ("/v1/chat/completions", {**options, **message, **asked}),
        ):
            answer = server.post(path, body)
            (choice,) = answer["choices"]
            assert (text_of(choice), choice["finish_reason"], choice["logprobs"]) == (label, "stop", None)
            assert answer["usage"]["completion_tokens"] == words_of(server, name)[label]
            assert streamed(server, path, {**body, "n": 2}) == [(label, ["stop"])] * 2
        classified = server.post("/v1/classify", {"model": name, "fields": fields, "base_only": base_only})
        assert classified["data"][0]["label"] == label
        assert classified["usage"]["prompt_tokens"] == answer["usage"]["prompt_tokens"]


def test_several_prompts_and_choices_have_a_label_each(server: Running, grades: None) -> None:
    answer = server.post("/v1/completions", {"model": "grades", "prompt": list(TEXTS), "n": 2})
    found = [expected_of(server, "grades", {"input": text}) for text in TEXTS]
    labels = [max(one, key=one.__getitem__) for one in found]
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [
        (2 * place + number, label) for place, label in enumerate(labels) for number in range(2)
    ]
    tokens = words_of(server, "grades")
    assert answer["usage"]["completion_tokens"] == 2 * sum(tokens[label] for label in labels)


def test_log_probabilities_are_those_of_the_labels(server: Running, grades: None) -> None:
    """As a client reads the probabilities of classes from a completion's first token."""
    found = expected_of(server, "grades", {"input": TEXT})
    best = sorted(found, key=found.__getitem__, reverse=True)
    body: dict[str, Any] = {
        "model": "grades",
        "messages": [{"role": "user", "content": TEXT}],
        "logprobs": True,
        "top_logprobs": 3,
    }
    (entry,) = server.openai.chat.completions.create(**body).choices[0].logprobs.content
    assert (entry.token, entry.bytes) == (best[0], list(best[0].encode()))
    assert entry.logprob == pytest.approx(math.log(found[best[0]]), abs=1e-5)
    assert [other.token for other in entry.top_logprobs] == best[:3]
    for other in entry.top_logprobs:
        assert other.logprob == pytest.approx(math.log(found[other.token]), abs=1e-5)
    told = [chunk["choices"][0]["logprobs"]["content"] for chunk in server.stream("/v1/chat/completions", body)]
    assert [one["token"] for part in told for one in part] == [best[0]]
    no_list = server.post("/v1/chat/completions", {**body, "top_logprobs": None})["choices"][0]["logprobs"]
    assert [one["top_logprobs"] for one in no_list["content"]] == [[]]

    completion = server.post("/v1/completions", {"model": "grades", "prompt": TEXT, "logprobs": 20})["choices"][0]
    told = completion["logprobs"]
    assert (told["tokens"], told["text_offset"]) == ([best[0]], [0])
    assert told["top_logprobs"][0] == pytest.approx({label: math.log(found[label]) for label in best}, abs=1e-5)
    assert sum(map(math.exp, told["top_logprobs"][0].values())) == pytest.approx(1, abs=1e-5)


def test_a_label_is_drawn_as_often_as_temperature_and_nucleus_say(server: Running, grades: None) -> None:
    """Against the labels' probabilities to the power of 1 / temperature, to 5 standard errors; the seeds are fixed."""
    found = expected_of(server, "grades", {"input": TEXT})
    best = sorted(found, key=found.__getitem__, reverse=True)
    for temperature, top_p in ((0.5, 1.0), (3.0, 1.0), (1.0, found[best[0]] + 0.5 * found[best[1]])):
        weights = {label: found[label] ** (1 / temperature) for label in found}
        if top_p < 1:
            weights = {label: weights[label] for label in best[:2]}
        total = sum(weights.values())
        counts = dict.fromkeys(found, 0)
        draws = 4 * 120
        for turn in range(4):
            body = {"model": "grades", "prompt": TEXT, "n": 120, "seed": 1000 * turn}
            answer = server.post("/v1/completions", {**body, "temperature": temperature, "top_p": top_p})
            for choice in answer["choices"]:
                counts[choice["text"]] += 1
        for label, count in counts.items():
            share = weights.get(label, 0.0) / total
            assert abs(count / draws - share) <= 5 * math.sqrt(share * (1 - share) / draws), (label, temperature)
    nearly_none = {"model": "grades", "prompt": TEXT, "n": 8, "temperature": 1e-45}
    assert {choice["text"] for choice in server.post("/v1/completions", nearly_none)["choices"]} == {best[0]}


def test_choice_i_draws_with_seed_plus_i(server: Running, grades: None) -> None:
    body = {"model": "grades", "prompt": TEXT, "temperature": 5, "n": 6, "seed": 40}
    labels = [choice["text"] for choice in server.post("/v1/completions", body)["choices"]]
    later = [choice["text"] for choice in server.post("/v1/completions", {**body, "seed": 43})["choices"]]
    assert labels[3:] == later[:3]
    assert [text for text, _ in streamed(server, "/v1/completions", body)] == labels
    assert len(set(labels)) > 1
    found = expected_of(server, "grades", {"input": TEXT})
    noted = server.post("/v1/completions", {**body, "logprobs": 1})["choices"]
    for choice, label in zip(noted, labels, strict=True):  # the drawn one's own, before temperature
        assert choice["logprobs"]["token_logprobs"] == [pytest.approx(math.log(found[label]), abs=1e-5)]


def test_the_choices_of_a_label_are_scored_once(server: Running, grades: None, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted: list[int] = []
    submit = server.engine.submit

    def counting(jobs: Any, notify: Any) -> Any:
        submitted.append(len(jobs))
        return submit(jobs, notify)

    monkeypatch.setattr(server.engine, "submit", counting)
    body = {"model": "grades", "prompt": [TEXT, TEXT, TEXTS[2]], "temperature": 5, "n": 6, "seed": 40}
    labels = [choice["text"] for choice in server.post("/v1/completions", body)["choices"]]
    assert [text for text, _ in streamed(server, "/v1/completions", {**body, "n": 6, "prompt": TEXT})] == labels[:6]
    assert labels[:6] == labels[6:12]
    assert len(set(labels)) > 1
    server.post("/v1/completions", {**body, "model": "write", "max_tokens": 2})
    server.post("/v1/classify", {"model": ["grades", "sst2"], "input": [TEXT, TEXT]})
    assert submitted == [3, 1, 18, 4]


def test_an_input_that_does_not_fit_is_refused_or_cut(server: Running, grades: None) -> None:
    body: dict[str, Any] = {"model": "grades", "messages": [{"role": "user", "content": "the film " * 100}]}
    assert server.post("/v1/chat/completions", body, 400)["error"]["code"] == "context_length_exceeded"
    answer = server.post("/v1/chat/completions", {**body, "truncate": True})
    assert answer["truncated"] is True
    assert text_of(answer["choices"][0]) in GRADES


def test_raw_text_is_continued_whatever_labels_there_are(server: Running) -> None:
    answer = server.post("/v1/completions", {"model": "sst2", "prompt": TEXT, "raw": True, "max_tokens": 5})
    assert answer["choices"][0]["text"] not in ("positive", "negative")
