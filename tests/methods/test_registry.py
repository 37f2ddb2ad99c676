"""The list of methods: each once, and what it names is there."""

from __future__ import annotations

from importlib import import_module
from inspect import signature

import pytest

from softprompt.methods.registry import MAJORITY, METHODS, OURS


@pytest.mark.parametrize("name", METHODS)
def test_what_runs_is_there_and_takes_its_options(name: str) -> None:
    module, function, options = METHODS[name].run.args  # type: ignore[attr-defined]
    found = getattr(import_module(f"softprompt.methods.{module}"), function)
    signature(found).bind("a problem", **options)


def test_each_is_told_from_the_others() -> None:
    methods = METHODS.values()
    assert {OURS, MAJORITY} < METHODS.keys()
    assert len({method.words for method in methods}) == len(METHODS)
    looks = [(method.colour, method.marker, method.hollow) for method in methods]
    assert len(set(looks)) == len(METHODS)


def test_what_belongs_together_is_said_together() -> None:
    """A calibrated hard prompt is drawn, told and asked as the plain one is, and needs labels in addition."""
    calibrated = [method for method in METHODS.values() if method.calibrates]
    assert len(calibrated) == sum(method.kind == "hard prompt" for method in METHODS.values()) / 2
    for method in calibrated:
        plain = METHODS[str(method.calibrates)]
        assert method.needs_labels
        assert (method.seeded, method.reads_instructions, method.needs_instructions, method.kind, method.marker) == (
            plain.seeded,
            plain.reads_instructions,
            plain.needs_instructions,
            plain.kind,
            plain.marker,
        )
    for method in METHODS.values():
        assert method.reads_instructions >= method.needs_instructions
        assert method.seeded >= method.validated
