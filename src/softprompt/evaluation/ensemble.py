"""What the joint answers of several soft prompts are worth, and what their disagreement says."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from softprompt.data.example import Dataset
from softprompt.evaluation import metrics as measures
from softprompt.evaluation.evaluate import (
    Evaluation,
    choose_metrics,
    label_metrics,
    most_frequent_answer,
    require_targets,
    text_metrics,
)
from softprompt.evaluation.metrics import Metric
from softprompt.model.request import Sampling
from softprompt.tasks.ensemble import Ensemble
from softprompt.tasks.predict import Prediction, Progress

LOWER_IS_BETTER = ("log_loss", "calibration_error", "perplexity")
"""Metrics of which the least is the best."""


@dataclass(frozen=True)
class JointEvaluation(Evaluation):
    """What an ensemble's answers are worth, beside those of its members on the same rows.

    Attributes:
        names: what the members are called.
        members: what each of them is worth alone.
        disagreement: the share of the rows to which not all members give the same answer.
        agreeing, differing: with labels the accuracy of the joint answers to the other rows, and to these; None
            without such rows, or for free text.
    """

    names: tuple[str, ...] = ()
    members: tuple[Evaluation, ...] = ()
    disagreement: Metric | None = None
    agreeing: Metric | None = None
    differing: Metric | None = None

    @property
    def mean(self) -> float:
        """The mean of the members' headlines."""
        return statistics.fmean(one.headline.value for one in self.members)

    @property
    def best(self) -> int:
        """The place of the member with the best headline on these rows, of equals the first. Nobody can choose it
        without looking at these rows."""
        values = [one.headline.value for one in self.members]
        return values.index(min(values) if self.headline.name in LOWER_IS_BETTER else max(values))

    def as_dict(self) -> dict[str, Any]:
        """As for ``Evaluation``, with the members beside it."""
        named = {"disagreement": self.disagreement, "agreeing": self.agreeing, "differing": self.differing}
        return {
            **super().as_dict(),
            "members": [
                {"name": name, "metrics": [metric.as_dict() for metric in one.metrics]}
                for name, one in zip(self.names, self.members, strict=True)
            ],
            "mean_of_members": self.mean,
            "best_member": self.names[self.best],
            **{name: None if metric is None else metric.as_dict() for name, metric in named.items()},
        }


def evaluate_ensemble(
    ensemble: Ensemble,
    dataset: Dataset,
    *,
    metrics: Sequence[str] | None = None,
    normalise: bool = False,
    sampling: Sampling | None = None,
    progress: Progress | None = None,
) -> JointEvaluation:
    """Measures soft prompts that answer together, and each of them, all with the same answers.

    Args:
        ensemble: what answers.
        dataset, metrics, normalise, sampling, progress: as for ``evaluation.evaluate.evaluate``; several texts that
            are voted on have no perplexity, which is left out.

    Raises:
        ConfigError: a metric that the task does not have.
        DataError: a row without a target, or with one that is not in the label set.
    """
    labels = ensemble.labels
    names = choose_metrics(metrics, labels=bool(labels), of_one=False)
    require_targets(dataset, ensemble.tasks[0])
    found = ensemble.predict(dataset.examples, sampling=sampling, normalise=normalise, progress=progress)

    def measured(answers: Sequence[Prediction]) -> Evaluation:
        if labels:
            values = label_metrics(labels, dataset, answers, names)
        else:
            by_name = text_metrics(dataset, answers, names)
            values = tuple(by_name[name] for name in names)
        truncated = sum(one.truncated for one in answers)
        return Evaluation(values, tuple(answers), truncated, most_frequent_answer(dataset, answers))

    together = measured(found)
    alone = tuple(measured([one.members[place] for one in found]) for place in range(len(ensemble.tasks)))
    differ = [one.differ for one in found]

    def accuracy_where(differing: bool) -> Metric | None:
        rows = [
            one.text == str(row.target)
            for one, row in zip(found, dataset.examples, strict=True)
            if one.differ == differing
        ]
        return measures.proportion("accuracy", rows) if rows and labels else None

    return JointEvaluation(
        together.metrics,
        together.predictions,
        together.truncated,
        together.most_frequent,
        together.losses,
        ensemble.names,
        alone,
        measures.proportion("disagreement", differ),
        accuracy_where(False),
        accuracy_where(True),
    )
