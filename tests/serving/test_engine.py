"""The engine: one thread, many tasks; what it answers, in which turn, and what it refuses."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from softprompt.errors import ConfigError
from softprompt.generation.decoder import generate
from softprompt.model.frozen import FrozenLM
from softprompt.model.loading import pick_dtype
from softprompt.model.request import Request, Sampling
from softprompt.model.state.prefix import PrefixState
from softprompt.serving.engine import Engine
from softprompt.serving.jobs import Busy, Closed, Event, Failure, FairQueue, Job, Limits, Piece, Scores, Ticket
from softprompt.text.tokens import SOFT
from tests.conftest import ALL, SIZES, make_tokenizer, randomised, tiny
from tests.model.families import frozen, soft
from tests.model.test_frozen import mixed
from tests.servers import slowed

PATIENCE = 60  # seconds that a test waits for an event; reached only where one is lost


class Inbox:
    """Events as they come."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
        self.order: list[int] = []

    def __call__(self, index: int, event: Event) -> None:
        self._queue.put((index, event))

    def get(self) -> tuple[int, Event]:
        return self._queue.get(timeout=PATIENCE)

    def until_done(self, count: int) -> dict[int, list[Event]]:
        """All events of ``count`` jobs by index; ``order`` says which job ended first."""
        events: dict[int, list[Event]] = {}
        while len(self.order) < count:
            index, event = self.get()
            events.setdefault(index, []).append(event)
            if not isinstance(event, Piece) or event.finish:
                self.order.append(index)
        return events

    def empty(self) -> bool:
        return self._queue.empty()


@contextmanager
def running(lm: FrozenLM, **limits: Any) -> Iterator[Engine]:
    engine = Engine(lm, Limits(**limits))
    try:
        yield engine
    finally:
        engine.close()
        assert (engine.running, engine.waiting) == (0, 0)


def job(request: Request, prompts: Sequence[torch.Tensor], sampling: Sampling | None, **options: Any) -> Job:
    vectors = None if request.prompt is None else prompts[request.prompt]
    length = len(request.ids) + (0 if vectors is None else len(vectors) - 1)
    content = "" if vectors is None else str(request.prompt)
    made: dict[str, Any] = {"task": content or "base", "prompt_tokens": length, "vectors": vectors, "content": content}
    return Job(request=request, sampling=sampling, **made | options)


def words(count: int, **options: Any) -> Job:
    """A job of the bare base model that writes ``count`` tokens."""
    return job(Request((60, 61, 62), 1), (), Sampling(max_new_tokens=count), **options)


def text_of(events: Sequence[Event]) -> str:
    assert all(isinstance(event, Piece) for event in events), events
    return "".join(event.text for event in events if isinstance(event, Piece))


def expect_answers_of_one_at_a_time(
    lm: FrozenLM,
    prompts: Sequence[torch.Tensor],
    jobs: Sequence[tuple[Request, Sampling | None, bool]],
    tickets: Sequence[Ticket],
    events: Mapping[int, Sequence[Event]],
) -> None:
    """Each job, a request with how it is answered and whether it is streamed, against ``lm`` with nothing beside it."""
    for index, (request, sampling, stream) in enumerate(jobs):
        found = events[index]
        if sampling is None:
            (scores,) = found
            assert isinstance(scores, Scores)
            expected = lm.score([request], prompts)[0]
            torch.testing.assert_close(torch.tensor(scores.logprobs), expected, rtol=1e-5, atol=1e-5)
            continue
        alone = generate(lm, [request], prompts, sampling)[0]
        last = found[-1]
        assert isinstance(last, Piece)
        assert text_of(found) == alone.text
        assert last.finish == alone.finish
        assert last.count - len(alone.ids) in (0, 1)  # the end-of-sequence token counts
        assert stream or len(found) == 1
        ticket = tickets[index]
        assert ticket.started is not None
        assert ticket.first is not None
        assert ticket.submitted <= ticket.started <= ticket.first


