"""Every method, stated once. What runs is imported when it runs: the names need no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from softprompt.drawing.style import PALETTE
from softprompt.methods.method import Method

if TYPE_CHECKING:
    from pathlib import Path

    from softprompt.errors import SoftPromptError
    from softprompt.methods.problem import Learned, Problem

OURS = "soft-prompt"
"""The method that all others are compared with."""

MAJORITY = "majority-class"
"""The method that shows what a score is worth."""


def _by(module: str, function: str, **options: Any) -> Callable[[Problem], Learned]:
    return partial(_run, module, function, options)


def _run(module: str, function: str, options: dict[str, Any], problem: Problem) -> Learned:
    found: Learned = getattr(import_module(f"softprompt.methods.{module}"), function)(problem, **options)
    return found


def _together(**options: Any) -> Callable[[Sequence[Problem], Path], list[Learned | SoftPromptError]]:
    def learn(problems: Sequence[Problem], folder: Path) -> list[Learned | SoftPromptError]:
        from softprompt.methods.prompt_tuning import soft_prompts

        return soft_prompts(problems, folder, **options)

    return learn


def _and_calibrated(method: Method, function: str) -> tuple[Method, Method]:
    """A hard prompt, and the same with contextual calibration."""
    calibrated = replace(
        method,
        name=f"{method.name}-calibrated",
        words=f"{method.name} with contextual calibration (Zhao et al. 2021)",
        run=_by("hard_prompt", function, calibrate=True),
        needs_labels=True,
        calibrates=method.name,
        hollow=True,
    )
    return method, calibrated


_SHOTS = "worked examples from the training rows, as many as did best on validation rows, in the soft prompt's place"

_ALL = (
    Method(
        name=MAJORITY,
        words="the most frequent label of the training rows, whatever the input",
        run=_by("classical", "majority_class"),
        kind="floor",
        needs_labels=True,
        colour=PALETTE[5],
        marker="d",
    ),
    *_and_calibrated(
        Method(
            name="zero-shot",
            words="the base model as it is, with nothing in the soft prompt's place",
            run=_by("hard_prompt", "zero_shot"),
            kind="hard prompt",
        ),
        "zero_shot",
    ),
    *_and_calibrated(
        Method(
            name="instruction",
            words="a written instruction in the soft prompt's place; of several, the best on validation rows",
            run=_by("hard_prompt", "instruction"),
            kind="hard prompt",
            reads_instructions=True,
            needs_instructions=True,
            marker="s",
        ),
        "instruction",
    ),
    *_and_calibrated(
        Method(
            name="few-shot",
            words=f"{_SHOTS}, drawn at random",
            run=_by("hard_prompt", "few_shot"),
            kind="hard prompt",
            reads_instructions=True,
            seeded=True,
            marker="^",
        ),
        "few_shot",
    ),
    *_and_calibrated(
        Method(
            name="few-shot-nearest",
            words=f"{_SHOTS}, the most similar ones for each input text",
            run=_by("hard_prompt", "few_shot_nearest"),
            kind="hard prompt",
            reads_instructions=True,
            marker="D",
        ),
        "few_shot_nearest",
    ),
    Method(
        name="tf-idf",
        words="logistic regression on weighted counts of words and pairs of words, without a language model",
        run=_by("classical", "tf_idf"),
        kind="floor",
        needs_labels=True,
        colour=PALETTE[6],
        marker="X",
    ),
    Method(
        name="peft-prompt-tuning",
        words="prompt tuning by the library PEFT with its own defaults",
        run=_by("peft", "peft_prompt_tuning"),
        kind="soft prompt",
        seeded=True,
        alone=True,
        colour=PALETTE[4],
        marker="v",
    ),
    Method(
        name=OURS,
        words="trained vectors in front of the input text, the base model frozen",
        run=_by("prompt_tuning", "soft_prompt"),
        together=_together(),
        kind="soft prompt",
        seeded=True,
        validated=True,
        colour=PALETTE[0],
    ),
    Method(
        name="soft-prompt-ensemble",
        words="the soft prompts of all seeds, their probabilities averaged",
        run=_by("prompt_tuning", "ensemble"),
        kind="soft prompt",
        needs_labels=True,
        of_several_seeds=True,
        colour=PALETTE[0],
        marker="D",
        hollow=True,
    ),
    Method(
        name="soft-prompt-majority",
        words="the soft prompts of all seeds, the label that most of them give",
        run=_by("prompt_tuning", "majority"),
        kind="soft prompt",
        needs_labels=True,
        of_several_seeds=True,
        colour=PALETTE[0],
        marker="p",
        hollow=True,
    ),
    Method(
        name="prefix",
        words="trained keys and values, or initial states, in every layer, the base model frozen (prefix tuning)",
        run=_by("prompt_tuning", "soft_prompt", parametrisation="prefix"),
        together=_together(parametrisation="prefix"),
        kind="soft prompt",
        seeded=True,
        validated=True,
        colour=PALETTE[3],
        marker="s",
    ),
    Method(
        name="soft-prompt-decoder",
        words="trained vectors before the input, and 16 before the decoder's input, of an encoder–decoder",
        run=_by("prompt_tuning", "soft_prompt", decoder_virtual_tokens=16),
        together=_together(decoder_virtual_tokens=16),
        kind="soft prompt",
        seeded=True,
        validated=True,
        if_asked=True,
        colour=PALETTE[0],
        marker="v",
    ),
    Method(
        name="lora",
        words="trained low-rank changes of the base model's weights (LoRA), by the library PEFT",
        run=_by("peft", "lora"),
        kind="weights",
        seeded=True,
        alone=True,
        validated=True,
        colour=PALETTE[2],
        marker="^",
    ),
    Method(
        name="full-fine-tuning",
        words="all weights of the base model trained",
        run=_by("fine_tuning", "full_fine_tuning"),
        kind="weights",
        seeded=True,
        alone=True,
        validated=True,
        colour=PALETTE[1],
        marker="P",
    ),
)

METHODS = {method.name: method for method in _ALL}
"""Every method by name, in the order in which they run and are shown."""
