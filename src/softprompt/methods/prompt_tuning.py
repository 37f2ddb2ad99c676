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
from softprompt.tuning.rows import split_rows
from softprompt.tuning.step import Step
from softprompt.tuning.training import Training

NOTHING_LEARNED = "The loss is not finite at the very first steps, so nothing was learned; try --dtype fp32."

LATEST = 50
"""Steps whose median tells how many more there is time for."""

START_SEEDS = 1_000_003
"""How far apart the seeds of the starts of one seed are, so that none is that of another seed's start."""

STATE = "spent.json"
"""What was spent of the budget, and how the curve went, beside the checkpoints."""


def soft_prompt(problem: Problem, parametrisation: str = "plain", decoder_virtual_tokens: int = 0) -> Learned:
    """A soft prompt tuned with the default settings, in as many steps as the budget lasts for."""
    (found,) = soft_prompts([problem], parametrisation=parametrisation, decoder_virtual_tokens=decoder_virtual_tokens)
    if isinstance(found, SoftPromptError):
        raise found
    return found


def soft_prompts(
    problems: Sequence[Problem],
    folder: Path | None = None,
    *,
    parametrisation: str = "plain",
    decoder_virtual_tokens: int = 0,
) -> list[Learned | SoftPromptError]:
    """The same for several seeds, in shared passes: each is the training that it would be alone.

    What a round takes is divided evenly among the seeds that take part in it. Each seed may take its own budget, so
    they have as much time together as one after the other, and more steps in it.

    Args:
        problems: alike but for their seeds.
        folder: where checkpoints are kept, and what was spent; a run that was stopped there goes on.
        parametrisation: what is trained.
        decoder_virtual_tokens: of an encoder–decoder, before its decoder's input.

    Returns:
        For each, what was learned, or why nothing was.
    """
    return _Run(problems, folder, parametrisation, decoder_virtual_tokens).learned()


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


@dataclass
class _Seat:
    """One training of a run.

    Attributes:
        problem: whose it is.
        start: its number among the starts of the problem's seed.
        training: it.
        curve: of its validations.
    """

    problem: Problem
    start: int
    training: Training
    curve: list[dict[str, float]]

    @property
    def name(self) -> str:
        """What its files are called."""
        return _name(self.problem.seed, self.start)


def _name(seed: int, start: int) -> str:
    return f"{seed}" + f".{start}" * (start > 0)


