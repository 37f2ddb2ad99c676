"""``softprompt evaluate``: a soft prompt measured on rows with targets."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from softprompt.cli.options import Columns, Loading
from softprompt.cli.predict import asked
from softprompt.data.example import Dataset
from softprompt.errors import ConfigError
from softprompt.evaluation.evaluate import choose_metrics, evaluate
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.soft_prompts.store import Store
from softprompt.tasks.predict import default_sampling
from softprompt.terminal.console import metrics_table, print_json, rows_bar, stderr, stdout, warn_truncated
from softprompt.text.chat import with_answers


def measure(
    name: str,
    test: str,
    columns: Columns,
    *,
    base_only: bool,
    metrics: Sequence[str] | None,
    normalise: bool,
    sampling: Mapping[str, Any],
    base: str | None,
    loading: Loading,
    as_json: bool,
) -> None:
    """Prints the metrics of a soft prompt, or of the base model alone, on the rows of ``test``.

    Raises:
        SoftPromptError: a mistake of the user's, see each step.
    """
    soft_prompt = Store().load(name)
    choose_metrics(metrics, labels=soft_prompt.verbalizer is not None)
    dataset = _read(soft_prompt, test, columns)
    lm = loading.load(base or soft_prompt.base)
    dataset = with_answers(dataset, lm.tokenizer)
    task, vectors = asked(lm, soft_prompt, base_only)
    settings = replace(default_sampling(task), **sampling)
    began = time.perf_counter()
    with rows_bar("evaluating") as progress:
        found = evaluate(
            task, vectors, dataset, metrics=metrics, normalise=normalise, sampling=settings, progress=progress
        )
    warn_truncated(found.truncated, task.max_length)
    what = f"{lm.name} without a soft prompt" if base_only else f"{soft_prompt.name} on {lm.name}"
    if found.most_frequent is not None and found.most_frequent.is_telling:
        stderr.print(f"warning: {what} {found.most_frequent}")
    if as_json:
        print_json(
            {
                "name": soft_prompt.name,
                "base": lm.name,
                "base_only": base_only,
                "num_virtual_tokens": task.num_virtual_tokens,
                "source": dataset.source,
                "fingerprint": dataset.fingerprint,
                **found.as_dict(),
                "normalise_length": normalise,
                "sampling": asdict(settings) if task.verbalizer is None else None,
                "dtype": str(lm.dtype).removeprefix("torch."),
                "seconds": round(time.perf_counter() - began, 3),
            }
        )
        return
    stdout.print(f"{what}, {dataset.source}")
    stdout.print(metrics_table(metric.as_dict() for metric in found.metrics))


def _read(soft_prompt: SoftPrompt, test: str, columns: Columns) -> Dataset:
    """Rows of the soft prompt's task."""
    if soft_prompt.verbalizer is not None and columns.names_references:
        raise ConfigError(
            f"--references-field is for free text, but the soft prompt {soft_prompt.name!r} answers with labels; "
            f"leave it out."
        )
    return columns.read(test, soft_prompt)
