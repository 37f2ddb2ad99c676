"""Tiny encoder–decoders from configurations, with tokenizers that end a text as theirs do."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from tokenizers import processors
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

from softprompt.data.example import Dataset, Example
from softprompt.model.frozen import FrozenLM
from tests.conftest import make_tokenizer, randomised, toy

T5: dict[str, Any] = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
BART: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 320,
    "eos_token_id": 1,
    "decoder_start_token_id": 1,
    "scale_embedding": True,
}
GEMMA: dict[str, Any] = {
    "vocab_size": 321,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"],
    "pad_token_id": 0,
    "bos_token_id": 320,
    "eos_token_id": 1,
}
VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
IMAGES = {"image_size": 28, "patch_size": 14}
OPTIONS: dict[str, dict[str, Any]] = {
    "t5": T5,  # the head tied to the embeddings, so that the decoder's states are scaled; ReLU
    "t5-1.1": T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "mt5": T5 | {"tie_word_embeddings": False},
    "bart": BART,
    "t5gemma": {"encoder": GEMMA, "decoder": GEMMA},
    "t5gemma2": {
        "encoder": {
            "text_config": GEMMA,
            "vision_config": VISION | IMAGES,
            "mm_tokens_per_image": 4,
            "boi_token_index": 300,
            "eoi_token_index": 301,
            "image_token_index": 302,
        },
        "decoder": GEMMA,
    },
}
KINDS = tuple(OPTIONS)

OTHER = {"positive": "negative", "negative": "positive"}


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """Ends a text with ``</s>`` as T5's does; puts ``<s>`` before it, as BART's does, or that alone, as Gemma's."""
    tokenizer: Any = make_tokenizer()
    if kind.startswith("t5gemma") or kind == "bart":
        tokenizer.add_special_tokens({"bos_token": "<s>"})
    around = {"bart": "<s> $A </s>", "t5gemma": "<s> $A", "t5gemma2": "<s> $A"}.get(kind, "$A </s>")
    special = [(token, id) for token, id in (("<s>", 320), ("</s>", 1)) if token in around]
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=special)
    return tokenizer  # type: ignore[no-any-return]


def make_encoder_decoder(kind: str, **options: Any) -> Any:
    """A tiny model with seeded random weights."""
    model_type = "t5" if kind == "t5-1.1" else kind
    config = AutoConfig.for_model(model_type, vocab_size=321, **OPTIONS.get(kind, BART) | options)
    torch.manual_seed(7)
    models: Any = AutoModelForSeq2SeqLM
    return randomised(models.from_config(config), 0.2)


@cache
def encoder_decoder(kind: str) -> FrozenLM:
    """A frozen one in fp32; made once, since nothing may change it."""
    return FrozenLM(make_encoder_decoder(kind), tokenizer_of(kind), name=f"tiny-{kind}", dtype="fp32")


@cache
def reference(kind: str) -> Any:
    """An oracle: the same weights in a model of transformers alone."""
    return make_encoder_decoder(kind).eval().requires_grad_(False)


def words_only(data: Dataset) -> Dataset:
    """The rows of ``toy`` without their numbers."""
    examples = (Example({"input": e.fields["input"].split(" ", 1)[1]}, e.target, where=e.where) for e in data.examples)
    return replace(data, examples=tuple(examples))


def taught(steps: int = 110) -> Any:
    """A T5 of one layer that answers the rows of ``toy`` behind the word "very", says the opposite behind "dull", and
    "film" without either: a frozen model of random weights alone can be taught nothing by a soft prompt."""
    tokenizer, draw, rows = tokenizer_of("t5"), random.Random(0), words_only(toy(300, 5)).examples
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models: Any = AutoModelForSeq2SeqLM
        config = AutoConfig.for_model("t5", vocab_size=321, **T5 | {"num_layers": 1, "dropout_rate": 0.0})
        model = models.from_config(config).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(steps):
            texts, targets = [], []
            for row in draw.choices(rows, k=32):
                gold, way = str(row.target), draw.randrange(3)
                texts.append(("very ", "dull ", "")[way] + row.fields["input"])
                targets.append((gold, OTHER[gold], "film")[way])
            labels = tokenizer(targets, padding=True, return_tensors="pt").input_ids
            given = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
            optimizer.zero_grad()
            model(**given, labels=labels.masked_fill(labels == 0, -100)).loss.backward()
            optimizer.step()
    return model.eval()
