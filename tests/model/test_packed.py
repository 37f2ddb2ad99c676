"""Packed weights against the plain ones: the same numbers, the same texts, and no copy that is out of date."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from softprompt.generation.decoder import generate
from softprompt.model.fast import packed
from softprompt.model.fast.packed import PackedWeights, can_pack, computes_bf16
from softprompt.model.frozen import FrozenLM
from softprompt.model.request import Sampling
from tests.conftest import make_model, make_tokenizer, tiny
from tests.model.test_frozen import mixed

if not computes_bf16():
    pytest.skip("this processor's library does not compute in bf16", allow_module_level=True)


def layer_of(width: int, outputs: int, bias: bool) -> Any:
    torch.manual_seed(width)
    return nn.Sequential(nn.Linear(width, outputs, bias=bias)).bfloat16().requires_grad_(False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(576, 192), (1536, 576), (33, 7)])
@pytest.mark.parametrize("rows", [(1,), (2,), (3, 16), (130,)])
@torch.no_grad()
def test_the_product_is_the_plain_one(shape: tuple[int, int], rows: tuple[int, ...], bias: bool) -> None:
    model = layer_of(*shape, bias)
    inputs = torch.randn(*rows, shape[0]).bfloat16()
    plain = model(inputs)
    with PackedWeights(model).used():
        assert "forward" in vars(model[0])
        torch.testing.assert_close(model(inputs), plain)
    assert "forward" not in vars(model[0])


def test_a_gradient_goes_through_the_plain_weights() -> None:
    model, inputs = layer_of(32, 8, True), torch.randn(4, 32).bfloat16().requires_grad_()
    with PackedWeights(model).used():
        model(inputs).sum().backward()
    assert inputs.grad is not None
    torch.testing.assert_close(inputs.grad, model[0].weight.sum(dim=0).expand(4, -1), rtol=0.02, atol=0.02)


@torch.no_grad()
def test_a_weight_that_has_changed_is_packed_anew() -> None:
    model, inputs = layer_of(32, 8, False), torch.randn(4, 32).bfloat16()
    weights = PackedWeights(model)
    with weights.used():
        before = model(inputs)
    model[0].weight.mul_(2)
    with weights.used(), weights.used():
        torch.testing.assert_close(model(inputs), 2 * before)
    model[0].weight.data.mul_(2)  # without autograd's notice
    with weights.used():
        torch.testing.assert_close(model(inputs), 4 * before)
    model[0].weight.data = -model[0].weight.data
    with weights.used():
        torch.testing.assert_close(model(inputs), -4 * before)


@torch.no_grad()
@torch.no_grad()
def test_one_number_that_has_changed_is_noticed() -> None:
    model, inputs = layer_of(576, 192, False), torch.ones(2, 576).bfloat16()
    weights = PackedWeights(model)
    for place in range(3):  # of the 110,592 numbers, one that lies between those that are compared
        with weights.used():
            model(inputs)
        model[0].weight[place, 1 + place] += 64
        with weights.used():
            torch.testing.assert_close(model(inputs), nn.functional.linear(inputs, model[0].weight))


def test_a_weight_that_is_trained_or_too_large_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = layer_of(32, 8, False)
    monkeypatch.setattr(packed, "MOST_BYTES", 32 * 8 * 2 - 1)
    with PackedWeights(model).used():
        assert "forward" not in vars(model[0])
    monkeypatch.setattr(packed, "MOST_BYTES", 32 * 8 * 2)
    model[0].weight.requires_grad_()
    with PackedWeights(model).used():
        assert "forward" not in vars(model[0])
    assert not can_pack(make_model("llama"))  # float32


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gemma3_text-sliding", "stablelm"])
def test_texts_are_those_of_the_plain_weights(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = FrozenLM(make_model(kind), make_tokenizer(), name=kind, dtype="bf16", device="cpu")
    requests, prompts = mixed(tiny(kind))
    digest, products, linear = lm.weights_digest(), 0, packed._forward

    def counted(*arguments: Any) -> torch.Tensor:
        nonlocal products
        products += 1
        return linear(*arguments)

    monkeypatch.setattr(packed, "_forward", counted)
    found = generate(lm, requests, prompts, Sampling(max_new_tokens=8))
    assert products > 0
    monkeypatch.setattr(lm, "packed", PackedWeights(nn.Module()))
    assert [one.ids for one in found] == [
        one.ids for one in generate(lm, requests, prompts, Sampling(max_new_tokens=8))
    ]
    assert lm.weights_digest() == digest
