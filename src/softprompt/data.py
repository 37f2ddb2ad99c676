"""From a data file to examples: text fields and a target, each example with the place it came from.

Every row is checked when the file is read, so that nothing fails in the middle of a training.
"""

from __future__ import annotations

import csv
import datetime
import decimal
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprompt.errors import ConfigError, DataError
from softprompt.files import StrPath, local_path


@dataclass(frozen=True)
class Example:
    """One row of a task.

    Attributes:
        fields: name of a template's input field → its text.
        target: the label or text to be produced, or None where it is not known.
        references: further accepted targets, may be empty.
        where: the row's place, for messages: ``train.jsonl:17`` with the line on which the row starts, as an editor
            counts (a header counts, too), ``test.parquet:17`` or ``hf:imdb:train:17`` with the row counted from 1.
    """

    fields: Mapping[str, str]
    target: str | None
    references: tuple[str, ...] = ()
    where: str = ""


@dataclass(frozen=True)
class Dataset:
    """The examples of one source, at least one.

    Attributes:
        examples: in the order of the source.
        source: what ``read_dataset`` was given.
        fingerprint: SHA-256 hex digest of every example's fields, target and references in order. It does not depend
            on the file's name, format or unused columns.
    """

    examples: tuple[Example, ...]
    source: str
    fingerprint: str


@dataclass(frozen=True)
class _Table:
    """The rows of a source before they are checked.

    Attributes:
        name: how a row's place starts, such as ``train.jsonl``.
        columns: the names in order of appearance; of a JSON Lines file, those of any row.
        rows: line or row number → the cells by column, or what is wrong with the row.
    """

    name: str
    columns: tuple[str, ...]
    rows: tuple[tuple[int, Mapping[str, Any] | str], ...]


class _BadRow(Exception):
    """What is wrong with one row, as "expected ..., found ..."."""


def read_dataset(
    source: StrPath,
    *,
    fields: Sequence[str],
    input_field: str | None = None,
    target_field: str = "target",
    require_target: bool = True,
    references_field: str = "references",
) -> Dataset:
    """Reads and checks every row of a source.

    A file is UTF-8, with or without a byte order mark. Numbers and booleans become their JSON text (``1``, ``true``),
    dates their ISO 8601 text, ``ClassLabel`` columns their names.

    Args:
        source: a ``.jsonl`` file (one object a line; blank lines are skipped), a ``.csv`` or ``.tsv`` file (with a
            header; cells may be quoted and then hold line ends), a ``.parquet`` file, or
            ``hf:DATASET[/CONFIG][:SPLIT]`` of the Hugging Face Hub (``hf:glue/sst2:validation``,
            ``hf:owner/name/config``; the split is ``train`` if not given) or a local folder that ``datasets`` can
            load (``hf:./folder:test``). No code of a data set is ever run.
        fields: names of the template's fields, each the name of a column.
        input_field: the column that feeds the field ``input``, where it has another name.
        target_field: the column of the targets.
        require_target: if False, the target's column or cell may be missing; the target is None then.
        references_field: the column of further accepted targets, used where there is one: a list of strings, in CSV
            and TSV written as JSON; an empty cell is an empty list.

    Raises:
        ConfigError: ``input_field`` without a field ``input``, or a library for this source is not installed.
        DataError: the source cannot be read, has no rows, lacks a column, or has a row that is malformed or has an
            empty cell; the sentence names the first bad row and how many more there are.
    """
    if input_field is not None and "input" not in fields:
        raise ConfigError(
            f"An input field can be chosen only for a template with {{input}}, but this template's fields are "
            f"{_listed(fields)}; rename the column or the template's field."
        )
    columns = {field: input_field if field == "input" and input_field else field for field in fields}
    name = os.fspath(source)
    table = _read_hub(name) if name.startswith("hf:") else _read_file(local_path(name))
    _check_columns(table, [*columns.values(), *([target_field] if require_target else [])], target_field)

    examples: list[Example] = []
    problems: list[str] = []
    for number, row in table.rows:
        where = f"{table.name}:{number}"
        try:
            examples.append(_example(row, where, columns, target_field, require_target, references_field))
        except _BadRow as bad:
            problems.append(f"{where}: {bad}")
    if problems:
        raise DataError(f"{problems[0]}; correct or remove this row{_and_more(problems)}.")
    return Dataset(tuple(examples), name, _fingerprint(examples))


