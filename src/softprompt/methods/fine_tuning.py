"""Full fine-tuning, and the loop that trains any weights of a copy of the base model.

They are trained with the soft prompt's care: its rows and template, its loss and validation rule, its batch size,
clipping and patience, a learning rate chosen on the validation rows, and the best weights kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from softprompt.data.example import Example
from softprompt.evaluation.validation import validator
from softprompt.methods.problem import Learned, Problem
from softprompt.model.batch import Row, micro_batches
from softprompt.model.frozen import FrozenLM
from softprompt.model.request import can_share
from softprompt.model.state.prefix import PrefixState
from softprompt.tasks.predict import Prediction, Progress, Query, default_sampling, predict
from softprompt.tuning.alarms import Watch
from softprompt.tuning.config import EPOCHS, TrainConfig
from softprompt.tuning.keeping import Keeper
from softprompt.tuning.objective import Objective
from softprompt.tuning.optimizer import learning_rate
from softprompt.tuning.rows import RowOrder, split_rows
from softprompt.tuning.trend import Trend

FULL_RATES = (3e-5, 1e-4, 3e-4)
"""Peak learning rates that are tried; the middle one is taken where there is no time to try, or no clear winner."""
TRIALS = 0.2
"""Share of the budget that goes into trying the learning rates."""
TRIAL_STEPS = 8
"""With fewer steps a trial would tell nothing, and is not made."""
VALIDATIONS = 16
"""As many as a soft prompt's default run has, or fewer where they would take more than a fifth of the time."""
LEAST_PLANNED = 200
"""Steps that are allowed even if they are more passes than that, for data of a few dozen rows."""


def full_fine_tuning(problem: Problem) -> Learned:
    """Every weight of the base model trained."""
    lm = problem.fresh()
    return learn(problem, lm, list(lm.model.parameters()), FULL_RATES)


def learn(problem: Problem, lm: FrozenLM, weights: list[torch.nn.Parameter], rates: Sequence[float]) -> Learned:
    """Trains ``weights`` of ``lm`` with the best of ``rates``, within the budget."""
    tuner = Tuner(problem, lm, weights)
    try:
        lr = tuner.choose(rates)
        run = tuner.run(lr, problem.seconds_left, VALIDATIONS)
    finally:
        tuner.close()
    watch = Watch(problem.task(), tuner.examples, tuner.held_out)
    count = sum(weight.numel() for weight in weights)
    alarms = watch.at_end_of(run.keeper, run.trend, replace(tuner.config, lr=lr), count, "the trained model")
    task = problem.task(lm=lm)
    # a fine-tuned model has learned to end its answer, as a soft prompt has; only an untrained one ends with its line
    sampling = None if task.verbalizer is not None else replace(default_sampling(task), stop=(), skip_blank=False)

    def answer(examples: Sequence[Example], progress: Progress | None) -> list[Prediction]:
        return predict([Query(task, example) for example in examples], sampling=sampling, progress=progress)

    return Learned(
        answer=answer,
        trainable_parameters=count,
        bytes=sum(weight.nbytes for weight in weights),
        chosen={"lr": lr, "steps": run.curve[-1]["step"] if run.curve else 0, "best_step": run.best["step"]},
        validation=run.best["value"] if problem.labels and run.curve else None,
        curve=run.curve,
        adapted=lm,
        validation_rows=len(tuner.held_out),
        alarms=alarms,
    )


@dataclass(frozen=True)
class Run:
    """What a run came to.

    Attributes:
        best: the point of the curve whose weights are in the model; ``NOTHING`` if there is none, and the weights are
            as they were at the start.
        curve: ``{"seconds", "step", "value", "loss"}`` for every validation with a finite loss; the seconds count from
            the start of the budget.
        keeper: has seen its validations.
        trend: of its losses and gradients.
    """

    best: Mapping[str, float]
    curve: tuple[dict[str, float], ...]
    keeper: Keeper = field(default_factory=lambda: Keeper(0))
    trend: Trend = field(default_factory=Trend)


NOTHING: Mapping[str, float] = {"step": 0, "value": -math.inf, "loss": math.inf}


