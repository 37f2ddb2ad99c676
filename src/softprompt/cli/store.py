"""``softprompt list``, ``show`` and ``rm``."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import fields
from typing import Annotated, Any

import typer

from softprompt.cli.options import (
    Json,
    Name,
)
from softprompt.compare.summary import short_names
from softprompt.drawing.words import number, plain_metric, simple_table
from softprompt.soft_prompts import artifact
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.soft_prompts.store import Store
from softprompt.terminal.console import print_json, print_rows, stderr, stdout
from softprompt.tuning.run_folder import RunFolder


def list_command(as_json: Json = False) -> None:
    """List the stored soft prompts.

    The store is the folder $SOFTPROMPT_HOME, by default in the user's data directory.

    \b
    softprompt list
    """
    store = Store()
    entries = store.entries()
    if as_json:
        listed: list[dict[str, Any]] = []
        for entry in entries:
            of_entry = {"name": entry.name, "path": str(entry.path), "bytes": entry.bytes}
            if isinstance(entry.soft_prompt, SoftPrompt):
                listed.append({**of_entry, **_brief(entry.soft_prompt)})
            else:
                listed.append({**of_entry, "error": str(entry.soft_prompt)})
        print_json({"home": str(store.home), "soft_prompts": listed})
        return
    if not entries:
        stderr.print(f"the store {store.home} is empty; see `softprompt train --help` or `softprompt demo`")
        return
    names = short_names(entry.soft_prompt.base for entry in entries if isinstance(entry.soft_prompt, SoftPrompt))
    table = simple_table("name", "base model", ">P", "task", "validation", ">bytes", "created")
    for entry in entries:
        if isinstance(entry.soft_prompt, SoftPrompt):
            brief = _brief(entry.soft_prompt)
            kind = "free text" if brief["labels"] is None else f"{len(brief['labels'])} labels"
            metric = next(iter(brief["metrics"]), None)
            value = "" if metric is None else f"{metric['metric']} {number(metric['metric'], metric['value'])}"
            base = names[brief["base"]]
            length = str(brief["num_virtual_tokens"])
            table.add_row(entry.name, base, length, kind, value, f"{entry.bytes:,}", str(brief["created"])[:10])
        else:
            table.add_row(entry.name, "(unreadable)", "", "", "", f"{entry.bytes:,}", "")
            stderr.print(f"warning: {entry.soft_prompt}")
    stdout.print(table)


def _brief(soft_prompt: SoftPrompt) -> dict[str, Any]:
    return {
        "base": soft_prompt.base,
        "num_virtual_tokens": soft_prompt.num_virtual_tokens,
        "labels": None if soft_prompt.verbalizer is None else list(soft_prompt.verbalizer),
        "metrics": list(soft_prompt.metrics),
        "created": soft_prompt.created,
    }


def show_command(name: Name, as_json: Json = False) -> None:
    """Show all that a soft prompt's file says, except its numbers.

    \b
    softprompt show sst2
    softprompt show ./sst2.safetensors --json
    """
    path = Store().find(name)
    soft_prompt = artifact.load(path)
    document = {
        "path": str(path),
        "bytes": path.stat().st_size,
        **soft_prompt.sizes,
        **{field.name: getattr(soft_prompt, field.name) for field in fields(SoftPrompt) if field.name != "vectors"},
    }
    if as_json:
        print_json(document)
        return
    rows: list[tuple[str, str]] = []
    for key, value in document.items():
        if key == "metrics":
            rows += [(f"metrics.{metric.get('split')}", plain_metric(metric)) for metric in value]
        elif isinstance(value, dict):
            rows += [(f"{key}.{part}", _plain(inner)) for part, inner in value.items()]
        else:
            rows.append((key, _plain(value)))
    print_rows(rows)


def _plain(value: object) -> str:
    return value if isinstance(value, str) and value.isprintable() else json.dumps(value, ensure_ascii=False)


def rm_command(names: Annotated[list[str], typer.Argument(metavar="N…", help="Names in the store.")]) -> None:
    """Delete soft prompts from the store, and what their trainings left behind.

    \b
    softprompt rm sst2 qa
    """
    store = Store()
    stored = set(store.names())
    with ExitStack() as held:
        runs = {}
        for name in dict.fromkeys(names):
            if store.run_folder(name).is_dir():  # a run that was stopped may have left no soft prompt
                runs[name] = held.enter_context(RunFolder(store.run_folder(name), name))
            else:
                store.find(name)
        for name in dict.fromkeys(names):
            if name in stored:
                store.remove(name)
            if name in runs:
                runs[name].remove()
            stdout.print(f"removed {name}")
