"""Tiny models as folders and GGUF files, and what is said of those that cannot be loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from softprompt.errors import BaseModelError
from softprompt.model.frozen import FrozenLM
from tests.conftest import make_model, make_tokenizer

ADVICE = "give smollm2-135m, a hub id, a folder saved by transformers or a .gguf file"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "mlp.down_proj": "ffn_down",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.k_proj": "attn_k",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_proj": "attn_q",
    "self_attn.v_proj": "attn_v",
}


def saved(folder: Path, kind: str = "llama") -> Path:
    make_model(kind).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def write_gguf(path: Path, *, leave_out: str = "") -> dict[str, torch.Tensor]:
    """The tiny Llama as a GGUF file, queries and keys in Q8_0, the rest in F32; returns the weights it stands for."""
    model, vocabulary = make_model("llama"), json.loads(make_tokenizer().backend_tokenizer.to_str())["model"]
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for layer in range(3):
        names |= {f"model.layers.{layer}.{ours}": f"blk.{layer}.{theirs}" for ours, theirs in LAYER_NAMES.items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(3)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(320)
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in ("<pad>", "</s>") else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in vocabulary["merges"]])
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    weights = {}
    for name, weight in model.state_dict().items():
        if name == leave_out:
            continue
        stem, array = name.removesuffix(".weight"), weight.detach().numpy()
        heads = {"q_proj": 4, "k_proj": 2}.get(stem[-6:])
        if heads is None:
            writer.add_tensor(f"{names[stem]}.weight", array)
            weights[name] = weight.detach()
            continue
        q8 = gguf.GGMLQuantizationType.Q8_0
        rotated = array.reshape(heads, 2, 4, 32).swapaxes(1, 2).reshape(-1, 32)  # GGUF's order of rotary pairs
        packed = gguf.quants.quantize(rotated, q8)
        writer.add_tensor(f"{names[stem]}.weight", packed, raw_dtype=q8)
        unpacked = torch.from_numpy(gguf.quants.dequantize(packed, q8))
        weights[name] = unpacked.view(heads, 4, 2, 32).transpose(1, 2).reshape(-1, 32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def refusal(source: object, **options: Any) -> str:
    with pytest.raises(BaseModelError) as error:
        FrozenLM.load(str(source), **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def changed(folder: Path, **options: Any) -> Path:
    """The folder with other settings in its config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))
    return folder
