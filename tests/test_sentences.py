"""Whatever a sentence advises exists: every command, option and extra that the source names."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import softprompt
from softprompt.cli.main import command_line

GROUP: Any = get_command(command_line())
SOURCES = sorted(Path(softprompt.__file__).parent.rglob("*.py"))
OTHERS = {
    "--enable-prompt-embeds",
    "--nproc-per-node",
    "--enable-prompt-tokens-details",
    "--no-deps",
    "--ignore-requires-python",
    "--chat",
}
"""Options of vLLM and pip, and of the code that an export for vLLM writes, which are named as theirs."""
ARGUMENT = re.compile(r"--[\w:=-]+")
"""What is passed to another program is no sentence."""


def options(command: str) -> set[str]:
    return {name for param in GROUP.commands[command].params for name in (*param.opts, *param.secondary_opts)}


ALL = {"--help", "--version"}.union(*map(options, GROUP.commands))


def texts(source: Path) -> Iterator[tuple[int, str]]:
    """Every text of a file with its line; of an f-string, ``…`` for what is filled in."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
            yield node.lineno, "".join(parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            yield node.lineno, node.value


def faults(text: str) -> list[str]:
    """What a text names that does not exist."""
    found = [word for word in re.findall(r"(?<![\w(-])--[a-z][a-z-]+(?![\w-]|:)", text) if word not in ALL | OTHERS]
    for command, rest in re.findall(r"`softprompt +([a-z]+(?:-[a-z]+)*)([^`\n]*)`", text):
        if command not in GROUP.commands:
            found.append(f"softprompt {command}")
        else:
            found += [word for word in re.findall(r"--[a-z-]+", rest) if word not in options(command) | {"--help"}]
    for command in re.findall(r"^softprompt +([a-z]+(?:-[a-z]+)*) ", text, re.MULTILINE):
        found += [f"softprompt {command}"] * (command not in GROUP.commands)
    extras = metadata("softprompt").get_all("Provides-Extra") or []
    return found + [extra for extra in re.findall(r"softprompt\[(\w+)\]", text) if extra not in extras]


def test_it_finds_what_does_not_exist() -> None:
    assert faults("read with `softprompt swallow`; or --no-such-option") == ["--no-such-option", "softprompt swallow"]
    assert faults("`softprompt rm … --budget` and `softprompt train --help`") == ["--budget"]
    assert faults('pip install "softprompt[everything]"') == ["everything"]
    assert faults("softprompt tune train.jsonl\n") == ["softprompt tune"]
    assert faults("`softprompt lm-train` or `softprompt lm-eval --tasks a`") == ["softprompt lm-train"]
    assert sum(len(list(texts(source))) for source in SOURCES) > 3000


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_what_is_advised_exists(source: Path) -> None:
    sentences = [(line, text) for line, text in texts(source) if not ARGUMENT.fullmatch(text)]
    assert [f"{line}: {fault}" for line, text in sentences for fault in faults(text)] == []
