"""Which validation is kept, and when it is enough."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from softprompt.keeping import Keeper, of_earlier_release


def validation(*probabilities: float, step: int = 0) -> dict[str, Any]:
    """Of rows whose right label has these probabilities, two labels."""
    losses = [-math.log(p) for p in probabilities]
    return {
        "step": step,
        "value": float(np.mean([p > 0.5 for p in probabilities])),
        "score": float(np.mean(probabilities)),
        "loss": float(np.mean(losses)),
        "rows": {"loss": losses, "correct": [int(p > 0.5) for p in probabilities]},
    }


def test_a_lucky_accuracy_is_not_kept() -> None:
    """Two rows that just cross the line give the first one more accuracy; the second is surer of the right labels."""
    lucky, learned = validation(0.51, 0.51, 0.6, 0.6), validation(0.49, 0.49, 0.9, 0.9)
    assert lucky["value"] > learned["value"]
    keeper = Keeper(0)
    assert [keeper.add(one) for one in (lucky, learned)] == [True, True]
    assert keeper.best is learned


def test_a_few_sure_and_wrong_rows_do_not_rule() -> None:
    """The mean loss would choose the first."""
    careful, better = validation(*[0.6] * 10), validation(1e-9, *[0.95] * 9)
    assert better["loss"] > careful["loss"]
    keeper = Keeper(0)
    keeper.add(careful)
    assert keeper.add(better)


def test_it_is_over_when_it_has_stayed_below_the_best_by_more_than_chance() -> None:
    """Chance by hand: of 4 rows that lose 0.1 each but one, which gains 0.3, the mean loss is 0, its error 0.1."""
    best, worse = validation(0.6, 0.6, 0.6, 0.6), validation(0.5, 0.5, 0.5, 0.6)
    chance = validation(0.5, 0.5, 0.5, 0.85)
    assert 0 < best["score"] - chance["score"] < np.std([0.1, 0.1, 0.1, -0.25], ddof=1) / 2
    keeper = Keeper(2)
    over = []
    for one in (best, worse, chance, worse, worse):
        keeper.add(one)
        over.append(keeper.over)
    assert over == [False, False, False, False, True]
    assert keeper.best is best


def test_a_new_best_begins_the_count_anew() -> None:
    keeper = Keeper(2)
    for score in (0.5, 0.4, 0.6, 0.4):
        keeper.add(validation(score, score))
        assert not keeper.over
    keeper.add(validation(0.4, 0.4))
    assert keeper.over


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_worse_and_never_kept(bad: float) -> None:
    keeper = Keeper(2)
    broken = {"step": 1, "value": 0.9, "score": 0.9, "loss": bad, "rows": {"loss": [bad], "correct": [1]}}
    assert not keeper.add(broken)
    assert keeper.best is None
    keeper.add(validation(0.5, 0.5))
    for _ in range(2):
        assert not keeper.add(broken)
    assert keeper.over


def test_free_text_goes_by_its_loss() -> None:
    def of(*losses: float) -> dict[str, Any]:
        loss = float(np.mean(losses))
        return {"step": 0, "value": -loss, "score": -loss, "loss": loss, "rows": {"loss": list(losses)}}

    keeper = Keeper(1)
    assert keeper.add(of(2.0, 3.0))
    assert keeper.add(of(1.0, 3.0))
    keeper.add(of(1.0, 3.1))
    assert not keeper.over  # 0.05 below, as one error is
    keeper.add(of(1.5, 3.6))
    assert keeper.over


def test_the_best_of_an_earlier_release_gives_way_to_what_is_better() -> None:
    """It has a mean loss alone; the mean of the rows' probabilities is at least ``exp`` of minus it."""
    found = validation(0.2, 0.9)
    old = of_earlier_release({key: found[key] for key in ("step", "value", "loss")})
    assert old["score"] == pytest.approx(math.sqrt(0.2 * 0.9))
    assert old["score"] < found["score"]
    keeper = Keeper(1)
    keeper.best = old
    keeper.add(validation(0.3, 0.3))
    assert (keeper.best, keeper.over) == (old, False)
    assert keeper.add(validation(0.6, 0.6))
    text = {"step": 3, "value": -1.25, "loss": 1.25}
    assert of_earlier_release(text)["score"] == -1.25
