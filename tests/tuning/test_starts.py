"""Several starts and lengths of a soft prompt in one run: each against a run of its own."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt.errors import ConfigError
from softprompt.inspection.drift import way_of
from softprompt.inspection.start import starting_vectors
from softprompt.tuning.config import TrainConfig
from softprompt.tuning.gradients import Gradients
from softprompt.tuning.optimizer import learning_rate
from softprompt.tuning.start import initial_vectors
from softprompt.tuning.training import Training
from tests.conftest import scripted, tiny, toy, toy_task, train_settings


def test_the_best_of_several_starts_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three starts of 2 steps each; the second has the best validation (the loss decides) and does its other 18."""
    script = [(0.5, 1.0), (0.6, 0.8), (0.6, 0.9), (0.4, 1.0), (0.8, 1.0), (0.9, 1.0), (0.3, 1.0)]
    seen = scripted(monkeypatch, script)
    data = toy(20, 0)
    task = toy_task(tiny("llama"), data)
    config = train_settings(steps=20, eval_every=5, starts=3, seed=4, init="vocab")
    training = Training(task, data, data, config)
    steps = list(training)
    assert training.total == 24
    assert [step.number for step in steps] == list(range(1, 25))
    assert [step.number for step in steps if step.validation] == [2, 4, 6, 9, 14, 19, 24]
    assert [step.lr for step in steps] == [learning_rate(config, k, 20) for k in (0, 1, 0, 1, *range(20))]
    made = training.result()
    assert made.training["start"] == 1
    assert (made.training["best_step"], made.training["steps_done"]) == (19, 24)
    monkeypatch.undo()

    alone = scripted(monkeypatch, [(0.1, 1.0)] * 20)
    single = Training(task, data, data, train_settings(steps=20, eval_every=1, seed=5, init="vocab"))
    list(single)
    assert torch.equal(seen[1], alone[1])  # the second start is a run with the next seed
    for place, expected in ((4, 3), (9, 4), (14, 5), (19, 6)):
        assert torch.equal(seen[expected], alone[place])


def poison(monkeypatch: pytest.MonkeyPatch, *bad: int) -> None:
    """Makes the losses of those calls, counted from 1, not finite."""
    add, calls = Gradients.add, itertools.count(1)

    def poisoned(*given: Any) -> torch.Tensor:
        losses = add(*given)
        return losses * math.nan if next(calls) in bad else losses

    monkeypatch.setattr(Gradients, "add", poisoned)


