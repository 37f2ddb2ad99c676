"""The command line with a quantised base model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import softprompt as sp
from tests.conftest import Ran, Run

FEW = ("--num-virtual-tokens", "4", "--steps", "4")


def is_refused(ran: Ran, words: str) -> bool:
    return (ran.code, ran.out) == (2, "") and words in ran.err


def test_trained_served_and_measured_in_few_bits(run: Run, train: Run, home: Path) -> None:
    trained = train("train.jsonl", "--name", "films", *FEW, "--quantize", "int8", "--json")
    assert trained.code == 0
    assert trained.json["base_unchanged"] is True
    assert run("show", "films", "--json").json["quantized"] == "int8"

    same = run("evaluate", "films", "test.jsonl", "--quantize", "int8", "--dtype", "fp32", "--json")
    assert same.json["precision"] == "int8"
    assert same.json["captured_graphs"] == 0  # on a CPU
    assert "trained on its base model" not in same.err
    other = run("evaluate", "films", "test.jsonl", "--dtype", "fp32", "--json")
    assert other.err.count("was trained on its base model int8, and is used on it unquantised") == 1
    assert "softprompt evaluate films TEST --on int8" in other.err

    found = run("evaluate", "films", "test.jsonl", "--dtype", "fp32", "--on", "int8", "int4", "--json")
    assert "trained on its base model" not in found.err
    assert found.json["precision"] == "fp32"
    assert [one["precision"] for one in found.json["on"]] == ["int8", "int4"]
    eight = found.json["on"][0]
    assert eight["metrics"] == same.json["metrics"]
    assert eight["difference"]["value"] == pytest.approx(eight["value"] - found.json["value"])
    assert eight["difference"]["low"] <= eight["difference"]["value"] <= eight["difference"]["high"]
    assert found.json["on"][1]["base_bytes"] < eight["base_bytes"]
    shown = run("evaluate", "films", "test.jsonl", "--on", "int8", "bf16")
    assert shown.code == 0
    assert "accuracy: difference" in shown.out


def test_the_difference_of_the_loss_is_that_of_each_row(run: Run, train: Run, base: str, home: Path) -> None:
    """Oracle: minus the log-probability of each row's label, from Python, on a model in each precision."""
    assert train("train.jsonl", "--name", "films", *FEW).code == 0
    asked = ("evaluate", "films", "test.jsonl", "--dtype", "fp32", "--on", "int4", "fp32")
    found = run(*asked, "--json").json
    rows = [json.loads(line) for line in Path("test.jsonl").read_text().splitlines()]
    soft_prompt, losses = sp.SoftPrompt.load(home / "films.safetensors"), []
    for precision in (None, "int4"):
        lm = sp.load_model(base, dtype="fp32", device="cpu", quantize=precision)
        answers = sp.predict(lm, soft_prompt, [row["input"] for row in rows])
        pairs = zip(answers, rows, strict=True)
        losses.append(np.array([-(answer.logprobs or {})[row["target"]] for answer, row in pairs]))
    plain, four = losses
    told = found["on"][0]["loss_difference"]
    assert told["n"] == 12
    assert told["value"] == pytest.approx(float((four - plain).mean()), abs=1e-5)
    assert told["stderr"] == pytest.approx(float((four - plain).std(ddof=1)) / 12**0.5, abs=1e-5)
    assert (told["first_loss"], told["loss"]) == pytest.approx((plain.mean(), four.mean()), abs=1e-5)
    assert told["stderr"] > 0
    same = found["on"][1]["loss_difference"]
    assert (same["value"], same["stderr"]) == (0, 0)
    assert f"loss in fp32: {plain.mean():.4f} nats a row, +0.0000 ± 0.0000" in run(*asked).out


def test_fp8_has_two_spellings(run: Run, train: Run) -> None:
    for name, option in (("one", "--quantize"), ("two", "--base-dtype")):
        assert train("train.jsonl", "--name", name, *FEW, option, "fp8").code == 0
    files = [run("show", name, "--json").json for name in ("one", "two")]
    assert files[0]["quantized"] == files[1]["quantized"] == "fp8"
    assert files[0]["training"]["loss"] == files[1]["training"]["loss"]


def test_what_is_refused(run: Run, train: Run) -> None:
    assert is_refused(train("train.jsonl", "--name", "a", "--quantize", "int3"), "--quantize must be one of")
    assert is_refused(train("train.jsonl", "--name", "a", "--base-dtype", "bf16"), "--base-dtype can only be fp8")
    both = train("train.jsonl", "--name", "a", "--base-dtype", "fp8", "--quantize", "int8")
    assert is_refused(both, "--base-dtype can only be fp8")
    assert train("train.jsonl", "--name", "films", *FEW).code == 0
    assert is_refused(run("evaluate", "films", "test.jsonl", "--on", "runes"), "--on takes precisions")


def test_free_text_in_other_precisions(run: Run, train: Run) -> None:
    rows = [{"input": f"film {i}", "target": f"a good film number {i}"} for i in range(12)]
    Path("texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train("texts.jsonl", "--name", "texts", "--labels", "none", *FEW).code == 0
    asked = ("evaluate", "texts", "texts.jsonl", "--max-new-tokens", "4", "--on", "int8", "--json")
    eight = run(*asked).json["on"][0]
    assert eight["difference"]["metric"] == "bleu"
    assert eight["loss_difference"]["n"] == 12
    perplexity = run(*asked, "--metric", "perplexity").json
    assert perplexity["on"][0]["difference"] is None
    assert perplexity["on"][0]["metric"] == "perplexity"
