"""``softprompt compare`` on the command line: the whole way, going on, and mistakes before a model is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from softprompt.cli.compare import estimated, planned, read_instructions, run_cells, took
from softprompt.compare.comparison_time import Parts
from softprompt.compare.plan import Plan
from softprompt.data.example import Example
from softprompt.errors import DataError, TrainingError
from softprompt.methods import registry
from softprompt.methods.problem import Learned, Problem
from softprompt.tasks.predict import Prediction, Progress
from tests.conftest import (
    TOY_LABELS,
    TOY_TEMPLATE,
    Run,
    is_refused,
    make_model,
    make_tokenizer,
    tiny,
    toy,
    write_labels,
    write_texts,
)

DATA = ("train.jsonl", "--validation", "dev.jsonl", "--test", "test.jsonl", "--out", "report")
QUICK = ("--dtype", "fp32", "--device", "cpu", "--budget", "1s")


@pytest.fixture(autouse=True)
def dev(home: Path, tmp_path: Path) -> None:
    write_labels(tmp_path / "dev.jsonl", 10)


def test_the_whole_way(run: Run, base: str, tmp_path: Path) -> None:
    compared = run("compare", *DATA, *QUICK, "--methods", "zero-shot", "soft-prompt", "--bases", base, "--json")
    assert compared.code == 0, compared.err
    assert [(cell["method"], cell["status"]) for cell in compared.json["cells"]] == [
        ("zero-shot", "done"),
        ("soft-prompt", "done"),
    ]
    folder = tmp_path / "report"
    assert json.loads((folder / "results.json").read_text()) == compared.json["cells"]
    assert "soft-prompt" in (folder / "report.html").read_text()
    alarms = compared.json["cells"][1]["alarms"]  # of a second's training on few rows
    assert "few_validation_rows" not in {alarm["kind"] for alarm in alarms}  # there are 10
    for alarm in alarms:
        assert f"warning: soft-prompt, seed 0: {alarm['sentence']}" in compared.err
    # the soft prompt that was tuned is there to be used, and gives the score that was reported
    (path,) = Path("report/soft-prompts").glob("*.soft-prompt.0.safetensors")
    found = run("evaluate", str(path), "test.jsonl", "--dtype", "fp32", "--metric", "accuracy", "--json")
    assert found.json["value"] == compared.json["cells"][1]["value"]

    assert compared.json["seconds"] >= sum(cell["seconds"] for cell in compared.json["cells"])
    first, second, third = [line for line in compared.err.splitlines() if not line.startswith(("data: ", "warning: "))][
        :3
    ]
    assert first == "plan: 2 cells (2 methods, 1 seed, 1 base model), 1.0 s to learn for each"
    assert re.match(r"about \d+ s at most: 1 s learning", second)
    assert re.fullmatch(r"  1/2  zero-shot, seed 0: accuracy [01]\.\d{4}, in \d.* s\b.*; about \d+ s left", third)

    again = run("compare", *DATA, *QUICK, "--methods", "zero-shot", "soft-prompt", "tf-idf", "--bases", base)
    assert again.code == 0
    assert "plan: 3 cells (3 methods, " in again.err
    assert "going on: 1 cell is left to run" in again.err
    assert again.out.splitlines()[-1].startswith("the whole comparison took ")
    assert [line.split(",")[0].split()[-1] for line in again.err.splitlines() if line.strip().startswith("1/1")] == [
        "tf-idf"
    ]
    assert "tf-idf" in again.out
    assert "zero-shot" in again.out


def test_the_majority_class_stands_first_with_its_metrics(run: Run, base: str, tmp_path: Path) -> None:
    gold = [json.loads(line)["target"] for line in Path("test.jsonl").read_text().splitlines()]
    train = [json.loads(line)["target"] for line in Path("train.jsonl").read_text().splitlines()]
    label = max(sorted(set(train)), key=train.count)
    ran = run("compare", *DATA, *QUICK, "--methods", "tf-idf", "majority-class", "soft-prompt", "--bases", base)
    assert ran.code == 0, ran.err
    lines = [line.split() for line in ran.out.splitlines()]
    head = next(place for place, words in enumerate(lines) if words[:1] == ["method"])
    assert lines[head][:4] == ["method", "score", "macro-F1", "MCC"]
    assert lines[head + 1][:2] == ["majority-class", f"{100 * gold.count(label) / len(gold):.1f}"]
    page = (tmp_path / "report" / "report.html").read_text()
    assert f"always answering &#x27;{label}&#x27; with " in page
    assert "macro-F1" in page


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, run: Any) -> None:
    """Has something else run as the method ``name``."""
    monkeypatch.setitem(registry.METHODS, name, replace(registry.METHODS[name], run=run, together=None))


def test_a_failed_cell_is_told_and_the_rest_goes_on(
    run: Run, base: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(problem: object) -> None:
        raise MemoryError("not enough of it")

    stand_in(monkeypatch, "zero-shot", fails)
    ran = run("compare", *DATA, *QUICK, "--methods", "zero-shot", "tf-idf", "--bases", base)
    assert ran.code == 0
    assert "1/2  zero-shot, seed 0 failed: not enough of it" in ran.err
    assert "2/2  tf-idf, seed 0: accuracy" in ran.err
    assert "not enough of it" in (tmp_path / "report" / "report.html").read_text()


def test_a_mistake_of_ours_ends_it_with_the_report_of_the_cells_so_far(
    run: Run, base: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(problem: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)")

    stand_in(monkeypatch, "zero-shot", broken)
    options = (*DATA, *QUICK, "--bases", base, "--methods", "tf-idf")
    assert run("compare", *options).code == 0
    page = tmp_path / "report" / "report.html"
    page.unlink()
    with pytest.raises(RuntimeError, match="shapes"):
        run("compare", *options, "zero-shot")
    assert "tf-idf" in page.read_text()
    cells = json.loads((tmp_path / "report" / "results.json").read_text())
    assert [(cell["method"], cell["status"]) for cell in cells] == [("tf-idf", "done")]


def test_a_base_model_that_is_not_there_is_told_before_the_first_cell(run: Run, base: str, tmp_path: Path) -> None:
    ran = run("compare", *DATA, *QUICK, "--methods", "tf-idf", "--bases", base, "./no-such-model")
    assert (ran.code, ran.out) == (2, "")
    assert "no-such-model" in ran.err
    assert "tf-idf, seed 0" not in ran.err
    assert not (tmp_path / "report").exists()


def test_base_models_of_one_name_are_told_apart(run: Run, tmp_path: Path) -> None:
    for organisation, kind in (("org1", "llama"), ("org2", "gpt2")):
        make_model(kind).save_pretrained(tmp_path / organisation / "model")
        make_tokenizer().save_pretrained(tmp_path / organisation / "model")
    ran = run("compare", *DATA, *QUICK, "--methods", "zero-shot", "--bases", "org1/model", "org2/model")
    assert ran.code == 0, ran.err
    for name in ("org1/model", "org2/model"):
        assert f"zero-shot, seed 0, {name}: accuracy" in ran.err
        assert f"on {name}" in (tmp_path / "report" / "report.html").read_text()
    assert len(list((tmp_path / "report" / "predictions").iterdir())) == 2


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--budget", "soon"), "Expected a time such as 90s, 10m or 1h for --budget, found 'soon'; write one."),
        (("--seeds", "0"), "At least 1 seed is needed, not 0; give --seeds 1 or more."),
        (
            ("--methods", "instruction"),
            "The method 'instruction' cannot be compared here: it needs --instruction or --instructions; leave it out.",
        ),
        (
            ("--instructions", "none.txt"),
            "none.txt cannot be read: No such file or directory; check the path of --instructions.",
        ),
        (
            ("--instructions", "empty.json"),
            "empty.json: expected hard prompts, one a line or a JSON list of texts, found none; write some.",
        ),
    ],
)
def test_mistakes(run: Run, options: tuple[str, ...], sentence: str) -> None:
    Path("empty.json").write_text("[]")
    is_refused(run("compare", *DATA, *options), sentence)


@pytest.mark.usefixtures("no_model")
def test_a_target_of_the_test_rows_that_is_no_label(run: Run) -> None:
    write_labels(Path("test.jsonl"), 3, ("positive", "neutral"))
    is_refused(
        run("compare", *DATA),
        'test.jsonl:2: expected one of the labels "negative", "positive", found "neutral"; '
        "correct this row, or give all labels with --labels.",
    )


def test_free_text(run: Run, base: str) -> None:
    for name, rows in (("train", 20), ("dev", 6), ("test", 6)):
        write_texts(Path(f"{name}.jsonl"), rows)
    ran = run("compare", *DATA, *QUICK, "--methods", "zero-shot", "soft-prompt", "--bases", base, "--json")
    assert ran.code == 0, ran.err
    assert [cell["metric"] for cell in ran.json["cells"]] == ["bleu", "bleu"]
    assert [cell["n"] for cell in ran.json["cells"]] == [6, 6]


def test_instructions_come_with_any_byte_order_mark_and_line_end(tmp_path: Path) -> None:
    texts = ["Good or bad?", "Urteile: schön\u2028oder nicht?"]
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        for line_end in ("\n", "\r\n", "\r"):
            path = tmp_path / "texts.txt"
            path.write_bytes((line_end.join(["", *texts]) + line_end).encode(encoding))
            assert read_instructions(path) == texts
    path.write_bytes("schön".encode("latin-1"))
    with pytest.raises(DataError, match="save the file as UTF-8"):
        read_instructions(path)
    (tmp_path / "half.json").write_text(r'["\ud83d"]')
    with pytest.raises(DataError, match="one a line or a JSON list"):
        read_instructions(tmp_path / "half.json")


# --- how long it takes --------------------------------------------------------------------------------


class Clock:
    """Stands still until it is told otherwise."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def toy_plan(**options: object) -> Plan:
    settings: dict[str, object] = {"template": TOY_TEMPLATE, "verbalizer": TOY_LABELS, "bases": ("tiny",)}
    return Plan("toy", toy(20, 1), toy(10, 2), toy(30, 3), **settings | options)  # type: ignore[arg-type]


