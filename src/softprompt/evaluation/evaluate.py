"""What a task's answers are worth."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from softprompt.data.example import Dataset, check_targets
from softprompt.drawing.words import html_table, number
from softprompt.errors import ConfigError, DataError
from softprompt.evaluation import metrics as measures
from softprompt.evaluation.metrics import Metric
from softprompt.model.request import Sampling
from softprompt.tasks.predict import Prediction, Progress, Query, chunks, lm_of, predict, requests_of
from softprompt.tasks.task import Task

LABEL_METRICS = ("accuracy", "macro_f1", "mcc", "log_loss", "calibration_error")
"""What labels are measured by; the first is the headline."""

TEXT_METRICS = ("bleu", "rouge_l", "exact_match", "token_f1", "perplexity")
"""What free text is measured by; the first is the headline."""

SHORT_ANSWER = 4
"""Free text of fewer words than these holds no run of four, which BLEU counts."""

ONE_ANSWER, MISSED, MISSED_ROWS = 0.95, 0.05, 2
"""The share of the rows from which on one answer is given to nearly all; the share, and the number, of them that it is
given to beyond those that have it as their target, from which on that is told."""


@dataclass(frozen=True)
class OneAnswer:
    """The answer that was given most often.

    Attributes:
        label: the answer, a label or free text.
        share: of the rows that were answered so, 0 to 1.
        gold_share: of the rows whose target it is, 0 to 1.
        is_telling: whether nearly all rows, 95 % or more, were answered so, although fewer should be: by at least 5 %
            of the rows, and by 2 rows. Labels that are given in about their own shares are not meant, however frequent
            one of them is.
    """

    label: str
    share: float
    gold_share: float
    is_telling: bool = True

    def __str__(self) -> str:
        """``answers 'yes' on 98.2 % of the rows; 62.2 % of the rows are``."""
        label = self.label if len(self.label) <= 40 else self.label[:39] + "…"
        return (
            f"answers {label!r} on {100 * self.share:.1f} % of the rows; {100 * self.gold_share:.1f} % of the rows are"
        )

    def as_dict(self) -> dict[str, Any]:
        """The answer and the shares as JSON values, and under ``one_answer`` whether that is telling."""
        return {
            "label": self.label,
            "share": self.share,
            "gold_share": self.gold_share,
            "one_answer": self.is_telling,
        }


def one_answer(predicted: Sequence[str], gold: Sequence[str]) -> OneAnswer | None:
    """The one answer that nearly all rows were given, although fewer have it as their target; None if there is none.
    What that means is at ``OneAnswer.is_telling``.

    Args:
        predicted: the answers.
        gold: the targets of the same rows.
    """
    found = _most_frequent(predicted, gold)
    return found if found is not None and found.is_telling else None


def _most_frequent(predicted: Sequence[str], gold: Sequence[str]) -> OneAnswer | None:
    if not predicted:
        return None
    label, count = Counter(predicted).most_common(1)[0]
    rows, right = len(predicted), list(gold).count(label)
    is_telling = count >= ONE_ANSWER * rows and count - right >= max(MISSED * rows, MISSED_ROWS)
    return OneAnswer(label, count / rows, right / rows, is_telling)


@dataclass(frozen=True)
class Evaluation:
    """What a task's answers are worth.

    Attributes:
        metrics: the headline first.
        predictions: the answers, in the order of the rows; empty if no metric needed them.
        truncated: how many rows had input text cut.
        most_frequent: the answer that was given most often; None if no metric needed answers.
        losses: of each row minus the log-probability of its target, in nats: of a label among all labels, of free text
            all its tokens, the end token included. Empty if no metric needed them.
    """

    metrics: tuple[Metric, ...]
    predictions: tuple[Prediction, ...]
    truncated: int
    most_frequent: OneAnswer | None = None
    losses: tuple[float, ...] = ()

    @property
    def headline(self) -> Metric:
        """The first metric."""
        return self.metrics[0]

    def __str__(self) -> str:
        """The headline, ``accuracy 0.9072 ± 0.0068 (n = 872)``."""
        return str(self.headline)

    def _repr_html_(self) -> str:
        """All metrics as a table, for a notebook."""
        rows = []
        for metric in (metric.as_dict() for metric in self.metrics):
            name = str(metric["metric"])
            value, stderr, low, high = (number(name, metric[key]) for key in ("value", "stderr", "low", "high"))
            rows.append((name, value, stderr, f"{low} to {high}", f"{metric['n']:,}"))
        return html_table(("metric", "value", "± stderr", "95 % interval", "n"), rows)

    def as_dict(self) -> dict[str, Any]:
        """The headline's own values, all metrics, the number of truncated inputs, and the most frequent answer, as JSON
        values."""
        return {
            **self.headline.as_dict(),
            "metrics": [metric.as_dict() for metric in self.metrics],
            "truncated": self.truncated,
            "most_frequent_answer": self.most_frequent and self.most_frequent.as_dict(),
        }


def evaluate(
    task: Task,
    vectors: torch.Tensor | None,
    dataset: Dataset,
    *,
    metrics: Sequence[str] | None = None,
    normalise: bool = False,
    sampling: Sampling | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measures a soft prompt, or with a task without one the bare base model.

    Args:
        task: what to answer.
        vectors: float ``[P, H]``; None for a task without a soft prompt.
        dataset: rows with targets. Free text is compared with a row's references, or else with its target.
        metrics: names from ``LABEL_METRICS`` or ``TEXT_METRICS``, whichever the task has; None: all of them. Only
            these are computed; the first is the headline.
        normalise: divide each word's log-probability by its number of tokens.
        sampling: how free text is generated; None: ``default_sampling``.
        progress: is told how far it is.

    Raises:
        ConfigError: a metric that the task does not have.
        DataError: a row without a target, or with one that is not in the label set.
        TemplateError: a template leaves no room for the input.
    """
    names = choose_metrics(metrics, labels=task.verbalizer is not None)
    require_targets(dataset, task)
    queries = [Query(task, example, vectors) for example in dataset.examples]
    if task.verbalizer is not None:
        answers = predict(queries, normalise=normalise, progress=progress)
        found_metrics = label_metrics(task.labels, dataset, answers, names)
        often, losses = most_frequent_answer(dataset, answers), tuple(label_losses(dataset, answers))
        return Evaluation(found_metrics, tuple(answers), _truncated(answers), often, losses)

    writes = names != ("perplexity",)
    passes = writes + ("perplexity" in names)
    found: dict[str, Metric] = {}
    answers, truncated, nll = [], 0, list[float]()
    if writes:
        answers = predict(queries, sampling=sampling, progress=_share(progress, 0, passes))
        found = text_metrics(dataset, answers, names)
        truncated = _truncated(answers)
    if "perplexity" in names:
        nll, tokens, cut = _target_nll(queries, _share(progress, passes - 1, passes))
        found["perplexity"] = measures.perplexity(nll, tokens)
        truncated = truncated if writes else cut
    measured = tuple(found[name] for name in names)
    often = most_frequent_answer(dataset, answers) if writes else None
    return Evaluation(measured, tuple(answers), truncated, often, tuple(nll))


