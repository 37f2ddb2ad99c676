"""The pictures of an inspection, each drawn from plain data in the project's style."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from softprompt.drawing.style import GREY, INK, PALE, PALETTE, style
from softprompt.drawing.words import share, shortened
from softprompt.evaluation.metrics import Metric
from softprompt.inspection.ablation import TOP, AsText, Cut, Difference, WhatMatters
from softprompt.inspection.behaviour import Attention, Labels
from softprompt.inspection.drift import Drift
from softprompt.inspection.nearest import Neighbours
from softprompt.inspection.plane import Map
from softprompt.inspection.similarity import Similarity, linkage
from softprompt.inspection.start import Norms

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 9.2
"""Inches, as wide as a report's text."""

OURS, OTHER = PALETTE[0], PALETTE[1]

MOST_ROWS = 40
"""The most virtual tokens in a picture where each has a line of its own."""

MOST_LABELS = 20


def _drawn(text: str, width: int = 24) -> str:
    """The same for a picture: letters that its font lacks as escapes, dollar signs not taken for mathematics."""
    return shortened(repr(text) if all(ord(letter) < 0x530 for letter in text) else ascii(text), width).replace(
        "$", r"\$"
    )


def _canvas(height: float, columns: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height))
    axes = np.atleast_1d(figure.subplots(1, columns, **options))
    return figure, list(axes)


