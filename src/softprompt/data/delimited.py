"""CSV and TSV: from text to a header and rows, without a row lost to a quotation mark.

RFC 4180 lets a cell in quotation marks hold delimiters and line ends. Much data is written without any quoting, and a
cell there may begin with a mark that is text: read as a quoted cell, it swallows all lines up to the next mark.
So a file with tabs is taken for quoted only if all of it looks as a CSV writer writes, and in a file with commas a
quoted cell is refused that swallows lines which look like rows.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from softprompt.data.wording import counted, quoted
from softprompt.errors import DataError, SoftPromptWarning

_LINE_END = re.compile(r"\r\n|\n|\r")
_NUMBER = re.compile(r"\s*[+-]?\d+(?:\.\d+)?\s*")


@dataclass(frozen=True)
class _Record:
    """One row as it was written.

    Attributes:
        line: the line on which it starts, counted from 1.
        cells: its cells' texts.
        quoted: positions of the cells that were in quotation marks.
        raw: the text, without the line end behind it.
    """

    line: int
    cells: Sequence[str]
    quoted: tuple[int, ...]
    raw: str


class _Malformed(Exception):
    """A quotation mark that does not fit, and the line on which its row starts."""

    def __init__(self, line: int, what: str) -> None:
        super().__init__(what)
        self.line = line


def read_delimited(
    text: str, name: str, delimiter: str
) -> tuple[tuple[str, ...], tuple[tuple[int, dict[str, str] | str], ...]]:
    """The columns' names, and per row its line and its cells by column, or what is wrong with it.

    Columns without a name are left out. Another delimiter is taken if the header holds only that one: commas,
    semicolons as Excel writes them in much of Europe, or tabs; a first line such as ``sep=;`` names it.

    Args:
        text: all of it, not blank.
        name: the file's name, for messages.
        delimiter: the one that the file's suffix stands for.

    Raises:
        DataError: quotation marks that do not fit or that swallow rows, or a column's name that is there twice.
    """
    first_line = 1
    if (named := re.match(r"sep=(.)(?:\r\n|\n|\r)", text)) is not None:
        delimiter, text, first_line = named[1], text[named.end() :], 2
    else:
        delimiter = _delimiter(text, delimiter)
    if delimiter == "\t":
        records = _tabbed(text, first_line)
    else:
        try:
            records = _records(text, delimiter, first_line)
        except _Malformed as error:
            raise DataError(
                f"{name}:{error.line}: expected cells in the quoting of CSV, found {error}; write a cell that holds a "
                f'quotation mark as "...""...", or give the rows as JSON Lines or as TSV without quoting.'
            ) from None
        _check_swallowed(records, name, delimiter)
    if not records:
        return (), ()
    return _by_column(records, name)


def _delimiter(text: str, own: str) -> str:
    """The file's own delimiter, or the only other one by which its header and most of its rows are split alike."""
    lines = [line for line in _LINE_END.split(text) if line]
    header = lines[0] if lines else ""
    if own in header:
        return own
    for other in (";", "\t", ","):
        width = header.count(other)
        if width and 2 * sum(line.count(other) >= width for line in lines) > len(lines):
            return other
    return own


def _by_column(
    records: Sequence[_Record], name: str
) -> tuple[tuple[str, ...], tuple[tuple[int, dict[str, str] | str], ...]]:
    header, body = records[0], records[1:]
    places = {column: place for place, column in enumerate(header.cells) if column.strip()}
    for place, column in enumerate(header.cells):
        if column.strip() and column in header.cells[:place]:
            raise DataError(
                f"{name}:{header.line}: expected column names that differ, found {quoted(column)} twice; "
                f"rename a column."
            )
    width = len(header.cells)
    least = 1 + max(places.values(), default=0)
    rows: list[tuple[int, dict[str, str] | str]] = []
    for record in body:
        cells = record.cells
        if len(cells) < least or any(cell.strip() for cell in cells[width:]):
            rows.append((record.line, f"expected {width} cells as in the header, found {len(cells)}"))
        else:
            rows.append((record.line, {column: cells[place] for column, place in places.items()}))
    _warn_of_unnamed(header, body, name)
    return tuple(places), tuple(rows)


