"""Rows that join and leave between passes, and the text that they write, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from softprompt.generation import decoder as decoding
from softprompt.generation.decoder import Continuation, Decoder, Generated, continuation, generate
from softprompt.generation.writer import Writer, take
from softprompt.model.frozen import FrozenLM
from softprompt.model.request import Request, Sampling
from softprompt.model.state.kv import PrefixKV
from softprompt.model.state.slots import RowKV
from tests.conftest import ALL, SENTENCES, make_tokenizer, tiny
from tests.model.test_frozen import mixed

few = settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow])
TOKENS = 9


# --- rows that come and go -----------------------------------------------------------------------------------


@cache
def alone(kind: str, seed: int | None = None) -> list[Generated]:
    """What each of ``mixed``'s requests gives by itself."""
    requests, prompts = mixed(tiny(kind))
    sampling = [sampling_of(i, seed) for i in range(len(requests))]
    return [generate(tiny(kind), [r], prompts, s)[0] for r, s in zip(requests, sampling, strict=True)]


def sampling_of(index: int, seed: int | None) -> Sampling:
    """Greedy, or seeded draws; some rows end early."""
    tokens = TOKENS - index % 4
    if seed is None:
        return Sampling(max_new_tokens=tokens)
    return Sampling(max_new_tokens=tokens, temperature=1.2, top_p=0.9, seed=seed + index)


def row(lm: FrozenLM, index: int, seed: int | None) -> Continuation:
    requests, prompts = mixed(lm)
    request = requests[index]
    vectors = None if request.prompt is None else prompts[request.prompt]
    sampling = sampling_of(index, seed)
    return continuation(
        lm, request, vectors, Writer(lm.tokenizer, lm.end_tokens, sampling, sampling.seed), lm.prefix_kv
    )


@pytest.mark.parametrize(("kind", "seed"), [*((kind, None) for kind in ALL), ("llama", 7), ("stablelm", 7)])
@few
@given(data=st.data())
def test_rows_that_join_and_leave_at_any_time_write_what_they_write_alone(
    kind: str, seed: int | None, data: st.DataObject
) -> None:
    """Every row joins at a step of its own; some are dropped at another; inputs are read in chunks of 2 to 512."""
    lm = tiny(kind)
    expected = alone(kind, seed)
    indices = data.draw(st.permutations(range(len(expected))))
    arrivals = data.draw(st.lists(st.integers(0, 12), min_size=len(indices), max_size=len(indices)))
    departures = data.draw(st.lists(st.integers(1, 40), min_size=len(indices), max_size=len(indices)))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(decoding, "CHUNK", data.draw(st.sampled_from([2, 9, 512])))
        patch.setattr(decoding, "JOIN_TOKENS", data.draw(st.sampled_from([1, 60, 2048])))
        decoder = Decoder(lm)
        rows = {index: row(lm, index, seed) for index in indices}
        step = 0
        while step <= 12 or len(decoder):
            decoder.join([rows[i] for i, at in zip(indices, arrivals, strict=True) if at == step])
            decoder.drop([rows[i] for i, at in zip(indices, departures, strict=True) if at == step])
            decoder.step()
            step += 1
    for index, departure in zip(indices, departures, strict=True):
        writer = rows[index].writer
        if writer.done:
            found = Generated(writer.text, tuple(writer.ids), writer.finish)
            assert found == expected[index]
        else:
            assert departure <= step
            assert tuple(writer.ids) == expected[index].ids[: len(writer.ids)]


def test_a_step_returns_the_rows_that_picked_a_token(llama: FrozenLM) -> None:
    with torch.no_grad():
        decoder = Decoder(llama)
        first, second = row(llama, 0, None), row(llama, 1, None)
        decoder.join([first])
        assert len(decoder) == 1
        assert decoder.step() == [first]
        decoder.join([second])
        assert len(decoder) == 2
        assert decoder.step() == [first]  # input is read every second time
        assert decoder.step() == [first, second]
        decoder.drop([first])
        assert decoder.step() == [second]
        assert len(decoder) == 1
        while len(decoder):
            decoder.step()
        assert decoder.step() == []
    assert [len(first.writer.ids), len(second.writer.ids)] == [3, len(alone("llama")[1].ids)]


def prefix(length: int, start: float, layers: int = 2) -> PrefixKV:
    numbers = torch.arange(length, dtype=torch.float32).view(1, 1, length, 1).expand(1, 3, length, 4) + start
    return PrefixKV((numbers,) * layers, (-numbers,) * layers, (length,))


