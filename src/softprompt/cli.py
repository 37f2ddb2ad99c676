"""The command line: parse → configuration → one call; the only place that prints results.

Results go to stdout, progress and warnings to stderr. A user's mistake is one sentence and exit code 2.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from typer.core import TyperCommand

from softprompt import __version__, artifact, demo
from softprompt.arguments import spread
from softprompt.base import DEFAULT_BASE
from softprompt.cli_compare import compare_command
from softprompt.cli_inspect import harden_command, inspect_command
from softprompt.cli_serve import serve_command
from softprompt.config import TrainConfig
from softprompt.data import Example, check_targets, read_dataset
from softprompt.encoding import text_of
from softprompt.errors import ConfigError, DataError, SoftPromptError, StoreError
from softprompt.evaluate import Prediction, Query, choose_metrics, default_sampling, evaluate, predict
from softprompt.files import local_path, strict_json
from softprompt.frozen import FrozenLM, Sampling
from softprompt.notes import as_note, hear_warnings
from softprompt.options import (
    SEED_RANGE,
    SOURCE,
    Base,
    BaseOnly,
    Device,
    Dtype,
    Encoding,
    InputField,
    Json,
    MaxNewTokens,
    Name,
    Normalise,
    ReferencesField,
    SampleSeed,
    Stop,
    TargetField,
    Temperature,
    TopP,
    Trust,
    data_option,
    load_base_model,
    option,
    references_column,
    with_line_ends,
)
from softprompt.packages import ROTTEN_TOMATOES
from softprompt.prompt import SoftPrompt
from softprompt.run_folder import RunFolder
from softprompt.store import Store
from softprompt.summary import short_names
from softprompt.task import Task
from softprompt.template import Template
from softprompt.terminal import (
    metrics_table,
    number,
    plain_metric,
    print_rows,
    rows_bar,
    shortened,
    simple_table,
    stderr,
    stdout,
    warn_truncated,
)
from softprompt.tune import train_command

app = typer.Typer(
    name="softprompt",
    help="Adapt a frozen language model to a task by learning a soft prompt: kilobytes a task, one model in memory.",
    epilog="Quick start: softprompt demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # but for what notes.heard() hears of it
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what a terminal cannot show must still be told apart
    try:
        with warnings.catch_warnings():
            hear_warnings()
            warnings.showwarning = lambda message, *_: print(f"Note: {as_note(str(message))}.", file=sys.stderr)
            typed = sys.argv[1:] if arguments is None else arguments
            app(spread(typer.main.get_command(app), typed), prog_name="softprompt")
        code = 0
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else 1
    except KeyboardInterrupt:
        code = 130
    except SoftPromptError as error:
        code = _fail(str(error))
    except OSError as error:
        place = f"{error.filename} " if error.filename else ""
        code = _fail(f"{place}cannot be read or written: {error.strerror or error}; check the disk and permissions")
    return code if _flushed() else 1


def _fail(sentence: str) -> int:
    stderr.print(f"error: {sentence}")
    return 2


def _flushed() -> bool:
    """Writes out what is left, silently where the reader has gone (``softprompt list | head -1``)."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


def _print_json(document: dict[str, Any]) -> None:
    print(strict_json(document))


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"softprompt {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


app.command("train")(train_command)
app.command("compare")(compare_command)
app.command("inspect")(inspect_command)
app.command("harden")(harden_command)
app.command("serve")(serve_command)


# --- evaluate and predict ------------------------------------------------------------------------


def _task(lm: FrozenLM, soft_prompt: SoftPrompt, base_only: bool) -> tuple[Task, torch.Tensor | None]:
    task = Task.of(lm, soft_prompt)
    return (task.without_soft_prompt(), None) if base_only else (task, soft_prompt.vectors)


def _sampling_options(
    max_new_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    stop: Sequence[str] | None,
    seed: int | None,
) -> dict[str, Any]:
    """What was given of ``Sampling``, checked."""
    given: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "stop": tuple(map(with_line_ends, stop)) if stop else None,
        "seed": seed,
    }
    options = {key: value for key, value in given.items() if value is not None}
    Sampling(**options)
    return options


