"""Rows, tries and micro-batches: what is read where, and that neither padding nor sharing changes a number."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from softprompt.model.batch import Row, build_trie, collate, micro_batches, without_lone_rows
from softprompt.model.request import Request
from softprompt.model.state.kv import PrefixKV
from softprompt.text.tokens import Tokens
from tests.conftest import plain_score, tiny

CPU = torch.device("cpu")
# Few distinct tokens, so that words often share beginnings, are each other's beginnings, or are equal.
words = st.lists(st.lists(st.integers(70, 72), min_size=1, max_size=4).map(tuple), min_size=1, max_size=6).map(tuple)


# --- the trie ------------------------------------------------------------------------------------------------


def test_the_trie_of_a_few_words() -> None:
    trie = build_trie(((7, 8, 9), (7, 8), (5,), (7, 6, 9), (7,)))
    assert trie.tokens == (7, 6, 8)  # the last token of a word is predicted, never read
    assert trie.depths == (1, 2, 2)
    assert trie.ends == (3, 2, 3)
    assert [trie.path(node) for node in range(3)] == [(7,), (7, 6), (7, 8)]
    assert trie.steps == (
        *((-1, 7, 0), (0, 8, 0), (2, 9, 0)),
        *((-1, 7, 1), (0, 8, 1)),
        (-1, 5, 2),
        *((-1, 7, 3), (0, 6, 3), (1, 9, 3)),
        (-1, 7, 4),
    )
    assert trie.num_words == 5


def test_words_of_one_token_and_no_words_add_nothing_to_a_row() -> None:
    assert build_trie(((7,), (8,))).tokens == ()
    assert build_trie(()).num_words == 0
    assert Row((1, 2, 3), ((7,), (8,))).length == Row((1, 2, 3)).length == 3
    assert Row((1, 2, 3), ((7, 8, 9),)).length == 5


@settings(deadline=None)
@given(words)
def test_the_trie_spells_every_word_over_nodes_that_see_just_their_ancestors(words: tuple[Tokens, ...]) -> None:
    trie = build_trie(words)
    beginnings = {word[:depth] for word in words for depth in range(1, len(word))}
    assert len(trie.tokens) == len(beginnings)  # each common beginning once
    for index, word in enumerate(words):
        steps = [(node, token) for node, token, of in trie.steps if of == index]
        assert tuple(token for _, token in steps) == word
        path = [node for node, _ in steps]
        assert path[0] == -1
        assert tuple(trie.tokens[node] for node in path[1:]) == word[:-1]
        for depth, node in enumerate(path[1:], start=1):
            assert trie.depths[node] == depth
            assert [j for j in range(node + 1) if node < trie.ends[j]] == path[1 : depth + 1]


@settings(max_examples=40, deadline=None)
@given(words, st.lists(st.integers(2, 319), min_size=1, max_size=5).map(tuple))
def test_the_trie_scores_each_word_as_if_it_stood_alone(words: tuple[Tokens, ...], ids: Tokens) -> None:
    found = tiny("llama").score([Request((3, 4, *ids), 2, words)])[0]
    expected = torch.stack([plain_score("llama", (3, 4, *ids), word) for word in words])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# --- rows as tensors -----------------------------------------------------------------------------------------


def test_the_exact_positions_that_are_read() -> None:
    rows = [Row((11, 12, 13), ((7, 8, 9), (7, 6)), prefix=1), Row((21,), ((5,),), prefix=0)]
    batch = collate(rows, (2, 4), CPU)
    assert batch.ids.tolist() == [[11, 12, 13, 7, 8], [21, 0, 0, 0, 0]]
    assert batch.positions.tolist() == [[4, 5, 6, 7, 8], [2, 0, 0, 0, 0]]
    assert batch.size == 2
    assert batch.num_words == 2
    assert batch.word_counts.tolist() == [2, 1]
    assert batch.prefix_rows is not None
    assert batch.prefix_rows.tolist() == [1, 0]
    read = list(zip(batch.read_lines.tolist(), batch.read_columns.tolist(), strict=True))
    assert read == [(0, 2), (0, 3), (0, 4), (1, 0)]
    steps = zip(batch.step_read.tolist(), batch.step_token.tolist(), batch.step_slot.tolist(), strict=True)
    # row 0: 7, 8 and 9 for its word 0; 7 and 6 for its word 1; row 1: 5 for its word 0
    assert list(steps) == [(0, 7, 0), (1, 8, 0), (2, 9, 0), (0, 7, 1), (1, 6, 1), (3, 5, 2)]
    seen = [["".join("x" if s else "." for s in token) for token in row] for row in batch.sees.tolist()]
    assert seen == [
        ["xxxxx....", "xxxxxx...", "xxxxxxx..", "xxxxxxxx.", "xxxxxxxxx"],
        ["xx..x....", "xx...x...", "xx....x..", "xx.....x.", "xx......x"],  # what padding sees does not matter
    ]


def test_rows_of_one_prefix_share_a_line_and_do_not_see_each_other() -> None:
    batch = collate([Row((11,), ((7, 8),)), Row((21, 22, 23), ((5,),))], (1,), CPU)
    assert batch.ids.tolist() == [[21, 22, 23, 11, 7]]  # the longer row comes first
    assert batch.positions.tolist() == [[1, 2, 3, 1, 2]]
    assert batch.size == 2
    seen = ["".join("x" if s else "." for s in token) for token in batch.sees[0].tolist()]
    assert seen == ["xx....", "xxx...", "xxxx..", "x...x.", "x...xx"]
    steps = zip(batch.step_read.tolist(), batch.step_token.tolist(), batch.step_slot.tolist(), strict=True)
    assert list(steps) == [(0, 5, 1), (1, 7, 0), (2, 8, 0)]
    assert collate([Row((11,)), Row((21,), prefix=1)], (1, 1), CPU).ids.tolist() == [[11], [21]]


@pytest.mark.parametrize(
    ("lengths", "prefix", "shape"),
    [
        ([64] * 16, 64, (16, 64)),  # nothing to gain
        ([100, *[66] * 14], 64, (8, 132)),  # two of 66, and 100 alone: 1,056 places; 15 lines would have 1,500
        ([70, *[66] * 14], 64, (15, 70)),  # 1,050 places, less than the same 1,056
        ([110, *[40] * 12], 64, (5, 120)),  # three of 40, and 110 alone: 600 places; two of 40 to a line would have 770
        ([18] * 16, 464, (16, 18)),
        ([1000, 20, 20, 20], 64, (2, 1000)),  # one longer than any line
    ],
)
def test_lines_are_as_long_as_is_cheapest(lengths: list[int], prefix: int, shape: tuple[int, int]) -> None:
    rows = [Row(tuple(range(length))) for length in lengths]
    assert tuple(collate(rows, (prefix,), CPU).ids.shape) == shape


@given(st.lists(st.integers(1, 120), min_size=16, max_size=16))
def test_padding_is_never_more_than_in_lines_of_one_row(lengths: list[int]) -> None:
    places = collate([Row((7,) * length) for length in lengths], (64,), CPU).ids.numel()
    assert sum(lengths) <= places <= len(lengths) * max(lengths)


@given(st.lists(st.lists(st.integers(2, 300), min_size=1, max_size=70), min_size=1, max_size=9), st.randoms())
@settings(max_examples=25, deadline=None)
def test_packing_changes_no_score(texts: list[list[int]], draw: random.Random) -> None:
    """Rows of two prefixes, and of one, score in shared lines as each does alone."""
    lm = tiny("llama")
    several = (((60,), (61, 62, 63), (61, 64)), ((60, 61),), ((9,), (8, 7)))
    prefixes = [lm.prefix_kv(ids, None) for ids in ((3, 4, 5), (6, 7))]
    for known in (prefixes, prefixes[:1]):
        rows = [Row(tuple(text), draw.choice(several), draw.randrange(len(known))) for text in texts]
        stacked = known[0].stack(known[1:])
        packed = lm.score_batch(collate(rows, stacked.lengths, CPU), stacked)
        for row, scores in zip(rows, packed, strict=True):
            own = known[row.prefix]
            alone = lm.score_batch(collate([replace(row, prefix=0)], own.lengths, CPU), own)[0]
            torch.testing.assert_close(scores[: len(alone)], alone, rtol=1e-5, atol=2e-5)


def test_one_prefix_for_all_rows_is_not_gathered() -> None:
    assert collate([Row((1,)), Row((2, 3))], (4,), CPU).prefix_rows is None


def test_no_row_sees_another_word() -> None:
    batch = collate([Row((11,), ((7, 8), (6, 5)))], (0,), CPU)
    assert batch.ids.tolist() == [[11, 6, 7]]
    assert batch.sees.tolist() == [[[True, False, False], [True, True, False], [True, False, True]]]
    assert batch.positions.tolist() == [[0, 1, 1]]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_padding_changes_nothing(kind: str) -> None:
    """A short row scores alike alone, beside longer rows and prefixes, and whatever stands in the padding."""
    lm = tiny(kind)
    row = Row((60, 61), ((70, 71), (80,)))
    prefixes = [lm.prefix_kv(tuple(range(40, 40 + length)), None) for length in (3, 9)]
    alone = lm.score_batch(collate([row], (3,), CPU), prefixes[0])[0]
    generator = torch.Generator().manual_seed(0)

    def padded(parts: Sequence[torch.Tensor], longer: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        filled = []
        for part, other in zip(parts, longer, strict=True):
            junk = 50 * torch.randn(1, part.shape[1], 6, part.shape[3], generator=generator)
            filled.append(torch.cat([torch.cat([part, junk], dim=2), other]))
        return tuple(filled)

    filled = padded(prefixes[0].tensors, prefixes[1].tensors)
    prefix = PrefixKV(filled[:3], filled[3:], (3, 9))
    batch = collate([row, Row((62, 63, 64, 65, 66), ((70, 72, 73), (71, 70, 75)), prefix=1)], (3, 9), CPU)
    ids, positions = batch.ids.clone(), batch.positions.clone()
    ids[0, 3:], positions[0, 3:] = 99, 77
    batch = replace(batch, ids=ids, positions=positions)
    torch.testing.assert_close(lm.score_batch(batch, prefix)[0], alone, rtol=1e-5, atol=1e-5)


def test_words_that_a_row_lacks_have_no_probability() -> None:
    lm = tiny("llama")
    scores = lm.score_batch(
        collate([Row((60,), ((70,),)), Row((60,), ((70,), (71, 72)))], (0,), CPU), lm.prefix_kv((), None)
    )
    assert scores[0, 1] == -math.inf
    assert scores[0, 0] == pytest.approx(float(scores[1, 0]), rel=1e-5)


# --- micro-batches -------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 200))
def test_micro_batches_hold_each_row_once_within_the_budget(lengths: list[int], max_tokens: int) -> None:
    groups = micro_batches(lengths, max_tokens)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        longest = max(lengths[index] for index in group)
        assert len(group) == 1 or longest * len(group) <= max_tokens
    flat = [lengths[index] for group in groups for index in group]
    assert flat == sorted(lengths, reverse=True)  # the longest first, so that memory peaks at once
    for group, following in itertools.pairwise(groups):  # no group could have taken one more
        assert lengths[group[0]] * (len(group) + 1) > max_tokens
        assert lengths[following[0]] <= lengths[group[-1]]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(60, 200))
def test_no_group_of_several_rows_leaves_one_alone(lengths: list[int], max_tokens: int) -> None:
    """Every row once, no more tokens than before in a group, as many groups, and no lone row but of three at most."""
    before = micro_batches(lengths, max_tokens)
    groups = without_lone_rows(before)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    assert len(groups) == len(before)
    assert all(max(lengths[i] for i in group) * len(group) <= max(max_tokens, 60) for group in groups)
    for number, group in enumerate(groups):
        assert len(group) > 1 or number == 0 or len(groups[number - 1]) <= 2


@given(st.lists(st.integers(1, 60), min_size=2, max_size=12))
def test_two_rows_are_never_one_line_where_two_are_wanted(lengths: list[int]) -> None:
    rows = [Row((7,) * length) for length in lengths]
    found = collate(rows, (5,), CPU, least_lines=2)
    assert len(found.ids) >= 2
    assert found.size == len(rows)
    assert len(collate(rows[:1], (5,), CPU, least_lines=2).ids) == 1


def test_micro_batches_by_hand() -> None:
    assert micro_batches([3, 9, 4, 4, 20], 12) == [[4], [1], [2, 3, 0]]
    assert micro_batches([], 12) == []