def check_targets(dataset: Dataset, labels: Sequence[str]) -> None:
    """Checks that every known target is one of the labels.

    Raises:
        DataError: a target is not; the sentence names the first one's place and how many more there are.
    """
    allowed = set(labels)
    bad = [example for example in dataset.examples if example.target is not None and example.target not in allowed]
    if bad:
        raise DataError(
            f"{bad[0].where}: expected one of the labels {_listed(labels)}, found {_quoted(str(bad[0].target))}; "
            f"correct this row{_and_more(bad)}, or give all labels with --labels."
        )


def infer_labels(dataset: Dataset) -> tuple[str, ...] | None:
    """The label set if the targets look like labels, sorted by code point; None if they look like free text.

    They are labels if there are 2 to 200 distinct targets, at least 5 rows a target on average, at most 8 words in
    each, and no example has references. Rows without a target do not count.
    """
    targets = [example.target for example in dataset.examples if example.target is not None]
    distinct = set(targets)
    few_and_repeated = 2 <= len(distinct) <= 200 and len(targets) >= 5 * len(distinct)
    short = all(len(target.split()) <= 8 for target in distinct)
    has_references = any(example.references for example in dataset.examples)
    return tuple(sorted(distinct)) if few_and_repeated and short and not has_references else None


# From a row to an example


def _example(
    row: Mapping[str, Any] | str,
    where: str,
    columns: Mapping[str, str],
    target_field: str,
    require_target: bool,
    references_field: str,
) -> Example:
    if isinstance(row, str):
        raise _BadRow(row)
    fields = {field: _text(row, column) for field, column in columns.items()}
    target = None if not require_target and _is_missing(row.get(target_field)) else _text(row, target_field)
    return Example(fields, target, _references(row.get(references_field), references_field), where)


def _is_missing(cell: Any) -> bool:
    """Whether a cell holds nothing: null, blank text, or a number that is not finite."""
    if isinstance(cell, float):
        return not math.isfinite(cell)
    return cell is None or (isinstance(cell, str) and not cell.strip())


def _text(row: Mapping[str, Any], column: str) -> str:
    if column not in row:
        raise _BadRow(f"expected the column {_quoted(column)}, found {_listed(tuple(row))}")
    cell = row[column]
    if isinstance(cell, bool | int | float) and not _is_missing(cell):
        cell = json.dumps(cell)
    elif isinstance(cell, decimal.Decimal):
        cell = str(cell)
    elif isinstance(cell, datetime.date | datetime.time):
        cell = cell.isoformat()
    if not isinstance(cell, str) or _is_missing(cell):
        raise _BadRow(f"expected text in the column {_quoted(column)}, found {_kind(cell)}")
    return _encodable(cell, column)


