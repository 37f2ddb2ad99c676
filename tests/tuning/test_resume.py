"""What a stopped run goes on with: the same content, from wherever it comes; and what is said where it is another."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt.data.example import Dataset
from softprompt.errors import ConfigError, StoreError, TrainingError
from softprompt.model.frozen import FrozenLM
from softprompt.tuning import checkpoint
from softprompt.tuning.gradients import Gradients
from softprompt.tuning.training import Training
from tests.conftest import Run, make_model, make_tokenizer, scripted, tiny, toy, toy_task, train_settings


def strict(text: str) -> Any:
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def made(folder: Path, data: Dataset | None = None, **options: Any) -> Training:
    data = data or toy(15, 0)
    held_out = replace(toy(20, 1), source=f"{data.source}.dev")
    start = options.pop("start", None)
    config = train_settings(**{"steps": 8, "eval_every": 4, "checkpoint_every": 2} | options)
    return Training(toy_task(tiny("llama"), data), data, held_out, config, start=start, folder=folder, resume=True)


def stopped_at(training: Training, step: int) -> None:
    for done in training:
        if done.number == step:
            return


def test_the_same_rows_may_come_from_another_path(tmp_path: Path) -> None:
    stopped_at(made(tmp_path, replace(toy(15, 0), source="/local/17/train.jsonl")), 4)
    again = made(tmp_path, replace(toy(15, 0), source="./train.jsonl"))
    assert again.step == 4
    list(again)
    assert again.result().data["train"]["source"] == "./train.jsonl"
    assert again.result().data["validation"]["source"] == "./train.jsonl.dev"


def test_the_same_start_may_come_from_another_path(tmp_path: Path) -> None:
    start = torch.full((6, 32), 0.01)
    stopped_at(made(tmp_path, start=start, init="job1/first.safetensors"), 4)
    assert made(tmp_path, start=start.clone(), init="first").step == 4
    with pytest.raises(ConfigError, match="with other start;"):
        made(tmp_path, start=start + 1e-3, init="first")


def test_other_rows_under_the_same_path_are_refused(tmp_path: Path) -> None:
    stopped_at(made(tmp_path), 4)
    with pytest.raises(ConfigError, match="with other training data;"):
        made(tmp_path, toy(15, 3))


def test_how_often_is_saved_may_change(tmp_path: Path) -> None:
    stopped_at(made(tmp_path, checkpoint_every=2), 4)
    assert made(tmp_path, checkpoint_every=1).step == 4


def test_another_base_model_is_named(tmp_path: Path) -> None:
    first = made(tmp_path)
    stopped_at(first, 4)
    model = make_model("llama")
    with torch.no_grad():
        model.lm_head.weight[0] += 1
    lm = FrozenLM(model, make_tokenizer(), name=tiny("llama").name, dtype="fp32", device="cpu")
    with pytest.raises(ConfigError, match="with other base model;"):
        Training(toy_task(lm, toy(15, 0)), toy(15, 0), toy(20, 1), first.config, folder=tmp_path, resume=True)


def test_a_base_model_of_other_settings_is_named(tmp_path: Path) -> None:
    first = made(tmp_path)
    stopped_at(first, 4)
    model = make_model("llama")
    model.config.rms_norm_eps = 1e-3
    lm = FrozenLM(model, make_tokenizer(), name=tiny("llama").name, dtype="fp32", device="cpu")
    with pytest.raises(ConfigError, match="with other base settings;"):
        Training(toy_task(lm, toy(15, 0)), toy(15, 0), toy(20, 1), first.config, folder=tmp_path, resume=True)


def test_a_checkpoint_that_knows_no_base_settings_is_gone_on_from(tmp_path: Path) -> None:
    first = made(tmp_path)
    stopped_at(first, 4)
    tensors, optimizers, state = checkpoint.load(tmp_path)
    del state["identity"]["base settings"]
    checkpoint.save(tmp_path, tensors, optimizers, state)
    assert made(tmp_path).step == 4


def as_version_2(folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, source: str) -> None:
    """Writes a run's checkpoint anew as the releases of schema version 2 did: one digest of four things, and paths."""
    tensors, optimizers, state = checkpoint.load(folder)
    identity, lm = dict(state["identity"]), tiny("llama")
    task = toy_task(lm, toy(15, 0))
    content = [task.template.text, [task.labels, task.words, task.label_of_word], lm.fingerprint, dtype]
    for name in ("template", "labels", "base model", "dtype", "training data", "validation data"):
        identity.pop(name, None)
    identity |= {
        "checkpoint_every": 2,
        "task": hashlib.sha256(json.dumps(content).encode()).hexdigest(),
        "data": {
            "train": {"source": source, "fingerprint": "toy-15-0", "rows": 15},
            "validation": {"source": "dev.jsonl", "fingerprint": "toy-20-1", "rows": 20},
        },
    }
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "SCHEMA_VERSION", 2)
        checkpoint.save(folder, tensors, optimizers, state | {"identity": identity})


