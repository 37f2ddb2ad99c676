"""Attention over a shared prefix, against PyTorch's own; how it meets whole models is in ``test_frozen.py``."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from softprompt.errors import BaseModelError
from softprompt.model import attention
from softprompt.model.architecture import decoder_layers
from softprompt.model.attention import attend, attend_fast, attend_shared
from tests.conftest import SHARED, SIZES, make_model, tiny


@pytest.mark.parametrize("tokens", [5, 1])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_is_pytorchs(kv_heads: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 4, tokens, 8, generator=generator)
    key, value = (torch.randn(3, kv_heads, 9, 8, generator=generator) for _ in range(2))
    sees = torch.rand(3, 1, tokens, 9, generator=generator) < 0.5
    sees[..., 0] = True
    mask = torch.zeros(3, 1, tokens, 9).masked_fill(~sees, torch.finfo(torch.float32).min)
    expected = functional.scaled_dot_product_attention(query, key, value, sees, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(attend(query, key, value, mask, 0.3), expected.transpose(1, 2))
    for grouped in (True, False):
        found = attend_fast(query, key, value, mask, 0.3, grouped=grouped)
        torch.testing.assert_close(found, expected.transpose(1, 2))


def shared_inputs(
    kv_heads: int, length: int, dtype: torch.dtype = torch.float64
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Query, key, value, prefix key and value of 3 rows of 5 tokens, and a mask with causal rows and a word apart."""
    generator = torch.Generator().manual_seed(length)
    shapes = [(3, 4, 5, 8), *[(3, kv_heads, 5, 8)] * 2, *[(1, kv_heads, length, 8)] * 2]
    tensors = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    sees = torch.ones(3, 1, 5, length + 5, dtype=torch.bool)
    sees[..., length:] = torch.ones(5, 5, dtype=torch.bool).tril()
    sees[1, 0, 4, length + 3] = False
    return tensors, torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("length", [0, 1, 7])
def test_attention_over_a_shared_prefix_and_its_gradient_are_pytorchs(kv_heads: int, length: int) -> None:
    tensors, mask = shared_inputs(kv_heads, length)
    query, key, value, prefix_key, prefix_value = tensors
    keys = torch.cat([prefix_key.expand(3, -1, -1, -1), key], dim=2)
    values = torch.cat([prefix_value.expand(3, -1, -1, -1), value], dim=2)
    expected = functional.scaled_dot_product_attention(query, keys, values, mask == 0, scale=0.3, enable_gqa=True)
    found, _ = attend_shared(*tensors, None, mask, 0.3, True)
    torch.testing.assert_close(found, expected.transpose(1, 2))
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad((found * weight).sum(), tensors),
        torch.autograd.grad((expected.transpose(1, 2) * weight).sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_rows_of_several_prefixes_attend_to_their_own(kv_heads: int) -> None:
    """Rows 0 and 2 have prefix 1, row 1 has prefix 0, of which the mask hides the last two tokens, as if it were
    shorter."""
    (query, key, value, *_), mask = shared_inputs(kv_heads, 7)
    generator = torch.Generator().manual_seed(2)
    prefix_key, prefix_value = (
        torch.randn(2, kv_heads, 7, 8, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)
    )
    tensors, rows = (query, key, value, prefix_key, prefix_value), torch.tensor([1, 0, 1])
    mask = mask.clone()
    mask[1, :, :, 5:7] = torch.finfo(mask.dtype).min
    keys, values = (torch.cat([t[rows], own], dim=2) for t, own in ((prefix_key, key), (prefix_value, value)))
    expected = functional.scaled_dot_product_attention(query, keys, values, mask == 0, scale=0.3, enable_gqa=True)
    found, _ = attend_shared(*tensors, rows, mask, 0.3, False)
    torch.testing.assert_close(found, expected.transpose(1, 2))
    weight = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad((found * weight).sum(), tensors),
        torch.autograd.grad((expected.transpose(1, 2) * weight).sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)  # a prefix's rows are added up in fp32


def test_the_operator_keeps_the_rules_of_pytorchs_compiler() -> None:
    tensors, mask = shared_inputs(2, 7, torch.float32)
    torch.library.opcheck(attend_shared, (*tensors, None, mask, 0.3, True))
    prefixes = tuple(tensor.detach().repeat(2, 1, 1, 1).requires_grad_() for tensor in tensors[3:])
    rows = torch.tensor([1, 0, 1])
    torch.library.opcheck(attend_shared, (*tensors[:3], *prefixes, rows, mask, 0.3, False))


@pytest.mark.parametrize("kind", SHARED)
def test_without_a_prefix_the_model_is_as_it_was(kind: str) -> None:
    ids = torch.tensor([[3, 60, 61, 62, 63], [4, 70, 71, 0, 0]])
    mask = torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    expected = make_model(kind).eval()(input_ids=ids, attention_mask=mask).logits.detach()
    found = tiny(kind).model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1, :3], expected[1, :3])


