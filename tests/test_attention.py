"""Attention over a shared prefix, against PyTorch's own; how it meets whole models is in ``test_frozen.py``."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from conftest import SHARED, make_model, tiny
from softprompt.attention import PrefixKV, attend, stack_prefixes


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_is_pytorchs(kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 4, 5, 8, generator=generator)
    key, value = (torch.randn(3, kv_heads, 9, 8, generator=generator) for _ in range(2))
    sees = torch.rand(3, 1, 5, 9, generator=generator) < 0.5
    sees[..., 0] = True
    mask = torch.zeros(3, 1, 5, 9).masked_fill(~sees, torch.finfo(torch.float32).min)
    expected = functional.scaled_dot_product_attention(query, key, value, sees, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(attend(query, key, value, mask, 0.3), expected.transpose(1, 2))


@pytest.mark.parametrize("kind", SHARED)
def test_without_a_prefix_the_model_is_as_it_was(kind: str) -> None:
    ids = torch.tensor([[3, 60, 61, 62, 63], [4, 70, 71, 0, 0]])
    mask = torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    expected = make_model(kind).eval()(input_ids=ids, attention_mask=mask).logits.detach()
    found = tiny(kind).model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1, :3], expected[1, :3])


def test_prefixes_of_any_lengths_stand_beside_each_other() -> None:
    def prefix(length: int) -> PrefixKV:
        layers = tuple(torch.full((1, 2, length, 4), 10.0 * length + layer) for layer in range(3))
        return PrefixKV(layers, tuple(-layer for layer in layers), (length,))

    stacked = stack_prefixes([prefix(2), prefix(0), prefix(3)])
    assert stacked.lengths == (2, 0, 3)
    assert stacked.width == 3
    assert len(stacked) == 3
    for layer in range(3):
        assert stacked.keys[layer].shape == stacked.values[layer].shape == (3, 2, 3, 4)
        assert stacked.keys[layer][:, 1, :, 2].tolist() == [[20 + layer, 20 + layer, 0], [0, 0, 0], [30 + layer] * 3]
        assert torch.equal(stacked.values[layer], -stacked.keys[layer])
    one = prefix(2)
    assert stack_prefixes([one]) is one
    assert one.nbytes == 2 * 3 * 2 * 2 * 4 * 4
