"""What lies at the path of a base model: what can be loaded is found, anything else is refused in a sentence."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from softprompt.errors import BaseModelError
from softprompt.files import local_path

ADAPTER = "adapter_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
POINTER = b"version https://git-lfs.github.com/spec/"
SAVE = "save it as safetensors (model.save_pretrained and tokenizer.save_pretrained) and give that folder"


def locate(base: str) -> Path | None:
    """The GGUF file, or the folder with ``config.json`` and safetensors, that ``base`` names on this machine; None if
    it can only be a hub id.

    A file of a folder's model stands for the folder. What a GGUF file is called does not matter.

    Raises:
        BaseModelError: it is no path of either, or files of it are missing, cut off or pointers.
    """
    path = local_path(base)
    try:
        if path.is_dir():
            return _checked(path)
        if path.is_file():
            return _of_file(path)
    except OSError as error:
        raise BaseModelError(
            f"the base model {base} cannot be read: {error.strerror or error}; check {error.filename or path}"
        ) from error
    if base.startswith((".", "~")) or path.is_absolute() or base.count("/") > 1 or _is_a_files_name(path):
        raise BaseModelError(
            f"the base model {base} was not found: there is no such file or folder; give the path of a GGUF file or a "
            "folder that exists"
        )
    return None


def _is_a_files_name(path: Path) -> bool:
    return path.suffix.lower() in (".gguf", ".safetensors", ".json", *PICKLES)


def _of_file(path: Path) -> Path:
    with path.open("rb") as file:
        head = file.read(len(POINTER))
    _refuse_pointers([path])
    if head[:4] == b"GGUF":
        if part := re.search(r"-\d{5}-of-(\d{5})$", path.stem):
            raise BaseModelError(
                f"{path} is one of {int(part[1])} parts of a GGUF file; join them with llama.cpp's llama-gguf-split, "
                "and give the whole"
            )
        return path
    if path.suffix.lower() == ".gguf":
        found = f"it begins with {head[:4]!r} instead of b'GGUF'" if head else "it is empty"
        raise BaseModelError(f"{path} is no GGUF file that transformers can read ({found}); give another")
    if path.name in ("config.json", INDEX) or re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", path.name):
        return _checked(path.parent)
    if path.name.startswith("adapter_"):
        raise adapter_alone(path.parent / ADAPTER, f"{path} is")
    if path.suffix == ".safetensors":
        raise BaseModelError(
            f"{path} is no base model by itself; give a folder with config.json, the tokenizer and the weights as "
            f"{WEIGHTS}"
        )
    if path.suffix.lower() in PICKLES:
        raise BaseModelError(f"{path} is a pickle, which could run any code and is never read; {SAVE}")
    raise BaseModelError(f"{path} is a file of another kind; give a folder saved by transformers, or a GGUF file")


def _checked(folder: Path) -> Path:
    """The folder, if all that a model needs is there and whole but for the tokenizer, which has many forms."""
    config = folder / "config.json"
    if not config.is_file():
        raise _without_config(folder)
    _refuse_pointers(_read_files(folder))
    if "transformers_weights" in _json_object(config):  # another name for the weights
        return folder
    if (folder / WEIGHTS).is_file():
        shards = [WEIGHTS]
    elif (folder / INDEX).is_file():
        places = _json_object(folder / INDEX).get("weight_map")
        shards = sorted(set(map(str, places.values()))) if isinstance(places, dict) else []
        if missing := [name for name in shards if not (folder / name).is_file()]:
            raise BaseModelError(
                f"the folder {folder} should hold {len(shards)} files of weights, but {len(missing)} of them, such as "
                f"{missing[0]}, are not there; copy or download them, too"
            )
    else:
        raise _without_weights(folder)
    for name in shards:
        try:
            with safe_open(folder / name, "pt"):
                pass
        except SafetensorError as error:
            raise BaseModelError(
                f"{folder / name} is no whole safetensors file ({error}); copy or download it again"
            ) from error
    return folder


def _read_files(folder: Path) -> list[Path]:
    """The files that are read of a folder, as far as one can tell."""
    names = ["config.json", "tokenizer.json", "tokenizer_config.json"]
    if not (folder / "tokenizer.json").exists():
        names += ["tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt"]
    return [*(folder / name for name in names), *sorted(folder.glob("model*.safetensors*"))]


def _refuse_pointers(files: Iterable[Path]) -> None:
    for path in files:
        if not path.is_file():
            continue
        with path.open("rb") as file:
            if file.read(len(POINTER)) == POINTER:
                raise BaseModelError(
                    f"{path} is a pointer of Git LFS, not the file itself; run `git lfs pull` in {path.parent}, or "
                    "download the file"
                )


def _json_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BaseModelError(
            f"{path} is not a valid JSON file ({error}); copy or download it again, or save the model again"
        ) from error
    if not isinstance(found, dict):
        raise BaseModelError(f"{path} is no JSON object; copy or download it again, or save the model again")
    return found


def _names(folder: Path, *suffixes: str) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix.lower() in suffixes)


def _without_config(folder: Path) -> BaseModelError:
    if (folder / ADAPTER).is_file():
        return adapter_alone(folder / ADAPTER, f"the folder {folder} holds")
    lacks = f"the folder {folder} holds no config.json"
    if ggufs := _names(folder, ".gguf"):
        return BaseModelError(f"{lacks}, but GGUF files; give one of them, such as {folder / ggufs[0]}")
    if inner := sorted([*folder.glob("*/config.json"), *folder.glob("snapshots/*/config.json")]):
        return BaseModelError(f"{lacks}, but {inner[-1].parent} does; give that")
    if not any(folder.iterdir()):
        lacks = f"the folder {folder} is empty"
    return BaseModelError(f"{lacks}; give a folder saved by transformers, or a .gguf file")


def _without_weights(folder: Path) -> BaseModelError:
    lacks = f"the folder {folder} holds no {WEIGHTS}"
    if pickles := [name for name in _names(folder, *PICKLES) if name != "training_args.bin"]:
        return BaseModelError(
            f"{lacks}, but {pickles[0]}, a pickle, which could run any code and is never read; load the model in "
            f"Python, {SAVE}"
        )
    if (folder / ADAPTER).is_file():
        return adapter_alone(folder / ADAPTER, f"the folder {folder} holds")
    if ggufs := _names(folder, ".gguf"):
        return BaseModelError(f"{lacks}, but GGUF files; give one of them, such as {folder / ggufs[0]}")
    if others := _names(folder, ".safetensors"):
        return BaseModelError(
            f"{lacks}, but {others[0]}; if that holds the weights by transformers' names, call it {WEIGHTS}"
        )
    return BaseModelError(f"{lacks}; copy or download the weights, too")


def adapter_alone(config: Path, found: str) -> BaseModelError:
    """The refusal of an adapter without its base model.

    Args:
        config: its ``adapter_config.json``.
        found: where it is, and a verb.
    """
    return BaseModelError(
        f"{found} an adapter{adapts(config)}, not a whole model; give its base model, or merge the adapter of LoRA "
        "into it with PEFT (merge_and_unload), save the whole and give that folder"
    )


def adapts(config: Path) -> str:
    """`` of MODEL``, the base model that an ``adapter_config.json`` names; nothing if it names none."""
    try:
        named = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        named = None
    return f" of {named}" if named else ""
