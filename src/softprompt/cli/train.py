"""``softprompt train``: options → data and settings, checked before a model is loaded → ``Training`` → a file."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import typer

from softprompt.cli.groups import Learning, LearningOnce, Output
from softprompt.cli.options import Loading, in_utf8
from softprompt.cli.place import Place
from softprompt.cli.task import Sources, template_from
from softprompt.cli.transfer import Search
from softprompt.data.packages import DEFAULT_BASE
from softprompt.drawing.words import duration, plain_metric
from softprompt.errors import ConfigError, StoreError, TrainingError
from softprompt.files import strict_json
from softprompt.model.distributed import is_first, launched
from softprompt.model.frozen import FrozenLM
from softprompt.soft_prompts.metadata import start_length
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.soft_prompts.store import Store
from softprompt.terminal.console import print_rows, say_reading, stderr, warn_truncated
from softprompt.terminal.training import say_alarms, watch
from softprompt.tuning import checkpoint
from softprompt.tuning.config import INITS, TrainConfig
from softprompt.tuning.config import preset as published
from softprompt.tuning.job import Job
from softprompt.tuning.tracking import tracking
from softprompt.tuning.training import Training
from softprompt.tuning.transfer import Trial


@dataclass(frozen=True)
class Options:
    """What the command line says of a training, or of each of several.

    Attributes:
        sources, template, learning: what is learned.
        output: where it goes.
        base, loading: the base model; None: the default one.
        as_json: print what came of it for programs.
    """

    sources: Sources
    template: str
    output: Output
    learning: Learning
    base: str | None
    loading: Loading
    as_json: bool


def tune(options: Options, search: Search | None = None) -> None:
    """Tunes a soft prompt, stores it, and says what came of it. With ``search``, it looks for a start first.

    Raises:
        SoftPromptError: a mistake of the user's, see each step.
        typer.Exit: the user pressed Ctrl-C.
    """
    began, output, learning = time.perf_counter(), options.output, options.learning
    place = Place.of(output.one_name, output.out, overwrite=output.overwrite, resume=output.resume)
    job, trial = job_of(place.name, options.sources, options.template, learning, place.store), None
    if search is not None:
        _require_no_other_start(job.config, learning)
    with place.claimed():
        lm = options.loading.load(options.base or DEFAULT_BASE)
        if search is not None:
            trial = search.find(lm, job.on(lm), job.config)
            job = replace(
                job, start=trial.start, config=replace(job.config, num_virtual_tokens=trial.num_virtual_tokens)
            )
        job, training = prepared(job, place, lm)
        say_reading(job.reading)
        warn_truncated(training.truncated, training.task.max_length)
        train_and_store(training, place, job.reading.as_dict(), began, output.track, options.as_json, trial)


def _require_no_other_start(config: TrainConfig, learning: LearningOnce) -> None:
    """Refuses options that say what a trial is to find."""
    if learning.init is not None and learning.init not in INITS:
        raise ConfigError(
            f"--init {learning.init} names the start that transfer looks for; leave it out, or use `softprompt train`."
        )
    if config.tries > 1:
        raise ConfigError("transfer tries several starts by itself; leave --starts and --lengths out.")


def job_of(name: str, sources: Sources, template: str, learning: LearningOnce, store: Store) -> Job:
    """What the options ask for, checked, its rows read.

    Raises:
        SoftPromptError: a mistake of the user's.
    """
    config, start = _configuration(learning, store)
    return Job.read(
        sources.train,
        sources.validation,
        name=name,
        template=template if template in ("default", "chat") else template_from(template),
        labels=sources.labels,
        columns=sources.columns,
        start=start,
        config=config,
    )


def prepared(job: Job, place: Place, lm: FrozenLM) -> tuple[Job, Training]:
    """The job on its base model, and its training in a place that is claimed."""
    with stderr.status("preparing"):
        job = job.on(lm)
        return job, job.training(lm, folder=place.run, resume=place.resume)


def _configuration(learning: LearningOnce, store: Store) -> tuple[TrainConfig, SoftPrompt | None]:
    """The run's settings, and the soft prompt to start from if ``--init`` names one."""
    options = {field.name: getattr(learning, field.name) for field in fields(learning)}
    recipe = options.pop("preset")
    given = {name: value for name, value in options.items() if value is not None}
    in_utf8(given.get("init_text", ""))
    if "lengths" in given:
        given["lengths"] = _lengths(given["lengths"])
    start, init = None, given.get("init", "auto")
    if init not in INITS:
        try:
            start = store.load(init)
        except StoreError as error:
            raise ConfigError(
                f"--init must be one of {', '.join(INITS)}, or a soft prompt's name or path, not {init!r}; "
                f"see `softprompt list`."
            ) from error
        if start.decoder_virtual_tokens:
            given.setdefault("decoder_virtual_tokens", start.decoder_virtual_tokens)
        length = given.setdefault("num_virtual_tokens", start_length(start, start.num_virtual_tokens))
        if start.num_virtual_tokens not in (0, length):
            raise ConfigError(
                f"--num-virtual-tokens is {length}, but the soft prompt {init!r} to start from has "
                f"{start.num_virtual_tokens}; leave the option out."
            )
    return (TrainConfig(**given) if recipe is None else published(recipe, **given)), start


