"""Hard prompts against the same text written by hand, TF-IDF done apart, and choices planted on validation rows."""

from __future__ import annotations

import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from softprompt.data.example import Dataset, Example
from softprompt.errors import ConfigError, DataError, TemplateError
from softprompt.evaluation.evaluate import evaluate
from softprompt.methods import hard_prompt
from softprompt.methods.hard_prompt import few_shot, few_shot_nearest, instruction, zero_shot
from softprompt.methods.problem import Learned, Problem
from softprompt.methods.registry import METHODS
from softprompt.model.request import Sampling
from softprompt.tasks.predict import Prediction, Query, predict
from softprompt.tasks.task import Task
from softprompt.text.template import Template
from softprompt.text.verbalizer import Verbalizer
from tests.conftest import TOY_LABELS, TOY_TEMPLATE, tiny, toy

LABELLED = Template("{soft_prompt}Text: {input}\nLabel: {target}")
TEST = toy(7, 3)


def problem(**options: Any) -> Problem:
    lm = tiny("llama")
    given: dict[str, Any] = {
        "lm": lm,
        "fresh": lambda: lm,
        "template": TOY_TEMPLATE,
        "verbalizer": TOY_LABELS,
        "train": toy(12, 1),
        "validation": toy(9, 2),
        "seed": 0,
        "budget": 600.0,
    }
    return Problem(**given | options)


def rows(*pairs: tuple[str, str], field: str = "input") -> Dataset:
    numbered = enumerate(pairs, start=1)
    examples = (Example({field: text}, target, where=f"rows.jsonl:{i}") for i, (text, target) in numbered)
    return Dataset(tuple(examples), "rows.jsonl", "")


def by_hand(hard_text: str, test: Dataset, template: Template = TOY_TEMPLATE) -> list[Prediction]:
    """What the base model says with this text in the soft prompt's place."""
    task = Task(tiny("llama"), template, TOY_LABELS, 5, 128).without_soft_prompt(hard_text)
    return list(evaluate(task, None, test).predictions)


def same(found: Sequence[Prediction], wanted: Sequence[Prediction]) -> bool:
    """Equal but for what other rows of a batch change in the last digits."""
    pairs = list(zip(found, wanted, strict=True))
    if [(one.text, one.truncated) for one in found] != [(other.text, other.truncated) for other in wanted]:
        return False
    return all(dict(one.logprobs or {}) == pytest.approx(dict(other.logprobs or {}), abs=1e-5) for one, other in pairs)


class Planted:
    """Validation rows are answered as planted, all other queries by the model.

    Attributes:
        asked: the template's text of each query about a validation row, in order.
    """

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        validation: Dataset,
        worth: Callable[[str], tuple[float, float]],
        seconds: Callable[[str], float] = lambda text: 0.0,
    ) -> None:
        """
        Args:
            patch: undoes it.
            validation: the rows.
            worth: text before the input → share of right answers, and the probability of the answer given.
            seconds: text before the input → what a row costs on a clock of its own.
        """
        self.asked: list[str] = []
        self.now = 0.0
        rows = {id(example): i for i, example in enumerate(validation.examples)}

        def answer(query: Query) -> Prediction:
            place = rows[id(query.example)]
            text = query.task.template.text
            share, sure = worth(text)
            labels = query.task.labels
            right = place < share * len(rows)
            said = next(label for label in labels if (label == query.example.target) == right)
            logprobs = {label: math.log(sure if label == said else 1 - sure) for label in labels}
            self.asked.append(text)
            self.now += seconds(text)
            return Prediction(said, logprobs, None, False)

        def planted(queries: Sequence[Query], **options: Any) -> list[Prediction]:
            if all(id(query.example) in rows for query in queries):
                return [answer(query) for query in queries]
            return predict(queries, **options)

        patch.setattr(hard_prompt, "predict", planted)
        patch.setattr(time, "perf_counter", lambda: self.now)

    @property
    def tried(self) -> list[str]:
        """The texts, each once, in order."""
        return list(dict.fromkeys(self.asked))


