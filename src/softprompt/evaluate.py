"""Running tasks on rows: answers of mixed batches, and what they are worth."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from softprompt import metrics as measures
from softprompt.data import Dataset, Example, check_targets
from softprompt.errors import ConfigError, DataError
from softprompt.frozen import FrozenLM, PrefixOf, Request, Sampling
from softprompt.metrics import Metric
from softprompt.task import Task

LABEL_METRICS = ("accuracy", "macro_f1", "mcc", "log_loss")
"""What labels are measured by; the first is the headline."""
TEXT_METRICS = ("bleu", "rouge_l", "exact_match", "token_f1", "perplexity")
"""What free text is measured by; the first is the headline."""

SHORT_ANSWER = 4
"""Free text of fewer words than these holds no run of four, which BLEU counts."""

ONE_ANSWER, MISSED, MISSED_ROWS = 0.95, 0.05, 2
"""The share of the rows from which on one answer is given to nearly all; the share, and the number, of them that it is
given to beyond those that have it as their target, from which on that is told."""

KEPT_PREFIXES = 64
"""Soft prompts, or hard ones, whose keys and values are kept from one batch to the next."""
ROWS_AT_ONCE = 128
"""Rows between two reports of progress; inside, they are sorted by length."""

Progress = Callable[[int, int], None]
"""Called with the rows done and the rows in all."""


@dataclass(frozen=True, eq=False)
class Query:
    """One row to be answered.

    Attributes:
        task: template and verbalizer, bound to the base model.
        example: its input text; a target is not looked at.
        vectors: float ``[P, H]``, the soft prompt, or ``[P, L, 2, H_kv, D]``, a trained KV prefix; None for a template
            without one.

    Raises:
        ConfigError: the vectors are missing, are not wanted, or have another shape than the task's soft prompt.
    """

    task: Task
    example: Example
    vectors: torch.Tensor | None = None

    def __post_init__(self) -> None:
        task = self.task
        found = None if self.vectors is None else list(self.vectors.shape)
        kv = found is not None and len(found) == 5 and task.lm.shares_prefix
        a_token = task.lm.kv_shape if kv else (task.lm.hidden_size,)
        wanted = [task.num_virtual_tokens, *a_token] if task.template.has_soft_prompt else None
        if found != wanted:
            raise ConfigError(
                f"The template {task.template.text!r} needs {_shape(wanted)}, but {_shape(found)} was given; "
                f"use a soft prompt with its own task, and Task.without_soft_prompt() without one."
            )


def _shape(shape: list[int] | None) -> str:
    return "no soft prompt" if shape is None else f"a soft prompt of shape {shape}"


@dataclass(frozen=True)
class Prediction:
    """The answer to one query.

    Attributes:
        text: the most probable label, or the generated text without blanks around it.
        logprobs: natural logarithm of each label's probability, given that it is one of the labels; None for free text.
        finish: for free text ``stop`` (end-of-sequence or a stop string) or ``length``; None for labels.
        truncated: whether input text was cut to fit the window.
    """

    text: str
    logprobs: Mapping[str, float] | None
    finish: str | None
    truncated: bool

    @property
    def probabilities(self) -> dict[str, float] | None:
        """Label → probability, in the order of the labels; they sum to 1. None for free text."""
        if self.logprobs is None:
            return None
        return dict(zip(self.logprobs, torch.tensor(list(self.logprobs.values())).double().exp().tolist(), strict=True))


def default_sampling(task: Task) -> Sampling:
    """Greedy, up to 128 tokens, but at most half of what soft prompt and template leave of the sequence.

    A tuned soft prompt has learned to end its answer. Without one, the base model would often go on with another
    question: there the answer is the first line that is not blank.
    """
    tuned = task.template.has_soft_prompt
    room = task.max_length - task.num_virtual_tokens - task.encoder.num_fixed
    most = max(1, min(128, room // 2))
    return Sampling(max_new_tokens=most, stop=() if tuned else ("\n",), skip_blank=not tuned)


def predict(
    queries: Sequence[Query],
    *,
    sampling: Sampling | None = None,
    normalise: bool = False,
    progress: Progress | None = None,
    prefix_of: PrefixOf | None = None,
) -> list[Prediction]:
    """Answers queries that may differ in soft prompt, template and labels, in shared batches of one base model.

    Args:
        queries: labels are scored, free text is generated.
        sampling: for free text; None: ``default_sampling`` of each query's task.
        normalise: divide each word's log-probability by its number of tokens.
        progress: is told how far it is.
        prefix_of: where prefixes come from; by default ``FrozenLM.kept_prefixes``, for as long as this call lasts.

    Returns:
        One prediction a query, in order. In fp32 the same query gives the same greedy answer in any company; in 16
        bits the others change how its numbers are rounded, and with them, rarely, a label, or on a GPU a text; load the
        base model with dtype fp32 where that matters.

    Raises:
        ConfigError: the queries are of several base models, or the model's numbers overflow in its dtype.
        TemplateError: a template leaves no room for the input.
    """
    if len({id(query.task.lm) for query in queries}) > 1:
        raise ConfigError("One batch needs one base model in memory, but the queries have several; predict for each.")
    jobs: dict[Sampling | None, list[int]] = {}  # one job, and so shared batches, for all labels; likewise for text
    for index, query in enumerate(queries):
        job = None if query.task.verbalizer is not None else sampling or default_sampling(query.task)
        jobs.setdefault(job, []).append(index)
    answers: dict[int, Prediction] = {}
    if queries and prefix_of is None:
        prefix_of = _lm(queries).kept_prefixes(KEPT_PREFIXES)
    for job, members in jobs.items():
        for start, chunk in _chunks(members):
            part = [queries[i] for i in chunk]
            # the seed goes on as if the rows were not cut into chunks
            found = (
                _write(part, replace(job, seed=job.seed + start), prefix_of)
                if job
                else _classify(part, normalise, prefix_of)
            )
            answers.update(zip(chunk, found, strict=True))
            if progress is not None:
                progress(len(answers), len(queries))
    return [answers[i] for i in range(len(queries))]


def _chunks(members: Sequence[int]) -> Iterator[tuple[int, Sequence[int]]]:
    for start in range(0, len(members), ROWS_AT_ONCE):
        yield start, members[start : start + ROWS_AT_ONCE]


def _requests(
    queries: Sequence[Query], make: Callable[[Query, int | None], Request]
) -> tuple[list[Request], list[torch.Tensor]]:
    """Each query's request, and the distinct soft prompts that they point into."""
    soft_prompts: list[torch.Tensor] = []
    places: dict[int, int] = {}
    requests = []
    for query in queries:
        if query.vectors is not None and id(query.vectors) not in places:
            places[id(query.vectors)] = len(soft_prompts)
            soft_prompts.append(query.vectors)
        requests.append(make(query, places.get(id(query.vectors))))
    return requests, soft_prompts


