"""What must be known of a transformers model's architecture: a record for each family whose prefixes can be computed
once, and what is read off any model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from softprompt.model.state.kv import PrefixKV
from softprompt.model.state.prefix import PrefixState
from softprompt.model.state.recurrent import RecurrentState

Windows = Literal["none", "every layer", "by layer_types"]
"""Which layers of a model see a part of the tokens only: the last ``sliding_window``, or those of the same chunk."""


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
        found = getattr(config, self.setting, None)
        return found in self.values if self.values else bool(found)


REFUSED = (Refusal("use_bidirectional_attention", (), "tokens see those behind them"),)


@dataclass(frozen=True)
class Head:
    """What a model does to its logits behind the last matrix product.

    Attributes:
        multiplier: the setting that they are multiplied by; empty: none.
        divisor: the setting that they are divided by.
        cap: the setting of the size that they are kept below, by a hyperbolic tangent.
    """

    multiplier: str = ""
    divisor: str = ""
    cap: str = ""

    def __call__(self, logits: torch.Tensor, config: Any) -> torch.Tensor:
        """Float logits ``[…, V]`` as a model of this configuration gives them."""
        factor = getattr(config, self.multiplier) if self.multiplier else 1.0
        if self.divisor:
            factor = factor / getattr(config, self.divisor)
        logits = logits if factor == 1 else logits * factor
        cap = getattr(config, self.cap) if self.cap else None
        return logits if cap is None else torch.tanh(logits / cap) * cap


@dataclass(frozen=True, kw_only=True)
class Family:
    """Architectures alike, for which the shared-prefix computation is tested against concatenation.

    Attributes:
        name: what people call it.
        model_types: what transformers calls it in a configuration.
        layers: where its decoder layers are, from the model without its head.
        state: what a prefix leaves behind.
        leaves: what a prefix leaves behind, in plain words.
        windows: which layers have a sliding window, or chunks.
        fed: the setting by which it multiplies tokens' embeddings, and not those that it is given; empty: none.
        head: what becomes of its logits.
        attention: whether it has layers with attention.
        latent: whether its attention keeps latents, from which its ``expand_kv`` makes keys and values.
        but: what else a user should know of it, for the table of the documentation.
        refused: with which settings a model of it runs whole sequences all the same.
        untrained: why what a prefix leaves behind cannot be trained in its place; empty if it can.
    """

    name: str
    model_types: tuple[str, ...]
    layers: str = "layers"
    state: type[PrefixState] = PrefixKV
    leaves: str = "keys and values in every layer"
    windows: Windows = "none"
    fed: str = ""
    head: Head = Head()
    attention: bool = True
    latent: bool = False
    but: str = ""
    refused: tuple[Refusal, ...] = REFUSED
    untrained: str = ""

    @property
    def recurrent(self) -> bool:
        """Whether it has layers whose memory is a state of one size."""
        return self.state is RecurrentState


CAPPED = Head(cap="final_logit_softcapping")
MULTIPLIED = Head(multiplier="logit_scale")
DIVIDED = Head(divisor="logits_scaling")
LATENTS = "latents in every layer"
PARTS = (
    "a virtual token's parts for each layer are those of padding, so a soft prompt that starts from a text does not "
    "start with that text's logits"
)
STATES = "keys and values in the layers with attention, the state and the convolution's window in the others"

FAMILIES = (
    Family(name="Llama 1 to 3", model_types=("llama",)),
    Family(name="Llama 4", model_types=("llama4_text",), windows="by layer_types"),
    Family(name="Qwen 2 and 3", model_types=("qwen2", "qwen3"), windows="by layer_types"),
    Family(name="Qwen 2 MoE", model_types=("qwen2_moe",), windows="by layer_types"),
    Family(name="Qwen 3 MoE", model_types=("qwen3_moe",), windows="every layer"),
    Family(
        name="Qwen 2 to 3 VL",
        model_types=("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"),
        windows="by layer_types",
    ),
    Family(name="Gemma 1", model_types=("gemma",)),
    Family(name="Gemma 2", model_types=("gemma2",), windows="by layer_types", head=CAPPED),
    Family(name="Gemma 3", model_types=("gemma3_text",), windows="by layer_types", head=CAPPED),
    Family(
        name="Gemma 3n",
        model_types=("gemma3n_text",),
        windows="by layer_types",
        head=CAPPED,
        but=PARTS,
        untrained="some of its layers read the keys and values of others",
    ),
    Family(
        name="Gemma 4",
        model_types=("gemma4_text",),
        windows="by layer_types",
        head=CAPPED,
        but=f"of E2B and E4B, {PARTS}",
        untrained="the heads of its layers differ in size",
    ),
    Family(name="Mistral", model_types=("mistral",), windows="every layer"),
    Family(name="Ministral", model_types=("ministral",), windows="by layer_types"),
    Family(name="Ministral 3", model_types=("ministral3",), windows="every layer"),
    Family(name="Mixtral", model_types=("mixtral",), windows="every layer"),
    Family(name="Phi 1 and 2", model_types=("phi",)),
    Family(name="Phi 3 and 4", model_types=("phi3",), windows="every layer"),
    Family(name="Phi 3.5 MoE", model_types=("phimoe",), windows="every layer"),
    Family(name="gpt-oss", model_types=("gpt_oss",), windows="by layer_types"),
    Family(name="SmolLM 3", model_types=("smollm3",), windows="by layer_types"),
    Family(name="OLMo 1 and 2", model_types=("olmo", "olmo2")),
    Family(name="OLMo 3", model_types=("olmo3",), windows="by layer_types"),
    Family(name="OLMoE", model_types=("olmoe",)),
    Family(name="Granite 3", model_types=("granite", "granitemoe", "granitemoeshared"), head=DIVIDED),
    Family(name="GLM-4", model_types=("glm", "glm4", "glm4_moe")),
    Family(name="Cohere 1", model_types=("cohere",), head=MULTIPLIED),
    Family(name="Cohere 2", model_types=("cohere2",), windows="by layer_types", head=MULTIPLIED),
    Family(
        name="DeepSeek V2 and V3",
        model_types=("deepseek_v2", "deepseek_v3"),
        leaves=LATENTS,
        latent=True,
        untrained="it keeps latents",
    ),
    Family(
        name="Qwen 3.5 and 3-Next",
        model_types=("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"),
        state=RecurrentState,
        leaves=STATES,
    ),
    Family(name="Granite 4", model_types=("granitemoehybrid",), state=RecurrentState, leaves=STATES, head=DIVIDED),
    Family(
        name="Falcon-H1",
        model_types=("falcon_h1",),
        state=RecurrentState,
        leaves="keys, values, state and convolution window in every layer",
        fed="embedding_multiplier",
        head=Head(multiplier="lm_head_multiplier"),
    ),
    Family(name="Nemotron-H", model_types=("nemotron_h",), state=RecurrentState, leaves=STATES),
    Family(
        name="LFM2",
        model_types=("lfm2", "lfm2_moe"),
        state=RecurrentState,
        leaves="keys and values in the layers with attention, the convolution's window in the others",
    ),
    Family(name="Bamba", model_types=("bamba",), state=RecurrentState, leaves=STATES),
    Family(
        name="Mamba 2",
        model_types=("mamba2",),
        state=RecurrentState,
        leaves="the state and the convolution's window in every layer",
        attention=False,
    ),
    Family(name="StarCoder 2", model_types=("starcoder2",), windows="every layer"),
    Family(name="GPT BigCode", model_types=("gpt_bigcode",), layers="h"),
    Family(name="Seed-OSS", model_types=("seed_oss",)),
    Family(name="Hunyuan", model_types=("hunyuan_v1_dense",)),
    Family(name="ERNIE 4.5", model_types=("ernie4_5",)),
    Family(name="EXAONE 4", model_types=("exaone4",), windows="by layer_types"),
    Family(name="Arcee", model_types=("arcee",)),
    Family(name="dots.llm1", model_types=("dots1",), windows="by layer_types"),
    Family(name="Apertus", model_types=("apertus",)),
    Family(name="Helium", model_types=("helium",)),
    Family(name="GPT-2", model_types=("gpt2",), layers="h"),
    Family(name="GPT-NeoX", model_types=("gpt_neox",)),
    Family(name="OPT", model_types=("opt",), layers="decoder.layers"),
)
"""A model of these shares prefixes; every other causal language model runs whole sequences, the soft prompt before each
(the concatenation path), unless a trial at loading shows that its prefixes can be shared as well."""

ALIBI = "its attention adds a bias by distance, computed inside the model"
OWN_ATTENTION = "its attention does not go through the interface of transformers that a prefix enters by"
WHOLE = {
    "bloom": ALIBI,
    "codegen": OWN_ATTENTION,
    "falcon": OWN_ATTENTION,
    "gptj": OWN_ATTENTION,
    "mamba": "its layers do not go on from a state with several tokens",
    "mpt": ALIBI,
    "nemotron": OWN_ATTENTION,
    "stablelm": OWN_ATTENTION,
}
"""Types of models that run whole sequences, and why."""

TEXT_PARTS = ("language_model", "text_model")
"""What models of images and text call the language model inside them."""

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


def family_of(config: Any) -> Family | None:
    """The family of a model of this configuration, or of the language model inside it; None if it is of none."""
    kind = config.get_text_config().model_type
    return next((family for family in FAMILIES if kind in family.model_types), None)


def why_whole_sequences(config: Any) -> str:
    """Why a model of this configuration cannot share a prefix, in plain words; empty if it can."""
    family = family_of(config)
    if getattr(config, "is_encoder_decoder", False):
        return f"it is an encoder-decoder ({config.model_type}), whose encoder reads all of its input at once"
    if family is None:
        return f"it is of type {config.model_type}: {WHOLE.get(config.model_type, 'nothing is known of it')}"
    text = config.get_text_config()
    found = [refusal for refusal in family.refused if refusal.applies(text)]
    return "; ".join(f"with the setting {refusal.setting} of its configuration {refusal.why}" for refusal in found)


def longest_steady(config: Any) -> int:
    """The most tokens of a sequence up to which the angles of positions do not depend on its length; beyond, they
    stretch with it (``dynamic``), or all of them are others (``longrope``)."""
    text = config.get_text_config()
    rotary = getattr(text, "rope_parameters", None) or {}
    found = [LARGEST_WINDOW]
    for kind in (rotary, *rotary.values()):  # some models have one for each kind of layer
        name = kind.get("rope_type") if isinstance(kind, dict) else None
        if name == "longrope":
            found.append(kind["original_max_position_embeddings"])
        elif name and "dynamic" in name:
            found.append(text.max_position_embeddings)
    return min(found)


def feed(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """What tokens feed into the model: ``[…, H]`` of int64 ids ``[…]``, differentiable in the weights."""
    family = family_of(model.config)
    fed: torch.Tensor = model.get_input_embeddings()(ids)
    return fed * getattr(model.config, family.fed) if family is not None and family.fed else fed


def embedding_table(model: Any) -> torch.Tensor:
    """What each token feeds into the model, ``[V, H]``: the weight itself, unless the model scales it (Gemma)."""
    weight: torch.Tensor = model.get_input_embeddings().weight
    with torch.no_grad():
        few = torch.arange(min(64, weight.shape[0]), device=weight.device)
        if torch.equal(feed(model, few), weight[few]):
            return weight
        return feed(model, torch.arange(weight.shape[0], device=weight.device))


def core_of(model: Any) -> Any:
    """The language model without its head."""
    core = model.base_model
    if core is model:  # Llama 4 calls its own something else; an encoder–decoder with a head (T5) has none
        core = getattr(model, "model", model)
    return next((getattr(core, name) for name in TEXT_PARTS if hasattr(core, name)), core)


def leave_out_images(model: Any) -> None:
    """Takes what reads images out of a model of images and text, and its memory with it; what it computes from text
    alone stays."""
    core = model.base_model
    if model.config.get_text_config() is model.config or core is model or core_of(model) is core:
        return
    for name, part in list(core.named_children()):
        if part is not core_of(model):
            setattr(core, name, None)


def decoder_layers(model: Any) -> nn.ModuleList:
    """The stack of decoder layers. In a model of no family: of the lists of modules that are inside no other, the first
    with as many as the configuration says the language model has layers, or the longest."""
    family = family_of(model.config)
    if family is not None:
        layers: nn.ModuleList = core_of(model).get_submodule(family.layers)
        return layers
    config = model.config.get_text_config()
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():  # outer modules come first
        if isinstance(module, nn.ModuleList) and not name.startswith(tuple(f"{outer}." for outer in lists)):
            lists[name] = module
    count = getattr(config, "num_hidden_layers", None)
    fitting = [m for name, m in lists.items() if len(m) == count and not re.search("vis(ion|ual)|audio", name)]
    return fitting[0] if fitting else max(lists.values(), key=len, default=nn.ModuleList())


def window_of(config: Any, tokenizer: Any) -> int:
    """The most tokens in one sequence: what the configuration says, or the tokenizer, or ``USUAL_WINDOW``."""
    text = config.get_text_config()
    said = [getattr(text, name, None) for name in WINDOWS]
    said.append(getattr(tokenizer, "model_max_length", None))
    return next(
        (int(size) for size in said if isinstance(size, int | float) and 0 < size <= LARGEST_WINDOW), USUAL_WINDOW
    )
