"""Plain arrays of a soft prompt: ``.npy`` as Google's prompt-tuning writes them, and one tensor in safetensors."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from softprompt.errors import ArtifactError
from softprompt.files import StrPath, atomic_writer, local_path

TENSOR = "prompt_embeddings"
MAX_BYTES = 4 << 30
MAX_HEADER_BYTES = 10_000


def write_npy(path: Path, numbers: torch.Tensor) -> None:
    """Writes float32 ``[P, H]``.

    Raises:
        OSError: the folder cannot be written.
    """
    buffer = io.BytesIO()
    np.save(buffer, numbers.numpy(), allow_pickle=False)
    with atomic_writer(path) as file:
        file.write(buffer.getvalue())


def write_safetensors(path: Path, numbers: torch.Tensor) -> None:
    """Writes one tensor named ``prompt_embeddings``.

    Raises:
        OSError: the folder cannot be written.
    """
    with atomic_writer(path) as file:
        file.write(save({TENSOR: numbers.contiguous()}, metadata={"format": "pt"}))


def read(source: StrPath) -> torch.Tensor:
    """The numbers of a ``.npy`` file, or of a ``.safetensors`` file with one tensor.

    Returns:
        float32 ``[P, H]`` or ``[P, L, 2, H_kv, D]``, finite; ``[1, P, H]`` is taken as ``[P, H]``.

    Raises:
        ArtifactError: the file is missing, too large, damaged, holds objects, or anything but such numbers.
    """
    path = local_path(source)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ArtifactError(f"Expected a file of at most {MAX_BYTES:,} bytes at {path}, found a larger one.")
        numbers = _npy(path) if path.suffix == ".npy" else _safetensors(path)
    except (OSError, ValueError, EOFError, SafetensorError) as error:
        reason = str(getattr(error, "strerror", None) or error).splitlines()[:1] or [type(error).__name__]
        raise ArtifactError(f"Expected an array at {path}, found: {reason[0][:150]}; check the file.") from error
    if numbers.dim() == 3 and len(numbers) == 1:
        numbers = numbers[0]
    if not numbers.is_floating_point() or numbers.dim() not in (2, 5) or 0 in numbers.shape:
        raise ArtifactError(
            f"Expected floating-point numbers [P, H] or [P, L, 2, H_kv, D] in {path}, found {numbers.dtype} "
            f"{list(numbers.shape)}."
        )
    if not numbers.isfinite().all():
        raise ArtifactError(f"Expected finite numbers in {path}, found NaN or infinity; the file was damaged.")
    return numbers.float()


def _npy(path: Path) -> torch.Tensor:
    try:
        array = np.load(path, allow_pickle=False, mmap_mode="r", max_header_size=MAX_HEADER_BYTES)
    except Exception as error:  # of numpy's reader alone, which parses the header as Python: SyntaxError, TokenError, …
        raise ValueError(str(error) or type(error).__name__) from error
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        raise ValueError(f"an array of {getattr(array, 'dtype', type(array).__name__)}, not of floating-point numbers")
    return torch.from_numpy(np.array(array, dtype=np.float32, order="C"))


def _safetensors(path: Path) -> torch.Tensor:
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        if len(names) != 1 and TENSOR not in names:
            raise ValueError(f"the tensors {', '.join(sorted(names)[:5])[:100] or 'none'}, not one")
        tensor: torch.Tensor = file.get_tensor(TENSOR if TENSOR in names else names[0])
        return tensor
