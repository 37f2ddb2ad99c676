"""From a data file to examples: text fields and a target, each example with the place it came from.

Every row is checked when the file is read, so that nothing fails in the middle of a training.
"""

from __future__ import annotations

import datetime
import decimal
import hashlib
import json
import math
import os
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from softprompt.data.columns import Columns
from softprompt.data.conversations import BadRow, conversation_examples
from softprompt.data.example import Dataset, Example, check_targets
from softprompt.data.formats import Layout, layout_of
from softprompt.data.sources import Source, Table, read_table
from softprompt.data.wording import and_more, is_image, kind, listed, quoted
from softprompt.errors import ConfigError, DataError, SoftPromptWarning

REFERENCES = "references"
"""The column of further accepted answers that is used without being asked for, if it holds lists of strings."""


def read_dataset(
    source: Source,
    *,
    fields: Sequence[str] | None,
    input_field: str | None = None,
    target_field: str = "target",
    require_target: bool = True,
    references_field: str | None = None,
    encoding: str | None = None,
    labels: Collection[str] | None = None,
    label_names: Mapping[str, str] | None = None,
    format: str | None = "none",
) -> Dataset:
    """Reads and checks every row of a source.

    Numbers and booleans become their JSON text (``1``, ``true``), dates their ISO 8601 text, ``ClassLabel`` columns
    their names. Of several fields, some may be blank in a row, but not all.

    Args:
        source: a file or a data set.
            ``.jsonl``, ``.ndjson``: one object a line; blank lines are skipped.
            ``.json``: a list of objects, or an object with one such list in it.
            ``.csv``: with a header, and commas, semicolons or tabs between the cells; cells in quotation marks may
            hold these and line ends. Columns without a name are left out.
            ``.tsv``: with a header; one row a line, quotation marks being text, unless the file is quoted as CSV.
            Each of these may be compressed, with ``.gz``, ``.bz2`` or ``.xz`` behind its name.
            ``.parquet``.
            ``hf:DATASET[/CONFIG][:SPLIT]`` of the Hugging Face Hub (``hf:glue/sst2:validation``,
            ``hf:owner/name/config``), or a local folder that ``datasets`` can load or has saved (``hf:./folder:test``).
            The split is ``train`` if not given, and may be cut and joined: ``train[:50%]+test``. No code of a data set
            is ever run.
            Or rows in memory: a list of dicts, a pandas, polars or Arrow table, a ``datasets.Dataset``.
        fields: names of the template's fields, each the name of a column; None: those of the format, ``input`` of none.
        input_field: the column that feeds the field ``input``, where it has another name.
        target_field: the column of the targets.
        require_target: if False, the target's column or cell may be missing; the target is None then.
        references_field: the column of further accepted targets: a list of strings, in CSV and TSV written as JSON; an
            empty cell is an empty list. If None, the column ``references`` is used if there is one that holds lists of
            strings and nothing else, and left alone otherwise; ``""`` stands for no column.
        labels: what every target must be one of; None or none: anything.
        encoding: of a file of text, a name that Python's codecs know; UTF-8 if None. A byte order mark, also of UTF-16
            and UTF-32, counts for more.
        label_names: number of a label, as text → its name, which takes the place of a target that is such a number.
        format: one of ``softprompt.data.formats.FORMATS``; None: told from the columns (``layout_of``). Of a
            conversation, each answer is an example; without ``require_target``, the last answer or the one to come is.

    Raises:
        ConfigError: ``input_field`` without a field ``input``, no such encoding or format, or a library for this source
            is not installed.
        DataError: the source cannot be read, has no rows, lacks a column, or has a row that is malformed, has an
            empty cell or a target that is none of the labels; the sentence names the first bad row and how many more
            there are.
    """
    if input_field is not None and fields is not None and "input" not in fields:
        raise ConfigError(
            f"An input field can be chosen only for a template with {{input}}, but this template's fields are "
            f"{listed(fields)}; rename the column or the template's field."
        )
    table = read_table(source, encoding)
    layout = layout_of(table, fields, input_field, target_field, require_target=require_target, format=format)
    for wanted, option in (
        *((column, "--input-field") for column in layout.columns.values() if column not in layout.optional),
        *([(layout.target, "--target-field")] if require_target and not layout.chat else []),
        *([(references_field, "--references-field")] if references_field else []),
    ):
        _check_column(table, wanted, option)
    if references_field is None and not layout.chat:
        references_field = _fitting_references(table, {*layout.columns.values(), layout.target})

    _refuse_images(table)
    examples = _examples(table, layout, require_target, references_field)
    examples, named = _with_names(examples, labels or (), label_names or {})
    used = _used_columns(table, layout, references_field)
    name = os.fspath(source) if isinstance(source, str | os.PathLike) else f"{table.name} in memory"
    fingerprint = _fingerprint(examples)
    dataset = Dataset(tuple(examples), name, fingerprint, used, layout.format, layout.recognised, named)
    if labels:
        check_targets(dataset, tuple(labels))
    return dataset


