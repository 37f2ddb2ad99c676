"""Soft prompts of a few numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt.errors import ArtifactError
from softprompt.soft_prompts.artifact import read_header
from softprompt.soft_prompts.soft_prompt import SoftPrompt, load

BASE: Mapping[str, Any] = {
    "base": "smollm2-135m",
    "base_fingerprint": "ab" * 32,
    "tokenizer_fingerprint": "cd" * 32,
    "hidden_size": 8,
    "base_settings": {"rms_norm_eps": 1e-05, "rope_parameters.rope_theta": 100_000.0, "sliding_window": None},
}


def make(vectors: torch.Tensor | None = None, **changes: Any) -> SoftPrompt:
    if vectors is None:
        vectors = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    fields: dict[str, Any] = {
        "name": "sst2",
        "base": "smollm2-135m",
        "base_fingerprint": "ab" * 32,
        "tokenizer_fingerprint": "cd" * 32,
        "template": "{soft_prompt}{input}\nSentiment: {target}",
        "verbalizer": {"positive": ("great", "good"), "negative": ("terrible",)},
        "training": {"steps": 400, "learning_rate": 0.15, "loss": "labels", "betas": [0.9, 0.999], "note": None},
        "data": {"train": {"rows": 6920, "sha256": "ef" * 32}},
        "metrics": ({"split": "validation", "metric": "accuracy", "value": 0.905, "stderr": 0.01, "n": 872},),
        "versions": {"torch": "2.13.0"},
        "created": "2026-11-22T12:00:00+00:00",
    }
    return SoftPrompt(vectors=vectors, **(fields | changes))


def make_prefix(vectors: torch.Tensor | None = None, **changes: Any) -> SoftPrompt:
    """A trained KV prefix ``[P, L, 2, H_kv, D]``."""
    if vectors is None:
        vectors = torch.randn(3, 4, 2, 1, 5, generator=torch.Generator().manual_seed(0))
    return make(vectors, **({"parametrisation": "prefix"} | changes))


def sentence(path: Path) -> str:
    """Why a file is refused, which is the same with and without its numbers."""
    with pytest.raises(ArtifactError) as caught:
        load(path)
    with pytest.raises(ArtifactError) as without_numbers:
        read_header(path)
    assert str(caught.value) == str(without_numbers.value)
    return str(caught.value)
