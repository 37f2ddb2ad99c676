"""How long a comparison takes: by what a base model takes for a few rows, then by what finished cells took.

The time to learn is given, but answering is not: few-shot prompts with rows of their own compute hundreds of tokens for
each test row, and many labels or test rows add up.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from softprompt.methods.hard_prompt import CHOICE_ROWS, GROWTH, NEAREST_GROWTH, SHOT_TOKENS
from softprompt.methods.method import Method
from softprompt.methods.registry import METHODS
from softprompt.model.frozen import FrozenLM
from softprompt.tasks.predict import Query, predict
from softprompt.tasks.task import Task

if TYPE_CHECKING:
    from softprompt.compare.plan import Key, Plan

ROWS = 16
"""Test rows that are timed."""
SLOW = 5.0
"""Seconds for a first row above which it is not timed again, though it warms up."""
SHARED_SHOTS = 2.0
"""How many times as long a row takes behind shots that all rows share: they are computed once, but looked at."""
ADAPTERS = 1.5
"""How many times as long a row takes with adapters that stay beside the weights."""
NEUTRAL = 3
"""Inputs without content that calibration asks beside each row whose shots are its own."""


@dataclass(frozen=True)
class Speed:
    """What a base model takes.

    Attributes:
        load: seconds to load and check it.
        row: seconds for a test row among others, by the bare template.
        alone: seconds for one on its own.
        plain: seconds for the plain text that forgetting is measured on.
        tokens: the mean length of a test row, template included.
        window: the most tokens in a sequence.
    """

    load: float
    row: float
    alone: float
    plain: float
    tokens: float
    window: int

    @classmethod
    def of(cls, plan: Plan, lm: FrozenLM, load: float, plain: float) -> Speed:
        """Times some of the plan's test rows, from all over them; ``load`` and ``plain`` are known.

        Raises:
            SoftPromptError: the base model cannot answer them.
        """
        rows = plan.test.examples
        some = rows[:: max(1, len(rows) // ROWS)][:ROWS]
        task = Task(lm, plan.form.replace_soft_prompt(""), plan.verbalizer, 0, lm.window)
        queries = [Query(task, example) for example in some]
        alone = _seconds(lambda: predict(queries[:1]))
        if lm.world.from_first(lambda: alone < SLOW):  # of several processes, the clock of the first counts
            alone = _seconds(lambda: predict(queries[:1]))
        row = _seconds(lambda: predict(queries)) / len(queries)
        requests = [task.label_request(one) if task.words else task.open_request(one, 1) for one in some]
        tokens = statistics.fmean(len(request.ids) for request in requests)
        return cls(load, row, alone, plain, tokens, lm.window)


@dataclass(frozen=True)
class Parts:
    """Seconds of a cell, or of several.

    Attributes:
        learning: the method's own time, all choices included.
        answering: for the test rows.
        rest: for what else is measured, and for loading base models.
    """

    learning: float = 0.0
    answering: float = 0.0
    rest: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.learning + self.answering + self.rest

    def times(self, factor: float) -> Parts:
        """Each of them so many times."""
        return Parts(factor * self.learning, factor * self.answering, factor * self.rest)

    def __add__(self, other: Parts) -> Parts:
        return Parts(self.learning + other.learning, self.answering + other.answering, self.rest + other.rest)


def expected(plan: Plan, method: str, speed: Speed) -> Parts:
    """What a cell takes on a base model of that speed, its whole budget included where a method may use it."""
    if method == "tf-idf":  # the base model has no part in it
        return Parts()
    known = METHODS[method]
    passes = _passes(plan, known, speed)
    rest = len(plan.timed_alone) * speed.alone * passes
    if known.kind == "weights":  # its copy of the base model reads the plain text, too
        rest += speed.plain
    return Parts(_learning(plan, known, speed, passes), len(plan.test.examples) * speed.row * passes, rest)


def _passes(plan: Plan, method: Method, speed: Speed) -> float:
    """How many times as long as by the bare template a test row takes."""
    name = method.calibrates or method.name
    if method.of_several_seeds:
        return plan.seeds
    if name == "few-shot":
        return SHARED_SHOTS
    if name == "few-shot-nearest":
        return 1 + _shot_tokens(speed) / speed.tokens + NEUTRAL * (method.calibrates is not None)
    return ADAPTERS if name == "lora" else 1.0


def _shot_tokens(speed: Speed) -> float:
    """The most tokens of a row's own shots."""
    return max(0.0, min(SHOT_TOKENS, speed.window - speed.tokens))


