"""The vectors that a training starts from, and the soft prompt that it makes."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from softprompt.errors import ConfigError
from softprompt.model.frozen import FrozenLM
from softprompt.soft_prompts.metadata import library_versions
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tuning.start import initial_vectors
from tests.conftest import tiny


def rows_of(lm: FrozenLM, vectors: torch.Tensor) -> list[int]:
    """The token whose embedding each vector is; fails for another vector."""
    return [int((lm.embedding == vector).all(dim=1).nonzero().item()) for vector in vectors]


def start(lm: FrozenLM, length: int, init: str, seed: int = 0, **options: Any) -> torch.Tensor:
    vectors = initial_vectors(lm, length, init=init, seed=seed, **options)
    assert vectors.shape == (length, 32)
    assert vectors.dtype == torch.float32
    assert not vectors.requires_grad
    return vectors


@pytest.mark.parametrize(
    ("length", "expected"), [(1, "0"), (4, "0123"), (5, "01234"), (6, "401234"), (11, "40123401234")]
)
def test_text_is_cut_to_the_length_or_repeated_to_end_whole(llama: FrozenLM, length: int, expected: str) -> None:
    ids = llama.tokenizer(" very good", add_special_tokens=False).input_ids
    assert len(set(ids)) == len(ids) == 5
    assert rows_of(llama, start(llama, length, "text", text=" very good")) == [ids[int(place)] for place in expected]


def test_labels_are_the_means_of_their_tokens_and_then_vocabulary(llama: FrozenLM) -> None:
    words: Sequence[tuple[int, ...]] = ((70, 71, 90), (80,))
    vectors = start(llama, 6, "labels", seed=3, label_words=words)
    table = llama.embedding
    torch.testing.assert_close(vectors[0], (table[70] + table[71] + table[90]) / 3)
    assert torch.equal(vectors[1], table[80])
    assert torch.equal(vectors[2:], start(llama, 6, "vocab", seed=3)[2:])
    assert torch.equal(start(llama, 1, "labels", label_words=words)[0], vectors[0])  # more labels than virtual tokens


def test_vocabulary_is_drawn_from_the_frequent_part_without_replacement(
    llama: FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("softprompt.text.tokens.FREQUENT_TOKENS", 50)
    drawn = rows_of(llama, start(llama, 50, "vocab"))
    assert sorted(drawn) == list(range(2, 52))  # tokens 0 and 1 are the special ones
    assert drawn != sorted(drawn)
    again = rows_of(llama, start(llama, 120, "vocab"))  # more than there are: from the start again
    assert again == (drawn * 3)[:120]


def test_random_has_the_size_of_the_embeddings(llama: FrozenLM) -> None:
    """RMS of n = 200 * 32 normal numbers: standard error rms / sqrt(2 n) = 0.9 %; the bound of 5 % is beyond 5 of them,
    so with another seed it would fail with a probability below 1e-7."""
    vectors = start(llama, 200, "random")
    assert float(vectors.square().mean().sqrt()) == pytest.approx(llama.embedding_rms, rel=0.05)
    assert abs(float(vectors.mean())) < 5 * llama.embedding_rms / math.sqrt(vectors.numel())


@pytest.mark.parametrize("init", ["random", "vocab", "labels"])
def test_the_seed_decides(llama: FrozenLM, init: str) -> None:
    words = ((70,), (71,))
    first = start(llama, 8, init, seed=1, label_words=words)
    torch.rand(3)  # the global generator has no part in it
    assert torch.equal(start(llama, 8, init, seed=1, label_words=words), first)
    assert not torch.equal(start(llama, 8, init, seed=2, label_words=words), first)


def test_nothing_reaches_into_the_table(llama: FrozenLM) -> None:
    before = llama.embedding.clone()
    for init in ("random", "vocab", "labels", "text"):
        start(llama, 5, init, text="film", label_words=((70,), (71,))).fill_(7)
    assert torch.equal(llama.embedding, before)


@pytest.mark.parametrize(
    ("init", "options", "sentence"),
    [
        ("text", {}, "init text needs an init_text of at least one token; give a longer one"),
        ("text", {"text": ""}, "init text needs an init_text of at least one token; give a longer one"),
        ("labels", {}, "init labels needs class labels; give --labels, or another init"),
        ("mine", {}, "init must be random, vocab, text or labels, not 'mine'"),
    ],
)
def test_a_start_that_does_not_fit(llama: FrozenLM, init: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        initial_vectors(llama, 3, init=init, seed=0, **options)
    assert str(error.value) == sentence


def test_a_soft_prompt_knows_its_length_and_versions() -> None:
    made = SoftPrompt(
        vectors=torch.zeros(5, 32),
        name="a",
        base="b",
        base_fingerprint="",
        tokenizer_fingerprint="",
        template="{soft_prompt}{input}{target}",
    )
    assert made.num_virtual_tokens == 5
    found = library_versions()
    assert found == {name: importlib.metadata.version(name) for name in ("softprompt", "torch", "transformers")}


def test_every_model_has_its_own_start() -> None:
    assert not torch.equal(start(tiny("llama"), 3, "vocab"), start(tiny("gpt2"), 3, "vocab"))
