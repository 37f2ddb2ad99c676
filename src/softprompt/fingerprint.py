"""How a base model is known again: by its weights, its tokenizer, and the settings of its configuration."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import torch

SAMPLES_PER_TENSOR = 4096

NOT_COMPUTED = re.compile(
    r"_.*"  # transformers' own bookkeeping
    r"|.*(name|path|version|dtype|drop|init|loss|noise|label|kernels).*"  # identity, training, what only costs time
    r"|.*token_(ids?|index)"  # the tokenizer's fingerprint covers those
    r"|(output|return|summary)_.*"
    r"|architectures|auto_map|model_type|tokenizer_class|quantization_config|problem_type|task_specific_params"
    r"|tie_word_embeddings|chunk_size_feed_forward|gradient_checkpointing|is_encoder_decoder|pretraining_tp"
    r"|num_logits_to_keep|torchscript|use_associative_scan|use_cache|use_mambapy"
)
"""Names of settings that change nothing in what a trained model computes, or that other fingerprints cover."""


def fingerprint_model(model: Any) -> str:
    """Hex digest of a model's type and of a sample of every stored weight (``SAMPLES_PER_TENSOR`` evenly spaced
    elements a tensor); its other settings are compared one by one, see ``model_settings``.

    Taken before any cast, so it does not depend on the dtype that the model is used in.
    """
    digest = hashlib.sha256(model.config.model_type.encode())
    for name, weight in model.named_parameters():
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLES_PER_TENSOR)].contiguous().cpu()
        digest.update(f"{name}:{tuple(weight.shape)}:{weight.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def model_settings(config: Any) -> dict[str, Any]:
    """The settings of a transformers configuration that change what the language model computes from its weights, such
    as ``rope_parameters.rope_theta``, as JSON values by name; those within another have both names with a dot."""
    found: dict[str, Any] = {}

    def collect(settings: Mapping[Any, Any], prefix: str) -> None:
        for key, value in sorted(settings.items(), key=lambda pair: str(pair[0])):
            if NOT_COMPUTED.fullmatch(str(key)):
                continue
            if isinstance(value, Mapping):
                collect(value, f"{prefix}{key}.")
            elif value is None or isinstance(value, str | int | float | list | tuple):
                found[f"{prefix}{key}"] = _plain(value)

    collect(config.get_text_config().to_dict(), "")
    return found


def _plain(value: Any) -> Any:
    """As JSON has it, which knows no infinite numbers."""
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, str | int | float) else str(value)


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


HASHED_AT_ONCE = 1 << 25
"""Bytes, so that what is held meanwhile stays small."""


def device_hash(content: torch.Tensor) -> int:
    """A 64-bit hash of bytes, computed where they are: the sum of SplitMix64 (Steele et al. 2014) of all words of 8
    bytes, each with its place added in.

    SplitMix64 is a bijection, so another value of one word is noticed for sure. What changes in several words, swapped
    ones included, goes unnoticed with a chance of 2^-64.

    Args:
        content: uint8 ``[N]``, contiguous.

    Returns:
        0 to 2^64 - 1.
    """

    def shifted(words: torch.Tensor, bits: int) -> torch.Tensor:
        return (words >> bits) & ((1 << (64 - bits)) - 1)  # without the sign

    total = torch.zeros((), dtype=torch.int64, device=content.device)
    for start in range(0, len(content), HASHED_AT_ONCE):
        some = content[start : start + HASHED_AT_ONCE]
        if len(some) % 8 or some.storage_offset() % 8:
            some = torch.nn.functional.pad(some, (0, -len(some) % 8))
        words = some.view(torch.int64)
        first = start // 8 + 1
        places = torch.arange(first, first + len(words), device=content.device)
        words = words + places * -0x61C8864680B583EB  # 0x9E3779B97F4A7C15, the golden ratio's, as a signed number
        words = (words ^ shifted(words, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
        words = (words ^ shifted(words, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
        total += (words ^ shifted(words, 31)).sum()
    return int(total) % (1 << 64)
