"""``softprompt evaluate``: a soft prompt measured on rows with targets."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from softprompt.cli.groups import DTYPES, Measured
from softprompt.cli.options import PRECISIONS, Columns, Loading
from softprompt.cli.predict import asked
from softprompt.data.example import Dataset
from softprompt.drawing.words import number, simple_table
from softprompt.errors import ConfigError, PrecisionWarning
from softprompt.evaluation.evaluate import (
    LABEL_METRICS,
    TEXT_METRICS,
    Evaluation,
    choose_metrics,
    evaluate,
    headline_difference,
)
from softprompt.model.frozen import FrozenLM
from softprompt.model.quantized import bytes_of
from softprompt.model.request import Sampling
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.soft_prompts.store import Store
from softprompt.tasks.predict import default_sampling
from softprompt.terminal.console import metrics_table, print_json, rows_bar, stderr, stdout, warn_truncated
from softprompt.text.chat import with_answers

COMPARED_BY = (LABEL_METRICS[0], TEXT_METRICS[0])
"""By which metric answers of two precisions are compared, on the same rows."""


@dataclass(frozen=True)
class _Run:
    """One base model's answers; the model itself may be gone."""

    what: str
    base: str
    precision: str
    dtype: str
    base_bytes: int
    num_virtual_tokens: int
    dataset: Dataset
    sampling: Sampling | None
    found: Evaluation
    seconds: float


def measure(
    name: str,
    test: str,
    columns: Columns,
    measured: Measured,
    *,
    sampling: Mapping[str, Any],
    base: str | None,
    loading: Loading,
    as_json: bool,
) -> None:
    """Prints the metrics of a soft prompt, or of the base model alone, on the rows of ``test``; with ``--on`` beside
    those on the base model in other precisions.

    Raises:
        SoftPromptError: a mistake of the user's, see each step.
    """
    loadings = [loading, *_others(loading, measured.on or ())]
    soft_prompt = Store().load(name)
    choose_metrics(measured.metric, labels=soft_prompt.verbalizer is not None)
    dataset = _read(soft_prompt, test, columns)
    runs = []
    with warnings.catch_warnings():
        if measured.on:  # what it costs is being measured
            warnings.simplefilter("ignore", PrecisionWarning)
        for one in loadings:
            runs.append(_run(one.load(base or soft_prompt.base), soft_prompt, dataset, measured, sampling))
            gc.collect()
    first = runs[0]
    if as_json:
        print_json(_document(soft_prompt, first, measured) | ({"on": list(_compared(runs))} if measured.on else {}))
        return
    stdout.print(f"{first.what}, {dataset.source}")
    if measured.on:
        _show(runs)
    else:
        stdout.print(metrics_table(metric.as_dict() for metric in first.found.metrics))


def _others(loading: Loading, precisions: Sequence[str]) -> Iterator[Loading]:
    """The base model in each of the precisions of ``--on``."""
    for precision in dict.fromkeys(precisions):
        if precision in PRECISIONS:
            yield replace(loading, quantize=precision, base_dtype=None)
        elif precision in DTYPES:
            yield replace(loading, quantize=None, base_dtype=None, dtype=precision)
        else:
            raise ConfigError(
                f"--on takes precisions of the base model, {', '.join((*PRECISIONS, *DTYPES))}, not {precision!r}; "
                "choose of those."
            )


def _run(lm: FrozenLM, soft_prompt: SoftPrompt, rows: Dataset, measured: Measured, given: Mapping[str, Any]) -> _Run:
    began = time.perf_counter()
    dataset = with_answers(rows, lm.tokenizer)
    task, vectors = asked(lm, soft_prompt, measured.base_only)
    settings = replace(default_sampling(task), **given)
    with rows_bar("evaluating") as progress:
        found = evaluate(
            task,
            vectors,
            dataset,
            metrics=measured.metric,
            normalise=measured.normalise_length,
            sampling=settings,
            progress=progress,
        )
    warn_truncated(found.truncated, task.max_length)
    what = f"{lm.name} without a soft prompt" if measured.base_only else f"{soft_prompt.name} on {lm.name}"
    what += f" ({lm.quantized})" if lm.quantized else ""
    if found.most_frequent is not None and found.most_frequent.is_telling:
        stderr.print(f"warning: {what} {found.most_frequent}")
    return _Run(
        what=what,
        base=lm.name,
        precision=lm.precision,
        dtype=str(lm.dtype).removeprefix("torch."),
        base_bytes=bytes_of(lm.model),
        num_virtual_tokens=task.num_virtual_tokens,
        dataset=dataset,
        sampling=settings if task.verbalizer is None else None,
        found=found,
        seconds=round(time.perf_counter() - began, 3),
    )


def _document(soft_prompt: SoftPrompt, run: _Run, measured: Measured) -> dict[str, Any]:
    return {
        "name": soft_prompt.name,
        "base": run.base,
        "base_only": measured.base_only,
        "num_virtual_tokens": run.num_virtual_tokens,
        "source": run.dataset.source,
        "fingerprint": run.dataset.fingerprint,
        **run.found.as_dict(),
        "normalise_length": measured.normalise_length,
        "sampling": None if run.sampling is None else asdict(run.sampling),
        "dtype": run.dtype,
        "precision": run.precision,
        "seconds": run.seconds,
    }


def _compared(runs: Sequence[_Run]) -> Iterator[dict[str, Any]]:
    """Each of the other precisions, and what its answers score above those of the first on the same rows."""
    for run in runs[1:]:
        yield {
            "precision": run.precision,
            "dtype": run.dtype,
            "base_bytes": run.base_bytes,
            **run.found.as_dict(),
            "difference": _difference(run, runs[0]),
            "seconds": run.seconds,
        }


def _difference(run: _Run, first: _Run) -> dict[str, Any] | None:
    """None where no metric needed answers."""
    answers = [[prediction.text for prediction in one.found.predictions] for one in (run, first)]
    if not all(answers):
        return None
    metric = COMPARED_BY[first.sampling is not None]
    value, low, high = headline_difference(metric, first.dataset, *answers)
    same = sum(a == b for a, b in zip(*answers, strict=True)) / len(answers[0])
    return {"metric": metric, "value": value, "low": low, "high": high, "same_answers": same}


def _show(runs: Sequence[_Run]) -> None:
    """A row a precision: the headline, and the difference to the first row with its 95 % interval."""
    name, compared = runs[0].found.headline.name, COMPARED_BY[runs[0].sampling is not None]
    table = simple_table("base model", ">MB", f">{name}", f">{compared}: difference", ">95 % interval", ">same answers")
    for run in runs:
        cells = ["", "", ""]
        difference = None if run is runs[0] else _difference(run, runs[0])
        if difference is not None:
            value, low, high = (f"{difference[key]:+.3f}" for key in ("value", "low", "high"))
            cells = [value, f"{low} to {high}", f"{100 * difference['same_answers']:.1f} %"]
        table.add_row(run.precision, f"{run.base_bytes / 1e6:,.0f}", number(name, run.found.headline.value), *cells)
    stdout.print(table)


def _read(soft_prompt: SoftPrompt, test: str, columns: Columns) -> Dataset:
    """Rows of the soft prompt's task."""
    if soft_prompt.verbalizer is not None and columns.names_references:
        raise ConfigError(
            f"--references-field is for free text, but the soft prompt {soft_prompt.name!r} answers with labels; "
            f"leave it out."
        )
    return columns.read(test, soft_prompt)