@pytest.mark.parametrize(
    ("bad", "numbers", "goes_on"),
    [
        (2, [1, 3, 4, 5, 6], 2),  # the first start ends in its second step and has no validation
        (3, [1, 2, 5, 6], 2),  # the second ends in its first
        (6, [1, 2, 3, 4, 5], 1),  # the last ends in its last
    ],
)
def test_a_start_whose_loss_is_not_finite_is_given_up(
    bad: int, numbers: list[int], goes_on: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three starts of 2 steps each, each better than the one before."""
    poison(monkeypatch, bad)
    scripted(monkeypatch, [(0.5, 1.0), (0.6, 1.0)] + [(0.7, 1.0)] * 4)
    data = toy(20, 0)
    config = train_settings(steps=20, eval_every=5, starts=3, seed=4, init="vocab")
    training = Training(toy_task(tiny("llama"), data), data, data, config)
    steps = list(training)
    assert [step.number for step in steps] == [*numbers, *range(7, 25)]
    found = [step.validation["start"] for step in steps if step.validation]
    assert found == [*(start for start in range(3) if start != (bad - 1) // 2), *[goes_on] * 4]
    assert (training.stopped, training.step) == ("steps", 24)


def test_starts_that_all_have_losses_that_are_not_finite_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, *range(1, 100))
    data = toy(20, 0)
    config = train_settings(steps=20, eval_every=5, starts=3, init="vocab")
    training = Training(toy_task(tiny("llama"), data), data, data, config)
    assert list(training) == []
    assert (training.stopped, training.tokens) == ("not finite", 0)


def test_with_init_auto_further_starts_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [(0.5, 1.0)] * 9)
    data = toy(40, 0)
    lm = tiny("llama")
    line = lm.tokenizer("Options: negative, positive.\n").input_ids
    task = toy_task(lm, data, len(line))
    training = Training(task, data, data, train_settings(num_virtual_tokens=len(line), starts=3))
    torch.testing.assert_close(training._begin(0).numbers(), lm.embedding[line])
    for number in (1, 2):
        expected = initial_vectors(lm, len(line), init="labels", seed=number, label_words=task.label_words)
        torch.testing.assert_close(training._begin(number).numbers(), expected)


def test_short_runs_do_not_spend_the_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [(0.9, 1.0)] + [(0.5, 1.0)] * 9)
    data = toy(20, 0)
    config = train_settings(steps=20, eval_every=5, starts=4, patience=2, init="vocab")
    training = Training(toy_task(tiny("llama"), data), data, data, config)
    steps = list(training)
    assert [step.number for step in steps if step.validation] == [2, 4, 6, 8, 11, 16]
    assert training.stopped == "early"
    assert training.result().training["best_step"] == 2


def test_prompt_lengths_are_tried_as_runs_of_their_own_and_the_best_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of P = 3, 5 and 2, two steps each; 5 is made the best, and goes on as a run with that P alone."""
    data, lm = toy(20, 0), tiny("llama")
    settings: dict[str, Any] = {"steps": 20, "eval_every": 2, "init": "vocab", "patience": 0}

    def trained(**options: Any) -> tuple[list[float], Training]:
        config = train_settings(**settings, **options)
        task = toy_task(lm, data, config.longest)
        training = Training(task, data, data, config)
        return [step.loss for step in training], training

    # the latest is the best, but that no start after number 1 is better than it
    monkeypatch.setattr(
        "softprompt.tuning.training.better", lambda one, other: one["start"] == 1 or other["start"] != 1
    )
    alone = {length: trained(num_virtual_tokens=length) for length in (2, 3, 5)}
    losses, training = trained(num_virtual_tokens=3, lengths=(5, 2))
    assert losses[:6] == [*alone[3][0][:2], *alone[5][0][:2], *alone[2][0][:2]]
    assert losses[6:] == alone[5][0][2:]
    made = training.result()
    assert made.num_virtual_tokens == 5
    assert torch.equal(made.vectors, alone[5][1].result().vectors)
    start, about = starting_vectors(training.task, made)
    assert about == "made again from the training record: init vocab, seed 0"
    assert start is not None
    assert torch.equal(start, initial_vectors(lm, 5, init="vocab", seed=0))


def test_several_starts_of_several_lengths() -> None:
    config = TrainConfig(num_virtual_tokens=4, starts=2, lengths=(8, 6))
    assert (config.tries, config.longest) == (6, 8)
    assert [config.start(number) for number in range(6)] == [(4, 0), (8, 0), (6, 0), (4, 1), (8, 1), (6, 1)]
    assert TrainConfig(**config.as_dict()) == config
    with pytest.raises(ConfigError, match=r"^lengths must be at least 1, not 0$"):
        TrainConfig(lengths=(5, 0))
    data = toy(20, 0)
    with pytest.raises(ConfigError) as error:
        Training(toy_task(tiny("llama"), data), data, config=train_settings(lengths=(2,)), start=torch.zeros(4, 8))
    assert str(error.value) == ("other lengths cannot be tried from a soft prompt to start from; leave one of them out")


@pytest.mark.parametrize("stop", [3, None])
def test_the_start_on_record_is_the_one_that_the_best_vectors_came_from(
    stop: int | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two starts of 2 steps: the first has the best validation midway, the second the better one at its end, and goes
    on; or the run is interrupted while the second is tried."""
    script = [(0.9, 1.0), (0.5, 1.0), (0.6, 1.0), (0.6, 0.9), *[(0.1, 1.0)] * 18]
    seen = scripted(monkeypatch, script)
    data = toy(20, 0)
    config = train_settings(steps=20, eval_every=1, starts=2, init="vocab", seed=7)
    training = Training(toy_task(tiny("llama"), data), data, data, config, folder=tmp_path)
    for step in training:
        if step.number == stop:
            break
    made = training.result()
    assert (made.training["start"], made.training["best_step"]) == (0, 1)
    assert torch.equal(made.vectors, seen[0])
    start, about = starting_vectors(training.task, made)
    assert about == "made again from the training record: init vocab, seed 7"
    assert start is not None
    way = way_of(made, tmp_path)
    assert list(way) == [0, 1, 2]
    torch.testing.assert_close(way[0], start, rtol=1e-5, atol=1e-6)
    assert torch.equal(way[2], seen[1])