def require_targets(dataset: Dataset, task: Task) -> None:
    """Refuses rows that cannot be measured on.

    Raises:
        DataError: a row without a target, or with one that is not in the label set.
    """
    for example in dataset.examples:
        if example.target is None:
            raise DataError(f"{example.where}: expected a target, found none; add one.")
    if task.verbalizer is not None:
        check_targets(dataset, task.labels)


def headline_metric(train: Dataset, labels: Sequence[str]) -> str:
    """What methods are compared by: ``accuracy`` with labels; ``token_f1`` where the targets of the training rows are
    short answers, in the median; ``bleu`` for other free text."""
    if labels:
        return "accuracy"
    words = statistics.median(len(str(example.target).split()) for example in train.examples)
    return "token_f1" if words < SHORT_ANSWER else "bleu"


def headline(metric: str, dataset: Dataset, predictions: Sequence[Prediction]) -> Metric:
    """A metric that ``headline_metric`` names, of answers that are there already."""
    if metric == "accuracy":
        gold = [str(example.target) for example in dataset.examples]
        return measures.accuracy([prediction.text for prediction in predictions], gold)
    return text_metrics(dataset, predictions, (metric,))[metric]


def label_metrics(
    labels: Sequence[str], dataset: Dataset, predictions: Sequence[Prediction], names: Sequence[str]
) -> tuple[Metric, ...]:
    """Metrics of answers that are there already.

    Args:
        labels: the label set.
        dataset: rows whose targets are of it.
        predictions: their answers, with log-probabilities for ``log_loss`` and ``calibration_error``.
        names: of ``LABEL_METRICS``, in the order in which they are returned.
    """
    gold = [str(example.target) for example in dataset.examples]
    answers = [prediction.text for prediction in predictions]

    compute: dict[str, Callable[[], Metric]] = {
        "accuracy": lambda: measures.accuracy(answers, gold),
        "macro_f1": lambda: measures.macro_f1(answers, gold, labels),
        "mcc": lambda: measures.mcc(answers, gold, labels),
        "log_loss": lambda: measures.log_loss(label_losses(dataset, predictions)),
        "calibration_error": lambda: measures.calibration_error(*confidences(dataset, predictions)),
    }
    return tuple(compute[name]() for name in names)


