"""Scores of labels against a loop over labels with ``torch.logsumexp``, gradient included."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from softprompt.tasks.scores import label_scores

NUMBERS = st.one_of(
    st.floats(-200, 0, width=32), st.sampled_from([-math.inf, math.inf, math.nan, 0.0, -1e30, 3e38, -3e38])
)


def loop(scores: torch.Tensor, owners: list[int]) -> torch.Tensor:
    of_word = torch.tensor(owners)
    return torch.stack([scores[:, of_word == label].logsumexp(dim=1) for label in range(max(owners) + 1)], dim=1)


@given(owners=st.lists(st.integers(0, 5), min_size=1, max_size=12), numbers=st.lists(NUMBERS, min_size=36, max_size=36))
@settings(deadline=None, max_examples=200)
def test_scores_of_labels_are_those_of_a_loop_over_labels(owners: list[int], numbers: list[float]) -> None:
    """Words in any order, labels without words, words without probability, overflows and what is no number."""
    start = torch.tensor(numbers).view(3, 12)[:, : len(owners)]
    found, expected = start.clone().requires_grad_(), start.clone().requires_grad_()
    ours, theirs = label_scores(found, owners), loop(expected, owners)
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    weight = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(len(owners)))
    for scores in (ours, theirs):  # a loss over labels that are there, as training has it
        torch.where(scores.isfinite(), scores, 0).mul(weight).sum().backward()  # type: ignore[no-untyped-call]
    assert found.grad is not None
    assert expected.grad is not None
    torch.testing.assert_close(found.grad, expected.grad, equal_nan=True)


def test_the_gradient_is_each_words_share_of_its_label() -> None:
    probabilities = torch.tensor([[0.1, 0.2, 0.3, 0.0]])
    scores = probabilities.log().requires_grad_()
    found = label_scores(scores, (0, 1, 0, 1))
    assert found.exp().tolist() == [pytest.approx([0.4, 0.2])]
    found[0, 0].backward()  # type: ignore[no-untyped-call]
    assert scores.grad is not None
    assert scores.grad.tolist() == [pytest.approx([0.25, 0, 0.75, 0])]


def test_large_scores_do_not_overflow() -> None:
    scores = torch.tensor([[-1e4, -1e4, -2e4], [1e4, 1e4, 0]])
    assert label_scores(scores, (0, 0, 1)).tolist() == [
        pytest.approx([-1e4 + math.log(2), -2e4]),
        pytest.approx([1e4 + math.log(2), 0]),
    ]


def test_nothing_is_read_back_from_the_device() -> None:
    """A tensor without numbers: whatever read one would fail."""
    scores = torch.empty(7, 4, device="meta", requires_grad=True)
    found = label_scores(scores, (0, 2, 1, 2))
    assert found.shape == (7, 3)
    found.log_softmax(dim=1).sum().backward()  # type: ignore[no-untyped-call]
