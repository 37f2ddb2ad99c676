"""What the comparison's report says, against arithmetic done apart; made-up cells of the shape of ``results.json``."""

from __future__ import annotations

import io
import math
import random
import re
import sys
from collections.abc import Sequence
from html import unescape
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from rich.console import Console
from scipy import stats
from sklearn.isotonic import IsotonicRegression

from softprompt.compare import figures as plots
from softprompt.compare import report, summary
from softprompt.compare.summary import Row
from softprompt.drawing import labels as labels_module
from softprompt.drawing import style
from softprompt.drawing.words import amount
from softprompt.errors import ConfigError
from softprompt.evaluation.metrics import accuracy, paired_bootstrap
from softprompt.methods import registry

METHODS: dict[str, tuple[float, int, int, float, float, float, float]] = {
    # accuracy on sst2, trained parameters, bytes, seconds, peak memory, latency in ms, forgetting
    "majority-class": (0.511, 0, 8, 0.0, 0.6e9, 0.0, 1.0),
    "zero-shot": (0.802, 0, 0, 0.0, 0.6e9, 28.0, 1.0),
    "zero-shot-calibrated": (0.821, 0, 16, 0.4, 0.6e9, 28.4, 1.0),
    "instruction": (0.773, 0, 84, 21.0, 0.6e9, 33.0, 1.0),
    "instruction-calibrated": (0.811, 0, 100, 22.0, 0.6e9, 33.5, 1.0),
    "few-shot": (0.683, 0, 1200, 95.0, 0.9e9, 61.0, 1.0),
    "few-shot-calibrated": (0.796, 0, 1216, 96.0, 0.9e9, 61.4, 1.0),
    "few-shot-nearest": (0.846, 0, 480_000, 140.0, 1.1e9, 88.0, 1.0),
    "few-shot-nearest-calibrated": (0.851, 0, 480_016, 141.0, 1.1e9, 88.2, 1.0),
    "tf-idf": (0.812, 14_822, 402_000, 1.3, 0.2e9, 0.4, 1.0),
    "peft-prompt-tuning": (0.712, 11_520, 46_600, 600.4, 4.1e9, 34.0, 1.0),
    "soft-prompt": (0.907, 11_520, 47_952, 402.1, 1.2e9, 31.0, 1.0),
    "soft-prompt-ensemble": (0.914, 34_560, 143_856, 1206.0, 1.2e9, 74.0, 1.0),
    "prefix": (0.921, 230_400, 926_000, 455.0, 1.3e9, 30.0, 1.0),
    "lora": (0.932, 921_600, 3_700_000, 590.0, 3.9e9, 29.0, 1.09),
    "full-fine-tuning": (0.938, 134_515_008, 269_000_000, 597.0, 5.2e9, 28.0, 1.62),
}
FREE_TEXT = [method for method in METHODS if method not in ("majority-class", "tf-idf")]
LEARNED = ("peft-prompt-tuning", "soft-prompt", "prefix", "lora", "full-fine-tuning")
SIZES = {"smollm2-135m": 134_515_008, "smollm2-360m": 361_821_120, "smollm2-1.7b": 1_711_376_384}


def make_cells(
    task: str = "sst2", base: str = "smollm2-135m", seeds: int = 1, shift: float = 0.0, gain: float = 0.0
) -> list[dict[str, Any]]:
    """A cell for every method: accuracies ``shift`` higher than on SST-2, and hard prompts ``gain`` more."""
    return [
        make_cell(method, task, base, seed, shift + (gain if numbers[1] == 0 else 0.0))
        for method, numbers in METHODS.items()
        for seed in range(seeds if method in LEARNED else 1)
    ]


def make_cell(method: str, task: str, base: str, seed: int, shift: float, bleu: bool = False) -> dict[str, Any]:
    accuracy, parameters, kept, seconds, memory, latency, forgetting = METHODS[method]
    n = 1821
    value = round(min(accuracy + shift + 0.004 * (seed - 1) * (seed > 0), 0.99), 4)
    ours = round(METHODS["soft-prompt"][0] + shift, 4)
    stderr = (value * (1 - value) / n) ** 0.5
    top = 40.0 if bleu else 1.0
    difference = {"value": value - ours, "low": value - ours - 0.013, "high": value - ours + 0.012}
    scaled = {key: top * number for key, number in difference.items()}
    curve = [
        {"seconds": seconds * i / 8, "step": 50 * i, "value": top * (value - 0.35 * 0.5**i), "loss": 2 * 0.7**i}
        for i in range(1, 9)
    ]
    return {
        "task": task,
        "method": method,
        "base": base,
        "base_parameters": SIZES[base],
        "seed": seed,
        "status": "done",
        "reason": None,
        "metric": "bleu" if bleu else "accuracy",
        "value": top * value,
        "stderr": top * stderr,
        "low": top * (value - 2 * stderr),
        "high": top * (value + 1.9 * stderr),
        "n": n,
        "metrics": [] if bleu else [made_metric("macro_f1", value - 0.02), made_metric("mcc", 2 * value - 1)],
        "most_frequent_answer": made_answer("positive", 1.0 if method == "majority-class" else 0.52, 0.511),
        "trainable_parameters": parameters,
        "bytes": kept,
        "train_seconds": seconds,
        "peak_memory_bytes": memory,
        "latency_ms": latency,
        "forgetting": {"before": 19.1, "after": 19.1 * forgetting, "ratio": forgetting},
        "validation": top * value,
        "chosen": {"lr": 3e-5} if method in LEARNED else {},
        "curve": curve if method in LEARNED else [],
        "difference": None if method == "soft-prompt" else scaled,
        "budget_seconds": 600.0,
        "versions": {"torch": "2.13.0", "softprompt": "0.1.0"},
    }


