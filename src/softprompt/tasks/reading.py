"""Data as people have it → checked training and validation rows, and the labels that their targets are taken for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from softprompt.data.checks import Reading, reading, require_label_set
from softprompt.data.columns import AS_FOUND, Columns
from softprompt.data.example import Dataset, check_targets, infer_labels
from softprompt.data.formats import ALPACA
from softprompt.data.reading import read_rows
from softprompt.data.sources import Source
from softprompt.data.wording import listed
from softprompt.errors import ConfigError, DataError
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.text.chat import user_template
from softprompt.text.template import ALPACA_TEMPLATE, Template, default_template
from softprompt.text.verbalizer import Verbalizer, label_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Labels = str | Iterable[str] | Mapping[str, str | Sequence[str]] | Mapping[int, str] | Verbalizer
"""What says which labels there are: ``"all"`` (each target is one), ``"none"`` (free text), the label set as text
(``Verbalizer.parse``) or as a list, label → its word or words, number of a label in the data → its name, or a
verbalizer."""


def read_task(
    train: Source | Dataset,
    validation: Source | Dataset | None,
    labels: Labels | None,
    names: Sequence[str] | None,
    columns: Columns = AS_FOUND,
) -> tuple[Dataset, Dataset | None, Verbalizer | None]:
    """Training and validation rows, and the labels; None for free text.

    Args:
        train, validation: data (:func:`softprompt.data.reading.read_dataset`); data sets that were read already are
            used as they are.
        labels: see ``Labels``; None: targets that look like labels are (``infer_labels``), unless a column of
            references is named.
        names: the template's fields; None: those of the format.
        columns: what is where in the rows; those for validation are read in the format that those for training have,
            conversations in any.

    Raises:
        ConfigError: labels and a column of references together, or an unknown encoding.
        DataError: data that cannot be read, or labels that cannot be meant.
    """
    named = columns.names_references
    if named and labels not in (None, "none"):
        raise ConfigError(
            "--references-field is for free text, but --labels makes the targets labels; leave one of them out."
        )
    verbalizer = None if labels in (None, "all", "none") else verbalizer_of(labels)
    numbers = numbers_of(labels)

    def read(source: Source | Dataset, names: Sequence[str] | None, columns: Columns) -> Dataset:
        if isinstance(source, Dataset):
            if verbalizer is not None:
                check_targets(source, verbalizer.labels)
            return source
        known = None if verbalizer is None else verbalizer.labels
        return read_rows(source, columns, fields=names, labels=known, label_names=numbers)

    rows = read(train, names, columns)
    fields = names if names is not None or rows.is_chat else tuple(rows.examples[0].fields)
    likewise = columns if rows.is_chat else replace(columns, format=rows.format)
    held_out = None if validation is None else read(validation, fields, likewise)
    if rows.is_chat:
        _require_chat(rows, held_out, labels, named)
        return rows, held_out, None
    if held_out is not None and held_out.is_chat:
        raise DataError(
            f"Expected the format of {rows.source} in {held_out.source}, found conversations; give validation rows of "
            f"the same format, or none."
        )
    if verbalizer is None and labels == "all":
        examples = (*rows.examples, *(held_out.examples if held_out else ()))
        verbalizer = Verbalizer.from_labels(sorted({str(example.target) for example in examples}))
    elif labels is None and not named:
        found = infer_labels(rows)
        require_label_set(rows, found)
        verbalizer = None if found is None else Verbalizer.from_labels(found)
        if verbalizer is not None and held_out is not None:
            check_targets(held_out, verbalizer.labels)
    return rows, held_out, verbalizer


def _require_chat(rows: Dataset, held_out: Dataset | None, labels: Labels | None, references: bool) -> None:
    if labels not in (None, "none") or references:
        option = "--references-field" if references else "--labels"
        raise ConfigError(f"{rows.source} holds conversations, whose answers are free text; leave {option} out.")
    if held_out is not None and not held_out.is_chat:
        raise DataError(
            f"Expected conversations in {held_out.source}, as in {rows.source}, found rows without; give validation "
            f"rows of the same format, or none."
        )


def read_for(
    soft_prompt: SoftPrompt,
    source: Source,
    columns: Columns = AS_FOUND,
    *,
    require_target: bool = True,
) -> Dataset:
    """Rows for a soft prompt that is there already: those of its template's fields and of its labels, or conversations
    if it was tuned on such.

    Args:
        soft_prompt: what shall answer them.
        source: the rows.
        columns: what is where in them.
        require_target: as for ``read_dataset``.

    Raises:
        ConfigError: as for ``read_dataset``.
        DataError: as for ``read_dataset``; or conversations for a soft prompt that was tuned on other rows.
    """
    labels = tuple(soft_prompt.verbalizer or ()) if require_target else None
    fields = Template(soft_prompt.template).fields
    names = soft_prompt.data.get("label_names")
    rows = read_rows(source, columns, fields=fields, require_target=require_target, labels=labels, label_names=names)
    if rows.is_chat and not soft_prompt.is_chat:
        raise DataError(
            f"Expected rows with {listed(fields)}, as the soft prompt {soft_prompt.name!r} was tuned on, found "
            f"conversations in {rows.source}; give such rows, or train a soft prompt on conversations."
        )
    return rows


def require_no_chat(rows: Dataset, what: str) -> None:
    """Refuses conversations where there must be one template for all rows.

    Raises:
        DataError: they are.
    """
    if rows.is_chat:
        raise DataError(
            f"{what} needs rows with one input and one target each, found conversations in {rows.source}; write them "
            f"as such rows."
        )


def form_of(rows: Dataset, tokenizer: PreTrainedTokenizerBase, labelled: bool) -> Template:
    """The template of rows where the user writes none.

    Raises:
        TemplateError: they are conversations, and the tokenizer has no chat template for them.
    """
    if rows.is_chat:
        return user_template(tokenizer)
    names = set(rows.examples[0].fields)
    return Template(ALPACA_TEMPLATE) if names == set(ALPACA) else default_template(labelled)


def numbers_of(labels: Labels | None) -> dict[str, str]:
    """Number of a label in the data, as text → its name, where ``labels`` says such; else empty.

    Raises:
        TemplateError: a file of names cannot be read.
    """
    return label_names(labels) if isinstance(labels, str | Mapping) and labels not in ("all", "none") else {}


def taken_for(
    train: Dataset,
    validation: Dataset | None,
    test: Dataset | None,
    verbalizer: Verbalizer | None,
    labels: Labels | None,
    columns: Columns,
) -> Reading:
    """What the data were taken for; ``labels`` and ``columns`` are what ``read_task`` was given."""
    return reading(
        train,
        validation,
        test,
        labels=None if verbalizer is None else verbalizer.labels,
        chosen=labels is not None or columns.names_references,
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
        if names := label_names(labels):
            return Verbalizer.from_labels(names.values())
        return Verbalizer(
            {str(label): (words,) if isinstance(words, str) else tuple(words) for label, words in labels.items()}
        )
    return Verbalizer.from_labels(labels or ())
