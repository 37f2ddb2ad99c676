"""What must be known of a transformers model's architecture: its parts, and whether a prefix can be computed once."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

SHARED_PREFIX_MODELS = frozenset({"gemma3_text", "gpt2", "gpt_neox", "llama", "mistral", "opt", "qwen2", "qwen3"})
"""Model types whose shared-prefix computation is tested against concatenation; others take the concatenation path."""

NOT_OURS = ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention")
"""Settings of a configuration with which a model computes what the shared-prefix computation does not."""


def shares_prefix(config: Any) -> bool:
    """Whether the shared-prefix computation serves a model of this configuration."""
    rotary = getattr(config, "rope_parameters", None) or {}
    # These stretch the angles with the length of what runs, so a prefix would not be the same alone.
    kinds = [rotary, *(kind for kind in rotary.values() if isinstance(kind, dict))]  # some differ from layer to layer
    stretches = any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds)
    differs = any(getattr(config, name, None) for name in NOT_OURS)
    return config.model_type in SHARED_PREFIX_MODELS and not stretches and not differs


def embedding_table(model: Any) -> torch.Tensor:
    """What each token feeds into the model, ``[V, H]``: the weight itself, unless the model scales it (Gemma)."""
    lookup = model.get_input_embeddings()
    weight: torch.Tensor = lookup.weight
    with torch.no_grad():
        few = torch.arange(min(64, weight.shape[0]), device=weight.device)
        if torch.equal(lookup(few), weight[few]):
            return weight
        fed: torch.Tensor = lookup(torch.arange(weight.shape[0], device=weight.device))
        return fed


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The stack of decoder layers: the longest list of modules inside the model."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=nn.ModuleList())