def made_metric(name: str, value: float) -> dict[str, Any]:
    return {"metric": name, "value": value, "stderr": 0.01, "low": value - 0.02, "high": value + 0.02, "n": 1821}


def made_answer(label: str, share: float, gold_share: float) -> dict[str, Any]:
    telling = share >= 0.95 and gold_share < 0.9
    return {"label": label, "share": share, "gold_share": gold_share, "one_answer": telling}


def make_failed(method: str, seed: int = 0, task: str = "sst2") -> dict[str, Any]:
    return {
        "task": task,
        "method": method,
        "base": "smollm2-135m",
        "seed": seed,
        "status": "failed",
        "reason": "The model's memory is <full>; use a smaller batch.",
        "value": None,
        "difference": None,
        "budget_seconds": 600.0,
        "versions": {"torch": "2.13.0", "softprompt": "0.1.0"},
    }


def several_tasks() -> list[dict[str, Any]]:
    free_text = [make_cell(method, "e2e_nlg", "smollm2-135m", 0, -0.2, bleu=True) for method in FREE_TEXT]
    return [
        *make_cells("sst2", seeds=3),
        *make_cells("trec6", shift=-0.02, gain=-0.3),
        *make_cells("rte", shift=-0.3, gain=0.15),
        *free_text,
        make_failed("lora", seed=1, task="trec6"),
    ]


def several_bases(tasks: Sequence[str] = ("sst2",)) -> list[dict[str, Any]]:
    bases = (("smollm2-1.7b", 0.05, 0.06), ("smollm2-135m", 0.0, 0.0), ("smollm2-360m", 0.02, 0.03))
    return [
        cell for base, shift, gain in bases for task in tasks for cell in make_cells(task, base, shift=shift, gain=gain)
    ]


def row_of(cells: Sequence[dict[str, Any]], method: str, task: str = "sst2") -> Row:
    (row,) = (row for row in summary.summary(cells) if (row.method, row.task) == (method, task))
    return row


def printed(cells: Sequence[dict[str, Any]], width: int = 120) -> list[str]:
    console = Console(file=io.StringIO(), width=width, soft_wrap=True, markup=False, highlight=False)
    console.print(report.table(cells))
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


# --- summary --------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("freedom", [1, 1.5, 2, 3.3, 9, 30, 9_999, 1e12])
def test_quantile_of_student(freedom: float) -> None:
    assert summary._t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-5)


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


# --- the terminal ---------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize(
    "cells", [make_cells(seeds=3), several_tasks(), several_bases()], ids=["one", "tasks", "bases"]
)
def test_table_fits_a_terminal_and_is_never_cut(cells: list[dict[str, Any]], width: int) -> None:
    lines = printed(cells, width)
    assert max(map(len, lines)) <= 120
    rows = summary.summary(cells)
    body = iter(lines)
    for row in rows:  # in order, each with its own numbers
        assert row.score is not None
        assert row.stderr is not None
        line = next(line for line in body if line.split("  ")[0].removesuffix(" ◂") == row.method)
        scale = 1 if row.metric == "bleu" else 100
        assert f"{scale * row.score.value:.1f} ± {scale * row.stderr:.1f}" in line
        assert line.endswith(f"×{row.forgetting:.2f}")
        if row.difference is None:
            assert line.startswith("soft-prompt ◂ ")
            continue
        low, high = row.difference.low, row.difference.high
        assert low is not None
        assert high is not None
        excludes = low > 0 or high < 0  # an end that would be shown as 0 is shown with a digit of its own then
        ends = [f"{end:+.1g}" if excludes and abs(end) < 0.05 else f"{end:+.1f}" for end in (scale * low, scale * high)]
        assert f"[{', '.join(ends)}]".replace("-", "−") in line
        assert ("▲" in line, "▼" in line) == (low > 0, high < 0)


