"""Comparisons with made-up methods: what is kept, what is measured, what fails."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, matthews_corrcoef

from softprompt.compare import measure, report
from softprompt.compare.measure import plain_perplexity
from softprompt.compare.plan import Key
from softprompt.data.example import Dataset, Example
from softprompt.errors import ConfigError, TrainingError
from softprompt.evaluation import metrics
from softprompt.methods.problem import Learned, Problem
from softprompt.methods.registry import METHODS
from softprompt.model.frozen import FrozenLM
from softprompt.tasks.predict import Prediction, Progress
from tests.compare.made_up import MadeUp, comparison, fails, plan, run_all, says
from tests.conftest import make_model, make_tokenizer, tiny, toy

pytestmark = pytest.mark.usefixtures("made_up")


def test_cells_are_measured_and_kept(tmp_path: Path) -> None:
    found = comparison(tmp_path, seeds=2)
    assert found.todo() == [
        Key("tiny", "zero-shot", 0),
        Key("tiny", "soft-prompt", 0),
        Key("tiny", "soft-prompt", 1),
        Key("tiny", "lora", 0),
        Key("tiny", "lora", 1),
    ]
    run_all(found)
    cells = json.loads((tmp_path / "results.json").read_text())
    assert cells == found.cells
    first = cells[0]
    gold = [example.target for example in toy(30, 3).examples]
    assert first["value"] == pytest.approx(gold.count("negative") / 30)
    assert (first["task"], first["method"], first["base"], first["seed"]) == ("toy", "zero-shot", "tiny", 0)
    assert (first["metric"], first["n"], first["status"], first["reason"]) == ("accuracy", 30, "done", None)
    assert (first["trainable_parameters"], first["bytes"], first["chosen"]) == (7, 9, {"k": 2})
    assert first["base_parameters"] == tiny("llama").num_parameters
    assert first["forgetting"]["ratio"] == 1
    assert first["peak_memory_bytes"] >= measure.lm_bytes(tiny("llama"))
    assert first["latency_ms"] >= 0
    assert first["seconds"] >= first["train_seconds"] + first["answer_seconds"] >= 0
    failed = cells[-1]
    assert (failed["method"], failed["status"], failed["reason"]) == ("lora", "failed", "It does not learn.")


def test_cells_have_macro_f1_and_mcc_beside_accuracy(tmp_path: Path) -> None:
    """scikit-learn's, of the same answers."""
    found = comparison(tmp_path, methods=("zero-shot", "soft-prompt"))
    gold = [str(example.target) for example in toy(30, 3).examples]
    for cell, said in zip(run_all(found), (["negative"], ["negative", "positive", "positive"]), strict=True):
        answers = [said[i % len(said)] for i in range(30)]
        by_name = {metric["metric"]: metric for metric in cell["metrics"]}
        assert list(by_name) == ["accuracy", "macro_f1", "mcc"]
        assert by_name["accuracy"] == {key: cell[key] for key in ("metric", "value", "stderr", "low", "high", "n")}
        labels = ["negative", "positive"]
        wanted = f1_score(gold, answers, labels=labels, average="macro", zero_division=0)
        assert by_name["macro_f1"]["value"] == pytest.approx(wanted)
        assert by_name["mcc"]["value"] == pytest.approx(matthews_corrcoef(gold, answers))
        label = "negative" if len(said) == 1 else "positive"
        assert cell["most_frequent_answer"] == {
            "label": label,
            "share": answers.count(label) / 30,
            "gold_share": gold.count(label) / 30,
            "one_answer": len(said) == 1,
        }


