"""What the command line shows: results on stdout, progress and warnings on stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from softprompt.drawing.words import number, roughly, simple_table
from softprompt.files import strict_json

if TYPE_CHECKING:
    from softprompt.data.checks import Reading
    from softprompt.tasks.predict import Progress as Report


def print_json(document: dict[str, Any]) -> None:
    print(strict_json(document))


# No markup: a label, a path or a review may well hold square brackets.
stdout = Console(markup=False, highlight=False, emoji=False, soft_wrap=True)

stderr = Console(markup=False, highlight=False, emoji=False, soft_wrap=True, stderr=True)


Clock = Callable[[], float]
"""Seconds since some moment."""

LINE_EVERY = 60.0
"""The least seconds between two lines about progress where nothing can be redrawn."""


class Minute:
    """Tells when to say something again where nothing can be redrawn: at most once in ``LINE_EVERY`` seconds, and not
    in the first of them."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock, self._last = clock, clock()

    def is_over(self) -> bool:
        """Whether the time has come; if so, it begins anew."""
        now = self._clock()
        over = now - self._last >= LINE_EVERY
        if over:
            self._last = now
        return over


@contextmanager
def notices(clock: Clock = time.monotonic) -> Iterator[Callable[[str], None]]:
    """A function that shows what is being done: on a terminal in a line that changes, elsewhere in a line a minute."""
    minute = Minute(clock)
    with stderr.status("") as line:

        def show(text: str) -> None:
            line.update(text)
            if not can_redraw() and minute.is_over():
                stderr.print(text)

        yield show


@contextmanager
def rows_bar(description: str, clock: Clock = time.monotonic) -> Iterator[Report]:
    """A progress bar over rows; a line a minute where stderr is no terminal."""
    minute, began = Minute(clock), clock()
    with progress_bar(TextColumn(""), TimeRemainingColumn()) as bar:
        row = bar.add_task(description, total=None)

        def report(done: int, total: int) -> None:
            bar.update(row, completed=done, total=total)
            if not can_redraw() and 0 < done < total and minute.is_over():
                left = (clock() - began) * (total - done) / done
                stderr.print(f"{description}: {done:,} of {total:,}, about {roughly(left)} left")

        yield report


def can_redraw() -> bool:
    """Whether a bar can move: on a terminal, and in a notebook that has ipywidgets."""
    return stderr.is_terminal or (stderr.is_jupyter and find_spec("ipywidgets") is not None)


def progress_bar(extra: ProgressColumn, time_left: ProgressColumn) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(16), MofNCompleteColumn(), extra, time_left)
    return Progress(*columns, console=stderr, transient=True, disable=not can_redraw())


def say_reading(reading: Reading, job: str = "") -> None:
    """Says on stderr what the data were taken for, and what in them is probably a mistake; of several, with the name of
    the job."""
    stderr.print(f"{job}: {reading}" if job else str(reading))
    for doubt in reading.doubts:
        stderr.print(f"warning: {job}: {doubt}" if job else f"warning: {doubt}")


def warn_truncated(truncated: int, max_length: int) -> None:
    """Says on stderr how many inputs were cut, if any."""
    if truncated:
        stderr.print(f"warning: {were_cut(truncated, max_length)}")


def were_cut(truncated: int, max_length: int) -> str:
    """How many inputs were cut, at least one, as a sentence without a full stop."""
    inputs = "input did" if truncated == 1 else "inputs did"
    return (
        f"{truncated:,} {inputs} not fit into {max_length:,} tokens, template and target included; the end of the "
        f"input was cut"
    )


def metrics_table(metrics: Iterable[Mapping[str, Any]]) -> Table:
    """A row a metric, with its 95 % interval."""
    table = simple_table("metric", ">value", ">± stderr", ">95 % interval", ">n")
    for metric in metrics:
        name = str(metric["metric"])
        value, stderr_, low, high = (number(name, metric[key]) for key in ("value", "stderr", "low", "high"))
        table.add_row(name, value, stderr_, f"{low} to {high}", f"{metric['n']:,}")
    return table


def print_rows(rows: Sequence[tuple[str, str]]) -> None:
    """Names and values on stdout, a line each."""
    width = max(len(key) for key, _ in rows)
    for key, value in rows:
        stdout.print(f"{key:<{width}}  {value}")
