"""When a training validates, and how long it still takes by what its steps and validations have taken so far."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from softprompt.model.request import Request
from softprompt.tuning.config import DEFAULT_STEPS, EVAL_EVERY, TrainConfig
from softprompt.tuning.gradients import Gradients

LATEST = 50
"""Steps, or validations, whose median tells what the next ones take."""
ENOUGH_STEPS, ENOUGH_SECONDS = 4, 5.0
"""Steps, or seconds of at least two steps, from which an estimate is made."""
FORWARD = 1 / 3
"""Share of a training step's time a token that a validation takes, which has no backward pass and larger batches."""


@dataclass(frozen=True)
class Schedule:
    """The steps of a training, and its validations if nothing ends it early.

    With several starts, each does the first tenth of the planned steps, and one of them goes on with the rest.

    Attributes:
        planned: steps of the start that goes on to the end.
        every: steps between two validations.
        rows: how many rows each validation scores.
        tokens: how many tokens each validation computes.
        tries: how many starts.
    """

    planned: int
    every: int
    rows: int
    tokens: int
    tries: int = 1

    @property
    def probe(self) -> int:
        """Steps that each of several starts does; 0 for one start."""
        return max(1, self.planned // 10) if self.tries > 1 else 0

    @property
    def probing(self) -> int:
        """Steps that all starts do together before one goes on."""
        return self.tries * self.probe

    @property
    def total(self) -> int:
        """Steps in all."""
        return self.planned + max(0, self.probing - self.probe)

    @cached_property
    def validations(self) -> tuple[int, ...]:
        """The numbers of the steps that end with one, in order: the multiples of ``every`` of each start, the ends of
        short runs, and the last."""
        probe, shift = self.probe, self.total - self.planned
        short = [place for place in (*range(self.every, probe, self.every), probe) if place]
        tried = {number * probe + place for number in range(self.tries) for place in short}
        rest = {shift + place for place in range(self.every, self.planned, self.every) if place > probe}
        return tuple(sorted({*tried, *rest, self.total}))

    def place(self, step: int) -> int:
        """The place of the step after the first ``step`` in the plan of its start, from 0."""
        return step % self.probe if step < self.probing else step - (self.total - self.planned)

    def ends_start(self, step: int) -> bool:
        """Whether the short run of one of several starts ends with the step of that number, from 1."""
        return step <= self.probing and step % self.probe == 0

    def validations_after(self, step: int) -> int:
        """How many validations come after the first ``step`` steps."""
        return len(self.validations) - bisect_right(self.validations, step)


def schedule_of(
    config: TrainConfig, gradients: Gradients, requests: Sequence[Request], checked: Sequence[Request], rows: int
) -> Schedule:
    """When the validations of a training come, and what each of them computes.

    Args:
        config: settings.
        gradients: of the training.
        requests: of its rows.
        checked: of its validation rows.
        rows: how many an epoch has.
    """
    lm = gradients.lm
    if config.epochs is not None:
        planned = max(1, math.ceil(config.epochs * rows / config.batch_size))
    else:
        planned = config.steps or DEFAULT_STEPS
    # by tokens alone, so that a resumed run has the same; a step runs them twice
    step = 2 * config.batch_size * gradients.tokens(requests) / len(requests)
    checking = gradients.tokens(checked)
    interval = max(1, min(max(EVAL_EVERY, math.ceil(3 * checking / step)), planned // 5))
    whole = (lm.tokens_of(row, config.longest) for row in checked)
    tokens = checking if lm.shares_prefix else sum(whole)
    return Schedule(planned, config.eval_every or interval, len(checked), tokens, tries=config.tries)


class TrainingTime:
    """What steps and validations take, and what is left of a training."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self._steps: deque[float] = deque(maxlen=LATEST)
        self._tokens: deque[int] = deque(maxlen=LATEST)
        self._checks: deque[float] = deque(maxlen=LATEST)

    def saw_step(self, seconds: float, tokens: int) -> None:
        """A step that is like those to come: not one that compiles."""
        self._steps.append(seconds)
        self._tokens.append(tokens)

    def saw_validation(self, seconds: float) -> None:
        """A validation."""
        self._checks.append(max(0.0, seconds))

    @property
    def ready(self) -> bool:
        """Whether enough was seen for an estimate: a few steps, or two that are slow."""
        return len(self._steps) >= ENOUGH_STEPS or (len(self._steps) >= 2 and sum(self._steps) >= ENOUGH_SECONDS)

    @property
    def validations_seen(self) -> bool:
        """Whether a validation was seen."""
        return bool(self._checks)

    @property
    def a_step(self) -> float:
        """Seconds that a step is expected to take; one must have been seen."""
        return statistics.median(self._steps)

    @property
    def a_validation(self) -> float:
        """Seconds that a validation is expected to take: before one was seen, by its tokens."""
        if self._checks:
            return statistics.median(self._checks)
        return FORWARD * self.a_step * self.schedule.tokens / max(1, statistics.median(self._tokens))

    def left(self, done: int) -> float:
        """Seconds left after the first ``done`` steps, if nothing ends the training early."""
        steps = self.schedule.total - done
        return steps * self.a_step + self.schedule.validations_after(done) * self.a_validation
