"""Tuning a soft prompt on a frozen base model: the loop, its checkpoints, and what it hands back."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from softprompt.data.example import Dataset, Example, check_targets
from softprompt.errors import ConfigError, ProcessError, StoreError, TrainingError
from softprompt.evaluation.validation import validator
from softprompt.files import StrPath
from softprompt.model.fast.measured import MicroBatch
from softprompt.model.joined import share_beginnings
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tasks.task import Task
from softprompt.text.tokens import SOFT, Tokens
from softprompt.tuning import checkpoint, compilation
from softprompt.tuning.alarms import Watch
from softprompt.tuning.config import INITS, TrainConfig
from softprompt.tuning.gradients import Gradients, Share, Work
from softprompt.tuning.history import History
from softprompt.tuning.keeping import Keeper, better
from softprompt.tuning.learner import Learner
from softprompt.tuning.objective import Objective
from softprompt.tuning.optimizer import learning_rate, make_optimizer
from softprompt.tuning.parametrisation import parametrise, require_shared_prefix
from softprompt.tuning.rows import Order, RowOrder, describe_rows, split_rows
from softprompt.tuning.run_folder import Hold, RunFolder
from softprompt.tuning.start import first_numbers, init_scale
from softprompt.tuning.state import State
from softprompt.tuning.step import Alarm, Begun, Step
from softprompt.tuning.training_time import Schedule, schedule_of


class Training:
    """One run of tuning. Iterate over it to train, then ask for ``result()``; that works after an interruption too.

    The learned numbers are kept in units of the RMS of their start, so that learning rate, clipping and Adam's epsilon
    mean the same for every base model (``parametrisation.py``).

    With several starts, each does the first tenth of the steps and is validated; the best of them goes on with its
    optimizer. They count as steps of one run, and so do those that a start skips once its loss is not finite.

    Attributes:
        config: its settings.
        task: template and verbalizer, bound to the base model.
        schedule: its steps and validations.
        truncated: how many inputs were cut.
        notes: what it remembers of its data besides.
        watch: looks whether it learns; its ``before`` is what was to be seen before the first step.
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
        order: Order | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """Prepares a run.

        Args:
            task: what to learn; its number of virtual tokens is the largest that ``config`` tries, if it names any.
            train: at least one example with a target.
            validation: for choosing the best checkpoint; None holds a tenth of ``train`` back (at most
                ``config.validation_rows``).
            config: defaults if None.
            name: name of the soft prompt.
            start: float ``[P, H]``, or for a KV prefix ``[P, L, 2, H_kv, D]``, or for a trained state ``[N]``, to start
                from instead of ``config.init``.
            folder: where checkpoints, ``log.jsonl`` and the history of the vectors are kept; None keeps none. It is
                held, so that no other training writes there, until the iteration ends or the training is deleted.
            resume: go on from the checkpoint in ``folder``, if there is one.
            order: of the rows of ``train``, where it is not that of one task.
            notes: what the soft prompt is to remember of its data besides, JSON values.

        Raises:
            DataError: too few rows.
            ConfigError: an initialisation that does not fit, a KV prefix for a base model or template that cannot
                have one, or a checkpoint of a run with other settings or data.
            StoreError: another training holds ``folder``, it cannot be written, or its checkpoint is damaged.
        """
        self.config = config = config or TrainConfig()
        if config.num_virtual_tokens is None:
            self.config = replace(config, num_virtual_tokens=max(1, task.num_virtual_tokens))
        self.task, self.name = task, name
        self._world = task.model.world
        if not self._world.writes:  # the first process does, for all
            folder = None
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
        if task.decoder_virtual_tokens != self.config.decoder_virtual_tokens:
            raise ConfigError(
                f"the task has {task.decoder_virtual_tokens} virtual tokens before the decoder's input, but "
                f"{self.config.decoder_virtual_tokens} are to be learned; give Task and TrainConfig the same "
                "decoder_virtual_tokens"
            )
        if self.config.parametrisation == "prefix" and not task.model.trained.why_none:
            self.task = task = replace(task, num_virtual_tokens=task.model.trained.places(found))
        self._base_digest = task.model.digest_before
        self.base_unchanged: bool | None = None
        examples, held_out = split_rows(train, validation, self.config)
        self.notes = dict(notes or {})
        self._data = describe_rows(train, validation, len(examples), len(held_out)) | self.notes
        if task.verbalizer is not None:
            for rows in filter(None, (train, validation)):
                check_targets(rows, task.labels)
        self._order = order or RowOrder.of(examples, labelled=task.verbalizer is not None)
        self._gradients = Gradients(task.model, may_recompute=self.config.activation_checkpointing != "off")
        self._works: dict[tuple[int, int], Work] = {}
        self._prepare(examples)
        if self.config.parametrisation == "prefix":
            require_shared_prefix(task.model, task.template, self._requests)
        self.truncated = sum(request.truncated for request in self._requests)
        self._validator = validator(task, held_out)
        self.watch = Watch(task, examples, held_out)
        self._at_end: tuple[Alarm, ...] | None = None
        checked = [task.label_request(e) if task.words else task.target_request(e) for e in held_out]
        asked = share_beginnings(checked)
        self.schedule = schedule_of(self.config, self._gradients, self._requests, asked, self._order.rows)
        self._given = self.config, self.schedule.total  # before the end was moved
        self._start = start
        self._history = History(self.folder)
        compiled = compilation.wanted(self.config, self._gradients, self._requests, self.total)
        self._state = State.of(Keeper(self.config.patience), self._begin(0), compiled)
        self._hold, self._iterating = Hold(self._run), False
        self._open_folder(resume)

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._state.step

    @property
    def total(self) -> int:
        """Optimizer steps planned."""
        return self.schedule.total

    @property
    def tokens(self) -> int:
        """Tokens computed in these steps."""
        return self._state.tokens

    @property
    def seconds(self) -> float:
        """Wall time of these steps, validations not included."""
        return self._state.seconds

    @property
    def stopped(self) -> str:
        """Why it ended: ``steps``, ``early``, ``interrupted``, ``not finite``; empty while it runs."""
        return self._state.stopped

    @property
    def score(self) -> float:
        """What its best soft prompt is compared by (``keeping.py``): a mean probability of the right label, or minus a
        loss; minus infinity before the first validation."""
        return self._state.keeper.score

    @property
    def validations(self) -> list[dict[str, Any]]:
        """All validations so far, without their rows."""
        return list(self._state.validations)

    @property
    def ended(self) -> bool:
        """Whether no step is left to do."""
        return bool(self.stopped) or self.step >= self.total

    @property
    def compiled(self) -> bool:
        """Whether the decoder layers are compiled while it trains; False, too, where that was seen not to work."""
        return self._state.compiled

    @property
    def graphs(self) -> dict[str, int]:
        """What its steps cost once (``Gradients.costs``)."""
        return self._gradients.costs

    @property
    def micro_batch(self) -> MicroBatch | None:
        """What its passes compute at once, from measured memory; None where that was not measured."""
        return self._gradients.measuring.found

    @property
    def alarms(self) -> tuple[Alarm, ...]:
        """What gives reason to doubt what is learned: before its end, what was to be seen before the first step; at its
        end all that was found, for which the base model answers some validation rows alone."""
        if not self.ended or self.stopped not in ("", "steps", "early"):
            return self.watch.before
        if self._at_end is None:
            start = None if self._start is not None else self._learner(self._state.learner.number).numbers()
            self._at_end = self.watch.at_end(self._state, start, self.config)
        return self._at_end

    @property
    def learned(self) -> dict[str, torch.Tensor]:
        """The tensors that are learned, by name, on the base model's device; their gradients are those of the last
        step, clipped."""
        return self._state.learner.form.tensors

    @property
    def vectors(self) -> torch.Tensor:
        """The soft prompt as it is now, trained or not: float32 ``[P, H]`` or a trained prefix, on the CPU."""
        return self._state.learner.numbers().cpu()

    def _prepare(self, examples: Sequence[Example]) -> None:
        """What each row asks, and its label's number where the loss is over labels."""
        task, self._common = self.task, 0  # tokens that all conversations begin with
        if self.config.loss == "labels":
            if task.verbalizer is None:
                raise ConfigError(
                    "The loss 'labels' needs class labels, but the targets are free text; give --labels or use lm."
                )
            self._objective = Objective(task.label_of_word)
            self._requests = [task.label_request(e) for e in examples]
            self._gold = [task.labels.index(str(e.target)) for e in examples]
        else:
            self._objective = Objective()
            alone = [task.target_request(e) for e in examples]
            self._requests = share_beginnings(alone) if task.model.shares_prefix else alone
            self._common = self._requests[0].shared - alone[0].shared
            self._gold = [0] * len(examples)

    def __iter__(self) -> Iterator[Step]:
        """Trains, one step at a time, until the planned steps are done or there is a reason to stop earlier.

        Raises:
            StoreError: the folder cannot be written; or it was given back when an earlier iteration ended, and another
                training has it now, or has had it since.
        """
        on_cpu = self.task.model.device.type == "cpu"
        with self.running():
            while (begun := self.begin_step()) is not None:
                started = time.perf_counter()
                work = self._laid_out(begun)
                loss_found = self._add(work, begun)
                norm = begun.take_back()
                following = None if on_cpu else self._following(begun)
                if following is not None:
                    self._laid_out(following)  # while the device computes
                loss, norm_found = torch.stack([loss_found, norm]).tolist()
                took = time.perf_counter() - started
                step = self.end_step(begun, loss, norm_found, sum(work.tokens), took, sum(work.saved))
                if step is None:
                    continue
                if self.wants_save(step):
                    self.save()
                yield step

    def _add(self, work: Work, begun: Begun) -> torch.Tensor:
        """Computes a step's gradient and loss; where another process is lost, what was learned before is kept."""
        try:
            return self._gradients.add(work, [begun.numbers] * len(work.whole)).sum()
        except ProcessError:
            self.save()
            raise

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, it may do steps: it holds its folder, and the layers run as its settings want them.

        Raises:
            StoreError: see ``__iter__``.
        """
        lm = self.task.model
        self._hold.take()
        try:
            self._iterating = True
            again = self.config.activation_checkpointing == "on" or self._gradients.measuring.recomputes
            lm.layers.set(compiled=self._state.compiled, recomputed=again)
            yield
        finally:
            lm.layers.set(compiled=False, recomputed=False)
            self._iterating = False
            self._hold.give_back()

    def begin_step(self) -> Begun | None:
        """The next step before its gradient; None when there is none, with the reason in ``stopped``."""
        state = self._state
        if not state.stopped and state.step >= self.total:  # in a checkpoint of an earlier release
            state.stopped = "steps"
        if state.stopped:
            return None
        learner = state.learner
        folded = learner.form.fold()
        numbers = (folded.detach() * learner.form.unit).requires_grad_()
        return Begun(learner, self.schedule.place(state.step), folded, numbers)

    def shares(self, begun: Begun) -> list[Share]:
        """The rows that a step learns from: one share of them for each text around the soft prompt, of which there are
        several where tasks are mixed. The sum of their losses is the mean loss of all rows."""
        seed = self.config.seed + self.config.start(begun.learner.number)[1]
        chosen = self._order.batch(seed, begun.place, self.config.batch_size)
        requests, gold = [self._requests[i] for i in chosen], [self._gold[i] for i in chosen]
        whole = Share(self._objective, requests, gold, tuple(begun.numbers.shape))
        alike: dict[tuple[Tokens, bool], list[int]] = {}
        for place, request in enumerate(requests):
            alike.setdefault((request.ids[: request.shared], request.shares_prefix), []).append(place)
        return [whole] if len(alike) == 1 else [whole.part(rows) for rows in alike.values()]

    def _following(self, begun: Begun) -> Begun | None:
        """The step behind one, if it goes on with the same start."""
        after = self._state.step + 1
        if after >= self.total or self.schedule.ends_start(after):
            return None
        return replace(begun, place=self.schedule.place(after))

    def _laid_out(self, begun: Begun) -> Work:
        """What a step computes; of the latest two it is kept."""
        key = (begun.learner.number, begun.place)
        if key not in self._works:
            self._works = dict([*self._works.items()][-1:])
            self._works[key] = self._gradients.prepare(self.shares(begun))
        return self._works[key]

    def end_step(
        self, begun: Begun, loss: float, norm: float, tokens: int, seconds: float, saved: int = 0
    ) -> Step | None:
        """What follows on a step's gradient: the optimizer, a validation when it is due, and a line in the log.

        Args:
            begun: the step; its gradient was taken back to what is learned.
            loss, norm: of the step.
            tokens, seconds: that it took.
            saved: tokens that were not computed since the answers of a conversation share what they begin with.

        Returns:
            What was done; None if loss or norm are not finite: nothing is learned then, and the run goes on with
            another start or has ended.
        """
        began = time.perf_counter()
        state = self._state
        state.rounds += 1
        state.compiled = self.task.model.layers.compiled  # it may have turned out that they cannot be
        if not (math.isfinite(loss) and math.isfinite(norm)):
            if not self._give_up_start():
                state.stopped = "not finite"
            return None
        lr = learning_rate(self.config, begun.place, self.schedule.planned)
        state.good = begun.numbers.detach()  # its loss is finite; what the step makes of it, may not have one
        state.learner.descend(lr, self.config.clip, min(self.config.average, (2 + begun.place) / (11 + begun.place)))
        seconds += time.perf_counter() - began
        saved += (self.config.batch_size - 1) * self._common
        state.step += 1
        state.seconds += seconds
        state.tokens += tokens
        step = Step(state.step, self.total, loss, lr, norm, tokens, seconds, saved=saved)
        tried = self.schedule.ends_start(state.step)
        if (begun.place + 1) % self.schedule.every == 0 or state.step == self.total or tried:
            step = self._validate(step)
        step = self.watch.saw(step, state, self.config)
        if tried:
            self._compare_starts(step.validation)
        if state.step >= self.total:
            state.stopped = "steps"
        self._log(step)
        return step

    def wants_save(self, step: Step) -> bool:
        """Whether a checkpoint is due after a step."""
        return step.number % self.config.checkpoint_every == 0 or step.validation is not None

    def _validate(self, step: Step) -> Step:
        """Scores the current soft prompt, or its average, on the validation rows and keeps it if it is the best."""
        state, learner = self._state, self._state.learner
        current = learner.numbers() if learner.average is None else learner.average.clone()
        found = {"step": state.step, "start": learner.number, **self._validator(current)}
        improved = state.keeper.add(found)
        if improved:
            state.best = current
        state.validated(found)
        self._history.add(learner.number, state.step, current)
        if state.keeper.over and self.schedule.probing < state.step < self.total:  # a start that is tried goes on
            state.stopped = "early"
        return replace(step, validation=found, improved=improved)

    def end_after(self, steps: int) -> None:
        """Moves the end of a run of one start to ``steps`` steps in all, and the schedule of its learning rate with it.
        At least one more step is done, so that the last one is validated. A run that is resumed begins with the end
        that its settings had at first."""
        assert self.config.tries == 1
        self._plan(max(steps, self.step + 1))

    def _plan(self, steps: int) -> None:
        old, self._state.planned = self.schedule, steps
        self.schedule = Schedule(steps, old.every, old.rows, old.tokens)
        self.config = replace(self.config, steps=steps, epochs=None)

    # --- several starts ---------------------------------------------------------------------------

    def _begin(self, number: int) -> Learner:
        """The start of that number, before its first step."""
        learner = self._learner(number)
        self._history.add(number, number * self.schedule.probe, learner.numbers())
        return learner

    def _learner(self, number: int) -> Learner:
        first = self._requests[0].ids
        before = first[: first.index(SOFT)]
        form = parametrise(
            self.task.model,
            self.config.parametrisation,
            first_numbers(self.task, self.config, number, self._start, before),
            seed=self.config.seed + number,
            scale=init_scale(self.task.model, self.config),
            before=before,
        )
        learner = Learner(number, form, make_optimizer(self.config, *form.tensors.values()), None)
        learner.average = learner.numbers() if self.config.average else None
        return learner

    def _compare_starts(self, found: dict[str, Any] | None) -> None:
        """After a start's last step, whose validation is ``found``: keeps it if it is the best so far; begins the
        next, or goes on with the best. None: it has none, and is not kept."""
        state = self._state
        tried, leader = state.learner, state.leader
        tried.found = found
        if found and math.isfinite(found["loss"]) and (leader is None or better(found, leader.found or {})):
            leader = tried
        if state.step < self.schedule.probing:
            state.learner, state.leader = self._begin(tried.number + 1), leader
        else:
            state.learner, state.leader = leader or tried, None
        state.keeper.begin()

    def _give_up_start(self) -> bool:
        """Skips what is left of a start whose loss is not finite; False if there is no other to go on with."""
        state, schedule = self._state, self.schedule
        following = state.learner.number + 1
        if state.step >= schedule.probing or (following == self.config.tries and state.leader is None):
            return False
        state.step = following * schedule.probe
        self._compare_starts(None)
        return True

    def result(self) -> SoftPrompt:
        """The best soft prompt so far; before any validation, the last one whose loss was finite.

        Raises:
            TrainingError: no step was done yet, the loss of the very first was not finite, or a weight of the base
                model changed, which must never happen.
        """
        lm, state = self.task.model, self._state
        best = state.keeper.best
        if not state.tokens:
            raise TrainingError(
                "The loss is not finite at the very first step, so nothing was learned; try --dtype fp32."
                if state.stopped == "not finite"
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
        given = self._start is not None and self.config.init in INITS
        return self.task.soft_prompt(
            (state.good if best is None else state.best).cpu(),
            name=self.name,
            parametrisation=self.config.parametrisation,
            training={
                **self.config.as_dict(),
                "init_scale": init_scale(lm, self.config),
                "init": "given" if given else self.config.init,
                **state.summary(),
                "dtype": str(lm.dtype).removeprefix("torch."),
                "device": lm.device.type,
                "alarms": [alarm.kind for alarm in self.alarms],
            },
            data=self._data,
            metrics=() if best is None else [{"split": "validation", **metric} for metric in best["metrics"]],
        )

    # --- what survives a kill ---------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        return checkpoint.identity(self.task, *self._given, self._start, self._data)

    def _open_folder(self, resume: bool) -> None:
        found = self._world.from_first(lambda: self._opened(resume))
        if found is None:
            return
        try:
            self._go_on(found)
        except BaseException:
            self._hold.give_back()
            raise

    def _opened(self, resume: bool) -> checkpoint.Loaded | None:
        """Takes the folder; the checkpoint that is gone on from, if there is one."""
        if (run := self._run) is None:
            return None
        self._hold.take()
        try:
            checkpoint.tidy(run.path)
            found = self._checkpoint() if resume and run.stopped else None
            if found is None:
                run.clear()
            return found
        except BaseException as error:
            self._hold.give_back()
            if isinstance(error, OSError):
                raise run.unwritable(error) from error
            raise

    def save(self, *, keep_earlier: bool = False) -> None:
        """Writes a checkpoint, if there is a folder.

        Args:
            keep_earlier: keep the one before it, too, which ``go_back_to`` needs.

        Raises:
            StoreError: the folder cannot be written.
        """
        if self.folder is not None:
            self._state.save(self.folder, self._identity(), keep_earlier=keep_earlier)

    @property
    def rounds(self) -> int:
        """How many steps were computed, those included that were not finite."""
        return self._state.rounds

    def go_back_to(self, rounds: int) -> None:
        """Becomes the checkpoint before the latest one, which was written after so many ``rounds``.

        Raises:
            StoreError: there is none, or it was written at another time.
        """
        self._go_on(self._world.from_first(lambda: self._checkpoint(earlier=True)))
        if self.rounds != rounds:
            raise StoreError(
                f"the earlier checkpoint in {self.folder} was written after {self.rounds} steps, and {rounds} are "
                f"needed; {checkpoint.ANEW}"
            )

    def _checkpoint(self, *, earlier: bool = False) -> checkpoint.Loaded:
        """A checkpoint of this run in the folder, the latest or the one before it."""
        assert self.folder is not None
        found = checkpoint.load(self.folder, earlier=earlier)
        checkpoint.require_same(self.folder, self._identity(), found[2]["identity"])
        return found

    def _go_on(self, found: checkpoint.Loaded) -> None:
        """Becomes what a checkpoint holds."""
        state = self._state
        state.take_up(found, self._begin)
        if state.planned:
            self._plan(state.planned)
        if self.folder is None:
            return
        self._history.resume(state.step)
        best = state.keeper.best
        if best is not None:  # it may have been thinned out since
            self._history.add(best["start"], best["step"], state.best)
        self._history.write(state.validations, best)
        checkpoint.trim_log(self.folder / checkpoint.LOG, state.step)

    def _log(self, step: Step) -> None:
        if self._run is None:
            return
        try:
            self._run.log(step.as_dict() | self._gradients.measuring.news())
            if step.validation is not None:
                self._history.write(self._state.validations, self._state.keeper.best)
        except OSError as error:
            raise self._run.unwritable(error) from error
