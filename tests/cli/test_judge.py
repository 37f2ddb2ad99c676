"""``softprompt judge``: both scores are those of train and evaluate, step by step."""

from __future__ import annotations

from pathlib import Path

import pytest

import softprompt as sp
from softprompt.evaluation.metrics import paired_bootstrap
from tests.conftest import Run, write_texts

QUICK = ("--dtype", "fp32", "--device", "cpu", "--steps", "8")


def test_it_is_train_and_evaluate_in_one(run: Run, base: str, home: Path) -> None:
    ran = run("judge", "train.jsonl", "test.jsonl", "--base", base, "--json", *QUICK)
    lm = sp.load_model(base, dtype="fp32", device="cpu")
    prompt = sp.train(lm, "train.jsonl", num_virtual_tokens=10, steps=8, progress=False)
    found = [sp.evaluate(lm, prompt, "test.jsonl", base_only=alone, progress=False) for alone in (False, True)]
    told = ran.json
    for name, one in zip(("with", "without"), found, strict=True):
        assert told[name]["value"] == one.headline.value
        assert (told[name]["low"], told[name]["high"]) == (one.headline.low, one.headline.high)
    assert told["metric"] == "accuracy"
    gold = [str(row.target) for row in sp.read_dataset("test.jsonl", fields=("input",)).examples]
    hits = [[float(p.text == target) for p, target in zip(one.predictions, gold, strict=True)] for one in found]
    assert told["difference"]["value"] == pytest.approx(told["with"]["value"] - told["without"]["value"])
    assert (told["difference"]["low"], told["difference"]["high"]) == paired_bootstrap(*hits)[1:]
    assert (told["num_virtual_tokens"], told["steps"], told["difference"]["n"]) == (10, 8, 12)
    assert not home.exists()  # nothing is stored


def test_it_prints_both_scores_and_their_difference(run: Run, base: str) -> None:
    ran = run("judge", "train.jsonl", "test.jsonl", "--base", base, "--num-virtual-tokens", "3", *QUICK)
    assert ran.code == 0
    lines = ran.out.splitlines()
    assert [line.split("  ")[0] for line in lines[2:5]] == ["without a soft prompt", "with one", "difference"]
    assert all(" to " in line and line.endswith("12") for line in (line.rstrip() for line in lines[2:5]))
    assert lines[5].startswith("3 virtual tokens, 8 steps on train.jsonl")


def test_free_text_is_judged_by_its_own_metric(run: Run, base: str, tmp_path: Path) -> None:
    write_texts(tmp_path / "texts.jsonl", 12)
    ran = run("judge", "texts.jsonl", "texts.jsonl", "--base", base, "--json", *QUICK[:4], "--steps", "2")
    assert ran.json["metric"] == "bleu"
    assert ran.json["difference"].keys() == {"value", "low", "high", "n"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nothing.jsonl", "test.jsonl"), "nothing.jsonl"),
        (("train.jsonl", "nothing.jsonl"), "nothing.jsonl"),
        (("train.jsonl", "test.jsonl", "--steps", "0"), "steps"),
        (("train.jsonl", "test.jsonl", "--template", "{input}{target}"), "{soft_prompt}"),
        (("train.jsonl", "test.jsonl", "--labels", "yes,no"), "positive"),
    ],
)
@pytest.mark.usefixtures("no_model")
def test_mistakes_are_told_before_the_model_is_loaded(run: Run, arguments: tuple[str, ...], words: str) -> None:
    ran = run("judge", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert words in ran.err