def read_rows(
    source: Source,
    columns: Columns,
    *,
    fields: Sequence[str] | None,
    require_target: bool = True,
    labels: Collection[str] | None = None,
    label_names: Mapping[str, str] | None = None,
) -> Dataset:
    """``read_dataset``, as a user says what is where in the rows."""
    return read_dataset(
        source,
        fields=fields,
        input_field=columns.input_field,
        target_field=columns.target_field,
        require_target=require_target,
        references_field="" if columns.references_field == "none" else columns.references_field,
        encoding=columns.encoding,
        labels=labels,
        label_names=label_names,
        format=columns.format,
    )


def _used_columns(table: Table, layout: Layout, references_field: str | None) -> dict[str, str]:
    """Field, ``target`` or ``references`` → its column."""
    used = {"conversations": layout.chat[-1]} if layout.chat else dict(layout.columns)
    if layout.target in table.columns and not layout.chat:
        used["target"] = layout.target
    if references_field:
        used["references"] = references_field
    return used


def _with_names(
    examples: list[Example], labels: Collection[str], names: Mapping[str, str]
) -> tuple[list[Example], Mapping[str, str]]:
    """The examples with names for the targets that are numbers of labels and no labels themselves, and the names if any
    is used; pandas writes 1.0 for the 1 of a column with empty cells."""
    targets = {example.target for example in examples if example.target is not None} - set(labels)
    found = {target: names[number] for target in targets if (number := target.removesuffix(".0")) in names}
    if not found:
        return examples, {}
    return [replace(one, target=found.get(str(one.target), one.target)) for one in examples], names


def _refuse_images(table: Table) -> None:
    """A column of images beside the text would be left out without a word."""
    for number, row in table.rows:
        for column, cell in () if isinstance(row, str) else row.items():
            if any(map(is_image, cell if isinstance(cell, list | tuple) else (cell,))):
                raise DataError(
                    f"{table.name}:{number}: expected text alone, found an image in the column {quoted(column)}; a "
                    f"soft prompt learns from text: remove the column if the rows make sense without it."
                )


# From a row to an example


def _examples(table: Table, layout: Layout, require_target: bool, references_field: str | None) -> list[Example]:
    examples: list[Example] = []
    problems: list[str] = []
    for number, row in table.rows:
        where = f"{table.name}:{number}"
        try:
            if isinstance(row, str):
                raise BadRow(row)
            if layout.chat:
                examples += conversation_examples(row, where, layout.chat, require_target)
            else:
                examples.append(_example(row, where, layout, require_target, references_field))
        except BadRow as bad:
            problems.append(f"{where}: {bad}")
    if problems:
        raise DataError(f"{problems[0]}; correct or remove this row{and_more(problems)}.")
    return examples