def test_the_majority_class_runs_first_wherever_there_are_labels(tmp_path: Path, made_up: MadeUp) -> None:
    made_up["majority-class"] = METHODS["majority-class"].run
    assert plan().methods[0] == next(iter(METHODS)) == "majority-class"
    assert "majority-class" not in plan(verbalizer=None, template=None).methods
    earlier = comparison(tmp_path, methods=("zero-shot", "soft-prompt"))
    run_all(earlier)
    for cell in earlier.cells:  # as releases before left them
        del cell["metrics"], cell["most_frequent_answer"]
    (tmp_path / "results.json").write_text(json.dumps(earlier.cells))
    found = comparison(tmp_path, methods=("majority-class", "zero-shot", "soft-prompt"), seeds=2)
    assert found.todo() == [Key("tiny", "majority-class", 0), Key("tiny", "soft-prompt", 1)]
    first = run_all(found)[0]
    train, gold = ([str(row.target) for row in toy(*of).examples] for of in ((20, 1), (30, 3)))
    label = max(("negative", "positive"), key=train.count)
    assert first["value"] == gold.count(label) / 30
    assert first["most_frequent_answer"]["label"] == label
    assert first["most_frequent_answer"]["share"] == 1
    assert {metric["metric"]: metric["value"] for metric in first["metrics"]}["mcc"] == 0
    assert (first["trainable_parameters"], first["bytes"], first["chosen"]) == (0, len(label), {})
    assert first["forgetting"]["ratio"] == 1
    ours = [("negative", "positive", "positive")[i % 3] == target for i, target in enumerate(gold)]
    assert found.cells[0]["method"] == "majority-class"
    assert found.cells[0]["difference"]["value"] == pytest.approx(gold.count(label) / 30 - np.mean(ours))
    assert report.verdict(found.cells)


def test_an_instruction_that_was_chosen_is_kept_with_its_text(tmp_path: Path, made_up: MadeUp) -> None:
    def method(problem: Problem) -> Learned:
        return replace(says(["negative"])(problem), chosen={"k": 4, "instruction": 1})

    made_up["few-shot"] = method
    found = comparison(tmp_path, methods=("few-shot",), instructions=("Good?", "Good or bad?"))
    assert run_all(found)[0]["chosen"] == {"k": 4, "instruction": 1, "instruction_text": "Good or bad?"}


def test_a_cell_says_what_all_of_it_took(tmp_path: Path, made_up: MadeUp) -> None:
    def slow(problem: Problem) -> Learned:
        time.sleep(0.3)
        learned = says(["negative"])(problem)

        def answer(examples: Sequence[Example], progress: Progress | None) -> list[Prediction]:
            time.sleep(0.4 if len(examples) > 1 else 0)
            return learned.answer(examples, progress)

        return replace(learned, answer=answer)

    made_up["zero-shot"], made_up["lora"] = slow, fails
    slowed, failed = run_all(comparison(tmp_path, methods=("zero-shot", "lora")))
    assert slowed["train_seconds"] >= 0.3
    assert slowed["answer_seconds"] >= 0.4
    assert slowed["seconds"] >= 0.7
    assert json.loads((tmp_path / "results.json").read_text())[0]["seconds"] == slowed["seconds"]
    assert failed["seconds"] >= 0


def test_differences_are_paired(tmp_path: Path) -> None:
    found = comparison(tmp_path)
    run_all(found)
    zero, soft = found.cells[:2]
    gold = [example.target for example in toy(30, 3).examples]
    theirs = [float(target == "negative") for target in gold]
    ours = [float(target == ("negative", "positive", "positive")[i % 3]) for i, target in enumerate(gold)]
    value, low, high = metrics.paired_bootstrap(theirs, ours)
    assert zero["difference"] == {"value": value, "low": low, "high": high}
    assert value == pytest.approx(np.mean(theirs) - np.mean(ours))
    assert soft["difference"] is None


