"""Soft prompts that are trained together come out as each does alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt.errors import ConfigError, StoreError
from softprompt.tuning import checkpoint
from softprompt.tuning.gradients import Gradients, Work
from softprompt.tuning.many import train_together
from softprompt.tuning.step import Step
from softprompt.tuning.training import Training
from tests.conftest import tiny, toy, toy_task, train_settings

JOBS: tuple[dict[str, Any], ...] = (
    {},
    {"seed": 3, "lr": 0.1, "average": 0.9},
    {"num_virtual_tokens": 9, "loss": "labels", "batch_size": 3},
    {"parametrisation": "residual", "steps": 4},
    {"parametrisation": "prefix", "eval_every": 3},
    {"starts": 2, "steps": 10},
    {"optimizer": "adafactor", "weight_decay": 0.01, "clip": 0.5},
)
"""Other seeds, rates, lengths, losses, forms, batch sizes, steps, starts and optimizers."""


def made(number: int, kind: str = "llama", **options: Any) -> Training:
    """Job ``number``, each with rows of its own."""
    config = train_settings(**{"eval_every": 5, "steps": 8, **JOBS[number]})
    data = toy(24 + number, number)
    return Training(toy_task(tiny(kind), data, config.longest), data, toy(12, 50 + number), config, **options)


def run(trainings: Sequence[Training]) -> list[list[Step]]:
    """The steps of each."""
    found: list[list[Step]] = [[] for _ in trainings]
    for steps in train_together(trainings):
        for own, step in zip(found, steps, strict=True):
            own.extend([step] if step is not None else [])
    return found


def same(together: Training, alone: Training, tolerance: float = 2e-4) -> None:
    found, expected = together.result(), alone.result()
    torch.testing.assert_close(found.vectors, expected.vectors, rtol=tolerance, atol=tolerance)
    assert (together.step, together.stopped or "steps") == (alone.step, alone.stopped or "steps")
    for ours, theirs in zip(found.metrics, expected.metrics, strict=True):
        assert ours.keys() == theirs.keys()
    for key in ("best_step", "steps_done", "tokens"):
        assert found.training[key] == expected.training[key]


def test_each_comes_out_as_alone() -> None:
    trainings = [made(number) for number in range(len(JOBS))]
    steps = run(trainings)
    for number, (training, own) in enumerate(zip(trainings, steps, strict=True)):
        alone = made(number)
        expected = list(alone)
        assert [step.number for step in own] == [step.number for step in expected]
        assert [step.loss for step in own] == pytest.approx([step.loss for step in expected], rel=1e-4)
        assert [step.lr for step in own] == [step.lr for step in expected]
        assert [step.validation is None for step in own] == [step.validation is None for step in expected]
        same(training, alone)
        assert training.base_unchanged


def test_architectures_without_a_shared_prefix_train_together_too() -> None:
    trainings = [made(number, "stablelm") for number in (0, 1)]
    run(trainings)
    for number, training in enumerate(trainings):
        alone = made(number, "stablelm")
        list(alone)
        same(training, alone)


def poisoned(monkeypatch: pytest.MonkeyPatch, job: int, at: int) -> None:
    """The loss of one job is not finite in one round."""
    add, rounds = Gradients.add, 0

    def spoilt(gradients: Gradients, work: Work, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        nonlocal rounds
        rounds += 1
        losses = add(gradients, work, vectors)
        if rounds == at:
            losses = losses.clone()
            losses[job] = math.nan
        return losses

    monkeypatch.setattr(Gradients, "add", spoilt)


def test_one_that_fails_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        poisoned(patch, 1, 4)
        trainings = [made(number) for number in (0, 1, 2)]
        run(trainings)
    assert (trainings[1].stopped, trainings[1].step) == ("not finite", 3)
    for number in (0, 2):
        alone = made(number)
        list(alone)
        same(trainings[number], alone)


def test_one_that_ends_early_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    trainings = [made(number) for number in (0, 3)]
    rounds = [[step is not None for step in steps] for steps in train_together(trainings)]
    assert rounds == [[True, True]] * 4 + [[True, False]] * 4
    alone = made(0)
    list(alone)
    same(trainings[0], alone)


# --- what survives a kill ------------------------------------------------------------------------------------


class Killed(Exception):
    pass


@contextmanager
def killed_at_checkpoint(number: int) -> Iterator[None]:
    """Inside, what trains dies in the place of writing its ``number``-th checkpoint."""
    save, numbers = checkpoint.save, count(1)

    def dies(*given: Any, **options: Any) -> None:
        if next(numbers) == number:
            raise Killed
        save(*given, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", dies)
        with pytest.raises(Killed):
            yield


@pytest.mark.parametrize("at", [1, 3, 6, 8, 11, 14])
def test_trainings_that_were_killed_go_on_to_the_same_bits(at: int, tmp_path: Path) -> None:
    """The kill comes at any of the checkpoints that are written: some have the latest one, others do not."""

    def jobs(where: str, **options: Any) -> list[Training]:
        return [made(number, folder=tmp_path / where / str(number), **options) for number in (0, 2, 3, 5)]

    whole = jobs("whole")
    run(whole)
    killed = jobs("parts")
    with killed_at_checkpoint(at):
        run(killed)
    del killed
    resumed = jobs("parts", resume=True)
    run(resumed)
    for ours, theirs in zip(resumed, whole, strict=True):
        assert torch.equal(ours.result().vectors, theirs.result().vectors)
        assert (ours.step, ours.rounds) == (theirs.step, theirs.rounds)
        logs = [(each.folder or tmp_path) / checkpoint.LOG for each in (ours, theirs)]
        assert len(logs[0].read_text().splitlines()) == len(logs[1].read_text().splitlines())


def test_trainings_of_other_rounds_are_refused(tmp_path: Path) -> None:
    first = made(0, folder=tmp_path / "a")
    for step in first:
        if step.number == 5:
            break
    second = made(2, folder=tmp_path / "b")
    with pytest.raises(StoreError, match="no checkpoint"):
        run([made(0, folder=tmp_path / "a", resume=True), second])


def test_trainings_share_one_base_model_and_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one base model"):
        run([made(0), made(0, "gpt2")])
    one = made(0, folder=tmp_path)
    with pytest.raises(ConfigError, match="folders of their own"):
        run([one, one])
