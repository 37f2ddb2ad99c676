"""What data are taken for, in one line, and what in them is probably a mistake, in a sentence each."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from softprompt.data.example import MOST_LABELS, MOST_WORDS, Dataset, Example, difference, folded
from softprompt.data.wording import counted, listed, quoted
from softprompt.errors import DataError

FEW_INPUTS = 4
"""Rows, and distinct targets, for each distinct input from which on inputs and targets may have been swapped."""
SHOWN = 10
"""Labels that are shown with their rows; of more, the largest and the smallest are."""


@dataclass(frozen=True)
class Reading:
    """What data were taken for.

    Attributes:
        rows: number of rows to train with, those held back for validation included.
        validation_rows: number of rows of the validation data; 0 if there are none.
        labels: label → its number of rows to train with, in the order of the labels; None for free text.
        distinct: how many targets differ.
        columns: field, ``target`` or ``references`` → the column it was read from.
        blank: field → rows in which it is blank, without those that never are.
        chosen: whether labels or free text were asked for, or there is no choice, rather than told from the targets.
        format: what the columns were taken for, one of ``softprompt.data.formats.FORMATS``.
        recognised: whether that was told from the columns.
        conversations: how many conversations the rows are answers of; 0 if they are not.
        label_names: number of a label in the data → its name.
        doubts: what is probably a mistake, as sentences without a full stop.
    """

    rows: int
    validation_rows: int
    labels: Mapping[str, int] | None
    distinct: int
    columns: Mapping[str, str]
    blank: Mapping[str, int]
    chosen: bool
    doubts: tuple[str, ...]
    format: str = "none"
    recognised: bool = False
    conversations: int = 0
    label_names: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line, such as ``data: 2,488 rows, 2 labels (negative 901, positive 1,587), input from "input", …``."""
        rows = counted(self.rows, "row")
        if self.conversations:
            rows = f"{counted(self.rows, 'answer')} of {counted(self.conversations, 'conversation')}"
        if self.validation_rows:
            rows += f" and {self.validation_rows:,} for validation"
        parts = [rows, *([as_format(self.format, self.recognised)] if self.format != "none" else []), self._targets()]
        if self.label_names:
            parts.append(f"names in the place of numbers ({self._names()})")
        for name, column in self.columns.items():
            if name == "references":
                parts.append(f"answers compared with the lists in {quoted(column)}")
            else:
                blank = f" (blank in {counted(self.blank[name], 'row')})" if name in self.blank else ""
                parts.append(f"{name} from {quoted(column)}{blank}")
        line = f"data: {', '.join(parts)}"
        if self.chosen:
            return line
        if self.labels is not None:
            return f"{line}; if the targets are free text, add --labels none"
        return f"{line}; if the targets are labels, add --labels all, or --labels a,b,… with their names"

    def _names(self) -> str:
        """The numbers of labels with their names, of many the first."""
        names = [f"{number} is {_shown(name)}" for number, name in self.label_names.items()]
        return ", ".join(names if len(names) <= SHOWN else [*names[:3], "…", names[-1]])

    def _targets(self) -> str:
        if self.labels is None:
            return f"free text ({counted(self.distinct, 'distinct target')})"

        def named(labels: Sequence[tuple[str, int]]) -> str:
            return ", ".join(f"{_shown(label)} {count:,}" for label, count in labels)

        most_first = sorted(self.labels.items(), key=lambda item: -item[1])
        if len(most_first) <= SHOWN:
            found = named(list(self.labels.items()))
        else:
            found = f"the most {named(most_first[:3])}; the fewest {named(most_first[-3:])}"
        return f"{counted(len(self.labels), 'label')} ({found})"

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "rows": self.rows,
            "validation_rows": self.validation_rows,
            "labels": None if self.labels is None else dict(self.labels),
            "distinct_targets": self.distinct,
            "columns": dict(self.columns),
            "format": self.format,
            **({"conversations": self.conversations} if self.conversations else {}),
            **({"label_names": dict(self.label_names)} if self.label_names else {}),
            "doubts": list(self.doubts),
        }


