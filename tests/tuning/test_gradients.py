"""Gradients of steps: several soft prompts at once, static shapes, and steps that do not fit into memory. That each way
gives the gradient of one example at a time is in test_frozen.py."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt.data.example import Example
from softprompt.errors import SoftPromptWarning, TrainingError
from softprompt.model.batch import rounded_up
from softprompt.model.fast.blocks import attend_blocks, block_mask
from softprompt.model.fast.graphs import Graphs
from softprompt.model.fast.measured import Gauge, Measuring
from softprompt.model.frozen import FrozenLM
from softprompt.model.request import Request
from softprompt.tasks.task import Task
from softprompt.text.template import Template
from softprompt.text.tokens import SOFT, Tokens
from softprompt.text.verbalizer import Verbalizer
from softprompt.tuning.gradients import Gradients, Layout, Share
from softprompt.tuning.objective import Objective
from softprompt.tuning.training import Training
from tests.conftest import SHARED, make_model, make_tokenizer, tiny, toy, toy_task, train_settings
from tests.graphs import OnCPU
from tests.model.families import soft

TEXTS = ("a stirring film", "dull", "one of the best movies of the year , and a very funny one", "so so")
LABELS = Verbalizer({"good": ("very good", "great", "good"), "bad": ("very bad", "awful"), "so": ("very",)})


def shares(lm: FrozenLM, shift: int = 0) -> tuple[list[Share], list[torch.Tensor]]:
    """Three soft prompts of other lengths, templates, losses and numbers of rows."""
    found, vectors = [], []
    for number, (length, template, labels) in enumerate(
        [
            (7, "Review :{soft_prompt} {input} {target}", True),
            (3, "{soft_prompt}{input} {target}", False),
            (5, "It is{soft_prompt} so {input}{target}", True),
        ]
    ):
        task = Task(lm, Template(template), LABELS, length, 128)
        examples = [
            Example({"input": TEXTS[(i + number + shift) % 4]}, ("good", "bad", "so")[i % 3]) for i in range(2 + number)
        ]
        requests = [task.label_request(e) if labels else task.target_request(e) for e in examples]
        gold = [i % 3 if labels else 0 for i in range(len(examples))]
        found.append(Share(Objective(task.label_of_word if labels else None), requests, gold, (length, 32)))
        vectors.append(soft(length, number).to(lm.device).requires_grad_())
    return found, vectors


def alone(lm: FrozenLM, each: Sequence[Share], vectors: Sequence[torch.Tensor]) -> list[tuple[float, torch.Tensor]]:
    """Loss and gradient of each by concatenation, one row at a time."""
    found = []
    for share, own in zip(each, vectors, strict=True):
        leaf = own.detach().clone().requires_grad_()
        ways = Gradients(lm, layout="concatenation", max_tokens=1)
        loss, _ = ways.backward(share.objective, share.requests, share.gold, leaf)
        assert leaf.grad is not None
        found.append((loss, leaf.grad))
    return found


def check(gradients: Gradients, each: Sequence[Share], vectors: Sequence[torch.Tensor]) -> None:
    expected = alone(gradients.lm, each, vectors)
    losses = gradients.add(gradients.prepare(each), vectors)
    for found, own, (loss, gradient) in zip(losses.tolist(), vectors, expected, strict=True):
        assert found == pytest.approx(loss, rel=1e-5)
        assert own.grad is not None
        assert float((own.grad - gradient).norm() / gradient.norm()) < 1e-5
        own.grad = None


@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize("layout", ["stream", "two stages"])
def test_several_soft_prompts_in_one_pass_have_the_gradients_that_they_have_alone(kind: str, layout: Layout) -> None:
    lm = tiny(kind)
    each, vectors = shares(lm)
    for max_tokens in (4096, 40, 14):  # all in one pass, rows in some, prefixes in some too
        check(Gradients(lm, layout=layout, max_tokens=max_tokens), each, vectors)


def test_other_architectures_train_several_one_after_the_other() -> None:
    lm = tiny("stablelm")
    each, vectors = shares(lm)
    check(Gradients(lm), each, vectors)


def test_kv_prefixes_and_vectors_are_trained_together(llama: FrozenLM) -> None:
    each, vectors = shares(llama)
    numbers = llama.trained.numbers((*each[1].shared,), vectors[1])
    kv = Share(each[1].objective, each[1].requests, each[1].gold, tuple(numbers.shape))
    vectors[1] = numbers.requires_grad_()
    both, other = Gradients(llama), Gradients(llama)
    work = both.prepare([each[0], kv])
    assert work.layout == "two stages"
    losses = both.add(work, vectors[:2])
    found = [own.grad for own in vectors[:2]]
    for number, share in enumerate((each[0], kv)):
        vectors[number].grad = None
        loss, _ = other.backward(share.objective, share.requests, share.gold, vectors[number])
        assert float(losses[number]) == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(found[number], vectors[number].grad, rtol=1e-4, atol=1e-6)


# --- what a GPU is given -------------------------------------------------------------------------------------


def test_the_shapes_of_streams_are_few_and_little_larger() -> None:
    sizes = [rounded_up(n, 128) for n in range(1, 20_000)]
    assert all(size >= n and size % 128 == 0 for n, size in enumerate(sizes, start=1))
    assert all(size <= 1.125 * n for n, size in enumerate(sizes, start=1) if n > 1024)
    assert len(set(sizes)) < 50


def test_padded_streams_of_one_shape_share_a_graph(llama: FrozenLM) -> None:
    """As on a GPU, where a graph is captured for each key: batches of other texts have the same one."""
    gradients = Gradients(llama, layout="stream")
    gradients.fixed = True
    gradients.graphs = OnCPU(record=False)
    for shift in range(4):
        each, vectors = shares(llama, shift)
        check(gradients, each, vectors)
    assert (gradients.graphs.captured, gradients.graphs.replays) == (1, 4)


def talks(seed: int, width: int) -> list[Request]:
    """Eight answers of some conversations, each with all that was said before; of words to choose from if ``width`` is
    above 1."""
    draw, found = random.Random(seed), list[Request]()
    while len(found) < 8:
        said: Tokens = ()
        for turn in range(draw.randint(1, 8 - len(found))):
            said += tuple(draw.choices(range(20, 300), k=draw.randint(1, 4)))
            words = tuple(tuple(draw.choices(range(20, 300), k=draw.randint(1, 3))) for _ in range(width))
            ids = (3, SOFT, 60, *said)
            found.append(Request(ids, 2, words, 0, conversation=f"{seed} {len(found) - turn}"))
            said += words[0]
    return found


@pytest.mark.parametrize(("kind", "width"), [("llama", 1), ("llama", 3), ("gemma3_text-sliding", 1)])
def test_conversations_are_taken_apart_in_padded_streams(kind: str, width: int) -> None:
    """However many answers each has; two soft prompts, one with conversations, the other with single rows."""
    lm = tiny(kind)
    gradients = Gradients(lm)
    gradients.fixed = True
    gradients.graphs = OnCPU(record=False)
    objective = Objective(tuple(range(width)) if width > 1 else None)
    single, vectors = shares(lm)
    for seed in range(4):
        requests = talks(seed, width)
        assert len({request.conversation for request in requests}) < 8
        each = [Share(objective, requests, [seed % width] * 8, (7, 32)), single[1]]
        work = gradients.prepare(each)
        assert work.layout == "stream"
        assert any(len(one.requests) > 1 for _, one in work.rows)
        check(gradients, each, vectors[:2])
    assert gradients.graphs.replays == 4
    assert gradients.graphs.captured < 4


@pytest.mark.parametrize("window", [None, 6])
def test_blocks_are_the_dense_mask(window: int | None) -> None:
    """Two prefixes of 5 and 3 tokens with rows of 4 and 7 behind them, and padding, by PyTorch's own kernel."""
    ends, positions = torch.arange(1, 129), torch.arange(128)
    ends[:9], ends[9:19] = torch.tensor([9] * 5 + [9] * 4), torch.tensor([19] * 3 + [19] * 7)
    positions[:9], positions[9:19] = torch.arange(9), torch.arange(10)
    places = torch.arange(128)
    sees = (places <= places[:, None]) & (places[:, None] < ends)
    if window:
        sees &= positions[:, None] - positions < window
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 128, 16, generator=generator) for heads in (4, 2, 2))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, sees, scale=0.3, enable_gqa=True)
    found = attend_blocks(query, key, value, block_mask(ends, positions, window), 0.3)
    torch.testing.assert_close(found, expected.transpose(1, 2))


