"""The soft prompt's own way: as many steps as the budget lasts for; and ensembles of several."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from softprompt.errors import ConfigError, SoftPromptError, TrainingError
from softprompt.files import atomic_writer
from softprompt.methods.problem import CHECKING, LEAST_CHECKS, PROBE, PROBE_ROWS, Learned, Problem
from softprompt.tasks.ensemble import Ensemble
from softprompt.tasks.predict import Query, predict
from softprompt.tasks.task import Task
from softprompt.tuning.config import EVAL_EVERY, TrainConfig, most_steps
from softprompt.tuning.many import train_together
from softprompt.tuning.step import Step
from softprompt.tuning.training import Training

NOTHING_LEARNED = "The loss is not finite at the very first steps, so nothing was learned; try --dtype fp32."

LATEST = 50
"""Steps whose median tells how many more there is time for."""

STATE = "spent.json"
"""What was spent of the budget, and how the curve went, beside the checkpoints."""


def soft_prompt(problem: Problem, parametrisation: str = "plain") -> Learned:
    """A soft prompt tuned with the default settings, in as many steps as the budget lasts for."""
    (found,) = soft_prompts([problem], parametrisation=parametrisation)
    if isinstance(found, SoftPromptError):
        raise found
    return found


def soft_prompts(
    problems: Sequence[Problem], folder: Path | None = None, *, parametrisation: str = "plain"
) -> list[Learned | SoftPromptError]:
    """The same for several seeds, in shared passes: each is the training that it would be alone.

    What a round takes is divided evenly among the seeds that take part in it. Each seed may take its own budget, so
    they have as much time together as one after the other, and more steps in it.

    Args:
        problems: alike but for their seeds.
        folder: where checkpoints are kept, and what was spent; a run that was stopped there goes on.
        parametrisation: what is trained.

    Returns:
        For each, what was learned, or why nothing was.
    """
    return _Run(problems, folder, parametrisation).learned()


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


class _Run:
    """Trainings of several seeds in shared passes, each of which may take its budget."""

    def __init__(self, problems: Sequence[Problem], folder: Path | None, parametrisation: str) -> None:
        first = problems[0]
        self._problems, self._first, self._world = problems, first, first.lm.world
        self._path = None if folder is None else folder / STATE
        self._task = Task(first.lm, first.template, first.verbalizer, first.num_virtual_tokens, first.lm.window)
        self._task.remember()
        self._spent, self._curves = [0.0] * len(problems), [list[dict[str, float]]() for _ in problems]
        config = TrainConfig(parametrisation=parametrisation, validation_rows=first.validation_rows)
        self._parametrisation = parametrisation
        saved = self._world.from_first(self._saved)
        if saved is None:
            first.notice("timing a step")
            self._config, self._pace = self._planned(config)
        else:
            self._config = TrainConfig(**saved["config"])
            self._pace = _Pace(deque([saved["a step"]], maxlen=LATEST), saved["a validation"], self._most(config))
            self._spent = [float(saved["spent"][str(each.seed)]) for each in problems]
            self._curves = [saved["curves"][str(each.seed)] for each in problems]
        self._last = first.began
        self._pass([True] * len(problems))
        self._keep()
        self._trainings = [
            self._training(
                replace(self._config, seed=each.seed),
                folder=None if folder is None else folder / f"{each.seed}",
                resume=saved is not None,
            )
            for each in problems
        ]

    def learned(self) -> list[Learned | SoftPromptError]:
        """Trains them to their ends."""
        for steps in self._rounds():
            self._saw(steps)
        return [self._of(place) for place in range(len(self._problems))]

    def _training(self, config: TrainConfig, *, folder: Path | None = None, resume: bool = False) -> Training:
        first = self._first
        return Training(self._task, first.train, first.validation, config, folder=folder, resume=resume)

    def _rounds(self) -> Iterator[list[Step | None]]:
        if len(self._trainings) > 1:
            yield from train_together(self._trainings)
        else:
            yield from ([step] for step in self._trainings[0])

    def _saw(self, steps: Sequence[Step | None]) -> None:
        """After a round: accounts for its time, and moves the ends to where the time will be spent."""
        there = [step for step in steps if step is not None]
        took = self._pass([step is not None for step in steps])
        if not there:
            return
        checked = sum(step.validation is not None for step in there)
        if there[0].number > 1:  # the first may compile
            self._pace.steps.append(statistics.fmean(step.seconds for step in there))
        if checked:
            self._pace.validation = (took - sum(step.seconds for step in there)) / checked
        if there[0].number % 10 == 0:
            together = f" of {len(there)} soft prompts in shared passes" if len(steps) > 1 else ""
            said = f"step {there[0].number:,} of {there[0].total:,}{together}, loss {there[0].loss:.3f}"
            self._first.notice(said)
        ends = self._world.from_first(lambda: self._ends(steps))  # a clock decides, and it is that of one process
        for place, (training, step) in enumerate(zip(self._trainings, steps, strict=True)):
            if step is None:
                continue
            if step.validation is not None:
                value, loss = step.validation["value"], step.validation["loss"]
                seconds = round(self._spent[place], 1)
                self._curves[place].append({"seconds": seconds, "step": step.number, "value": value, "loss": loss})
            if step.number < step.total:
                training.end_after(ends[place])
        if checked or any(each.wants_save(step) for each, step in zip(self._trainings, steps, strict=True) if step):
            self._keep()

    def _pass(self, going: Sequence[bool]) -> float:
        """Divides the time since the last call among those that took part; returns it, in seconds."""
        now = time.perf_counter()
        took, self._last = now - self._last, now
        for place, goes in enumerate(going):
            if goes:
                self._spent[place] += took / sum(going)
        return took

    def _ends(self, steps: Sequence[Step | None]) -> list[int]:
        """How many steps each has in all by what is left of its time."""
        every, budget = self._config.eval_every or EVAL_EVERY, self._first.budget
        return [
            0 if step is None else self._pace.end(budget - spent, every, step.number)
            for step, spent in zip(steps, self._spent, strict=True)
        ]

    # --- the plan ---------------------------------------------------------------------------------

    def _most(self, config: TrainConfig) -> int:
        return most_steps(len(self._first.train.examples), config.batch_size)

    def _planned(self, config: TrainConfig) -> tuple[TrainConfig, _Pace]:
        """The settings with as many steps as fit into what is left of the budget, and what some steps and rows took
        that were timed for it, all seeds together."""
        first, count = self._first, len(self._problems)
        config = replace(config, compile="on" if first.worth_compiling else "off")
        rows = min(config.validation_rows, len(first.validation.examples))
        some = min(rows, PROBE_ROWS)
        timed = replace(config, steps=PROBE, eval_every=1_000, validation_rows=some)
        self._trainings = [self._training(replace(timed, seed=each.seed)) for each in self._problems]
        began, pace = time.perf_counter(), _Pace(deque(maxlen=LATEST), 0.0, self._most(config))
        in_steps = 0.0
        for steps in self._rounds():
            if there := [step.seconds for step in steps if step is not None]:
                in_steps += sum(there)
                pace.steps.append(statistics.fmean(there))
            if pace.steps and self._world.from_first(lambda: self._left() < 0):
                return replace(config, steps=1, compile="off"), pace
        if len(pace.steps) < 2:
            raise TrainingError(NOTHING_LEARNED)
        pace.validation = rows * (time.perf_counter() - began - in_steps) / some / count
        pace.steps.popleft()  # the first may compile
        compiled = any(each.compiled for each in self._trainings)
        config = replace(config, compile="on" if compiled else "off")
        return self._world.from_first(lambda: (self._within(config, pace), pace))

    def _left(self) -> float:
        """Seconds of each seed's budget that are left before the trainings."""
        return self._first.budget - (time.perf_counter() - self._first.began) / len(self._problems)

    def _within(self, config: TrainConfig, pace: _Pace) -> TrainConfig:
        left = self._left()
        every = max(EVAL_EVERY, math.ceil((1 / CHECKING - 1) * pace.validation / pace.a_step))
        every = max(1, min(every, pace.end(left, every) // LEAST_CHECKS))
        return replace(config, steps=pace.end(left, every), eval_every=every)

    # --- what survives a kill ---------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        first = self._first
        words = None if first.verbalizer is None else {k: list(v) for k, v in first.verbalizer.words.items()}
        return {
            "data": [first.train.fingerprint, first.validation.fingerprint],
            "template": [first.template.text, words],
            "base model": [first.lm.fingerprint, str(first.lm.dtype), first.lm.quantized],
            "budget": first.budget,
            "parametrisation": self._parametrisation,
        }

    def _keep(self) -> None:
        """Writes down what was spent."""
        if self._path is None or not self._world.writes:
            return
        seeds = [str(each.seed) for each in self._problems]
        document = {
            "identity": self._identity(),
            "config": self._config.as_dict(),
            "a step": self._pace.a_step,
            "a validation": self._pace.validation,
            "spent": dict(zip(seeds, self._spent, strict=True)),
            "curves": dict(zip(seeds, self._curves, strict=True)),
        }
        with atomic_writer(self._path) as file:
            file.write(json.dumps(document).encode())

    def _saved(self) -> dict[str, Any] | None:
        """What was written down of a run of these seeds; None if there is none that can be gone on with."""
        if self._path is None or not self._path.exists():
            return None
        try:
            saved: dict[str, Any] = json.loads(self._path.read_text(encoding="utf-8"))
            seeds = {str(each.seed) for each in self._problems}
            same = saved["identity"] == self._identity() and seeds <= saved["spent"].keys()
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return saved if same else None

    # --- what came of it --------------------------------------------------------------------------

    def _of(self, place: int) -> Learned | SoftPromptError:
        training, lm, task = self._trainings[place], self._first.lm, self._task
        if not training.step:
            return TrainingError(NOTHING_LEARNED)
        found, kept = training.result(), lm.kept_prefixes(1)
        return Learned(
            answer=lambda examples, progress: predict(
                [Query(task, example, found.vectors) for example in examples], progress=progress, prefix_of=kept
            ),
            trainable_parameters=found.training["trainable_parameters"],
            bytes=len(found.encoded()),
            chosen={"steps": found.training["steps_done"], "best_step": found.training["best_step"]},
            validation=found.metrics[0]["value"] if found.metrics else None,
            curve=tuple(point for point in self._curves[place] if point["step"] <= training.step),
            soft_prompt=found,
            validation_rows=found.data["validation"]["rows"],
            seconds=self._spent[place],
        )


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
