"""Trained states against transformers' own cache, in which the numbers stand as its layers keep them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from softprompt.errors import BaseModelError, ConfigError
from softprompt.generation.decoder import generate
from softprompt.model.request import Request, Sampling
from softprompt.model.trained import apart
from softprompt.text.tokens import SOFT
from softprompt.tuning.gradients import Gradients
from softprompt.tuning.objective import Objective
from tests.conftest import tiny
from tests.model.families import BY_LAYER, CASES, frozen, plain, soft, whole, whole_score
from tests.model.test_families import CLOSE, INPUTS, VOCABULARY, recurrent

KEPT = ["gemma4_text", "gemma4_text-by_layer", "gemma3n_text", "deepseek_v2", "deepseek_v3"]
"""Layers that have attention all, but not all of them keys and values of one size."""

STATES = [case for case in CASES if recurrent(case)] + KEPT
every = pytest.mark.parametrize("case", STATES)
TEXT = (9, 12, 17, 20, 33, 41)
WORDS = ((70, 71, 72), (70, 80), (90,))


def numbers_of(case: str, length: int = 6, seed: int = 0) -> torch.Tensor:
    """A trained state ``[N]`` as no text would leave it."""
    generator = torch.Generator().manual_seed(seed)
    return 0.3 * torch.randn(frozen(case).trained.shape(length), generator=generator)


def named(case: str, numbers: torch.Tensor) -> dict[str, torch.Tensor]:
    trained = frozen(case).trained
    return apart(numbers, trained.shapes(trained.length(numbers.shape)))


def takes(model: Any, cache: Any) -> dict[str, Any]:
    return {"cache_params" if model.config.model_type == "mamba2" else "past_key_values": cache, "use_cache": True}


def cached(case: str, ids: Sequence[int], parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Log-probabilities ``[T, V]`` after each of the ids behind ``SOFT``, by transformers alone, with ``parts`` in its
    cache behind the ids before it."""
    model, place = plain(case), tuple(ids).index(SOFT)
    cache: Any = DynamicCache(config=model.config)
    if place or case not in KEPT:
        model(input_ids=torch.tensor([ids[:place] or [5]]), **takes(model, cache))
    if case in KEPT:
        for name, keys in parts.items():
            if name.endswith("keys"):
                both = keys, parts[name.replace("keys", "values")]
                cache.update(*(own.transpose(0, 1)[None] for own in both), int(name.split(".")[1]))
    else:
        put_into(cache, parts, place)
    # Nemotron-H's own layers bound the size of a step, but where a pass has one token alone: so one more, not looked at
    rest, positions = torch.tensor([[*ids[place + 1 :], 5]]), {}
    if model.config.model_type != "mamba2":
        past = place + next(len(own) for name, own in parts.items() if name.endswith("keys"))
        positions = {"position_ids": torch.arange(past, past + rest.shape[1])[None]}
    return torch.log_softmax(model(input_ids=rest, **takes(model, cache), **positions).logits[0, :-1], dim=-1)


def put_into(cache: Any, parts: Mapping[str, torch.Tensor], place: int) -> None:
    """What the cache of a recurrent model holds of some ids, or of a throw-away token, gives way to ``parts``; keys and
    values stand behind the first ``place``."""
    for number, layer in enumerate(cache.layers):
        layer.record_past = True  # else a convolution changes its window in place
        layer.update_recurrent_state = lambda states, *_, **__: states
        for name, held in (("state", "recurrent_states"), ("window", "conv_states")):
            if f"layers.{number}.{name}" in parts:
                own = parts[f"layers.{number}.{name}"][None]
                before = getattr(layer, held)[0]
                lost = before.shape[-1] - own.shape[-1]
                assert lost == (name == "window")
                assert before.shape[:-1] == own.shape[:-1]
                getattr(layer, held)[0] = torch.cat([torch.full_like(before[..., :lost], 9.0), own], dim=-1)
        for which in ("keys", "values"):
            if f"layers.{number}.{which}" in parts:
                own = parts[f"layers.{number}.{which}"].transpose(0, 1)[None]
                before = getattr(layer, which)[:, :, :place]
                setattr(layer, which, torch.cat([before, own], dim=2))


