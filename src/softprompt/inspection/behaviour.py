"""What a soft prompt does: the same texts with and without it, and how much attention it is paid."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from softprompt.data.example import Dataset, Example
from softprompt.errors import ConfigError
from softprompt.evaluation import metrics
from softprompt.evaluation.metrics import Metric
from softprompt.inspection.ablation import Difference, difference
from softprompt.inspection.statistics import plain
from softprompt.model.frozen import FrozenLM
from softprompt.model.request import Request
from softprompt.tasks.predict import Progress, Query, predict
from softprompt.tasks.task import Task
from softprompt.text.tokens import SOFT

NEXT_TOKENS = 5
"""Most probable next tokens that are listed."""


# --- labels --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labels:
    """Answers to labelled rows with and without the soft prompt.

    Attributes:
        with_it, without: mean probability of each label, given that it is one of the labels.
        gold: share of the rows that have each label.
        accuracy_with, accuracy_without: on these rows.
        gained: accuracy with less accuracy without, paired.
        mended, broken: rows that are right only with the soft prompt, and only without.
        changed: rows whose answer is another.
        distance: mean total variation distance between a row's two distributions, in [0, 1].
        n: rows.
    """

    with_it: dict[str, float]
    without: dict[str, float]
    gold: dict[str, float]
    accuracy_with: Metric
    accuracy_without: Metric
    gained: Difference
    mended: int
    broken: int
    changed: int
    distance: float
    n: int

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return dict(plain(self))


def label_shift(task: Task, vectors: torch.Tensor, dataset: Dataset, *, progress: Progress | None = None) -> Labels:
    """How the soft prompt changes the distribution over the labels.

    Args:
        task: the soft prompt's own, with labels.
        vectors: float32 ``[P, H]``.
        dataset: rows with targets.
        progress: is told how far it is.
    """
    examples, n = dataset.examples, len(dataset.examples)
    bare = task.without_soft_prompt()
    queries = [Query(task, example, vectors) for example in examples] + [Query(bare, example) for example in examples]
    found = predict(queries, progress=progress)
    tuned, plainly = found[:n], found[n:]
    gold = [str(example.target) for example in examples]
    p, q = (np.array([list((a.probabilities or {}).values()) for a in answers]) for answers in (tuned, plainly))
    right, right_without = (
        np.array([answer.text == label for answer, label in zip(answers, gold, strict=True)], dtype=np.float64)
        for answers in (tuned, plainly)
    )
    counts = Counter(gold)
    return Labels(
        with_it=dict(zip(task.labels, p.mean(axis=0).tolist(), strict=True)),
        without=dict(zip(task.labels, q.mean(axis=0).tolist(), strict=True)),
        gold={label: counts[label] / n for label in task.labels},
        accuracy_with=metrics.accuracy([answer.text for answer in tuned], gold),
        accuracy_without=metrics.accuracy([answer.text for answer in plainly], gold),
        gained=difference(right, right_without),
        mended=int((right > right_without).sum()),
        broken=int((right < right_without).sum()),
        changed=sum(a.text != b.text for a, b in zip(tuned, plainly, strict=True)),
        distance=float(np.abs(p - q).sum(axis=1).mean() / 2),
        n=n,
    )


# --- next tokens ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Continuation:
    """The base model's next token after a text.

    Attributes:
        text: the input text, its fields joined by a space.
        with_it, without: the most probable tokens and their probabilities over the whole vocabulary.
        divergence: Kullback-Leibler divergence of the distribution with the soft prompt from that without, in nats.
        on_labels_with, on_labels_without: probability that the answer is one of the verbalizer's words; None for free
            text.
        labels_with, labels_without: each label's probability, given that it is one of the labels; None for free text.
    """

    text: str
    with_it: tuple[tuple[str, float], ...]
    without: tuple[tuple[str, float], ...]
    divergence: float
    on_labels_with: float | None
    on_labels_without: float | None
    labels_with: dict[str, float] | None
    labels_without: dict[str, float] | None

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return dict(plain(self))


def next_tokens(
    task: Task, vectors: torch.Tensor, examples: Sequence[Example], *, k: int = NEXT_TOKENS
) -> tuple[Continuation, ...]:
    """The distribution of the token that follows the template, with and without the soft prompt.

    Args:
        task: the soft prompt's own.
        vectors: float32 ``[P, H]``.
        examples: input texts; targets are not looked at.
        k: tokens to list.
    """
    return tuple(_continuation(task, vectors, example, k) for example in examples)


def _continuation(task: Task, vectors: torch.Tensor, example: Example, k: int) -> Continuation:
    lm = task.model
    listed, logprobs, on_labels, labels = [], [], [], []
    for variant, soft in ((task, vectors), (task.without_soft_prompt(), None)):
        next_one = _next_logprobs(lm, variant.open_request(example, 1), soft)
        best = next_one.topk(k)
        tokens = [lm.tokenizer.decode([token]) for token in best.indices.tolist()]
        listed.append(tuple(zip(tokens, best.values.exp().tolist(), strict=True)))
        logprobs.append(next_one)
        if task.verbalizer is not None:
            scores = lm.score([variant.label_request(example)], [] if soft is None else [soft])
            on_labels.append(float(scores.double().exp().sum()))
            labels.append(dict(zip(task.labels, variant.label_logprobs(scores)[0].exp().tolist(), strict=True)))
    after, before = logprobs
    return Continuation(
        text=" ".join(example.fields.values()),
        with_it=listed[0],
        without=listed[1],
        divergence=float((after.exp() * (after - before)).sum()),
        on_labels_with=on_labels[0] if on_labels else None,
        on_labels_without=on_labels[1] if on_labels else None,
        labels_with=labels[0] if labels else None,
        labels_without=labels[1] if labels else None,
    )


@torch.no_grad()
def _next_logprobs(lm: FrozenLM, request: Request, vectors: torch.Tensor | None) -> torch.Tensor:
    """Log-probabilities float32 ``[V]`` of the next token by the model's own forward."""
    row = lm.whole.growing()
    row.add([lm.rows(request.ids, vectors)])
    return row.logits()[0].log_softmax(dim=-1).cpu()


