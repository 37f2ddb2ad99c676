"""With and without: against ``evaluate`` and against a model of transformers alone."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
import torch

from softprompt.data.example import Example
from softprompt.errors import ConfigError
from softprompt.evaluation.evaluate import evaluate
from softprompt.inspection.behaviour import attention, examples_of, label_shift, next_tokens
from softprompt.tasks.task import Task
from softprompt.text.template import Template
from softprompt.text.tokens import SOFT
from softprompt.tuning.start import initial_vectors
from tests.conftest import TOY_LABELS, TOY_TEMPLATE, plain, plain_logprobs, tiny, toy, toy_task

LENGTH = 3
ROWS = toy(12, 5)
TEXTS = (Example({"input": "a dull film"}, None), Example({"input": "the best movies of the year"}, None))


@cache
def vectors() -> torch.Tensor:
    return initial_vectors(tiny("llama"), LENGTH, init="random", seed=2) * 4


def test_the_shift_of_labels_is_what_the_answers_say() -> None:
    task = toy_task(tiny("llama"), ROWS, LENGTH)
    found = label_shift(task, vectors(), ROWS)
    tuned, bare = evaluate(task, vectors(), ROWS), evaluate(task.without_soft_prompt(), None, ROWS)
    assert (found.accuracy_with, found.accuracy_without) == (tuned.headline, bare.headline)
    p, q = (np.array([list((each.probabilities or {}).values()) for each in one.predictions]) for one in (tuned, bare))
    assert list(found.with_it.values()) == pytest.approx(p.mean(axis=0))
    assert list(found.without.values()) == pytest.approx(q.mean(axis=0))
    assert found.distance == pytest.approx(np.abs(p - q).sum(axis=1).mean() / 2)
    gold = [example.target for example in ROWS.examples]
    assert found.gold == {label: gold.count(label) / 12 for label in task.labels}
    answers = [[each.text for each in one.predictions] for one in (tuned, bare)]
    rows = list(zip(*answers, gold, strict=True))
    assert found.mended == sum(a == g != b for a, b, g in rows)
    assert found.broken == sum(b == g != a for a, b, g in rows)
    assert found.changed == sum(a != b for a, b, _ in rows)
    assert found.gained.value == pytest.approx(tuned.headline.value - bare.headline.value)
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["n"] == 12


@pytest.mark.parametrize(
    "template", ["{soft_prompt}Text: {input}\nLabel: {target}", "Text: {input}{soft_prompt} {target}"]
)
def test_next_tokens_are_the_base_models_own(kind: str, template: str) -> None:
    lm = tiny(kind)
    task = Task(lm, Template(template), TOY_LABELS, LENGTH, lm.window)
    for found, example in zip(next_tokens(task, vectors(), TEXTS, k=4), TEXTS, strict=True):
        ids = task.open_request(example, 1).ids
        with_it = plain_logprobs(kind, [-1 if token == SOFT else token for token in ids], vectors())[-1]
        without = plain_logprobs(kind, task.without_soft_prompt().open_request(example, 1).ids)[-1]
        for listed, logprobs in ((found.with_it, with_it), (found.without, without)):
            best = logprobs.topk(4)
            assert [text for text, _ in listed] == [lm.tokenizer.decode([t]) for t in best.indices.tolist()]
            assert [p for _, p in listed] == pytest.approx(best.values.exp().tolist(), rel=1e-3)
        divergence = float((with_it.exp() * (with_it - without)).sum())
        assert found.divergence == pytest.approx(divergence, rel=1e-2, abs=1e-5)
        assert found.text == example.fields["input"]
        assert found.labels_with is not None
        assert sum(found.labels_with.values()) == pytest.approx(1)
        assert found.on_labels_with is not None
        assert 0 < found.on_labels_with < 1


def test_free_text_has_next_tokens_and_no_labels() -> None:
    lm = tiny("llama")
    (found,) = next_tokens(Task(lm, TOY_TEMPLATE, None, LENGTH, lm.window), vectors(), TEXTS[:1])
    assert found.labels_with is None
    assert found.on_labels_without is None
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["divergence"] > 0


@pytest.mark.parametrize("kind", ["llama", "gpt2", "stablelm"])
def test_attention_is_that_of_the_plain_model(kind: str) -> None:
    lm = tiny(kind)
    task = Task(lm, Template("Film: {soft_prompt}{input} {target}"), TOY_LABELS, LENGTH, lm.window)
    start = initial_vectors(lm, LENGTH, init="vocab", seed=0)
    before = lm.model.config._attn_implementation
    found = attention(task, vectors(), TEXTS, start=start)
    assert lm.model.config._attn_implementation == before
    assert found is not None
    table = plain(kind).get_input_embeddings().weight
    for soft, by_layer in ((vectors(), found.by_layer), (start, found.start)):
        total, even = torch.zeros(3, LENGTH), 0.0
        for example in TEXTS:
            ids = task.open_request(example, 1).ids
            at = ids.index(SOFT)
            embedded = torch.cat([table[list(ids[:at])], soft, table[list(ids[at + 1 :])]])
            layers = plain(kind)(inputs_embeds=embedded[None], output_attentions=True).attentions
            total += torch.stack([layer[0, :, -1, at : at + LENGTH].mean(dim=0) for layer in layers])
            even += 1 / len(embedded)
        torch.testing.assert_close(torch.tensor(by_layer), total / 2, rtol=1e-3, atol=1e-5)
        assert found.even == pytest.approx(even / 2)
    assert found.texts == 2


def test_a_model_that_gives_no_attention_is_not_asked_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny("llama")
    task = Task(lm, TOY_TEMPLATE, TOY_LABELS, LENGTH, lm.window)

    def refuse(name: str) -> None:
        raise ValueError(f"no {name}")

    monkeypatch.setattr(lm.model, "set_attn_implementation", refuse)
    assert attention(task, vectors(), TEXTS) is None


def test_the_model_answers_as_before_after_its_attention_was_looked_at() -> None:
    task = toy_task(tiny("llama"), ROWS, LENGTH)
    before = evaluate(task, vectors(), ROWS)
    attention(task, vectors(), TEXTS)
    assert evaluate(task, vectors(), ROWS) == before


def test_a_text_needs_a_template_with_one_field() -> None:
    lm = tiny("llama")
    pair = Task(lm, Template("{soft_prompt}{premise} {hypothesis} {target}"), TOY_LABELS, LENGTH, lm.window)
    with pytest.raises(ConfigError) as caught:
        examples_of(pair, ["x"])
    assert str(caught.value) == (
        "A text can be given for a template with one field, but this one has premise, hypothesis; "
        "give rows with --data instead."
    )
    assert examples_of(toy_task(lm, ROWS), ["x"])[0].fields == {"input": "x"}
