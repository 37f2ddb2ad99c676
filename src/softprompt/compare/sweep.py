"""What came of a sweep: a table, sentences, a figure, and all of it for programs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rich.table import Table

from softprompt.data.wording import counted
from softprompt.drawing.style import GREY, INK, PALETTE, style
from softprompt.drawing.words import simple_table
from softprompt.tuning.sweep import AXES, Selection, Sweep, Worth

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def table(sweep: Sweep) -> Table:
    """A row a setting, the best first."""
    metric = next((found["metric"] for found in sweep.found.values() if found["metric"]), "score")
    shown = simple_table("setting", ">steps", ">score", f">{metric}", "state")
    for number in ranked(sweep):
        found = sweep.found[number]
        score, value = ("–" if one is None else f"{one:.4f}" for one in (found["score"], found["value"]))
        shown.add_row(sweep.label(number), f"{found['steps']:,}", score, value, _state(sweep, number))
    return shown


def ranked(sweep: Sweep) -> list[int]:
    """The settings that were trained: the chosen first, those that came further before those that did not."""
    numbers = sorted(sweep.found)
    scores = {number: sweep.found[number]["score"] for number in numbers}

    def place(number: int) -> tuple[bool, float, float]:
        dropped, score = sweep.found[number]["dropped_at"], scores[number]
        return number != sweep.best, -(dropped or math.inf), -(-math.inf if score is None else score)

    return sorted(numbers, key=place)


def _state(sweep: Sweep, number: int) -> str:
    found = sweep.found[number]
    if found["stopped"] == "not finite":
        return "failed: not finite"
    if number == sweep.best:
        return "chosen" + ", ended early" * bool(found["stopped"] == "early")
    if found["dropped_at"] is not None:
        return f"dropped at {found['dropped_at']:,}"
    early = ", ended early" * bool(found["stopped"] == "early")
    return ("default, to compare with" if number == 0 else "not chosen") + early


def sentences(sweep: Sweep, selection: Selection) -> list[str]:
    """How good the chosen is, and how much of its gain is luck."""
    count, percent = len(sweep.configs), selection.metric == "accuracy"
    seen, unseen = selection.chosen
    rows = [f"{number:,} rows" for number in selection.rows]
    said = [
        f"best of {count}: {selection.metric} {_shown(seen, percent)} on the {rows[0]} used to choose it, "
        f"{_shown(unseen, percent)} on {rows[1]} not used to choose"
    ]
    if sweep.best == 0:
        return [*said, "the default setting is the best of them: nothing is gained"]
    gains = [_shown(gain, percent, signed=True) for gain in selection.gain]
    said.append(
        f"gain over the default setting: {gains[0]} on the rows used to choose, {gains[1]} on the others: "
        f"{_shown(selection.selection, percent, signed=True)} of the gain is selection"
    )
    gain = selection.gain[1]
    if not gain.value > 2 * gain.stderr:
        said.append("on the rows not used to choose, the gain is within two standard errors of zero")
    return said


def _shown(worth: Worth, percent: bool, *, signed: bool = False) -> str:
    """``91.2 ± 1.3``, in percent for an accuracy."""
    factor, digits = (100.0, 1) if percent else (1.0, 3)
    value = f"{factor * worth.value:{'+' if signed else ''}.{digits}f}"
    return f"{value} ± {factor * worth.stderr:.{digits}f}"


def document(sweep: Sweep, selection: Selection) -> dict[str, Any]:
    """All of it, JSON values."""
    candidates = [
        {
            "setting": sweep.label(number),
            "default": number == 0,
            "chosen": number == sweep.best,
            **{axis: getattr(config, axis) for axis in AXES},
            **sweep.found[number],
        }
        for number, config in enumerate(sweep.configs)
    ]
    return {"rungs": sweep.rungs, "candidates": candidates, "selection": selection.as_dict()}


def figure(sweep: Sweep) -> Figure:
    """The score of each setting at its validations; the chosen and the default stand out.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    with style():
        from matplotlib.figure import Figure

        made = Figure(figsize=(9.2, 4.6))
        panel = made.add_axes((0.08, 0.13, 0.89, 0.78))
        for rung in sweep.rungs[:-1]:
            panel.axvline(rung, color=GREY, linewidth=0.8, linestyle=":")
        looks: dict[int, dict[str, Any]] = {
            0: {"color": PALETTE[1], "linewidth": 1.8, "zorder": 4, "label": "default"},
            sweep.best: {
                "color": PALETTE[0],
                "linewidth": 2.6,
                "zorder": 5,
                "label": f"chosen: {sweep.label(sweep.best)}",
            },
        }
        other = {"color": GREY, "linewidth": 0.9, "zorder": 3}
        for number, found in sorted(sweep.found.items()):
            points = [(step, score) for step, score, _ in found["curve"] if score is not None]
            if points:
                panel.plot(*zip(*points, strict=True), marker="o", markersize=2.5, **looks.get(number, other))
        panel.set_title(f"{counted(len(sweep.configs), 'setting')}, dropped at the dotted lines", color=INK)
        panel.set_xlabel("optimizer steps")
        panel.set_ylabel("score on the validation rows that choose")
        panel.set_xlim(left=0)
        panel.legend(loc="lower right")
    return made
