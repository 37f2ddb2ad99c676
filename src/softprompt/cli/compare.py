"""``softprompt compare``: options → a plan, checked before a model is loaded → cells, a table and a report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from softprompt.cli.groups import Comparing
from softprompt.cli.options import Loading, seconds, with_line_ends
from softprompt.cli.task import Sources, task_name, template_from
from softprompt.compare import report
from softprompt.compare.comparison import Comparison
from softprompt.compare.comparison_time import ComparisonTime, Parts
from softprompt.compare.plan import Key, Plan, cut
from softprompt.data.checks import Reading
from softprompt.data.encoding import decode
from softprompt.data.packages import DEFAULT_BASE
from softprompt.data.wording import counted
from softprompt.drawing import style
from softprompt.drawing.words import duration, number, roughly, short_names
from softprompt.errors import DataError
from softprompt.files import local_path, strict_json
from softprompt.methods.registry import METHODS
from softprompt.model.distributed import is_first
from softprompt.model.frozen import FrozenLM
from softprompt.tasks.reading import require_no_chat
from softprompt.terminal.console import Clock, notices, say_reading, stderr, stdout
from softprompt.text.template import ALPACA_TEMPLATE, Template
from softprompt.tuning.run_folder import RunFolder


def compare(
    sources: Sources,
    test: str,
    template: str,
    comparing: Comparing,
    bases: Sequence[str] | None,
    loading: Loading,
    as_json: bool,
) -> None:
    """Runs a comparison, or what is left of it, and says what came of it.

    Raises:
        SoftPromptError: a mistake of the user's, see each step.
    """
    began = time.perf_counter()
    with style.style():  # without matplotlib, say so now rather than after hours
        pass
    plan, taken = _planned(sources, test, template, comparing, bases)
    say_reading(taken)
    out = local_path(comparing.out)
    with RunFolder(out, plan.task, "comparison") if is_first() else nullcontext():
        comparison = run_cells(plan, out, loading.load_quietly)
    wanted = [cell for cell in comparison.cells if cell["base"] in plan.bases and cell["method"] in plan.methods]
    if as_json:
        print(strict_json({"out": str(out), "seconds": round(time.perf_counter() - began, 1), "cells": wanted}))
        return
    stdout.print(report.table(wanted))
    stdout.print(f"results: {out / 'results.json'}, report: {out / 'report.html'}")
    stdout.print(f"the whole comparison took {duration(time.perf_counter() - began)}")


def _planned(
    sources: Sources, test: str, template: str, comparing: Comparing, bases: Sequence[str] | None
) -> tuple[Plan, Reading]:
    """The plan, and what the data were taken for; no model is loaded."""
    form = None if template == "default" else template_from(template)
    rows, held_out, verbalizer = sources.read(*((None, None) if form is None else (form.fields, "none")))
    require_no_chat(rows, "compare")
    if form is None and set(rows.examples[0].fields) != {"input"}:
        form = Template(ALPACA_TEMPLATE)
    assert held_out is not None  # it was asked for
    tested = sources.read_test(test, rows, verbalizer)
    texts = () if comparing.instructions is None else read_instructions(comparing.instructions)
    plan = Plan(
        task=comparing.task or task_name(sources.train),
        train=rows,
        validation=held_out,
        test=cut(tested, comparing.test_rows),
        template=form,
        verbalizer=verbalizer,
        bases=tuple(dict.fromkeys(bases or (DEFAULT_BASE,))),
        methods=tuple(dict.fromkeys(comparing.methods or ())),
        seeds=comparing.seeds,
        starts=comparing.starts,
        budget=seconds(comparing.budget),
        instructions=tuple(map(with_line_ends, (*(comparing.instruction or ()), *texts))),
    )
    return plan, sources.taken_for(rows, held_out, tested, verbalizer)


def run_cells(plan: Plan, out: Path, load: Callable[[str], FrozenLM], clock: Clock = time.monotonic) -> Comparison:
    """Runs what is left to run, and writes the report, whatever ends it. Says on stderr what is planned, how long that
    may take, what is being done, and what came of each cell.

    Raises:
        ConfigError: ``out`` holds results of another comparison.
        BaseModelError: a base model cannot be loaded.
    """
    names = short_names(plan.bases)
    with notices(clock) as show:
        doing = _Doing(plan.task, show, clock)
        comparison = Comparison(plan, out, load, doing.notice)
        todo = comparison.todo()
        stderr.print(planned(plan))
        if comparison.cells:
            stderr.print(f"going on: {counted(len(todo), 'cell is', 'cells are')} left to run")
        speeds = comparison.speeds() if todo else {}
        expected = ComparisonTime(plan, speeds, comparison.cells)
        if todo:
            untimed = [names[base] for base in dict.fromkeys(key.base for key in todo) if base not in speeds]
            stderr.print(estimated(expected.left(todo), len(plan.test.examples), untimed))
        try:
            for place, key in enumerate(todo, start=1):
                what = f"{key.method}, seed {key.seed}" + f", {names[key.base]}" * (len(names) > 1)

                def left(spent: float, keys: Sequence[Key] = todo[place - 1 :]) -> Parts:
                    return expected.left(keys, spent, comparison.learned)

                doing.begin(f"cell {place} of {len(todo)}, {key.method}, seed {key.seed}, {names[key.base]}", left)
                cell = comparison.run(key)
                expected.saw(cell)
                if cell["status"] == "done":
                    found = f"{cell['metric']} {number(cell['metric'], cell['value'])}, in {took(cell)}"
                    rest = f"; about {roughly(expected.left(todo[place:], learned=comparison.learned).total)} left" * (
                        place < len(todo)
                    )
                    stderr.print(f"{place:>3}/{len(todo)}  {what}: {found}{rest}")
                    for alarm in cell["alarms"]:
                        stderr.print(f"warning: {what}: {alarm['sentence']}")
                else:
                    stderr.print(f"{place:>3}/{len(todo)}  {what} failed: {cell['reason']}")
        finally:
            if comparison.cells and is_first():
                report.write(comparison.cells, out)
    return comparison


class _Doing:
    """What is being done, in a line with the cell and the time left."""

    def __init__(self, task: str, show: Callable[[str], None], clock: Clock) -> None:
        self._task, self._show, self._clock = task, show, clock
        self._cell, self._began = "", clock()
        self._left: Callable[[float], Parts] = lambda spent: Parts()

    def begin(self, cell: str, left: Callable[[float], Parts]) -> None:
        """A cell begins; ``left`` tells what is left so many seconds later."""
        self._cell, self._left, self._began = cell, left, self._clock()
        self.notice("")

    def notice(self, text: str) -> None:
        """Something begins, in a few words."""
        left = self._left(self._clock() - self._began).total
        parts = (self._cell, text, f"about {roughly(left)} left" if left else "")
        self._show(f"{self._task}: {' · '.join(filter(None, parts))}")


def planned(plan: Plan) -> str:
    """How many cells there are, of what, and how long each may learn."""
    kinds = [counted(len(plan.methods), "method"), counted(plan.seeds, "seed"), counted(len(plan.bases), "base model")]
    return f"plan: {counted(len(plan.keys), 'cell')} ({', '.join(kinds)}), {duration(plan.budget)} to learn for each"


def estimated(left: Parts, test_rows: int, untimed: Sequence[str] = ()) -> str:
    """How long the cells that are left take, and what for; ``untimed`` are the base models that could not be timed."""
    parts = (
        (left.learning, "learning"),
        (left.answering, f"answering {counted(test_rows, 'test row')}"),
        (left.rest, "loading and measuring"),
    )
    shown = ", ".join(f"{roughly(seconds)} {what}" for seconds, what in parts if seconds >= 0.5)
    unknown = f"; answering with {' and '.join(untimed)} could not be timed" if untimed else ""
    return f"about {roughly(left.total)} at most{': ' * bool(shown)}{shown}{unknown}"


def took(cell: Mapping[str, Any]) -> str:
    """``12 min 3 s: 8 min learning, 4 min answering, 3.0 s else``; parts of less than a second are left out."""
    of_others = METHODS[cell["method"]].of_several_seeds  # its members have learned, in cells of their own
    learning = 0.0 if of_others else cell["train_seconds"]
    rest = cell["seconds"] - learning - cell["answer_seconds"]
    parts = (learning, "learning"), (cell["answer_seconds"], "answering"), (rest, "else")
    shown = ", ".join(f"{duration(seconds)} {what}" for seconds, what in parts if seconds >= 1)
    return duration(cell["seconds"]) + f": {shown}" * bool(shown)


def read_instructions(path: Path) -> list[str]:
    """The texts of a JSON list, or the lines of any other file that are not blank.

    Raises:
        DataError: the file cannot be read, or has no such texts.
    """
    path = local_path(path)
    try:
        text = decode(path.read_bytes())
        lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        found = json.loads(text) if path.suffix.lower() == ".json" else [line for line in lines if line.strip()]
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}; check the path of --instructions."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"Expected UTF-8 in {path}, found other bytes; save the file as UTF-8.") from error
    except ValueError:
        found = None
    if not isinstance(found, list) or not found or not all(isinstance(one, str) and _sound(one) for one in found):
        raise DataError(f"{path}: expected hard prompts, one a line or a JSON list of texts, found none; write some.")
    return found


def _sound(text: str) -> bool:
    """Whether it is text that a tokenizer takes, and not only blanks."""
    return bool(text.strip()) and not any("\ud800" <= letter <= "\udfff" for letter in text)