def test_a_graph_that_cannot_be_captured_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs, told = Graphs(), []
    on_gpu = torch.zeros(3, device="meta")
    monkeypatch.setattr(type(graphs), "on_gpu", staticmethod(lambda tensor: True))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def capture(*_: Any) -> Any:
        told.append("tried")
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "capture", capture)
    with pytest.warns(SoftPromptWarning, match="could not be captured as a CUDA graph .operation not permitted"):
        assert graphs("shape", lambda tensor: (tensor,), on_gpu) == (on_gpu,)
    assert graphs("shape", lambda tensor: (tensor,), on_gpu) == (on_gpu,)
    assert told == ["tried"]
    assert graphs.captured == 0


# --- memory --------------------------------------------------------------------------------------------------


def small(monkeypatch: pytest.MonkeyPatch, tokens: int) -> list[int]:
    """A device whose memory ends with a pass of more than ``tokens`` tokens; the tokens of the passes that fitted."""
    passes: list[int] = []
    for name in ("score_batch", "score_stream"):
        compute = getattr(FrozenLM, name)

        def limited(self: FrozenLM, batch: Any, *rest: Any, compute: Any = compute) -> torch.Tensor:
            if batch.ids.numel() > tokens and not self.layers.recomputed:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            passes.append(batch.ids.numel())
            scores: torch.Tensor = compute(self, batch, *rest)
            return scores

        monkeypatch.setattr(FrozenLM, name, limited)
    return passes


