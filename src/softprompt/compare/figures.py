"""A comparison's figures: score against parameters, time, model size; learning curves. Every mark is
named beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from softprompt.drawing.labels import BESIDE, LABEL_SIZE, Boxes, apart, around, gap, place_labels, text_size
from softprompt.drawing.style import GREY, INK, style
from softprompt.drawing.words import amount, shortened
from softprompt.methods.registry import METHODS, OURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from softprompt.compare.summary import Row

    Panels = Mapping[str, Sequence[Row]]

_WIDTH = 9.2
"""Width of a figure in inches: as wide as the report's text column."""

_LINE, _GAP = 11.0, 16.0
"""In a column of labels: points from one label's middle to the next, and from the panel to the column."""


def score_against_parameters(panels: Panels) -> Figure | None:
    """Score with its interval against the trained parameters (log), a panel for each task and base model.

    Returns:
        None if no row has both numbers.
    """
    ticks = {10.0**power: amount(10**power) for power in range(13)}
    return _scatter(panels, lambda row: row.trainable_parameters, ticks, 1.0, "0", "trained parameters")


def score_against_time(panels: Panels) -> Figure | None:
    """Score with its interval against the training time (log), a panel for each task and base model.

    Returns:
        None if no row has both numbers.
    """
    ticks = {1.0: "1 s", 10.0: "10 s", 60.0: "1 min", 600.0: "10 min", 3600.0: "1 h", 36000.0: "10 h"}
    ticks |= {360000.0: "100 h"}
    return _scatter(
        panels, lambda row: row.train_seconds, ticks, 1.0, "under 1 s", "training time, all choices included"
    )


def score_against_size(panels: Panels) -> Figure | None:
    """Score with its interval against the base model's parameters (log), a line for each method, a panel for each task.

    This is figure 1 of Lester et al. (2021).

    Returns:
        None if no task has scores on at least two base models of known size.
    """
    shown = {}
    for title, rows in panels.items():
        members = [row for row in rows if row.score and row.base_parameters]
        if len({row.base_parameters for row in members}) > 1:
            shown[title] = sorted(members, key=lambda row: row.base_parameters or 0)
    if not shown:
        return None
    with style():
        figure, axes = _panels(len(shown), {row.method for rows in shown.values() for row in rows})
        for panel, (title, members) in zip(axes, shown.items(), strict=True):
            ends = []
            for method in dict.fromkeys(row.method for row in members):
                several = [row for row in members if row.method == method]
                look = _look(method)
                x = [math.log10(row.base_parameters or 1) for row in several]
                y, errors = _with_errors(several)
                panel.errorbar(x, y, errors, fmt=f"{look.marker}-", **look.line, **look.mark, elinewidth=0.8)
                ends.append((x[-1], y[-1], method))
            sizes = sorted({row.base_parameters for row in members if row.base_parameters})
            panel.set_xticks([math.log10(size) for size in sizes], [amount(size) for size in sizes])
            panel.margins(x=0.08)
            _finish(panel, title, members[0].unit, "parameters of the base model")
            _name_ends(panel, ends)
    return figure


def learning_curves(panels: Panels) -> Figure | None:
    """Validation score over training time, a line for each method and seed, a panel for each task and base model.

    Returns:
        None if no row has a curve.
    """
    shown = {title: found for title, rows in panels.items() if (found := [row for row in rows if row.curves])}
    if not shown:
        return None
    with style():
        figure, axes = _panels(len(shown), {row.method for rows in shown.values() for row in rows})
        for panel, (title, members) in zip(axes, shown.items(), strict=True):
            longest = max(seconds for row in members for curve in row.curves for seconds, _ in curve)
            unit, name = (60.0, "minutes") if longest >= 180 else (1.0, "seconds")
            ends = []
            for row in members:
                look = _look(row.method)
                thin = look.line | {"linewidth": look.line["linewidth"] / len(row.curves) ** 0.5}
                for curve in row.curves:
                    x, y = [seconds / unit for seconds, _ in curve], [row.factor * value for _, value in curve]
                    panel.plot(x, y, **thin, marker="o", markersize=2.5)
                last = max(row.curves, key=lambda curve: curve[-1])[-1]
                ends.append((last[0] / unit, row.factor * last[1], row.method))
            panel.set_xlim(left=0)
            _finish(panel, title, f"validation {members[0].unit}", f"training time, {name}")
            _name_ends(panel, ends)
    return figure