def _encodable(text: str, column: str) -> str:
    """The text, if it is valid Unicode; JSON can write half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _BadRow(f"expected text in the column {_quoted(column)}, found half of a surrogate pair") from None
    return text


def _references(cell: Any, column: str) -> tuple[str, ...]:
    if _is_missing(cell):
        return ()
    if isinstance(cell, str):  # CSV and TSV have no lists
        try:
            cell = json.loads(cell)
        except ValueError:
            raise _BadRow(f"expected a JSON list of strings in the column {_quoted(column)}, found text") from None
    if not isinstance(cell, list):
        raise _BadRow(f"expected a list of strings in the column {_quoted(column)}, found {_kind(cell)}")
    for item in cell:
        if not isinstance(item, str):
            raise _BadRow(f"expected a list of strings in the column {_quoted(column)}, found {_kind(item)} in it")
    return tuple(_encodable(item, column) for item in cell)


def _fingerprint(examples: Iterable[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        content = [sorted(example.fields.items()), example.target, example.references]
        digest.update(json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
    return digest.hexdigest()


def _check_columns(table: _Table, wanted: Sequence[str], target_field: str) -> None:
    if not table.rows:
        raise DataError(f"Expected rows of data in {table.name}, found none; check the file.")
    missing = [column for column in wanted if column not in table.columns]
    if not missing or not table.columns:  # without any column every row is malformed, and says so itself
        return
    option = "--target-field" if missing[0] == target_field else "--input-field"
    raise DataError(
        f"Expected the column {_quoted(missing[0])} in {table.name}, found {_listed(table.columns)}; "
        f"choose a column with {option}, or rename the column or the template's field."
    )


# From a source to a table


def _read_file(path: Path) -> _Table:
    readers: dict[str, Callable[[Path], _Table]] = {
        ".jsonl": _read_jsonl,
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".parquet": _read_parquet,
    }
    if not path.exists():
        raise DataError(f"Expected a data file at {path}, found nothing; check the path, or write hf: before a Hub id.")
    if path.is_dir():
        raise DataError(f"Expected a data file at {path}, found a folder; name one of its files, or write hf:{path}.")
    if path.suffix.lower() not in readers:
        raise DataError(
            f"Expected a data file that ends with {', '.join(readers)}, found {path}; convert or rename the file."
        )
    try:
        return readers[path.suffix.lower()](path)
    except OSError as error:
        reason = error.strerror or _first_line(error)
        raise DataError(f"Expected a readable data file at {path}, found: {reason}; check it.") from error


def _decoded(path: Path) -> str:
    """The file's text without a byte order mark, line ends as they are."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # error.object lacks the byte order mark where there is one; no line end is in it
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path.name}:{line}: expected UTF-8, found the byte 0x{error.object[error.start]:02x}; "
            f"save the file with the encoding UTF-8."
        ) from None
    if not text.strip():
        raise DataError(f"Expected rows of data in {path.name}, found an empty file; check the file.")
    return text


def _read_jsonl(path: Path) -> _Table:
    rows: list[tuple[int, Mapping[str, Any] | str]] = []
    columns: dict[str, None] = {}
    # Not splitlines(): a JSON string may hold U+2028 and its like, which are no line ends to an editor or to JSON Lines
    for number, line in enumerate(_decoded(path).split("\n"), start=1):
        if not line.strip():
            continue
        row = _parsed_line(line)
        if isinstance(row, dict):
            columns.update(dict.fromkeys(row))
        rows.append((number, row))
    return _Table(path.name, tuple(columns), tuple(rows))


def _parsed_line(line: str) -> dict[str, Any] | str:
    """A line's object, or what is wrong with it."""

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        row = json.loads(line, parse_constant=no_constant)
    except json.JSONDecodeError as error:
        return f"expected a JSON object, found an error at column {error.colno} ({error.msg})"
    except (ValueError, RecursionError) as error:  # NaN, a number of thousands of digits, a thousand nested lists
        return f"expected a JSON object, found an error ({error})"
    return row if isinstance(row, dict) else f"expected a JSON object, found {_kind(row)}"


def _read_csv(path: Path) -> _Table:
    text = _decoded(path)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    lines: list[tuple[int, list[str]]] = []
    start = 1
    limit = csv.field_size_limit(len(text) + 1)  # a long document is no error
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        for cells in reader:
            if cells:  # not a blank line
                lines.append((start, cells))
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path.name}:{start}: expected cells in the quoting of CSV, found an error ({error}); "
            f'write a cell that holds a quote as "...""...".'
        ) from None
    finally:
        csv.field_size_limit(limit)

    (header_line, header), *body = lines
    repeated = [name for position, name in enumerate(header) if name in header[:position]]
    if repeated:
        raise DataError(
            f"{path.name}:{header_line}: expected column names that differ, found {_quoted(repeated[0])} twice; "
            f"rename a column."
        )
    rows: list[tuple[int, Mapping[str, Any] | str]] = [
        (number, dict(zip(header, cells, strict=True)))
        if len(cells) == len(header)
        else (number, f"expected {len(header)} cells as in the header, found {len(cells)}")
        for number, cells in body
    ]
    return _Table(path.name, tuple(header), tuple(rows))


