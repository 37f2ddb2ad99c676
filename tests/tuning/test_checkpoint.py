"""The file that a training goes on from; a killed and resumed training is the uninterrupted one, bit for bit."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from softprompt.errors import ConfigError, StoreError
from softprompt.model.frozen import FrozenLM
from softprompt.tasks.task import Task
from softprompt.text.template import Template
from softprompt.text.verbalizer import Verbalizer
from softprompt.tuning import checkpoint, history
from softprompt.tuning.config import TrainConfig
from softprompt.tuning.gradients import Gradients
from softprompt.tuning.optimizer import make_optimizer
from softprompt.tuning.step import Step
from softprompt.tuning.training import Training
from tests.conftest import (
    TOY_LABELS,
    TOY_TEMPLATE,
    make_model,
    make_tokenizer,
    scripted,
    tiny,
    toy,
    toy_task,
    train_settings,
)

STATE = {"step": 7, "best": {"value": 0.1 + 0.2, "loss": 1e-300}, "validations": [], "stopped": "", "tokens": 10**15}


def stepped(name: str, steps: int) -> tuple[torch.Tensor, torch.optim.Optimizer]:
    """A parameter and its optimizer after seeded steps."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(4, 6, generator=generator).requires_grad_()
    optimizer = make_optimizer(TrainConfig(optimizer=name, lr=0.1, weight_decay=0.01), vectors)
    for _ in range(steps):
        vectors.grad = torch.randn(4, 6, generator=generator)
        optimizer.step()
    return vectors, optimizer


def save(folder: Path, tensors: dict[str, torch.Tensor], **optimizers: torch.optim.Optimizer) -> None:
    memories = {name: checkpoint.slots_of(optimizer) for name, optimizer in optimizers.items()}
    checkpoint.save(folder, tensors, memories, STATE)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_everything_comes_back_bit_for_bit(name: str, steps: int, tmp_path: Path) -> None:
    vectors, optimizer = stepped(name, steps)
    tensors = {"vectors": vectors, "odd": vectors.detach().t()[1:]}
    save(tmp_path, tensors, one=optimizer, two=stepped(name, steps + 1)[1])
    copy = torch.zeros(4, 6).requires_grad_()
    other = make_optimizer(TrainConfig(optimizer=name, lr=0.1, weight_decay=0.01), copy)
    tensors, memories, state = checkpoint.load(tmp_path)
    checkpoint.give_slots(other, memories["one"])
    assert state == STATE
    assert sorted(memories) == ["one", "two"]
    assert sorted(tensors) == ["odd", "vectors"]
    assert torch.equal(tensors["odd"], vectors.detach().t()[1:])
    with torch.no_grad():
        copy.copy_(tensors["vectors"])
    assert torch.equal(copy, vectors)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):  # the optimizers go on alike
        gradient = torch.randn(4, 6, generator=generator)
        for parameter, optim in ((vectors, optimizer), (copy, other)):
            parameter.grad = gradient.clone()
            optim.step()
        assert torch.equal(copy, vectors)


def test_an_optimizer_of_several_tensors_comes_back(tmp_path: Path) -> None:
    def made() -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
        tensors = [torch.ones(size).requires_grad_() for size in ((2, 3), (3,), (1, 2, 2))]
        return tensors, make_optimizer(TrainConfig(lr=0.1), *tensors)

    def step(tensors: list[torch.Tensor], optimizer: torch.optim.Optimizer, size: float) -> None:
        for tensor in tensors:
            tensor.grad = torch.full_like(tensor, size)
        optimizer.step()

    tensors, optimizer = made()
    step(tensors, optimizer, 0.5)
    save(tmp_path, {}, it=optimizer)
    others, other = made()
    with torch.no_grad():
        for mine, its in zip(others, tensors, strict=True):
            mine.copy_(its)
    checkpoint.give_slots(other, checkpoint.load(tmp_path)[1]["it"])
    for group in ((tensors, optimizer), (others, other)):
        step(*group, -2.0)
    assert all(torch.equal(mine, its) for mine, its in zip(others, tensors, strict=True))


def damaged(folder: Path) -> str:
    with pytest.raises(StoreError) as error:
        checkpoint.load(folder)
    return str(error.value)


