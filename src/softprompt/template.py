"""The template: the one object that places soft prompt, input fields and target in a sequence of tokens.

Training, evaluation, prediction, serving and every baseline build their sequences here, so that methods differ in
nothing else. Each piece of a template is tokenized on its own: what the tokens before the target are never depends on
the target, so a sequence at inference is the start of the sequence in training.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from softprompt.data import Example
from softprompt.encoding import decode
from softprompt.errors import TemplateError
from softprompt.files import StrPath, local_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SOFT = -1
"""Stands in a sequence of token ids for the place of the soft prompt: one entry for all of its virtual tokens."""

DEFAULT_TEMPLATE = "{soft_prompt}Text: {input}\nLabel: {target}"

_PIECE = re.compile(r"\{\{|\}\}|\{(?P<name>[^{}]*)\}|[{}]")
_NAME = re.compile(r"[^\W\d][\w.-]*( [\w.-]+)*")  # no !r, :>10 or [0] of Python's format strings


@dataclass(frozen=True)
class TokenSequence:
    """One example as tokens.

    Attributes:
        ids: token ids before the target; may hold one ``SOFT``.
        shared: how many of the first entries of ``ids`` do not depend on the example (``SOFT`` counts 1).
        target_ids: the target's token ids, with the end-of-sequence token where it was asked for; empty without target.
        truncated: whether tokens of the input fields were cut.
    """

    ids: tuple[int, ...]
    shared: int
    target_ids: tuple[int, ...]
    truncated: bool


@dataclass(frozen=True)
class _Part:
    kind: Literal["text", "soft", "field", "target"]
    value: str = ""  # the literal text, or the field's name


@dataclass(frozen=True)
class Template:
    """Where soft prompt, input fields and target stand in one sequence.

    ``{soft_prompt}`` stands at most once, ``{target}`` once and last, at least one input field by name (a field may be
    repeated), and ``{{`` and ``}}`` for literal braces. A field's name begins with a letter or ``_`` and goes on with
    letters, digits, ``_``, ``-``, ``.`` and single spaces.

    Attributes:
        text: the template as it was written.
        fields: the input fields' names, each once, in order of appearance.
        has_soft_prompt: whether ``{soft_prompt}`` is in it.

    Raises:
        TemplateError: the text breaks one of these rules; the sentence says where.
    """

    text: str
    fields: tuple[str, ...] = field(init=False, repr=False, compare=False)
    has_soft_prompt: bool = field(init=False, repr=False, compare=False)
    _parts: tuple[_Part, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        parts = _parse(self.text)
        names = dict.fromkeys(part.value for part in parts if part.kind == "field")
        if not names:
            raise TemplateError(
                f"Expected an input field such as {{input}} in the template, found none in {self.text!r}; add one."
            )
        object.__setattr__(self, "fields", tuple(names))
        object.__setattr__(self, "has_soft_prompt", any(part.kind == "soft" for part in parts))
        object.__setattr__(self, "_parts", parts)

    def replace_soft_prompt(self, hard_text: str) -> Template:
        """The template with a hard prompt, which may be empty, in the soft prompt's place.

        The hard text is literal text from here on and is tokenized as one piece with the literal text beside it.
        """
        parts = (_Part("text", hard_text) if part.kind == "soft" else part for part in self._parts)
        return Template("".join(map(_written, parts)))

    def with_shots(self, shots: Sequence[tuple[Mapping[str, str], str]]) -> Template:
        """The template behind worked examples of itself, a blank line after each; the hard prompt of few-shot learning.

        The examples are literal text from here on, so that they are a shared prefix and a chat model's turns stay its
        turns. The joined text is tokenized as one piece: at the borders of fields its tokens may differ from those of
        a row. The soft prompt's place, if there is one, moves to the first example.

        Args:
            shots: each an example's fields and its target.
        """
        parts: list[_Part] = []
        for number, (fields, target) in enumerate(shots):
            for part in self._parts:
                if part.kind == "field":
                    parts.append(_Part("text", fields[part.value]))
                elif part.kind == "target":
                    parts.append(_Part("text", target))
                elif part.kind == "text" or number == 0:
                    parts.append(part)
            parts.append(_Part("text", "\n\n"))
        parts += [part for part in self._parts if part.kind != "soft" or not shots]
        return Template("".join(map(_written, parts)))

    def bind(self, tokenizer: PreTrainedTokenizerBase) -> Encoder:
        """The template together with a tokenizer; its literal text is tokenized once, here."""
        return Encoder(self, tokenizer)


def default_template(labelled: bool) -> Template:
    """The template for targets that are labels, or for free text, where the user writes none."""
    return Template(DEFAULT_TEMPLATE if labelled else "{soft_prompt}Input: {input}\nOutput: {target}")


def chat_template(tokenizer: PreTrainedTokenizerBase) -> Template:
    """A chat model's own template for one message of the user: ``{soft_prompt}{input}``, then the answer's start.

    The tokenizer's chat template is rendered once, here; what it inserts (a system message, a date) stays as it is.

    Raises:
        TemplateError: the tokenizer has no chat template, or one that does not render such a message as it is.
    """
    if not tokenizer.chat_template:
        raise TemplateError(
            "Expected a base model with a chat template, found a tokenizer without one; write a template instead."
        )
    place = "{soft_prompt}{input}"
    message = [{"role": "user", "content": place}]
    try:
        rendered = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # Jinja code of the model: whatever it raises
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise TemplateError(
            f"Expected a chat template that takes one message of the user, found one that fails ({reason}); "
            f"write a template instead."
        ) from error
    before, *rest = rendered.split(place)
    if len(rest) != 1:
        raise TemplateError(
            f"Expected a chat template that repeats the message once, found one that does so {len(rest)} times; "
            f"write a template instead."
        )
    return Template(f"{_escaped(before)}{place}{_escaped(rest[0])}{{target}}")


def _parse(text: str) -> tuple[_Part, ...]:
    parts: list[_Part] = []
    literal = ""
    end = 0
    for match in _PIECE.finditer(text):
        literal += text[end : match.start()]
        end = match.end()
        token, name, place = match[0], match["name"], f"at character {match.start() + 1} of {text!r}"
        if token in ("{{", "}}"):
            literal += token[0]
            continue
        if name is None:
            raise TemplateError(
                f"Expected braces in pairs in the template, found {token} alone {place}; "
                f"close it, or write {token}{token} for a literal brace."
            )
        if not _NAME.fullmatch(name):
            raise TemplateError(
                f"Expected a field's name between braces in the template, found {token} {place}; "
                f"write {{{{ and }}}} for literal braces."
            )
        if literal:
            parts.append(_Part("text", literal))
            literal = ""
        part = {"soft_prompt": _Part("soft"), "target": _Part("target")}.get(name, _Part("field", name))
        if part.kind != "field" and part in parts:
            raise TemplateError(f"Expected {token} once in the template, found another {place}; remove one.")
        parts.append(part)
    literal += text[end:]
    if literal:
        parts.append(_Part("text", literal))
    if _Part("target") not in parts:
        raise TemplateError(f"Expected {{target}} at the end of the template, found none in {text!r}; append it.")
    if parts[-1].kind != "target":
        after = "".join(map(_written, parts[parts.index(_Part("target")) + 1 :]))
        raise TemplateError(
            f"Expected {{target}} at the end of the template, found {after!r} after it in {text!r}; move it to the end."
        )
    return tuple(parts)


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _written(part: _Part) -> str:
    """The part as it is written in a template."""
    return {"text": _escaped(part.value), "soft": "{soft_prompt}", "field": f"{{{part.value}}}", "target": "{target}"}[
        part.kind
    ]


@dataclass(frozen=True)
class _Place:
    """A template's part for one tokenizer.

    Attributes:
        part: the part.
        ids: its tokens if it is literal text, ``SOFT`` for the soft prompt.
        lead: the space moved to it from the literal text before it, or nothing.
        starts: whether no text stands before it.
    """

    part: _Part
    ids: tuple[int, ...]
    lead: str = ""
    starts: bool = False


class Encoder:
    """A template bound to a tokenizer: turns examples into tokens.

    A single space at the end of literal text, directly before a field or the target, is moved to the start of what
    follows ("Answer: " + "positive" becomes "Answer:" + " positive"), since vocabularies of byte-level BPE join a space
    to the word after it. A tokenizer that adds such a space by itself (SentencePiece: a lone "a" becomes "▁a") gets the
    piece without the space; and a piece that goes on without a space is tokenized so that none is added.

    Special tokens are recognised in the template's literal text only: a field's value or a target that spells one is
    plain text. Where the tokenizer puts a beginning-of-sequence token first, so does the encoder, unless the template's
    own text begins with it.

    Attributes:
        template: the template.
        tokenizer: the tokenizer.
        num_fixed: tokens besides soft prompt, fields and target.
    """

    def __init__(self, template: Template, tokenizer: PreTrainedTokenizerBase) -> None:
        self.template = template
        self.tokenizer = tokenizer
        self._special = {
            id for id, token in tokenizer.added_tokens_decoder.items() if token.special and id != tokenizer.unk_token_id
        }
        first = tokenizer.convert_ids_to_tokens(self._raw("a", literal=True)[:1])
        self._adds_space = bool(first) and str(first[0]).startswith(("▁", "Ġ"))
        # Where a piece that goes on without a space is tokenized after one of these, and they do not join it,
        # what follows them are the piece's own tokens.
        marks = {mark: self._raw(mark, literal=True) for mark in ("\n", ".", "0")}
        self._marks = {mark: ids for mark, ids in marks.items() if ids and tokenizer.unk_token_id not in ids}

        self._places = self._placed(template._parts)
        bos = self._bos()
        self._bos_ids = () if self._places[0].ids[: len(bos)] == bos else bos
        literal = sum(len(place.ids) for place in self._places if place.part.kind == "text")
        self.num_fixed = len(self._bos_ids) + literal

    def encode(
        self,
        example: Example,
        *,
        num_virtual_tokens: int,
        max_length: int,
        target: str | None,
        append_eos: bool,
        reserve: int = 0,
    ) -> TokenSequence:
        """One example as tokens, at most ``max_length`` of them.

        Where they are more, tokens are cut from the end of the fields' values, from the longest first until they are
        equally long; never from the template or the target.

        Args:
            example: its fields are used; its own target is not.
            num_virtual_tokens: ``P``; counted only if the template has a soft prompt.
            max_length: tokens that the whole sequence may have, soft prompt and target included.
            target: the text to place as target, or None for a sequence that ends before it.
            append_eos: whether the end-of-sequence token follows the target.
            reserve: tokens to keep free for the target if its own are fewer, for example for generation.

        Raises:
            TemplateError: the example lacks a field, the template and the target leave no room for one token of each
                field, or ``append_eos`` is asked of a tokenizer without an end-of-sequence token.
        """
        target_ids = () if target is None else self.target_ids(target, append_eos=append_eos)
        pieces = [self._field(place, example) if place.part.kind == "field" else place.ids for place in self._places]
        is_field = [place.part.kind == "field" for place in self._places]
        lengths = [len(piece) for piece, of_field in zip(pieces, is_field, strict=True) if of_field]
        fixed = self.num_fixed + num_virtual_tokens * self.template.has_soft_prompt
        num_target = max(len(target_ids), reserve)
        room = max_length - fixed - num_target
        needed = sum(length > 0 for length in lengths)
        if room < needed:
            raise TemplateError(
                f"{_expected_at(example)} at most {max_length} tokens, found {fixed} of template and soft prompt, "
                f"{num_target} of the target and at least {needed} of the input; "
                f"shorten one of them or choose a longer window."
            )

        ids = list(self._bos_ids)
        shared: int | None = None
        kept = iter(_fair_shares(lengths, room))
        for piece, of_field in zip(pieces, is_field, strict=True):
            if of_field and shared is None:
                shared = len(ids)
            ids += piece[: next(kept)] if of_field else piece
        assert shared is not None  # a template has at least one field
        return TokenSequence(tuple(ids), shared, target_ids, truncated=sum(lengths) > room)

    def target_ids(self, target: str, *, append_eos: bool = False) -> tuple[int, ...]:
        """The target's tokens as the template places them, the moved space included.

        Raises:
            TemplateError: ``append_eos`` is asked of a tokenizer without an end-of-sequence token.
        """
        ids = self._piece(self._places[-1].lead + target, literal=False, starts=False)
        if append_eos:
            eos = self.tokenizer.eos_token_id
            if not isinstance(eos, int):
                raise TemplateError(
                    "Expected a tokenizer with an end-of-sequence token to end the targets with, found none; "
                    "choose another base model."
                )
            ids.append(eos)
        return tuple(ids)

    @cached_property
    def ends(self) -> tuple[tuple[int, ...], ...]:
        """What may stand behind a whole answer, as token ids: the end-of-sequence token, a line end, a blank line.

        The first is what training teaches. None of them is the start of another; a tokenizer that has no token for
        one goes without it.
        """
        eos, unknown = self.tokenizer.eos_token_id, self.tokenizer.unk_token_id
        found: list[tuple[int, ...]] = [(eos,)] if isinstance(eos, int) else []
        for text in ("\n", "\n\n"):
            ids = tuple(self._piece(text, literal=True, starts=False))
            if ids and unknown not in ids and not overlap([*found, ids]):
                found.append(ids)
        return tuple(found)

    def _placed(self, parts: tuple[_Part, ...]) -> tuple[_Place, ...]:
        places: list[_Place] = []
        lead = ""
        starts = True
        for part, following in zip(parts, (*parts[1:], None), strict=True):
            if part.kind == "text":
                moves = following is not None and following.kind in ("field", "target")
                text = part.value.removesuffix(" ") if moves else part.value
                places.append(_Place(part, tuple(self._piece(text, literal=True, starts=starts))))
                lead = part.value[len(text) :]
                starts = starts and text == ""
            else:
                places.append(_Place(part, (SOFT,) if part.kind == "soft" else (), lead, starts))
                lead = ""
                starts = starts and part.kind == "soft"
        return tuple(places)

    def _field(self, place: _Place, example: Example) -> tuple[int, ...]:
        name = place.part.value
        if name not in example.fields:
            raise TemplateError(
                f"{_expected_at(example)} a text for the template's field {{{name}}}, found none; "
                f"give it, or choose a template without this field."
            )
        return tuple(self._piece(place.lead + example.fields[name], literal=False, starts=place.starts))

    def _piece(self, text: str, *, literal: bool, starts: bool) -> list[int]:
        """The tokens of a piece of the text as they are where it stands."""
        if not self._adds_space or text == "":
            return self._raw(text, literal=literal)
        if text.startswith(" "):
            return self._raw(text[1:], literal=literal)
        if not starts:
            for mark, mark_ids in self._marks.items():
                ids = self._raw(mark + text, literal=literal)
                if ids[: len(mark_ids)] == mark_ids:
                    return ids[len(mark_ids) :]
        return self._raw(text, literal=literal)

    def _raw(self, text: str, *, literal: bool) -> list[int]:
        """The tokenizer's tokens; special tokens are recognised only in literal text."""
        ids: list[int] = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=not literal, verbose=False
        ).input_ids
        if literal or self._special.isdisjoint(ids):
            return ids
        # A Unigram model has its special tokens in its own vocabulary and takes them for words: spell those out.
        spelled: list[int] = []
        for id in ids:
            if id in self._special:
                letters = map(self.tokenizer.convert_tokens_to_ids, str(self.tokenizer.convert_ids_to_tokens(id)))
                spelled += [letter for letter in letters if isinstance(letter, int)]  # None: not even an unknown token
            else:
                spelled.append(id)
        return spelled

    def _bos(self) -> tuple[int, ...]:
        """What the tokenizer puts before a text by itself."""
        bare = self._raw("a", literal=True)
        full: list[int] = self.tokenizer("a", verbose=False).input_ids
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return tuple(full[:start])
        return ()


def _expected_at(example: Example) -> str:
    return f"{example.where}: expected" if example.where else "Expected"


def _fair_shares(lengths: list[int], room: int) -> list[int]:
    """How many tokens each of several values keeps: at most ``room`` in all, cut from the longest."""
    kept = [0] * len(lengths)
    shortest_first = sorted(range(len(lengths)), key=lengths.__getitem__)
    for rank, index in enumerate(shortest_first):
        kept[index] = min(lengths[index], room // (len(lengths) - rank))
        room -= kept[index]
    return kept


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


def overlap(words: Iterable[tuple[int, ...]] | Iterable[str]) -> bool:
    """Whether one of the words, as token ids or text, is the start of another: then the longer one can never be the
    more probable of the two, unless both have an end."""
    ordered: list[Any] = sorted(words)
    return any(second[: len(first)] == first for first, second in pairwise(ordered))


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
