"""From a row with a conversation to examples: one for each answer that is to be learned."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from softprompt.data.example import Conversation, Example
from softprompt.data.wording import kind, listed, quoted

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""Who speaks, as data say it → as chat templates do."""

_BESIDES = ("name", "tool_calls", "tool_call_id")
"""What a message may hold besides its role and text that chat templates look at."""

IMAGES = ("image", "image_url", "input_image", "video", "video_url")
"""Types of parts of a message that are no text, as OpenAI and transformers call them."""


class BadRow(Exception):
    """What is wrong with one row, as "expected ..., found ..."."""


def conversation_examples(
    row: Mapping[str, Any], where: str, columns: Sequence[str], require_target: bool
) -> list[Example]:
    """The answers of a row's conversation.

    Args:
        row: the row.
        where: its place.
        columns: the column of the messages; or of the messages and of those whose answers are learned.
        require_target: if False, one answer is wanted: the one to come or, of a conversation that ends with an answer,
            the last one.

    Raises:
        BadRow: the row holds no conversation with an answer.
    """
    lists = [_messages(row.get(column), column) for column in columns]
    messages = [message for several in lists for message in several]
    if not messages:
        raise BadRow(f"expected messages in the column {quoted(columns[0])}, found an empty list")
    system = row.get("system")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    tools = _tools(row.get("tools"))
    first = len(messages) - len(lists[-1])
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= max(first, 1)]
    if not require_target:
        last = len(messages) - 1
        turns = [last if last in turns else last + 1]
    if not turns:
        raise BadRow(
            f"expected an answer of the assistant behind another message in the column {quoted(columns[-1])}, found "
            f"the roles {listed([message['role'] for message in messages])}"
        )
    return [_example(messages, turn, tools, where) for turn in turns]


def _example(messages: Sequence[dict[str, Any]], turn: int, tools: Any, where: str) -> Example:
    fields: dict[str, str] = {}
    placed = []
    for number, message in enumerate(messages[:turn], start=1):
        name = f"message {number}"
        if message["content"]:
            fields[name] = message["content"]
        placed.append({**message, "content": f"{{{name}}}" if message["content"] else ""})
    if not any(text.strip() for text in fields.values()):
        raise BadRow(f"expected text before message {turn + 1}, found only blanks")
    answer = messages[turn] if turn < len(messages) else None
    if answer is not None and not answer["content"].strip() and "tool_calls" not in answer:
        raise BadRow(f"expected text in message {turn + 1}, of the assistant, found {kind(answer['content'])}")
    conversation = Conversation(
        origin=where,
        before=_json({"messages": placed, "tools": tools}),
        answer=None if answer is None else _json({**answer, "content": "{answer}" if answer["content"] else ""}),
    )
    return Example(
        fields, None if answer is None else answer["content"], (), f"{where}, message {turn + 1}", conversation
    )


def _messages(cell: Any, column: str) -> list[dict[str, Any]]:
    """The messages of a cell, each with ``role``, ``content`` (a text) and what there is of ``_BESIDES``."""
    if isinstance(cell, str):  # CSV and TSV have no lists
        cell = _parsed(cell)
    if not isinstance(cell, list):
        raise BadRow(f"expected a list of messages in the column {quoted(column)}, found {kind(cell)}")
    return [_message(message, number) for number, message in enumerate(cell, start=1)]


def _message(message: Any, number: int) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise BadRow(f"expected an object as message {number}, found {kind(message)}")
    keys = ("from", "value") if "from" in message else ("role", "content")
    role = message.get(keys[0])
    if not isinstance(role, str) or role.lower() not in ROLES:
        found = quoted(role) if isinstance(role, str) else kind(role)
        raise BadRow(f"expected who speaks, such as user or assistant, as {quoted(keys[0])} of message {number}, "
                     f"found {found}")  # fmt: skip
    kept = {"role": ROLES[role.lower()], "content": _text(message.get(keys[1]), number)}
    return kept | {key: _without_null(message[key]) for key in _BESIDES if message.get(key)}


def _text(content: Any, number: int) -> str:
    """A message's text, of parts those that are text; one that calls tools may go without."""
    if content is None:
        return ""
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                what = part.get("type") if isinstance(part, dict) else None
                found = f"a part of type {quoted(what)}" if isinstance(what, str) else kind(part)
                images = " (a soft prompt learns from text, images are not read)" if what in IMAGES else ""
                raise BadRow(f"expected parts of text in message {number}, found {found}{images}")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise BadRow(f"expected text in message {number}, found {kind(content)}")
    try:
        content.encode()
    except UnicodeEncodeError:
        raise BadRow(f"expected text in message {number}, found half of a surrogate pair") from None
    return content


def _tools(cell: Any) -> list[Any] | None:
    """The tools that the assistant may call; None if there are none."""
    found = _parsed(cell) if isinstance(cell, str) and cell.strip() else cell or None
    if found is not None and not (isinstance(found, list) and all(isinstance(tool, dict) for tool in found)):
        raise BadRow(f'expected a list of tools in the column "tools", found {kind(cell)}')
    return _without_null(found) or None


def _without_null(value: Any) -> Any:
    """The value without keys that hold null: tables of Arrow give each object the keys of all."""
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _json(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
        text.encode()
        return text
    except (TypeError, ValueError) as error:  # no JSON value, or half of a surrogate pair
        raise BadRow(f"expected messages and tools as JSON has them, found an error ({error})") from None
