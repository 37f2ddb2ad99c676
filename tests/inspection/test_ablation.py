"""Leaving out, replacing, reading as text and cutting: each against ``evaluate`` with the change made by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from scipy import stats

from softprompt.data.example import Dataset, Example
from softprompt.evaluation.evaluate import evaluate
from softprompt.inspection import ablation
from softprompt.inspection.ablation import (
    Change,
    Variant,
    WhatMatters,
    as_text,
    change,
    cuts,
    difference,
    score_variants,
    what_matters,
)
from softprompt.inspection.vocabulary import Vocabulary
from softprompt.tasks.task import Task
from softprompt.text.template import Template
from softprompt.tuning.start import initial_vectors
from tests.conftest import tiny, toy, toy_task

LENGTH = 4
ROWS = toy(11, 5)


@cache
def a_task() -> Task:
    return toy_task(tiny("llama"), ROWS, LENGTH)


@cache
def vectors() -> torch.Tensor:
    return initial_vectors(tiny("llama"), LENGTH, init="random", seed=2) * 4


@cache
def found() -> WhatMatters:
    return what_matters(a_task(), vectors(), ROWS)


def by_hand(task: Task, soft: torch.Tensor | None, change: Change) -> None:
    """The change's scores are those that ``evaluate`` gives."""
    metrics = {metric.name: metric for metric in evaluate(task, soft, ROWS).metrics}
    assert change.score is not None
    assert change.score == metrics["accuracy"]
    assert change.loss.value == pytest.approx(metrics["log_loss"].value, abs=1e-6)


def test_leaving_out_is_evaluating_without_it() -> None:
    task, soft = a_task(), vectors()
    by_hand(task, soft, found().full)
    full = evaluate(task, soft, ROWS)
    for i, token in enumerate(found().tokens):
        fewer = torch.cat([soft[:i], soft[i + 1 :]])
        by_hand(replace(task, num_virtual_tokens=LENGTH - 1), fewer, token.left_out)
        instead = soft.clone()
        instead[i] = soft.mean(dim=0)
        by_hand(task, instead, token.replaced)
        assert token.left_out.score_change is not None
        assert token.left_out.score_change.value == pytest.approx(
            token.left_out.score.value - full.headline.value if token.left_out.score else None
        )
        assert token.left_out.loss_change.value == pytest.approx(found().costs[i].mean())
        assert token.left_out.loss_change.value == pytest.approx(
            token.left_out.loss.value - found().full.loss.value, abs=1e-6
        )


def test_the_order_the_correction_and_the_agreement() -> None:
    matters = found()
    means = matters.costs.mean(axis=1)
    assert list(matters.order) == np.argsort(-means).tolist()
    p = [token.left_out.loss_change.p for token in matters.tokens]
    assert [token.q for token in matters.tokens] == pytest.approx(list(stats.false_discovery_control(p)))
    instead = [token.replaced.loss_change.value for token in matters.tokens]
    apart = np.argsort(np.argsort(means)) - np.argsort(np.argsort(instead))
    assert matters.agreement == pytest.approx(1 - 6 * (apart**2).sum() / (len(apart) * (len(apart) ** 2 - 1)))
    assert all(token.top_share == 1 for token in matters.tokens)  # four are always among the first five
    document = json.loads(json.dumps(matters.as_dict(), allow_nan=False))
    assert document["top"] == list(matters.order)
    assert "costs" not in document
    assert document["n"] == len(ROWS.examples)


def test_the_share_of_resamples_says_how_sure_the_order_is() -> None:
    """Seven virtual tokens on 40 rows: one always costs most, one never, two are alike."""
    noise = np.random.default_rng(0).normal(size=(7, 40))
    costs = np.array([9.0, 3, 2, 1, 0, 0, -9])[:, None] + noise * np.array([1, 0.1, 0.1, 0.1, 1, 1, 1])[:, None]
    shares = ablation._top_shares(costs)
    assert shares[0] == shares[1] == shares[2] == shares[3] == 1
    assert shares[6] == 0
    assert 0 < shares[4] < 1
    assert shares.sum() == pytest.approx(5)


def test_differences_are_paired() -> None:
    draw = np.random.default_rng(1)
    full, noise = draw.normal(size=200) * 10, draw.normal(size=200) * 0.1
    changed = difference(full + 0.05 + noise, full)
    assert changed.value == pytest.approx((0.05 + noise).mean())
    error = noise.std(ddof=1) / math.sqrt(200)
    assert changed.p == pytest.approx(2 * stats.norm.sf(changed.value / error))
    assert changed.low == pytest.approx(changed.value - 1.96 * error, abs=error / 3)
    assert changed.high == pytest.approx(changed.value + 1.96 * error, abs=error / 3)
    same = difference(full, full)
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)
    one = difference(np.array([2.0]), np.array([1.0]))
    assert one.value == 1
    assert math.isnan(one.low)
    assert one.p == 1


