"""What can be compared, and what its cells are called."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softprompt.compare.plan import Key, cut
from softprompt.errors import ConfigError
from tests.compare.made_up import MadeUp, fails, plan
from tests.conftest import toy


@pytest.mark.usefixtures("made_up")
def test_a_plan_says_what_does_not_fit() -> None:
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"methods": ("magic",)}, "A method must be one of zero-shot, soft-prompt, lora, not 'magic'; choose one."),
        ({"budget": 0.0}, "The budget must be above 0 seconds, not 0.0; give for instance 10m."),
        ({"seeds": 0}, "At least 1 seed is needed, not 0; give --seeds 1 or more."),
    ]
    for options, sentence in mistakes:
        with pytest.raises(ConfigError) as caught:
            plan(**options)
        assert str(caught.value) == sentence


def test_methods_that_do_not_fit(made_up: MadeUp) -> None:
    for name in ("tf-idf", "zero-shot-calibrated", "instruction", "soft-prompt-ensemble"):
        made_up[name] = fails
    free: dict[str, Any] = {"verbalizer": None, "template": None}
    assert plan(**free).methods == ("zero-shot", "soft-prompt", "lora")
    for options, method, lack in [
        (free, "tf-idf", "the targets are free text, and it needs labels"),
        (free, "zero-shot-calibrated", "the targets are free text, and it needs labels"),
        ({}, "instruction", "it needs --instruction or --instructions"),
        ({}, "soft-prompt-ensemble", "it needs the soft prompts of at least 2 seeds"),
    ]:
        with pytest.raises(ConfigError) as caught:
            plan(methods=(method,), **options)
        assert str(caught.value) == f"The method {method!r} cannot be compared here: {lack}; leave it out."
    assert "soft-prompt-ensemble" in plan(seeds=2).methods
    assert "instruction" in plan(instructions=("Good or bad?",)).methods


@given(st.integers(1, 40), st.integers(0, 5))
def test_a_cut_is_a_seeded_choice_in_order(rows: int, seed: int) -> None:
    data = toy(30, 3)
    some = cut(data, rows, seed)
    assert len(some.examples) == min(rows, 30)
    places = [data.examples.index(example) for example in some.examples]
    assert places == sorted(set(places))
    assert some == cut(data, rows, seed)
    assert (some.fingerprint == data.fingerprint) == (rows >= 30)
    assert replace(some, examples=()) != replace(cut(data, rows, seed + 1), examples=()) or rows >= 30


def test_every_cell_has_files_of_its_own() -> None:
    bases = ("tiny", "org1/tiny", "org2/tiny", "/models/tiny", "./tiny", "a_b", "a-b", "a b", "x" * 200, "x" * 201)
    names = [Key(base, method, seed).file_name for base in bases for method in ("lora", "prefix") for seed in (0, 1)]
    assert len({name.lower() for name in names}) == len(names)
    for name in names:
        assert re.fullmatch(r"[A-Za-z0-9.-]{1,150}", name)
    assert Key("smollm2-135m", "lora", 1).file_name == "smollm2-135m.lora.1"
    assert Key("org1/tiny", "lora", 1).file_name.startswith("tiny-")
