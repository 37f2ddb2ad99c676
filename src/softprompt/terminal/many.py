"""Several trainings on the terminal: one table for all."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich.live import Live
from rich.table import Table

from softprompt.data.wording import counted
from softprompt.drawing.words import number, roughly, simple_table
from softprompt.terminal.console import Clock, Minute, can_redraw, stderr
from softprompt.terminal.training import heard_ctrl_c
from softprompt.tuning.many import train_together
from softprompt.tuning.step import Step
from softprompt.tuning.training import Training

WORDS = {"steps": "done", "early": "ended early", "not finite": "failed: not finite", "interrupted": "stopped"}
"""Why a training ended, as the table says it."""


@dataclass
class _Seen:
    """What was seen of a training."""

    loss: float = 0.0
    count: int = 0
    validation: str = ""
    ended: bool = False

    def saw(self, step: Step) -> None:
        self.count += 1
        self.loss += (step.loss - self.loss) / min(self.count, 20)
        if step.validation is not None:
            self.validation = _metric(step.validation["metrics"])


def _metric(metrics: Sequence[dict[str, object]]) -> str:
    if not metrics:
        return "–"
    found = metrics[0]
    return f"{found['metric']} {number(str(found['metric']), found['value'])}"  # type: ignore[arg-type]


@dataclass
class _Board:
    """The table of all, and the line in its place where nothing can be redrawn."""

    trainings: Sequence[Training]
    seen: list[_Seen] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.seen = [_Seen() for _ in self.trainings]
        for own, training in zip(self.seen, self.trainings, strict=True):
            if training.validations:
                own.validation = _metric(training.validations[-1]["metrics"])

    def table(self) -> Table:
        table = simple_table("name", ">step", ">loss", "validation", "state")
        for training, own in zip(self.trainings, self.seen, strict=True):
            table.add_row(
                training.name,
                f"{training.step:,}/{training.total:,}",
                f"{own.loss:.3f}" if own.count else "–",
                own.validation or "–",
                state_of(training),
            )
        return table

    def line(self, left: float) -> str:
        ended = sum(training.ended for training in self.trainings)
        going = [
            f"{training.name} {training.step:,}/{training.total:,} loss {own.loss:.3f}"
            for training, own in zip(self.trainings, self.seen, strict=True)
            if not training.ended
        ]
        shown = ", ".join(going[:4]) + f" and {len(going) - 4} more" * (len(going) > 4)
        said = [f"{ended} of {len(self.trainings)} ended", shown, f"about {roughly(left)} left"]
        return "; ".join(part for part in said if part)


def state_of(training: Training) -> str:
    """What a training does, or why it ended, in a word or two."""
    if training.ended:
        return WORDS.get(training.stopped or "steps", training.stopped)
    return "training" if training.step else "waiting"


def watch_together(
    trainings: Sequence[Training],
    clock: Clock = time.monotonic,
    *,
    until: int | None = None,
    ended: Callable[[Training], None] = lambda training: None,
    planned: bool = True,
) -> None:
    """Trains all to their ends, or to the step ``until``, and shows one table of them, or a line a minute where stderr
    is no terminal.

    Args:
        trainings: at least one, see ``train_together``.
        clock: tells the time.
        until: see ``train_together``.
        ended: is told of each training as soon as it has ended, also of those that had ended before.
        planned: say first what is planned.

    Raises:
        KeyboardInterrupt: the user pressed Ctrl-C; ``result()`` of each is its best so far.
    """
    board, minute = _Board(trainings), Minute(clock)
    began, first = clock(), sum(training.step for training in trainings)
    goals = [training.total if until is None else min(until, training.total) for training in trainings]
    if planned:
        stderr.print(_planned(trainings))
    with Live(console=stderr, auto_refresh=False, transient=True) as live, heard_ctrl_c() as pressed:

        def tell() -> None:
            for training, own in zip(trainings, board.seen, strict=True):
                if training.ended and not own.ended:
                    own.ended = True
                    ended(training)

        tell()
        for steps in train_together(trainings, until=until):
            for own, step in zip(board.seen, steps, strict=True):
                if step is not None:
                    own.saw(step)
            tell()
            if can_redraw():
                live.update(board.table(), refresh=True)
            elif minute.is_over():
                todo = sum(goal - each.step for goal, each in zip(goals, trainings, strict=True) if not each.ended)
                done = sum(training.step for training in trainings) - first
                stderr.print(board.line((clock() - began) * todo / max(1, done)))
            if pressed:
                raise KeyboardInterrupt
        tell()


def _planned(trainings: Sequence[Training]) -> str:
    going = [training for training in trainings if not training.ended]
    steps = sum(training.total - training.step for training in going)
    return f"plan: {counted(len(going), 'soft prompt')} in shared passes, {counted(steps, 'step')} in all"
