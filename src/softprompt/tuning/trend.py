"""How a run's losses and gradients go, in a few numbers."""

from __future__ import annotations

from dataclasses import dataclass, field

MOST_KEPT, LEAST_KEPT = 50, 4
"""Steps at the start and at the end of a run whose losses are kept: a twentieth of it, within these."""


@dataclass
class Trend:
    """How a run's losses and gradients go; small, whatever the number of steps.

    Attributes:
        first, last: the losses of the first and of the last steps, at most ``keep`` each.
        norms: the gradient's norms in the first steps.
        steps, clipped: how many steps there were, and in how many of them the gradient was clipped.
    """

    first: list[float] = field(default_factory=list)
    last: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    steps: int = 0
    clipped: int = 0

    def add(self, loss: float, norm: float, clip: float, total: int) -> None:
        """Takes the next step of ``total``."""
        keep = min(MOST_KEPT, max(LEAST_KEPT, total // 20))
        if self.steps == len(self.first) < keep:  # the total may rise while it runs
            self.first.append(loss)
            self.norms.append(norm)
        self.last = [*self.last[1 - keep :], loss]
        self.steps += 1
        self.clipped += 0 < clip < norm
