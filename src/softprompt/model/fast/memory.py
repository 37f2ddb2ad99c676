"""How much a pass with gradient computes at once: first estimated, on a GPU then from what was measured."""

from __future__ import annotations

import torch

MAX_TOKENS = 2048
"""Tokens in one micro-batch on a CPU, padding included: enough for matrix products near their peak, little enough for
memory."""

MOST_TOKENS = 16384
"""On a GPU at most as many, from where on launching kernels costs little."""

GPU_SHARE = 0.1
"""Share of a GPU's memory that a micro-batch with gradient should not exceed by much, before anything was measured."""


def estimated_tokens(device: torch.device, bytes_a_token: int) -> int:
    """The most tokens of a micro-batch with gradient. A GPU wants more than a CPU: passes over few tokens spend their
    time on launching kernels. It gets as many as keep what backward needs within ``GPU_SHARE``."""
    if device.type != "cuda":
        return MAX_TOKENS
    fitting = int(GPU_SHARE * torch.cuda.get_device_properties(device).total_memory / bytes_a_token)
    return min(max(MAX_TOKENS, fitting), MOST_TOKENS)