def test_rows_keep_their_columns_while_others_come_and_go() -> None:
    """Arithmetic apart: row ``i``'s token in column ``t`` is the number ``1000 * i + t``."""
    kv = RowKV()
    starts = {0: 5, 1: 0, 2: 30}
    kv.add([prefix(length, 1000 * i) for i, length in starts.items()], 1)
    expected = {i: [1000 * i + t for t in range(length)] for i, length in starts.items()}
    slots = [0, 1, 2]

    def run(counts: Sequence[int]) -> None:
        tokens = max(counts)
        columns = kv.extend(counts, tokens)
        new = torch.tensor(
            [
                [1000.0 * slot + column for column in of_one]
                for slot, of_one in zip(slots, columns.tolist(), strict=True)
            ]
        )
        keys = new[:, None, :, None].expand(len(slots), 3, tokens, 4)
        for layer in range(2):
            found, negated = kv.update(keys, -keys, layer)
            assert found.shape == (len(slots), 3, kv.width, 4)
            assert found.is_contiguous()
            assert torch.equal(found, -negated)
            assert bool(found.isfinite().all())
        for slot, count in zip(slots, counts, strict=True):
            expected[slot] += [1000 * slot + t for t in range(len(expected[slot]), len(expected[slot]) + count)]
        for place, slot in enumerate(slots):
            assert kv.lengths[place] == len(expected[slot])
            assert kv.row(place).keys[1][0, 2, :, 3].tolist() == expected[slot]
            assert kv.row(place).lengths == (len(expected[slot]),)

    run([1, 1, 1])
    assert kv.width == 32
    run([2, 4, 1])  # laid out anew, wider
    assert kv.width == 64
    kv.remove(0)  # the last takes its slot
    slots[0] = slots.pop()
    run([1, 1])
    kv.add([prefix(300, 3000)], 1)  # a longer one
    expected[3] = list(range(3000, 3300))
    slots.append(3)
    assert kv.width == 320
    run([1, 2, 3])
    kv.remove(2)
    slots.pop()
    run([1, 1])  # narrower again
    assert kv.width == 64
    many = [prefix(2, 1000 * i) for i in range(4, 14)]
    kv.add(many, 1)
    expected |= {i: [1000 * i, 1000 * i + 1] for i in range(4, 14)}
    slots += range(4, 14)
    run([1] * 12)


def test_a_row_leaves_nothing_behind_that_harms_the_next_in_its_slot() -> None:
    """A weight of 0 times a NaN would be a NaN."""
    for leaves_first in (True, False):
        kv = RowKV()
        bad = prefix(20, 0)
        kv.add([PrefixKV(tuple(t * torch.nan for t in bad.keys), bad.values, bad.lengths), prefix(3, 0)], 1)
        if leaves_first:
            kv.remove(0)
            kv.add([prefix(2, 0)], 1)
        else:
            kv.add([prefix(2, 0)], 1)
            kv.remove(0)
        kv.extend([1] * 2, 1)
        found, _ = kv.update(torch.ones(2, 3, 1, 4), torch.ones(2, 3, 1, 4), 0)
        assert bool(found.isfinite().all())


# --- what a row writes ---------------------------------------------------------------------------------------


@cache
def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """As SentencePiece has it: a space before each word is a part of it, and a text's first space is not written;
    what is not in the vocabulary is spelled in bytes."""
    letters = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "</s>", *letters], show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    fast: Any = PreTrainedTokenizerFast
    made: PreTrainedTokenizerFast = fast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    return made


TOKENIZERS: dict[str, Any] = {"bytes": make_tokenizer, "metaspace": metaspace_tokenizer}
TEXT = st.text(st.sampled_from("abe tig.,n é😀漢ß\n"), max_size=14)


def written(tokenizer: Any, ids: Sequence[int], sampling: Sampling, **options: Any) -> tuple[Writer, list[str]]:
    """A writer that was made to pick ``ids``, and the pieces that it released after each."""
    writer = Writer(tokenizer, {1}, sampling, 0, **options)
    pieces = []
    for token in ids:
        logits = torch.full((len(tokenizer) + 8,), -9.0)
        logits[token] = 9.0
        take([writer], logits[None])
        pieces.append(writer.release()[0])
        if writer.done:
            break
    return writer, pieces


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_pieces_join_to_the_text_of_all_tokens_whatever_the_bytes(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]()
    ids = data.draw(st.lists(st.integers(2, 299), min_size=1, max_size=20))
    writer, pieces = written(tokenizer, ids, Sampling(max_new_tokens=len(ids)))
    assert writer.finish == "length"
    assert writer.text == tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(pieces) == writer.text


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=100)
@given(text=TEXT)
def test_a_character_of_several_tokens_is_never_shown_in_part(name: str, text: str) -> None:
    tokenizer: Any = TOKENIZERS[name]()
    ids = tokenizer(text + ".", add_special_tokens=False).input_ids
    _, pieces = written(tokenizer, ids, Sampling(max_new_tokens=len(ids)))
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