@dataclass(frozen=True)
class _Look:
    """How a method is drawn: ``mark`` and ``line`` are arguments of matplotlib's, ``strong`` is the soft prompt's."""

    marker: str
    mark: Mapping[str, Any]
    line: dict[str, Any]
    strong: bool


def _look(name: str) -> _Look:
    method = METHODS.get(name)
    colour, marker = (GREY, "o") if method is None else (method.colour, method.marker)
    strong = name == OURS
    mark = {
        "markersize": 9.0 if strong else 6.0,
        "markerfacecolor": "white" if method is not None and method.hollow else colour,
        "markeredgecolor": colour,
        "markeredgewidth": 1.2,
    }
    width, order = (2.6, 5) if strong else (1.4, 4) if _is_coloured(name) else (0.9, 3)
    return _Look(marker, mark, {"color": colour, "linewidth": width, "zorder": order}, strong)


def _is_coloured(name: str) -> bool:
    """Whether it stands out: hard prompts, and what is not known, are grey."""
    return name in METHODS and METHODS[name].colour != GREY


def _panels(count: int, names: Iterable[str] = ()) -> tuple[Figure, list[Axes]]:
    """Axes in one column, or two if there are several, each with room at its right for a column of ``names``."""
    from matplotlib.figure import Figure

    columns = 1 if count == 1 else 2
    longest = max((text_size(name, True)[0] for name in names), default=0.0)
    left, right, bottom, top = 0.75, 0.15 + (longest + _GAP) / 72, 0.6, 0.4  # inches around each panel
    width, height = _WIDTH / columns, 4.6 if count == 1 else 3.9
    lines = math.ceil(count / columns)
    figure = Figure(figsize=(_WIDTH, height * lines))
    axes = []
    for index in range(count):
        line, column = divmod(index, columns)
        corner = (column * width + left, (lines - 1 - line) * height + bottom)
        size = (width - left - right, height - bottom - top)
        box = (corner[0] / _WIDTH, corner[1] / (height * lines), size[0] / _WIDTH, size[1] / (height * lines))
        axes.append(figure.add_axes(box))
    return figure, axes


def _finish(panel: Axes, title: str, y_label: str, x_label: str) -> None:
    panel.set_title(shortened(title, 48))
    panel.set_ylabel(y_label)
    panel.set_xlabel(x_label)
    panel.margins(y=0.12)
    panel.set_ylim(panel.get_ylim())  # from here on, positions in points hold


def _with_errors(rows: Sequence[Row]) -> tuple[list[float], list[list[float]]]:
    """Scores as shown, and how far their intervals go below and above; 0 for a row without one."""
    y, below, above = [], [], []
    for row in rows:
        assert row.score is not None
        value, low, high = row.score.value, row.score.low, row.score.high
        y.append(row.factor * value)
        below.append(row.factor * (value - (value if low is None else low)))
        above.append(row.factor * ((value if high is None else high) - value))
    return y, [below, above]


def _scatter(
    panels: Panels,
    number: Callable[[Row], float | None],
    ticks: Mapping[float, str],
    floor: float,
    zero: str,
    x_label: str,
) -> Figure | None:
    """A mark for each row; those with a number under ``floor`` stand side by side in a zone of their own, ``zero``."""
    shown = {}
    for title, rows in panels.items():
        if members := [row for row in rows if row.score and number(row) is not None]:
            shown[title] = members
    if not shown:
        return None
    with style():
        figure, axes = _panels(len(shown))
        for panel, (title, members) in zip(axes, shown.items(), strict=True):
            numbers = [number(row) or 0.0 for row in members]
            x = _on_log_axis(panel, numbers, ticks, floor, zero)
            y, errors = _with_errors(members)
            for i, row in enumerate(members):
                look = _look(row.method)
                error = [[errors[0][i]], [errors[1][i]]]
                panel.errorbar([x[i]], [y[i]], error, fmt=look.marker, **look.mark, **look.line, elinewidth=1.0)
            _finish(panel, title, members[0].unit, x_label)
            _name_marks(panel, members, x, y, errors, all_of_them=len(shown) == 1)
    return figure


