"""Input texts as users give them → examples without targets."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from softprompt.data.columns import Columns
from softprompt.data.example import Example
from softprompt.errors import DataError
from softprompt.files import local_path
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tasks.reading import read_for
from softprompt.text.template import Template

Input = str | Mapping[str, str]
"""An input text, or the texts of a template's fields by name."""

FILES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""How the name of a data file ends that is probably not meant as an input text."""


def examples_of(soft_prompt: SoftPrompt, inputs: Input | Iterable[Input] | Path) -> list[Example]:
    """Input texts, or the rows of a file, for a soft prompt's template.

    Args:
        soft_prompt: what shall answer them.
        inputs: a text or several, or for a template with several fields dicts of them by name; a ``pathlib.Path`` is a
            data file.

    Raises:
        DataError: an input without the template's fields, or blank, or a file that cannot be read.
    """
    if isinstance(inputs, os.PathLike):
        return list(read_for(soft_prompt, inputs, Columns(references_field="none"), require_target=False).examples)
    if isinstance(inputs, str) and inputs.lower().endswith(FILES) and local_path(inputs).is_file():
        raise DataError(f"Expected input text, found the name of a file, {inputs}; write Path({inputs!r}) to read it.")
    form = Template(soft_prompt.template)
    several = [inputs] if isinstance(inputs, str | Mapping) else inputs
    return [example_of(form, given, number) for number, given in enumerate(several, start=1)]


def example_of(template: Template, given: Input, number: int) -> Example:
    """An input, the ``number``-th from 1, as an example without a target.

    Raises:
        DataError: it lacks the template's fields, or is blank.
    """
    names, where = template.fields, f"input {number}"
    if isinstance(given, str) and len(names) == 1:
        texts: Mapping[str, str] = {names[0]: given}
    elif isinstance(given, Mapping) and all(isinstance(given.get(name), str) for name in names):
        texts = given
    else:
        wanted = "a text" if len(names) == 1 else f"a dict with texts for {', '.join(names)}"
        raise DataError(f"{where}: expected {wanted}, found {given!r:.80}; correct it.")
    if not any(texts[name].strip() for name in names):
        raise DataError(f"{where}: expected text for {{{'}, {'.join(names)}}}, found only blanks; write some.")
    return Example({name: texts[name] for name in names}, None, where=where)
