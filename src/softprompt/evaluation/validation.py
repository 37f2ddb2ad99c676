"""What learned vectors are worth on the validation rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from softprompt.data.example import Dataset, Example, check_targets
from softprompt.evaluation import metrics
from softprompt.evaluation.evaluate import one_answer
from softprompt.tasks.task import Task

Validator = Callable[[torch.Tensor], dict[str, Any]]
"""Vectors float ``[P, H]`` → one validation, as JSON values.

* ``value``: accuracy, or minus the loss for free text; higher is better.
* ``score``: what a run's validations are compared by (``tuning/keeping.py``): the mean probability of the right label,
  or minus the loss for free text.
* ``loss``: nats, the mean of an example with labels, of a target token for free text.
* ``metrics``: ``Metric.as_dict()`` each; with labels accuracy, macro-F1 and MCC, for free text perplexity.
* ``one_answer``: ``OneAnswer.as_dict()`` where nearly all rows were given one label though fewer have it, else None.
* ``rows``: ``loss``, a number a row whose mean is the loss, and with labels ``correct``, 1 or 0 a row.
"""

DIGITS = 6
"""Decimals of a row's loss that are kept."""


def validator(task: Task, examples: Sequence[Example]) -> Validator:
    """What validates on these examples.

    Raises:
        DataError: a target that is not one of the labels.
    """
    return _of_text(task, examples) if task.verbalizer is None else _of_labels(task, examples)


def _of_text(task: Task, examples: Sequence[Example]) -> Validator:
    requests = [task.target_request(example) for example in examples]
    tokens = [len(request.words[0]) for request in requests]
    per_row = len(tokens) / sum(tokens)

    def validate(vectors: torch.Tensor) -> dict[str, Any]:
        nll = (-task.model.score(requests, [vectors])[:, 0]).tolist()
        loss = sum(nll) / sum(tokens)
        found = [metrics.perplexity(nll, tokens).as_dict()] if math.isfinite(loss) else []
        rows = {"loss": [round(per_row * one, DIGITS) for one in nll]}
        return {"value": -loss, "score": -loss, "loss": loss, "metrics": found, "rows": rows}

    return validate


def _of_labels(task: Task, examples: Sequence[Example]) -> Validator:
    check_targets(Dataset(tuple(examples), "", ""), task.labels)
    requests = [task.label_request(example) for example in examples]
    gold = [str(example.target) for example in examples]
    index = torch.tensor([task.labels.index(target) for target in gold])

    def validate(vectors: torch.Tensor) -> dict[str, Any]:
        logprobs = task.label_logprobs(task.model.score(requests, [vectors])).cpu()
        predicted = [task.labels[i] for i in logprobs.argmax(dim=1).tolist()]
        losses = -logprobs.gather(1, index[:, None])[:, 0]
        found = [
            metrics.accuracy(predicted, gold),
            metrics.macro_f1(predicted, gold, task.labels),
            metrics.mcc(predicted, gold, task.labels),
        ]
        said = one_answer(predicted, gold)
        return {
            "value": found[0].value,
            "score": float(losses.neg().exp().mean()),
            "loss": float(losses.mean()),
            "metrics": [metric.as_dict() for metric in found],
            "one_answer": said and said.as_dict(),
            "rows": {
                "loss": [round(loss, DIGITS) for loss in losses.tolist()],
                "correct": [int(answer == label) for answer, label in zip(predicted, gold, strict=True)],
            },
        }

    return validate
