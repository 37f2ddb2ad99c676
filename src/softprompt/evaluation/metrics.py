"""Metrics without a model: each a value with its number of rows, a standard error and a 95 % interval.

Where the spread has a formula it is used: Wilson's interval for proportions, the standard error of a mean, the delta
method for perplexity. Elsewhere rows are resampled with replacement ``BOOTSTRAP_DRAWS`` times from the fixed seed
``BOOTSTRAP_SEED``, so that the same rows always give the same numbers, and the interval is the bias-corrected
percentile interval (Efron 1981): macro-F1 over many rare labels is lower in resamples than in the data, so that
plain percentiles hold the truth too seldom (the coverage test of 15 labels on 200 rows tells the two apart).

When all rows score alike, the spread that they show is 0 and, except for proportions, the interval has no width: few
rows then prove less than it says. One row shows no spread at all: except for proportions, ``stderr``, ``low`` and
``high`` are NaN there.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softprompt.drawing.words import plain_metric
from softprompt.errors import DataError

BOOTSTRAP_DRAWS = 1_000
BOOTSTRAP_SEED = 0

CALIBRATION_BINS = 15
"""Bins of confidences (Guo et al. 2017)."""

_NORMAL = NormalDist()
_Z = _NORMAL.inv_cdf(0.975)
_ROUNDING = 1e-6  # of probabilities that were added up in float32
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Metric:
    """One measured number.

    Attributes:
        name: ``accuracy``, ``macro_f1``, ``exact_match``, ``token_f1``, ``rouge_l`` (0 to 1), ``mcc`` (-1 to 1),
            ``bleu`` (0 to 100), ``perplexity``, ``log_loss`` or ``calibration_error`` (at least 0, lower is better).
        value: the metric over all rows, in its natural range.
        stderr: standard error of ``value``, in the same unit.
        low: lower end of the 95 % interval, at most ``value``.
        high: upper end of the 95 % interval, at least ``value``.
        n: number of rows.
    """

    name: str
    value: float
    stderr: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, Any]:
        """The metric as JSON values, its name under ``metric``; None where a number is not finite."""
        numbers = {"value": self.value, "stderr": self.stderr, "low": self.low, "high": self.high}
        finite = {key: number if math.isfinite(number) else None for key, number in numbers.items()}
        return {"metric": self.name, **finite, "n": self.n}

    def __str__(self) -> str:
        """``accuracy 0.9072 ± 0.0068 (n = 872)``: the value, its standard error and the number of rows."""
        return plain_metric(self.as_dict())


def accuracy(predicted: Sequence[str], gold: Sequence[str]) -> Metric:
    """Share of rows whose prediction is the gold label, 0 to 1.

    The standard error is binomial, ``sqrt(p (1 - p) / n)``; the interval is Wilson's (1927), which keeps a width
    when every row is right or wrong.

    Raises:
        DataError: no rows, or unequal lengths.
    """
    _check_rows("accuracy", predicted, "predictions", gold, "gold labels")
    return _proportion("accuracy", [answer == label for answer, label in zip(predicted, gold, strict=True)])


def macro_f1(predicted: Sequence[str], gold: Sequence[str], labels: Sequence[str]) -> Metric:
    """Unweighted mean over ``labels`` of each label's F1, 0 to 1; bootstrap.

    A label that occurs neither in ``gold`` nor in ``predicted`` counts as F1 0. A prediction outside ``labels`` is an
    error on its row and has no F1 of its own.

    Raises:
        DataError: no rows, unequal lengths, no labels, a label listed twice, or a gold label outside ``labels``.
    """
    correct, true, answered = _confusion("macro_f1", predicted, gold, labels)
    size = (true + answered)[:, :-1]
    f1 = np.divide(2 * correct[:, :-1], size, out=np.zeros_like(size), where=size > 0)
    return _bootstrapped("macro_f1", f1.mean(axis=1), len(gold))


def mcc(predicted: Sequence[str], gold: Sequence[str], labels: Sequence[str]) -> Metric:
    """Matthews' correlation for any number of classes, ``R_K`` of Gorodkin (2004), -1 to 1; bootstrap.

    It is 0 where it is undefined (one class only, in ``gold`` or in ``predicted``). All predictions outside
    ``labels`` are one further class.

    Raises:
        DataError: no rows, unequal lengths, no labels, a label listed twice, or a gold label outside ``labels``.
    """
    correct, true, answered = _confusion("mcc", predicted, gold, labels)
    n = len(gold)
    covariance = n * correct.sum(axis=1) - (true * answered).sum(axis=1)
    variances = (n**2 - (true**2).sum(axis=1)) * (n**2 - (answered**2).sum(axis=1))
    r_k = np.divide(covariance, np.sqrt(variances), out=np.zeros_like(covariance), where=variances > 0)
    return _bootstrapped("mcc", r_k, n)


def exact_match(predicted: Sequence[str], references: Sequence[Sequence[str]]) -> Metric:
    """Share of rows that equal one of their references after SQuAD's normalisation, 0 to 1.

    The normalisation (Rajpurkar et al. 2016, official script) lowers the case, drops ASCII punctuation and the
    articles a, an, the, and collapses blanks. Standard error and interval as in ``accuracy``.

    Raises:
        DataError: no rows, unequal lengths, or a row whose references are none or not a list of strings.
    """
    _check_references("exact_match", predicted, references)
    rows = zip(predicted, references, strict=True)
    return _proportion("exact_match", [_normalise(answer) in map(_normalise, several) for answer, several in rows])


def token_f1(predicted: Sequence[str], references: Sequence[Sequence[str]]) -> Metric:
    """Mean over rows of SQuAD's F1 of normalised words, best over the row's references, 0 to 1.

    Two texts without words agree (1); one without words scores 0 (official script of SQuAD 2.0). The standard error
    is that of a mean, the interval ``value ± 1.96 stderr`` cut to 0 and 1.

    Raises:
        DataError: no rows, unequal lengths, or a row whose references are none or not a list of strings.
    """
    _check_references("token_f1", predicted, references)
    return _mean("token_f1", _best(_word_f1, predicted, references))


def rouge_l(predicted: Sequence[str], references: Sequence[Sequence[str]]) -> Metric:
    """Mean over rows of ROUGE-L's F-measure (Lin 2004), best over the row's references, 0 to 1.

    Computed by the package ``rouge_score`` without stemming, which only knows ASCII letters and digits. Standard
    error and interval as in ``token_f1``.

    Raises:
        DataError: no rows, unequal lengths, or a row whose references are none or not a list of strings.
    """
    _check_references("rouge_l", predicted, references)
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)

    def f_measure(answer: str, reference: str) -> float:
        return float(scorer.score(reference, answer)["rougeL"].fmeasure)

    return _mean("rouge_l", _best(f_measure, predicted, references))


def bleu(predicted: Sequence[str], references: Sequence[Sequence[str]]) -> Metric:
    """Corpus BLEU (Papineni et al. 2002) as sacrebleu computes it by default, 0 to 100; bootstrap over rows.

    Tokenizer 13a, case kept, exponential smoothing, n-grams up to 4 (Post 2018). Rows may differ in their number of
    references.

    Raises:
        DataError: no rows, unequal lengths, or a row whose references are none or not a list of strings.
    """
    counts = _bleu_counts(predicted, references)
    return _bootstrapped("bleu", _bleu_scores(counts), len(counts))


def paired_bleu(a: Sequence[str], b: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, float, float]:
    """BLEU of ``a`` minus BLEU of ``b`` with its 95 % bootstrap interval, rows resampled in pairs (Koehn 2004).

    Raises:
        DataError: as for :func:`bleu`.
    """
    difference = _bleu_scores(_bleu_counts(a, references)) - _bleu_scores(_bleu_counts(b, references))
    metric = _bootstrapped("difference", difference, len(references))
    return metric.value, metric.low, metric.high


def paired_token_f1(
    a: Sequence[str], b: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, float, float]:
    """SQuAD's F1 of ``a`` minus that of ``b`` with its 95 % bootstrap interval, rows resampled in pairs.

    Raises:
        DataError: as for :func:`token_f1`.
    """
    for answers in (a, b):
        _check_references("token_f1", answers, references)
    first, second = (_best(_word_f1, answers, references).tolist() for answers in (a, b))
    return paired_bootstrap(first, second)


def _bleu_counts(predicted: Sequence[str], references: Sequence[Sequence[str]]) -> NDArray[np.float64]:
    """``[n, 10]``: lengths, matching and all n-grams of each row, which add up to the corpus's."""
    _check_references("bleu", predicted, references)
    from sacrebleu import BLEU

    # effective_order and force keep sacrebleu from warning about scores of single sentences and tokenized text
    scorer = BLEU(effective_order=True, force=True)
    rows = [scorer.sentence_score(answer, several) for answer, several in zip(predicted, references, strict=True)]
    return np.array([[row.sys_len, row.ref_len, *row.counts, *row.totals] for row in rows], dtype=np.float64)


