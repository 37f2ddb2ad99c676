"""Answers of a conversation as one row: every number is that of each answer alone, and what is shared is counted."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from softprompt.errors import SoftPromptWarning
from softprompt.model.batch import build_trie
from softprompt.model.frozen import FrozenLM
from softprompt.model.joined import Joined, join, share_beginnings
from softprompt.model.request import Request
from softprompt.text.tokens import SOFT, Tokens
from softprompt.tuning.gradients import Gradients, Layout, Share
from softprompt.tuning.objective import Objective
from tests.conftest import SHARED, make_model, make_tokenizer, plain_score, tiny
from tests.model.families import frozen, soft

BEFORE = (3, SOFT)
FIRST, SECOND, THIRD = (60, 61, 62), (60, 61, 62, 70, 71, 63), (60, 61, 62, 70, 71, 63, 72, 64, 65)


def answer(ids: Tokens, *words: Tokens, of: str = "one", prompt: int = 0) -> Request:
    return Request((*BEFORE, *ids), len(BEFORE), words, prompt, conversation=of)


def talk(of: str = "one", prompt: int = 0) -> list[Request]:
    """Three answers; what is said before one is what the one before it was asked, and said."""
    words = ((70, 71, 99), (72, 73), (74, 75, 76))
    return [answer(ids, word, of=of, prompt=prompt) for ids, word in zip((FIRST, SECOND, THIRD), words, strict=True)]


def places(joined: Sequence[Joined]) -> list[tuple[int, ...]]:
    return [one.places for one in joined]


# --- which are joined, and what is computed ------------------------------------------------------------------


def test_answers_of_a_conversation_become_one_row_in_which_only_the_answers_are_scored() -> None:
    (one,) = join(talk(), 100)
    row = one.row()
    assert row.ids == FIRST
    assert row.words == ((70, 71, 99), (70, 71, 63, 72, 73), (70, 71, 63, 72, 64, 65, 74, 75, 76))
    assert row.scored_from == (0, 3, 6)
    # 60 61 62, then 70 71 63 72, and from there 64 65 74 75: 72 is said and then read
    assert row.length == 3 + 4 + 4
    assert one.saved == (3 + 2) + (6 + 1) + (9 + 2) - 11


def test_a_template_that_writes_earlier_answers_in_another_way_shares_up_to_there() -> None:
    """As where thoughts are left out: the first answer begins with 90, which the second one's text has no more."""
    first, second = answer(FIRST, (90, 91, 70, 71, 99)), answer(SECOND, (90, 72, 99))
    (one,) = join([first, second], 100)
    assert one.row().words == ((90, 91, 70, 71, 99), (70, 71, 63, 90, 72, 99))
    assert one.saved == 3
    cut = replace(second, ids=(*BEFORE, *FIRST[:2], *SECOND[3:]))  # its first message was too long
    (one,) = join([first, cut], 100)
    assert one.row().ids == FIRST[:2]


def test_what_is_of_no_conversation_or_of_another_one_stands_alone() -> None:
    requests = [*talk("a"), *talk("b"), *talk(""), *talk("a", prompt=1), talk("a")[0]]
    assert places(join(requests, 100)) == [(0, 1, 2, 12), (3, 4, 5), (6,), (7,), (8,), (9, 10, 11)]


def test_what_begins_otherwise_is_not_less_to_compute_together() -> None:
    assert places(join([answer((60, 61), (70,)), answer((61, 60), (70,))], 100)) == [(0,), (1,)]
    long = [answer((60, *range(70 + 100 * n, 170 + 100 * n)), (70,)) for n in range(2)]  # one token of 101 is shared
    assert places(join(long, 1000)) == [(0,), (1,)]


def test_a_row_is_no_longer_than_what_is_computed_at_once_or_than_its_longest_answer() -> None:
    branches = [answer((*range(100), 200 + n), (*range(300, 350), 0)) for n in range(5)]  # 101 + 50 tokens each
    joined = join(branches, 260)
    assert places(joined) == [(0, 1, 2), (3, 4)]
    assert [one.row().length for one in joined] == [100 + 3 * 51, 100 + 2 * 51]
    (chain,) = join(talk(), 5)
    assert chain.row().length == len(THIRD) + 2


def test_a_long_conversation_keeps_little_in_memory() -> None:
    """Ten answers over 2,000 tokens: what is kept of the trie is a few numbers a token, not one for each pair."""
    said = [tuple(random.Random(n).choices(range(300), k=200)) for n in range(10)]
    texts = [tuple(token for part in said[: n + 1] for token in part) for n in range(10)]
    (one,) = join([answer(text, (7, 8, 9)) for text in texts], 2048)
    row = one.row()
    assert row.length == 2000 + 10 * 2
    trie = build_trie(row.words, row.scored_from)
    assert len(trie.tokens + trie.depths + trie.ends) + 3 * len(trie.steps) < 10 * row.length
    assert len(trie.steps) == 30
    assert [len(trie.path(node)) for node in range(0, len(trie.tokens), 100)] == list(trie.depths[::100])


