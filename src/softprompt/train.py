"""Tuning a soft prompt on a frozen base model: the loop, its checkpoints, and what it hands back."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from softprompt import checkpoint
from softprompt.attention import PrefixKV
from softprompt.batch import Row, collate, micro_batches
from softprompt.config import DEFAULT_STEPS, TrainConfig
from softprompt.data import Dataset, Example, check_targets
from softprompt.errors import ConfigError, DataError, StoreError
from softprompt.frozen import MAX_TOKENS, FrozenLM, Request
from softprompt.prompt import SoftPrompt, initial_vectors, library_versions
from softprompt.task import Task

COMPILE_PAYS_FROM = 1e14
"""Floating-point operations of a run from which compiling is faster: it costs 15 to 25 s and saves about a third of
a step."""


@dataclass(frozen=True)
class Step:
    """What one optimizer step did.

    Attributes:
        number: 1 for the first.
        total: how many are planned.
        loss: mean loss of the step's batch, in nats (a target token for ``lm``, an example for ``labels``).
        lr: learning rate in embedding RMS.
        grad_norm: the gradient's norm before clipping, in loss per embedding RMS.
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


@dataclass(frozen=True)
class Objective:
    """The loss of examples as requests, and how to get its gradient by the path that serves them.

    Attributes:
        lm: the frozen base model.
        labels: for the loss over labels, label index of each word; None for the loss of all target tokens.
        max_tokens: the most tokens, padding included, in one micro-batch.
    """

    lm: FrozenLM
    labels: torch.Tensor | None = None
    max_tokens: int = MAX_TOKENS

    def loss(self, scores: torch.Tensor, gold: Sequence[int]) -> torch.Tensor:
        """Sum over rows of the negative log-probability of the gold word or label.

        Args:
            scores: float32 ``[B, W]``, log-probabilities of words.
            gold: ``B`` indices, of a word or, for the loss over labels, of a label.
        """
        if self.labels is not None:
            scores = torch.stack(
                [scores[:, self.labels == k].logsumexp(1) for k in range(int(self.labels.max()) + 1)], dim=1
            )
            scores = scores.log_softmax(dim=1)
        return -scores.gather(1, torch.tensor(gold, device=scores.device)[:, None]).sum()

    def weight(self, requests: Sequence[Request]) -> int:
        """By what the summed loss is divided: target tokens, or examples for the loss over labels."""
        return len(requests) if self.labels is not None else sum(len(r.words[0]) for r in requests)

    def backward(self, requests: Sequence[Request], gold: Sequence[int], vectors: torch.Tensor) -> tuple[float, int]:
        """Adds the gradient of the mean loss to ``vectors.grad``; returns the mean loss and the tokens computed.

        With a shared prefix it goes in two stages. The prefix runs once; micro-batches of rows send their gradients
        into its detached keys and values, where they add up in fp32. One backward pass then carries the sum to
        ``vectors``.

        Args:
            requests: a whole batch, all with the same shared prefix.
            gold: as for ``loss``.
            vectors: float32 ``[P, H]``, requires grad.
        """
        weight = self.weight(requests)
        if not (self.lm.shares_prefix and all(r.shares_prefix for r in requests)):
            return self._backward_concatenated(requests, gold, vectors, weight)
        first = requests[0]
        prefix = self.lm.prefix_kv(first.ids[: first.shared], vectors)
        graph = (*prefix.keys, *prefix.values)
        leaves = [tensor.detach().float().requires_grad_() for tensor in graph]
        rows = [Row(r.ids[r.shared :], r.words) for r in requests]
        total = 0.0
        for group in micro_batches([row.length for row in rows], self.max_tokens):
            parts = [leaf.to(self.lm.dtype) for leaf in leaves]
            half = len(parts) // 2
            shared = PrefixKV(tuple(parts[:half]), tuple(parts[half:]), prefix.lengths)
            batch = collate([rows[i] for i in group], prefix.lengths, self.lm.device)
            loss = self.loss(self.lm.score_batch(batch, shared), [gold[i] for i in group]) / weight
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        gradients = [leaf.grad.to(tensor.dtype) for leaf, tensor in zip(leaves, graph, strict=True)]  # type: ignore[union-attr]
        torch.autograd.backward(graph, gradients)
        return total, prefix.lengths[0] + sum(row.length for row in rows)

    def _backward_concatenated(
        self, requests: Sequence[Request], gold: Sequence[int], vectors: torch.Tensor, weight: int
    ) -> tuple[float, int]:
        total, width = 0.0, vectors.shape[0]
        lengths = [sum(len(r.ids) - 1 + width + len(word) for word in r.words) for r in requests]
        for group in micro_batches(lengths, self.max_tokens):
            scores = self.lm.score_concatenated([requests[i] for i in group], [vectors])
            loss = self.loss(scores, [gold[i] for i in group]) / weight
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total, sum(lengths)


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """Learning rate of step ``step`` (from 0) of ``total``, in embedding RMS: linear warm-up, then the schedule."""
    warm = math.ceil(config.warmup * total)
    if step < warm:
        return config.lr * (step + 1) / warm
    left = 1 - (step - warm) / max(1, total - warm)
    shape = {"linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left), "constant": 1.0}[config.schedule]
    return config.lr * shape


def make_optimizer(config: TrainConfig, vectors: torch.Tensor) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019), or Adafactor (Shazeer and Stern 2018) without parameter scaling as in
    Lester et al. 2021."""
    if config.optimizer == "adamw":
        return torch.optim.AdamW([vectors], lr=config.lr, weight_decay=config.weight_decay)
    from transformers import optimization

    adafactor: Any = optimization.Adafactor
    return adafactor(  # type: ignore[no-any-return]
        [vectors],
        lr=config.lr,
        decay_rate=-0.8,
        weight_decay=config.weight_decay,
        scale_parameter=False,
        relative_step=False,
        warmup_init=False,
    )


class Training:
    """One run of tuning. Iterate over it to train, then ask for ``result()``; that works after an interruption too.

    The learned numbers are kept in units of the embedding table's RMS, so that learning rate, clipping and Adam's
    epsilon mean the same for every base model.

    Attributes:
        config: its settings.
        task: template and verbalizer, bound to the base model.
        step: optimizer steps done.
        total: optimizer steps planned.
        stopped: why it ended: ``steps``, ``early``, ``interrupted``, ``not finite``; empty while it runs.
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
        folder: Path | None = None,
        resume: bool = False,
    ) -> None:
        """Prepares a run.

        Args:
            task: what to learn; its number of virtual tokens is ``config``'s.
            train: at least one example with a target.
            validation: for choosing the best checkpoint; None holds a tenth of ``train`` back (at most
                ``config.validation_rows``).
            config: defaults if None.
            name: name of the soft prompt.
            start: float ``[P, H]`` to start from instead of ``config.init``.
            folder: where checkpoints and ``log.jsonl`` are kept; None keeps none.
            resume: go on from the checkpoint in ``folder``, if there is one.

        Raises:
            DataError: too few rows.
            ConfigError: an initialisation that does not fit, or a checkpoint of a run with other settings or data.
            StoreError: ``folder`` cannot be written.
        """
        self.config = config or TrainConfig()
        self.task, self.name, self.folder = task, name, folder
        found = task.num_virtual_tokens if task.template.has_soft_prompt else 0
        if found != self.config.num_virtual_tokens:
            raise ConfigError(
                f"the task's template holds {found} virtual tokens, but {self.config.num_virtual_tokens} are to be "
                "learned; give Task and TrainConfig the same num_virtual_tokens, and the template a {soft_prompt}"
            )
        self._base_digest = task.lm.weights_digest()
        examples, held_out = _split(train, validation, self.config)
        self._data = _describe(train, validation, len(examples), len(held_out))
        if task.verbalizer is not None:
            check_targets(train, task.labels)
        if task.picks_loss(self.config.loss) == "labels":
            self._objective = Objective(task.lm, torch.tensor(task.label_of_word, device=task.lm.device))
            self._requests = [task.label_request(e) for e in examples]
            self._gold = [task.labels.index(str(e.target)) for e in examples]
        else:
            self._objective = Objective(task.lm)
            self._requests = [task.target_request(e) for e in examples]
            self._gold = [0] * len(examples)
        self.truncated = sum(request.truncated for request in self._requests)
        self._validator = task.validator(held_out)
        self._best: dict[str, Any] | None = None
        self._validations: list[dict[str, Any]] = []
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.stopped: str = ""
        self.total = self._planned_steps()
        self.compiled = self._should_compile()

        self._unit = task.lm.embedding_rms
        self._vectors = (self._initial(start) / self._unit).requires_grad_()
        self._good = self._vectors.detach().clone()
        self._best_vectors = self._good.clone()
        self._optimizer = make_optimizer(self.config, self._vectors)
        self._open_folder(resume)

    def __iter__(self) -> Iterator[Step]:
        """Trains, one step at a time, until the planned steps are done or there is a reason to stop earlier."""
        lm = self.task.lm
        if self.compiled:
            lm.compile_layers()
        try:
            while not self.stopped:
                if self.step >= self.total:
                    self.stopped = "steps"
                    break
                step = self._advance()
                if not math.isfinite(step.loss) or not math.isfinite(step.grad_norm):
                    self.stopped = "not finite"
                    break
                self._log(step)
                if self.step % self.config.checkpoint_every == 0 or step.validation is not None:
                    self._save()
                yield step
        finally:
            lm.uncompile_layers()

    def _advance(self) -> Step:
        """One optimizer step, with a validation when it is due."""
        began = time.perf_counter()
        chosen = self._batch(self.step)
        requests = [self._requests[i] for i in chosen]
        scaled = (self._vectors.detach() * self._unit).requires_grad_()
        loss, tokens = self._objective.backward(requests, [self._gold[i] for i in chosen], scaled)
        assert scaled.grad is not None
        self._vectors.grad = scaled.grad * self._unit
        norm = float(self._vectors.grad.norm())
        lr = learning_rate(self.config, self.step, self.total)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return Step(self.step + 1, self.total, loss, lr, norm, tokens, time.perf_counter() - began)
        if self.config.clip:
            torch.nn.utils.clip_grad_norm_([self._vectors], self.config.clip)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._good = self._vectors.detach().clone()  # its loss is finite; what the step makes of it, may not have one
        self._optimizer.step()
        self.step += 1
        seconds = time.perf_counter() - began
        self.seconds += seconds
        self.tokens += tokens
        step = Step(self.step, self.total, loss, lr, norm, tokens, seconds)
        if self.step % self.config.eval_every == 0 or self.step == self.total:
            step = self._validate(step)
        return step

    def _validate(self, step: Step) -> Step:
        """Scores the current vectors on the validation rows and keeps them if they are the best so far."""
        current = self._vectors.detach().clone()
        found = {"step": self.step, **self._validator(current * self._unit)}
        improved = math.isfinite(found["loss"]) and (self._best is None or _better(found, self._best))
        if improved:
            self._best, self._best_vectors = found, current
        self._validations.append(found)
        best_step = 0 if self._best is None else self._best["step"]
        waited = sum(past["step"] > best_step for past in self._validations)
        if self.config.patience and waited >= self.config.patience and self.step < self.total:
            self.stopped = "early"
        return replace(step, validation=found, improved=improved)

    def result(self) -> SoftPrompt:
        """The best soft prompt so far; before any validation, the last one whose loss was finite.

        Raises:
            AssertionError: a weight of the base model changed, which must never happen.
        """
        lm, best = self.task.lm, self._best
        assert lm.weights_digest() == self._base_digest, "a weight of the frozen base model changed"
        metrics = []
        if best is not None:
            metrics = [{"split": "validation", **metric} for metric in best["metrics"]]
        return SoftPrompt(
            vectors=((self._best_vectors if best is not None else self._good) * self._unit).cpu(),
            name=self.name,
            base=lm.name,
            base_fingerprint=lm.fingerprint,
            tokenizer_fingerprint=lm.tokenizer_fingerprint,
            template=self.task.template.text,
            verbalizer=None if self.task.verbalizer is None else dict(self.task.verbalizer.words),
            training={
                **self.config.as_dict(),
                "loss": "lm" if self._objective.labels is None else "labels",
                "steps_done": self.step,
                "best_step": self.step if best is None else best["step"],
                "stopped": self.stopped or "interrupted",
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
        )

    # --- preparation ------------------------------------------------------------------------------

    def _planned_steps(self) -> int:
        config = self.config
        if config.epochs is not None:
            return max(1, math.ceil(config.epochs * len(self._requests) / config.batch_size))
        return config.steps or DEFAULT_STEPS

    def _should_compile(self) -> bool:
        """Decided from the run's size alone, so that a resumed run decides alike."""
        lm = self.task.lm
        if not lm.shares_prefix or self.config.compile == "off":
            return False
        if self.config.compile == "on":
            return True
        compiler = any(shutil.which(name) for name in ("g++", "c++", "clang++"))
        tokens = (
            sum(Row(r.ids[r.shared :], r.words).length for r in self._requests)
            / len(self._requests)
            * self.config.batch_size
        )
        body = lm.num_parameters - lm.embedding.numel()
        operations = 4 * body * (tokens + self.config.num_virtual_tokens) * self.total  # forward and input gradient
        return compiler and lm.device.type == "cpu" and operations >= COMPILE_PAYS_FROM

    def _initial(self, start: torch.Tensor | None) -> torch.Tensor:
        lm, config = self.task.lm, self.config
        if start is not None:
            expected = (config.num_virtual_tokens, lm.hidden_size)
            if tuple(start.shape) != expected:
                raise ConfigError(
                    f"the soft prompt to start from has shape {list(start.shape)}, but {list(expected)} is needed; "
                    "set num_virtual_tokens to its length and use it with a base model of its width"
                )
            return start.detach().float().cpu().clone().to(lm.device)
        words, init, text = self.task.label_words(), config.init, config.init_text
        if init == "auto" and text is None and words:
            options = f"Options: {', '.join(self.task.labels)}.\n"
            if len(lm.tokenizer(options, add_special_tokens=False).input_ids) <= config.num_virtual_tokens:
                text = options
        if init == "auto":
            init = "text" if text else "labels" if words else "vocab"
        vectors = initial_vectors(
            lm, config.num_virtual_tokens, init=init, seed=config.seed, text=text, label_words=words
        )
        return vectors.to(lm.device)

    def _batch(self, step: int) -> list[int]:
        """Indices of the examples of step ``step``, from the seed alone: consecutive parts of each epoch's
        permutation."""
        count, size = len(self._requests), self.config.batch_size
        chosen: list[int] = []
        while len(chosen) < size:
            epoch, offset = divmod(step * size + len(chosen), count)
            generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
            order = torch.randperm(count, generator=generator).tolist()
            chosen += order[offset : offset + size - len(chosen)]
        return chosen

    # --- what survives a kill ---------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with to be gone on with."""
        settings = self.config.as_dict()
        labels = [self.task.labels, self.task.words, self.task.label_of_word]
        content = [self.task.template.text, labels, self.task.lm.fingerprint, str(self.task.lm.dtype)]
        return {
            **settings,
            "total": self.total,
            "task": hashlib.sha256(json.dumps(content).encode()).hexdigest(),
            "data": self._data,
        }

    def _open_folder(self, resume: bool) -> None:
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if resume and (self.folder / checkpoint.FILE).exists():
                self._load()
            else:
                for name in (checkpoint.FILE, checkpoint.LOG):
                    (self.folder / name).unlink(missing_ok=True)
                (self.folder / checkpoint.LOG).touch()
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> StoreError:
        return StoreError(
            f"the training's folder {self.folder} cannot be written: {error.strerror or error}; "
            "free some space there, or set SOFTPROMPT_HOME to a folder that can"
        )

    def _save(self) -> None:
        if self.folder is None:
            return
        tensors = {"vectors": self._vectors.detach(), "good": self._good, "best": self._best_vectors}
        checkpoint.save(
            self.folder,
            tensors,
            self._optimizer,
            {
                "identity": self._identity(),
                "step": self.step,
                "seconds": self.seconds,
                "tokens": self.tokens,
                "best": self._best,
                "validations": self._validations,
                "stopped": self.stopped,
                "compiled": self.compiled,
            },
        )

    def _load(self) -> None:
        assert self.folder is not None
        tensors, state = checkpoint.load(self.folder, self._optimizer)
        ours = self._identity()
        differing = [key for key in ours if state["identity"].get(key) != ours[key]]
        if differing:
            raise ConfigError(
                f"the checkpoint in {self.folder} is of a run with other {', '.join(differing)}; "
                "resume with the same settings and data, or start anew without --resume"
            )
        with torch.no_grad():
            self._vectors.copy_(tensors["vectors"])
        self._good = tensors["good"].to(self._vectors.device)
        self._best_vectors = tensors["best"].to(self._vectors.device)
        self.step, self.seconds, self.tokens = state["step"], state["seconds"], state["tokens"]
        self._best, self._validations = state["best"], state["validations"]
        self.stopped, self.compiled = state["stopped"], state["compiled"]
        checkpoint.trim_log(self.folder / checkpoint.LOG, self.step)

    def _log(self, step: Step) -> None:
        if self.folder is None:
            return
        line = {key: value for key, value in step.__dict__.items() if value is not None}
        try:
            with open(self.folder / checkpoint.LOG, "a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
        except OSError as error:
            raise self._unwritable(error) from error


def _split(
    train: Dataset, validation: Dataset | None, config: TrainConfig
) -> tuple[Sequence[Example], Sequence[Example]]:
    """Training and validation examples; without validation data, a seeded tenth of the training data is held back."""
    generator = torch.Generator().manual_seed(config.seed)
    pool = train.examples if validation is None else validation.examples
    order = torch.randperm(len(pool), generator=generator).tolist()
    if validation is not None:
        return train.examples, [pool[i] for i in sorted(order[: config.validation_rows])]
    if len(pool) < 2:
        raise DataError(
            f"{train.source} has {len(pool)} row, but training needs at least 2 when no validation data is given; "
            "add rows or give --validation"
        )
    held = set(order[: min(config.validation_rows, max(1, len(pool) // 10))])
    return [e for i, e in enumerate(pool) if i not in held], [pool[i] for i in sorted(held)]


def _describe(train: Dataset, validation: Dataset | None, rows: int, held_out: int) -> dict[str, Any]:
    return {
        "train": {"source": train.source, "fingerprint": train.fingerprint, "rows": rows},
        "validation": {
            "source": f"held out of {train.source}" if validation is None else validation.source,
            "fingerprint": (validation or train).fingerprint,
            "rows": held_out,
        },
    }


def _better(found: Mapping[str, Any], best: Mapping[str, Any]) -> bool:
    """A higher value, or the same value at a lower loss."""
    return (found["value"], -found["loss"]) > (best["value"], -best["loss"])
