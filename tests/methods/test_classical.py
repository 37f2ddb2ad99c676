"""The majority class by counting; TF-IDF and logistic regression against scikit-learn, and arithmetic done apart."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from softprompt.data.example import Dataset, Example
from softprompt.errors import ConfigError, DataError
from softprompt.methods import classical
from softprompt.methods.classical import fit_tf_idf, majority_class, rank, tf_idf
from softprompt.methods.problem import Problem
from softprompt.tasks.predict import Prediction
from softprompt.text.template import Template
from softprompt.text.verbalizer import Verbalizer
from tests.conftest import TOY_LABELS, TOY_TEMPLATE, tiny, toy

THREE = Verbalizer({"good": ("great",), "so so": ("so so",), "bad": ("awful", "bad")})
PAIR = Template("{soft_prompt}{one} and {two}: {target}")
PAIRS = (
    ("a great film", "I laughed", "good"),
    ("a dull film", "I slept", "bad"),
    ("a film", "it was", "so so"),
    ("great acting", "I laughed a lot", "good"),
    ("the worst plot", "I slept , too", "bad"),
    ("some plot", "it was a film", "so so"),
    ("great !", "loved it", "good"),
    ("dull plot", "no ideas", "bad"),
)


def dataset(*rows: tuple[str, str, str]) -> Dataset:
    examples = (Example({"one": one, "two": two}, target, where="pairs.csv:2") for one, two, target in rows)
    return Dataset(tuple(examples), "pairs.csv", "")


def problem(train: Dataset, validation: Dataset, labels: Verbalizer | None = THREE, **options: Any) -> Problem:
    lm = tiny("llama")
    given = {"template": PAIR, "seed": 0, "budget": 600.0, **options}
    return Problem(lm=lm, fresh=lambda: tiny("llama"), verbalizer=labels, train=train, validation=validation, **given)


def by_scikit_learn(
    train: Dataset, rows: Dataset, penalty: float
) -> tuple[list[dict[str, float]], TfidfVectorizer, LogisticRegression]:
    """Probabilities by class, from texts joined by hand."""
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\w+|[^\w\s]+", min_df=2)
    texts = [[f"{e.fields['one']}\n{e.fields['two']}" for e in part.examples] for part in (train, rows)]
    weights = vectorizer.fit_transform(texts[0])
    fitted = LogisticRegression(C=penalty, max_iter=1000).fit(weights, [e.target for e in train.examples])
    found = fitted.predict_proba(vectorizer.transform(texts[1]))
    return [dict(zip(fitted.classes_, row, strict=True)) for row in found.tolist()], vectorizer, fitted


def test_the_majority_class_is_the_most_frequent_label_of_the_training_rows() -> None:
    """Of 5 rows 3 are good and 2 bad; with one more for each of 3 labels, 4, 1 and 3 of 8."""
    train = dataset(*PAIRS[:2], *PAIRS[3:5], PAIRS[6])
    learned = majority_class(problem(train, dataset(*PAIRS)))
    reports: list[tuple[int, int]] = []
    found = learned.answer(dataset(*PAIRS).examples, lambda *report: reports.append(report))
    assert reports == [(8, 8)]
    assert {prediction.text for prediction in found} == {"good"}
    for prediction in found:
        assert prediction.probabilities == pytest.approx({"good": 4 / 8, "so so": 1 / 8, "bad": 3 / 8})
    assert (learned.trainable_parameters, learned.bytes, learned.curve, learned.soft_prompt) == (0, 4, (), None)
    assert learned.validation == 3 / 8  # of the 8 rows there


def test_of_equals_the_first_label_is_the_majority_class() -> None:
    rows = dataset(*PAIRS[1:3], *PAIRS[4:6])  # two bad, two so so
    found = majority_class(problem(rows, rows)).answer(rows.examples, None)
    assert {prediction.text for prediction in found} == {"so so"}
    assert found[0].text == max(found[0].logprobs or {}, key=(found[0].logprobs or {}).__getitem__)


def test_a_label_of_several_bytes_a_letter_is_kept_as_utf_8() -> None:
    rows = Dataset((Example({"one": "a", "two": "b"}, "schön", where="t:1"),), "t", "")
    assert majority_class(problem(rows, rows, Verbalizer.from_labels(["übel", "schön"]))).bytes == 6


def test_the_majority_class_needs_labels() -> None:
    data = dataset(*PAIRS)
    with pytest.raises(ConfigError, match=r"free text; leave out majority-class or give --labels\.$"):
        majority_class(problem(data, data, None))
    with pytest.raises(DataError, match=r"^pairs\.csv:2: expected one of the labels .* found \"nice\""):
        majority_class(problem(dataset(*PAIRS, ("a", "b", "nice")), data))


@pytest.mark.parametrize("labels", [3, 2])
def test_the_probabilities_are_scikit_learns(labels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    words = dict(list(THREE.words.items())[:: 1 if labels == 3 else 2])
    rows = [row for row in PAIRS if row[2] in words]
    train, validation = dataset(*rows), dataset(*rows[:3])
    monkeypatch.setattr(classical, "INVERSE_PENALTIES", (3.0,))
    learned = tf_idf(problem(train, validation, Verbalizer(words)))
    wanted, vectorizer, fitted = by_scikit_learn(train, validation, 3.0)
    reports: list[tuple[int, int]] = []
    found = learned.answer(validation.examples, lambda *report: reports.append(report))
    assert reports == [(3, 3)]
    for prediction, expected in zip(found, wanted, strict=True):
        assert list(prediction.logprobs or {}) == list(words)
        assert prediction.probabilities == pytest.approx(expected, rel=1e-6)
        assert prediction.text == max(expected, key=expected.__getitem__)
        assert (prediction.finish, prediction.truncated) == (None, False)
    terms = len(vectorizer.vocabulary_)
    outputs = 3 if labels == 3 else 1
    assert learned.trainable_parameters == outputs * (terms + 1) == fitted.coef_.size + fitted.intercept_.size
    assert learned.bytes == 4 * (outputs * (terms + 1) + terms) + len("".join(vectorizer.vocabulary_).encode())
    assert learned.chosen == {"C": 3.0}
    assert learned.adapted is None


def test_the_penalty_is_chosen_by_accuracy_and_then_log_loss() -> None:
    train, validation = dataset(*PAIRS), dataset(("great", "I slept", "good"), ("dull", "a film", "bad"))
    scored = []
    for penalty in classical.INVERSE_PENALTIES:
        found, *_ = by_scikit_learn(train, validation, penalty)
        gold = [row[str(e.target)] for row, e in zip(found, validation.examples, strict=True)]
        right = [row[str(e.target)] == max(row.values()) for row, e in zip(found, validation.examples, strict=True)]
        scored.append((sum(right) / 2, sum(map(math.log, gold)) / 2, penalty))
    best = max(scored)
    assert best[2] != classical.INVERSE_PENALTIES[0]  # else the first would do
    learned = tf_idf(problem(train, validation))
    assert learned.chosen == {"C": best[2]}
    assert learned.validation == best[0]


def test_without_time_the_first_penalty_is_taken() -> None:
    told: list[str] = []
    data = dataset(*PAIRS)
    assert tf_idf(problem(data, data, budget=-1.0, notice=told.append)).chosen == {"C": 10.0}
    assert told == ["fitting with C = 10"]


def test_a_label_without_a_training_row_is_improbable_but_possible() -> None:
    """As one row of n + 1, with 8 of them."""
    labels = Verbalizer.from_labels(["good", "never", "so so", "bad"])
    data = dataset(*PAIRS)
    for prediction in tf_idf(problem(data, data, labels)).answer(data.examples, None):
        assert (prediction.probabilities or {})["never"] == pytest.approx(1 / 9)
        assert sum((prediction.probabilities or {}).values()) == pytest.approx(1)


def test_it_learns_what_one_word_decides() -> None:
    test = toy(60, 3)
    learned = tf_idf(problem(toy(80, 1), toy(20, 2), TOY_LABELS, template=TOY_TEMPLATE))
    found = learned.answer(test.examples, None)
    assert all(one.text == example.target for one, example in zip(found, test.examples, strict=True))


def test_texts_without_a_common_term_keep_their_own() -> None:
    assert set(fit_tf_idf(["a b", "b c"], rare=False).vocabulary_) == {"b"}
    assert set(fit_tf_idf(["a b", "b c"], rare=True).vocabulary_) == {"a", "b", "c", "a b", "b c"}
    assert set(fit_tf_idf(["a", "!"], rare=False).vocabulary_) == {"a", "!"}


def test_ranks_of_labels_and_of_free_text() -> None:
    rows = dataset(("a", "b", "good"), ("a", "b", "bad"))
    logprobs = {"good": -0.5, "so so": -2.0, "bad": -1.5}
    found = [Prediction("good", logprobs, None, False)] * 2
    assert rank(problem(rows, rows), rows, found) == (0.5, -1.0)
    text = [Prediction("good", None, "stop", False), Prediction("bad", None, "stop", False)]
    free = problem(rows, rows, None)
    assert rank(free, rows, text) == (free.score(rows, text), 0)


def sentence(error: type[Exception], given: Problem) -> str:
    with pytest.raises(error) as caught:
        tf_idf(given)
    return str(caught.value)


def test_mistakes() -> None:
    data = dataset(*PAIRS)
    assert sentence(ConfigError, problem(data, data, None)) == (
        "TF-IDF needs class labels, but the targets are free text; leave out tf-idf or give --labels."
    )
    assert sentence(DataError, problem(dataset(*PAIRS[:1], *PAIRS[3:4]), data)) == (
        "Expected rows of at least 2 labels to train TF-IDF on, found only 'good'; give rows of another."
    )
    foreign = (
        'pairs.csv:2: expected one of the labels "good", "so so", "bad", found "nice"; correct this row, or give all '
        "labels with --labels."
    )
    nice = dataset(*PAIRS, ("a", "b", "nice"))
    for train, validation in ((nice, data), (data, nice)):
        with pytest.raises(DataError) as error:
            problem(train, validation)
        assert str(error.value) == foreign


@pytest.mark.parametrize("module", ["sklearn.feature_extraction.text", "sklearn.linear_model"])
def test_without_scikit_learn(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    data = dataset(*PAIRS)
    assert sentence(ConfigError, problem(data, data)) == (
        'TF-IDF needs the library scikit-learn, which is not installed; pip install "softprompt[compare]".'
    )