def test_a_step_that_does_not_fit_is_repeated_in_smaller_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny("llama")
    monkeypatch.setitem(vars(lm), "tokens_at_once", lm.tokens_at_once)
    each, vectors = shares(lm)
    passes = small(monkeypatch, 60)
    with pytest.warns(SoftPromptWarning, match="did not fit into the memory of the device"):
        check(Gradients(lm, layout=None), each, vectors)
    assert 1 < len(passes) <= 9


def test_a_row_that_does_not_fit_is_computed_again_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny("llama")
    monkeypatch.setitem(vars(lm), "tokens_at_once", 1)
    each, vectors = shares(lm)
    small(monkeypatch, 4)
    try:
        with pytest.raises(TrainingError, match="single row does not fit"):
            Gradients(lm, may_recompute=False, layout="two stages").backward(
                each[0].objective, each[0].requests, each[0].gold, vectors[0]
            )
        assert vectors[0].grad is None
        with pytest.warns(SoftPromptWarning, match="activations are computed again"):
            check(Gradients(lm, layout="two stages"), each, vectors)
        assert lm.layers.recomputed
    finally:
        lm.layers.set(recomputed=False)


@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize("layout", ["stream", "two stages"])
def test_activation_checkpointing_changes_no_number(kind: str, layout: Layout) -> None:
    lm = tiny(kind)
    each, vectors = shares(lm)
    gradients, found = Gradients(lm, layout=layout), []
    for recomputed in (False, True):
        lm.layers.set(recomputed=recomputed)
        try:
            losses = gradients.add(gradients.prepare(each), vectors)
        finally:
            lm.layers.set(recomputed=False)
        found.append([losses.tolist(), [own.grad.tolist() for own in vectors if own.grad is not None]])
        for own in vectors:
            own.grad = None
    assert found[0] == found[1]


class Made(Gauge):
    """A device on which each token of a pass takes ``a_token`` bytes, a tenth of it where activations are computed
    again, on top of ``fixed`` ones.

    Attributes:
        seen: tokens of the passes.
    """

    def __init__(self, lm: FrozenLM, seen: list[int], *, a_token: int, fixed: int, free: int) -> None:
        self.lm, self.seen, self.a_token, self.fixed, self.bytes = lm, seen, a_token, fixed, free

    def begin(self) -> None:
        self.first = len(self.seen)

    def raised(self) -> int:
        a_token = self.a_token // 10 if self.lm.layers.recomputed else self.a_token
        return self.fixed + a_token * max(self.seen[self.first :])

    def free(self) -> int:
        return self.bytes


