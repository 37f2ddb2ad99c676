"""What in a soft prompt matters: parts of it taken away or replaced, and the same rows scored again.

Every variant is another soft prompt for the same rows, so changes are paired row by row. The rows should be some that
the soft prompt was not tuned on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from softprompt.data.example import Dataset
from softprompt.evaluation import metrics
from softprompt.evaluation.metrics import Metric
from softprompt.inspection.statistics import LEVEL, SEED, adjusted, plain, tail
from softprompt.inspection.vocabulary import Vocabulary
from softprompt.tasks.predict import Progress, Query, predict
from softprompt.tasks.task import Task
from softprompt.tuning.start import initial_vectors

TOP = 5
"""How many virtual tokens are named as those that matter most."""
RESAMPLES = 2000
"""Resamples of the rows for an interval."""
RANDOM_TEXTS = 3
"""Draws of random tokens that a reading as text is compared with."""

Rows = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Variant:
    """A soft prompt, or none, to be scored.

    Attributes:
        task: template, labels, and the number of virtual tokens.
        vectors: float32 ``[P, H]``; None for a task without a soft prompt.
    """

    task: Task
    vectors: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class Scored:
    """What a variant makes of each row.

    Attributes:
        loss: float64 ``[n]`` in nats: of the right label among the labels, or of a token of the target's text.
        answers: the most probable label of each row; empty for free text.
        gold: the right label of each row; empty for free text.
    """

    loss: Rows
    answers: tuple[str, ...]
    gold: tuple[str, ...]

    @property
    def right(self) -> Rows:
        """1 where the answer is right, float64 ``[n]``; empty for free text."""
        return np.array([a == b for a, b in zip(self.answers, self.gold, strict=True)], dtype=np.float64)


def score_variants(
    variants: Sequence[Variant], dataset: Dataset, *, progress: Progress | None = None
) -> tuple[Scored, ...]:
    """Scores the same rows with each variant.

    Each variant's rows run in batches of their own, the same for every variant: one prefix in a batch is the fastest
    path, and what bf16 rounds away depends on what else is in a batch.

    Args:
        variants: of one base model.
        dataset: rows with targets.
        progress: is told how far it is, in rows of all variants.
    """
    n = len(dataset.examples)
    found = []
    for number, variant in enumerate(variants):
        found.append((_score_labels if variant.task.verbalizer else _score_text)(variant, dataset))
        if progress is not None:
            progress((number + 1) * n, len(variants) * n)
    return tuple(found)


def _score_labels(variant: Variant, dataset: Dataset) -> Scored:
    answers = predict([Query(variant.task, example, variant.vectors) for example in dataset.examples])
    gold = tuple(str(example.target) for example in dataset.examples)
    loss = [-(answer.logprobs or {})[label] for answer, label in zip(answers, gold, strict=True)]
    return Scored(np.array(loss), tuple(answer.text for answer in answers), gold)


def _score_text(variant: Variant, dataset: Dataset) -> Scored:
    requests = [variant.task.target_request(example) for example in dataset.examples]
    scores = variant.task.model.score(requests, [] if variant.vectors is None else [variant.vectors])
    return Scored(-scores[:, 0].double().numpy() / np.array([len(request.words[0]) for request in requests]), (), ())


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences.

    Attributes:
        value: the mean.
        low, high: its 95 % bootstrap interval; NaN for a single row.
        p: chance of a mean as far from 0 if there were no difference (normal approximation, two-sided).
    """

    value: float
    low: float
    high: float
    p: float


def difference(changed: Rows, full: Rows) -> Difference:
    """Mean of ``changed - full``, both ``[n]``, rows in the same order."""
    value, low, high = metrics.paired_bootstrap(changed.tolist(), full.tolist(), draws=RESAMPLES)
    gaps = changed - full
    error = float(gaps.std(ddof=1)) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.inf
    p = 2 * tail(abs(value) / error) if error > 0 else float(value == 0)
    return Difference(value, low, high, p)


@dataclass(frozen=True)
class Change:
    """How a variant scores, and what that is against the whole soft prompt.

    Attributes:
        loss: mean loss in nats.
        score: accuracy; None for free text.
        loss_change: above 0 where the variant is worse.
        score_change: below 0 where the variant is worse; None for free text.
    """

    loss: Metric
    score: Metric | None
    loss_change: Difference
    score_change: Difference | None


def change(variant: Scored, full: Scored) -> Change:
    """A variant's scores beside those of the whole soft prompt on the same rows."""
    labelled = bool(full.gold)
    return Change(
        loss=metrics.log_loss(variant.loss.tolist()),
        score=metrics.accuracy(variant.answers, variant.gold) if labelled else None,
        loss_change=difference(variant.loss, full.loss),
        score_change=difference(variant.right, full.right) if labelled else None,
    )