def test_table_word_for_word() -> None:
    cells = [cell for cell in make_cells() if cell["method"] in ("zero-shot", "soft-prompt", "prefix", "lora")]
    cells[-1]["forgetting"] = None
    assert printed([*cells, make_failed("full-fine-tuning")]) == [
        "sst2 · smollm2-135m, 135 M parameters; accuracy, % on 1,821 test rows",
        "method                 score  macro-F1   MCC         to soft prompt    kept    training  latency  forgets",
        "zero-shot         80.2 ± 0.9      78.2  0.60  ▼ −10.5 [−11.8, −9.3]     0 B       0.0 s    28 ms    ×1.00",
        "soft-prompt ◂     90.7 ± 0.7      88.7  0.81                      –   48 kB  6 min 42 s    31 ms    ×1.00",
        "prefix            92.1 ± 0.6      90.1  0.84    ▲ +1.4 [+0.1, +2.6]  926 kB  7 min 35 s    30 ms    ×1.00",
        "lora              93.2 ± 0.6      91.2  0.86    ▲ +2.5 [+1.2, +3.7]  3.7 MB  9 min 50 s    29 ms        –",
        "full-fine-tuning      failed         –     –                      –       –           –        –        –",
        "failed: full-fine-tuning, seed 0: The model's memory is <full>; use a smaller batch.",
        "",
        "± one standard error; [95 % interval]; ▲ better, ▼ worse than the soft prompt ◂ beyond it",
    ]


def test_free_text_has_no_columns_of_labels() -> None:
    cells = [make_cell(method, "e2e_nlg", "smollm2-135m", 0, 0.0, bleu=True) for method in ("zero-shot", "soft-prompt")]
    head, first = (line.split() for line in printed(cells)[1:3])
    assert head[:3] == ["method", "score", "to"]
    assert "trained" in head
    assert "memory" in head
    assert "MCC" not in head
    assert "–" not in first


def test_cells_of_earlier_releases_have_no_further_metrics(tmp_path: Path) -> None:
    cells = [cell for cell in make_cells() if cell["method"] in ("soft-prompt", "lora")]
    for cell in cells:
        del cell["metrics"], cell["most_frequent_answer"]
    row = row_of(cells, "lora")
    assert (row.macro_f1, row.mcc, row.one_answer, row.answer) == (None, None, (), None)
    line = next(line for line in printed(cells) if line.startswith("lora"))
    assert re.search(r"93\.2 ± 0\.6 +– +– +▲", line)
    report.write(cells, tmp_path)


def test_further_metrics_are_means_over_seeds() -> None:
    cells = make_cells(seeds=3)
    found = [cell["metrics"] for cell in cells if cell["method"] == "lora"]
    row = row_of(cells, "lora")
    assert row.macro_f1 == pytest.approx(np.mean([of_seed[0]["value"] for of_seed in found]))
    assert row.mcc == pytest.approx(np.mean([of_seed[1]["value"] for of_seed in found]))


@pytest.mark.parametrize(
    ("ratio", "text"),
    [(1.0, "×1.00"), (16.027, "×16.03"), (99.994, "×99.99"), (99.996, "×100"), (3423.4, "×3,423"), (9e6, "×9,000,000")],
)
def test_forgetting_in_words(ratio: float, text: str) -> None:
    cell = make_cell("lora", "sst2", "smollm2-135m", 0, 0.0) | {"forgetting": {"ratio": ratio}}
    assert any(line.endswith(f" {text}") for line in printed([cell]))


# --- an interval that ends at 0 --------------------------------------------------------------------


def cells_of_answers(seeds: int, ours: Sequence[bool], theirs: Sequence[bool]) -> list[dict[str, Any]]:
    """LoRA and the soft prompt, the same answers for each seed: hits of the same rows."""
    value, low, high = paired_bootstrap([float(hit) for hit in theirs], [float(hit) for hit in ours])
    cells = []
    for method, hits in (("soft-prompt", ours), ("lora", theirs)):
        found = accuracy(["a" if hit else "b" for hit in hits], ["a"] * len(hits)).as_dict()
        for seed in range(seeds):
            cell = make_cell(method, "sst2", "smollm2-135m", seed, 0.0) | found
            cell["difference"] = {"value": value, "low": low, "high": high} if method == "lora" else None
            cells.append(cell)
    return cells


