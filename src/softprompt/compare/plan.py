"""What is compared, and on what."""

from __future__ import annotations

import hashlib
import json
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from softprompt.data.example import Dataset, Example
from softprompt.errors import ConfigError
from softprompt.evaluation.evaluate import (
    headline_metric,
)
from softprompt.methods.registry import METHODS
from softprompt.text.template import Template, default_template
from softprompt.text.tokens import overlap
from softprompt.text.verbalizer import Verbalizer

LATENCY_ROWS = {True: 20, False: 5}
"""Requests timed one by one, with labels and for free text."""


@dataclass(frozen=True)
class Plan:
    """What is compared, and on what.

    Attributes:
        task: its name in the results.
        train, validation, test: rows with targets; only the test rows are reported.
        template: with ``{soft_prompt}``; None: the default one for labels or free text.
        verbalizer: label → words; None for free text.
        bases: ids of base models.
        methods: names from ``METHODS``.
        seeds: methods that draw something run with the seeds 0 to ``seeds - 1``.
        starts: how many starts each soft prompt has; the best on validation rows goes on after a tenth of the steps.
        budget: seconds that each cell may learn for, all choices included.
        instructions: hard prompts for ``instruction`` and ``few-shot``.

    Raises:
        ConfigError: a method that does not exist or does not fit, or a number out of range.
    """

    task: str
    train: Dataset
    validation: Dataset
    test: Dataset
    template: Template | None = None
    verbalizer: Verbalizer | None = None
    bases: tuple[str, ...] = ("smollm2-135m",)
    methods: tuple[str, ...] = ()
    seeds: int = 1
    starts: int = 1
    budget: float = 600.0
    instructions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.budget > 0:
            raise ConfigError(f"The budget must be above 0 seconds, not {self.budget}; give for instance 10m.")
        if self.seeds < 1:
            raise ConfigError(f"At least 1 seed is needed, not {self.seeds}; give --seeds 1 or more.")
        if self.starts < 1:
            raise ConfigError(f"At least 1 start is needed, not {self.starts}; give --starts 1 or more.")
        if not self.methods:
            usual = (name for name, method in METHODS.items() if not method.if_asked)
            object.__setattr__(self, "methods", tuple(name for name in usual if not self._lacks(name)))
        for method in self.methods:
            if method not in METHODS:
                raise ConfigError(f"A method must be one of {', '.join(METHODS)}, not {method!r}; choose one.")
            if lack := self._lacks(method):
                raise ConfigError(f"The method {method!r} cannot be compared here: {lack}; leave it out.")

    def _lacks(self, name: str) -> str:
        """What a method needs that is not there; empty if it can run."""
        method = METHODS[name]
        if method.needs_labels and self.verbalizer is None:
            return "the targets are free text, and it needs labels"
        if method.needs_instructions and not self.instructions:
            return "it needs --instruction or --instructions"
        if method.of_several_seeds and self.seeds < 2:
            return "it needs the soft prompts of at least 2 seeds"
        return ""

    @property
    def form(self) -> Template:
        """The template in use."""
        return self.template or default_template(self.verbalizer is not None)

    @property
    def metric(self) -> str:
        """What every method is measured by."""
        return headline_metric(self.train, () if self.verbalizer is None else self.verbalizer.labels)

    @property
    def keys(self) -> list[Key]:
        """All cells, in the order in which to run them."""
        return [
            Key(base, method, seed)
            for base in self.bases
            for method in self.methods
            for seed in range(self.seeds if METHODS[method].seeded else 1)
        ]

    @property
    def timed_alone(self) -> tuple[Example, ...]:
        """The test rows that latency is measured on, the first of which warms up."""
        return self.test.examples[: LATENCY_ROWS[self.verbalizer is not None] + 1]

    def identity(self, method: str) -> dict[str, Any]:
        """What a cell must agree with to stand beside the plan's; instructions count where a method reads them."""
        words = None if self.verbalizer is None else {k: list(v) for k, v in self.verbalizer.words.items()}
        content: dict[str, Any] = {
            "template": self.form.text,
            "labels": words,
            "train": self.train.fingerprint,
            "validation": self.validation.fingerprint,
            "test": self.test.fingerprint,
            "test_rows": len(self.test.examples),
            "budget": self.budget,
        }
        if words is not None and overlap(word for several in words.values() for word in several):
            content["label_ends"] = True  # earlier releases could not predict all of these labels
        if METHODS[method].together is not None and self.starts > 1:
            content["starts"] = self.starts
        if METHODS[method].reads_instructions:
            content["instructions"] = list(self.instructions)
        return {key: _digest(value) if key in ("instructions", "labels") else value for key, value in content.items()}


@dataclass(frozen=True, order=True)
class Key:
    """Which cell."""

    base: str
    method: str
    seed: int

    @property
    def file_name(self) -> str:
        """A name for the cell's own files, another for each base model."""
        readable = re.sub(r"[^A-Za-z0-9.-]+", "-", Path(self.base).name)[:80]
        digest = "" if readable == self.base else f"-{_digest(self.base)[:8]}"
        return f"{readable}{digest}.{self.method}.{self.seed}"

    @property
    def earlier_file_name(self) -> str:
        """What earlier releases called them: alike for base models that share the last part of their ids."""
        return f"{re.sub(r'[^A-Za-z0-9.-]+', '-', Path(self.base).name)}.{self.method}.{self.seed}"


def cut(dataset: Dataset, rows: int | None, seed: int = 0) -> Dataset:
    """A seeded choice of at most ``rows`` rows, in their order."""
    if rows is None or len(dataset.examples) <= rows:
        return dataset
    chosen = sorted(random.Random(seed).sample(range(len(dataset.examples)), rows))
    return replace(
        dataset,
        examples=tuple(dataset.examples[i] for i in chosen),
        fingerprint=_digest([dataset.fingerprint, rows, seed]),
    )


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
