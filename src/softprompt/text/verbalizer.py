"""Class labels and the words that stand for them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from softprompt.data.encoding import decode
from softprompt.errors import TemplateError
from softprompt.files import StrPath, local_path
from softprompt.text.encoder import Encoder


@dataclass(frozen=True)
class Verbalizer:
    """Class label → the words that stand for it as target.

    Attributes:
        words: label → its words, in order; at least 2 labels, each with at least 1 word that is not blank, and no word
            twice.

    Raises:
        TemplateError: the words break one of these rules.
    """

    words: Mapping[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        if len(self.words) < 2:
            found = ", ".join(self.words) or "none"
            raise TemplateError(f"Expected at least 2 labels in the verbalizer, found {found}; give all labels.")
        owner: dict[str, str] = {}
        for label, words in self.words.items():
            if not label.strip() or not words or not all(word.strip() for word in words):
                raise TemplateError(
                    f"Expected each label of the verbalizer with words that are not blank, found {label!r} with "
                    f"{list(words)!r}; give each label at least one word."
                )
            for word in words:
                if word in owner:
                    raise TemplateError(
                        f"Expected words in the verbalizer that differ, found {word!r} for {owner[word]!r} and again "
                        f"for {label!r}; remove one."
                    )
                owner[word] = label

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels in order."""
        return tuple(self.words)

    @classmethod
    def from_labels(cls, labels: Iterable[str]) -> Verbalizer:
        """Each label stands for itself.

        Raises:
            TemplateError: fewer than 2 labels, or a label is blank or repeated.
        """
        return cls(_distinct((label, (label,)) for label in labels))

    @classmethod
    def parse(cls, text_or_path: StrPath) -> Verbalizer:
        """Reads ``positive,negative``, ``good=positive|great,bad=negative|awful``, or a file ``labels.json``.

        The file holds an object that maps each label to its word or a list of its words; use it for labels with a
        comma, ``=`` or ``|``. Blanks around labels and words are dropped in the text, and kept in the file.

        Raises:
            TemplateError: the file cannot be read or has another content, or the labels do not make a verbalizer.
        """
        text = os.fspath(text_or_path)
        if text.lower().endswith(".json"):
            return cls(_distinct(_read_words(local_path(text))))
        pairs: list[tuple[str, tuple[str, ...]]] = []
        for item in text.removeprefix("\ufeff").split(","):
            label, equals, words = item.partition("=")
            names = words.split("|") if equals else [label]
            pairs.append((label.strip(), tuple(name.strip() for name in names)))
        return cls(_distinct(pairs))

    def token_ids(self, encoder: Encoder) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Per label and word, its token ids as the template places them, without an end.

        One word's ids may be the start of another's ("1", "10"), which ``Task`` sees to.

        Raises:
            TemplateError: two words have the same ids, so no score could tell them apart.
        """
        ids = tuple(tuple(encoder.target_ids(word) for word in words) for words in self.words.values())
        seen: dict[tuple[int, ...], str] = {}
        for words, rows in zip(self.words.values(), ids, strict=True):
            for word, row in zip(words, rows, strict=True):
                if row in seen:
                    raise TemplateError(
                        f"Expected words in the verbalizer that the base model's tokenizer tells apart, found the same "
                        f"tokens for {seen[row]!r} and {word!r}; choose another word for one of them."
                    )
                seen[row] = word
        return ids


def _distinct(pairs: Iterable[tuple[str, tuple[str, ...]]]) -> dict[str, tuple[str, ...]]:
    words: dict[str, tuple[str, ...]] = {}
    for label, label_words in pairs:
        if any("\ud800" <= letter <= "\udfff" for text in (label, *label_words) for letter in text):
            raise TemplateError(f"Expected UTF-8 in the labels, found other bytes in {label!r}; convert them.")
        if label in words:
            raise TemplateError(
                f"Expected each label of the verbalizer once, found {label!r} twice; join its words with |."
            )
        words[label] = label_words
    return words


def _read_words(path: Path) -> list[tuple[str, tuple[str, ...]]]:
    expected = f"Expected a JSON object of labels and their words in {path}"
    try:
        # pairs instead of a dict, so that a label given twice is seen
        pairs = json.loads(decode(path.read_bytes()), object_pairs_hook=tuple)
    except OSError as error:
        raise TemplateError(f"{expected}, found: {error.strerror or error}; check the path.") from error
    except (ValueError, RecursionError) as error:  # malformed JSON, or not UTF-8
        raise TemplateError(f"{expected}, found an error ({error}); correct it.") from error
    if not isinstance(pairs, tuple):
        raise TemplateError(f'{expected}, found no object; write one such as {{"good": ["great"], "bad": "awful"}}.')
    words: list[tuple[str, tuple[str, ...]]] = []
    for label, value in pairs:
        listed = [value] if isinstance(value, str) else value
        if not isinstance(listed, list) or not all(isinstance(word, str) for word in listed):
            raise TemplateError(f"{expected}, found something else for {label!r}; give a string or a list of strings.")
        words.append((label, tuple(listed)))
    return words
