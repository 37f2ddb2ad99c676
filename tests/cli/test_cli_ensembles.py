"""``softprompt predict A,B`` and ``evaluate A,B``: against the answers of A and B alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Run, is_refused

EXACT = ("--dtype", "fp32", "--json")


@pytest.fixture
def pair(train: Run, home: Path) -> str:
    """Two soft prompts of one task."""
    for seed in ("0", "1"):
        assert train("train.jsonl", "--name", f"films-{seed}", "--seed", seed, "--num-virtual-tokens", "4").code == 0
    return "films-0,films-1"


def test_two_answer_together(run: Run, pair: str, tmp_path: Path) -> None:
    together = run("predict", pair, "--file", "test.jsonl", *EXACT).json
    alone = [run("predict", name, "--file", "test.jsonl", *EXACT).json["predictions"] for name in pair.split(",")]
    assert (together["name"], together["vote"]) == (pair, "mean")
    for row, found in enumerate(together["predictions"]):
        for label, probability in found["probabilities"].items():
            each = [one[row]["probabilities"][label] for one in alone]
            assert probability == pytest.approx(sum(each) / 2, abs=1e-5)
        assert [one["text"] for one in found["members"]] == [one[row]["text"] for one in alone]

    measured = run("evaluate", pair, "test.jsonl", "--plot", "plots/films.svg", *EXACT).json
    scores = [run("evaluate", name, "test.jsonl", *EXACT).json for name in pair.split(",")]
    assert [one["metrics"][0] for one in measured["members"]] == [one["metrics"][0] for one in scores]
    assert measured["mean_of_members"] == pytest.approx(sum(one["value"] for one in scores) / 2)
    assert sum(one["n"] for one in measured["reliability"]) == measured["n"] == 12
    assert (tmp_path / "plots" / "films.svg").read_text().startswith("<?xml")
    plain = run("evaluate", pair, "test.jsonl", "--dtype", "fp32").out
    for words in ("films-0", "films-1", "their mean", "disagreement", "calibration_error"):
        assert words in plain
    one = run("evaluate", "films-0", "test.jsonl", "--plot", "one.png", "--dtype", "fp32")
    assert one.code == 0
    assert (tmp_path / "one.png").stat().st_size > 5_000


@pytest.mark.usefixtures("no_model", "stored")
def test_mistakes_are_told_before_a_model_is_loaded(run: Run, home: Path) -> None:
    is_refused(
        run("predict", "films", "a", "--vote", "mean"),
        "--vote is for several soft prompts, A,B,C, but only 'films' was named; leave it out.",
    )
    assert "found that of 'films' twice" in run("predict", "films,films", "a").err
    assert "'filmz'" in run("evaluate", "films,filmz", "test.jsonl").err
    assert "--base-only" in run("predict", "films,films", "a", "--base-only").err
    assert ".png or .svg" in run("evaluate", "films", "test.jsonl", "--plot", "a.pdf").err


@pytest.mark.usefixtures("stored")
def test_a_path_that_is_there_may_hold_a_comma(run: Run, home: Path) -> None:
    path = home / "a,b.safetensors"
    (home / "films.safetensors").rename(path)
    assert "base model" in run("predict", str(path), "a").err  # it was found, and is of another one


@pytest.mark.usefixtures("no_model", "stored")
def test_ensembles_to_serve_are_read_before_a_model_is_loaded(run: Run) -> None:
    for value in ("films", "=a,b", "x=a"):
        ran = run("serve", "--ensemble", value)
        assert ran.code == 2
        assert "NAME=A,B,C" in ran.err
    assert "two of one name" in run("serve", "--ensemble", "x=a,b", "x=c,d").err
    assert "--vote is for --ensemble" in run("serve", "--vote", "mean").err
