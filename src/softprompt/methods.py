"""What every way of adapting a base model is given, what it hands back, and the soft prompt's own way.

All methods see the same rows, template and labels, and have the same time. Hard prompts are in ``hardprompt.py``, ways
that change weights in ``finetune.py``; ``compare.py`` runs and measures them.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from softprompt import artifact
from softprompt.compilation import can_compile
from softprompt.config import EVAL_EVERY, TrainConfig, most_steps
from softprompt.data import Dataset, Example
from softprompt.errors import ConfigError, TrainingError
from softprompt.evaluate import Prediction, Progress, Query, headline, headline_metric, predict
from softprompt.frozen import FrozenLM
from softprompt.prompt import SoftPrompt, default_num_virtual_tokens
from softprompt.task import Task
from softprompt.template import Template, Verbalizer
from softprompt.train import Training
from softprompt.validation import validator

COMPILE_FROM = 300.0
"""Seconds of budget from which compiling the layers pays: it costs 10 to 25 of them."""
PROBE, PROBE_ROWS = 5, 100
"""Steps, and rows of a validation, that are timed to plan a run."""
CHECKING, LEAST_CHECKS = 0.1, 3
"""The share of the time that validations may take, and how many there are at least."""
NOTHING_LEARNED = "The loss is not finite at the very first steps, so nothing was learned; try --dtype fp32."
LATEST = 50
"""Steps whose median tells how many more there is time for."""


@dataclass(frozen=True)
class Problem:
    """What a method is to learn, and from what.

    Attributes:
        lm: the base model, which no method may change.
        fresh: loads another copy of it, which a method may change.
        template: with a place for the soft prompt; other methods put their hard text, or nothing, there.
        verbalizer: label → words; None for free text.
        train: rows to learn from.
        validation: rows to choose by.
        seed: seeds whatever the method draws.
        budget: seconds for learning, all choices included.
        instructions: the user's hard prompts.
        notice: is told what is being done, in a few words.
        siblings: the soft prompts of all seeds, for what is made of several.
        validation_rows: how many of them are used, a seeded choice, to validate what is being trained; the same for
            every trained method (:func:`affordable_rows`).
        began: clock time at which the budget began to run.
    """

    lm: FrozenLM
    fresh: Callable[[], FrozenLM]
    template: Template
    verbalizer: Verbalizer | None
    train: Dataset
    validation: Dataset
    seed: int
    budget: float
    instructions: tuple[str, ...] = ()
    notice: Callable[[str], None] = lambda _: None
    siblings: tuple[SoftPrompt, ...] = ()
    validation_rows: int = TrainConfig().validation_rows
    began: float = field(default_factory=time.perf_counter)

    @property
    def labels(self) -> tuple[str, ...]:
        """The label set; empty for free text."""
        return () if self.verbalizer is None else self.verbalizer.labels

    @property
    def num_virtual_tokens(self) -> int:
        """P of every soft prompt that is learned."""
        return default_num_virtual_tokens(self.lm, self.labels)

    @property
    def seconds_left(self) -> float:
        """What is left of the budget; below 0 when it is spent."""
        return self.budget - (time.perf_counter() - self.began)

    @property
    def worth_compiling(self) -> bool:
        """Whether the budget is large enough for compiling the layers to pay, and they can be."""
        return self.budget >= COMPILE_FROM and can_compile(self.lm)

    def task(self, hard_text: str = "", lm: FrozenLM | None = None) -> Task:
        """The task with hard text, or nothing, in the soft prompt's place, on ``lm`` or the base model."""
        lm = lm or self.lm
        return Task(lm, self.template.replace_soft_prompt(hard_text), self.verbalizer, 0, lm.window)

    def score(self, dataset: Dataset, predictions: Sequence[Prediction]) -> float:
        """The headline metric, see ``headline_metric``; higher is better."""
        return headline(headline_metric(self.train, self.labels), dataset, predictions).value


@dataclass(frozen=True)
class Learned:
    """What a method made of the training and validation rows.

    Attributes:
        answer: the predictions for rows whose targets are not looked at.
        trainable_parameters: how many numbers were learned.
        bytes: what must be kept for the task, the base model not counted.
        chosen: what was chosen on the validation rows, JSON values (``{"lr": 1e-4}``, ``{"k": 8}``).
        validation: the headline metric there, if it was computed.
        curve: for plots, in order: ``{"seconds", "step", "value", "loss"}`` on the validation rows.
        adapted: the changed copy of the base model; None if the base model itself is used, unchanged.
        soft_prompt: what was tuned, to be kept.
        validation_rows: how many rows each point of the curve was validated on; 0 where there is none.
    """

    answer: Callable[[Sequence[Example], Progress | None], list[Prediction]]
    trainable_parameters: int
    bytes: int
    chosen: Mapping[str, Any] = field(default_factory=dict)
    validation: float | None = None
    curve: tuple[Mapping[str, float], ...] = ()
    adapted: FrozenLM | None = None
    soft_prompt: SoftPrompt | None = None
    validation_rows: int = 0