def test_a_plan_counts_its_cells() -> None:
    """Of each base model zero-shot once, two methods with three seeds, and an ensemble once: 2 × 8."""
    methods = ("zero-shot", "soft-prompt", "lora", "soft-prompt-ensemble")
    several = toy_plan(methods=methods, seeds=3, bases=("a", "b"), budget=600)
    assert planned(several) == "plan: 16 cells (4 methods, 3 seeds, 2 base models), 10 min to learn for each"
    assert len(several.keys) == 16


def test_an_estimate_names_its_parts() -> None:
    assert estimated(Parts(6600, 2400, 580), 1000) == (
        "about 2 h 40 min at most: 1 h 50 min learning, 40 min answering 1,000 test rows, 9 min 40 s loading and "
        "measuring"
    )
    assert estimated(Parts(90), 1, ["a", "b"]) == (
        "about 1 min 30 s at most: 1 min 30 s learning; answering with a and b could not be timed"
    )


def test_what_a_cell_took_is_split() -> None:
    cell = {"method": "soft-prompt", "train_seconds": 480.0, "answer_seconds": 240.0, "seconds": 723.0}
    assert took(cell) == "12 min 3 s: 8 min learning, 4 min answering, 3.0 s else"
    # the time that its members learned was that of other cells
    assert took(cell | {"method": "soft-prompt-ensemble", "seconds": 240.4}) == "4 min: 4 min answering"
    assert took(cell | {"train_seconds": 0.2, "answer_seconds": 0.3, "seconds": 0.8}) == "0.8 s"


