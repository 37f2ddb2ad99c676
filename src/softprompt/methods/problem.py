"""What every way of adapting a base model is given, and what it hands back.

All methods see the same rows, template and labels, and have the same time. ``registry.py`` lists them;
``compare/comparison.py`` runs and measures them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from softprompt.data.example import Dataset, Example, check_targets
from softprompt.evaluation.evaluate import headline, headline_metric
from softprompt.evaluation.validation import validator
from softprompt.model.frozen import FrozenLM
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tasks.length import default_num_virtual_tokens
from softprompt.tasks.predict import Prediction, Progress
from softprompt.tasks.task import Task
from softprompt.text.template import Template
from softprompt.text.verbalizer import Verbalizer
from softprompt.tuning.compilation import can_compile
from softprompt.tuning.config import TrainConfig
from softprompt.tuning.step import Alarm

COMPILE_FROM = 300.0
"""Seconds of budget from which compiling the layers pays: it costs 10 to 25 of them."""

PROBE, PROBE_ROWS = 5, 100
"""Steps, and rows of a validation, that are timed to plan a run."""

CHECKING, LEAST_CHECKS = 0.1, 3
"""The share of the time that validations may take, and how many there are at least."""


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
        starts: how many starts a soft prompt has, the best of which goes on after a tenth of the steps.
        began: clock time at which the budget began to run.

    Raises:
        DataError: a target is not in the label set.
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
    starts: int = 1
    began: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        if self.verbalizer is not None:
            for rows in (self.train, self.validation):
                check_targets(rows, self.labels)

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
        return self.budget - self.seconds_since(self.began)

    def seconds_since(self, began: float) -> float:
        """Seconds since that clock time; of several processes, by the clock of the first, so that all decide alike."""
        return self.lm.world.from_first(lambda: time.perf_counter() - began)

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
        seconds: its part of the time, where it was learned together with others; None: all that its run took.
        alarms: what gives reason to doubt what was trained; none where nothing is.
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
    seconds: float | None = None
    alarms: tuple[Alarm, ...] = ()


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
    a_row = problem.seconds_since(began) / len(some)
    return min(most, max(len(some), int(problem.budget * CHECKING / LEAST_CHECKS / a_row)))
