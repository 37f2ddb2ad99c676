"""Figures in one style.

matplotlib is imported when a figure is made. The same rows give the same bytes: its bundled font, no dates, a fixed
salt for the identifiers in an SVG. Colours are those of Okabe and Ito (2008), which people with any colour vision
tell apart.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from softprompt.errors import missing_library

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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


@contextmanager
def style() -> Iterator[None]:
    """Our style for every figure made or saved inside, whatever the user's own matplotlib settings are.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib.style
    except ImportError as error:
        raise missing_library("Drawing figures", "matplotlib", "softprompt[compare]") from error
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