def test_a_single_virtual_token_is_left_out_with_the_soft_prompt() -> None:
    task = replace(a_task(), num_virtual_tokens=1)
    alone = what_matters(task, vectors()[:1], ROWS)
    by_hand(task.without_soft_prompt(), None, alone.tokens[0].left_out)
    assert alone.tokens[0].replaced.loss_change.value == 0
    assert math.isnan(alone.agreement)
    assert alone.as_dict()["agreement"] is None


def test_readings_are_the_texts_scored_in_its_place() -> None:
    task, soft, lm = a_task(), vectors(), tiny("llama")
    vocabulary, start = Vocabulary.of(lm), initial_vectors(lm, LENGTH, init="vocab", seed=1)
    readings = {reading.name: reading for reading in as_text(task, soft, vocabulary, ROWS, start=start)}
    assert list(readings) == [
        "soft prompt",
        "nearest tokens by cosine",
        "those, at the soft prompt's norms",
        "nearest tokens by distance",
        "nearest by cosine, typed as text",
        "start of the training",
        "no soft prompt",
        "random tokens, draw 1",
        "random tokens, draw 2",
        "random tokens, draw 3",
    ]
    table = vocabulary.table.float()
    units = torch.nn.functional.normalize(table, dim=1)
    cosine = (torch.nn.functional.normalize(soft, dim=1) @ units.T).argmax(dim=1)
    distance = torch.cdist(soft, table).argmin(dim=1)
    text = lm.tokenizer.decode(cosine.tolist())
    assert readings["nearest tokens by cosine"].text == text
    expected = {
        "soft prompt": (task, soft),
        "nearest tokens by cosine": (task, table[cosine]),
        "those, at the soft prompt's norms": (task, units[cosine] * soft.norm(dim=1, keepdim=True)),
        "nearest tokens by distance": (task, table[distance]),
        "nearest by cosine, typed as text": (task.without_soft_prompt(text), None),
        "start of the training": (task, start),
        "no soft prompt": (task.without_soft_prompt(), None),
        "random tokens, draw 2": (task, initial_vectors(lm, LENGTH, init="vocab", seed=1)),
    }
    for name, (of_task, in_place) in expected.items():
        by_hand(of_task, in_place, readings[name].change)
    names = [reading.name for reading in as_text(task, soft, vocabulary, ROWS)]
    assert "start of the training" not in names


def test_cuts_keep_the_first_and_the_best_chosen_on_other_rows() -> None:
    task, soft = a_task(), vectors()
    made = cuts(task, soft, ROWS, found())
    assert [cut.k for cut in made] == [1, 2]
    even = [i % 2 == 0 for i in range(len(ROWS.examples))]
    for cut in made:
        shorter = replace(task, num_virtual_tokens=cut.k)
        by_hand(shorter, soft[: cut.k], cut.first)
        loss = 0.0
        for half in (True, False):
            chosen_on = [i for i, is_even in enumerate(even) if is_even != half]
            order = np.argsort(-found().costs[:, chosen_on].mean(axis=1))
            best = soft[sorted(order[: cut.k].tolist())]
            rows = replace(
                ROWS, examples=tuple(e for e, is_even in zip(ROWS.examples, even, strict=True) if is_even == half)
            )
            (scored,) = score_variants([Variant(shorter, best)], rows)
            loss += float(scored.loss.sum())
        assert cut.best.loss.value == pytest.approx(loss / len(even), abs=1e-6)


def test_free_text_has_a_loss_and_no_score() -> None:
    lm = tiny("llama")
    rows = Dataset(tuple(Example({"input": f"film {i}"}, f"it was {i} stars") for i in range(4)), "t", "t")
    task = Task(lm, Template("{soft_prompt}{input} {target}"), None, LENGTH, lm.window)
    (scored,) = score_variants([Variant(task, vectors())], rows)
    for example, loss in zip(rows.examples, scored.loss, strict=True):
        perplexity = evaluate(task, vectors(), replace(rows, examples=(example,)), metrics=["perplexity"]).headline
        assert loss == pytest.approx(math.log(perplexity.value), rel=1e-5)
    told: list[tuple[int, int]] = []
    matters = what_matters(task, vectors(), rows, progress=lambda done, total: told.append((done, total)))
    assert matters.full.score is None
    assert matters.tokens[0].left_out.score_change is None
    assert told[-1] == (36, 36)
    assert cuts(task, vectors(), rows, matters)[0].best.score is None
    assert change(scored, scored).loss_change.value == 0
