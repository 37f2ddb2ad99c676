"""``softprompt evaluate``: a soft prompt measured on rows with targets."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprompt.cli.groups import Answering, Measured
from softprompt.cli.options import ColumnOptions, Loading
from softprompt.cli.precisions import measure_on
from softprompt.cli.predict import asked, asked_for, of_whom
from softprompt.data.example import Dataset
from softprompt.drawing.words import number, simple_table
from softprompt.errors import ConfigError
from softprompt.evaluation.ensemble import JointEvaluation, evaluate_ensemble
from softprompt.evaluation.evaluate import Evaluation, choose_metrics, confidences, evaluate
from softprompt.evaluation.figures import reliability_diagram, require_form, save_figure
from softprompt.evaluation.metrics import reliability
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tasks.ensemble import Ensemble
from softprompt.tasks.predict import default_sampling
from softprompt.terminal.console import metrics_table, print_json, rows_bar, stderr, stdout, warn_truncated
from softprompt.text.chat import with_answers

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def measure(
    names: str,
    test: str,
    columns: ColumnOptions,
    answering: Answering,
    measured: Measured,
    *,
    sampling: Mapping[str, Any],
    base: str | None,
    loading: Loading,
    as_json: bool,
) -> None:
    """Prints the metrics of a soft prompt, of the base model alone, or of several soft prompts that answer together, on
    the rows of ``test``.

    Raises:
        SoftPromptError: a mistake of the user's, see each step.
    """
    began = time.perf_counter()
    soft_prompts, metrics = asked_for(names, answering), measured.metric
    soft_prompt = soft_prompts[0]
    labels = soft_prompt.verbalizer is not None
    choose_metrics(metrics, labels=labels, of_one=not soft_prompts[1:])
    path = _plot_path(measured.plot, labels)
    dataset = _read(soft_prompt, test, columns)
    if measured.on:
        if soft_prompts[1:] or path is not None:
            raise ConfigError("--on measures one soft prompt, without --plot; give one name, and leave --plot out.")
        measure_on(measured.on, soft_prompt, dataset, answering, metrics, sampling, base, loading, as_json=as_json)
        return
    lm = loading.load(base or soft_prompt.base)
    dataset = with_answers(dataset, lm.tokenizer)
    together = Ensemble.of(lm, soft_prompts, answering.vote) if soft_prompts[1:] else None
    task, vectors = asked(lm, soft_prompt, answering.base_only)
    settings, normalise = replace(default_sampling(task), **sampling), answering.normalise_length
    with rows_bar("evaluating") as progress:
        if together is not None:
            found: Evaluation = evaluate_ensemble(
                together, dataset, metrics=metrics, normalise=normalise, sampling=settings, progress=progress
            )
        else:
            found = evaluate(
                task, vectors, dataset, metrics=metrics, normalise=normalise, sampling=settings, progress=progress
            )
    warn_truncated(found.truncated, task.max_length)
    called = of_whom(soft_prompts, together)["name"]
    what = f"{lm.name} without a soft prompt" if answering.base_only else f"{called} on {lm.name}"
    what += f" ({lm.quantized})" if lm.quantized else ""
    if found.most_frequent is not None and found.most_frequent.is_telling:
        stderr.print(f"warning: {what} {found.most_frequent}")
    if path is not None:
        save_figure(reliability_of(found, dataset, called), path)
    if as_json:
        print_json(
            {
                **of_whom(soft_prompts, together),
                "base": lm.name,
                "base_only": answering.base_only,
                "num_virtual_tokens": task.num_virtual_tokens,
                "source": dataset.source,
                "fingerprint": dataset.fingerprint,
                **found.as_dict(),
                "reliability": [asdict(one) for one in reliability(*confidences(dataset, found.predictions))]
                if labels
                else None,
                "normalise_length": normalise,
                "sampling": asdict(settings) if task.verbalizer is None else None,
                "dtype": str(lm.dtype).removeprefix("torch."),
                "precision": lm.precision,
                "seconds": round(time.perf_counter() - began, 3),
                "captured_graphs": lm.fixed_rows.graphs.captured,
            }
        )
        return
    stdout.print(f"{what}, {dataset.source}")
    stdout.print(metrics_table(metric.as_dict() for metric in found.metrics))
    if isinstance(found, JointEvaluation):
        _print_members(found)


def reliability_of(found: Evaluation, dataset: Dataset, name: str) -> Figure:
    """The reliability diagram of answers with labels, an ensemble's members in the background."""
    members = found.members if isinstance(found, JointEvaluation) else ()
    title = f"{len(members)} soft prompts together" if members else name
    answered = [confidences(dataset, one.predictions) for one in (found, *members)]
    return reliability_diagram(title, answered[0], answered[1:])


def _print_members(found: JointEvaluation) -> None:
    """What each member is worth alone, their mean and best, and what their disagreement says."""
    headline = found.headline.name
    table = simple_table("member", f">{headline}", ">± stderr")
    for place, (name, one) in enumerate(zip(found.names, found.members, strict=True)):
        value, error = (number(headline, one.headline.as_dict()[key]) for key in ("value", "stderr"))
        table.add_row(name + "  (the best on these rows)" * (place == found.best), value, error)
    table.add_row("their mean", number(headline, found.mean), "")
    stdout.print(table)
    if found.disagreement is not None:
        stdout.print(f"{found.disagreement}: rows to which not all members give the same answer")
    for metric, rows in ((found.agreeing, "where all agree"), (found.differing, "where they differ")):
        if metric is not None:
            stdout.print(f"{metric} {rows}")


def _plot_path(plot: Path | None, labels: bool) -> Path | None:
    if plot is None:
        return None
    if not labels:
        raise ConfigError("--plot shows the probabilities of labels, but these answers are free text; leave it out.")
    return require_form(plot)


def _read(soft_prompt: SoftPrompt, test: str, columns: ColumnOptions) -> Dataset:
    """Rows of the soft prompt's task."""
    if soft_prompt.verbalizer is not None and columns.names_references:
        raise ConfigError(
            f"--references-field is for free text, but the soft prompt {soft_prompt.name!r} answers with labels; "
            f"leave it out."
        )
    return columns.read(test, soft_prompt)
