"""What the cells of a comparison come to: for each task, base model and method one row with its intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np

from softprompt.drawing.words import short_names
from softprompt.evaluation.evaluate import OneAnswer
from softprompt.methods.registry import MAJORITY, METHODS, OURS

_Z = NormalDist().inv_cdf(0.975)

Cell = Mapping[str, Any]
"""One entry of ``results.json``: a task, method, base model and seed."""

METRICS = {"accuracy": "accuracy", "token_f1": "token F1", "bleu": "BLEU"}
"""Metric → how it is written."""


ROUNDING = 1e-9
"""Numbers nearer to 0 are 0: sums and differences of scores leave less, and a test row counts for more."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; ``low`` and ``high`` are None where there is none. An end that only rounding
    tells from 0 is 0."""

    value: float
    low: float | None
    high: float | None

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            end = getattr(self, name)
            if end is not None and abs(end) < ROUNDING:
                object.__setattr__(self, name, 0.0)

    @property
    def sign(self) -> int:
        """1 or -1 if the interval lies on that side of 0; 0 if it holds 0, be it as an end, or there is none."""
        if self.low is None or self.high is None:
            return 0
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


@dataclass(frozen=True)
class Row:
    """One method on one task and base model, over its seeds. Numbers are means over the seeds that have them.

    Attributes:
        task: the task's name.
        base: the base model's id.
        method: one of ``METHODS``, or another name.
        base_parameters: how many numbers the base model has.
        metric: ``accuracy`` or ``token_f1`` (0 to 1), or ``bleu`` (0 to 100); None if no seed has a score.
        n: test rows, the least of the seeds.
        seeds: how many have a score.
        failed: for each failed seed, which and why.
        one_answer: for each seed that gives one answer to nearly all rows, although their targets differ, which seed
            and what answer.
        alarms: for each alarm of each seed's training which seed, and what was found.
        answer: the most frequent answer of the first seed; None if it is not known.
        validation_rows: on how many rows each seed's training was validated, each number once; empty where it was
            not, or where it is not known.
        score: in the metric's own range.
        stderr: standard error of ``score.value``.
        seed_error: standard error of ``score.value`` from the spread between seeds alone; 0 for one seed.
        macro_f1: 0 to 1, and ``mcc``, -1 to 1, see ``evaluation/metrics.py``; None for free text, and for cells of
            releases that did not measure them.
        difference: score minus the soft prompt's on the same test rows; None for the soft prompt itself.
        trainable_parameters: how many numbers are learned.
        bytes: what is kept for the task, without the base model.
        train_seconds: seconds of learning, all choices included.
        peak_memory_bytes: the most memory in use.
        latency_ms: milliseconds for a single request.
        forgetting: perplexity of plain text after learning over that before; 1 is nothing forgotten.
        curves: for each seed that has one, (seconds, validation score) in order.
    """

    task: str
    base: str
    method: str
    base_parameters: int | None
    metric: str | None
    n: int | None
    seeds: int
    failed: tuple[str, ...]
    one_answer: tuple[str, ...]
    alarms: tuple[tuple[int, str], ...]
    answer: str | None
    validation_rows: tuple[int, ...]
    score: Estimate | None
    stderr: float | None
    seed_error: float
    macro_f1: float | None
    mcc: float | None
    difference: Estimate | None
    trainable_parameters: float | None
    bytes: float | None
    train_seconds: float | None
    peak_memory_bytes: float | None
    latency_ms: float | None
    forgetting: float | None
    curves: tuple[tuple[tuple[float, float], ...], ...]

    @property
    def top(self) -> float:
        """The highest score of the metric."""
        return 100.0 if self.metric == "bleu" else 1.0

    @property
    def factor(self) -> float:
        """What a score is multiplied by to be shown: shares become percent."""
        return 100.0 / self.top

    @property
    def unit(self) -> str:
        """``accuracy, %``, ``token F1, %`` or ``BLEU``."""
        name = METRICS.get(str(self.metric), str(self.metric))
        return name if self.metric == "bleu" else f"{name}, %"


def summary(cells: Sequence[Cell]) -> list[Row]:
    """One row for each task × base model × method: tasks as they come, base models by size, methods as in ``METHODS``.

    **Score.** With one seed the interval is that of its test rows. With S seeds, scores ``v_s``, standard errors
    ``e_s`` and intervals ``[l_s, h_s]``, it is put together by the law of total variance, each side by itself::

        stderr² = mean(e_s²) + d²/S                         d: standard deviation of v_s
        high = v + t sqrt(mean((h_s - v_s)²)/z² + d²/S)     v: mean of v_s; low likewise

    The first term is the chance in which rows were drawn: it does not shrink with S, since all seeds see the same test
    rows. The second is the chance in the seed. ``z`` is the 97.5 % quantile of the normal distribution, ``t`` that of
    Student's with the degrees of freedom of Welch and Satterthwaite, where the first term has no end of them and the
    second S - 1. Ends are cut to the metric's range.

    **Difference.** The method's mean minus the soft prompt's. The first term comes from the cells' paired bootstraps;
    ``d²/S`` of either side is added.

    Assumed: given the rows, seeds are independent and their scores normal; a method with one seed has no chance in it,
    or one that its interval leaves out. What belongs to one seed on one row is in both terms, so that intervals are
    rather too wide. Only where two or three seeds differ by far more than rows explain, they are too narrow: in
    simulations they hold the truth about 9 times of 10 then.
    """
    groups: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell["task"], cell["base"], cell["method"]), []).append(cell)
    rows = {key: _row(*key, members) for key, members in groups.items()}
    for (task, base, method), row in rows.items():
        ours = rows.get((task, base, OURS))
        if ours is not None and row is not ours:
            paired = [cell["difference"] for cell in groups[task, base, method] if cell.get("difference")]
            rows[task, base, method] = replace(row, difference=_difference(row, ours, paired))
    tasks = list(dict.fromkeys(task for task, _, _ in rows))
    sizes = {row.base: row.base_parameters or math.inf for row in rows.values()}
    order = {method: place for place, method in enumerate(METHODS)}

    def place(row: Row) -> tuple[object, ...]:
        return tasks.index(row.task), sizes[row.base], row.base, order.get(row.method, len(order)), row.method

    return sorted(rows.values(), key=place)


def _row(task: str, base: str, method: str, cells: Sequence[Cell]) -> Row:
    """All but the difference."""
    scored = [cell for cell in cells if cell["status"] == "done" and cell.get("value") is not None]
    errors = [cell["stderr"] for cell in scored if cell.get("stderr") is not None]
    count, seed_error = len(scored), 0.0
    if count > 1:
        seed_error = float(np.std([cell["value"] for cell in scored], ddof=1)) / math.sqrt(count)

    def mean(key: str) -> float | None:
        return _mean(cell.get(key) for cell in scored)

    row = Row(
        task=task,
        base=base,
        method=method,
        base_parameters=next((cell["base_parameters"] for cell in cells if cell.get("base_parameters")), None),
        metric=str(scored[0]["metric"]) if scored else None,
        n=min((cell["n"] for cell in scored if cell.get("n")), default=None),
        seeds=count,
        failed=tuple(f"seed {cell['seed']}: {cell.get('reason')}" for cell in cells if cell["status"] == "failed"),
        one_answer=tuple(filter(None, map(_one_answer, scored))),
        alarms=tuple((cell["seed"], alarm["sentence"]) for cell in scored for alarm in cell.get("alarms") or ()),
        answer=next(
            (cell["most_frequent_answer"]["label"] for cell in scored if cell.get("most_frequent_answer")), None
        ),
        validation_rows=tuple(sorted({cell["validation_rows"] for cell in scored if cell.get("validation_rows")})),
        score=None,
        stderr=math.hypot(_rms(errors), seed_error) if errors and len(errors) == count else None,
        seed_error=seed_error if seed_error > ROUNDING else 0.0,
        macro_f1=_mean(_beside(cell, "macro_f1") for cell in scored),
        mcc=_mean(_beside(cell, "mcc") for cell in scored),
        difference=None,
        trainable_parameters=mean("trainable_parameters"),
        bytes=mean("bytes"),
        train_seconds=mean("train_seconds"),
        peak_memory_bytes=mean("peak_memory_bytes"),
        latency_ms=mean("latency_ms"),
        forgetting=_mean((cell.get("forgetting") or {}).get("ratio") for cell in scored),
        curves=tuple(filter(None, map(_curve, scored))),
    )
    value = mean("value")
    return row if value is None else replace(row, score=_estimate(value, scored, (row,), (0.0, row.top)))


def _beside(cell: Cell, name: str) -> float | None:
    """A metric's value beside the headline."""
    return next((found["value"] for found in cell.get("metrics") or () if found["metric"] == name), None)


