"""``torch.compile`` for decoder layers: where it works, when it pays, and what happens where it turns out to fail."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from softprompt.errors import SoftPromptWarning

if TYPE_CHECKING:
    from softprompt.frozen import FrozenLM

PAYS_FROM_OPERATIONS = 1e14
"""Floating-point operations of a run from which compiling is faster on a CPU: it costs 15 to 25 s and saves about a
third of a step."""

PAYS_FROM_STEPS = 500
"""Steps of a run from which compiling is faster on a GPU, whose steps last as long as launching their kernels does: it
costs about 13 s with a warm cache, by estimate 30 s with a cold one, and saves 50 to 80 ms a step."""


def can_compile(lm: FrozenLM) -> bool:
    """Whether compiling the decoder layers of ``lm`` is known to work and to help here."""
    compiler = any(shutil.which(name) for name in ("g++", "c++", "clang++"))
    device = lm.device.type == "cpu" or (lm.device.type == "cuda" and find_spec("triton") is not None)
    return lm.shares_prefix and device and compiler


def pays(lm: FrozenLM, steps: int, tokens: float) -> bool:
    """Whether a run of so many optimizer steps, each over so many tokens in the mean, is faster compiled; decided from
    its size alone, so that a resumed run decides alike."""
    if lm.device.type == "cuda":
        return can_compile(lm) and steps >= PAYS_FROM_STEPS
    operations = 4 * (lm.num_parameters - lm.embedding.numel()) * tokens * steps  # forward and input gradient
    return can_compile(lm) and operations >= PAYS_FROM_OPERATIONS


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
