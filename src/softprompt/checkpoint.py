"""What a training writes down to go on after a kill: tensors as safetensors, everything else as JSON in the same
file's header, with a digest over both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from softprompt import history
from softprompt.artifact import atomic_writer
from softprompt.errors import StoreError

FILE = "checkpoint.safetensors"
LOG = "log.jsonl"
SCHEMA_VERSION = 2
_KEY = "softprompt_checkpoint"

Slots = dict[str, dict[str, Any]]
"""An optimizer's memory: index of a parameter → slot → tensor or JSON value."""


def slots_of(optimizer: torch.optim.Optimizer) -> Slots:
    """What ``optimizer`` remembers of its parameters, to be saved."""
    return {str(index): slots for index, slots in optimizer.state_dict()["state"].items()}


def give_slots(optimizer: torch.optim.Optimizer, slots: Slots) -> None:
    """Makes ``optimizer``, of the same kind and parameters, remember what was saved."""
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": {int(index): held for index, held in slots.items()}, "param_groups": groups})


def save(
    folder: Path, tensors: Mapping[str, torch.Tensor], optimizers: Mapping[str, Slots], state: Mapping[str, Any]
) -> None:
    """Writes a checkpoint, whole or not at all.

    Args:
        folder: is made if it is missing.
        tensors: by name; not ``optimizer/*``.
        optimizers: name, without ``/`` → memory.
        state: JSON values.

    Raises:
        StoreError: the folder cannot be written or the disk is full; the earlier checkpoint stays.
    """
    flat = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    plain: dict[str, Slots] = {}
    for name, memory in optimizers.items():
        plain[name] = {index: {} for index in memory}
        for index, slots in memory.items():
            for slot, value in slots.items():
                if isinstance(value, torch.Tensor):
                    flat[f"optimizer/{name}/{index}/{slot}"] = value.detach().cpu().contiguous()
                else:
                    plain[name][index][slot] = value
    document = {"schema_version": SCHEMA_VERSION, "state": state, "optimizers": plain}
    text = json.dumps(document | {"digest": _digest(document, flat)})
    try:
        with atomic_writer(folder / FILE) as file:
            file.write(to_bytes(flat, metadata={_KEY: text}))
    except OSError as error:
        raise StoreError(
            f"the checkpoint in {folder} cannot be written: {error.strerror or error}; free some space there and resume"
        ) from error


def load(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Slots], dict[str, Any]]:
    """Reads a checkpoint.

    Returns:
        The tensors, the optimizers' memories and the state that were given to ``save``.

    Raises:
        StoreError: the file is damaged, or of another release.
    """
    path = folder / FILE
    try:
        with safe_open(path, "pt") as file:
            document = json.loads(file.metadata()[_KEY])
            version, digest = document.get("schema_version"), document.pop("digest", None)
            if version != SCHEMA_VERSION:
                raise StoreError(
                    f"the checkpoint {path} has schema version {version}, but this release of softprompt goes on from "
                    f"{SCHEMA_VERSION}; finish the run with the release that began it, or start anew without --resume"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        if _digest(document, tensors) != digest:
            raise ValueError("its content is not what was written")
    except (SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise StoreError(f"the checkpoint {path} is damaged ({error}); start anew without --resume") from error
    optimizers: dict[str, Slots] = document["optimizers"]
    for key in [key for key in tensors if key.startswith("optimizer/")]:
        _, name, index, slot = key.split("/")
        optimizers[name][index][slot] = tensors.pop(key)
    return tensors, optimizers, document["state"]


def _digest(document: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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
    with atomic_writer(path) as file:
        file.write("".join(line + "\n" for line in kept).encode())


def tidy(folder: Path) -> None:
    """Removes what a kill in the middle of writing left behind."""
    for name in (FILE, LOG, history.FILE):
        for path in folder.glob(f".{name}*"):
            path.unlink(missing_ok=True)