def test_free_text_is_compared_by_bleu(tmp_path: Path, made_up: MadeUp) -> None:
    made_up["zero-shot"], made_up["soft-prompt"] = says(["the film is a film"]), says(["the plot is thin"])
    rows = tuple(Example({"input": str(i)}, "the plot is thin", where=f"t:{i}") for i in range(12))
    test = Dataset(rows, "t", "t")
    found = comparison(tmp_path, verbalizer=None, train=test, test=test, methods=("zero-shot", "soft-prompt"))
    zero, soft = run_all(found)
    assert (zero["metric"], soft["value"]) == ("bleu", pytest.approx(100))
    assert [metric["metric"] for metric in zero["metrics"]] == ["bleu"]
    assert zero["most_frequent_answer"] == {
        "label": "the film is a film",
        "share": 1.0,
        "gold_share": 0.0,
        "one_answer": True,
    }
    assert found.cells[0]["difference"]["value"] == pytest.approx(zero["value"] - 100)


def test_short_answers_are_compared_by_the_words_they_share(tmp_path: Path, made_up: MadeUp) -> None:
    """ "a red car" shares one of three words with "a red door" once the article is gone: F1 of 2 * 1 / (2 + 2)."""
    made_up["zero-shot"], made_up["soft-prompt"] = says(["a red car"]), says(["The red door."])
    rows = tuple(Example({"input": str(i)}, "red door", where=f"t:{i}") for i in range(12))
    short = Dataset(rows, "t", "t")
    options: dict[str, Any] = {"verbalizer": None, "train": short, "validation": short, "test": short}
    found = comparison(tmp_path, methods=("zero-shot", "soft-prompt"), **options)
    zero, soft = run_all(found)
    assert (zero["metric"], zero["value"], soft["value"]) == ("token_f1", 0.5, 1.0)
    assert found.cells[0]["difference"] == {"value": -0.5, "low": -0.5, "high": -0.5}
    long = Dataset(tuple(replace(row, target="one two three four") for row in rows), "t", "t")
    with pytest.raises(ConfigError, match="with other metric;"):
        comparison(tmp_path, methods=("zero-shot", "soft-prompt"), **options | {"train": long})


def test_forgetting_is_measured_on_the_changed_copy(tmp_path: Path, made_up: MadeUp) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    changed = FrozenLM(model, make_tokenizer(), name="changed", dtype="fp32", device="cpu")
    made_up["lora"] = says(["positive"], adapted=changed)
    cell = comparison(tmp_path, methods=("lora",)).run(Key("tiny", "lora", 0))
    before, after = plain_perplexity(tiny("llama")), plain_perplexity(changed)
    assert cell["forgetting"] == {"before": before, "after": after, "ratio": after / before}
    assert after > 1.1 * before


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("probability tensor contains either `inf`, `nan` or element < 0"),
        FloatingPointError("overflow"),
        TrainingError("The loss is not finite."),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_a_method_may_run_into_fails_its_cell(error: Exception, tmp_path: Path, made_up: MadeUp) -> None:
    def method(problem: Problem) -> Learned:
        raise error

    made_up["lora"] = method
    assert [cell["status"] for cell in run_all(comparison(tmp_path))] == ["done", "done", "failed"]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4) at non-singleton dimension 0"),
        AssertionError("ours"),
        ZeroDivisionError(),
        KeyError("loss"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_mistake_of_ours_is_no_failed_cell(error: Exception, tmp_path: Path, made_up: MadeUp) -> None:
    def method(problem: Problem) -> Learned:
        raise error

    made_up["lora"] = method
    found = comparison(tmp_path)
    with pytest.raises(type(error)):
        run_all(found)
    kept = json.loads((tmp_path / "results.json").read_text())
    assert [(cell["method"], cell["status"]) for cell in kept] == [("zero-shot", "done"), ("soft-prompt", "done")]


def test_numbers_that_are_not_finite_are_null(tmp_path: Path, made_up: MadeUp) -> None:
    def method(problem: Problem) -> Learned:
        curve = ({"seconds": 1.0, "step": 1, "value": 0.5, "loss": math.inf},)
        return replace(says(["positive"])(problem), curve=curve, validation=math.nan)

    made_up["lora"] = method
    run_all(comparison(tmp_path))
    cell = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)[-1]
    assert (cell["curve"][0]["loss"], cell["validation"]) == (None, None)
