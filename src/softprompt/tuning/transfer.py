"""Which soft prompt of another task to start from (SPoT, Vu et al. 2022): by a short trial, beside its similarity."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from softprompt.data.example import Dataset
from softprompt.errors import DataError
from softprompt.evaluation.metrics import paired_bootstrap
from softprompt.evaluation.validation import validator
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tasks.task import Task
from softprompt.tuning.config import TrainConfig
from softprompt.tuning.many import train_together
from softprompt.tuning.rows import split_rows
from softprompt.tuning.training import Training

DEFAULT_START = "the default start"


@dataclass(frozen=True)
class Candidate:
    """A start, and what it came to in the trial.

    Attributes:
        name: of the soft prompt; ``DEFAULT_START`` for that of the settings.
        similarity: cosine between the mean of its virtual tokens and the mean of those that the trial learned from the
            default start (SPoT, §4.2, with the trial in the place of a whole training); None for the default start.
        score: mean probability of the right label, or minus the loss of a target token, on the rows it was chosen by.
        value: accuracy, or minus that loss, on the other half of the validation rows.
        gain: ``value`` above that of the default start, with the ends of its 95 % interval (paired bootstrap); None for
            the default start.
    """

    name: str
    similarity: float | None
    score: float
    value: float
    gain: tuple[float, float, float] | None

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        low_high = None if self.gain is None else [None if math.isnan(end) else end for end in self.gain[1:]]
        return {
            "name": self.name,
            "similarity": self.similarity,
            "score": self.score,
            "value": self.value,
            "gain": None if self.gain is None else self.gain[0],
            "gain_interval": low_high,
        }


@dataclass(frozen=True)
class Trial:
    """What came of the candidates.

    Attributes:
        candidates: the best first.
        start: the soft prompt to start from; None: the default start.
        num_virtual_tokens: P of all of them.
        steps: of each candidate.
        rows: that the values and gains are of.
        metric: what the values are: ``accuracy``, or ``minus the loss`` of free text.
    """

    candidates: tuple[Candidate, ...]
    start: SoftPrompt | None
    num_virtual_tokens: int
    steps: int
    rows: int
    metric: str

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "start": self.candidates[0].name,
            "trial_steps": self.steps,
            "rows": self.rows,
            "metric": self.metric,
            "candidates": [one.as_dict() for one in self.candidates],
        }


def find_start(
    task: Task,
    train: Dataset,
    validation: Dataset | None,
    config: TrainConfig,
    sources: Mapping[str, SoftPrompt],
    *,
    steps: int = 50,
    told: Callable[[int], None] = lambda _: None,
) -> Trial:
    """Trains from each source, and from the default start, for some steps in shared passes, and compares them.

    The sources are ranked by one half of the validation rows. The gain of each is of the other half, so that it is not
    flattered by having been chosen; of the best of several small gains, chance may still be the reason.

    Args:
        task: the new task.
        train, validation, config: as for ``Training``; the settings of the training that is to follow.
        sources: name → soft prompt of the task's base model with as many virtual tokens, at least one.
        steps: optimizer steps of each candidate, with a learning rate that falls to its end in them.
        told: is called with the number of each step.

    Raises:
        DataError: fewer than four validation rows.
        BaseModelError: a source of another base model.
        ConfigError: a source of another length.
    """
    for one in sources.values():
        Task.of(task.model, one)
    task.remember()  # the tokens of a row are the same for all starts
    examples, held_out = split_rows(train, validation, config)
    if len(held_out) < 4:
        raise DataError(
            f"A trial needs at least 4 validation rows, 2 to choose by and 2 to report on, found {len(held_out)}; give "
            f"more."
        )
    chosen_by = replace(train, examples=tuple(held_out[::2]))
    reported = held_out[1::2]
    rows = replace(train, examples=tuple(examples))
    short = replace(config, steps=steps, epochs=None, eval_every=steps, starts=1, lengths=(), compile="off")
    starts: dict[str, torch.Tensor | None] = {DEFAULT_START: None}
    starts |= {name: one.vectors for name, one in sources.items()}
    runs = {name: Training(task, rows, chosen_by, short, name=name, start=start) for name, start in starts.items()}
    for number, _ in enumerate(train_together(list(runs.values())), start=1):
        told(number)
    vectors = {name: run.result().vectors for name, run in runs.items()}
    by_choice, by_report = validator(task, chosen_by.examples), validator(task, reported)
    scores = {name: by_choice(found)["score"] for name, found in vectors.items()}
    found_rows = {name: by_report(found) for name, found in vectors.items()}
    labelled = task.verbalizer is not None

    def of_rows(name: str) -> list[float]:
        of = found_rows[name]["rows"]
        return [float(hit) for hit in of["correct"]] if labelled else [-loss for loss in of["loss"]]

    own = _mean(vectors[DEFAULT_START])
    candidates = [
        Candidate(
            name,
            None if start is None else float(torch.cosine_similarity(_mean(start), own, dim=0)),
            scores[name],
            found_rows[name]["value"],
            None if start is None else paired_bootstrap(of_rows(name), of_rows(DEFAULT_START)),
        )
        for name, start in starts.items()
    ]
    candidates.sort(key=lambda one: -one.score)  # of equals the default start comes first
    best = candidates[0].name
    metric = "accuracy" if labelled else "minus the loss"
    return Trial(tuple(candidates), sources.get(best), task.num_virtual_tokens, steps, len(reported), metric)


def _mean(numbers: torch.Tensor) -> torch.Tensor:
    """The mean over virtual tokens, of which a trained state ``[N]`` has none to take it over: its numbers."""
    return numbers if numbers.dim() == 1 else numbers.flatten(1).mean(dim=0)
