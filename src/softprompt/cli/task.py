"""What options of several commands say of the task: template, data and labels."""

from __future__ import annotations

from collections.abc import Sequence

from softprompt.cli.options import (
    references_column,
    with_line_ends,
)
from softprompt.data.checks import Reading, reading, require_label_set
from softprompt.data.example import Dataset, check_targets, infer_labels
from softprompt.data.reading import read_dataset
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


def read_task(
    train: str,
    validation: str | None,
    labels: str | None,
    names: Sequence[str],
    input_field: str | None,
    target: str,
    references: str | None = None,
    encoding: str | None = None,
) -> tuple[Dataset, Dataset | None, Verbalizer | None]:
    """Training and validation data and their labels, as the options of these names say.

    Without ``labels``, targets that look like labels are; a column of references that was named makes them free text.

    Raises:
        ConfigError: labels and a column of references together, or an unknown encoding.
        DataError: data that cannot be read, or labels that cannot be meant.
    """
    named = references not in (None, "none")
    if named and labels not in (None, "none"):
        raise ConfigError(
            "--references-field is for free text, but --labels makes the targets labels; leave one of them out."
        )
    verbalizer = None if labels in (None, "all", "none") else Verbalizer.parse(str(labels))

    def read(source: str) -> Dataset:
        return read_dataset(
            source,
            fields=names,
            input_field=input_field,
            target_field=target,
            references_field=references_column(references),
            encoding=encoding,
        )

    rows = read(train)
    held_out = None if validation is None else read(validation)
    if labels is None and not named:
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
    train: Dataset,
    validation: Dataset | None,
    test: Dataset | None,
    verbalizer: Verbalizer | None,
    labels: str | None,
    references: str | None,
) -> Reading:
    """What the data were taken for; ``labels`` and ``references`` are the options of these names."""
    return reading(
        train,
        validation,
        test,
        labels=None if verbalizer is None else verbalizer.labels,
        chosen=labels is not None or references not in (None, "none"),
    )
