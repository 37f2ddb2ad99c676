"""Mixed batches against one request at a time and against transformers alone; metrics against arithmetic done apart."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import softprompt
from softprompt.data.example import Dataset, Example
from softprompt.errors import ConfigError, DataError
from softprompt.evaluation import metrics
from softprompt.evaluation.evaluate import (
    LABEL_METRICS,
    TEXT_METRICS,
    Evaluation,
    choose_metrics,
    evaluate,
    headline,
    headline_difference,
    headline_metric,
    most_frequent_answer,
    one_answer,
)
from softprompt.generation.decoder import Generated
from softprompt.model.frozen import FrozenLM
from softprompt.model.request import Request, Sampling
from softprompt.tasks.predict import Prediction, Query, default_sampling, predict
from softprompt.tasks.task import Task
from softprompt.text.template import Template
from softprompt.text.tokens import SOFT
from softprompt.text.verbalizer import Verbalizer
from tests.conftest import plain_score, tiny

TEXTS = ("a stirring film", "the plot is thin and the acting is worse", "dull", "one of the best movies of the year")


def vectors(lm: FrozenLM, length: int, seed: int) -> torch.Tensor:
    noise = torch.randn(length, lm.hidden_size, generator=torch.Generator().manual_seed(seed))
    return noise * lm.embedding_rms


def label_task(lm: FrozenLM, length: int = 4) -> Task:
    """Labels of several words and several tokens, and words that begin alike."""
    words = {"good": ("very good", "great"), "bad": ("very bad", "awful mess"), "so so": ("no ideas at all",)}
    return Task(lm, Template("{soft_prompt}{input}\nAnswer: {target}"), Verbalizer(words), length, lm.window)


def other_label_task(lm: FrozenLM, length: int = 7) -> Task:
    template = Template("Is it good? {soft_prompt}{input} It is {target}")
    return Task(lm, template, Verbalizer.from_labels(["positive", "negative"]), length, lm.window)


def text_task(lm: FrozenLM, length: int = 3) -> Task:
    return Task(lm, Template("{soft_prompt}{input} Then: {target}"), None, length, lm.window)


def dataset(*rows: tuple[str, str | None]) -> Dataset:
    numbered = enumerate(rows, start=1)
    examples = (Example({"input": text}, target, where=f"test.jsonl:{i}") for i, (text, target) in numbered)
    return Dataset(tuple(examples), "test.jsonl", "0" * 64)


def mixed_queries(lm: FrozenLM) -> list[Query]:
    """Every row with another soft prompt, template or kind of task; some bare."""
    first, second, third = label_task(lm), other_label_task(lm), text_task(lm)
    soft = [vectors(lm, 4, 1), vectors(lm, 7, 2), vectors(lm, 3, 3), vectors(lm, 4, 4)]
    a, b, c, d = (Example({"input": text}, None) for text in TEXTS)
    return [
        Query(first, a, soft[0]),
        Query(third, b, soft[2]),
        Query(first.without_soft_prompt(), c),
        Query(second, d, soft[1]),
        Query(third.without_soft_prompt(), a),
        Query(first, b, soft[3]),
        Query(second.without_soft_prompt(), c),
        Query(third, d, soft[2]),
    ]


def test_a_mixed_batch_answers_like_one_query_at_a_time(lm: FrozenLM) -> None:
    queries = mixed_queries(lm)
    sampling = Sampling(max_new_tokens=6)
    together = predict(queries, sampling=sampling)
    alone = [predict([query], sampling=sampling)[0] for query in queries]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert [answer.finish for answer in together] == [answer.finish for answer in alone]
    for ours, theirs in zip(together, alone, strict=True):
        if ours.logprobs is None or theirs.logprobs is None:
            assert ours.logprobs == theirs.logprobs
        else:
            assert ours.logprobs == pytest.approx(dict(theirs.logprobs), abs=1e-4)


@pytest.mark.parametrize("normalise", [False, True])
def test_label_probabilities_are_those_of_transformers_alone(kind: str, normalise: bool) -> None:
    lm = tiny(kind)
    task, soft = label_task(lm), vectors(lm, 4, 1)
    queries = [Query(task, Example({"input": text}, None), soft) for text in TEXTS]
    for query, answer in zip(queries, predict(queries, normalise=normalise), strict=True):
        request = task.label_request(query.example)
        scores = [float(plain_score(kind, request.ids, word, soft)) for word in task.words]
        if normalise:
            scores = [score / len(word) for score, word in zip(scores, task.words, strict=True)]
        by_label = [math.log(sum(map(math.exp, part))) for part in (scores[:2], scores[2:4], scores[4:])]
        total = math.log(sum(map(math.exp, by_label)))
        expected = dict(zip(task.labels, (value - total for value in by_label), strict=True))
        assert dict(answer.logprobs or {}) == pytest.approx(expected, abs=2e-4)
        assert answer.text == max(expected, key=expected.__getitem__)
        assert sum((answer.probabilities or {}).values()) == pytest.approx(1)
        assert answer.finish is None


def test_predictions_do_not_depend_on_how_rows_are_cut_into_chunks(
    llama: FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, soft = text_task(llama), vectors(llama, 3, 1)
    queries = [Query(task, Example({"input": f"film {i}"}, None), soft) for i in range(7)]
    sampling = Sampling(max_new_tokens=5, temperature=1.5, seed=3)
    whole = predict(queries, sampling=sampling)
    # the package's attribute of the module's name is its function
    monkeypatch.setattr("softprompt.tasks.predict.ROWS_AT_ONCE", 2)
    reports: list[tuple[int, int]] = []
    assert predict(queries, sampling=sampling, progress=lambda *report: reports.append(report)) == whole
    assert reports == [(2, 7), (4, 7), (6, 7), (7, 7)]
    assert len({answer.text for answer in whole}) > 1
    assert predict([]) == []


def test_a_prefix_is_computed_once_for_all_chunks(llama: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softprompt.tasks.predict.ROWS_AT_ONCE", 2)
    computed: list[int] = []
    prefix_kv = FrozenLM.prefix_kv

    def counted(lm: FrozenLM, ids: Any, soft: torch.Tensor | None) -> Any:
        computed.append(0 if soft is None else len(soft))
        return prefix_kv(lm, ids, soft)

    monkeypatch.setattr(FrozenLM, "prefix_kv", counted)
    labels, text = label_task(llama), text_task(llama)
    four, three = vectors(llama, 4, 1), vectors(llama, 3, 3)
    rows = [Example({"input": text}, None) for text in TEXTS]
    queries = [Query(labels, row, four) for row in rows] + [Query(text, row, three) for row in rows]
    predict(queries)
    assert sorted(computed) == [3, 4]
    kept = llama.kept_prefixes(2)
    one_at_a_time = [predict([query], prefix_of=kept)[0] for query in queries]
    assert sorted(computed) == [3, 3, 4, 4]
    assert [answer.text for answer in one_at_a_time] == [answer.text for answer in predict(queries)]


def test_a_kept_prefix_is_that_of_the_numbers_of_now(llama: FrozenLM) -> None:
    """Vectors that change in place, with and without autograd's notice, and others at an address that was free."""
    kept = llama.kept_prefixes(2)
    ids = (3, SOFT, 4)

    def check(soft: torch.Tensor) -> None:
        found, expected = kept(ids, soft), llama.prefix_kv(ids, soft)
        for one, other in zip(found.tensors, expected.tensors, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)

    soft = vectors(llama, 4, 1)
    check(soft)
    soft.mul_(2)
    check(soft)
    soft.data += 1
    check(soft)
    soft.numpy()[0] = 0
    check(soft)
    address, tried = id(soft), []
    del soft
    for seed in range(100):
        tried.append(vectors(llama, 4, seed))
        check(tried[-1])
        if id(tried[-1]) == address:
            break
    task, row = label_task(llama), Example({"input": TEXTS[0]}, None)
    soft = vectors(llama, 4, 1)
    predict([Query(task, row, soft)], prefix_of=kept)
    soft += 0.5
    assert predict([Query(task, row, soft)], prefix_of=kept) == predict([Query(task, row, soft.clone())])


