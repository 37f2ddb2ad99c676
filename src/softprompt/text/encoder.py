"""A template with a tokenizer: examples as tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from softprompt.data.example import Example
from softprompt.errors import TemplateError
from softprompt.text.template import Part, Template
from softprompt.text.tokens import SOFT, Tokens, TokenSequence, around, overlap

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class _Place:
    """A template's part for one tokenizer.

    Attributes:
        part: the part.
        ids: its tokens if it is literal text, ``SOFT`` for the soft prompt.
        lead: the space moved to it from the literal text before it, or nothing.
        starts: whether no text stands before it.
    """

    part: Part
    ids: tuple[int, ...]
    lead: str = ""
    starts: bool = False


class Encoder:
    """A template with a tokenizer: turns examples into tokens. Literal text is tokenized once, here.

    A single space at the end of literal text, directly before a field or the target, is moved to the start of what
    follows ("Answer: " + "positive" becomes "Answer:" + " positive"), since vocabularies of byte-level BPE join a space
    to the word after it. A tokenizer that adds such a space by itself (SentencePiece: a lone "a" becomes "▁a") gets the
    piece without the space; and a piece that goes on without a space is tokenized so that none is added.

    Special tokens are recognised in the template's literal text only: a field's value or a target that spells one is
    plain text. Where the tokenizer puts a beginning-of-sequence token first, so does the encoder, unless the template's
    own text begins with it, at the start or behind a soft prompt that stands there.

    Of an encoder–decoder, a sequence without its target is the encoder's input. It ends with what the tokenizer puts
    behind a text, which T5's tokenizer does (``</s>``). The target is the decoder's: it is tokenized as a text of its
    own, and takes no room from the input.

    Attributes:
        template: the template.
        tokenizer: the tokenizer.
        encoder_decoder: whether it is that of an encoder–decoder.
        num_fixed: tokens besides soft prompt, fields and target.
        known: the tokens of texts that were asked for before; None: they are not kept.
    """

    def __init__(
        self, template: Template, tokenizer: PreTrainedTokenizerBase, *, encoder_decoder: bool = False
    ) -> None:
        self.template = template
        self.tokenizer = tokenizer
        self.encoder_decoder = encoder_decoder
        self.known: dict[tuple[str, bool], tuple[int, ...]] | None = None
        self._special = {
            id for id, token in tokenizer.added_tokens_decoder.items() if token.special and id != tokenizer.unk_token_id
        }
        first = tokenizer.convert_ids_to_tokens(self._raw("a", literal=True)[:1])
        self._adds_space = bool(first) and str(first[0]).startswith(("▁", "Ġ"))
        # Where a piece that goes on without a space is tokenized after one of these, and they do not join it,
        # what follows them are the piece's own tokens.
        marks = {mark: self._raw(mark, literal=True) for mark in ("\n", ".", "0")}
        self._marks = {mark: ids for mark, ids in marks.items() if ids and tokenizer.unk_token_id not in ids}

        bos, end = self._around()
        self._end_ids = end if encoder_decoder else ()
        self._places = self._placed(template.parts, bos)
        behind = self._places[self._places[0].part.kind == "soft"]  # behind a soft prompt that stands first
        self._bos_ids = () if behind.ids[: len(bos)] == bos else bos
        literal = sum(len(place.ids) for place in self._places if place.part.kind == "text")
        self.num_fixed = len(self._bos_ids) + literal + len(self._end_ids)

    def encode(
        self,
        example: Example,
        *,
        num_virtual_tokens: int,
        max_length: int,
        target: str | Tokens | None,
        append_eos: bool,
        reserve: int = 0,
        ahead: int = 0,
    ) -> TokenSequence:
        """One example as tokens, at most ``max_length`` of them.

        Where they are more, tokens are cut from the end of the fields' values, from the longest first until they are
        equally long; never from the template or the target.

        Args:
            example: its fields are used; its own target is not.
            num_virtual_tokens: ``P``; counted only if the template has a soft prompt.
            max_length: tokens that the whole sequence may have, soft prompt and target included.
            target: the text to place as target, its tokens, or None for a sequence that ends before it.
            append_eos: whether the end-of-sequence token follows a target that is a text.
            reserve: tokens to keep free for the target if its own are fewer, for example for generation.
            ahead: virtual tokens before a decoder's input.

        Raises:
            TemplateError: the example lacks a field, the template and the target leave no room for one token of each
                field, or ``append_eos`` is asked of a tokenizer without an end-of-sequence token.
        """
        target_ids = self.target_ids(target, append_eos=append_eos) if isinstance(target, str) else target or ()
        pieces = [self._field(place, example) if place.part.kind == "field" else place.ids for place in self._places]
        is_field = [place.part.kind == "field" for place in self._places]
        lengths = [len(piece) for piece, of_field in zip(pieces, is_field, strict=True) if of_field]
        fixed = self.num_fixed + num_virtual_tokens * self.template.has_soft_prompt
        num_target = max(len(target_ids), reserve)
        if self.encoder_decoder:
            self._require_short(example, num_target, max_length - ahead)
            num_target = 0
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
        ids += self._end_ids
        return TokenSequence(tuple(ids), shared, target_ids, truncated=sum(lengths) > room)

    @property
    def before_soft_prompt(self) -> tuple[int, ...]:
        """The tokens of the template before its soft prompt, the beginning-of-sequence token included; fields have
        none."""
        kinds = [place.part.kind for place in self._places]
        return self._bos_ids + tuple(id for place in self._places[: kinds.index("soft")] for id in place.ids)

    def target_ids(self, target: str, *, append_eos: bool = False) -> tuple[int, ...]:
        """The target's tokens as the template places them, the moved space included.

        Raises:
            TemplateError: ``append_eos`` is asked of a tokenizer without an end-of-sequence token.
        """
        if self.encoder_decoder:
            ids = self._piece(target, literal=False, starts=True)
        else:
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

    def literal_ids(self, text: str) -> tuple[int, ...]:
        """The tokens of literal text that follows something, its special tokens recognised."""
        return tuple(self._piece(text, literal=True, starts=False))

    @cached_property
    def ends(self) -> tuple[tuple[int, ...], ...]:
        """What may stand behind a whole answer, as token ids: the end-of-sequence token, a line end, a blank line.

        The first is what training teaches, and the only one that an encoder–decoder has learned to write. None of them
        is the start of another; a tokenizer that has no token for one goes without it.
        """
        eos, unknown = self.tokenizer.eos_token_id, self.tokenizer.unk_token_id
        found: list[tuple[int, ...]] = [(eos,)] if isinstance(eos, int) else []
        for text in () if self.encoder_decoder else ("\n", "\n\n"):
            ids = tuple(self._piece(text, literal=True, starts=False))
            if ids and unknown not in ids and not overlap([*found, ids]):
                found.append(ids)
        return tuple(found)

    def _placed(self, parts: tuple[Part, ...], bos: tuple[int, ...]) -> tuple[_Place, ...]:
        places: list[_Place] = []
        lead = ""
        starts = True
        for part, following in zip(parts, (*parts[1:], None), strict=True):
            if part.kind == "text":
                moves = following is not None and following.kind in ("field", "target")
                text = part.value.removesuffix(" ") if moves else part.value
                ids = tuple(self._piece(text, literal=True, starts=starts))
                begins = len(places) == 1 and places[0].part.kind == "soft" and ids == bos
                places.append(_Place(part, ids))
                lead = part.value[len(text) :]
                starts = starts and (text == "" or begins)  # text behind the token that begins a sequence is its start
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
        if self.known is None:
            return self._tokenized(text, literal=literal)
        found = self.known.get((text, literal))
        if found is None:
            found = self.known[text, literal] = tuple(self._tokenized(text, literal=literal))
        return list(found)

    def _tokenized(self, text: str, *, literal: bool) -> list[int]:
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

    def _around(self) -> tuple[Tokens, Tokens]:
        """What the tokenizer puts before a text by itself, and behind it."""
        return around(self._raw("a", literal=True), self.tokenizer("a", verbose=False).input_ids)

    def _require_short(self, example: Example, num_target: int, max_length: int) -> None:
        """A decoder has as many places as an encoder, two of which may be taken before the target."""
        if num_target > max_length - 2:
            raise TemplateError(
                f"{_expected_at(example)} a target of at most {max_length - 2} tokens, found {num_target}; "
                "shorten it or choose a longer window."
            )


_RECIPE = """def tokens({arguments}):
    return [
{pieces}
    ]


