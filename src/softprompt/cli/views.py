"""Texts and tables of ``inspect`` and ``harden``, which fit into a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from rich.cells import cell_len
from rich.table import Table

from softprompt.drawing.words import shortened, simple_table
from softprompt.terminal.console import stdout

WIDTH = 100
"""Columns that they fit into."""


def section(title: str) -> None:
    stdout.print()
    wrapped(title)


def wrapped(text: str, indent: str = "") -> None:
    stdout.print(textwrap.fill(text, WIDTH, initial_indent=indent, subsequent_indent=indent))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], widths: dict[int, int]) -> Table:
    """A table whose columns in ``widths`` are cut to that many letters, so that no line is too long."""
    table = simple_table(*columns)
    for row in rows:
        table.add_row(*(shortened(cell, widths.get(i, WIDTH)) for i, cell in enumerate(row)))
    return table


def print_table(table: Table) -> None:
    for column in table.columns:  # no narrower in a pipe: cut numbers would be of no use
        column.min_width = max(cell_len(str(text)) for text in (column.header, *column.cells))
    stdout.print(table)
