"""``softprompt train``: options → data and settings, checked before a model is loaded → ``Training`` → a file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from softprompt.cli.options import (
    LABELS,
    SEED_RANGE,
    SOURCE,
    Device,
    Dtype,
    Encoding,
    InputField,
    Json,
    ReferencesField,
    TargetField,
    Trust,
    data_option,
    flag,
    in_utf8,
    load_base_model,
    model_option,
    option,
)
from softprompt.cli.task import template_from
from softprompt.data.checks import Reading
from softprompt.data.packages import DEFAULT_BASE
from softprompt.drawing.words import duration, plain_metric
from softprompt.errors import ConfigError, StoreError, TrainingError
from softprompt.files import local_path, strict_json
from softprompt.soft_prompts import artifact
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.soft_prompts.store import Store
from softprompt.tasks.length import default_num_virtual_tokens
from softprompt.tasks.reading import read_task, taken_for
from softprompt.tasks.task import Task
from softprompt.terminal.console import print_rows, say_reading, stderr, warn_truncated
from softprompt.terminal.training import watch
from softprompt.text.template import chat_template, default_template
from softprompt.tuning import checkpoint
from softprompt.tuning.config import (
    DEFAULT_STEPS,
    INITS,
    LOSSES,
    OPTIMIZERS,
    PARAMETRISATIONS,
    PRESETS,
    SCHEDULES,
    TrainConfig,
)
from softprompt.tuning.config import preset as published
from softprompt.tuning.run_folder import RunFolder
from softprompt.tuning.training import Training

_D = TrainConfig()

_run = partial(option, panel="The run")

_learn = partial(option, panel="Learning")


def train_command(
    context: typer.Context,
    train: Annotated[str, typer.Argument(metavar="TRAIN", help=SOURCE)],
    name: Annotated[str | None, _run("What to call the soft prompt.")] = None,
    out: Annotated[Path | None, _run("Write to this .safetensors file instead of the store.")] = None,
    resume: Annotated[bool, flag("--resume", "Go on with a run that was stopped.", panel="The run")] = False,
    overwrite: Annotated[bool, flag("--overwrite", "Replace an earlier one of that name.", panel="The run")] = False,
    validation: Annotated[str | None, data_option("Rows to choose the best step by.", "a tenth of TRAIN")] = None,
    template: Annotated[
        str, data_option("default, chat, or text with {soft_prompt}, fields and {target}; \\n: line end.", "default")
    ] = "default",
    labels: Annotated[str | None, data_option(LABELS, "as TRAIN looks")] = None,
    input_field: InputField = None,
    target_field: TargetField = "target",
    references_field: ReferencesField = None,
    encoding: Encoding = None,
    preset: Annotated[str | None, _learn(f"A published recipe as start: {', '.join(PRESETS)}.")] = None,
    num_virtual_tokens: Annotated[int | None, _learn("How many vectors to learn.", "64, more for many labels")] = None,
    init: Annotated[str | None, _learn(f"{', '.join(INITS)}, or a soft prompt's name or path.", _D.init)] = None,
    init_text: Annotated[str | None, _learn("Text to start from.")] = None,
    init_scale: Annotated[float | None, _learn("Length of the start in embeddings.", "as the base model asks")] = None,
    parametrisation: Annotated[str | None, _learn(f"{', '.join(PARAMETRISATIONS)}.", _D.parametrisation)] = None,
    starts: Annotated[int | None, _learn("Short runs of which the best goes on.", _D.starts)] = None,
    lengths: Annotated[str | None, _learn("Other numbers of virtual tokens to try so, a,b,c.")] = None,
    loss: Annotated[str | None, _learn(f"{', '.join(LOSSES)}.", _D.loss)] = None,
    steps: Annotated[int | None, _learn("Optimizer steps.", DEFAULT_STEPS)] = None,
    epochs: Annotated[float | None, _learn("Passes over TRAIN, instead of steps.")] = None,
    batch_size: Annotated[int | None, _learn("Examples a step.", _D.batch_size)] = None,
    lr: Annotated[float | None, _learn("Peak learning rate in RMS of the start.", _D.lr)] = None,
    optimizer: Annotated[str | None, _learn(f"{', '.join(OPTIMIZERS)}.", _D.optimizer)] = None,
    schedule: Annotated[str | None, _learn(f"{', '.join(SCHEDULES)}.", _D.schedule)] = None,
    warmup: Annotated[float | None, _learn("Share of the steps.", _D.warmup)] = None,
    clip: Annotated[float | None, _learn("The most that the gradient's norm may be; 0: any.", _D.clip)] = None,
    weight_decay: Annotated[float | None, _learn("Decoupled, a factor of lr.", _D.weight_decay)] = None,
    average: Annotated[
        float | None, _learn("Decay of the soft prompt's average over steps; 0: none.", _D.average)
    ] = None,
    eval_every: Annotated[int | None, _learn("Steps between validations.", "100, or as fits")] = None,
    patience: Annotated[
        int | None, _learn("Validations worse than the best to stop after; 0: never.", _D.patience)
    ] = None,
    validation_rows: Annotated[int | None, _learn("The most validation rows to use.", _D.validation_rows)] = None,
    max_length: Annotated[int | None, _learn("The most tokens in one sequence.", "the model's window")] = None,
    seed: Annotated[int | None, _learn("Seeds start, order and held-out rows.", _D.seed, **SEED_RANGE)] = None,
    checkpoint_every: Annotated[int | None, _run("Steps between checkpoints.", _D.checkpoint_every)] = None,
    compile: Annotated[str | None, _run("Compile the layers: auto, on, off.", _D.compile)] = None,
    base: Annotated[
        str, model_option("The frozen model: alias, hub id, folder or .gguf file.", DEFAULT_BASE)
    ] = DEFAULT_BASE,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Tune a soft prompt on labelled or free-text examples and store it.

    The base model stays as it is, bit for bit. Targets that look like labels are taken for labels; a line says so.

    \b
    softprompt train train.jsonl --validation dev.jsonl --name sst2
    softprompt train train.jsonl --name sst2 --init-text "Good or bad?" --epochs 2
    softprompt train qa.csv --name qa --template "{soft_prompt}{question} {target}"
    softprompt train hf:ag_news --input-field text --target-field label --name news
    """
    began = time.perf_counter()
    place = Place.of(name, out, overwrite=overwrite, resume=resume)
    config, start = _configuration(context.params, place.store)
    form = None if template in ("default", "chat") else template_from(template)
    names = ("input",) if form is None else form.fields
    rows, held_out, verbalizer = read_task(
        train,
        validation,
        labels,
        names,
        input_field=input_field,
        target_field=target_field,
        references_field=references_field,
        encoding=encoding,
    )
    with place.claimed():
        lm = load_base_model(base, dtype, device, trust_remote_code)
        if start is not None:
            Task.of(lm, start)  # refuses vectors of another base model: they mean nothing here
        form = form or (chat_template(lm.tokenizer) if template == "chat" else default_template(verbalizer is not None))
        if config.num_virtual_tokens is None:
            length = default_num_virtual_tokens(lm, () if verbalizer is None else verbalizer.labels)
            config = replace(config, num_virtual_tokens=length)
        task = Task(lm, form, verbalizer, config.longest, config.max_length or lm.window)
        vectors = None if start is None else start.vectors
        with stderr.status("preparing"):
            training = Training(
                task, rows, held_out, config, name=place.name, start=vectors, folder=place.run, resume=resume
            )
        taken = taken_for(rows, held_out, None, verbalizer, labels, references_field)
        say_reading(taken)
        warn_truncated(training.truncated, task.max_length)
        _train_and_store(training, place, taken, began, as_json)