def test_a_flipped_bit_in_any_byte_is_noticed(tmp_path: Path) -> None:
    vectors, optimizer = stepped("adamw", 1)
    save(tmp_path, {"vectors": vectors}, it=optimizer)
    path = tmp_path / checkpoint.FILE
    whole = path.read_bytes()
    named = {"damaged": 0, "another schema": 0}
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        message = damaged(tmp_path)
        named["damaged" if message.startswith(f"the checkpoint {path} is damaged (") else "another schema"] += 1
    assert named["damaged"] > 0.95 * len(whole)
    path.write_bytes(whole)
    checkpoint.load(tmp_path)


def test_a_number_that_is_another_is_noticed_by_the_digest(tmp_path: Path) -> None:
    save(tmp_path, {"vectors": torch.ones(3)})
    path = tmp_path / checkpoint.FILE
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)
    message = damaged(tmp_path)
    assert message.startswith(f"the checkpoint {path} is damaged (its content is not what was written); ")


@pytest.mark.parametrize(
    ("document", "version"),
    [({"schema_version": 1}, "1"), ({"schema_version": 4}, "4"), ({"state": {}, "optimizer": {}}, None)],
)
def test_a_checkpoint_of_another_release_is_named(document: dict[str, Any], version: str, tmp_path: Path) -> None:
    metadata = {"softprompt_checkpoint": json.dumps(document)}
    save_file({"vectors": torch.zeros(4, 6)}, tmp_path / checkpoint.FILE, metadata)
    message = damaged(tmp_path)
    assert message.startswith(f"the checkpoint {tmp_path / checkpoint.FILE} has schema version {version}, ")
    assert message.endswith("or start anew with --overwrite instead of --resume")


def test_what_a_kill_left_is_removed(tmp_path: Path) -> None:
    """As ``atomic_writer`` names it, and as earlier releases did; nothing else goes."""
    list(resumable(tmp_path))
    (tmp_path / "plots.html").write_text("mine")
    before = sorted(path.name for path in tmp_path.iterdir())
    for name in (".checkpoint.safetensors.0011aabb.tmp", ".checkpoint.safetensors-x1y2z3", ".log.jsonl.22cc.tmp"):
        (tmp_path / name).write_bytes(b"half")
    resumable(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_cut_or_changed_header_is_named(tmp_path: Path) -> None:
    vectors, optimizer = stepped("adamw", 2)
    save(tmp_path, {"vectors": vectors}, it=optimizer)
    path = tmp_path / checkpoint.FILE
    whole = path.read_bytes()
    for content in (
        b"",
        whole[:4],
        whole[:100],
        whole[:-1],
        b"\xff" * 8 + whole[8:],
        whole.replace(b'"state', b"'state", 1),
    ):
        path.write_bytes(content)
        message = damaged(tmp_path)
        assert message.startswith(f"the checkpoint {path} is damaged (")
        assert message.endswith("); start anew with --overwrite instead of --resume")
        assert "\n" not in message


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"other": "1"},
        {"softprompt_checkpoint": "no json"},
        {"softprompt_checkpoint": "[]"},
        {"softprompt_checkpoint": '{"schema_version": 2}'},
        {"softprompt_checkpoint": '{"schema_version": 2, "state": {}, "optimizers": 3, "digest": ""}'},
    ],
)
def test_a_foreign_file_is_named(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    save_file({"vectors": torch.zeros(4, 6)}, tmp_path / checkpoint.FILE, metadata)
    message = damaged(tmp_path)
    assert message.startswith(f"the checkpoint {tmp_path / checkpoint.FILE} is damaged (")


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, optimizer = stepped("adamw", 1)
    save(tmp_path, {"vectors": vectors}, it=optimizer)
    before = (tmp_path / checkpoint.FILE).read_bytes()

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(StoreError) as error:
                save(tmp_path, {"vectors": vectors + 1}, it=optimizer)
        assert str(error.value) == (
            f"the checkpoint in {tmp_path} cannot be written: No space left on device; free some space there and resume"
        )
        assert [path.name for path in tmp_path.iterdir()] == [checkpoint.FILE]
        assert (tmp_path / checkpoint.FILE).read_bytes() == before


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError) as error:
        save(tmp_path / "file" / "run", {"vectors": torch.ones(2)})
    assert str(error.value) == (
        f"the checkpoint in {tmp_path / 'file' / 'run'} cannot be written: Not a directory; "
        "free some space there and resume"
    )


