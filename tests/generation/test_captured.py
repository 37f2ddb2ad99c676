"""Passes over the last tokens of rows as captured graphs. In place of a GPU's, what PyTorch's own tracer records is run
again, on the same tensors: it, too, refuses what waits for a number, and knows nothing of Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from softprompt.errors import SoftPromptWarning
from softprompt.generation.decoder import Continuation, Decoder, generate
from softprompt.model.fast import graphs as fast_graphs
from softprompt.model.fast.fixed_rows import FixedKV, FixedRows, Memory, rounded_rows
from softprompt.model.fast.graphs import Captured, Graphs, Tensors
from softprompt.model.frozen import FrozenLM
from softprompt.model.request import Sampling
from softprompt.model.state.kv import PrefixKV
from softprompt.model.state.slots import RowKV
from tests.conftest import SHARED, tiny
from tests.generation.test_decoding import row
from tests.model.test_frozen import mixed


class Recorded(Graphs):
    """Graphs of a GPU that is not there.

    Attributes:
        replays: how often one was run.
        shapes: of what was captured.
    """

    def __init__(self) -> None:
        super().__init__("a pass", "it goes on")
        self.replays = 0

    @staticmethod
    def on_gpu(tensor: torch.Tensor) -> bool:
        return True

    def capture(self, run: Callable[..., Tensors], inputs: Tensors) -> Captured:
        own = tuple(tensor.clone() for tensor in inputs)
        for _ in range(fast_graphs.WARM_UPS):
            outputs = tuple(output.clone() for output in run(*own))
        recorded = make_fx(run)(*own)

        def replay() -> None:
            self.replays += 1
            for output, new in zip(outputs, recorded(*own), strict=True):
                output.copy_(new)

        return Captured(SimpleNamespace(replay=replay), own, outputs)


@contextmanager
def captured(lm: FrozenLM) -> Iterator[Recorded]:
    """Inside, the model continues texts as on a GPU."""
    before, lm.fixed_rows = lm.fixed_rows, FixedRows(wanted=True)
    graphs = lm.fixed_rows.graphs = Recorded()
    try:
        yield graphs
    finally:
        lm.fixed_rows = before


def logits_of(lm: FrozenLM, events: Sequence[tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> dict[int, list[str]]:
    """The texts of rows that join and leave, by row, and the logits of each of their passes."""
    seen: list[torch.Tensor] = []
    whole = FrozenLM.last_logits

    def watched(self: FrozenLM, kv: RowKV, tokens: Sequence[int]) -> torch.Tensor:
        seen.append(whole(self, kv, tokens))
        return seen[-1]

    monkeypatch.setattr(FrozenLM, "last_logits", watched)
    rows: dict[int, Continuation] = {}
    with torch.no_grad():
        decoder = Decoder(lm)
        for what, index in events:
            if what == "join":
                rows[index] = row(lm, index, 7 if index % 2 else None)
                decoder.join([rows[index]])
            elif what == "drop":
                decoder.drop([rows[index]])
            else:
                for _ in range(index):
                    decoder.step()
        while len(decoder):
            decoder.step()
    monkeypatch.undo()
    return {index: one.writer.ids for index, one in rows.items()}, seen


EVENTS = [
    ("join", 0),
    ("step", 2),
    ("join", 3),
    ("join", 4),
    ("join", 8),
    ("step", 4),
    ("drop", 3),
    *(("join", index) for index in (1, 2, 5, 6, 7, 9)),
    ("step", 3),
    ("drop", 1),
    ("join", 10),
]


@pytest.mark.parametrize("kind", SHARED)
def test_captured_passes_have_the_logits_of_plain_ones(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny(kind)
    if lm.recurrent:
        pytest.skip("its rows have states")
    expected, plain = logits_of(lm, EVENTS, monkeypatch)
    with captured(lm) as graphs:
        found, fixed = logits_of(lm, EVENTS, monkeypatch)
    assert graphs.failed == ""
    assert found == expected
    assert len(fixed) == len(plain) == graphs.replays
    for one, other in zip(fixed, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert graphs.captured < graphs.replays / 2
