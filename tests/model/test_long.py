"""Models in which the angles of positions are others in long sequences (``longrope``, ``dynamic``): each row as if it
were alone, against transformers' own forward."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from softprompt.generation.decoder import Decoder, continuation, generate
from softprompt.generation.writer import Writer
from softprompt.model.frozen import FrozenLM
from softprompt.model.request import Request, Sampling, can_share
from softprompt.text.tokens import SOFT
from softprompt.tuning.gradients import Gradients
from softprompt.tuning.objective import Objective
from tests.conftest import make_tokenizer, randomised
from tests.model.families import EXPERTS, SIZES, soft

STEADY = 16
"""Tokens up to which a sequence of these models is short."""

LONG: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "long_factor": [1.0, 4.0, 9.0, 16.0],
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "original_max_position_embeddings": STEADY,
}
KINDS: dict[str, dict[str, Any]] = {
    "phi3": {"rope_parameters": LONG, "original_max_position_embeddings": STEADY},
    "phimoe": {**EXPERTS, "rope_parameters": LONG | {"long_mscale": 1.3, "short_mscale": 1.1}},
    "llama": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        "max_position_embeddings": STEADY,
    },
}
WORDS = ((70, 71, 72), (70, 71, 80), (90,))
SHORT, MIDDLE, BEYOND = (60, 61), tuple(range(60, 66)), tuple(range(60, 72))
every = pytest.mark.parametrize("kind", KINDS)
longrope = pytest.mark.parametrize("kind", ["phi3", "phimoe"])


def make(kind: str) -> Any:
    torch.manual_seed(7)
    models: Any = AutoModelForCausalLM
    model = models.from_config(AutoConfig.for_model(kind, **{**SIZES, **KINDS[kind]}))
    return randomised(model).eval().requires_grad_(False)


@cache
def frozen(kind: str) -> FrozenLM:
    return FrozenLM(make(kind), make_tokenizer(), name=f"tiny-{kind}", dtype="fp32", device="cpu")


def alone(kind: str, request: Request, vectors: torch.Tensor, written: tuple[int, ...] = ()) -> torch.Tensor:
    """Log-probabilities ``[T, V]`` by a model of transformers that has run nothing before."""
    model = make(kind)
    model.set_attn_implementation("eager")
    lookup = model.get_input_embeddings()
    pieces = [vectors if token == SOFT else lookup(torch.tensor([token])) for token in (*request.ids, *written)]
    logits: torch.Tensor = model(inputs_embeds=torch.cat(pieces)[None], use_cache=False).logits[0]
    return logits.log_softmax(dim=-1)


def score(kind: str, request: Request, word: tuple[int, ...], vectors: torch.Tensor) -> torch.Tensor:
    found = alone(kind, request, vectors, word[:-1])[-len(word) :]
    return found[torch.arange(len(word)), torch.tensor(word)].sum()


def request(inputs: tuple[int, ...], words: tuple[tuple[int, ...], ...] = WORDS) -> Request:
    """Of 7 + 2 tokens and the input's."""
    return Request((3, SOFT, 4, *inputs), 3, words, 0)


@every
def test_short_sequences_share_prefixes_whatever_ran_before(kind: str) -> None:
    lm, vectors, requests = frozen(kind), soft(7), [request(SHORT), request((62,))]
    assert all(can_share(lm, r, 7) for r in requests)
    assert not can_share(lm, request(MIDDLE), 7)
    lm.score([request(BEYOND)], [vectors])
    expected = [[score(kind, r, word, vectors) for word in WORDS] for r in requests]
    torch.testing.assert_close(lm.score(requests, [vectors]), torch.tensor(expected), rtol=1e-5, atol=2e-5)


@longrope
def test_long_ones_beside_them_are_as_if_each_were_alone(kind: str) -> None:
    """The middle one is short with one of its words and long with the others."""
    lm, vectors = frozen(kind), soft(7)
    requests = [request(inputs) for inputs in (SHORT, BEYOND, MIDDLE, (62,))]
    expected = [[score(kind, r, word, vectors) for word in WORDS] for r in requests]
    torch.testing.assert_close(lm.score(requests, [vectors]), torch.tensor(expected), rtol=1e-5, atol=2e-5)


@longrope
@pytest.mark.parametrize("inputs", [(SHORT, (62,)), (SHORT, BEYOND)])
def test_the_gradient_is_that_of_rows_alone(kind: str, inputs: tuple[tuple[int, ...], ...]) -> None:
    vectors = soft(7).requires_grad_()
    requests = [request(own, WORDS[:1]) for own in inputs]
    loss = -torch.stack([score(kind, r, WORDS[0], vectors) for r in requests]).sum() / 6
    (expected,) = torch.autograd.grad(loss, vectors)
    leaf = soft(7).requires_grad_()
    Gradients(frozen(kind)).backward(Objective(), requests, [0, 0], leaf)
    assert leaf.grad is not None
    assert float((leaf.grad - expected).norm() / expected.norm()) < 1e-5


@longrope
def test_a_text_that_becomes_long_goes_on_as_a_long_one(kind: str) -> None:
    lm, prompts = frozen(kind), [soft(7)]
    requests = [request(inputs) for inputs in ((62,), SHORT, BEYOND)]
    found = generate(lm, requests, prompts, Sampling(max_new_tokens=9))
    for one, text in zip(requests, found, strict=True):
        written: tuple[int, ...] = ()
        while len(written) < 9 and 1 not in written:
            written = (*written, int(alone(kind, one, prompts[0], written)[-1].argmax()))
        assert text.ids == (written[:-1] if 1 in written else written)


def test_rows_that_wait_begin_as_whole_sequences_where_they_are_long() -> None:
    lm = frozen("phi3")
    writer = Writer(lm.tokenizer, lm.end_tokens, Sampling(max_new_tokens=2), 0)
    rows = [continuation(lm, request(own), soft(7), writer, lm.prefix_kv) for own in (SHORT, BEYOND)]
    assert [row.prefix is None for row in rows] == [False, True]
    decoder = Decoder(lm)
    decoder.join(rows)
    assert len(decoder) == 2
