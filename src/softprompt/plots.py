"""Figures in one style, and those of the comparison: score against parameters, time, model size; learning curves.

matplotlib is imported when a figure is made. The same rows give the same bytes: its bundled font, no dates, a fixed
salt for the identifiers in an SVG. Colours are those of Okabe and Ito (2008), which people with any colour vision
tell apart; every mark is named beside it as well.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from softprompt.errors import ConfigError
from softprompt.terminal import amount, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from softprompt.summary import Row

    Panels = Mapping[str, Sequence[Row]]  # a panel's title → what it shows

Boxes = NDArray[np.float64]

PALETTE = ("#D55E00", "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000")
"""The first is the highlight: the soft prompt's."""
INK, GREY, PALE = "#222222", "#8a8a8a", "#e4e4e4"
"""Text; what stays in the background; grid lines."""

_STYLE: Mapping[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.prop_cycle": f"cycler(color={list(PALETTE)})",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "figure.facecolor": "white",
    "font.family": ["DejaVu Sans"],  # comes with matplotlib: the same on every machine
    "font.size": 9.0,
    "grid.color": PALE,
    "grid.linewidth": 0.8,
    "image.cmap": "cividis",
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
    "savefig.dpi": 200,
    "svg.fonttype": "path",
    "svg.hashsalt": "softprompt",
    "text.color": INK,
    "text.hinting": "none",
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 3.0,
    "ytick.major.size": 0.0,
}

_WIDTH = 9.2
"""Width of a figure in inches: as wide as the report's text column."""
_LABEL_SIZE = 8.0
_BESIDE = 9.0
"""A label at most so many points from its mark needs no line to it."""
_LINE, _GAP = 11.0, 16.0
"""In a column of labels: points from one label's middle to the next, and from the panel to the column."""