# --- the answers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_mixed_jobs_get_the_answers_of_one_at_a_time(kind: str) -> None:
    """Five soft prompts and the bare base model; greedy and seeded, streamed and whole, and scores, all at once."""
    lm = tiny(kind)
    requests, prompts = mixed(lm)
    plans = [
        (Sampling(max_new_tokens=9), True),
        (Sampling(max_new_tokens=7, temperature=1.2, top_p=0.9, seed=5), False),
        (None, False),
    ]
    jobs = [(r, sampling, stream) for r in requests for sampling, stream in plans]
    with running(lm, rows=7) as engine:
        inbox = Inbox()
        tickets = engine.submit([job(r, prompts, s, stream=stream) for r, s, stream in jobs], inbox)
        events = inbox.until_done(len(jobs))
    expect_answers_of_one_at_a_time(lm, prompts, jobs, tickets, events)


@pytest.mark.parametrize("case", ["llama", "qwen3_5_text", "mamba2"])
def test_a_trained_prefix_is_served_beside_plain_soft_prompts(case: str) -> None:
    lm = tiny(case) if case == "llama" else frozen(case)
    prompts = [soft(4), 0.3 * torch.randn(lm.trained.shape(6), generator=torch.Generator().manual_seed(3))]
    requests = [Request((3, SOFT, 4, 60, 61, 62 + i), 3, ((70,), (71, 72)), i % 2) for i in range(6)]
    sampling = Sampling(max_new_tokens=7)
    with running(lm) as engine:
        inbox = Inbox()
        engine.submit([job(r, prompts, s) for r in requests for s in (sampling, None)], inbox)
        events = inbox.until_done(12)
    for index, request in enumerate(requests):
        assert text_of(events[2 * index]) == generate(lm, [request], prompts, sampling)[0].text
        (scores,) = events[2 * index + 1]
        assert isinstance(scores, Scores)
        torch.testing.assert_close(torch.tensor(scores.logprobs), lm.score([request], prompts)[0], rtol=1e-5, atol=1e-5)


