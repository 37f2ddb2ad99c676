"""What must be known of a transformers model's architecture: a record for each family whose prefixes can be computed
once, and what is read off any model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from softprompt.errors import BaseModelError
from softprompt.model.state.kv import PrefixKV
from softprompt.model.state.prefix import PrefixState

Windows = Literal["none", "every layer", "by layer_types"]
"""Which layers of a model see the last ``sliding_window`` tokens only."""


@dataclass(frozen=True)
class Refusal:
    """A setting with which a model runs whole sequences, since a prefix computed alone would not be the same.

    Attributes:
        setting: its name in the configuration.
        values: the values that are meant; none: all but None, 0 and False.
        why: what it changes, in plain words.
    """

    setting: str
    values: tuple[str, ...]
    why: str

    def applies(self, config: Any) -> bool:
        """Whether a model of this configuration has it."""
        found = [getattr(config, self.setting, None)]
        if self.setting == "rope_type":  # some models have one for each kind of layer
            rotary = getattr(config, "rope_parameters", None) or {}
            found = [kind.get("rope_type") for kind in (rotary, *rotary.values()) if isinstance(kind, dict)]
        return any(value in self.values if self.values else bool(value) for value in found)


REFUSED = (
    Refusal("rope_type", ("dynamic", "longrope"), "the angles of the positions stretch with the length of what runs"),
    Refusal("attn_logit_softcapping", (), "attention scores are capped"),
    Refusal("final_logit_softcapping", (), "logits are capped"),
    Refusal("use_bidirectional_attention", (), "tokens see those behind them"),
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """Architectures alike, for which the shared-prefix computation is tested against concatenation.

    Attributes:
        name: what people call it.
        model_types: what transformers calls it in a configuration.
        layers: where its decoder layers are, from the model without its head.
        state: what a prefix leaves behind.
        enters: how a prefix enters, in plain words.
        windows: which layers have a sliding window.
        refused: with which settings a model of it runs whole sequences all the same.
    """

    name: str
    model_types: tuple[str, ...]
    layers: str = "layers"
    state: type[PrefixState] = PrefixKV
    enters: str = "keys and values before those of the row, in every layer"
    windows: Windows = "none"
    refused: tuple[Refusal, ...] = REFUSED


FAMILIES = (
    Family(name="Llama", model_types=("llama",)),
    Family(name="Mistral", model_types=("mistral",), windows="every layer"),
    Family(name="Qwen 2 and 3", model_types=("qwen2", "qwen3"), windows="by layer_types"),
    Family(name="Gemma 3", model_types=("gemma3_text",), windows="by layer_types"),
    Family(name="GPT-2", model_types=("gpt2",), layers="h"),
    Family(name="GPT-NeoX", model_types=("gpt_neox",)),
    Family(name="OPT", model_types=("opt",), layers="decoder.layers"),
)
"""Every other causal language model runs whole sequences, the soft prompt before each (the concatenation path)."""

SHARED_PREFIX_MODELS = tuple(sorted(kind for family in FAMILIES for kind in family.model_types))

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


def family_of(config: Any) -> Family | None:
    """The family of a model of this configuration; None if it is of none."""
    return next((family for family in FAMILIES if config.model_type in family.model_types), None)


def why_whole_sequences(config: Any) -> str:
    """Why a model of this configuration cannot share a prefix, in plain words; empty if it can."""
    family = family_of(config)
    if getattr(config, "is_encoder_decoder", False):
        return f"it is an encoder-decoder ({config.model_type}), whose encoder reads all of its input at once"
    if family is None:
        return f"it is of type {config.model_type}, and a prefix can be shared by {', '.join(SHARED_PREFIX_MODELS)}"
    found = [refusal for refusal in family.refused if refusal.applies(config)]
    return "; ".join(f"with the setting {refusal.setting} of its configuration {refusal.why}" for refusal in found)


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
    """The stack of decoder layers. In a model of no family: of the lists of modules that are inside no other, the first
    with as many as the configuration says the language model has layers, or the longest."""
    family = family_of(model.config)
    if family is not None:
        layers: nn.ModuleList = model.base_model.get_submodule(family.layers)
        return layers
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