def _classify(queries: Sequence[Query], normalise: bool, prefix_of: PrefixOf | None) -> list[Prediction]:
    requests, soft_prompts = _requests(queries, lambda query, place: query.task.label_request(query.example, place))
    scores = _lm(queries).score(requests, soft_prompts, prefix_of=prefix_of)
    by_task: dict[int, list[int]] = {}
    for row, query in enumerate(queries):
        by_task.setdefault(id(query.task), []).append(row)
    found: dict[int, Prediction] = {}
    for rows in by_task.values():
        task = queries[rows[0]].task
        logprobs = task.label_logprobs(scores[rows, : len(task.words)], normalise=normalise)
        if logprobs.isnan().any():
            raise ConfigError(f"The base model's scores are not numbers in {task.lm.dtype}; load it with dtype fp32.")
        for row, values in zip(rows, logprobs.tolist(), strict=True):
            of_label = dict(zip(task.labels, values, strict=True))
            best = max(of_label, key=of_label.__getitem__)
            found[row] = Prediction(best, of_label, None, requests[row].truncated)
    return [found[row] for row in range(len(queries))]


def _write(queries: Sequence[Query], sampling: Sampling, prefix_of: PrefixOf | None) -> list[Prediction]:
    requests, soft_prompts = _requests(
        queries, lambda query, place: query.task.open_request(query.example, sampling.max_new_tokens, place)
    )
    written = _lm(queries).generate(requests, soft_prompts, sampling, prefix_of=prefix_of)
    return [
        Prediction(answer.text.strip(), None, answer.finish, request.truncated)
        for answer, request in zip(written, requests, strict=True)
    ]


