"""Folders of PEFT's prompt learning methods: ``adapter_config.json`` and ``adapter_model.safetensors``.

Facts of the format, from PEFT's own reader (release 0.21): ``prompt_embeddings`` is ``[P, H]`` for prompt tuning and
for p-tuning, which is saved folded. For prefix tuning and cartridges it is ``[P, L·2·H_kv·D]``, a plain reshape of
``[P, L, 2, H_kv, D]``; keys are as they are in a cache, after any rotary embedding, at positions 0 to P-1. Multitask
prompt tuning has ``prefix_task_cols`` ``[tasks, P, r]`` and ``prefix_task_rows`` ``[tasks, r, H]`` beside, whose
product is multiplied with the embeddings. For encoder–decoders the first two hold ``[2P, H]`` by default
(``num_transformer_submodules``), of which PEFT reads the first ``P``, before the encoder's input.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from softprompt.errors import ArtifactError
from softprompt.exchange.baking import Baked
from softprompt.files import StrPath, atomic_writer, local_path, strict_json
from softprompt.model.frozen import FrozenLM

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

PROMPT, COLUMNS, ROWS = "prompt_embeddings", "prefix_task_cols", "prefix_task_rows"
"""What PEFT calls its tensors."""

EMBEDDINGS = ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING")
KEYS_AND_VALUES = ("PREFIX_TUNING", "CARTRIDGE")

MAX_CONFIG_BYTES = 1 << 20
MAX_WEIGHT_BYTES = 4 << 30
MAX_VIRTUAL_TOKENS = 1 << 20

HUB_IDS = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""What aliases of base models are called on the Hugging Face Hub."""


@dataclass(frozen=True, eq=False)
class PeftPrompt:
    """What a PEFT folder holds.

    Attributes:
        kind: its ``peft_type``.
        numbers: float32 ``[P, H]``, or ``[P, C]`` of keys and values, finite.
        base: the base model that it names; empty if it names none.
        settings: what else its configuration says, JSON values.
        tasks: how many tasks a multitask prompt has; else 0.
    """

    kind: str
    numbers: torch.Tensor
    base: str
    settings: Mapping[str, Any]
    tasks: int = 0

    @property
    def is_kv(self) -> bool:
        """Whether the numbers are keys and values."""
        return self.kind in KEYS_AND_VALUES


def write(
    folder: StrPath,
    baked: Baked,
    lm: FrozenLM,
    base: str,
    kind: str,
) -> None:
    """Writes the two files, each whole or not at all.

    Args:
        folder: is made if it is missing.
        baked: the numbers, keys and values for the last two kinds.
        lm: the base model.
        base: its id.
        kind: the ``peft_type``: ``PROMPT_TUNING``, ``PREFIX_TUNING`` or ``CARTRIDGE``.

    Raises:
        OSError: the folder cannot be written.
    """
    path, numbers = local_path(folder), baked.numbers
    heads, width = (numbers.shape[3], numbers.shape[3] * numbers.shape[4]) if baked.is_kv else (None, lm.hidden_size)
    config: dict[str, Any] = {
        "peft_type": kind,
        "task_type": "SEQ_2_SEQ_LM" if lm.encoder_decoder else "CAUSAL_LM",
        "base_model_name_or_path": HUB_IDS.get(base, base),
        "inference_mode": True,
        "num_virtual_tokens": baked.num_virtual_tokens,
        "token_dim": width,
        "num_transformer_submodules": 1,
        "num_attention_heads": heads or lm.model.config.get_text_config().num_attention_heads,
        "num_layers": lm.num_layers,
    }
    if kind == "PROMPT_TUNING":
        config["prompt_tuning_init"] = "RANDOM"
    elif kind == "PREFIX_TUNING":
        config |= {"prefix_projection": False, "encoder_hidden_size": width}
    else:
        config["num_frozen_tokens"] = 0
    flat = numbers.reshape(len(numbers), -1).contiguous()
    for name, content in (
        (WEIGHTS, save({PROMPT: flat}, metadata={"format": "pt"})),
        (CONFIG, f"{json.dumps(json.loads(strict_json(config)), indent=2)}\n".encode()),
    ):
        with atomic_writer(path / name) as file:
            file.write(content)


