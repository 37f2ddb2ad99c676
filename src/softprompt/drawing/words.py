"""Numbers and texts as people read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich.table import Table

_IN_PERCENT_OR_NATS = {"bleu", "perplexity"}


def number(name: str, value: float | None) -> str:
    """A metric's value with as many decimals as make sense."""
    return "–" if value is None else f"{value:.2f}" if name in _IN_PERCENT_OR_NATS else f"{value:.4f}"


def plain_metric(metric: Mapping[str, Any]) -> str:
    """``accuracy 0.9072 ± 0.0068 (n = 872)``."""
    name = str(metric["metric"])
    value, error = number(name, metric["value"]), number(name, metric["stderr"])
    return f"{name} {value} ± {error} (n = {metric['n']:,})"


def simple_table(*columns: str) -> Table:
    """A table without frame; a column's name with ``>`` in front is aligned to the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    return table


def duration(seconds: float) -> str:
    """``12.3 s``, ``5 min 12 s``, or from an hour on ``1 h 12 min``; whole minutes and hours without a 0 behind."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        large, small, units = *divmod(whole, 60), ("min", "s")
    else:
        large, small, units = *divmod(round(seconds / 60), 60), ("h", "min")
    return f"{large:,} {units[0]}" + f" {small} {units[1]}" * (small > 0)


def roughly(seconds: float) -> str:
    """``40 s``, ``5 min 10 s``, ``38 min``, ``1 h 12 min``: no finer than an estimate is."""
    grain = 1 if seconds < 60 else 10 if seconds < 600 else 60
    whole = max(1, grain * round(seconds / grain))
    return f"{whole} s" if whole < 60 else duration(whole)


def short(seconds: float) -> str:
    """``0.013 s``, ``1.3 s``, ``14 s``: two digits below ten seconds, then as an estimate."""
    return f"{seconds:.2g} s" if seconds < 9.95 else roughly(seconds)


def amount(number: float, unit: str = "") -> str:
    """``11.5 k`` or, with the unit ``B``, ``269 MB``: three digits at most, in steps of 1,000."""
    number, power = float(f"{number:.3g}"), 0
    while abs(number) >= 1000 and power < 4:
        number, power = number / 1000, power + 1
    prefix = ("", "k", "M", "G" if unit else "B", "T")[power]
    return f"{number:.3g} {prefix}{unit}".strip()


def shortened(text: str, width: int) -> str:
    """The text on one line of at most ``width`` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def shown(text: str, width: int = 24) -> str:
    """A token as it is written in Python, so that blanks and line ends are seen, on one line that does not break."""
    return shortened(repr(text), width).replace(" ", "\u00a0")


def share(number: float) -> str:
    """``95 %``."""
    return f"{100 * number:.0f} %"


def markdown(text: str) -> str:
    """The text with every mark that Markdown or HTML would take for its own escaped."""
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]<>#|~$&" else letter for letter in text)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, and a blank one; a column's name with ``>`` in front is aligned to the right."""
    head = [column.removeprefix(">") for column in columns]
    rule = ["---:" if column.startswith(">") else "---" for column in columns]
    written = [[markdown(cell) for cell in row] for row in (head, *rows)]
    lines = [f"| {' | '.join(cells)} |" for cells in (written[0], rule, *written[1:])]
    return [*lines, ""]


def html_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as a notebook shows it; all text is escaped."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def short_names(bases: Iterable[str]) -> dict[str, str]:
    """Base model's id or path → its last part; where several share that, as many of the last parts as tell them
    apart."""
    parts = {base: Path(base).parts or (base,) for base in bases}
    most = max(map(len, parts.values()), default=0)

    def last(base: str, count: int) -> str:
        return str(Path(*parts[base][-count:]))

    names = {base: last(base, 1) for base in parts}
    for count in range(2, most + 1):
        shown = list(names.values())
        names = {base: last(base, count) if shown.count(name) > 1 else name for base, name in names.items()}
    shown = list(names.values())
    return {base: base if shown.count(name) > 1 else name for base, name in names.items()}
