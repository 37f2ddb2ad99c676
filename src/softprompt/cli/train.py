"""``softprompt train``: options → data and settings, checked before a model is loaded → ``Training`` → a file."""

from __future__ import annotations

import time
from dataclasses import fields, replace
from pathlib import Path

import typer

from softprompt.cli.groups import Learning, Output
from softprompt.cli.options import Loading, in_utf8
from softprompt.cli.place import Place
from softprompt.cli.task import Sources, template_from
from softprompt.data.checks import Reading
from softprompt.drawing.words import duration, plain_metric
from softprompt.errors import ConfigError, StoreError, TrainingError
from softprompt.files import strict_json
from softprompt.model.distributed import is_first
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.soft_prompts.store import Store
from softprompt.tasks.length import default_num_virtual_tokens
from softprompt.tasks.reading import form_of, require_no_chat
from softprompt.tasks.task import Task
from softprompt.terminal.console import print_rows, say_reading, stderr, warn_truncated
from softprompt.terminal.training import watch
from softprompt.text.chat import with_answers
from softprompt.text.template import chat_template
from softprompt.tuning import checkpoint
from softprompt.tuning.config import INITS, TrainConfig
from softprompt.tuning.config import preset as published
from softprompt.tuning.tracking import Track, tracking
from softprompt.tuning.training import Training


def tune(
    sources: Sources, template: str, output: Output, learning: Learning, base: str, loading: Loading, as_json: bool
) -> None:
    """Tunes a soft prompt, stores it, and says what came of it.

    Raises:
        SoftPromptError: a mistake of the user's, see each step.
        typer.Exit: the user pressed Ctrl-C.
    """
    began = time.perf_counter()
    place = Place.of(output.name, output.out, overwrite=output.overwrite, resume=output.resume)
    config, start = _configuration(learning, place.store)
    form = None if template in ("default", "chat") else template_from(template)
    if form is not None:  # who writes a template names the columns
        rows, held_out, verbalizer = sources.read(form.fields, "none")
        require_no_chat(rows, "A template of your own")
    else:
        rows, held_out, verbalizer = sources.read(("input",) if template == "chat" else None)
    with place.claimed():
        lm = loading.load(base)
        if start is not None:
            Task.of(lm, start)  # refuses vectors of another base model: they mean nothing here
        rows, held_out = with_answers(rows, lm.tokenizer), held_out and with_answers(held_out, lm.tokenizer)
        if form is None and template == "chat" and not rows.is_chat:
            form = chat_template(lm.tokenizer)
        form = form or form_of(rows, lm.tokenizer, verbalizer is not None)
        if config.num_virtual_tokens is None:
            length = default_num_virtual_tokens(lm, () if verbalizer is None else verbalizer.labels)
            config = replace(config, num_virtual_tokens=length)
        task = Task(lm, form, verbalizer, config.longest, config.max_length or lm.window)
        vectors = None if start is None else start.vectors
        with stderr.status("preparing"):
            training = Training(
                task, rows, held_out, config, name=place.name, start=vectors, folder=place.run, resume=place.resume
            )
        taken = sources.taken_for(rows, held_out, None, verbalizer)
        say_reading(taken)
        warn_truncated(training.truncated, task.max_length)
        with tracking(output.track if is_first() else None, training, place.run.path / "tensorboard") as track:
            _train_and_store(training, place, taken, began, track, as_json)


def _configuration(learning: Learning, store: Store) -> tuple[TrainConfig, SoftPrompt | None]:
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
        length = given.setdefault("num_virtual_tokens", start.num_virtual_tokens)
        if length != start.num_virtual_tokens:
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


def _train_and_store(
    training: Training, place: Place, taken: Reading, began: float, track: Track, as_json: bool
) -> None:
    interrupted = False
    try:
        watch(training, track=track)
    except KeyboardInterrupt:
        interrupted = True
    if training.step == 0 and interrupted:
        stderr.print("interrupted before the first step; nothing was stored")
        raise typer.Exit(130)
    soft_prompt = training.result()
    place.save(soft_prompt)
    if not is_first():  # which writes and reports
        raise typer.Exit(130 if interrupted else 2 if training.stopped == "not finite" else 0)
    if not interrupted:
        (place.run.path / checkpoint.FILE).unlink(missing_ok=True)  # what has ended cannot be resumed
    _report(training, soft_prompt, place.path, taken, time.perf_counter() - began, as_json)
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
    training: Training, soft_prompt: SoftPrompt, path: Path, taken: Reading, seconds: float, as_json: bool
) -> None:
    record, size = soft_prompt.training, path.stat().st_size
    if as_json:
        document = {
            "name": soft_prompt.name,
            "path": str(path),
            "bytes": size,
            "base": soft_prompt.base,
            "base_unchanged": training.base_unchanged,
            "num_virtual_tokens": soft_prompt.num_virtual_tokens,
            "data": taken.as_dict(),
            "metrics": list(soft_prompt.metrics),
            "steps": record["steps_done"],
            "truncated": training.truncated,
            "seconds": round(seconds, 3),
            "graphs": training.graphs,
            **{key: record[key] for key in ("best_step", "stopped", "loss", "tokens", "train_seconds")},
        }
        print(strict_json(document))
        return
    print_rows(
        [
            ("soft prompt", f"{soft_prompt.name}, {soft_prompt.num_virtual_tokens} virtual tokens"),
            ("file", f"{path} ({size:,} bytes)"),
            ("base model", f"{soft_prompt.base}" + ", unchanged, bit for bit" * bool(training.base_unchanged)),
            *(("validation", plain_metric(metric)) for metric in soft_prompt.metrics),
            ("steps", f"{record['steps_done']:,}, the best of them {record['best_step']:,}"),
            ("time", duration(seconds)),
        ]
    )
