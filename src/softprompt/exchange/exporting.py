"""A soft prompt in the form that other tools read."""

from __future__ import annotations

from pathlib import Path

from softprompt.errors import ConfigError, StoreError
from softprompt.exchange import arrays, check, peft_folder, vllm_request
from softprompt.exchange.baking import Baked, bake
from softprompt.exchange.check import Checked
from softprompt.exchange.formats import FORMATS, PEFT
from softprompt.exchange.readme import readme
from softprompt.files import StrPath, atomic_writer, local_path
from softprompt.model.frozen import FrozenLM
from softprompt.soft_prompts.soft_prompt import SoftPrompt


def export(lm: FrozenLM, soft_prompt: SoftPrompt, to: str, folder: StrPath, *, checked: bool = True) -> Checked | None:
    """Writes a soft prompt as files of another tool, with a README that says how to use them exactly.

    What stands before the soft prompt in its template, the beginning-of-sequence token included, becomes virtual tokens
    of its own, since other tools put virtual tokens first.

    Args:
        lm: its base model.
        soft_prompt: what to export.
        to: one of ``FORMATS``. Keys and values (``prefix-tuning``, ``cartridge``) are computed from a soft prompt of
            embeddings, too.
        folder: where the files go; it must not exist, or be empty.
        checked: compare a few texts with what the other library computes from the files.

    Returns:
        What the check found; None without one, or where PEFT is not installed.

    Raises:
        ConfigError: an unknown format, or one in which this soft prompt has no exact form.
        BaseModelError: the soft prompt is of another base model.
        StoreError: the folder holds something, or cannot be written.
    """
    if to not in FORMATS:
        raise ConfigError(f"The format must be one of {', '.join(FORMATS)}, not {to!r}.")
    if to == "peft":
        to = "prefix-tuning" if soft_prompt.vectors.dim() == 5 else "prompt-tuning"
    if lm.encoder_decoder and to == "vllm":
        raise ConfigError(
            f"vLLM serves no encoder-decoders such as {lm.name}; export it to npy or peft, or serve it with "
            "softprompt serve."
        )
    if lm.reads_parts and not soft_prompt.parts:  # of those no tool takes any
        raise ConfigError(
            f"Other tools hand over embeddings alone, and the layers of {lm.name} get more of each token; serve it "
            "with softprompt serve."
        )
    path = _free(folder)
    baked = bake(lm, soft_prompt, kv=to in ("prefix-tuning", "cartridge"))
    try:
        if to in PEFT:
            peft_folder.write(path, baked, lm, soft_prompt.base, PEFT[to])
        elif to == "npy":
            arrays.write_npy(path / f"{soft_prompt.name}.npy", baked.numbers)
        else:  # of vLLM, too
            arrays.write_safetensors(path / f"{soft_prompt.name}.safetensors", baked.numbers)
        found = _check(lm, soft_prompt, baked, to, path) if checked else None
        if to == "vllm":
            vllm_request.write(path, lm, soft_prompt, baked, f"{soft_prompt.name}.safetensors")
        else:
            with atomic_writer(path / "README.md") as file:
                file.write(readme(lm, soft_prompt, baked, to, found).encode())
    except OSError as error:
        raise StoreError(f"The folder {path} cannot be written: {error.strerror or error}; choose another.") from error
    return found


def _free(folder: StrPath) -> Path:
    path = local_path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise StoreError(
            f"Expected a new or empty folder to export to, found {path} with something in it; choose another."
        )
    return path


def _check(lm: FrozenLM, soft_prompt: SoftPrompt, baked: Baked, to: str, path: Path) -> Checked | None:
    if to not in PEFT:
        written = arrays.read(next(path.glob("*.npy"), None) or next(path.glob("*.safetensors")))
        return check.against_embeddings(lm, baked.task, soft_prompt.vectors, written)
    try:
        return check.against_peft(lm, baked.task, soft_prompt.vectors, path)
    except ImportError:
        return None
