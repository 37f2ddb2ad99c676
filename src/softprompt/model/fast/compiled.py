"""``torch.compile`` where it works, and what happens where it turns out to fail."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from softprompt.errors import SoftPromptWarning


def compiled_if_possible(
    forward: Callable[..., Any], undo: Callable[[], None], *, what: str = "the layers", dynamic: bool = True
) -> Callable[..., Any]:
    """The compiled ``forward``. It is compiled at its first call, so only that can tell whether it works. Where it does
    not, ``undo`` is called, with a ``SoftPromptWarning``, and ``forward`` serves as it is.

    Args:
        forward: what to compile.
        undo: takes the compiled function out of use.
        what: what it computes, in plain words.
        dynamic: whether one compiled function serves all shapes.
    """
    from torch._dynamo.exc import TorchDynamoException

    compiled = torch.compile(forward, dynamic=dynamic)

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return compiled(*args, **kwargs)
        except TorchDynamoException as error:
            undo()
            lines = str(error).strip().splitlines() or [type(error).__name__]
            reason = next((line for line in lines if "error:" in line), lines[0]).strip()
            warnings.warn(
                f"{what} could not be compiled ({reason}); training goes on without, and a step takes about "
                "half as long again. Compiling needs a C++ compiler and Python's headers (on Debian: g++, "
                "python3-dev)",
                SoftPromptWarning,
                stacklevel=2,
            )
            return forward(*args, **kwargs)

    return call


def graphs_compiled() -> int:
    """How many graphs ``torch.compile`` has compiled in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