def test_checkpoints_of_the_earlier_schema_are_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = made(tmp_path / "whole")
    list(whole)
    stopped_at(made(tmp_path / "old"), 4)
    as_version_2(tmp_path / "old", monkeypatch, "torch.float32", "/elsewhere/train.jsonl")
    again = made(tmp_path / "old")
    assert again.step == 4
    list(again)
    assert torch.equal(again.result().vectors, whole.result().vectors)


def test_of_the_earlier_schema_other_things_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped_at(made(tmp_path), 4)
    as_version_2(tmp_path, monkeypatch, "torch.bfloat16", "train.jsonl")
    with pytest.raises(ConfigError, match=r"other dtype \(bf16 there, fp32 here\); .*--dtype bf16"):
        made(tmp_path)
    as_version_2(tmp_path, monkeypatch, "torch.float32", "train.jsonl")
    with pytest.raises(ConfigError, match="other training data;"):
        made(tmp_path, toy(15, 3))


# --- numbers that are not finite -------------------------------------------------------------------


def test_every_line_of_the_log_is_json_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = [(0.5, math.inf), (0.4, math.nan), (0.6, 1.0)]
    scripted(monkeypatch, script)
    stopped_at(made(tmp_path, steps=12), 8)
    lines = (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()
    found = [strict(line) for line in lines]
    assert [line["validation"]["loss"] for line in found if "validation" in line] == [None, None]
    header = (tmp_path / checkpoint.FILE).read_bytes()
    size = int.from_bytes(header[:8], "little")
    strict(json.loads(header[8 : 8 + size])["__metadata__"]["softprompt_checkpoint"])
    _, _, state = checkpoint.load(tmp_path)
    losses = [past["loss"] for past in state["validations"]]
    assert losses[0] == math.inf
    assert math.isnan(losses[1])
    again = made(tmp_path, steps=12)
    assert again.step == 8
    monkeypatch.undo()
    scripted(monkeypatch, script[2:])
    list(again)
    assert again.result().training["best_step"] == 12


# --- results ---------------------------------------------------------------------------------------


def test_there_is_no_result_before_the_first_step(tmp_path: Path) -> None:
    training = made(tmp_path)
    with pytest.raises(TrainingError, match="iterate over it first"):
        training.result()
    assert training.base_unchanged is None
    next(iter(training))
    assert training.result().training["steps_done"] == 1
    assert training.base_unchanged is True


def test_a_changed_weight_of_the_base_model_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = FrozenLM(make_model("llama"), make_tokenizer(), name="mine", dtype="fp32", device="cpu")
    data = toy(12, 0)
    training = Training(toy_task(lm, data), data, data, train_settings(steps=2))
    list(training)
    with torch.no_grad():
        lm.model.lm_head.weight[3, 4] += 1e-3
    with pytest.raises(TrainingError, match="base model mine is not what it was"):
        training.result()
    assert training.base_unchanged is False


def test_nothing_is_stored_for_a_base_model_that_changed(run: Run, train: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    add = Gradients.add

    def spoil(gradients: Gradients, *values: Any) -> Any:
        with torch.no_grad():
            gradients.lm.model.lm_head.weight[0, 0] += 1
        return add(gradients, *values)

    monkeypatch.setattr(Gradients, "add", spoil)
    ran = train("train.jsonl", "--name", "films", "--json")
    assert (ran.code, ran.out) == (2, "")
    assert "is not what it was before the training" in ran.err
    assert run("list", "--json").json["soft_prompts"] == []


# --- who holds the folder --------------------------------------------------------------------------


def test_a_training_that_was_interrupted_does_not_write_over_one_that_went_on(tmp_path: Path) -> None:
    first = made(tmp_path)
    stopped_at(first, 2)
    second = made(tmp_path)
    list(second)
    with pytest.raises(StoreError, match="Another training has used"):
        next(iter(first))
    assert made(tmp_path).step == 8


def test_a_training_that_was_interrupted_goes_on_where_nobody_else_did(tmp_path: Path) -> None:
    training = made(tmp_path)
    for last in (2, 3, 6):
        stopped_at(training, last)
    assert [step.number for step in training] == [7, 8]
