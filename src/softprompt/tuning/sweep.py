"""The best of several settings, by successive halving (Jamieson and Talwalkar 2016) in one process.

All settings are trained in shared passes. At a ninth and a third of the steps they are compared on validation rows, and
a third of them goes on. Each that goes on is the run that it would be alone: its learning rate falls over the whole
length, its rows, optimizer and validations are those of a single training. Ours differs from the paper in that no run
begins anew at a rung, and that the default setting goes on to the end whatever its rank, to be compared with.

The highest of several scores is partly luck. So the validation rows are halved: one half chooses (the setting, and the
step of each run), the other tells what the chosen is worth.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from softprompt.data.example import Dataset
from softprompt.errors import ConfigError, DataError, StoreError, TrainingError
from softprompt.evaluation.validation import validator
from softprompt.files import atomic_writer, strict_json
from softprompt.model.frozen import FrozenLM
from softprompt.tuning.config import TrainConfig
from softprompt.tuning.job import Job
from softprompt.tuning.many import train_together
from softprompt.tuning.rows import held_rows
from softprompt.tuning.run_folder import SWEEP
from softprompt.tuning.training import Training

RUNGS = 2
"""How often settings are compared before the end."""

AXES = ("seed", "init", "lr", "num_virtual_tokens", "parametrisation")
"""What settings may differ in."""

Run = Callable[[Sequence[Training], int | None], None]
"""Trains several together to a step, or to their ends."""


def cross(config: TrainConfig, axes: Mapping[str, Sequence[Any]]) -> list[TrainConfig]:
    """Every combination of the values of each axis; ``config`` itself is the first, whether it is one of them or not.

    Args:
        config: the default setting; its values are those of the axes that are not named.
        axes: some of ``AXES`` → values.

    Raises:
        ConfigError: a value that cannot be.
    """
    values = [axes.get(name) or (getattr(config, name),) for name in AXES]
    made = [replace(config, **dict(zip(AXES, chosen, strict=True))) for chosen in itertools.product(*values)]
    return list(dict.fromkeys([config, *made]))


def halves(job: Job, seed: int) -> tuple[Job, Dataset]:
    """A job with the validation rows that choose, and those that do not: halves of its validation rows, or of those
    that it would hold back, each of at most ``config.validation_rows``. All answers of a conversation are in one half.

    Raises:
        DataError: there are too few rows.
    """
    pool = job.rows if job.validation is None else job.validation
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(pool.examples), generator=generator).tolist()
    most, count = job.config.validation_rows, len(pool.examples)
    size = max(1, min(most, count // (2 if job.validation is not None else 20)))
    choosing = held_rows(pool.examples, order, size)
    telling = held_rows(pool.examples, [i for i in order if i not in set(choosing)], size)
    rest = [i for i in range(count) if i not in {*choosing, *telling}]
    if not telling or (job.validation is None and not rest):
        raise DataError(
            f"Expected enough rows in {pool.source} to choose by one half of the validation rows and to report on the "
            f"other, found {len(pool.examples)}; add rows."
        )

    def part(numbers: Sequence[int], source: str) -> Dataset:
        return replace(pool, examples=tuple(pool.examples[i] for i in sorted(numbers)), source=source)

    rows = job.rows if job.validation is not None else part(rest, pool.source)
    chooses = part(choosing, f"a half of the validation rows of {pool.source}")
    return replace(job, rows=rows, validation=chooses), part(telling, f"the other half of those of {pool.source}")


@dataclass(frozen=True)
class Worth:
    """A number and its standard error."""

    value: float
    stderr: float

    @classmethod
    def of(cls, rows: np.ndarray[Any, np.dtype[np.float64]]) -> Worth:
        """The mean over rows, ``[n]``."""
        error = float(rows.std(ddof=1)) / math.sqrt(len(rows)) if len(rows) > 1 else math.nan
        return cls(float(rows.mean()), error)

    def as_dict(self) -> dict[str, float]:
        """JSON values."""
        return {"value": self.value, "stderr": self.stderr}


@dataclass(frozen=True)
class Selection:
    """What the chosen setting is worth on the rows that chose it, and on those that did not.

    Attributes:
        metric: ``accuracy``, or for free text ``loss``, nats a target token.
        rows: how many rows chose, and how many did not.
        chosen, default: of the two settings, on either rows.
        gain: what the chosen is better by, paired row by row, on either rows.
        selection: how much less that is on the rows that did not choose: the part of the gain that is luck.
    """

    metric: str
    rows: tuple[int, int]
    chosen: tuple[Worth, Worth]
    default: tuple[Worth, Worth]
    gain: tuple[Worth, Worth]

    @property
    def selection(self) -> Worth:
        seen, unseen = self.gain
        return Worth(seen.value - unseen.value, math.hypot(seen.stderr, unseen.stderr))

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        both = {"chosen": self.chosen, "default": self.default, "gain": self.gain}
        return {
            "metric": self.metric,
            "rows_that_chose": self.rows[0],
            "rows_that_did_not": self.rows[1],
            **{
                name: {"on_rows_that_chose": seen.as_dict(), "on_rows_that_did_not": unseen.as_dict()}
                for name, (seen, unseen) in both.items()
            },
            "selection": self.selection.as_dict(),
        }


class Sweep:
    """A sweep in its folder.

    Attributes:
        configs: the settings; the first is the default.
        rungs: the steps after which they are compared, and last the steps of a whole run.
        left: numbers of those that go on.
        found: of each setting by its number, what was seen of it: ``steps``, ``stopped``, ``score``, ``metric``,
            ``value``, ``curve`` (step, score and value of each validation), ``dropped_at``.
    """

    def __init__(
        self,
        lm: FrozenLM,
        job: Job,
        axes: Mapping[str, Sequence[Any]],
        folder: Path,
        *,
        keep: Fraction = Fraction(1, 3),
        resume: bool = False,
    ) -> None:
        """Prepares a sweep, or what is left of it.

        Args:
            lm: the base model.
            job: what is learned, its settings being the default; its validation rows are halved.
            axes: see :func:`cross`.
            folder: the run folder, where ``sweep.json`` and a folder for each setting are kept until :meth:`close`.
            keep: the share that goes on at each rung, above 0 and at most 1.
            resume: go on with the sweep in ``folder``, if there is one.

        Raises:
            ConfigError: the one in ``folder`` is another sweep, or a setting does not fit.
            StoreError: ``folder`` cannot be written, or what is in it is damaged.
            DataError: too few rows.
        """
        if not 0 < keep <= 1:
            raise ConfigError(f"--keep must be above 0 and at most 1, not {keep}.")
        if job.config.tries > 1:
            raise ConfigError("A sweep tries starts and lengths of its own; leave --starts out, and give --seeds.")
        self._lm, self._keep, self._state = lm, keep, folder / SWEEP
        self._folder = folder / "sweep"
        self._job, self._telling = halves(job.on(lm), job.config.seed)
        self._task = self._job.task(lm)
        self._task.remember()  # the tokens of a row are the same for all settings
        self.configs = cross(self._job.config, axes)
        self.left, self._done, self._resume = list(range(len(self.configs))), 0, resume
        self.found: dict[int, dict[str, Any]] = {}
        self._trainings: dict[int, Training] = {}
        self._world = lm.world
        if self._world.from_first(lambda: resume and self._state.exists()):
            self._load()
        else:
            self._remove(self._folder)
        self._open(0)
        self.rungs = self._rungs()
        for number in self.left[1:]:
            self._open(number)
        self._save()

    def _open(self, number: int) -> None:
        config = self.configs[number]
        if number and config.eval_every is None:  # all are compared at the same steps
            config = replace(config, eval_every=self._trainings[0].schedule.every)
        job = replace(self._job, config=config, name=self.label(number))
        folder = self._folder / f"{number:03}"
        self._trainings[number] = job.training(self._lm, folder=folder, resume=self._resume, task=self._task)

    def _rungs(self) -> list[int]:
        """Steps with a validation, the first at or behind each share of the steps; a short run has fewer."""
        schedule = self._trainings[0].schedule
        shares = [] if self._keep == 1 else [self._keep**power for power in range(RUNGS, 0, -1)]
        behind = [next(step for step in schedule.validations if step >= share * schedule.total) for share in shares]
        return [*(step for step in dict.fromkeys(behind) if step < schedule.total), schedule.total]

    def label(self, number: int) -> str:
        """A setting by what it has other than the default."""
        config, default = self.configs[number], self.configs[0]
        names = {"num_virtual_tokens": "tokens", "parametrisation": ""}
        parts = [
            f"{names.get(axis, axis)} {getattr(config, axis)}".strip()
            for axis in AXES
            if getattr(config, axis) != getattr(default, axis)
        ]
        return ", ".join(parts) or "default"

    @property
    def resumed(self) -> int:
        """How many rungs were done before."""
        return self._done

    def run(self, train: Run | None = None, notice: Callable[[str], None] = lambda _: None) -> None:
        """Trains until one of those left is the best.

        Args:
            train: trains some of them together to a step; None: without a word.
            notice: is told of each rung.

        Raises:
            TrainingError: no loss was finite.
            StoreError: the folder cannot be written.
        """
        for rung in range(self._done, len(self.rungs)):
            last, goal = rung == len(self.rungs) - 1, self.rungs[rung]
            notice(f"rung {rung + 1} of {len(self.rungs)}: {len(self.left)} settings to step {goal:,}")
            (train or _silently)([self._trainings[number] for number in self.left], None if last else goal)
            for number in self.left:
                self.found[number] = self._seen(number)
            self._done = rung + 1
            if not last:
                ranked = sorted(self.left, key=lambda number: (-self._rank(number), number))
                kept = {0, *ranked[: math.ceil(self._keep * len(ranked))]}
                dropped = [number for number in self.left if number not in kept]
                for number in dropped:
                    self.found[number]["dropped_at"] = goal
                self.left = sorted(kept)
                self._save()
                for number in dropped:
                    del self._trainings[number]
                    self._remove(self._folder / f"{number:03}")
        if self._rank(self.best) == -math.inf:
            raise TrainingError("No setting has a loss that is finite; try lower --lrs, or --dtype fp32.")

    def _rank(self, number: int) -> float:
        found = self.found[number]
        return -math.inf if found["stopped"] == "not finite" or found["score"] is None else float(found["score"])

    def _seen(self, number: int) -> dict[str, Any]:
        training = self._trainings[number]
        curve = [[one["step"], one["score"], one["value"]] for one in training.validations]
        metrics = training.result().metrics if training.tokens and training.validations else ()
        return {
            "steps": training.step,
            "stopped": training.stopped,
            "score": training.score if training.validations else None,
            "metric": metrics[0]["metric"] if metrics else None,
            "value": metrics[0]["value"] if metrics else None,
            "curve": curve,
            "dropped_at": None,
        }

    @property
    def best(self) -> int:
        """The number of the best of those left; of equals the first."""
        return max(self.left, key=lambda number: (self._rank(number) if number in self.found else -math.inf, -number))

    @property
    def leader(self) -> Training | None:
        """The training that is ahead now; None before the first validation."""
        seen = [training for number, training in sorted(self._trainings.items()) if training.validations]
        sound = [training for training in seen if training.stopped != "not finite"]
        return max(sound, key=lambda training: training.score, default=None)

    def training(self, number: int) -> Training:
        """The training of one of those left."""
        return self._trainings[number]

    def folder(self, number: int) -> Path:
        """Its run folder."""
        return self._folder / f"{number:03}"

    def selection(self) -> Selection:
        """What the best is worth, and how much of that is luck."""
        chosen, default = self._trainings[self.best], self._trainings[0]
        assert self._job.validation is not None
        metric, of = "", []
        for training in (chosen, default):
            vectors = training.result().vectors.to(self._lm.device)
            seen = []
            for rows in (self._job.validation, self._telling):
                found = validator(training.task, rows.examples)(vectors)["rows"]
                metric = "accuracy" if "correct" in found else "loss"
                seen.append(np.asarray(found.get("correct", found["loss"]), dtype=np.float64))
            of.append(seen)
        sign = 1 if metric == "accuracy" else -1
        gains = [Worth.of(sign * (ours - theirs)) for ours, theirs in zip(*of, strict=True)]
        (a, b), (c, d) = ([Worth.of(rows) for rows in seen] for seen in of)
        sizes = (len(self._job.validation.examples), len(self._telling.examples))
        return Selection(metric, sizes, (a, b), (c, d), (gains[0], gains[1]))

    def close(self) -> None:
        """Removes what it would be gone on with from."""
        self._trainings.clear()
        if self._world.writes:
            self._state.unlink(missing_ok=True)
        self._remove(self._folder)

    def _remove(self, folder: Path) -> None:
        if self._world.writes:
            shutil.rmtree(folder, ignore_errors=True)

    # --- what survives a kill ---------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        job = self._job
        assert job.validation is not None
        texts = [[e.where for e in rows.examples] for rows in (job.rows, job.validation, self._telling)]
        return {
            "settings": [config.as_dict() for config in self.configs],
            "keep": str(self._keep),
            "base model": self._lm.fingerprint,
            "data": [job.rows.fingerprint, job.validation.fingerprint],
            "rows": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
        }

    def _save(self) -> None:
        if not self._world.writes:
            return
        found = {str(number): seen for number, seen in self.found.items()}
        document = {"identity": self._identity(), "done": self._done, "left": self.left, "found": found}
        try:
            with atomic_writer(self._state) as file:
                file.write(strict_json(document).encode())
        except OSError as error:
            raise StoreError(
                f"The sweep's folder {self._state.parent} cannot be written: {error.strerror or error}; free some "
                f"space there and resume."
            ) from error

    def _load(self) -> None:
        identity, self.left, self._done, self.found = self._world.from_first(self._read)
        ours = json.loads(strict_json(self._identity()))
        differing = [name for name in ours if identity.get(name) != ours[name]]
        if differing:
            raise ConfigError(
                f"The sweep in {self._state} is of other {', '.join(differing)}; give the same command with "
                f"--resume, or start anew with --overwrite instead."
            )

    def _read(self) -> tuple[dict[str, Any], list[int], int, dict[int, dict[str, Any]]]:
        """Of what is gone on from: what it is, the settings that are left, the rungs that are done, what was seen."""
        try:
            saved = json.loads(self._state.read_text(encoding="utf-8"))
            identity, found = saved["identity"], {int(number): seen for number, seen in saved["found"].items()}
            left, done = [int(number) for number in saved["left"]], int(saved["done"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(
                f"The sweep in {self._state} is damaged ({error}); start anew with --overwrite instead of --resume."
            ) from error
        return identity, left, done, found


def _silently(trainings: Sequence[Training], until: int | None) -> None:
    for _ in train_together(trainings, until=until):
        pass
