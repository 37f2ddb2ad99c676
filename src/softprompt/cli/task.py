"""What an option of several commands says of the template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from softprompt.cli.options import Columns, with_line_ends
from softprompt.data.checks import Reading
from softprompt.data.example import Dataset
from softprompt.data.reading import read_dataset
from softprompt.errors import TemplateError
from softprompt.tasks.reading import Labels, numbers_of, read_task, references_column, taken_for
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
        columns = self.columns
        return read_task(
            self.train,
            self.validation,
            self.labels,
            names,
            input_field=columns.input_field,
            target_field=columns.target_field,
            references_field=columns.references_field,
            encoding=columns.encoding,
            format=columns.format or format,
        )

    def read_test(self, test: str, train: Dataset, verbalizer: Verbalizer | None) -> Dataset:
        """Rows of the task that ``train`` holds.

        Raises:
            DataError: they cannot be read.
        """
        columns = self.columns
        return read_dataset(
            test,
            fields=tuple(train.examples[0].fields),
            input_field=columns.input_field,
            target_field=columns.target_field,
            references_field=references_column(columns.references_field),
            encoding=columns.encoding,
            labels=None if verbalizer is None else verbalizer.labels,
            label_names=numbers_of(self.labels),
            format=columns.format or train.format,
        )

    def taken_for(
        self, train: Dataset, validation: Dataset | None, test: Dataset | None, verbalizer: Verbalizer | None
    ) -> Reading:
        """What the data were taken for."""
        return taken_for(train, validation, test, verbalizer, self.labels, self.columns.references_field)


def task_name(train: str) -> str:
    """The file's name, or its folder's where the file is called after its split."""
    path = Path(train.removeprefix("hf:"))
    return path.parent.name if path.stem.startswith("train") and path.parent.name else path.stem
