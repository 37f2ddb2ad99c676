"""Serving through vLLM, against servers that speak as vLLM does and compute with transformers: the same answers as
here, and what becomes of a request when a server fails."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from softprompt.cli.main import main
from softprompt.data.example import Example
from softprompt.errors import ConfigError
from softprompt.generation.decoder import generate
from softprompt.model.batch import build_trie
from softprompt.model.embedder import Embedder
from softprompt.model.frozen import FrozenLM
from softprompt.model.request import Request, Sampling
from softprompt.serving import vllm
from softprompt.serving.jobs import Closed, Limits, Scores
from softprompt.serving.upstream import Upstreams
from softprompt.serving.vllm import Unreachable, Vllm
from softprompt.soft_prompts.store import Store
from softprompt.tasks.task import Task
from softprompt.text.tokens import SOFT
from tests.conftest import SIZES, make_model, tiny
from tests.fake_vllm import Fake, fake_vllm
from tests.model.test_frozen import mixed
from tests.servers import Running, fill, make_lm, serving, soft_prompt
from tests.serving import test_server, test_server_labels
from tests.serving.test_engine import Inbox, expect_answers_of_one_at_a_time, job

LEFT_OUT = {
    "test_a_stream_tells_its_usage_if_asked",
    "test_a_label_is_drawn_as_often_as_temperature_and_nucleus_say",
}
# The API's own tests once more, with this module's server; but the cache is not the engine's, and hundreds of draws
# would be as many requests.
globals().update(
    {
        name: test
        for module in (test_server, test_server_labels)
        for name, test in vars(module).items()
        if name.startswith("test_") and name not in LEFT_OUT
    }
)
grades = test_server_labels.grades
TEXT = test_server.TEXT
BROKEN = "An upstream server broke off in the middle of the answer; try again."
NOT_UNDERSTOOD = "An upstream server answered what is not understood; this server's log says what."


@pytest.fixture(scope="module")
def fake() -> Iterator[Fake]:
    with fake_vllm() as fake:
        yield fake


@pytest.fixture(scope="module")
def server(fake: Fake, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("store"), limits=Limits(rows=6, waiting=128), upstreams=[fake.url]) as running:
        yield running


@pytest.fixture(autouse=True)
def well(fake: Fake) -> Iterator[None]:
    yield
    fake.mode, fake.seconds, fake.per_chunk = "", 0.0, 1
    fake.bodies.clear()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    fill(Store(tmp_path / "store"), make_lm())
    return tmp_path / "store"


@contextmanager
def upstreams(lm: Embedder, urls: Sequence[str], **limits: Any) -> Iterator[Upstreams]:
    engine = Upstreams(lm, urls, Limits(**limits))
    try:
        yield engine
    finally:
        engine.close()
        assert (engine.running, engine.waiting) == (0, 0)


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def failure(answer: httpx.Response) -> tuple[int, str, str]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["message"]


def write(running: Running, **more: Any) -> httpx.Response:
    return running.http.post("/v1/completions", json={"model": "write", "prompt": TEXT, "max_tokens": 6, **more})


# --- the same answers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "stablelm"])
def test_mixed_jobs_get_the_answers_of_one_at_a_time(kind: str) -> None:
    """Five soft prompts and the bare base model at two servers; greedy and seeded, streamed and whole, and scores."""
    lm, own = tiny(kind), Embedder.of(tiny(kind), own_table=True)
    requests, prompts = mixed(lm)
    plans = [
        (Sampling(max_new_tokens=9), True),
        (Sampling(max_new_tokens=7, temperature=1.2, seed=5), False),
        (None, False),
    ]
    jobs = [(r, sampling, stream) for r in requests for sampling, stream in plans]
    with (
        fake_vllm(make_model(kind).eval(), per_chunk=2) as one,
        fake_vllm(make_model(kind).eval()) as other,
        upstreams(own, [one.url, other.url], rows=4) as engine,
    ):
        inbox = Inbox()
        tickets = engine.submit([job(r, prompts, s, stream=stream) for r, s, stream in jobs], inbox)
        events = inbox.until_done(len(jobs))
        assert one.bodies
        assert other.bodies
    expect_answers_of_one_at_a_time(lm, prompts, jobs, tickets, events)


def test_a_word_that_is_the_start_of_others_is_scored_at_each_node(fake: Fake) -> None:
    lm = tiny("llama")
    words = ((70,), (70, 71), (70, 71, 72), (70, 73), (74, 75), *((80 + i,) for i in range(200)))
    request = Request((3, SOFT, 60, 61), 2, words, 0)
    vectors = 0.2 * torch.randn(5, lm.hidden_size, generator=torch.Generator().manual_seed(1))
    with upstreams(make_lm(), [fake.url]) as engine:
        asked = len(fake.bodies)
        inbox = Inbox()
        engine.submit([job(request, [vectors], None)], inbox)
        (scores,) = inbox.until_done(1)[0]
    assert isinstance(scores, Scores)
    torch.testing.assert_close(torch.tensor(scores.logprobs), lm.score([request], [vectors])[0], rtol=1e-5, atol=1e-5)
    assert len(fake.bodies) - asked == 2 + 1 + 1 + 1  # 202 tokens at the root, and three nodes
    assert max(len(body["logprob_token_ids"]) for body in fake.bodies) <= 128


def test_what_is_sent(server: Running, fake: Fake) -> None:
    fake.bodies.clear()
    write(server, temperature=0.5, top_p=1, seed=7, stop=["never"], n=2, logprobs=3)
    server.post("/v1/completions", {"model": "tiny", "prompt": [60, 61], "max_tokens": 3})
    server.post("/v1/classify", {"model": "film", "input": TEXT})
    both = [body for body in fake.written if body["max_tokens"] == 6]
    (bare,) = (body for body in fake.written if body["max_tokens"] == 3)
    labels = [body for body in fake.bodies if not body.get("stream")]
    assert {body["seed"] for body in both} == {7, 8}
    for body in both:
        assert "prompt" not in body
        assert "stop" not in body  # text is made on our side
        assert (body["temperature"], body["top_p"], body["logprobs"]) == (0.5, 1.0, 3)
        assert body["stop_token_ids"] == [1]
    assert bare["prompt"] == [60, 61]
    task, _ = test_server.task_of(server, "film")
    assert len(labels) == 1 + len(build_trie(task.words).tokens)
    assert {body["max_tokens"] for body in labels} == {1}


def test_the_most_probable_tokens_are_told_whatever_else_runs(server: Running, fake: Fake) -> None:
    """A vLLM server that scores tokens by id loses the others' most probable tokens of that pass, as the fake does."""
    body = {"model": "write", "prompt": TEXT, "max_tokens": 12, "logprobs": 5}
    label = {"model": ["sst2", "film"], "input": [TEXT, "dull"]}
    expected = server.post("/v1/completions", body)["choices"]
    probabilities = [entry["probabilities"] for entry in server.post("/v1/classify", label)["data"]]
    fake.seconds = 0.01
    fake.bodies.clear()
    with ThreadPoolExecutor(4) as pool:
        jobs = [("/v1/completions", body) if turn % 4 == 2 else ("/v1/classify", label) for turn in range(16)]
        answers = [pool.submit(server.post, *job) for job in jobs]
        written, labelled = answers[2::4], [answer for turn, answer in enumerate(answers) if turn % 4 != 2]
        assert [answer.result()["choices"] for answer in written] == [expected] * 4
        for answer in labelled:
            found = [entry["probabilities"] for entry in answer.result()["data"]]
            assert all(one == pytest.approx(other, abs=1e-6) for one, other in zip(found, probabilities, strict=True))
    ways = [name for body in fake.bodies for name in ("logprob_token_ids", "allowed_token_ids") if name in body]
    assert set(ways) == {"logprob_token_ids", "allowed_token_ids"}


