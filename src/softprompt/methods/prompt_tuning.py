"""The soft prompt's own way: as many steps as the budget lasts for; and ensembles of several."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from dataclasses import dataclass, replace

from softprompt.errors import ConfigError, TrainingError
from softprompt.methods.problem import CHECKING, LEAST_CHECKS, PROBE, PROBE_ROWS, Learned, Problem
from softprompt.tasks.ensemble import Ensemble
from softprompt.tasks.predict import Query, predict
from softprompt.tasks.task import Task
from softprompt.tuning.config import EVAL_EVERY, TrainConfig, most_steps
from softprompt.tuning.training import Training

NOTHING_LEARNED = "The loss is not finite at the very first steps, so nothing was learned; try --dtype fp32."

LATEST = 50
"""Steps whose median tells how many more there is time for."""


def soft_prompt(problem: Problem, parametrisation: str = "plain") -> Learned:
    """A soft prompt tuned with the default settings, in as many steps as the budget lasts for."""
    config = TrainConfig(seed=problem.seed, parametrisation=parametrisation, validation_rows=problem.validation_rows)
    task = Task(problem.lm, problem.template, problem.verbalizer, problem.num_virtual_tokens, problem.lm.window)
    problem.notice("timing a step")
    config, pace = _within_budget(problem, task, config)
    training = Training(task, problem.train, problem.validation, config)
    curve, ended = [], time.perf_counter()
    for step in training:
        if step.number % 10 == 0:
            problem.notice(f"step {step.number:,} of {step.total:,}, loss {step.loss:.3f}")
        began, ended = ended, time.perf_counter()
        if step.number > 1:  # the first may compile
            pace.steps.append(step.seconds)
        if step.validation is not None:
            pace.validation = ended - began - step.seconds
            seconds = problem.budget - problem.seconds_left
            value, loss = step.validation["value"], step.validation["loss"]
            curve.append({"seconds": round(seconds, 1), "step": step.number, "value": value, "loss": loss})
        if step.number < step.total:
            training.end_after(pace.end(problem.seconds_left, config.eval_every or EVAL_EVERY, step.number))
    if not training.step:
        raise TrainingError(NOTHING_LEARNED)
    found = training.result()
    kept = problem.lm.kept_prefixes(1)
    return Learned(
        answer=lambda examples, progress: predict(
            [Query(task, example, found.vectors) for example in examples], progress=progress, prefix_of=kept
        ),
        trainable_parameters=found.training["trainable_parameters"],
        bytes=len(found.encoded()),
        chosen={"steps": found.training["steps_done"], "best_step": found.training["best_step"]},
        validation=found.metrics[0]["value"] if found.metrics else None,
        curve=tuple(curve),
        soft_prompt=found,
        validation_rows=found.data["validation"]["rows"],
        alarms=training.alarms,
    )


@dataclass
class _Pace:
    """What training has been seen to take.

    Attributes:
        steps: seconds of each of the latest steps.
        validation: seconds of a validation.
        most: steps that a run may have, however long the time.
    """

    steps: deque[float]
    validation: float
    most: int

    @property
    def a_step(self) -> float:
        """Seconds that a step is expected to take."""
        return statistics.median(self.steps)

    def end(self, seconds: float, every: int, done: int = 0) -> int:
        """How many steps the longest run has that has done ``done`` and takes ``seconds`` more, with a validation at
        every multiple of ``every`` and at its end: at least one more step, and at most ``most``."""
        end, check = done, done - done % every + every
        while end < self.most:
            last = done + int((seconds - self.validation) / self.a_step)
            end = max(end, min(last, check, self.most))
            if last <= check:
                break
            seconds, check = seconds - self.validation, check + every
        return max(end, done + 1)


def _within_budget(problem: Problem, task: Task, config: TrainConfig) -> tuple[TrainConfig, _Pace]:
    """The settings with as many steps as fit into what is left of the budget, and what some steps and rows took that
    were timed for it."""
    config = replace(config, compile="on" if problem.worth_compiling else "off")
    rows = min(config.validation_rows, len(problem.validation.examples))
    some = min(rows, PROBE_ROWS)
    timed = replace(config, steps=PROBE, eval_every=1_000, validation_rows=some)
    probe = Training(task, problem.train, problem.validation, timed)
    most = most_steps(len(problem.train.examples), config.batch_size)
    began, pace = time.perf_counter(), _Pace(deque(maxlen=LATEST), 0.0, most)
    for step in probe:
        pace.steps.append(step.seconds)
        if problem.seconds_left < 0:
            return replace(config, steps=1, compile="off"), pace
    if len(pace.steps) < 2:
        raise TrainingError(NOTHING_LEARNED)
    a_row = (time.perf_counter() - began - sum(pace.steps)) / some
    pace.validation = rows * a_row
    pace.steps.popleft()  # the first may compile
    config = replace(config, compile="on" if probe.compiled else "off")

    every = max(EVAL_EVERY, math.ceil((1 / CHECKING - 1) * pace.validation / pace.a_step))
    every = max(1, min(every, pace.end(problem.seconds_left, every) // LEAST_CHECKS))
    return replace(config, steps=pace.end(problem.seconds_left, every), eval_every=every), pace


def _of_several(problem: Problem, vote: str) -> Learned:
    """The answers of all seeds' soft prompts, from one batch, made into one.

    Args:
        problem: holds them as ``siblings``.
        vote: as ``Ensemble`` has it.

    Raises:
        ConfigError: fewer than 2 soft prompts.
    """
    members = problem.siblings
    if len(members) < 2:
        raise ConfigError(
            f"An ensemble needs the soft prompts of at least 2 seeds, found {len(members)}; run them first."
        )
    together = Ensemble.of(problem.lm, members, vote)
    kept = problem.lm.kept_prefixes(len(members))
    return Learned(
        answer=lambda examples, progress: list(together.predict(examples, progress=progress, prefix_of=kept)),
        trainable_parameters=sum(member.vectors.numel() for member in members),
        bytes=sum(len(member.encoded()) for member in members),
        chosen={"soft_prompts": len(members)},
    )


def ensemble(problem: Problem) -> Learned:
    """The mean probability of all seeds' soft prompts."""
    return _of_several(problem, "mean")


def majority(problem: Problem) -> Learned:
    """The label that most seeds' soft prompts give; among equals, the more probable (Lester et al. 2021, §6)."""
    return _of_several(problem, "majority")
