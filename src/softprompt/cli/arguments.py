"""``--bases A B`` as people write it, for click, which wants ``--bases A --bases B``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def spread(group: Any, arguments: Sequence[str]) -> list[str]:
    """The arguments with every option that may be given several times repeated before each of the words behind it.

    Which options these are, and how many positional arguments a command has, is what ``group`` declares. Positional
    arguments that stand nowhere else are the last of the words: in ``compare --methods a b train.jsonl``, the file. A
    command with any number of them, such as ``predict N [TEXT…]``, must have one elsewhere; otherwise each option has
    one word, and the others are positional. ``--`` ends the words of an option.

    Args:
        group: click's group of commands.
        arguments: what was typed behind the program's name.
    """
    place = next((i for i, word in enumerate(arguments) if not word.startswith("-")), len(arguments))
    command = group.commands.get(arguments[place]) if place < len(arguments) else None
    if command is None:
        return list(arguments)
    parts, free = _parts(command, arguments[place + 1 :])
    counts = [param.nargs for param in command.params if param.param_type_name == "argument"]
    required = sum(count for count in counts if count > 0)
    only_one = -1 in counts and free <= required
    last = max((i for i, (option, _) in enumerate(parts) if option), default=-1)
    found = list(arguments[: place + 1])
    for i, (option, words) in enumerate(parts):
        values = words if option else []
        if only_one:
            values = values[:1]
        elif i == last and free < required:
            values = words[: max(1, len(words) - (required - free))]
        found += [part for value in values for part in (option, value)] + words[len(values) :]
    return found


def _parts(command: Any, words: Sequence[str]) -> tuple[list[tuple[str, list[str]]], int]:
    """The words behind a command in their order: each option that takes several, with its words, and all else under
    ``""``; and how many of all else are positional arguments."""
    options = [param for param in command.params if param.param_type_name == "option"]
    several = {name for param in options if param.multiple for name in param.opts}
    single = {name for param in options if not param.multiple and not param.is_flag for name in param.opts}
    parts: list[tuple[str, list[str]]] = []
    free, i = 0, 0
    while i < len(words):
        word = words[i]
        if word == "--":
            return [*parts, ("", list(words[i:]))], free + len(words) - i - 1
        if word in several | single:
            value = list(words[i + 1 : i + 2])  # whatever it looks like
            parts.append((word, value) if word in several and value else ("", [word, *value]))
            if value and value[0].startswith("-"):
                parts.append(("", []))
            i += 1
        elif word.startswith("-") and word != "-":
            parts.append(("", [word]))
        elif parts and parts[-1][0] and word != "-":
            parts[-1][1].append(word)
        else:
            parts.append(("", [word]))
            free += 1
        i += 1
    return parts, free
