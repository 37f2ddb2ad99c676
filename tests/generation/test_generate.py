"""Texts of mixed batches against transformers' own generation, sampling, and where texts end."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from softprompt.errors import ConfigError
from softprompt.generation.decoder import Decoder, generate
from softprompt.model.frozen import FrozenLM
from softprompt.model.request import Request, Sampling
from tests.conftest import ALL, plain_logprobs, tiny
from tests.model.test_frozen import mixed, own_generation

few = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("kind", ALL)
@few
@given(data=st.data())
def test_a_mixed_batch_generates_what_transformers_generates_one_at_a_time(kind: str, data: st.DataObject) -> None:
    lm = tiny(kind)
    requests, prompts = mixed(lm)
    order = data.draw(st.permutations(range(len(requests))))
    batch_size = data.draw(st.sampled_from([1, 4, 32]))
    found = generate(lm, [requests[i] for i in order], prompts, Sampling(max_new_tokens=9), batch_size=batch_size)
    for result, i in zip(found, order, strict=True):
        assert list(result.ids) == own_generation(kind, requests[i], prompts, 9)
        assert result.text == lm.tokenizer.decode(result.ids, skip_special_tokens=True)
        assert result.finish == ("length" if len(result.ids) == 9 else "stop")


@pytest.mark.parametrize(("kv_tokens", "most"), [(1, 1), (100, 3), (10_000, 5)])
def test_long_rows_run_few_at_a_time(
    llama: FrozenLM, kv_tokens: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [Request(tuple(range(10, 34)), 20) for _ in range(5)]  # each may become 24 + 8 tokens long
    expected = generate(llama, requests, (), Sampling(max_new_tokens=8))
    monkeypatch.setattr("softprompt.generation.decoder.KV_TOKENS", kv_tokens)
    seen, step = [], Decoder.step

    def counted(decoder: Decoder) -> Any:
        seen.append(len(decoder))
        return step(decoder)

    monkeypatch.setattr(Decoder, "step", counted)
    assert generate(llama, requests, (), Sampling(max_new_tokens=8)) == expected
    assert max(seen) == most


def test_rows_end_by_themselves(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a common token for the end of sequence, rows leave the batch at different steps."""
    lm = tiny(kind)
    requests, prompts = mixed(lm)
    free = generate(lm, requests, prompts, Sampling(max_new_tokens=12))
    end = free[3].ids[5]
    monkeypatch.setattr(lm.model.generation_config, "eos_token_id", [end, 1])
    found = generate(lm, requests, prompts, Sampling(max_new_tokens=12), batch_size=5)
    for whole, cut in zip(free, found, strict=True):
        if end in whole.ids:
            assert cut.ids == whole.ids[: whole.ids.index(end)]
            assert cut.finish == "stop"
        else:
            assert cut == whole
    assert len(found[3].ids) <= 5


def test_stop_strings_cut_the_text(llama: FrozenLM) -> None:
    requests, prompts = mixed(llama)
    whole = generate(llama, requests[:1], prompts, Sampling(max_new_tokens=10))[0]
    text = whole.text
    assert len(text) > 6
    stop = text[4:6]  # in the middle of the text, and of tokens
    late, never = text[-1], "\x00"
    starts = [llama.tokenizer.decode(whole.ids[:count]) for count in range(11)]
    count = next(c for c in range(2, 11) if starts[c][-1] not in starts[c][:-1])
    twice = Sampling(max_new_tokens=10, stop=(starts[count][-1], starts[count][-2:]))  # both end with the same token
    both = generate(llama, requests[:1], prompts, twice)[0]
    assert (both.text, both.ids) == (starts[count][:-2], whole.ids[:count])
    cut = generate(llama, requests[:1], prompts, Sampling(max_new_tokens=10, stop=(late, stop, never, "")))[0]
    assert cut.text == text[: min(text.find(stop), text.find(late))]
    assert cut.finish == "stop"
    assert cut.ids == whole.ids[: len(cut.ids)]
    same = generate(llama, requests[:1], prompts, Sampling(max_new_tokens=10, stop=(never,)))[0]
    assert same == whole
    assert whole.finish == "length"
    assert len(whole.ids) == 10


def test_sampling_depends_on_the_seed_and_not_on_the_neighbours(kind: str) -> None:
    lm = tiny(kind)
    requests, prompts = mixed(lm)
    sampling = Sampling(max_new_tokens=6, temperature=1.3, top_p=0.9, seed=11)
    together = generate(lm, requests, prompts, sampling)
    assert together == generate(lm, requests, prompts, sampling, batch_size=3)
    alone = [generate(lm, [r], prompts, replace(sampling, seed=11 + i))[0] for i, r in enumerate(requests)]
    assert together == alone  # request i draws with seed + i
    assert together != generate(lm, requests, prompts, replace(sampling, seed=12))
    greedy = generate(lm, requests, prompts, Sampling(max_new_tokens=6))
    assert generate(lm, requests, prompts, replace(sampling, top_p=1e-6)) == greedy


def test_sampling_follows_the_probabilities_of_the_nucleus(llama: FrozenLM) -> None:
    """Draws of one token against the renormalised distribution: the largest deviation of a share stays below
    5 standard errors; with exact sampling that fails for some token with a probability below 320 * 6e-7 = 2e-4, and the
    seed is fixed."""
    request, count = Request((3, 4, 5, 60), 3), 3000
    logits = plain_logprobs("llama", request.ids)[-1]
    probabilities, order = (logits / 0.7).softmax(dim=-1).sort(descending=True)
    kept = probabilities.cumsum(0) - probabilities < 0.6
    expected = torch.zeros(320)
    expected[order[kept]] = probabilities[kept] / probabilities[kept].sum()
    assert 3 <= int(kept.sum()) < 320
    sampling = Sampling(max_new_tokens=1, temperature=0.7, top_p=0.6, seed=5)
    drawn = [r.ids[0] if r.ids else 1 for r in generate(llama, [request] * count, (), sampling, batch_size=500)]
    shares = torch.bincount(torch.tensor(drawn), minlength=320) / count
    errors = (expected * (1 - expected) / count).sqrt()
    assert bool(((shares - expected).abs() <= 5 * errors).all())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"temperature": -0.5}, "temperature must be 0 or more, not -0.5"),
        ({"temperature": math.nan}, "temperature must be 0 or more, not nan"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, not 0.0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, not 1.5"),
    ],
)
def test_sampling_checks_its_values(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        Sampling(**options)
    assert str(error.value) == sentence
