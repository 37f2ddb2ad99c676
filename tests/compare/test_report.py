"""What the comparison's report says: the table in the terminal, the verdict, the page."""

from __future__ import annotations

import math
import re
import sys
from html import unescape
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softprompt.compare import report, summary
from softprompt.drawing.words import amount
from softprompt.errors import ConfigError
from softprompt.methods import registry
from tests.compare.cells import (
    FREE_TEXT,
    METHODS,
    cells_of_answers,
    made_answer,
    make_cell,
    make_cells,
    make_failed,
    printed,
    row_of,
    several_bases,
    several_tasks,
)

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


@pytest.mark.parametrize(
    ("ratio", "text"),
    [(1.0, "×1.00"), (16.027, "×16.03"), (99.994, "×99.99"), (99.996, "×100"), (3423.4, "×3,423"), (9e6, "×9,000,000")],
)
def test_forgetting_in_words(ratio: float, text: str) -> None:
    cell = make_cell("lora", "sst2", "smollm2-135m", 0, 0.0) | {"forgetting": {"ratio": ratio}}
    assert any(line.endswith(f" {text}") for line in printed([cell]))


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
    if seeds != 3:  # figures are dear, and the page shows what the lines above have shown of each
        return
    page = report.write(two, tmp_path)[0].read_text("utf-8")
    (counts,) = re.findall(r"<tr><td>lora</td>((?:<td[^>]*>[^<]*</td>)+)</tr>", page.split("Over all tasks")[1])[:1]
    assert re.findall(r">([^<]*)</td>", counts)[:3] == ["0", "0", "2"]


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


def test_alarms_are_said_once_under_the_table_and_on_the_page(tmp_path: Path) -> None:
    keys = [("soft-prompt", 0), ("soft-prompt", 1), ("lora", 0), ("few-shot", 0)]
    cells = [make_cell(name, "sst2", "smollm2-135m", seed, 0.0) for name, seed in keys]
    assert not [line for line in printed(cells) if "alarm" in line]  # of a release that did not write them down
    few = {"kind": "few_rows", "sentence": "8 rows to train with are very few"}
    chance = {"kind": "chance", "sentence": "the validation accuracy of 0.52 is that of the most frequent label"}
    for cell, alarms in zip(cells, ([few], [few], [few, chance], []), strict=True):
        cell["alarms"] = alarms
    said = [
        f"alarm: soft-prompt, seeds 0, 1; lora, seed 0: {few['sentence']}",
        f"alarm: lora, seed 0: {chance['sentence']}",
    ]
    assert [line for line in printed(cells) if "alarm" in line] == said
    page = unescape(report.write(cells, tmp_path)[0].read_text("utf-8"))
    for line in said:
        assert f"<p>A{line[1:]}</p>" in page


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
