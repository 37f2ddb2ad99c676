"""Prefixes that are kept: which of them, for how long, and that what is found is what would be computed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from softprompt.model.state.prefix import PrefixState
from softprompt.text.tokens import SOFT
from tests.conftest import tiny
from tests.model.families import soft


@settings(deadline=None, max_examples=40)
@given(
    asked=st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 6)), max_size=25),
    capacity=st.sampled_from([0, 3000, 8000, 10**9]),
    named=st.booleans(),
)
def test_the_cache_keeps_the_latest_that_fit(asked: list[tuple[str, int]], capacity: int, named: bool) -> None:
    """Against an ordered dictionary; a prefix's bytes are 2 tensors of 3 layers, 2 heads of 8, 4 bytes a number."""
    lm = tiny("llama")
    cache = lm.kept_prefixes(capacity=capacity)
    kept: OrderedDict[tuple[str, int], int] = OrderedDict()
    queries = hits = 0
    with torch.no_grad():
        for content, length in asked:
            vectors = soft(length, seed=ord(content))
            ids = (SOFT, *range(3, 3 + length))
            width, size = 2 * length, 2 * 3 * 2 * 8 * 4 * 2 * length
            queries += width
            hits += width if (content, length) in kept else 0
            if named:
                assert cache.holds(ids, content) == ((content, length) in kept)
            found = cache(ids, vectors, content if named else "")
            is_same(found, lm.prefix_kv(ids, vectors))
            if size <= capacity:
                kept[content, length] = size
                kept.move_to_end((content, length))
                while sum(kept.values()) > capacity:
                    kept.popitem(last=False)
            assert cache.nbytes == sum(kept.values()) <= max(capacity, 0)
            assert cache.count == len(kept)
    assert (cache.queries, cache.hits) == (queries, hits)


def is_same(found: PrefixState, expected: PrefixState) -> None:
    assert found.lengths == expected.lengths
    for one, other in zip(found.tensors, expected.tensors, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_number_of_prefixes_is_kept() -> None:
    cache = tiny("llama").kept_prefixes(2)
    for token in (3, 4, 3, 5, 4, 3):  # 3 and 5 are there when 4 is asked for again, and then 4 and 5
        cache((token,), None)
    assert cache.count == 2
    assert (cache.queries, cache.hits) == (6, 1)
    assert cache.holds((4,), "")
    assert cache.holds((3,), "")


CHANGES: list[Callable[[torch.Tensor], object]] = [
    lambda vectors: vectors.mul_(2),
    lambda vectors: vectors.data.add_(1),  # without autograd's notice
    lambda vectors: vectors.numpy().__setitem__(0, 0),
    lambda vectors: vectors.neg_(),
]


@pytest.mark.parametrize("change", CHANGES)
def test_vectors_changed_in_place_are_others(change: Callable[[torch.Tensor], object]) -> None:
    lm, ids = tiny("llama"), (3, SOFT, 4)
    cache, vectors = lm.kept_prefixes(), soft(4)
    before = cache(ids, vectors)
    assert cache(ids, vectors.clone()) is before  # the same numbers elsewhere are the same
    change(vectors)
    with torch.no_grad():
        is_same(cache(ids, vectors), lm.prefix_kv(ids, vectors))
    assert cache(ids, soft(4)) is before
    assert cache.count == 2


def test_dtype_and_shape_are_a_part_of_the_content() -> None:
    """The same bytes as other numbers."""
    lm = tiny("llama")
    cache, vectors = lm.kept_prefixes(), soft(4)
    halves = vectors.view(torch.float16).reshape(8, 32)
    assert halves.numpy().tobytes() == vectors.numpy().tobytes()
    for each in (vectors, halves, halves.view(torch.bfloat16)):
        cache((SOFT,), each)
    assert cache.count == 3
    assert cache((SOFT,), vectors.clone().requires_grad_()).lengths == (4,)
    assert cache.count == 3


def test_a_kept_prefix_has_no_graph() -> None:
    found = tiny("llama").kept_prefixes()((SOFT, 3), soft(2).requires_grad_())
    assert not any(tensor.requires_grad for tensor in found.tensors)


def test_what_holds_no_soft_prompt_is_shared_by_all_tasks() -> None:
    cache = tiny("llama").kept_prefixes(capacity=10**9)
    cache((3, 4), None)
    cache((3, 4), soft(2), "content")
    cache((3, 4), soft(2))
    assert (cache.count, cache.hits) == (1, 4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_kept_prefix_holds_no_more_memory_than_it_says(kind: str) -> None:
    """GPT-2 cuts queries, keys and values out of one tensor; a view would keep all of it."""
    cache = tiny(kind).kept_prefixes()
    found = cache((3, 4, 5), None)
    assert sum(t.untyped_storage().nbytes() for t in found.tensors) == cache.nbytes == found.nbytes