def shots_in(text: str) -> int:
    return text.count("\n\n")


# --- nothing, and instructions ------------------------------------------------------------------------------------


def test_zero_shot_is_the_template_with_nothing_in_the_soft_prompts_place() -> None:
    learned = zero_shot(problem())
    assert same(learned.answer(TEST.examples, None), by_hand("", TEST))
    assert (learned.trainable_parameters, learned.bytes, learned.chosen, learned.validation) == (0, 0, {}, None)
    assert learned.adapted is None


def test_an_instruction_and_a_blank_line() -> None:
    learned = instruction(problem(instructions=(" Is it {good}?\n",)))
    assert same(learned.answer(TEST.examples, None), by_hand("Is it {good}?\n\n", TEST))
    assert (learned.bytes, learned.chosen) == (len("Is it {good}?\n\n"), {"instruction": 0})
    assert not same(learned.answer(TEST.examples, None), zero_shot(problem()).answer(TEST.examples, None))


@pytest.mark.parametrize("turn", range(4))
def test_of_several_instructions_the_best_on_validation(turn: int) -> None:
    texts = ["Is it good?", "a dull mess", "one of the best movies of the year", "Answer: positive"]
    validation = toy(30, 2)
    scored = []
    for text in texts:
        task = Task(tiny("llama"), TOY_TEMPLATE, TOY_LABELS, 5, 128).without_soft_prompt(text + "\n\n")
        accuracy, log_loss = evaluate(task, None, validation, metrics=["accuracy", "log_loss"]).metrics
        scored.append((accuracy.value, -log_loss.value, text))
    best_value, _, best = max(scored)
    turned = texts[turn:] + texts[:turn]
    learned = instruction(problem(instructions=tuple(turned), validation=validation))
    assert learned.chosen == {"instruction": turned.index(best)}
    assert learned.validation == pytest.approx(best_value)


def test_equal_instructions_are_told_apart_by_log_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem(instructions=("a film", "the film", "a plot"))
    Planted(monkeypatch, given.validation, lambda text: (1.0, 0.9 if "the film" in text else 0.8))
    assert instruction(given).chosen == {"instruction": 1}
    # of equals in both, the first
    Planted(monkeypatch, given.validation, lambda text: (1.0, 0.9))
    assert instruction(given).chosen == {"instruction": 0}


# --- few-shot -----------------------------------------------------------------------------------------------------

TWO = rows(("a great film", "positive"), ("a dull plot", "negative"))
SHOTS = ("a great film positive\n\n", "a dull plot negative\n\n")


