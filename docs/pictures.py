"""Draws the two pictures of the first page: how it works, and accuracy against bytes.

    python docs/pictures.py

The second is drawn from the cells of the study in ``docs/study``. The pictures are kept in the repository.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from softprompt.drawing.style import INK, PALE, PALETTE, png, style
from softprompt.files import atomic_writer

HERE = Path(__file__).parent
SETS = ("sst2", "trec6", "cr", "subj", "agnews", "sick", "ni_sentiment140", "banking77")
"""The eight sets of the study's aim."""
HARD = ("zero-shot", "instruction", "few-shot")
"""Prompt engineering, by the beginning of a method's name."""
SOFT, BLUE = PALETTE[0], PALETTE[1]


class Method(NamedTuple):
    """How a method is drawn, and whether its name stands above its marks, else below."""

    label: str
    colour: str
    marker: str
    above: bool = True


METHODS = {
    "best hard prompt": Method("best hard\nprompt", "#6b6b6b", "s"),
    "tf-idf": Method("TF-IDF + logistic\nregression", "#2b8cc4", "X", above=False),
    "soft-prompt": Method("soft\nprompt", SOFT, "o"),
    "prefix": Method("KV\nprefix", "#b0568c", "D"),
    "lora": Method("LoRA", PALETTE[2], "^"),
    "full-fine-tuning": Method("full\nfine-tuning", BLUE, "P"),
}


def main() -> None:
    for name, draw in {"how_it_works": how_it_works, "accuracy_bytes": accuracy_bytes}.items():
        with style():
            content = png(draw())
        path = HERE / "pictures" / f"{name}.png"
        with atomic_writer(path) as file:
            file.write(content)
        print(f"docs/pictures/{path.name}")


# --- accuracy against bytes ----------------------------------------------------------------------