@pytest.mark.parametrize("seeds", [1, 3, 7])
@pytest.mark.parametrize("side", [1, -1])
def test_an_interval_that_ends_at_zero_is_no_verdict(side: int, seeds: int, tmp_path: Path) -> None:
    """One method is right on 3 rows more: more than 2.5 % of the resamples hold none of these, so that the end is 0.

    For these n, ends that are taken from the value and added again are not 0 but a rounding error, on 1, 3 or 7 seeds.
    """
    for n in (30, 35, 41, 49, 53):
        more, less = [row % 3 != 0 or row < 9 for row in range(n)], [row % 3 != 0 for row in range(n)]
        cells = cells_of_answers(seeds, *((less, more) if side > 0 else (more, less)))
        found = cells[-1]["difference"]
        assert found["low" if side > 0 else "high"] == 0
        row = row_of(cells, "lora")
        assert row.difference is not None
        assert row.difference.sign == 0
        assert (row.difference.low if side > 0 else row.difference.high) == 0
        (line,) = (line for line in printed(cells) if line.startswith("lora"))
        assert "▲" not in line
        assert "▼" not in line
        assert "There is no verdict against the better of LoRA" in report.verdict(cells)
    two = [{**cell, "task": task, "curve": []} for task in ("sst2", "cr") for cell in cells]
    assert "none of 2, and on 2 the interval allows no verdict (sst2, cr)" in report.verdict(two)
    page = report.write(two, tmp_path)[0].read_text("utf-8")
    (counts,) = re.findall(r"<tr><td>lora</td>((?:<td[^>]*>[^<]*</td>)+)</tr>", page.split("Over all tasks")[1])[:1]
    assert re.findall(r">([^<]*)</td>", counts)[:3] == ["0", "0", "2"]


def test_rounding_is_no_sign() -> None:
    """0.1 + 0.2 - 0.3 is 5.6e-17: means of token F1 over resamples come to that."""
    rest = 0.1 + 0.2 - 0.3
    assert rest != 0
    assert summary.Estimate(0.1, rest, 0.2).sign == 0
    assert summary.Estimate(-0.1, -0.2, -rest).sign == 0
    assert summary.Estimate(0.1, 1e-6, 0.2).sign == 1  # less than a row of a million
    assert summary.Estimate(-0.1, -0.2, -1e-6).sign == -1


@pytest.mark.parametrize("seeds", [1, 3])
def test_figures_end_their_bars_where_the_intervals_end(seeds: int) -> None:
    """With no row right and all rows right, the bars begin at 0 and end at 100."""
    cells = cells_of_answers(seeds, ours=[True] * 40, theirs=[False] * 40)
    (panel,) = drawn(plots.score_against_time(panels_of(cells))).axes
    bars = {
        tuple(float(y) for y in segment[:, 1])
        for container in panel.containers
        if isinstance(container, ErrorbarContainer)
        for line in container.lines[2]
        for segment in line.get_segments()
    }
    (bottom, low), (high, top) = sorted(bars)
    assert (bottom, top) == (0, 100)
    assert low == pytest.approx(100 * accuracy(["b"] * 40, ["a"] * 40).high)
    assert high == pytest.approx(100 * accuracy(["a"] * 40, ["a"] * 40).low)


def test_an_end_near_zero_is_not_shown_as_zero() -> None:
    cells = [cell for cell in make_cells() if cell["method"] in ("zero-shot", "soft-prompt")]
    cells[0]["difference"] = {"value": -0.105, "low": -0.2, "high": -0.0004}
    assert "▼ −10.5 [−20.0, −0.04]" in printed(cells)[2]
    assert "(95 % interval 0.04 to 20.0)" in report.verdict(cells)
    cells[0]["difference"]["high"] = 0.0004
    assert " −10.5 [−20.0, +0.0]" in printed(cells)[2]


@pytest.mark.parametrize(
    ("number", "unit", "text"),
    [
        (0, "", "0"),
        (20, "", "20"),
        (999, "", "999"),
        (11_520, "", "11.5 k"),
        (134_515_008, "", "135 M"),
        (1_711_376_384, "", "1.71 B"),
        (999_600, "", "1 M"),
        (0, "B", "0 B"),
        (47_952, "B", "48 kB"),
        (1_200_000_000, "B", "1.2 GB"),
        (269_030_016, "B", "269 MB"),
        (3e15, "B", "3e+03 TB"),
    ],
)
def test_amounts(number: float, unit: str, text: str) -> None:
    assert amount(number, unit) == text


# --- the verdict ----------------------------------------------------------------------------------


def test_verdict_on_one_task() -> None:
    assert report.verdict(make_cells()) == (
        "On sst2 the soft prompt reaches 90.7 ± 0.7 (accuracy, %, ± one standard error). "
        "It is 5.6 points (95 % interval 4.4 to 6.9) above the best hard prompt, few-shot-nearest-calibrated with "
        "85.1 ± 0.8. "
        "It is 39.6 points (95 % interval 38.4 to 40.9) above always answering 'positive' with 51.1 ± 1.2. "
        "It is 3.1 points (95 % interval 1.8 to 4.3) below the better of LoRA and full fine-tuning, full-fine-tuning "
        "with 93.8 ± 0.6. Also better than the soft prompt: prefix, lora."
    )


