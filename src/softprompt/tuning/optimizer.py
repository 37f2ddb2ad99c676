"""How learned numbers are moved: the optimizer and its learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch

from softprompt.tuning.config import TrainConfig


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """Learning rate of step ``step`` (from 0) of ``total``, in RMS of the start: linear warm-up, then the schedule."""
    warm = math.ceil(config.warmup * total)
    if step < warm:
        return config.lr * (step + 1) / warm
    left = 1 - (step - warm) / max(1, total - warm)
    shape = {"linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left), "constant": 1.0}[config.schedule]
    return config.lr * shape


def make_optimizer(config: TrainConfig, *tensors: torch.Tensor) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019), or Adafactor (Shazeer and Stern 2018) without parameter scaling as in
    Lester et al. 2021."""
    if config.optimizer == "adamw":
        return torch.optim.AdamW(tensors, lr=config.lr, weight_decay=config.weight_decay)
    from transformers import optimization

    adafactor: Any = optimization.Adafactor
    return adafactor(  # type: ignore[no-any-return]
        tensors,
        lr=config.lr,
        decay_rate=-0.8,
        weight_decay=config.weight_decay,
        scale_parameter=False,
        relative_step=False,
        warmup_init=False,
    )
