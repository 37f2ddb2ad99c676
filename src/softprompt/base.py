"""Finding and loading a base model: an alias, a hub id, a folder or a GGUF file → a transformers model and its
tokenizer."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError

from softprompt.digest import device_hash
from softprompt.errors import BaseModelError, ConfigError
from softprompt.packages import SMOLLM2_GGUF, cache_folder

DEFAULT_BASE = "smollm2-135m"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SAMPLES_PER_TENSOR = 4096


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` → CUDA, else MPS, else the CPU; anything else is torch's own name of a device.

    Raises:
        ConfigError: unknown to torch, or not on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ConfigError(f"--device must be auto, cpu, cuda or mps and be on this machine; {name!r} is not") from error
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` → bf16 where the processor computes it natively (AVX512-BF16, AMX, recent CUDA GPUs), otherwise fp32.

    Raises:
        ConfigError: not one of auto, fp32, bf16, fp16.
    """
    if name == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
        native = device.type == "cpu" and any(
            getattr(torch.cpu, probe, lambda: False)()
            for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        )
        return torch.bfloat16 if native else torch.float32
    if name not in DTYPES:
        raise ConfigError(f"--dtype must be auto, fp32, bf16 or fp16, not {name!r}")
    return DTYPES[name]


def load_base(base: str, *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Loads a causal language model on the CPU in the dtype it is stored in.

    Args:
        base: ``smollm2-135m``, a folder with ``config.json`` and safetensors, a ``.gguf`` file, or a hub id.
        trust_remote_code: run code that comes with the model; never unless the user says so.

    Returns:
        The transformers model and tokenizer.

    Raises:
        BaseModelError: it cannot be found or read.
    """
    path = Path(base).expanduser()
    source = base
    if base == DEFAULT_BASE:
        source = str(_dequantized(SMOLLM2_GGUF.path(), SMOLLM2_GGUF.sha256[:16]))
    elif path.suffix == ".gguf":
        if not path.is_file():
            raise BaseModelError(f"the base model {base} was not found; give the path of a GGUF file that exists")
        stat = path.stat()
        key = hashlib.sha256(f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:16]
        source = str(_dequantized(path, key))
    elif path.is_dir() and not (path / "config.json").is_file():
        raise BaseModelError(
            f"the folder {base} holds no config.json; give a folder saved by transformers, or a .gguf file"
        )
    return _from_pretrained(source, base, trust_remote_code)


def _from_pretrained(source: str, base: str, trust_remote_code: bool) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    models: Any = AutoModelForCausalLM
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
            model, found = models.from_pretrained(
                source,
                dtype="auto",
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, SafetensorError, HTTP errors, …
        raise BaseModelError(
            f"the base model {base!r} could not be loaded as a causal language model in safetensors or GGUF: "
            f"{_reason(error)}; "
            f"give {DEFAULT_BASE}, a hub id, a folder saved by transformers or a .gguf file"
        ) from error
    _require_all_weights(base, found)
    return model, tokenizer


def _reason(error: Exception) -> str:
    """The first sentence of what a library says went wrong."""
    return " ".join(str(error).split()).split(". ")[0].rstrip(".")[:200] or type(error).__name__


def _require_all_weights(base: str, found: dict[str, Any]) -> None:
    """Transformers fills weights that a file lacks with random numbers."""
    missing = sorted(found["missing_keys"])
    if missing:
        raise BaseModelError(
            f"the base model {base!r} should hold every weight of its architecture, but {len(missing)} of them, "
            f"such as {missing[0]}, are not there; give a complete causal language model"
        )


def _dequantized(gguf: Path, key: str) -> Path:
    """The folder with the GGUF file's model as fp32 safetensors; made on first use, by one process, whole or not at
    all."""
    folder = cache_folder() / "base" / f"{gguf.stem}-{key}"
    if _complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not _complete(folder):
                _convert(gguf, folder)
    except (OSError, SafetensorError) as error:  # a full disk is the one or the other
        reason = getattr(error, "strerror", None) or _reason(error)
        raise BaseModelError(
            f"the base model {gguf.name} could not be unpacked into {folder.parent}: {reason}; "
            "free some space there or set SOFTPROMPT_CACHE to another folder"
        ) from error
    return folder


def _complete(folder: Path) -> bool:
    """True if every file has the size that was written down when the folder was made."""
    try:
        sizes = json.loads((folder / "sizes.json").read_text())
        return bool(sizes) and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _convert(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    models: Any = AutoModelForCausalLM
    for name in os.listdir(folder.parent):  # what a killed process has left behind
        if name.startswith(f".{folder.name}-"):
            shutil.rmtree(folder.parent / name, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with _quiet():
            try:
                tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
                model, found = models.from_pretrained(
                    str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True
                )
            except OSError:
                raise
            except Exception as error:
                raise BaseModelError(
                    f"{gguf} is no GGUF file that transformers can read: {_reason(error)}; give another"
                ) from error
            _require_all_weights(str(gguf), found)
            # It is plain fp32 now; transformers refuses to save it while it believes otherwise.
            del model.config.quantization_config
            model.hf_quantizer = None
            model.quantization_method = None
            model.config._name_or_path = gguf.stem
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
        sizes = {file.name: file.stat().st_size for file in sorted(scratch.iterdir())}
        (scratch / "sizes.json").write_text(json.dumps(sizes))
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _quiet() -> Any:
    """Keeps transformers' own progress bars and load reports off our stderr."""
    from transformers.utils import logging as untyped

    logging: Any = untyped
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def fingerprint_model(model: Any) -> str:
    """Hex digest of a model's kind and of a sample of every stored weight (``SAMPLES_PER_TENSOR`` evenly spaced
    elements a tensor).

    Taken before any cast, so it does not depend on the dtype that the model is used in.
    """
    digest = hashlib.sha256(model.config.model_type.encode())
    for name, weight in model.named_parameters():
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLES_PER_TENSOR)].contiguous().cpu()
        digest.update(f"{name}:{tuple(weight.shape)}:{weight.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fingerprint_tokenizer(tokenizer: Any) -> str:
    """Hex digest of what a tokenizer does to text: its vocabulary, merges, normalisation and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content: Any = sorted(tokenizer.get_vocab().items())
    else:
        content = json.loads(backend.to_str())
        content.pop("padding", None)
        content.pop("truncation", None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return hashlib.sha256(json.dumps([content, special], sort_keys=True).encode()).hexdigest()


def weights_digest(model: Any) -> str:
    """Hex digest of every bit of every weight as it stands in memory: equal before and after a training (oracle 3).

    Weights on a CUDA device are hashed there, by ``device_hash``, and not copied; their digest is another than on the
    CPU.
    """
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(name.encode())
        content = tensor.detach().contiguous().view(-1).view(torch.uint8)
        if tensor.device.type == "cuda":
            digest.update(device_hash(content).to_bytes(8, "little"))
        else:
            digest.update(content.cpu().numpy().data)
    return digest.hexdigest()