@dataclass(frozen=True)
class Place:
    """Where a tuned soft prompt goes: what is looked at before the training is what is written after it.

    Attributes:
        name: what it is called.
        path: its file.
        run: the folder of what the run leaves behind: checkpoint, log and history.
        store: the store, even if ``path`` is elsewhere.
        stored_as: its name in the store; None if ``path`` is elsewhere.
        overwrite: whether what is there at the start may be replaced.
        resume: whether a run that was stopped is gone on with.
    """

    name: str
    path: Path
    run: RunFolder
    store: Store
    stored_as: str | None
    overwrite: bool
    resume: bool

    @classmethod
    def of(cls, name: str | None, out: Path | None, *, overwrite: bool, resume: bool) -> Place:
        """The place that the options name, if it can be written.

        Raises:
            ConfigError: neither a name nor a path, or a path of another kind.
            StoreError: as for :meth:`check`, or the name is none.
        """
        store = Store()
        if out is not None:
            path = local_path(out)
            if path.suffix != artifact.SUFFIX or path.is_dir():
                raise ConfigError(f"--out needs the path of a file that ends with {artifact.SUFFIX}, not {out}.")
            stored_as = store.name_of(path)
        elif name is None:
            raise ConfigError("A soft prompt needs a name to be stored under; give --name, or --out with a path.")
        else:
            path, stored_as = store.path(name), name
        folder = Path(f"{path}.run") if stored_as is None else store.run_folder(stored_as)
        place = cls(
            name or path.stem, path, RunFolder(folder, path.stem), store, stored_as, overwrite=overwrite, resume=resume
        )
        place.run.require_free()
        place.check()
        return place

    def check(self) -> None:
        """Refuses a place that a training must not write to.

        Raises:
            StoreError: a run was stopped there, or a soft prompt is there that may not be replaced.
        """
        stopped = self.run.stopped
        if self.overwrite:
            return
        if stopped and not self.resume:
            raise StoreError(
                f"A training of {self.path.stem!r} was stopped before its end, see {self.run.path}; "
                f"add --resume to go on with it, or --overwrite to start anew."
            )
        if stopped:
            if self._taken():
                raise StoreError(
                    f"The soft prompt {self.path} is not of the training that was stopped, see {self.run.path}; "
                    f"move it away, or add --overwrite to --resume to replace it."
                )
        elif self.stored_as is not None:
            self.store.require_free(self.stored_as)
        elif self.path.exists():
            raise StoreError(f"The file {self.path} exists; choose another --out, or add --overwrite to replace it.")

    def _taken(self) -> bool:
        return self.path.exists() and not self.run.may_replace(self.path)

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keeps the place for this run until the block ends.

        Raises:
            StoreError: as for :meth:`check`; or another run has the place, or the folder cannot be written.
        """
        with self.run:
            self.check()
            given_up = [self.path.read_bytes()] if self.overwrite and self.path.is_file() else []
            self.run.allow(*given_up, anew=not (self.resume and self.run.stopped))
            yield

    def save(self, soft_prompt: SoftPrompt) -> None:
        """Writes the soft prompt.

        Raises:
            StoreError: the file cannot be written, or another soft prompt was put there in the meantime.
        """
        with nullcontext() if self.stored_as is None else self.store.locked():
            if self._taken():
                raise StoreError(
                    f"Another soft prompt was put at {self.path} while this one was trained; the training is not "
                    f"lost: give the same command with --resume after moving that file away, or with --resume and "
                    f"--overwrite to replace it."
                )
            try:
                self.run.allow(artifact.encode(soft_prompt))
                artifact.save(soft_prompt, self.path)
            except StoreError as error:
                saved = f"{error}".rstrip(".")
                raise StoreError(f"{saved}; the training is not lost: give the same command with --resume.") from error


def _configuration(parameters: dict[str, Any], store: Store) -> tuple[TrainConfig, SoftPrompt | None]:
    """The run's settings, and the soft prompt to start from if ``--init`` names one."""
    names = [field.name for field in fields(TrainConfig)]
    given = {name: parameters[name] for name in names if parameters[name] is not None}
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
    recipe = parameters["preset"]
    return (TrainConfig(**given) if recipe is None else published(recipe, **given)), start


def _lengths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(length) for length in text.split(","))
    except ValueError as error:
        raise ConfigError(
            f"--lengths must be whole numbers with commas between them, for instance 5,50, not {text!r}."
        ) from error


def _train_and_store(training: Training, place: Place, taken: Reading, began: float, as_json: bool) -> None:
    interrupted = False
    try:
        watch(training)
    except KeyboardInterrupt:
        interrupted = True
    if training.step == 0 and interrupted:
        stderr.print("interrupted before the first step; nothing was stored")
        raise typer.Exit(130)
    soft_prompt = training.result()
    place.save(soft_prompt)
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
