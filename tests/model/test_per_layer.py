"""Models whose layers get more of a token than its embedding: what ``test_families.py`` does not ask."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from softprompt.errors import BaseModelError, ConfigError
from softprompt.exchange.embedded import embedded
from softprompt.exchange.exporting import export
from softprompt.model.frozen import FrozenLM
from softprompt.model.request import Request
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.text.tokens import SOFT
from tests import conftest
from tests.conftest import make_tokenizer
from tests.model.families import CASES, SIZES, frozen, make_model, soft, whole, whole_score

REQUEST = Request((3, SOFT, 60, 61), 2, ((70, 71), (90,)), 0)


def text_config(case: str) -> dict[str, Any]:
    return {**SIZES, **CASES[case][1], "model_type": CASES[case][0]}


def soft_prompt(lm: FrozenLM) -> SoftPrompt:
    return SoftPrompt(
        vectors=soft(4),
        name="films",
        base=lm.name,
        base_fingerprint=lm.fingerprint,
        tokenizer_fingerprint=lm.tokenizer_fingerprint,
        template="{soft_prompt}{input}\n{target}",
        verbalizer=None,
    )


def test_gemma_3n_is_loaded_without_what_sees_and_hears(tmp_path: Path) -> None:
    """As it is stored on the hub; its towers would need the library timm."""
    weights = {
        name.replace("model.", "model.language_model.", 1): weight.clone()
        for name, weight in make_model("gemma3n_text").state_dict().items()
        if name != "lm_head.weight"
    }
    weights |= {"model.vision_tower.x.weight": torch.zeros(3), "model.embed_audio.embedding.weight": torch.zeros(3)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    AutoConfig.for_model("gemma3n", text_config=text_config("gemma3n_text")).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # there is nothing to be told
        lm = FrozenLM.load(tmp_path, dtype="fp32", device="cpu")
    assert lm.shares_prefix
    vectors = soft(4)
    expected = [whole_score("gemma3n_text", REQUEST, word, vectors) for word in REQUEST.words]
    torch.testing.assert_close(lm.score([REQUEST], [vectors])[0], torch.stack(expected), rtol=1e-5, atol=2e-5)


def test_gemma_4_of_images_and_text_shares_prefixes_too() -> None:
    vision = {"num_hidden_layers": 1, "num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 16}
    vision |= {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "patch_size": 4}
    config = AutoConfig.for_model(
        "gemma4",
        text_config=text_config("gemma4_text-by_layer"),
        vision_config=vision,
        audio_config=None,
        **{f"{sense}_token_id": number for number, sense in enumerate(("image", "video", "audio"), start=2)},
    )
    models: Any = AutoModelForCausalLM
    model = models.from_config(config).eval()
    model.model.language_model.load_state_dict(make_model("gemma4_text-by_layer").model.state_dict())
    model.tie_weights()
    lm = FrozenLM(model, make_tokenizer(), name="tiny", dtype="fp32", device="cpu", text_only=True)
    assert lm.shares_prefix
    vectors = soft(4)
    expected = [whole_score("gemma4_text-by_layer", REQUEST, word, vectors) for word in REQUEST.words]
    torch.testing.assert_close(lm.score([REQUEST], [vectors])[0], torch.stack(expected), rtol=1e-5, atol=2e-5)
    bare = lm.score([Request((3, 60, 61), 1, ((70,),))])
    torch.testing.assert_close(bare[0, 0], whole("gemma4_text-by_layer", (3, 60, 61))[-1, 70], rtol=1e-5, atol=2e-5)


def test_what_hands_over_embeddings_alone_is_refused(tmp_path: Path) -> None:
    lm = frozen("gemma3n_text")
    for to in ("peft", "npy", "vllm"):
        with pytest.raises(ConfigError, match=r"layers of tiny-gemma3n_text get more.*softprompt serve"):
            export(lm, soft_prompt(lm), to, tmp_path / to)
    with pytest.raises(ConfigError, match=r"more of each token; take softprompt\.predict"):
        embedded(lm, soft_prompt(lm), ())


def test_parts_that_cannot_be_looked_up_are_refused() -> None:
    model = conftest.make_model("llama").eval()
    model.config.hidden_size_per_layer_input = 8
    with pytest.raises(BaseModelError, match=r"more of a token than its embedding.*give another base model"):
        FrozenLM(model, make_tokenizer(), name="tiny", dtype="fp32", device="cpu")
