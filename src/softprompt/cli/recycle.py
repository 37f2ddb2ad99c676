"""``softprompt recycle``: a soft prompt for another base model, and what it is worth there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from softprompt.cli.options import ColumnOptions, Loading
from softprompt.data.example import Dataset
from softprompt.drawing.words import number, simple_table
from softprompt.evaluation.evaluate import Evaluation, evaluate
from softprompt.exchange.recycling import recycle
from softprompt.model.frozen import FrozenLM
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.soft_prompts.store import Store
from softprompt.tasks.task import Task
from softprompt.terminal.console import print_json, print_rows, rows_bar, stderr, stdout
from softprompt.text.chat import with_answers
from softprompt.tuning.config import TrainConfig
from softprompt.tuning.start import first_vectors


@dataclass(frozen=True)
class Wanted:
    """What is to become of a soft prompt.

    Attributes:
        name: of the new one.
        base: the other base model.
        method: of ``exchange.formats.RECYCLING``.
        old_base: where its own base model is; None: as in training.
        overwrite: whether an earlier one of that name is replaced.
    """

    name: str
    base: str
    method: str
    old_base: str | None
    overwrite: bool


def carry(name: str, wanted: Wanted, test: str | None, columns: ColumnOptions, loading: Loading, as_json: bool) -> None:
    """Stores the soft prompt for the other base model, and measures it on the rows of ``test``.

    Raises:
        SoftPromptError: a mistake of the user's, see each step.
    """
    store = Store()
    if not wanted.overwrite:
        store.require_free(wanted.name)
    soft_prompt = store.load(name)
    rows = None if test is None else columns.read(test, soft_prompt)
    source = loading.load(wanted.old_base or soft_prompt.base)
    target = loading.load(wanted.base)
    with stderr.status("recycling"):
        made = recycle(source, target, soft_prompt, name=wanted.name, method=wanted.method)
    measured = {} if rows is None else _measured(target, made, rows)
    if measured:
        metric = {"split": "recycled", **measured["recycled"].headline.as_dict()}
        made = replace(made, metrics=(metric,))
    path = store.save(made, overwrite=wanted.overwrite)
    common = made.training["common_tokens"]
    if as_json:
        document: dict[str, Any] = {
            "name": made.name,
            "path": str(path),
            "base": target.name,
            "recycled_from": dict(made.training["recycled_from"]),
            "method": wanted.method,
            "common_tokens": common,
            "measured": {key: found.headline.as_dict() for key, found in measured.items()} or None,
        }
        print_json(document)
        return
    print_rows(
        [
            ("soft prompt", f"{made.name}, {made.extent}"),
            ("file", str(path)),
            ("base model", f"{target.name}, from {source.name}"),
            ("map", f"{wanted.method}, {common:,} common tokens"),
        ]
    )
    if not measured:
        stderr.print("not measured: what it is worth there is not known; give --test with rows of the task")
        return
    table = simple_table("on the other base model", f">{measured['recycled'].headline.name}", ">± stderr")
    for key, found in measured.items():
        value = found.headline.as_dict()
        table.add_row(key, *(number(found.headline.name, value[part]) for part in ("value", "stderr")))
    stdout.print(table)


def _measured(lm: FrozenLM, made: SoftPrompt, rows: Dataset) -> dict[str, Evaluation]:
    """The recycled soft prompt, the untrained default start in its place, and the base model alone, all on ``rows``."""
    rows = with_answers(rows, lm.tokenizer)
    task = Task.of(lm, made)
    start = first_vectors(task, TrainConfig(num_virtual_tokens=made.num_virtual_tokens))
    found = {}
    for key, of, vectors in (
        ("recycled", task, made.vectors),
        ("the default start, untrained", task, start),
        ("without a soft prompt", task.without_soft_prompt(), None),
    ):
        with rows_bar(f"evaluating: {key}") as progress:
            found[key] = evaluate(of, vectors, rows, progress=progress)
    return found
