"""Virtual tokens before the decoder's input of an encoder–decoder, against transformers' own forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt.data.example import Example
from softprompt.errors import ConfigError, TemplateError
from softprompt.generation.decoder import generate
from softprompt.model.request import Request, Sampling
from softprompt.soft_prompts.artifact import read_header
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tasks.predict import Query, predict
from softprompt.tasks.task import Task
from softprompt.text.tokens import SOFT
from softprompt.tuning.gradients import Gradients
from softprompt.tuning.objective import Objective
from softprompt.tuning.training import Training
from tests.conftest import tiny, toy, toy_task, train_settings
from tests.encoder_decoders import KINDS, encoder_decoder, reference
from tests.model.test_encoder_decoder import embedded

TOLERANCE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
WORDS = ((50, 1), (50, 51, 1), (50, 51, 52, 1), (53,))
REQUESTS = (
    Request((SOFT, 40, 41, 42, 43, 44, 1), 1, WORDS, 0, ahead=2),
    Request((40, 41, SOFT, 42, 1), 0, WORDS[1:3], 1, ahead=3),
    Request((40, SOFT, 43, 1), 0, WORDS[:2], 1),
    Request((70, 71, 1), 0, WORDS[:1], None),
)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def soft_prompts() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randn(5, 32, generator=draw), torch.randn(8, 32, generator=draw)]


def logits(kind: str, request: Request, words: Sequence[int], prompts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Float32 ``[N + start + words, V]`` behind each of what the decoder reads, by transformers alone."""
    model, ahead = reference(kind), torch.zeros(0, 32)
    if request.ahead:
        assert request.prompt is not None
        ahead = prompts[request.prompt][-request.ahead :]
        prompts = [own[: -request.ahead] for own in prompts]
    tokens = torch.tensor([*encoder_decoder(kind).decoder_start, *words])
    read = torch.cat([ahead, model.get_decoder().get_input_embeddings()(tokens)])[None]
    mask = torch.ones(read.shape[:2], dtype=torch.long)
    given = embedded(kind, request, prompts)
    found: torch.Tensor = model(inputs_embeds=given, decoder_inputs_embeds=read, decoder_attention_mask=mask).logits[0]
    return found


def own_score(kind: str, request: Request, word: Sequence[int], prompts: Sequence[torch.Tensor]) -> torch.Tensor:
    """log P(word | input) by ``logits``."""
    logprobs = logits(kind, request, word[:-1], prompts)[-len(word) :].log_softmax(dim=-1)
    return logprobs.gather(1, torch.tensor(word)[:, None]).sum()


def test_scores_are_those_of_transformers_in_any_company(kind: str) -> None:
    lm, prompts = encoder_decoder(kind), soft_prompts()
    scores = lm.score(REQUESTS, prompts)
    for row, request in zip(scores, REQUESTS, strict=True):
        expected = torch.stack([own_score(kind, request, word, prompts) for word in request.words])
        torch.testing.assert_close(row[: len(expected)], expected, **TOLERANCE)
    without = lm.score([replace(REQUESTS[0], ahead=0)], [prompts[0][:3]])
    assert float((without - scores[0]).abs().max()) > 0.01


def test_the_gradient_is_that_of_transformers(kind: str) -> None:
    lm, prompts = encoder_decoder(kind), soft_prompts()
    requests = [replace(r, prompt=0, ahead=2, words=r.words[1:2]) for r in REQUESTS[:2]]
    theirs = prompts[0].clone().requires_grad_()
    total = -torch.stack([own_score(kind, r, r.words[0], [theirs]) for r in requests]).sum() / 7
    (expected,) = torch.autograd.grad(total, theirs)
    ours = prompts[0].clone().requires_grad_()
    loss, _ = Gradients(lm).backward(Objective(), requests, [0, 0], ours)
    assert loss == pytest.approx(float(total.detach()), rel=1e-5)
    assert bool(expected[-2:].abs().sum(dim=1).gt(0).all())
    torch.testing.assert_close(ours.grad, expected, **TOLERANCE)


