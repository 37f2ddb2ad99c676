"""Comparisons with made-up methods: what is kept, what runs again, what is measured."""

from __future__ import annotations

import itertools
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score, matthews_corrcoef

from softprompt.compare import measure, report
from softprompt.compare.comparison import Comparison
from softprompt.compare.measure import plain_perplexity
from softprompt.compare.plan import Key, Plan, cut
from softprompt.data.example import Dataset, Example
from softprompt.errors import BaseModelError, ConfigError, TrainingError
from softprompt.evaluation import metrics
from softprompt.methods.method import Method
from softprompt.methods.problem import PROBE, Learned, Problem
from softprompt.methods.registry import METHODS
from softprompt.model.frozen import FrozenLM
from softprompt.tasks.predict import Prediction, Progress
from softprompt.tuning.gradients import Gradients, Work
from tests.conftest import TOY_LABELS, TOY_TEMPLATE, make_model, make_tokenizer, tiny, toy

RAN: list[tuple[str, int]] = []

Run = Callable[[Problem], Learned]


def says(labels: Sequence[str], name: str = "", adapted: FrozenLM | None = None) -> Run:
    """A method that answers row ``i`` of any data with ``labels[i]``, again and again."""

    def method(problem: Problem) -> Learned:
        RAN.append((name, problem.seed))

        def answer(examples: Sequence[Example], progress: Progress | None) -> list[Prediction]:
            return [
                Prediction(labels[i % len(labels)], {"negative": -1.0, "positive": -0.5}, None, False)
                for i in range(len(examples))
            ]

        return Learned(answer, 7, 9, {"k": 2}, 0.5, ({"seconds": 1.0, "step": 1, "value": 0.5, "loss": 1.0},), adapted)

    return method


def fails(problem: Problem) -> Learned:
    RAN.append(("fails", problem.seed))
    raise TrainingError("It does not learn.")


def stops(problem: Problem) -> Learned:
    raise KeyboardInterrupt


class MadeUp:
    """What stands in for the methods; all others are not there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._made: dict[str, Method] = {}
        monkeypatch.setattr("softprompt.compare.comparison.METHODS", self._made)
        monkeypatch.setattr("softprompt.compare.plan.METHODS", self._made)

    def __setitem__(self, name: str, run: Run) -> None:
        self.add(replace(METHODS[name], run=run, together=None))

    def add(self, method: Method) -> None:
        self._made[method.name] = method
        for known in [known for known in METHODS if known in self._made]:  # in their order
            self._made[known] = self._made.pop(known)


@pytest.fixture(autouse=True)
def made_up(monkeypatch: pytest.MonkeyPatch) -> MadeUp:
    RAN.clear()
    made = MadeUp(monkeypatch)
    made["zero-shot"] = says(["negative"], "zero-shot")
    made["soft-prompt"] = says(["negative", "positive", "positive"], "soft-prompt")
    made["lora"] = fails
    return made


def plan(**options: Any) -> Plan:
    settings: dict[str, Any] = {
        "task": "toy",
        "train": toy(20, 1),
        "validation": toy(10, 2),
        "test": toy(30, 3),
        "template": TOY_TEMPLATE,
        "verbalizer": TOY_LABELS,
        "bases": ("tiny",),
    }
    return Plan(**settings | options)


def comparison(folder: Path, **options: Any) -> Comparison:
    return Comparison(plan(**options), folder, lambda _: tiny("llama"))


def run_all(found: Comparison) -> list[dict[str, Any]]:
    return [found.run(key) for key in found.todo()]


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


def test_base_models_are_timed_before_the_first_cell(tmp_path: Path) -> None:
    loads: list[str] = []

    def load(base: str) -> FrozenLM:
        loads.append(base)
        return tiny({"a": "llama", "b": "gpt2"}[base])

    found = Comparison(plan(bases=("a", "b")), tmp_path, load)
    speeds = found.speeds()
    assert sorted(speeds) == ["a", "b"]
    assert all(speed.row > 0 and speed.plain > 0 for speed in speeds.values())
    assert RAN == []
    assert loads == ["b", "a"]
    found.run(found.todo()[0])
    assert loads == ["b", "a"]


def test_a_base_model_that_cannot_answer_has_no_speed_and_its_cells_tell_why(tmp_path: Path) -> None:
    long = replace(TOY_TEMPLATE, text="many words " * 100 + TOY_TEMPLATE.text)
    found = comparison(tmp_path, template=long)
    assert found.speeds() == {}
    assert "choose a longer window" in found.run(Key("tiny", "lora", 0))["reason"]


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


def test_finished_cells_do_not_run_again_and_failed_ones_do(tmp_path: Path, made_up: MadeUp) -> None:
    run_all(comparison(tmp_path))
    assert RAN == [("zero-shot", 0), ("soft-prompt", 0), ("fails", 0)]
    RAN.clear()
    made_up["lora"] = says(["positive"], "lora")
    again = comparison(tmp_path, seeds=2)
    run_all(again)
    assert RAN == [("soft-prompt", 1), ("lora", 0), ("lora", 1)]
    assert [(cell["method"], cell["seed"]) for cell in again.cells] == [
        ("zero-shot", 0),
        ("soft-prompt", 0),
        ("soft-prompt", 1),
        ("lora", 0),
        ("lora", 1),
    ]
    assert {cell["status"] for cell in again.cells} == {"done"}
    assert comparison(tmp_path, seeds=2).todo() == []


def test_an_interruption_loses_the_cell_at_hand_only(tmp_path: Path, made_up: MadeUp) -> None:
    made_up["lora"] = stops
    found = comparison(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_all(found)
    assert [key.method for key in comparison(tmp_path).todo()] == ["lora"]


def real(monkeypatch: pytest.MonkeyPatch, made_up: MadeUp, steps: int = 6) -> None:
    """The soft prompt's own method, with few steps."""
    monkeypatch.setattr("softprompt.methods.prompt_tuning.most_steps", lambda rows, batch_size: steps)
    made_up.add(METHODS["soft-prompt"])


