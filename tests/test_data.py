from __future__ import annotations

import csv
import datetime
import hashlib
import json
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from softprompt.data import Dataset, Example, check_targets, infer_labels, read_dataset
from softprompt.errors import ConfigError, DataError


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def failure(path: str | Path, **options: Any) -> str:
    """The sentence that reading the file ends in."""
    with pytest.raises(DataError) as caught:
        read_dataset(path, **{"fields": ["input"], **options})
    return str(caught.value)


def read_pairs(path: str | Path, **options: Any) -> list[tuple[str, str | None]]:
    return [
        (example.fields["input"], example.target)
        for example in read_dataset(path, fields=["input"], **options).examples
    ]


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


# Hugging Face data sets


@pytest.fixture
def labelled() -> datasets.Dataset:
    features = datasets.Features(input=datasets.Value("string"), target=datasets.ClassLabel(names=["neg", "pos"]))
    return datasets.Dataset.from_dict({"input": ["a", "b", "c"], "target": [1, 0, 1]}, features=features)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_saved_datasets_are_read_with_label_names(tmp_path: Path, labelled: datasets.Dataset) -> None:
    datasets.DatasetDict(train=labelled, test=labelled.select([1])).save_to_disk(tmp_path / "both")
    labelled.save_to_disk(tmp_path / "one")
    whole = [("a", "pos"), ("b", "neg"), ("c", "pos")]
    assert read_pairs(f"hf:{tmp_path}/both") == whole
    assert read_pairs(f"hf:{tmp_path}/both:test") == [("b", "neg")]
    dataset = read_dataset(f"hf:{tmp_path}/one", fields=["input"])
    assert [(e.fields["input"], e.target) for e in dataset.examples] == whole
    assert dataset.examples[2].where == f"hf:{tmp_path}/one:train:3"
    assert dataset.source == f"hf:{tmp_path}/one"


@pytest.mark.usefixtures("cache")
def test_a_folder_of_data_files_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder, "train.jsonl", "".join(f'{{"input": "{n}", "target": "x"}}\n' for n in "abc"))
    write(folder, "test.jsonl", '{"input": "d", "target": "y"}\n')
    assert read_pairs(f"hf:{folder}") == [("a", "x"), ("b", "x"), ("c", "x")]
    assert read_pairs(f"hf:{folder}:train[:2]") == [("a", "x"), ("b", "x")]
    assert read_pairs(f"hf:{folder}:test") == [("d", "y")]


def test_an_unlabelled_row_is_named(tmp_path: Path) -> None:
    features = datasets.Features(input=datasets.Value("string"), target=datasets.ClassLabel(names=["neg", "pos"]))
    datasets.Dataset.from_dict({"input": ["a", "b"], "target": [1, -1]}, features=features).save_to_disk(tmp_path / "d")
    assert failure(f"hf:{tmp_path}/d:test") == (
        f'hf:{tmp_path}/d:test:2: expected text in the column "target", found null; correct or remove this row.'
    )


def test_ids_configurations_and_splits_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, labelled: datasets.Dataset
) -> None:
    calls: list[tuple[Any, ...]] = []

    def load_dataset(*arguments: str, split: str) -> datasets.Dataset:
        calls.append((*arguments, split))
        if arguments[0] in ("glue/sst2", "no/such"):
            raise datasets.exceptions.DatasetNotFoundError("Dataset doesn't exist on the Hub.\nMore lines")
        if arguments[0] == "no":
            raise ValueError("Couldn't find it.")
        return labelled

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source in ["hf:imdb", "hf:imdb:test", "hf:o/n", "hf:o/n/c:validation", "hf:glue/sst2:train[:10%]"]:
        assert len(read_pairs(source)) == 3
    assert calls == [
        ("imdb", "train"),
        ("imdb", "test"),
        ("o/n", "train"),
        ("o/n", "c", "validation"),
        ("glue/sst2", "train[:10%]"),
        ("glue", "sst2", "train[:10%]"),
    ]
    assert failure("hf:no/such") == (
        "Expected a data set that datasets can load at hf:no/such, found: Couldn't find it; "
        "check its name, configuration and split."
    )
    assert failure("hf:") == "Expected hf:DATASET[/CONFIG][:SPLIT], found hf:; name a data set."