def test_greedy_texts_are_those_of_whole_sequences(kind: str) -> None:
    lm, prompts = encoder_decoder(kind), soft_prompts()
    for request, found in zip(REQUESTS, generate(lm, REQUESTS, prompts, Sampling(max_new_tokens=6)), strict=True):
        ids: list[int] = []
        for _ in range(6):
            ids.append(int(logits(kind, request, ids, prompts)[-1].argmax()))
        assert found.ids == tuple(ids[: ids.index(1)] if 1 in ids else ids)


def made(folder: Path | None = None, **options: Any) -> Training:
    data, lm = toy(24, 0), encoder_decoder("t5")
    settings: dict[str, Any] = {"steps": 6, "eval_every": 3, "checkpoint_every": 2, "decoder_virtual_tokens": 2}
    task = replace(toy_task(lm, data), decoder_virtual_tokens=2)
    return Training(task, data, data, train_settings(**settings | options), name="both", folder=folder, resume=True)


@pytest.mark.parametrize("parametrisation", ["plain", "residual"])
def test_both_are_learned_and_a_run_goes_on(parametrisation: str, tmp_path: Path) -> None:
    whole = made(tmp_path / "whole", parametrisation=parametrisation)
    start = whole.vectors
    assert start.shape == (8, 32)
    losses = [step.loss for step in whole]
    stopped = made(tmp_path / "stopped", parametrisation=parametrisation)
    next(step for step in stopped if step.number == 4)
    again = made(tmp_path / "stopped", parametrisation=parametrisation)
    assert [step.loss for step in again] == losses[4:]
    found = whole.result()
    assert torch.equal(again.result().vectors, found.vectors)
    assert bool((found.vectors - start).abs().sum(dim=1).gt(0).all())
    assert (found.num_virtual_tokens, found.decoder_virtual_tokens) == (6, 2)
    assert found.extent == "6 virtual tokens, and 2 before the decoder's input"


def test_a_file_holds_both_and_is_used_as_it_was(tmp_path: Path) -> None:
    training = made()
    list(training)
    one, path, lm = training.result(), tmp_path / "both.safetensors", encoder_decoder("t5")
    one.save(path)
    loaded = SoftPrompt.load(path)
    assert torch.equal(loaded.vectors, one.vectors)
    assert loaded.parts == {"soft_prompt": (6, 32), "decoder_soft_prompt": (2, 32)}
    assert read_header(path).sizes == {"num_virtual_tokens": 6, "hidden_size": 32}
    task, example = Task.of(lm, loaded), Example({"input": "1 great"}, None)
    assert task.decoder_virtual_tokens == 2
    (answer,) = predict([Query(task, example, loaded.vectors)])
    expected = lm.score([replace(task.label_request(example), ahead=2)], [one.vectors])
    assert list((answer.logprobs or {}).values()) == pytest.approx(task.label_logprobs(expected)[0].tolist(), abs=1e-5)
    with pytest.raises(ConfigError, match=r"needs a soft prompt of shape \[8, 32\]"):
        Query(task, example, loaded.vectors[:6])


def test_where_nothing_stands_before_a_decoder_says_so() -> None:
    data = toy(8, 0)
    with pytest.raises(ConfigError, match="tiny-llama is not: it is no encoder-decoder; leave decoder_virtual_tokens"):
        replace(toy_task(tiny("llama"), data), decoder_virtual_tokens=2)
    with pytest.raises(ConfigError, match="the task has 0 virtual tokens before the decoder's input, but 2 are to be"):
        Training(toy_task(encoder_decoder("t5"), data), data, data, train_settings(decoder_virtual_tokens=2))


def test_the_target_leaves_them_room() -> None:
    task = replace(toy_task(encoder_decoder("bart"), toy(8, 0)), verbalizer=None)
    window, example = task.max_length, Example({"input": "a"}, None)
    task.open_request(example, window - 2)
    with pytest.raises(TemplateError, match=f"a target of at most {window - 2 - 3} tokens"):
        replace(task, decoder_virtual_tokens=3).open_request(example, window - 2)
