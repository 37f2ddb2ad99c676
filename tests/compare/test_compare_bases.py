"""Comparisons of several base models: what is checked and timed first, and whose answers are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softprompt.compare.comparison import Comparison
from softprompt.compare.plan import Key
from softprompt.errors import BaseModelError
from softprompt.methods.problem import Learned, Problem
from softprompt.model.frozen import FrozenLM
from tests.compare.made_up import RAN, MadeUp, comparison, plan, run_all, says
from tests.conftest import TOY_TEMPLATE, tiny, toy

pytestmark = pytest.mark.usefixtures("made_up")


def test_base_models_are_timed_before_the_first_cell(tmp_path: Path) -> None:
    loads: list[str] = []

    def load(base: str) -> FrozenLM:
        loads.append(base)
        return tiny({"a": "llama", "b": "gpt2"}[base])

    found = Comparison(plan(bases=("a", "b")), tmp_path, load)
    speeds = found.speeds()
    assert sorted(speeds) == ["a", "b"]
    assert all(speed.row > 0 and speed.plain > 0 for speed in speeds.values())
    assert RAN == []
    assert loads == ["b", "a"]
    found.run(found.todo()[0])
    assert loads == ["b", "a"]


def test_a_base_model_that_cannot_answer_has_no_speed_and_its_cells_tell_why(tmp_path: Path) -> None:
    long = replace(TOY_TEMPLATE, text="many words " * 100 + TOY_TEMPLATE.text)
    found = comparison(tmp_path, template=long)
    assert found.speeds() == {}
    assert "choose a longer window" in found.run(Key("tiny", "lora", 0))["reason"]


def test_base_models_are_checked_before_the_first_cell(tmp_path: Path) -> None:
    def load(base: str) -> FrozenLM:
        if base == "gone":
            raise BaseModelError("There is no such model.")
        return tiny("llama")

    found = Comparison(plan(bases=("tiny", "gone")), tmp_path, load)
    with pytest.raises(BaseModelError):
        found.run(found.todo()[0])
    assert RAN == []
    only = Comparison(plan(bases=("tiny", "gone"), methods=("zero-shot",)), tmp_path, load)
    only.plan = plan(bases=("tiny",), methods=("zero-shot",))
    assert only.run(only.todo()[0])["status"] == "done"


def test_a_base_model_too_large_for_the_machine_is_told_before_the_first_cell(tmp_path: Path) -> None:
    def load(base: str) -> FrozenLM:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory")

    found = Comparison(plan(), tmp_path, load)
    with pytest.raises(BaseModelError, match="does not fit into memory here"):
        found.run(found.todo()[0])


def test_a_base_model_that_is_gone_later_fails_its_cells_only(tmp_path: Path) -> None:
    loads: list[str] = []

    def load(base: str) -> FrozenLM:
        loads.append(base)
        if base == "b" and loads.count("b") > 1:
            raise BaseModelError("It is gone.")
        return tiny("llama")

    found = Comparison(plan(bases=("a", "b"), methods=("zero-shot", "soft-prompt")), tmp_path, load)
    assert [(cell["base"], cell["status"], cell["reason"]) for cell in run_all(found)] == [
        ("a", "done", None),
        ("a", "done", None),
        ("b", "failed", "It is gone."),
        ("b", "failed", "It is gone."),
    ]


BASES = ("org1/tiny", "org2/tiny")

SAID = {"org1/tiny": ["negative"], "org2/tiny": ["positive"]}


@pytest.fixture
def two(made_up: MadeUp) -> Callable[..., Comparison]:
    """A comparison of two base models of one name, which answer differently."""
    models = {"org1/tiny": tiny("llama"), "org2/tiny": tiny("gpt2")}

    def zero_shot(problem: Problem) -> Learned:
        base = next(base for base, lm in models.items() if lm is problem.lm)
        return says(SAID[base])(problem)

    made_up["zero-shot"] = zero_shot

    def open_folder(folder: Path, **options: Any) -> Comparison:
        settings: dict[str, Any] = {"bases": BASES, "methods": ("zero-shot", "soft-prompt")}
        return Comparison(plan(**settings | options), folder, lambda base: models[base])

    return open_folder


def difference(labels: Sequence[str]) -> float:
    """To ``soft-prompt`` of ``made_up``, counted by hand."""
    gold = [example.target for example in toy(30, 3).examples]
    ours = [("negative", "positive", "positive")[i % 3] == target for i, target in enumerate(gold)]
    return float(np.mean([labels[0] == target for target in gold]) - np.mean(ours))


def test_differences_are_of_each_base_models_own_answers(tmp_path: Path, two: Callable[..., Comparison]) -> None:
    found = two(tmp_path)
    run_all(found)
    for base in BASES:
        (cell,) = [cell for cell in found.cells if (cell["base"], cell["method"]) == (base, "zero-shot")]
        assert cell["difference"]["value"] == pytest.approx(difference(SAID[base]))
    assert difference(SAID["org1/tiny"]) != difference(SAID["org2/tiny"])


def as_earlier(folder: Path, *bases: str) -> None:
    """Gives the files the names that earlier releases gave them; of two alike, the last one stays."""
    for base in bases:
        for method in ("zero-shot", "soft-prompt"):
            key = Key(base, method, 0)
            path = folder / "predictions" / f"{key.file_name}.json"
            path.replace(folder / "predictions" / f"tiny.{method}.0.json")


def test_files_of_earlier_releases_are_read(tmp_path: Path, two: Callable[..., Comparison], made_up: MadeUp) -> None:
    run_all(two(tmp_path, bases=("org1/tiny",)))
    as_earlier(tmp_path, "org1/tiny")
    run_all(two(tmp_path))  # another of that name joins
    made_up["lora"] = says(["positive"])
    later = two(tmp_path, methods=("zero-shot", "soft-prompt", "lora"))
    run_all(later)
    found = {(cell["base"], cell["method"]): cell["difference"] for cell in later.cells}
    for base in BASES:
        assert found[base, "zero-shot"]["value"] == pytest.approx(difference(SAID[base]))
        assert found[base, "lora"]["value"] == pytest.approx(difference(["positive"]))


def test_files_of_earlier_releases_that_may_be_anothers_are_not_read(
    tmp_path: Path, two: Callable[..., Comparison], made_up: MadeUp
) -> None:
    run_all(two(tmp_path))
    as_earlier(tmp_path, *BASES)
    made_up["lora"] = says(["positive"])
    later = two(tmp_path, methods=("zero-shot", "soft-prompt", "lora"))
    run_all(later)
    assert {cell["difference"] is None for cell in later.cells} == {True}
