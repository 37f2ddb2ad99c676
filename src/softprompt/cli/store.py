"""``softprompt list``, ``show`` and ``rm``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields
from typing import Any

from softprompt.drawing.words import number, plain_metric, short_names, simple_table
from softprompt.soft_prompts import artifact
from softprompt.soft_prompts.metadata import Header, Metadata
from softprompt.soft_prompts.store import Store
from softprompt.terminal.console import print_json, print_rows, stderr, stdout


def show_list(as_json: bool) -> None:
    """Prints what is in the store."""
    store = Store()
    entries = store.entries()
    if as_json:
        listed: list[dict[str, Any]] = []
        for entry in entries:
            of_entry = {"name": entry.name, "path": str(entry.path), "bytes": entry.bytes}
            if isinstance(entry.header, Header):
                listed.append({**of_entry, **_brief(entry.header)})
            else:
                listed.append({**of_entry, "error": str(entry.header)})
        print_json({"home": str(store.home), "soft_prompts": listed})
        return
    if not entries:
        stderr.print(f"the store {store.home} is empty; see `softprompt train --help` or `softprompt demo`")
        return
    names = short_names(entry.header.base for entry in entries if isinstance(entry.header, Header))
    table = simple_table("name", "base model", ">P", "task", "validation", ">bytes", "created")
    for entry in entries:
        if isinstance(entry.header, Header):
            brief = _brief(entry.header)
            kind = "free text" if brief["labels"] is None else f"{len(brief['labels'])} labels"
            metric = next(iter(brief["metrics"]), None)
            value = "" if metric is None else f"{metric['metric']} {number(metric['metric'], metric['value'])}"
            base = names[brief["base"]]
            length = str(brief["num_virtual_tokens"])
            table.add_row(entry.name, base, length, kind, value, f"{entry.bytes:,}", str(brief["created"])[:10])
        else:
            table.add_row(entry.name, "(unreadable)", "", "", "", f"{entry.bytes:,}", "")
            stderr.print(f"warning: {entry.header}")
    stdout.print(table)


def _brief(header: Header) -> dict[str, Any]:
    return {
        "base": header.base,
        "num_virtual_tokens": header.num_virtual_tokens,
        "labels": None if header.verbalizer is None else list(header.verbalizer),
        "metrics": list(header.metrics),
        "created": header.created,
    }


def show_one(name: str, as_json: bool) -> None:
    """Prints what a soft prompt's file says, except its numbers."""
    path = Store().find(name)
    header = artifact.read_header(path)
    document = {
        "path": str(path),
        "bytes": path.stat().st_size,
        **header.sizes,
        **{field.name: getattr(header, field.name) for field in fields(Metadata)},
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


def remove(names: Sequence[str]) -> None:
    """Deletes soft prompts, and what their trainings left behind."""
    store = Store()
    stored = set(store.names())
    with ExitStack() as held:
        runs = {}
        for name in dict.fromkeys(names):
            if store.run_folder(name).is_dir():  # a run that was stopped may have left no soft prompt
                from softprompt.tuning.run_folder import RunFolder  # needs torch, which nothing else here does

                runs[name] = held.enter_context(RunFolder(store.run_folder(name), name))
            else:
                store.find(name)
        for name in dict.fromkeys(names):
            if name in stored:
                store.remove(name)
            if name in runs:
                runs[name].remove()
            stdout.print(f"removed {name}")
