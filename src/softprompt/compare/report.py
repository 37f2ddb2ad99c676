"""What ``compare`` found, to be read: a table for the terminal, and a page with figures.

The input is the list of cells of ``results.json``, one for each task, method, base model and seed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from softprompt.compare import figures as plots
from softprompt.compare.summary import (
    METRICS,
    ROUNDING,
    Cell,
    Estimate,
    Row,
    grouped,
    summary,
    times,
)
from softprompt.data.wording import counted, quoted
from softprompt.drawing import style
from softprompt.drawing.page import Page
from softprompt.drawing.words import amount, duration, shortened, simple_table
from softprompt.files import StrPath, atomic_writer, local_path
from softprompt.methods.registry import MAJORITY, METHODS, OURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HARD = tuple(name for name, method in METHODS.items() if method.kind == "hard prompt")
_TUNED = tuple(name for name, method in METHODS.items() if method.kind == "weights")


# --- the verdict ----------------------------------------------------------------------------------


def verdict(cells: Sequence[Cell]) -> str:
    """What the numbers say about the soft prompt, in a few sentences.

    Of several rivals of one kind the one with the highest test score counts, which favours that kind. With labels the
    majority class is always one: where no hard prompt scores above it, being better than hard prompts says little.
    """
    return _verdict(grouped(summary(cells)))


def _verdict(groups: Mapping[str, Sequence[Row]]) -> str:
    if len(groups) == 1:
        return _verdict_on_one(*next(iter(groups.items())))
    hard, low = {}, []
    for title, rows in groups.items():
        hard[title] = _best(rows, _HARD)
        if _is_majority_as_good(rows):
            hard[title] = _best(rows, [MAJORITY])
            low.append(title)
    instead = f", or the majority class where no hard prompt scores above it ({', '.join(low)})," if low else ""
    sentences = [
        _verdict_on_all(f"the best hard prompt{instead}", hard),
        _verdict_on_all("the majority class", {title: _best(rows, [MAJORITY]) for title, rows in groups.items()}),
        _verdict_on_all(
            "the better of LoRA and full fine-tuning", {title: _best(rows, _TUNED) for title, rows in groups.items()}
        ),
    ]
    if not any(sentences):
        return "There is nothing yet that the soft prompt can be compared with."
    if unknown := [title for title, rows in groups.items() if _lacks_majority(rows)]:
        sentences.insert(2, f"There is no score of the majority class on {', '.join(unknown)}.")
    return " ".join(filter(None, sentences))


def _verdict_on_all(rival: str, rivals: Mapping[str, Row | None]) -> str:
    """A sentence about one kind of rival, of each task the best; empty if there is none to compare with."""
    found: dict[int, list[str]] = {-1: [], 1: [], 0: []}
    for title, best in rivals.items():
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
    hard, majority, tuned = (_best(rows, methods) for methods in (_HARD, [MAJORITY], _TUNED))
    counts = _is_majority_as_good(rows)
    constant = "" if majority is None else _constant(majority)
    if hard is not None:
        limit = f", which is not above {constant}" if counts else ""
        parts.append(_against(f"the best hard prompt, {hard.method} with {_score(hard)}{limit}", hard))
    if majority is not None:
        remark = ", and this is the comparison that counts" if counts else ""
        parts.append(_against(f"{constant} with {_score(majority)}{remark}", majority))
    elif _lacks_majority(rows):
        parts.append("There is no score of the majority class to compare with.")
    if tuned is not None:
        parts.append(_against(f"the better of LoRA and full fine-tuning, {tuned.method} with {_score(tuned)}", tuned))
    named = [row.method for row in (hard, majority, tuned) if row is not None]
    others = [row.method for row in rows if row.difference and row.difference.sign > 0 and row.method not in named]
    if others:
        parts.append(f"Also better than the soft prompt: {', '.join(others)}.")
    return " ".join(filter(None, parts))


def _against(rival: str, row: Row) -> str:
    """What the rival's difference to the soft prompt says; empty if there is none."""
    difference, factor = row.difference, row.factor
    if difference is None:
        return ""
    if not difference.sign or difference.low is None or difference.high is None:
        found = _signed(difference, factor)
        return f"There is no verdict against {rival}: the difference to the soft prompt is {found}."
    low, high = sorted(factor * abs(end) for end in (difference.low, difference.high))
    value = _not_zero(factor * abs(difference.value))
    return (
        f"It is {value} points (95 % interval {_not_zero(low)} to {_not_zero(high)}) "
        f"{'below' if difference.sign > 0 else 'above'} {rival}."
    )


def _constant(majority: Row) -> str:
    """``always answering 'yes'``."""
    answer = "with the most frequent label" if majority.answer is None else repr(shortened(majority.answer, 40))
    return f"always answering {answer}"


def _is_majority_as_good(rows: Sequence[Row]) -> bool:
    """Whether no hard prompt scores above the majority class."""
    hard, majority = _best(rows, _HARD), _best(rows, [MAJORITY])
    if hard is None or majority is None or hard.score is None or majority.score is None:
        return False
    return hard.score.value < majority.score.value + ROUNDING


