"""Ways by the library PEFT: LoRA, trained as ``fine_tuning.py`` trains all weights, and PEFT's own prompt tuning."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from softprompt.data.example import Example
from softprompt.errors import ConfigError, missing_library
from softprompt.evaluation.validation import validator
from softprompt.methods.fine_tuning import learn
from softprompt.methods.problem import Learned, Problem
from softprompt.model.experts import WITHIN, holds_coded_experts
from softprompt.model.frozen import FrozenLM
from softprompt.model.notes import heard, hide_noise
from softprompt.model.request import Request
from softprompt.tasks.predict import Prediction, Progress, Query, predict
from softprompt.tasks.task import Task
from softprompt.text.tokens import SOFT, Tokens
from softprompt.tuning.alarms import BASE_ROWS, OURS, Watch
from softprompt.tuning.config import TrainConfig, most_steps
from softprompt.tuning.keeping import Keeper
from softprompt.tuning.optimizer import learning_rate
from softprompt.tuning.rows import RowOrder
from softprompt.tuning.step import Alarm
from softprompt.tuning.trend import Trend

LORA_RATES = (3e-4, 1e-3, 3e-3)
"""Peak learning rates that are tried, see ``fine_tuning.FULL_RATES``."""
LORA_RANK, LORA_ALPHA = 16, 32
PEFT_LR = 3e-2
"""Of ``examples/causal_language_modeling/peft_prompt_tuning_clm.ipynb`` in PEFT's repository."""


def lora(problem: Problem) -> Learned:
    """Low-rank adapters of every linear layer, but the head (Hu et al. 2022), through ``peft``.

    They are float32, as is PEFT's default, and stay beside the weights (they are not merged).

    Raises:
        ConfigError: ``peft`` is not installed.
    """
    peft = _import_peft("LoRA")
    lm = problem.fresh()
    config = peft.LoraConfig(
        task_type=_task_type(lm),
        r=LORA_RANK,
        lora_alpha=LORA_ALPHA,
        lora_dropout=0.0,
        target_modules="all-linear",
        exclude_modules=WITHIN if holds_coded_experts(lm.model) else None,
    )
    with _seeded(problem.seed):
        peft.get_peft_model(lm.model, config)  # puts the adapters into the model itself
    lm.model.eval()
    return learn(problem, lm, [weight for weight in lm.model.parameters() if weight.requires_grad], LORA_RATES)


class PeftTask(Task):
    """A task whose soft prompt stands where PEFT puts it: before everything else, the beginning-of-sequence token
    included."""

    def _request(self, *arguments: Any) -> Request:
        request = super()._request(*arguments)
        rest = tuple(token for token in request.ids if token != SOFT)
        moved_in = SOFT not in request.ids[: request.shared]
        return replace(request, ids=(SOFT, *rest), shared=request.shared + moved_in)


def peft_prompt_tuning(problem: Problem) -> Learned:
    """PEFT's prompt tuning as its example for causal language models does it.

    As many virtual tokens as a soft prompt has by default, PEFT's default initialisation (normal, deviation 1),
    cross-entropy of the target tokens by transformers' own forward, AdamW with a rate that falls linearly from
    ``PEFT_LR``, no validation: the last vectors are taken. As many steps as a soft prompt has in ``compare``, or as
    fit into the budget. The vectors are then used by our own engine, which gives PEFT's logits.

    Raises:
        ConfigError: ``peft`` is not installed.
    """
    peft = _import_peft("PEFT's prompt tuning")
    if problem.lm.reads_parts:
        raise ConfigError(
            f"PEFT hands the base model embeddings alone, and the layers of {problem.lm.name} get more of each token; "
            "leave peft-prompt-tuning out of --methods."
        )
    lm = problem.fresh()
    lm.model.set_attn_implementation("sdpa")  # what transformers gives a user
    config = TrainConfig(lr=PEFT_LR, warmup=0.0, schedule="linear", clip=0.0, seed=problem.seed)
    task = PeftTask(problem.lm, problem.template, problem.verbalizer, problem.num_virtual_tokens, problem.lm.window)
    requests = [task.target_request(example) for example in problem.train.examples]
    with _seeded(problem.seed):
        settings = peft.PromptTuningConfig(
            task_type=_task_type(lm),
            num_virtual_tokens=problem.num_virtual_tokens,
            num_transformer_submodules=1,  # of an encoder–decoder, PEFT reads no more of them
        )
        model = peft.get_peft_model(lm.model, settings).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=PEFT_LR)
    order = RowOrder([None] * len(requests))  # plainly random, as in its example
    step, pace, most = 0, 0.0, most_steps(len(requests), config.batch_size)
    total, trend = most, Trend()
    while step < max(1, total):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, total)
        chosen = order.batch(config.seed, step, config.batch_size)
        loss = peft_loss(model, [requests[i] for i in chosen], lm.decoder_start)
        if not math.isfinite(float(loss.detach())):
            break
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        trend.add(float(loss.detach()), _norm(model), config.clip, most)
        optimizer.step()
        step += 1
        took = time.perf_counter() - began
        pace = took if step == 1 else pace + 0.1 * (took - pace)
        total = min(most, step + int(problem.seconds_left / pace))
        if step % 10 == 0:
            problem.notice(f"step {step:,} of {total:,}, loss {float(loss.detach()):.3f}")
    vectors = model.get_prompt_embedding_to_save("default").float()
    kept = problem.lm.kept_prefixes(1)

    def answer(examples: Sequence[Example], progress: Progress | None) -> list[Prediction]:
        return predict([Query(task, example, vectors) for example in examples], progress=progress, prefix_of=kept)

    return Learned(
        answer,
        vectors.numel(),
        vectors.nbytes,
        chosen={"steps": step},
        alarms=_alarms(problem, task, vectors, trend, config),
    )


