"""The command line as one of several processes, which ``torchrun`` starts: all do the same, and one speaks."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from types import FrameType

from softprompt.errors import ConfigError
from softprompt.model.distributed import World, is_first, launched

DIVIDED = ("train", "sweep", "compare", "evaluate", "predict")
"""Commands whose work several processes share."""


class Stopped(BaseException):
    """This process was told to stop; no library may take it for an error of its own."""

    def __str__(self) -> str:
        return (
            "This run was told to stop, as torchrun does when it loses a process; a training's checkpoint stays: give "
            "the same command with --resume and any number of processes."
        )


@contextmanager
def one_of_several() -> Iterator[None]:
    """Inside, a process that is not the first one is silent, and one that is told to stop says what is kept.

    ``torchrun`` tells all processes to stop when one is lost.
    """
    if not launched():
        yield
        return
    signal.signal(signal.SIGTERM, _stop)
    try:
        if is_first():
            yield
        else:
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
                yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is about to end by itself


def join_for(command: str | None) -> None:
    """Meets the other processes, before anything is read.

    Raises:
        ConfigError: the command is one that a single process does.
        ProcessError: the others cannot be reached.
    """
    if not launched() or command is None:
        return
    if command not in DIVIDED:
        raise ConfigError(
            f"Several processes share the work of {', '.join(DIVIDED[:-1])} and {DIVIDED[-1]}, but not of {command}; "
            "start it without torchrun."
        )
    World.join()


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped
