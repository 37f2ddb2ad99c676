"""``softprompt train`` with several data files or a plan: one soft prompt each, in shared passes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import typer

from softprompt.cli.groups import Learning, Output
from softprompt.cli.options import Loading
from softprompt.cli.place import Place
from softprompt.cli.plan_file import Wanted, read_plan
from softprompt.cli.task import task_name
from softprompt.cli.train import Options, described, document_of, job_of, prepared
from softprompt.data.columns import Columns
from softprompt.data.packages import DEFAULT_BASE
from softprompt.drawing.words import duration, plain_metric, simple_table
from softprompt.errors import ConfigError, SoftPromptError, StoreError, TrainingError
from softprompt.files import strict_json
from softprompt.model.loading import lasting
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.soft_prompts.store import Store, is_name
from softprompt.terminal.console import say_reading, stderr, stdout, were_cut
from softprompt.terminal.many import WORDS, watch_together
from softprompt.terminal.training import say_alarms
from softprompt.tuning import checkpoint
from softprompt.tuning.job import Job, of_job
from softprompt.tuning.training import Training


def tune_plan(source: str, options: Options) -> None:
    """Trains all jobs of a plan. Options of the command line count for all of them, and for more than the plan.

    Args:
        source: the plan's file.
        options: what they say; the training data are the plan's.

    Raises:
        SoftPromptError: a mistake of the user's; each is a line with its job's name.
        typer.Exit: the user pressed Ctrl-C.
    """
    if options.output.name is not None:
        raise ConfigError(f"The names are those of the plan {source}; leave --name out.")
    plan = read_plan(source, given_in(options))
    train_all(plan.jobs, options.output, options.base or plan.base, plan.loaded_as(options.loading), options.as_json)


def given_in(options: Options) -> dict[str, Any]:
    """What the options of the command line say, by the names that a plan has for it."""
    sources = options.sources
    given: dict[str, Any] = {} if options.template == "default" else {"template": options.template}
    asked = {"validation": sources.validation, "labels": sources.labels}
    given |= {name: value for name, value in asked.items() if value is not None}
    for group, defaults in ((options.learning, Learning()), (sources.columns, Columns())):
        own = {field.name: getattr(group, field.name) for field in fields(defaults)}
        given |= {name: value for name, value in own.items() if value != getattr(defaults, name)}
    return given


def tune_files(files: Sequence[str], options: Options) -> None:
    """Trains a soft prompt on each of several data files, with the same options.

    Raises:
        SoftPromptError: a mistake of the user's; each is a line with its job's name.
        typer.Exit: the user pressed Ctrl-C.
    """
    wanted = [
        Wanted(name, replace(options.sources, train=file), options.template, options.learning)
        for file, name in zip(files, names_of(files, options.output.name), strict=True)
    ]
    train_all(wanted, options.output, options.base, options.loading, options.as_json)


def names_of(files: Sequence[str], names: Sequence[str] | None) -> list[str]:
    """What the soft prompts of several data files are called.

    Args:
        files: the files.
        names: None: each as its file; one with ``{file}`` in it: that, with the file's name in its place; else one for
            each file.

    Raises:
        ConfigError: another number of names, or a file's name cannot be one of the store.
    """
    patterns = ["{file}"] if names is None else list(names)
    if len(patterns) == 1 and "{file}" in patterns[0]:
        patterns *= len(files)
    if len(patterns) != len(files):
        raise ConfigError(
            f"Expected a name for each of {len(files)} data files, or one with {{file}} in it, found "
            f"{', '.join(patterns)}; give as many with --name."
        )
    found = [pattern.replace("{file}", task_name(file)) for pattern, file in zip(patterns, files, strict=True)]
    for name, file, pattern in zip(found, files, patterns, strict=True):
        if not is_name(name) and "{file}" in pattern:
            raise ConfigError(f"The file {file} gives no name for a soft prompt, {name!r}; give names with --name.")
    return found


# --- what is asked for, checked ------------------------------------------------------------------


@dataclass
class _Asked:
    """A job, and where its soft prompt goes.

    Attributes:
        job: what is learned.
        place: None where an earlier run has stored it.
        path: the soft prompt's file.
        kept: what an earlier run stored.
        document: what came of it, for programs.
        fault: why there is no soft prompt, or not the one that was hoped for.
    """

    job: Job
    place: Place | None
    path: Path
    kept: SoftPrompt | None = None
    document: dict[str, Any] = field(default_factory=dict)
    fault: str = ""


def _checked(wanted: Sequence[Wanted], output: Output, base: str) -> list[_Asked]:
    """All jobs, their rows read and their places free.

    Raises:
        SoftPromptError: there is a mistake; of several, each is a line.
    """
    if output.out is not None:
        raise ConfigError("--out is for one soft prompt; leave it out, several go to the store.")
    if output.track is not None:
        raise ConfigError("--track is for one soft prompt; leave it out, or train one at a time.")
    names = [each.name for each in wanted]
    found: list[_Asked] = []
    faults: list[SoftPromptError] = []
    store = Store()
    for number, each in enumerate(wanted):
        try:
            with of_job(each.name):
                if each.name in names[:number]:
                    raise ConfigError("another job has the same name; give each a name of its own.")
                store.path(each.name)
                job = job_of(each.name, each.sources, each.template, each.learning, store)
                found.append(_placed(job, store, output, base))
        except SoftPromptError as error:
            faults.append(error)
    if faults:
        raise type(faults[0])("\n".join(map(str, faults)))
    return found


def _placed(job: Job, store: Store, output: Output, base: str) -> _Asked:
    """A job with its place, or with what an earlier run has stored there."""
    path = store.path(job.name)
    if output.resume:
        place = Place.at(job.name, store, overwrite=output.overwrite, resume=True)
        if not place.run.stopped and path.exists() and place.run.may_replace(path):
            kept = store.load(job.name)
            if differing := _differing(kept, job, base):
                raise StoreError(
                    f"The soft prompt {path} is of a training with other {', '.join(differing)}; choose another name, "
                    f"or start all anew with --overwrite instead of --resume."
                )
            return _Asked(job, None, path, kept)
    return _Asked(job, Place.of(job.name, None, overwrite=output.overwrite, resume=output.resume), path)


_NO_MATTER = ("checkpoint_every", "activation_checkpointing", "compile")
"""Settings that change no number, or only its rounding."""


def _differing(kept: SoftPrompt, job: Job, base: str) -> list[str]:
    """In what a stored soft prompt is not what a job would train."""
    asked, record = job.config.as_dict(), kept.training
    resolved = {name for name in ("init_scale", "num_virtual_tokens") if asked[name] is None}
    if job.start is not None:
        resolved.add("init")
    if job.config.lengths:
        resolved.add("num_virtual_tokens")
    names = [name for name in asked if name not in {*resolved, *_NO_MATTER} and record.get(name) != asked[name]]
    rows = {"training data": (job.rows, "train"), "validation data": (job.validation or job.rows, "validation")}
    for what, (dataset, split) in rows.items():
        if kept.data.get(split, {}).get("fingerprint") != dataset.fingerprint:
            names.append(what)
    return names + ["base model"] * (kept.base != lasting(base))


# --- training -------------------------------------------------------------------------------------


def train_all(wanted: Sequence[Wanted], output: Output, base: str | None, loading: Loading, as_json: bool) -> None:
    """Trains all that is wanted in shared passes; each soft prompt is stored as its training ends.

    Raises:
        SoftPromptError: a mistake of the user's, or some of the trainings failed; each is a line with its job's name.
        typer.Exit: the user pressed Ctrl-C.
    """
    began, base = time.perf_counter(), base or DEFAULT_BASE
    asked = _checked(wanted, output, base)
    todo = [each for each in asked if each.place is not None]
    for each in asked:
        if each.kept is not None:
            each.document = described(each.kept, each.path)
            stderr.print(f"{each.job.name}: has ended already, and stays as it is")
    interrupted = False
    with ExitStack() as stack:
        for each in todo:
            with of_job(each.job.name):
                stack.enter_context(_place(each).claimed())
        if todo:
            interrupted = _train(todo, base, loading, began)
    if as_json:
        print(strict_json(_document(asked, base, time.perf_counter() - began)))
    else:
        _print(asked, time.perf_counter() - began)
    if interrupted:
        stderr.print("interrupted; the best so far of each is stored; to go on, give the same command with --resume")
        raise typer.Exit(130)
    faults = [f"job {each.job.name!r}: {each.fault}" for each in asked if each.fault]
    if faults:
        raise TrainingError("\n".join(faults))


def _place(asked: _Asked) -> Place:
    assert asked.place is not None
    return asked.place


def _train(todo: Sequence[_Asked], base: str, loading: Loading, began: float) -> bool:
    """Trains and stores; whether the user pressed Ctrl-C."""
    lm = loading.load(base)
    jobs: dict[int, _Asked] = {}
    trainings: list[Training] = []
    for each in todo:
        with of_job(each.job.name):
            each.job, training = prepared(each.job, _place(each), lm)
        say_reading(each.job.reading, each.job.name)
        if training.truncated:
            said = were_cut(training.truncated, training.task.max_length)
            stderr.print(f"warning: {each.job.name}: {said}")
        trainings.append(training)
        jobs[id(training)] = each
    _require_company(trainings, jobs)

    def store(training: Training) -> None:
        _store(jobs[id(training)], training, time.perf_counter() - began)

    interrupted = False
    try:
        watch_together(trainings, ended=store)
    except KeyboardInterrupt:
        interrupted = True
    for training in trainings:
        if not jobs[id(training)].document and not jobs[id(training)].fault:
            store(training)
    for training in trainings:
        if training.tokens:
            say_alarms(training.alarms, training.name)
    if not interrupted:
        for each in todo:
            if each.document or not each.path.exists():  # what has ended cannot be resumed
                (_place(each).run.path / checkpoint.FILE).unlink(missing_ok=True)
    return interrupted


def _require_company(trainings: Sequence[Training], jobs: dict[int, _Asked]) -> None:
    """Refuses a training that begins where others go on: it would have missed their steps.

    Raises:
        StoreError: there is one.
    """
    going = [training for training in trainings if not training.ended]
    new = [each for each in going if not each.rounds and not _place(jobs[id(each)]).run.stopped]
    if new and any(each.rounds for each in going):
        names = ", ".join(each.name for each in new)
        raise StoreError(
            f"The trainings that were stopped had no {names} among them; train what is new with a command of its own, "
            f"or start all anew with --overwrite instead of --resume."
        )


def _store(asked: _Asked, training: Training, seconds: float) -> None:
    """Stores what came of a training, or keeps why it cannot be."""
    if not training.tokens:
        asked.fault = (
            "the loss is not finite at the very first step, so nothing was learned; try --dtype fp32."
            if training.stopped == "not finite"
            else ""
        )
        return
    try:
        soft_prompt = training.result()
        _place(asked).save(soft_prompt)
        training.watch.require_same_answers(asked.path, soft_prompt)
    except SoftPromptError as error:
        asked.fault = str(error)
        return
    asked.document = document_of(training, soft_prompt, asked.path, asked.job.reading.as_dict(), seconds)
    if training.ended:
        (_place(asked).run.path / checkpoint.FILE).unlink(missing_ok=True)
    if training.stopped == "not finite":
        asked.fault = (
            f"the loss is not finite any more after step {training.step:,} of {training.total:,}; the last good soft "
            f"prompt is in {asked.path}; train again with an --lr below {training.config.lr}, or with --dtype fp32."
        )


def _document(asked: Sequence[_Asked], base: str, seconds: float) -> dict[str, Any]:
    nothing = {"path": None, "stopped": None}
    return {
        "base": lasting(base),
        "seconds": round(seconds, 3),
        "soft_prompts": [
            {"name": each.job.name, **(each.document or nothing), "fault": each.fault or None} for each in asked
        ],
    }


def _print(asked: Sequence[_Asked], seconds: float) -> None:
    table = simple_table("name", ">steps", ">best", "validation", "state")
    for each in asked:
        found = each.document
        if not found:
            table.add_row(each.job.name, "0", "–", "–", "failed" if each.fault else "stopped")
            continue
        metric = plain_metric(found["metrics"][0]) if found["metrics"] else "–"
        steps, best = f"{found['steps']:,}", f"{found['best_step']:,}"
        table.add_row(each.job.name, steps, best, metric, WORDS[found["stopped"]])
    stdout.print(table)
    stdout.print(f"stored in {asked[0].path.parent}, {duration(seconds)} in all")