def test_usage_tells_what_the_server_had_cached(server: Running) -> None:
    answer = write(server).json()
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}
    stream = server.stream(
        "/v1/completions",
        {"model": "write", "prompt": TEXT, "max_tokens": 3, "stream_options": {"include_usage": True}},
    )
    assert stream[-1]["usage"] == {
        **answer["usage"],
        "completion_tokens": 3,
        "total_tokens": answer["usage"]["prompt_tokens"] + 3,
    }
    metrics = server.http.get("/metrics").text
    counted = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#"))
    assert float(counted['softprompt:prefix_cache_hits_total{model_name="tiny"}']) >= 8
    assert float(counted['softprompt:num_requests_running{model_name="tiny"}']) == 0
    assert float(counted['softprompt:prefix_cache_bytes{model_name="tiny"}']) == 0


# --- what fails ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "status", "code", "sentence"),
    [
        ("500", 502, "upstream", "An upstream server refused or failed the request (500); this server's log says why."),
        ("400", 502, "upstream", "An upstream server refused or failed the request (400); this server's log says why."),
        ("hang up", 502, "upstream", BROKEN),
        ("short", 502, "upstream", BROKEN),
        ("error", 502, "upstream", NOT_UNDERSTOOD),
        ("noise", 502, "upstream", NOT_UNDERSTOOD),
    ],
)
def test_a_server_that_fails_is_one_sentence(
    server: Running, fake: Fake, mode: str, status: int, code: str, sentence: str
) -> None:
    expected = write(server).json()["choices"]
    fake.mode = mode
    assert failure(write(server)) == (status, code, sentence)
    with server.http.stream("POST", "/v1/completions", json={"model": "write", "prompt": TEXT, "stream": True}) as told:
        lines = [line for line in told.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert sentence in lines[-2]
    if mode in ("500", "400"):
        answer = server.http.post("/v1/classify", json={"model": "sst2", "input": TEXT})
        assert failure(answer) == (status, code, sentence)
    fake.mode = ""
    assert write(server).json()["choices"] == expected
    server.settle()
    assert f'request_success_total{{finished_reason="{code}",model_name="write"}}' in server.http.get("/metrics").text


def test_the_time_limit_holds_for_who_waits_and_for_who_is_answered(store: Path) -> None:
    sentence = "The request took longer than 0.4 s; ask for less, or try again later."
    with (
        fake_vllm(seconds=0.15) as slow,
        serving(store, upstreams=[slow.url], limits=Limits(rows=1, seconds=0.4)) as running,
    ):
        with ThreadPoolExecutor(3) as pool:
            answers = list(pool.map(lambda _: write(running), range(3)))
        assert [failure(answer) for answer in answers] == [(504, "timeout", sentence)] * 3
        running.settle()
        until(lambda: slow.active == 0)
        assert slow.dropped == len(slow.written) >= 1


def test_more_than_may_wait_are_refused(store: Path) -> None:
    limits = Limits(rows=1, waiting=2)
    with fake_vllm(seconds=0.05) as slow, serving(store, upstreams=[slow.url], limits=limits) as running:
        with ThreadPoolExecutor(3) as pool:
            first = pool.submit(write, running)
            until(lambda: running.engine.running == 1)
            others = [pool.submit(write, running) for _ in range(2)]
            until(lambda: running.engine.waiting == 2)
            refused = "2 requests wait already, of 2 that may; try again in a moment."
            assert failure(write(running)) == (503, "overloaded", refused)
            assert [answer.result().status_code for answer in (first, *others)] == [200, 200, 200]
        assert slow.most_active == 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_request_at_the_server(server: Running, fake: Fake, stream: bool) -> None:
    fake.seconds = 0.02
    dropped = fake.dropped
    body = {"model": "write", "prompt": TEXT, "max_tokens": 100, "stream": stream}
    with httpx.Client(base_url=server.url) as client:
        if stream:
            with client.stream("POST", "/v1/completions", json=body) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json=body, timeout=0.2)
    until(lambda: fake.active == 0)
    server.settle()
    assert fake.dropped == dropped + 1


