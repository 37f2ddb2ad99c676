"""Which of a run's validations is kept, and when a run ends early.

The highest accuracy of a run is partly luck: with 500 rows, one validation differs from the next by a point by chance
alone, and a maximum over them often picks an early one though the vectors still gain. So what counts is the mean
probability of the right label. All rows have a part in it, not only those near the line between two answers, so it
moves less. Unlike the loss it is not ruled by a few rows with sure and wrong answers. The validation is kept that ends
the three in a row with the highest mean. A run ends early once it has stayed below that by more than chance.
``docs/study/defaults.md`` has the rules that were tried and ``benchmarks/replay.py`` replays them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

IN_A_ROW = 3
"""Validations whose mean counts."""
CHANCE = 1.0
"""Standard errors of the mean difference on the same rows by which the latest must be below the best to count as
worse."""

Found = Mapping[str, Any]
"""One validation, as ``validation.Validator`` gives it."""


class Keeper:
    """Takes a run's validations in their order.

    Attributes:
        patience: how many validations in a row must be worse than the best by more than chance for the run to be over;
            0: it never is.
        best: the one that is kept: the last of the validations in a row with the highest mean score; of equals the
            earliest. None before the first.
        worse: how many validations in a row have been worse than the best by more than chance.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.best: Found | None = None
        self.worse = 0
        self._best_scores: list[float] = []  # of each row, the mean of those in a row
        self._latest: list[list[float]] = []  # of the latest validations, the score of each row

    def add(self, found: Found) -> bool:
        """Takes the next validation; whether it is the best so far. One whose loss is not finite never is."""
        if not math.isfinite(found["loss"]):
            self.worse += self.best is not None
            return False
        self._latest = [*self._latest[1 - IN_A_ROW :], scores_of(found)]
        scores = np.mean(self._latest, axis=0)
        if self.best is None or scores.mean() > np.mean(self._best_scores):
            self.best, self._best_scores, self.worse = found, scores.tolist(), 0
            return True
        self.worse = self.worse + 1 if _beyond_chance(np.asarray(self._best_scores) - scores) else 0
        return False

    def begin(self) -> None:
        """Tells that what is validated from here on is another run's, or begins anew; the best so far stays."""
        self._latest, self.worse = [], 0

    @property
    def score(self) -> float:
        """The highest mean score of validations in a row; minus infinity before the first."""
        return float(np.mean(self._best_scores)) if self._best_scores else -math.inf

    @property
    def scores(self) -> list[float]:
        """Of each row, the mean score over the validations in a row that ``best`` ends; empty before the first."""
        return self._best_scores

    @property
    def over(self) -> bool:
        """Whether the run should end."""
        return 0 < self.patience <= self.worse

    # --- what survives a kill ---------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """JSON values to go on from."""
        best = None if self.best is None else {key: value for key, value in self.best.items() if key != "rows"}
        return {"best": best, "scores": self._best_scores, "latest": self._latest, "worse": self.worse}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Goes on from what ``state`` gave."""
        self.best, self._best_scores = state["best"], list(state["scores"])
        self._latest, self.worse = [list(scores) for scores in state["latest"]], state["worse"]

    def resume_earlier(self, best: Found | None) -> None:
        """Goes on from the best validation of a release that kept no scores, with what its mean loss says of them."""
        self.best = best
        if best is not None:
            of_text = best["value"] == -best["loss"]
            # at most the mean of the rows' (Jensen)
            self._best_scores = [-best["loss"] if of_text else math.exp(-best["loss"])]


def better(found: Found, best: Found) -> bool:
    """A higher score."""
    return bool(found["score"] > best["score"])


def _beyond_chance(lost: NDArray[np.float64]) -> bool:
    """Whether the mean of one difference a row, ``[rows]``, is above 0 by more than chance."""
    if len(lost) < 2:
        return False
    return bool(lost.mean() > CHANCE * lost.std(ddof=1) / math.sqrt(len(lost)))


def scores_of(found: Found) -> list[float]:
    """The score of each row: the probability of the right label, or minus the loss for free text."""
    losses = np.asarray(found["rows"]["loss"], dtype=np.float64)
    scores: list[float] = (np.exp(-losses) if "correct" in found["rows"] else -losses).tolist()
    return scores
