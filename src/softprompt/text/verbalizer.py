"""Class labels and the words that stand for them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        """Reads ``positive,negative``, ``good=positive|great,bad=negative|awful``, or a file of labels.

        A file ``labels.json`` holds an object that maps each label to its word or a list of its words; use it for
        labels with a comma, ``=`` or ``|``. Or it holds names of numbered labels (``label_names``), as a file
        ``labels.txt`` does. Blanks around labels and words are dropped in the text, and kept in ``labels.json``.

        Raises:
            TemplateError: the file cannot be read or has another content, or the labels do not make a verbalizer.
        """
        text = os.fspath(text_or_path)
        if names := label_names(text):
            return cls(_distinct((name, (name,)) for name in names.values()))
        if text.lower().endswith(".json"):
            return cls(_distinct(_words(*_read_json(local_path(text)))))
        pairs: list[tuple[str, tuple[str, ...]]] = []
        for item in text.removeprefix("\ufeff").split(","):
            label, equals, words = item.partition("=")
            several = words.split("|") if equals else [label]
            pairs.append((label.strip(), tuple(word.strip() for word in several)))
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


def label_names(source: StrPath | Mapping[Any, Any]) -> dict[str, str]:
    """Number of a label, as text → its name, where a file or a mapping says such; else empty.

    A file ``.txt`` holds a name a line and ``.json`` a list of names, numbered from 0, or an object, name → number, as
    ``label2id`` of a classifier. A mapping has the numbers as integers, on either side. An object ``{"0": "negative"}``
    is none of these: it gives the label 0 the word "negative".

    Raises:
        TemplateError: the file cannot be read, or gives a number twice.
    """
    if isinstance(source, Mapping):
        return _numbered(list(source.items()))
    text = os.fspath(source)
    path = local_path(text)
    if text.lower().endswith(".txt"):
        try:
            lines = [line.strip() for line in decode(path.read_bytes()).split("\n")]
        except OSError as error:
            raise TemplateError(
                f"Expected names of labels in {path}, found: {error.strerror or error}; check the path."
            ) from error
        except ValueError as error:
            raise TemplateError(f"Expected names of labels in {path}, found an error ({error}); correct it.") from error
        while lines and not lines[-1]:
            lines.pop()
        return {str(number): name for number, name in enumerate(lines)}
    if not text.lower().endswith(".json"):
        return {}
    _, value = _read_json(path)
    if isinstance(value, list):
        if not all(isinstance(name, str) for name in value):
            raise TemplateError(
                f"Expected a list of names of labels in {path}, found something else in it; correct it."
            )
        return {str(number): name for number, name in enumerate(value)}
    return _numbered(value) if isinstance(value, tuple) else {}


def _numbered(pairs: Sequence[tuple[Any, Any]]) -> dict[str, str]:
    """Number → name of pairs that are such, one way or the other; else empty."""
    if not pairs:
        return {}
    if all(isinstance(name, str) and type(number) is int for name, number in pairs):
        pairs = [(number, name) for name, number in pairs]
    numbers = all(type(number) is int and number >= 0 for number, _ in pairs)
    if not numbers or any(not isinstance(name, str) or re.fullmatch(r"[\d.]*", name.strip()) for _, name in pairs):
        return {}
    names: dict[str, str] = {}
    for number, name in pairs:
        if str(number) in names:
            raise TemplateError(f"Expected each number of a label once, found {number} twice; correct it.")
        names[str(number)] = name
    return names


def _read_json(path: Path) -> tuple[Path, Any]:
    """The path and what the file holds, an object as a tuple of pairs, so that a label given twice is seen."""
    expected = f"Expected a JSON object of labels and their words in {path}"
    try:
        return path, json.loads(decode(path.read_bytes()), object_pairs_hook=tuple)
    except OSError as error:
        raise TemplateError(f"{expected}, found: {error.strerror or error}; check the path.") from error
    except (ValueError, RecursionError) as error:  # malformed JSON, or not UTF-8
        raise TemplateError(f"{expected}, found an error ({error}); correct it.") from error


def _words(path: Path, pairs: Any) -> list[tuple[str, tuple[str, ...]]]:
    expected = f"Expected a JSON object of labels and their words in {path}"
    if not isinstance(pairs, tuple):
        raise TemplateError(f'{expected}, found no object; write one such as {{"good": ["great"], "bad": "awful"}}.')
    words: list[tuple[str, tuple[str, ...]]] = []
    for label, value in pairs:
        listed = [value] if isinstance(value, str) else value
        if not isinstance(listed, list) or not all(isinstance(word, str) for word in listed):
            raise TemplateError(f"{expected}, found something else for {label!r}; give a string or a list of strings.")
        words.append((label, tuple(listed)))
    return words
