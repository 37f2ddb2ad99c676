"""Tuning a soft prompt on a frozen base model: the loop, its checkpoints, and what it hands back."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from softprompt.data.example import Dataset, Example, check_targets
from softprompt.errors import ConfigError, TrainingError
from softprompt.evaluation.validation import validator
from softprompt.files import StrPath
from softprompt.model.batch import Row
from softprompt.model.loading import DTYPES
from softprompt.model.request import Request
from softprompt.soft_prompts.soft_prompt import SoftPrompt, library_versions
from softprompt.tasks.task import Task
from softprompt.text.tokens import SOFT
from softprompt.tuning import checkpoint, compilation
from softprompt.tuning.config import DEFAULT_STEPS, EVAL_EVERY, INITS, TrainConfig
from softprompt.tuning.history import History
from softprompt.tuning.keeping import Keeper, better
from softprompt.tuning.learner import Learner
from softprompt.tuning.objective import Objective
from softprompt.tuning.optimizer import learning_rate, make_optimizer
from softprompt.tuning.parametrisation import parametrise, require_shared_prefix
from softprompt.tuning.rows import RowOrder, describe_rows, split_rows
from softprompt.tuning.run_folder import Hold, RunFolder
from softprompt.tuning.start import first_vectors, init_scale
from softprompt.tuning.training_time import Schedule


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
        seconds: wall time, validation not included.
        validation: metric → value if the step ended with a validation.
        improved: whether that validation was the best so far.
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


def _tokens(requests: Sequence[Request]) -> int:
    """Tokens that a forward pass runs behind the shared prefix."""
    return sum(Row(request.ids[request.shared :], request.words).length for request in requests)


class Training:
    """One run of tuning. Iterate over it to train, then ask for ``result()``; that works after an interruption too.

    The learned numbers are kept in units of the RMS of their start, so that learning rate, clipping and Adam's epsilon
    mean the same for every base model (``parametrisation.py``).

    With several starts, each does the first tenth of the steps and is validated; the best of them goes on with its
    optimizer. They count as steps of one run, and so do those that a start skips once its loss is not finite.

    Attributes:
        config: its settings.
        task: template and verbalizer, bound to the base model.
        step: optimizer steps done.
        total: optimizer steps planned.
        stopped: why it ended: ``steps``, ``early``, ``interrupted``, ``not finite``; empty while it runs.
        compiled: whether the decoder layers are compiled while it trains; False, too, where that was seen not to work.
        base_unchanged: whether every bit of the base model's weights is as it was before any training, as the latest
            ``result`` found; None before that.
    """

    def __init__(
        self,
        task: Task,
        train: Dataset,
        validation: Dataset | None = None,
        config: TrainConfig | None = None,
        *,
        name: str = "soft-prompt",
        start: torch.Tensor | None = None,
        folder: StrPath | RunFolder | None = None,
        resume: bool = False,
    ) -> None:
        """Prepares a run.

        Args:
            task: what to learn; its number of virtual tokens is the largest that ``config`` tries, if it names any.
            train: at least one example with a target.
            validation: for choosing the best checkpoint; None holds a tenth of ``train`` back (at most
                ``config.validation_rows``).
            config: defaults if None.
            name: name of the soft prompt.
            start: float ``[P, H]``, or for a KV prefix ``[P, L, 2, H_kv, D]``, to start from instead of
                ``config.init``.
            folder: where checkpoints, ``log.jsonl`` and the history of the vectors are kept; None keeps none. It is
                held, so that no other training writes there, until the iteration ends or the training is deleted.
            resume: go on from the checkpoint in ``folder``, if there is one.

        Raises:
            DataError: too few rows.
            ConfigError: an initialisation that does not fit, a KV prefix for a base model or template that cannot
                have one, or a checkpoint of a run with other settings or data.
            StoreError: another training holds ``folder``, it cannot be written, or its checkpoint is damaged.
        """
        config = config or TrainConfig()
        if config.num_virtual_tokens is None:
            config = replace(config, num_virtual_tokens=max(1, task.num_virtual_tokens))
        self.config = config
        self.task, self.name = task, name
        self._run = folder if isinstance(folder, RunFolder) or folder is None else RunFolder(folder, name)
        self.folder = None if self._run is None else self._run.path
        if start is not None and self.config.lengths:
            raise ConfigError("other lengths cannot be tried from a soft prompt to start from; leave one of them out")
        found = task.num_virtual_tokens if task.template.has_soft_prompt else 0
        if found != self.config.longest:
            raise ConfigError(
                f"the task's template holds {found} virtual tokens, but {self.config.longest} are to be "
                "learned; give Task and TrainConfig the same num_virtual_tokens, and the template a {soft_prompt}"
            )
        self._base_digest = task.lm.digest_before
        self.base_unchanged: bool | None = None
        examples, held_out = split_rows(train, validation, self.config)
        self._data = describe_rows(train, validation, len(examples), len(held_out))
        if task.verbalizer is not None:
            check_targets(train, task.labels)
        self._order = RowOrder([None if task.verbalizer is None else example.target for example in examples])
        self._prepare(examples)
        if self.config.parametrisation == "prefix":
            require_shared_prefix(task.lm, task.template, self._requests)
        self.truncated = sum(request.truncated for request in self._requests)
        self._validator = validator(task, held_out)
        self._checked = [task.label_request(e) if task.words else task.target_request(e) for e in held_out]
        self._keeper = Keeper(self.config.patience)
        self._validations: list[dict[str, Any]] = []
        self._history = History(self.folder)
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.stopped: str = ""
        self._planned = self._planned_steps()
        self._every = self.config.eval_every or self._interval()
        self._probe = max(1, self._planned // 10) if self.config.tries > 1 else 0
        self._probing = self._probe * self.config.tries
        self.total = self._planned + max(0, self._probing - self._probe)
        self.compiled = self._should_compile()

        self._start = start
        self._learner = self._begin(0)
        self._leader: Learner | None = None  # the best of several starts so far
        self._good = self._learner.numbers()
        self._best_vectors = self._good.clone()
        self._hold, self._iterating = Hold(self._run), False
        self._open_folder(resume)

    def _prepare(self, examples: Sequence[Example]) -> None:
        """What each row asks, and its label's number where the loss is over labels."""
        task = self.task
        if self.config.loss == "labels":
            if task.verbalizer is None:
                raise ConfigError(
                    "The loss 'labels' needs class labels, but the targets are free text; give --labels or use lm."
                )
            self._objective = Objective(task.lm, torch.tensor(task.label_of_word, device=task.lm.device))
            self._requests = [task.label_request(e) for e in examples]
            self._gold = [task.labels.index(str(e.target)) for e in examples]
        else:
            self._objective = Objective(task.lm)
            self._requests = [task.target_request(e) for e in examples]
            self._gold = [0] * len(examples)

    def __iter__(self) -> Iterator[Step]:
        """Trains, one step at a time, until the planned steps are done or there is a reason to stop earlier.

        Raises:
            StoreError: the folder cannot be written; or it was given back when an earlier iteration ended, and another
                training has it now, or has had it since.
        """
        lm = self.task.lm
        self._hold.take()
        try:
            self._iterating = True
            if self.compiled:
                lm.compile_layers()
            while not self.stopped:
                if self.step >= self.total:
                    self.stopped = "steps"
                    break
                step = self._advance()
                if not math.isfinite(step.loss) or not math.isfinite(step.grad_norm):
                    if self._give_up_start():
                        continue
                    self.stopped = "not finite"
                    break
                self._log(step)
                if self.step % self.config.checkpoint_every == 0 or step.validation is not None:
                    self._save()
                yield step
        finally:
            lm.uncompile_layers()
            self._iterating = False
            self._hold.give_back()

    def _advance(self) -> Step:
        """One optimizer step, with a validation when it is due."""
        began = time.perf_counter()
        learner, place = self._learner, self._place()
        form = learner.form
        chosen = self._batch(place)
        requests = [self._requests[i] for i in chosen]
        folded = form.fold()
        numbers = (folded.detach() * form.unit).requires_grad_()
        loss, tokens = self._objective.backward(requests, [self._gold[i] for i in chosen], numbers)
        assert numbers.grad is not None
        self.compiled = self.task.lm.compiled  # it may have turned out that they cannot be
        learner.optimizer.zero_grad()
        torch.autograd.backward(folded, numbers.grad * form.unit)
        norm = math.hypot(*(float(tensor.grad.norm()) for tensor in form.tensors.values() if tensor.grad is not None))
        lr = learning_rate(self.config, place, self._planned)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return Step(self.step + 1, self.total, loss, lr, norm, tokens, time.perf_counter() - began)
        if self.config.clip:
            torch.nn.utils.clip_grad_norm_(form.tensors.values(), self.config.clip)
        for group in learner.optimizer.param_groups:
            group["lr"] = lr
        self._good = numbers.detach()  # its loss is finite; what the step makes of it, may not have one
        learner.optimizer.step()
        if learner.average is not None:
            decay = min(self.config.average, (2 + place) / (11 + place))
            learner.average.lerp_(learner.numbers(), 1 - decay)
        self.step += 1
        seconds = time.perf_counter() - began
        self.seconds += seconds
        self.tokens += tokens
        step = Step(self.step, self.total, loss, lr, norm, tokens, seconds)
        tried = self.step <= self._probing and place + 1 == self._probe
        if (place + 1) % self._every == 0 or self.step == self.total or tried:
            step = self._validate(step)
        if tried:
            self._compare_starts(step.validation)
        return step

    def _validate(self, step: Step) -> Step:
        """Scores the current soft prompt, or its average, on the validation rows and keeps it if it is the best."""
        average = self._learner.average
        current = self._learner.numbers() if average is None else average.clone()
        found = {"step": self.step, "start": self._learner.number, **self._validator(current)}
        improved = self._keeper.add(found)
        if improved:
            self._best_vectors = current
        self._validations.append(found)
        self._history.add(self._learner.number, self.step, current)
        if self._keeper.over and self._probing < self.step < self.total:  # a start that is tried does not end the run
            self.stopped = "early"
        return replace(step, validation=found, improved=improved)

    def end_after(self, steps: int) -> None:
        """Moves the end of a run of one start, which keeps no checkpoints, to ``steps`` steps in all, and the schedule
        of its learning rate with it. At least one more step is done, so that the last one is validated."""
        assert self.config.tries == 1
        assert self.folder is None
        self._planned = self.total = max(steps, self.step + 1)
        self.config = replace(self.config, steps=self.total, epochs=None)

    # --- several starts ---------------------------------------------------------------------------

    def _place(self) -> int:
        """The next step's place in the schedule of its start, from 0."""
        return self.step % self._probe if self.step < self._probing else self.step - (self.total - self._planned)

    def _begin(self, number: int) -> Learner:
        """The start of that number, before its first step."""
        first = self._requests[0].ids
        form = parametrise(
            self.task.lm,
            self.config.parametrisation,
            self._initial(number),
            seed=self.config.seed + number,
            scale=init_scale(self.task.lm, self.config),
            before=first[: first.index(SOFT)],
        )
        learner = Learner(number, form, make_optimizer(self.config, *form.tensors.values()), None)
        learner.average = learner.numbers() if self.config.average else None
        self._history.add(number, number * self._probe, learner.numbers())
        return learner

    def _compare_starts(self, found: dict[str, Any] | None) -> None:
        """After a start's last step, whose validation is ``found``: keeps it if it is the best so far; begins the
        next, or goes on with the best. None: it has none, and is not kept."""
        tried, leader = self._learner, self._leader
        tried.found = found
        if found and math.isfinite(found["loss"]) and (leader is None or better(found, leader.found or {})):
            leader = tried
        if self.step < self._probing:
            self._learner, self._leader = self._begin(tried.number + 1), leader
        else:
            self._learner, self._leader = leader or tried, None
        self._keeper.begin()

    def _give_up_start(self) -> bool:
        """Skips what is left of a start whose loss is not finite; False if there is no other to go on with."""
        following = self._learner.number + 1
        if self.step >= self._probing or (following == self.config.tries and self._leader is None):
            return False
        self.step = following * self._probe
        self._compare_starts(None)
        return True

    @property
    def vectors(self) -> torch.Tensor:
        """The soft prompt as it is now, trained or not: float32 ``[P, H]`` or ``[P, L, 2, H_kv, D]`` on the CPU."""
        return self._learner.numbers().cpu()

    @property
    def schedule(self) -> Schedule:
        """When validations come, and what each of them computes."""
        rows, tries, longest = self._checked, self.config.tries, self.config.longest
        whole = (len(row.ids) - 1 + longest + len(word) for row in rows for word in row.words)
        tokens = _tokens(rows) if self.task.lm.shares_prefix else sum(whole)
        return Schedule.of(self._planned, self._every, len(rows), tokens, tries=tries, probe=self._probe)

    def result(self) -> SoftPrompt:
        """The best soft prompt so far; before any validation, the last one whose loss was finite.

        Raises:
            TrainingError: no step was done yet, the loss of the very first was not finite, or a weight of the base
                model changed, which must never happen.
        """
        lm, best = self.task.lm, self._keeper.best
        if not self.tokens:
            raise TrainingError(
                "The loss is not finite at the very first step, so nothing was learned; try --dtype fp32."
                if self.stopped == "not finite"
                else "The training has done no step yet, so there is no result; iterate over it first, for instance "
                "with `for step in training: print(step)`."
            )
        if not self._iterating:
            self._hold.give_back()
        self.base_unchanged = lm.weights_digest() == self._base_digest
        if not self.base_unchanged:
            raise TrainingError(
                f"A weight of the base model {lm.name} is not what it was before the training, so its soft prompt "
                "would fit no model; load the base model anew, and report this unless you changed the weight yourself."
            )
        metrics = []
        if best is not None:
            metrics = [{"split": "validation", **metric} for metric in best["metrics"]]
        return SoftPrompt(
            vectors=(self._best_vectors if best is not None else self._good).cpu(),
            name=self.name,
            base=lm.name,
            base_fingerprint=lm.fingerprint,
            tokenizer_fingerprint=lm.tokenizer_fingerprint,
            template=self.task.template.text,
            verbalizer=None if self.task.verbalizer is None else dict(self.task.verbalizer.words),
            word_end=bool(self.task.ends),
            parametrisation=self.config.parametrisation,
            training={
                **self.config.as_dict(),
                "init_scale": init_scale(lm, self.config),
                "init": "given" if self._start is not None and self.config.init in INITS else self.config.init,
                "steps_done": self.step,
                "best_step": self.step if best is None else best["step"],
                "stopped": self.stopped or "interrupted",
                "start": self._learner.number if best is None else best["start"],
                "trainable_parameters": sum(tensor.numel() for tensor in self._learner.form.tensors.values()),
                "tokens": self.tokens,
                "train_seconds": round(self.seconds, 3),
                "dtype": str(lm.dtype).removeprefix("torch."),
                "device": lm.device.type,
                "compiled": self.compiled,
            },
            data=self._data,
            metrics=tuple(metrics),
            versions=library_versions(),
            created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            base_settings=lm.settings,
        )

    # --- preparation ------------------------------------------------------------------------------

    def _planned_steps(self) -> int:
        config = self.config
        if config.epochs is not None:
            return max(1, math.ceil(config.epochs * len(self._requests) / config.batch_size))
        return config.steps or DEFAULT_STEPS

    def _interval(self) -> int:
        """Steps between validations, by tokens alone, so that a resumed run has the same; a step runs them twice."""
        step = 2 * self.config.batch_size * _tokens(self._requests) / len(self._requests)
        return max(1, min(max(EVAL_EVERY, math.ceil(3 * _tokens(self._checked) / step)), self._planned // 5))

    def _should_compile(self) -> bool:
        lm = self.task.lm
        if not lm.shares_prefix or self.config.compile == "off":
            return False
        tokens = _tokens(self._requests) / len(self._requests) * self.config.batch_size + self.config.longest
        return self.config.compile == "on" or compilation.pays(lm, self.total, tokens)

    def _initial(self, number: int) -> torch.Tensor:
        """What the start of that number begins with: float32 ``[P, H]`` or ``[P, L, 2, H_kv, D]``."""
        lm, config, start = self.task.lm, self.config, self._start
        if start is not None:
            length, _ = config.start(number)
            expected: tuple[int, ...] = (length, lm.hidden_size)
            if start.dim() == 5:
                if config.parametrisation != "prefix":
                    raise ConfigError(
                        "the soft prompt to start from is a trained KV prefix, which only the parametrisation prefix "
                        f"can go on from, not {config.parametrisation}; choose that, or another start"
                    )
                expected = (length, *lm.kv_shape)
            if tuple(start.shape) != expected:
                raise ConfigError(
                    f"the soft prompt to start from has shape {list(start.shape)}, but {list(expected)} is needed; "
                    "set num_virtual_tokens to its length and use it with a base model of its width"
                )
            return start.detach().float().cpu().clone().to(lm.device)
        return first_vectors(self.task, config, number).to(lm.device)

    def _batch(self, step: int) -> list[int]:
        """Indices of the examples of a start's step ``step``, from its seed alone."""
        seed = self.config.seed + self.config.start(self._learner.number)[1]
        return self._order.batch(seed, step, self.config.batch_size)

    # --- what survives a kill ---------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with to be gone on with."""
        task, data = self.task, self._data
        settings = self.config.as_dict()
        del settings["checkpoint_every"]  # which changes no number
        start = None if self._start is None else self._start.detach().float().cpu().contiguous().numpy().tobytes()
        return {
            **settings,
            "init": self.config.init if start is None else "given",  # not the path, which may change
            "start": None if start is None else hashlib.sha256(start).hexdigest(),
            "total": self.total,
            "template": task.template.text,
            "labels": [task.labels, task.words, task.label_of_word, task.ends],
            "base model": task.lm.fingerprint,
            "dtype": next(name for name, dtype in DTYPES.items() if dtype == task.lm.dtype),
            "training data": [data["train"]["fingerprint"], data["train"]["rows"]],
            "validation data": [data["validation"]["fingerprint"], data["validation"]["rows"]],
        }

    def _open_folder(self, resume: bool) -> None:
        run = self._run
        if run is None:
            return
        self._hold.take()
        try:
            checkpoint.tidy(run.path)
            if resume and run.stopped:
                self._load()
            else:
                run.clear()
        except BaseException as error:
            self._hold.give_back()
            if isinstance(error, OSError):
                raise run.unwritable(error) from error
            raise

    def _save(self) -> None:
        if self.folder is None:
            return
        tensors = {"good": self._good, "best": self._best_vectors}
        learners = {"learner": self._learner} | ({} if self._leader is None else {"leader": self._leader})
        for role, learner in learners.items():
            tensors |= {f"{role}/{name}": tensor for name, tensor in learner.tensors().items()}
        checkpoint.save(
            self.folder,
            tensors,
            {role: checkpoint.slots_of(learner.optimizer) for role, learner in learners.items()},
            {
                "identity": self._identity(),
                "step": self.step,
                "seconds": self.seconds,
                "tokens": self.tokens,
                "starts": {role: [learner.number, learner.found] for role, learner in learners.items()},
                "keeper": self._keeper.state(),
                "validations": [_without_rows(found) for found in self._validations],
                "stopped": self.stopped,
                "compiled": self.compiled,
            },
        )

    def _load(self) -> None:
        assert self.folder is not None
        tensors, optimizers, state = checkpoint.load(self.folder)
        checkpoint.require_same(self.folder, self._identity(), state["identity"])
        began = {role: self._begin(number) for role, (number, _) in state["starts"].items()}
        for role, learner in began.items():
            with torch.no_grad():
                for name, tensor in learner.tensors().items():
                    tensor.copy_(tensors[f"{role}/{name}"])
            checkpoint.give_slots(learner.optimizer, optimizers[role])
            learner.found = state["starts"][role][1]
        self._learner, self._leader = began["learner"], began.get("leader")
        self._good = tensors["good"].to(self.task.lm.device)
        self._best_vectors = tensors["best"].to(self.task.lm.device)
        self.step, self.seconds, self.tokens = state["step"], state["seconds"], state["tokens"]
        if "keeper" in state:
            self._keeper.resume(state["keeper"])
        else:
            self._keeper.resume_earlier(state["best"])
        best, self._validations = self._keeper.best, state["validations"]
        self.stopped, self.compiled = state["stopped"], state["compiled"]
        self._history.resume(self.step)
        if best is not None:  # it may have been thinned out since
            self._history.add(best["start"], best["step"], self._best_vectors)
        self._history.write(self._validations, self._keeper.best)
        checkpoint.trim_log(self.folder / checkpoint.LOG, self.step)

    def _log(self, step: Step) -> None:
        if self._run is None:
            return
        try:
            self._run.log({key: value for key, value in step.__dict__.items() if value is not None})
            if step.validation is not None:
                self._history.write(self._validations, self._keeper.best)
        except OSError as error:
            raise self._run.unwritable(error) from error


def _without_rows(found: Mapping[str, Any]) -> dict[str, Any]:
    """A validation as the checkpoint has it; its rows are in the log."""
    return {key: value for key, value in found.items() if key != "rows"}
