"""The template: the one object that places soft prompt, input fields and target in a sequence of tokens.

Training, evaluation, prediction, serving and every baseline build their sequences here, so that methods differ in
nothing else. Each piece of a template is tokenized on its own: what the tokens before the target are never depends on
the target, so a sequence at inference is the start of the sequence in training.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from softprompt.data.wording import first_line
from softprompt.errors import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_TEMPLATE = "{soft_prompt}Text: {input}\nLabel: {target}"

_PIECE = re.compile(r"\{\{|\}\}|\{(?P<name>[^{}]*)\}|[{}]")

_NAME = re.compile(r"[^\W\d][\w.-]*( [\w.-]+)*")  # no !r, :>10 or [0] of Python's format strings


@dataclass(frozen=True)
class Part:
    """A stretch of literal text, or a place."""

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
        parts: the text, taken apart.

    Raises:
        TemplateError: the text breaks one of these rules; the sentence says where.
    """

    text: str
    fields: tuple[str, ...] = field(init=False, repr=False, compare=False)
    has_soft_prompt: bool = field(init=False, repr=False, compare=False)
    parts: tuple[Part, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        parts = _parse(self.text)
        names = dict.fromkeys(part.value for part in parts if part.kind == "field")
        if not names:
            raise TemplateError(
                f"Expected an input field such as {{input}} in the template, found none in {self.text!r}; add one."
            )
        object.__setattr__(self, "fields", tuple(names))
        object.__setattr__(self, "has_soft_prompt", any(part.kind == "soft" for part in parts))
        object.__setattr__(self, "parts", parts)

    def replace_soft_prompt(self, hard_text: str) -> Template:
        """The template with a hard prompt, which may be empty, in the soft prompt's place.

        The hard text is literal text from here on and is tokenized as one piece with the literal text beside it.
        """
        parts = (Part("text", hard_text) if part.kind == "soft" else part for part in self.parts)
        return Template("".join(map(_written, parts)))

    def with_shots(self, shots: Sequence[tuple[Mapping[str, str], str]]) -> Template:
        """The template behind worked examples of itself, a blank line after each; the hard prompt of few-shot learning.

        The examples are literal text from here on, so that they are a shared prefix and a chat model's turns stay its
        turns. The joined text is tokenized as one piece: at the borders of fields its tokens may differ from those of
        a row. The soft prompt's place, if there is one, moves to the first example.

        Args:
            shots: each an example's fields and its target.
        """
        parts: list[Part] = []
        for number, (fields, target) in enumerate(shots):
            for part in self.parts:
                if part.kind == "field":
                    parts.append(Part("text", fields[part.value]))
                elif part.kind == "target":
                    parts.append(Part("text", target))
                elif part.kind == "text" or number == 0:
                    parts.append(part)
            parts.append(Part("text", "\n\n"))
        parts += [part for part in self.parts if part.kind != "soft" or not shots]
        return Template("".join(map(_written, parts)))


def default_template(labelled: bool) -> Template:
    """The template for targets that are labels, or for free text, where the user writes none."""
    return Template(DEFAULT_TEMPLATE if labelled else "{soft_prompt}Input: {input}\nOutput: {target}")


ALPACA_TEMPLATE = "{soft_prompt}Instruction: {instruction}\n{input}\nOutput: {target}"
"""For Alpaca's rows; the input, which may be blank, has no name in it, so that none stands there alone."""


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
        raise TemplateError(
            f"Expected a chat template that takes one message of the user, found one that fails ({first_line(error)}); "
            f"write a template instead."
        ) from error
    before, *rest = rendered.split(place)
    if len(rest) != 1:
        raise TemplateError(
            f"Expected a chat template that repeats the message once, found one that does so {len(rest)} times; "
            f"write a template instead."
        )
    return Template(f"{escaped(before)}{place}{escaped(rest[0])}{{target}}")


def _parse(text: str) -> tuple[Part, ...]:
    parts: list[Part] = []
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
            parts.append(Part("text", literal))
            literal = ""
        part = {"soft_prompt": Part("soft"), "target": Part("target")}.get(name, Part("field", name))
        if part.kind != "field" and part in parts:
            raise TemplateError(f"Expected {token} once in the template, found another {place}; remove one.")
        parts.append(part)
    literal += text[end:]
    if literal:
        parts.append(Part("text", literal))
    if Part("target") not in parts:
        raise TemplateError(f"Expected {{target}} at the end of the template, found none in {text!r}; append it.")
    if parts[-1].kind != "target":
        after = "".join(map(_written, parts[parts.index(Part("target")) + 1 :]))
        raise TemplateError(
            f"Expected {{target}} at the end of the template, found {after!r} after it in {text!r}; move it to the end."
        )
    return tuple(parts)


def escaped(text: str) -> str:
    """Literal text as it is written in a template."""
    return text.replace("{", "{{").replace("}", "}}")


def _written(part: Part) -> str:
    """The part as it is written in a template."""
    return {"text": escaped(part.value), "soft": "{soft_prompt}", "field": f"{{{part.value}}}", "target": "{target}"}[
        part.kind
    ]