def label_losses(dataset: Dataset, predictions: Sequence[Prediction]) -> list[float]:
    """Minus the log-probability of each row's label, in nats, of answers with labels."""
    rows = zip(predictions, dataset.examples, strict=True)
    return [-(prediction.logprobs or {})[str(row.target)] for prediction, row in rows]


def confidences(dataset: Dataset, predictions: Sequence[Prediction]) -> tuple[list[float], list[bool]]:
    """The probability that each answer gives itself, and whether it is right, of answers with labels."""
    hits = [one.text == str(row.target) for one, row in zip(predictions, dataset.examples, strict=True)]
    return [one.probability or 0.0 for one in predictions], hits


def headline_difference(
    metric: str, dataset: Dataset, first: Sequence[str], second: Sequence[str]
) -> tuple[float, float, float]:
    """What the answers ``first`` score above ``second`` on the same rows, with the ends of its 95 % interval (paired
    bootstrap)."""
    if metric == "accuracy":
        gold = [str(example.target) for example in dataset.examples]
        hits = [[float(a == target) for a, target in zip(answers, gold, strict=True)] for answers in (first, second)]
        return measures.paired_bootstrap(*hits)
    paired = {"bleu": measures.paired_bleu, "token_f1": measures.paired_token_f1}
    return paired[metric](first, second, _references(dataset))


def most_frequent_answer(dataset: Dataset, predictions: Sequence[Prediction]) -> OneAnswer | None:
    """The answer that rows were given most often, of equals the first; for free text any of a row's references is its
    target. None without answers."""
    answers = [prediction.text for prediction in predictions]
    rows = zip(answers, dataset.examples, _references(dataset), strict=True)
    return _most_frequent(answers, [answer if answer in several else str(row.target) for answer, row, several in rows])


def choose_metrics(names: Sequence[str] | None, *, labels: bool, of_one: bool = True) -> tuple[str, ...]:
    """The metrics to compute, each once; all of a task's if ``names`` is None or empty.

    Args:
        names: of ``LABEL_METRICS`` or ``TEXT_METRICS``.
        labels: whether the task has labels.
        of_one: whether one soft prompt answers; several texts that are voted on have no perplexity.

    Raises:
        ConfigError: a name that tasks of this kind do not have.
    """
    available = LABEL_METRICS if labels else TEXT_METRICS if of_one else TEXT_METRICS[:-1]
    for name in names or ():
        if name not in available:
            kind = "labels" if labels else "free text" if of_one else "free text of several soft prompts"
            raise ConfigError(f"The metric for {kind} must be one of {', '.join(available)}, not {name!r}; choose one.")
    return tuple(dict.fromkeys(names or available))


def _share(progress: Progress | None, part: int, parts: int) -> Progress | None:
    """Progress of one of several passes over the rows as progress of the whole."""
    return None if progress is None else lambda done, total: progress(part * total + done, parts * total)


def _truncated(predictions: Sequence[Prediction]) -> int:
    return sum(prediction.truncated for prediction in predictions)


def _references(dataset: Dataset) -> list[tuple[str, ...]]:
    """The texts that each row's answer is compared with."""
    references = [example.references or (str(example.target),) for example in dataset.examples]
    return [tuple(text.strip() for text in several) for several in references]


def text_metrics(dataset: Dataset, predictions: Sequence[Prediction], names: Sequence[str]) -> dict[str, Metric]:
    """Metrics of free text that is there already, by name; perplexity, which is of no text, is left out."""
    wanted = _references(dataset)
    answers = [prediction.text for prediction in predictions]
    compute = {
        "bleu": measures.bleu,
        "rouge_l": measures.rouge_l,
        "exact_match": measures.exact_match,
        "token_f1": measures.token_f1,
    }
    return {name: compute[name](answers, wanted) for name in names if name in compute}


def _target_nll(queries: Sequence[Query], progress: Progress | None) -> tuple[list[float], list[int], int]:
    """Each target's negative log-likelihood in nats and its tokens, the end token included; and truncated rows."""
    nll: list[float] = []
    tokens: list[int] = []
    truncated = 0
    for _, chunk in chunks(range(len(queries))):
        part = [queries[i] for i in chunk]
        requests, soft_prompts = requests_of(part, lambda query, place: query.task.target_request(query.example, place))
        nll += (-lm_of(part).score(requests, soft_prompts)[:, 0]).tolist()
        tokens += [len(request.words[0]) for request in requests]
        truncated += sum(request.truncated for request in requests)
        if progress is not None:
            progress(len(nll), len(queries))
    return nll, tokens, truncated
