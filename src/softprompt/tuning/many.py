"""Many soft prompts on one base model, trained in shared passes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import torch

from softprompt.errors import ConfigError
from softprompt.tuning.gradients import Gradients
from softprompt.tuning.step import Step
from softprompt.tuning.training import Training


def train_together(trainings: Sequence[Training], *, until: int | None = None) -> Iterator[list[Step | None]]:
    """Trains several soft prompts, each with the rows, optimizer, validations and end that it would have alone.

    A round computes one step of each training that has not ended, all of them in shared passes. Gradients are those of
    a training alone, to rounding. One that ends early or whose loss is not finite leaves, and the others go on.

    Checkpoints are written in the same rounds by all, and the earlier one is kept, so that trainings that were killed
    in the middle of writing go on from one round: in the same company, with the same numbers.

    Args:
        trainings: at least one, all on one base model, with folders of their own or none; with ``resume``, where they
            are to go on.
        until: pause once each has done so many steps or has ended; None: go on until all have ended.

    Yields:
        After each round, the step of each training; None for those that did none.

    Raises:
        ConfigError: they have several base models, or share a folder.
        StoreError: as for ``Training``; or their checkpoints are of no common round.
    """
    lm = trainings[0].task.model
    if any(each.task.model is not lm for each in trainings):
        raise ConfigError("Trainings that go on together share one base model in memory; give all tasks the same.")
    folders = [each.folder for each in trainings if each.folder is not None]
    if len(set(folders)) < len(folders):
        raise ConfigError("Trainings that go on together need folders of their own; give each another one.")
    _meet(trainings)
    recompute = all(each.config.activation_checkpointing != "off" for each in trainings)
    gradients = Gradients(lm, may_recompute=recompute)
    with ExitStack() as stack:
        for each in trainings:
            stack.enter_context(each.running())
        modes = {
            "compiled": any(each.compiled for each in trainings),
            "recomputed": any(each.config.activation_checkpointing == "on" for each in trainings),
        }
        lm.layers.set(**modes)
        for each in trainings:
            if not each.rounds:
                each.save()  # to go back to, where the first checkpoints behind it are not written by all
        while until is None or any(each.step < until and not each.ended for each in trainings):
            round_ = _round(gradients, trainings)
            if round_ is None:
                return
            steps, computed = round_
            due = any(step is not None and each.wants_save(step) for each, step in zip(trainings, steps, strict=True))
            if due or any(each.ended for each in computed):
                for each in computed:
                    each.save(keep_earlier=True)
            yield steps


def _meet(trainings: Sequence[Training]) -> None:
    """Brings trainings that were killed back to the latest round that all of them have."""
    going = [each.rounds for each in trainings if not each.ended]
    together = min(going, default=0)
    for each in trainings:
        if each.rounds > together and going:
            each.go_back_to(together)


def _round(gradients: Gradients, trainings: Sequence[Training]) -> tuple[list[Step | None], list[Training]] | None:
    """A step of each training that has not ended, and those trainings; None if all have."""
    began = time.perf_counter()
    begun = [(number, each, step) for number, each in enumerate(trainings) if (step := each.begin_step()) is not None]
    if not begun:
        return None
    shares = [each.shares(step) for _, each, step in begun]
    numbers = [step.numbers for own, (_, _, step) in zip(shares, begun, strict=True) for _ in own]
    work = gradients.prepare([share for own in shares for share in own])
    ends = list(itertools.accumulate(len(own) for own in shares))
    of = [slice(end - len(own), end) for own, end in zip(shares, ends, strict=True)]  # its shares, of each training
    found_losses = gradients.add(work, numbers)
    losses = torch.stack([found_losses[own].sum() for own in of])
    norms = [step.take_back() for _, _, step in begun]
    found = torch.stack([losses, torch.stack(norms)]).tolist()
    seconds = (time.perf_counter() - began) / len(begun)
    steps: list[Step | None] = [None] * len(trainings)
    for place, (number, each, step) in enumerate(begun):
        steps[number] = each.end_step(
            step, found[0][place], found[1][place], sum(work.tokens[of[place]]), seconds, sum(work.saved[of[place]])
        )
    return steps, [each for _, each, _ in begun]
