"""An inspection's numbers for people."""

from __future__ import annotations

from softprompt.evaluation.metrics import Metric
from softprompt.inspection.ablation import Change, Difference


def percent(metric: Metric) -> str:
    """``92.5 % [88.1, 95.4]``."""
    return f"{100 * metric.value:.1f} % [{100 * metric.low:.1f}, {100 * metric.high:.1f}]"


def points(found: Difference) -> str:
    """``−47.5 points [−62.0, −30.1]``."""
    return _minus(f"{100 * found.value:+.1f} points [{100 * found.low:+.1f}, {100 * found.high:+.1f}]")


def nats(found: Difference) -> str:
    """``+0.089 nats [+0.021, +0.170]``."""
    return _minus(f"{found.value:+.3f} nats [{found.low:+.3f}, {found.high:+.3f}]")


def value(change: Change) -> str:
    """Accuracy, or for free text the mean loss, with its interval."""
    if change.score is not None:
        return percent(change.score)
    return f"{change.loss.value:.3f} nats [{change.loss.low:.3f}, {change.loss.high:.3f}]"


def lost(change: Change) -> str:
    """What that is against the whole soft prompt."""
    return nats(change.loss_change) if change.score_change is None else points(change.score_change)


def chance(q: float) -> str:
    """``q = 0.012``, ``q < 0.001``."""
    return f"q = {q:.3f}" if q >= 0.001 else "q < 0.001"


def _minus(text: str) -> str:
    return text.replace("-", "−")
