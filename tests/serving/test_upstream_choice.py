"""Which of several vLLM servers is asked, and what happens where one does not answer."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
import torch

from softprompt.model.request import Request, Sampling
from softprompt.serving import upstream as upstream_module
from softprompt.text.tokens import SOFT
from tests.fake_vllm import fake_vllm
from tests.servers import make_lm, serving
from tests.serving import test_upstream
from tests.serving.test_engine import Inbox, job
from tests.serving.test_upstream import failure, until, upstreams, write

store = test_upstream.store
NONE = "No upstream server answers; try again in a moment."


def test_a_soft_prompt_stays_with_its_server_and_the_base_model_goes_where_there_is_least_to_do() -> None:
    requests = [Request((SOFT, 60, 61 + number), 1, (), 0) for number in range(40)]
    prompts = [torch.randn(3, 32)]
    with fake_vllm() as one, fake_vllm() as other, upstreams(make_lm(), [one.url, other.url]) as engine:
        places: dict[int, bool] = {}
        for number in range(20):
            for turn in range(2):
                before = len(one.written), len(other.written)
                inbox = Inbox()
                jobs = [job(requests[turn], prompts, Sampling(max_new_tokens=1), content=str(number))]
                engine.submit(jobs, inbox)
                inbox.until_done(1)
                place = len(one.written) > before[0]
                assert places.setdefault(number, place) == place
        assert set(places.values()) == {True, False}  # all of 20 at one: 2 in a million
        one.seconds = other.seconds = 0.2
        one.bodies.clear()
        other.bodies.clear()
        inbox = Inbox()
        engine.submit([job(Request((60, 61), 0), (), Sampling(max_new_tokens=1))] * 6, inbox)
        inbox.until_done(6)
        assert (len(one.written), len(other.written)) == (3, 3)


def test_a_soft_prompts_server_that_is_full_is_helped_out() -> None:
    with fake_vllm(seconds=0.1) as one, fake_vllm(seconds=0.1) as other:
        with upstreams(make_lm(), [one.url, other.url], rows=2) as engine:
            inbox = Inbox()
            same = job(Request((SOFT, 60), 1, (), 0), [torch.randn(3, 32)], Sampling(max_new_tokens=2))
            engine.submit([same] * 8, inbox)
            inbox.until_done(8)
        assert (len(one.written), len(other.written)) == (4, 4)
        assert max(one.most_active, other.most_active) == 2


def test_the_next_server_is_asked_where_one_does_not_answer(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    with fake_vllm() as one, fake_vllm() as other, serving(store, upstreams=[one.url, other.url]) as running:
        expected = write(running).json()["choices"]
        (first, second) = (one, other) if one.written else (other, one)
        assert not second.written
        first.mode = "503"
        assert write(running).json()["choices"] == expected
        assert len(second.written) == 1
        first.mode = ""
        until(lambda: all(upstream.alive for upstream in running.engine._servers))
        first.stop()
        assert write(running).json()["choices"] == expected
        assert running.http.get("/health").status_code == 200
        second.stop()
        assert failure(write(running)) == (503, "no_upstream", NONE)
        assert write(running).headers["retry-after"] == "1"
        assert failure(running.http.get("/health")) == (503, "no_upstream", NONE)
        assert failure(write(running, stream=True)) == (503, "no_upstream", NONE)
    assert f"The upstream {first.url} takes no requests now (503)." in caplog.messages
    assert f"The upstream {first.url} does not answer: All connection attempts failed." in caplog.messages


def test_a_server_that_comes_later_is_found(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_module, "LOOK_SECONDS", 0.05)
    with fake_vllm() as gone:
        gone.stop()
    port = httpx.URL(gone.url).port or 0
    with serving(store, upstreams=[gone.url]) as running:
        assert failure(running.http.get("/health")) == (503, "no_upstream", NONE)
        assert running.http.get("/v1/models").status_code == 200
        with fake_vllm(port=port):
            until(lambda: running.http.get("/health").status_code == 200)
            assert write(running).status_code == 200
        until(lambda: running.http.get("/health").status_code == 503)
