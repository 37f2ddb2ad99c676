"""Passes over the last tokens of rows as captured graphs, by a stand-in for a GPU's."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch

from softprompt.errors import SoftPromptWarning
from softprompt.generation.decoder import Continuation, Decoder, generate
from softprompt.model.fast import graphs as fast_graphs
from softprompt.model.fast.fixed_rows import FixedKV, FixedRows, LastTokens, Memory, rounded_rows
from softprompt.model.fast.graphs import Captured
from softprompt.model.frozen import FrozenLM
from softprompt.model.request import Request, Sampling
from softprompt.model.state.recurrent import Slots
from softprompt.model.state.slots import RowKV
from tests.conftest import tiny
from tests.generation.test_decoding import prefix, row
from tests.graphs import OnCPU
from tests.model.families import CASES, frozen
from tests.model.test_frozen import mixed


@contextmanager
def captured(lm: FrozenLM, *, record: bool = False) -> Iterator[OnCPU]:
    """Inside, the model continues texts as on a GPU."""
    before, lm.fixed_rows = lm.fixed_rows, FixedRows(wanted=True)
    graphs = lm.fixed_rows.graphs = OnCPU(record=record)
    try:
        yield graphs
    finally:
        lm.fixed_rows = before


Event = tuple[str, int]


def run(lm: FrozenLM, events: Sequence[Event]) -> tuple[dict[int, list[int]], list[torch.Tensor]]:
    """What rows that join and leave write, and the logits of each pass over their last tokens."""
    seen: list[torch.Tensor] = []
    whole = FrozenLM.last_logits

    def watched(self: FrozenLM, kv: Slots, tokens: Sequence[int]) -> torch.Tensor:
        seen.append(whole(self, kv, tokens))
        return seen[-1]

    rows: dict[int, Continuation] = {}
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(FrozenLM, "last_logits", watched)
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
    return {index: one.writer.ids for index, one in rows.items()}, seen


FEW: list[Event] = [("join", 0), ("join", 1), ("step", 2), ("drop", 0)]
MANY: list[Event] = [
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


@pytest.mark.parametrize(
    ("kind", "events", "record"),
    [
        ("llama", FEW, True),
        ("gemma3_text-sliding", FEW, True),
        ("gemma4_text-by_layer", FEW, False),
        ("gpt2", MANY, False),
        ("mistral-sliding", MANY, False),
        ("llama", MANY, False),
    ],
)
def test_captured_passes_have_the_logits_of_plain_ones(kind: str, events: list[Event], record: bool) -> None:
    lm = frozen(kind) if kind in CASES else tiny(kind)
    expected, plain = run(lm, events)
    with captured(lm, record=record) as graphs:
        found, fixed = run(lm, events)
    assert graphs.failed == ""
    assert found == expected
    assert len(fixed) == len(plain) == graphs.replays
    for one, other in zip(fixed, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert graphs.captured <= len({len(one) for one in plain})


def test_later_calls_use_the_graphs_of_earlier_ones() -> None:
    lm = tiny("llama")
    requests, prompts = mixed(lm)
    expected = generate(lm, requests, prompts, Sampling(max_new_tokens=6))
    with captured(lm) as graphs:
        assert generate(lm, requests, prompts, Sampling(max_new_tokens=6)) == expected
        once = graphs.captured
        assert once >= 1
        assert generate(lm, requests, prompts, Sampling(max_new_tokens=6)) == expected
        assert graphs.captured == once


def test_only_one_decoder_has_the_fixed_slots() -> None:
    lm = tiny("llama")
    with captured(lm):
        first = lm.slots(fixed=True)
        assert isinstance(first, FixedKV)
        assert not isinstance(lm.slots(fixed=True), FixedKV)
        assert not isinstance(lm.slots(), FixedKV)
        del first
        assert isinstance(lm.slots(fixed=True), FixedKV)
        decoder = Decoder(lm)
        assert not isinstance(lm.slots(fixed=True), FixedKV)
        decoder.close()
        assert isinstance(lm.slots(fixed=True), FixedKV)


def test_memory_that_becomes_too_small_is_left_with_its_graphs() -> None:
    """Longer rows lie elsewhere, so that what was captured for shorter ones would read what is no longer there."""
    lm = tiny("llama")
    short, long = Request((3, 4, 5), 0), Request(tuple(range(3, 300)), 0)
    sampling = Sampling(max_new_tokens=4)
    expected = [generate(lm, [request], (), sampling)[0] for request in (short, long)]
    with captured(lm) as graphs:
        assert [generate(lm, [r], (), sampling)[0] for r in (short, long, short)] == [*expected, expected[0]]
        assert graphs.captured == 3
        assert generate(lm, [long], (), sampling) == [expected[1]]
        assert graphs.captured == 3
        lm.fixed_rows.free()
        assert generate(lm, [long], (), sampling) == [expected[1]]
        assert graphs.captured == 4


def test_fixed_slots_keep_what_rows_hold() -> None:
    """Arithmetic apart: row ``i``'s token in column ``t`` is the number ``1000 * i + t``."""
    kv, memory = FixedKV(memory := Memory()), memory
    expected: list[list[float]] = []

    def join(*starts: tuple[int, int]) -> None:
        others = RowKV()
        others.add([prefix(length, 1000 * number) for number, length in starts], 1)
        assert kv.join(others) is kv
        expected.extend([1000.0 * number + t for t in range(length)] for number, length in starts)

    def check() -> None:
        assert kv.lengths == [len(one) for one in expected]
        for place, numbers in enumerate(expected):
            for tensor, sign in ((kv.row(place).keys[1], 1), (kv.row(place).values[0], -1)):
                assert (sign * tensor[0, 2, :, 3]).tolist() == numbers
        assert all(bool(tensor.isfinite().all()) for pair in kv.layers() for tensor in pair)

    def pass_over() -> None:
        columns = torch.tensor([*kv.advance(), *[0] * (kv.rows - len(expected))])[:, None]
        new = torch.tensor([one[0] + len(one) for one in expected] + [0.0] * (kv.rows - len(expected)))
        tokens = new[:, None, None, None].expand(-1, 3, 1, 4)
        layers = kv.layers()
        for layer in range(2):
            keys, _ = LastTokens(layers, columns).update(tokens, -tokens, layer)
            assert keys.shape == (kv.rows, 3, kv.width, 4)
        for one in expected:
            one.append(one[0] + len(one))

    join((1, 5), (2, 30), (3, 127))
    address = kv.layers()[0][0].data_ptr()
    check()
    assert (kv.rows, kv.width) == (4, 128)
    pass_over()
    check()
    assert kv.width == 128
    pass_over()
    check()
    assert (kv.rows, kv.width) == (4, 256)
    kv.remove(2)
    del expected[2]
    check()
    pass_over()
    assert (kv.rows, kv.width) == (2, 128)  # narrower again, over what lay there
    check()
    join(*((number, 3 * number) for number in range(4, 12)))
    check()
    assert (kv.rows, kv.width) == (16, 128)
    pass_over()
    check()
    before = kv.layers()[0][0].data_ptr(), memory.moved
    assert before[0] != address
    join((12, 2))
    assert (kv.layers()[0][0].data_ptr(), memory.moved) == before