def piece(text, starts=False):
    def raw(text):
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

{body}
"""

_PLAIN = "    return raw(text)"

_WITHOUT_ADDED_SPACE = """    # this tokenizer puts a space before a text by itself
    if text.startswith(" "):
        return raw(text[1:])
    for mark, ids in () if starts else {marks!r}:
        if raw(mark + text)[: len(ids)] == ids:
            return raw(mark + text)[len(ids) :]
    return raw(text)"""


def recipe(encoder: Encoder) -> str:
    """Python source of ``tokens(text)``, or of ``tokens`` of a template's several fields: the tokens that follow the
    soft prompt, with a tokenizer of transformers alone, as the encoder gives them."""
    fields = encoder.template.fields
    names = {field: f"field_{number}" if len(fields) > 1 else "text" for number, field in enumerate(fields, start=1)}
    kinds = [place.part.kind for place in encoder._places]
    pieces = []
    for place in encoder._places[kinds.index("soft") + 1 :]:
        if place.part.kind == "field":
            text = names[place.part.value] if place.lead == "" else f"{place.lead!r} + {names[place.part.value]}"
            pieces.append(f"        *piece({text}{', starts=True' if place.starts else ''}),")
        elif place.ids:
            comment = f"  # {place.part.value!r}" if place.part.kind == "text" else ""
            pieces.append(f"        {', '.join(map(str, place.ids))},{comment}")
    if encoder._end_ids:
        ending = encoder.tokenizer.decode(list(encoder._end_ids))
        pieces.append(f"        {', '.join(map(str, encoder._end_ids))},  # {ending!r}")
    body = _WITHOUT_ADDED_SPACE.format(marks=tuple(encoder._marks.items())) if encoder._adds_space else _PLAIN
    return _RECIPE.format(arguments=", ".join(names.values()), pieces="\n".join(pieces), body=body)


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