# --- the numbers ---------------------------------------------------------------------------------------------


few = st.integers(70, 72)
texts = st.lists(few, min_size=1, max_size=6).map(tuple)
words = st.lists(st.lists(few, min_size=1, max_size=4).map(tuple), min_size=1, max_size=3).map(tuple)
requests = st.lists(st.tuples(texts, words, st.sampled_from(["", "a", "b"]), st.integers(0, 1)), min_size=1, max_size=8)


@settings(max_examples=15, deadline=None)
@given(requests, st.integers(1, 60))
def test_every_word_scores_as_if_it_stood_alone(drawn: list[tuple[Any, ...]], most: int) -> None:
    """Few tokens, so that texts and words share beginnings, are each other's beginnings, and part anywhere."""
    vectors = [soft(4, 0), soft(4, 1)]
    several = [answer(text, *words, of=of, prompt=prompt) for text, words, of, prompt in drawn]
    found, greedy = tiny("llama").score_and_compare(several, vectors)
    alone, same = tiny("llama").score_and_compare([replace(one, conversation="") for one in several], vectors)
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)
    assert torch.equal(greedy, same)
    limited = tiny("llama").score(several, vectors, max_tokens=most)
    torch.testing.assert_close(limited, alone, rtol=1e-5, atol=1e-5)
    for row, request in zip(found, several, strict=True):
        vectors_of = vectors[request.prompt or 0]
        expected = torch.stack([plain_score("llama", request.ids, word, vectors_of) for word in request.words])
        torch.testing.assert_close(row[: len(expected)], expected, rtol=1e-5, atol=1e-5)
        assert bool((row[len(expected) :] == -torch.inf).all())


def mixed(words: tuple[Tokens, ...] | None) -> list[Request]:
    """Two conversations, a cut one, and plain rows, in any order; with ``words`` for the words of all."""
    cut = [answer((60, 61, *ids[3:]), *one.words, of="cut") for one in talk() if (ids := one.ids[2:])]
    plain = [answer((61, 66), (70, 71), of=""), answer((60, 61, 62, 70), (75,), of="")]
    found = [*talk("a"), plain[0], *talk("b")[1:], *cut, plain[1], talk("c")[0]]
    random.Random(0).shuffle(found)
    return found if words is None else [replace(one, words=words) for one in found]


def gradient(
    ways: Gradients, several: Sequence[Request], gold: Sequence[int], owners: tuple[int, ...] | None = None
) -> tuple[float, int, torch.Tensor]:
    leaf = soft(4).requires_grad_()
    loss, tokens = ways.backward(Objective(owners), several, gold, leaf)
    assert leaf.grad is not None
    return loss, tokens, leaf.grad


def saved(ways: Gradients, several: Sequence[Request]) -> int:
    """Tokens that a step of these requests does not compute."""
    return ways.prepare([Share(Objective(), several, [0] * len(several), tuple(soft(4).shape))]).saved[0]


@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize("owners", [None, (0, 1, 0)])
@pytest.mark.parametrize(("max_tokens", "layout"), [(16, None), (4096, "stream"), (4096, "two stages")])
def test_loss_and_gradient_are_those_of_separate_rows(
    kind: str, owners: tuple[int, ...] | None, max_tokens: int, layout: Layout | None
) -> None:
    """For the loss of target tokens and that over labels; against transformers' own forward, one at a time."""
    several = mixed(None if owners is None else ((70, 71), (70, 72, 73), (74,)))
    gold = [0 if owners is None else n % 2 for n in range(len(several))]
    alone = [replace(one, conversation="") for one in several]
    ways = Gradients(tiny(kind), layout=layout, max_tokens=max_tokens)
    loss, tokens, found = gradient(ways, several, gold, owners)
    apart, most, wanted = gradient(ways, alone, gold, owners)
    assert loss == pytest.approx(apart, rel=1e-6)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-6
    assert most - tokens == saved(ways, several) > 0
    assert saved(ways, alone) == 0

    leaf, total = soft(4).requires_grad_(), torch.zeros(())
    for request, label in zip(several, gold, strict=True):
        scores = torch.stack([plain_score(kind, request.ids, word, leaf) for word in request.words])
        if owners is not None:
            of = [scores[[owner == k for owner in owners]].logsumexp(0) for k in (0, 1)]
            scores = torch.stack(of).log_softmax(dim=0)
        total = total - scores[label]
    count = len(several) if owners else sum(len(one.words[0]) for one in several)
    (expected,) = torch.autograd.grad(total / count, leaf)
    assert loss == pytest.approx(float(total.detach()) / count, rel=1e-5)
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_without_a_shared_prefix_nothing_is_joined() -> None:
    ways = Gradients(tiny("stablelm"))
    loss, tokens, found = gradient(ways, talk(), [0, 0, 0])
    apart, most, wanted = gradient(ways, [replace(one, conversation="") for one in talk()], [0, 0, 0])
    assert (loss, tokens, saved(ways, talk())) == (apart, most, 0)
    assert torch.equal(found, wanted)


