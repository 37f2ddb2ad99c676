"""Conversations by a base model's own chat template: where the messages stand, as a ``Template``.

The chat template is rendered with names in the place of the messages' texts. So the texts become fields, and special
tokens that one of them spells are plain text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from softprompt.data.example import Conversation, Dataset, Example
from softprompt.data.wording import first_line
from softprompt.errors import DataError, TemplateError
from softprompt.text.encoder import Encoder
from softprompt.text.template import Template, escaped

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SOFT_PROMPT = "{soft_prompt}"

_NAMED = re.compile(r"\{(message \d+|input)\}")
_ANSWER = "{answer}"


def conversation_template(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | None = None,
    *,
    opening: str = "",
) -> Template:
    """The template of a conversation up to the answer to its last message.

    Args:
        tokenizer: of the base model.
        messages: with ``role`` and ``content``, which is ``{message 1}``, ``{message 2}`` … or ``{input}``, a field's
            name in braces, or nothing.
        tools: that the assistant may call.
        opening: what stands before the whole conversation, but behind a beginning-of-sequence token that the chat
            template writes: the soft prompt's place, or literal text with its braces doubled.

    Raises:
        TemplateError: there is no chat template, it does not take these messages or leaves one of them out, or tools
            spell a special token.
    """
    text = rendered(tokenizer, messages, tools, answer_follows=True)
    names = [message["content"][1:-1] for message in messages if message["content"]]
    found = {name for name in _NAMED.findall(text) if name in names}
    if len(found) < len(names):
        raise TemplateError(
            "Expected a chat template that repeats every message, found one of the base model that leaves one out; "
            "write a template instead."
        )
    bos = tokenizer.bos_token
    begin = bos if isinstance(bos, str) and bos and opening and text.startswith(bos) else ""
    pieces = _NAMED.split(text.removeprefix(begin))  # literal text and names in turn
    written = [
        f"{{{piece}}}" if place % 2 and piece in names else escaped(f"{{{piece}}}" if place % 2 else piece)
        for place, piece in enumerate(pieces)
    ]
    return Template(f"{escaped(begin)}{opening}{''.join(written)}{{target}}")


def user_template(tokenizer: PreTrainedTokenizerBase) -> Template:
    """A conversation of one message of the user, ``{input}``, with a soft prompt before it.

    Raises:
        TemplateError: see ``conversation_template``.
    """
    return conversation_template(tokenizer, [{"role": "user", "content": "{input}"}], opening=SOFT_PROMPT)


@dataclass(frozen=True)
class Turn:
    """One answer in a conversation, for one tokenizer.

    Attributes:
        encoder: of the conversation before it.
        lead: blanks that the chat template writes before the answer's text.
        before, behind: the literal text that the chat template writes before the answer's text, as it does for calls of
            tools, and behind it, up to the end of the turn, as token ids.
        has_text: whether the answer has a text between the two.
        calls_tools: whether it calls tools.
    """

    encoder: Encoder
    before: tuple[int, ...] = ()
    behind: tuple[int, ...] = ()
    has_text: bool = True
    lead: str = ""
    calls_tools: bool = False

    def target_ids(self, text: str, ends: Collection[int]) -> tuple[int, ...]:
        """The answer's tokens, to the end of the turn; behind it, where that is none of ``ends``, the
        end-of-sequence token, since nothing else would end a text that is generated.

        Raises:
            TemplateError: the tokenizer has no end-of-sequence token where one is needed.
        """
        spelled = self.encoder.target_ids(self.lead + text) if self.has_text else ()
        ids = (*self.before, *spelled, *self.behind)
        if not self.behind or self.behind[-1] not in ends:
            ids += self.encoder.target_ids("", append_eos=True)
        return ids


def turn_of(
    tokenizer: PreTrainedTokenizerBase,
    before: str,
    answer: str | None,
    opening: str,
    *,
    encoder_decoder: bool = False,
) -> Turn:
    """An answer in a conversation.

    Args:
        tokenizer: of the base model.
        before, answer: as of ``Conversation``.
        opening: as for ``conversation_template``.
        encoder_decoder: whether the base model is an encoder–decoder.

    Raises:
        TemplateError: see ``conversation_template``; or the chat template writes calls of tools in no place that can be
            learned.
    """
    given = json.loads(before)
    messages, tools = given["messages"], given["tools"]
    form = conversation_template(tokenizer, messages, tools, opening=opening)
    encoder = Encoder(form, tokenizer, encoder_decoder=encoder_decoder)
    if answer is None:
        return Turn(encoder)
    message = json.loads(answer)
    whole = rendered(tokenizer, [*messages, message], tools, answer_follows=False)
    start = rendered(tokenizer, messages, tools, answer_follows=True)
    if "tool_calls" not in message:
        first, found, rest = whole.rpartition(_ANSWER)
        between = first.removeprefix(start)  # other text than blanks, such as an empty thought, is not to be learned
        ids = encoder.literal_ids(rest) if found else ()
        lead = "" if between.strip() else between
        return Turn(encoder, behind=_to_special(tokenizer, ids, last=False), lead=lead)
    if not whole.startswith(start):
        raise TemplateError(
            "Expected a chat template that writes calls of tools behind the start of an answer, found another one; "
            "leave these rows out, or write the calls as text."
        )
    first, has_text, rest = whole[len(start) :].partition(_ANSWER)
    if not has_text:
        behind = _to_special(tokenizer, encoder.literal_ids(first), last=True)
        return Turn(encoder, behind=behind, has_text=False, calls_tools=True)
    behind = _to_special(tokenizer, encoder.literal_ids(rest), last=True)
    return Turn(encoder, encoder.literal_ids(first), behind, calls_tools=True)


def with_answers(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The data set with every answer that calls tools as the text that would be generated, without special tokens.

    Raises:
        DataError: a conversation that the base model's chat template does not take, with its place.
        TemplateError: there is no chat template.
    """
    if not dataset.is_chat:
        return dataset
    user_template(tokenizer)
    turns: dict[Conversation, Turn] = {}
    examples: list[Example] = []
    problems: list[str] = []
    for example in dataset.examples:
        given = example.conversation
        if given is None:
            examples.append(example)
            continue
        key = Conversation("", given.before, given.answer)
        try:
            turn = turns.get(key) or turn_of(tokenizer, given.before, given.answer, "")
        except TemplateError as error:
            problems.append(f"{example.where}: {str(error)[:1].lower()}{str(error)[1:]}")
            continue
        turns[key] = turn
        text = example.target
        if text is not None and turn.calls_tools:
            ids = list(turn.target_ids(text, turn.behind[-1:]))
            text = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
        examples.append(replace(example, target=text))
    if problems:
        raise DataError(problems[0].removesuffix(".") + f"{_more(problems)}.")
    return replace(dataset, examples=tuple(examples))