def test_a_folder_that_is_gone_is_made_again(tmp_path: Path) -> None:
    """A night's training does not end because its folder was tidied away."""
    save(tmp_path / "gone", {"vectors": torch.ones(2)})
    assert torch.equal(checkpoint.load(tmp_path / "gone")[0]["vectors"], torch.ones(2))


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    log = tmp_path / checkpoint.LOG
    written = [json.dumps({"number": number, "loss": 1 / number}) for number in range(1, 6)]
    log.write_text("".join(line + "\n" for line in written) + '{"number": 6, "lo')
    checkpoint.trim_log(log, 3)
    assert log.read_text().splitlines() == written[:3]
    checkpoint.trim_log(log, 9)
    assert log.read_text().splitlines() == written[:3]
    checkpoint.trim_log(tmp_path / "none.jsonl", 3)
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.LOG]


# --- killed and resumed is never killed ----------------------------------------------------------------------


def resumable(folder: Path, **options: Any) -> Training:
    config = train_settings(**{"steps": 12, "eval_every": 5, "checkpoint_every": 3} | options)
    data = toy(15, 0)
    return Training(toy_task(tiny("llama"), data), data, toy(20, 1), config, folder=folder, resume=True)


def count_lines(folder: Path) -> int:
    """Lines of the log; none while a run that starts anew, since it found no checkpoint, replaces it."""
    try:
        return len((folder / "log.jsonl").read_text(encoding="utf-8").splitlines())
    except FileNotFoundError:
        return 0


def lines(folder: Path) -> list[dict[str, Any]]:
    """The log without its wall times."""
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    for line in log:
        del line["seconds"]
    return log


def kept_history(folder: Path) -> bytes | None:
    """The history's file; None if there is none."""
    path = folder / history.FILE
    return path.read_bytes() if path.exists() else None


def outcome(training: Training) -> dict[str, Any]:
    """Everything about a result but wall times."""
    made = training.result()
    rest = {key: value for key, value in made.training.items() if key != "train_seconds"}
    return {"vectors": made.vectors.numpy().tobytes(), "metrics": made.metrics, "training": rest, "data": made.data}


@pytest.mark.parametrize(
    ("options", "stops"),
    [
        ({}, range(1, 13)),
        ({"optimizer": "adafactor"}, range(1, 13)),
        *[({"parametrisation": kind}, (4, 5)) for kind in ("residual", "superpos", "mlp", "prefix")],
        ({"parametrisation": "prefix", "optimizer": "adafactor", "average": 0.5}, (2, 8)),
        ({"average": 0.9}, (3, 7)),
    ],
    ids=str,
)
def test_stopped_after_any_step_it_goes_on_to_the_same_end(
    options: dict[str, Any], stops: Sequence[int], tmp_path: Path
) -> None:
    whole = resumable(tmp_path / "whole", **options)
    assert [step.number for step in whole] == list(range(1, 13))
    for stop in stops:
        folder = tmp_path / str(stop)
        for step in resumable(folder, **options):
            if step.number == stop:
                break
        again = resumable(folder, **options)
        assert again.step == max(k for k in (0, 3, 5, 6, 9, 10, 12) if k <= stop)  # the last checkpoint
        list(again)
        assert outcome(again) == outcome(whole)
        assert lines(folder) == lines(tmp_path / "whole")
        assert kept_history(folder) == kept_history(tmp_path / "whole")
    kept = [(0, 0), (0, 5), (0, 10), (0, 12)]
    if options.get("parametrisation") == "prefix":
        assert kept_history(tmp_path / "whole") is None
    else:
        assert sorted(history.load(tmp_path / "whole")) == kept


