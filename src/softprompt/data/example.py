"""Examples, data sets of them, and what their targets are taken for."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from softprompt.data.wording import and_more, listed, quoted
from softprompt.errors import DataError

MOST_LABELS, MOST_WORDS = 200, 8
"""What is taken for labels without being asked for: at most so many, each of at most so many words."""


@dataclass(frozen=True)
class Conversation:
    """What stands before one answer of a conversation, and the answer, for a base model's chat template.

    Attributes:
        origin: the place of the row with the whole conversation, the same for all of its answers.
        before: JSON of the messages and of the tools: ``{"messages": [{"role": "user", "content": "{message 1}"}],
            "tools": null}``. The texts of the messages are the example's fields, each named in its place.
        answer: JSON of the answer's message, whose text is named ``{answer}``; None where it is still to come.
    """

    origin: str
    before: str
    answer: str | None


@dataclass(frozen=True)
class Example:
    """One row of a task.

    Attributes:
        fields: name of a template's input field → its text.
        target: the label or text to be produced, or None where it is not known.
        references: further accepted targets, may be empty.
        where: the row's place, for messages: ``train.jsonl:17`` with the line on which the row starts, as an editor
            counts (a header counts, too), ``test.parquet:17`` or ``hf:imdb:train:17`` with the row counted from 1.
        conversation: of an answer in a conversation, what stands around the fields; None: the task's template does.
    """

    fields: Mapping[str, str]
    target: str | None
    references: tuple[str, ...] = ()
    where: str = ""
    conversation: Conversation | None = None


@dataclass(frozen=True)
class Dataset:
    """The examples of one source, at least one.

    Attributes:
        examples: in the order of the source.
        source: what ``read_dataset`` was given.
        columns: field, ``target`` or ``references`` → the column it was read from; without those that there are not.
        fingerprint: SHA-256 hex digest of every example's fields, target and references in order. It does not depend
            on the file's name, format or unused columns.
        format: what the columns were taken for, one of ``softprompt.data.formats.FORMATS``.
        recognised: whether that was told from the columns, rather than asked for.
        label_names: number of a label → its name, where the targets' numbers were replaced by names.
    """

    examples: tuple[Example, ...]
    source: str
    fingerprint: str
    columns: Mapping[str, str] = field(default_factory=dict)
    format: str = "none"
    recognised: bool = False
    label_names: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_chat(self) -> bool:
        """Whether the examples are answers in conversations."""
        return any(example.conversation is not None for example in self.examples)


def check_targets(dataset: Dataset, labels: Sequence[str]) -> None:
    """Checks that every known target is one of the labels.

    Raises:
        DataError: a target is not; the sentence names the first one's place and how many more there are.
    """
    allowed = set(labels)
    bad = [example for example in dataset.examples if example.target is not None and example.target not in allowed]
    if not bad:
        return
    target = str(bad[0].target)
    alike = next((label for label in labels if folded(label) == folded(target)), None)
    differs = "" if alike is None else f", which differs from {quoted(alike)} in {difference(alike, target)} only"
    raise DataError(
        f"{bad[0].where}: expected one of the labels {listed(labels)}, found {quoted(target)}{differs}; "
        f"correct this row{and_more(bad)}, or give all labels with --labels."
    )


def infer_labels(dataset: Dataset) -> tuple[str, ...] | None:
    """The label set if the targets look like labels, sorted by code point; None if they look like free text.

    They are labels if there are 2 to 200 distinct targets of at most 8 words, at least 2 rows a target on average, and
    at least half of them are there twice. Where there are fewer than 5 rows a target, rows that are there twice count
    once: a file of free text that was joined to itself does not hold labels. Rows without a target do not count.
    """
    rows = Counter(example.target for example in dataset.examples if example.target is not None)
    if not 2 <= len(rows) <= MOST_LABELS or any(len(target.split()) > MOST_WORDS for target in rows):
        return None
    if rows.total() < 5 * len(rows):
        once = {(example.target, tuple(sorted(example.fields.items()))) for example in dataset.examples}
        rows = Counter(target for target, _ in once if target is not None)
    repeated = sum(count > 1 for count in rows.values())
    few_and_repeated = rows.total() >= 2 * len(rows) and 2 * repeated >= len(rows)
    return tuple(sorted(rows)) if few_and_repeated else None


def folded(label: str) -> str:
    """What labels have in common that people cannot tell apart, or write in two ways without meaning two labels:
    without blanks at the ends and doubled ones, upper case, and forms of Unicode; ``1.0`` as ``1``."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", _without_blanks(label)).casefold())
    return _without_zeros(_without_blanks(text))


def difference(one: str, other: str) -> str:
    """In what two labels differ that are the same once they are ``folded``."""
    if _without_blanks(one) == _without_blanks(other):
        return "blanks"
    if unicodedata.normalize("NFKC", one) == unicodedata.normalize("NFKC", other):
        return "the form of Unicode"
    if one.casefold() == other.casefold():
        return "upper and lower case"
    if _without_zeros(one) == _without_zeros(other):
        return "the form of numbers"
    return "blanks, case or form"


def _without_zeros(text: str) -> str:
    """A whole number as such: pandas writes 1.0 for the 1 of a column with empty cells."""
    return re.sub(r"^([+-]?\d+)\.0+$", r"\1", text)


def _without_blanks(text: str) -> str:
    """The text with single spaces, without letters that have no width."""
    visible = "".join(letter for letter in text if letter not in "\ufeff\u200b\u2060\u00ad")
    return " ".join(visible.split())
