"""The file that a training goes on from: whole or not at all, every bit of it, and nothing but data."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from softprompt import checkpoint
from softprompt.config import TrainConfig
from softprompt.errors import StoreError
from softprompt.train import make_optimizer

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


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_everything_comes_back_bit_for_bit(name: str, steps: int, tmp_path: Path) -> None:
    vectors, optimizer = stepped(name, steps)
    checkpoint.save(tmp_path, {"vectors": vectors, "odd": vectors.detach().t()[1:]}, optimizer, STATE)
    copy = torch.zeros(4, 6).requires_grad_()
    other = make_optimizer(TrainConfig(optimizer=name, lr=0.1, weight_decay=0.01), copy)
    tensors, state = checkpoint.load(tmp_path, other)
    assert state == STATE
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


def damaged(folder: Path) -> str:
    with pytest.raises(StoreError) as error:
        checkpoint.load(folder, stepped("adamw", 0)[1])
    return str(error.value)


def test_a_cut_or_changed_header_is_named(tmp_path: Path) -> None:
    vectors, optimizer = stepped("adamw", 2)
    checkpoint.save(tmp_path, {"vectors": vectors}, optimizer, STATE)
    path = tmp_path / checkpoint.FILE
    whole = path.read_bytes()
    for content in (b"", whole[:4], whole[:100], whole[:-1], b"\xff" * 8 + whole[8:], whole.replace(b'"state', b"'state")):
        path.write_bytes(content)
        message = damaged(tmp_path)
        assert message.startswith(f"the checkpoint {path} is damaged (")
        assert message.endswith("); start anew without --resume")
        assert "\n" not in message


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"other": "1"},
        {"softprompt_checkpoint": "no json"},
        {"softprompt_checkpoint": "[]"},
        {"softprompt_checkpoint": "{}"},
        {"softprompt_checkpoint": '{"optimizer": {}}'},
        {"softprompt_checkpoint": '{"state": {}, "optimizer": 3}'},
    ],
)
def test_a_foreign_file_is_named(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    save_file({"vectors": torch.zeros(4, 6)}, tmp_path / checkpoint.FILE, metadata)
    message = damaged(tmp_path)
    assert message.startswith(f"the checkpoint {tmp_path / checkpoint.FILE} is damaged (")


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, optimizer = stepped("adamw", 1)
    checkpoint.save(tmp_path, {"vectors": vectors}, optimizer, STATE)
    before = (tmp_path / checkpoint.FILE).read_bytes()

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(StoreError) as error:
                checkpoint.save(tmp_path, {"vectors": vectors + 1}, optimizer, STATE)
        assert str(error.value) == (
            f"the checkpoint in {tmp_path} cannot be written: No space left on device; free some space there and resume"
        )
        assert [path.name for path in tmp_path.iterdir()] == [checkpoint.FILE]
        assert (tmp_path / checkpoint.FILE).read_bytes() == before


def test_a_folder_that_is_gone_is_named(tmp_path: Path) -> None:
    vectors, optimizer = stepped("adamw", 1)
    with pytest.raises(StoreError) as error:
        checkpoint.save(tmp_path / "gone", {"vectors": vectors}, optimizer, STATE)
    assert str(error.value) == (
        f"the checkpoint in {tmp_path / 'gone'} cannot be written: No such file or directory; "
        "free some space there and resume"
    )


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