def test_verdict_where_the_interval_allows_none() -> None:
    cells = [cell for cell in make_cells() if cell["method"] in ("zero-shot", "soft-prompt")]
    cells[0] |= {"value": 0.9, "difference": {"value": -0.007, "low": -0.02, "high": 0.006}}
    assert report.verdict(cells) == (
        "On sst2 the soft prompt reaches 90.7 ± 0.7 (accuracy, %, ± one standard error). There is no verdict against "
        "the best hard prompt, zero-shot with 90.0 ± 0.9: the difference to the soft prompt is −0.7 [−2.0, +0.6]. "
        "There is no score of the majority class to compare with."
    )


def with_majority(share: float, low: float, high: float) -> list[dict[str, Any]]:
    """The majority class at ``share``, zero-shot at 51.3 and the soft prompt at 62.3 %, 1,000 test rows of BoolQ."""
    cells = [cell for cell in make_cells("boolq") if cell["method"] in ("majority-class", "zero-shot", "soft-prompt")]
    for cell, value in zip(cells, (share, 0.513, 0.623), strict=True):
        error = math.sqrt(value * (1 - value) / 1000)
        cell |= {"value": value, "stderr": error, "low": value - 2 * error, "high": value + 2 * error}
    cells[0] |= {"difference": {"value": share - 0.623, "low": low, "high": high}}
    cells[0]["most_frequent_answer"] = made_answer("yes", 1.0, share)
    cells[1]["difference"] = {"value": -0.11, "low": -0.14, "high": -0.08}
    return cells


def test_where_no_hard_prompt_is_above_the_majority_class_that_comparison_counts() -> None:
    cells = with_majority(0.622, -0.02, 0.018)
    assert report.verdict(cells) == (
        "On boolq the soft prompt reaches 62.3 ± 1.5 (accuracy, %, ± one standard error). "
        "It is 11.0 points (95 % interval 8.0 to 14.0) above the best hard prompt, zero-shot with 51.3 ± 1.6, which is "
        "not above always answering 'yes'. "
        "There is no verdict against always answering 'yes' with 62.2 ± 1.5, and this is the comparison that counts: "
        "the difference to the soft prompt is −0.1 [−2.0, +1.8]."
    )
    equal = report.verdict(with_majority(0.513, -0.13, -0.09))
    assert "zero-shot with 51.3 ± 1.6, which is not above always answering 'yes'. " in equal
    assert (
        "It is 11.0 points (95 % interval 9.0 to 13.0) above always answering 'yes' with 51.3 ± 1.6, and this is the "
        "comparison that counts."
    ) in equal
    below = report.verdict(with_majority(0.5, -0.15, -0.1))
    assert "counts" not in below
    assert "above the best hard prompt, zero-shot with 51.3 ± 1.6. It is 12.3 points" in below


def test_where_the_soft_prompt_is_below_the_majority_class() -> None:
    found = report.verdict(with_majority(0.7, 0.04, 0.11))
    assert "It is 7.7 points (95 % interval 4.0 to 11.0) below always answering 'yes' with 70.0 ± 1.4" in found
    assert "Also better" not in found


def test_without_hard_prompts_the_majority_class_is_said_all_the_same() -> None:
    cells = [cell for cell in with_majority(0.622, -0.02, 0.018) if cell["method"] != "zero-shot"]
    assert "There is no verdict against always answering 'yes' with 62.2 ± 1.5: the difference" in report.verdict(cells)


def test_over_tasks_the_majority_class_counts_where_no_hard_prompt_is_above_it() -> None:
    sst2 = [cell for cell in make_cells() if cell["method"] in ("majority-class", "zero-shot", "soft-prompt")]
    cr = [{**cell, "task": "cr"} for cell in sst2]
    assert report.verdict([*sst2, *with_majority(0.622, -0.02, 0.018)]) == (
        "Against the best hard prompt, or the majority class where no hard prompt scores above it (boolq), the soft "
        "prompt is better on 1 of 2, and on 1 the interval allows no verdict (boolq). "
        "Against the majority class the soft prompt is better on 1 of 2, and on 1 the interval allows no verdict "
        "(boolq)."
    )
    assert report.verdict([*sst2, *(cell for cell in cr if cell["method"] != "majority-class")]) == (
        "Against the best hard prompt the soft prompt is better on 2 of 2. "
        "Against the majority class the soft prompt is better on 1 of 1. There is no score of the majority class on cr."
    )