# --- what attention is to do besides -------------------------------------------------------------------------


def installed(kind: str, **options: Any) -> Any:
    """A tiny model of another family, with our attention in it."""
    models: Any = AutoModelForCausalLM
    torch.manual_seed(0)
    model = models.from_config(AutoConfig.for_model(kind, **SIZES | {"head_dim": 8} | options)).eval()
    attention.install(model, decoder_layers(model))
    return model


def run(model: Any, *, own: bool, **options: Any) -> torch.Tensor:
    """Logits of five tokens, by our attention or by transformers' ``sdpa``."""
    sees = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    mask = torch.zeros(1, 1, 5, 5).masked_fill(~sees, torch.finfo(torch.float32).min) if own else None
    with torch.no_grad():
        logits: torch.Tensor = model(
            input_ids=torch.tensor([[3, 60, 61, 62, 63]]), attention_mask=mask, **options
        ).logits
    return logits


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1}),
        ("gemma2", {"attn_logit_softcapping": 0.05}),
    ],
)
def test_sinks_and_capped_scores_are_transformers_own(kind: str, options: dict[str, Any], own: bool) -> None:
    model = installed(kind, **options)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    ours = run(model, own=own)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(ours, run(model, own=own))


def test_scores_are_capped_before_the_mask_and_a_sink_takes_its_share() -> None:
    query, key, value = (torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    mask = torch.zeros(1, 1, 3, 3).masked_fill(torch.ones(3, 3).triu(1).bool(), torch.finfo(torch.float32).min)
    sinks = torch.tensor([0.5, -1.0])
    found = attend(query, key, value, mask, 2.0, softcap=1.5, sinks=sinks)
    for head in range(2):
        for token in range(3):
            scores = [
                1.5 * math.tanh(2.0 * float(query[0, head, token] @ key[0, head, seen]) / 1.5)
                for seen in range(token + 1)
            ]
            total = sum(map(math.exp, scores)) + math.exp(float(sinks[head]))
            expected = sum(math.exp(score) / total * value[0, head, seen] for seen, score in enumerate(scores))
            torch.testing.assert_close(found[0, token, head], expected)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("asked", [{"position_bias": torch.zeros(1, 4, 5, 5)}, {"new": False}])
def test_nothing_that_attention_is_given_is_left_out(own: bool, asked: dict[str, Any]) -> None:
    model = tiny("llama").model
    with pytest.raises(BaseModelError, match=next(iter(asked))):
        run(model, own=own, **asked)
    nothing = run(model, own=own, **dict.fromkeys(asked))
    torch.testing.assert_close(nothing, run(model, own=own), rtol=0, atol=0)


def test_dropout_is_refused_and_not_left_out() -> None:
    model = installed("llama", attention_dropout=0.5)
    assert run(model, own=True).isfinite().all()
    model.train()
    with pytest.raises(BaseModelError, match="dropout"):
        run(model, own=True)
