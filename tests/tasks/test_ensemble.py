"""Joint answers against votes counted and means taken apart."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softprompt.data.example import Example
from softprompt.errors import BaseModelError, ConfigError
from softprompt.model.frozen import FrozenLM
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tasks.ensemble import Ensemble, joint
from softprompt.tasks.predict import Prediction, Query, predict
from softprompt.tasks.task import Task
from tests.conftest import tiny
from tests.servers import soft_prompt

FORM = "{soft_prompt}{input}\nAnswer: {target}"
WORDS = {"good": ("great", "very good"), "bad": ("bad",)}
ROWS = tuple(Example({"input": text}, None) for text in ("a stirring film", "the plot is thin", "dull", "the best"))


def members(lm: FrozenLM, count: int = 3) -> list[SoftPrompt]:
    """Soft prompts of different lengths, templates, words and orders of the labels; the second one answers otherwise
    than the others."""
    forms = (FORM, "Is it good? {soft_prompt}{input} {target}", FORM)
    words = (WORDS, {"bad": ("film",), "good": ("the",)}, WORDS)
    return [soft_prompt(lm, f"seed{i}", forms[i % 3], words[i % 3], length=3 + i, seed=10 + i) for i in range(count)]


def alone(lm: FrozenLM, one: SoftPrompt) -> list[Prediction]:
    task = Task.of(lm, one)
    return [predict([Query(task, row, one.vectors)])[0] for row in ROWS]


def test_the_mean_is_of_what_each_gives_alone_by_label(llama: FrozenLM) -> None:
    several = members(llama)
    found = Ensemble.of(llama, several).predict(ROWS)
    each = [alone(llama, one) for one in several]
    for row, answer in enumerate(found):
        mean = {label: sum((one[row].probabilities or {})[label] for one in each) / 3 for label in WORDS}
        assert answer.probabilities == pytest.approx(mean, abs=1e-5)
        assert answer.text == max(mean, key=mean.__getitem__)
        assert [one.text for one in answer.members] == [one[row].text for one in each]
        assert answer.disagreement == sum(one[row].text != answer.text for one in each) / 3
        assert answer.differ


@given(
    st.lists(st.tuples(*[st.floats(0.01, 1)] * 3), min_size=2, max_size=6),  # members, 3 labels
)
def test_a_majority_is_counted_and_the_mean_decides_among_equals(numbers: list[tuple[float, float, float]]) -> None:
    each = [{label: p / sum(of) for label, p in zip("abc", of, strict=True)} for of in numbers]
    given = [
        Prediction(max(of, key=of.__getitem__), {label: math.log(p) for label, p in of.items()}, None, False)
        for of in each
    ]
    answer = joint(given, "majority")
    votes = Counter(one.text for one in given)
    equals = [label for label, count in votes.items() if count == max(votes.values())]
    means = {label: sum(of[label] for of in each) / len(each) for label in equals}
    assert means[answer.text] == pytest.approx(max(means.values()))
    assert sum((answer.probabilities or {}).values()) == pytest.approx(1)


def text(*answers: str) -> list[Prediction]:
    return [Prediction(answer, None, "stop", False) for answer in answers]


@pytest.mark.parametrize(
    ("answers", "wanted", "disagreement"),
    [
        (("Paris", "London", "paris"), "Paris", 1 / 3),
        (("Rome", "the  end", "The end"), "the  end", 1 / 3),
        (("b", "a"), "b", 1 / 2),  # of equals the earliest
        (("c", "a", "b", "b", "a"), "a", 3 / 5),
    ],
)
def test_texts_are_voted_on_but_for_case_and_blanks(answers: Sequence[str], wanted: str, disagreement: float) -> None:
    found = joint(text(*answers), "majority")
    assert (found.text, found.logprobs, found.finish) == (wanted, None, "stop")
    assert found.disagreement == pytest.approx(disagreement)


def test_a_cut_input_of_one_member_is_told() -> None:
    one, other = text("a", "a")
    assert joint([one, replace(other, truncated=True)], "majority").truncated


def test_free_text_of_several_is_what_most_write(llama: FrozenLM) -> None:
    several = [soft_prompt(llama, f"w{i}", "{soft_prompt}{input} {target}", length=4, seed=i) for i in range(3)]
    found = Ensemble.of(llama, several).predict(ROWS)
    for row, answer in enumerate(found):
        written = [alone(llama, one)[row].text for one in several]
        assert [one.text for one in answer.members] == written
        assert answer.text in written


def refused(lm: FrozenLM, several: Sequence[SoftPrompt], vote: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        Ensemble.of(lm, several, vote)
    return str(caught.value)


def test_what_is_of_no_one_task_is_refused(llama: FrozenLM) -> None:
    first, second, _ = members(llama)
    other = soft_prompt(llama, "grades", FORM, {"1": ("very",), "2": ("no",)}, seed=5)
    nli = soft_prompt(llama, "nli", "{soft_prompt}{premise} {target}", WORDS, seed=6)
    writes = soft_prompt(llama, "writes", FORM, seed=7)
    assert "at least 2" in refused(llama, [first])
    assert "'seed0' twice" in refused(llama, [first, second, first])
    for one, found in ((other, '"1", "2"'), (writes, "free text"), (nli, '"premise"')):
        sentence = refused(llama, [first, one])
        assert found in sentence
        assert f"'{one.name}'" in sentence
        assert sentence.endswith("; name soft prompts of the same task.")
    assert "'median'" in refused(llama, [first, second], "median")
    assert "no mean" in refused(llama, [writes, replace(writes, vectors=torch.ones(2, 32))], "mean")


def test_members_are_of_one_base_model(llama: FrozenLM) -> None:
    foreign = replace(members(tiny("gpt2"))[1], name="foreign")
    with pytest.raises(BaseModelError, match="'foreign'"):
        Ensemble.of(llama, [members(llama)[0], foreign])
