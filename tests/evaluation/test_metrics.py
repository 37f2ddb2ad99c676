"""The metrics against scikit-learn, sacrebleu, rouge_score and arithmetic done apart.

Simulations have fixed seeds. Each states the probability that a right implementation (true coverage 95 %) would have
failed under another seed: the binomial tail outside the accepted counts.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import f1_score, matthews_corrcoef

from softprompt.errors import DataError
from softprompt.evaluation.metrics import (
    Metric,
    accuracy,
    bleu,
    exact_match,
    macro_f1,
    mcc,
    paired_bootstrap,
    perplexity,
    rouge_l,
    token_f1,
)

LABELS = ["positive", "negative", "neutral", "never seen"]
WORDS = ["the", "a", "cat", "dog", "sat", "mat,", "blue", "Spice", "is", "near", "river", ".", "!", "it's", "café", "5"]

ReferenceMetric = Callable[[Sequence[str], Sequence[Sequence[str]]], Metric]

label_rows = st.lists(st.tuples(st.sampled_from([*LABELS, "outside"]), st.sampled_from(LABELS[:3])), min_size=1)
sentences = st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)
text_rows = st.lists(st.tuples(sentences, st.lists(sentences, min_size=1, max_size=3)), min_size=1, max_size=8)


def message_of(call: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        call()
    return str(caught.value)


def test_as_dict_holds_json_values_under_fixed_keys() -> None:
    metric = Metric("accuracy", 0.5, 0.25, 0.1, 0.9, 4)
    assert metric.as_dict() == {"metric": "accuracy", "value": 0.5, "stderr": 0.25, "low": 0.1, "high": 0.9, "n": 4}
    assert list(metric.as_dict()) == ["metric", "value", "stderr", "low", "high", "n"]


@pytest.mark.parametrize(
    "metric",
    [
        macro_f1(["a"], ["a"], ["a", "b"]),
        mcc(["a"], ["a"], ["a", "b"]),
        token_f1(["a cat"], [["cat"]]),
        rouge_l(["a cat"], [["cat"]]),
        bleu(["a cat sat on it"], [["a cat sat on me"]]),
        perplexity([3.0], [2]),
    ],
    ids=lambda metric: metric.name,
)
def test_one_row_shows_no_spread(metric: Metric) -> None:
    assert metric.n == 1
    assert all(map(math.isnan, (metric.stderr, metric.low, metric.high)))
    text = json.dumps(metric.as_dict(), allow_nan=False)
    assert json.loads(text) == {
        "metric": metric.name, "value": metric.value, "stderr": None, "low": None, "high": None, "n": 1
    }  # fmt: skip


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (1, 1), (0, 7), (7, 7), (1, 7), (80, 100), (1639, 1821), (0, 10_000)])
def test_accuracy_is_binomial_with_wilson_interval(hits: int, n: int) -> None:
    metric = accuracy(["yes"] * hits + ["no"] * (n - hits), ["yes"] * n)
    # Wilson's ends are where |hits/n - p| is 1.96 standard errors by p itself: the roots of
    # (hits/n - p)² = z² p (1 - p) / n.
    square = 1.959963984540054**2 / n
    low, high = sorted(np.roots([1 + square, -2 * hits / n - square, (hits / n) ** 2]).real)
    assert (metric.name, metric.value, metric.n) == ("accuracy", hits / n, n)
    assert metric.stderr == pytest.approx(math.sqrt(hits * (n - hits) / n**3))
    assert (metric.low, metric.high) == pytest.approx((low, high), abs=1e-9)
    assert 0 <= metric.low <= metric.value <= metric.high <= 1


@pytest.mark.filterwarnings("ignore:A single label was found")  # scikit-learn's own
@settings(deadline=None, max_examples=60)
@given(label_rows)
def test_macro_f1_and_mcc_equal_scikit_learn(rows: list[tuple[str, str]]) -> None:
    predicted, gold = [row[0] for row in rows], [row[1] for row in rows]
    f1, correlation = macro_f1(predicted, gold, LABELS), mcc(predicted, gold, LABELS)
    assert f1.value == pytest.approx(f1_score(gold, predicted, labels=LABELS, average="macro", zero_division=0))
    assert correlation.value == pytest.approx(matthews_corrcoef(gold, predicted), abs=1e-12)
    assert f1.n == correlation.n == len(rows)
    if len(rows) > 1:
        assert 0 <= f1.low <= f1.value <= f1.high <= 1
        assert -1 <= correlation.low <= correlation.value <= correlation.high <= 1


def test_label_that_never_occurs_lowers_macro_f1() -> None:
    rows = ["a", "b", "a", "b"]
    assert macro_f1(rows, rows, ["a", "b"]).value == 1
    assert macro_f1(rows, rows, ["a", "b", "c", "d"]).value == 0.5


def test_mcc_takes_predictions_outside_the_labels_as_one_class() -> None:
    gold = ["a", "b", "a", "b", "a", "b"]
    together = mcc(["a", "b", "a", "b", "?", "?"], gold, ["a", "b"])
    assert mcc(["a", "b", "a", "b", "x", "y"], gold, ["a", "b"]) == together
    assert together.value == pytest.approx(matthews_corrcoef(gold, ["a", "b", "a", "b", "?", "?"]))


def test_bootstrap_of_cells_has_the_spread_of_resampled_rows() -> None:
    rng = np.random.default_rng(1)
    gold = rng.choice(LABELS[:3], size=150, p=[0.6, 0.3, 0.1])
    predicted = np.where(rng.random(150) < 0.7, gold, rng.choice(LABELS[:3], size=150))

    def by_rows(score: Callable[[list[str], list[str]], float]) -> float:
        picks = rng.integers(150, size=(400, 150))
        return float(np.std([score(gold[pick].tolist(), predicted[pick].tolist()) for pick in picks]))

    f1 = by_rows(lambda true, answer: f1_score(true, answer, labels=LABELS[:3], average="macro", zero_division=0))
    correlation = by_rows(matthews_corrcoef)
    # The quotient of two such deviations is 1 with a standard error of sqrt(1/800 + 1/2000) = 0.042 for normal
    # resamples: 20 % is 4.8 of these, a a false-failure probability of 1.6e-6 each.
    assert macro_f1(predicted.tolist(), gold.tolist(), LABELS[:3]).stderr == pytest.approx(f1, rel=0.2)
    assert mcc(predicted.tolist(), gold.tolist(), LABELS[:3]).stderr == pytest.approx(correlation, rel=0.2)


@pytest.mark.parametrize(
    ("predicted", "references", "exact", "f1"),
    [
        ("The Cat.", ["cat"], 1, 1),  # case, article, full stop
        ("  a\tcat \n sat ", ["cat sat!"], 1, 1),  # blanks
        ("the-end", ["the end"], 0, 0),  # punctuation goes first: theend against end
        ("theatre", ["atre"], 0, 0),  # articles are whole words
        ("U.S.", ["us"], 1, 1),
        ("cat sat", ["cat sat on mat"], 0, 2 / 3),  # precision 1, recall 1/2
        ("cat cat dog", ["cat dog dog"], 0, 2 / 3),  # shared: cat once, dog once
        ("cat", ["dog", "a bird", "Cat"], 1, 1),  # best reference
        ("big cat", ["dog", "cat", "small big dog cat"], 0, 2 / 3),  # 2/3 by the second and third
        ("", ["cat"], 0, 0),
        ("cat", [""], 0, 0),
        ("the", ["a"], 1, 1),  # both without words
        ("café", ["cafe"], 0, 0),  # accents count
    ],
)
def test_squad_scores_by_hand(predicted: str, references: list[str], exact: int, f1: float) -> None:
    assert exact_match([predicted], [references]).value == exact
    assert token_f1([predicted], [references]).value == pytest.approx(f1)


def test_exact_match_is_a_proportion() -> None:
    metric = exact_match(["The cat", "dog", "bird", "fish"], [["cat"], ["a dog", "x"], ["fish"], ["fish"]])
    assert metric == Metric("exact_match", *list(vars(accuracy(["y"] * 4, ["y", "y", "n", "y"])).values())[1:])


def test_token_f1_has_the_standard_error_of_a_mean() -> None:
    metric = token_f1(["cat sat", "cat", "dog", "x"], [["cat sat on mat"], ["cat"], ["cat"], ["x"]])
    mean = (2 / 3 + 1 + 0 + 1) / 4
    variance = ((2 / 3 - mean) ** 2 + 2 * (1 - mean) ** 2 + mean**2) / 3
    assert metric.value == pytest.approx(mean)
    assert metric.stderr == pytest.approx(math.sqrt(variance / 4))
    assert metric.low == pytest.approx(mean - 1.959964 * math.sqrt(variance / 4))
    assert (metric.name, metric.high, metric.n) == ("token_f1", 1, 4)  # 2/3 + 0.46 is cut to 1


@settings(deadline=None, max_examples=60)
@given(text_rows)
def test_rouge_l_equals_rouge_score(rows: list[tuple[str, list[str]]]) -> None:
    metric = rouge_l([row[0] for row in rows], [row[1] for row in rows])
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    best = [scorer.score_multi(several, answer)["rougeL"].fmeasure for answer, several in rows]
    assert metric.value == pytest.approx(np.mean(best))
    if len(rows) > 1:
        assert metric.stderr == pytest.approx(np.std(best, ddof=1) / math.sqrt(len(rows)))
        assert 0 <= metric.low <= metric.value <= metric.high <= 1


def test_rouge_l_by_hand() -> None:
    # Longest common subsequence of "a c d" and "a b c d e": 3 words; precision 1, recall 3/5.
    assert rouge_l(["a c d"], [["x", "a b c d e"]]).value == pytest.approx(0.75)
    assert rouge_l(["cats"], [["cat"]]).value == 0  # no stemming


@settings(deadline=None, max_examples=40)
@given(text_rows)
def test_bleu_equals_sacrebleu_with_missing_references_as_none(rows: list[tuple[str, list[str]]]) -> None:
    predicted, references = [row[0] for row in rows], [row[1] for row in rows]
    width = max(map(len, references))
    columns = [[several[i] if i < len(several) else None for several in references] for i in range(width)]
    metric = bleu(predicted, references)
    assert metric.value == pytest.approx(sacrebleu.corpus_bleu(predicted, columns).score, abs=1e-9)  # type: ignore[arg-type]
    if len(rows) > 1:
        assert 0 <= metric.low <= metric.value <= metric.high <= 100 + 1e-9


def noisy_rows(n: int, seed: int) -> tuple[list[str], list[list[str]]]:
    """Sentences of 6 to 15 words, every fifth word replaced, with 1 to 3 references."""
    rng = np.random.default_rng(seed)
    predicted, references = [], []
    for _ in range(n):
        words = rng.choice(WORDS, size=rng.integers(6, 16))
        several = [np.where(rng.random(len(words)) < 0.2, "other", words) for _ in range(rng.integers(1, 4))]
        predicted.append(" ".join(words))
        references.append([" ".join(reference) for reference in several])
    return predicted, references


def test_bleu_has_the_spread_that_sacrebleu_gives_resampled_rows() -> None:
    predicted, references = noisy_rows(80, seed=2)
    rng = np.random.default_rng(3)
    scores = []
    for _ in range(200):
        pick = rng.integers(80, size=80)
        columns = [[references[i][k] if k < len(references[i]) else None for i in pick] for k in range(3)]
        scores.append(sacrebleu.corpus_bleu([predicted[i] for i in pick], columns).score)  # type: ignore[arg-type]
    # The quotient's standard error is sqrt(1/400 + 1/2000) = 0.055: 27 % is 4.9 of these, false failure near 1e-6.
    assert bleu(predicted, references).stderr == pytest.approx(np.std(scores), rel=0.27)


def test_perplexity_by_hand() -> None:
    metric = perplexity([2.0, 3.0, 7.0], [2, 1, 3])
    # Rate 12/6 = 2; residuals -2, 1, 1; standard error of the rate sqrt(3/2 * 6) / 6 = 1/2.
    assert metric.value == pytest.approx(math.e**2)
    assert metric.stderr == pytest.approx(math.e**2 / 2)
    assert metric.low == pytest.approx(math.exp(2 - 1.959964 / 2))
    assert metric.high == pytest.approx(math.exp(2 + 1.959964 / 2), rel=1e-6)
    assert (metric.name, metric.n) == ("perplexity", 3)


def test_perplexity_weighs_tokens_and_not_rows() -> None:
    assert perplexity([10.0, 0.0], [1, 9]).value == pytest.approx(math.e)
    assert perplexity([math.log(8) * 5] * 3, [5, 5, 5]).value == pytest.approx(8)  # uniform over 8 tokens


def test_perplexity_too_large_for_a_float_is_infinite_and_null_in_json() -> None:
    metric = perplexity([800.0, 900.0], [1, 1])
    assert metric.value == math.inf
    assert metric.as_dict()["value"] is None


def test_paired_bootstrap_of_constant_and_single_rows() -> None:
    assert paired_bootstrap([3.0, 5.0, 9.0], [1.0, 3.0, 7.0]) == (2.0, 2.0, 2.0)  # pairs differ alike, rows do not
    mean, low, high = paired_bootstrap([3.0], [1.0])
    assert mean == 2
    assert math.isnan(low)
    assert math.isnan(high)


def test_paired_bootstrap_is_seeded_and_antisymmetric_in_its_mean() -> None:
    rng = np.random.default_rng(4)
    a, b = rng.random(50).tolist(), rng.random(50).tolist()
    first = paired_bootstrap(a, b, draws=2_000)
    assert paired_bootstrap(a, b, draws=2_000) == first
    assert paired_bootstrap(a, b, draws=2_000, seed=1)[1:] != first[1:]
    assert paired_bootstrap(b, a, draws=2_000)[0] == -first[0]
    difference = np.array(a) - np.array(b)
    half = 1.96 * difference.std() / math.sqrt(50)
    # Near the normal interval. A bootstrap end scatters by 2.7 / sqrt(2000) = 6 % of a standard error, so 3 % of the
    # half, and as much again by the bias correction: 25 % is above 5 of these together, false failure below 1e-6.
    assert first[0] == pytest.approx(difference.mean())
    assert first[1:] == pytest.approx((difference.mean() - half, difference.mean() + half), abs=0.25 * half)


def covered(intervals: Sequence[tuple[float, float]], truth: float) -> int:
    return sum(low <= truth <= high for low, high in intervals)


@pytest.mark.slow
@pytest.mark.parametrize(("labels", "n"), [(3, 300), (15, 200)])
def test_bootstrap_intervals_of_macro_f1_and_mcc_cover(labels: int, n: int) -> None:
    """False failure: 300 intervals, 270 to 296 hits accepted, binomial tails 1.3e-4 + 1.7e-4 a metric."""
    names = [f"label {i}" for i in range(labels)]
    joint = 0.7 * np.eye(labels) / labels + 0.3 / labels**2  # gold x predicted
    true, answered, correct = joint.sum(axis=1), joint.sum(axis=0), np.diag(joint)
    f1_truth = float((2 * correct / (true + answered)).mean())
    mcc_truth = float((correct.sum() - true @ answered) / math.sqrt((1 - true @ true) * (1 - answered @ answered)))
    rng = np.random.default_rng(5)
    f1, correlation = [], []
    for _ in range(300):
        gold, predicted = np.divmod(rng.choice(labels**2, size=n, p=joint.ravel()), labels)
        rows = [names[i] for i in predicted], [names[i] for i in gold]
        f1.append(macro_f1(*rows, names))
        correlation.append(mcc(*rows, names))
    assert 270 <= covered([(metric.low, metric.high) for metric in f1], f1_truth) <= 296
    assert 270 <= covered([(metric.low, metric.high) for metric in correlation], mcc_truth) <= 296


@pytest.mark.slow
def test_bootstrap_interval_of_bleu_covers() -> None:
    """The population is 2,000 rows. False failure: 120 intervals, at least 103 hits accepted, binomial tail 3.1e-5."""
    predicted, references = noisy_rows(2_000, seed=6)
    truth = bleu(predicted, references).value
    rng = np.random.default_rng(7)
    metrics = []
    for _ in range(120):
        pick = rng.integers(2_000, size=60)
        metrics.append(bleu([predicted[i] for i in pick], [references[i] for i in pick]))
    assert covered([(metric.low, metric.high) for metric in metrics], truth) >= 103


def test_interval_of_perplexity_covers_when_tokens_of_a_row_hang_together() -> None:
    """False failure: 500 intervals, 455 to 493 hits accepted, binomial tails 6.7e-5 + 4.2e-6."""
    rng = np.random.default_rng(8)
    intervals = []
    for _ in range(500):
        tokens = rng.integers(1, 40, size=200)
        rates = rng.gamma(4.0, 0.5, size=200)  # mean 2 nats, one rate a row
        metric = perplexity((rates * tokens).tolist(), tokens.tolist())
        intervals.append((metric.low, metric.high))
    assert 455 <= covered(intervals, math.exp(2)) <= 493


@pytest.mark.slow
def test_interval_of_paired_bootstrap_covers() -> None:
    """False failure: 300 intervals, 270 to 296 hits accepted, binomial tails 1.3e-4 + 1.7e-4."""
    rng = np.random.default_rng(9)
    intervals = []
    for _ in range(300):
        both = rng.random(200)  # what makes a row easy or hard for both methods
        a, b = (both < 0.8).astype(float), (both + rng.normal(0, 0.1, size=200) < 0.7).astype(float)
        intervals.append(paired_bootstrap(a.tolist(), b.tolist(), draws=1_000)[1:])
    grid = (np.arange(20_000) + 0.5) / 20_000
    share = np.mean([0.5 * math.erfc(-(0.7 - x) / 0.1 / math.sqrt(2)) for x in grid])  # P(both + noise < 0.7)
    assert 270 <= covered(intervals, 0.8 - float(share)) <= 296


def test_same_rows_give_the_same_numbers() -> None:
    predicted, references = noisy_rows(20, seed=10)
    assert bleu(predicted, references) == bleu(predicted, references)
    labels = ["a", "b"]
    assert macro_f1(["a", "b", "b"], ["a", "b", "a"], labels) == macro_f1(["a", "b", "b"], ["a", "b", "a"], labels)


def test_unequal_lengths_and_no_rows_are_named() -> None:
    assert message_of(lambda: accuracy(["a", "b", "c"], ["a", "b"])) == (
        "accuracy goes row by row, but found 3 predictions and 2 gold labels; pass one of each for every row."
    )
    assert message_of(lambda: mcc(["a"], [], ["a"])) == (
        "mcc goes row by row, but found 1 predictions and 0 gold labels; pass one of each for every row."
    )
    assert message_of(lambda: macro_f1([], [], ["a"])) == (
        "macro_f1 expects at least 1 row, found none; evaluate on data that has rows."
    )
    assert message_of(lambda: perplexity([1.0], [1, 2])) == (
        "perplexity goes row by row, but found 1 log-likelihoods and 2 token counts; pass one of each for every row."
    )
    assert message_of(lambda: paired_bootstrap([1.0], [])) == (
        "paired_bootstrap goes row by row, but found 1 first scores and 0 second scores; "
        "pass one of each for every row."
    )


@pytest.mark.parametrize("metric", [exact_match, token_f1, rouge_l, bleu])
def test_bad_references_are_named(metric: ReferenceMetric) -> None:
    name = getattr(metric, "__name__", "")
    assert message_of(lambda: metric(["x"], [["x"], ["y"]])) == (
        f"{name} goes row by row, but found 1 predictions and 2 lists of references; pass one of each for every row."
    )
    assert message_of(lambda: metric([], [])) == (
        f"{name} expects at least 1 row, found none; evaluate on data that has rows."
    )
    assert message_of(lambda: metric(["x", "y"], [["x"], []])) == (
        f"{name} expects a list of at least 1 reference for every row, found an empty list in row 2 of 2; "
        "give that row's references as a list."
    )
    assert message_of(lambda: metric(["x", "y"], ["x", "y"])) == (
        f"{name} expects a list of at least 1 reference for every row, found one string in row 1 of 2; "
        "give that row's references as a list."
    )


@pytest.mark.parametrize("metric", [macro_f1, mcc])
def test_bad_labels_are_named(metric: Callable[[Sequence[str], Sequence[str], Sequence[str]], Metric]) -> None:
    name = getattr(metric, "__name__", "")
    assert message_of(lambda: metric(["a", "a"], ["a", "z"], ["a", "b"])) == (
        f"{name} expects each gold label to be one of the 2 labels, found 'z' in row 2 of 2; "
        "correct it or add it to the labels."
    )
    assert message_of(lambda: metric(["a"], ["a"], ["b", "a", "a"])) == (
        f"{name} expects at least 1 label and each of them once, found 'a' more than once; pass the label set."
    )
    assert message_of(lambda: metric(["a"], ["a"], [])) == (
        f"{name} expects at least 1 label and each of them once, found none; pass the label set."
    )


def test_bad_numbers_are_named() -> None:
    assert message_of(lambda: perplexity([1.0, math.nan], [1, 1])) == (
        "perplexity expects finite numbers, found nan in row 2 of 2; "
        "look at how that row was scored, or score in float32."
    )
    assert message_of(lambda: paired_bootstrap([1.0, 2.0], [math.inf, 1.0])) == (
        "paired_bootstrap expects finite numbers, found inf in row 1 of 2; "
        "look at how that row was scored, or score in float32."
    )
    assert message_of(lambda: perplexity([1.0, 1.0, 0.0], [1, 1, 0])) == (
        "perplexity expects at least 1 target token in every row, found 0 in row 3 of 3; "
        "leave out rows with an empty target."
    )


def test_label_metrics_need_neither_scikit_learn_nor_the_text_packages() -> None:
    program = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['sklearn', 'scipy', 'sacrebleu', 'rouge_score']))\n"  # importing one raises
        "from softprompt.evaluation.metrics import accuracy, macro_f1, mcc\n"
        "print(accuracy(['a'], ['a']).value, macro_f1(['a'], ['a'], ['a']).value, mcc(['a'], ['a'], ['a']).value)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1.0 1.0 0.0\n", "")
