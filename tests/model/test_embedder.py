"""What embeds for a base model whose layers are elsewhere, against the base model itself."""

from __future__ import annotations

import pytest
import torch

from softprompt.errors import ConfigError, DataError
from softprompt.model.embedder import Embedder
from softprompt.text.tokens import SOFT
from tests.conftest import ALL, make_model, tiny
from tests.model.families import soft


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("own_table", [True, False])
def test_it_embeds_as_the_base_model_does(kind: str, own_table: bool) -> None:
    """Gemma scales what it looks up; that is in the table."""
    lm = tiny(kind)
    embedder = Embedder.of(lm, own_table=own_table)
    expected = make_model(kind).get_input_embeddings()(torch.tensor([3, 60, 61])).detach()
    torch.testing.assert_close(embedder.embed((3, 60, 61), None), expected, rtol=0, atol=0)
    torch.testing.assert_close(embedder.look_up(torch.tensor([[60]]))[0], expected[1:2], rtol=0, atol=0)
    mixed = embedder.embed((3, SOFT, 60), soft(4))
    torch.testing.assert_close(mixed, torch.cat([expected[:1], soft(4), expected[1:2]]), rtol=0, atol=0)
    assert (embedder.window, embedder.hidden_size, embedder.dtype) == (128, 32, torch.float32)
    assert (embedder.end_tokens, embedder.fingerprint, embedder.name) == (lm.end_tokens, lm.fingerprint, lm.name)


def test_its_own_table_needs_nothing_of_the_model() -> None:
    lm = tiny("llama")
    embedder = Embedder.of(lm, own_table=True)
    assert embedder.embedding.untyped_storage().nbytes() == 320 * 32 * 4
    assert embedder.embedding.data_ptr() != lm.embedding.data_ptr()
    assert Embedder.of(lm).embedding.data_ptr() == lm.embedding.data_ptr()
    held = [value for value in vars(embedder).values() if isinstance(value, torch.nn.Module)]
    assert held == []


def test_its_tokenizer_is_its_own() -> None:
    lm = tiny("llama")
    embedder = Embedder.of(lm)
    assert embedder.tokenizer is not lm.tokenizer
    assert embedder.tokenizer("a film").input_ids == lm.tokenizer("a film").input_ids


def test_what_cannot_be_embedded_is_refused() -> None:
    embedder = Embedder.of(tiny("llama"))
    with pytest.raises(DataError, match="number 320 of its tokenizer"):
        embedder.require_embeddings((3, 320))
    with pytest.raises(ConfigError, match="use a plain soft prompt"):
        embedder.embed((SOFT,), torch.zeros(2, 3, 2, 2, 8))
