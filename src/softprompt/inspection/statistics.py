"""Chances, false discoveries and plain numbers, for every view."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

LEVEL = 0.05
"""False discovery rate of everything that is called significant."""

SEED = 0


def tail(deviations: float) -> float:
    """Chance that a standard normal number is larger."""
    return math.erfc(deviations / math.sqrt(2)) / 2


def adjusted(p: Sequence[float]) -> list[float]:
    """Each p-value as the smallest false discovery rate at which it counts (Benjamini and Hochberg 1995).

    Calling those at most ``q`` significant keeps the expected share of false ones among them at most ``q``; where
    nothing is true, the chance of any at all.
    """
    from scipy.stats import false_discovery_control

    return [float(q) for q in false_discovery_control(p)] if len(p) else []


def plain(value: Any) -> Any:
    """Dataclasses, sequences and numbers as JSON values; None for a number that is not finite."""
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
