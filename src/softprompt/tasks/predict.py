"""Queries to answers, in mixed batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from softprompt.data.example import Example
from softprompt.drawing.words import html_table
from softprompt.errors import ConfigError
from softprompt.generation.decoder import generate
from softprompt.model.frozen import FrozenLM
from softprompt.model.prefixes import PrefixOf
from softprompt.model.request import Request, Sampling
from softprompt.tasks.task import Task

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
        vectors: float ``[P, H]``, the soft prompt, or a trained prefix, ``[P, L, 2, H_kv, D]`` or ``[N]``; None for a
            template without one.

    Raises:
        ConfigError: the vectors are missing, are not wanted, or have another shape than the task's soft prompt.
    """

    task: Task
    example: Example
    vectors: torch.Tensor | None = None

    def __post_init__(self) -> None:
        task = self.task
        found = None if self.vectors is None else list(self.vectors.shape)
        trained = found is not None and len(found) != 2 and not task.model.trained.why_none
        rows = task.num_virtual_tokens + task.decoder_virtual_tokens
        shape = task.model.trained.shape(task.num_virtual_tokens) if trained else (rows, task.lm.hidden_size)
        wanted = list(shape) if task.template.has_soft_prompt else None
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

    @property
    def probability(self) -> float | None:
        """Of the most probable label, given that it is one of the labels; None for free text."""
        return None if self.logprobs is None else math.exp(self.logprobs[self.text])

    def __str__(self) -> str:
        """``positive 0.98``, or the generated text."""
        return self.text if self.probability is None else f"{self.text} {self.probability:.2f}"


class Predictions(tuple[Prediction, ...]):
    """Answers in the order of the inputs. They print as ``[positive 0.98, negative 0.95]``, free text in quotation
    marks, and in a notebook as a table."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"[{', '.join(repr(one.text) if one.logprobs is None else str(one) for one in self)}]"

    def _repr_html_(self) -> str:
        columns = ("answer", "probability")
        rows = [(one.text, "–" if one.probability is None else f"{one.probability:.2f}") for one in self]
        return html_table(columns, rows)


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
        prefix_of = lm_of(queries).kept_prefixes(KEPT_PREFIXES)
    for job, members in jobs.items():
        for start, chunk in chunks(members):
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


def chunks(members: Sequence[int]) -> Iterator[tuple[int, Sequence[int]]]:
    for start in range(0, len(members), ROWS_AT_ONCE):
        yield start, members[start : start + ROWS_AT_ONCE]


def requests_of(
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
    requests, soft_prompts = requests_of(queries, lambda query, place: query.task.label_request(query.example, place))
    scores = lm_of(queries).score(requests, soft_prompts, prefix_of=prefix_of)
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
    requests, soft_prompts = requests_of(
        queries, lambda query, place: query.task.open_request(query.example, sampling.max_new_tokens, place)
    )
    written = generate(lm_of(queries), requests, soft_prompts, sampling, prefix_of=prefix_of)
    return [
        Prediction(answer.text.strip(), None, answer.finish, request.truncated)
        for answer, request in zip(written, requests, strict=True)
    ]


def lm_of(queries: Sequence[Query]) -> FrozenLM:
    return queries[0].task.model