def expected_so_far(tokenizer: Any, ids: Sequence[int]) -> str:
    """The whole characters of a text in the making."""
    return str(tokenizer.decode(ids, skip_special_tokens=True)).rstrip("\N{REPLACEMENT CHARACTER}")


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=200)
@given(text=TEXT, stops=st.lists(st.text(st.sampled_from("abe é😀n"), min_size=1, max_size=4), max_size=3))
def test_a_stop_string_ends_the_text_and_never_shows(name: str, text: str, stops: list[str]) -> None:
    """Oracle: after each token, all tokens decoded together and searched."""
    tokenizer: Any = TOKENIZERS[name]()
    ids = tokenizer(text + ".", add_special_tokens=False).input_ids
    expected, finish, count = "", "length", len(ids)
    for number in range(1, len(ids) + 1):
        expected = tokenizer.decode(ids[:number], skip_special_tokens=True)
        cuts = [expected.find(stop) for stop in stops if stop in expected]
        if cuts:
            expected, finish, count = expected[: min(cuts)], "stop", number
            break
    writer, pieces = written(tokenizer, ids, Sampling(max_new_tokens=len(ids), stop=tuple(stops)))
    assert (writer.text, writer.finish, len(writer.ids)) == (expected, finish, count)
    assert "".join(pieces) == expected
    for number in range(1, count):  # all is shown but what may yet turn out to be a stop string's beginning
        so_far = expected_so_far(tokenizer, ids[:number])
        held = max((n for stop in stops for n in range(len(stop)) if so_far.endswith(stop[:n])), default=0)
        assert "".join(pieces[:number]) == so_far[: len(so_far) - held]


def test_the_end_of_sequence_is_counted_and_not_written() -> None:
    tokenizer = make_tokenizer()
    ids = [*tokenizer("good", add_special_tokens=False).input_ids, 1]
    writer, pieces = written(tokenizer, [*ids, 40], Sampling(max_new_tokens=9))
    assert (writer.text, writer.finish, writer.count) == ("good", "stop", len(ids))
    assert writer.ids == ids[:-1]
    assert "".join(pieces) == "good"


@pytest.mark.parametrize(("text", "expected"), [(" good", "good"), ("  good", " good"), ("good", "good"), (" ", "")])
def test_the_templates_own_space_is_left_out_once(text: str, expected: str) -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    writer, pieces = written(tokenizer, ids, Sampling(max_new_tokens=len(ids)), lead=" ")
    assert writer.text == "".join(pieces) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("\n\n a film\nbad", "a film"), ("a film\nbad", "a film"), ("\n \n", ""), ("a\n\nb", "a")],
)
def test_blanks_at_the_beginning_hide_no_answer(text: str, expected: str) -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    sampling = Sampling(max_new_tokens=len(ids), stop=("\n",), skip_blank=True)
    writer, pieces = written(tokenizer, ids, sampling)
    assert writer.text == "".join(pieces) == expected


def test_tokens_are_told_with_the_text_that_they_belong_to() -> None:
    """Two tokens that wait for a stop string to show itself are told with the text they turn out to be."""
    tokenizer = make_tokenizer()
    ids = [tokenizer(letter, add_special_tokens=False).input_ids[0] for letter in "abzc"]
    writer = Writer(tokenizer, {1}, Sampling(max_new_tokens=4, stop=("abx",)), 0, top_logprobs=2)
    released = []
    logits = torch.zeros(320)
    for token in ids:
        logits = torch.zeros(320)
        logits[token], logits[65] = 3.0, 1.0
        take([writer], logits[None])
        released.append(writer.release())
    assert [text for text, _ in released] == ["", "", "abz", "c"]
    assert [[token.text for token in tokens] for _, tokens in released] == [[], [], ["a", "b", "z"], ["c"]]
    expected = logits.log_softmax(dim=-1)
    last = released[-1][1][0]
    likeliest = [(ids[-1], "c"), (65, tokenizer.decode([65]))]
    assert [text for text, _ in last.top] == [text for _, text in likeliest]
    assert [logprob for _, logprob in last.top] == pytest.approx([float(expected[token]) for token, _ in likeliest])
    assert last.logprob == last.top[0][1]


def test_draws_do_not_change_with_the_way_the_nucleus_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny("llama")
    request, sampling = Request((3, 4, 5, 60), 3), Sampling(max_new_tokens=12, temperature=2.0, top_p=0.9, seed=3)
    found = []
    for nucleus in (3, 1024):  # three tokens hold less than 0.9, so everything is sorted
        monkeypatch.setattr("softprompt.generation.writer.NUCLEUS", nucleus)
        found.append(generate(lm, [request] * 20, (), sampling))
    assert found[0] == found[1]
    assert len({result.ids for result in found[0]}) == 20
    assert found[0] != generate(lm, [request] * 20, (), replace(sampling, top_p=1.0))


