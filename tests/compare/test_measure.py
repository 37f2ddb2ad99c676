"""What a cell measures besides its score."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch

from softprompt.compare import measure
from softprompt.compare.measure import peak_memory, plain_perplexity
from tests.conftest import plain_logprobs, tiny


def test_perplexity_of_plain_text_against_transformers() -> None:
    lm = tiny("llama")
    tokens = lm.tokenizer(measure.plain_text(), add_special_tokens=False, verbose=False).input_ids
    length, passages = 16, 3
    gap = (len(tokens) - length) // passages
    nll = []
    for start in (0, gap, 2 * gap):
        ids = tokens[start : start + length]
        logprobs = plain_logprobs("llama", ids)
        nll += [-float(logprobs[i, ids[i + 1]]) for i in range(length - 1)]
    assert plain_perplexity(lm, passages, length) == pytest.approx(math.exp(np.mean(nll)), rel=1e-4)


def test_peak_memory_sees_what_was_held() -> None:
    held = 256 << 20
    with peak_memory(tiny("llama")) as peak:
        filled = torch.ones(held // 4)
        until = torch.ones(1)
        for _ in range(20):  # some time passes
            until = until + filled[:1_000_000].sum()
        del filled
    assert held * 0.75 < peak[0] < held * 2  # what others gave back meanwhile counts against it


def test_peak_memory_sees_what_was_freed_before_and_is_used_again() -> None:
    """The C library keeps freed memory that lies below some still in use."""

    def many() -> list[torch.Tensor]:
        return [torch.ones(1 << 16) for _ in range(1024)]  # 256 MB in pieces of 256 kB

    torch.ones(1 << 20)  # freed, it makes the C library put tensors up to its size together
    before = many()
    above = torch.ones(1 << 16)
    del before
    with peak_memory(tiny("llama")) as peak:
        again = many()
        time.sleep(0.2)
    assert peak[0] > 200 << 20
    assert len(again) * above.numel() * 4 == 256 << 20
