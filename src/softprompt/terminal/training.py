"""A training on the terminal: what is planned, how far it is, how long it takes."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from rich.progress import TextColumn

from softprompt.data.wording import counted
from softprompt.drawing.words import number, plain_metric, roughly, short
from softprompt.terminal.console import Clock, Minute, can_redraw, progress_bar, stderr
from softprompt.tuning.step import Alarm
from softprompt.tuning.tracking import Track
from softprompt.tuning.training import Training
from softprompt.tuning.training_time import TrainingTime


def watch(training: Training, clock: Clock = time.monotonic, *, track: Track = lambda step: None) -> None:
    """Trains to the end. Says what is planned and, after some steps, how long that takes. Then there is a progress bar,
    or a line a minute where stderr is no terminal. A line for each validation stays. ``track`` gets each step.

    Raises:
        KeyboardInterrupt: the user pressed Ctrl-C; ``training.result()`` is the best so far.
    """
    if not training.stopped and training.step < training.total:  # one that goes on may have nothing left to do
        stderr.print(_planned(training))
    expected, first, told = TrainingTime(training.schedule), training.step, False
    unit = TextColumn("loss {task.fields[loss]}  {task.fields[metric]}  {task.fields[speed]}")
    with progress_bar(unit, TextColumn("{task.fields[left]}")) as bar, heard_ctrl_c() as pressed:
        row = bar.add_task("step", total=training.total, completed=first, loss="–", metric="", speed="", left="")
        mean, metric, left = 0.0, "", ""
        minute = Minute(clock)
        last = began = clock()
        for count, step in enumerate(training, start=1):
            track(step)
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
            say_alarms(step.alarms)
            last = now
            if expected.ready and step.number < step.total:
                seconds = expected.left(step.number)
                left = f"{roughly(seconds)} left"
                if not told:
                    bar.console.print(_estimated(expected, now - began + seconds, first, training.config.patience))
                    told = True
            if not can_redraw() and step.number < step.total and minute.is_over():
                shown = (f"step {step.number:,}/{step.total:,}", f"loss {mean:.3f}", left)
                stderr.print(", ".join(filter(None, shown)))
            speed = f"{training.tokens / max(training.seconds, 1e-9):,.0f} tokens/s"
            bar.update(row, completed=step.number, loss=f"{mean:.3f}", metric=metric, speed=speed, left=left)
            if pressed:
                raise KeyboardInterrupt


def say_alarms(alarms: Sequence[Alarm], name: str = "") -> None:
    """Says on stderr what gives reason to doubt a training."""
    for alarm in alarms:
        stderr.print(f"warning: {name}: {alarm.sentence}" if name else f"warning: {alarm.sentence}")


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


@contextmanager
def heard_ctrl_c() -> Iterator[list[int]]:
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