def test_scores_that_are_not_numbers_end_a_row() -> None:
    writers = [Writer(make_tokenizer(), {1}, Sampling(temperature=t), 0, top_logprobs=1) for t in (0.0, 1.0, 0.0, 0.0)]
    logits = torch.full((4, 320), torch.nan)
    logits[2] = 0.0
    logits[3, 60:] = 0.0  # one number that is none is enough
    take(writers, logits)
    for writer in (writers[0], writers[1], writers[3]):
        assert (writer.finish, writer.ids, writer.release()) == ("error", [], ("", ()))
    assert (writers[2].finish, len(writers[2].ids)) == ("", 1)


def test_rows_picked_together_are_picked_as_each_alone() -> None:
    """Greedy and drawn, with and without nucleus, with as many alternatives as each wants; one ends with its token."""
    logits = 3 * torch.randn(6, 320, generator=torch.Generator().manual_seed(0))
    logits[5, 1] = 50
    ways = [
        (Sampling(), None),
        (Sampling(temperature=1.5), 3),
        (Sampling(temperature=0.7, top_p=0.5), 0),
        (Sampling(), 5),
        (Sampling(temperature=1.5, top_p=0.99), None),
        (Sampling(), 2),
    ]

    def write() -> list[Writer]:
        return [
            Writer(make_tokenizer(), {1}, sampling, seed, top_logprobs=top) for seed, (sampling, top) in enumerate(ways)
        ]

    together, alone = write(), write()
    tokens = take(together, logits)
    assert tokens == [take([writer], row[None])[0] for writer, row in zip(alone, logits, strict=True)]
    assert [tokens[i] for i in (0, 3, 5)] == logits.argmax(dim=1)[[0, 3, 5]].tolist()
    assert together[5].finish == "stop"
    told = 0
    for one, other, row, token, (_, top) in zip(together, alone, logits, tokens, ways, strict=True):
        assert (one.text, one.ids, one.finish) == (other.text, other.ids, other.finish)
        (_, noted), (_, expected) = one.release(), other.release()
        assert noted == expected
        assert all(len(note.top) == top for note in noted)
        told += len(noted)
        for note in noted:
            logprobs = row.log_softmax(dim=0)
            assert note.logprob == pytest.approx(float(logprobs[token]))
            best = logprobs.topk(len(note.top)).values.tolist()
            assert [value for _, value in note.top] == pytest.approx(best)
    assert told >= 2


def test_a_pass_is_read_by_the_host_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows pick or draw their token, in ways of their own, and whatever is noted beside it."""
    read = 0
    lists = torch.Tensor.tolist

    def counted(tensor: torch.Tensor) -> Any:
        nonlocal read
        read += 1
        return lists(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    for name in ("item", "__int__", "__float__", "__bool__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, None)
    ways = [
        (Sampling(), None),
        (Sampling(temperature=0.7), None),
        (Sampling(temperature=1.5, top_p=0.5), None),
        (Sampling(temperature=1.0, top_p=0.9), 3),
    ]
    logits = torch.randn(32, 320, generator=torch.Generator().manual_seed(0))
    for kinds in (1, 4):
        writers = [
            Writer(make_tokenizer(), {1}, ways[i % kinds][0], i, top_logprobs=ways[i % kinds][1]) for i in range(32)
        ]
        read = 0
        take(writers, logits)
        assert read == 1
        assert all(writer.count == 1 for writer in writers)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.3, 0.8), (2.0, 0.99)])
def test_draws_are_those_of_torch(temperature: float, top_p: float) -> None:
    """Oracle: ``torch.multinomial`` on the row's sorted nucleus, or on all of it, with a generator of the same seed."""
    logits = 2 * torch.randn(20, 320, generator=torch.Generator().manual_seed(1))
    sampling = Sampling(temperature=temperature, top_p=top_p)
    tokens = take([Writer(make_tokenizer(), {1}, sampling, seed) for seed in range(20)], logits)
    for seed, (row, token) in enumerate(zip(logits, tokens, strict=True)):
        probabilities = (row / temperature).softmax(dim=0)
        order = torch.arange(320)
        if top_p < 1:
            probabilities, order = probabilities.sort(descending=True)
            probabilities[probabilities.cumsum(dim=0) - probabilities >= top_p] = 0
        drawn = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(seed))
        assert token == int(order[drawn])
    assert len(set(tokens)) > 5