# --- each virtual token --------------------------------------------------------------------------


@dataclass(frozen=True)
class Importance:
    """What one virtual token is worth.

    Attributes:
        left_out: without it; all that stands behind it moves up by one place.
        replaced: with the mean of all virtual tokens in its place; nothing moves.
        q: the p-value of the loss without it, adjusted for all virtual tokens.
        significant: whether q is at most the level.
        top_share: in which share of resamples of the rows it is among the ``TOP`` that cost most when left out.
    """

    left_out: Change
    replaced: Change
    q: float
    significant: bool
    top_share: float


@dataclass(frozen=True, eq=False)
class WhatMatters:
    """What each virtual token is worth.

    Attributes:
        full: the whole soft prompt.
        tokens: one a virtual token.
        order: their indices, those first whose absence costs most loss.
        agreement: rank correlation between the losses left out and replaced, in [-1, 1]; NaN for a single one.
        n: rows.
        level: false discovery rate.
        costs: float64 ``[P, n]``, the loss that each costs each row when left out.
    """

    full: Change
    tokens: tuple[Importance, ...]
    order: tuple[int, ...]
    agreement: float
    n: int
    level: float
    costs: Rows

    @property
    def top(self) -> tuple[int, ...]:
        """The ``TOP`` that matter most."""
        return self.order[:TOP]

    def as_dict(self) -> dict[str, Any]:
        """JSON values, without the costs of single rows."""
        kept = {key: value for key, value in self.__dict__.items() if key != "costs"}
        return dict(plain({**kept, "top": self.top}))


def what_matters(
    task: Task,
    vectors: torch.Tensor,
    dataset: Dataset,
    *,
    level: float = LEVEL,
    progress: Progress | None = None,
) -> WhatMatters:
    """Leaves each virtual token out, and replaces each by the mean of all.

    A single virtual token is left out by leaving the soft prompt out.

    Args:
        task: the soft prompt's own.
        vectors: float32 ``[P, H]``.
        dataset: rows with targets.
        level: false discovery rate.
        progress: is told how far it is.
    """
    count, mean = len(vectors), vectors.mean(dim=0)
    without = [_kept(task, vectors, [j for j in range(count) if j != i]) for i in range(count)]
    instead = [Variant(task, torch.cat([vectors[:i], mean[None], vectors[i + 1 :]])) for i in range(count)]
    full, *found = score_variants([Variant(task, vectors), *without, *instead], dataset, progress=progress)
    left_out = [change(scored, full) for scored in found[:count]]
    replaced = [change(scored, full) for scored in found[count:]]
    costs = np.stack([scored.loss - full.loss for scored in found[:count]])
    q = adjusted([each.loss_change.p for each in left_out])
    shares = _top_shares(costs)
    return WhatMatters(
        full=change(full, full),
        tokens=tuple(Importance(left_out[i], replaced[i], q[i], q[i] <= level, float(shares[i])) for i in range(count)),
        order=_by_cost(costs),
        agreement=_rank_correlation(costs.mean(axis=1), np.array([each.loss_change.value for each in replaced])),
        n=len(dataset.examples),
        level=level,
        costs=costs,
    )


def _kept(task: Task, vectors: torch.Tensor, kept: Sequence[int]) -> Variant:
    """Only some of the virtual tokens, in their order."""
    if not kept:
        return Variant(task.without_soft_prompt(), None)
    return Variant(replace(task, num_virtual_tokens=len(kept)), vectors[list(kept)])


def _by_cost(costs: Rows) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argsort(-costs.mean(axis=1), kind="stable"))


def _top_shares(costs: Rows) -> Rows:
    """For each row of ``costs`` ``[P, n]``, the share of resamples of columns in which its mean is among the largest
    ``TOP``."""
    n = costs.shape[1]
    weights = np.random.default_rng(SEED).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    ranks = np.argsort(np.argsort(-(weights @ costs.T), axis=1), axis=1)
    shares: Rows = (ranks < TOP).mean(axis=0)
    return shares


def _rank_correlation(a: Rows, b: Rows) -> float:
    """Spearman's; NaN for a single number."""
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic) if len(a) > 1 else math.nan


# --- read as text --------------------------------------------------------------------------------


@dataclass(frozen=True)
class AsText:
    """The soft prompt read in one way, and scored like that.

    Attributes:
        name: which way.
        text: what it says; empty without a soft prompt.
        change: what that is worth.
    """

    name: str
    text: str
    change: Change