def _warn_of_unnamed(header: _Record, body: Sequence[_Record], name: str) -> None:
    """Says that text is left out where only some rows go on in columns without a name, as texts cut at a comma do."""
    unnamed = [place for place, column in enumerate(header.cells) if not column.strip()]
    filled = [record for record in body if any("".join(record.cells[i : i + 1]).strip() for i in unnamed)]
    if filled and len(filled) < len(body):
        warnings.warn(
            f"{name}:{filled[0].line}: text in columns without a name is not used; {len(filled):,} of "
            f"{counted(len(body), 'row')} hold some; name the columns to use it",
            SoftPromptWarning,
            stacklevel=2,
        )


# From text to records


def _records(text: str, delimiter: str, first_line: int) -> list[_Record]:
    """The rows in the quoting of RFC 4180; lines that hold nothing are skipped.

    Raises:
        _Malformed: a cell that begins with a quotation mark does not end with one.
    """
    mark = re.escape(delimiter)
    cell = re.compile(rf'"(?P<inner>[^"]*(?:""[^"]*)*)"(?={mark}|[\r\n]|\Z)|(?!")[^{mark}\r\n]*')
    records: list[_Record] = []
    start, line = 0, first_line
    while start < len(text):
        found = _LINE_END.search(text, start)
        end = found.start() if found else len(text)
        plain = text[start:end]
        if '"' not in plain:
            if plain:
                records.append(_Record(line, plain.split(delimiter), (), plain))
            start, line = found.end() if found else end, line + 1
            continue
        cells: list[str] = []
        in_marks: list[int] = []
        place = start
        while True:
            match = cell.match(text, place)
            if match is None:
                closed = re.compile(r'"[^"]*(?:""[^"]*)*"').match(text, place) is not None
                what = "text behind a closing quotation mark" if closed else "a quotation mark that is never closed"
                raise _Malformed(line, what)
            if match["inner"] is None:
                cells.append(match[0])
            else:
                in_marks.append(len(cells))
                cells.append(match["inner"].replace('""', '"'))
            place = match.end()
            if not text.startswith(delimiter, place):
                break
            place += len(delimiter)
        raw = text[start:place]
        records.append(_Record(line, cells, tuple(in_marks), raw))
        behind = _LINE_END.match(text, place)
        start, line = behind.end() if behind else place, line + 1 + len(_LINE_END.findall(raw))
    return records


def _tabbed(text: str, first_line: int) -> list[_Record]:
    """The rows of a file with tabs: one a line with quotation marks as text, or quoted if it really is."""
    lines = text.split("\n" if "\n" in text else "\r")
    plain = [
        _Record(number, line.split("\t"), (), line)
        for number, line in enumerate((line.removesuffix("\r") for line in lines), start=first_line)
        if line
    ]
    if not any(cell.startswith('"') for record in plain for cell in record.cells):
        return plain
    try:
        records = _records(text, "\t", first_line)
    except _Malformed:
        return plain
    return records if _really_quoted(records, plain) else plain


def _really_quoted(records: Sequence[_Record], plain: Sequence[_Record]) -> bool:
    """Whether a CSV writer wrote this: it puts a cell in marks for a reason, and always for that reason."""
    width = len(records[0].cells)
    bare = [cell for record in records for i, cell in enumerate(record.cells) if i not in record.quoted]
    if any('"' in cell for cell in bare) or any(_swallowed(record, width, "\t") for record in records):
        return False
    if sum(len(record.cells) != width for record in records) > sum(len(record.cells) != width for record in plain):
        return False
    body = records[1:]
    without_need = {
        (i, "," in record.cells[i])
        for record in body
        for i in record.quoted
        if re.search(r'["\t\r\n]', record.cells[i]) is None
    }
    at_commas = not any("," in cell for cell in bare)  # as Excel writes text with tabs
    return all(
        (comma and at_commas)
        or all(i in record.quoted for record in body if i < len(record.cells) and record.cells[i] != "")
        for i, comma in without_need
    )


