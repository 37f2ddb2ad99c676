"""The classical floor, without any language model: the majority class, and word counts with a linear classifier."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from softprompt.data.example import Dataset, Example
from softprompt.errors import ConfigError, DataError, missing_library
from softprompt.evaluation.evaluate import one_answer
from softprompt.methods.problem import Learned, Problem
from softprompt.tasks.predict import Prediction, Progress
from softprompt.tuning.alarms import of_answers
from softprompt.tuning.step import Alarm

INVERSE_PENALTIES = (10.0, 1.0, 100.0, 0.1)
"""Values of scikit-learn's ``C`` in the order in which they are tried: the time may not last for all."""

_TOKEN = r"\w+|[^\w\s]+"  # marks count, too, so that no text that is not blank is without a term


def majority_class(problem: Problem) -> Learned:
    """The most frequent label of the training rows, whatever the input; of equals, the first of the label set.

    Its probabilities are how frequent the labels are there, by Laplace's rule: each counts one row more than it has, so
    that none is impossible.

    Raises:
        ConfigError: the targets are free text.
        DataError: a target is not in the label set.
    """
    labels = problem.labels
    if not labels:
        raise ConfigError(
            "The majority class needs class labels, but the targets are free text; leave out majority-class or give "
            "--labels."
        )
    counts = Counter(str(example.target) for example in problem.train.examples)
    total = counts.total() + len(labels)
    logprobs = {label: math.log((counts[label] + 1) / total) for label in labels}
    found = Prediction(max(labels, key=counts.__getitem__), logprobs, None, False)

    def answer(examples: Sequence[Example], progress: Progress | None) -> list[Prediction]:
        if progress is not None:
            progress(len(examples), len(examples))
        return [found] * len(examples)

    return Learned(
        answer=answer,
        trainable_parameters=0,
        bytes=len(found.text.encode()),
        validation=problem.score(problem.validation, answer(problem.validation.examples, None)),
    )


def tf_idf(problem: Problem) -> Learned:
    """Logistic regression on TF-IDF weights of the input's words and pairs of words, scikit-learn's.

    Terms of a single training row are left out: on sst2, trec6, sick and imdb that was better on validation rows by 0.3
    to 1 points, with a quarter of the vocabulary. ``C`` is chosen on the validation rows: accuracy, then log loss. No
    label may be impossible: one without a training row gets the probability of one row in one more than there are.

    Returns:
        ``trainable_parameters`` are coefficients and intercepts; ``bytes`` are theirs and those of the IDF weights as
        float32, and the UTF-8 text of the vocabulary.

    Raises:
        ConfigError: the targets are free text, or scikit-learn is not installed.
        DataError: the training rows have one label only, or a target is not in the label set.
    """
    if not problem.labels:
        raise ConfigError(
            "TF-IDF needs class labels, but the targets are free text; leave out tf-idf or give --labels."
        )
    targets = [str(example.target) for example in problem.train.examples]
    if len(set(targets)) < 2:
        raise DataError(
            f"Expected rows of at least 2 labels to train TF-IDF on, found only {targets[0]!r}; give rows of another."
        )
    fields = problem.template.fields
    vectorizer = fit_tf_idf([input_text(example, fields) for example in problem.train.examples], rare=False)
    weights = _weights(vectorizer, problem.train.examples, fields)
    tried: list[tuple[tuple[float, float], float, Any]] = []
    for penalty in INVERSE_PENALTIES:
        if tried and problem.seconds_left < 0:
            break
        problem.notice(f"fitting with C = {penalty:g}")
        fitted = _regression(penalty).fit(weights, targets)
        predictions = _predictions(problem, vectorizer, fitted, problem.validation.examples)
        tried.append((rank(problem, problem.validation, predictions), penalty, fitted))
    (value, _), penalty, fitted = max(tried, key=lambda one: one[0])

    def answer(examples: Sequence[Example], progress: Progress | None) -> list[Prediction]:
        found = _predictions(problem, vectorizer, fitted, examples)
        if progress is not None:
            progress(len(examples), len(examples))
        return found

    trained = fitted.coef_.size + fitted.intercept_.size
    vocabulary = sum(len(term.encode()) for term in vectorizer.vocabulary_)
    return Learned(
        answer=answer,
        trainable_parameters=trained,
        bytes=4 * (trained + len(vectorizer.idf_)) + vocabulary,
        chosen={"C": penalty},
        validation=value,
        alarms=_alarms(problem, _predictions(problem, vectorizer, fitted, problem.validation.examples), value),
    )


def _alarms(problem: Problem, predictions: Sequence[Prediction], value: float) -> tuple[Alarm, ...]:
    """Whether the answers to the validation rows, of which ``value`` are right, tell the labels apart."""
    gold = [str(example.target) for example in problem.validation.examples]
    scores = [math.exp((one.logprobs or {})[target]) for one, target in zip(predictions, gold, strict=True)]
    one = one_answer([prediction.text for prediction in predictions], gold)
    return tuple(of_answers(scores, value, gold, {"one_answer": one and one.as_dict()}, who="the regression"))


def input_text(example: Example, fields: Sequence[str]) -> str:
    """All of the input's fields as one text, a line end between them."""
    return "\n".join(example.fields[name] for name in fields)


def fit_tf_idf(texts: Sequence[str], *, rare: bool) -> Any:
    """scikit-learn's ``TfidfVectorizer`` fitted to texts; its rows have length 1, so that products are cosines.

    Args:
        texts: none is blank.
        rare: whether terms of one text only are kept; they are, too, if there are no others.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise _needs_library() from error
    make = partial(TfidfVectorizer, ngram_range=(1, 2), token_pattern=_TOKEN)
    try:
        return make(min_df=1 if rare else 2).fit(texts)
    except ValueError:  # no term is left
        return make().fit(texts)


def rank(problem: Problem, dataset: Dataset, predictions: Sequence[Prediction]) -> tuple[float, float]:
    """What choices are made by, higher is better: the headline metric, then for labels minus the log loss in nats."""
    pairs = zip(predictions, dataset.examples, strict=True)
    gold = [one.logprobs[str(example.target)] for one, example in pairs if one.logprobs is not None]
    return problem.score(dataset, predictions), sum(gold) / len(predictions)


def _weights(vectorizer: Any, examples: Sequence[Example], fields: Sequence[str]) -> Any:
    """TF-IDF weights, sparse ``[N, terms]``."""
    return vectorizer.transform([input_text(example, fields) for example in examples])


def _regression(penalty: float) -> Any:
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise _needs_library() from error
    return LogisticRegression(C=penalty, max_iter=1_000)


def _predictions(problem: Problem, vectorizer: Any, fitted: Any, examples: Sequence[Example]) -> list[Prediction]:
    logits = torch.from_numpy(fitted.decision_function(_weights(vectorizer, examples, problem.template.fields)))
    if logits.ndim == 1:  # two classes: of the second against the first
        logits = torch.stack([torch.zeros_like(logits), logits], dim=1)
    unseen = -math.log(len(problem.train.examples))
    scores = torch.full((len(examples), len(problem.labels)), unseen, dtype=torch.float64)
    scores[:, [problem.labels.index(label) for label in fitted.classes_]] = logits.double().log_softmax(dim=1)
    return [
        Prediction(problem.labels[int(row.argmax())], dict(zip(problem.labels, row.tolist(), strict=True)), None, False)
        for row in scores.log_softmax(dim=1)
    ]


def _needs_library() -> ConfigError:
    return missing_library("TF-IDF", "scikit-learn", "softprompt[compare]")