@pytest.mark.parametrize("kind", ["plain", "superpos", "prefix"])
def test_several_starts_stopped_after_any_step_go_on_to_the_same_end(kind: str, tmp_path: Path) -> None:
    """Three starts of 2 steps, then at most 18 more of the best."""
    options: dict[str, Any] = {"parametrisation": kind, "starts": 3, "steps": 20, "average": 0.5, "init": "vocab"}
    options["patience"] = 1
    whole = resumable(tmp_path / "whole", **options)
    assert len(list(whole)) >= 9
    assert whole.result().training["start"] in (0, 1, 2)
    for stop in (1, 2, 3, 5, 6, 8) if kind == "plain" else (4, 7):
        folder = tmp_path / str(stop)
        for step in resumable(folder, **options):
            if step.number == stop:
                break
        again = resumable(folder, **options)
        assert again.step <= stop
        list(again)
        assert outcome(again) == outcome(whole)
        assert lines(folder) == lines(tmp_path / "whole")
        assert kept_history(folder) == kept_history(tmp_path / "whole")
    if kind != "prefix":
        assert [key for key in sorted(history.load(tmp_path / "whole")) if key[1] <= 6] == [
            (start, step) for start in range(3) for step in (2 * start, 2 * start + 2)
        ]


def test_the_log_has_a_line_for_every_step(tmp_path: Path) -> None:
    training = resumable(tmp_path)
    steps = list(training)
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["number"] for line in logged] == list(range(1, 13))
    for line, step in zip(logged, steps, strict=True):
        alarms = {"alarms": [alarm.as_dict() for alarm in step.alarms]} if step.alarms else {}
        told = {name: value for name, value in step.__dict__.items() if value is not None and name != "alarms"}
        assert line == told | alarms
    assert isinstance(steps[0], Step)
    assert [step.number for step in steps if step.validation] == [5, 10, 12]


def test_a_finished_run_stays_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = resumable(tmp_path / "steps")
    list(whole)
    again = resumable(tmp_path / "steps")
    assert list(again) == []
    assert outcome(again) == outcome(whole)

    scripted(monkeypatch, [(0.5, 1.0), (0.4, 1.0), (0.4, 1.0)])
    early = resumable(tmp_path / "early", patience=1, eval_every=2)
    assert [step.number for step in early] == [1, 2, 3, 4]
    again = resumable(tmp_path / "early", patience=1, eval_every=2)
    assert list(again) == []
    assert again.stopped == "early"
    assert outcome(again) == outcome(early)


