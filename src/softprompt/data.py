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
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from softprompt.errors import ConfigError, DataError, SoftPromptWarning
from softprompt.files import StrPath
from softprompt.sources import Table, read_table
from softprompt.wording import and_more, kind, listed, quoted

REFERENCES = "references"
"""The column of further accepted answers that is used without being asked for, if it holds lists of strings."""
MOST_LABELS, MOST_WORDS = 200, 8
"""What is taken for labels without being asked for: at most so many, each of at most so many words."""


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
        columns: field, ``target`` or ``references`` → the column it was read from; without those that there are not.
        fingerprint: SHA-256 hex digest of every example's fields, target and references in order. It does not depend
            on the file's name, format or unused columns.
    """

    examples: tuple[Example, ...]
    source: str
    fingerprint: str
    columns: Mapping[str, str] = field(default_factory=dict)


class _BadRow(Exception):
    """What is wrong with one row, as "expected ..., found ..."."""


def read_dataset(
    source: StrPath,
    *,
    fields: Sequence[str],
    input_field: str | None = None,
    target_field: str = "target",
    require_target: bool = True,
    references_field: str | None = None,
    encoding: str | None = None,
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
        fields: names of the template's fields, each the name of a column.
        input_field: the column that feeds the field ``input``, where it has another name.
        target_field: the column of the targets.
        require_target: if False, the target's column or cell may be missing; the target is None then.
        references_field: the column of further accepted targets: a list of strings, in CSV and TSV written as JSON; an
            empty cell is an empty list. If None, the column ``references`` is used if there is one that holds lists of
            strings and nothing else, and left alone otherwise; ``""`` stands for no column.
        encoding: of a file of text, a name that Python's codecs know; UTF-8 if None. A byte order mark, also of UTF-16
            and UTF-32, counts for more.

    Raises:
        ConfigError: ``input_field`` without a field ``input``, no such encoding, or a library for this source is not
            installed.
        DataError: the source cannot be read, has no rows, lacks a column, or has a row that is malformed or has an
            empty cell; the sentence names the first bad row and how many more there are.
    """
    if input_field is not None and "input" not in fields:
        raise ConfigError(
            f"An input field can be chosen only for a template with {{input}}, but this template's fields are "
            f"{listed(fields)}; rename the column or the template's field."
        )
    columns = {field: input_field if field == "input" and input_field else field for field in fields}
    table = read_table(source, encoding)
    for wanted, option in (
        *((column, "--input-field") for column in columns.values()),
        *([(target_field, "--target-field")] if require_target else []),
        *([(references_field, "--references-field")] if references_field else []),
    ):
        _check_column(table, wanted, option)
    if references_field is None:
        references_field = _fitting_references(table, {*columns.values(), target_field})

    examples: list[Example] = []
    problems: list[str] = []
    for number, row in table.rows:
        where = f"{table.name}:{number}"
        try:
            examples.append(_example(row, where, columns, target_field, require_target, references_field))
        except _BadRow as bad:
            problems.append(f"{where}: {bad}")
    if problems:
        raise DataError(f"{problems[0]}; correct or remove this row{and_more(problems)}.")
    used = {**columns, "target": target_field} if target_field in table.columns else dict(columns)
    if references_field:
        used["references"] = references_field
    return Dataset(tuple(examples), os.fspath(source), _fingerprint(examples), used)


def check_targets(dataset: Dataset, labels: Sequence[str]) -> None:
    """Checks that every known target is one of the labels.

    Raises:
        DataError: a target is not; the sentence names the first one's place and how many more there are.
    """
    allowed = set(labels)
    bad = [example for example in dataset.examples if example.target is not None and example.target not in allowed]
    if not bad:
        return
    target = str(bad[0].target)
    alike = next((label for label in labels if folded(label) == folded(target)), None)
    differs = "" if alike is None else f", which differs from {quoted(alike)} in {difference(alike, target)} only"
    raise DataError(
        f"{bad[0].where}: expected one of the labels {listed(labels)}, found {quoted(target)}{differs}; "
        f"correct this row{and_more(bad)}, or give all labels with --labels."
    )