Method = Callable[[Problem], Learned]


def affordable_rows(problem: Problem) -> int:
    """How many validation rows there is time for: as many as a training uses by default, but where they are dear (many
    labels) no more than let ``LEAST_CHECKS`` validations take ``CHECKING`` of the budget, and ``PROBE_ROWS`` at least.

    Some rows are timed on the base model, with nothing in the soft prompt's place.
    """
    most = min(problem.validation_rows, len(problem.validation.examples))
    some, task = problem.validation.examples[:PROBE_ROWS], problem.task()
    validator(task, some[:8])(torch.empty(0))  # the first call of a model is slow
    began = time.perf_counter()
    validator(task, some)(torch.empty(0))
    a_row = (time.perf_counter() - began) / len(some)
    return min(most, max(len(some), int(problem.budget * CHECKING / LEAST_CHECKS / a_row)))


# --- the soft prompt's own way ------------------------------------------------------------------------------------


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
        bytes=len(artifact.encode(found)),
        chosen={"steps": found.training["steps_done"], "best_step": found.training["best_step"]},
        validation=found.metrics[0]["value"] if found.metrics else None,
        curve=tuple(curve),
        soft_prompt=found,
        validation_rows=found.data["validation"]["rows"],
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


def _of_several(problem: Problem, decide: Callable[[torch.Tensor], torch.Tensor]) -> Learned:
    """The answers of all seeds' soft prompts, from one batch, made into one.

    Args:
        problem: holds them as ``siblings``.
        decide: probabilities float64 ``[S, N, labels]`` of S soft prompts → ``[N, labels]``, which sum to 1.

    Raises:
        ConfigError: fewer than 2 soft prompts.
    """
    members = problem.siblings
    if len(members) < 2:
        raise ConfigError(
            f"An ensemble needs the soft prompts of at least 2 seeds, found {len(members)}; run them first."
        )
    tasks = [Task.of(problem.lm, member) for member in members]
    kept = problem.lm.kept_prefixes(len(members))

    def answer(examples: Sequence[Example], progress: Progress | None) -> list[Prediction]:
        queries = [
            Query(task, example, member.vectors)
            for example in examples
            for task, member in zip(tasks, members, strict=True)
        ]
        found = predict(queries, progress=progress, prefix_of=kept)
        logprobs = torch.tensor([list((one.logprobs or {}).values()) for one in found], dtype=torch.float64)
        together = decide(logprobs.exp().view(len(examples), len(members), -1).transpose(0, 1))
        return [
            Prediction(
                problem.labels[int(row.argmax())],
                dict(zip(problem.labels, row.clamp_min(1e-12).log().tolist(), strict=True)),
                None,
                one.truncated,
            )
            for row, one in zip(together, found[:: len(members)], strict=True)
        ]

    return Learned(
        answer=answer,
        trainable_parameters=sum(member.vectors.numel() for member in members),
        bytes=sum(len(artifact.encode(member)) for member in members),
        chosen={"soft_prompts": len(members)},
    )


def ensemble(problem: Problem) -> Learned:
    """The mean probability of all seeds' soft prompts."""
    return _of_several(problem, lambda each: each.mean(dim=0))


def majority(problem: Problem) -> Learned:
    """The label that most seeds' soft prompts give; among equals, the more probable (Lester et al. 2021, §6)."""

    def decide(each: torch.Tensor) -> torch.Tensor:
        votes = torch.nn.functional.one_hot(each.argmax(dim=2), each.shape[2]).double()
        return (votes.mean(dim=0) + 1e-6 * each.mean(dim=0)) / (1 + 1e-6)

    return _of_several(problem, decide)


METHODS: dict[str, Method] = {
    "soft-prompt": soft_prompt,
    "soft-prompt-ensemble": ensemble,
    "soft-prompt-majority": majority,
    "prefix": partial(soft_prompt, parametrisation="prefix"),
}
OF_SEVERAL_SEEDS = ("soft-prompt-ensemble", "soft-prompt-majority")
