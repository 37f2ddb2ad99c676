"""Numbers in words, Markdown that stays text, and pictures that draw for the odd cases, too."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from softprompt.drawing import style
from softprompt.drawing.words import markdown, markdown_table, share, shown
from softprompt.evaluation.metrics import Metric
from softprompt.inspection import figures
from softprompt.inspection.ablation import AsText, Change, Cut, Difference, Importance, WhatMatters
from softprompt.inspection.behaviour import Attention, Labels
from softprompt.inspection.nearest import Near, Neighbours, Reading
from softprompt.inspection.plane import Map
from softprompt.inspection.start import Moved, Norms
from softprompt.inspection.tables import readings_table
from softprompt.inspection.words import chance, lost, nats, percent, points, value

HALF = Metric("accuracy", 0.5, 0.1, 0.3, 0.7, 25)
LOSS = Metric("log_loss", 1.25, 0.1, 1.0, 1.5, 25)
LOWER = Difference(-0.25, -0.5, 0.0, 0.01)


def test_numbers_in_words() -> None:
    assert percent(HALF) == "50.0 % [30.0, 70.0]"
    assert points(LOWER) == "−25.0 points [−50.0, +0.0]"
    assert nats(LOWER) == "−0.250 nats [−0.500, +0.000]"
    assert (chance(0.0123), chance(0.0001), share(0.947)) == ("q = 0.012", "q < 0.001", "95 %")
    of_labels, of_text = Change(LOSS, HALF, LOWER, LOWER), Change(LOSS, None, LOWER, None)
    assert (value(of_labels), lost(of_labels)) == (percent(HALF), points(LOWER))
    assert (value(of_text), lost(of_text)) == ("1.250 nats [1.000, 1.500]", nats(LOWER))
    assert readings_table([AsText("a", "", of_labels), AsText("b", "", of_labels)]) == (
        ["", ">score [95 %]", ">change [95 %]", ">loss, nats"],
        [["a", percent(HALF), "", "1.250"], ["b", percent(HALF), points(LOWER), "1.250"]],
    )
    assert readings_table([AsText("a", "", of_text)])[0] == ["", ">score [95 %]", ">change [95 %]"]


def test_tokens_are_shown_with_their_blanks() -> None:
    assert shown(" a b") == "'\u00a0a\u00a0b'"
    assert shown("\n") == r"'\n'"
    assert shown("x" * 50, 10) == "'xxxxxxxx…"


@given(st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126), max_size=30))
def testmarkdown_stays_text(text: str) -> None:
    """What is escaped reads as it was, and no mark is left that could begin a tag, a link, emphasis or a cell."""
    written = markdown(text)
    assert re.sub(r"\\([\\`*_{}\[\]<>#|~$&])", r"\1", written) == text
    assert not re.search(r"(?<!\\)(?:\\\\)*[`*_{}\[\]<>#|~$&]", written)
    head, rule, row, end = markdown_table(["", ">n"], [[text, "1"]])
    assert (head, rule, end) == ("|  | n |", "| --- | ---: |", "")
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) == 3


# --- pictures ------------------------------------------------------------------------------------


def drawn(figure: object) -> str:
    """The picture's SVG, for what is written in it; drawing must not fail."""
    return style.svg(figure).decode()  # type: ignore[arg-type]


def of_tokens(count: int, cost: float = 0.01) -> WhatMatters:
    changes = [
        Change(LOSS, HALF, Difference(cost * i, cost * i - 0.01, cost * i + 0.01, 0.5), LOWER) for i in range(count)
    ]
    tokens = tuple(Importance(change, change, 0.5, False, 0.1) for change in changes)
    costs = np.array([[change.loss_change.value] for change in changes])
    return WhatMatters(changes[0], tokens, tuple(reversed(range(count))), 0.5, 25, 0.05, costs)


@pytest.mark.parametrize("count", [1, 3, 60])
def test_pictures_of_any_number_of_virtual_tokens(count: int) -> None:
    near = Near(3, "$\\alpha$ 日本", 5.0)
    reading = Reading((near,), (near,), (near,), {"cosine": 0.1}, 0.5, near, 0.1, 0.1, False)
    readings = Neighbours((reading,) * count, (), 3, 10, 10, 0, 0.05, 4.0, 0.2, 0.6)
    drawn(figures.near(readings, readings if count == 3 else None))
    table = {0.0: 1.0, 0.05: 1.5, 0.5: 2.0, 0.95: 3.0, 1.0: 4.0}
    moved = (Moved(None, 2.0, 1.0, 0.9, 0.8, 1, 3.0, 0.01, 0.01, True),) * count
    drawn(figures.norms(Norms((2.5,) * count, (0.5,) * count, table, moved if count == 3 else (), "", 0.05)))
    place = ((0.1, 0.2),) * count
    drawn(figures.plane(Map((1,), ((0.0, 0.1),), place, place if count == 3 else (), place, 0.5, 0.1), {0: near.text}))
    drawn(figures.matters(of_tokens(count), [near.text] * count))
    drawn(figures.attention(Attention(((0.01,) * count,) * 2, (), 0.05, 3)))


def test_a_cost_beyond_the_others_does_not_squeeze_them() -> None:
    ends = [0.1] * 9 + [0.2]
    assert figures._limit(ends) == math.inf
    assert figures._limit([0.1] * 19 + [3.0]) == pytest.approx(0.15)
    assert figures._limit([]) == math.inf
    drawn(figures.matters(of_tokens(20, 0.0001), ["x"] * 20))


def test_a_single_row_and_free_text_draw_without_intervals() -> None:
    nan = math.nan
    alone = Change(Metric("log_loss", 1.0, nan, nan, nan, 1), None, Difference(0.0, nan, nan, 1.0), None)
    drawn(figures.readings([AsText("soft prompt", "", alone), AsText("no soft prompt", "", alone)]))
    drawn(figures.cuts([Cut(1, alone, alone)], 2, alone.loss))
    many = {f"label {i}": i / 100 for i in range(30)}
    drawn(figures.labels(Labels(many, many, many, HALF, HALF, LOWER, 1, 2, 3, 0.5, 25)))