class Killed(BaseException):
    pass


def test_seeds_learn_together_and_go_on_after_a_kill(
    tmp_path: Path, made_up: MadeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    real(monkeypatch, made_up)
    add, rounds = Gradients.add, itertools.count()
    at = PROBE + 3

    def dies(gradients: Gradients, work: Work, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        assert len(vectors) == 3
        if next(rounds) == at:
            raise Killed
        return add(gradients, work, vectors)

    monkeypatch.setattr(Gradients, "add", dies)
    options: dict[str, Any] = {"methods": ("soft-prompt",), "seeds": 3, "budget": 200.0}
    with pytest.raises(Killed):
        run_all(comparison(tmp_path, **options))
    found = comparison(tmp_path, **options)
    first = found.run(found.todo()[0])
    assert next(rounds) == at + 1 + 6 - 2  # from the checkpoint of the validation at step 2
    assert found.learned == {Key("tiny", "soft-prompt", 1), Key("tiny", "soft-prompt", 2)}
    assert (tmp_path / "training").exists()
    del found  # killed again, with all learned: nothing is computed anew
    rest = run_all(comparison(tmp_path, **options))
    assert next(rounds) == at + 1 + 6 - 2 + 1
    cells = json.loads((tmp_path / "results.json").read_text())
    assert cells == [first, *rest]
    assert [cell["learned_with"] for cell in cells] == [[1, 2], [0, 2], [0, 1]]
    assert all(cell["seconds"] >= cell["train_seconds"] > 0 for cell in cells)
    report.write(cells, tmp_path)
    assert "soft-prompt learned for several seeds in shared passes" in (tmp_path / "report.html").read_text()
    assert {cell["status"] for cell in cells} == {"done"}
    assert not (tmp_path / "training").exists()


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"test": toy(31, 3)}, "test, test_rows"),
        ({"budget": 5.0}, "budget"),
        ({"task": "other", "train": toy(21, 1)}, "task, train"),
    ],
)
def test_a_folder_is_of_one_comparison(tmp_path: Path, options: dict[str, Any], what: str) -> None:
    run_all(comparison(tmp_path))
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(ConfigError) as caught:
        comparison(tmp_path, **options)
    assert str(caught.value) == (
        f"The folder {tmp_path} holds results of a comparison with other {what}; "
        f"choose another --out, or repeat that comparison's options."
    )
    assert (tmp_path / "results.json").read_bytes() == before


@pytest.mark.parametrize("content", ["", "{}", "[1]", '[{"task": "x"}]', "\udcff"])
def test_something_else_in_the_folder_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError) as caught:
        comparison(tmp_path)
    assert str(caught.value) == (
        f"Expected a comparison's results in {path}, found something else; choose another --out."
    )


