"""How a base model is known again: by its weights, its tokenizer, and the settings of its configuration."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from softprompt.model.digest import device_hash
from softprompt.model.sharding import here

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


def fingerprint_model(model: Any, apart: Mapping[str, Iterable[torch.Tensor]] | None = None) -> str:
    """Hex digest of a model's type and of a sample of every stored weight (``SAMPLES_PER_TENSOR`` evenly spaced
    elements a tensor); its other settings are compared one by one, see ``model_settings``.

    Taken before any cast, so it does not depend on the dtype that the model is used in.

    Args:
        model: of transformers.
        apart: by the name of each weight that has no numbers yet, the tensors that it is made of, one after the other.
    """
    digest = hashlib.sha256(model.config.model_type.encode())
    for name, weight in model.named_parameters():
        for inner, plain in _plain_tensors(name, weight.detach()):
            sampled(digest, inner, plain, (apart or {}).get(inner))
    for name, tensor in _beside(model):
        sampled(digest, name, tensor)
    return digest.hexdigest()


def sampled(digest: Any, name: str, weight: torch.Tensor, parts: Iterable[torch.Tensor] | None = None) -> None:
    """Adds a weight's name, shape, type and a sample of its elements to a digest of ``hashlib``; its elements are those
    of the parts, one after the other, if there are any."""
    step, start = max(1, weight.numel() // SAMPLES_PER_TENSOR), 0
    samples = list[torch.Tensor]()
    for part in [weight] if parts is None else parts:
        samples.append(part.detach().reshape(-1)[start::step].to(weight.dtype).contiguous().cpu())
        start = (start - part.numel()) % step
    sample = samples[0] if len(samples) == 1 else torch.cat(samples)
    digest.update(f"{name}:{tuple(weight.shape)}:{weight.dtype}".encode())
    digest.update(sample.view(torch.uint8).numpy().tobytes())


def _plain_tensors(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensor, or those that a quantised one is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for inner in tensor.__tensor_flatten__()[0]:
        yield from _plain_tensors(f"{name}.{inner}", getattr(tensor, inner))


def _beside(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The scales and codebooks that bitsandbytes keeps beside its weights, neither parameters nor buffers."""
    for name, weight in model.named_parameters():
        state = getattr(weight, "quant_state", None)
        found = {} if state is None else state.as_dict(packed=True)
        if getattr(weight, "SCB", None) is not None:
            found = {"SCB": weight.SCB}
        yield from ((f"{name}.{key}", value) for key, value in sorted(found.items()))
    for name, module in model.named_modules():  # of 8 bits, they move there at the first use
        scales = getattr(getattr(module, "state", None), "SCB", None)
        if isinstance(scales, torch.Tensor) and getattr(module.weight, "SCB", None) is None:
            yield f"{name}.weight.SCB", scales


def stored_tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """All that a model's weights are, by name: parameters, buffers, and what quantised weights are made of."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        yield from _plain_tensors(name, here(tensor.detach()))
    yield from _beside(model)


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

    whole = config if getattr(config, "is_encoder_decoder", False) else config.get_text_config()
    collect(whole.to_dict(), "")
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
    """Hex digest of every bit of every weight, of codes and their scales, as it stands in memory: equal before and
    after a training (oracle 3); of a model in parts, of what this process has.

    Weights on a CUDA device are hashed there, by ``device_hash``, and not copied; their digest is another than on the
    CPU.
    """
    digest = hashlib.sha256()
    for name, tensor in stored_tensors(model):
        digest.update(name.encode())
        content = tensor.contiguous().view(-1).view(torch.uint8)
        if tensor.device.type == "cuda":
            digest.update(device_hash(content).to_bytes(8, "little"))
        else:
            digest.update(content.cpu().numpy().data)
    return digest.hexdigest()