def test_jobs_of_several_threads_are_all_answered(llama: FrozenLM) -> None:
    requests, prompts = mixed(llama)
    expected = [generate(llama, [r], prompts, Sampling(max_new_tokens=5))[0].text for r in requests]
    wrong: list[str] = []

    def client(engine: Engine, start: int) -> None:
        for turn in range(6):
            index = (start + turn) % len(requests)
            inbox = Inbox()
            engine.submit([job(requests[index], prompts, Sampling(max_new_tokens=5), stream=True)], inbox)
            text = text_of(inbox.until_done(1)[0])
            if text != expected[index]:
                wrong.append(text)

    with running(llama, rows=4) as engine:
        threads = [threading.Thread(target=client, args=(engine, start)) for start in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
    assert wrong == []


def test_a_soft_prompt_that_is_loaded_again_never_mixes_with_the_old_one(llama: FrozenLM) -> None:
    """Two contents under one name, taking turns while rows of both are in the same pass."""
    request = Request((SOFT, 60, 61, 62), 1, ((70,), (71, 72)), 0)
    versions = [soft(6, seed=seed) for seed in (1, 2)]
    sampling = Sampling(max_new_tokens=8)
    expected = [generate(llama, [request], [vectors], sampling)[0].text for vectors in versions]
    scores = [llama.score([request], [vectors])[0] for vectors in versions]
    assert expected[0] != expected[1]
    jobs = [
        job(request, [versions[i % 2]], sampling if i % 3 else None, task="same", content=f"content {i % 2}")
        for i in range(24)
    ]
    with running(llama, rows=5, prefix_bytes=12_000) as engine:  # room for one of the two prefixes
        inbox = Inbox()
        engine.submit(jobs, inbox)
        events = inbox.until_done(len(jobs))
        assert engine.prefixes.nbytes <= 12_000
    for index, found in events.items():
        if index % 3:
            assert text_of(found) == expected[index % 2]
        else:
            assert isinstance(found[0], Scores)
            torch.testing.assert_close(torch.tensor(found[0].logprobs), scores[index % 2], rtol=1e-5, atol=1e-5)


def test_a_prefix_is_computed_once(llama: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[tuple[int, ...]] = []
    whole = llama.prefix_kv

    def watched(ids: Sequence[int], vectors: torch.Tensor | None) -> PrefixState:
        computed.append(tuple(ids))
        return whole(ids, vectors)

    monkeypatch.setattr(llama, "prefix_kv", watched)
    request = Request((SOFT, 5, 60, 61), 2, ((70,),), 0)
    with running(llama) as engine:
        inbox = Inbox()
        tickets = engine.submit([job(request, [soft(6)], Sampling(max_new_tokens=2))] * 3, inbox)
        inbox.until_done(3)
        tickets += engine.submit([job(request, [soft(6)], None)] * 2, inbox)
        inbox.until_done(5)
        assert computed == [(SOFT, 5)]
        assert (engine.prefixes.queries, engine.prefixes.count) == (7 * 4, 1)  # the scores shared one look
        assert engine.prefixes.hits == 7 * 3
    assert [ticket.cached for ticket in tickets] == [0, 7, 7, 7, 7]


# --- turns and limits --------------------------------------------------------------------------------------


def test_tasks_that_wait_take_turns(llama: FrozenLM) -> None:
    """One row at a time: six jobs of one task, then two of others, which do not wait for all six."""
    with slowed(llama), running(llama, rows=1) as engine:
        inbox = Inbox()
        engine.submit([words(10, task="first"), *[words(1, task=task) for task in "aaaaaabc"]], inbox)
        inbox.until_done(9)
    assert inbox.order == [0, 1, 7, 8, 2, 3, 4, 5, 6]


@settings(deadline=None)
@given(st.lists(st.one_of(st.sampled_from("abcd"), st.none(), st.integers(0, 9))))
def test_the_queue_takes_turns_and_keeps_each_tasks_order(steps: list[str | int | None]) -> None:
    """Against a list: who has waited for the most turns of others is next."""
    line = FairQueue()
    waiting: list[Ticket] = []
    served: dict[str, int] = {}
    for clock, step in enumerate(steps):
        if isinstance(step, str):
            ticket = Ticket(words(1, task=step), lambda event: None)
            if step not in {t.job.task for t in waiting}:
                served[step] = clock  # a task that had no line stands behind the others
            waiting.append(ticket)
            line.push(ticket)
        elif isinstance(step, int):
            line.sift(lambda ticket, step=step: id(ticket) % 10 != step)  # type: ignore[misc]
            waiting = [ticket for ticket in waiting if id(ticket) % 10 != step]
        elif waiting:
            task = min({t.job.task for t in waiting}, key=served.__getitem__)
            expected = next(t for t in waiting if t.job.task == task)
            assert line.first() is expected
            assert line.pop() is expected
            waiting.remove(expected)
            served[task] = clock
        assert len(line) == len(waiting)
    assert (line.first() is None) == (not waiting)


def test_no_more_rows_run_than_may_and_none_is_overtaken(llama: FrozenLM) -> None:
    """A long row waits until it fits beside the others; short ones behind it wait with it."""
    counts = [20, 20, 100, 1, 20, 20]  # and three tokens of input each
    most = 0
    whole = llama.next_logits

    with running(llama, rows=4, tokens=120) as engine:

        def watched(*arguments: Any) -> torch.Tensor:
            nonlocal most
            rooms = [ticket.room for ticket in engine._rows.values()]
            most = max(most, len(rooms) * max(rooms) if len(rooms) > 1 else 0)
            return whole(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(llama, "next_logits", watched)
            inbox = Inbox()
            engine.submit([words(count, task=str(i)) for i, count in enumerate(counts)], inbox)
            inbox.until_done(len(counts))
    assert most == 3 * 23
    assert inbox.order[:3] == [0, 1, 2]
    assert engine.limits.window(llama) == 120


def test_more_than_may_wait_are_refused_all_together(llama: FrozenLM) -> None:
    with slowed(llama), running(llama, rows=1, waiting=3) as engine:
        inbox = Inbox()
        engine.submit([words(30)], inbox)
        while not engine.running:
            time.sleep(0.001)
        engine.submit([words(1)] * 2, inbox)
        with pytest.raises(Busy) as error:
            engine.submit([words(1)] * 2, inbox)
        assert str(error.value) == "2 requests wait already, of 3 that may; try again in a moment."
        assert engine.waiting == 2
        inbox.until_done(3)


def test_a_cancelled_job_frees_its_row_and_says_nothing_more(llama: FrozenLM) -> None:
    with slowed(llama), running(llama, rows=1) as engine:
        inbox, other = Inbox(), Inbox()
        (ticket,) = engine.submit([words(100, stream=True)], inbox)
        assert isinstance(inbox.get()[1], Piece)  # it has begun
        waiting = engine.submit([words(3), words(4), words(5)], other)
        waiting[1].cancel()
        ticket.cancel()
        other.until_done(2)
        assert other.order == [0, 2]
        while not inbox.empty():
            event = inbox.get()[1]
            assert isinstance(event, Piece)
            assert not event.finish
        assert ticket.cancelled


@pytest.mark.parametrize("starts", [True, False])
def test_a_job_that_takes_too_long_is_ended(llama: FrozenLM, starts: bool) -> None:
    with slowed(llama, 0.05), running(llama, rows=1, seconds=0.4) as engine:
        inbox = Inbox()
        engine.submit([words(100)] if starts else [words(100, task="a"), words(100, task="b")], inbox)
        events = inbox.until_done(1 if starts else 2)
        sentence = "The request took longer than 0.4 s; ask for less, or try again later."
        assert list(events.values())[-1] == [Failure("timeout", sentence)]
        inbox = Inbox()
        engine.submit([words(1)], inbox)
        assert text_of(inbox.until_done(1)[0])


def test_closing_finishes_what_was_taken_and_refuses_the_rest(llama: FrozenLM) -> None:
    with slowed(llama):
        engine = Engine(llama, Limits(rows=2))
        inbox = Inbox()
        engine.submit([words(20, task=str(i)) for i in range(5)], inbox)
        assert engine.alive
        engine.close()
    assert not engine.alive
    assert len(inbox.until_done(5)) == 5
    assert inbox.empty()
    with pytest.raises(Closed) as error:
        engine.submit([words(1)], inbox)
    assert str(error.value) == "The server is shutting down; send the request to another one."


def test_a_pass_that_fails_harms_only_the_rows_in_it(llama: FrozenLM, caplog: pytest.LogCaptureFixture) -> None:
    failure = [Failure("error", "The server failed to compute the answer; its log says why.")]
    whole = llama.next_logits
    broken = True

    def fails(*arguments: Any) -> torch.Tensor:
        if broken:
            raise RuntimeError("out of memory")
        return whole(*arguments)

    with pytest.MonkeyPatch.context() as patch, running(llama) as engine:
        patch.setattr(llama, "next_logits", fails)
        inbox = Inbox()
        engine.submit([words(3), words(4)], inbox)
        assert inbox.until_done(2) == {0: failure, 1: failure}
        broken = False
        inbox = Inbox()
        engine.submit([words(3), job(Request((60,), 0, ((70,),)), (), None)], inbox)
        assert text_of(inbox.until_done(2)[0])
    assert "out of memory" in caplog.text


@pytest.mark.parametrize("sampling", [Sampling(max_new_tokens=2), None])
def test_a_job_that_cannot_begin_fails_alone(llama: FrozenLM, sampling: Sampling | None) -> None:
    """Vectors of another width."""
    request = Request((SOFT, 60, 61), 1, ((70,),), 0)
    with running(llama) as engine:
        inbox = Inbox()
        engine.submit([job(request, [torch.zeros(3, 5)], sampling)], inbox)
        assert inbox.until_done(1) == {
            0: [Failure("error", "The server failed to compute the answer; its log says why.")]
        }
        inbox = Inbox()
        engine.submit([words(2)], inbox)
        assert text_of(inbox.until_done(1)[0])


@pytest.mark.parametrize("sampling", [Sampling(max_new_tokens=2), None])
def test_scores_that_are_not_numbers_are_an_error(llama: FrozenLM, sampling: Sampling | None) -> None:
    request = Request((SOFT, 60, 61), 1, ((70,),), 0)
    with running(llama) as engine:
        inbox = Inbox()
        engine.submit([job(request, [torch.full((3, 32), torch.nan)], sampling), words(2)], inbox)
        events = inbox.until_done(2)
    sentence = "The base model's scores are not numbers in torch.float32; serve it with --dtype fp32."
    assert events[0] == [Failure("error", sentence)]
    assert text_of(events[1])


def test_a_client_that_cannot_be_told_is_forgotten(llama: FrozenLM) -> None:
    def gone(index: int, event: Event) -> None:
        raise RuntimeError("the event loop is closed")

    with slowed(llama), running(llama) as engine:
        (ticket,) = engine.submit([words(100, stream=True)], gone)
        inbox = Inbox()
        engine.submit([words(20)], inbox)
        assert text_of(inbox.until_done(1)[0])
        assert ticket.cancelled


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"rows": 0}, "The server's limit on rows must be at least 1, not 0."),
        ({"tokens": 0}, "The server's limit on tokens must be at least 1, not 0."),
        ({"waiting": -1}, "The server's limit on waiting must be at least 1, not -1."),
        ({"seconds": 0.0}, "The server's limit on seconds must be above 0, not 0.0."),
        ({"prefix_bytes": -1}, "The server's limit on prefix_bytes must be 0 or more, not -1."),
    ],
)
def test_limits_are_checked(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        Limits(**options)
    assert str(error.value) == sentence


@pytest.mark.skipif(
    pick_dtype("auto", torch.device("cpu")) != torch.bfloat16 or torch.cpu._is_amx_tile_supported(),
    reason="measured on processors with AVX512-BF16 and without AMX, whose kernels are others",
)
def test_in_bf16_an_answer_is_the_same_in_any_company() -> None:
    """To the last bit of its log-probabilities: alone, beside one other, and beside all."""
    config = AutoConfig.for_model(
        "llama", **SIZES | {"hidden_size": 128, "intermediate_size": 2048, "num_attention_heads": 2}
    )
    config.num_key_value_heads, config.max_position_embeddings = 1, 700
    torch.manual_seed(5)
    models: Any = AutoModelForCausalLM
    lm = FrozenLM(models.from_config(config), make_tokenizer(), name="wide", dtype="bf16", device="cpu")
    randomised(lm.model, 0.1)
    generator = torch.Generator().manual_seed(0)
    prompts = [0.3 * torch.randn(length, 128, generator=generator) for length in (50, 90)]
    jobs = []
    for number, length in enumerate((*(1, 2, 3, 2) * 20, 7, 30, 33, 70, 150, 230, 300)):
        ids = tuple(torch.randint(2, 320, (length,), generator=generator).tolist())
        prompt = (None, 0, 1)[number % 3]
        request = Request(ids, 0) if prompt is None else Request((SOFT, *ids), 1, (), prompt)
        jobs.append(job(request, prompts, Sampling(max_new_tokens=4), top_logprobs=2))

    def answers(engine: Engine, together: Sequence[Job]) -> list[Any]:
        inbox = Inbox()
        engine.submit(together, inbox)
        events = inbox.until_done(len(together))
        return [events[index] for index in range(len(together))]

    with running(lm) as engine:
        alone = [answers(engine, [one])[0] for one in jobs]
        assert answers(engine, jobs) == alone
        for one, other in pairwise(range(75, len(jobs))):
            assert answers(engine, [jobs[one], jobs[other]]) == [alone[one], alone[other]]


def test_a_seeded_job_draws_alike_in_any_company(llama: FrozenLM) -> None:
    requests, prompts = mixed(llama)
    sampling = Sampling(max_new_tokens=8, temperature=1.5, seed=3)
    texts: list[str] = []
    for company in (0, 5):
        with running(llama) as engine:
            inbox = Inbox()
            jobs = [job(requests[0], prompts, sampling)]
            jobs += [job(r, prompts, replace(sampling, seed=9)) for r in requests[1 : 1 + company]]
            engine.submit(jobs, inbox)
            texts.append(text_of(inbox.until_done(len(jobs))[0]))
    assert texts[0] == texts[1] == generate(llama, requests[:1], prompts, sampling)[0].text