class Tuner:
    """Trains chosen weights of one model on a problem's rows, as often as it is asked to, each time anew.

    Attributes:
        config: what is the same in every run: batch size, schedule, clipping, patience, validation rows, seed.
        examples, held_out: the rows it learns from, and those it is validated on.
        masters: the float32 numbers that the optimizer changes, in the order of the weights.
    """

    def __init__(self, problem: Problem, lm: FrozenLM, weights: Sequence[torch.nn.Parameter]) -> None:
        self.config = TrainConfig(
            warmup=0.1,
            schedule="linear",
            clip=1.0,
            weight_decay=0.0,
            seed=problem.seed,
            validation_rows=problem.validation_rows,
        )
        self._problem, self._lm, self._weights = problem, lm, list(weights)
        self.examples, self.held_out = split_rows(problem.train, problem.validation, self.config)
        task = problem.task(lm=lm)
        self._objective = Objective()
        self._requests = [task.target_request(e) for e in self.examples]
        self._order = RowOrder([None if task.verbalizer is None else example.target for example in self.examples])
        self._validator = validator(task, self.held_out)
        self._no_prefix: PrefixState | None = None
        if all(can_share(lm, request, 0) for request in self._requests):
            with torch.no_grad():
                self._no_prefix = lm.prefix_kv((), None)
        self._start = _copied(self._weights)
        self._trend = Trend()
        self._hooks: list[Any] = []
        self.masters = [self._master(weight) for weight in self._weights]
        if problem.worth_compiling:
            problem.notice("compiling")
            lm.layers.set(compiled=True)
            self.backward(range(min(self.config.batch_size, len(self.examples))))  # its gradient is thrown away
        self._pace = self._time_a_step()
        # a guess until there is one: a row forward, in larger batches, is about a quarter of forward and backward
        self._check = self._pace * len(self.held_out) / self.config.batch_size / 4

    def close(self) -> None:
        """Leaves a model that needs no gradient."""
        for hook in self._hooks:
            hook.remove()
        for weight in self._weights:
            weight.requires_grad_(False)
            weight.grad = None
        self._lm.layers.set(compiled=False)

    def choose(self, rates: Sequence[float]) -> float:
        """The middle one of three learning rates, unless a short run of another, with a whole schedule of its own, is
        better on the validation rows by more than one standard error of an accuracy there (free text: better at all).

        Short runs are within the noise of each other, and favour high rates, which lose in a whole run: see
        ``docs/study/defaults.md``.
        """
        middle, seconds = rates[len(rates) // 2], TRIALS * self._problem.seconds_left / len(rates)
        found = dict[float, Mapping[str, float]]()
        for lr in rates:
            if seconds - self._check < TRIAL_STEPS * self._pace:  # known better after each run
                return middle
            found[lr] = self.run(lr, seconds, 1).best
        best = max(rates, key=lambda lr: (found[lr]["value"], -found[lr]["loss"]))
        gain = found[best]["value"] - found[middle]["value"]
        return best if gain > self._noise(found[middle]["value"]) else middle

    def _noise(self, value: float) -> float:
        """One standard error of an accuracy on the validation rows; 0 for free text, whose loss is of many tokens."""
        return math.sqrt(value * (1 - value) / len(self.held_out)) if self._problem.labels and value >= 0 else 0.0

    def run(self, lr: float, seconds: float, validations: int) -> Run:
        """Trains from the start for at most ``seconds``, but one step at least; leaves the best weights in the model.

        Args:
            lr: peak of the learning rate, which rises linearly and then falls to 0 at the end of the time.
            seconds: the time for steps and validations.
            validations: how many to spread over it; one of them is at the end.
        """
        config, end = replace(self.config, lr=lr), time.perf_counter() + seconds
        interval = max(seconds / validations, 4 * self._check)
        self._put(self._start)
        optimizer = torch.optim.AdamW(
            self.masters, lr=lr, weight_decay=config.weight_decay, fused=self._lm.device.type in ("cpu", "cuda") or None
        )
        keeper, kept, curve = Keeper(config.patience), self._start, list[dict[str, float]]()
        best, step, trained, total = NOTHING, 0, 0.0, max(1, self._planned(0, end, interval))
        self._trend = Trend()
        while step < total:
            began = time.perf_counter()
            if not self._step(optimizer, self._order.batch(config.seed, step, config.batch_size), config, step, total):
                break
            took = time.perf_counter() - began
            step, trained, self._pace = step + 1, trained + took, self._pace + 0.1 * (took - self._pace)
            total = self._planned(step, end, interval)
            ends_soon = (total - step) * self._pace < interval / 2
            if step < total and (trained < interval or ends_soon):
                continue
            found = self._validate(step)
            if not math.isfinite(found["loss"]):
                break
            point = {key: found[key] for key in ("seconds", "step", "value", "loss")}
            curve.append(point)
            if keeper.add(found):
                best, kept = point, _copied(self._weights)
            if step >= total or keeper.over:
                break
            trained, total = 0.0, self._planned(step, end, interval)
        self._put(kept)
        return Run(best, tuple(curve), keeper, self._trend)

    def _planned(self, step: int, end: float, interval: float) -> int:
        """How many steps there will be in all: ``step`` that are done, and those that fit, with a validation every
        ``interval`` seconds of steps, into the time until ``end``."""
        longest = max(LEAST_PLANNED, math.ceil(EPOCHS * len(self._requests) / self.config.batch_size))
        left = end - time.perf_counter() - self._check
        return min(longest, step + int(left / (self._pace * (1 + self._check / interval))))

    def backward(self, chosen: Sequence[int]) -> float:
        """Adds the gradient of the mean loss of the rows ``chosen`` to that of the masters; returns the loss.

        Each row runs whole, in micro-batches, so that the gradient reaches every weight; nothing is shared.
        """
        requests = [self._requests[i] for i in chosen]
        weight, total = self._objective.weight(requests), 0.0
        rows = [Row(request.ids, request.words) for request in requests]
        if self._no_prefix is None:
            lengths = [self._lm.tokens_of(request) for request in requests]
        else:
            lengths = [row.length for row in rows]
        for group in micro_batches(lengths, self._lm.tokens_at_once):
            if self._no_prefix is None:
                scores = self._lm.score_concatenated([requests[i] for i in group], ())
            else:
                batch = self._lm.collate([rows[i] for i in group], self._no_prefix.lengths)
                scores = self._lm.score_batch(batch, self._no_prefix)
            gold = torch.zeros(len(group), dtype=torch.long, device=scores.device)
            loss = self._objective.loss(scores, gold) / weight
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    def _step(
        self, optimizer: torch.optim.Optimizer, chosen: Sequence[int], config: TrainConfig, step: int, total: int
    ) -> bool:
        """Step ``step`` (from 0), on the rows ``chosen``; False, and nothing is changed, if it is not finite."""
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, total)
        loss = self.backward(chosen)
        norm = float(torch.nn.utils.clip_grad_norm_(self.masters, config.clip or math.inf))
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            self._trend.add(loss, norm, config.clip, total)
            optimizer.step()
            self._serve()
        optimizer.zero_grad()
        if step % 10 == 0:
            self._problem.notice(f"learning rate {config.lr:g}, step {step + 1:,} of {total:,}, loss {loss:.3f}")
        return finite

    def _validate(self, step: int) -> dict[str, Any]:
        """A validation, with its step and the seconds since the budget began to run."""
        began = time.perf_counter()
        found = self._validator(torch.empty(0))  # the requests have no place for a soft prompt
        self._check = time.perf_counter() - began
        seconds = round(self._problem.budget - self._problem.seconds_left, 1)
        return {"seconds": seconds, "step": step, **found}

    def _time_a_step(self) -> float:
        """Seconds of a batch's gradient, which is thrown away."""
        began = time.perf_counter()
        self.backward(range(min(self.config.batch_size, len(self._requests))))
        for master in self.masters:
            master.grad = None
        return time.perf_counter() - began

    # --- the weights ------------------------------------------------------------------------------

    def _master(self, weight: torch.nn.Parameter) -> torch.Tensor:
        """The weight itself if it is float32, else a float32 copy that its gradients are added to.

        A bf16 number around 0.1 moves in steps of 0.0005, many times what an AdamW step at these rates asks for, so
        that most updates would be lost; and so would small gradients of a batch's many micro-batches.
        """
        weight.requires_grad_()
        if weight.dtype == torch.float32:
            return weight
        master = weight.detach().float().requires_grad_()
        hook = weight.register_post_accumulate_grad_hook(partial(_hand_over, master))  # type: ignore[no-untyped-call]
        self._hooks.append(hook)
        return master

    @torch.no_grad()
    def _serve(self) -> None:
        """Rounds the masters into the weights that the model computes with."""
        for weight, master in zip(self._weights, self.masters, strict=True):
            if weight is not master:
                weight.copy_(master)

    @torch.no_grad()
    def _put(self, values: Sequence[torch.Tensor]) -> None:
        for weight, master, value in zip(self._weights, self.masters, values, strict=True):
            weight.copy_(value)
            if weight is not master:
                master.copy_(value)


def _hand_over(master: torch.Tensor, weight: torch.Tensor) -> None:
    """Moves a gradient from a weight to its master."""
    assert weight.grad is not None, "the hook runs after a gradient has been accumulated"
    gradient, weight.grad = weight.grad.float(), None
    master.grad = gradient if master.grad is None else master.grad.add_(gradient)


def _copied(weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies in the CPU's memory."""
    return [weight.detach().to("cpu", copy=True) for weight in weights]
