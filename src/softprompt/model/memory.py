"""How many tokens a pass with gradient may compute at once, by the memory of the device."""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from torch import nn

from softprompt.errors import SoftPromptWarning
from softprompt.model.quantized import sizes_of

MAX_TOKENS = 2048
"""Tokens in one micro-batch on a CPU, padding included: enough for matrix products near their peak, little enough for
memory."""

MOST_TOKENS = 16384
"""On a GPU at most as many, from where on launching kernels costs little."""

GPU_SHARE = 0.1
"""Share of a GPU's memory that a micro-batch with gradient should not exceed by much."""


def tokens_that_fit(
    layers: nn.ModuleList, config: Any, dtype: torch.dtype, vocabulary: int, device: torch.device
) -> int:
    """The most tokens, padding included, in a micro-batch with gradient.

    A GPU wants more than a CPU: passes over few tokens spend their time on launching kernels. It gets as many as keep
    what backward needs within ``GPU_SHARE``.

    Args:
        layers: the decoder layers.
        config: the model's configuration.
        dtype: that it computes in.
        vocabulary: how many logits a token has.
        device: where it is.
    """
    if device.type != "cuda":
        return MAX_TOKENS
    memory = GPU_SHARE * torch.cuda.get_device_properties(device).total_memory
    fitting = int(memory / kept_bytes(layers, config, dtype, vocabulary))
    return min(max(MAX_TOKENS, fitting), MOST_TOKENS)


def less_at_once(tokens: int, device: torch.device) -> int:
    """After a pass of so many tokens did not fit: half of them, with a ``SoftPromptWarning``."""
    fewer = max(1, tokens // 2)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    warnings.warn(
        f"a pass did not fit into the memory of the device ({device}); it goes on in passes of at most "
        f"{fewer} tokens, with the same result",
        SoftPromptWarning,
        stacklevel=4,
    )
    return fewer


def matrix_ends(layers: nn.ModuleList, config: Any) -> int:
    """How many numbers go into and come out of the matrix products of all layers for one token; of a mixture of
    experts, those of as many experts as a token is sent to."""
    chosen = getattr(config.get_text_config(), "num_experts_per_tok", None) or 1
    ends = 0
    for name, shape in (pair for layer in layers for pair in sizes_of(layer)):
        expert = re.search(r"experts\.(\d+)\.", name)
        if len(shape) == 2 and not (expert and int(expert[1]) >= chosen):
            ends += sum(shape)
        elif len(shape) == 3 and ".experts." in f".{name}":  # all experts in one
            ends += chosen * sum(shape[1:])
    return ends


def kept_bytes(layers: nn.ModuleList, config: Any, dtype: torch.dtype, vocabulary: int) -> int:
    """Bytes that a token of a pass with gradient takes: all that goes into and comes out of each matrix product, and
    two copies of its logits."""
    return dtype.itemsize * matrix_ends(layers, config) + 2 * torch.float32.itemsize * vocabulary
