"""What cells come to, against arithmetic done apart."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy import stats

from softprompt.compare import summary
from softprompt.evaluation.metrics import accuracy
from tests.compare.cells import METHODS, make_cell, make_cells, make_failed, row_of, several_bases


def test_one_seed_keeps_the_interval_of_its_rows() -> None:
    cells = make_cells()
    for cell in cells:
        row = row_of(cells, cell["method"])
        assert row.score is not None
        assert (row.score.value, row.score.low, row.score.high) == pytest.approx(
            (cell["value"], cell["low"], cell["high"])
        )
        assert row.stderr == pytest.approx(cell["stderr"])
        if cell["difference"] is None:
            assert row.difference is None
        else:
            assert row.difference is not None
            assert vars(row.difference) == pytest.approx(cell["difference"])
        assert (row.seeds, row.n, row.metric) == (1, 1821, "accuracy")
        assert (row.trainable_parameters, row.bytes) == (cell["trainable_parameters"], cell["bytes"])
        assert (row.train_seconds, row.latency_ms) == (cell["train_seconds"], cell["latency_ms"])
        assert (row.peak_memory_bytes, row.forgetting) == (cell["peak_memory_bytes"], cell["forgetting"]["ratio"])


def test_several_seeds_add_their_own_spread() -> None:
    cells = make_cells(seeds=3)
    mine = [cell for cell in cells if cell["method"] == "lora"]
    ours = [cell for cell in cells if cell["method"] == "soft-prompt"]

    def column(key: str, of: Sequence[dict[str, Any]] = mine) -> Any:
        return np.array([cell[key] for cell in of])

    value, seeds = column("value").mean(), column("value").std(ddof=1) ** 2 / 3
    below, above = column("value") - column("low"), column("high") - column("value")
    row = row_of(cells, "lora")
    assert row.score is not None
    assert row.score.value == pytest.approx(value)
    assert row.stderr == pytest.approx(math.sqrt((column("stderr") ** 2).mean() + seeds))
    assert row.score.low == pytest.approx(value - half_width((below**2).mean(), [seeds]), rel=1e-5)
    assert row.score.high == pytest.approx(value + half_width((above**2).mean(), [seeds]), rel=1e-5)

    both = [seeds, column("value", ours).std(ddof=1) ** 2 / 3]
    value -= column("value", ours).mean()
    assert row.difference is not None
    assert vars(row.difference) == pytest.approx(
        {"value": value, "low": value - half_width(0.013**2, both), "high": value + half_width(0.012**2, both)},
        rel=1e-5,
    )


def half_width(of_rows: float, seeds: Sequence[float]) -> float:
    """Welch and Satterthwaite's, from a squared half-width and variances of means over three seeds."""
    variance = of_rows / stats.norm.ppf(0.975) ** 2 + sum(seeds)
    return float(stats.t.ppf(0.975, variance**2 / sum(one**2 / 2 for one in seeds)) * math.sqrt(variance))


def test_a_method_without_seeds_is_compared_with_the_mean_of_the_soft_prompts() -> None:
    row = row_of(make_cells(seeds=3), "zero-shot")
    ours = np.array([0.907, 0.907, 0.911])
    assert row.difference is not None
    assert row.difference.value == pytest.approx(0.802 - ours.mean())
    width = half_width(0.012**2, [ours.std(ddof=1) ** 2 / 3])
    assert row.difference.high == pytest.approx(row.difference.value + width, rel=1e-5)


