"""The facts that hold for every family, each against transformers' own forward over one whole sequence at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt.generation.decoder import generate
from softprompt.model.architecture import FAMILIES, WHOLE, Family
from softprompt.model.fast.packed import computes_bf16
from softprompt.model.frozen import FrozenLM
from softprompt.model.request import Request, Sampling
from softprompt.text.tokens import SOFT
from softprompt.tuning.gradients import Gradients, Layout
from softprompt.tuning.objective import Objective
from softprompt.tuning.training import Training
from tests.conftest import SHARED, make_tokenizer, toy, toy_task, train_settings
from tests.model.families import BY_LAYER, CASES, WHOLE_SEQUENCES, frozen, make_model, soft, whole, whole_score

CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 2e-5}
WORDS = ((70, 71, 72), (70, 71, 80), (90,), (70, 81))
OWNERS = (0, 1, 2, 2)
VOCABULARY = tuple((token,) for token in range(320))
INPUTS = ((60,), (61, 62, 63, 64, 65, 66, 67, 68, 69), (62, 60, 61))
every = pytest.mark.parametrize("case", CASES)


def family_of(case: str) -> Family | None:
    """The record of a case's language model; None if it runs whole sequences."""
    kind = {"gemma3": "gemma3_text"}.get(CASES[case][0], CASES[case][0])
    return next((family for family in FAMILIES if {kind, f"{kind}_text"} & set(family.model_types)), None)


def recurrent(case: str) -> bool:
    family = family_of(case)
    return family is not None and family.recurrent


def trains_prefixes(case: str) -> bool:
    return family_of(case) is not None


def mixed() -> tuple[list[Request], list[torch.Tensor]]:
    """Two soft prompts of different lengths, one before an input and one behind other text, and none at all."""
    starts = ((3, SOFT, 4), (SOFT,), (5, 6, 7))
    requests = [
        Request((*start, *inputs), len(start), WORDS, index if index < 2 else None)
        for inputs in INPUTS
        for index, start in enumerate(starts)
    ]
    return requests, [soft(7), soft(2, 1)]


def soft_of(request: Request, prompts: list[torch.Tensor]) -> torch.Tensor | None:
    return None if request.prompt is None else prompts[request.prompt]


def test_every_family_that_the_page_lists_is_one_of_these() -> None:
    """The generated page is made of ``FAMILIES`` and ``WHOLE``; the tests below run over ``CASES``."""
    fast = {CASES[case][0] for case in CASES if case not in WHOLE_SEQUENCES}
    told = {kind for family in FAMILIES for kind in family.model_types}
    inside = {"gemma3": "gemma3_text"} | {kind: f"{kind}_text" for kind in fast if kind.endswith("_vl")}
    language_models = {inside.get(kind, kind) for kind in fast}
    assert language_models | {kind.removesuffix("-sliding") for kind in SHARED} == told
    assert {CASES[case][0] for case in WHOLE_SEQUENCES} == set(WHOLE)


@every
def test_the_path_is_the_one_that_is_told(case: str) -> None:
    lm = frozen(case)
    assert lm.shares_prefix == (case not in WHOLE_SEQUENCES)
    assert lm.why_whole_sequences == ("" if lm.shares_prefix else f"it is of type {case}: {WHOLE[case]}")


@every
def test_vectors_of_a_text_give_its_logits(case: str) -> None:
    lm, text = frozen(case), (9, 12, 17, 20, 33, 41, 57, 58)
    requests = [Request((3, SOFT, *inputs), 2, VOCABULARY, 0) for inputs in INPUTS]
    expected = torch.stack([whole(case, (3, *text, *inputs))[-1] for inputs in INPUTS])
    embedded = lm.look_up(torch.tensor(text))
    found = lm.score(requests, [embedded])
    if case in BY_LAYER:  # which of a text is more than its vectors
        assert (found - expected).abs().max() > 5e-4
        expected = torch.stack([whole(case, request.ids, embedded)[-1] for request in requests])
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("case", [case for case in CASES if trains_prefixes(case)])
def test_what_a_text_left_behind_is_that_text_where_it_is_put_in(case: str) -> None:
    lm, text = frozen(case), (9, 12, 17, 20, 33, 41, 57, 58)
    requests = [Request((3, SOFT, *inputs), 2, VOCABULARY, 0) for inputs in INPUTS]
    if case in BY_LAYER:  # which of a text is more than its vectors
        numbers = lm.trained.numbers((3, *text), None, 1)
    else:
        numbers = lm.trained.numbers((3, SOFT), lm.look_up(torch.tensor(text)), 1)
    assert tuple(numbers.shape) == lm.trained.shape(len(text))
    expected = torch.stack([whole(case, (3, *text, *inputs))[-1] for inputs in INPUTS])
    torch.testing.assert_close(lm.score(requests, [numbers]), expected, **CLOSE)


@every
def test_a_mixed_batch_equals_one_sequence_at_a_time(case: str) -> None:
    requests, prompts = mixed()
    expected = [[whole_score(case, r, word, soft_of(r, prompts)) for word in r.words] for r in requests]
    torch.testing.assert_close(frozen(case).score(requests, prompts), torch.tensor(expected), **CLOSE)