def _read_parquet(path: Path) -> _Table:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise _needs_library("pyarrow", "a Parquet file") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            table = file.read()
    except pyarrow.ArrowException as error:
        raise DataError(f"Expected a Parquet file at {path}, found: {_first_line(error)}; check the file.") from error
    try:  # Parquet files of the Hub keep the names of ClassLabel columns beside Arrow's schema
        features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
        labels = {column: feature["names"] for column, feature in features.items() if "names" in feature}
    except (AttributeError, KeyError, TypeError, ValueError):
        labels = {}
    return _arrow_table(path.name, table.to_pylist(), table.column_names, labels)


def _read_hub(source: str) -> _Table:
    # the split may be a slice of datasets: train[:100]
    match = re.fullmatch(r"hf:(?P<name>.+?)(?::(?P<split>\w+(?:\.\w+)*(?:\[[^\]]*\])?))?", source)
    if match is None:
        raise DataError(f"Expected hf:DATASET[/CONFIG][:SPLIT], found {source}; name a data set.")
    name, split = match["name"], match["split"] or "train"
    try:
        import datasets
    except ImportError as error:
        raise _needs_library("datasets", "a Hugging Face data set") from error
    try:
        rows = _loaded(datasets, name, split)
    except Exception as error:  # the library raises errors of many kinds, its own and those of what it calls
        raise DataError(
            f"Expected a data set that datasets can load at {source}, found: {_first_line(error)}; "
            f"check its name, configuration and split."
        ) from error
    labels = {
        column: feature.names for column, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)
    }
    return _arrow_table(f"hf:{name}:{split}", rows.to_list(), rows.column_names, labels)


def _loaded(datasets: Any, name: str, split: str) -> Any:
    """A ``datasets.Dataset``; of ``a/b``, ``a/b`` is tried as a data set before ``b`` as a configuration of ``a``."""
    if name.startswith("~"):
        name = str(local_path(name))
    folder = Path(name)
    if (folder / "dataset_dict.json").is_file():  # written by save_to_disk, which load_dataset does not take
        splits = datasets.load_from_disk(name)
        if split not in splits:
            raise ValueError(f"no split {_quoted(split)} but {_listed(tuple(splits))}")
        return splits[split]
    if (folder / "state.json").is_file():
        return datasets.load_from_disk(name)
    if folder.exists() or name.count("/") == 0:
        return datasets.load_dataset(name, split=split)
    dataset, _, config = name.rpartition("/")
    if name.count("/") > 1:
        return datasets.load_dataset(dataset, config, split=split)
    try:
        return datasets.load_dataset(name, split=split)
    except datasets.exceptions.DatasetNotFoundError:
        return datasets.load_dataset(dataset, config, split=split)


def _arrow_table(
    name: str, rows: Sequence[dict[str, Any]], columns: Sequence[str], labels: Mapping[str, Sequence[str]]
) -> _Table:
    """The table with the names instead of the numbers of ``ClassLabel`` columns; -1 stands for no label there."""
    for column, names in labels.items():
        for row in rows:
            number = row[column]
            row[column] = names[number] if isinstance(number, int) and 0 <= number < len(names) else None
    return _Table(name, tuple(columns), tuple(enumerate(rows, start=1)))


# Words of the sentences


def _needs_library(library: str, purpose: str) -> ConfigError:
    return ConfigError(
        f'Reading {purpose} needs the library {library}, which is not installed; pip install "softprompt[data]".'
    )


def _quoted(text: str) -> str:
    """The text in double quotes on one line, shortened to 60 characters."""
    return json.dumps(text if len(text) <= 60 else text[:59] + "…", ensure_ascii=False)


def _listed(names: Sequence[str]) -> str:
    """The names in quotes, the first 10 of them."""
    if not names:
        return "none"
    rest = f", … ({len(names)} in all)" if len(names) > 10 else ""
    return ", ".join(map(_quoted, names[:10])) + rest


def _and_more(bad: Sequence[object]) -> str:
    """What follows "this row" where several are bad."""
    more = len(bad) - 1
    return "" if more == 0 else f" and {more:,} more bad {'row' if more == 1 else 'rows'}"


def _kind(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, str):
        return "text" if value.strip() else "only blanks" if value else "nothing"
    if isinstance(value, bool):
        return "a boolean"
    kinds = {type(None): "null", dict: "an object", list: "a list", int: "a number", float: "a number"}
    return kinds.get(type(value), f"a value of type {type(value).__name__}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