def test_without_resume_it_starts_anew(tmp_path: Path) -> None:
    first = resumable(tmp_path)
    list(first)
    data = toy(15, 0)
    anew = Training(first.task, data, toy(20, 1), first.config, folder=tmp_path, resume=False)
    assert anew.step == 0
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["log.jsonl"]
    assert (tmp_path / "log.jsonl").read_text(encoding="utf-8") == ""


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lr": 0.2, "seed": 9}, "lr, seed"),
        ({"num_virtual_tokens": 7}, "num_virtual_tokens"),
        ({"optimizer": "adafactor"}, "optimizer"),
        ({"parametrisation": "prefix"}, "parametrisation"),
        ({"average": 0.9}, "average"),
        ({"starts": 2}, "starts"),
        ({"steps": 13}, "steps"),
        ({"data": toy(16, 0)}, "training data"),
        ({"validation": toy(20, 2)}, "validation data"),
        ({"template": Template("{soft_prompt} {input} {target}")}, "template"),
        ({"verbalizer": Verbalizer({"negative": ("negative", "bad"), "positive": ("positive",)})}, "labels"),
        ({"dtype": "bf16"}, "dtype"),
    ],
)
def test_resuming_with_something_else_is_refused(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    list(resumable(tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = dict(change)
    data, validation = other.pop("data", toy(15, 0)), other.pop("validation", toy(20, 1))
    template, verbalizer = other.pop("template", TOY_TEMPLATE), other.pop("verbalizer", TOY_LABELS)
    lm = tiny("llama")
    if dtype := other.pop("dtype", None):
        lm = FrozenLM(make_model("llama"), make_tokenizer(), name="tiny", dtype=dtype, device="cpu")
    config = train_settings(**{"steps": 12, "eval_every": 5, "checkpoint_every": 3} | other)
    task = Task.for_data(lm, data, template, verbalizer=verbalizer, num_virtual_tokens=config.num_virtual_tokens)
    with pytest.raises(ConfigError) as error:
        Training(task, data, validation, config, folder=tmp_path, resume=True)
    found, remedy = str(error.value).split("; ")
    differing = re.sub(r" \([^()]* there, [^()]* here\)", "", found)
    assert differing == f"the checkpoint in {tmp_path} is of a run with other {named}"
    assert remedy.endswith("or start anew with --overwrite instead of --resume")
    assert ("--dtype fp32" in remedy) == ("dtype" in named)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    list(resumable(tmp_path))
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(StoreError) as error:
        resumable(tmp_path)
    assert str(error.value).startswith(f"the checkpoint {path} is damaged (")
    assert str(error.value).endswith("); start anew with --overwrite instead of --resume")
    assert "\n" not in str(error.value)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError) as error:
        resumable(tmp_path / "file" / "run")
    assert str(error.value) == (
        f"the training's folder {tmp_path / 'file' / 'run'} cannot be written: Not a directory; "
        "free some space there, or set SOFTPROMPT_HOME to a folder that can"
    )


def train_until_killed(folder: Path, options: dict[str, Any], calls: int, at: str) -> None:
    """In a process of its own: trains on and dies by SIGKILL at that call of ``at``, or writes the result."""
    count = 0

    def die_in(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == calls:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)

        return counted

    if at == "backward":
        Gradients.add = die_in(Gradients.add)  # type: ignore[method-assign]
    elif at == "replace":  # the checkpoint is written, and not yet in its place
        os.replace = die_in(os.replace)
    elif at == "save":  # the step is logged, and not yet in a checkpoint
        checkpoint.save = die_in(checkpoint.save)
    training = resumable(folder, **options, steps=30, eval_every=7, checkpoint_every=4)
    for _ in training:
        if at == "outside":
            time.sleep(0.1)  # so that the kill from outside finds it at work
    end = outcome(training)
    end["vectors"] = end["vectors"].hex()
    (folder / "result.json").write_text(json.dumps(end, sort_keys=True))


@pytest.mark.parametrize(
    ("options", "kills"),
    [
        ({}, ("backward", "replace", "save", "backward", "replace")),
        pytest.param({"optimizer": "adafactor"}, ("save", "replace"), marks=pytest.mark.slow),
        ({"parametrisation": "residual"}, ("backward", "replace")),
        ({"parametrisation": "superpos", "starts": 2}, ("backward", "backward")),
        ({"parametrisation": "mlp"}, ("save", "backward")),
        ({"parametrisation": "prefix", "average": 0.9}, ("backward", "replace")),
    ],
    ids=str,
)
def test_killed_at_random_moments_and_resumed_is_never_killed(
    options: dict[str, Any], kills: Sequence[str], tmp_path: Path, spawn: Callable[..., Any]
) -> None:
    draw = random.Random(str(options))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = spawn(train_until_killed, whole, options, 0, "")
    process.join(60)
    assert process.exitcode == 0
    for at in kills:
        calls = draw.randint(2, 6) if at == "backward" else draw.randint(1, 2)
        process = spawn(train_until_killed, killed, options, calls, at)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        if at == "replace":  # what was written stays behind until the next start
            assert list(killed.glob(".*.tmp"))
    process = spawn(train_until_killed, killed, options, 0, "outside")
    deadline, known = time.monotonic() + 60, count_lines(killed)
    while count_lines(killed) < known + 2 and time.monotonic() < deadline:
        time.sleep(draw.uniform(0, 0.01))
    process.kill()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    with open(killed / "log.jsonl", "a", encoding="utf-8") as log:
        log.write('{"number": 3, "lo')  # a line that the kill cut in two
    assert not (killed / "result.json").exists()
    process = spawn(train_until_killed, killed, options, 0, "")
    process.join(60)
    assert process.exitcode == 0
    assert (killed / "result.json").read_text() == (whole / "result.json").read_text()
    assert lines(killed) == lines(whole)
    assert kept_history(killed) == kept_history(whole)
    assert (kept_history(whole) is None) == (options.get("parametrisation") == "prefix")
    assert not list(killed.glob(".*"))
