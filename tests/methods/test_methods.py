"""The soft prompt's own methods, against evaluation by hand and votes counted apart."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softprompt.errors import ConfigError, SoftPromptWarning, TrainingError
from softprompt.evaluation.evaluate import evaluate
from softprompt.methods import problem as problems
from softprompt.methods import prompt_tuning
from softprompt.methods.problem import Learned, Problem
from softprompt.model.fast.layers import LayerModes
from softprompt.model.frozen import FrozenLM
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tasks.length import VIRTUAL_TOKENS
from softprompt.tasks.predict import Query, predict
from softprompt.tasks.task import Task
from softprompt.tuning.config import DEFAULT_STEPS, TrainConfig
from softprompt.tuning.gradients import Gradients, Work
from softprompt.tuning.step import Step
from softprompt.tuning.training import Training
from tests.conftest import TOY_LABELS, TOY_TEMPLATE, toy


def problem(lm: FrozenLM, **options: Any) -> Problem:
    settings: dict[str, Any] = {
        "lm": lm,
        "fresh": lambda: pytest.fail("another copy of the base model was loaded"),
        "template": TOY_TEMPLATE,
        "verbalizer": TOY_LABELS,
        "train": toy(60, 1),
        "validation": toy(20, 2),
        "seed": 0,
        "budget": 60.0,
    }
    return Problem(**settings | options)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings of at most 40 steps."""
    monkeypatch.setattr("softprompt.methods.prompt_tuning.most_steps", lambda rows, batch_size: 40)


@pytest.mark.usefixtures("short")
def test_a_soft_prompt_is_what_training_makes_of_the_defaults(llama: FrozenLM) -> None:
    learned = prompt_tuning.soft_prompt(problem(llama))
    found = learned.soft_prompt
    assert found is not None
    assert (found.training["lr"], found.num_virtual_tokens) == (TrainConfig().lr, VIRTUAL_TOKENS)
    assert learned.chosen["steps"] == found.training["steps_done"] == 40
    assert learned.trainable_parameters == VIRTUAL_TOKENS * llama.hidden_size
    test = toy(30, 3)
    by_hand = evaluate(Task.of(llama, found), found.vectors, test)
    answers = learned.answer(test.examples, None)
    assert [a.text for a in answers] == [a.text for a in by_hand.predictions]
    assert [point["step"] for point in learned.curve] == [13, 26, 39, 40]
    assert learned.validation == max(point["value"] for point in learned.curve)


def test_a_small_budget_is_kept(llama: FrozenLM) -> None:
    began = time.perf_counter()
    learned = prompt_tuning.soft_prompt(problem(llama, budget=1.5))
    assert 1 <= learned.chosen["steps"] < DEFAULT_STEPS
    assert time.perf_counter() - began < 15  # a machine ten times slower than its own probe would still pass


@pytest.mark.usefixtures("short")
def test_no_budget_at_all_still_gives_a_soft_prompt(llama: FrozenLM) -> None:
    assert prompt_tuning.soft_prompt(problem(llama, budget=1e-9)).chosen["steps"] == 1


