"""A comparison of made-up methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from softprompt.compare.comparison import Comparison
from softprompt.compare.plan import Plan
from softprompt.data.example import Example
from softprompt.errors import TrainingError
from softprompt.methods.method import Method
from softprompt.methods.problem import Learned, Problem
from softprompt.methods.registry import METHODS
from softprompt.model.frozen import FrozenLM
from softprompt.tasks.predict import Prediction, Progress
from tests.conftest import TOY_LABELS, TOY_TEMPLATE, tiny, toy

RAN: list[tuple[str, int]] = []

Run = Callable[[Problem], Learned]


def says(labels: Sequence[str], name: str = "", adapted: FrozenLM | None = None) -> Run:
    """A method that answers row ``i`` of any data with ``labels[i]``, again and again."""

    def method(problem: Problem) -> Learned:
        RAN.append((name, problem.seed))

        def answer(examples: Sequence[Example], progress: Progress | None) -> list[Prediction]:
            return [
                Prediction(labels[i % len(labels)], {"negative": -1.0, "positive": -0.5}, None, False)
                for i in range(len(examples))
            ]

        return Learned(answer, 7, 9, {"k": 2}, 0.5, ({"seconds": 1.0, "step": 1, "value": 0.5, "loss": 1.0},), adapted)

    return method


def fails(problem: Problem) -> Learned:
    RAN.append(("fails", problem.seed))
    raise TrainingError("It does not learn.")


def stops(problem: Problem) -> Learned:
    raise KeyboardInterrupt


class MadeUp:
    """What stands in for the methods; all others are not there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._made: dict[str, Method] = {}
        monkeypatch.setattr("softprompt.compare.comparison.METHODS", self._made)
        monkeypatch.setattr("softprompt.compare.plan.METHODS", self._made)

    def __setitem__(self, name: str, run: Run) -> None:
        self.add(replace(METHODS[name], run=run, together=None))

    def add(self, method: Method) -> None:
        self._made[method.name] = method
        for known in [known for known in METHODS if known in self._made]:  # in their order
            self._made[known] = self._made.pop(known)


def plan(**options: Any) -> Plan:
    settings: dict[str, Any] = {
        "task": "toy",
        "train": toy(20, 1),
        "validation": toy(10, 2),
        "test": toy(30, 3),
        "template": TOY_TEMPLATE,
        "verbalizer": TOY_LABELS,
        "bases": ("tiny",),
    }
    return Plan(**settings | options)


def comparison(folder: Path, **options: Any) -> Comparison:
    return Comparison(plan(**options), folder, lambda _: tiny("llama"))


def run_all(found: Comparison) -> list[dict[str, Any]]:
    return [found.run(key) for key in found.todo()]
