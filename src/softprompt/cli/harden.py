"""``softprompt harden``: a soft prompt → a readable hard prompt, and what is lost."""

from __future__ import annotations

import json

from softprompt.cli.options import Loading, OneTargetColumns, seconds
from softprompt.cli.views import print_table, section, table, wrapped
from softprompt.drawing.words import duration
from softprompt.inspection.harden import Hardened, harden
from softprompt.inspection.report import require_vectors
from softprompt.inspection.tables import readings_table
from softprompt.inspection.vocabulary import Vocabulary
from softprompt.soft_prompts.store import Store
from softprompt.tasks.reading import require_no_chat
from softprompt.tasks.task import Task
from softprompt.terminal.console import rows_bar, stdout


def search(
    name: str,
    validation: str,
    budget: str,
    seed: int,
    columns: OneTargetColumns,
    base: str | None,
    loading: Loading,
    as_json: bool,
) -> None:
    """Searches within ``budget``, and prints what was found.

    Raises:
        SoftPromptError: a mistake of the user's, see each step.
    """
    limit = seconds(budget)
    soft_prompt = Store().load(name)
    require_vectors(soft_prompt)
    dataset = columns.read(validation, soft_prompt)
    require_no_chat(dataset, "harden")
    lm = loading.load(base or soft_prompt.base)
    task = Task.of(lm, soft_prompt)
    with rows_bar("searching") as progress:
        found = harden(
            task,
            soft_prompt.vectors,
            Vocabulary.of(lm),
            dataset,
            budget=limit,
            seed=seed,
            progress=lambda gone, _: progress(int(gone), int(limit)),
        )
    if as_json:
        print(json.dumps({"name": soft_prompt.name, "base": lm.name, **found.as_dict()}, allow_nan=False))
        return
    _show_hardened(found)


def _show_hardened(found: Hardened) -> None:
    print_table(table(*readings_table(found.readings), {0: 34}))
    wrapped(
        f"On {found.report_rows} rows that the search did not see; it used {found.search_rows} others, "
        f"{found.steps} steps and {duration(found.seconds)}, and changed the text {found.swaps} times (ended: "
        f"{found.stopped}). Loss there: {found.search_loss[0]:.3f} before, {found.search_loss[1]:.3f} after."
    )
    section("The hard prompt, as a Python string")
    stdout.print(repr(found.text))