def _norm(model: Any) -> float:
    """The norm of the gradient of all that is trained."""
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def _alarms(
    problem: Problem, task: Task, vectors: torch.Tensor, trend: Trend, config: TrainConfig
) -> tuple[Alarm, ...]:
    """What gives reason to doubt the vectors; PEFT's example looks at no validation rows, so some are looked at now."""
    rows, keeper = problem.validation.examples[:BASE_ROWS], Keeper(0)
    keeper.add(validator(task, rows)(vectors))
    watch = Watch(task, problem.train.examples, rows)
    return watch.at_end_of(keeper, trend, config, vectors.numel(), OURS)


def peft_loss(model: Any, requests: Sequence[Request], decoder_start: Tokens = ()) -> torch.Tensor:
    """Mean loss of the target tokens by PEFT's forward, a scalar: padded rows, labels of -100 before the target."""
    if decoder_start:
        return _decoder_loss(model, requests, decoder_start)
    heads = [[token for token in request.ids if token != SOFT] for request in requests]
    rows = [head + list(request.words[0]) for head, request in zip(heads, requests, strict=True)]
    shape = (len(rows), max(map(len, rows)))
    ids, mask = (torch.zeros(shape, dtype=torch.long, device=model.device) for _ in range(2))
    labels = torch.full(shape, -100, device=model.device)
    for i, (head, row) in enumerate(zip(heads, rows, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
        labels[i, len(head) : len(row)] = ids[i, len(head) : len(row)]
    loss: torch.Tensor = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    return loss


def _decoder_loss(model: Any, requests: Sequence[Request], start: Tokens) -> torch.Tensor:
    """The same of an encoder–decoder, whose targets are no part of the input."""
    inputs = [[token for token in request.ids if token != SOFT] for request in requests]
    decoded = [[*start, *request.words[0][:-1]] for request in requests]
    labels = [[-100] * (len(start) - 1) + list(request.words[0]) for request in requests]

    def beside(rows: Sequence[Sequence[int]], padding: int) -> torch.Tensor:
        longest = max(map(len, rows))
        return torch.tensor([[*row, *[padding] * (longest - len(row))] for row in rows], device=model.device)

    loss: torch.Tensor = model(
        input_ids=beside(inputs, 0),
        attention_mask=beside([[1] * len(row) for row in inputs], 0),
        decoder_input_ids=beside(decoded, 0),
        decoder_attention_mask=beside([[1] * len(row) for row in decoded], 0),
        labels=beside(labels, -100),
    ).loss
    return loss


def _task_type(lm: FrozenLM) -> str:
    """What PEFT calls such a base model."""
    return "SEQ_2_SEQ_LM" if lm.encoder_decoder else "CAUSAL_LM"


def _import_peft(purpose: str) -> Any:
    try:
        import peft
    except ImportError as error:
        raise missing_library(purpose, "peft", "softprompt[compare]") from error
    return peft


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """PEFT draws from torch's global generator, and warns of what it sets right by itself."""
    with torch.random.fork_rng(), warnings.catch_warnings(), heard():
        hide_noise()
        torch.manual_seed(seed)
        yield