@pytest.mark.parametrize(("spread", "least"), [(0.1, 558), (0.4, 522)])
def test_interval_holds_the_truth_over_seeds_and_rows(spread: float, least: int) -> None:
    """Three seeds on 400 rows, whose scores differ by 1.4 or by 6 points.

    At the stated coverage, at least 95 % and about 90 %, fewer hits of 600 have probability 1 % each (binomial).
    """
    rng = np.random.default_rng(0)
    rows, seeds, trials, both, rows_only = 400, 3, 600, 0, 0
    difficulty, chance = rng.normal(1.5, 1.0, 100_000), rng.normal(0.0, spread, 2_000)
    truth = (1 / (1 + np.exp(-(difficulty[:2_000, None] + chance[None, :])))).mean()
    for _ in range(trials):
        drawn = rng.choice(difficulty, rows)
        cells = []
        for seed in range(seeds):
            hits = rng.random(rows) < 1 / (1 + np.exp(-(drawn + rng.choice(chance))))
            metric = accuracy(["a" if hit else "b" for hit in hits], ["a"] * rows)
            cells.append({**make_failed("lora", seed), "status": "done", **metric.as_dict()})
        score = row_of(cells, "lora").score
        assert score is not None
        assert score.low is not None
        assert score.high is not None
        both += score.low <= truth <= score.high
        half = 1.96 * np.sqrt(np.mean([cell["stderr"] ** 2 for cell in cells]) / seeds)  # as if rows were drawn anew
        rows_only += abs(score.value - truth) <= half
    assert both >= least
    assert rows_only < least


def test_intervals_end_where_the_metric_does() -> None:
    cells = [make_cell("soft-prompt", "sst2", "smollm2-135m", seed, 0.0) for seed in range(2)]
    cells[0] |= {"value": 0.99, "low": 0.98, "high": 0.995}
    cells[1] |= {"value": 0.5, "low": 0.4, "high": 0.6}
    score = row_of(cells, "soft-prompt").score
    assert score is not None
    assert (score.low, score.high) == (0.0, 1.0)


def test_rows_are_in_order_whatever_the_order_of_the_cells() -> None:
    cells = [*several_bases(("sst2", "cr")), {**make_cell("lora", "cr", "smollm2-135m", 0, 0.0), "method": "another"}]
    expected = [
        (task, base, method)
        for task in ("sst2", "cr")
        for base in ("smollm2-135m", "smollm2-360m", "smollm2-1.7b")
        for method in [*METHODS, *(["another"] if (task, base) == ("cr", "smollm2-135m") else [])]
    ]
    first, rest = cells[0], cells[1:]
    random.Random(0).shuffle(rest)
    assert [(row.task, row.base, row.method) for row in summary.summary([first, *rest])] == expected


def test_failed_seeds_count_for_nothing_but_are_named() -> None:
    good = make_cell("lora", "sst2", "smollm2-135m", 0, 0.0)
    row = row_of([good, make_failed("lora", 1)], "lora")
    assert row.score == row_of([good], "lora").score
    assert row.failed == ("seed 1: The model's memory is <full>; use a smaller batch.",)
    alone = row_of([make_failed("lora")], "lora")
    assert (alone.score, alone.stderr, alone.seeds, alone.metric) == (None, None, 0, None)


def test_null_means_unknown() -> None:
    cell = make_cell("lora", "sst2", "smollm2-135m", 0, 0.0)
    cell |= dict.fromkeys(("stderr", "low", "high", "latency_ms", "forgetting", "curve", "difference", "bytes"))
    row = row_of([cell, make_cell("soft-prompt", "sst2", "smollm2-135m", 0, 0.0)], "lora")
    assert row.score == summary.Estimate(cell["value"], None, None)
    assert row.difference is not None
    assert (row.difference.low, row.difference.high, row.difference.sign) == (None, None, 0)
    assert (row.stderr, row.latency_ms, row.forgetting, row.curves, row.bytes) == (None, None, None, (), None)


def test_further_metrics_are_means_over_seeds() -> None:
    cells = make_cells(seeds=3)
    found = [cell["metrics"] for cell in cells if cell["method"] == "lora"]
    row = row_of(cells, "lora")
    assert row.macro_f1 == pytest.approx(np.mean([of_seed[0]["value"] for of_seed in found]))
    assert row.mcc == pytest.approx(np.mean([of_seed[1]["value"] for of_seed in found]))


def test_rounding_is_no_sign() -> None:
    """0.1 + 0.2 - 0.3 is 5.6e-17: means of token F1 over resamples come to that."""
    rest = 0.1 + 0.2 - 0.3
    assert rest != 0
    assert summary.Estimate(0.1, rest, 0.2).sign == 0
    assert summary.Estimate(-0.1, -0.2, -rest).sign == 0
    assert summary.Estimate(0.1, 1e-6, 0.2).sign == 1  # less than a row of a million
    assert summary.Estimate(-0.1, -0.2, -1e-6).sign == -1