def _lm(queries: Sequence[Query]) -> FrozenLM:
    return queries[0].task.lm


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
    """

    metrics: tuple[Metric, ...]
    predictions: tuple[Prediction, ...]
    truncated: int
    most_frequent: OneAnswer | None = None

    @property
    def headline(self) -> Metric:
        """The first metric."""
        return self.metrics[0]

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
    for example in dataset.examples:
        if example.target is None:
            raise DataError(f"{example.where}: expected a target, found none; add one.")
    if task.verbalizer is not None:
        check_targets(dataset, task.labels)
    queries = [Query(task, example, vectors) for example in dataset.examples]
    if task.verbalizer is not None:
        answers = predict(queries, normalise=normalise, progress=progress)
        found_metrics = label_metrics(task.labels, dataset, answers, names)
        return Evaluation(found_metrics, tuple(answers), _truncated(answers), most_frequent_answer(dataset, answers))

    writes = names != ("perplexity",)
    passes = writes + ("perplexity" in names)
    found: dict[str, Metric] = {}
    answers, truncated = [], 0
    if writes:
        answers = predict(queries, sampling=sampling, progress=_share(progress, 0, passes))
        found = _text_metrics(dataset, answers, names)
        truncated = _truncated(answers)
    if "perplexity" in names:
        nll, tokens, cut = _target_nll(queries, _share(progress, passes - 1, passes))
        found["perplexity"] = measures.perplexity(nll, tokens)
        truncated = truncated if writes else cut
    measured = tuple(found[name] for name in names)
    return Evaluation(measured, tuple(answers), truncated, most_frequent_answer(dataset, answers) if writes else None)


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
    return _text_metrics(dataset, predictions, (metric,))[metric]


def label_metrics(
    labels: Sequence[str], dataset: Dataset, predictions: Sequence[Prediction], names: Sequence[str]
) -> tuple[Metric, ...]:
    """Metrics of answers that are there already.

    Args:
        labels: the label set.
        dataset: rows whose targets are of it.
        predictions: their answers, with log-probabilities for ``log_loss``.
        names: of ``LABEL_METRICS``, in the order in which they are returned.
    """
    gold = [str(example.target) for example in dataset.examples]
    answers = [prediction.text for prediction in predictions]

    def log_loss() -> Metric:
        rows = zip(predictions, gold, strict=True)
        return measures.log_loss([-(prediction.logprobs or {})[label] for prediction, label in rows])

    compute: dict[str, Callable[[], Metric]] = {
        "accuracy": lambda: measures.accuracy(answers, gold),
        "macro_f1": lambda: measures.macro_f1(answers, gold, labels),
        "mcc": lambda: measures.mcc(answers, gold, labels),
        "log_loss": log_loss,
    }
    return tuple(compute[name]() for name in names)


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


def choose_metrics(names: Sequence[str] | None, *, labels: bool) -> tuple[str, ...]:
    """The metrics to compute, each once; all of a task's if ``names`` is None or empty.

    Raises:
        ConfigError: a name that tasks of this kind do not have.
    """
    available = LABEL_METRICS if labels else TEXT_METRICS
    for name in names or ():
        if name not in available:
            kind = "labels" if labels else "free text"
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


def _text_metrics(dataset: Dataset, predictions: Sequence[Prediction], names: Sequence[str]) -> dict[str, Metric]:
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
    for _, chunk in _chunks(range(len(queries))):
        part = [queries[i] for i in chunk]
        requests, soft_prompts = _requests(part, lambda query, place: query.task.target_request(query.example, place))
        nll += (-_lm(part).score(requests, soft_prompts)[:, 0]).tolist()
        tokens += [len(request.words[0]) for request in requests]
        truncated += sum(request.truncated for request in requests)
        if progress is not None:
            progress(len(nll), len(queries))
    return nll, tokens, truncated
