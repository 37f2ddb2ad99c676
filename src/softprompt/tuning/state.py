"""What a training has come to: all that its checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from softprompt.tuning import checkpoint
from softprompt.tuning.keeping import Keeper
from softprompt.tuning.learner import Learner
from softprompt.tuning.trend import Trend


@dataclass(eq=False)
class State:
    """What a training has come to.

    Attributes:
        keeper: which validation is kept.
        learner: the start that is trained now.
        good: float32 ``[P, H]``, ``[P, L, 2, H_kv, D]`` or ``[N]``, the last numbers whose loss was finite.
        best: float32 of the same shape, the numbers of the validation that is kept.
        leader: the best of several starts so far; None with one, and when they are compared.
        step, tokens, seconds: what was done: optimizer steps, tokens computed, wall time without validations.
        rounds: steps computed, those included that were not finite.
        validations: all of them, without their rows.
        trend: of the steps' losses and gradients.
        stopped: why it ended: ``steps``, ``early``, ``interrupted``, ``not finite``; empty while it runs.
        compiled: whether the decoder layers are compiled while it trains.
        planned: steps in all, where the end was moved; 0 where it is that of the settings.
    """

    keeper: Keeper
    learner: Learner
    good: torch.Tensor
    best: torch.Tensor
    leader: Learner | None = None
    step: int = 0
    rounds: int = 0
    tokens: int = 0
    seconds: float = 0.0
    validations: list[dict[str, Any]] = field(default_factory=list)
    trend: Trend = field(default_factory=Trend)
    stopped: str = ""
    compiled: bool = False
    planned: int = 0

    @classmethod
    def of(cls, keeper: Keeper, learner: Learner, compiled: bool) -> State:
        """Before the first step."""
        numbers = learner.numbers()
        return cls(keeper, learner, numbers, numbers.clone(), compiled=compiled)

    def validated(self, found: Mapping[str, Any]) -> None:
        """Adds a validation; its rows are in the log."""
        self.validations.append({key: value for key, value in found.items() if key != "rows"})

    @property
    def parameters(self) -> int:
        """How many numbers are learned."""
        return sum(tensor.numel() for tensor in self.learner.form.tensors.values())

    def summary(self) -> dict[str, Any]:
        """What a soft prompt remembers of its training, JSON values."""
        best = self.keeper.best
        return {
            "steps_done": self.step,
            "best_step": self.step if best is None else best["step"],
            "stopped": self.stopped or "interrupted",
            "start": self.learner.number if best is None else best["start"],
            "trainable_parameters": self.parameters,
            "tokens": self.tokens,
            "train_seconds": round(self.seconds, 3),
            "compiled": self.compiled,
        }

    def save(self, folder: Path, identity: Mapping[str, Any], *, keep_earlier: bool = False) -> None:
        """Writes the checkpoint.

        Args:
            folder: where.
            identity: all that the run's numbers depend on, JSON values.
            keep_earlier: keep the one before it, too.

        Raises:
            StoreError: the folder cannot be written; the earlier checkpoint stays.
        """
        tensors = {"good": self.good, "best": self.best}
        learners = {"learner": self.learner} | ({} if self.leader is None else {"leader": self.leader})
        for role, learner in learners.items():
            tensors |= {f"{role}/{name}": tensor for name, tensor in learner.tensors().items()}
        checkpoint.save(
            folder,
            tensors,
            {role: checkpoint.slots_of(learner.optimizer) for role, learner in learners.items()},
            {
                "identity": identity,
                "step": self.step,
                "rounds": self.rounds,
                "seconds": self.seconds,
                "tokens": self.tokens,
                "starts": {role: [learner.number, learner.found] for role, learner in learners.items()},
                "keeper": self.keeper.state(),
                "validations": self.validations,
                "trend": asdict(self.trend),
                "stopped": self.stopped,
                "compiled": self.compiled,
                "planned": self.planned,
            },
            keep_earlier=keep_earlier,
        )

    def take_up(self, found: checkpoint.Loaded, begin: Callable[[int], Learner]) -> None:
        """Becomes what a checkpoint holds.

        Args:
            found: the checkpoint, of this run.
            begin: the start of a number, before its first step.
        """
        tensors, optimizers, saved = found
        began = {role: begin(number) for role, (number, _) in saved["starts"].items()}
        for role, learner in began.items():
            with torch.no_grad():
                for name, tensor in learner.tensors().items():
                    tensor.copy_(tensors[f"{role}/{name}"])
            checkpoint.give_slots(learner.optimizer, optimizers[role])
            learner.found = saved["starts"][role][1]
        self.learner, self.leader = began["learner"], began.get("leader")
        self.good = tensors["good"].to(self.good.device)
        self.best = tensors["best"].to(self.best.device)
        self.step, self.seconds, self.tokens = saved["step"], saved["seconds"], saved["tokens"]
        self.rounds = saved.get("rounds", self.step)  # earlier releases kept none
        self.validations, self.stopped, self.compiled = saved["validations"], saved["stopped"], saved["compiled"]
        self.trend, self.planned = Trend(**saved.get("trend", {})), saved.get("planned", 0)  # earlier releases: none
        if "keeper" in saved:
            self.keeper.resume(saved["keeper"])
        else:
            self.keeper.resume_earlier(saved["best"])