def read(folder: StrPath, task: int | None = None) -> PeftPrompt:
    """Reads a PEFT folder of a prompt learning method; nothing in it is executed or unpickled.

    Args:
        folder: with the two files.
        task: which task of a multitask prompt is wanted, from 0.

    Raises:
        ArtifactError: a file is missing, too large or damaged, of another method, or holds other numbers than it says.
    """
    path = local_path(folder)
    config = read_config(path)
    kind = str(config["peft_type"])
    tensors = _tensors(path)
    numbers = tensors[PROMPT]
    if numbers.dim() != 2 or 0 in numbers.shape:
        raise ArtifactError(f"Expected {PROMPT} [P, width] in {path / WEIGHTS}, found {list(numbers.shape)}.")
    tasks = 0
    if kind == "MULTITASK_PROMPT_TUNING":
        numbers, tasks = _of_task(path, tensors, numbers, task)
    elif task is not None:
        raise ArtifactError(f"Expected a multitask prompt to choose a task of, found {kind} in {path}; leave it out.")
    stated, submodules = config.get("num_virtual_tokens"), config.get("num_transformer_submodules") or 1
    if not isinstance(stated, int) or stated * submodules != len(numbers):
        each = " for encoder and decoder each" if submodules == 2 else ""
        raise ArtifactError(
            f"Expected as many virtual tokens in {path / WEIGHTS} as its {CONFIG} says, {str(stated)[:20]}{each}, "
            f"found {len(numbers)}."
        )
    numbers = numbers[:stated]
    if not numbers.isfinite().all():
        raise ArtifactError(f"Expected finite numbers in {path / WEIGHTS}, found NaN or infinity; it was damaged.")
    base = config.get("base_model_name_or_path")
    kept = ("peft_type", "num_virtual_tokens", "prompt_tuning_init_text", "encoder_hidden_size", "num_frozen_tokens")
    settings = {key: config[key] for key in kept if isinstance(config.get(key), str | int)}
    return PeftPrompt(kind, numbers, base if isinstance(base, str) else "", settings, tasks)


def read_config(folder: StrPath) -> Mapping[str, Any]:
    """What the configuration of a PEFT folder says.

    Raises:
        ArtifactError: it is missing, too large or damaged, or of another method.
    """
    path = local_path(folder)
    config = _config(path)
    kind = str(config.get("peft_type"))
    if kind not in (*EMBEDDINGS, *KEYS_AND_VALUES):
        why = "changes weights of the base model" if kind in ("LORA", "ADALORA", "IA3") else "is none of these"
        raise ArtifactError(
            f"Expected an adapter of {', '.join((*EMBEDDINGS, *KEYS_AND_VALUES))} in {path}, found {kind[:40]!r}, "
            f"which {why}; use it with PEFT."
        )
    alone = (1, 2, None) if kind in ("PROMPT_TUNING", "P_TUNING") else (1, None)
    if config.get("num_transformer_submodules", 1) not in alone:
        raise ArtifactError(f"Expected one prompt for the input in {path}, found one for encoder and decoder.")
    return config


def _config(path: Path) -> Mapping[str, Any]:
    file = path / CONFIG
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise ArtifactError(
                f"Expected {CONFIG} of at most {MAX_CONFIG_BYTES:,} bytes in {path}, found a larger file."
            )
        config = json.loads(file.read_bytes())
    except OSError as error:
        raise ArtifactError(
            f"Expected a PEFT folder with {CONFIG} at {path}, found: {error.strerror or error}; check the path."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"Expected JSON in {file}, found an error ({str(error)[:100]}).") from error
    if not isinstance(config, dict):
        raise ArtifactError(f"Expected a JSON object in {file}, found another value.")
    return config


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a prompt, float32; others are not read."""
    file = path / WEIGHTS
    if not file.is_file():
        if (path / PICKLED).exists():
            raise ArtifactError(
                f"Expected {WEIGHTS} in {path}, found {PICKLED}, a pickle, which could run code and is not read; save "
                f"the adapter again with PEFT's save_pretrained(safe_serialization=True)."
            )
        raise ArtifactError(f"Expected {WEIGHTS} in {path}, found none; check the folder.")
    if file.stat().st_size > MAX_WEIGHT_BYTES:
        raise ArtifactError(f"Expected {WEIGHTS} of at most {MAX_WEIGHT_BYTES:,} bytes in {path}, found a larger file.")
    try:
        with safe_open(file, "pt") as opened:
            names = set(opened.keys())
            if PROMPT not in names:
                found = ", ".join(sorted(names)[:5])[:200] or "nothing"
                raise ArtifactError(f"Expected the tensor {PROMPT} in {file}, found {found}.")
            tensors = {name: opened.get_tensor(name) for name in (PROMPT, COLUMNS, ROWS) if name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"The file {file} is no sound safetensors file: {str(error)[:150]}.") from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ArtifactError(f"Expected floating-point numbers in {name} of {file}, found {tensor.dtype}.")
    return {name: tensor.float() for name, tensor in tensors.items()}


def _of_task(
    path: Path, tensors: Mapping[str, torch.Tensor], shared: torch.Tensor, task: int | None
) -> tuple[torch.Tensor, int]:
    """The prompt of one task, and how many tasks there are (Wang et al. 2023, §3.1)."""
    columns, rows = tensors.get(COLUMNS), tensors.get(ROWS)
    if columns is None or rows is None or columns.dim() != 3 or rows.dim() != 3 or len(columns) != len(rows):
        raise ArtifactError(f"Expected {COLUMNS} and {ROWS} for each task in {path / WEIGHTS}.")
    tasks = len(columns)
    if task is None or not 0 <= task < tasks:
        found = "none" if task is None else str(task)
        raise ArtifactError(
            f"Expected one of the {tasks} tasks of {path}, 0 to {tasks - 1}, found {found}; give --task."
        )
    try:
        return shared * (columns[task] @ rows[task]), tasks
    except RuntimeError as error:  # sizes that do not fit
        raise ArtifactError(
            f"Expected factors of {list(shared.shape)} in {path / WEIGHTS}, found {list(columns.shape)} and "
            f"{list(rows.shape)}."
        ) from error