def _lengths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(length) for length in text.split(","))
    except ValueError as error:
        raise ConfigError(
            f"--lengths must be whole numbers with commas between them, for instance 5,50, not {text!r}."
        ) from error


def train_and_store(
    training: Training,
    place: Place,
    taken: Mapping[str, Any],
    began: float,
    tracker: str | None,
    as_json: bool,
    trial: Trial | None = None,
) -> None:
    """Trains, stores the soft prompt and says what came of it.

    Args:
        training: what is trained.
        place: where it goes; claimed.
        taken: what the data were taken for, JSON values.
        began: clock time at which the command began.
        tracker: what is told of each step, one of ``TRACKERS``.
        as_json: print one JSON object.
        trial: what was found to start from.

    Raises:
        SoftPromptError: the training failed, or its soft prompt cannot be stored.
        typer.Exit: the user pressed Ctrl-C.
    """
    say_alarms(training.watch.before)
    interrupted = False
    with tracking(tracker if is_first() else None, training, place.run.path / "tensorboard") as track:
        try:
            watch(training, track=track)
        except KeyboardInterrupt:
            interrupted = True
        _store(training, place, taken, began, as_json, trial, interrupted=interrupted)


def _store(
    training: Training,
    place: Place,
    taken: Mapping[str, Any],
    began: float,
    as_json: bool,
    trial: Trial | None,
    *,
    interrupted: bool,
) -> None:
    if training.step == 0 and interrupted:
        stderr.print("interrupted before the first step; nothing was stored")
        raise typer.Exit(130)
    soft_prompt = training.result()
    place.save(soft_prompt)
    if not interrupted and is_first():
        (place.run.path / checkpoint.FILE).unlink(missing_ok=True)  # what has ended cannot be resumed
    if not (interrupted and launched()):  # several processes were interrupted at different places
        training.watch.require_same_answers(place.path, soft_prompt)
    if not is_first():  # which reports
        raise typer.Exit(130 if interrupted else 2 if training.stopped == "not finite" else 0)
    say_alarms(training.alarms[len(training.watch.before) :])
    _report(training, soft_prompt, place.path, taken, time.perf_counter() - began, as_json, trial)
    after = f"after step {training.step:,} of {training.total:,}"
    if interrupted:
        stderr.print(f"interrupted {after}; the best so far is stored; to go on, give the same command with --resume")
        raise typer.Exit(130)
    if training.stopped == "not finite":
        raise TrainingError(
            f"The loss is not finite any more {after}; the last good soft prompt is in {place.path}; "
            f"train again with an --lr below {training.config.lr}, or with --dtype fp32."
        )


def _report(
    training: Training,
    soft_prompt: SoftPrompt,
    path: Path,
    taken: Mapping[str, Any],
    seconds: float,
    as_json: bool,
    trial: Trial | None,
) -> None:
    if as_json:
        found = {} if trial is None else {"transfer": trial.as_dict()}
        print(strict_json({**document_of(training, soft_prompt, path, taken, seconds), **found}))
        return
    record, size = soft_prompt.training, path.stat().st_size
    print_rows(
        [
            ("soft prompt", f"{soft_prompt.name}, {soft_prompt.extent}"),
            ("file", f"{path} ({size:,} bytes)"),
            ("base model", f"{soft_prompt.base}" + ", unchanged, bit for bit" * bool(training.base_unchanged)),
            *(("validation", plain_metric(metric)) for metric in soft_prompt.metrics),
            *(() if trial is None else (("start", trial.candidates[0].name),)),
            ("steps", f"{record['steps_done']:,}, the best of them {record['best_step']:,}"),
            ("time", duration(seconds)),
        ]
    )


def document_of(
    training: Training, soft_prompt: SoftPrompt, path: Path, taken: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    """What came of a training, for programs."""
    return {
        **described(soft_prompt, path),
        "base_unchanged": training.base_unchanged,
        "data": dict(taken),
        "truncated": training.truncated,
        "alarms": [alarm.as_dict() for alarm in training.alarms],
        "seconds": round(seconds, 3),
        "graphs": training.graphs,
        "micro_batch": None if training.micro_batch is None else training.micro_batch.as_dict(),
    }


def described(soft_prompt: SoftPrompt, path: Path) -> dict[str, Any]:
    """What a stored soft prompt says of itself and its training, for programs."""
    record = soft_prompt.training
    return {
        "name": soft_prompt.name,
        "path": str(path),
        "bytes": path.stat().st_size,
        "base": soft_prompt.base,
        "num_virtual_tokens": soft_prompt.num_virtual_tokens,
        "numbers": soft_prompt.vectors.numel(),
        "metrics": list(soft_prompt.metrics),
        "steps": record["steps_done"],
        **{key: record[key] for key in ("best_step", "stopped", "loss", "tokens", "train_seconds")},
    }
