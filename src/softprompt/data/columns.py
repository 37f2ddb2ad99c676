"""What is where in rows, as a user says it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Columns:
    """How rows are to be read.

    Attributes:
        input_field, target_field, encoding, format: as for ``read_dataset``.
        references_field: the column of further accepted answers to free text; None: ``references``, if it holds lists
            of strings; ``"none"``: no column.
    """

    input_field: str | None = None
    target_field: str = "target"
    references_field: str | None = None
    encoding: str | None = None
    format: str | None = None

    @property
    def names_references(self) -> bool:
        """Whether a column of references was named, which makes the targets free text."""
        return self.references_field not in (None, "none")


AS_FOUND = Columns()
"""Rows that are read as their columns look."""