def test_verdict_over_tasks_names_where_the_soft_prompt_loses() -> None:
    cells = several_tasks()
    for cell in cells:
        if cell["task"] == "e2e_nlg" and cell["difference"] is not None:
            cell["difference"] = {"value": 0.0, "low": -9.0, "high": 9.0}
    assert report.verdict(cells) == (
        "Against the best hard prompt the soft prompt is better on 2 of 4, worse on 1 (rte), and on 1 the interval "
        "allows no verdict (e2e_nlg). Against the majority class the soft prompt is better on 3 of 3. "
        "Against the better of LoRA and full fine-tuning the soft prompt is better on "
        "none of 4, worse on 3 (sst2, trec6, rte), and on 1 the interval allows no verdict (e2e_nlg)."
    )


def test_verdict_without_a_rival_or_without_us() -> None:
    nothing = "There is nothing yet that the soft prompt can be compared with."
    assert report.verdict([]) == nothing
    assert report.verdict([make_failed("lora"), make_failed("lora", task="cr")]) == nothing
    assert (
        report.verdict([make_failed("soft-prompt")]) == "On sst2 the soft prompt has no score, so there is no verdict."
    )


# --- the page and its figures ---------------------------------------------------------------------

FIGURES = ["score_vs_parameters.png", "score_vs_time.png", "learning_curves.png"]


@pytest.mark.parametrize(
    ("cells", "figures"),
    [
        ([], []),
        ([make_failed("lora")], []),
        ([make_failed("soft-prompt"), *make_cells()[:1]], FIGURES[:2]),
        ([make_cell("soft-prompt", "sst2", "smollm2-135m", 0, 0.0)], FIGURES),
        ([make_cell(method, "e2e_nlg", "smollm2-135m", 0, -0.2, bleu=True) for method in FREE_TEXT], FIGURES),
        ([*make_cells(seeds=2), make_failed("lora", seed=2), make_failed("lora", task="cr")], FIGURES),
        (several_bases()[:30], [*FIGURES, "score_vs_size.png"]),
    ],
    ids=["empty", "failed", "zero-shot", "one", "bleu", "tasks", "bases"],
)
def test_report_holds_every_number_and_nothing_from_outside(
    cells: list[dict[str, Any]], figures: list[str], tmp_path: Path
) -> None:
    paths = report.write(cells, tmp_path / "out")
    assert paths == [tmp_path / "out" / name for name in ["report.html", *figures]]
    assert sorted((tmp_path / "out").iterdir()) == sorted(paths)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths[1:])
    page = paths[0].read_text("utf-8")
    assert not re.search(r"http|<script|@import|url\(|<link|<iframe", page)
    assert len(re.findall(r"<img ", page)) == len(re.findall(r'<img src="data:', page)) == len(figures)
    lines = re.findall(r"<tr[^>]*>(.*?)</tr>", page)
    for row in summary.summary(cells):
        scale = 1 if row.metric == "bleu" else 100
        number = f"{scale * row.score.value:.1f} ± {scale * (row.stderr or 0):.1f}" if row.score else "failed"
        assert any(line.startswith(f"<td>{row.method}</td>") and f">{number}<" in line for line in lines)
        assert all(failure in unescape(page) for failure in row.failed)
    assert "<full>" not in page


def test_page_names_what_was_compared(tmp_path: Path) -> None:
    cells = [cell for cell in make_cells(seeds=3) if cell["method"] in ("few-shot-nearest", "soft-prompt", "lora")]
    page = unescape(report.write(cells, tmp_path)[0].read_text("utf-8"))
    for text in (
        "3 ways to adapt a language model to sst2",
        report.verdict(cells),
        "Each had 10 min to learn, all choices included.",
        "smollm2-135m, 135 M parameters; accuracy, % on 1,821 test rows; up to 3 seeds.",
        registry.METHODS["few-shot-nearest"].words,
        "learning rate 3e-5",
        "softprompt 0.1.0, torch 2.13.0.",
    ):
        assert text in page


def test_one_answer_to_nearly_all_rows_is_said_under_the_table(tmp_path: Path) -> None:
    cells = with_majority(0.622, -0.02, 0.018)
    cells[2]["most_frequent_answer"] = made_answer("yes", 0.982, 0.622)
    note = "note: soft-prompt, seed 0: answers 'yes' on 98.2 % of the rows; 62.2 % of the rows are"
    lines = printed(cells)
    assert [line for line in lines if "answers" in line] == [note]  # not the majority class, which always does
    assert lines.index(note) == 5
    page = unescape(report.write(cells, tmp_path)[0].read_text("utf-8"))
    assert f"<p>N{note[1:]}</p>" in page
    cells[2]["most_frequent_answer"] = made_answer("yes", 0.982, 0.95)
    assert not [line for line in printed(cells) if "answers" in line]


