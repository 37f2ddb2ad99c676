"""What an option of several commands says of the template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from softprompt.cli.options import with_line_ends
from softprompt.data.checks import Reading
from softprompt.data.columns import Columns
from softprompt.data.example import Dataset
from softprompt.data.reading import read_rows
from softprompt.errors import TemplateError
from softprompt.tasks.reading import Labels, numbers_of, read_task, taken_for
from softprompt.text.template import Template
from softprompt.text.verbalizer import Verbalizer


def template_from(text: str) -> Template:
    """A user's template, ``\\n`` in it being a line end.

    Raises:
        TemplateError: it breaks the rules, or has no place for a soft prompt.
    """
    template = Template(with_line_ends(text))
    if not template.has_soft_prompt:
        raise TemplateError(
            f"Expected {{soft_prompt}} in the template, found none in {template.text!r}; "
            f"put it where the soft prompt shall stand."
        )
    return template


@dataclass(frozen=True)
class Sources:
    """Training and validation data and their labels, as the options say.

    Attributes:
        train: a file or data set.
        validation: another; None: there is none.
        labels: ``--labels``, or what a plan says.
        columns: what is where in them.
    """

    train: str
    validation: str | None
    labels: Labels | None
    columns: Columns

    def read(
        self, names: Sequence[str] | None, format: str | None = None
    ) -> tuple[Dataset, Dataset | None, Verbalizer | None]:
        """Reads them for a template with the fields ``names``, or None for those of their format: ``format``, if the
        options say none.

        Without ``--labels``, targets that look like labels are; a column of references that was named makes them free
        text.

        Raises:
            ConfigError: labels and a column of references together, or an unknown encoding.
            DataError: data that cannot be read, or labels that cannot be meant.
        """
        columns = replace(self.columns, format=self.columns.format or format)
        return read_task(self.train, self.validation, self.labels, names, columns)

    def read_test(self, test: str, train: Dataset, verbalizer: Verbalizer | None) -> Dataset:
        """Rows of the task that ``train`` holds.

        Raises:
            DataError: they cannot be read.
        """
        return read_rows(
            test,
            replace(self.columns, format=self.columns.format or train.format),
            fields=tuple(train.examples[0].fields),
            labels=None if verbalizer is None else verbalizer.labels,
            label_names=numbers_of(self.labels),
        )

    def taken_for(
        self, train: Dataset, validation: Dataset | None, test: Dataset | None, verbalizer: Verbalizer | None
    ) -> Reading:
        """What the data were taken for."""
        return taken_for(train, validation, test, verbalizer, self.labels, self.columns)


def task_name(train: str) -> str:
    """The file's name, or its folder's where the file is called after its split."""
    path = Path(train.removeprefix("hf:"))
    return path.parent.name if path.stem.startswith("train") and path.parent.name else path.stem
