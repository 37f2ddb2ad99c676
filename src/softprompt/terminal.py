"""What the command line shows: results on stdout, progress and warnings on stderr."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from softprompt.data_checks import Reading
from softprompt.evaluate import OneAnswer
from softprompt.evaluate import Progress as Report
from softprompt.train import Step, Training
from softprompt.training_time import TrainingTime
from softprompt.wording import counted

# No markup: a label, a path or a review may well hold square brackets.
stdout = Console(markup=False, highlight=False, emoji=False, soft_wrap=True)
stderr = Console(markup=False, highlight=False, emoji=False, soft_wrap=True, stderr=True)

_IN_PERCENT_OR_NATS = {"bleu", "perplexity"}


Clock = Callable[[], float]
"""Seconds since some moment."""
LINE_EVERY = 60.0
"""The least seconds between two lines about progress where nothing can be redrawn."""


def watch(training: Training, clock: Clock = time.monotonic) -> None:
    """Trains to the end. Says what is planned and, after some steps, how long that takes. Then there is a progress bar,
    or a line a minute where stderr is no terminal. A line for each validation stays.

    Raises:
        KeyboardInterrupt: the user pressed Ctrl-C; ``training.result()`` is the best so far.
    """
    if not training.stopped and training.step < training.total:  # one that goes on may have nothing left to do
        stderr.print(_planned(training))
    expected, first, told = TrainingTime(training.schedule), training.step, False
    unit = TextColumn("loss {task.fields[loss]}  {task.fields[metric]}  {task.fields[speed]}")
    with _bar(unit, TextColumn("{task.fields[left]}")) as bar, _ctrl_c() as pressed:
        row = bar.add_task("step", total=training.total, completed=first, loss="–", metric="", speed="", left="")
        mean, metric, left = 0.0, "", ""
        minute, doubt = Minute(clock), _OneAnswer()
        last = began = clock()
        for count, step in enumerate(training, start=1):
            now = clock()
            if count > 1:  # the first may compile
                expected.saw_step(step.seconds, step.tokens)
            mean += (step.loss - mean) / min(count, 20)
            if step.validation is not None:
                expected.saw_validation(now - last - step.seconds)
                found = step.validation["metrics"][0]
                metric = f"{found['metric']} {number(found['metric'], found['value'])}"
                line = f"step {step.number:>5,}/{step.total:,}  loss {mean:.3f}  validation {plain_metric(found)}"
                bar.console.print(line + "  best so far" * step.improved)
                doubt.saw(step)
            last = now
            if expected.ready and step.number < step.total:
                seconds = expected.left(step.number)
                left = f"{roughly(seconds)} left"
                if not told:
                    bar.console.print(_estimated(expected, now - began + seconds, first, training.config.patience))
                    told = True
            if not stderr.is_terminal and step.number < step.total and minute.is_over():
                shown = (f"step {step.number:,}/{step.total:,}", f"loss {mean:.3f}", left)
                stderr.print(", ".join(filter(None, shown)))
            speed = f"{training.tokens / max(training.seconds, 1e-9):,.0f} tokens/s"
            bar.update(row, completed=step.number, loss=f"{mean:.3f}", metric=metric, speed=speed, left=left)
            if pressed:
                raise KeyboardInterrupt


class _OneAnswer:
    """Warns where nearly all validation rows are given one answer: at the second such validation in a row, when the
    start is behind it, and again each time after another answer was seen."""

    def __init__(self) -> None:
        self._times = 0

    def saw(self, step: Step) -> None:
        """Takes a step that ended with a validation."""
        found = (step.validation or {}).get("one_answer")
        self._times = self._times + 1 if found else 0
        if found and self._times == 2:
            said = OneAnswer(found["label"], found["share"], found["gold_share"])
            stderr.print(
                f"warning: the soft prompt {said}: it does not tell the labels apart so far. If that stays so, try "
                f"more steps or --parametrisation prefix, and look at full fine-tuning with `softprompt compare`."
            )


def _planned(training: Training) -> str:
    """What a training will do, before it does any of it."""
    config, schedule = training.config, training.schedule
    on = f"on {counted(schedule.rows, 'row')}"
    every = "after every step" if schedule.every == 1 else f"every {schedule.every:,} steps"
    parts = [
        f"plan: {counted(schedule.total, 'step')} of {counted(config.batch_size, 'row')}"
        + f", of which {training.step:,} are done" * bool(training.step),
        " or ".join(f"{length:,}" for length in dict.fromkeys((config.num_virtual_tokens or 0, *config.lengths)))
        + (" virtual token" if config.longest == 1 else " virtual tokens"),
        f"a validation {every} {on}, {len(schedule.validations):,} in all"
        if len(schedule.validations) > 1
        else f"one validation {on} at the end",
    ]
    if config.tries > 1:
        parts.append(f"{config.tries} starts, of which the best goes on")
    return "; ".join(parts)


def _estimated(expected: TrainingTime, seconds: float, done: int, patience: int) -> str:
    """How long a training takes that had ``done`` steps behind it, and why."""
    schedule = expected.schedule
    checks = schedule.validations_after(done)
    steps = f"{counted(schedule.total - done, 'step')} of {short(expected.a_step)}"
    about = "" if expected.validations_seen else "about "
    may_end = 0 < patience < checks
    early = f"; it ends early once {counted(patience, 'validation')} in a row fall behind the best" if may_end else ""
    return (
        f"about {roughly(seconds)}{' at most' * may_end}: {steps}, "
        f"{counted(checks, 'validation')} of {about}{short(expected.a_validation)}{early}"
    )


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
            if not stderr.is_terminal and minute.is_over():
                stderr.print(text)

        yield show


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
def rows_bar(description: str, clock: Clock = time.monotonic) -> Iterator[Report]:
    """A progress bar over rows; a line a minute where stderr is no terminal."""
    minute, began = Minute(clock), clock()
    with _bar(TextColumn(""), TimeRemainingColumn()) as bar:
        row = bar.add_task(description, total=None)

        def report(done: int, total: int) -> None:
            bar.update(row, completed=done, total=total)
            if not stderr.is_terminal and 0 < done < total and minute.is_over():
                left = (clock() - began) * (total - done) / done
                stderr.print(f"{description}: {done:,} of {total:,}, about {roughly(left)} left")

        yield report


def _bar(extra: ProgressColumn, time_left: ProgressColumn) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(16), MofNCompleteColumn(), extra, time_left)
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
