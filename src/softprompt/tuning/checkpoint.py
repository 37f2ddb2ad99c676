"""What a training writes down to go on after a kill: tensors as safetensors, everything else as JSON in the same
file's header, with a digest over both."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from softprompt.errors import ConfigError, StoreError
from softprompt.files import StrPath, atomic_writer, local_path
from softprompt.model.loading import DTYPES
from softprompt.tasks.task import Task
from softprompt.tuning import history
from softprompt.tuning.config import TrainConfig

FILE = "checkpoint.safetensors"
EARLIER = "checkpoint.earlier.safetensors"
"""The one before it, kept where several runs must go on from the same step."""
LOG = "log.jsonl"
SCHEMA_VERSION = 3
READABLE = (2, 3)
"""Before version 3, one digest stood for template, labels, base model and dtype, and data went by path, too."""
ANEW = "start anew with --overwrite instead of --resume"
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
    folder: StrPath,
    tensors: Mapping[str, torch.Tensor],
    optimizers: Mapping[str, Slots],
    state: Mapping[str, Any],
    *,
    keep_earlier: bool = False,
) -> None:
    """Writes a checkpoint, whole or not at all.

    Args:
        folder: is made if it is missing.
        tensors: by name; not ``optimizer/*``.
        optimizers: name, without ``/`` → memory.
        state: JSON values.
        keep_earlier: keep the checkpoint before it as ``EARLIER``.

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
    text = json.dumps(_encoded(document | {"digest": _digest(document, flat)}), allow_nan=False)
    path = local_path(folder) / FILE
    try:
        if keep_earlier and path.exists():
            with atomic_writer(path.with_name(EARLIER)) as file:
                file.write(path.read_bytes())
        with atomic_writer(path) as file:
            file.write(to_bytes(flat, metadata={_KEY: text}))
    except OSError as error:
        raise StoreError(
            f"the checkpoint in {folder} cannot be written: {error.strerror or error}; free some space there and resume"
        ) from error


Loaded = tuple[dict[str, torch.Tensor], dict[str, Slots], dict[str, Any]]
"""Tensors, the optimizers' memories and the state, as they were given to ``save``."""


def load(folder: StrPath, *, earlier: bool = False) -> Loaded:
    """Reads a checkpoint, the latest or the one before it.

    Returns:
        The tensors, the optimizers' memories and the state that were given to ``save``.

    Raises:
        StoreError: the file is damaged, or of another release.
    """
    path = local_path(folder) / (EARLIER if earlier else FILE)
    if not path.exists():
        raise StoreError(f"there is no checkpoint {path} to go on from; {ANEW}")
    try:
        with safe_open(path, "pt") as file:
            document = json.loads(file.metadata()[_KEY], object_hook=_decoded)
            version, digest = document.get("schema_version"), document.pop("digest", None)
            if version not in READABLE:
                raise StoreError(
                    f"the checkpoint {path} has schema version {version}, but this release of softprompt goes on from "
                    f"{' and '.join(map(str, READABLE))}; finish the run with the release that began it, or {ANEW}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        if _digest(document, tensors) != digest:
            raise ValueError("its content is not what was written")
    except (SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise StoreError(f"the checkpoint {path} is damaged ({error}); {ANEW}") from error
    optimizers: dict[str, Slots] = document["optimizers"]
    for key in [key for key in tensors if key.startswith("optimizer/")]:
        _, name, index, slot = key.split("/")
        optimizers[name][index][slot] = tensors.pop(key)
    return tensors, optimizers, document["state"]


def _encoded(value: Any) -> Any:
    """JSON has no form for numbers that are not finite; they must come back as they were."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, Mapping):
        return {key: _encoded(inner) for key, inner in value.items()}
    return [_encoded(inner) for inner in value] if isinstance(value, list | tuple) else value


def _decoded(found: dict[str, Any]) -> Any:
    return float(found["float"]) if found.keys() == {"float"} else found


def identity(
    task: Task, config: TrainConfig, total: int, given: torch.Tensor | None, data: Mapping[str, Any]
) -> dict[str, Any]:
    """All that the numbers of a run depend on, which a checkpoint must agree with to be gone on with.

    Args:
        task, config: of the run.
        total: steps planned.
        given: the numbers that it starts from; None: by the rule ``config.init``.
        data: fingerprints and row counts, as ``describe_rows`` gives them.

    Returns:
        JSON values under the names that a user knows.
    """
    settings = config.as_dict()
    for name in ("checkpoint_every", "activation_checkpointing"):  # which change no number
        del settings[name]
    start = None if given is None else given.detach().float().cpu().contiguous().numpy().tobytes()
    return {
        **settings,
        "init": config.init if start is None else "given",  # not the path, which may change
        "start": None if start is None else hashlib.sha256(start).hexdigest(),
        "total": total,
        "template": task.template.text,
        "labels": [task.labels, task.words, task.label_of_word, task.ends],
        "base model": task.model.fingerprint,
        "base settings": dict(task.model.settings),
        "dtype": next(name for name, dtype in DTYPES.items() if dtype == task.model.dtype),
        "quantized": task.model.quantized,
        "training data": [data["train"]["fingerprint"], data["train"]["rows"]],
        "validation data": [data["validation"]["fingerprint"], data["validation"]["rows"]],
    }


def require_same(folder: StrPath, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Refuses to go on with another run than the one that wrote the checkpoint.

    Args:
        folder: where the checkpoint is.
        ours: the run's ``identity``.
        theirs: the same of the checkpoint, or as schema version 2 has it.

    Raises:
        ConfigError: they differ; the sentence names in what, and both values where they are short.
    """
    ours, theirs, differing = json.loads(json.dumps(ours)), dict(theirs), []
    # those that only one of both has are not compared: earlier releases kept none, other libraries know others
    there = theirs.get("base settings", {})
    theirs["base settings"] = {key: there.get(key, value) for key, value in ours["base settings"].items()}
    theirs.setdefault("quantized", "")  # earlier releases quantised nothing
    theirs.setdefault("decoder_virtual_tokens", 0)  # and put nothing there
    if "task" in theirs:
        theirs |= _of_version_2(ours, theirs)
        differing = [] if "template" in theirs else ["template, labels or base model"]
    differing += [key for key in ours if key in theirs or not differing if theirs.get(key) != ours[key]]
    if len(differing) > 1 and "total" in differing:  # it follows from the others
        differing.remove("total")
    if differing:
        named = ", ".join(_named(key, theirs.get(key), ours.get(key)) for key in differing)
        dtype = f" (--dtype {theirs['dtype']})" if "dtype" in differing else ""
        if "quantized" in differing:
            dtype += f" ({f'--quantize {there}' if (there := theirs['quantized']) else 'without --quantize'})"
        raise ConfigError(
            f"the checkpoint in {folder} is of a run with other {named}; "
            f"resume with the same settings and data{dtype}, or {ANEW}"
        )


_UNSHOWN = ("start", "template", "base model", "base settings")


def _named(key: str, there: Any, here: Any) -> str:
    values = (there, here)
    if key in _UNSHOWN or there == here or not all(isinstance(value, str | int | float | None) for value in values):
        return key
    return key if any(len(str(value)) > 40 for value in values) else f"{key} ({there} there, {here} here)"


def _of_version_2(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint of schema version 2 has in other words; without ``template``, ``labels``, ``base model`` and
    ``dtype`` where its one digest of the four is of none of ours."""
    found: dict[str, Any] = {}
    for name, dtype in DTYPES.items():
        content = [ours["template"], ours["labels"][:3], ours["base model"], str(dtype)]
        if hashlib.sha256(json.dumps(content).encode()).hexdigest() == theirs["task"]:
            found = {"dtype": name} | {key: ours[key] for key in ("template", "labels", "base model")}
    if ours["start"] is not None and theirs["start"] is not None:
        found["init"] = ours["init"]  # there, the path of what it started from
    for ours_name, name in (("training data", "train"), ("validation data", "validation")):
        described = theirs["data"][name]
        found[ours_name] = [described["fingerprint"], described["rows"]]
    return found


def _digest(document: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def trim_log(path: StrPath, step: int) -> None:
    """Cuts a log back to the lines up to ``step``: those behind it were written after the checkpoint and will be
    made again."""
    path = local_path(path)
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


def tidy(folder: StrPath) -> None:
    """Removes what a kill in the middle of writing left behind."""
    for name in (FILE, EARLIER, LOG, history.FILE):
        for path in local_path(folder).glob(f".{name}*"):
            path.unlink(missing_ok=True)