@every
@pytest.mark.parametrize("labels", [False, True])
def test_the_gradient_is_that_of_concatenation(case: str, labels: bool) -> None:
    lm, vectors = frozen(case), soft(7).requires_grad_()
    requests = [Request((3, SOFT, 4, *inputs), 3, WORDS if labels else WORDS[:1], 0) for inputs in INPUTS]
    scores = torch.stack([torch.stack([whole_score(case, r, w, vectors) for w in r.words]) for r in requests])
    if labels:
        gold = [0, 1, 2]
        of_labels = torch.stack([scores[:, 0], scores[:, 1], scores[:, 2:].logsumexp(1)], dim=1)
        expected = torch.nn.functional.cross_entropy(of_labels, torch.tensor(gold))
    else:
        gold, expected = [0, 0, 0], -scores.sum() / 9
    (gradient,) = torch.autograd.grad(expected, vectors)
    two: Layout | None = "two stages" if lm.shares_prefix else None
    ways: tuple[tuple[int, Layout | None], ...] = ((1, None), (4096, None), (4096, two))
    for max_tokens, layout in ways:  # every row alone, all together
        leaf = vectors.detach().clone().requires_grad_()
        gradients = Gradients(lm, layout=layout, max_tokens=max_tokens)
        found, _ = gradients.backward(Objective(OWNERS if labels else None), requests, gold, leaf)
        assert found == pytest.approx(float(expected.detach()), rel=1e-5)
        assert leaf.grad is not None
        assert float((leaf.grad - gradient).norm() / gradient.norm()) < 1e-5


@pytest.mark.parametrize("case", [case for case in CASES if recurrent(case)])
def test_a_single_virtual_token_behind_text_has_its_gradient(case: str) -> None:
    """Some recurrent layers run one token alone in place."""
    lm, vectors = frozen(case), soft(1).requires_grad_()
    requests = [Request((3, 4, SOFT, *inputs), 3, WORDS[2:3], 0) for inputs in INPUTS]
    expected = -torch.stack([whole_score(case, r, r.words[0], vectors) for r in requests]).sum() / 3
    (gradient,) = torch.autograd.grad(expected, vectors)
    leaf = vectors.detach().clone().requires_grad_()
    Gradients(lm).backward(Objective(), requests, [0, 0, 0], leaf)
    assert leaf.grad is not None
    assert float((leaf.grad - gradient).norm() / gradient.norm()) < 1e-5


@pytest.mark.parametrize("case", [case for case in CASES if recurrent(case)])
def test_in_16_bits_scores_are_near_and_greedy_texts_the_same_in_any_company(case: str) -> None:
    """Mamba 2 adds its layers up in fp32, whatever the weights."""
    lm = FrozenLM(make_model(case), make_tokenizer(), name=case, dtype="bf16", device="cpu")
    requests, prompts = mixed()
    found, exact = lm.score(requests, prompts), frozen(case).score(requests, prompts)
    assert float((found - exact).abs().mean()) < 0.02 * float(exact.abs().mean())
    sampling = Sampling(max_new_tokens=3)
    together = generate(lm, requests[:4], prompts, sampling)
    alone = [generate(lm, [each], prompts, sampling)[0] for each in requests[:4]]
    if computes_bf16():
        assert [each.ids for each in alone] == [each.ids for each in together]


@every
def test_greedy_texts_are_those_of_whole_sequences(case: str) -> None:
    requests, prompts = mixed()
    requests = requests[:5]
    found = generate(frozen(case), requests, prompts, Sampling(max_new_tokens=4))
    for request, text in zip(requests, found, strict=True):
        ids = list(request.ids)
        for _ in range(4):
            ids.append(int(whole(case, ids, soft_of(request, prompts))[-1].argmax()))
        written = ids[len(request.ids) :]
        assert list(text.ids) == (written[: written.index(1)] if 1 in written else written)


@every
def test_nothing_that_ran_changes_what_runs_later(case: str) -> None:
    """A state that was written to, a buffer that was left behind: a resumed run would not equal one never killed."""
    lm, (requests, prompts) = frozen(case), mixed()
    vectors, learned = [soft(7, 2).requires_grad_() for _ in range(2)]

    def gradient(leaf: torch.Tensor) -> torch.Tensor:
        few = [replace(r, words=WORDS[:1]) for r in requests if r.prompt == 0]
        Gradients(lm).backward(Objective(), few, [0] * len(few), leaf)
        assert leaf.grad is not None
        return leaf.grad

    first, scores = gradient(vectors), lm.score(requests, prompts)
    generate(lm, requests[:2], prompts, Sampling(max_new_tokens=3))
    assert torch.equal(lm.score(requests, prompts), scores)
    assert torch.equal(gradient(learned), first)


@pytest.mark.parametrize("case", ["qwen3_5_text", "mamba2", "deepseek_v3", "gpt_oss", "gemma3n_text"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(case: str, tmp_path: Path) -> None:
    lm, data = frozen(case), toy(8, 0)
    before = lm.weights_digest()

    def made(folder: Path) -> Training:
        config = train_settings(steps=4, eval_every=2, checkpoint_every=2)
        return Training(toy_task(lm, data), data, data, config, folder=folder, resume=True)

    whole, stopped = made(tmp_path / "whole"), made(tmp_path / "stopped")
    losses = [step.loss for step in whole]
    next(step for step in stopped if step.number == 2)
    again = made(tmp_path / "stopped")
    assert again.step == 2
    assert [step.loss for step in again] == losses[2:]
    assert len(set(losses)) == 4
    assert torch.equal(again.result().vectors, whole.result().vectors)
    assert lm.weights_digest() == before


@every
def test_what_can_be_trained_is_what_the_page_tells(case: str) -> None:
    """The page says it of all ``FAMILIES``; ``test_trained.py`` and ``test_parametrisation.py`` compare the numbers."""
    assert (frozen(case).trained.why_none == "") == trains_prefixes(case)
