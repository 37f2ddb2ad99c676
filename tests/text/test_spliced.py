"""Templates as messages: which there are, and that the tokens are those of the sequence."""

from __future__ import annotations

from typing import Any

import pytest

from softprompt.data.example import Example
from softprompt.errors import TemplateError
from softprompt.text.encoder import Encoder
from softprompt.text.spliced import Splicer
from softprompt.text.template import Template
from softprompt.text.tokens import SOFT
from tests.conftest import make_tokenizer
from tests.servers import CHAT

PARTS = (
    "{% for message in messages %}{{ message.role }}:\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}"
    "</s>{% endfor %}{% if add_generation_prompt %}assistant:\n{% endif %}"
)
SYSTEM = "system:\n{soft_prompt}</s>user:\n{input}</s>assistant:\n{target}"
BOS = "{{ bos_token }}" + CHAT


def tokenizer_of(chat: str, bos: bool = False) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = chat
    if bos:
        tokenizer.bos_token = "<pad>"
    return tokenizer


def ids_of(tokenizer: Any, template: Template, **fields: str) -> tuple[int, ...]:
    encoder = Encoder(template, tokenizer)
    example = Example(fields, None)
    return encoder.encode(example, num_virtual_tokens=3, max_length=999, target=None, append_eos=False).ids


@pytest.mark.parametrize(
    ("chat", "bos", "text"),
    [
        (CHAT, False, SYSTEM),
        (PARTS, False, SYSTEM),
        (BOS, True, "<pad>" + SYSTEM),
        (CHAT, False, "system:\n{{ be }} {soft_prompt}!</s>user:\n{a} {{or}} {b}</s>assistant:\n{target}"),
        (CHAT, False, "user:\n{a}{soft_prompt}{b}</s>assistant:\n{target}"),
    ],
)
def test_the_tokens_around_the_embeddings_are_those_of_the_sequence(chat: str, bos: bool, text: str) -> None:
    tokenizer, template = tokenizer_of(chat, bos), Template(text)
    fields = dict.fromkeys(template.fields, "a dull film")
    ids = ids_of(tokenizer, template, **fields)
    splice = Splicer(tokenizer).splice(template, fields, ids)
    [role] = [role for role, content in splice.messages if content is None]
    messages = [
        {"role": role, "content": "<mark>" if content is None else content} for role, content in splice.messages
    ]
    written = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before, behind = (tokenizer(piece).input_ids for piece in written.split("<mark>"))
    assert (len(before), len(behind)) == (splice.before, splice.behind)
    assert [*before, *splice.content(ids), *behind] == list(ids)
    assert SOFT in splice.content(ids)
    sent = splice.conversation("AAAA")
    assert [one["content"] for one in sent if one["role"] == role] == [[{"type": "prompt_embeds", "data": "AAAA"}]]


@pytest.mark.parametrize(
    ("chat", "text", "value", "reason"),
    [
        (CHAT, "{soft_prompt}" + SYSTEM.replace("{soft_prompt}", "be brief"), "a", "within a message"),
        (CHAT, SYSTEM.replace("assistant", "other"), "a", "within a message"),
        (CHAT, SYSTEM.replace("\n{target}", "\n {target}"), "a", "within a message"),
        (CHAT, SYSTEM, "</s>", "other tokens"),
        (CHAT, SYSTEM, "<prompt_embeds>", "other tokens"),
        (CHAT.replace("['content']", "['content'] | trim"), SYSTEM, " a", "other tokens"),
        (PARTS.replace("part.text", "part.text ~ '.'"), SYSTEM, "a", "other tokens"),
        (CHAT.replace("['content']", "['content'] * 2"), SYSTEM, "a", "other tokens"),
        ("{{ raise_exception('no') }}", SYSTEM, "a", "within a message"),
        ("", SYSTEM, "a", "no chat template"),
    ],
)
def test_what_would_not_be_the_sequence_is_refused(chat: str, text: str, value: str, reason: str) -> None:
    tokenizer, template = tokenizer_of(chat), Template(text)
    splicer = Splicer(tokenizer)
    for _ in range(2):
        with pytest.raises(TemplateError, match=reason):
            splicer.splice(template, {"input": value}, ids_of(tokenizer, template, input=value))
    assert "<prompt_embeds>" not in tokenizer.get_vocab()  # its own copy alone has it