def test_default_sampling(llama: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    task = text_task(llama)
    fixed = len(llama.tokenizer(" Then:").input_ids)
    room = llama.window - 3 - fixed
    assert room < 128
    assert default_sampling(task) == Sampling(max_new_tokens=room // 2)
    assert default_sampling(Task(llama, task.template, None, 3, 3 + fixed + 21)) == Sampling(max_new_tokens=10)
    assert default_sampling(Task(llama, task.template, None, 3, 5)) == Sampling(max_new_tokens=1)
    bare = Sampling(max_new_tokens=(room + 3) // 2, stop=("\n",), skip_blank=True)
    assert default_sampling(task.without_soft_prompt()) == bare

    used: list[Sampling] = []

    def generate(
        lm: FrozenLM, requests: list[Request], soft_prompts: list[torch.Tensor], sampling: Sampling, **more: Any
    ) -> list[Generated]:
        used.append(sampling)
        return [Generated(" an answer \n", (1, 2), "stop")] * len(requests)

    monkeypatch.setattr("softprompt.tasks.predict.generate", generate)
    example = Example({"input": "film"}, None)
    found = predict([Query(task, example, vectors(llama, 3, 1)), Query(task.without_soft_prompt(), example)])
    assert used == [default_sampling(task), default_sampling(task.without_soft_prompt())]
    assert found == [Prediction("an answer", None, "stop", False)] * 2
    assert found[0].probabilities is None


# --- evaluate ------------------------------------------------------------------------------------


def test_label_metrics_are_those_of_the_predictions(llama: FrozenLM) -> None:
    task, soft = label_task(llama), vectors(llama, 4, 1)
    gold = ["good", "bad", "so so", "good"]
    rows = dataset(*zip(TEXTS, gold, strict=True))
    reports: list[tuple[int, int]] = []
    found = evaluate(task, soft, rows, progress=lambda *report: reports.append(report))
    answers = predict([Query(task, example, soft) for example in rows.examples])
    assert found.predictions == tuple(answers)
    texts = [answer.text for answer in answers]
    nll = [-(answer.logprobs or {})[label] for answer, label in zip(answers, gold, strict=True)]
    assert found.metrics == (
        metrics.accuracy(texts, gold),
        metrics.macro_f1(texts, gold, task.labels),
        metrics.mcc(texts, gold, task.labels),
        metrics.log_loss(nll),
        metrics.calibration_error(
            [math.exp((answer.logprobs or {})[answer.text]) for answer in answers],
            [text == label for text, label in zip(texts, gold, strict=True)],
        ),
    )
    assert found.headline.name == "accuracy"
    assert found.truncated == 0
    assert reports == [(4, 4)]
    assert found.as_dict() == {
        **found.headline.as_dict(),
        "metrics": [metric.as_dict() for metric in found.metrics],
        "truncated": 0,
        "most_frequent_answer": {
            "label": max(texts, key=texts.count),
            "share": max(map(texts.count, texts)) / 4,
            "gold_share": gold.count(max(texts, key=texts.count)) / 4,
            "one_answer": len(set(texts)) == 1,
        },
    }
    only = evaluate(task, soft, rows, metrics=["mcc", "accuracy", "mcc"])
    assert [metric.name for metric in only.metrics] == ["mcc", "accuracy"]
    assert only.headline == found.metrics[2]


def test_the_bare_base_model_is_the_same_template_without_the_soft_prompt(llama: FrozenLM) -> None:
    task = label_task(llama)
    rows = dataset(*zip(TEXTS, ["good", "bad", "so so", "good"], strict=True))
    bare = Task(llama, Template("{input}\nAnswer: {target}"), task.verbalizer, 0, llama.window)
    assert evaluate(task.without_soft_prompt(), None, rows) == evaluate(bare, None, rows)
    assert evaluate(task.without_soft_prompt(), None, rows) != evaluate(task, vectors(llama, 4, 1), rows)


def test_perplexity_is_that_of_transformers_alone(kind: str) -> None:
    lm = tiny(kind)
    task, soft = text_task(lm), vectors(lm, 3, 1)
    rows = dataset(("a stirring film", "one of the best"), ("dull", "with no ideas"), ("the plot", "is thin"))
    found = evaluate(task, soft, rows, metrics=["perplexity"])
    nll, tokens = [], []
    for example in rows.examples:
        request = task.target_request(example)
        assert request.words[0][-1] == lm.tokenizer.eos_token_id
        nll.append(-float(plain_score(kind, request.ids, request.words[0], soft)))
        tokens.append(len(request.words[0]))
    assert found.headline.value == pytest.approx(math.exp(sum(nll) / sum(tokens)), rel=1e-4)
    assert found.headline.n == 3
    assert found.predictions == ()


def test_text_metrics_compare_stripped_answers_with_the_references(
    llama: FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([" very good \n", "a bad film", "nothing like it"])
    monkeypatch.setattr(
        "softprompt.tasks.predict.generate",
        lambda lm, requests, *_, **__: [Generated(next(answers), (1,), "stop") for _ in requests],
    )
    examples = (
        Example({"input": "a"}, "very good", (), "test.jsonl:1"),
        Example({"input": "b"}, "an awful film", ("an awful film ", " a bad film "), "test.jsonl:2"),
        Example({"input": "c"}, "great", (), "test.jsonl:3"),
    )
    reports: list[tuple[int, int]] = []
    found = evaluate(
        text_task(llama),
        vectors(llama, 3, 1),
        Dataset(examples, "test.jsonl", ""),
        progress=lambda *report: reports.append(report),
    )
    texts = ["very good", "a bad film", "nothing like it"]
    wanted = [("very good",), ("an awful film", "a bad film"), ("great",)]
    of_name = {metric.name: metric for metric in found.metrics}
    assert tuple(of_name) == TEXT_METRICS
    assert found.headline == metrics.bleu(texts, wanted)
    assert of_name["exact_match"].value == pytest.approx(2 / 3)
    assert of_name["token_f1"] == metrics.token_f1(texts, wanted)
    assert of_name["rouge_l"] == metrics.rouge_l(texts, wanted)
    assert reports == [(3, 6), (6, 6)]
    assert found.as_dict()["most_frequent_answer"] == {
        "label": "very good",
        "share": 1 / 3,
        "gold_share": 1 / 3,
        "one_answer": False,
    }


# --- one answer to nearly all rows -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("answered", "wanted", "told"),  # of rows, how many were answered with yes, and how many should have been
    [
        ((983, 1000), (622, 1000), True),
        ((1000, 1000), (622, 1000), True),
        ((950, 1000), (622, 1000), True),
        ((949, 1000), (622, 1000), False),
        ((1000, 1000), (950, 1000), True),  # 5 % of the rows are missed, no less
        ((1000, 1000), (951, 1000), False),
        ((960, 1000), (940, 1000), False),  # a rare label, found on two thirds of its rows
        ((1000, 1000), (1000, 1000), False),
        ((1000, 1000), (0, 1000), True),
        ((10, 10), (6, 10), True),
        ((3, 3), (2, 3), False),  # a single row proves nothing
        ((3, 3), (1, 3), True),
        ((1, 1), (0, 1), False),
    ],
)
def test_one_answer_to_nearly_all_rows(answered: tuple[int, int], wanted: tuple[int, int], told: bool) -> None:
    def column(yes: tuple[int, int]) -> list[str]:
        return ["yes"] * yes[0] + ["no"] * (yes[1] - yes[0])

    found = one_answer(column(answered), column(wanted)[::-1])
    if not told:
        assert found is None
        return
    assert found is not None
    assert (found.label, found.share, found.gold_share) == (
        "yes",
        answered[0] / answered[1],
        wanted[0] / wanted[1],
    )


def test_one_answer_in_words() -> None:
    found = one_answer(["yes"] * 982 + ["no"] * 18, ["yes"] * 622 + ["no"] * 378)
    assert str(found) == "answers 'yes' on 98.2 % of the rows; 62.2 % of the rows are"
    assert one_answer([], []) is None
    assert str(one_answer([""] * 40, ["a"] * 40)) == "answers '' on 100.0 % of the rows; 0.0 % of the rows are"
    assert str(one_answer(["x" * 99] * 40, ["a"] * 40)).startswith(f"answers '{'x' * 39}…' on 100.0 % of")


def test_any_reference_is_the_target_of_free_text() -> None:
    rows = tuple(Example({"input": "a"}, "four", ("four", " 4 "), where="t:1") for _ in range(40))
    predictions = [Prediction("4", None, "stop", truncated=False)] * 40
    found = most_frequent_answer(Dataset(rows, "t", "t"), predictions)
    assert found is not None
    assert (found.label, found.share, found.gold_share, found.is_telling) == ("4", 1.0, 1.0, False)


def test_the_headline_fits_the_answers() -> None:
    """Half of the training rows decide: BLEU counts runs of four words."""
    four, three = ("q", "in the old town"), ("q", "the old town")
    assert headline_metric(dataset(four, three), ("in the old town", "the old town")) == "accuracy"
    assert headline_metric(dataset(four, four, three), ()) == "bleu"
    assert headline_metric(dataset(four, three, three), ()) == "token_f1"


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(*[st.sampled_from(["red door", "a door", "", "red car, red door"])] * 3), min_size=2))
def test_the_difference_is_that_of_the_headlines(rows: list[tuple[str, str, str]]) -> None:
    first, second, wanted = (list(column) for column in zip(*rows, strict=True))
    found = dataset(*(("q", target) for target in wanted))
    for metric in ("accuracy", "token_f1", "bleu"):
        answers = ([Prediction(text, None, "stop", truncated=False) for text in texts] for texts in (first, second))
        one, other = (headline(metric, found, several).value for several in answers)
        value, low, high = headline_difference(metric, found, first, second)
        assert value == pytest.approx(one - other, abs=1e-9)
        assert low <= high


def test_truncated_inputs_are_counted(llama: FrozenLM) -> None:
    rows = dataset(("dull " * 200, "bad"), ("a film", "good"), ("dull " * 300, "bad"))
    assert evaluate(label_task(llama), vectors(llama, 4, 1), rows).truncated == 2
    text = evaluate(text_task(llama), vectors(llama, 3, 1), rows, sampling=Sampling(max_new_tokens=2))
    assert text.truncated == 2
    assert evaluate(text_task(llama), vectors(llama, 3, 1), rows, metrics=["perplexity"]).truncated == 2


def test_log_loss_against_arithmetic() -> None:
    found = metrics.log_loss([0.5, 1.0, 4.5])
    assert found.value == pytest.approx(2)
    spread = math.sqrt((1.5**2 + 1.0**2 + 2.5**2) / 2 / 3)
    assert found.stderr == pytest.approx(spread)
    assert found.low == 0  # 2 - 1.96 * 1.26, cut
    assert found.high == pytest.approx(2 + 1.959964 * spread, rel=1e-6)


# --- mistakes ------------------------------------------------------------------------------------


def sentence(error: type[Exception], act: Any) -> str:
    with pytest.raises(error) as caught:
        act()
    return str(caught.value)


def test_a_query_refuses_a_soft_prompt_that_does_not_fit_its_task(llama: FrozenLM) -> None:
    task, example = label_task(llama), Example({"input": "a"}, None)
    assert sentence(ConfigError, lambda: Query(task, example, vectors(llama, 5, 1))) == (
        "The template '{soft_prompt}{input}\\nAnswer: {target}' needs a soft prompt of shape [4, 32], but "
        "a soft prompt of shape [5, 32] was given; use a soft prompt with its own task, "
        "and Task.without_soft_prompt() without one."
    )
    assert sentence(ConfigError, lambda: Query(task, example)) == (
        "The template '{soft_prompt}{input}\\nAnswer: {target}' needs a soft prompt of shape [4, 32], but "
        "no soft prompt was given; use a soft prompt with its own task, and Task.without_soft_prompt() without one."
    )
    assert sentence(ConfigError, lambda: Query(task.without_soft_prompt(), example, vectors(llama, 4, 1))) == (
        "The template '{input}\\nAnswer: {target}' needs no soft prompt, but a soft prompt of shape [4, 32] was given; "
        "use a soft prompt with its own task, and Task.without_soft_prompt() without one."
    )


def test_one_batch_has_one_base_model(llama: FrozenLM) -> None:
    example = Example({"input": "a"}, None)
    queries = [Query(label_task(lm).without_soft_prompt(), example) for lm in (llama, tiny("gpt2"))]
    assert sentence(ConfigError, lambda: predict(queries)) == (
        "One batch needs one base model in memory, but the queries have several; predict for each."
    )


def test_unknown_metrics_are_refused_by_kind_of_task() -> None:
    assert choose_metrics(None, labels=True) == LABEL_METRICS
    assert choose_metrics([], labels=False) == TEXT_METRICS
    assert sentence(ConfigError, lambda: choose_metrics(["bleu"], labels=True)) == (
        "The metric for labels must be one of accuracy, macro_f1, mcc, log_loss, calibration_error, not 'bleu'; "
        "choose one."
    )
    assert sentence(ConfigError, lambda: choose_metrics(["bleu", "mcc"], labels=False)) == (
        "The metric for free text must be one of bleu, rouge_l, exact_match, token_f1, perplexity, not 'mcc'; "
        "choose one."
    )


def test_rows_without_a_target_or_with_a_foreign_one_are_refused(llama: FrozenLM) -> None:
    task, soft = label_task(llama), vectors(llama, 4, 1)
    assert sentence(DataError, lambda: evaluate(task, soft, dataset(("a", "good"), ("b", None)))) == (
        "test.jsonl:2: expected a target, found none; add one."
    )
    assert sentence(DataError, lambda: evaluate(task, soft, dataset(("a", "nice")))) == (
        'test.jsonl:1: expected one of the labels "good", "bad", "so so", found "nice"; correct this row, '
        "or give all labels with --labels."
    )


def test_scores_that_are_not_numbers_are_refused(llama: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    task, soft = label_task(llama), vectors(llama, 4, 1)
    width = len(task.words)
    monkeypatch.setattr(llama, "score", lambda requests, *_, **__: torch.full((len(requests), width), torch.nan))
    assert sentence(ConfigError, lambda: predict([Query(task, Example({"input": "a"}, None), soft)])) == (
        "The base model's scores are not numbers in torch.float32; load it with dtype fp32."
    )


# --- the package ---------------------------------------------------------------------------------


def test_the_public_names_are_there() -> None:
    assert all(hasattr(softprompt, name) for name in softprompt.__all__)
    assert len(set(softprompt.__all__)) == len(softprompt.__all__)
    assert softprompt.Evaluation is Evaluation