def _learning(plan: Plan, method: Method, speed: Speed, passes: float) -> float:
    """What a method takes to choose on validation rows, or its budget if it uses all the time that it has."""
    name = method.calibrates or method.name
    if name == "zero-shot" or method.of_several_seeds:
        return 0.0
    if method.kind == "weights":
        return max(plan.budget, speed.load)  # a fresh copy is loaded in any case
    if name == "instruction":
        candidates = len(plan.instructions) if len(plan.instructions) > 1 else 0
    elif name == "few-shot":
        most = min(speed.window / speed.tokens, len(plan.train.examples))
        candidates = _sizes(most, GROWTH) + len(plan.instructions)
    elif name == "few-shot-nearest":
        most = min(NEAREST_GROWTH * _shot_tokens(speed) / speed.tokens, len(plan.train.examples))
        candidates = _sizes(most, NEAREST_GROWTH) + len(plan.instructions)
    else:
        return plan.budget
    rows = min(CHOICE_ROWS, len(plan.validation.examples))
    return min(plan.budget, candidates * rows * speed.row * passes)


def _sizes(most: float, growth: int) -> int:
    """How many numbers of shots are tried: 1, growth, growth² …, as far as ``most``."""
    return 1 + int(math.log2(max(1.0, most)) / math.log2(growth))


class ComparisonTime:
    """What the cells of a plan that are left will take."""

    def __init__(self, plan: Plan, speeds: Mapping[str, Speed], cells: Iterable[Mapping[str, Any]] = ()) -> None:
        """
        Args:
            plan: what is compared.
            speeds: base model → what it takes; a base model without one counts with what learning may take alone.
            cells: those that are finished, as ``Comparison.cells``.
        """
        self._plan, self._speeds = plan, speeds
        self._seen: dict[tuple[str, str], list[float]] = {}
        for cell in cells:
            self.saw(cell)

    def saw(self, cell: Mapping[str, Any]) -> None:
        """Corrects what cells of that method are expected to take by one that is finished."""
        if cell["status"] == "done" and "seconds" in cell:
            self._seen.setdefault((cell["base"], cell["method"]), []).append(cell["seconds"])

    def cell(self, key: Key) -> Parts:
        """What a cell is expected to take: as long as others of its method did on its base model; or else as its
        method did elsewhere, as far as this base model's speed lets one tell; or else by its speed alone."""
        parts = self._by_speed(key.base, key.method)
        if own := self._seen.get((key.base, key.method)):
            return _stretched(parts, statistics.fmean(own))
        factors = [
            statistics.fmean(seconds) / self._by_speed(base, method).total
            for (base, method), seconds in self._seen.items()
            if method == key.method and base in self._speeds and self._by_speed(base, method).total
        ]
        return parts.times(statistics.fmean(factors)) if factors else parts

    def left(self, keys: Sequence[Key], spent: float = 0.0, learned: Collection[Key] = ()) -> Parts:
        """What the cells ``keys`` are expected to take, of the first of which ``spent`` seconds are over.

        A base model is loaded again when its turn comes, but for that of the first cell. Where seeds learn together,
        they do so in the first cell of them: what that takes beyond its own part is theirs, and of cells that have
        ``learned`` the rest alone is left.
        """
        found = Parts()
        for place, key in enumerate(keys):
            parts = self.cell(key)
            if key in learned:
                parts = replace(parts, learning=0.0)
            first = keys[0]
            if place == 0 or (METHODS[key.method].together and (key.base, key.method) == (first.base, first.method)):
                parts, spent = _stretched(parts, max(0.0, parts.total - spent)), max(0.0, spent - parts.total)
            elif key.base != keys[place - 1].base and key.base in self._speeds:
                parts += Parts(rest=self._speeds[key.base].load)
            found += parts
        return found

    def _by_speed(self, base: str, method: str) -> Parts:
        speed = self._speeds.get(base) or Speed(0.0, 0.0, 0.0, 0.0, 1.0, 1)
        return expected(self._plan, method, speed)


def _stretched(parts: Parts, total: float) -> Parts:
    """Parts of that total, in the same proportions."""
    return parts.times(total / parts.total) if parts.total else Parts(rest=total)


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
