"""What must be known of a transformers model's architecture: its parts, and whether a prefix can be computed once."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from softprompt.errors import BaseModelError

SHARED_PREFIX_MODELS = frozenset({"gemma3_text", "gpt2", "gpt_neox", "llama", "mistral", "opt", "qwen2", "qwen3"})
"""Model types whose shared-prefix computation is tested against concatenation; others take the concatenation path."""

NOT_OURS = ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention")
"""Settings of a configuration with which a model computes what the shared-prefix computation does not."""

WINDOWS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "seq_length",
    "seq_len",
)
"""What configurations call the most tokens in one sequence."""

USUAL_WINDOW = 32_768
"""Where nothing says how long a sequence may be, as for Mamba."""

LARGEST_WINDOW = 100_000_000
"""More than any model has; tokenizers without a limit say 10³⁰."""

LEAST_SIGHT = 1e-6
"""Share of the largest gradient that one in a later token must have to count: rounding is far below, sight above."""


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


def decoder_layers(model: Any) -> nn.ModuleList:
    """The stack of decoder layers: of the lists of modules that are inside no other, the first with as many as the
    configuration says the language model has layers, or the longest."""
    config = model.config.get_text_config()
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():  # outer modules come first
        if isinstance(module, nn.ModuleList) and not name.startswith(tuple(f"{outer}." for outer in lists)):
            lists[name] = module
    count = getattr(config, "num_hidden_layers", None)
    fitting = [m for name, m in lists.items() if len(m) == count and not re.search("vis(ion|ual)|audio", name)]
    return fitting[0] if fitting else max(lists.values(), key=len, default=nn.ModuleList())


def matrix_ends(layers: nn.ModuleList, config: Any) -> int:
    """How many numbers go into and come out of the matrix products of all layers for one token; of a mixture of
    experts, those of as many experts as a token is sent to."""
    chosen = getattr(config.get_text_config(), "num_experts_per_tok", None) or 1
    ends = 0
    for name, weight in (pair for layer in layers for pair in layer.named_parameters()):
        expert = re.search(r"experts\.(\d+)\.", name)
        if weight.dim() == 2 and not (expert and int(expert[1]) >= chosen):
            ends += sum(weight.shape)
        elif weight.dim() == 3 and ".experts." in f".{name}":  # all experts in one
            ends += chosen * sum(weight.shape[1:])
    return ends


def window_of(config: Any, tokenizer: Any) -> int:
    """The most tokens in one sequence: what the configuration says, or the tokenizer, or ``USUAL_WINDOW``."""
    text = config.get_text_config()
    said = [getattr(text, name, None) for name in WINDOWS]
    said.append(getattr(tokenizer, "model_max_length", None))
    return next(
        (int(size) for size in said if isinstance(size, int | float) and 0 < size <= LARGEST_WINDOW), USUAL_WINDOW
    )


def require_causal(model: Any, name: str, *, rms: float) -> None:
    """Refuses a model in which a token sees those behind it: of a causal one, the gradient of early logits in later
    tokens is zero.

    Args:
        model: of transformers, in evaluation mode.
        name: what the user calls it.
        rms: root mean square of its embeddings.

    Raises:
        BaseModelError: it is an encoder, or takes no embedded tokens.
    """
    weight = model.get_input_embeddings().weight
    noise = rms * torch.randn(1, 4, weight.shape[1], generator=torch.Generator().manual_seed(0))
    leaf = noise.to(weight.device, weight.dtype).requires_grad_()
    try:
        with torch.enable_grad():
            logits = model(
                inputs_embeds=leaf + 0, attention_mask=torch.ones_like(leaf[..., 0]).long(), use_cache=False
            ).logits
            (gradient,) = torch.autograd.grad(logits[:, :2].float().square().mean(), leaf)
    except Exception as error:  # of transformers alone
        reason = " ".join(str(error).split()).split(". ")[0][:200]
        raise BaseModelError(
            f"the base model {name!r} ({model.config.model_type}) does not compute logits and gradients from embedded "
            f"tokens ({type(error).__name__}: {reason}); give another causal language model"
        ) from error
    found = gradient.float().nan_to_num(0.0).abs()  # an overflow is no sign of sight
    if found[:, 2:].max() > LEAST_SIGHT * found.max():
        raise BaseModelError(
            f"the base model {name!r} is an encoder ({model.config.model_type}): its tokens see those behind them; "
            "give a causal language model"
        )