def _lacks_majority(rows: Sequence[Row]) -> bool:
    """Whether labels are compared without the score of the majority class."""
    scored = [row for row in rows if row.score is not None]
    return any(row.metric == "accuracy" and row.difference for row in scored) and _best(scored, [MAJORITY]) is None


def _best(rows: Sequence[Row], methods: Sequence[str]) -> Row | None:
    """The one with the highest score."""
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
    value = f"{factor * estimate.value:+.1f}"
    if estimate.low is None or estimate.high is None:
        return value.replace("-", "−")
    ends = (factor * estimate.low, factor * estimate.high)
    low, high = (_not_zero(end, "+") if estimate.sign else f"{end:+.1f}" for end in ends)
    return f"{value} [{low}, {high}]".replace("-", "−")


def _not_zero(number: float, sign: str = "") -> str:
    """The number with one decimal, or with as many as tell it from 0: an end of an interval that excludes 0."""
    text = f"{number:{sign}.1f}"
    return text if float(text) or not number else f"{number:{sign}.1g}"


def _marked(estimate: Estimate | None, factor: float) -> str:
    """The same with a sign in front if the interval excludes 0."""
    if estimate is None:
        return _NONE
    return {1: "▲ ", -1: "▼ ", 0: ""}[estimate.sign] + _signed(estimate, factor)


def _latency(milliseconds: float) -> str:
    return duration(milliseconds / 1000) if milliseconds >= 1000 else f"{milliseconds:.3g} ms"


def _mcc(value: float) -> str:
    """From −1.00 to 1.00."""
    return f"{value:.2f}".replace("-", "−").replace("−0.00", "0.00")


_COLUMNS: dict[str, tuple[str, Callable[[Row], str]]] = {  # header → (what it means, a row's text)
    "score": ("the mean over the seeds on the test rows, ± one standard error, over rows and seeds", _score),
    "95 % interval": (
        "such intervals hold the true score, over other test rows of the same kind and other seeds, 19 times of 20",
        _interval,
    ),
    "macro-F1": (
        "each label's F1, the mean over the labels, in percent: it is low where a label is never found, however rare "
        "that label is",
        lambda row: _or_none(row.macro_f1, lambda share: f"{100 * share:.1f}"),
    ),
    "MCC": (
        "Matthews' correlation between answers and labels, from −1 to 1: 0 is what the same answer to all rows comes "
        "to, or one that does not depend on the row",
        lambda row: _or_none(row.mcc, _mcc),
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
        lambda row: _or_none(row.forgetting, times),
    ),
    "seeds": ("how many seeds the row is the mean of", lambda row: str(row.seeds)),
}
_PAGE_ONLY = ("95 % interval", "seeds")
_OF_LABELS, _FOR_THEM = ("macro-F1", "MCC"), ("trained", "memory")
"""Columns that free text has no numbers for, and those that make room for them in a terminal."""


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


def _remarks(rows: Sequence[Row]) -> list[str]:
    """What is to be read under a table: failures, methods that give one answer to nearly all rows, trainings that there
    is reason to doubt, and how many rows the trained methods were validated on."""
    failed = [f"failed: {row.method}, {failure}" for row in rows for failure in row.failed]
    one_answer = [f"note: {row.method}, {found}" for row in rows for found in row.one_answer]
    return [*failed, *one_answer, *_alarms(rows), *(f"note: {text}" for text in _validated(rows))]


def _alarms(rows: Sequence[Row]) -> list[str]:
    """What there is reason to doubt, each once, with those that it was said of."""
    said: dict[str, dict[str, list[int]]] = {}
    for row in rows:
        for seed, sentence in row.alarms:
            said.setdefault(sentence, {}).setdefault(row.method, []).append(seed)
    return [
        f"alarm: {'; '.join(f'{method}, {_seeds(seeds)}' for method, seeds in found.items())}: {sentence}"
        for sentence, found in said.items()
    ]


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def _validated(rows: Sequence[Row]) -> list[str]:
    """On how many rows trainings were validated, if that is known: one sentence."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for row in rows:
        if row.validation_rows:
            groups.setdefault(row.validation_rows, []).append(row.method)
    if len(groups) < 2:
        return [f"trained methods were validated on {_counts(numbers)} rows" for numbers in groups]
    parts = (f"{', '.join(dict.fromkeys(names))} on {_counts(numbers)}" for numbers, names in groups.items())
    return [f"trained methods were validated on different numbers of rows: {'; '.join(parts)}"]


def _counts(numbers: Sequence[int]) -> str:
    return " or ".join(f"{number:,}" for number in numbers)


def _columns(rows: Sequence[Row]) -> list[str]:
    """Those of ``_COLUMNS`` that the rows can have numbers for."""
    labels = any(row.metric == "accuracy" for row in rows)
    return [name for name in _COLUMNS if labels or name not in _OF_LABELS]


# --- what was chosen, in words ----------------------------------------------------------------------


def _chosen(found: Mapping[str, Any]) -> str:
    """A cell's ``chosen`` in words: ``learning rate 1e-4; best after 293 of 400 steps``. Other keys are shown, too."""
    rest, words = dict(found), []

    def take(name: str, kind: type | tuple[type, ...]) -> Any:
        """The value, and it is out of the rest; None if there is none of that kind."""
        return rest.pop(name) if isinstance(rest.get(name), kind) else None

    if (rate := take("lr", (int, float))) is not None:
        words.append(f"learning rate {_rate(rate)}")
    if (penalty := take("C", (int, float))) is not None:
        words.append(f"inverse penalty C = {penalty:g}")
    if (best := take("best_step", int)) is not None:
        words.append(_best_step(best, take("steps", int)))
    elif (steps := take("steps", int)) is not None:
        words.append(f"{counted(steps, 'step')}, the last one kept")
    if (shots := take("k", int)) is not None:
        words.append(counted(shots, "example"))
    if (number := take("instruction", int)) is not None:
        text = take("instruction_text", str)
        words.append(f"instruction {number + 1}" + (f": {quoted(text.strip())}" if text else ""))
    elif "instruction" in rest and rest["instruction"] is None:
        del rest["instruction"]
        words.append("no instruction")
    if (members := take("soft_prompts", int)) is not None:
        words.append(f"made of {counted(members, 'soft prompt')}")
    for name, value in rest.items():
        words.append(f"{name}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}")
    return shortened("; ".join(words), 200)


