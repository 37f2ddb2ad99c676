"""``softprompt predict``: answers to texts from the command line, standard input or a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from softprompt.cli.groups import Answering
from softprompt.cli.options import ColumnOptions, Loading
from softprompt.data.encoding import text_of
from softprompt.data.example import Example
from softprompt.drawing.words import shortened
from softprompt.errors import ConfigError, DataError
from softprompt.model.frozen import FrozenLM
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.soft_prompts.store import Store
from softprompt.tasks.ensemble import Ensemble, JointPrediction, require_ensemble
from softprompt.tasks.predict import Prediction, Query, default_sampling, predict
from softprompt.tasks.task import Task
from softprompt.terminal.console import print_json, rows_bar, stdout, warn_truncated
from softprompt.text.template import Template


@dataclass(frozen=True)
class Inputs:
    """What is to be answered.

    Attributes:
        texts: input texts, or ``-`` for one a line on standard input.
        file: a file or data set of rows in their place.
        input_field: its column that feeds ``{input}``.
        encoding: of the file or of standard input.
        format: of the file's rows.
    """

    texts: Sequence[str]
    file: str | None
    input_field: str | None
    encoding: str | None
    format: str | None


def answer(
    names: str,
    inputs: Inputs,
    answering: Answering,
    *,
    sampling: Mapping[str, Any],
    base: str | None,
    loading: Loading,
    as_json: bool,
) -> None:
    """Prints what a soft prompt, or the base model alone, answers; or what several answer together.

    Raises:
        SoftPromptError: a mistake of the user's, see each step.
    """
    soft_prompts = asked_for(names, answering)
    soft_prompt = soft_prompts[0]
    examples = _examples(soft_prompt, inputs)
    lm = loading.load(base or soft_prompt.base)
    together = Ensemble.of(lm, soft_prompts, answering.vote) if soft_prompts[1:] else None
    task, vectors = asked(lm, soft_prompt, answering.base_only)
    settings, normalise = replace(default_sampling(task), **sampling), answering.normalise_length
    found: Sequence[Prediction]
    with rows_bar("predicting") as progress:
        if together is not None:
            found = together.predict(examples, sampling=settings, normalise=normalise, progress=progress)
        else:
            queries = [Query(task, example, vectors) for example in examples]
            found = predict(queries, sampling=settings, normalise=normalise, progress=progress)
    warn_truncated(sum(prediction.truncated for prediction in found), task.max_length)
    if not as_json:
        for prediction in found:
            stdout.print(_answer(prediction))
        return
    print_json(
        {
            **of_whom(soft_prompts, together),
            "base": lm.name,
            "base_only": answering.base_only,
            "predictions": [
                {
                    "fields": dict(example.fields),
                    **_told(prediction),
                    "truncated": prediction.truncated,
                    **_members(prediction),
                }
                for example, prediction in zip(examples, found, strict=True)
            ],
        }
    )


def asked_for(names: str, answering: Answering) -> list[SoftPrompt]:
    """The soft prompt of a name, or those of several names with commas, if they can answer as they are to.

    Raises:
        ConfigError: they cannot answer together, or an option is for one, or for several of them.
        StoreError, ArtifactError: as for ``Store.load``.
    """
    found = Store().load_several(names)
    if found[1:]:
        if answering.base_only:
            raise ConfigError("--base-only leaves the soft prompt out, of which there are several; name one of them.")
        require_ensemble(found, answering.vote)
    elif answering.vote is not None:
        raise ConfigError(f"--vote is for several soft prompts, A,B,C, but only {names!r} was named; leave it out.")
    return found


def of_whom(soft_prompts: Sequence[SoftPrompt], together: Ensemble | None) -> dict[str, Any]:
    """JSON values: the soft prompt's name; of an ensemble the names with commas, and how it votes."""
    name = ",".join(one.name for one in soft_prompts)
    return {"name": name} if together is None else {"name": name, "vote": together.vote}


def _told(prediction: Prediction) -> dict[str, Any]:
    return {"text": prediction.text, "probabilities": prediction.probabilities, "finish": prediction.finish}


def _members(prediction: Prediction) -> dict[str, Any]:
    if not isinstance(prediction, JointPrediction):
        return {}
    return {"disagreement": prediction.disagreement, "members": [_told(one) for one in prediction.members]}


def asked(lm: FrozenLM, soft_prompt: SoftPrompt, base_only: bool) -> tuple[Task, torch.Tensor | None]:
    """The task and the vectors to ask ``lm`` with."""
    task = Task.of(lm, soft_prompt)
    return (task.without_soft_prompt(), None) if base_only else (task, soft_prompt.vectors)


def _answer(prediction: Prediction) -> str:
    """The generated text, or the three most probable labels with their probabilities."""
    if prediction.probabilities is None:
        return prediction.text
    ranked = sorted(prediction.probabilities.items(), key=lambda item: -item[1])
    shown = "  ".join(f"{label} {probability:.3f}" for label, probability in ranked[:3])
    if isinstance(prediction, JointPrediction) and prediction.differ:
        others = [one.text for one in prediction.members if one.text != prediction.text]
        shown += f"  ({len(others)} of {len(prediction.members)} answer {', '.join(dict.fromkeys(others))})"
    return shown


def _examples(soft_prompt: SoftPrompt, inputs: Inputs) -> tuple[Example, ...]:
    """The inputs to answer."""
    names = Template(soft_prompt.template).fields
    texts, file = inputs.texts, inputs.file
    if (file is None) == (not texts):
        raise ConfigError("Either texts or --file are needed to predict, not both; give TEXT, - for stdin, or --file.")
    if file is not None:
        columns = ColumnOptions(inputs.input_field, "target", "none", inputs.encoding, inputs.format)
        return columns.read(file, soft_prompt, require_target=False).examples
    if list(texts) != ["-"]:
        return tuple(_example(text, f"text {i}", names) for i, text in enumerate(texts, start=1))
    text = text_of(sys.stdin.buffer.read(), "stdin", inputs.encoding).replace("\r\n", "\n").replace("\r", "\n")
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
