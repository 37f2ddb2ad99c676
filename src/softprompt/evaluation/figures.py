"""How far answers can be trusted, as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from softprompt.drawing.style import GREY, PALETTE, png, style, svg
from softprompt.errors import ConfigError
from softprompt.evaluation.metrics import reliability
from softprompt.files import StrPath, atomic_writer, local_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Answered = tuple[Sequence[float], Sequence[bool]]
"""Confidences, and whether each answer is right."""

FORMS = (".png", ".svg")


def reliability_diagram(name: str, answered: Answered, members: Sequence[Answered] = ()) -> Figure:
    """Accuracy over confidence, in bins, and below how many rows each bin has (Guo et al. 2017, figure 1).

    Args:
        name: what is drawn.
        answered: its answers.
        members: those of an ensemble's members, in the background.

    Raises:
        ConfigError: matplotlib is not installed.
        DataError: as for ``metrics.reliability``.
    """
    with style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4.2, 4.8), layout="constrained")
        top, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        top.plot([0, 1], [0, 1], color=GREY, linewidth=0.9, linestyle="--", label="confidence = accuracy")
        for place, one in enumerate(members):
            bins = reliability(*one)
            label = None if place else "each alone"
            x, y = [each.confidence for each in bins], [each.accuracy for each in bins]
            top.plot(x, y, color=GREY, linewidth=0.8, marker="o", markersize=2.5, alpha=0.7, label=label)
        bins = reliability(*answered)
        x, y = [each.confidence for each in bins], [each.accuracy for each in bins]
        errors = [(each.accuracy * (1 - each.accuracy) / each.n) ** 0.5 for each in bins]
        top.errorbar(x, y, errors, color=PALETTE[0], linewidth=2.0, marker="o", elinewidth=0.8, label=name, zorder=5)
        width = bins[0].high - bins[0].low
        below.bar([each.low + width / 2 for each in bins], [each.n for each in bins], 0.9 * width, color=PALETTE[0])
        top.set_ylabel("accuracy")
        top.set_ylim(-0.03, 1.03)
        top.legend(loc="upper left", fontsize=8)
        below.set_xlabel("confidence: probability of the answer")
        below.set_ylabel("rows")
        below.set_xlim(0, 1)
    return figure


def require_form(path: StrPath) -> Path:
    """The path of a figure's file: ask before long work rather than after it.

    Raises:
        ConfigError: its name does not end as that of a figure that can be written.
    """
    found = local_path(path)
    if found.suffix.lower() not in FORMS:
        raise ConfigError(f"Expected a path that ends with {' or '.join(FORMS)} for the plot, found {path}; give one.")
    return found


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure as its path's ending says (:func:`require_form`); missing folders are made."""
    with atomic_writer(path) as file:
        file.write(svg(figure) if path.suffix.lower() == ".svg" else png(figure))
