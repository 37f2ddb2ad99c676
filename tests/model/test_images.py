"""Models of images and text: their language model, with text alone, against their own forward."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from softprompt.api import serve
from softprompt.errors import BaseModelError
from softprompt.model.frozen import FrozenLM
from softprompt.model.request import Request
from softprompt.text.tokens import SOFT
from softprompt.tuning.gradients import Gradients
from softprompt.tuning.objective import Objective
from softprompt.tuning.training import Training
from tests.conftest import make_tokenizer, randomised, toy, toy_task, train_settings
from tests.model.families import CASES, SIZES, VISION


def of(text: str, vision: str, **options: Any) -> dict[str, Any]:
    sections = {"text_config": {"model_type": text, **SIZES}, "vision_config": {"model_type": vision, **VISION}}
    return {name: {**section, **options.pop(name, {})} for name, section in sections.items()} | options


KINDS: dict[str, dict[str, Any]] = {
    "llava": of("llama", "clip_vision_model", image_token_index=2),
    "smolvlm": of("llama", "smolvlm_vision", image_token_id=2, scale_factor=2),
    "mistral3": of("mistral", "pixtral", image_token_index=2, vision_config={"head_dim": 8}),
    "internvl": of("qwen2", "internvl_vision", image_token_id=2, vision_config={"image_size": [16, 16]}),
    "gemma3": {**CASES["gemma3"][1], "image_token_index": 2},
    "qwen2_5_vl": CASES["qwen2_5_vl"][1],
    "qwen3_vl": CASES["qwen3_vl"][1],
}
every = pytest.mark.parametrize("kind", KINDS)


def make(kind: str, **options: Any) -> Any:
    models: Any = AutoModelForImageTextToText
    torch.manual_seed(7)
    model = models.from_config(AutoConfig.for_model(kind, **{**KINDS.get(kind, {}), **options}))
    return randomised(model).eval().requires_grad_(False)


@cache
def whole(kind: str) -> Any:
    """An oracle: the whole model, with transformers' own attention."""
    model = make(kind)
    model.set_attn_implementation("eager")
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def saved(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        make(kind).save_pretrained(folder)
        tokenizer = make_tokenizer()
        tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}Answer:"
        tokenizer.save_pretrained(folder)
        return folder

    return saved


@pytest.fixture(scope="module")
def loaded(folders: Any) -> Any:
    def load(kind: str) -> FrozenLM:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # there is nothing to be told
            return FrozenLM.load(folders(kind), dtype="fp32", device="cpu")

    return cache(load)


@every
def test_scores_and_gradients_are_those_of_its_own_forward(kind: str, loaded: Any) -> None:
    lm: FrozenLM = loaded(kind)
    assert lm.shares_prefix
    word, inputs = (60, 61), ((5, 9), (33, 7, 44, 58, 90, 12, 100))
    start = 0.15 * torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    of_both = start.clone().requires_grad_()
    lookup, losses = whole(kind).get_input_embeddings(), []
    for ids in inputs:
        with torch.no_grad():
            logprobs = whole(kind)(input_ids=torch.tensor([[3, *ids, *word]])).logits[0, -3:].log_softmax(-1)
        bare = lm.score([Request((3, *ids), 1, (word,))], ())
        torch.testing.assert_close(bare[0, 0], logprobs[0, 60] + logprobs[1, 61], rtol=1e-5, atol=2e-5)
        pieces = [lookup(torch.tensor([3])), of_both, lookup(torch.tensor([*ids, *word]))]
        logprobs = whole(kind)(inputs_embeds=torch.cat(pieces)[None]).logits[0, -3:].log_softmax(-1)
        losses.append(-(logprobs[0, 60] + logprobs[1, 61]))
    (expected,) = torch.autograd.grad(sum(losses) / 4, of_both)
    leaf = start.clone().requires_grad_()
    requests = [Request((3, SOFT, *ids), 2, (word,), 0) for ids in inputs]
    loss, _ = Gradients(lm).backward(Objective(), requests, [0, 0], leaf)
    assert loss == pytest.approx(sum(one.item() for one in losses) / 4, rel=1e-5)
    assert leaf.grad is not None
    assert float((leaf.grad - expected).norm() / expected.norm()) < 1e-5


@every
def test_what_reads_images_is_not_kept_in_memory(kind: str, loaded: Any) -> None:
    lm: FrozenLM = loaded(kind)
    names = [name for name, _ in lm.model.named_parameters()]
    assert [name for name in names if "vis" in name or "projector" in name or "connector" in name] == []
    text = make(kind).get_decoder().num_parameters()
    assert text <= lm.num_parameters <= text + 320 * 32  # and the head, where it is not the table


def test_a_model_in_memory_keeps_its_eyes_and_is_the_same_base_model(loaded: Any) -> None:
    model = make("llava")
    before = sorted(name for name, _ in model.named_parameters())
    lm = FrozenLM.wrap(model, make_tokenizer(), dtype="fp32", device="cpu")
    assert sorted(name for name, _ in model.named_parameters()) == before
    assert lm.fingerprint == loaded("llava").fingerprint


@pytest.mark.parametrize("kind", ["llava", "smolvlm", "qwen3_vl"])
def test_it_is_trained_and_served(kind: str, loaded: Any) -> None:
    lm, data = loaded(kind), toy(20, 0)
    before = lm.weights_digest()
    training = Training(toy_task(lm, data), data, toy(10, 1), train_settings(steps=2, eval_every=1), name="film")
    assert len(list(training)) == 2
    made = training.result()
    assert lm.weights_digest() == before
    running = serve(lm, {"film": made}, port=0, block=False)
    try:
        asked = {"model": "film", "messages": [{"role": "user", "content": "a great film"}]}
        reply = httpx.post(f"{running.url}/v1/chat/completions", json=asked, timeout=30)
        assert reply.status_code == 200, reply.text
        assert reply.json()["choices"][0]["message"]["content"] in ("positive", "negative")
        picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
        asked["messages"] = [{"role": "user", "content": [picture]}]
        refused = httpx.post(f"{running.url}/v1/chat/completions", json=asked, timeout=30)
        assert refused.status_code == 400
        assert "content.0.image_url" in refused.json()["error"]["message"]
    finally:
        running.close()


def test_one_whose_text_sees_what_is_behind_it_is_refused() -> None:
    """The text before a PaliGemma's answer is read in both directions."""
    options = of("gemma", "siglip_vision_model", vision_config={"projection_dim": 32}, projection_dim=32)
    model = make("paligemma", **options, image_token_index=2)
    with pytest.raises(BaseModelError, match="its tokens see those behind them"):
        FrozenLM(model, make_tokenizer(), name="tiny", dtype="fp32", device="cpu")
