"""How long a comparison takes: arithmetic done by hand, and corrections by cells that are finished."""

from __future__ import annotations

from typing import Any

import pytest

from softprompt.compare.comparison_time import ComparisonTime, Parts, Speed, expected
from softprompt.compare.plan import Key, Plan
from tests.compare import made_up
from tests.conftest import tiny, toy

SPEED = Speed(load=20.0, row=0.5, alone=2.0, plain=30.0, tokens=32.0, window=2048)


def plan(**options: Any) -> Plan:
    """100 rows to answer, 40 to choose by, 64 to learn from, for 600 s."""
    settings: dict[str, Any] = {
        "train": toy(64, 1),
        "validation": toy(40, 2),
        "test": toy(100, 3),
        "bases": ("a",),
        "methods": ("zero-shot", "soft-prompt"),
    }
    return made_up.plan(**settings | options)


def done(base: str, method: str, seconds: float, seed: int = 0) -> dict[str, Any]:
    return {"status": "done", "base": base, "method": method, "seed": seed, "seconds": seconds}


@pytest.mark.parametrize(
    ("method", "learning", "answering", "rest"),
    [
        ("tf-idf", 0, 0, 0),
        ("zero-shot", 0, 50, 42),  # 100 rows of 0.5 s; 21 rows of 2 s, one by one
        ("zero-shot-calibrated", 0, 50, 42),
        ("soft-prompt", 600, 50, 42),
        ("prefix", 600, 50, 42),
        ("peft-prompt-tuning", 600, 50, 42),
        ("full-fine-tuning", 600, 50, 42 + 30),  # and the plain text once more
        ("lora", 600, 75, 63 + 30),  # half as long again beside its adapters
        ("soft-prompt-ensemble", 0, 150, 126),  # three soft prompts
        # 1, 2, 4, … 64 shots in 2,048 tokens of 32 a row, so seven times 40 rows, twice as long as bare ones
        ("few-shot", 280, 100, 84),
        # 512 tokens of shots are 16 rows: 17 times as long; 1, 4, 16 and 64 shots are more time than there is
        ("few-shot-nearest", 600, 850, 714),
        ("few-shot-nearest-calibrated", 600, 1000, 840),  # and three inputs without content
    ],
)
def test_what_a_cell_takes(method: str, learning: float, answering: float, rest: float) -> None:
    found = expected(plan(seeds=3), method, SPEED)
    assert (found.learning, found.answering, found.rest) == pytest.approx((learning, answering, rest))


def test_what_choosing_takes_depends_on_the_candidates() -> None:
    one, two = ({"instructions": ("Good or bad?", "Well?")[:count]} for count in (1, 2))
    assert expected(plan(**one), "instruction", SPEED).learning == 0
    assert expected(plan(**two), "instruction", SPEED).learning == pytest.approx(2 * 40 * 0.5)
    assert expected(plan(**two), "few-shot", SPEED).learning == pytest.approx((7 + 2) * 40 * 0.5 * 2)
    assert expected(plan(budget=10.0, **two), "few-shot", SPEED).learning == 10  # the budget ends it
    few = plan(train=toy(4, 1))
    assert expected(few, "few-shot", SPEED).learning == pytest.approx(3 * 40 * 0.5 * 2)  # 1, 2 and 4 shots
    assert expected(few, "few-shot-nearest", SPEED).learning == pytest.approx(min(600, 2 * 40 * 0.5 * 17))  # 1 and 4


def test_a_fresh_copy_is_loaded_however_short_the_budget() -> None:
    assert expected(plan(budget=1.0), "lora", SPEED).learning == 20
    assert expected(plan(budget=1.0), "soft-prompt", SPEED).learning == 1


def test_what_is_left_is_the_sum_of_the_cells_and_of_loading() -> None:
    """92 s and 692 s a base model; that of the first cell is in memory, the other takes 20 s to load."""
    compared = plan(bases=("a", "b"))
    time = ComparisonTime(compared, {"a": SPEED, "b": SPEED})
    assert compared.keys == [
        Key("a", "zero-shot", 0),
        Key("a", "soft-prompt", 0),
        Key("b", "zero-shot", 0),
        Key("b", "soft-prompt", 0),
    ]
    left = time.left(compared.keys)
    assert (left.learning, left.answering, left.rest) == pytest.approx((1200, 200, 4 * 42 + 20))
    assert time.left(compared.keys[2:]).total == pytest.approx(92 + 692)
    assert time.left(compared.keys, spent=80.0).total == pytest.approx(left.total - 80)
    assert time.left(compared.keys, spent=500.0).total == pytest.approx(left.total - 92)  # it is over soon
    assert time.left([]) == Parts()


def test_finished_cells_correct_those_of_their_kind() -> None:
    compared = plan(seeds=3, bases=("a", "b"), methods=("soft-prompt", "prefix"))
    fast = Speed(load=20.0, row=0.25, alone=1.0, plain=15.0, tokens=32.0, window=2048)
    time = ComparisonTime(compared, {"a": SPEED, "b": fast})
    assert time.cell(Key("a", "soft-prompt", 1)).total == pytest.approx(692)
    assert time.cell(Key("b", "soft-prompt", 1)).total == pytest.approx(646)
    time.saw(done("a", "soft-prompt", 1000))
    time.saw({"status": "failed", "base": "a", "method": "soft-prompt", "seed": 1, "seconds": 3.0})
    assert time.cell(Key("a", "soft-prompt", 1)).total == pytest.approx(1000)
    time.saw(done("a", "soft-prompt", 1384))
    assert time.cell(Key("a", "soft-prompt", 2)).total == pytest.approx(1192)
    assert time.cell(Key("a", "soft-prompt", 2)).learning == pytest.approx(600 / 692 * 1192)
    assert time.cell(Key("a", "prefix", 0)).total == pytest.approx(692)
    # on the other base model it takes as many times as long as expected
    assert time.cell(Key("b", "soft-prompt", 0)).total == pytest.approx(646 * 1192 / 692)
    time.saw(done("b", "soft-prompt", 700))
    assert time.cell(Key("b", "soft-prompt", 1)).total == pytest.approx(700)


def test_cells_of_an_earlier_run_count_if_they_say_what_they_took() -> None:
    cells = [done("a", "soft-prompt", 900), {"status": "done", "base": "a", "method": "zero-shot", "seed": 0}]
    time = ComparisonTime(plan(), {"a": SPEED}, cells)
    assert time.cell(Key("a", "soft-prompt", 1)).total == pytest.approx(900)
    assert time.cell(Key("a", "zero-shot", 0)).total == pytest.approx(92)


def test_a_base_model_that_was_not_timed_counts_with_its_budgets() -> None:
    compared = plan()
    assert ComparisonTime(compared, {}).left(compared.keys) == Parts(learning=600)


@pytest.mark.parametrize("labelled", [True, False])
def test_a_base_model_is_timed(labelled: bool) -> None:
    lm = tiny("llama")
    compared = plan() if labelled else plan(verbalizer=None, methods=("zero-shot",))
    found = Speed.of(compared, lm, 3.0, 4.0)
    assert (found.load, found.plain, found.window) == (3.0, 4.0, lm.window)
    assert found.row > 0
    assert found.alone > 0
    chosen = compared.test.examples[::6][:16]
    tokens = [
        len(lm.tokenizer(example.fields["input"] + " ", add_special_tokens=False).input_ids) for example in chosen
    ]
    assert found.tokens == pytest.approx(sum(tokens) / 16, abs=2)  # what begins a sequence, and the blank at the end