def reading(
    train: Dataset,
    validation: Dataset | None = None,
    test: Dataset | None = None,
    *,
    labels: Sequence[str] | None,
    chosen: bool = False,
) -> Reading:
    """What data were taken for.

    Args:
        train, validation, test: the data, those that there are.
        labels: the label set; None for free text.
        chosen: whether the user said what the targets are.
    """
    count = Counter(example.target for example in train.examples if example.target is not None)
    blank = Counter(name for example in train.examples for name, text in example.fields.items() if not text.strip())
    return Reading(
        rows=len(train.examples),
        validation_rows=0 if validation is None else len(validation.examples),
        labels=None if labels is None else {label: count[label] for label in labels},
        distinct=len(count),
        columns=train.columns,
        blank=blank,
        chosen=chosen or train.is_chat,
        doubts=tuple(doubts(train, validation, test, labels=labels, chosen=chosen or train.is_chat)),
        format=train.format,
        recognised=train.recognised,
        conversations=len({example.conversation.origin for example in train.examples if example.conversation}),
        label_names=train.label_names,
    )


def as_format(format: str, recognised: bool) -> str:
    """That data are taken for a format, and if nobody asked for it, how to have them read otherwise."""
    return f"taken for the format {format} (if they are not, add --format none)" if recognised else f"format {format}"


def require_label_set(train: Dataset, labels: Sequence[str] | None) -> None:
    """Checks that a label set that was told from the targets can be meant.

    Args:
        train: the data.
        labels: what ``infer_labels`` gave.

    Raises:
        DataError: all rows have the same target, or two labels differ in nothing that people see.
    """
    targets = {example.target for example in train.examples}
    if len(train.examples) > 1 and len(targets) == 1:
        raise DataError(
            f"Expected targets that differ in {train.source}, found {quoted(str(targets.pop()))} in all "
            f"{len(train.examples):,} rows; add rows with other targets, give all labels with --labels, or say "
            f"--labels none to learn this text."
        )
    unseen = [pair for pair in _alike(train, labels or ()) if difference(*pair) != "upper and lower case"]
    if unseen:
        common, rare = unseen[0]
        rows = [example for example in train.examples if example.target == rare]
        more = f" ({len(unseen)} pairs of labels are so)" if len(unseen) > 1 else ""
        raise DataError(
            f"{rows[0].where}: the label {quoted(rare)} of {counted(len(rows), 'row')} differs from {quoted(common)} "
            f"in {difference(common, rare)} only{more}; correct the rows, or say --labels all if both are meant."
        )


def doubts(
    train: Dataset,
    validation: Dataset | None = None,
    test: Dataset | None = None,
    *,
    labels: Sequence[str] | None,
    chosen: bool = False,
) -> list[str]:
    """What in the data is probably a mistake, a sentence without a full stop for each kind; see ``reading``."""
    found = _doubts_of_text(train, chosen) if labels is None else _doubts_of_labels(train, validation, labels, chosen)
    found += _swapped(train)
    parts = (("training", train), ("validation", validation), ("test", test))
    for number, (name, later) in enumerate(parts):
        for earlier_name, earlier in parts[:number]:
            if earlier is None or later is None:
                continue
            known = {_content(example) for example in earlier.examples}
            same = [example for example in later.examples if _content(example) in known]
            if same:
                found.append(
                    f"{len(same):,} of {counted(len(later.examples), f'{name} row')} are {earlier_name} rows, too, "
                    f"with the same input and target{_first(same)}; scores on them come out too good, take them out "
                    f"of one of the two"
                )
    return found


def _doubts_of_text(train: Dataset, chosen: bool) -> list[str]:
    count = Counter(example.target for example in train.examples if example.target is not None)
    if chosen or len(count) < 2 or count.total() < 2 * len(count):
        return []
    long = max(len(target.split()) for target in count)
    if len(count) > MOST_LABELS:
        reason = f"there are more than {MOST_LABELS} of them"
    elif long > MOST_WORDS:
        reason = f"one of them has {long} words, more than {MOST_WORDS}"
    else:
        reason = "most of them are there once, or in rows that are the same"
    return [
        f"the {len(count):,} distinct targets of {count.total():,} rows repeat, but are taken for free text, since "
        f"{reason}; say --labels all if they are labels, or --labels none if they are not"
    ]