class _Run:
    """Trainings of several seeds in shared passes, each of which may take its budget.

    With several starts, all of a seed do the first tenth of the steps. The best of them on validation rows goes on.
    """

    def __init__(self, problems: Sequence[Problem], folder: Path | None, parametrisation: str, ahead: int) -> None:
        first = problems[0]
        self._problems, self._first, self._world = problems, first, first.lm.world
        self._folder, self._parametrisation, self._ahead = folder, parametrisation, ahead
        self._task = Task(
            first.lm,
            first.template,
            first.verbalizer,
            first.num_virtual_tokens,
            first.lm.window,
            decoder_virtual_tokens=ahead,
        )
        self._task.remember()
        self._spent = {each.seed: 0.0 for each in problems}
        self._left: dict[int, int] = {}  # seed → its start that goes on, once they were compared
        self._seats: list[_Seat] = []
        config = TrainConfig(
            parametrisation=parametrisation, validation_rows=first.validation_rows, decoder_virtual_tokens=ahead
        )
        saved = self._world.from_first(self._saved)
        curves: dict[str, list[dict[str, float]]] = {}
        if saved is None:
            first.notice("timing a step")
            self._config, self._pace = self._planned(config)
        else:
            self._config, curves = TrainConfig(**saved["config"]), saved["curves"]
            self._pace = _Pace(deque([saved["a step"]], maxlen=LATEST), saved["a validation"], self._most(config))
            self._spent = {each.seed: float(saved["spent"][str(each.seed)]) for each in problems}
            self._left = {each.seed: saved["left"][str(each.seed)] for each in problems if saved["left"]}
        self._last = first.began
        self._pass([each.seed for each in problems])
        self._seats = []
        for each in problems:
            starts = [self._left[each.seed]] if self._left else range(first.starts)
            for start in starts:
                name = _name(each.seed, start)
                path = None if folder is None else folder / name
                training = self._training(each.seed, self._config, start, path, resume=saved is not None)
                self._seats.append(_Seat(each, start, training, curves.get(name, [])))
        self._keep()

    def learned(self) -> list[Learned | SoftPromptError]:
        """Trains them to their ends."""
        if self._first.starts > 1 and not self._left:
            for steps in self._rounds(until=self._rung):
                self._saw(steps, moving=False)
            self._compare_starts()
        for steps in self._rounds():
            self._saw(steps)
        return [self._of(seat) for seat in self._seats]

    def _training(
        self, seed: int, config: TrainConfig, start: int = 0, folder: Path | None = None, *, resume: bool = False
    ) -> Training:
        first = self._first
        config = replace(config, seed=seed)
        validation = first.validation
        if first.starts > 1:  # which are compared on the same rows
            validation = replace(validation, examples=tuple(split_rows(first.train, validation, config)[1]))
        if start:
            drawn = "labels" if first.labels else "vocab"  # what else than ``auto`` begins with
            config = replace(config, seed=seed + start * START_SEEDS, init=drawn)
        return Training(self._task, first.train, validation, config, folder=folder, resume=resume)

    def _rounds(self, until: int | None = None) -> Iterator[list[Step | None]]:
        trainings = [seat.training for seat in self._seats]
        if len(trainings) > 1:
            yield from train_together(trainings, until=until)
        else:
            for step in trainings[0]:
                yield [step]

    @property
    def _rung(self) -> int:
        """The step after which starts are compared: the first validation in or behind a tenth of the steps."""
        schedule = self._seats[0].training.schedule
        return next(step for step in schedule.validations if step >= schedule.total / 10)

    def _compare_starts(self) -> None:
        """Goes on with the best start of each seed."""
        best: dict[int, _Seat] = {}
        for seat in self._seats:
            leader = best.setdefault(seat.problem.seed, seat)
            if _score(seat) > _score(leader):
                best[seat.problem.seed] = seat
        self._seats, self._left = list(best.values()), {seed: seat.start for seed, seat in best.items()}
        self._keep()

    def _saw(self, steps: Sequence[Step | None], moving: bool = True) -> None:
        """After a round: accounts for its time, and with ``moving`` moves the ends to where it will be spent."""
        seen = [(seat, step) for seat, step in zip(self._seats, steps, strict=True) if step is not None]
        took = self._pass([seat.problem.seed for seat, _ in seen])
        if not seen:
            return
        step = seen[0][1]
        checked = sum(step.validation is not None for _, step in seen)
        if step.number > 1:  # the first may compile
            self._pace.steps.append(statistics.fmean(step.seconds for _, step in seen))
        if checked:
            self._pace.validation = (took - sum(step.seconds for _, step in seen)) / checked
        if step.number % 10 == 0:
            together = f" of {len(seen)} soft prompts in shared passes" if len(steps) > 1 else ""
            self._first.notice(f"step {step.number:,} of {step.total:,}{together}, loss {step.loss:.3f}")
        for seat, step in seen:
            if step.validation is not None:
                value, loss = step.validation["value"], step.validation["loss"]
                seconds = round(self._spent[seat.problem.seed], 1)
                seat.curve.append({"seconds": seconds, "step": step.number, "value": value, "loss": loss})
        going = [(seat, step) for seat, step in seen if step.number < step.total and moving]
        ends = self._world.from_first(lambda: [self._end(*each) for each in going])  # by the clock of one process
        for (seat, _), end in zip(going, ends, strict=True):
            seat.training.end_after(end)
        if any(seat.training.wants_save(step) for seat, step in seen):
            self._keep()

    def _pass(self, seeds: Sequence[int]) -> float:
        """Divides the time since the last call among trainings, of which those seeds are; returns it, in seconds."""
        now = time.perf_counter()
        took, self._last = now - self._last, now
        for seed in seeds:
            self._spent[seed] += took / len(seeds)
        return took

    def _end(self, seat: _Seat, step: Step) -> int:
        """How many steps a training has in all by what is left of its time."""
        left = seat.problem.budget - self._spent[seat.problem.seed]
        return self._pace.end(left, self._config.eval_every or EVAL_EVERY, step.number)

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
        self._seats = [_Seat(each, 0, self._training(each.seed, timed), []) for each in self._problems]
        began, pace = time.perf_counter(), _Pace(deque(maxlen=LATEST), 0.0, self._most(config))
        in_steps = 0.0
        for steps in self._rounds():
            if there := [step.seconds for step in steps if step is not None]:
                in_steps += sum(there)
                pace.steps.append(statistics.fmean(there))
            over = self._world.from_first(lambda: self._seconds_left() < 0)
            if over and pace.steps:
                return replace(config, steps=1, compile="off"), pace
        if len(pace.steps) < 2:
            raise TrainingError(NOTHING_LEARNED)
        pace.validation = rows * (time.perf_counter() - began - in_steps) / some / count
        pace.steps.popleft()  # the first may compile
        compiled = any(seat.training.compiled for seat in self._seats)
        config = replace(config, compile="on" if compiled else "off")
        return self._world.from_first(lambda: (self._within(config, pace), pace))

    def _seconds_left(self) -> float:
        """Seconds of each seed's budget that are left before the trainings."""
        return self._first.budget - (time.perf_counter() - self._first.began) / len(self._problems)

    def _within(self, config: TrainConfig, pace: _Pace) -> TrainConfig:
        starts = self._first.starts
        left = self._seconds_left() / (1 + (starts - 1) / 10)  # all of them do a tenth of the steps
        every = max(EVAL_EVERY, math.ceil((1 / CHECKING - 1) * pace.validation / pace.a_step))
        every = max(1, min(every, pace.end(left, every) // (LEAST_CHECKS if starts == 1 else 10)))
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
            "decoder virtual tokens": self._ahead,
            "starts": first.starts,
        }

    def _keep(self) -> None:
        """Writes down what was spent."""
        if self._folder is None or not self._world.writes:
            return
        document = {
            "identity": self._identity(),
            "config": self._config.as_dict(),
            "a step": self._pace.a_step,
            "a validation": self._pace.validation,
            "spent": self._spent,
            "left": self._left,
            "curves": {seat.name: seat.curve for seat in self._seats},
        }
        with atomic_writer(self._folder / STATE) as file:
            file.write(json.dumps(document).encode())

    def _saved(self) -> dict[str, Any] | None:
        """What was written down of a run of these seeds; None if there is none that can be gone on with."""
        if self._folder is None or not (self._folder / STATE).exists():
            return None
        try:
            saved: dict[str, Any] = json.loads((self._folder / STATE).read_text(encoding="utf-8"))
            seeds = {str(each.seed) for each in self._problems}
            same = saved["identity"] == self._identity() and seeds <= saved["spent"].keys()
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return saved if same else None

    # --- what came of it --------------------------------------------------------------------------

    def _of(self, seat: _Seat) -> Learned | SoftPromptError:
        training, lm, task = seat.training, self._first.lm, self._task
        if not training.step:
            return TrainingError(NOTHING_LEARNED)
        found, kept = training.result(), lm.kept_prefixes(1)
        return Learned(
            answer=lambda examples, progress: predict(
                [Query(task, example, found.vectors) for example in examples], progress=progress, prefix_of=kept
            ),
            trainable_parameters=found.training["trainable_parameters"],
            bytes=len(found.encoded()),
            chosen={
                "steps": found.training["steps_done"],
                "best_step": found.training["best_step"],
                **({"start": seat.start} if self._first.starts > 1 else {}),
            },
            validation=found.metrics[0]["value"] if found.metrics else None,
            curve=tuple(point for point in seat.curve if point["step"] <= training.step),
            soft_prompt=found,
            validation_rows=found.data["validation"]["rows"],
            seconds=self._spent[seat.problem.seed],
            alarms=training.alarms,
        )


def _score(seat: _Seat) -> float:
    """What starts are compared by; one whose loss was not finite is no choice."""
    return -math.inf if seat.training.stopped == "not finite" else seat.training.score


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
