"""``softprompt judge``: what a base model does on a task with a short soft prompt, and without one.

Ten virtual tokens and 80 steps by default, the protocol of arXiv 2606.12117.
"""

from __future__ import annotations

import time
from typing import Any

from softprompt import api
from softprompt.cli.options import Loading
from softprompt.cli.task import Sources, template_from
from softprompt.drawing.words import number, simple_table
from softprompt.evaluation.evaluate import Evaluation, headline_difference, headline_metric
from softprompt.tasks.reading import require_no_chat
from softprompt.terminal.console import print_json, stdout
from softprompt.tuning.config import TrainConfig


def judge(
    sources: Sources,
    test: str,
    template: str,
    config: TrainConfig,
    base: str,
    loading: Loading,
    as_json: bool,
) -> None:
    """Tunes as ``config`` says, measures with and without, and prints both and their difference on the same rows.

    Raises:
        SoftPromptError: a mistake of the user's, see each step.
    """
    began = time.perf_counter()
    form = template if template in ("default", "chat") else template_from(template)
    train, held_out, verbalizer = sources.read(*((None, None) if isinstance(form, str) else (form.fields, "none")))
    require_no_chat(train, "judge")
    labels = () if verbalizer is None else verbalizer.labels
    rows = sources.read_test(test, train, verbalizer)
    metric = headline_metric(train, labels)
    lm = loading.load(base)
    soft_prompt = api.train(
        lm, train, validation=held_out, name="judge", template=form, labels=verbalizer or "none", config=config
    )
    without, tuned = (
        api.evaluate(lm, soft_prompt, rows, base_only=base_only, metrics=[metric]) for base_only in (True, False)
    )
    answers = [[prediction.text for prediction in found.predictions] for found in (tuned, without)]
    difference, low, high = headline_difference(metric, rows, *answers)
    if as_json:
        print_json(
            {
                "base": lm.name,
                "train": train.source,
                "test": rows.source,
                "metric": metric,
                "without": _measured(without),
                "with": _measured(tuned),
                "difference": {"value": difference, "low": low, "high": high, "n": len(rows.examples)},
                "num_virtual_tokens": soft_prompt.num_virtual_tokens,
                "steps": soft_prompt.training["steps_done"],
                "best_step": soft_prompt.training["best_step"],
                "template": soft_prompt.template,
                "dtype": str(lm.dtype).removeprefix("torch."),
                "seconds": round(time.perf_counter() - began, 3),
            }
        )
        return
    stdout.print(f"{lm.name}, {rows.source}")
    table = simple_table(metric, ">value", ">95 % interval", ">n")
    for what, found in (("without a soft prompt", without), ("with one", tuned)):
        one = found.headline.as_dict()
        value, start, end = (number(metric, one[key]) for key in ("value", "low", "high"))
        table.add_row(what, value, f"{start} to {end}", f"{one['n']:,}")
    value, start, end = (number(metric, one) for one in (difference, low, high))
    table.add_row("difference", value, f"{start} to {end}", f"{len(rows.examples):,}")
    stdout.print(table)
    stdout.print(
        f"{soft_prompt.num_virtual_tokens} virtual tokens, {soft_prompt.training['steps_done']} steps on {train.source}"
    )


def _measured(found: Evaluation) -> dict[str, Any]:
    said = found.most_frequent
    return {**found.headline.as_dict(), "truncated": found.truncated, "most_frequent_answer": said and said.as_dict()}
