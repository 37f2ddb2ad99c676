"""Which validation is kept, and when it is enough."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from softprompt.tuning.keeping import Keeper


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


def kept(keeper: Keeper, *found: dict[str, Any]) -> list[bool]:
    """Whether each in turn is the best so far."""
    return [keeper.add(one) for one in found]


def test_a_lucky_accuracy_is_not_kept() -> None:
    """Two rows that just cross the line give the first one more accuracy; the second is surer of the right labels."""
    lucky, learned = validation(0.51, 0.51, 0.6, 0.6), validation(0.49, 0.49, 0.9, 0.9)
    assert lucky["value"] > learned["value"]
    keeper = Keeper(0)
    assert kept(keeper, lucky, learned) == [True, True]
    assert keeper.best is learned


def test_a_few_sure_and_wrong_rows_do_not_rule() -> None:
    """The mean loss would choose the first."""
    careful, better = validation(*[0.6] * 10), validation(1e-9, *[0.95] * 9)
    assert better["loss"] > careful["loss"]
    assert kept(Keeper(0), careful, better) == [True, True]


def test_the_last_of_the_best_three_in_a_row_is_kept() -> None:
    """Means of three: 0.5, 0.6, 0.567, 0.633, 0.6, 0.6: the peak of 0.8 counts with its neighbours."""
    scores = (0.5, 0.7, 0.5, 0.7, 0.6, 0.5)
    found = [validation(score, score, step=step) for step, score in enumerate(scores)]
    keeper = Keeper(0)
    assert kept(keeper, *found) == [True, True, False, True, False, False]
    assert keeper.best is found[3]


def test_another_run_does_not_count_with_the_one_before() -> None:
    keeper = Keeper(0)
    assert kept(keeper, validation(0.2, 0.2), validation(0.2, 0.2)) == [True, False]
    keeper.begin()
    new = validation(0.3, 0.3)
    assert kept(keeper, new, validation(0.29, 0.29)) == [True, False]
    assert keeper.best is new  # a mean with those before it would have gone on rising


def test_it_is_over_when_it_has_stayed_below_the_best_by_more_than_chance() -> None:
    """Means of three validations of 4 rows, by hand. The second mean is 0.02 below in three rows and 0.05 above in one:
    0.0025 in the mean, with a standard error of 0.0175. The third is 0.04 below in all."""
    best = validation(0.6, 0.6, 0.6, 0.6)
    rows = [best, best, best, validation(0.54, 0.54, 0.54, 0.75), validation(0.54, 0.54, 0.54, 0.33), best]
    keeper, over, worse = Keeper(2), [], []
    for one in [*rows, validation(0.5, 0.5, 0.5, 0.5), validation(0.5, 0.5, 0.5, 0.5)]:
        keeper.add(one)
        worse.append(keeper.worse)
        over.append(keeper.over)
    assert worse == [0, 0, 0, 0, 1, 2, 3, 4]
    assert over == [False] * 5 + [True] * 3
    assert keeper.best is best


def test_a_new_best_begins_the_count_anew() -> None:
    keeper = Keeper(2)
    for score in (0.5, 0.4, 0.9, 0.1):
        keeper.add(validation(score, score))
        assert not keeper.over
    keeper.add(validation(0.1, 0.1))
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

    assert kept(Keeper(1), of(2.0, 3.0), of(1.0, 3.0), of(1.5, 4.5)) == [True, True, False]


def test_it_goes_on_from_its_state() -> None:
    found = [validation(p, 1 - p / 2, 0.5) for p in (0.3, 0.5, 0.4, 0.45, 0.2, 0.1, 0.1, 0.1)]
    whole, first = Keeper(2), Keeper(2)
    expected = [(whole.add(one), whole.worse, whole.over) for one in found]
    for one in found[:4]:
        first.add(one)
    second = Keeper(2)
    second.resume(json.loads(json.dumps(first.state())))
    assert [(second.add(one), second.worse, second.over) for one in found[4:]] == expected[4:]


def test_the_best_of_an_earlier_release_gives_way_to_what_is_better() -> None:
    """It has a mean loss alone; the mean of the rows' probabilities is at least ``exp`` of minus it."""
    old = {"step": 1, "value": 0.5, "loss": -math.log(0.5)}
    keeper = Keeper(1)
    keeper.resume_earlier(old)
    assert kept(keeper, validation(0.49, 0.5)) == [False]
    assert keeper.best == old
    keeper.begin()
    assert kept(keeper, validation(0.6, 0.6)) == [True]
    text = Keeper(1)
    text.resume_earlier({"step": 3, "value": -1.25, "loss": 1.25})
    worse = {"step": 4, "value": -1.3, "score": -1.3, "loss": 1.3, "rows": {"loss": [1.3]}}
    assert kept(text, worse, worse | {"loss": 1.0, "rows": {"loss": [1.0]}}) == [False, True]