def test_a_stop_string_ends_the_request_at_the_server(server: Running, fake: Fake) -> None:
    whole = write(server, max_tokens=30).json()["choices"][0]["text"]
    dropped = fake.dropped
    fake.seconds = 0.02
    assert write(server, max_tokens=30, stop=whole[3:5]).json()["choices"][0]["text"] == whole[: whole.find(whole[3:5])]
    until(lambda: fake.dropped == dropped + 1)


def test_closing_finishes_what_has_begun(store: Path) -> None:
    limits = Limits(rows=1)
    with (
        fake_vllm(seconds=0.02) as slow,
        serving(store, upstreams=[slow.url], limits=limits) as running,
        ThreadPoolExecutor(3) as pool,
    ):
        answers = [pool.submit(write, running) for _ in range(2)]
        until(lambda: running.engine.running and running.engine.waiting)
        running.stop()
        assert [answer.result().status_code for answer in answers] == [200, 200]
    with pytest.raises(Closed, match="shutting down"):
        running.engine.submit([], Inbox())


def test_what_cannot_be_used_is_refused_at_the_start(fake: Fake, tmp_path: Path) -> None:
    def sentence(url: str) -> str:
        with pytest.raises(ConfigError) as caught:
            Upstreams(make_lm(), [fake.url, url])
        return str(caught.value)

    models: Any = AutoModelForCausalLM
    other = make_model("llama").eval()
    wider = models.from_config(AutoConfig.for_model("llama", **SIZES | {"hidden_size": 48})).eval()
    with torch.no_grad():
        other.get_input_embeddings().weight.copy_(torch.randn(320, 32))
    refuses = (
        "Expected a vLLM server with --enable-prompt-embeds and this base model at {0}, found one that refuses our "
    )
    with fake_vllm(other) as foreign:
        assert sentence(foreign.url) == (
            f"Expected the base model tiny at {foreign.url}, found base, whose token embeddings are others; start vLLM "
            f"with the same model, or give it as --base."
        )
    with fake_vllm(wider) as foreign:
        reason = "`prompt_embeds` hidden_size does not match the model's hidden_size"
        assert sentence(foreign.url) == f"{refuses.format(foreign.url)}sequences: {reason}; see its log."
    with fake_vllm(takes_embeds=False) as plain:
        reason = "You must set `--enable-prompt-embeds` to input `prompt_embeds`"
        assert sentence(plain.url) == f"{refuses.format(plain.url)}sequences: {reason}; see its log."
    with fake_vllm(key="sesame") as locked:
        assert sentence(locked.url) == (
            f"Expected an upstream that takes our key, found {locked.url}, which answers 401; give its key with "
            f"--upstream-api-key."
        )
        Upstreams(make_lm(), [locked.url + "/v1/"], api_key="sesame").close()
    with serving(tmp_path / "no-vllm") as ours:  # it has no /health of base models alone, but lists models
        assert "refuses our sequences" in sentence(ours.url)