def means(cells: Path) -> dict[str, tuple[float, float]]:
    """Bytes and accuracy in percent of every method of one data set, means over its seeds; the best of the hard prompts
    stands for all of them."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for cell in json.loads(cells.read_text(encoding="utf-8")):
        if cell["status"] == "done":
            found[cell["method"]].append((cell["bytes"], 100 * cell["value"]))
    of_method = {
        method: (statistics.mean(size for size, _ in pairs), statistics.mean(score for _, score in pairs))
        for method, pairs in found.items()
    }
    hard = [pair for method, pair in of_method.items() if method.startswith(HARD)]
    return {**of_method, "best hard prompt": max(hard, key=lambda pair: pair[1])}


def accuracy_bytes() -> Figure:
    """Accuracy against the bytes that a task adds to the model (log, geometric mean): a pale mark for each data set,
    and the mean of all."""
    of_set = [means(HERE / "study" / f"{name}.json") for name in SETS]
    figure = Figure(figsize=(7.6, 4.1))
    axes = figure.add_subplot()
    for key, method in METHODS.items():
        scores = [found[key][1] for found in of_set]
        mean = statistics.mean(scores)
        size = math.exp(statistics.mean(math.log(found[key][0]) for found in of_set))
        axes.scatter(
            [size] * len(scores), scores, s=24, alpha=0.35, linewidths=0, c=method.colour, marker=method.marker
        )
        axes.scatter(
            [size], [mean], s=140, edgecolors="white", linewidths=1.2, zorder=4, c=method.colour, marker=method.marker
        )
        side = -1 if key == "soft-prompt" else 1  # TF-IDF's marks are at its right
        axes.annotate(
            f"{mean:.1f}",
            (size, mean),
            (11 * side, 0),
            textcoords="offset points",
            ha="left" if side > 0 else "right",
            va="center",
            color=method.colour,
            fontsize=10,
            fontweight="bold",
            zorder=5,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.8},
        )
        axes.annotate(
            method.label,
            (size, 100 if method.above else min(scores)),
            (0, 5 if method.above else -6),
            textcoords="offset points",
            ha="center",
            va="bottom" if method.above else "top",
            color=method.colour,
            fontweight="bold" if key == "soft-prompt" else "normal",
            fontsize=10,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )
    axes.set_xscale("log")
    axes.set_xlim(8e2, 2e9)
    axes.set_xticks([1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9], ["1 kB", "10 kB", "100 kB", "1 MB", "10 MB", "100 MB", "1 GB"])
    axes.minorticks_off()
    axes.set_ylim(52, 107)
    axes.set_yticks(range(60, 101, 10))
    axes.set_xlabel("bytes that a task adds to the model")
    axes.set_ylabel("accuracy on test rows, %")
    axes.set_title("Eight data sets (pale) and their mean: SmolLM2-135M, equal time to learn")
    return figure


# --- how it works --------------------------------------------------------------------------------


def how_it_works() -> Figure:
    """The soft prompt through the frozen model once; its keys and values for every row."""
    figure = Figure(figsize=(7.6, 3.5))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 100), ylim=(-0.8, 46))
    axes.axis("off")

    _text(axes, 2, 42.5, "1  The soft prompt runs once", weight="bold")
    for place in range(8):
        _box(axes, 2.5 + 3.1 * place, 32, 2.5, 6.5, SOFT)
    _text(axes, 2.5, 28.3, "64 learned vectors, 150 kB:", SOFT)
    _text(axes, 2.5, 25.0, "the only thing that is trained", SOFT)

    _text(axes, 2, 18.3, "2  Every row reads the result", weight="bold")
    for number, text in enumerate(["a fine film", "a dull , badly written mess", "thin plot"]):
        bottom = 13.2 - 4.6 * number
        for place in range(len(text.split())):
            _box(axes, 2.5 + 1.9 * place, bottom - 1.4, 1.5, 2.8, BLUE)
        _text(axes, 15.2, bottom, text, size=8.4)
        _arrow(axes, (38.5, bottom), (45.4, bottom), BLUE)
        _arrow(axes, (67.6, bottom), (73.6, bottom), BLUE)

    shape = "round,pad=0,rounding_size=1.6"
    axes.add_patch(FancyBboxPatch((45.5, 0.6), 22, 43.6, boxstyle=shape, facecolor="#f3f3f3", edgecolor=INK))
    _text(axes, 56.5, 40.9, "frozen", weight="bold", align="center", size=10.5)
    _text(axes, 56.5, 37.4, "language model", weight="bold", align="center", size=10.5)
    _box(axes, 48, 22.2, 17, 8.6, "white", edge=SOFT)
    _text(axes, 56.5, 28.3, "keys and values", SOFT, align="center", size=8.4)
    _text(axes, 56.5, 24.9, "of the soft prompt", SOFT, align="center", size=8.4)
    _arrow(axes, (27.6, 35.2), (47.8, 27.8), SOFT, curve=-0.16)
    for x in (51.5, 56.5, 61.5):
        _arrow(axes, (x, 22.0), (x, 15.4), SOFT)
    for number in range(3):
        _box(axes, 48, 13.2 - 4.6 * number - 1.3, 17, 2.6, "#cfe0ee")

    _text(axes, 74.5, 18.3, "3  Answers", weight="bold")
    for number, (label, share) in enumerate([("positive", 0.96), ("negative", 0.91), ("negative", 0.84)]):
        height = 13.2 - 4.6 * number
        _text(axes, 74.5, height, label, size=8.6)
        _bar(axes, 86.5, height, share)
    _text(axes, 74.5, 42.5, "Another task", weight="bold")
    _text(axes, 74.5, 38.6, "another soft prompt,", INK)
    _text(axes, 74.5, 35.3, "the same model,", INK)
    _text(axes, 74.5, 32.0, "the same batch", INK)
    return figure


def _text(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    colour: str = INK,
    *,
    weight: str = "normal",
    align: str = "left",
    size: float = 9.0,
) -> None:
    axes.text(x, y, text, color=colour, fontweight=weight, ha=align, va="center", fontsize=size)


def _box(axes: Axes, x: float, y: float, width: float, height: float, colour: str, edge: str = "none") -> None:
    shape = "round,pad=0,rounding_size=0.5"
    axes.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle=shape, facecolor=colour, edgecolor=edge, linewidth=1.2)
    )


def _bar(axes: Axes, x: float, y: float, share: float) -> None:
    _box(axes, x, y - 1.0, 11, 2.0, PALE)
    _box(axes, x, y - 1.0, 11 * share, 2.0, PALETTE[2])


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, curve: float = 0.0) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=9,
            color=colour,
            linewidth=1.3,
            connectionstyle=f"arc3,rad={curve}",
            shrinkA=0,
            shrinkB=0,
        )
    )


if __name__ == "__main__":
    main()