def test_a_plan_says_what_does_not_fit() -> None:
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"methods": ("magic",)}, "A method must be one of zero-shot, soft-prompt, lora, not 'magic'; choose one."),
        ({"budget": 0.0}, "The budget must be above 0 seconds, not 0.0; give for instance 10m."),
        ({"seeds": 0}, "At least 1 seed is needed, not 0; give --seeds 1 or more."),
    ]
    for options, sentence in mistakes:
        with pytest.raises(ConfigError) as caught:
            plan(**options)
        assert str(caught.value) == sentence


def test_methods_that_do_not_fit(made_up: MadeUp) -> None:
    for name in ("tf-idf", "zero-shot-calibrated", "instruction", "soft-prompt-ensemble"):
        made_up[name] = fails
    free: dict[str, Any] = {"verbalizer": None, "template": None}
    assert plan(**free).methods == ("zero-shot", "soft-prompt", "lora")
    for options, method, lack in [
        (free, "tf-idf", "the targets are free text, and it needs labels"),
        (free, "zero-shot-calibrated", "the targets are free text, and it needs labels"),
        ({}, "instruction", "it needs --instruction or --instructions"),
        ({}, "soft-prompt-ensemble", "it needs the soft prompts of at least 2 seeds"),
    ]:
        with pytest.raises(ConfigError) as caught:
            plan(methods=(method,), **options)
        assert str(caught.value) == f"The method {method!r} cannot be compared here: {lack}; leave it out."
    assert "soft-prompt-ensemble" in plan(seeds=2).methods
    assert "instruction" in plan(instructions=("Good or bad?",)).methods


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


@given(st.integers(1, 40), st.integers(0, 5))
def test_a_cut_is_a_seeded_choice_in_order(rows: int, seed: int) -> None:
    data = toy(30, 3)
    some = cut(data, rows, seed)
    assert len(some.examples) == min(rows, 30)
    places = [data.examples.index(example) for example in some.examples]
    assert places == sorted(set(places))
    assert some == cut(data, rows, seed)
    assert (some.fingerprint == data.fingerprint) == (rows >= 30)
    assert replace(some, examples=()) != replace(cut(data, rows, seed + 1), examples=()) or rows >= 30


def test_instructions_may_be_added_after_methods_that_do_not_read_them(tmp_path: Path, made_up: MadeUp) -> None:
    run_all(comparison(tmp_path))
    made_up["instruction"] = says(["negative"], "instruction")
    instructed = {"instructions": ("Good or bad?",)}
    later = comparison(tmp_path, methods=("instruction",), **instructed)
    run_all(later)
    assert [cell["method"] for cell in later.cells if cell["status"] == "done"] == [
        "zero-shot",
        "instruction",
        "soft-prompt",
    ]
    assert later.cells[1]["difference"] is not None
    assert comparison(tmp_path, methods=("zero-shot", "soft-prompt")).todo() == []
    with pytest.raises(ConfigError, match="with other instructions; "):
        comparison(tmp_path, methods=("instruction",), instructions=("Another one?",))


# --- base models of one name -------------------------------------------------------------------------


def test_every_cell_has_files_of_its_own() -> None:
    bases = ("tiny", "org1/tiny", "org2/tiny", "/models/tiny", "./tiny", "a_b", "a-b", "a b", "x" * 200, "x" * 201)
    names = [Key(base, method, seed).file_name for base in bases for method in ("lora", "prefix") for seed in (0, 1)]
    assert len({name.lower() for name in names}) == len(names)
    for name in names:
        assert re.fullmatch(r"[A-Za-z0-9.-]{1,150}", name)
    assert Key("smollm2-135m", "lora", 1).file_name == "smollm2-135m.lora.1"
    assert Key("org1/tiny", "lora", 1).file_name.startswith("tiny-")


BASES = ("org1/tiny", "org2/tiny")

SAID = {"org1/tiny": ["negative"], "org2/tiny": ["positive"]}


@pytest.fixture
def two(made_up: MadeUp) -> Callable[..., Comparison]:
    """A comparison of two base models of one name, which answer differently."""
    models = {"org1/tiny": tiny("llama"), "org2/tiny": tiny("gpt2")}

    def zero_shot(problem: Problem) -> Learned:
        base = next(base for base, lm in models.items() if lm is problem.lm)
        return says(SAID[base])(problem)

    made_up["zero-shot"] = zero_shot

    def open_folder(folder: Path, **options: Any) -> Comparison:
        settings: dict[str, Any] = {"bases": BASES, "methods": ("zero-shot", "soft-prompt")}
        return Comparison(plan(**settings | options), folder, lambda base: models[base])

    return open_folder


