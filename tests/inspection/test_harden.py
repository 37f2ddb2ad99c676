"""The hard prompt that is reported is what it is said to be; the search only ever lowers its loss."""

from __future__ import annotations

import itertools
import json
import random
from functools import cache
from typing import Any

import pytest
import torch

from softprompt.data.example import Dataset, Example
from softprompt.errors import DataError
from softprompt.evaluation.evaluate import evaluate
from softprompt.inspection import harden as module
from softprompt.inspection.ablation import score_variants
from softprompt.inspection.harden import Hardened, harden
from softprompt.inspection.vocabulary import Vocabulary
from softprompt.tasks.task import Task
from softprompt.tuning.start import initial_vectors
from tests.conftest import TOY_TEMPLATE, tiny, toy, toy_task

LENGTH = 4
ROWS = toy(24, 5)


@cache
def vectors() -> torch.Tensor:
    return initial_vectors(tiny("llama"), LENGTH, init="random", seed=2) * 4


def searched(monkeypatch: pytest.MonkeyPatch, rows: Dataset = ROWS, patience: int = 3, **options: Any) -> Hardened:
    monkeypatch.setattr(module, "PATIENCE", patience)
    task = toy_task(tiny("llama"), ROWS, LENGTH)
    return harden(task, vectors(), Vocabulary.of(tiny("llama")), rows, budget=1e6, **options)


def test_the_text_is_worth_what_is_reported_on_rows_that_the_search_did_not_see(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scored: list[Dataset] = []
    score = score_variants

    def watched(variants: Any, dataset: Dataset, **options: Any) -> Any:
        scored.append(dataset)
        return score(variants, dataset, **options)

    monkeypatch.setattr(module, "score_variants", watched)
    found = searched(monkeypatch)
    *in_search, reported = scored
    assert (found.search_rows, found.report_rows) == (12, 12)
    seen = {example.where for dataset in in_search for example in dataset.examples}
    assert seen.isdisjoint(example.where for example in reported.examples)
    assert len(seen) == 12
    task = toy_task(tiny("llama"), ROWS, LENGTH)
    assert [reading.name for reading in found.readings] == [
        "soft prompt",
        "no soft prompt",
        "nearest tokens as text",
        "hardened text",
    ]
    for reading, text in zip(found.readings[1:], ["", found.projected, found.text], strict=True):
        headline = evaluate(task.without_soft_prompt(text), None, reported).headline
        assert reading.change.score == headline
        assert reading.text == text
    assert found.readings[0].change.score == evaluate(task, vectors(), reported).headline
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["text"] == found.text


def test_the_search_starts_at_the_nearest_readable_tokens_and_only_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[float] = []
    step = module._Search.step

    def watched(search: Any) -> bool:
        losses.append(float(search.losses.mean()))
        return step(search)

    monkeypatch.setattr(module._Search, "step", watched)
    told: list[str] = []
    found = searched(monkeypatch, patience=8, progress=lambda _, text: told.append(text))
    assert all(later <= earlier for earlier, later in itertools.pairwise(losses))
    assert found.search_loss[0] == losses[0]
    assert found.search_loss[1] == pytest.approx(min(losses))
    assert found.search_loss[1] < found.search_loss[0]
    assert found.swaps >= 1
    assert (found.steps, found.stopped) == (len(losses), "no gain")
    assert told[0] == found.projected
    assert len(found.text) > 0
    assert found.text.replace("\n", "").isprintable()
    lm = tiny("llama")
    assert found.tokens == len(lm.tokenizer(found.text, add_special_tokens=False).input_ids)


def test_the_same_seed_finds_the_same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    first, again = searched(monkeypatch, seed=1), searched(monkeypatch, seed=1)
    assert first.text == again.text
    assert first.readings == again.readings


def test_a_spent_budget_leaves_the_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    task = toy_task(tiny("llama"), ROWS, LENGTH)
    found = harden(task, vectors(), Vocabulary.of(tiny("llama")), ROWS, budget=0)
    assert (found.steps, found.swaps, found.stopped) == (0, 0, "budget")
    assert found.text == found.projected
    assert found.search_loss[0] == found.search_loss[1]


def test_planted_words_are_the_projection() -> None:
    """A soft prompt made of words is read as these words."""
    lm = tiny("llama")
    ids = lm.tokenizer("the plot is thin", add_special_tokens=False).input_ids
    words = lm.embedding[ids].float() * 3
    task = Task(lm, TOY_TEMPLATE, toy_task(lm, ROWS).verbalizer, len(ids), lm.window)
    assert harden(task, words, Vocabulary.of(lm), ROWS, budget=0).text == "the plot is thin"


def test_the_gradient_is_that_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against finite differences of the loss that ``evaluate`` gives, in a random direction."""
    lm, task = tiny("llama"), toy_task(tiny("llama"), ROWS, LENGTH)
    search = module._Search(task, vectors(), Vocabulary.of(lm), ROWS, random.Random(0))
    gradient = search._gradient(ROWS.examples)
    assert gradient.shape == (len(search.ids), lm.hidden_size)
    direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0))
    shorter = Task(lm, task.template, task.verbalizer, len(search.ids), lm.window)

    def loss(step: float) -> float:
        moved = lm.embedding[search.ids].float() + step * direction
        return evaluate(shorter, moved, ROWS, metrics=["log_loss"]).headline.value

    slope = (loss(1e-3) - loss(-1e-3)) / 2e-3
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=0.02, abs=1e-4)


def test_free_text_can_be_hardened(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny("llama")
    rows = Dataset(tuple(Example({"input": f"film {i}"}, "very good", where=f"t:{i}") for i in range(8)), "t", "t")
    task = Task(lm, TOY_TEMPLATE, None, LENGTH, lm.window)
    monkeypatch.setattr(module, "PATIENCE", 4)
    found = harden(task, vectors(), Vocabulary.of(lm), rows, budget=1e6)
    assert found.search_loss[1] <= found.search_loss[0]
    assert found.readings[0].change.score is None


def test_too_few_rows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError) as caught:
        searched(monkeypatch, rows=toy(3, 0))
    assert str(caught.value) == ("Expected at least 4 rows to search and report with in toy.jsonl, found 3; give more.")