@contextmanager
def style() -> Iterator[None]:
    """Our style for every figure made or saved inside, whatever the user's own matplotlib settings are.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib.style
    except ImportError as error:
        raise ConfigError(
            'Drawing figures needs the library matplotlib, which is not installed; pip install "softprompt[compare]".'
        ) from error
    with matplotlib.style.context(["default", dict(_STYLE)]):
        yield


def png(figure: Figure) -> bytes:
    """The figure as a PNG of 200 dots an inch; equal figures give equal bytes."""
    return _saved(figure, "png", {"Software": None})


def svg(figure: Figure) -> bytes:
    """The figure as an SVG, its text as outlines; equal figures give equal bytes."""
    return _saved(figure, "svg", {"Date": None, "Creator": None})


def _saved(figure: Figure, form: str, metadata: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format=form, bbox_inches="tight", metadata=metadata)
    return buffer.getvalue()


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


_COLOURED = {  # all but hard prompts: method → (colour, marker)
    "majority-class": (PALETTE[5], "d"),
    "soft-prompt": (PALETTE[0], "o"),
    "soft-prompt-ensemble": (PALETTE[0], "D"),
    "soft-prompt-majority": (PALETTE[0], "p"),
    "prefix": (PALETTE[3], "s"),
    "peft-prompt-tuning": (PALETTE[4], "v"),
    "lora": (PALETTE[2], "^"),
    "full-fine-tuning": (PALETTE[1], "P"),
    "tf-idf": (PALETTE[6], "X"),
}
_HARD = {"zero-shot": "o", "instruction": "s", "few-shot": "^", "few-shot-nearest": "D"}


def _look(method: str) -> _Look:
    plain = method.removesuffix("-calibrated")
    colour, marker = _COLOURED.get(method, (GREY, _HARD.get(plain, "o")))
    strong = method == "soft-prompt"
    hollow = method.endswith(("-calibrated", "-ensemble", "-majority"))
    order = 5 if strong else 4 if method in _COLOURED else 3
    mark = {
        "markersize": 9.0 if strong else 6.0,
        "markerfacecolor": "white" if hollow else colour,
        "markeredgecolor": colour,
        "markeredgewidth": 1.2,
    }
    line = {"color": colour, "linewidth": 2.6 if strong else 1.4 if method in _COLOURED else 0.9, "zorder": order}
    return _Look(marker, mark, line, strong)


def _panels(count: int, names: Iterable[str] = ()) -> tuple[Figure, list[Axes]]:
    """Axes in one column, or two if there are several, each with room at its right for a column of ``names``."""
    from matplotlib.figure import Figure

    columns = 1 if count == 1 else 2
    longest = max((_text_size(name, True)[0] for name in names), default=0.0)
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
    hard = [i for i, row in enumerate(rows) if row.method not in _COLOURED]
    best = max(hard, key=lambda i: y[i], default=None)
    named = [i for i, row in enumerate(rows) if all_of_them or i == best or row.method in _COLOURED]
    scale = 72 / panel.figure.dpi  # pixels → points
    marks = panel.transData.transform(np.column_stack([x, y])) * scale
    low, high = (
        panel.transData.transform(np.column_stack([x, ends]))[:, 1] * scale
        for ends in (np.subtract(y, errors[0]), np.add(y, errors[1]))
    )
    bars = np.column_stack([marks[:, 0] - 1, low, marks[:, 0] + 1, high])
    window = panel.get_window_extent()
    frame = np.array([window.x0, window.y0, window.x1, window.y1]) * scale
    sizes = np.array([_text_size(rows[i].method, _look(rows[i].method).strong) for i in named])
    boxes = _place_labels(marks[named], sizes, np.vstack([_around(marks, 10.0, 10.0), bars]), frame)
    for i, box in zip(named, boxes, strict=True):
        _name(panel, rows[i].method, (x[i], y[i]), box, leader=_gap(box[None], marks[i])[0] > _BESIDE)


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
        fontsize=_LABEL_SIZE,
        fontweight="bold" if look.strong else "normal",
        color=look.line["color"] if look.strong else INK,
        zorder=6,
        annotation_clip=False,
        arrowprops=line if leader else None,
        path_effects=[withStroke(linewidth=2.0, foreground="white", alpha=0.8)],
    )


# --- where labels go: rectangles are float [N, 4], left, bottom, right, top, in points ----------------


def _place_labels(marks: Boxes, sizes: Boxes, taken: Boxes, frame: Boxes) -> Boxes:
    """A rectangle for each label, near its mark, inside ``frame``, over nothing else as far as there is room.

    Each label in turn takes the cheapest of its places, given where the others and the lines to them are; three rounds
    settle it.

    Args:
        marks: float ``[N, 2]``, x and y of each label's mark.
        sizes: float ``[N, 2]``, width and height of each label.
        taken: float ``[M, 4]``, marks and error bars.
        frame: float ``[4]``, the panel.
    """
    placed: dict[int, Boxes] = {}
    for _ in range(3):
        for key, (mark, size) in enumerate(zip(marks, sizes, strict=True)):
            obstacles = [taken]
            for other in placed.keys() - {key}:
                line = _leaders(placed[other][None], marks[other])[0]
                obstacles += [placed[other][None], _around(line[~np.isnan(line[:, 0])], 2.0, 2.0)]
            full = np.vstack(obstacles)
            places = _places(mark, size)
            covered = _overlaps(places, full).sum(axis=1)
            outside = size.prod() - _overlaps(places, frame[None])[:, 0]
            steps = _leaders(places, mark)[:, :, None]
            inside = np.logical_and(steps > full[:, :2], steps < full[:, 2:]).all(axis=3)
            crossed = np.any(inside, axis=1).sum(axis=1)
            cost = _gap(places, mark) + 2 * covered + 4 * outside + 12 * crossed
            placed[key] = places[cost.argmin()]
    return np.array([placed[key] for key in range(len(marks))])


def _places(mark: Boxes, size: Boxes) -> Boxes:
    """Rectangles around a mark, the nearest and rightmost first."""
    middles = []
    for radius in (7.0, 11.0, 16.0, 22.0, 30.0, 40.0, 52.0, 66.0, 82.0, 100.0):
        for degrees in (0, 180, 90, 270, 30, 330, 150, 210, 60, 300, 120, 240, 15, 345, 165, 195, 45, 315, 135, 225):
            across, up = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
            beside = size[0] / 2 if across > 0.1 else -size[0] / 2 if across < -0.1 else 0.0
            middles.append((mark[0] + across * radius + beside, mark[1] + up * (radius + size[1] / 2)))
    return _around(np.array(middles), *size)


def _around(middles: Boxes, width: float, height: float) -> Boxes:
    half = np.array([width, height]) / 2
    return np.hstack([middles - half, middles + half])


def _overlaps(some: Boxes, others: Boxes) -> Boxes:
    """float ``[N, M]``: the area that two rectangles both cover."""
    low = np.maximum(some[:, None, :2], others[None, :, :2])
    high = np.minimum(some[:, None, 2:], others[None, :, 2:])
    area: Boxes = np.clip(high - low, 0, None).prod(axis=-1)
    return area


def _gap(boxes: Boxes, mark: Boxes) -> Boxes:
    """float ``[N]``: from a mark to the nearest place of each rectangle."""
    length: Boxes = np.linalg.norm(np.clip(mark, boxes[:, :2], boxes[:, 2:]) - mark, axis=-1)
    return length


def _leaders(boxes: Boxes, mark: Boxes) -> Boxes:
    """float ``[N, 10, 2]``: places along the line from a mark's edge to each rectangle; NaN where there is no line."""
    ends = np.clip(mark, boxes[:, :2], boxes[:, 2:])
    length = _gap(boxes, mark)[:, None, None]
    shares = np.linspace(0, 1, 10)[None, :, None]
    start = mark + (ends[:, None] - mark) * np.minimum(7.0 / np.maximum(length, 1e-9), 1.0)
    points: Boxes = start + (ends[:, None] - start) * shares * 0.95  # short of the label itself
    return np.where(length > _BESIDE, points, np.nan)


@cache
def _text_size(text: str, bold: bool) -> tuple[float, float]:
    """Width and height of a label in points."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    font = FontProperties(family="DejaVu Sans", size=_LABEL_SIZE, weight="bold" if bold else "normal")
    return TextPath((0, 0), text, prop=font).get_extents().width + 3, _LABEL_SIZE + 2


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
    for (x, y, method), height in zip(order, _apart(heights, _LINE, low, high), strict=True):
        width, size = _text_size(method, _look(method).strong)
        box = np.array([left, height - size / 2, left + width, height + size / 2])
        _name(panel, method, (x, y), box, leader=True)


def _apart(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Rising heights, moved as little as possible (least squares) to be ``gap`` apart and from ``low`` to ``high``.

    This is isotonic regression with bounds; too many heights for the bounds go above ``high``.
    """
    blocks: list[tuple[float, int]] = []  # (mean, size)
    for i, height in enumerate(heights):
        mean, size = height - i * gap, 1
        while blocks and blocks[-1][0] > mean:
            before, count = blocks.pop()
            mean, size = (mean * size + before * count) / (size + count), size + count
        blocks.append((mean, size))
    means = [mean for mean, size in blocks for _ in range(size)]
    ceiling = high - (len(means) - 1) * gap
    return [max(min(mean, ceiling), low) + i * gap for i, mean in enumerate(means)]