@app.command("evaluate")
def evaluate_command(
    name: Name,
    test: Annotated[str, typer.Argument(metavar="TEST", help=SOURCE)],
    base_only: BaseOnly = False,
    metric: Annotated[list[str] | None, option("Only these metrics, the first is the headline.", "all")] = None,
    normalise_length: Normalise = False,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    stop: Stop = None,
    seed: SampleSeed = None,
    input_field: InputField = None,
    target_field: TargetField = "target",
    references_field: ReferencesField = None,
    encoding: Encoding = None,
    base: Base = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Measure a soft prompt on rows with targets.

    Labels: accuracy, macro_f1, mcc, log_loss. Free text: bleu, rouge_l, exact_match, token_f1, perplexity.

    \b
    softprompt evaluate sst2 test.jsonl
    softprompt evaluate sst2 test.jsonl --base-only --json
    softprompt evaluate qa test.csv --metric token_f1 --stop "\\n"
    """
    options = _sampling_options(max_new_tokens, temperature, top_p, stop, seed)
    soft_prompt = Store().load(name)
    form = Template(soft_prompt.template)
    choose_metrics(metric, labels=soft_prompt.verbalizer is not None)
    if soft_prompt.verbalizer is not None and references_field not in (None, "none"):
        raise ConfigError(
            f"--references-field is for free text, but the soft prompt {soft_prompt.name!r} answers with labels; "
            f"leave it out."
        )
    dataset = read_dataset(
        test,
        fields=form.fields,
        input_field=input_field,
        target_field=target_field,
        references_field=references_column(references_field),
        encoding=encoding,
    )
    if soft_prompt.verbalizer is not None:
        check_targets(dataset, list(soft_prompt.verbalizer))
    lm = load_base_model(base or soft_prompt.base, dtype, device, trust_remote_code)
    task, vectors = _task(lm, soft_prompt, base_only)
    sampling = replace(default_sampling(task), **options)
    began = time.perf_counter()
    with rows_bar("evaluating") as progress:
        found = evaluate(
            task,
            vectors,
            dataset,
            metrics=metric,
            normalise=normalise_length,
            sampling=sampling,
            progress=progress,
        )
    warn_truncated(found.truncated, task.max_length)
    what = f"{lm.name} without a soft prompt" if base_only else f"{soft_prompt.name} on {lm.name}"
    if found.most_frequent is not None and found.most_frequent.is_telling:
        stderr.print(f"warning: {what} {found.most_frequent}")
    if as_json:
        _print_json(
            {
                "name": soft_prompt.name,
                "base": lm.name,
                "base_only": base_only,
                "num_virtual_tokens": task.num_virtual_tokens,
                "source": dataset.source,
                "fingerprint": dataset.fingerprint,
                **found.as_dict(),
                "normalise_length": normalise_length,
                "sampling": asdict(sampling) if task.verbalizer is None else None,
                "dtype": str(lm.dtype).removeprefix("torch."),
                "seconds": round(time.perf_counter() - began, 3),
            }
        )
        return
    stdout.print(f"{what}, {dataset.source}")
    stdout.print(metrics_table(metric.as_dict() for metric in found.metrics))


class _TextsCommand(TyperCommand):
    """A command whose arguments are texts, which may begin with a dash as options do."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if hasattr(error, "option_name") and isinstance(getattr(error, "message", None), str):  # no such option
                error.message += "; put -- before a text that begins with a dash, and options before it"  # type: ignore[attr-defined]
            raise


@app.command("predict", cls=_TextsCommand)
def predict_command(
    name: Name,
    text: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TEXT…|-]", help="Input texts; - reads one a line from stdin.", show_default=False),
    ] = None,
    file: Annotated[str | None, data_option(f"Rows to answer: {SOURCE}")] = None,
    base_only: BaseOnly = False,
    normalise_length: Normalise = False,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    stop: Stop = None,
    seed: SampleSeed = None,
    input_field: InputField = None,
    encoding: Encoding = None,
    base: Base = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Answer input texts: a label with probabilities, or generated text.

    A template with several fields takes each TEXT as a JSON object of its fields.

    \b
    softprompt predict sst2 "a stirring film" "a dull mess"
    softprompt predict nli '{"premise": "It rains.", "hypothesis": "It is dry."}'
    softprompt predict sst2 --file reviews.csv --input-field review --json
    """
    options = _sampling_options(max_new_tokens, temperature, top_p, stop, seed)
    soft_prompt = Store().load(name)
    examples = _examples(Template(soft_prompt.template).fields, text or [], file, input_field, encoding)
    lm = load_base_model(base or soft_prompt.base, dtype, device, trust_remote_code)
    task, vectors = _task(lm, soft_prompt, base_only)
    with rows_bar("predicting") as progress:
        found = predict(
            [Query(task, example, vectors) for example in examples],
            sampling=replace(default_sampling(task), **options),
            normalise=normalise_length,
            progress=progress,
        )
    warn_truncated(sum(prediction.truncated for prediction in found), task.max_length)
    if as_json:
        _print_json(
            {
                "name": soft_prompt.name,
                "base": lm.name,
                "base_only": base_only,
                "predictions": [
                    {
                        "fields": dict(example.fields),
                        "text": prediction.text,
                        "probabilities": prediction.probabilities,
                        "finish": prediction.finish,
                        "truncated": prediction.truncated,
                    }
                    for example, prediction in zip(examples, found, strict=True)
                ],
            }
        )
        return
    for prediction in found:
        stdout.print(_answer(prediction))


def _answer(prediction: Prediction) -> str:
    """The generated text, or the three most probable labels with their probabilities."""
    if prediction.probabilities is None:
        return prediction.text
    ranked = sorted(prediction.probabilities.items(), key=lambda item: -item[1])
    return "  ".join(f"{label} {probability:.3f}" for label, probability in ranked[:3])


def _examples(
    names: Sequence[str], texts: Sequence[str], file: str | None, input_field: str | None, encoding: str | None
) -> tuple[Example, ...]:
    """The inputs to answer, from the command line, standard input or a file."""
    if (file is None) == (not texts):
        raise ConfigError("Either texts or --file are needed to predict, not both; give TEXT, - for stdin, or --file.")
    if file is not None:
        return read_dataset(
            file, fields=names, input_field=input_field, require_target=False, references_field="", encoding=encoding
        ).examples
    if list(texts) != ["-"]:
        return tuple(_example(text, f"text {i}", names) for i, text in enumerate(texts, start=1))
    text = text_of(sys.stdin.buffer.read(), "stdin", encoding).replace("\r\n", "\n").replace("\r", "\n")
    lines = [(i, line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise DataError("Expected a text a line on standard input, found none; pipe some in.")
    return tuple(_example(line, f"stdin:{i}", names) for i, line in lines)


def _example(text: str, where: str, names: Sequence[str]) -> Example:
    values: Any = {names[0]: text}
    if len(names) > 1:
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict) or not all(isinstance(values.get(name), str) for name in names):
            raise DataError(
                f"{where}: expected a JSON object with texts for {', '.join(names)}, found {shortened(text, 60)!r}; "
                f"write one, or give rows with --file."
            )
    if not any(values[name].strip() for name in names):
        raise DataError(f"{where}: expected text for {{{'}, {'.join(names)}}}, found only blanks; write some.")
    for name in names:
        if any("\ud800" <= letter <= "\udfff" for letter in values[name]):
            raise DataError(f"{where}: expected UTF-8 for {{{name}}}, found other bytes; convert it.")
    return Example({name: values[name] for name in names}, None, where=where)


# --- the store -----------------------------------------------------------------------------------


@app.command("list")
def list_command(as_json: Json = False) -> None:
    """List the stored soft prompts.

    The store is the folder $SOFTPROMPT_HOME, by default in the user's data directory.

    \b
    softprompt list
    """
    store = Store()
    entries = store.entries()
    if as_json:
        listed: list[dict[str, Any]] = []
        for entry in entries:
            of_entry = {"name": entry.name, "path": str(entry.path), "bytes": entry.bytes}
            if isinstance(entry.soft_prompt, SoftPrompt):
                listed.append({**of_entry, **_brief(entry.soft_prompt)})
            else:
                listed.append({**of_entry, "error": str(entry.soft_prompt)})
        _print_json({"home": str(store.home), "soft_prompts": listed})
        return
    if not entries:
        stderr.print(f"the store {store.home} is empty; see `softprompt train --help` or `softprompt demo`")
        return
    names = short_names(entry.soft_prompt.base for entry in entries if isinstance(entry.soft_prompt, SoftPrompt))
    table = simple_table("name", "base model", ">P", "task", "validation", ">bytes", "created")
    for entry in entries:
        if isinstance(entry.soft_prompt, SoftPrompt):
            brief = _brief(entry.soft_prompt)
            kind = "free text" if brief["labels"] is None else f"{len(brief['labels'])} labels"
            metric = next(iter(brief["metrics"]), None)
            value = "" if metric is None else f"{metric['metric']} {number(metric['metric'], metric['value'])}"
            base = names[brief["base"]]
            length = str(brief["num_virtual_tokens"])
            table.add_row(entry.name, base, length, kind, value, f"{entry.bytes:,}", str(brief["created"])[:10])
        else:
            table.add_row(entry.name, "(unreadable)", "", "", "", f"{entry.bytes:,}", "")
            stderr.print(f"warning: {entry.soft_prompt}")
    stdout.print(table)


def _brief(soft_prompt: SoftPrompt) -> dict[str, Any]:
    return {
        "base": soft_prompt.base,
        "num_virtual_tokens": soft_prompt.num_virtual_tokens,
        "labels": None if soft_prompt.verbalizer is None else list(soft_prompt.verbalizer),
        "metrics": list(soft_prompt.metrics),
        "created": soft_prompt.created,
    }


@app.command("show")
def show_command(name: Name, as_json: Json = False) -> None:
    """Show all that a soft prompt's file says, except its numbers.

    \b
    softprompt show sst2
    softprompt show ./sst2.safetensors --json
    """
    path = Store().find(name)
    soft_prompt = artifact.load(path)
    document = {
        "path": str(path),
        "bytes": path.stat().st_size,
        **soft_prompt.sizes,
        **{field.name: getattr(soft_prompt, field.name) for field in fields(SoftPrompt) if field.name != "vectors"},
    }
    if as_json:
        _print_json(document)
        return
    rows: list[tuple[str, str]] = []
    for key, value in document.items():
        if key == "metrics":
            rows += [(f"metrics.{metric.get('split')}", plain_metric(metric)) for metric in value]
        elif isinstance(value, dict):
            rows += [(f"{key}.{part}", _plain(inner)) for part, inner in value.items()]
        else:
            rows.append((key, _plain(value)))
    print_rows(rows)


def _plain(value: object) -> str:
    return value if isinstance(value, str) and value.isprintable() else json.dumps(value, ensure_ascii=False)


@app.command("rm")
def rm_command(names: Annotated[list[str], typer.Argument(metavar="N…", help="Names in the store.")]) -> None:
    """Delete soft prompts from the store, and what their trainings left behind.

    \b
    softprompt rm sst2 qa
    """
    store = Store()
    stored = set(store.names())
    with ExitStack() as held:
        runs = {}
        for name in dict.fromkeys(names):
            if store.run_folder(name).is_dir():  # a run that was stopped may have left no soft prompt
                runs[name] = held.enter_context(RunFolder(store.run_folder(name), name))
            else:
                store.find(name)
        for name in dict.fromkeys(names):
            if name in stored:
                store.remove(name)
            if name in runs:
                runs[name].remove()
            stdout.print(f"removed {name}")


# --- demo ----------------------------------------------------------------------------------------


@app.command("demo")
def demo_command(
    seed: Annotated[int, option("Seeds split and training.", 0, **SEED_RANGE)] = 0,
    steps: Annotated[int, option("Optimizer steps.", demo.STEPS)] = demo.STEPS,
    out: Annotated[Path | None, option("Copy data, soft prompt and results.json into this folder, too.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """The whole way on real data: tune, measure, keep and swap, in minutes on two cores.

    Data (critics' sentences on films, each "fresh" or "rotten") and base model come from the package index.

    \b
    softprompt demo
    softprompt demo --steps 50 --json
    """
    config = TrainConfig(steps=steps, seed=seed)
    store = Store()
    folder = store.run_folder("demo")
    if "demo" in store.names() and not (folder / "train.jsonl").exists():
        raise StoreError(
            f"The name 'demo' is taken by a soft prompt that is not the demo's, {store.path('demo')}; "
            f"rename or remove it first."
        )
    with RunFolder(folder, "demo"):
        splits = demo.write_splits(demo.read_reviews(ROTTEN_TOMATOES.path()), folder, seed=seed)
        outcome = demo.run(lambda: load_base_model(DEFAULT_BASE, dtype, device, False), splits, config)
        path = store.save(outcome.soft_prompt, overwrite=True)
        document = {"name": "demo", "path": str(path), "bytes": path.stat().st_size, **outcome.as_dict()}
        if out is not None:
            with artifact.atomic_writer(local_path(out) / "results.json") as file:
                file.write(json.dumps(document, indent=2).encode() + b"\n")
            for source in (path, *(folder / f"{name}.jsonl" for name in splits)):
                shutil.copyfile(source, local_path(out) / source.name)
    if as_json:
        _print_json(document)
    else:
        demo.show(outcome, splits, path)
