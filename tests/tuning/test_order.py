"""Every row once an epoch, and the labels spread evenly over it."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softprompt.tuning.rows import RowOrder

KINDS = st.lists(st.sampled_from("abcd"), min_size=1, max_size=60)


def epoch(order: RowOrder, rows: int, seed: int, number: int) -> list[int]:
    """The rows of an epoch one by one."""
    return [order.batch(seed, number * rows + i, 1)[0] for i in range(rows)]


@given(KINDS, st.integers(0, 5), st.integers(1, 20))
def test_each_row_comes_once_an_epoch_whatever_the_size_of_a_step(kinds: list[str], seed: int, size: int) -> None:
    order = RowOrder(kinds)
    steps = -(-3 * len(kinds) // size)
    drawn = [row for step in range(steps) for row in order.batch(seed, step, size)]
    for number in range(3):
        rows = drawn[number * len(kinds) : (number + 1) * len(kinds)]
        assert sorted(rows) == list(range(len(kinds)))
        assert rows == epoch(RowOrder(kinds), len(kinds), seed, number)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["", "x", "y", "z"])), min_size=1, max_size=40))
def test_the_answers_of_a_conversation_follow_each_other(rows: list[tuple[str, str]]) -> None:
    kinds, conversations = [kind for kind, _ in rows], [of for _, of in rows]
    order = RowOrder(kinds, conversations)
    for number in range(2):
        drawn = epoch(order, len(rows), 3, number)
        assert sorted(drawn) == list(range(len(rows)))
        for of in {"x", "y", "z"} & set(conversations):
            places = [place for place, row in enumerate(drawn) if conversations[row] == of]
            assert places == list(range(places[0], places[0] + len(places)))
            assert [drawn[place] for place in places] == [row for row, one in enumerate(conversations) if one == of]
        assert drawn == [row for step in range(len(rows)) for row in order.batch(3, number * len(rows) + step, 1)]


@given(KINDS, st.integers(0, 5))
def test_rows_of_no_conversation_keep_the_order_that_checkpoints_go_on_with(kinds: list[str], seed: int) -> None:
    """The recipe of the order, written down apart: places in even parts of the epoch, from torch's generator."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + 1)
    shuffled = torch.randperm(len(kinds), generator=generator).tolist()
    chance = torch.rand(len(kinds), generator=generator, dtype=torch.float64).tolist()
    seen, places = Counter[str](), list[float]()
    for row, drawn in zip(shuffled, chance, strict=True):
        places.append((seen[kinds[row]] + drawn) / kinds.count(kinds[row]))
        seen[kinds[row]] += 1
    expected = [shuffled[place] for place in sorted(range(len(kinds)), key=places.__getitem__)]
    alone = [f"conversation {row}" for row in range(len(kinds))]
    for order in (RowOrder(kinds), RowOrder(kinds, [""] * len(kinds)), RowOrder(kinds, alone)):
        assert epoch(order, len(kinds), seed, 1) == expected


@given(KINDS, st.integers(0, 5))
def test_every_beginning_of_an_epoch_holds_each_kind_as_often_as_the_whole_does(kinds: list[str], seed: int) -> None:
    """The n rows of a kind stand in n equal parts of the epoch, so that less than one too many or too few of them lie
    before any place; the rows of all K kinds before it are then less than K off, n / N of which is that kind's
    share."""
    rows = epoch(RowOrder(kinds), len(kinds), seed, 1)
    sizes = Counter(kinds)
    for many in range(len(rows) + 1):
        found = Counter(kinds[row] for row in rows[:many])
        for kind, size in sizes.items():
            share = size / len(kinds)
            assert abs(found[kind] - many * share) < 1 + len(sizes) * share + 1e-9


def test_two_labels_of_one_size_are_even_in_each_batch() -> None:
    """Less than one off, as above: half of an even number of rows, then."""
    kinds = ["positive"] * 40 + ["negative"] * 40
    order = RowOrder(kinds)
    for step in range(10):
        assert Counter(kinds[row] for row in order.batch(0, step, 16)) == {"positive": 8, "negative": 8}


def test_which_row_of_a_label_comes_first_is_chance() -> None:
    """600 seeds, of 6 rows in two kinds: each should come first 100 times. A row of a fair draw is outside 55 to 145
    with a probability of 1e-6 (binomial), one of the six with less than 1e-5."""
    kinds = [None, None, None, 7, 7, 7]
    first = Counter(RowOrder(kinds).batch(seed, 0, 1)[0] for seed in range(600))
    assert set(first) == set(range(6))
    assert all(55 <= count <= 145 for count in first.values())


@pytest.mark.parametrize("kinds", [["a"] * 50, ["a", "b"] * 25])
def test_epochs_and_seeds_have_orders_of_their_own(kinds: list[str]) -> None:
    """Two fair draws agree with a probability below (25!)^-2."""
    order = RowOrder(kinds)
    drawn = [epoch(order, 50, seed, number) for seed in (0, 1) for number in (0, 1)]
    assert len({tuple(rows) for rows in drawn}) == 4