def _swapped(train: Dataset) -> list[str]:
    """Says where few inputs stand before many targets, as where two columns were taken for each other."""
    rows = train.examples
    inputs = {_content(example)[0] for example in rows}
    targets = {example.target for example in rows}
    if len(rows) < FEW_INPUTS * len(inputs) or len(targets) < FEW_INPUTS * len(inputs):
        return []
    return [
        f"{counted(len(rows), 'row has', 'rows have')} {counted(len(inputs), 'distinct input')} and {len(targets):,} "
        f"distinct targets; the two columns may have been taken for each other, name them with --input-field and "
        f"--target-field"
    ]


def _doubts_of_labels(train: Dataset, validation: Dataset | None, labels: Sequence[str], chosen: bool) -> list[str]:
    count = Counter(str(example.target) for example in train.examples if example.target is not None)
    found: list[str] = []
    for one, other in _alike(train, labels):
        found.append(
            f"the labels {quoted(one)} ({counted(count[one], 'row')}) and {quoted(other)} "
            f"({counted(count[other], 'row')}) differ in {difference(one, other)} only; "
            f"correct the rows if they are one label"
        )
    edges = [label for label in labels if label != label.strip()]
    if edges:
        found.append(f"labels begin or end with blanks: {listed(edges)}; answers will, too; take the blanks out")
    missing = [label for label in labels if count[label] == 0]
    if missing:
        in_validation = sum(example.target in missing for example in (validation.examples if validation else ()))
        also = f", and {counted(in_validation, 'validation row')} with one" if in_validation else ""
        found.append(f"there is no training row with the labels {listed(missing)}{also}; add some, or leave them out")
    single = [label for label in labels if count[label] == 1]
    if single:
        where = next(example for example in train.examples if example.target in single).where
        found.append(
            f"{counted(len(single), 'label has', 'labels have')} a single row: {listed(single)} ({where}); "
            f"add rows, or correct the label if it is a slip"
        )
    elif not chosen and len(labels) > 50 and len(train.examples) < 10 * len(labels):
        found.append(
            f"{len(train.examples):,} rows are few for {len(labels)} labels, {len(train.examples) / len(labels):.1f} "
            f"each; say --labels none if the targets are free text"
        )
    return found + _contradictions(train)


def _contradictions(train: Dataset) -> list[str]:
    """Says where the same input has several targets."""
    targets: dict[tuple[tuple[str, str], ...], dict[str | None, Example]] = defaultdict(dict)
    for example in train.examples:
        targets[_content(example)[0]].setdefault(example.target, example)
    several = [of_input for of_input in targets.values() if len(of_input) > 1]
    if not several:
        return []
    first, second, *_ = several[0].values()
    return [
        f"{counted(len(several), 'input has', 'inputs have')} different targets in different rows, such as "
        f"{quoted(str(first.target))} ({first.where}) and {quoted(str(second.target))} ({second.where}); correct them, "
        f"since nothing can learn both"
    ]


def _alike(train: Dataset, labels: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of labels that are the same once they are folded, the one with more rows first."""
    count = Counter(example.target for example in train.examples)
    of_form: dict[str, list[str]] = defaultdict(list)
    for label in sorted(labels, key=lambda label: -count[label]):
        of_form[folded(label)].append(label)
    return [(first, other) for first, *others in of_form.values() for other in others]


def _content(example: Example) -> tuple[tuple[tuple[str, str], ...], str | None]:
    return tuple(sorted(example.fields.items())), example.target


def _first(rows: Sequence[Example]) -> str:
    return f" (the first is {rows[0].where})" if rows[0].where else ""


def _shown(label: str) -> str:
    """The label as it is, or in quotes where it could be misread."""
    plain = label.isprintable() and label == label.strip() and not set(label) & set(',;()"') and len(label) <= 40
    return label if plain else quoted(label)