def difference(labels: Sequence[str]) -> float:
    """To ``soft-prompt`` of ``made_up``, counted by hand."""
    gold = [example.target for example in toy(30, 3).examples]
    ours = [("negative", "positive", "positive")[i % 3] == target for i, target in enumerate(gold)]
    return float(np.mean([labels[0] == target for target in gold]) - np.mean(ours))


def test_differences_are_of_each_base_models_own_answers(tmp_path: Path, two: Callable[..., Comparison]) -> None:
    found = two(tmp_path)
    run_all(found)
    for base in BASES:
        (cell,) = [cell for cell in found.cells if (cell["base"], cell["method"]) == (base, "zero-shot")]
        assert cell["difference"]["value"] == pytest.approx(difference(SAID[base]))
    assert difference(SAID["org1/tiny"]) != difference(SAID["org2/tiny"])


def as_earlier(folder: Path, *bases: str) -> None:
    """Gives the files the names that earlier releases gave them; of two alike, the last one stays."""
    for base in bases:
        for method in ("zero-shot", "soft-prompt"):
            key = Key(base, method, 0)
            path = folder / "predictions" / f"{key.file_name}.json"
            path.replace(folder / "predictions" / f"tiny.{method}.0.json")


def test_files_of_earlier_releases_are_read(tmp_path: Path, two: Callable[..., Comparison], made_up: MadeUp) -> None:
    run_all(two(tmp_path, bases=("org1/tiny",)))
    as_earlier(tmp_path, "org1/tiny")
    run_all(two(tmp_path))  # another of that name joins
    made_up["lora"] = says(["positive"])
    later = two(tmp_path, methods=("zero-shot", "soft-prompt", "lora"))
    run_all(later)
    found = {(cell["base"], cell["method"]): cell["difference"] for cell in later.cells}
    for base in BASES:
        assert found[base, "zero-shot"]["value"] == pytest.approx(difference(SAID[base]))
        assert found[base, "lora"]["value"] == pytest.approx(difference(["positive"]))


def test_files_of_earlier_releases_that_may_be_anothers_are_not_read(
    tmp_path: Path, two: Callable[..., Comparison], made_up: MadeUp
) -> None:
    run_all(two(tmp_path))
    as_earlier(tmp_path, *BASES)
    made_up["lora"] = says(["positive"])
    later = two(tmp_path, methods=("zero-shot", "soft-prompt", "lora"))
    run_all(later)
    assert {cell["difference"] is None for cell in later.cells} == {True}


# --- what goes wrong ---------------------------------------------------------------------------------


def test_base_models_are_checked_before_the_first_cell(tmp_path: Path) -> None:
    def load(base: str) -> FrozenLM:
        if base == "gone":
            raise BaseModelError("There is no such model.")
        return tiny("llama")

    found = Comparison(plan(bases=("tiny", "gone")), tmp_path, load)
    with pytest.raises(BaseModelError):
        found.run(found.todo()[0])
    assert RAN == []
    only = Comparison(plan(bases=("tiny", "gone"), methods=("zero-shot",)), tmp_path, load)
    only.plan = plan(bases=("tiny",), methods=("zero-shot",))
    assert only.run(only.todo()[0])["status"] == "done"


def test_a_base_model_too_large_for_the_machine_is_told_before_the_first_cell(tmp_path: Path) -> None:
    def load(base: str) -> FrozenLM:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory")

    found = Comparison(plan(), tmp_path, load)
    with pytest.raises(BaseModelError, match="does not fit into memory here"):
        found.run(found.todo()[0])


def test_a_base_model_that_is_gone_later_fails_its_cells_only(tmp_path: Path) -> None:
    loads: list[str] = []

    def load(base: str) -> FrozenLM:
        loads.append(base)
        if base == "b" and loads.count("b") > 1:
            raise BaseModelError("It is gone.")
        return tiny("llama")

    found = Comparison(plan(bases=("a", "b"), methods=("zero-shot", "soft-prompt")), tmp_path, load)
    assert [(cell["base"], cell["status"], cell["reason"]) for cell in run_all(found)] == [
        ("a", "done", None),
        ("a", "done", None),
        ("b", "failed", "It is gone."),
        ("b", "failed", "It is gone."),
    ]


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
