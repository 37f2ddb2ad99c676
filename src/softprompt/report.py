"""What ``compare`` found, to be read: a table for the terminal, and a page with figures.

The input is the list of cells of ``results.json``, one for each task, method, base model and seed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from softprompt import plots
from softprompt.artifact import atomic_writer
from softprompt.files import StrPath, local_path
from softprompt.page import Page
from softprompt.summary import METHODS, METRICS, OURS, Cell, Estimate, Row, grouped, summary
from softprompt.terminal import amount, duration, shortened, simple_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HARD = tuple(method for method in METHODS if method.startswith(("zero-shot", "instruction", "few-shot")))
_RIVALS = {"the best hard prompt": _HARD, "the better of LoRA and full fine-tuning": ("lora", "full-fine-tuning")}


# --- the verdict ----------------------------------------------------------------------------------


def verdict(cells: Sequence[Cell]) -> str:
    """What the numbers say about the soft prompt, in a few sentences.

    Of several rivals of one kind the one with the highest test score counts, which favours that kind.
    """
    return _verdict(grouped(summary(cells)))


def _verdict(groups: Mapping[str, Sequence[Row]]) -> str:
    if len(groups) == 1:
        return _verdict_on_one(*next(iter(groups.items())))
    sentences = (_verdict_on_all(groups, name, methods) for name, methods in _RIVALS.items())
    return " ".join(filter(None, sentences)) or "There is nothing yet that the soft prompt can be compared with."


def _verdict_on_all(groups: Mapping[str, Sequence[Row]], rival: str, methods: Sequence[str]) -> str:
    """A sentence about one kind of rival; empty if there is none to compare with."""
    found: dict[int, list[str]] = {-1: [], 1: [], 0: []}
    for title, rows in groups.items():
        best = _best(rows, methods)
        if best is not None and best.difference is not None:
            found[best.difference.sign].append(title)
    total = sum(map(len, found.values()))
    if not total:
        return ""
    parts = [f"Against {rival} the soft prompt is better on {len(found[-1]) or 'none'} of {total}"]
    if worse := found[1]:
        parts.append(f"worse on {len(worse)} ({', '.join(worse)})")
    if undecided := found[0]:
        parts.append(f"and on {len(undecided)} the interval allows no verdict ({', '.join(undecided)})")
    return ", ".join(parts) + "."


def _verdict_on_one(title: str, rows: Sequence[Row]) -> str:
    ours = next((row for row in rows if row.method == OURS), None)
    if ours is None or ours.score is None:
        return f"On {title} the soft prompt has no score, so there is no verdict."
    parts = [f"On {title} the soft prompt reaches {_score(ours)} ({ours.unit}, ± one standard error)."]
    named = set()
    for name, methods in _RIVALS.items():
        rival = _best(rows, methods)
        if rival is not None and rival.difference is not None:
            parts.append(_against(f"{name}, {rival.method} with {_score(rival)}", rival.difference, rival.factor))
            named.add(rival.method)
    others = [row.method for row in rows if row.difference and row.difference.sign > 0 and row.method not in named]
    if others:
        parts.append(f"Also better than the soft prompt: {', '.join(others)}.")
    return " ".join(parts)


def _against(rival: str, difference: Estimate, factor: float) -> str:
    if not difference.sign or difference.low is None or difference.high is None:
        found = _signed(difference, factor)
        return f"There is no verdict against {rival}: the difference to the soft prompt is {found}."
    low, high = sorted(factor * abs(end) for end in (difference.low, difference.high))
    return (
        f"It is {factor * abs(difference.value):.1f} points (95 % interval {low:.1f} to {high:.1f}) "
        f"{'below' if difference.sign > 0 else 'above'} {rival}."
    )


def _best(rows: Sequence[Row], methods: Sequence[str]) -> Row | None:
    scored = [(row.score.value, row) for row in rows if row.method in methods and row.score]
    return max(scored, key=lambda pair: pair[0])[1] if scored else None


# --- numbers for people ---------------------------------------------------------------------------

_NONE = "–"


def _or_none(value: float | None, show: Callable[[float], str]) -> str:
    return _NONE if value is None else show(value)


def _score(row: Row) -> str:
    """``91.9 ± 0.6``."""
    if row.score is None:
        return "failed" if row.failed else _NONE
    error = "" if row.stderr is None else f" ± {row.factor * row.stderr:.1f}"
    return f"{row.factor * row.score.value:.1f}{error}"


def _interval(row: Row) -> str:
    """``90.5 to 93.1``."""
    if row.score is None or row.score.low is None or row.score.high is None:
        return _NONE
    return f"{row.factor * row.score.low:.1f} to {row.factor * row.score.high:.1f}"


def _signed(estimate: Estimate, factor: float) -> str:
    """``−1.2 [−2.5, +0.1]``."""

    def signed(number: float) -> str:
        return f"{factor * number:+.1f}".replace("-", "−")

    if estimate.low is None or estimate.high is None:
        return signed(estimate.value)
    return f"{signed(estimate.value)} [{signed(estimate.low)}, {signed(estimate.high)}]"


def _marked(estimate: Estimate | None, factor: float) -> str:
    """The same with a sign in front if the interval excludes 0."""
    if estimate is None:
        return _NONE
    return {1: "▲ ", -1: "▼ ", 0: ""}[estimate.sign] + _signed(estimate, factor)


def _latency(milliseconds: float) -> str:
    return duration(milliseconds / 1000) if milliseconds >= 1000 else f"{milliseconds:.3g} ms"


_COLUMNS: dict[str, tuple[str, Callable[[Row], str]]] = {  # header → (what it means, a row's text)
    "score": ("the mean over the seeds on the test rows, ± one standard error, over rows and seeds", _score),
    "95 % interval": (
        "such intervals hold the true score, over other test rows of the same kind and other seeds, 19 times of 20",
        _interval,
    ),
    "to soft prompt": (
        "the method's score minus the soft prompt's on the same test rows, in points, with its 95 % interval (paired "
        "bootstrap, and the spread between seeds); ▲ the method is better, ▼ it is worse, beyond that interval; "
        "without a sign there is no verdict. Each interval is for itself: of 20, one may be expected to miss",
        lambda row: _marked(row.difference, row.factor),
    ),
    "trained": ("how many numbers are learned", lambda row: _or_none(row.trainable_parameters, amount)),
    "kept": (
        "what is stored for this task, the base model not counted, which all tasks share",
        lambda row: _or_none(row.bytes, lambda number: amount(number, "B")),
    ),
    "training": (
        "time to learn, all choices on validation rows included",
        lambda row: _or_none(row.train_seconds, duration),
    ),
    "memory": (
        "the most memory in use while it learned and answered",
        lambda row: _or_none(row.peak_memory_bytes, lambda number: amount(number, "B")),
    ),
    "latency": ("time for a single request, the median", lambda row: _or_none(row.latency_ms, _latency)),
    "forgets": (
        "perplexity of plain text after learning over that before, without the method's prompt: ×1.00 is nothing "
        "forgotten, higher is worse",
        lambda row: _or_none(row.forgetting, lambda ratio: f"×{ratio:.2f}"),
    ),
    "seeds": ("how many seeds the row is the mean of", lambda row: str(row.seeds)),
}
_PAGE_ONLY = ("95 % interval", "seeds")


def _about(rows: Sequence[Row]) -> str:
    """``smollm2-135m, 135 M parameters; accuracy, % on 1,821 test rows``."""
    size = next((f", {amount(row.base_parameters)} parameters" for row in rows if row.base_parameters), "")
    scored = [row for row in rows if row.score]
    if not scored:
        return f"{rows[0].base}{size}; no scores"
    counts = sorted({row.n for row in scored if row.n})
    on = f" on {' or '.join(f'{count:,}' for count in counts)} test rows" if counts else ""
    seeds = max(row.seeds for row in scored)
    return f"{rows[0].base}{size}; {scored[0].unit}{on}{f'; up to {seeds} seeds' if seeds > 1 else ''}"


def _failures(rows: Sequence[Row]) -> list[str]:
    return [f"{row.method}, {failure}" for row in rows for failure in row.failed]


# --- the terminal ---------------------------------------------------------------------------------


def table(cells: Sequence[Cell]) -> Table:
    """A block for each task and base model, at most 120 columns wide for the methods of ``METHODS``."""
    columns = [name for name in _COLUMNS if name not in _PAGE_ONLY]
    groups = {
        title: [(row, [f"{row.method}{' ◂' if row.method == OURS else ''}", *_texts(row, columns)]) for row in rows]
        for title, rows in grouped(summary(cells)).items()
    }
    lines = [["method", *columns], *(texts for rows in groups.values() for _, texts in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    whole = Table.grid()
    # no narrower on a narrow terminal or in a pipe: cut numbers would be of no use
    whole.add_column(min_width=sum(widths) + 2 * len(columns), overflow="fold")
    for rows in groups.values():
        block = simple_table("method", *(f">{name}" for name in columns))
        for column, width in zip(block.columns, widths, strict=True):
            column.min_width, column.no_wrap = width, True
        for row, texts in rows:
            block.add_row(*map(Text, texts), style="bold" if row.method == OURS else "")
        members = [row for row, _ in rows]
        whole.add_row(Text(f"{members[0].task} · {_about(members)}", style="bold"))
        whole.add_row(block)
        for failure in _failures(members):
            whole.add_row(Text(f"failed: {failure}"))
        whole.add_row("")
    if groups:
        whole.add_row("± one standard error; [95 % interval]; ▲ better, ▼ worse than the soft prompt ◂ beyond it")
    return whole


def _texts(row: Row, columns: Sequence[str]) -> list[str]:
    return [_COLUMNS[name][1](row) for name in columns]


# --- the page -------------------------------------------------------------------------------------


def write(cells: Sequence[Cell], folder: StrPath) -> list[Path]:
    """Writes ``report.html``, which needs no other file, and its figures as PNGs of their own.

    Returns:
        The files, the page first. A figure that the cells have no numbers for is left out.

    Raises:
        ConfigError: matplotlib is not installed.
        OSError: the folder cannot be written.
    """
    folder, rows = local_path(folder), summary(cells)
    groups = grouped(rows)
    figures = _figures(rows)
    page = Page(_title(rows), _verdict(groups))
    _what_was_compared(page, cells)
    if len(groups) > 1:
        _overview(page, rows)
    for title, members in groups.items():
        page.heading(title)
        page.paragraph(_about(members) + ".")
        if len(groups) > 1:
            page.paragraph(_verdict_on_one(title, members))
        texts = [[row.method, *_texts(row, list(_COLUMNS))] for row in members]
        strong = [i for i, row in enumerate(members) if row.method == OURS]
        page.table(["method", *(f">{name}" for name in _COLUMNS)], texts, strong=strong)
        for failure in _failures(members):
            page.paragraph(f"Failed: {failure}")
    if figures:
        page.heading("Figures")
    for figure, caption in figures.values():
        page.figure(figure, caption, f"{caption} The numbers are in the tables above.")
    _explanations(page, cells, rows)
    page.save(folder / "report.html")
    paths = [folder / "report.html"]
    for name, (figure, _) in figures.items():
        with atomic_writer(folder / name) as file:
            file.write(plots.png(figure))
        paths.append(folder / name)
    return paths


def _title(rows: Sequence[Row]) -> str:
    tasks = list(dict.fromkeys(row.task for row in rows))
    methods = len({row.method for row in rows})
    if not rows:
        return "A comparison without results"
    where = tasks[0] if len(tasks) == 1 else f"{len(tasks)} tasks"
    return f"{methods} {'ways' if methods != 1 else 'way'} to adapt a language model to {where}"


def _what_was_compared(page: Page, cells: Sequence[Cell]) -> None:
    page.heading("What was compared")
    budgets = sorted({cell["budget_seconds"] for cell in cells if cell.get("budget_seconds")})
    times = " or ".join(f"{budget / 60:g} min" if budget >= 60 else f"{budget:g} s" for budget in budgets)
    budget = f" Each had {times} to learn, all choices included." if budgets else ""
    page.paragraph(
        "Every method saw the same rows, in the same template, and was scored in the same way. Whatever could be "
        f"chosen was chosen on validation rows; the test rows, which are reported here, decided nothing.{budget}"
    )
    page.paragraph(
        "Scores are followed by ± one standard error. Differences are the method minus the soft prompt, in points, "
        "with a 95 % interval in brackets: ▲ better, ▼ worse than the soft prompt, both beyond that interval. Where "
        "there is no sign, the numbers allow no verdict. Methods and columns are explained at the end."
    )


def _overview(page: Page, rows: Sequence[Row]) -> None:
    """How often each method is better or worse than the soft prompt, and by how much on average."""
    if not any(row.difference for row in rows):
        return
    page.heading("Over all tasks")
    page.paragraph(
        "On how many tasks each method is better or worse than the soft prompt beyond the 95 % interval, and the mean "
        "of its differences, in points, with its interval for these very tasks."
    )
    metrics = list(dict.fromkeys(row.metric for row in rows if row.difference))
    names = (METRICS.get(str(metric), str(metric)) for metric in metrics)
    several = len({row.base for row in rows}) > 1
    compared: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.difference:
            compared.setdefault((row.base, row.method), []).append(row)
    order = {method: place for place, method in enumerate(METHODS)}
    bases = list(dict.fromkeys(base for base, _ in compared))
    lines = []
    for base, method in sorted(compared, key=lambda key: (bases.index(key[0]), order.get(key[1], len(order)))):
        members = compared[base, method]
        signs = [row.difference.sign for row in members if row.difference]
        means = (_mean_difference([row for row in members if row.metric == metric]) for metric in metrics)
        counts = (str(signs.count(sign)) for sign in (1, -1, 0))
        lines.append([*([base] if several else []), method, *counts, *means])
    columns = ["method", ">▲ better", ">▼ worse", ">no verdict", *(f">mean difference, {name}" for name in names)]
    page.table([*(["base model"] if several else []), *columns], lines)


def _mean_difference(rows: Sequence[Row]) -> str:
    """Over tasks, whose test rows are independent: squared half-widths add up."""
    differences = [row.difference for row in rows if row.difference]
    if not differences:
        return _NONE
    count = len(differences)
    value = sum(difference.value for difference in differences) / count
    found = [
        (one.value - one.low, one.high - one.value)
        for one in differences
        if one.low is not None and one.high is not None
    ]
    if len(found) < count:
        return _signed(Estimate(value, None, None), rows[0].factor)
    below, above = (math.hypot(*side) / count for side in zip(*found, strict=True))
    return _marked(Estimate(value, value - below, value + above), rows[0].factor)


def _figures(rows: Sequence[Row]) -> dict[str, tuple[Figure, str]]:
    """File name → figure and caption, of those figures that there are numbers for."""
    groups = grouped(rows)
    tasks = {row.task: [other for other in rows if other.task == row.task] for row in rows}
    named = ", of which only the best is named" if len(groups) > 1 else ""
    key = f"Bars are 95 % intervals; grey marks are hard prompts{named}"
    drawn = {
        "score_vs_parameters.png": (
            plots.score_against_parameters(groups),
            f"Score against the number of trained parameters; what trains none stands side by side on grey. {key}.",
        ),
        "score_vs_time.png": (
            plots.score_against_time(groups),
            f"Score against the time to learn, all choices on validation rows included. {key}.",
        ),
        "learning_curves.png": (
            plots.learning_curves(groups),
            "Validation score while learning, a line for each seed.",
        ),
        "score_vs_size.png": (
            plots.score_against_size(tasks),
            f"Score against the size of the base model, as in figure 1 of Lester et al. (2021). {key}.",
        ),
    }
    return {name: (figure, caption) for name, (figure, caption) in drawn.items() if figure is not None}


def _explanations(page: Page, cells: Sequence[Cell], rows: Sequence[Row]) -> None:
    """What the names mean, what was chosen, and with what it was run."""
    used = {row.method for row in rows}
    page.heading("What the methods are")
    page.table(["method", "what it is"], [[method, text] for method, text in METHODS.items() if method in used])
    page.heading("What the columns mean")
    page.table(["column", "what it says"], [[name, text] for name, (text, _) in _COLUMNS.items()])
    chosen = [
        [
            cell["task"],
            cell["base"],
            cell["method"],
            str(cell["seed"]),
            shortened(json.dumps(cell["chosen"], ensure_ascii=False), 200),
        ]
        for cell in cells
        if cell.get("chosen")
    ]
    if chosen:
        page.heading("What was chosen on validation rows")
        page.table(["task", "base model", "method", ">seed", "chosen"], chosen)
    versions: dict[str, dict[str, None]] = {}
    for cell in cells:
        for library, version in (cell.get("versions") or {}).items():
            versions.setdefault(library, {})[version] = None
    if versions:
        page.heading("Versions")
        page.paragraph(
            ", ".join(f"{library} {' and '.join(found)}" for library, found in sorted(versions.items())) + "."
        )