def _example(
    row: Mapping[str, Any], where: str, layout: Layout, require_target: bool, references_field: str | None
) -> Example:
    columns, target_field = layout.columns, layout.target
    row = {**dict.fromkeys(layout.optional, ""), **row}
    blank = [field for field, column in columns.items() if _is_blank(row.get(column, ...))]
    some = len(blank) < len(columns)  # an instruction may go without further input
    fields = {field: "" if some and field in blank else _text(row, column) for field, column in columns.items()}
    if isinstance(row.get(target_field), list | tuple):
        raise BadRow(
            f"expected one target in the column {quoted(target_field)}, found a list of "
            f"{len(row[target_field])} (write a row for each of them, or join them to one text)"
        )
    target = None if not require_target and _is_missing(row.get(target_field)) else _text(row, target_field)
    references = _references(row.get(references_field), references_field) if references_field else ()
    return Example(fields, target, references, where)


def _is_blank(cell: Any) -> bool:
    return _is_missing(cell) and cell not in (math.inf, -math.inf)


def _is_missing(cell: Any) -> bool:
    """Whether a cell holds nothing: null, blank text, or a number that is not finite."""
    if isinstance(cell, float):
        return not math.isfinite(cell)
    return cell is None or (isinstance(cell, str) and not cell.strip())


def _text(row: Mapping[str, Any], column: str) -> str:
    if column not in row:
        raise BadRow(f"expected the column {quoted(column)}, found {listed(tuple(row))}")
    cell = row[column]
    if isinstance(cell, bool | int | float) and not _is_missing(cell):
        cell = json.dumps(cell)
    elif isinstance(cell, decimal.Decimal):
        cell = str(cell)
    elif isinstance(cell, datetime.date | datetime.time):
        cell = cell.isoformat()
    if not isinstance(cell, str) or _is_missing(cell):
        raise BadRow(f"expected text in the column {quoted(column)}, found {kind(cell)}")
    return _encodable(cell, column)


def _encodable(text: str, column: str) -> str:
    """The text, if it is valid Unicode; JSON can write half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRow(f"expected text in the column {quoted(column)}, found half of a surrogate pair") from None
    return text


def _references(cell: Any, column: str) -> tuple[str, ...]:
    if _is_missing(cell):
        return ()
    if isinstance(cell, str):  # CSV and TSV have no lists
        try:
            cell = json.loads(cell)
        except ValueError:
            raise BadRow(f"expected a JSON list of strings in the column {quoted(column)}, found text") from None
    if not isinstance(cell, list):
        raise BadRow(f"expected a list of strings in the column {quoted(column)}, found {kind(cell)}")
    for item in cell:
        if not isinstance(item, str):
            raise BadRow(f"expected a list of strings in the column {quoted(column)}, found {kind(item)} in it")
    return tuple(_encodable(item, column) for item in cell)


def _fingerprint(examples: Iterable[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        content: list[Any] = [sorted(example.fields.items()), example.target, example.references]
        if example.conversation is not None:
            content += [example.conversation.before, example.conversation.answer]
        digest.update(json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
    return digest.hexdigest()


def _check_column(table: Table, column: str, option: str) -> None:
    if not table.rows:
        raise DataError(f"Expected rows of data in {table.name}, found none; check the file.")
    if column in table.columns or not table.columns:  # without any column every row is malformed, and says so itself
        return
    field = "" if option == "--references-field" else " or the template's field"
    raise DataError(
        f"Expected the column {quoted(column)} in {table.name}, found {listed(table.columns)}; "
        f"choose a column with {option}, or rename the column{field}."
    )


def _fitting_references(table: Table, used: set[str]) -> str | None:
    """The column ``references``, if it holds lists of strings and is not used for anything else."""
    if REFERENCES not in table.columns or REFERENCES in used:
        return None
    fitting = 0
    bad: list[int] = []
    for number, row in table.rows:
        try:
            fitting += not isinstance(row, str) and _references(row.get(REFERENCES), REFERENCES) != ()
        except BadRow:
            bad.append(number)
    if fitting and bad:
        warnings.warn(
            f"the column {quoted(REFERENCES)} of {table.name} is not used, since not every row holds a list of strings "
            f"in it, the first at {table.name}:{bad[0]}; correct the rows or name the column with --references-field "
            f"to use it, or say none",
            SoftPromptWarning,
            stacklevel=3,
        )
    return REFERENCES if fitting and not bad else None
