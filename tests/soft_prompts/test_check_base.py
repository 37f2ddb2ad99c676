"""Which base models a soft prompt is used with."""

from __future__ import annotations

from typing import Any

import pytest

from softprompt.errors import BaseModelError, SoftPromptError
from softprompt.soft_prompts.soft_prompt import check_base
from tests.soft_prompts.made import BASE, make, make_prefix


def test_the_same_base_under_any_id_is_accepted() -> None:
    check_base(make(), **BASE)
    check_base(make(), **{**BASE, "base": "/models/SmolLM2-135M"})


def test_a_kv_prefix_goes_by_its_fingerprint() -> None:
    check_base(make_prefix(), **{**BASE, "hidden_size": 16})
    with pytest.raises(BaseModelError) as caught:
        check_base(make_prefix(), **{**BASE, "base": "gpt2", "base_fingerprint": "0" * 64})
    assert str(caught.value) == (
        "The soft prompt 'sst2' was tuned on the base model 'smollm2-135m' (fingerprint abababababab), but the one "
        "loaded is 'gpt2' (fingerprint 000000000000); load 'smollm2-135m', or tune a new soft prompt on 'gpt2'."
    )


@pytest.mark.parametrize(
    ("changes", "tuned", "loaded", "remedy"),
    [
        (
            {"base": "gpt2", "base_fingerprint": "0" * 64, "hidden_size": 16},
            "'smollm2-135m' (width 8)",
            "'gpt2' (width 16)",
            "load 'smollm2-135m', or tune a new soft prompt on 'gpt2'",
        ),
        (
            {"base": "gpt2", "base_fingerprint": "0" * 64},
            "'smollm2-135m' (fingerprint abababababab)",
            "'gpt2' (fingerprint 000000000000)",
            "load 'smollm2-135m', or tune a new soft prompt on 'gpt2'",
        ),
        (
            {"base_fingerprint": "0" * 64},
            "'smollm2-135m' (fingerprint abababababab)",
            "'smollm2-135m' (fingerprint 000000000000)",
            "load the 'smollm2-135m' of that time, or tune a new soft prompt on 'smollm2-135m'",
        ),
        (
            {"base": "copy", "tokenizer_fingerprint": "0" * 64},
            "'smollm2-135m' (tokenizer cdcdcdcdcdcd)",
            "'copy' (tokenizer 000000000000)",
            "load 'smollm2-135m', or tune a new soft prompt on 'copy'",
        ),
    ],
)
def test_a_wrong_base_is_refused_by_name(changes: dict[str, Any], tuned: str, loaded: str, remedy: str) -> None:
    with pytest.raises(BaseModelError) as caught:
        check_base(make(), **{**BASE, **changes})
    assert isinstance(caught.value, SoftPromptError)
    assert str(caught.value) == (
        f"The soft prompt 'sst2' was tuned on the base model {tuned}, but the one loaded is {loaded}; {remedy}."
    )


@pytest.mark.parametrize(
    ("key", "value", "loaded"),
    [
        ("rms_norm_eps", 1e-06, "1e-05"),
        ("rope_parameters.rope_theta", 10_000.0, "100000.0"),
        ("sliding_window", 4096, "None"),
    ],
)
def test_a_base_of_other_settings_is_refused(key: str, value: object, loaded: str) -> None:
    soft_prompt = make(base_settings={**BASE["base_settings"], key: value})
    with pytest.raises(BaseModelError) as caught:
        check_base(soft_prompt, **BASE)
    assert f"'smollm2-135m' ({key} {value!r}), but" in str(caught.value)
    assert f"'smollm2-135m' ({key} {loaded}); load" in str(caught.value)


def test_a_setting_that_only_one_side_knows_is_not_compared() -> None:
    check_base(make(base_settings={"unheard_of": 1, "rms_norm_eps": 1e-05}), **BASE)