def test_a_server_that_is_too_slow_to_be_checked_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    async def slow(*_: Any) -> None:
        await asyncio.sleep(60)

    async def look(url: str) -> None:
        server = Vllm(url, make_lm())
        try:
            await server.look()
        finally:
            assert not server.alive
            await server.close()

    monkeypatch.setattr(vllm, "CHECK_SECONDS", 0.05)
    monkeypatch.setattr(Vllm, "next_logprobs", slow)
    with fake_vllm() as there:
        with pytest.raises(Unreachable) as error:
            asyncio.run(look(there.url))
        assert str(error.value) == f"The upstream {there.url} does not answer in time."


def test_a_token_that_is_wanted_twice_is_told_once(fake: Fake) -> None:
    async def ask() -> dict[int, float]:
        server = Vllm(fake.url, make_lm())
        try:
            await server.look()
            found, _ = await asyncio.wait_for(server.next_logprobs([3, 60], None, [5, 7, 5, 5, 9]), 20)
        finally:
            await server.close()
        return found

    with torch.no_grad():
        logits = make_model("llama").eval()(torch.tensor([[3, 60]])).logits[0, -1]
    expected = {token: float(logits.log_softmax(dim=-1)[token]) for token in (5, 7, 9)}
    assert asyncio.run(ask()) == pytest.approx(expected, abs=1e-5)


def test_the_window_is_the_smallest_of_all() -> None:
    with fake_vllm(window=100) as one, fake_vllm(window=None) as other:
        with upstreams(make_lm(), [one.url, other.url]) as engine:
            assert engine.window == 100
        with upstreams(make_lm(), [other.url]) as engine:
            assert engine.window == 128


# --- which soft prompts --------------------------------------------------------------------------------------


