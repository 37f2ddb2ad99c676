"""What a cell of a comparison measures besides its score."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator

import psutil
import torch

from softprompt.model.frozen import FrozenLM
from softprompt.model.quantized import bytes_of
from softprompt.model.request import Request
from softprompt.model.state.slots import give_back_freed

PLAIN_PASSAGES, PLAIN_TOKENS = 24, 256
"""How much plain text forgetting is measured on."""


@contextlib.contextmanager
def peak_memory(lm: FrozenLM) -> Iterator[list[int]]:
    """A list whose only number, after the block, is the most bytes held above those at its start.

    Of the process, looked at every 20 ms; on a CUDA device, of the device's own count.
    """
    gc.collect()
    give_back_freed()  # malloc keeps freed memory; return it first, or this method seems to need none
    found = [0]
    if lm.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(lm.device)
        before = torch.cuda.memory_allocated(lm.device)
        yield found
        found[0] = torch.cuda.max_memory_allocated(lm.device) - before
        return
    process, done = psutil.Process(), threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        while not done.wait(0.02):
            found[0] = max(found[0], process.memory_info().rss - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


def lm_bytes(lm: FrozenLM) -> int:
    """Bytes of the weights in memory, shared ones counted once."""
    return bytes_of(lm.model)


def plain_text() -> str:
    """English prose that is on every machine with Python: the language's own reference manual."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def plain_perplexity(lm: FrozenLM, passages: int = PLAIN_PASSAGES, length: int = PLAIN_TOKENS) -> float:
    """Perplexity of plain text, ``passages`` of ``length`` tokens each: what it is before and after tells how much of
    its language a model has forgotten."""
    length = min(length, lm.window)
    ids = lm.tokenizer(plain_text(), add_special_tokens=False, verbose=False).input_ids
    tokens = [token for token in ids if token < len(lm.embedding)]  # a tokenizer may have more than its model
    starts = range(0, len(tokens) - length, max(1, (len(tokens) - length) // passages))[:passages]
    requests = [Request((tokens[i],), 0, (tuple(tokens[i + 1 : i + length]),)) for i in starts]
    nll = -lm.score(requests)[:, 0]
    return float((nll.sum() / (len(requests) * (length - 1))).exp())