def test_how_many_rows_trained_methods_were_validated_on_is_said(tmp_path: Path) -> None:
    cells = [make_cell(name, "sst2", "smollm2-135m", 0, 0.0) for name in ("soft-prompt", "lora", "few-shot")]
    assert not [line for line in printed(cells) if "validated" in line]  # of a release that did not write it down
    for cell, rows in zip(cells, (500, 500, 0), strict=True):
        cell["validation_rows"] = rows
    assert "note: trained methods were validated on 500 rows" in printed(cells)
    page = unescape(report.write(cells, tmp_path)[0].read_text("utf-8"))
    assert "a line for each seed. Trained methods were validated on 500 rows." in page
    cells[1]["validation_rows"] = 1_200
    said = "note: trained methods were validated on different numbers of rows: soft-prompt on 500; lora on 1,200"
    assert said in printed(cells)


CHOSEN: list[tuple[dict[str, Any], str]] = [
    ({"lr": 1e-4, "steps": 400, "best_step": 293}, "learning rate 1e-4; best after 293 of 400 steps"),
    ({"lr": 1.5e-5, "steps": 1, "best_step": 1}, "learning rate 1.5e-5; best after 1 of 1 step"),
    ({"lr": 0.3, "steps": 1600, "best_step": 0}, "learning rate 0.3; best at the start, before any of 1,600 steps"),
    ({"steps": 0, "best_step": 0}, "best at the start, no step was done"),
    ({"steps": 1200}, "1,200 steps, the last one kept"),
    ({"k": 8, "instruction": None}, "8 examples; no instruction"),
    ({"k": 1, "instruction": 1}, "1 example; instruction 2"),
    ({"instruction": 0, "instruction_text": "Good\nor bad? "}, 'instruction 1: "Good\\nor bad?"'),
    ({"C": 10.0}, "inverse penalty C = 10"),
    ({"soft_prompts": 3}, "made of 3 soft prompts"),
    ({"lr": "auto", "average": 0.98, "form": "mlp", "s": [1, 2]}, "lr: auto; average: 0.98; form: mlp; s: [1, 2]"),
    ({"steps": None, "best_step": 7}, "best after 7 steps; steps: null"),
]


def test_what_was_chosen_in_words(tmp_path: Path) -> None:
    cell = make_cell("soft-prompt", "sst2", "smollm2-135m", 0, 0.0) | {"curve": []}
    cells = [{**cell, "seed": seed, "chosen": chosen} for seed, (chosen, _) in enumerate(CHOSEN)]
    page = unescape(report.write(cells, tmp_path)[0].read_text("utf-8")).split("What was chosen")[1]
    assert re.findall(r"<td>([^<]*)</td></tr>", page) == [words for _, words in CHOSEN]


def test_mean_difference_over_tasks(tmp_path: Path) -> None:
    cells = [
        cell
        for cell in [*make_cells("sst2"), *make_cells("cr", gain=0.06)]
        if cell["method"] in ("zero-shot", "soft-prompt")
    ]
    for cell in cells:
        cell["curve"] = []
    page = report.write(cells, tmp_path)[0].read_text("utf-8")
    # zero-shot: −10.5 and −4.5 points, each −1.3 to +1.2
    below, above = math.hypot(1.3, 1.3) / 2, math.hypot(1.2, 1.2) / 2
    assert f"▼ −7.5 [−{7.5 + below:.1f}, −{7.5 - above:.1f}]" in page


def test_equal_cells_give_equal_files_whatever_the_users_settings(tmp_path: Path) -> None:
    cells = [cell for cell in make_cells() if cell["method"] in ("zero-shot", "soft-prompt", "lora")]
    first = report.write(cells, tmp_path / "first")
    with matplotlib.rc_context({"font.size": 20, "svg.hashsalt": None, "axes.facecolor": "black", "figure.dpi": 50}):
        second = report.write(cells, tmp_path / "second")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_without_matplotlib_only_the_table_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError) as caught:
        report.write(make_cells(), tmp_path)
    assert str(caught.value) == (
        'Drawing figures needs the library matplotlib, which is not installed; pip install "softprompt[compare]".'
    )
    assert list(tmp_path.iterdir()) == []
    assert any(line.startswith("soft-prompt ◂") for line in printed(make_cells()))


def panels_of(cells: Sequence[dict[str, Any]]) -> dict[str, list[Row]]:
    return summary.grouped(summary.summary(cells))


def texts_of(panel: Axes) -> list[Annotation]:
    return [text for text in panel.texts if isinstance(text, Annotation)]


def drawn(figure: Figure | None) -> Figure:
    assert figure is not None
    with style.style():
        figure.draw_without_rendering()
    return figure


