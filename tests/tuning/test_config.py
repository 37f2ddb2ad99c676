"""Settings: the defaults hold, every fault is named at once, a preset is the published recipe."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from softprompt.errors import ConfigError
from softprompt.tuning.config import DEFAULT_STEPS, PRESETS, TrainConfig, most_steps, preset


def message(**options: Any) -> str:
    with pytest.raises(ConfigError) as error:
        TrainConfig(**options)
    return str(error.value)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        *[
            ({name: 0}, f"{name} must be at least 1, not 0")
            for name in (
                "num_virtual_tokens",
                "starts",
                "batch_size",
                "steps",
                "eval_every",
                "validation_rows",
                "checkpoint_every",
                "max_length",
            )
        ],
        *[({name: -1}, f"{name} must be at least 0, not -1") for name in ("patience", "weight_decay", "clip", "seed")],
        (
            {"parametrisation": "lora"},
            "parametrisation must be one of plain, residual, superpos, mlp, prefix, not 'lora'",
        ),
        ({"average": 1.0}, "average must be in [0, 1), not 1.0"),
        ({"average": -0.1}, "average must be in [0, 1), not -0.1"),
        ({"average": math.nan}, "average must be in [0, 1), not nan"),
        ({"loss": "mse"}, "loss must be one of lm, labels, not 'mse'"),
        ({"init_scale": 0.9}, "init_scale must be at least 1 and below 1000, not 0.9"),
        ({"init_scale": 1000.0}, "init_scale must be at least 1 and below 1000, not 1000.0"),
        ({"init_scale": math.nan}, "init_scale must be at least 1 and below 1000, not nan"),
        ({"optimizer": "sgd"}, "optimizer must be one of adamw, adafactor, not 'sgd'"),
        ({"schedule": "step"}, "schedule must be one of linear, cosine, constant, not 'step'"),
        ({"compile": "maybe"}, "compile must be one of auto, on, off, not 'maybe'"),
        ({"lr": 0.0}, "lr must be above 0 and below 1000 RMS of the start, not 0.0"),
        ({"lr": 1000.0}, "lr must be above 0 and below 1000 RMS of the start, not 1000.0"),
        ({"lr": math.nan}, "lr must be above 0 and below 1000 RMS of the start, not nan"),
        ({"warmup": 1.0}, "warmup must be a share of the steps in [0, 1), not 1.0"),
        ({"warmup": -0.1}, "warmup must be a share of the steps in [0, 1), not -0.1"),
        ({"epochs": 0.0}, "epochs must be above 0 and finite, not 0.0"),
        ({"epochs": math.inf}, "epochs must be above 0 and finite, not inf"),
        ({"steps": 5, "epochs": 1.0}, "steps and epochs exclude each other; give one of them"),
        ({"init": "text"}, "init text needs an init_text; give one"),
        ({"init": "text", "init_text": ""}, "init text needs an init_text; give one"),
        ({"init": "vocab", "init_text": "a"}, "an init_text goes with init text, not vocab"),
    ],
)
def test_every_bound_has_its_sentence(options: dict[str, Any], sentence: str) -> None:
    assert message(**options) == sentence


def test_all_faults_are_named_at_once() -> None:
    assert message(batch_size=0, lr=-1.0, loss="x") == (
        "batch_size must be at least 1, not 0; loss must be one of lm, labels, not 'x'; "
        "lr must be above 0 and below 1000 RMS of the start, not -1.0"
    )


def test_bounds_themselves_are_allowed() -> None:
    TrainConfig(patience=0, clip=0.0, warmup=0.0, weight_decay=0.0, seed=0, steps=1, batch_size=1, epochs=None)
    TrainConfig(epochs=0.5)
    TrainConfig(init="text", init_text="a")
    TrainConfig(init_text="a")
    TrainConfig(init="another-soft-prompt", init_scale=1.0)


def test_settings_are_json() -> None:
    config = TrainConfig(steps=7, init_text="a")
    assert TrainConfig(**json.loads(json.dumps(config.as_dict()))) == config


def test_where_time_is_given_a_run_has_the_default_steps_or_20_passes() -> None:
    assert most_steps(rows=100, batch_size=16) == DEFAULT_STEPS == 1600
    assert most_steps(rows=1280, batch_size=16) == 1600
    assert most_steps(rows=1281, batch_size=16) == 1602


def test_the_recipe_of_lester_et_al() -> None:
    config = preset("lester2021")
    assert config.lr == pytest.approx(0.02804, rel=1e-3)  # 0.3 on a table of RMS 10.7
    expected = {
        "num_virtual_tokens": 100,
        "init_scale": 1.0,
        "optimizer": "adafactor",
        "schedule": "constant",
        "warmup": 0.0,
        "weight_decay": 1e-5,
        "batch_size": 32,
        "steps": 30_000,
        "clip": 0.0,
        "average": 0.0,
        "patience": 0,
    }
    assert {name: getattr(config, name) for name in expected} == expected


def test_a_preset_gives_way_to_what_is_given() -> None:
    assert preset("lester2021", num_virtual_tokens=5, lr=0.5).num_virtual_tokens == 5
    assert preset("lester2021", steps=9).steps == 9
    by_epochs = preset("lester2021", epochs=2.0)
    assert (by_epochs.steps, by_epochs.epochs) == (None, 2.0)
    with pytest.raises(ConfigError) as error:
        preset("lester2022")
    assert str(error.value) == f"the preset must be one of {', '.join(PRESETS)}, not 'lester2022'"
    with pytest.raises(ConfigError):
        preset("lester2021", batch_size=0)
