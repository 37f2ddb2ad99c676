"""When validations come, and how long a training takes: arithmetic done by hand."""

from __future__ import annotations

from typing import Any

import pytest

from softprompt.tuning.training import Training
from softprompt.tuning.training_time import Schedule, TrainingTime
from tests.conftest import tiny, toy, toy_task, train_settings


def test_the_time_left_is_steps_and_validations_at_what_they_took() -> None:
    """2,304 s: 1,600 steps of 1.3 s are 2,080 s, and 16 validations of 14 s are 224 s."""
    expected = TrainingTime(Schedule(1600, 100, rows=500, tokens=9000))
    for seconds in (1.2, 9.0, 1.3, 1.4, 0.1):  # the median is 1.3
        expected.saw_step(seconds, 600)
    expected.saw_validation(14.0)
    assert expected.left(0) == pytest.approx(2304)
    assert expected.left(100) == pytest.approx(1500 * 1.3 + 15 * 14)
    assert expected.left(1599) == pytest.approx(1.3 + 14)
    assert expected.left(1600) == 0


def test_a_validation_is_guessed_by_its_tokens_until_one_was_seen() -> None:
    """9,000 tokens are 15 steps of 600 tokens, at a third of their time: 5 steps of 2 s."""
    expected = TrainingTime(Schedule(100, 50, rows=500, tokens=9000))
    for _ in range(2):
        expected.saw_step(2.0, 600)
    assert not expected.validations_seen
    assert expected.a_validation == pytest.approx(10)
    assert expected.left(0) == pytest.approx(100 * 2 + 2 * 10)
    expected.saw_validation(30.0)
    assert expected.validations_seen
    assert expected.left(50) == pytest.approx(50 * 2 + 30)


@pytest.mark.parametrize(
    ("seconds", "ready"),
    [((), False), ((0.1,) * 3, False), ((0.1,) * 4, True), ((2.6,), False), ((20.0,), False), ((2.6, 2.6), True)],
)
def test_an_estimate_needs_a_few_steps_or_seconds(seconds: tuple[float, ...], ready: bool) -> None:
    expected = TrainingTime(Schedule(100, 50, rows=5, tokens=90))
    for took in seconds:
        expected.saw_step(took, 10)
    assert expected.ready is ready


@pytest.mark.parametrize(
    ("options", "validations"),
    [
        ({"steps": 10, "eval_every": 5}, (5, 10)),
        ({"steps": 10, "eval_every": 4}, (4, 8, 10)),
        ({"steps": 3, "eval_every": 50}, (3,)),
        ({"steps": 20, "eval_every": 50, "starts": 3}, (2, 4, 6, 24)),  # 2 steps for each start, and 18 for the best
        ({"steps": 20, "eval_every": 3, "starts": 2}, (2, 4, 5, 8, 11, 14, 17, 20, 22)),
        ({"steps": 30, "eval_every": 2, "starts": 2}, (2, 3, 5, 6, *range(7, 34, 2))),
        ({"steps": 1, "eval_every": 1, "starts": 2}, (1, 2)),
    ],
)
def test_validations_come_when_the_schedule_says(options: dict[str, Any], validations: tuple[int, ...]) -> None:
    lm, data = tiny("llama"), toy(20, 1)
    training = Training(toy_task(lm, data), data, toy(8, 2), train_settings(**options))
    schedule = training.schedule
    found = tuple(step.number for step in training if step.validation is not None)
    assert schedule.validations[-1] == schedule.total == training.total
    assert found == schedule.validations
    assert schedule.rows == 8
    for done in range(training.total + 1):
        assert schedule.validations_after(done) == sum(number > done for number in found)
    assert found == validations


@pytest.mark.parametrize("kind", ["llama", "gpt2", "stablelm"])
def test_the_tokens_of_a_validation_are_those_of_a_step_over_its_rows(kind: str) -> None:
    """A step over the same rows, by the loss that scores every label, too, computes the shared prefix besides."""
    lm, data = tiny(kind), toy(8, 2)
    task = toy_task(lm, data)
    training = Training(task, data, data, train_settings(batch_size=8, steps=1, loss="labels"))
    (step,) = training
    prefix = task.label_request(data.examples[0]).shared - 1 + 6 if lm.shares_prefix else 0
    assert training.schedule.tokens == step.tokens - prefix