def test_an_unknown_split_is_named(tmp_path: Path, labelled: datasets.Dataset) -> None:
    datasets.DatasetDict(train=labelled, test=labelled).save_to_disk(tmp_path / "d")
    source = f"hf:{tmp_path}/d:dev"
    assert failure(source) == (
        f'Expected a data set that datasets can load at {source}, found: no split "dev" but "train", "test"; '
        "check its name, configuration and split."
    )


@pytest.mark.parametrize(
    ("source", "library", "purpose"),
    [("hf:imdb", "datasets", "a Hugging Face data set"), ("a.parquet", "pyarrow", "a Parquet file")],
)
def test_a_missing_library_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, library: str, purpose: str
) -> None:
    monkeypatch.chdir(write(tmp_path, "a.parquet", "").parent)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError) as caught:
        read_dataset(source, fields=["input"])
    assert str(caught.value) == (
        f'Reading {purpose} needs the library {library}, which is not installed; pip install "softprompt[data]".'
    )


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
        (
            '{"input": "a", "target": "x", "references": {}}',
            'expected a list of strings in the column "references", found an object',
        ),
        (
            '{"input": "a", "target": "x", "references": ["y", 1]}',
            'expected a list of strings in the column "references", found a number in it',
        ),
        (
            '{"input": "a", "target": "x", "references": "y"}',
            'expected a JSON list of strings in the column "references", found text',
        ),
        (
            '{"input": "a", "target": "x", "references": true}',
            'expected a list of strings in the column "references", found a boolean',
        ),
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
        "c.csv:3: expected cells in the quoting of CSV, found an error (unexpected end of data); "
        'write a cell that holds a quote as "...""...".'
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
    rest = "save the file with the encoding UTF-8."
    path = write(tmp_path, "a.csv", "input,target\na,x\nä,y\n".encode("latin-1"))
    assert failure(path) == f"a.csv:3: expected UTF-8, found the byte 0xe4; {rest}"
    path = write(tmp_path, "a.jsonl", b"\xef\xbb\xbf" + GOOD.encode() + b'{"input": "\xff"}')
    assert failure(path) == f"a.jsonl:2: expected UTF-8, found the byte 0xff; {rest}"
    path = write(tmp_path, "b.jsonl", GOOD.encode("utf-16"))
    assert failure(path) == f"b.jsonl:1: expected UTF-8, found the byte 0xff; {rest}"


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
        f"Expected a data file that ends with .jsonl, .csv, .tsv, .parquet, found {path}; convert or rename the file."
    )
    for name in ("a.jsonl", "a.csv", "a.tsv"):
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
        tuple(Example({"input": "a"}, target, references, f"a.csv:{n}") for n, target in enumerate(targets, start=2)),
        "a.csv",
        "",
    )


def test_targets_outside_the_label_set_are_named() -> None:
    check_targets(made(["x", None, "y"]), ["y", "x"])
    with pytest.raises(DataError) as caught:
        check_targets(made(["x", "X", "y"]), ["x", "y"])
    assert str(caught.value) == (
        'a.csv:3: expected one of the labels "x", "y", found "X"; correct this row, or give all labels with --labels.'
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
        (["b", "a"] * 5, ("a", "b")),
        (["a", "b"] * 5, ("a", "b")),  # whatever the order of the rows
        (["a"] * 9 + ["b"], ("a", "b")),
        (["a"] * 8 + ["b"], None),  # 4.5 rows a label
        (["a"] * 8 + ["b", None], None),  # a row without target does not count
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
    assert infer_labels(made(targets, references=("a",))) is None