# --- what all conversations begin with -----------------------------------------------------------------------


def test_what_all_conversations_begin_with_is_part_of_the_shared_prefix() -> None:
    system = (90, 91, 92)
    several = [answer((*system, *one.ids[2:]), *one.words, of=of) for of in "ab" for one in talk()]
    several[3:] = [replace(one, ids=(*one.ids[:5], 93, *one.ids[6:])) for one in several[3:]]
    found = share_beginnings(several)
    assert [request.shared for request in found] == [5] * 6
    assert [replace(request, shared=2) for request in found] == several
    whole = gradient(Gradients(tiny("llama")), found, [0] * 6)
    alone = gradient(Gradients(tiny("llama")), [replace(one, conversation="") for one in several], [0] * 6)
    assert whole[0] == pytest.approx(alone[0], rel=1e-6)
    assert float((whole[2] - alone[2]).norm() / alone[2].norm()) < 1e-5
    # the soft prompt, the system message and two conversations: 93 60 61 and 60 61 62, where they part, and behind
    assert whole[1] == 4 + 2 - 1 + 3 + 2 * 11


def test_of_one_conversation_of_other_rows_or_of_other_soft_prompts_nothing_more_is_shared() -> None:
    for several in (talk(), [*talk(""), *talk("a")], [*talk("a"), *talk("b", prompt=1)], []):
        assert share_beginnings(several) == several
    same = [answer((60, 61), (70,), of=of) for of in "ab"]
    assert [one.shared for one in share_beginnings(same)] == [3, 3]  # a token is left to each row
    assert [one.shared for one in share_beginnings([*same, *talk("")])] == [3, 3, 2, 2, 2]


@pytest.mark.parametrize("case", ["falcon_h1", "qwen3_next", "deepseek_v3", "gemma2", "gpt_oss"])
def test_families_of_other_memories_give_the_same(case: str) -> None:
    """States cannot branch: there, each way through the trie is a line of its own."""
    gradients = Gradients(frozen(case), layout="two stages")
    for several in (mixed(None), [*talk("a"), answer(FIRST, (70, 72, 99), of="a")]):
        loss, _, found = gradient(gradients, several, [0] * len(several))
        alone = [replace(one, conversation="") for one in several]
        apart, _, wanted = gradient(gradients, alone, [0] * len(several))
        assert loss == pytest.approx(apart, rel=1e-6)
        assert float((found - wanted).norm() / wanted.norm()) < 1e-5
        scores, greedy = frozen(case).score_and_compare(several, [soft(4)])
        others, same = frozen(case).score_and_compare(alone, [soft(4)])
        torch.testing.assert_close(scores, others, rtol=1e-5, atol=2e-5)
        assert torch.equal(greedy, same)


def test_a_pass_that_does_not_fit_is_repeated_in_smaller_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Down to one answer a row, with the same scores and gradients."""
    lm = FrozenLM(make_model("llama"), make_tokenizer(), name="small", dtype="fp32", device="cpu")
    branches = ((FIRST, (90, 91, 92, 93, 99)), (SECOND, (90, 94, 95, 99)))  # 7 and 9 tokens, 13 as one row
    several, collate = [answer(text, word, of=of) for of in "ab" for text, word in branches], lm.collate
    scores, wanted = lm.score(several, [soft(4)]), gradient(Gradients(lm), several, [0] * 4)

    def full(rows: Sequence[Any], *rest: Any) -> Any:
        if sum(row.length for row in rows) > 9:
            raise torch.OutOfMemoryError
        return collate(rows, *rest)

    monkeypatch.setattr(lm, "collate", full)
    with pytest.warns(SoftPromptWarning, match="smaller|at most"):
        torch.testing.assert_close(lm.score(several, [soft(4)]), scores, rtol=1e-5, atol=1e-5)
    monkeypatch.undo()
    small = gradient(Gradients(lm, layout="two stages", max_tokens=4), several, [0] * 4)
    assert small[0] == pytest.approx(wanted[0], rel=1e-6)
    assert float((small[2] - wanted[2]).norm() / wanted[2].norm()) < 1e-5