@pytest.mark.parametrize("lead", ["", "Is it good?"])
def test_few_shot_is_the_hard_text_written_by_hand(lead: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem(train=TWO, instructions=(lead,) if lead else ())
    Planted(monkeypatch, given.validation, lambda text: ((shots_in(text) + text.startswith(lead or "-")) / 9, 0.9))
    texts = {lead + "\n\n" * bool(lead) + SHOTS[first] + SHOTS[1 - first] for first in (0, 1)}
    seen = set()
    for seed in range(8):  # the order is drawn
        learned = few_shot(problem(train=TWO, instructions=given.instructions, validation=given.validation, seed=seed))
        assert learned.chosen == {"k": 2, "instruction": 0 if lead else None}
        found = learned.answer(TEST.examples, None)
        (text,) = (text for text in texts if same(found, by_hand(text, TEST)))
        seen.add(text)
    assert seen == texts
    kept = len("a great film") + len("positive") + len("a dull plot") + len("negative")
    assert learned.bytes == kept + (len(lead) + 2 if lead else 0)
    assert learned.trainable_parameters == 0


@pytest.mark.parametrize(("best", "share", "sure"), [(1, 1, 0.9), (4, 1, 0.9), (8, 1, 0.9), (2, 0.5, 0.6)])
def test_k_is_the_best_on_validation(best: int, share: float, sure: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the last case it is as often right as the others, 5 of 9 times, but less sure of what is wrong."""
    given = problem()
    monkeypatch.setattr(tiny("llama"), "window", 1000)
    planted = Planted(
        monkeypatch, given.validation, lambda text: (share, sure) if shots_in(text) == best else (0.5, 0.9)
    )
    learned = few_shot(given)
    assert learned.chosen == {"k": best, "instruction": None}
    assert learned.validation == pytest.approx(1 if share == 1 else 5 / 9)
    assert [shots_in(text) for text in planted.tried] == [1, 2, 4, 8]  # 16 would be more than there are


def test_labels_take_turns_and_the_seed_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny("llama"), "window", 1000)
    train = rows(*((f"good {i}", "positive") for i in range(9)), *((f"bad {i}", "negative") for i in range(3)))

    def tried(seed: int) -> list[list[str]]:
        given = problem(train=train, seed=seed)
        planted = Planted(monkeypatch, given.validation, lambda text: (0.5, 0.9))
        few_shot(given)
        return [text.split("\n\n")[:-1] for text in planted.tried]

    found = tried(0)
    assert [len(shots) for shots in found] == [1, 2, 4, 8]
    by_label = [sorted(Counter(shot.split()[-1] for shot in shots).values()) for shots in found]
    assert by_label == [[1], [1, 1], [2, 2], [3, 5]]
    for fewer, more in pairwise(found):
        assert set(fewer) < set(more)
    assert all(len(set(shots)) == len(shots) for shots in found)
    assert tried(0) == found
    others = [tried(seed) for seed in range(1, 5)]
    assert any(shots[2][0].split()[-1] == shots[2][1].split()[-1] for shots in others)  # the turns are shuffled
    assert (
        len({tuple(shots[3]) for shots in [found, *others]}) == 5
    )  # 12! / 4! / … orders: equal ones would be a defect
    assert {shots[0][0].split()[-1] for shots in [found, *others]} == {"positive", "negative"}


def test_an_instruction_that_helps_the_chosen_k(monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem(instructions=("a plot", "a film", "the film"))
    worths = {"": 0.5, "a plot": 0.3, "a film": 0.9, "the film": 0.6}
    planted = Planted(
        monkeypatch,
        given.validation,
        lambda text: (
            (worths[next((lead for lead in given.instructions if text.startswith(lead)), "")], 0.9)
            if shots_in(text) - any(map(text.startswith, given.instructions)) == 2
            else (0.1, 0.9)
        ),
    )
    assert few_shot(given).chosen == {"k": 2, "instruction": 1}
    assert [next((i for i in given.instructions if text.startswith(i)), "") for text in planted.tried][-3:] == [
        *given.instructions
    ]


def test_without_time_the_smallest_k(monkeypatch: pytest.MonkeyPatch) -> None:
    for method in (few_shot, few_shot_nearest):
        given = problem(budget=-1.0, instructions=("a plot",), began=0.0)
        planted = Planted(monkeypatch, given.validation, lambda text: (shots_in(text) / 9, 0.9))
        assert method(given).chosen == {"k": 1, "instruction": None}
        assert {shots_in(text) for text in planted.tried} == {1}


def test_k_grows_as_long_as_twice_the_last_time_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of 9 rows takes k seconds: 9 + 18 + 36 = 63 of 134 leave 71, not the 72 that k = 8 would take; then the
    instruction, expected to take the 36 of k = 4, is tried."""
    monkeypatch.setattr(tiny("llama"), "window", 1000)
    for budget, last, instructed in ((134, 4, True), (135, 8, False), (63 + 35, 4, False), (9 + 17, 1, True)):
        given = problem(budget=float(budget), began=0.0, instructions=("a plot",))
        planted = Planted(
            monkeypatch,
            given.validation,
            lambda text: (shots_in(text) / 9, 0.9),
            seconds=lambda text: shots_in(text) - text.startswith("a plot\n"),
        )
        chosen = few_shot(given).chosen
        assert max(shots_in(text) for text in planted.tried if not text.startswith("a plot\n")) == last
        assert any(text.startswith("a plot\n") for text in planted.tried) == instructed
        assert chosen == {"k": last, "instruction": 0 if instructed else None}


@pytest.mark.parametrize("labelled", [True, False])
def test_k_grows_as_long_as_no_input_loses_text(labelled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    verbalizer = TOY_LABELS if labelled else None
    train = rows(*[("a film", "positive"), ("a plot", "negative")] * 16)
    given = problem(train=train, verbalizer=verbalizer)
    texts: list[str] = []

    def score(self: Problem, dataset: Dataset, predictions: Sequence[Prediction]) -> float:
        texts.append("")
        assert not any(one.truncated for one in predictions)
        return float(len(texts))  # later ones are better

    monkeypatch.setattr(Problem, "score", score)
    learned = few_shot(given)
    k = learned.chosen["k"]
    assert k > 1
    longer = Template(TOY_TEMPLATE.with_shots([(e.fields, str(e.target)) for e in train.examples[: 2 * k]]).text)
    task = Task(tiny("llama"), longer.replace_soft_prompt(""), verbalizer, 0, 128)
    cut = []
    for example in given.validation.examples:
        try:
            request = task.label_request(example) if labelled else task.open_request(example, 64)
            cut.append(request.truncated)
        except TemplateError:
            cut.append(True)
    assert any(cut)


def test_long_rows_are_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    long = ("film " * 40, "positive")
    given = problem(train=rows(*[long] * 5, ("a film", "positive"), *[("a plot", "negative")] * 2))
    planted = Planted(monkeypatch, given.validation, lambda text: (0.5, 0.9))
    few_shot(given)
    assert [shots_in(text) for text in planted.tried] == [1, 2]
    assert not any("film film" in text for text in planted.tried)
    with pytest.raises(DataError) as error:
        few_shot(problem(train=rows(long)))
    assert str(error.value) == (
        "Expected a training row of at most 32 tokens, a quarter of the window of tiny-llama, as an example for "
        "few-shot, found none; leave out few-shot."
    )


def test_choices_are_made_on_a_seeded_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hard_prompt, "CHOICE_ROWS", 4)
    samples = []
    for seed in (0, 0, 1):
        given = problem(seed=seed)
        seen: list[list[str]] = []

        def kept(queries: Sequence[Query], *, seen: list[list[str]] = seen, **options: Any) -> list[Prediction]:
            seen.append([query.example.where for query in queries])
            return predict(queries, **options)

        monkeypatch.setattr(hard_prompt, "predict", kept)
        few_shot(given)
        asked = [sample for sample in seen if sample]
        assert len(asked) > 1
        assert all(sample == asked[0] for sample in asked)
        samples.append(asked[0])
    assert len(set(samples[0])) == 4
    assert samples[0] == samples[1]
    assert set(samples[0]) != set(samples[2])


# --- nearest shots ------------------------------------------------------------------------------------------------

POOL = rows(
    ("a stirring , funny film", "positive"),
    ("the plot is thin !", "negative"),
    ("one of the best movies", "positive"),
    ("a dull , dull mess", "negative"),
    ("Funny film of the year !", "positive"),
    ("the worst film", "negative"),
)
INPUTS = rows(("a funny film !", "positive"), ("the thin , dull plot", "negative"), ("xyz", "negative"))


def brute_force(text: str, texts: Sequence[str]) -> list[int]:
    """Numbers of ``texts``, nearest first: cosine of count · (1 + ln((1 + n) / (1 + df))) of words, marks and pairs."""

    def terms(text: str) -> list[str]:
        words = re.findall(r"[a-z0-9_]+|[^a-z0-9_ ]+", text.lower())
        return words + [f"{one} {two}" for one, two in pairwise(words)]

    vocabulary = sorted({term for text in texts for term in terms(text)})
    counts = np.array([[terms(one).count(term) for term in vocabulary] for one in [*texts, text]], dtype=float)
    idf = 1 + np.log((1 + len(texts)) / (1 + (counts[:-1] > 0).sum(axis=0)))
    weights = counts * idf
    norms = np.linalg.norm(weights, axis=1)
    norms[norms == 0] = 1
    cosines = (weights / norms[:, None])[:-1] @ (weights / norms[:, None])[-1]
    return sorted(range(len(texts)), key=lambda i: (-round(cosines[i], 9), i))


def test_each_input_has_its_nearest_rows_the_nearest_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny("llama"), "window", 1000)
    given = problem(train=POOL, instructions=("Is it good?",), validation=toy(5, 2))
    planted = Planted(monkeypatch, given.validation, lambda text: (1.0 if shots_in(text) == 4 else 0.2, 0.9))
    learned = few_shot_nearest(given)
    assert [shots_in(text) for text in planted.asked] == [1] * 5 + [4] * 5 + [5] * 5
    assert learned.chosen == {"k": 4, "instruction": None}
    texts = [example.fields["input"] for example in POOL.examples]
    for test in INPUTS.examples:
        nearest = brute_force(test.fields["input"], texts)[:4]
        shots = [POOL.examples[i] for i in reversed(nearest)]
        text = "".join(f"{shot.fields['input']} {shot.target}\n\n" for shot in shots)
        alone = Dataset((test,), "", "")
        assert same(learned.answer([test], None), by_hand(text, alone))
    kept = "".join(texts) + "".join(str(example.target) for example in POOL.examples)
    assert learned.bytes == len(kept)
    # with all of them at once, too, and told after each batch
    monkeypatch.setattr(hard_prompt, "NEAREST_AT_ONCE", 2)
    reports: list[tuple[int, int]] = []
    found = learned.answer(INPUTS.examples, lambda *report: reports.append(report))
    assert reports == [(2, 3), (3, 3)]
    assert same(found, [learned.answer([test], None)[0] for test in INPUTS.examples])


def kept_shots(monkeypatch: pytest.MonkeyPatch, given: Problem) -> list[list[str]]:
    """The shots of each query of the last k."""
    planted = Planted(monkeypatch, given.validation, lambda text: (shots_in(text) / 20, 0.9))
    few_shot_nearest(given)
    return [text.split("\n\n")[:-1] for text in planted.asked[-len(given.validation.examples) :]]


def test_nearest_shots_that_are_too_long_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the 4 nearest, the second does not fit; what is farther does."""
    train = rows(
        ("bad film plot year", "negative"),
        ("bad film plot " + "of " * 30, "negative"),
        ("bad film and the", "negative"),
        ("bad of the and a", "negative"),
    )
    validation = rows(("bad film plot year", "negative"))
    given = problem(train=train, validation=validation)
    order = brute_force("bad film plot year", [example.fields["input"] for example in train.examples])
    assert order[:2] == [0, 2]
    tokens = [len(tiny("llama").tokenizer(f"{e.fields['input']} {e.target}\n\n").input_ids) for e in train.examples]
    monkeypatch.setattr(hard_prompt, "SHOT_TOKENS", sum(tokens) - tokens[1] + 4)
    monkeypatch.setattr(tiny("llama"), "window", 1000)
    wanted = [f"{train.examples[i].fields['input']} negative" for i in reversed(order[:4])]
    assert kept_shots(monkeypatch, given) == [[shot for shot in wanted if "of of" not in shot]]


def test_nearest_shots_never_cost_the_input_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs of all lengths: the farthest shots go first, and an input that fits alone is whole."""
    train = rows(*[("film bad " * 3 + "plot " * (i % 4), "negative") for i in range(8)], ("film", "positive"))
    validation = rows(*[("film bad " * n, "negative") for n in (1, 4, 8, 12, 16, 40)])
    given = problem(train=train, validation=validation)
    kept = kept_shots(monkeypatch, given)
    texts = [example.fields["input"] for example in train.examples]
    for shots, example in zip(kept, validation.examples, strict=True):
        order = brute_force(example.fields["input"], texts)[: len(shots)]
        assert shots == [f"{texts[i]} {train.examples[i].target}" for i in reversed(order)]
    counts = [len(shots) for shots in kept]
    assert counts[0] > 1
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 0
    monkeypatch.undo()
    bare = zero_shot(given).answer(validation.examples, None)
    found = few_shot_nearest(given).answer(validation.examples, None)
    assert [one.truncated for one in found] == [one.truncated for one in bare] == [False] * 5 + [True]


# --- calibration --------------------------------------------------------------------------------------------------

WORDS = Verbalizer({"good": ("very good", "great"), "bad": ("bad",), "so so": ("no ideas",)})


def in_words(data: Dataset) -> Dataset:
    """The same rows with labels of ``WORDS``."""
    named = {"positive": "good", "negative": "bad"}
    return replace(data, examples=tuple(replace(one, target=named[str(one.target)]) for one in data.examples))


def worded() -> Problem:
    return problem(verbalizer=WORDS, train=in_words(toy(12, 1)), validation=in_words(toy(9, 2)))


def calibrated_by_hand(task: Task, example: Example, content_free: Sequence[str]) -> dict[str, float]:
    """From ``FrozenLM.score``'s numbers: p / mean of the content-free p, normalised."""

    def probabilities(example: Example) -> list[float]:
        request = task.label_request(example)
        very_good, great, bad, no_ideas = map(math.exp, task.model.score([request])[0].tolist())
        each = [very_good + great, bad, no_ideas]
        return [value / sum(each) for value in each]

    neutral = [probabilities(Example({"input": text}, None)) for text in content_free]
    means = [sum(column) / len(neutral) for column in zip(*neutral, strict=True)]
    quotients = [p / mean for p, mean in zip(probabilities(example), means, strict=True)]
    return dict(zip(task.labels, (quotient / sum(quotients) for quotient in quotients), strict=True))


@pytest.mark.parametrize("method", [zero_shot, instruction, few_shot, few_shot_nearest])
def test_calibration_by_hand(method: Callable[..., Learned], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny("llama"), "window", 400)
    train = rows(("a great film", "good"), ("a dull mess", "bad"))
    given = problem(
        template=LABELLED, verbalizer=WORDS, train=train, validation=rows(("a", "bad")), instructions=("Well?",)
    )
    words = {"good": "very good", "bad": "bad"}
    shots = [f"Text: {e.fields['input']}\nLabel: {words[str(e.target)]}\n\n" for e in train.examples]
    lead = "Well?\n\n"
    nearest = {"a stirring film": shots[0], "dull !": shots[1]}
    asked: list[Query] = []

    def kept(queries: Sequence[Query], **options: Any) -> list[Prediction]:
        asked.extend(queries)
        return predict(queries, **options)

    monkeypatch.setattr(hard_prompt, "predict", kept)
    learned = method(given, calibrate=True)
    plain = method(given)
    changed = []
    for text, own in nearest.items():
        example = Example({"input": text}, None)
        hard = {
            zero_shot: [""],
            instruction: [lead],
            few_shot: [a + b for a in ("", lead) for b in (*shots, "".join(shots), shots[1] + shots[0])],
            few_shot_nearest: [a + b for a in ("", lead) for b in (own, "".join(sorted(shots, key=own.__eq__)))],
        }[method]
        (found,) = learned.answer([example], None)
        wanted = [calibrated_by_hand(given.task(candidate), example, ["N/A", "", "[MASK]"]) for candidate in hard]
        (expected,) = [one for one in wanted if found.probabilities == pytest.approx(one, rel=1e-4)]
        assert found.text == max(expected, key=expected.__getitem__)
        changed.append(found.probabilities != pytest.approx(plain.answer([example], None)[0].probabilities, rel=1e-2))
    assert all(changed)
    shared = method is not few_shot_nearest
    asked.clear()
    learned.answer([Example({"input": text}, None) for text in nearest], None)
    assert len(asked) == (2 if shared else 8)  # what is the same for all rows is computed once, before


def test_an_empty_input_that_leaves_no_token_is_left_out() -> None:
    """The toy template starts with its field, and the tokenizer has no BOS: there would be nothing to go on from."""
    given = worded()
    example = TEST.examples[0]
    (found,) = zero_shot(given, calibrate=True).answer([example], None)
    assert found.probabilities == pytest.approx(calibrated_by_hand(given.task(), example, ["N/A", "[MASK]"]), rel=1e-4)


def test_the_choice_is_made_on_calibrated_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem(instructions=("a film", "the film"))
    planted = Planted(monkeypatch, given.validation, lambda text: (0.5, 0.9))
    seen: list[Sequence[Prediction]] = []
    calibrated = hard_prompt._calibrated

    def counted(one: Prediction, prior: Sequence[Prediction]) -> Prediction:
        seen.append(prior)
        return calibrated(one, prior)

    monkeypatch.setattr(hard_prompt, "_calibrated", counted)
    instruction(given, calibrate=True)
    assert len(planted.asked) == len(seen) == 18
    assert all(len(prior) == 3 for prior in seen)


# --- free text, mistakes, names -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [zero_shot, instruction, few_shot, few_shot_nearest])
def test_free_text_is_written_with_the_bare_templates_room(method: Callable[..., Learned]) -> None:
    train = rows(("a film", "it was good"), ("a plot", "it was bad"))
    given = problem(train=train, validation=rows(("film", "good")), verbalizer=None, instructions=("Well?",))
    learned = method(given)
    (found,) = learned.answer([Example({"input": "a film"}, None)], None)
    assert found.logprobs is None
    assert found.finish in ("stop", "length")
    texts = {
        zero_shot: [""],
        instruction: ["Well?\n\n"],
    }.get(method, [a + b for a in ("", "Well?\n\n") for b in ("a film it was good\n\n", "a plot it was bad\n\n")])
    if method is few_shot_nearest:
        texts += [a + "a plot it was bad\n\na film it was good\n\n" for a in ("", "Well?\n\n")]
    sampling = Sampling(max_new_tokens=64, stop=("\n",))
    asked = [Query(given.task(text), Example({"input": "a film"}, None)) for text in texts]
    assert found.text in [predict([query], sampling=sampling)[0].text for query in asked]
    with pytest.raises(ConfigError) as error:
        method(given, calibrate=True)
    assert str(error.value) == (
        "Calibration needs class labels, but the targets are free text; leave out calibrated methods or give --labels."
    )


def test_no_instruction() -> None:
    with pytest.raises(ConfigError) as error:
        instruction(problem())
    assert str(error.value) == ("The method instruction needs a hard prompt, but none was given; give --instruction.")


def test_nearest_shots_need_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    with pytest.raises(ConfigError) as error:
        few_shot_nearest(problem())
    assert str(error.value) == (
        'TF-IDF needs the library scikit-learn, which is not installed; pip install "softprompt[compare]".'
    )


def test_the_methods_by_name() -> None:
    given = worded()
    answers = [METHODS[name].run(given).answer(TEST.examples, None) for name in ("zero-shot", "zero-shot-calibrated")]
    assert same(answers[0], zero_shot(given).answer(TEST.examples, None))
    assert same(answers[1], zero_shot(given, calibrate=True).answer(TEST.examples, None))
    assert not same(*answers)


def test_what_is_tried_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    given = problem(train=TWO, instructions=("a plot",), notice=told.append)
    Planted(monkeypatch, given.validation, lambda text: (0.5, 0.9))
    few_shot(given)
    assert told == ["trying k 1", "trying k 2", "trying k 1, instruction 0"]
