"""Data as people have it → checked training and validation rows, and the labels that their targets are taken for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from softprompt.data.checks import Reading, reading, require_label_set
from softprompt.data.example import Dataset, check_targets, infer_labels
from softprompt.data.reading import read_dataset
from softprompt.data.sources import Source
from softprompt.errors import ConfigError
from softprompt.text.verbalizer import Verbalizer

Labels = str | Iterable[str] | Mapping[str, str | Sequence[str]] | Verbalizer
"""What says which labels there are: ``"all"`` (each target is one), ``"none"`` (free text), the label set as text
(``Verbalizer.parse``) or as a list, label → its word or words, or a verbalizer."""


def read_task(
    train: Source | Dataset,
    validation: Source | Dataset | None,
    labels: Labels | None,
    names: Sequence[str],
    *,
    input_field: str | None = None,
    target_field: str = "target",
    references_field: str | None = None,
    encoding: str | None = None,
) -> tuple[Dataset, Dataset | None, Verbalizer | None]:
    """Training and validation rows, and the labels; None for free text.

    Args:
        train, validation: data (:func:`softprompt.data.reading.read_dataset`); data sets that were read already are
            used as they are.
        labels: see ``Labels``; None: targets that look like labels are (``infer_labels``), unless a column of
            references is named.
        names: the template's fields.
        input_field, target_field, encoding: as for ``read_dataset``.
        references_field: the column of further accepted answers to free text; ``"none"``: no column.

    Raises:
        ConfigError: labels and a column of references together, or an unknown encoding.
        DataError: data that cannot be read, or labels that cannot be meant.
    """
    named = references_field not in (None, "none")
    if named and labels not in (None, "none"):
        raise ConfigError(
            "--references-field is for free text, but --labels makes the targets labels; leave one of them out."
        )
    verbalizer = None if labels in (None, "all", "none") else verbalizer_of(labels)

    def read(source: Source | Dataset) -> Dataset:
        if isinstance(source, Dataset):
            return source
        return read_dataset(
            source,
            fields=names,
            input_field=input_field,
            target_field=target_field,
            references_field=references_column(references_field),
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


def references_column(name: str | None) -> str | None:
    """What ``read_dataset`` takes for a column of references that a user names: ``"none"`` is no column."""
    return "" if name == "none" else name


def taken_for(
    train: Dataset,
    validation: Dataset | None,
    test: Dataset | None,
    verbalizer: Verbalizer | None,
    labels: Labels | None,
    references_field: str | None,
) -> Reading:
    """What the data were taken for; ``labels`` and ``references_field`` are what ``read_task`` was given."""
    return reading(
        train,
        validation,
        test,
        labels=None if verbalizer is None else verbalizer.labels,
        chosen=labels is not None or references_field not in (None, "none"),
    )


def verbalizer_of(labels: Labels | None) -> Verbalizer:
    """The verbalizer of a label set that is said in one of the forms of ``Labels``; ``"all"`` and ``"none"`` are none.

    Raises:
        TemplateError: the labels make no verbalizer.
    """
    if isinstance(labels, Verbalizer):
        return labels
    if isinstance(labels, str):
        return Verbalizer.parse(labels)
    if isinstance(labels, Mapping):
        return Verbalizer(
            {label: (words,) if isinstance(words, str) else tuple(words) for label, words in labels.items()}
        )
    return Verbalizer.from_labels(labels or ())
