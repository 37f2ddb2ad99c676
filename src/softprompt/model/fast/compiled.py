"""``torch.compile`` where it works, and what happens where it turns out to fail."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from softprompt.errors import SoftPromptWarning


def compiled_if_possible(forward: Callable[..., Any], undo: Callable[[], None]) -> Callable[..., Any]:
    """The compiled ``forward``, dynamic shapes; it is compiled at its first call, so only that can tell whether it
    works. Where it does not, ``undo`` is called, with a ``SoftPromptWarning``, and ``forward`` serves as it is."""
    from torch._dynamo.exc import TorchDynamoException

    compiled = torch.compile(forward, dynamic=True)

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return compiled(*args, **kwargs)
        except TorchDynamoException as error:
            undo()
            lines = str(error).strip().splitlines() or [type(error).__name__]
            reason = next((line for line in lines if "error:" in line), lines[0]).strip()
            warnings.warn(
                f"the layers could not be compiled ({reason}); training goes on without, and a step takes about "
                "half as long again. Compiling needs a C++ compiler and Python's headers (on Debian: g++, "
                "python3-dev)",
                SoftPromptWarning,
                stacklevel=2,
            )
            return forward(*args, **kwargs)

    return call