def _lines(axes: Axes, labels: Sequence[str], *, strong: Sequence[int] = ()) -> None:
    """A line for each label, from the top down."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(axis="y", color=PALE)
    axes.grid(axis="x", visible=False)
    for i, tick in enumerate(axes.get_yticklabels()):
        tick.set_fontweight("bold" if i in strong else "normal")


# --- nearest tokens and norms --------------------------------------------------------------------


def near(now: Neighbours, added: Neighbours | None) -> Figure:
    """For each virtual token the token that stands out most, and the one that training moved it towards."""
    count = min(len(now.readings), MOST_ROWS)
    sets = [(now, OURS, "o", "the virtual token", "stands out in it")]
    if added is not None:
        sets.append((added, OTHER, "D", "what training added to its start", "training moved it towards"))
    with style():
        figure, (axes,) = _canvas(0.21 * count + 1.2, gridspec_kw={"left": 0.09, "right": 0.62})
        axes.axvspan(0, now.random_excess, color="#f0f0f0", zorder=0, linewidth=0)
        for column, (found, colour, marker, name, title) in enumerate(sets):
            for filled in (True, False):
                rows = [i for i in range(count) if found.readings[i].significant == filled]
                values = [found.readings[i].stands_out.value for i in rows]
                label = f"{name}, {'significant' if filled else 'not'}" if rows else None
                face = colour if filled else "white"
                axes.plot(values, rows, marker, color=colour, markerfacecolor=face, markersize=5, label=label)
            _beside(axes, found, count, 1.03 + 0.36 * column, title, colour)
        _lines(axes, [str(i) for i in range(count)])
        axes.set_xlim(left=0)
        axes.set_xlabel("excess over random vectors, in standard deviations")
        axes.set_ylabel("virtual token")
        axes.text(0.1, -0.8, f"random ({share(1 - now.level)})", color=GREY, fontsize=7, va="bottom")
        figure.legend(loc="upper left", bbox_to_anchor=(0.09, 0.0), ncols=2, fontsize=7.5)
    return figure


def _beside(axes: Axes, found: Neighbours, count: int, place: float, title: str, colour: str) -> None:
    """A column of tokens to the right of the lines."""
    axes.text(place, 1.01, title, transform=axes.transAxes, fontsize=8, fontweight="bold", color=colour)
    for i, reading in enumerate(found.readings[:count]):
        text, ink = (_drawn(reading.stands_out.text, 20), INK) if reading.significant else ("–", GREY)
        axes.text(place, i, text, transform=axes.get_yaxis_transform(), fontsize=7.5, va="center", color=ink)


def norms(found: Norms) -> Figure:
    """Norms of the virtual tokens now and at the start, among those of the embedding table."""
    from matplotlib.ticker import MaxNLocator

    with style():
        figure, (axes,) = _canvas(3.2)
        places = range(len(found.norms))
        axes.axhspan(found.table[0.05], found.table[0.95], color="#ececec", zorder=0, linewidth=0)
        axes.axhline(found.table[0.5], color=GREY, linewidth=1)
        axes.plot(places, found.norms, "o", color=OURS, markersize=5, label="virtual token")
        if found.moved:
            starts, distances = [each.start_norm for each in found.moved], [each.distance for each in found.moved]
            axes.plot(places, starts, "o", color=INK, markerfacecolor="white", markersize=4, label="its start")
            axes.plot(places, distances, "_", color=OTHER, markersize=7, label="distance between them")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("virtual token")
        axes.set_ylabel("norm")
        band = f"embedding table: median {found.table[0.5]:.1f}, 90 % in the grey band"
        axes.set_title(band, fontsize=8, fontweight="normal", color=GREY)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
    return figure


def drift(found: Drift) -> Figure:
    """The way from the start over the steps of the training."""
    from matplotlib.ticker import MaxNLocator

    steps, kept = [point.step for point in found.points], found.kept
    with style():
        figure, (far, cosine, tokens) = _canvas(3.0, 3, gridspec_kw={"wspace": 0.3})
        for each in zip(*(point.drift for point in found.points), strict=True):
            far.plot(steps, each, color=GREY, linewidth=0.5, alpha=0.6)
        far.plot(steps, [point.mean_drift for point in found.points], "o-", color=OURS, markersize=3, label="mean")
        far.set_title("drift, in RMS of the table", fontsize=9)
        cosine.plot(steps, [p.cosine for p in found.points], "o-", color=OURS, markersize=3, label="with the start")
        cosine.plot(steps, [p.random_cosine for p in found.points], "--", color=INK, label="by random steps")
        cosine.set_title("mean cosine with the start", fontsize=9)
        as_kept, as_at_start = [p.as_kept for p in found.points], [p.as_at_start for p in found.points]
        tokens.plot(steps, as_kept, "o-", color=OURS, markersize=3, label="as in the kept one")
        tokens.plot(
            steps, as_at_start, "s-", color=OTHER, markerfacecolor="none", markersize=5, label="as at the start"
        )
        tokens.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        tokens.set_title("nearest token, of how many", fontsize=9)
        tokens.set_ylim(0, len(kept.drift) * 1.05)
        for axes in (far, cosine, tokens):
            axes.axvline(kept.step, color=INK, linewidth=0.8, linestyle=":")
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.set_xlabel("step")
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=7.5)
        far.set_ylim(bottom=0)
    return figure


def plane(found: Map, names: Mapping[int, str]) -> Figure:
    """The map; ``names`` are written beside virtual tokens, by index."""
    with style():
        figure, (axes,) = _canvas(6.0)
        axes.grid(False)
        axes.plot(*_columns(found.vocabulary), ".", color="#c9c9c9", markersize=2.5, label="tokens of the vocabulary")
        axes.plot(*_columns(found.random), "x", color=INK, markersize=4, alpha=0.6, label="random vectors like them")
        if found.start:
            axes.plot(
                *_columns(found.start), "o", color=OTHER, markerfacecolor="none", markersize=5, label="their start"
            )
            for (x, y), (to_x, to_y) in zip(found.start, found.virtual, strict=True):
                axes.plot([x, to_x], [y, to_y], color=OTHER, linewidth=0.5, alpha=0.5)
        axes.plot(*_columns(found.virtual), "o", color=OURS, markersize=6, label="virtual tokens")
        for i, name in names.items():
            axes.annotate(f"{i} {_drawn(name, 14)}", found.virtual[i], (4, 3), textcoords="offset points", fontsize=6.5)
        axes.set_xlabel("first axis")
        axes.set_ylabel("second axis")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
    return figure


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


# --- what matters --------------------------------------------------------------------------------


def matters(found: WhatMatters, names: Sequence[str]) -> Figure:
    """What each virtual token costs when it is left out or replaced, the most costly at the top."""
    order = found.order[:MOST_ROWS]
    kinds = (("left_out", OURS, "o", "left out", -0.16), ("replaced", OTHER, "s", "replaced by the mean", 0.16))
    costs = {kind: [getattr(found.tokens[i], kind).loss_change for i in order] for kind, *_ in kinds}
    limit = _limit([max(0.0, change.high, change.value) for changes in costs.values() for change in changes])
    with style():
        figure, (axes,) = _canvas(0.24 * len(order) + 1.1)
        axes.axvline(0, color=INK, linewidth=0.8)
        for kind, colour, marker, label, shift in kinds:
            lines = [line + shift for line in range(len(order))]
            _bars(axes, costs[kind], lines, colour, marker, label, limit)
        labels = [f"{i}  {_drawn(names[i], 18)}" for i in order]
        _lines(axes, labels, strong=range(min(TOP, len(order))))
        if np.isfinite(limit):
            axes.set_xlim(right=limit)
        axes.set_xlabel(f"change of the mean loss on {found.n} rows, in nats, with its 95 % interval")
        axes.legend(loc="lower right", fontsize=8)
    return figure


def _limit(ends: Sequence[float]) -> float:
    """Where the axis ends: behind all of the ends, but for a few that would leave the others no room."""
    high = sorted(end for end in ends if np.isfinite(end))
    if not high:
        return np.inf
    usual = high[max(0, len(high) * 9 // 10 - 1)]
    return 1.5 * usual if high[-1] > 4 * usual > 0 else np.inf


def _bars(
    axes: Axes,
    changes: Sequence[Difference],
    lines: Sequence[float],
    colour: str,
    marker: str,
    label: str,
    limit: float,
) -> None:
    """Values with their intervals; beyond ``limit`` an arrow with the number."""
    inside = [i for i, change in enumerate(changes) if change.value <= limit]
    values = np.array([changes[i].value for i in inside])
    low, high = (np.array([getattr(changes[i], end) for i in inside]) for end in ("low", "high"))
    errors = np.nan_to_num([values - low, np.minimum(high, limit) - values]).clip(min=0)
    look: dict[str, Any] = {"fmt": marker, "color": colour, "markersize": 4, "elinewidth": 1, "label": label}
    axes.errorbar(values, [lines[i] for i in inside], xerr=errors, **look)
    for i, change in enumerate(changes):
        if i not in inside:
            text = f"{change.value:+.2f} ▸"
            axes.text(limit, lines[i], text, color=colour, fontsize=8, ha="right", va="center", fontweight="bold")


def readings(found: Sequence[AsText]) -> Figure:
    """Accuracy, or loss for free text, of the soft prompt and of what it reads as."""
    scores = [each.change.score or each.change.loss for each in found]
    with style():
        figure, (axes,) = _canvas(0.34 * len(found) + 0.9)
        factor, unit = (100, "accuracy, %") if found[0].change.score else (1, "mean loss, nats")
        axes.axvline(factor * scores[0].value, color=OURS, linewidth=0.8, linestyle=":")
        for line, score in enumerate(scores):
            _score(axes, score, line, OURS if line == 0 else INK, factor)
        _lines(axes, [each.name for each in found], strong=[0])
        axes.set_xlabel(f"{unit}, with its 95 % interval, {scores[0].n} rows")
    return figure


def _score(axes: Axes, score: Metric, line: float, colour: str, factor: float) -> None:
    ends = np.nan_to_num([[score.value - score.low], [score.high - score.value]]).clip(min=0)
    axes.errorbar([factor * score.value], [line], xerr=factor * ends, fmt="o", color=colour, markersize=5, elinewidth=1)


def cuts(found: Sequence[Cut], whole: int, full: Metric) -> Figure:
    """Accuracy, or loss for free text, with the first and the best k virtual tokens."""
    labelled = found[0].first.score is not None
    factor, unit = (100, "accuracy, %") if labelled else (1, "mean loss, nats")
    with style():
        figure, (axes,) = _canvas(3.4)
        x = [each.k for each in found]
        for kind, colour, marker, label in (("best", OURS, "o", "the best k"), ("first", OTHER, "s", "the first k")):
            scores = [getattr(each, kind).score or getattr(each, kind).loss for each in found] + [full]
            values = factor * np.array([score.value for score in scores])
            ends = factor * np.nan_to_num([[s.value - s.low, s.high - s.value] for s in scores]).clip(min=0)
            shift = 1.02 if kind == "first" else 1.0
            axes.errorbar(
                np.array([*x, whole]) * shift,
                values,
                yerr=ends.T,
                fmt=f"{marker}-",
                color=colour,
                markersize=5,
                elinewidth=1,
                label=label,
            )
        axes.set_xscale("log")
        axes.set_xticks([*x, whole], [*map(str, x), f"{whole} (all)"])
        axes.minorticks_off()
        axes.set_xlabel("virtual tokens kept")
        axes.set_ylabel(unit)
        axes.legend(fontsize=8)
    return figure


# --- what it does --------------------------------------------------------------------------------


def labels(found: Labels) -> Figure:
    """Mean label probabilities with and without the soft prompt, and the labels' true shares."""
    moved = {label: abs(found.with_it[label] - found.without[label]) for label in found.with_it}
    chosen = [label for label in found.with_it if label in sorted(moved, key=lambda of: -moved[of])[:MOST_LABELS]]
    with style():
        figure, (axes,) = _canvas(0.55 * len(chosen) + 1.0)
        sets = (("with the soft prompt", found.with_it, OURS), ("without", found.without, GREY))
        for shift, (name, of_label, colour) in zip((-0.2, 0.2), sets, strict=True):
            places = [line + shift for line in range(len(chosen))]
            axes.barh(places, [100 * of_label[label] for label in chosen], 0.36, color=colour, label=name)
        for line, label in enumerate(chosen):
            gold = 100 * found.gold[label]
            true = "true share" if line == 0 else None
            axes.plot([gold, gold], [line - 0.45, line + 0.45], color=INK, linewidth=2, label=true)
        _lines(axes, [_drawn(label, 30)[1:-1] for label in chosen])
        axes.set_xlabel(f"mean probability, %, over {found.n} rows")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
    return figure