def cached_score(case: str, request: Request, word: Sequence[int], parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    logprobs = cached(case, (*request.ids, *word[:-1]), parts)[-len(word) :]
    return logprobs[torch.arange(len(word)), torch.tensor(word)].sum()


@every
def test_the_state_that_a_text_left_is_that_text(case: str) -> None:
    """Taken from transformers' cache after the whole text, of which token 3 stands in the template."""
    lm, model = frozen(case), plain(case)
    cache = DynamicCache() if case in KEPT else DynamicCache(config=model.config)  # of sliding layers all tokens
    model(input_ids=torch.tensor([[3, *TEXT]]), **takes(model, cache))
    found = {}
    for number, layer in enumerate(cache.layers):
        for name, held in (("state", "recurrent_states"), ("window", "conv_states")):
            found[f"layers.{number}.{name}"] = getattr(layer, held, {0: None})[0]
        for which in ("keys", "values"):
            found[f"layers.{number}.{which}"] = getattr(layer, which, None)
    shapes, parts = lm.trained.shapes(len(TEXT)), []
    for name, shape in shapes.items():
        tensor = found[name][0]
        if name.endswith(("keys", "values")):
            tensor = tensor[:, 1:].transpose(0, 1)
        parts.append(tensor[..., 1:] if name.endswith("window") else tensor)
        assert parts[-1].shape == shape
    numbers = torch.cat([part.flatten() for part in parts])
    requests = [Request((3, SOFT, *inputs), 2, VOCABULARY, 0) for inputs in INPUTS]
    expected = torch.stack([whole(case, (3, *TEXT, *inputs))[-1] for inputs in INPUTS])
    torch.testing.assert_close(lm.score(requests, [numbers]), expected, **CLOSE)
    if case in BY_LAYER:  # whose layers get of a text more than its vectors
        made = lm.trained.numbers((3, *TEXT), None, 1)
    else:
        made = lm.trained.numbers((3, SOFT), lm.look_up(torch.tensor(TEXT)), 1)
    torch.testing.assert_close(made, numbers, **CLOSE)


@every
@pytest.mark.parametrize("start", [(SOFT,), (3, 4, SOFT, 5, 6)], ids=str)
def test_any_state_is_what_transformers_layers_go_on_from(case: str, start: tuple[int, ...]) -> None:
    numbers = numbers_of(case)
    requests = [Request((*start, *inputs), len(start), WORDS, 0) for inputs in INPUTS]
    parts = named(case, numbers)
    expected = [[cached_score(case, r, word, parts) for word in r.words] for r in requests]
    torch.testing.assert_close(frozen(case).score(requests, [numbers]), torch.tensor(expected), **CLOSE)


@every
@pytest.mark.parametrize("behind", [(), (4,), (4, 5)], ids=str)
def test_the_gradient_is_that_through_transformers_layers(case: str, behind: tuple[int, ...]) -> None:
    """Behind a state, some layers run one token alone in place."""
    numbers = numbers_of(case).requires_grad_()
    start = (3, SOFT, *behind)
    requests = [Request((*start, *inputs), len(start), WORDS[:1], 0) for inputs in INPUTS]
    parts = named(case, numbers)
    loss = -torch.stack([cached_score(case, r, r.words[0], parts) for r in requests]).sum() / 9
    (expected,) = torch.autograd.grad(loss, numbers)
    for name, part in named(case, expected).items():
        assert part.norm() > 0, name
    leaf = numbers.detach().clone().requires_grad_()
    found, _ = Gradients(frozen(case)).backward(Objective(), requests, [0, 0, 0], leaf)
    assert found == pytest.approx(float(loss.detach()), rel=1e-5)
    assert leaf.grad is not None
    assert float((leaf.grad - expected).norm() / expected.norm()) < 1e-4


def mixed(case: str) -> tuple[list[Request], list[torch.Tensor]]:
    """Two states of different lengths, a plain soft prompt, and none at all."""
    starts = ((3, SOFT, 4), (SOFT,), (SOFT, 5, 6), (5, 6, 7))
    requests = [
        Request((*start, *inputs), len(start), WORDS, index if index < 3 else None)
        for inputs in INPUTS
        for index, start in enumerate(starts)
    ]
    return requests, [numbers_of(case), numbers_of(case, 3, 1), soft(4)]


def alone(case: str, request: Request, prompts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Log-probabilities ``[V]`` behind a request, by transformers alone."""
    if request.prompt is None or prompts[request.prompt].dim() == 2:
        return whole(case, request.ids, None if request.prompt is None else prompts[request.prompt])[-1]
    return cached(case, request.ids, named(case, prompts[request.prompt]))[-1]


@every
def test_a_mixed_batch_is_scored_and_continued_as_each_row_alone(case: str) -> None:
    lm, (requests, prompts) = frozen(case), mixed(case)
    scores = lm.score(requests, prompts)
    for row, request in zip(scores, requests, strict=True):
        vectors = None if request.prompt is None else prompts[request.prompt]
        if vectors is None or vectors.dim() == 2:
            expected = [whole_score(case, request, word, vectors) for word in request.words]
        else:
            parts = named(case, vectors)
            expected = [cached_score(case, request, word, parts) for word in request.words]
        torch.testing.assert_close(row, torch.tensor(expected), **CLOSE)
    few = [requests[index] for index in (0, 1, 2, 3, 5)]
    for request, text in zip(few, generate(lm, few, prompts, Sampling(max_new_tokens=4)), strict=True):
        ids = request.ids
        for token in text.ids:
            assert int(alone(case, Request(ids, 0, (), request.prompt), prompts).argmax()) == token
            ids = (*ids, token)


def test_how_much_a_state_is() -> None:
    """The pure recurrent model has a memory of 4 heads of 16 by 8 and a window of 3 inputs of 80 in both layers."""
    trained = frozen("mamba2").trained
    assert trained.shape(7) == trained.shape(1) == (2 * (4 * 16 * 8 + 3 * 80),)
    assert trained.length(trained.shape(7)) == trained.places(7) == 0
    hybrid = frozen("qwen3_5_text").trained
    assert hybrid.shapes(7) == {
        "layers.1.keys": (7, 2, 8),
        "layers.1.values": (7, 2, 8),
        "layers.0.state": (4, 8, 8),
        "layers.0.window": (64, 3),
    }
    assert hybrid.length(hybrid.shape(7)) == hybrid.places(7) == 7


def test_only_what_a_layer_keeps_itself_is_trained() -> None:
    """Of 4 layers the last two read what the first two keep, whose heads have 8 and 16 numbers; the last two of 5 read
    what two of the others keep; and 16 numbers of latents stand for 4 heads."""
    assert frozen("gemma4_text-by_layer").trained.shapes(7) == {
        "layers.0.keys": (7, 2, 8),
        "layers.1.keys": (7, 2, 16),
        "layers.0.values": (7, 2, 8),
        "layers.1.values": (7, 2, 16),
    }
    shared = {f"layers.{layer}.{which}": (7, 2, 8) for which in ("keys", "values") for layer in range(3)}
    assert frozen("gemma3n_text").trained.shapes(7) == shared
    assert frozen("deepseek_v3").trained.shapes(7) == {
        "layers.0.keys": (7, 1, 16),
        "layers.1.keys": (7, 1, 16),
        "layers.0.values": (7, 1, 4),
        "layers.1.values": (7, 1, 4),
    }
    for case in KEPT:
        trained = frozen(case).trained
        assert trained.length(trained.shape(7)) == trained.places(7) == 7


@pytest.mark.parametrize("case", ["gemma4_text-by_layer", "gemma3n_text"])
def test_what_layers_read_of_others_is_held_once(case: str) -> None:
    """By prefixes that are kept, and by rows that grow."""
    lm = frozen(case)
    prefix, size = lm.kept_prefixes(1), 4 * sum(map(math.prod, lm.trained.shapes(7).values()))
    held = prefix((SOFT,), soft(7))
    assert prefix.nbytes == held.nbytes == size
    slots = lm.slots()
    slots.add([held], 1)
    assert slots.row(0).nbytes == size


@pytest.mark.parametrize(
    ("lm", "numbers", "why"),
    [
        (
            tiny("llama"),
            torch.zeros(50),
            "a trained state, which it cannot take: its layers start from no state of that",
        ),
        (frozen("mamba2"), torch.zeros(50), "a trained state, which it cannot take: its layers start from no state of"),
        (
            frozen("mamba2"),
            torch.zeros(2, 2, 2, 2, 8),
            "a trained KV prefix, which it cannot take: not all of its layers",
        ),
        (frozen("deepseek_v3"), torch.zeros(50), "a trained state, which it cannot take: its layers start from no"),
        (
            frozen("gemma4_text"),
            torch.zeros(2, 2, 2, 2, 8),
            "a trained KV prefix, which it cannot take: the keys and values of its layers differ",
        ),
        (
            frozen("gemma3n_text"),
            torch.zeros(2, 5, 2, 2, 8),
            "a trained KV prefix, which it cannot take: some of its layers read the keys and values of others",
        ),
        (
            tiny("stablelm"),
            torch.zeros(50),
            "A trained prefix must stand before all input.* the base model must compute a prefix once",
        ),
    ],
    ids=str,
)
def test_numbers_of_another_kind_are_named(lm: Any, numbers: torch.Tensor, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        lm.score([Request((SOFT, 60), 1, ((70,),), 0)], [numbers])


def test_a_state_of_other_layers_is_refused() -> None:
    trained = frozen("mamba2").trained
    parts = trained.shapes(0)
    trained.require("films", parts, 0)
    turned = {name: shape[::-1] for name, shape in parts.items()}
    with pytest.raises(
        BaseModelError, match=r"\[4, 16, 8\] as layers.0.state .* found \[8, 16, 4\] .*'films'; use the"
    ):
        trained.require("films", turned, 0)
    with pytest.raises(BaseModelError, match="found nothing in the trained state"):
        trained.require("films", {}, 0)
    with pytest.raises(BaseModelError, match=r"Expected nothing as layers.0.state"):
        tiny("llama").trained.require("films", parts, 0)
