from __future__ import annotations

import csv
import datetime
import hashlib
import json
import re
import sys
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from softprompt.data.example import Dataset, Example, check_targets, infer_labels
from softprompt.data.reading import read_dataset
from softprompt.errors import ConfigError, DataError, SoftPromptWarning
from tests.reading import failure, read_pairs, write

# What is read


def test_jsonl_becomes_examples_with_their_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "train.jsonl",
        '{"input": "a", "target": "x", "other": [1]}\n\n{"target": "y", "input": "b\\u2028", "references": ["y", "z"]}',
    )
    dataset = read_dataset(path, fields=["input"])
    assert dataset.examples == (
        Example({"input": "a"}, "x", (), "train.jsonl:1"),
        Example({"input": "b\u2028"}, "y", ("y", "z"), "train.jsonl:3"),
    )
    assert dataset.source == str(path)
    assert dataset == read_dataset(str(path), fields=["input"])


def test_jsonl_lines_end_at_line_feeds_only(tmp_path: Path) -> None:
    # U+2028 and U+0085 end a line for str.splitlines(), not for an editor and not in JSON
    path = write(
        tmp_path, "a.jsonl", '{"input": "a\u2028b\u0085c", "target": "x"}\r\n{"input": "d", "target": "y"}\r\n'
    )
    assert read_pairs(path) == [("a\u2028b\u0085c", "x"), ("d", "y")]