def infer_labels(dataset: Dataset) -> tuple[str, ...] | None:
    """The label set if the targets look like labels, sorted by code point; None if they look like free text.

    They are labels if there are 2 to 200 distinct targets of at most 8 words, at least 2 rows a target on average, and
    at least half of them are there twice. Where there are fewer than 5 rows a target, rows that are there twice count
    once: a file of free text that was joined to itself does not hold labels. Rows without a target do not count.
    """
    rows = Counter(example.target for example in dataset.examples if example.target is not None)
    if not 2 <= len(rows) <= MOST_LABELS or any(len(target.split()) > MOST_WORDS for target in rows):
        return None
    if rows.total() < 5 * len(rows):
        once = {(example.target, tuple(sorted(example.fields.items()))) for example in dataset.examples}
        rows = Counter(target for target, _ in once if target is not None)
    repeated = sum(count > 1 for count in rows.values())
    few_and_repeated = rows.total() >= 2 * len(rows) and 2 * repeated >= len(rows)
    return tuple(sorted(rows)) if few_and_repeated else None


def folded(label: str) -> str:
    """What labels have in common that people cannot tell apart, or write in two ways without meaning two labels:
    without blanks at the ends and doubled ones, upper case, and forms of Unicode; ``1.0`` as ``1``."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", _without_blanks(label)).casefold())
    return _without_zeros(_without_blanks(text))


def difference(one: str, other: str) -> str:
    """In what two labels differ that are the same once they are ``folded``."""
    if _without_blanks(one) == _without_blanks(other):
        return "blanks"
    if unicodedata.normalize("NFKC", one) == unicodedata.normalize("NFKC", other):
        return "the form of Unicode"
    if one.casefold() == other.casefold():
        return "upper and lower case"
    if _without_zeros(one) == _without_zeros(other):
        return "the form of numbers"
    return "blanks, case or form"


def _without_zeros(text: str) -> str:
    """A whole number as such: pandas writes 1.0 for the 1 of a column with empty cells."""
    return re.sub(r"^([+-]?\d+)\.0+$", r"\1", text)


def _without_blanks(text: str) -> str:
    """The text with single spaces, without letters that have no width."""
    visible = "".join(letter for letter in text if letter not in "\ufeff\u200b\u2060\u00ad")
    return " ".join(visible.split())


# From a row to an example


def _example(
    row: Mapping[str, Any] | str,
    where: str,
    columns: Mapping[str, str],
    target_field: str,
    require_target: bool,
    references_field: str | None,
) -> Example:
    if isinstance(row, str):
        raise _BadRow(row)
    blank = [field for field, column in columns.items() if _is_blank(row.get(column, ...))]
    some = len(blank) < len(columns)  # an instruction may go without further input
    fields = {field: "" if some and field in blank else _text(row, column) for field, column in columns.items()}
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
        raise _BadRow(f"expected the column {quoted(column)}, found {listed(tuple(row))}")
    cell = row[column]
    if isinstance(cell, bool | int | float) and not _is_missing(cell):
        cell = json.dumps(cell)
    elif isinstance(cell, decimal.Decimal):
        cell = str(cell)
    elif isinstance(cell, datetime.date | datetime.time):
        cell = cell.isoformat()
    if not isinstance(cell, str) or _is_missing(cell):
        raise _BadRow(f"expected text in the column {quoted(column)}, found {kind(cell)}")
    return _encodable(cell, column)


def _encodable(text: str, column: str) -> str:
    """The text, if it is valid Unicode; JSON can write half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _BadRow(f"expected text in the column {quoted(column)}, found half of a surrogate pair") from None
    return text


def _references(cell: Any, column: str) -> tuple[str, ...]:
    if _is_missing(cell):
        return ()
    if isinstance(cell, str):  # CSV and TSV have no lists
        try:
            cell = json.loads(cell)
        except ValueError:
            raise _BadRow(f"expected a JSON list of strings in the column {quoted(column)}, found text") from None
    if not isinstance(cell, list):
        raise _BadRow(f"expected a list of strings in the column {quoted(column)}, found {kind(cell)}")
    for item in cell:
        if not isinstance(item, str):
            raise _BadRow(f"expected a list of strings in the column {quoted(column)}, found {kind(item)} in it")
    return tuple(_encodable(item, column) for item in cell)


def _fingerprint(examples: Iterable[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        content = [sorted(example.fields.items()), example.target, example.references]
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
        except _BadRow:
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
