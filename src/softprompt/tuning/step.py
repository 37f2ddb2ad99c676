"""One optimizer step, before and after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from softprompt.tuning.learner import Learner


@dataclass(frozen=True)
class Alarm:
    """A reason to doubt a training.

    Attributes:
        kind: what it is, one of the names in ``docs/guides/alarms.md``.
        found: what was found, with the figure.
        remedy: what to do where a soft prompt is trained by itself.
    """

    kind: str
    found: str
    remedy: str

    @property
    def sentence(self) -> str:
        """Both, without a full stop."""
        return f"{self.found}; {self.remedy}"

    def as_dict(self) -> dict[str, str]:
        """JSON values."""
        return {"kind": self.kind, "sentence": self.sentence}


@dataclass(frozen=True)
class Step:
    """What one optimizer step did.

    Attributes:
        number: 1 for the first.
        total: how many are planned.
        loss: mean loss of the step's batch, in nats (a target token for ``lm``, an example for ``labels``).
        lr: learning rate in RMS of the start.
        grad_norm: the gradient's norm before clipping, in loss per RMS of the start.
        tokens: tokens computed, the shared prefix counted once.
        saved: how many more it would be if conversations, and the answers of one, did not share what they begin with.
        seconds: wall time, validation not included.
        validation: metric → value if the step ended with a validation.
        improved: whether that validation was the best so far.
        alarms: what gives reason to doubt the training since this step.
    """

    number: int
    total: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    seconds: float
    validation: dict[str, Any] | None = None
    improved: bool = False
    saved: int = 0
    alarms: tuple[Alarm, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """JSON values, of those that there are."""
        there = {key: value for key, value in self.__dict__.items() if value is not None and key != "alarms"}
        return there | ({"alarms": [alarm.as_dict() for alarm in self.alarms]} if self.alarms else {})


@dataclass(frozen=True)
class Begun:
    """A step before its gradient.

    Attributes:
        learner: what learns in it.
        place: its place in the plan of the start, from 0.
        folded: the soft prompt's numbers in units of the start, with the graph to what is learned.
        numbers: the same in the base model's units, a leaf that gets the gradient.
    """

    learner: Learner
    place: int
    folded: torch.Tensor
    numbers: torch.Tensor

    def take_back(self) -> torch.Tensor:
        """Takes the gradient at the numbers back to what is learned; returns its norm, float32 ``[]`` on the device."""
        return self.learner.gradient(self.folded, self.numbers)
