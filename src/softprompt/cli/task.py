"""What options of several commands say of the task: template, data and labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from softprompt.cli.options import Columns, with_line_ends
from softprompt.data.checks import Reading, reading, require_label_set
from softprompt.data.example import Dataset, check_targets, infer_labels
from softprompt.errors import ConfigError, TemplateError
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
        labels: ``--labels``.
        columns: what is where in them.
    """

    train: str
    validation: str | None
    labels: str | None
    columns: Columns

    def read(self, names: Sequence[str]) -> tuple[Dataset, Dataset | None, Verbalizer | None]:
        """Reads them for a template with the fields ``names``.

        Without ``--labels``, targets that look like labels are; a column of references that was named makes them free
        text.

        Raises:
            ConfigError: labels and a column of references together, or an unknown encoding.
            DataError: data that cannot be read, or labels that cannot be meant.
        """
        labels, free = self.labels, self.columns.names_references
        if free and labels not in (None, "none"):
            raise ConfigError(
                "--references-field is for free text, but --labels makes the targets labels; leave one of them out."
            )
        verbalizer = None if labels in (None, "all", "none") else Verbalizer.parse(str(labels))
        rows = self.columns.read(self.train, names)
        held_out = None if self.validation is None else self.columns.read(self.validation, names)
        if labels is None and not free:
            found = infer_labels(rows)
            require_label_set(rows, found)
            verbalizer = None if found is None else Verbalizer.from_labels(found)
        elif labels == "all":
            examples = (*rows.examples, *(held_out.examples if held_out else ()))
            verbalizer = Verbalizer.from_labels(sorted({str(example.target) for example in examples}))
        if verbalizer is not None:
            for dataset in filter(None, (rows, held_out)):
                check_targets(dataset, verbalizer.labels)
        return rows, held_out, verbalizer

    def taken_for(
        self, train: Dataset, validation: Dataset | None, test: Dataset | None, verbalizer: Verbalizer | None
    ) -> Reading:
        """What the data were taken for."""
        return reading(
            train,
            validation,
            test,
            labels=None if verbalizer is None else verbalizer.labels,
            chosen=self.labels is not None or self.columns.names_references,
        )
