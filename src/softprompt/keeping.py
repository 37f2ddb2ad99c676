"""Which of a run's validations is kept, and when a run ends early.

The highest accuracy of a run is partly luck: with 500 rows, one validation differs from the next by a point by chance
alone, and a maximum over them often picks an early one though the vectors still gain. So the validation is kept whose
mean probability of the right label is highest: of all rows, not only of those near the line between two answers, it
moves by a fraction of that, and other than the loss it is not ruled by a few rows with sure and wrong answers. A run
ends early once it has stayed below that by more than chance. ``docs/defaults.md`` has the rules that were tried and
``benchmarks/replay.py`` replays them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

CHANCE = 1.0
"""Standard errors of the mean difference on the same rows by which a validation must be below the best to count as
worse."""

Found = Mapping[str, Any]
"""One validation, as ``validation.Validator`` gives it."""


class Keeper:
    """Takes a run's validations in their order.

    Attributes:
        patience: how many validations in a row must be worse than the best by more than chance for the run to be over;
            0: it never is.
        best: the one that is kept, the highest ``score``; of equals the earliest. None before the first.
        worse: how many validations in a row have been worse than the best by more than chance.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.best: Found | None = None
        self.worse = 0

    def add(self, found: Found) -> bool:
        """Takes the next validation; whether it is the best so far. One whose loss is not finite never is."""
        if math.isfinite(found["loss"]) and (self.best is None or better(found, self.best)):
            self.best, self.worse = found, 0
            return True
        self.worse = self.worse + 1 if self.best is not None and _is_worse(found, self.best) else 0
        return False

    @property
    def over(self) -> bool:
        """Whether the run should end."""
        return 0 < self.patience <= self.worse


def better(found: Found, best: Found) -> bool:
    """A higher score."""
    return bool(found["score"] > best["score"])


def _is_worse(found: Found, best: Found) -> bool:
    """Whether a validation is worse than the best by more than chance."""
    if not math.isfinite(found["loss"]):
        return True
    ours, others = _scores(found), _scores(best)
    if len(ours) != len(others) or len(ours) < 2:
        return False
    lost = others - ours
    return bool(lost.mean() > CHANCE * lost.std(ddof=1) / math.sqrt(len(lost)))


def of_earlier_release(best: Found) -> dict[str, Any]:
    """The best validation of a checkpoint that has no scores, with what its mean loss says of its score at least."""
    of_text = best["value"] == -best["loss"]
    score = -best["loss"] if of_text else math.exp(-best["loss"])  # at most the mean of the rows' (Jensen)
    return {**best, "score": score, "rows": {"loss": []}}


def _scores(found: Found) -> NDArray[np.float64]:
    """The score of each row."""
    losses = np.asarray(found["rows"]["loss"], dtype=np.float64)
    return np.exp(-losses) if "correct" in found["rows"] else -losses
