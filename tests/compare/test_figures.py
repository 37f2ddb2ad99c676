"""The comparison's figures: what is drawn where."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.text import Annotation, Text
from sklearn.isotonic import IsotonicRegression

from softprompt.compare import figures as plots
from softprompt.compare import summary
from softprompt.drawing import labels as labels_module
from softprompt.evaluation.metrics import accuracy
from tests.compare.cells import (
    METHODS,
    cells_of_answers,
    drawn,
    make_cell,
    make_cells,
    panels_of,
    several_bases,
    several_tasks,
)


@pytest.mark.parametrize("seeds", [1, 3])
def test_figures_end_their_bars_where_the_intervals_end(seeds: int) -> None:
    """With no row right and all rows right, the bars begin at 0 and end at 100."""
    cells = cells_of_answers(seeds, ours=[True] * 40, theirs=[False] * 40)
    (panel,) = drawn(plots.score_against_time(panels_of(cells))).axes
    bars = {
        tuple(float(y) for y in segment[:, 1])
        for container in panel.containers
        if isinstance(container, ErrorbarContainer)
        for line in container.lines[2]
        for segment in line.get_segments()
    }
    (bottom, low), (high, top) = sorted(bars)
    assert (bottom, top) == (0, 100)
    assert low == pytest.approx(100 * accuracy(["b"] * 40, ["a"] * 40).high)
    assert high == pytest.approx(100 * accuracy(["a"] * 40, ["a"] * 40).low)


def texts_of(panel: Axes) -> list[Annotation]:
    return [text for text in panel.texts if isinstance(text, Annotation)]


@pytest.mark.parametrize(
    "cells", [make_cells(seeds=3), several_tasks(), several_bases()], ids=["one", "tasks", "bases"]
)
def test_labels_cover_neither_each_other_nor_marks(cells: list[dict[str, Any]]) -> None:
    groups = panels_of(cells)
    tasks = {"sst2": [row for row in summary.summary(cells) if row.task == "sst2"]}
    for figure in (
        plots.score_against_parameters(groups),
        plots.score_against_time(groups),
        plots.learning_curves(groups),
        plots.score_against_size(tasks),
    ):
        if figure is None:
            assert len({cell["base"] for cell in cells}) == 1
            continue
        for panel in drawn(figure).axes:
            labels = texts_of(panel)
            boxes = [Text.get_window_extent(label) for label in labels]  # without the line to the mark
            assert len(labels) > 3
            for (one, first), (other, second) in combinations(zip(labels, boxes, strict=True), 2):
                assert not first.overlaps(second), (one.get_text(), other.get_text())
            marks = panel.transData.transform([label.xy for label in labels])
            assert not any(box.contains(*mark) for box in boxes for mark in marks)


def test_what_trains_nothing_stands_left_of_the_logarithmic_axis() -> None:
    figure = drawn(plots.score_against_parameters(panels_of(make_cells())))
    (panel,) = figure.axes
    x = {label.get_text(): label.xy[0] for label in texts_of(panel)}
    assert x["lora"] == pytest.approx(math.log10(921_600))
    free = [x[method] for method, numbers in METHODS.items() if numbers[1] == 0]
    assert len(free) == len(set(free)) == 9
    assert max(free) < math.log10(10_000) - 0.2
    ticks = {text.get_text(): place for text, place in zip(panel.get_xticklabels(), panel.get_xticks(), strict=True)}
    assert list(ticks) == ["0", "10 k", "100 k", "1 M", "10 M", "100 M"]
    assert min(free) < ticks["0"] < max(free)
    assert ticks["1 M"] == 6


def test_names_in_a_small_panel_are_the_trained_methods_and_the_best_hard_prompt() -> None:
    figure = drawn(plots.score_against_time(panels_of(several_tasks())))
    trained = [method for method, numbers in METHODS.items() if numbers[1]]
    for panel in figure.axes:
        floor = [] if panel.get_title(loc="left") == "e2e_nlg" else ["majority-class"]
        shown = [method for method in trained if method != "tf-idf" or floor]
        assert {text.get_text() for text in texts_of(panel)} == {"few-shot-nearest-calibrated", *floor, *shown}


def test_titles_are_no_mathematics_and_fit() -> None:
    cells = [make_cell("soft-prompt", "$x^2$ " + "long " * 30, "smollm2-135m", 0, 0.0)]
    (panel,) = drawn(plots.score_against_time(panels_of(cells))).axes
    assert panel.get_title(loc="left").startswith("$x^2$ long long")
    assert len(panel.get_title(loc="left")) == 48


@given(st.lists(st.floats(-50, 150), min_size=1, max_size=12).map(sorted))
def test_labels_in_a_column_move_as_little_as_possible(heights: list[float]) -> None:
    steps = 10.0 * np.arange(len(heights))
    fit = IsotonicRegression(y_min=0, y_max=120 - steps[-1]).fit_transform(steps, heights - steps)
    assert labels_module.apart(heights, 10.0, 0.0, 120.0) == pytest.approx(fit + steps)
