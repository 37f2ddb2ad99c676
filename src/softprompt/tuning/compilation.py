"""``torch.compile`` for decoder layers: where it works and when it pays."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from softprompt.model.frozen import FrozenLM
    from softprompt.model.request import Request
    from softprompt.tuning.config import TrainConfig
    from softprompt.tuning.gradients import Gradients

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
    return lm.compiles and device and compiler


def pays(lm: FrozenLM, steps: int, tokens: float) -> bool:
    """Whether a run of so many optimizer steps, each over so many tokens in the mean, is faster compiled; decided from
    its size alone, so that a resumed run decides alike."""
    if lm.device.type == "cuda":
        return can_compile(lm) and steps >= PAYS_FROM_STEPS
    operations = 4 * (lm.num_parameters - lm.embedding.numel()) * tokens * steps  # forward and input gradient
    return can_compile(lm) and operations >= PAYS_FROM_OPERATIONS


def wanted(config: TrainConfig, gradients: Gradients, requests: Sequence[Request], steps: int) -> bool:
    """Whether the settings want the layers compiled for a run of so many steps, with ``auto`` where that pays.

    Args:
        config: settings.
        gradients: of the training.
        requests: of its rows.
        steps: optimizer steps planned.
    """
    lm = gradients.lm
    if not lm.compiles or config.compile == "off":
        return False
    tokens = gradients.tokens(requests) * (config.batch_size / len(requests)) + config.longest
    return config.compile == "on" or pays(lm, steps, tokens)
