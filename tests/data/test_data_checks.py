"""What data are taken for, and what in them is probably a mistake."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import pytest

from softprompt.data.checks import doubts, reading, require_label_set
from softprompt.data.example import Dataset, Example, check_targets, infer_labels
from softprompt.data.reading import read_dataset
from softprompt.errors import DataError
from tests.conftest import Run, write_labels, write_texts
from tests.reading import write


def made(rows: Sequence[tuple[str, str]], source: str = "train.csv") -> Dataset:
    examples = [Example({"input": a}, b, (), f"{source}:{n}") for n, (a, b) in enumerate(rows, start=2)]
    return Dataset(tuple(examples), source, "", {"input": "text", "target": "label"})


def labelled(**count: int) -> Dataset:
    return made([(f"{label} {n}", label) for label, rows in count.items() for n in range(rows)])


def found(*datasets: Dataset | None, labels: Sequence[str] | None = None, chosen: bool = False) -> list[str]:
    return doubts(*datasets, labels=labels or infer_labels(datasets[0] or made([])), chosen=chosen)  # type: ignore[arg-type]


# In one line


def test_labels_are_shown_with_their_rows() -> None:
    train = labelled(negative=901, positive=1587)
    line = str(reading(train, labels=("negative", "positive")))
    assert line == (
        'data: 2,488 rows, 2 labels (negative 901, positive 1,587), input from "text", target from "label"; '
        "if the targets are free text, add --labels none"
    )
    told = str(reading(train, train, labels=("negative", "positive"), chosen=True))
    assert told.startswith("data: 2,488 rows and 2,488 for validation, 2 labels (")
    assert "--labels" not in told


def test_of_many_labels_the_largest_and_smallest_are_shown() -> None:
    train = labelled(**{f"l{n}": n for n in range(2, 42)})
    line = str(reading(train, labels=infer_labels(train)))
    assert "40 labels (the most l41 41, l40 40, l39 39; the fewest l4 4, l3 3, l2 2)" in line


def test_free_text_is_said_and_how_to_say_otherwise() -> None:
    line = str(reading(made([("a", "one"), ("b", "two"), ("c", "two")]), labels=None))
    assert "3 rows, free text (2 distinct targets)" in line
    assert "--labels all" in line
    assert "--labels" not in str(reading(made([("a", "one")]), labels=None, chosen=True))


def test_blank_fields_and_references_are_shown(tmp_path: Path) -> None:
    rows = [{"instruction": "do", "input": "", "output": f"this {n}", "references": ["that"]} for n in range(3)]
    path = write(tmp_path, "a.json", json.dumps(rows))
    data = read_dataset(path, fields=["instruction", "input"], target_field="output")
    line = str(reading(data, labels=None))
    assert 'instruction from "instruction", input from "input" (blank in 3 rows), target from "output"' in line
    assert 'lists in "references"' in line


def test_labels_that_could_be_misread_are_in_quotes() -> None:
    train = made([(str(n), ("a, b", "good ")[n % 2]) for n in range(10)])
    assert '("a, b" 5, "good " 5)' in str(reading(train, labels=("a, b", "good ")))


# What is probably a mistake


def test_good_data_raise_no_doubt() -> None:
    train, validation, test = (
        made([(f"{name} {n}", "ab"[n % 2]) for n in range(20)], f"{name}.csv") for name in ("train", "dev", "test")
    )
    assert found(train, validation, test) == []
    texts = made([(str(n), f"answer {n}") for n in range(20)])
    assert found(texts) == []


NFD = unicodedata.normalize("NFD", "café")


@pytest.mark.parametrize(
    ("one", "other", "what"),
    [
        ("positive", "positive ", "blanks"),
        ("positive", "positive\r", "blanks"),
        ("very good", "very  good", "blanks"),
        ("very good", "very\u00a0good", "blanks"),
        ("positive", "\ufeffpositive", "blanks"),
        ("café", NFD, "the form of Unicode"),
        ("ABC", "ＡＢＣ", "the form of Unicode"),
        ("1", "1.0", "the form of numbers"),
        ("Café", f"{NFD} ", "blanks, case or form"),
    ],
)
def test_labels_that_nobody_tells_apart_are_refused(one: str, other: str, what: str) -> None:
    rows = [(f"text {n}", one) for n in range(10)] + [("x", other), ("y", other), ("z", "other")]
    train = made([*rows, ("w", "other")])
    with pytest.raises(DataError) as caught:
        require_label_set(train, infer_labels(train))
    message = str(caught.value)
    assert message.startswith("train.csv:12: the label ")
    assert f"of 2 rows differs from {json.dumps(one, ensure_ascii=False)} in {what}" in message
    assert "--labels all" in message
    # where labels were given, the row is named with the label that it may mean
    with pytest.raises(DataError, match="which differs from") as caught:
        check_targets(train, [one, "other"])
    assert what in str(caught.value)
    # and where both were given, they are told
    told = [doubt for doubt in found(train, labels=[one, other, "other"], chosen=True) if f"differ in {what}" in doubt]
    assert len(told) == 1


def test_labels_that_differ_in_case_are_told() -> None:
    train = made([(f"text {n}", ("positive", "negative", "Positive")[n % 3]) for n in range(30)])
    require_label_set(train, infer_labels(train))  # they may well be meant: US and us
    (doubt,) = found(train)
    assert '"Positive" (10 rows)' in doubt
    assert "upper and lower case only" in doubt


@pytest.mark.parametrize(
    "pair", [("C", "C++"), ("order", "order_status"), ("10", "1.0"), ("a part", "apart"), ("é", "e")]
)
def test_labels_that_are_told_apart_are_no_doubt(pair: tuple[str, str]) -> None:
    train = made([(f"text {n}", pair[n % 2]) for n in range(20)])
    require_label_set(train, infer_labels(train))
    assert found(train) == []


def test_one_class_only_is_refused() -> None:
    train = labelled(spam=12)
    with pytest.raises(DataError, match=r"train\.csv, found \"spam\" in all 12 rows.*--labels none"):
        require_label_set(train, infer_labels(train))
    require_label_set(labelled(spam=1), None)  # a single row of text is a little, and no class


def test_rows_that_are_in_two_parts_are_counted() -> None:
    rows = [(f"text {n}", "ab"[n % 2]) for n in range(20)]
    train = made(rows)
    validation = made([*rows[4:7], ("text 1", "a"), ("new", "a")], "dev.csv")
    test = made([rows[0], ("new", "a"), ("newer", "b")], "test.csv")
    first, second, third = found(train, validation, test)
    assert first.startswith("3 of 5 validation rows are training rows, too, ")
    assert "dev.csv:2" in first
    assert second.startswith("1 of 3 test rows are training rows, too, ")
    assert third.startswith("1 of 3 test rows are validation rows, too, ")
    texts = made([(str(n), f"answer {n}") for n in range(9)])
    assert found(texts, texts)[0].startswith("9 of 9 validation rows are training rows")


def test_an_input_with_several_targets_is_told() -> None:
    rows = [(f"text {n}", "ab"[n % 2]) for n in range(20)]
    (doubt,) = found(made([*rows, ("text 3", "a"), ("text 3", "b"), ("text 4", "b")]))
    assert doubt.startswith('2 inputs have different targets in different rows, such as "b" (train.csv:5) and "a" (')
    # of free text, several may well be right
    assert found(made([("a", "one answer"), ("a", "another"), ("b", "third")])) == []


def test_labels_without_a_row_or_with_one_are_told() -> None:
    train = labelled(a=10, b=10, slip=1)
    (doubt,) = found(train)
    assert 'a single row: "slip" (train.csv:22)' in doubt
    doubt, _ = found(train, made([("x", "c"), ("y", "a")], "dev.csv"), labels=["a", "b", "c", "slip"], chosen=True)
    assert 'no training row with the labels "c", and 1 validation row with one' in doubt


def test_blanks_around_all_labels_are_told() -> None:
    (doubt,) = found(made([(str(n), (" a", " b")[n % 2]) for n in range(20)]))
    assert 'begin or end with blanks: " a", " b"' in doubt


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ([f"l{n}" for n in range(205)] * 6, "more than 200 of them"),
        (["one two three four five six seven eight nine", "short"] * 10, "has 9 words"),
        (["none"] * 60 + [f"answer {n}" for n in range(20)], "there once"),
    ],
)
def test_targets_that_repeat_and_are_taken_for_text_are_told(targets: list[str], said: str) -> None:
    train = made([(f"text {n}", target) for n, target in enumerate(targets)])
    assert infer_labels(train) is None
    (doubt,) = found(train)
    assert said in doubt
    assert "--labels all" in doubt
    assert doubts(train, labels=None, chosen=True) == []


def test_many_labels_of_few_rows_are_told() -> None:
    train = labelled(**{f"l{n}": 5 for n in range(200)})
    (doubt,) = found(train)
    assert doubt.startswith("1,000 rows are few for 200 labels, 5.0 each; ")
    assert "--labels none" in doubt
    assert found(train, labels=infer_labels(train), chosen=True) == []


# On the command line


def test_train_says_what_it_took_the_data_for(train: Run) -> None:
    ran = train("train.jsonl", "--validation", "test.jsonl", "--name", "films", "--json")
    line, doubt = ran.err.splitlines()[:2]
    assert line.startswith("data: 40 rows and 12 for validation, 2 labels (negative 20, positive 20), input from ")
    assert doubt.startswith("warning: 12 of 12 validation rows are training rows, too, ")
    data = ran.json["data"]
    assert data["labels"] == {"negative": 20, "positive": 20}
    assert (data["rows"], data["validation_rows"], data["distinct_targets"]) == (40, 12, 2)
    assert data["columns"] == {"input": "input", "target": "target"}
    assert len(data["doubts"]) == 1


def test_every_target_is_a_label_where_that_is_said(run: Run, train: Run, home: Path) -> None:
    write_texts(home.parent / "texts.jsonl", 3)
    rows = [{"input": f"film {n}", "target": f"it was {n} stars"} for n in (1, 7)]
    (home.parent / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = train("texts.jsonl", "--name", "text")
    assert said.err.startswith("data: 3 rows, free text (3 distinct targets), ")
    options = ("--validation", "dev.jsonl", "--labels", "all", "--json")
    ran = train("texts.jsonl", "--name", "stars", *options)
    assert ran.json["data"]["labels"] == {f"it was {n} stars": int(n < 3) for n in (0, 1, 2, 7)}
    assert list(run("show", "stars", "--json").json["verbalizer"]) == [f"it was {n} stars" for n in (0, 1, 2, 7)]


@pytest.mark.usefixtures("no_model")
def test_mistakes_in_labels_are_refused_before_a_model_is_loaded(run: Run, home: Path) -> None:
    write_labels(home.parent / "one.jsonl", 10, ("spam", "spam"))
    write_labels(home.parent / "blank.jsonl", 10, ("spam", "spam "))
    for name in ("one", "blank"):
        ran = run("train", f"{name}.jsonl", "--name", "x")
        assert (ran.code, ran.out) == (2, "")
        assert "--labels" in ran.err
    for options in (("--labels", "positive,negative"), ("--labels", "all")):
        ran = run("train", "train.jsonl", "--name", "x", "--references-field", "target", *options)
        assert ran.code == 2
        assert "--references-field is for free text" in ran.err


def test_references_on_the_command_line(run: Run, train: Run, home: Path, stored: object) -> None:
    rows = [
        {"input": f"text {n}", "target": ("yes", "no")[n % 2], "references": ["p1"], "answers": ["yes", "no"]}
        for n in range(20)
    ]
    (home.parent / "refs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train("refs.jsonl", "--name", "a", "--json").json["data"]["labels"] == {"no": 10, "yes": 10}
    named = train("refs.jsonl", "--name", "b", "--references-field", "answers", "--json").json["data"]
    assert (named["labels"], named["columns"]["references"]) == (None, "answers")
    off = train("refs.jsonl", "--name", "c", "--references-field", "none", "--labels", "none", "--json").json["data"]
    assert "references" not in off["columns"]
    # every answer that is listed counts, whatever was generated
    short = ("--max-new-tokens", "2", "--dtype", "fp32", "--metric", "exact_match", "--json")
    answer = run("predict", "b", "text 1", *short[:4], "--json").json["predictions"][0]["text"].strip()
    (home.parent / "one.jsonl").write_text(
        json.dumps({"input": "text 1", "target": "no", "answers": [answer, "no"], "references": "see below"}) + "\n"
    )
    assert run("evaluate", "b", "one.jsonl", "--references-field", "answers", *short).json["value"] == 1
    assert run("evaluate", "b", "one.jsonl", *short).json["value"] == 0
    refused = run("evaluate", "a", "refs.jsonl", "--references-field", "answers")
    assert refused.code == 2
    assert "answers with labels" in refused.err


def test_compare_says_what_it_took_the_data_for(run: Run, base: str, home: Path) -> None:
    write_labels(home.parent / "dev.jsonl", 10)
    ran = run(
        *("compare", "train.jsonl", "--validation", "dev.jsonl", "--test", "test.jsonl", "--out", "report"),
        *("--budget", "1s", "--methods", "tf-idf", "--bases", base, "--dtype", "fp32", "--device", "cpu"),
    )
    assert ran.code == 0
    assert ran.err.startswith("data: 40 rows and 10 for validation, 2 labels (")
    assert "warning: 12 of 12 test rows are training rows" in ran.err
    assert "warning: 10 of 12 test rows are validation rows" in ran.err
