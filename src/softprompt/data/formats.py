"""In which columns data as people have it keep what a task needs: one's own columns, or those of a known format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from softprompt.data.sources import Table
from softprompt.data.wording import listed
from softprompt.errors import ConfigError, DataError

FORMATS = ("none", "completion", "alpaca", "sharegpt", "messages")
"""What the columns can be taken for: ``none``, a column for each field and ``target``; the rest is in ``_known``."""

ALPACA = ("instruction", "input")
"""The fields of Alpaca's rows; the second may be blank."""

_CHAT = {"sharegpt": "conversations", "messages": "messages"}

_EXPECTED = {
    "completion": '"prompt" and "completion"',
    "alpaca": '"instruction", "output" and, if there is any, "input"',
    "sharegpt": '"conversations"',
    "messages": '"messages"',
}


@dataclass(frozen=True)
class Layout:
    """Where in a row its parts are.

    Attributes:
        format: one of ``FORMATS``.
        recognised: whether it was told from the columns.
        columns: field → column.
        target: the column of the targets.
        chat: columns with lists of messages, whose answers are the targets; of two columns, those in the second. Empty:
            there are none.
        optional: columns that a row may go without.
    """

    format: str
    recognised: bool
    columns: Mapping[str, str]
    target: str
    chat: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


def layout_of(
    table: Table,
    fields: Sequence[str] | None,
    input_field: str | None,
    target_field: str,
    *,
    require_target: bool,
    format: str | None,
) -> Layout:
    """Where in the rows of a table their parts are.

    Args:
        table: the rows.
        fields: the template's fields; None: the format says which there are.
        input_field, target_field: columns that the user names, see ``read_dataset``.
        require_target: whether there must be targets.
        format: one of ``FORMATS``. None: told from the columns, where those of ``none`` are not there and the user
            names none.

    Raises:
        ConfigError: there is no such format.
        DataError: the columns are not those of ``format``.
    """
    names = tuple(fields or ("input",))
    own = {name: input_field if name == "input" and input_field else name for name in names}
    plain = Layout("none", False, own, target_field)
    if format is None:
        needed = {*own.values(), *([target_field] if require_target else [])}
        if input_field is not None or target_field != "target" or needed <= set(table.columns):
            return plain
        found = (_known(name, table, fields, None, target_field, require_target, True) for name in FORMATS[1:])
        return next((layout for layout in found if layout is not None), plain)
    if format == "none":
        return plain
    if format not in FORMATS:
        raise ConfigError(f"The format of the data must be one of {', '.join(FORMATS)}, not {format!r}; choose one.")
    asked = _known(format, table, fields, input_field, target_field, require_target, False)
    if asked is None:
        raise DataError(
            f"Expected the columns {_EXPECTED[format]} of the format {format} in {table.name} for a template with the "
            f"fields {listed(names)}, found {listed(table.columns)}; choose another --format, or name the columns."
        )
    return asked


def _known(
    format: str,
    table: Table,
    fields: Sequence[str] | None,
    input_field: str | None,
    target_field: str,
    require_target: bool,
    recognised: bool,
) -> Layout | None:
    """The layout of a known format, if the table and the template's fields are such; None if not."""

    def there(*columns: str) -> str | None:
        return next((column for column in columns if column in table.columns), None)

    of_one = fields is None or tuple(fields) == ("input",)
    if format in _CHAT:
        column = there(input_field or _CHAT[format])
        if not of_one or column is None or not _holds_lists(table, column):
            return None
        return Layout(format, recognised, {}, target_field, chat=(column,))
    outputs = ("completion", "response") if format == "completion" else ("output", "response")
    target = there(*outputs) if target_field == "target" else there(target_field)
    if target is None and require_target:
        return None
    target = target or outputs[0]
    if format == "completion":
        prompt = there(input_field or "prompt")
        if not of_one or prompt is None:
            return None
        if _holds_lists(table, prompt):
            return Layout(format, recognised, {}, target, chat=(prompt, target))
        return Layout(format, recognised, {"input": prompt}, target)
    instruction, further = there("instruction"), there(input_field or "input", "context")
    if instruction is None:
        return None
    if of_one and further is None:
        return Layout(format, recognised, {"input": instruction}, target)
    named = ALPACA if fields is None else tuple(fields)
    if "instruction" not in named or (recognised and not set(named) <= set(ALPACA)):
        return None
    columns = {name: (further or "input") if name == "input" else name for name in named}
    return Layout(format, recognised, columns, target, optional=(further or "input",))


def _holds_lists(table: Table, column: str) -> bool:
    """Whether a column holds lists, in CSV and TSV written as JSON."""
    cells = (row.get(column) for _, row in table.rows if not isinstance(row, str))
    return any(isinstance(cell, list) or (isinstance(cell, str) and cell.lstrip().startswith("[{")) for cell in cells)