@pytest.mark.parametrize(("rows", "expected"), [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8), (9, 16), (17, 24), (32, 32)])
def test_graphs_are_for_few_numbers_of_rows(rows: int, expected: int) -> None:
    assert rounded_rows(rows) == expected


# --- where nothing is captured -------------------------------------------------------------------------------


def test_rows_of_too_many_shapes_run_without_graphs_and_it_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny("llama")
    with captured(lm) as graphs, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        expected, _ = run(lm, MANY)  # afterwards, the memory is large enough
        graphs.forget()
        before = graphs.captured
        assert before > 2
        monkeypatch.setattr(fast_graphs, "MOST_GRAPHS", 2)
        found, _ = run(lm, MANY)
    assert found == expected
    assert graphs.captured == before + 2
    assert ["could not be captured" in str(one.message) for one in told if one.category is SoftPromptWarning] == [True]


def test_passes_that_cannot_be_captured_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny("llama")
    expected, _ = run(lm, MANY)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def refuse(*_: object) -> Captured:
        raise RuntimeError("operation not permitted when stream is capturing")

    with captured(lm) as graphs:
        monkeypatch.setattr(graphs, "capture", refuse)
        with pytest.warns(SoftPromptWarning, match="operation not permitted"):
            found, _ = run(lm, MANY)
    assert found == expected
    assert graphs.captured == 0


@pytest.mark.parametrize(("kind", "reason"), [("qwen3_5_text", "states"), ("stablelm", "whole sequences")])
def test_models_without_slots_say_once_that_nothing_is_captured(kind: str, reason: str) -> None:
    lm = tiny(kind)
    expected = generate(lm, [Request((3, 4, 5), 0)], (), Sampling(max_new_tokens=3))
    with captured(lm) as graphs, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            assert generate(lm, [Request((3, 4, 5), 0)], (), Sampling(max_new_tokens=3)) == expected
    assert [reason in str(one.message) for one in told if one.category is SoftPromptWarning] == [True]
    assert graphs.captured == 0
