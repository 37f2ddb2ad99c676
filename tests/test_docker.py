"""The container's files, as far as they can be checked without an engine for containers."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml
from typer.main import get_command

from softprompt.cli.arguments import spread
from softprompt.cli.main import command_line

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
ENTRYPOINT = re.search(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.MULTILINE)
COMPOSE: Any = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))


def parsed(arguments: list[str]) -> dict[str, Any]:
    """The options of a command, which must be known."""
    assert ENTRYPOINT is not None
    program, command, *fixed = json.loads(ENTRYPOINT[1])
    assert (program, command) == ("softprompt", "serve")
    group: Any = get_command(command_line())
    words = spread(group, ["serve", *fixed, *arguments])
    options: dict[str, Any] = group.commands["serve"].make_context("serve", words[1:]).params
    return options


def test_every_file_that_is_copied_is_there_and_sent() -> None:
    rules = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    copied = [name for line in re.findall(r"^COPY (.*)$", DOCKERFILE, re.MULTILINE) for name in line.split()[:-1]]
    assert "src" in copied
    for name in copied:
        assert (ROOT / name).exists()
        sent = [rule for rule in rules if fnmatch(name, rule.removeprefix("!"))]
        assert sent[-1].startswith("!"), f"{name} is not sent"


def test_torch_is_the_pinned_one() -> None:
    (pinned,) = re.findall(r"\btorch==\S+", DOCKERFILE)
    assert pinned in (ROOT / "constraints.txt").read_text(encoding="utf-8").split()


def test_the_server_in_the_container_listens_where_it_is_looked_for() -> None:
    options = parsed([])
    assert (options["host"], options["port"]) == ("0.0.0.0", 8000)
    assert f"EXPOSE {options['port']}\n" in DOCKERFILE
    assert f"127.0.0.1:{options['port']}/health" in DOCKERFILE
    for service in ("local", "gateway"):
        assert COMPOSE["services"][service]["ports"] == [f"127.0.0.1:8000:{options['port']}"]
        assert COMPOSE["services"][service]["stop_grace_period"] == f"{options['time_limit'] + 10:g}s"


def test_the_commands_of_the_services_are_known_to_them() -> None:
    services = COMPOSE["services"]
    assert parsed(services["local"]["command"])["backend"] == "local"
    gateway = parsed(services["gateway"]["command"])
    assert (gateway["backend"], gateway["upstream"]) == ("vllm", ["http://vllm:8000"])
    assert f"--model={gateway['base']}" in services["vllm"]["command"]
    assert "--enable-prompt-embeds" in services["vllm"]["command"]
    assert "ports" not in services["vllm"]  # whoever reaches it can run any embeddings
    assert set(services["gateway"]["networks"]) & set(services["vllm"]["networks"]) == {"inside"}
    assert "default" not in services["vllm"]["networks"]