def _one_answer(cell: Cell) -> str | None:
    """``seed 0: answers 'yes' on 98.2 % of the rows; 62.2 % of the rows are``, where that is telling."""
    found = cell.get("most_frequent_answer")
    if not found or not found.get("one_answer") or cell["method"] == MAJORITY:
        return None
    return f"seed {cell['seed']}: {OneAnswer(found['label'], found['share'], found['gold_share'])}"


def _curve(cell: Cell) -> tuple[tuple[float, float], ...]:
    points = cell.get("curve") or ()
    return tuple((point["seconds"], point["value"]) for point in points if point["value"] is not None)


def _difference(row: Row, ours: Row, paired: Sequence[Cell]) -> Estimate | None:
    if row.score is None or ours.score is None or row.metric != ours.metric:
        return None
    value = row.score.value - ours.score.value
    return _estimate(value, paired, (row, ours), (-row.top, row.top))


def _estimate(value: float, cells: Sequence[Cell], rows: Sequence[Row], ends: tuple[float, float]) -> Estimate:
    """A mean with its interval: the spread over test rows of the cells, that between seeds of the rows."""
    if not cells or any(cell.get(key) is None for cell in cells for key in ("low", "high")):
        return Estimate(value, None, None)
    seeds = [(row.seed_error, row.seeds - 1) for row in rows if row.seed_error > 0]
    if len(cells) == 1 and not seeds and abs(cells[0]["value"] - value) < ROUNDING:
        return Estimate(value, cells[0]["low"], cells[0]["high"])  # its own ends, to the last bit
    below = _half_width(_rms([cell["value"] - cell["low"] for cell in cells]), seeds)
    above = _half_width(_rms([cell["high"] - cell["value"] for cell in cells]), seeds)
    return Estimate(value, max(value - below, ends[0]), min(value + above, ends[1]))


def _half_width(of_rows: float, seeds: Sequence[tuple[float, int]]) -> float:
    """Half a 95 % interval, from that of the test rows and the (standard error, degrees of freedom) of seeds."""
    if not seeds:
        return of_rows
    variance = (of_rows / _Z) ** 2 + sum(error**2 for error, _ in seeds)
    freedom = variance**2 / sum(error**4 / own for error, own in seeds)
    from scipy.stats import t

    return float(t.ppf(0.975, freedom)) * math.sqrt(variance)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(sum(value**2 for value in values) / len(values))


def times(ratio: float) -> str:
    """How many times as high a perplexity is: ``×1.09``, ``×16.03``, ``×3,423``."""
    return f"×{ratio:.2f}" if round(ratio, 2) < 100 else f"×{ratio:,.0f}"


def grouped(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Title → the rows of one task and base model; the base model is named if there are several."""
    bases = {row.base for row in rows}
    names = short_names(bases)
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(f"{row.task} on {names[row.base]}" if len(bases) > 1 else row.task, []).append(row)
    return groups
