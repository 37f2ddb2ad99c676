"""A template as messages of the base model's own chat template, one message's content as embeddings.

vLLM's chat endpoint takes embeddings as a part of a message's content, writes the chat template around them, and
tokenizes that text as a whole. Here is found out whether that gives the tokens that a template gives, text by text.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from softprompt.errors import TemplateError
from softprompt.text.chat import rendered
from softprompt.text.template import Part, Template, escaped
from softprompt.text.tokens import SOFT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACEHOLDER = "<prompt_embeds>"
"""What vLLM writes in the place of embeddings, as a special token, before it tokenizes."""

_ROLES = (("user",), ("system", "user"))

_REST = "rest of the content"


@dataclass(frozen=True)
class Message:
    """A message of a conversation.

    Attributes:
        role: who speaks.
        parts: literal text, fields and the soft prompt, as of ``Template``.
    """

    role: str
    parts: tuple[Part, ...]

    @property
    def has_soft_prompt(self) -> bool:
        """Whether its content is to be embeddings."""
        return any(part.kind == "soft" for part in self.parts)

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that stand in it."""
        return tuple(part.value for part in self.parts if part.kind == "field")

    def text(self, fields: Mapping[str, str]) -> str:
        """Its content, with nothing in the soft prompt's place."""
        return "".join(fields[part.value] if part.kind == "field" else part.value for part in self.parts)


@dataclass(frozen=True)
class Splice:
    """A sequence as messages.

    Attributes:
        messages: role and text of each; None for the message whose content is embeddings.
        before, behind: how many tokens of the sequence stand before and behind these embeddings, ``SOFT`` counted as
            one.
    """

    messages: tuple[tuple[str, str | None], ...]
    before: int
    behind: int

    def content(self, ids: Sequence[int]) -> Sequence[int]:
        """The part of a sequence's ids that is to be embedded."""
        return ids[self.before : len(ids) - self.behind]

    def conversation(self, embedded: str) -> list[dict[str, Any]]:
        """The messages as vLLM's chat endpoint takes them.

        Args:
            embedded: the embeddings ``[T, H]`` of ``content``, as ``torch.save`` writes them, in base64.
        """
        part = {"type": "prompt_embeds", "data": embedded}
        return [{"role": role, "content": [part] if text is None else text} for role, text in self.messages]


class Splicer:
    """Sees templates of one base model as messages; to be used from one thread at a time."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Prepares to look.

        Args:
            tokenizer: of the base model; it is copied.
        """
        self._tokenizer: Any = copy.deepcopy(tokenizer)
        self._tokenizer.add_special_tokens({"additional_special_tokens": [PLACEHOLDER]})
        self._placeholder = self._tokenizer.convert_tokens_to_ids(PLACEHOLDER)
        # A chat template that goes through the parts of a content gets them as a list from vLLM, any other as text.
        takes_parts = re.search(r"\bfor\s+\w+\s+in\s[^%]*content", str(tokenizer.chat_template))
        self._forms = (False, True) if takes_parts else (False,)
        self._found = lru_cache(maxsize=256)(self._messages)

    def messages(self, template: Template) -> tuple[Message, ...]:
        """The messages that the chat template renders to a template's text.

        Raises:
            TemplateError: there are none with the soft prompt in the content of one of them; the message is a reason,
                not a sentence.
        """
        found = self._found(template)
        if isinstance(found, str):
            raise TemplateError(found)
        return found

    def _messages(self, template: Template) -> tuple[Message, ...] | str:
        """The messages, or why there are none."""
        if not self._tokenizer.chat_template:
            return "the base model has no chat template"
        if "strftime_now" in str(self._tokenizer.chat_template):
            return "the base model's chat template writes the day's date"
        for roles in _ROLES:
            asked = [{"role": role, "content": f"{{message {place}}}"} for place, role in enumerate(roles)]
            try:
                text = rendered(self._tokenizer, asked, None, answer_follows=True)
            except TemplateError:
                continue  # it takes no such roles
            found = self._matched(template, re.split(r"\{message \d\}", text), roles)
            if sum(message.has_soft_prompt for message in found) == 1:
                return found
        return "the template does not place the soft prompt within a message of the base model's chat template"

    def _matched(self, template: Template, literal: Sequence[str], roles: Sequence[str]) -> tuple[Message, ...]:
        """The messages between a chat template's literal text; none if a template has not this text."""
        bos = self._tokenizer.bos_token or ""  # a template may leave it to the tokenizer
        written = template.text.removesuffix("{target}")
        for first in dict.fromkeys((literal[0], literal[0].removeprefix(bos))):
            pattern = "(.*)".join(re.escape(escaped(piece)) for piece in (first, *literal[1:]))
            match = re.fullmatch(pattern, written, re.DOTALL)
            if match is not None:
                return tuple(map(Message, roles, map(_parts, match.groups())))
        return ()

    def splice(self, template: Template, fields: Mapping[str, str], ids: Sequence[int]) -> Splice:
        """A sequence of a template as messages.

        Args:
            template: with a soft prompt.
            fields: the texts in it.
            ids: the sequence's tokens, ``SOFT`` in the soft prompt's place.

        Raises:
            TemplateError: the template is no conversation, or vLLM would make other tokens of it; the message is a
                reason, not a sentence.
        """
        messages = self.messages(template)
        texts = tuple((one.role, None if one.has_soft_prompt else one.text(fields)) for one in messages)
        found = {self._around(texts, as_parts) for as_parts in self._forms}
        before, behind = found.pop() if len(found) == 1 else ((), ())
        end = len(ids) - len(behind)
        if not (behind and ids[: len(before)] == before and ids[end:] == behind and SOFT in ids[len(before) : end]):
            raise TemplateError("vLLM makes other tokens of this text, since it tokenizes the whole conversation")
        return Splice(texts, len(before), len(behind))

    def _around(
        self, texts: Sequence[tuple[str, str | None]], as_parts: bool
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The tokens before and behind the embeddings, as vLLM makes them; none where it would find no place."""
        contents = [(role, PLACEHOLDER if text is None else text) for role, text in texts]
        conversation = [
            {"role": role, "content": [{"type": "text", "text": text}] if as_parts else text} for role, text in contents
        ]
        try:
            text = self._tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        except Exception:  # Jinja code of the model: whatever it raises
            return (), ()
        ids = tuple(self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        if ids.count(self._placeholder) != 1:
            return (), ()
        place = ids.index(self._placeholder)
        return ids[:place], ids[place + 1 :]


def _parts(text: str) -> tuple[Part, ...]:
    """Literal text, fields and soft prompt of a stretch of a template."""
    parts = Template(f"{text}{{{_REST}}}{{target}}").parts
    return tuple(part for part in parts if part.kind != "target" and part != Part("field", _REST))
