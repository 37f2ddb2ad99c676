"""What prefixes leave behind: the laws that every kind of it keeps, by arithmetic apart and plain autograd."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from softprompt.model.state.kv import PrefixKV
from softprompt.model.state.prefix import Detached, PrefixState, apart
from tests.conftest import SHARED, tiny
from tests.model.families import soft

LAYERS, HEADS, WIDTH = 3, 2, 4


def kv(length: int, seed: int = 0) -> PrefixKV:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (
        tuple(torch.randn(1, HEADS, length, WIDTH, generator=generator) for _ in range(LAYERS)) for _ in range(2)
    )
    return PrefixKV(keys, values, (length,))


def is_same(one: PrefixState, other: PrefixState) -> None:
    assert one.lengths == other.lengths
    for a, b in zip(one.tensors, other.tensors, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5), data=st.data())
@settings(deadline=None, max_examples=50)
def test_what_is_selected_of_a_stack_is_the_part(lengths: list[int], data: st.DataObject) -> None:
    parts = [kv(length, seed) for seed, length in enumerate(lengths)]
    stacked = parts[0].stack(parts[1:])
    assert stacked.lengths == tuple(lengths)
    assert stacked.width == max(lengths)
    for index, part in enumerate(parts):
        is_same(stacked.select([index]), part)
    chosen = data.draw(st.lists(st.integers(0, len(parts) - 1), min_size=1, max_size=4))
    some = [parts[index] for index in chosen]
    is_same(stacked.select(chosen), some[0].stack(some[1:]))
    cut = data.draw(st.integers(1, len(parts)))
    rest = [parts[cut].stack(parts[cut + 1 :])] if cut < len(parts) else []
    is_same(parts[0].stack(parts[1:cut]).stack(rest), stacked)  # two stacks beside each other are one


@given(lengths=st.lists(st.integers(0, 6), min_size=2, max_size=4))
@settings(deadline=None, max_examples=30)
def test_joined_prefixes_are_as_long_as_both_and_hold_the_one_before_the_other(lengths: list[int]) -> None:
    parts = [kv(length, seed) for seed, length in enumerate(lengths)]
    joined = parts[0]
    for part in parts[1:]:
        joined = joined.join(part)
    assert joined.width == sum(lengths)
    assert joined.nbytes == sum(part.nbytes for part in parts) == 2 * LAYERS * HEADS * sum(lengths) * WIDTH * 4
    whole = torch.cat([part.numbers() for part in parts])
    torch.testing.assert_close(joined.numbers(), whole, rtol=0, atol=0)
    first, *rest = parts
    behind = rest[0]
    for part in rest[1:]:
        behind = behind.join(part)
    is_same(first.join(behind), joined)


def test_padding_between_two_prefixes_is_refused() -> None:
    with pytest.raises(AssertionError):
        kv(2).stack([kv(3)]).join(kv(1).stack([kv(1)]))


def test_the_numbers_of_a_prefix_make_it_again() -> None:
    one = kv(5)
    numbers = one.numbers()
    assert numbers.shape == (5, LAYERS, 2, HEADS, WIDTH)
    assert float(numbers[4, 2, 1, 0, 3]) == float(one.values[2][0, 0, 4, 3])
    is_same(PrefixKV.of_numbers(numbers), one)
    assert torch.equal(one.layer(1)[1], one.values[1])


def test_a_stack_of_padded_prefixes_is_zero_where_nothing_is() -> None:
    stacked = kv(2).stack([kv(0), kv(3)])
    assert [tuple(tensor.shape) for tensor in stacked.tensors] == [(3, HEADS, 3, WIDTH)] * 2 * LAYERS
    assert not stacked.keys[1][0, :, 2:].any()
    assert not stacked.values[0][1].any()
    one = kv(2)
    assert one.stack([]) is one


def test_a_copy_apart_holds_its_own_numbers_only() -> None:
    whole = torch.zeros(1, HEADS, 100, WIDTH)
    view = PrefixKV((whole[:, :, :3],), (whole[:, :, 3:6],), (3,))
    copied = apart(view)
    is_same(copied, view)
    assert sum(t.untyped_storage().nbytes() for t in copied.tensors) == copied.nbytes == view.nbytes
    whole += 1
    assert not copied.keys[0].any()


# --- another kind, which is not attention's ------------------------------------------------------------------


@dataclass(frozen=True)
class Running:
    """What a recurrence leaves behind: one state ``[K, H]``, whatever the length."""

    state: torch.Tensor
    lengths: tuple[int, ...]

    @property
    def width(self) -> int:
        return max(self.lengths)

    @property
    def nbytes(self) -> int:
        return self.state.nbytes

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.state,)

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> Running:
        return replace(self, state=tensors[0])

    def select(self, prefixes: Sequence[int]) -> Running:
        return Running(self.state[list(prefixes)], tuple(self.lengths[i] for i in prefixes))

    def join(self, behind: Running) -> Running:
        return Running(behind.state, (self.width + behind.width,))

    def stack(self, others: Sequence[Running]) -> Running:
        states = (self, *others)
        return Running(torch.cat([s.state for s in states]), tuple(n for s in states for n in s.lengths))


def test_gradients_add_up_in_the_detached_state_as_in_plain_autograd() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5, 8, generator=generator)
    start = torch.randn(1, 8, generator=generator)

    def run(numbers: torch.Tensor) -> Running:
        return Running((numbers * 3).tanh(), (4,))

    def loss(state: PrefixState, row: torch.Tensor) -> torch.Tensor:
        return (state.tensors[0] * row).sum().sin()

    expected = start.clone().requires_grad_()
    torch.stack([loss(run(expected), row) for row in rows]).sum().backward()  # type: ignore[no-untyped-call]

    found = start.clone().requires_grad_()
    detached = Detached(run(found))
    for row in rows:
        loss(detached.leaves(), row).backward()  # type: ignore[no-untyped-call]
        assert found.grad is None  # nothing has gone through the prefix yet
    detached.backward()
    assert found.grad is not None
    torch.testing.assert_close(found.grad, expected.grad)


def test_gradients_add_up_in_float32_whatever_the_dtype() -> None:
    """1 and then 0.001 a thousand times: bf16 would stay at 1, since half a step there is 0.004."""
    numbers = torch.ones(1, 2, dtype=torch.bfloat16, requires_grad=True)
    detached = Detached(Running(numbers * 1, (1,)))
    for factor in (1.0, *[0.001] * 1000):
        part = detached.leaves().state
        assert part.dtype == torch.bfloat16
        (part.sum() * factor).backward()  # type: ignore[no-untyped-call]
    detached.backward()
    assert numbers.grad is not None
    assert numbers.grad.tolist() == [[pytest.approx(2.0, abs=0.02)] * 2]


def test_what_no_pass_looks_at_has_no_gradient() -> None:
    used, unused = (torch.ones(1, HEADS, 2, WIDTH, requires_grad=True) for _ in range(2))
    detached = Detached(PrefixKV((used * 2,), (unused * 2,), (2,)))
    detached.leaves().keys[0].sum().backward()  # type: ignore[no-untyped-call]
    detached.backward()
    assert used.grad is not None
    assert used.grad.eq(2).all()
    assert unused.grad is None


@pytest.mark.parametrize("kind", SHARED)
def test_a_models_prefix_in_two_parts_is_the_whole(kind: str) -> None:
    lm, ids, vectors = tiny(kind), (3, 4, -1, 5, 60), soft(3)
    with torch.no_grad():
        whole = lm.prefix_kv(ids, vectors)
        in_parts = lm.prefix_kv(ids[2:], vectors, lm.prefix_kv(ids[:2], None))
    assert whole.lengths == in_parts.lengths == (7,)
    for a, b in zip(whole.tensors, in_parts.tensors, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