def test_without_a_terminal_what_is_done_is_a_line_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()

    def learns(problem: Problem) -> Learned:
        for step in range(1, 8):
            clock.now += 25
            problem.notice(f"step {step}")

        def answer(examples: Sequence[Example], progress: Progress | None) -> list[Prediction]:
            return [Prediction("negative", None, None, False) for _ in examples]

        return Learned(answer, 0, 0)

    def fails(problem: Problem) -> Learned:
        clock.now += 70
        problem.notice("failing")
        raise TrainingError("It does not learn.")

    stand_in(monkeypatch, "zero-shot", learns)
    stand_in(monkeypatch, "lora", fails)
    plan = toy_plan(methods=("zero-shot", "lora"), budget=600)
    run_cells(plan, tmp_path, lambda base: tiny("llama"), clock)
    lines = capsys.readouterr().err.splitlines()
    shown = [
        re.fullmatch(r"toy: (cell \d of 2, \S+, seed 0, tiny) · (\S+ ?\d?) · about 10 min left", line) for line in lines
    ]
    assert [found.groups() for found in shown if found] == [
        ("cell 1 of 2, zero-shot, seed 0, tiny", "step 3"),
        ("cell 1 of 2, zero-shot, seed 0, tiny", "step 6"),
    ]
    assert lines[0] == "plan: 2 cells (2 methods, 1 seed, 1 base model), 10 min to learn for each"
    assert re.fullmatch(r"about 10 min at most: 10 min learning.*", lines[1])
    assert [line for line in lines if "failing" in line] == [
        "toy: cell 2 of 2, lora, seed 0, tiny · failing · about 8 min 50 s left"
    ]
