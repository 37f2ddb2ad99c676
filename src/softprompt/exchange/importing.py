"""Soft prompts that other tools trained become ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from softprompt.errors import ArtifactError, ConfigError
from softprompt.exchange import arrays, check, peft_folder
from softprompt.exchange.check import Checked
from softprompt.exchange.peft_folder import PeftPrompt
from softprompt.files import StrPath, local_path
from softprompt.model.frozen import FrozenLM
from softprompt.soft_prompts import artifact
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tasks.task import Task
from softprompt.text.encoder import Encoder
from softprompt.text.template import Template
from softprompt.text.verbalizer import Verbalizer

DEFAULT_TEMPLATE = "{soft_prompt}{input}{target}"
"""Other tools do not say what stood around the text: by default nothing."""


@dataclass(frozen=True, eq=False)
class Found:
    """Numbers of another tool before a base model is known.

    Attributes:
        path: where they were found.
        numbers: float32 ``[P, H]``, ``[P, L, 2, H_kv, D]``, or ``[P, C]`` of PEFT's keys and values.
        base: the base model that they name; empty if they name none.
        peft: the PEFT folder; None for an array.
        task: the task that was chosen of a multitask prompt.
    """

    path: Path
    numbers: torch.Tensor
    base: str
    peft: PeftPrompt | None = None
    task: int | None = None


def find(source: StrPath, task: int | None = None) -> Found:
    """Reads what another tool wrote: a PEFT folder, a ``.npy`` or a ``.safetensors`` file.

    Args:
        source: where it is.
        task: which task of a multitask prompt, from 0.

    Raises:
        ArtifactError: it cannot be read, or holds no soft prompt.
    """
    path = local_path(source)
    if path.is_dir():
        found = peft_folder.read(path, task)
        return Found(path, found.numbers, found.base, found, task)
    if path.suffix not in (".npy", artifact.SUFFIX):
        raise ArtifactError(f"Expected a PEFT folder, or a .npy or .safetensors file, found {path}; check the path.")
    return Found(path, arrays.read(path), "")


def adopt(
    lm: FrozenLM,
    found: Found,
    *,
    name: str,
    template: str = DEFAULT_TEMPLATE,
    verbalizer: Verbalizer | None = None,
    checked: bool = True,
) -> tuple[SoftPrompt, Checked | None]:
    """Makes a soft prompt of ours of what another tool trained.

    Other tools put virtual tokens before everything, also before the token that begins a sequence: where the tokenizer
    adds one, it goes behind a soft prompt that stands first in the template.

    Args:
        lm: the base model that it was trained on.
        found: its numbers.
        name: what it shall be called.
        template: what stood around the text.
        verbalizer: label → words; None: free text.
        checked: compare a few texts with what the other library computes.

    Returns:
        The soft prompt, and what the check found: None without one, or where PEFT is not installed.

    Raises:
        ArtifactError: the numbers do not fit the base model.
        ConfigError: the base model has no place for keys and values.
        TemplateError: the template breaks a rule.
    """
    vectors = _fitting(lm, found)
    form = _behind_bos(lm, Template(template))
    origin: dict[str, Any] = {"imported_from": "an array" if found.peft is None else dict(found.peft.settings)}
    if found.task is not None:
        origin["task"] = found.task
    soft_prompt = Task(lm, form, verbalizer, len(vectors), lm.window).soft_prompt(
        vectors, name=name, parametrisation="prefix" if vectors.dim() == 5 else "plain", training=origin, data={}
    )
    return soft_prompt, _check(lm, soft_prompt, found) if checked else None


def _fitting(lm: FrozenLM, found: Found) -> torch.Tensor:
    """The numbers in our form, if they are of this base model's sizes."""
    numbers, is_kv = found.numbers, found.numbers.dim() == 5 or (found.peft is not None and found.peft.is_kv)
    if is_kv and lm.trained.why_no_kv:
        raise ConfigError(
            f"Expected a base model that can take a prefix of keys and values, which {lm.name} cannot: "
            f"{lm.trained.why_no_kv}; use it with PEFT."
        )
    wanted = lm.trained.kv_shape if is_kv else (lm.hidden_size,)
    width = 1
    for size in wanted:
        width *= size
    if numbers[0].numel() != width or (numbers.dim() == 5 and tuple(numbers.shape[1:]) != tuple(wanted)):
        raise ArtifactError(
            f"Expected {width:,} numbers a virtual token for {lm.name}, found {numbers[0].numel():,} in {found.path}; "
            f"name the base model that it was trained on with --base."
        )
    return numbers.reshape(len(numbers), *wanted).contiguous()


def _behind_bos(lm: FrozenLM, template: Template) -> Template:
    """The template with the token that begins a sequence behind a soft prompt that stands first."""
    if template.parts[0].kind != "soft":
        return template
    bos = Encoder(template, lm.tokenizer, encoder_decoder=lm.encoder_decoder).before_soft_prompt
    if not bos:
        return template
    text = str(lm.tokenizer.decode(list(bos))).replace("{", "{{").replace("}", "}}")
    place = "{soft_prompt}"
    moved = Template(f"{place}{text}{template.text.removeprefix(place)}")
    if Encoder(moved, lm.tokenizer, encoder_decoder=lm.encoder_decoder).before_soft_prompt:
        raise ConfigError(
            f"Expected a token that begins a sequence and is written as text, found {text!r} of {lm.name}; "
            f"write a template with it."
        )
    return moved


def _check(lm: FrozenLM, soft_prompt: SoftPrompt, found: Found) -> Checked | None:
    task = Task.of(lm, soft_prompt)
    if found.peft is None:
        if soft_prompt.vectors.dim() == 5:
            return None
        return check.against_embeddings(lm, task, soft_prompt.vectors, found.numbers)
    try:
        return check.against_peft(lm, task, soft_prompt.vectors, found.path, found.task)
    except ImportError:
        return None