# Quoted cells that swallow rows


def _swallowed(record: _Record, width: int, delimiter: str) -> list[tuple[int, list[str]]]:
    """The lines in a quoted cell that would be rows of their own: each one's place among the record's, and its cells.

    Of a cell that really goes over several lines, the first line alone or the last alone may well have as many cells
    as a row, but not both, and not those between.
    """
    lines = _LINE_END.split(record.raw) if record.quoted else []
    if len(lines) < 2:
        return []
    split = [(place, line.split(delimiter)) for place, line in enumerate(lines)]
    rows = [(place, cells) for place, cells in split if len(cells) == width]
    between = [row for row in rows if 0 < row[0] < len(lines) - 1]
    both_ends = len(split[0][1]) == len(split[-1][1]) == width
    return rows if between or both_ends else []


def _check_swallowed(records: Sequence[_Record], name: str, delimiter: str) -> None:
    """Refuses a quoted cell whose lines look like rows, and warns of one whose lines might be.

    Prose holds commas, so its lines may have as many cells as a row has. They look like rows if what would stand in
    some other column is a value of that column in other rows, or a number where all of those are numbers.
    """
    width = len(records[0].cells) if records else 0
    doubtful = [(record, rows) for record in records[1:] if (rows := _swallowed(record, width, delimiter))]
    if not doubtful:
        return
    columns = [_Column(records[1:], place) for place in range(width)]
    for record, rows in doubtful:
        last = len(_LINE_END.findall(record.raw))
        over_lines = {i for i in record.quoted if _LINE_END.search(record.cells[i])}
        for place in set(range(width)) - over_lines:
            # the record's own cells stand in its first line before the quoted cell, and in its last line behind it
            own = 0 if place < min(over_lines) else last
            told = [columns[place].takes(cells[place], record) for line, cells in rows if line != own]
            if told and 2 * sum(told) >= max(len(told), last - 1):
                raise DataError(
                    f"{name}:{record.line}: expected a row a line, found a quotation mark that opens here and closes "
                    f"{counted(last, 'line')} below, with text between that looks like rows; write a cell that "
                    f'holds a quotation mark as "...""...", or give the rows as JSON Lines or as TSV without quoting.'
                )
    first = doubtful[0][0]
    quoting = [record for record in records if record.quoted]
    if len(doubtful) == len(quoting) and not any('"' in record.cells[i] for record in quoting for i in record.quoted):
        warnings.warn(  # nothing else tells that marks are quoting in this file
            f"{name}:{first.line}: a quoted cell goes over {len(_LINE_END.findall(first.raw)) + 1} lines, each of "
            f"which could be a row; if they are rows, its quotation marks are text and must be doubled",
            SoftPromptWarning,
            stacklevel=2,
        )


class _Column:
    """The cells of one column, to tell whether a text looks like one of them."""

    def __init__(self, records: Sequence[_Record], place: int) -> None:
        self.place = place
        self.count = Counter(record.cells[place] for record in records if place < len(record.cells))
        self.wordy = sum(count for text, count in self.count.items() if not _NUMBER.fullmatch(text))

    def takes(self, text: str, record: _Record) -> bool:
        """Whether the text is a cell of another record, or a number as the cells of all other records are."""
        own = record.cells[self.place] if self.place < len(record.cells) else None
        if self.count[text] > (own == text):
            return text.strip() != ""
        others_are_numbers = self.wordy == (own is not None and not _NUMBER.fullmatch(own)) and len(self.count) > 2
        return others_are_numbers and _NUMBER.fullmatch(text) is not None
