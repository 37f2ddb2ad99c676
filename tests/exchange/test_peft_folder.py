"""Soft prompts go to PEFT and come back with the same answers, as PEFT itself computes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    CartridgeConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)

from softprompt.data.example import Example
from softprompt.errors import ArtifactError, ConfigError, SoftPromptError, StoreError
from softprompt.exchange.exporting import export
from softprompt.exchange.importing import adopt, find
from softprompt.model.frozen import FrozenLM
from softprompt.model.request import Request
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tasks.task import Task
from softprompt.text.encoder import recipe
from softprompt.text.tokens import SOFT
from tests.conftest import make_model, make_tokenizer, tiny

FAMILIES = ("llama", "gpt2", "qwen2", "qwen3", "gpt_neox", "gemma3_text-sliding")
TEXTS = ("the plot is thin and the acting is worse", "a dull film", "great")
SEEDS = 20


def base(kind: str) -> Any:
    """The tiny model for PEFT, which reads settings that this family does not have if the configuration holds them."""
    model = make_model(kind)
    if kind == "gpt_neox":
        del model.config.num_key_value_heads
    return model


def made(lm: FrozenLM, seed: int, template: str, kv: bool = False) -> SoftPrompt:
    """A random soft prompt."""
    draw = torch.Generator().manual_seed(seed)
    count = 3 + seed % 5
    shape = (count, *lm.kv_shape) if kv else (count, lm.hidden_size)
    return SoftPrompt(
        vectors=torch.randn(shape, generator=draw) * (0.5 if kv else 1.0) * lm.embedding_rms,
        name=f"random-{seed}",
        base=lm.name,
        base_fingerprint=lm.fingerprint,
        tokenizer_fingerprint=lm.tokenizer_fingerprint,
        template=template,
        parametrisation="prefix" if kv else "plain",
        base_settings=lm.settings,
    )


def ours(lm: FrozenLM, soft_prompt: SoftPrompt, text: str) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Log-probabilities ``[V]`` of the next token, and the tokens behind the soft prompt."""
    request = Task.of(lm, soft_prompt).open_request(Example({"input": text}, None), 1)
    words = tuple((token,) for token in range(len(lm.embedding)))
    asked = Request(request.ids, request.shared, words, 0)
    return lm.score([asked], [soft_prompt.vectors])[0], request.ids[request.ids.index(SOFT) + 1 :]


@torch.no_grad()
def theirs(model: Any, ids: tuple[int, ...], **options: Any) -> torch.Tensor:
    given = torch.tensor([ids])
    logits = model(input_ids=given, attention_mask=torch.ones_like(given), **options).logits
    return logits[0, -1].log_softmax(dim=0)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("to", ["prompt-tuning", "prefix-tuning", "cartridge"])
@pytest.mark.parametrize("kv", [False, True], ids=["embeddings", "kv"])
def test_peft_answers_from_an_export_as_we_do(kind: str, to: str, kv: bool, tmp_path: Path) -> None:
    lm = tiny(kind)
    if kv and to == "prompt-tuning":
        pytest.skip("keys and values have no embeddings")
    for seed in range(SEEDS):
        template = ("{soft_prompt}{input} {target}", "Text: {soft_prompt} {input}\nLabel: {target}")[seed % 2]
        soft_prompt = made(lm, seed, template, kv)
        folder = tmp_path / str(seed)
        export(lm, soft_prompt, to, folder, checked=False)
        model = PeftModel.from_pretrained(base(kind), str(folder)).eval()
        expected, ids = ours(lm, soft_prompt, TEXTS[seed % 3])
        torch.testing.assert_close(theirs(model, ids), expected, atol=1e-5, rtol=0)


CONFIGS: dict[str, Callable[[], Any]] = {
    "prompt tuning": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p-tuning": lambda: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8),
    "prefix tuning": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prefix tuning, projected": lambda: PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=8
    ),
    "cartridge": lambda: CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_frozen_tokens=1),
    "multitask": lambda: MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, num_tasks=3, num_ranks=2
    ),
}


def saved(kind: str, config: Any, folder: Path, seed: int) -> Any:
    """A PEFT model with random numbers, saved and read again by PEFT."""
    torch.manual_seed(seed)
    model = get_peft_model(base(kind), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "prompt_encoder" in name:
                weight.normal_(std=0.3)
    model.save_pretrained(str(folder))
    return PeftModel.from_pretrained(base(kind), str(folder)).eval()


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("method", CONFIGS)
def test_we_answer_from_an_import_as_peft_does(kind: str, method: str, tmp_path: Path) -> None:
    lm = tiny(kind)
    for seed in range(SEEDS if kind == "llama" else 3):
        task = seed % 3 if method == "multitask" else None
        model = saved(kind, CONFIGS[method](), tmp_path / str(seed), seed)
        soft_prompt, _ = adopt(lm, find(tmp_path / str(seed), task), name="theirs", checked=False)
        text = TEXTS[seed % 3]
        expected, _ = ours(lm, soft_prompt, text)
        options = {} if task is None else {"task_ids": torch.tensor([task])}
        # as a user of PEFT tokenises: the tokenizer's own beginning of a sequence behind the virtual tokens
        found = theirs(model, tuple(lm.tokenizer(text).input_ids), **options)
        torch.testing.assert_close(expected, found, atol=1e-5, rtol=0)