# --- attention -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attention:
    """Attention that the place of the answer pays, averaged over heads and texts.

    Attributes:
        by_layer: for each layer, the share paid to each virtual token.
        start: the same for the vectors that training started from; empty if not known.
        even: the share that each token would be paid if all were paid the same, averaged over texts.
        texts: how many.
    """

    by_layer: tuple[tuple[float, ...], ...]
    start: tuple[tuple[float, ...], ...]
    even: float
    texts: int

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return dict(plain(self))


def attention(
    task: Task, vectors: torch.Tensor, examples: Sequence[Example], *, start: torch.Tensor | None = None
) -> Attention | None:
    """Attention from the last token before the answer to each virtual token, by layer; of an encoder–decoder, from the
    first token of its decoder.

    It says where the model looks, not what it makes of it (Jain and Wallace 2019); the first tokens of a sequence are
    paid much attention whatever they are (Xiao et al. 2024, attention sinks), which is why the start is shown beside.

    Args:
        task: the soft prompt's own.
        vectors: float32 ``[P, H]``.
        examples: input texts.
        start: float32 ``[P, H]``, what training started from, if known.

    Returns:
        None if the model does not give its attention.
    """
    lm = task.model
    requests = [task.open_request(example, 1) for example in examples]

    def paid(soft: torch.Tensor) -> torch.Tensor | None:
        total = None
        for request in requests:
            with torch.no_grad():
                layers = lm.whole.attention(lm.rows(request.ids, soft))
            if not layers:
                return None
            at = request.ids.index(SOFT)
            found = torch.stack([layer[:, at : at + len(soft)].float().mean(dim=0).cpu() for layer in layers])
            total = found if total is None else total + found
        return None if total is None else total / len(requests)

    with _plain_attention(lm) as possible:
        of_tuned = paid(vectors) if possible else None
        of_start = paid(start) if start is not None and of_tuned is not None else None
    if of_tuned is None:
        return None
    lengths = [len(request.ids) - 1 + len(vectors) for request in requests]
    return Attention(
        by_layer=tuple(map(tuple, of_tuned.tolist())),
        start=() if of_start is None else tuple(map(tuple, of_start.tolist())),
        even=sum(1 / length for length in lengths) / len(lengths),
        texts=len(requests),
    )


@contextmanager
def _plain_attention(lm: FrozenLM) -> Iterator[bool]:
    """Has the model compute attention the plain way, which gives the weights, and says whether it can."""
    before = lm.model.config._attn_implementation
    try:
        lm.model.set_attn_implementation("eager")
    except (ValueError, NotImplementedError, ImportError):
        yield False
        return
    try:
        yield True
    finally:
        lm.model.set_attn_implementation(before)


def examples_of(task: Task, texts: Sequence[str]) -> tuple[Example, ...]:
    """Input texts as examples of a task with one field.

    Raises:
        ConfigError: the task has several fields.
    """
    names = task.template.fields
    if len(names) != 1:
        raise ConfigError(
            f"A text can be given for a template with one field, but this one has {', '.join(names)}; "
            f"give rows with --data instead."
        )
    return tuple(Example({names[0]: text}, None, where=f"text {i}") for i, text in enumerate(texts, start=1))