def _on_log_axis(
    panel: Axes, numbers: Sequence[float], ticks: Mapping[float, str], floor: float, zero: str
) -> list[float]:
    """Where each number stands on the panel's axis: log10, with a zone of its own for what is under ``floor``."""
    positive = [math.log10(number) for number in numbers if number >= floor]
    places = {math.log10(tick): name for tick, name in ticks.items()}
    low, high = (math.floor(min(positive) + 1e-9), max(positive)) if positive else (0, 0.0)
    high = max(high, low + 1.0) + 0.15  # two ticks at least
    shown = {place: name for place, name in places.items() if low <= place <= high} if positive else {}
    under = [i for i, number in enumerate(numbers) if number < floor]
    left = low - 0.15
    x = [math.log10(number) if number >= floor else 0.0 for number in numbers]
    if under:
        half = 0.13 * max(high - low, 2)
        middle = low - 0.25 - half
        for order, i in enumerate(under):
            x[i] = middle + half * 0.75 * ((2 * order + 1) / len(under) - 1)
        panel.axvspan(middle - half, middle + half, color="#f4f4f4", zorder=0, linewidth=0)
        shown = {middle: zero, **shown}
        left = middle - half
    panel.set_xticks(list(shown), list(shown.values()))
    panel.set_xlim(left, high if positive else low)
    return x


def _name_marks(
    panel: Axes,
    rows: Sequence[Row],
    x: Sequence[float],
    y: Sequence[float],
    errors: Sequence[Sequence[float]],
    *,
    all_of_them: bool,
) -> None:
    """Writes each method's name beside its mark; in a small panel only the best of the hard prompts is named."""
    hard = [i for i, row in enumerate(rows) if not _is_coloured(row.method)]
    best = max(hard, key=lambda i: y[i], default=None)
    named = [i for i, row in enumerate(rows) if all_of_them or i == best or _is_coloured(row.method)]
    scale = 72 / panel.figure.dpi  # pixels → points
    marks = panel.transData.transform(np.column_stack([x, y])) * scale
    low, high = (
        panel.transData.transform(np.column_stack([x, ends]))[:, 1] * scale
        for ends in (np.subtract(y, errors[0]), np.add(y, errors[1]))
    )
    bars = np.column_stack([marks[:, 0] - 1, low, marks[:, 0] + 1, high])
    window = panel.get_window_extent()
    frame = np.array([window.x0, window.y0, window.x1, window.y1]) * scale
    sizes = np.array([text_size(rows[i].method, _look(rows[i].method).strong) for i in named])
    boxes = place_labels(marks[named], sizes, np.vstack([around(marks, 10.0, 10.0), bars]), frame)
    for i, box in zip(named, boxes, strict=True):
        _name(panel, rows[i].method, (x[i], y[i]), box, leader=gap(box[None], marks[i])[0] > BESIDE)


def _name(panel: Axes, method: str, mark: tuple[float, float], box: Boxes, *, leader: bool) -> None:
    """Writes a method's name into a rectangle, with a line to its mark if that is not beside it."""
    from matplotlib.patheffects import withStroke

    look = _look(method)
    at = panel.transData.transform(mark) * 72 / panel.figure.dpi
    size, middle = box[2:] - box[:2], (box[:2] + box[2:]) / 2
    nearest = np.clip((at - box[:2]) / size, 0, 1)
    line = {"arrowstyle": "-", "color": look.line["color"], "linewidth": 0.7, "linestyle": (0, (1.5, 1.5))}
    line |= {"shrinkA": 0, "shrinkB": 4, "relpos": tuple(nearest)}
    panel.annotate(
        method,
        mark,
        tuple(middle - at),
        textcoords="offset points",
        ha="center",
        va="center",
        fontsize=LABEL_SIZE,
        fontweight="bold" if look.strong else "normal",
        color=look.line["color"] if look.strong else INK,
        zorder=6,
        annotation_clip=False,
        arrowprops=line if leader else None,
        path_effects=[withStroke(linewidth=2.0, foreground="white", alpha=0.8)],
    )


def _name_ends(panel: Axes, ends: Sequence[tuple[float, float, str]]) -> None:
    """Writes the names of lines in a column at the right, each as near to its line's end as the others allow.

    Args:
        panel: where the lines are.
        ends: x, y and method.
    """
    scale = 72 / panel.figure.dpi
    window = panel.get_window_extent()
    left, low, high = window.x1 * scale + _GAP, window.y0 * scale, window.y1 * scale
    order = sorted(ends, key=lambda end: end[1])
    heights = [float(panel.transData.transform(end[:2])[1]) * scale for end in order]
    for (x, y, method), height in zip(order, apart(heights, _LINE, low, high), strict=True):
        width, size = text_size(method, _look(method).strong)
        box = np.array([left, height - size / 2, left + width, height + size / 2])
        _name(panel, method, (x, y), box, leader=True)
