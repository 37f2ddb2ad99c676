"""What a tracker is given is what the log has."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import softprompt as sp
from softprompt.errors import ConfigError
from tests.conftest import Run, tiny

ROWS = [{"input": f"a {('great', 'bad')[i % 2]} film {i}", "target": ("good", "bad")[i % 2]} for i in range(40)]
SETTINGS: dict[str, Any] = {"steps": 6, "eval_every": 3, "batch_size": 4, "num_virtual_tokens": 3, "progress": False}


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return found


def test_tensorboard_has_every_step_and_validation(train: Run, home: Path) -> None:
    ran = train("train.jsonl", "--name", "films", "--track", "tensorboard")
    assert ran.code == 0
    folder = home / ".runs" / "films"
    found, log = events(folder / "tensorboard"), logged(folder)
    for tag, key in (("train/loss", "loss"), ("train/lr", "lr"), ("train/grad_norm", "grad_norm")):
        scalars = found.Scalars(tag)
        assert [one.step for one in scalars] == [line["number"] for line in log]
        assert [one.value for one in scalars] == pytest.approx([line[key] for line in log], rel=1e-6)
    validated = [line["validation"] for line in log if "validation" in line]
    accuracy = found.Scalars("validation/accuracy")
    assert [one.step for one in accuracy] == [one["step"] for one in validated]
    assert [one.value for one in accuracy] == pytest.approx([one["value"] for one in validated])


def test_python_tracks_too(tmp_path: Path) -> None:
    sp.train(tiny("llama"), ROWS, folder=tmp_path / "run", track="tensorboard", **SETTINGS)
    assert len(events(tmp_path / "run" / "tensorboard").Scalars("train/loss")) == 6


def test_the_other_trackers_get_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[Any, ...]] = []
    run = SimpleNamespace(log=lambda values, step: said.append((step, values)), finish=lambda: said.append(("end",)))
    wandb: Any = ModuleType("wandb")

    def init(**options: Any) -> Any:
        said.append(("start", options["name"], options["config"]["steps"]))
        return run

    wandb.init = init
    mlflow: Any = ModuleType("mlflow")
    mlflow.start_run = lambda run_name: said.append(("start", run_name))
    mlflow.log_params = lambda settings: said.append(("settings", settings["steps"]))
    mlflow.log_metrics = lambda values, step: said.append((step, values))
    mlflow.end_run = lambda: said.append(("end",))
    for name, module in (("wandb", wandb), ("mlflow", mlflow)):
        monkeypatch.setitem(sys.modules, name, module)
        said.clear()
        folder = tmp_path / name
        sp.train(tiny("llama"), ROWS, name="films", folder=folder, track=name, **SETTINGS)
        assert said[0][:2] == ("start", "films")
        assert said[-1] == ("end",)
        steps = {one[0]: one[1] for one in said if isinstance(one[0], int)}
        log = {line["number"]: line for line in logged(folder)}
        assert {step: values["train/loss"] for step, values in steps.items()} == {
            step: line["loss"] for step, line in log.items()
        }
        assert steps[3]["validation/accuracy"] == log[3]["validation"]["value"]


def test_a_tracker_that_is_not_there_is_named_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="library wandb"):
        sp.train(tiny("llama"), ROWS, track="wandb", **SETTINGS)
    with pytest.raises(ConfigError, match="tensorboard, wandb, mlflow"):
        sp.train(tiny("llama"), ROWS, track="comet", **SETTINGS)
