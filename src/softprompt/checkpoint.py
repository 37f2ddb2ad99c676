"""What a training writes down to go on after a kill: tensors as safetensors, everything else as JSON in the same
file's header."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from softprompt.errors import StoreError

FILE = "checkpoint.safetensors"
LOG = "log.jsonl"
_KEY = "softprompt_checkpoint"


def save(
    folder: Path, tensors: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
) -> None:
    """Writes a checkpoint, whole or not at all.

    Args:
        folder: exists.
        tensors: by name; not ``optimizer.*``.
        optimizer: of one parameter.
        state: JSON values.

    Raises:
        StoreError: the folder cannot be written or the disk is full; the earlier checkpoint stays.
    """
    slots: dict[str, Any] = next(iter(optimizer.state_dict()["state"].values()), {})
    held = {f"optimizer.{name}": value for name, value in slots.items() if isinstance(value, torch.Tensor)}
    plain = {name: value for name, value in slots.items() if not isinstance(value, torch.Tensor)}
    document = json.dumps({"state": state, "optimizer": plain})
    flat = {name: value.detach().cpu().contiguous() for name, value in (dict(tensors) | held).items()}
    scratch = None
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{FILE}-", delete=False) as file:
            scratch = Path(file.name)
            file.write(to_bytes(flat, metadata={_KEY: document}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, folder / FILE)
    except OSError as error:
        if scratch is not None:
            scratch.unlink(missing_ok=True)
        raise StoreError(
            f"the checkpoint in {folder} cannot be written: {error.strerror or error}; free some space there and resume"
        ) from error


def load(folder: Path, optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Reads a checkpoint and fills ``optimizer``, which must be of the same kind and parameter shape.

    Returns:
        The tensors and the state that were given to ``save``.

    Raises:
        StoreError: the file is damaged.
    """
    path = folder / FILE
    try:
        with safe_open(path, "pt") as file:
            document = json.loads(file.metadata()[_KEY])
            state, slots = dict(document["state"]), dict(document["optimizer"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise StoreError(f"the checkpoint {path} is damaged ({error}); start anew without --resume") from error
    for name in [name for name in tensors if name.startswith("optimizer.")]:
        slots[name.removeprefix("optimizer.")] = tensors.pop(name)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": {0: slots} if slots else {}, "param_groups": groups})
    return tensors, state


def trim_log(path: Path, step: int) -> None:
    """Cuts a log back to the lines up to ``step``: those behind it were written after the checkpoint and will be
    made again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["number"] <= step:
                kept.append(line)
        except (ValueError, KeyError):  # a line cut in two by the kill
            break
    scratch = path.with_name(f".{path.name}-trimmed")
    scratch.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(scratch, path)
