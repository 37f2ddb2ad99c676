"""What the command line shows: results on stdout, progress and warnings on stderr."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from softprompt.data_checks import Reading
from softprompt.evaluate import Progress as Report
from softprompt.train import Training

# No markup: a label, a path or a review may well hold square brackets.
stdout = Console(markup=False, highlight=False, emoji=False, soft_wrap=True)
stderr = Console(markup=False, highlight=False, emoji=False, soft_wrap=True, stderr=True)

_IN_PERCENT_OR_NATS = {"bleu", "perplexity"}


def watch(training: Training) -> None:
    """Trains to the end with a progress bar; a line for each validation stays.

    Raises:
        KeyboardInterrupt: the user pressed Ctrl-C; ``training.result()`` is the best so far.
    """
    unit = TextColumn("loss {task.fields[loss]}  {task.fields[metric]}  {task.fields[speed]}")
    with _bar(unit) as bar, _ctrl_c() as pressed:
        row = bar.add_task("step", total=training.total, completed=training.step, loss="–", metric="", speed="")
        mean, metric = 0.0, ""
        for count, step in enumerate(training, start=1):
            mean += (step.loss - mean) / min(count, 20)
            if step.validation is not None:
                found = step.validation["metrics"][0]
                metric = f"{found['metric']} {number(found['metric'], found['value'])}"
                line = f"step {step.number:>5,}/{step.total:,}  loss {mean:.3f}  validation {plain_metric(found)}"
                bar.console.print(line + "  best so far" * step.improved)
            speed = f"{training.tokens / max(training.seconds, 1e-9):,.0f} tokens/s"
            bar.update(row, completed=step.number, loss=f"{mean:.3f}", metric=metric, speed=speed)
            if pressed:
                raise KeyboardInterrupt


@contextmanager
def _ctrl_c() -> Iterator[list[int]]:
    """A list that is no longer empty once Ctrl-C was pressed. Python drops the exception itself where it comes up in a
    finalizer or in a callback of a library."""
    pressed: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        pressed.append(number)
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    main = threading.current_thread() is threading.main_thread()  # which alone may set it, and gets the signal
    if not main or before is signal.SIG_IGN:  # a shell's background job is not to hear it
        yield pressed
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def rows_bar(description: str) -> Iterator[Report]:
    """A progress bar over rows."""
    with _bar(TextColumn("")) as bar:
        row = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(row, completed=done, total=total)


def _bar(extra: ProgressColumn) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(16), MofNCompleteColumn(), extra, TimeRemainingColumn())
    # not on a terminal, there is nothing to redraw
    return Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal)


def say_reading(reading: Reading) -> None:
    """Says on stderr what the data were taken for, and what in them is probably a mistake."""
    stderr.print(str(reading))
    for doubt in reading.doubts:
        stderr.print(f"warning: {doubt}")


def warn_truncated(truncated: int, max_length: int) -> None:
    """Says on stderr how many inputs were cut, if any."""
    if truncated:
        inputs = "input did" if truncated == 1 else "inputs did"
        stderr.print(
            f"warning: {truncated:,} {inputs} not fit into {max_length:,} tokens, template and target included; "
            f"the end of the input was cut"
        )


def number(name: str, value: float | None) -> str:
    """A metric's value with as many decimals as make sense."""
    return "–" if value is None else f"{value:.2f}" if name in _IN_PERCENT_OR_NATS else f"{value:.4f}"


def plain_metric(metric: Mapping[str, Any]) -> str:
    """``accuracy 0.9072 ± 0.0068 (n = 872)``."""
    name = str(metric["metric"])
    value, error = number(name, metric["value"]), number(name, metric["stderr"])
    return f"{name} {value} ± {error} (n = {metric['n']:,})"


def metrics_table(metrics: Iterable[Mapping[str, Any]]) -> Table:
    """A row a metric, with its 95 % interval."""
    table = simple_table("metric", ">value", ">± stderr", ">95 % interval", ">n")
    for metric in metrics:
        name = str(metric["metric"])
        value, stderr_, low, high = (number(name, metric[key]) for key in ("value", "stderr", "low", "high"))
        table.add_row(name, value, stderr_, f"{low} to {high}", f"{metric['n']:,}")
    return table


def simple_table(*columns: str) -> Table:
    """A table without frame; a column's name with ``>`` in front is aligned to the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    return table


def print_rows(rows: Sequence[tuple[str, str]]) -> None:
    """Names and values on stdout, a line each."""
    width = max(len(key) for key, _ in rows)
    for key, value in rows:
        stdout.print(f"{key:<{width}}  {value}")


def duration(seconds: float) -> str:
    """``5 min 12 s``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes:,} min {rest} s" if minutes else f"{seconds:.1f} s"


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