def _bleu_scores(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """The corpus's BLEU, and that of ``BOOTSTRAP_DRAWS`` resamples of its rows, the same for each equal ``n``."""
    from sacrebleu import BLEU

    def score(sums: list[int]) -> float:
        length, reference, grams = sums[0], sums[1], sums[2:]
        half = len(grams) // 2
        return float(BLEU.compute_bleu(grams[:half], grams[half:], length, reference, smooth_method="exp").score)

    samples = [counts.sum(axis=0), *_resampled_sums(counts, BOOTSTRAP_DRAWS, BOOTSTRAP_SEED)]
    return np.array([score(sums.astype(int).tolist()) for sums in samples])


def perplexity(row_nll: Sequence[float], row_tokens: Sequence[int]) -> Metric:
    """``exp(sum of row_nll / sum of row_tokens)``, above 0; lower is better.

    The rate is a ratio estimator over rows, so the tokens of a row may depend on each other: with residuals
    ``e = nll - rate * tokens`` its standard error is ``sqrt(n / (n - 1) * sum e²) / sum of tokens`` (Cochran 1977,
    §2.11). ``stderr`` is that times the perplexity (delta method), the interval ``exp(rate ± 1.96 standard errors)``.

    Args:
        row_nll: negative log-likelihood of each row's target tokens, summed, in nats.
        row_tokens: number of those tokens, at least 1.

    Raises:
        DataError: no rows, unequal lengths, a likelihood that is not finite, or a row without tokens.
    """
    n = len(row_nll)
    _check_rows("perplexity", row_nll, "log-likelihoods", row_tokens, "token counts")
    nll, tokens = _finite("perplexity", row_nll), np.asarray(row_tokens, dtype=np.float64)
    if (tokens < 1).any():
        row = int(np.argmax(tokens < 1))
        raise DataError(
            f"perplexity expects at least 1 target token in every row, found {row_tokens[row]} in row {row + 1} "
            f"of {n}; leave out rows with an empty target."
        )
    rate = nll.sum() / tokens.sum()
    if n == 1:
        return _one_row("perplexity", _exp(rate))
    residuals = nll - rate * tokens
    error = math.sqrt(n / (n - 1) * (residuals**2).sum()) / tokens.sum()
    value = _exp(rate)
    return Metric("perplexity", value, float(value * error), _exp(rate - _Z * error), _exp(rate + _Z * error), n)


def log_loss(row_nll: Sequence[float]) -> Metric:
    """Mean negative log-probability of the gold label, in nats, at least 0; lower is better.

    The standard error is that of a mean, the interval ``value ± 1.96 stderr`` cut at 0.

    Args:
        row_nll: negative log-probability of each row's gold label.

    Raises:
        DataError: no rows, or a number that is not finite.
    """
    _check_rows("log_loss", row_nll, "log-probabilities", row_nll, "log-probabilities")
    return _mean("log_loss", _finite("log_loss", row_nll), most=math.inf)


@dataclass(frozen=True)
class Bin:
    """Answers of about the same confidence.

    Attributes:
        low, high: their confidences are above ``low`` and at most ``high``, 0 to 1.
        confidence: the mean of these.
        accuracy: the share of them that is right.
        n: how many they are, at least 1.
    """

    low: float
    high: float
    confidence: float
    accuracy: float
    n: int


def reliability(confidences: Sequence[float], hits: Sequence[bool], *, bins: int = CALIBRATION_BINS) -> tuple[Bin, ...]:
    """What is right of the answers, by their confidence: the bins that hold any, in order (Guo et al. 2017, §2).

    Args:
        confidences: the probability that each answer gives itself, 0 to 1.
        hits: whether it is right.
        bins: into how many parts of equal width 0 to 1 is cut.

    Raises:
        DataError: no rows, unequal lengths, or a confidence outside 0 to 1.
    """
    place, sure = _binned("reliability", confidences, hits, bins)
    right = np.asarray(hits, dtype=np.float64)
    return tuple(
        Bin(i / bins, (i + 1) / bins, float(sure[place == i].mean()), float(right[place == i].mean()), int(n))
        for i, n in enumerate(np.bincount(place, minlength=bins))
        if n
    )


def calibration_error(confidences: Sequence[float], hits: Sequence[bool], *, bins: int = CALIBRATION_BINS) -> Metric:
    """The expected calibration error: the mean over rows of how far accuracy and mean confidence of the row's bin are
    apart, 0 to 1, lower is better (Guo et al. 2017, §2); bootstrap.

    Chance alone keeps it above 0, the more so the fewer rows a bin has: compare it on the same rows only.

    Args:
        confidences, hits, bins: as for :func:`reliability`.

    Raises:
        DataError: as for :func:`reliability`.
    """
    place, sure = _binned("calibration_error", confidences, hits, bins)
    gaps = np.eye(bins)[place] * (np.asarray(hits, dtype=np.float64) - sure)[:, None]
    sums = np.vstack([gaps.sum(axis=0), _resampled_sums(gaps, BOOTSTRAP_DRAWS, BOOTSTRAP_SEED)])
    return _bootstrapped("calibration_error", np.abs(sums).sum(axis=1) / len(sure), len(sure))


def _binned(
    name: str, confidences: Sequence[float], hits: Sequence[bool], bins: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The bin of each answer ``[n]``, and its confidence, float64 ``[n]``."""
    _check_rows(name, confidences, "confidences", hits, "answers")
    sure = _finite(name, confidences)
    outside = (sure < -_ROUNDING) | (sure > 1 + _ROUNDING)
    if outside.any():
        row = int(np.argmax(outside))
        raise DataError(
            f"{name} expects confidences from 0 to 1, found {sure[row]} in row {row + 1} of {len(sure)}; give "
            f"probabilities."
        )
    sure = sure.clip(0, 1)
    return np.ceil(sure * bins).astype(np.int64).clip(1, bins) - 1, sure


def proportion(name: str, hits: Sequence[bool]) -> Metric:
    """The share of rows of which something is true, 0 to 1; standard error and interval as in ``accuracy``.

    Raises:
        DataError: no rows.
    """
    _check_rows(name, hits, "rows", hits, "rows")
    return _proportion(name, hits)


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], *, seed: int = BOOTSTRAP_SEED, draws: int = 10_000
) -> tuple[float, float, float]:
    """Mean of ``a - b`` with its 95 % bootstrap interval, rows resampled in pairs.

    Args:
        a: one score a row by the first method.
        b: one score a row by the second method, the same rows in the same order.
        seed: of the resampling; the same seed gives the same interval.
        draws: number of resamples, at least 1.

    Returns:
        The difference and the lower and upper end of its interval; the ends are NaN for a single row.

    Raises:
        DataError: no rows, unequal lengths, or a score that is not finite.
    """
    n = len(a)
    _check_rows("paired_bootstrap", a, "first scores", b, "second scores")
    difference = _finite("paired_bootstrap", a) - _finite("paired_bootstrap", b)
    means = _resampled_sums(difference[:, None], draws, seed)[:, 0] / n
    metric = _bootstrapped("difference", np.concatenate([[difference.mean()], means]), n)
    return metric.value, metric.low, metric.high


def _check_rows(
    name: str, first: Sequence[object], first_noun: str, second: Sequence[object], second_noun: str
) -> None:
    if len(first) != len(second):
        raise DataError(
            f"{name} goes row by row, but found {len(first)} {first_noun} and {len(second)} {second_noun}; "
            "pass one of each for every row."
        )
    if len(first) == 0:
        raise DataError(f"{name} expects at least 1 row, found none; evaluate on data that has rows.")


def _check_references(name: str, predicted: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    _check_rows(name, predicted, "predictions", references, "lists of references")
    for row, several in enumerate(references, start=1):
        if isinstance(several, str) or len(several) == 0:  # a bare string would be taken for a list of its letters
            found = "one string" if isinstance(several, str) else "an empty list"
            raise DataError(
                f"{name} expects a list of at least 1 reference for every row, found {found} in row {row} "
                f"of {len(references)}; give that row's references as a list."
            )


def _finite(name: str, values: Sequence[float]) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        row = int(np.argmin(np.isfinite(array)))
        raise DataError(
            f"{name} expects finite numbers, found {array[row]} in row {row + 1} of {len(array)}; "
            "look at how that row was scored, or score in float32."
        )
    return array


def _exp(log: float) -> float:
    """``exp`` that overflows to infinity instead of raising."""
    with np.errstate(over="ignore"):
        return float(np.exp(log))


def _one_row(name: str, value: float) -> Metric:
    return Metric(name, value, math.nan, math.nan, math.nan, 1)


def _proportion(name: str, hits: Sequence[bool]) -> Metric:
    n, p = len(hits), sum(hits) / len(hits)
    middle = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    low, high = max(0.0, min(middle - half, p)), min(1.0, max(middle + half, p))  # despite rounding at p = 0 and 1
    return Metric(name, p, math.sqrt(p * (1 - p) / n), low, high, n)


def _mean(name: str, values: NDArray[np.float64], most: float = 1.0) -> Metric:
    """Mean of values between 0 and ``most``, float64 ``[n]``."""
    n, mean = len(values), float(values.mean())
    if n == 1:
        return _one_row(name, mean)
    stderr = float(values.std(ddof=1)) / math.sqrt(n)
    return Metric(name, mean, stderr, max(0.0, mean - _Z * stderr), min(most, mean + _Z * stderr), n)


def _bootstrapped(name: str, scores: NDArray[np.float64], n: int) -> Metric:
    """``scores[0]`` is the value over all rows, ``scores[1:]`` those of the resamples.

    The quantiles that end the interval are moved by twice the bias: how far, in normal deviates, the value is from the
    median of the resamples. The interval is widened, where needed, to hold the value.
    """
    value = float(scores[0])
    if n == 1:
        return _one_row(name, value)
    draws = scores[1:]
    below = np.count_nonzero(draws < value) + np.count_nonzero(draws == value) / 2
    bias = _NORMAL.inv_cdf((below + 0.5) / (len(draws) + 1))  # the half keeps it finite
    low, high = np.quantile(draws, [_NORMAL.cdf(2 * bias - _Z), _NORMAL.cdf(2 * bias + _Z)])
    return Metric(name, value, float(draws.std()), min(float(low), value), max(float(high), value), n)


def _resampled_sums(rows: NDArray[np.float64], draws: int, seed: int) -> NDArray[np.float64]:
    """Sums ``[draws, S]`` over resamples with replacement of ``rows`` ``[n, S]``, one at a time to save memory."""
    rng = np.random.default_rng(seed)
    n = len(rows)
    return np.stack([np.bincount(rng.integers(n, size=n), minlength=n) @ rows for _ in range(draws)])


def _confusion(
    name: str, predicted: Sequence[str], gold: Sequence[str], labels: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Rows answered rightly, gold rows and answers by label, each float64 ``[1 + BOOTSTRAP_DRAWS, K + 1]``.

    Row 0 counts the data, the others resamples of it; column ``K`` is for answers outside the ``K`` labels.
    Multinomial draws over the occupied cells of the confusion matrix are the counts that resampled rows would give.
    """
    _check_rows(name, predicted, "predictions", gold, "gold labels")
    column = {label: index for index, label in enumerate(labels)}
    if not labels or len(column) != len(labels):
        found = f"{Counter(labels).most_common(1)[0][0]!r} more than once" if labels else "none"
        raise DataError(f"{name} expects at least 1 label and each of them once, found {found}; pass the label set.")
    for row, label in enumerate(gold, start=1):
        if label not in column:
            raise DataError(
                f"{name} expects each gold label to be one of the {len(labels)} labels, found {label!r} in row {row} "
                f"of {len(gold)}; correct it or add it to the labels."
            )
    answers = [column.get(answer, len(labels)) for answer in predicted]
    cells = Counter(zip([column[label] for label in gold], answers, strict=True))
    data = np.array(list(cells.values()), dtype=np.float64)
    draws = np.random.default_rng(BOOTSTRAP_SEED).multinomial(len(gold), data / len(gold), size=BOOTSTRAP_DRAWS)
    counts = np.vstack([data, draws])
    one_hot = np.eye(len(labels) + 1)
    is_gold = one_hot[[cell[0] for cell in cells]]
    is_answer = one_hot[[cell[1] for cell in cells]]
    return counts @ (is_gold * is_answer), counts @ is_gold, counts @ is_answer


def _normalise(text: str) -> str:
    """SQuAD's order matters: punctuation goes before articles, so ``the-end`` keeps its ``theend``."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def _word_f1(answer: str, reference: str) -> float:
    given, wanted = _normalise(answer).split(), _normalise(reference).split()
    if not given or not wanted:
        return float(given == wanted)
    common = (Counter(given) & Counter(wanted)).total()
    return 2 * common / (len(given) + len(wanted))


def _best(
    score: Callable[[str, str], float], predicted: Sequence[str], references: Sequence[Sequence[str]]
) -> NDArray[np.float64]:
    """The best ``score(answer, reference)`` of each row, float64 ``[n]``."""
    rows = zip(predicted, references, strict=True)
    return np.array([max(score(answer, reference) for reference in several) for answer, several in rows])