def test_a_prefix_that_does_not_fill_the_blocks_is_told_when_it_is_loaded(
    server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    lm, store, before = make_lm(), server.catalog.store, "Review :"
    literal = len(lm.tokenizer(before).input_ids)
    for name, template, length in (
        ("fits", f"{before}{{soft_prompt}}{{input}} {{target}}", 32 - literal),
        ("short", "{soft_prompt}{input} {target}", 15),
        ("long", f"{{soft_prompt}}{before}{{input}} {{target}}", 33),
        ("behind", "{input}{soft_prompt} {target}", 16),
    ):
        path = store.home.parent / f"{name}.safetensors"
        soft_prompt(lm, name, template, length=length).save(path)
        server.catalog.load(name, path)
        server.catalog.unload(name)
    rest = (33 + literal) % 16
    assert caplog.messages == [
        "short: of the 15 tokens that its requests begin with, vLLM's cache of blocks of 16 holds 0, and 15 are "
        "computed each time; a soft prompt of 16 virtual tokens would fill its blocks",
        f"long: of the {33 + literal} tokens that its requests begin with, vLLM's cache of blocks of 16 holds 32, "
        f"and {rest} are computed each time; a soft prompt of {33 - rest} or {49 - rest} virtual tokens would fill its "
        f"blocks",
        "behind: the soft prompt stands behind input text, where vLLM's cache seldom holds it",
    ]


def test_a_trained_kv_prefix_is_refused(server: Running) -> None:
    lm, path = make_lm(), server.catalog.store.home.parent / "kv.safetensors"
    made = soft_prompt(lm, "kv", "{soft_prompt}{input} {target}")
    vectors = 0.1 * torch.randn(4, *lm.trained.kv_shape)
    replace(made, vectors=vectors, parametrisation="prefix").save(path)
    with pytest.raises(ConfigError) as caught:
        server.catalog.load("kv", path)
    assert str(caught.value) == (
        "Expected vectors in the place of tokens for vLLM, found a trained KV prefix in 'kv'; serve it without "
        "--backend vllm."
    )
    assert "kv" not in {entry.name for entry in server.catalog.entries()}


def test_a_clients_own_embeddings_are_never_sent_on(server: Running, fake: Fake) -> None:
    fake.bodies.clear()
    own = "Embeddings of a client's own are never run; send text."
    message = {"role": "user", "content": [{"type": "prompt_embeds", "prompt_embeds": "AAAA"}]}
    for path, body in (
        ("/v1/completions", {"model": "write", "prompt": TEXT, "prompt_embeds": "AAAA"}),
        ("/v1/completions", {"model": "tiny", "prompt_embeds": ["AAAA"]}),
        (
            "/v1/chat/completions",
            {"model": "write", "messages": [{"role": "user", "content": "x"}], "prompt_embeds": ""},
        ),
        ("/v1/classify", {"model": "sst2", "input": TEXT, "prompt_embeds": {}}),
    ):
        error = server.post(path, body, 400)["error"]
        assert (error["message"], error["param"]) == (f"Found the field 'prompt_embeds'. {own}", "prompt_embeds")
    server.post("/v1/chat/completions", {"model": "write", "messages": [message]}, 400)
    assert fake.bodies == []


# --- the command line ----------------------------------------------------------------------------------------


def test_mistakes_are_told_before_a_model_is_loaded(no_model: None, capsys: pytest.CaptureFixture[str]) -> None:
    expected = "Expected URLs of vLLM servers as --upstream with --backend vllm, found"
    for options, sentence in (
        (["--backend", "gpu"], "--backend must be local or vllm, not 'gpu'"),
        (["--backend", "vllm"], f"{expected} none; give both."),
        (["--upstream", "http://a:1"], f"{expected} some without it; give both."),
        (
            ["--backend", "vllm", "--upstream", "http://a:1", "a:8000"],
            "Expected a URL such as http://host:8000 as --upstream, found 'a:8000'; correct it.",
        ),
    ):
        assert main(["serve", *options]) == 2
        assert capsys.readouterr().err == f"error: {sentence}\n"


def test_the_process_serves_through_two_servers_and_drains(
    fake: Fake, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOFTPROMPT_HOME", str(tmp_path))
    lm = FrozenLM.load(base, dtype="fp32", device="cpu")
    Store().save(soft_prompt(lm, "write", "{soft_prompt}{input} {target}", length=9, seed=4))
    with fake_vllm(seconds=0.02) as other:
        command = [sys.executable, "-m", "softprompt", "serve", "--base", base, "--port", "0", "--block-size", "9"]
        command += ["--backend", "vllm", "--upstream", fake.url, other.url]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                url = process.stdout.readline().removeprefix("listening on ").strip()
                answer = httpx.post(f"{url}/v1/completions", json={"model": "write", "prompt": TEXT, "max_tokens": 6})
                vectors = Store().load("write").vectors
                task = Task.of(lm, Store().load("write"))
                request = task.open_request(Example({"input": TEXT}, None), 1)
                (expected,) = generate(lm, [request], [vectors], Sampling(max_new_tokens=6))
                assert answer.json()["choices"][0]["text"] == expected.text.removeprefix(" ")
                body = {"model": "tiny", "prompt": TEXT, "max_tokens": 20, "n": 4}
                with ThreadPoolExecutor(1) as pool:
                    last = pool.submit(httpx.post, f"{url}/v1/completions", json=body, timeout=30)
                    until(lambda: other.active)
                    process.send_signal(signal.SIGTERM)
                    assert len(last.result().json()["choices"]) == 4
                out, err = process.communicate(timeout=60)
            finally:
                process.kill()
    assert process.returncode == 0, err
    assert out == ""
    assert [line for line in map(json.loads, err.splitlines()) if line["level"] != "info"] == []
