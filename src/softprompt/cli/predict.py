"""``softprompt evaluate`` and ``softprompt predict``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Annotated, Any

import torch
import typer

from softprompt.cli.options import (
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
    with_line_ends,
)
from softprompt.data.encoding import text_of
from softprompt.data.example import Example, check_targets
from softprompt.data.reading import read_dataset
from softprompt.drawing.words import shortened
from softprompt.errors import ConfigError, DataError
from softprompt.evaluation.evaluate import choose_metrics, evaluate
from softprompt.model.frozen import FrozenLM
from softprompt.model.request import Sampling
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.soft_prompts.store import Store
from softprompt.tasks.predict import Prediction, Query, default_sampling, predict
from softprompt.tasks.reading import references_column
from softprompt.tasks.task import Task
from softprompt.terminal.console import metrics_table, print_json, rows_bar, stderr, stdout, warn_truncated
from softprompt.text.template import Template


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
        print_json(
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
        print_json(
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