@pytest.mark.parametrize("steps_timed", [0, problems.PROBE])
def test_a_loss_that_is_not_finite_from_the_first_step_on_is_said(
    steps_timed: int, llama: FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While steps are timed, and in the run after it."""
    add, calls = Gradients.add, itertools.count()

    def poisoned(*given: Any) -> torch.Tensor:
        losses = add(*given)
        return losses if next(calls) < steps_timed else losses * math.nan

    monkeypatch.setattr(Gradients, "add", poisoned)
    with pytest.raises(TrainingError, match=r"not finite at the very first steps, so nothing was learned"):
        prompt_tuning.soft_prompt(problem(llama))


@pytest.mark.parametrize("later", [0.25, 3.0])
def test_the_end_moves_when_steps_take_another_time_than_those_that_were_timed(
    llama: FrozenLM, monkeypatch: pytest.MonkeyPatch, later: float
) -> None:
    clock, steps, add = [0.0], [0], Gradients.add

    def slow(*given: Any) -> Any:
        steps[0] += 1
        clock[0] += 1.0 if steps[0] <= problems.PROBE + 10 else later
        return add(*given)

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(Gradients, "add", slow)
    monkeypatch.setattr("softprompt.methods.problem.TrainConfig", partial(TrainConfig, patience=0))
    monkeypatch.setattr("softprompt.methods.prompt_tuning.TrainConfig", partial(TrainConfig, patience=0))
    learned = prompt_tuning.soft_prompt(problem(llama, budget=60.0, began=0.0))
    found = learned.soft_prompt
    assert found is not None
    assert clock[0] == pytest.approx(60.0, abs=max(2.0, later))
    fitting = 10 + (60 - problems.PROBE - 10) / later
    assert learned.chosen["steps"] == found.training["steps"] == pytest.approx(fitting, abs=2 / min(1.0, later))
    assert learned.curve[-1]["step"] == learned.chosen["steps"]


@pytest.fixture
def shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings of at most 12 steps."""
    monkeypatch.setattr("softprompt.methods.prompt_tuning.most_steps", lambda rows, batch_size: 12)


def of_seeds(lm: FrozenLM, *seeds: int, **options: Any) -> list[Problem]:
    return [problem(lm, seed=seed, **options) for seed in seeds]


@pytest.mark.usefixtures("shorter")
@pytest.mark.parametrize("parametrisation", ["plain", "prefix"])
def test_seeds_in_shared_passes_are_each_what_they_are_alone(llama: FrozenLM, parametrisation: str) -> None:
    began = time.perf_counter()
    found = prompt_tuning.soft_prompts(of_seeds(llama, 0, 5, began=began), parametrisation=parametrisation)
    took, spent = time.perf_counter() - began, 0.0
    for seed, together in zip((0, 5), found, strict=True):
        assert isinstance(together, Learned)
        alone = prompt_tuning.soft_prompt(problem(llama, seed=seed), parametrisation)
        assert together.soft_prompt is not None
        assert alone.soft_prompt is not None
        torch.testing.assert_close(together.soft_prompt.vectors, alone.soft_prompt.vectors, rtol=2e-4, atol=2e-4)
        assert together.chosen == alone.chosen
        assert [point["step"] for point in together.curve] == [point["step"] for point in alone.curve]
        assert together.soft_prompt.training["seed"] == seed
        spent += together.seconds or 0.0
    assert 0.3 * took < spent <= took


class Killed(Exception):
    pass


@pytest.mark.usefixtures("shorter")
def test_seeds_that_were_killed_go_on_with_what_they_had_spent(
    llama: FrozenLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, rounds = Gradients.add, itertools.count()

    def dies(*given: Any) -> Any:
        if next(rounds) == problems.PROBE + 10:
            raise Killed
        time.sleep(0.01)
        return add(*given)

    with monkeypatch.context() as patch:
        patch.setattr(Gradients, "add", dies)
        with pytest.raises(Killed):
            prompt_tuning.soft_prompts(of_seeds(llama, 0, 3), tmp_path)
    done = itertools.count()

    def counting(*given: Any) -> Any:
        next(done)
        return add(*given)

    monkeypatch.setattr(Gradients, "add", counting)
    resumed = prompt_tuning.soft_prompts(of_seeds(llama, 0, 3), tmp_path)
    assert next(done) == 12 - 8  # from the checkpoint of the validation at step 8
    again = prompt_tuning.soft_prompts(of_seeds(llama, 0, 3), tmp_path)  # ended, and not yet given up
    assert next(done) == 12 - 8 + 1
    whole = prompt_tuning.soft_prompts(of_seeds(llama, 0, 3))
    for one, twice, other in zip(resumed, again, whole, strict=True):
        assert isinstance(one, Learned)
        assert isinstance(twice, Learned)
        assert isinstance(other, Learned)
        assert one.soft_prompt is not None
        assert twice.soft_prompt is not None
        assert other.soft_prompt is not None
        torch.testing.assert_close(one.soft_prompt.vectors, other.soft_prompt.vectors, rtol=0, atol=0)
        torch.testing.assert_close(one.soft_prompt.vectors, twice.soft_prompt.vectors, rtol=0, atol=0)
        assert [point["step"] for point in one.curve] == [4, 8, 12]
        assert (one.seconds or 0.0) > 0.01 * (problems.PROBE + 8) / 2


def test_of_several_starts_the_best_goes_on(llama: FrozenLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each start is a training with its seed, and they are ranked by what that scores after a tenth of the steps."""
    monkeypatch.setattr("softprompt.methods.prompt_tuning.most_steps", lambda rows, batch_size: 20)
    monkeypatch.setattr("softprompt.methods.prompt_tuning.TrainConfig", partial(TrainConfig, patience=0))
    add, sizes = Gradients.add, list[int]()

    def seen(gradients: Gradients, work: Work, vectors: Any) -> Any:
        sizes.append(len(vectors))
        if len(sizes) == problems.PROBE + 9:
            raise Killed
        return add(gradients, work, vectors)

    monkeypatch.setattr(Gradients, "add", seen)
    asked = of_seeds(llama, 0, 1, starts=3)
    with pytest.raises(Killed):
        prompt_tuning.soft_prompts(asked, tmp_path)
    found = prompt_tuning.soft_prompts(asked, tmp_path)
    assert sizes[: problems.PROBE + 2] == [2] * problems.PROBE + [6] * 2
    assert set(sizes[problems.PROBE + 2 :]) == {2}
    assert len(sizes) == problems.PROBE + 9 + 20 - 8
    for one, each in zip(found, asked, strict=True):
        assert isinstance(one, Learned)
        scores, runs = [], list[Training]()
        for start in range(3):
            made: dict[str, Any] = {
                "seed": each.seed + start * prompt_tuning.START_SEEDS,
                "init": "labels" if start else "auto",
            }
            config = TrainConfig(steps=20, eval_every=2, patience=0, **made)
            task = Task(llama, TOY_TEMPLATE, TOY_LABELS, VIRTUAL_TOKENS, llama.window)
            runs.append(Training(task, each.train, each.validation, config))
            for step in runs[-1]:
                if step.number == 2:
                    assert step.validation is not None
                    scores.append(step.validation["score"])
                    if start != max(range(len(scores)), key=scores.__getitem__):
                        break
        best = max(range(3), key=scores.__getitem__)
        assert one.chosen["start"] == best
        assert one.soft_prompt is not None
        torch.testing.assert_close(one.soft_prompt.vectors, runs[best].result().vectors, rtol=2e-4, atol=2e-4)


def test_another_budget_or_other_seeds_begin_anew(llama: FrozenLM, tmp_path: Path) -> None:
    assert isinstance(prompt_tuning.soft_prompts(of_seeds(llama, 0, budget=1e-9), tmp_path)[0], Learned)
    for options in ({"budget": 2e-9}, {"seed": 1}):
        found = prompt_tuning.soft_prompts([problem(llama, **{"budget": 1e-9, **options})], tmp_path)[0]
        assert isinstance(found, Learned)
        assert found.chosen["steps"] == 1


def test_seeds_may_take_the_budget_of_each_together(llama: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shared pass takes a second here, as a pass of one would: twice the time of one, so twice as many steps."""
    clock, add = [0.0], Gradients.add

    def slow(*given: Any) -> Any:
        clock[0] += 1.0
        return add(*given)

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(Gradients, "add", slow)
    monkeypatch.setattr("softprompt.methods.prompt_tuning.TrainConfig", partial(TrainConfig, patience=0))
    found = prompt_tuning.soft_prompts(of_seeds(llama, 0, 1, budget=30.0, began=0.0))
    assert clock[0] == pytest.approx(60.0, abs=2.0)
    for one in found:
        assert isinstance(one, Learned)
        assert one.chosen["steps"] == pytest.approx(60 - problems.PROBE, abs=2)
        assert one.seconds == pytest.approx(30.0, abs=1.0)


@pytest.mark.parametrize(("a_row", "rows"), [(0.01, 300), (0.1, 200), (10.0, 100)])
def test_where_validations_are_dear_they_are_of_fewer_rows(
    llama: FrozenLM, monkeypatch: pytest.MonkeyPatch, a_row: float, rows: int
) -> None:
    """A tenth of the 600 seconds is for three validations."""
    clock, score = [0.0], FrozenLM.score

    def slow_rows(self: FrozenLM, requests: Any, *given: Any) -> Any:
        clock[0] += len(requests) * a_row
        return score(self, requests, *given)

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(FrozenLM, "score", slow_rows)
    asked = problem(llama, budget=600.0, began=0.0, validation=toy(300, 1))
    assert problems.affordable_rows(asked) == pytest.approx(rows, abs=1)


@given(st.integers(1, 60), st.integers(0, 300), st.integers(1, 9), st.integers(1, 80), st.integers(0, 400))
def test_a_run_is_planned_to_end_in_time(a_step: int, validation: int, k: int, every: int, done: int) -> None:
    """Against runs played step by step: it is the longest that is in time."""
    seconds = validation + a_step * (1 + 97 * k)

    def takes(end: int) -> int:
        return sum(a_step + validation * (n % every == 0 or n == end) for n in range(done + 1, end + 1))

    pace = prompt_tuning._Pace(deque([float(a_step)]), float(validation), 90)
    end = pace.end(float(seconds), every, done)
    fitting = [n for n in range(done + 1, done + 1 + seconds // a_step + 1) if takes(n) <= seconds]
    assert end == min(fitting[-1], max(90, done + 1))


def test_long_budgets_compile_the_steps_that_are_timed_and_the_run(
    llama: FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, switch = list[str](), LayerModes.set
    monkeypatch.setattr("softprompt.methods.prompt_tuning.most_steps", lambda rows, batch_size: 3)
    monkeypatch.setattr(problems, "can_compile", lambda lm: lm is llama)

    def spied(modes: LayerModes, **wanted: bool) -> None:
        done.extend(["compiled"] * wanted.get("compiled", False))
        switch(modes, **wanted)

    monkeypatch.setattr(LayerModes, "set", spied)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    for budget, expected in ((300.0, 2), (299.0, 0)):
        done.clear()
        assert prompt_tuning.soft_prompt(problem(llama, budget=budget)).chosen["steps"] == 3
        assert done == ["compiled"] * expected
    monkeypatch.setattr(problems, "can_compile", lambda lm: False)
    prompt_tuning.soft_prompt(problem(llama, budget=300.0))
    assert done == []


def test_a_compiler_that_does_not_work_is_tried_once(
    llama: FrozenLM, monkeypatch: pytest.MonkeyPatch, broken_compiler: list[str]
) -> None:
    monkeypatch.setattr("softprompt.methods.prompt_tuning.most_steps", lambda rows, batch_size: 3)
    monkeypatch.setattr(problems, "can_compile", lambda lm: True)
    with pytest.warns(SoftPromptWarning, match="could not be compiled"):
        assert prompt_tuning.soft_prompt(problem(llama, budget=300.0)).chosen["steps"] == 3
    assert len(broken_compiler) == llama.trained.kv_shape[0] - 1


def siblings(lm: FrozenLM, count: int) -> tuple[SoftPrompt, ...]:
    made = prompt_tuning.soft_prompt(problem(lm, budget=1e-9)).soft_prompt
    assert made is not None
    draws = torch.Generator().manual_seed(5)
    return tuple(
        replace(made, vectors=made.vectors + torch.randn(made.vectors.shape, generator=draws)) for _ in range(count)
    )


def test_an_ensemble_gives_the_mean_probability(llama: FrozenLM) -> None:
    members, examples = siblings(llama, 3), toy(12, 4).examples
    learned = prompt_tuning.ensemble(problem(llama, siblings=members))
    each = [
        [answer.probabilities for answer in predict([Query(Task.of(llama, one), row, one.vectors) for row in examples])]
        for one in members
    ]
    for row, answer in enumerate(learned.answer(examples, None)):
        assert answer.probabilities is not None
        for label, probability in answer.probabilities.items():
            mean = sum((several[row] or {})[label] for several in each) / 3
            assert probability == pytest.approx(mean, abs=1e-6)
    assert learned.trainable_parameters == 3 * members[0].vectors.numel()


def test_a_majority_is_counted(llama: FrozenLM) -> None:
    members, examples = siblings(llama, 3), toy(12, 4).examples
    learned = prompt_tuning.majority(problem(llama, siblings=members))
    each = [
        [answer.text for answer in predict([Query(Task.of(llama, one), row, one.vectors) for row in examples])]
        for one in members
    ]
    wanted = [Counter(several[row] for several in each).most_common(1)[0][0] for row in range(12)]
    assert [answer.text for answer in learned.answer(examples, None)] == wanted


def test_an_ensemble_of_one_is_refused(llama: FrozenLM) -> None:
    with pytest.raises(ConfigError) as caught:
        prompt_tuning.ensemble(problem(llama, siblings=siblings(llama, 1)))
    assert str(caught.value) == ("An ensemble needs the soft prompts of at least 2 seeds, found 1; run them first.")


@pytest.mark.usefixtures("short")
def test_the_weights_are_looked_at_once_after_the_budget(llama: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, they were already: when the base model was loaded."""
    _ = llama.digest_before
    looked: list[bool] = []
    real = FrozenLM.weights_digest
    given = problem(llama)

    def digest(lm: FrozenLM) -> str:
        looked.append(ended[0])
        return real(lm)

    ended = [False]
    steps = Training.__iter__

    def until_the_end(training: Training) -> Iterator[Step]:
        yield from steps(training)
        ended[0] = training.total > problems.PROBE

    monkeypatch.setattr(FrozenLM, "weights_digest", digest)
    monkeypatch.setattr(Training, "__iter__", until_the_end)
    prompt_tuning.soft_prompt(given)
    assert looked == [True]