@pytest.mark.parametrize(
    ("start", "free", "tokens", "recomputed"),
    [
        (22, 1_000_000, 780, False),  # the longest row, 41 tokens, took 42,000 bytes: 1,025 a token, of 80 %
        (22, 10**9, 16_384, False),
        (100, 60_000, 0, False),  # less than what was seen to fit
        (22, 45_000, 288, True),  # not even the longest row; computed again, it took 5,100 bytes: 125 a token
    ],
)
def test_the_micro_batch_is_found_from_measured_memory(
    start: int, free: int, tokens: int, recomputed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny("llama")
    monkeypatch.setitem(vars(lm), "tokens_at_once", start)
    each, vectors = shares(lm)
    gradients = Gradients(lm, layout="two stages")
    gauge = Made(lm, small(monkeypatch, 10**6), a_token=1000, fixed=1000, free=free)
    gradients.measuring = Measuring(gauge, may_recompute=True)
    try:
        check(gradients, each, vectors)
        expected = tokens or max(gauge.seen)
        assert max(gauge.seen) > 41 if start > 41 else max(gauge.seen) == 41
        for _ in range(4):
            check(gradients, each, vectors)
        found = gradients.measuring.found
        assert found is not None
        assert (found.tokens, found.recomputed, found.free_bytes) == (expected, recomputed, free)
        assert (lm.tokens_at_once, lm.layers.recomputed) == (expected, recomputed)
        assert gradients.measuring.news() == {"micro_batch": found.as_dict()}
        assert gradients.measuring.news() == {}
    finally:
        lm.layers.set(recomputed=False)


def test_what_was_found_stands_in_the_log_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = FrozenLM(make_model("llama"), make_tokenizer(), name="tiny", dtype="fp32", device="cpu")
    gauge = Made(lm, small(monkeypatch, 10**6), a_token=1000, fixed=0, free=1_000_000)
    monkeypatch.setattr("softprompt.tuning.gradients.Measuring", lambda _, **options: Measuring(gauge, **options))
    data = toy(20, 0)
    training = Training(toy_task(lm, data), data, toy(8, 1), train_settings(steps=4), folder=tmp_path)
    assert training.micro_batch is None
    for _ in training:
        pass
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    told = [line["micro_batch"] for line in lines if "micro_batch" in line]
    expected = {"tokens": 800, "activation_checkpointing": False, "bytes_a_token": 1000, "free_bytes": 1_000_000}
    assert told == [expected]
    assert training.micro_batch is not None
    assert training.micro_batch.as_dict() == expected


def test_nothing_is_decided_where_nothing_can_be_measured() -> None:
    lm = tiny("llama")
    each, vectors = shares(lm)
    gradients = Gradients(lm)
    for _ in range(3):
        check(gradients, each, vectors)
    assert gradients.measuring.found is None
    assert gradients.max_tokens is None


def test_after_a_pass_that_did_not_fit_its_halves_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny("llama")
    monkeypatch.setitem(vars(lm), "tokens_at_once", lm.tokens_at_once)
    each, vectors = shares(lm)
    gauge = Made(lm, small(monkeypatch, 60), a_token=1, fixed=0, free=10**9)
    gradients = Gradients(lm)
    gradients.measuring = Measuring(gauge, may_recompute=True)
    with pytest.warns(SoftPromptWarning, match="did not fit"):
        check(gradients, each, vectors)
    check(gradients, each, vectors)
    assert gradients.measuring.found is None
    assert max(gauge.seen) <= 60


def test_scoring_that_does_not_fit_goes_on_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny("llama")
    monkeypatch.setitem(vars(lm), "tokens_at_once", lm.tokens_at_once)
    each, vectors = shares(lm)
    requests = [*each[0].requests, *each[2].requests]
    expected = lm.score(requests, [vectors[0].detach()])
    small(monkeypatch, 60)
    with pytest.warns(SoftPromptWarning, match="did not fit"):
        found = lm.score(requests, [vectors[0].detach()])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# --- memory of shared passes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 12])
def test_passes_of_several_hold_no_more_tokens_than_the_largest_of_them_alone(
    count: int, llama: FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("softprompt.tuning.gradients.SHARED_TOKENS", 20)
    each, vectors = shares(llama)
    longest = max(
        len(share.shared)
        - 1
        + share.shape[0]
        + sum(len(r.ids) - r.shared + sum(map(len, r.words)) for r in share.requests)
        for share, own in zip(each, vectors, strict=True)
    )
    many = [each[i % 3] for i in range(count)]
    own = [vectors[i % 3].detach().clone().requires_grad_() for i in range(count)]
    held, layer = list[int](), llama.model.model.layers[0]

    def seen(module: Any, given: tuple[torch.Tensor, ...], options: dict[str, Any], found: Any) -> None:
        hidden = given[0] if given else options["hidden_states"]
        if torch.is_grad_enabled() and hidden.requires_grad:
            held.append(hidden.shape[0] * hidden.shape[1])

    gradients = Gradients(llama, layout="two stages")
    hook = layer.register_forward_hook(seen, with_kwargs=True)
    try:
        gradients.add(gradients.prepare(many), own)
    finally:
        hook.remove()
    assert held
    assert max(held) <= longest
    expected = alone(llama, each, vectors)
    for number, one in enumerate(own):
        assert one.grad is not None
        gradient = expected[number % 3][1]
        assert float((one.grad - gradient).norm() / gradient.norm()) < 1e-5