def as_text(
    task: Task,
    vectors: torch.Tensor,
    vocabulary: Vocabulary,
    dataset: Dataset,
    *,
    start: torch.Tensor | None = None,
    seed: int = SEED,
    progress: Progress | None = None,
) -> tuple[AsText, ...]:
    """Reads the soft prompt as words and scores those in its place (its "discretisation", Khashabi et al. 2022).

    The soft prompt itself comes first, then: the nearest token of each virtual token by cosine, the same stretched to
    the virtual token's norm, the nearest by distance, the first as a text that is typed and tokenized anew, the start
    of the training, no soft prompt, and ``RANDOM_TEXTS`` draws of P random tokens for comparison.

    Args:
        task: the soft prompt's own.
        vectors: float32 ``[P, H]``.
        vocabulary: of the base model.
        dataset: rows with targets.
        start: float32 ``[P, H]``, what training started from, if known.
        seed: seeds the random tokens.
        progress: is told how far it is.
    """
    nearest = vocabulary.nearest(vectors, 1, ("cosine", "euclidean"))
    by_cosine, by_distance = (nearest[name][1][:, 0].tolist() for name in ("cosine", "euclidean"))
    typed, stretched = task.model.tokenizer.decode(by_cosine), vocabulary[by_cosine]
    stretched = stretched * (vectors.norm(dim=1) / stretched.norm(dim=1).clamp_min(1e-12))[:, None]
    readings: list[tuple[str, str, Variant]] = [
        ("soft prompt", "", Variant(task, vectors)),
        ("nearest tokens by cosine", typed, Variant(task, vocabulary[by_cosine])),
        ("those, at the soft prompt's norms", typed, Variant(task, stretched)),
        (
            "nearest tokens by distance",
            task.model.tokenizer.decode(by_distance),
            Variant(task, vocabulary[by_distance]),
        ),
        ("nearest by cosine, typed as text", typed, Variant(task.without_soft_prompt(typed), None)),
    ]
    if start is not None:
        readings.append(("start of the training", "", Variant(task, start)))
    readings.append(("no soft prompt", "", Variant(task.without_soft_prompt(), None)))
    for draw in range(RANDOM_TEXTS):
        random = initial_vectors(task.model, len(vectors), init="vocab", seed=seed + draw)
        readings.append((f"random tokens, draw {draw + 1}", "", Variant(task, random)))
    full, *rest = score_variants([variant for _, _, variant in readings], dataset, progress=progress)
    changes = [change(scored, full) for scored in (full, *rest)]
    return tuple(AsText(name, text, found) for (name, text, _), found in zip(readings, changes, strict=True))


# --- fewer virtual tokens ------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """The soft prompt with only some of its virtual tokens.

    Attributes:
        k: how many are kept.
        first: the first k.
        best: the k whose absence costs most. They are chosen for each half of the rows on the other half, so that no
            row has a say in what it is scored with.
    """

    k: int
    first: Change
    best: Change


def cuts(
    task: Task, vectors: torch.Tensor, dataset: Dataset, matters: WhatMatters, *, progress: Progress | None = None
) -> tuple[Cut, ...]:
    """Keeps the first, and the best, k virtual tokens, for k = 1, 2, 5, 10, 20, 50 … below P.

    Args:
        task: the soft prompt's own.
        vectors: float32 ``[P, H]``.
        dataset: the rows that ``matters`` was found on, at least 2.
        matters: what each virtual token is worth.
        progress: is told how far it is.
    """
    sizes = [step * 10**power for power in range(4) for step in (1, 2, 5) if step * 10**power < len(vectors)]
    even = np.arange(len(dataset.examples)) % 2 == 0
    orders = [_by_cost(matters.costs[:, rows]) for rows in (~even, even)]  # for even rows by the odd ones, and back
    kept = [chosen for k in sizes for chosen in (range(k), sorted(orders[0][:k]), sorted(orders[1][:k]))]
    variants = [Variant(task, vectors), *(_kept(task, vectors, list(chosen)) for chosen in kept)]
    full, *found = score_variants(variants, dataset, progress=progress)
    made = []
    for i, k in enumerate(sizes):
        first, on_even, on_odd = found[3 * i : 3 * i + 3]
        both = zip(even, on_even.answers, on_odd.answers, strict=True) if full.gold else ()
        answers = tuple(a if is_even else b for is_even, a, b in both)
        best = Scored(np.where(even, on_even.loss, on_odd.loss), answers, full.gold)
        made.append(Cut(k, change(first, full), change(best, full)))
    return tuple(made)
