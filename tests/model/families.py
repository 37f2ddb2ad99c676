"""Tiny models of many families, from their configurations: what the oracles of ``test_families.py`` run over."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from softprompt.model.frozen import FrozenLM
from softprompt.model.request import Request
from softprompt.text.tokens import SOFT
from tests.conftest import make_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "decoder_sparse_step": 1,
}
SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
LATENT: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
    "num_key_value_heads": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "head_dim": 4,
}

GATED: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA: dict[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_d_ssm": 64,
    "mamba_chunk_size": 8,
    "mamba_expand": 2,
}

VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
SECTIONS: dict[str, Any] = {
    "text_config": {
        **SIZES,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    },
    "vision_config": {
        "depth": 1,
        "hidden_size": 16,
        "embed_dim": 16,
        "out_hidden_size": 32,
        "intermediate_size": 16,
        "num_heads": 2,
        "patch_size": 4,
        "deepstack_visual_indexes": [0],
    },
}
"""Qwen's models of images and text, whose positions have three axes; those of text are the same on all of them."""

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama4_text": (
        "llama4_text",
        {
            **EXPERTS,
            "intermediate_size_mlp": 48,
            "attention_chunk_size": 6,
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0],
            "attn_temperature_tuning": True,
            "floor_scale": 3,
            "attn_scale": 0.9,
        },
    ),
    "qwen2_moe": ("qwen2_moe", EXPERTS),
    "qwen3_moe": ("qwen3_moe", EXPERTS),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {**SLIDING, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "gemma3_text-capped": ("gemma3_text", {**SLIDING, "final_logit_softcapping": 3.0}),
    "gemma3": (
        "gemma3",
        {
            "text_config": {**SIZES, **SLIDING},
            "vision_config": VISION,
            "mm_tokens_per_image": 1,
        },
    ),
    "qwen2_vl": ("qwen2_vl", {**SECTIONS, "vision_config": {**SECTIONS["vision_config"], "hidden_size": 32}}),
    "qwen2_5_vl": ("qwen2_5_vl", SECTIONS),
    "qwen3_vl": ("qwen3_vl", SECTIONS),
    "gemma4_text": (
        "gemma4_text",
        {
            **SLIDING,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "global_head_dim": 16,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3n_text": (
        "gemma3n_text",
        {
            **SLIDING,
            "num_hidden_layers": 5,
            "layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"],
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 6,
            "vocab_size_per_layer_input": 320,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0, 0.0],
            "laurel_rank": 4,
            "altup_num_inputs": 2,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma4_text-by_layer": (
        "gemma4_text",
        {
            **SLIDING,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 6,
            "vocab_size_per_layer_input": 320,
            "global_head_dim": 16,
            "use_double_wide_mlp": True,
            "final_logit_softcapping": 3.0,
        },
    ),
    "ministral": ("ministral", SLIDING),
    "ministral3": ("ministral3", {}),
    "ministral3-scaled": (
        "ministral3",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "llama_4_scaling_beta": 0.9,
                "original_max_position_embeddings": 4,
            }
        },
    ),
    "mixtral": ("mixtral", {**EXPERTS, "sliding_window": 6}),
    "phi": ("phi", {}),
    "phi3": ("phi3", {"sliding_window": 6}),
    "phimoe": ("phimoe", EXPERTS),
    "gpt_oss": ("gpt_oss", {**EXPERTS, **SLIDING}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", SLIDING),
    "olmoe": ("olmoe", EXPERTS),
    "granite": ("granite", {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5}),
    "granitemoe": ("granitemoe", {**EXPERTS, "embedding_multiplier": 3.0, "logits_scaling": 2.0}),
    "granitemoeshared": (
        "granitemoeshared",
        {**EXPERTS, "embedding_multiplier": 3.0, "logits_scaling": 2.0, "shared_intermediate_size": 16},
    ),
    "glm": ("glm", {}),
    "glm4": ("glm4", {}),
    "glm4_moe": (
        "glm4_moe",
        {**EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    ),
    "cohere": ("cohere", {"logit_scale": 0.5}),
    "cohere2": ("cohere2", {**SLIDING, "logit_scale": 0.5}),
    "nemotron": ("nemotron", {}),
    "deepseek_v2": ("deepseek_v2", {**EXPERTS, **LATENT}),
    "deepseek_v3": ("deepseek_v3", {**EXPERTS, **LATENT}),
    "qwen3_next": ("qwen3_next", {**EXPERTS, **GATED}),
    "qwen3_5_text": ("qwen3_5_text", GATED),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", {**EXPERTS, **GATED}),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            **MAMBA,
            **EXPERTS,
            "layer_types": ["linear_attention", "full_attention"],
            "shared_intermediate_size": 16,
            "position_embedding_type": "rope",
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
        },
    ),
    "falcon_h1": ("falcon_h1", {**MAMBA, "lm_head_multiplier": 0.5, "embedding_multiplier": 2.0}),
    "nemotron_h": (
        "nemotron_h",
        {
            "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
            "n_routed_experts": 4,
            "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 16,
        },
    ),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "block_multiple_of": 8}),
    "lfm2_moe": (
        "lfm2_moe",
        {**EXPERTS, "layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "num_dense_layers": 1},
    ),
    "bamba": ("bamba", {**MAMBA, "attn_layer_indices": [1]}),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}),
    "codegen": ("codegen", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 128}),
    "falcon": ("falcon", {"alibi": True, "head_dim": None}),
    "gptj": ("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 128}),
    "mpt": ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128}),
    "mamba": ("mamba", {"state_size": 8, "conv_kernel": 4}),
    "mamba2": ("mamba2", {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8}),
    "starcoder2": ("starcoder2", {}),
    "stablelm": ("stablelm", {}),
    "gpt_bigcode": ("gpt_bigcode", {"n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "seed_oss": ("seed_oss", {}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {}),
    "ernie4_5": ("ernie4_5", {}),
    "exaone4": ("exaone4", SLIDING),
    "arcee": ("arcee", {}),
    "dots1": (
        "dots1",
        {**EXPERTS, **SLIDING, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1},
    ),
    "apertus": ("apertus", {}),
    "helium": ("helium", {}),
}


WHOLE_SEQUENCES = {"bloom", "codegen", "falcon", "gptj", "mamba", "mpt", "nemotron", "stablelm"}
"""The cases that take the concatenation path; all others are fast."""

BY_LAYER = {"gemma3n_text", "gemma4_text-by_layer"}
"""The cases whose layers get a part of their own of each token, by its id."""


def make_model(case: str) -> Any:
    """A tiny model with seeded random weights, large enough that attention is far from uniform."""
    kind, options = CASES[case]
    sizes = {} if "text_config" in options else SIZES
    wanted = {name: value for name, value in {**sizes, **options}.items() if value is not None}
    config = AutoConfig.for_model(kind, **wanted)
    torch.manual_seed(7)
    models: Any = AutoModelForImageTextToText if "_vl" in kind else AutoModelForCausalLM
    model = models.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(0.15 * torch.randn_like(weight) + (weight if weight.dim() == 1 else 0))
    return model.eval()


@cache
def frozen(case: str) -> FrozenLM:
    """A frozen tiny model in fp32; made once, since nothing may change it."""
    return FrozenLM(make_model(case), make_tokenizer(), name=f"tiny-{case}", dtype="fp32", device="cpu")


@cache
def plain(case: str) -> Any:
    """An oracle: the same weights in a model of transformers alone, with its plainest attention."""
    model = make_model(case).requires_grad_(False)
    model.set_attn_implementation("eager")
    return model


def soft(length: int, seed: int = 0) -> torch.Tensor:
    """Vectors ``[length, 32]`` of the size of the tiny models' embeddings."""
    return 0.15 * torch.randn(length, 32, generator=torch.Generator().manual_seed(seed))


def whole(case: str, ids: Sequence[int], soft: torch.Tensor | None = None) -> torch.Tensor:
    """Log-probabilities ``[T, V]`` by ``plain`` of one sequence; ``soft`` ``[P, H]`` where ``ids`` has ``SOFT``."""
    model = plain(case)
    if SOFT in ids:
        lookup, factor = model.get_input_embeddings(), 2.0 if case == "falcon_h1" else 1.0  # of tokens alone
        pieces: list[Any] = [soft if token == SOFT else factor * lookup(torch.tensor([token])) for token in ids]
        inputs = {"inputs_embeds": torch.cat(pieces)[None]}
        if case in BY_LAYER:  # a virtual token has the part of each layer that padding has
            places = [
                token
                for own in ids
                for token in ([0] * len(soft if soft is not None else ()) if own == SOFT else [own])
            ]
            inputs["per_layer_inputs"] = model.model.get_per_layer_inputs(torch.tensor([places]))
    else:
        inputs = {"input_ids": torch.tensor([ids])}
    logits = model(**inputs, use_cache=False).logits[0]
    return torch.log_softmax(logits, dim=-1)


def whole_score(case: str, request: Request, word: Sequence[int], soft: torch.Tensor | None) -> torch.Tensor:
    """log P(word | request) by ``plain``, a scalar."""
    logprobs = whole(case, (*request.ids, *word[:-1]), soft)[-len(word) :]
    return logprobs[torch.arange(len(word)), torch.tensor(word)].sum()
