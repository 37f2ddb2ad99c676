"""``softprompt evaluate --on``: the same soft prompt with its base model in several precisions."""

from __future__ import annotations

import gc
import math
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from softprompt.cli.groups import DTYPES, Answering
from softprompt.cli.options import PRECISIONS, Loading
from softprompt.cli.predict import asked
from softprompt.data.example import Dataset
from softprompt.drawing.words import number, simple_table
from softprompt.errors import ConfigError, PrecisionWarning
from softprompt.evaluation.evaluate import LABEL_METRICS, TEXT_METRICS, Evaluation, evaluate, headline_difference
from softprompt.model.frozen import FrozenLM
from softprompt.model.quantized import bytes_of
from softprompt.model.request import Sampling
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tasks.predict import default_sampling
from softprompt.terminal.console import print_json, rows_bar, stderr, stdout, warn_truncated
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


def measure_on(
    precisions: Sequence[str],
    soft_prompt: SoftPrompt,
    dataset: Dataset,
    answering: Answering,
    metrics: Sequence[str] | None,
    sampling: Mapping[str, Any],
    base: str | None,
    loading: Loading,
    *,
    as_json: bool,
) -> None:
    """Prints the metrics of a soft prompt, or of the base model alone, beside those on the base model in other
    precisions.

    Raises:
        SoftPromptError: a mistake of the user's, see each step.
    """
    loadings, runs = [loading, *_others(loading, precisions)], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PrecisionWarning)  # what it costs is being measured
        for one in loadings:
            runs.append(_run(one.load(base or soft_prompt.base), soft_prompt, dataset, answering, metrics, sampling))
            gc.collect()
    first = runs[0]
    if as_json:
        print_json(_document(soft_prompt, first, answering) | {"on": list(_compared(runs))})
        return
    stdout.print(f"{first.what}, {dataset.source}")
    _show(runs)


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


def _run(
    lm: FrozenLM,
    soft_prompt: SoftPrompt,
    rows: Dataset,
    answering: Answering,
    metrics: Sequence[str] | None,
    given: Mapping[str, Any],
) -> _Run:
    began = time.perf_counter()
    dataset = with_answers(rows, lm.tokenizer)
    task, vectors = asked(lm, soft_prompt, answering.base_only)
    settings = replace(default_sampling(task), **given)
    with rows_bar("evaluating") as progress:
        found = evaluate(
            task,
            vectors,
            dataset,
            metrics=metrics,
            normalise=answering.normalise_length,
            sampling=settings,
            progress=progress,
        )
    warn_truncated(found.truncated, task.max_length)
    what = f"{lm.name} without a soft prompt" if answering.base_only else f"{soft_prompt.name} on {lm.name}"
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


def _document(soft_prompt: SoftPrompt, run: _Run, answering: Answering) -> dict[str, Any]:
    return {
        "name": soft_prompt.name,
        "base": run.base,
        "base_only": answering.base_only,
        "num_virtual_tokens": run.num_virtual_tokens,
        "source": run.dataset.source,
        "fingerprint": run.dataset.fingerprint,
        **run.found.as_dict(),
        "normalise_length": answering.normalise_length,
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
            "loss_difference": _loss_difference(run, runs[0]),
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


def _loss_difference(run: _Run, first: _Run) -> dict[str, Any] | None:
    """How much higher the mean loss of the targets is than the first's, in nats, with the standard error of the
    difference on the same rows; None where no metric needed it."""
    rows = [b - a for a, b in zip(first.found.losses, run.found.losses, strict=True)]
    if not rows:
        return None
    first_loss, loss = (statistics.fmean(one.found.losses) for one in (first, run))
    stderr = statistics.stdev(rows) / math.sqrt(len(rows)) if len(rows) > 1 else None
    return {"value": statistics.fmean(rows), "stderr": stderr, "n": len(rows), "loss": loss, "first_loss": first_loss}


def _show(runs: Sequence[_Run]) -> None:
    """A row a precision: the headline, and the difference to the first row with its 95 % interval; and how much higher
    the loss is, in nats a row, with its standard error."""
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
    for run in runs[1:]:
        loss = _loss_difference(run, runs[0])
        if loss is not None:
            spread = "" if loss["stderr"] is None else f" ± {loss['stderr']:.4f}"
            stdout.print(f"loss in {run.precision}: {loss['loss']:.4f} nats a row, {loss['value']:+.4f}{spread}")