def _best_step(best: int, steps: int | None) -> str:
    if best == 0:
        return "best at the start, " + (f"before any of {counted(steps, 'step')}" if steps else "no step was done")
    return (
        f"best after {counted(best, 'step')}" if steps is None else f"best after {best:,} of {counted(steps, 'step')}"
    )


def _rate(rate: float) -> str:
    """``0.3``, ``1e-4``."""
    if rate >= 0.001:
        return f"{rate:g}"
    mantissa, exponent = f"{rate:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


# --- the terminal ---------------------------------------------------------------------------------


def table(cells: Sequence[Cell]) -> Table:
    """A block for each task and base model, at most 120 columns wide for the methods of ``METHODS``."""
    rows = summary(cells)
    columns = _columns(rows)
    left_out = (*_PAGE_ONLY, *(_FOR_THEM if _OF_LABELS[0] in columns else ()))
    columns = [name for name in columns if name not in left_out]
    groups = {
        title: [(row, [f"{row.method}{' ◂' if row.method == OURS else ''}", *_texts(row, columns)]) for row in members]
        for title, members in grouped(rows).items()
    }
    lines = [["method", *columns], *(texts for block in groups.values() for _, texts in block)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    whole = Table.grid()
    # no narrower on a narrow terminal or in a pipe: cut numbers would be of no use
    whole.add_column(min_width=sum(widths) + 2 * len(columns), overflow="fold")
    for shown in groups.values():
        block = simple_table("method", *(f">{name}" for name in columns))
        for column, width in zip(block.columns, widths, strict=True):
            column.min_width, column.no_wrap = width, True
        for row, texts in shown:
            block.add_row(*map(Text, texts), style="bold" if row.method == OURS else "")
        members = [row for row, _ in shown]
        whole.add_row(Text(f"{members[0].task} · {_about(members)}", style="bold"))
        whole.add_row(block)
        for remark in _remarks(members):
            whole.add_row(Text(remark))
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
    columns = _columns(rows)
    _what_was_compared(page, cells)
    if len(groups) > 1:
        _overview(page, rows)
    for title, members in groups.items():
        page.heading(title)
        page.paragraph(_about(members) + ".")
        if len(groups) > 1:
            page.paragraph(_verdict_on_one(title, members))
        texts = [[row.method, *_texts(row, columns)] for row in members]
        strong = [i for i, row in enumerate(members) if row.method == OURS]
        page.table(["method", *(f">{name}" for name in columns)], texts, strong=strong)
        for remark in _remarks(members):
            page.paragraph(remark[0].upper() + remark[1:])
    if figures:
        page.heading("Figures")
    for figure, caption in figures.values():
        page.figure(figure, caption, f"{caption} The numbers are in the tables above.")
    _explanations(page, cells, rows)
    page.save(folder / "report.html")
    paths = [folder / "report.html"]
    for name, (figure, _) in figures.items():
        with atomic_writer(folder / name) as file:
            file.write(style.png(figure))
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
    if shared := sorted({cell["method"] for cell in cells if cell.get("learned_with")}):
        page.paragraph(
            f"{' and '.join(shared)} learned for several seeds in shared passes. The time of a pass is divided evenly "
            "among them. Each had its whole budget, so it did more steps than alone. The memory is that of all of them "
            "together."
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
            "Validation score while learning, a line for each seed."
            + "".join(f" {text[0].upper()}{text[1:]}." for text in _validated(rows)),
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
    page.table(["method", "what it is"], [[name, method.words] for name, method in METHODS.items() if name in used])
    page.heading("What the columns mean")
    page.table(["column", "what it says"], [[name, _COLUMNS[name][0]] for name in _columns(rows)])
    chosen = [
        [cell["task"], cell["base"], cell["method"], str(cell["seed"]), _chosen(cell["chosen"])]
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