def test_csv_reports_the_line_on_which_a_row_starts(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", 'input,target\r\n"two\r\nlines, ""q""",x\r\n\r\nb,y\r\n')
    examples = read_dataset(path, fields=["input"]).examples
    assert [(e.fields["input"], e.target, e.where) for e in examples] == [
        ('two\r\nlines, "q"', "x", "a.csv:2"),
        ("b", "y", "a.csv:5"),
    ]


def test_tsv_with_several_fields_and_references_as_json(tmp_path: Path) -> None:
    path = write(tmp_path, "a.TSV", 'premise\thypothesis\ty\tr\na, b\tc\tyes\t"[""no"", ""maybe""]"\nd\te\tno\t\n')
    dataset = read_dataset(path, fields=["hypothesis", "premise"], target_field="y", references_field="r")
    assert dataset.examples == (
        Example({"hypothesis": "c", "premise": "a, b"}, "yes", ("no", "maybe"), "a.TSV:2"),
        Example({"hypothesis": "e", "premise": "d"}, "no", (), "a.TSV:3"),
    )


def test_columns_are_chosen_by_name(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "Review Text,label\ngood,1\n")
    assert read_pairs(path, input_field="Review Text", target_field="label") == [("good", "1")]
    with pytest.raises(ConfigError) as caught:
        read_dataset(path, fields=["premise", "hypothesis"], input_field="Review Text")
    assert str(caught.value) == (
        "An input field can be chosen only for a template with {input}, but this template's fields are "
        '"premise", "hypothesis"; rename the column or the template\'s field.'
    )


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    content = '{"input": "ä", "target": "x"}'.encode("utf-8-sig")
    assert read_pairs(write(tmp_path, "a.jsonl", content)) == [("ä", "x")]
    assert read_pairs(write(tmp_path, "a.csv", "input,target\nä,x".encode("utf-8-sig"))) == [("ä", "x")]


def test_numbers_and_booleans_become_their_json_text(tmp_path: Path) -> None:
    rows = [(1, True), (1.5, False), (-0.0, 12345678901234567890), (1e100, 0)]
    path = write(tmp_path, "a.jsonl", "\n".join(json.dumps({"input": a, "target": b}) for a, b in rows))
    assert read_pairs(path) == [("1", "true"), ("1.5", "false"), ("-0.0", "12345678901234567890"), ("1e+100", "0")]


def test_a_document_longer_than_the_csv_module_takes_by_default(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    text = "word " * 40_000 + "end"
    assert len(text) > limit
    assert read_pairs(write(tmp_path, "a.csv", f"input,target\n{text},x\n")) == [(text, "x")]
    assert csv.field_size_limit() == limit


def test_targets_may_be_missing_where_they_are_not_required(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '{"input": "a"}\n{"input": "b", "target": null}\n{"input": "c", "target": "x"}')
    assert read_pairs(path, require_target=False) == [("a", None), ("b", None), ("c", "x")]
    path = write(tmp_path, "a.csv", "input\na\n")
    assert read_pairs(path, require_target=False) == [("a", None)]


def test_the_fingerprint_is_of_the_content_alone(tmp_path: Path) -> None:
    one = write(tmp_path, "one.jsonl", '{"input": "a", "target": "1", "other": 5}\n{"input": "b", "target": "2"}')
    two = write(tmp_path, "two.csv", "n,target,text\n0,1,a\n0,2,b\n")
    expected = hashlib.sha256(b'[[["input","a"]],"1",[]]\n[[["input","b"]],"2",[]]\n').hexdigest()
    assert read_dataset(one, fields=["input"]).fingerprint == expected
    assert read_dataset(two, fields=["input"], input_field="text").fingerprint == expected
    different = ["b,2\na,1", "a,1", "a,2\nb,2", "c,1\nb,2"]  # other order, rows, target, field
    for body in different:
        path = write(tmp_path, "other.csv", f"input,target\n{body}\n")
        assert read_dataset(path, fields=["input"]).fingerprint != expected
    path = write(
        tmp_path, "r.jsonl", '{"input": "a", "target": "1", "references": ["2"]}\n{"input": "b", "target": "2"}'
    )
    assert read_dataset(path, fields=["input"]).fingerprint != expected


WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda text: text.strip() != "")
ROWS = st.lists(st.tuples(WORDS, WORDS, st.lists(st.text(st.characters(exclude_categories=["Cs"])))), min_size=1)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rows=ROWS, ascii=st.booleans(), line_end=st.sampled_from(["\n", "\r\n", "\n\n"]))
def test_what_json_writes_is_read(
    tmp_path: Path, rows: list[tuple[str, str, list[str]]], ascii: bool, line_end: str
) -> None:
    objects = [{"input": a, "target": b, "references": c} for a, b, c in rows]
    content = line_end.join(json.dumps(row, ensure_ascii=ascii) for row in objects)
    examples = read_dataset(write(tmp_path, "a.jsonl", content), fields=["input"]).examples
    step = line_end.count("\n")
    assert examples == tuple(
        Example({"input": a}, b, tuple(c), f"a.jsonl:{1 + index * step}") for index, (a, b, c) in enumerate(rows)
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rows=ROWS, suffix=st.sampled_from([".csv", ".tsv"]), quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]))
def test_what_csv_writes_is_read(
    tmp_path: Path, rows: list[tuple[str, str, list[str]]], suffix: str, quoting: int
) -> None:
    if suffix == ".tsv":  # a cell that holds tabs and line ends, or two with line ends in a row, may look like rows
        rows = [(re.sub(r"[\t\r\n]", " ", a), b.replace("\t", " "), c) for a, b, c in rows]
    if sys.version_info < (3, 11):  # its csv module refuses NUL
        rows = [(a.replace("\0", "0"), b.replace("\0", "0"), c) for a, b, c in rows]
    path = tmp_path / f"a{suffix}"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if suffix == ".tsv" else ",", quoting=quoting)  # type: ignore[arg-type]
        writer.writerows([["target", "references", "input"], *([b, json.dumps(c), a] for a, b, c in rows)])
    examples = read_dataset(path, fields=["input"]).examples
    assert [(e.fields["input"], e.target, list(e.references)) for e in examples] == rows
    # where a row starts: count the line ends of what stands before it
    line = 2
    text = path.read_bytes().decode()
    for example, (a, b, _) in zip(examples, rows, strict=True):
        assert example.where == f"a{suffix}:{line}"
        line += 1 + sum(cell.replace("\r\n", "\n").replace("\r", "\n").count("\n") for cell in (a, b))
    assert line == 1 + text.replace("\r\n", "\n").replace("\r", "\n").count("\n")


def test_a_tsv_whose_quoted_cells_may_be_rows_is_refused(tmp_path: Path) -> None:
    """The line in the middle has as many cells as the header: it may be a row whose text begins with a mark."""
    path = write(tmp_path, "a.tsv", 'target\treferences\tinput\n"0\n"\t[]\t"0\n"\n')
    with pytest.raises(DataError, match=r"^a\.tsv:2: expected 3 cells as in the header, found 1; "):
        read_dataset(path, fields=["input"])


def test_parquet_with_numbers_dates_lists_and_class_labels(tmp_path: Path) -> None:
    table = pyarrow.table(
        {
            "input": ["a", "b"],
            "when": [datetime.date(2024, 5, 6), datetime.date(2025, 1, 2)],
            "price": [Decimal("1.50"), Decimal("2.00")],
            "target": [1, 2],
            "references": [["x"], None],
        }
    )
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path)
    assert read_dataset(path, fields=["input", "when", "price"]).examples == (
        Example({"input": "a", "when": "2024-05-06", "price": "1.50"}, "1", ("x",), "a.parquet:1"),
        Example({"input": "b", "when": "2025-01-02", "price": "2.00"}, "2", (), "a.parquet:2"),
    )
    features = datasets.Features(input=datasets.Value("string"), target=datasets.ClassLabel(names=["neg", "pos"]))
    datasets.Dataset.from_dict({"input": ["a", "b"], "target": [1, 0]}, features=features).to_parquet(path)
    assert read_pairs(path) == [("a", "pos"), ("b", "neg")]


# Blank fields and references


def test_some_fields_of_a_row_may_be_blank(tmp_path: Path) -> None:
    rows = [("do it", ""), ("do it", None), ("do it", "with this"), (" ", "this alone")]
    path = write(tmp_path, "a.json", json.dumps([{"instruction": a, "input": b, "output": "done"} for a, b in rows]))
    both = {"fields": ["instruction", "input"], "target_field": "output"}
    examples = read_dataset(path, **both).examples  # type: ignore[arg-type]
    assert [example.fields["input"] for example in examples] == ["", "", "with this", "this alone"]
    assert examples[3].fields["instruction"] == ""
    assert failure(path, target_field="output").startswith(
        'a.json:1: expected text in the column "input", found nothing'
    )
    bad = write(tmp_path, "b.csv", "instruction,input,output\na,,x\n,,x\n")
    assert failure(bad, **both).startswith("b.csv:3: expected text in the column ")
    bad = write(
        tmp_path, "c.jsonl", '{"instruction": "a", "output": "x"}\n{"instruction": "a", "input": 1, "output": 2}'
    )
    assert failure(bad, **both).startswith('c.jsonl:1: expected the column "input"')  # not blank: not there
    bad = write(tmp_path, "d.jsonl", '{"instruction": "a", "input": "b", "output": ""}')
    assert 'in the column "output", found nothing' in failure(bad, **both)


@pytest.mark.parametrize(
    "cells",
    [
        ["Smith 1999; Lee 2004", "x"],
        [[1, 2], [3]],
        [{"id": 1}, None],
        [[["p1"]], []],
        [None, []],
        [True, "y"],
    ],
)
def test_a_column_of_that_name_that_holds_something_else_is_left_alone(tmp_path: Path, cells: list[Any]) -> None:
    lines = [json.dumps({"input": "a", "target": "x", "references": cell}) for cell in cells]
    path = write(tmp_path, "a.jsonl", "\n".join(lines))
    dataset = read_dataset(path, fields=["input"])
    assert [example.references for example in dataset.examples] == [(), ()]
    assert dataset.columns == {"input": "input", "target": "target"}
    if cells[0] is not None:
        assert failure(path, references_field="references").startswith("a.jsonl:1: expected a")


def test_references_are_read_where_they_fit_and_as_asked(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", 'input,target,references,more\na,x,"[""y""]",\nb,x,,"[""z""]"\n')
    assert [example.references for example in read_dataset(path, fields=["input"]).examples] == [("y",), ()]
    named = read_dataset(path, fields=["input"], references_field="more")
    assert [example.references for example in named.examples] == [(), ("z",)]
    assert named.columns["references"] == "more"
    off = read_dataset(path, fields=["input"], references_field="")
    assert [example.references for example in off.examples] == [(), ()]
    assert "--references-field" in failure(path, references_field="answers")
    used = write(tmp_path, "b.csv", 'input,references\na,"[""y""]"\n')
    assert read_dataset(used, fields=["input"], target_field="references").examples[0].references == ()


def test_references_that_fit_in_some_rows_only_are_told(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "a.jsonl",
        '{"input": "a", "target": "x", "references": ["y"]}\n{"input": "a", "target": "x", "references": "y"}',
    )
    with pytest.warns(SoftPromptWarning, match=r"a\.jsonl:2.*--references-field"):
        assert read_dataset(path, fields=["input"]).examples[0].references == ()


# What is refused

GOOD = '{"input": "a", "target": "x"}\n'


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (
            '{"input": "a" "target": "x"}',
            "expected a JSON object, found an error at column 15 (Expecting ',' delimiter)",
        ),
        ('{"input": NaN, "target": "x"}', "expected a JSON object, found an error (NaN is not JSON)"),
        ('["a", "x"]', "expected a JSON object, found a list"),
        ("null", "expected a JSON object, found null"),
        ('{"input": "a"}', 'expected the column "target", found "input"'),
        ("{}", 'expected the column "input", found none'),
        ('{"input": "", "target": "x"}', 'expected text in the column "input", found nothing'),
        ('{"input": "a", "target": " \\n"}', 'expected text in the column "target", found only blanks'),
        ('{"input": null, "target": "x"}', 'expected text in the column "input", found null'),
        ('{"input": 1e999, "target": "x"}', 'expected text in the column "input", found inf'),
        ('{"input": ["a"], "target": "x"}', 'expected text in the column "input", found a list'),
        ('{"input": "a", "target": {"b": 1}}', 'expected text in the column "target", found an object'),
        ('{"input": "\\ud800", "target": "x"}', 'expected text in the column "input", found half of a surrogate pair'),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, problem: str) -> None:
    one = write(tmp_path, "one.jsonl", f"{GOOD}\n{line}\n{GOOD}")
    assert failure(one) == f"one.jsonl:3: {problem}; correct or remove this row."
    two = write(tmp_path, "two.jsonl", f"{GOOD}{line}\n{GOOD}{line}\n")
    assert failure(two) == f"two.jsonl:2: {problem}; correct or remove this row and 1 more bad row."
    many = write(tmp_path, "many.jsonl", GOOD + f"{line}\n" * 1235)
    assert failure(many) == f"many.jsonl:2: {problem}; correct or remove this row and 1,234 more bad rows."


def test_deeply_nested_json_is_no_crash(tmp_path: Path) -> None:
    message = failure(write(tmp_path, "a.jsonl", GOOD + "[" * 200_000))
    assert message.startswith("a.jsonl:2: expected a JSON object, found an error")
    assert message.endswith("; correct or remove this row.")


def test_bad_csv_rows_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", 'input,target\n"a\nb",x\nc,x,y\nd\n')
    assert failure(path) == (
        "a.csv:4: expected 2 cells as in the header, found 3; correct or remove this row and 1 more bad row."
    )
    path = write(tmp_path, "b.csv", "input,target\na,\n")
    assert failure(path) == (
        'b.csv:2: expected text in the column "target", found nothing; correct or remove this row.'
    )
    path = write(tmp_path, "c.csv", 'input,target\na,x\n"b,x\nc,x\n')
    assert failure(path) == (
        "c.csv:3: expected cells in the quoting of CSV, found a quotation mark that is never closed; write a cell that "
        'holds a quotation mark as "...""...", or give the rows as JSON Lines or as TSV without quoting.'
    )
    assert "c.csv:2: expected cells in the quoting of CSV, found text behind a closing" in failure(
        write(tmp_path, "c.csv", 'input,target\n"Nightfall" is good,x\n')
    )
    path = write(tmp_path, "d.csv", "input,target,input\na,x,b\n")
    assert failure(path) == 'd.csv:1: expected column names that differ, found "input" twice; rename a column.'


def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "text,target\na,x\n")
    rest = "or rename the column or the template's field."
    assert failure(path) == (
        f'Expected the column "input" in a.csv, found "text", "target"; choose a column with --input-field, {rest}'
    )
    path = write(tmp_path, "b.jsonl", '{"input": "a", "label": 1}\n{"input": "b", "n": 1}\n')
    assert failure(path) == (
        f'Expected the column "target" in b.jsonl, found "input", "label", "n"; '
        f"choose a column with --target-field, {rest}"
    )
    path = write(tmp_path, "c.csv", ",".join(f"c{n}" for n in range(12)) + "\n" + ",".join("0" * 12))
    names = ", ".join(f'"c{n}"' for n in range(10))
    assert failure(path) == (
        f'Expected the column "input" in c.csv, found {names}, … (12 in all); '
        f"choose a column with --input-field, {rest}"
    )


def test_a_wrong_encoding_is_named_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "input,target\na,x\nä,y\n".encode("latin-1"))
    assert failure(path) == (
        "a.csv:3: expected UTF-8, found the byte 0xe4; name the right encoding with --encoding, for instance latin-1, "
        "or save the file as UTF-8."
    )
    path = write(tmp_path, "a.jsonl", b"\xef\xbb\xbf" + GOOD.encode() + b'{"input": "\xff"}')
    assert failure(path).startswith("a.jsonl:2: expected UTF-8, found the byte 0xff; ")
    assert "--encoding, for instance cp1252," in failure(write(tmp_path, "b.csv", "input\n“a”\n".encode("cp1252")))


def test_what_is_no_data_file_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "none.jsonl"
    assert failure(missing) == (
        f"Expected a data file at {missing}, found nothing; check the path, or write hf: before a Hub id."
    )
    assert failure(tmp_path) == (
        f"Expected a data file at {tmp_path}, found a folder; name one of its files, or write hf:{tmp_path}."
    )
    path = write(tmp_path, "a.xlsx", "")
    assert failure(path) == (
        f"Expected a data file that ends with .jsonl, .ndjson, .json, .csv, .tsv or .parquet, found {path}; "
        f"convert or rename the file."
    )
    assert "ends with .jsonl" in failure(write(tmp_path, "a.gz", ""))
    assert "an Excel workbook" in failure(write(tmp_path, "x.csv", b"PK\x03\x04..."))
    assert "git lfs pull" in failure(write(tmp_path, "y.csv", "version https://git-lfs.github.com/spec/v1\noid 1\n"))
    for name in ("a.jsonl", "a.json", "a.csv", "a.tsv"):
        path = write(tmp_path, name, b"\xef\xbb\xbf \n\n")
        assert failure(path) == f"Expected rows of data in {name}, found an empty file; check the file."
    path = write(tmp_path, "b.csv", "input,target\n")
    assert failure(path) == "Expected rows of data in b.csv, found none; check the file."
    path = write(tmp_path, "a.parquet", "PAR1 no")
    assert failure(path).startswith(f"Expected a Parquet file at {path}, found: ")
    pyarrow.parquet.write_table(pyarrow.table({"input": [], "target": []}), tmp_path / "b.parquet")
    assert failure(tmp_path / "b.parquet") == "Expected rows of data in b.parquet, found none; check the file."


def test_an_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path, "a.jsonl", GOOD)
    monkeypatch.setattr(Path, "read_bytes", refuse)  # root may read any file
    assert failure(path) == f"Expected a readable data file at {path}, found: Permission denied; check it."


# Targets


def made(targets: list[str | None], references: tuple[str, ...] = ()) -> Dataset:
    return Dataset(
        tuple(
            Example({"input": f"text {n}"}, target, references, f"a.csv:{n}")
            for n, target in enumerate(targets, start=2)
        ),
        "a.csv",
        "",
    )


def test_targets_outside_the_label_set_are_named() -> None:
    check_targets(made(["x", None, "y"]), ["y", "x"])
    with pytest.raises(DataError) as caught:
        check_targets(made(["x", "X", "y"]), ["x", "y"])
    assert str(caught.value) == (
        'a.csv:3: expected one of the labels "x", "y", found "X", which differs from "x" in upper and lower case only; '
        "correct this row, or give all labels with --labels."
    )
    with pytest.raises(DataError) as caught:
        check_targets(made(["l" * 100, "y", "z"]), [str(n) for n in range(77)])
    names = ", ".join(f'"{n}"' for n in range(10))
    assert str(caught.value) == (
        f'a.csv:2: expected one of the labels {names}, … (77 in all), found "{"l" * 59}…"; '
        "correct this row and 2 more bad rows, or give all labels with --labels."
    )


@pytest.mark.parametrize(
    ("targets", "labels"),
    [
        (["refund", "login", "delivery"] * 4, ("delivery", "login", "refund")),
        (["b", "a"] * 5, ("a", "b")),
        (["a", "b"] * 5, ("a", "b")),  # whatever the order of the rows
        (["a"] * 9 + ["b"], ("a", "b")),
        (["a", "b", "a", "b"], ("a", "b")),
        (["a", "b", "a"], None),  # 1.5 rows a target
        (["a", "b", "a", None], None),  # a row without target does not count
        (["a"] * 30 + [str(n) for n in range(10)], None),  # most targets are there once
        (["a"] * 10, None),  # a single target tells nothing apart
        ([str(n) for n in range(200)] * 5, tuple(sorted(str(n) for n in range(200)))),
        ([str(n) for n in range(201)] * 5, None),
        (["a", "one two three four five six seven eight"] * 5, ("a", "one two three four five six seven eight")),
        (["a", "one two three four five six seven eight nine"] * 5, None),
        ([None] * 10, None),
    ],
)
def test_labels_are_told_from_free_text(targets: list[str | None], labels: tuple[str, ...] | None) -> None:
    assert infer_labels(made(targets)) == labels
    assert infer_labels(made(targets, references=("a",))) == labels  # whatever else a file holds


def test_free_text_that_is_there_twice_is_no_label() -> None:
    once = made([f"answer {n}" for n in range(20)])
    assert infer_labels(replace(once, examples=once.examples * 3)) is None