@pytest.mark.parametrize(
    "cells", [make_cells(seeds=3), several_tasks(), several_bases()], ids=["one", "tasks", "bases"]
)
def test_labels_cover_neither_each_other_nor_marks(cells: list[dict[str, Any]]) -> None:
    groups = panels_of(cells)
    tasks = {"sst2": [row for row in summary.summary(cells) if row.task == "sst2"]}
    for figure in (
        plots.score_against_parameters(groups),
        plots.score_against_time(groups),
        plots.learning_curves(groups),
        plots.score_against_size(tasks),
    ):
        if figure is None:
            assert len({cell["base"] for cell in cells}) == 1
            continue
        for panel in drawn(figure).axes:
            labels = texts_of(panel)
            boxes = [Text.get_window_extent(label) for label in labels]  # without the line to the mark
            assert len(labels) > 3
            for (one, first), (other, second) in combinations(zip(labels, boxes, strict=True), 2):
                assert not first.overlaps(second), (one.get_text(), other.get_text())
            marks = panel.transData.transform([label.xy for label in labels])
            assert not any(box.contains(*mark) for box in boxes for mark in marks)


def test_what_trains_nothing_stands_left_of_the_logarithmic_axis() -> None:
    figure = drawn(plots.score_against_parameters(panels_of(make_cells())))
    (panel,) = figure.axes
    x = {label.get_text(): label.xy[0] for label in texts_of(panel)}
    assert x["lora"] == pytest.approx(math.log10(921_600))
    free = [x[method] for method, numbers in METHODS.items() if numbers[1] == 0]
    assert len(free) == len(set(free)) == 9
    assert max(free) < math.log10(10_000) - 0.2
    ticks = {text.get_text(): place for text, place in zip(panel.get_xticklabels(), panel.get_xticks(), strict=True)}
    assert list(ticks) == ["0", "10 k", "100 k", "1 M", "10 M", "100 M"]
    assert min(free) < ticks["0"] < max(free)
    assert ticks["1 M"] == 6


def test_names_in_a_small_panel_are_the_trained_methods_and_the_best_hard_prompt() -> None:
    figure = drawn(plots.score_against_time(panels_of(several_tasks())))
    trained = [method for method, numbers in METHODS.items() if numbers[1]]
    for panel in figure.axes:
        floor = [] if panel.get_title(loc="left") == "e2e_nlg" else ["majority-class"]
        shown = [method for method in trained if method != "tf-idf" or floor]
        assert {text.get_text() for text in texts_of(panel)} == {"few-shot-nearest-calibrated", *floor, *shown}


def test_titles_are_no_mathematics_and_fit() -> None:
    cells = [make_cell("soft-prompt", "$x^2$ " + "long " * 30, "smollm2-135m", 0, 0.0)]
    (panel,) = drawn(plots.score_against_time(panels_of(cells))).axes
    assert panel.get_title(loc="left").startswith("$x^2$ long long")
    assert len(panel.get_title(loc="left")) == 48


@given(st.lists(st.floats(-50, 150), min_size=1, max_size=12).map(sorted))
def test_labels_in_a_column_move_as_little_as_possible(heights: list[float]) -> None:
    steps = 10.0 * np.arange(len(heights))
    fit = IsotonicRegression(y_min=0, y_max=120 - steps[-1]).fit_transform(steps, heights - steps)
    assert labels_module.apart(heights, 10.0, 0.0, 120.0) == pytest.approx(fit + steps)


nullable = {
    key: st.none() | st.floats(0, 1e9)
    for key in ("trainable_parameters", "bytes", "train_seconds", "peak_memory_bytes", "latency_ms")
}


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "task": st.sampled_from(["a", "<b>"]),
                "base": st.sampled_from(["x/m", "y/m"]),
                "method": st.sampled_from([*METHODS, "[red]other"]),
                "seed": st.integers(0, 2),
                "status": st.sampled_from(["done", "failed"]),
                "reason": st.none() | st.just("no [bold]memory"),
                "metric": st.just("accuracy"),
                "value": st.none() | st.floats(0, 1),
                "stderr": st.none() | st.floats(0, 0.5),
                "low": st.none() | st.just(0.0),
                "high": st.none() | st.just(1.0),
                "difference": st.none() | st.just({"value": 0.0, "low": None, "high": None}),
                **nullable,
            },
            optional={"n": st.integers(1, 99), "base_parameters": st.integers(1, 10**12), "forgetting": st.none()},
        ),
        max_size=6,
    )
)
def test_any_cells_make_a_table(cells: list[dict[str, Any]]) -> None:
    lines = printed(cells)
    assert report.verdict(cells)
    for row in summary.summary(cells):
        assert any(line.startswith(row.method) for line in lines)