def attention(found: Attention) -> Figure:
    """Attention paid to each virtual token by layer, of the soft prompt and of its start."""
    from matplotlib.colors import PowerNorm

    panels = [("the soft prompt", found.by_layer)] + ([("its start", found.start)] if found.start else [])
    most = 100 * max(max(max(layer) for layer in layers) for _, layers in panels)
    with style():
        figure, axes = _canvas(0.11 * len(found.by_layer) + 1.6, len(panels), sharey=True)
        for panel, (title, layers) in zip(axes, panels, strict=True):
            panel.grid(False)
            scale = PowerNorm(0.5, 0, most)  # the first place takes most, and the others are to be seen as well
            image = panel.imshow(100 * np.array(layers), aspect="auto", cmap="magma_r", norm=scale)
            panel.set_title(title)
            panel.set_xlabel("virtual token")
        axes[0].set_ylabel("layer")
        figure.colorbar(image, ax=axes, label="% of the attention", pad=0.02)
    return figure


# --- several soft prompts ------------------------------------------------------------------------


def heat(found: Similarity, measure: str, title: str) -> Figure:
    """A measure of every two soft prompts, those that are alike side by side, and their tree."""
    from scipy.cluster import hierarchy

    values = found.matrix(measure)
    joined = linkage(1 - found.matrix("average_cosine"))
    with style():
        count = len(found.names)
        figure, (tree, panel) = _canvas(0.42 * count + 1.8, 2, gridspec_kw={"width_ratios": [1, 2.2], "wspace": 0.02})
        drawn = hierarchy.dendrogram(
            joined, orientation="left", ax=tree, no_labels=True, color_threshold=0, above_threshold_color=INK
        )
        order = drawn["leaves"]
        tree.grid(False)
        tree.set_xlabel("1 − cosine of the means")
        tree.set_ylim(0, 10 * count)
        tree.spines["left"].set_visible(False)
        panel.grid(False)
        of_others = np.where(np.eye(count, dtype=bool), np.nan, values)[np.ix_(order, order)]
        panel.imshow(of_others, cmap="RdBu_r", vmin=-1, vmax=1, origin="lower", aspect="auto")
        names = [_drawn(found.names[i], 22)[1:-1] for i in order]
        panel.set_xticks(range(count), names, rotation=45, ha="right")
        panel.set_yticks(range(count), names)
        panel.yaxis.tick_right()
        for i, j in zip(*np.nonzero(~np.isnan(of_others)), strict=True):
            colour = "white" if abs(of_others[i, j]) > 0.6 else INK
            panel.text(j, i, f"{of_others[i, j]:.2f}", ha="center", va="center", fontsize=8, color=colour)
        panel.set_title(title)
    return figure
