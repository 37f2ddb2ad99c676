"""Several soft prompts of one task that answer together (Lester et al. 2021, §6)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from softprompt.data.example import Example
from softprompt.data.wording import listed
from softprompt.errors import ConfigError
from softprompt.model.frozen import FrozenLM
from softprompt.model.prefixes import PrefixOf
from softprompt.model.request import Sampling
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tasks.predict import Prediction, Progress, Query, default_sampling, predict
from softprompt.tasks.task import Task
from softprompt.tasks.votes import chosen_vote
from softprompt.text.template import Template

_TIE = 1e-6
"""The weight of the mean probability beside the votes: it decides among labels of equally many votes."""

_LEAST = 1e-12
"""The least probability that a label has, so that its logarithm is a number."""


@dataclass(frozen=True)
class JointPrediction(Prediction):
    """The answer of several soft prompts to one input.

    ``logprobs`` are of the mean probabilities; with a majority vote of the share of the votes, where the mean
    probability, as a millionth of a vote, decides among equals.

    Attributes:
        members: what each of them answers, in their order.
    """

    members: tuple[Prediction, ...] = ()

    @property
    def disagreement(self) -> float:
        """The share of the members that answer something else, 0 to 1."""
        return sum(_same(one) != _same(self) for one in self.members) / len(self.members)

    @property
    def differ(self) -> bool:
        """Whether not all members give the same answer."""
        return len({_same(one) for one in self.members}) > 1


@dataclass(frozen=True)
class Ensemble:
    """Several soft prompts of one base model that answer one task together, all in shared batches.

    Attributes:
        names: what they are called.
        tasks: template and labels of each.
        soft_prompts: the soft prompts, in the same order.
        vote: ``mean`` of the labels' probabilities, or ``majority``: the label that most of them give, among equals the
            one with the highest mean probability. Free text is always voted on: the answer that most of them give but
            for case and blanks, among equals the one of the earliest.
    """

    names: tuple[str, ...]
    tasks: tuple[Task, ...]
    soft_prompts: tuple[SoftPrompt, ...]
    vote: str

    @classmethod
    def of(cls, lm: FrozenLM, soft_prompts: Sequence[SoftPrompt], vote: str | None = None) -> Ensemble:
        """An ensemble, whose soft prompts need not have the same template, length or order of labels.

        Raises:
            ConfigError: see :func:`require_ensemble`.
            BaseModelError: a soft prompt of another base model.
        """
        chosen = require_ensemble(soft_prompts, vote)
        names = tuple(one.name for one in soft_prompts)
        return cls(names, tuple(Task.of(lm, one) for one in soft_prompts), tuple(soft_prompts), chosen)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels, in the order of the first soft prompt; none for free text."""
        return self.tasks[0].labels

    def predict(
        self,
        examples: Sequence[Example],
        *,
        sampling: Sampling | None = None,
        normalise: bool = False,
        progress: Progress | None = None,
        prefix_of: PrefixOf | None = None,
    ) -> list[JointPrediction]:
        """Answers examples; arguments and errors as for ``tasks.predict.predict``.

        Args:
            sampling: for free text; None: that of the first soft prompt for all of them.
        """
        several = len(self.tasks)
        queries = [
            Query(task, example, one.vectors)
            for example in examples
            for task, one in zip(self.tasks, self.soft_prompts, strict=True)
        ]

        def told(done: int, total: int) -> None:
            if progress is not None:
                progress(done // several, total // several)

        found = predict(
            queries,
            sampling=sampling or default_sampling(self.tasks[0]),
            normalise=normalise,
            progress=told,
            prefix_of=prefix_of,
        )
        return [joint(found[row : row + several], self.vote) for row in range(0, len(found), several)]


def require_ensemble(soft_prompts: Sequence[SoftPrompt], vote: str | None) -> str:
    """Refuses soft prompts that cannot answer together, which needs no base model, and says how they vote.

    Raises:
        ConfigError: fewer than two, one of them twice, other labels or fields than the first has, or a vote that is
            none or that free text does not have.
    """
    if len(soft_prompts) < 2:
        raise ConfigError(
            f"An ensemble needs at least 2 soft prompts, found {len(soft_prompts)}; name more of the same task."
        )
    first = soft_prompts[0]
    seen: list[SoftPrompt] = []
    for one in soft_prompts:
        if any(one.template == other.template and torch.equal(one.vectors, other.vectors) for other in seen):
            raise ConfigError(
                f"Expected each soft prompt of an ensemble once, found that of {one.name!r} twice; leave one out."
            )
        seen.append(one)
        if _labels(one) != _labels(first):
            raise ConfigError(
                f"Expected one label set in an ensemble, found {_kind(first)} for {first.name!r} and {_kind(one)} for "
                f"{one.name!r}; name soft prompts of the same task."
            )
        if _input(one) != _input(first):
            raise ConfigError(
                f"Expected the same input in an ensemble, found {_input(first)} for {first.name!r} and {_input(one)} "
                f"for {one.name!r}; name soft prompts of the same task."
            )
    return chosen_vote(vote, labels=first.verbalizer is not None)


def joint(members: Sequence[Prediction], vote: str) -> JointPrediction:
    """One answer out of several to one input.

    Args:
        members: at least one, all with the same labels, or all without.
        vote: see ``Ensemble.vote``.
    """
    truncated = any(one.truncated for one in members)
    if members[0].logprobs is None:
        answers = [_same(one) for one in members]
        most = Counter(answers).most_common(1)[0][0]  # of equals the one that came first
        chosen = members[answers.index(most)]
        return JointPrediction(chosen.text, None, chosen.finish, truncated, tuple(members))
    together = mean_logprobs([one.logprobs or {} for one in members], vote)
    best = max(together, key=together.__getitem__)
    return JointPrediction(best, together, None, truncated, tuple(members))


def mean_logprobs(members: Sequence[Mapping[str, float]], vote: str) -> dict[str, float]:
    """Label → logarithm of its joint probability, from each member's labels, whose order may differ; the order is that
    of the first. See ``JointPrediction``."""
    mean = {label: sum(math.exp(one[label]) for one in members) / len(members) for label in members[0]}
    if vote == "majority":
        votes = Counter(max(one, key=one.__getitem__) for one in members)
        mean = {label: (votes[label] / len(members) + _TIE * p) / (1 + _TIE) for label, p in mean.items()}
    return {label: math.log(max(p, _LEAST)) for label, p in mean.items()}


def _same(prediction: Prediction) -> str:
    """What makes two answers the same."""
    return prediction.text if prediction.logprobs is not None else " ".join(prediction.text.casefold().split())


def _labels(soft_prompt: SoftPrompt) -> frozenset[str] | None:
    return None if soft_prompt.verbalizer is None else frozenset(soft_prompt.verbalizer)


def _input(soft_prompt: SoftPrompt) -> str:
    fields = f"the fields {listed(sorted(Template(soft_prompt.template).fields))}"
    return fields + " or conversations" * soft_prompt.is_chat


def _kind(soft_prompt: SoftPrompt) -> str:
    return "free text" if soft_prompt.verbalizer is None else f"the labels {listed(tuple(soft_prompt.verbalizer))}"
