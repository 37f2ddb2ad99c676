"""A soft prompt to push, and the stand-in that it is pushed to."""

from __future__ import annotations

from typing import Any

import torch

from softprompt.model.frozen import FrozenLM
from softprompt.soft_prompts.soft_prompt import SoftPrompt

TEMPLATE = "Text: {soft_prompt} {input}\nLabel: {target}"
LABELS = {"negative": ("negative",), "positive": ("positive", "great")}
METRIC = {
    "split": "validation",
    "metric": "accuracy",
    "value": 0.9,
    "stderr": 0.03,
    "low": 0.8256,
    "high": 0.9448,
    "n": 100,
}
REPO = "me/films"
OWN = "soft_prompt.safetensors"


def made(lm: FrozenLM, **options: Any) -> SoftPrompt:
    fields: dict[str, Any] = {
        "name": "films",
        "base": "someone/tiny",
        "base_fingerprint": lm.fingerprint,
        "tokenizer_fingerprint": lm.tokenizer_fingerprint,
        "template": TEMPLATE,
        "verbalizer": LABELS,
        "metrics": (METRIC,),
        "training": {"lr": 0.3, "steps": 10},
        "data": {"validation": {"source": "/home/me/secret/dev.jsonl", "fingerprint": "ab", "rows": 100}},
        "base_settings": lm.settings,
    }
    shape = (4, *lm.trained.kv_shape) if options.get("parametrisation") == "prefix" else (4, lm.hidden_size)
    vectors = 0.15 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return SoftPrompt(vectors=vectors, **fields | options)