def _more(problems: Sequence[str]) -> str:
    more = len(problems) - 1
    return f" ({more:,} more {'answers are' if more > 1 else 'answer is'} so)" if more else ""


def rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | None,
    *,
    answer_follows: bool,
) -> str:
    """The conversation as the base model's chat template writes it, up to the start of an answer if one follows.

    Raises:
        TemplateError: there is no chat template, it does not take these messages, or they spell a special token.
    """
    if not tokenizer.chat_template:
        raise TemplateError(
            "Expected a base model with a chat template for conversations, found a tokenizer without one; choose "
            "another base model, or have other columns read with --format none and a template of your own."
        )
    spelled = json.dumps([messages, tools], ensure_ascii=False)
    for token in tokenizer.added_tokens_decoder.values():
        if token.special and token.content in spelled:
            raise TemplateError(
                f"Expected tools and names without special tokens of the base model, found {token.content!r} in them; "
                f"write it in another way."
            )
    try:
        return str(
            tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=None if tools is None else list(tools),
                tokenize=False,
                add_generation_prompt=answer_follows,
            )
        )
    except Exception as error:  # Jinja code of the model: whatever it raises
        raise TemplateError(
            f"Expected messages that the base model's chat template takes, found some that it does not take "
            f"({first_line(error)}); change their roles or order, or leave them out."
        ) from error


def _to_special(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...], *, last: bool) -> tuple[int, ...]:
    """The tokens up to the first or last special one, which ends the turn; without any, of what stands behind a plain
    answer nothing, of calls of tools all."""
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    places = [place for place, id in enumerate(ids) if id in special]
    if not places:
        return ids if last else ()
    return ids[: places[-1 if last else 0] + 1]
