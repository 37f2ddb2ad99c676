"""Who may ask, what is loaded, who has gone, what is counted and logged, and how it ends."""

from __future__ import annotations

import http.client
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from softprompt.data.example import Example
from softprompt.generation.decoder import generate
from softprompt.model.request import Sampling
from softprompt.serving import server
from softprompt.serving.catalog import Catalog
from softprompt.serving.jobs import Limits
from softprompt.serving.telemetry import JsonLines
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.soft_prompts.store import Store
from softprompt.tasks.task import Task
from tests.servers import Running, fill, make_lm, serving, slowed, soft_prompt

TEXT = "a stirring , funny film"
WRITE = {"model": "write", "prompt": TEXT, "max_tokens": 4}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    fill(store, make_lm())
    return store


@pytest.fixture
def running(store: Store) -> Iterator[Running]:
    with serving(store.home, allow_loading=True) as running:
        yield running


# --- who may ask -----------------------------------------------------------------------------------------------


def test_without_the_key_only_health_and_metrics_answer(store: Store) -> None:
    refused = {
        "message": "Expected a valid API key as Bearer token, found none or another; send it.",
        "type": "invalid_request_error",
        "param": None,
        "code": "invalid_api_key",
    }
    with serving(store.home, api_key="sesame", allow_loading=True) as running:
        with httpx.Client(base_url=running.url) as stranger:
            for headers in (
                {},
                {"Authorization": "Bearer sesam"},
                {"Authorization": "Bearer sesame2"},
                {"Authorization": "Basic sesame"},
                {"Authorization": "sesame"},
                {"Authorization": "Bearer \xff"},
                {"X-Api-Key": "sesame"},
            ):
                for method, path in (
                    ("GET", "/v1/models"),
                    ("POST", "/v1/completions"),
                    ("POST", "/v1/unload_soft_prompt"),
                    ("GET", "/nothing"),
                    ("GET", "/health/x"),
                    ("GET", "/HEALTH"),
                ):
                    sent = [(key.encode(), value.encode("latin-1")) for key, value in headers.items()]
                    answer = stranger.request(method, path, headers=sent)
                    assert (answer.status_code, answer.json()) == (401, {"error": refused})
                    assert answer.headers["www-authenticate"] == "Bearer"
            for path in ("//health", "/health/../v1/models", "/v1/models/../../health", "/%68ealth/../v1/models"):
                plain = http.client.HTTPConnection(running.url.removeprefix("http://"))
                plain.request("GET", path)
                assert plain.getresponse().status == 401
                plain.close()
            assert stranger.get("/health").json() == {"status": "ok"}
            assert stranger.get("/metrics").status_code == 200
            asked = stranger.head("/health")
            assert (asked.status_code, asked.content) == (200, b"")
            assert stranger.head("/v1/models").status_code == 401
        assert running.http.get("/v1/models").status_code == 200
        assert running.openai.models.list().data
        with pytest.raises(openai.AuthenticationError):
            running.openai.with_options(api_key="other").models.list()


def test_a_body_may_be_so_large_and_no_larger(store: Store) -> None:
    message = "Expected a body of at most 1,000 bytes, found a larger one; send less at a time."
    refused = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}

    def body(size: int) -> bytes:
        return json.dumps(WRITE).encode().ljust(size)

    with serving(store.home, max_body_bytes=1000) as running:
        headers = {"Content-Type": "application/json"}
        assert running.http.post("/v1/completions", content=body(1000), headers=headers).status_code == 200
        answer = running.http.post("/v1/completions", content=body(1001), headers=headers)
        assert (answer.status_code, answer.json()) == (413, refused)
        # in chunks, without a length
        answer = running.http.post("/v1/completions", content=iter([body(600), b" " * 401]), headers=headers)
        assert (answer.status_code, answer.json()) == (413, refused)
        # who goes on sending after the refusal, as most clients do, can still read it
        with socket.create_connection(("127.0.0.1", httpx.URL(running.url).port or 0)) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 300000\r\n\r\n")
            for _ in range(3):
                time.sleep(0.1)
                connection.sendall(b" " * 100_000)
            answered = b"".join(iter(lambda: connection.recv(1000), b""))
        assert json.loads(answered.partition(b"\r\n\r\n")[2]) == refused
        # a length beyond all bounds: the refusal does not wait for it
        with socket.create_connection(("127.0.0.1", httpx.URL(running.url).port or 0)) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_every_answer_has_the_requests_id(running: Running) -> None:
    given = running.http.post("/v1/completions", json=WRITE, headers={"X-Request-Id": "my-id.1"})
    assert given.headers["x-request-id"] == "my-id.1"
    assert given.json()["id"] == "cmpl-my-id.1"
    for bad in ("a b", "x" * 101, "\xe9", "{}"):
        made = running.http.get("/v1/models", headers=[(b"X-Request-Id", bad.encode("latin-1"))])
        assert re.fullmatch(r"[0-9a-f]{32}", made.headers["x-request-id"])
    assert running.http.get("/nothing", headers={"X-Request-Id": "again"}).headers["x-request-id"] == "again"


def test_the_page_is_shut_in(running: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(server, "resources", lambda package: tmp_path)
    missing = running.http.get("/")
    assert missing.status_code == 404
    assert missing.json()["error"]["message"] == "There is no page here; the API is at /v1."
    (tmp_path / "playground.html").write_text("<p>é</p>", encoding="utf-8")
    page = running.http.get("/")
    assert page.text == "<p>é</p>"
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert "http" not in policy


# --- loading -----------------------------------------------------------------------------------------------------


def answer_of(running: Running, name: str = "write") -> Any:
    return running.post("/v1/completions", {**WRITE, "model": name})


def expected_of(running: Running, path: Path) -> str:
    soft = SoftPrompt.load(path)
    task = Task.of(running.lm, soft)
    request = task.open_request(Example({"input": TEXT}, None), 1)
    return generate(running.lm, [request], [soft.vectors], Sampling(max_new_tokens=4))[0].text.removeprefix(" ")


def test_the_path_of_a_soft_prompt_may_begin_with_the_home_folder(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "elsewhere.safetensors"
    soft_prompt(running.lm, "any", "{soft_prompt}{input} {target}", seed=77).save(other)
    monkeypatch.setenv("HOME", str(tmp_path))
    running.post("/v1/load_soft_prompt", {"name": "mine", "path": "~/elsewhere.safetensors"})
    assert answer_of(running, "mine")["choices"][0]["text"] == expected_of(running, other)
    sentence = running.post("/v1/load_soft_prompt", {"name": "none", "path": "~/none"}, 404)["error"]["message"]
    assert str(tmp_path / "none") in sentence
    running.post("/v1/unload_soft_prompt", {"name": "mine"})


def test_soft_prompts_are_loaded_unloaded_and_replaced(running: Running, tmp_path: Path) -> None:
    store, lm = running.catalog.store, running.lm
    before = answer_of(running)
    other = tmp_path / "elsewhere.safetensors"
    soft_prompt(lm, "any", "{soft_prompt}{input} {target}", seed=77).save(other)

    card = running.post("/v1/load_soft_prompt", {"name": "second", "path": str(other)})
    assert card == running.http.get("/v1/models/second").json()
    assert answer_of(running, "second")["choices"][0]["text"] == expected_of(running, other)

    store.save(soft_prompt(lm, "write", "{soft_prompt}{input} {target}", seed=78), overwrite=True)
    assert answer_of(running)["choices"] == before["choices"]  # the file alone changes nothing
    taken = running.post("/v1/load_soft_prompt", {"name": "write"}, 400)["error"]
    assert taken == {
        "message": "The name 'write' is served already; unload it first, or replace it with load_inplace.",
        "type": "invalid_request_error",
        "param": "name",
        "code": "already_loaded",
    }
    card = running.post("/v1/load_soft_prompt", {"name": "write", "load_inplace": True})
    after = answer_of(running)
    assert after["choices"][0]["text"] == expected_of(running, store.path("write"))
    assert after["choices"] != before["choices"]
    assert after["system_fingerprint"] == f"sp-{card['content_hash'][:12]}" != before["system_fingerprint"]

    gone = running.post("/v1/unload_soft_prompt", {"name": "second"})
    assert gone == {"id": "second", "object": "model", "deleted": True}
    for path, body in (
        ("/v1/completions", {**WRITE, "model": "second"}),
        ("/v1/unload_soft_prompt", {"name": "second"}),
    ):
        assert running.post(path, body, 404)["error"]["code"] == "model_not_found"
    assert "second" not in [model.id for model in running.openai.models.list().data]


def test_what_cannot_be_loaded_is_said_in_one_sentence(running: Running, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.safetensors"
    stranger = soft_prompt(
        running.lm, "foreign", "{soft_prompt}{input}{target}", base="other", base_fingerprint="f" * 64
    )
    stranger.save(foreign)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not at all")
    mine = running.lm.fingerprint[:12]
    for body, status, message in (
        (
            {"name": "none"},
            404,
            f"There is no soft prompt at {running.catalog.store.path('none')}; check name and path.",
        ),
        ({"name": "x", "path": str(tmp_path)}, 404, f"There is no soft prompt at {tmp_path}; check name and path."),
        (
            {"name": "../x"},
            400,
            "A soft prompt's name is 1 to 100 letters a-z, digits, '-', '_' and '.', without a dot in front or "
            "'.safetensors' at the end, but '../x' was given; choose another name.",
        ),
        (
            {"name": "tiny", "path": str(running.catalog.store.path("write")), "load_inplace": True},
            400,
            "The name 'tiny' is the base model's; rename the soft prompt's file, or load it under another name.",
        ),
        (
            {"name": "foreign", "path": str(foreign)},
            400,
            f"The soft prompt 'foreign' was tuned on the base model 'other' (fingerprint ffffffffffff), but the one "
            f"loaded is 'tiny' (fingerprint {mine}); load 'other', or tune a new soft prompt on 'tiny'.",
        ),
        ({"name": "broken", "path": str(broken)}, 400, None),
    ):
        error = running.post("/v1/load_soft_prompt", body, status)["error"]
        assert message is None or error["message"] == message
    base = running.post("/v1/unload_soft_prompt", {"name": "tiny"}, 400)["error"]
    assert base["message"] == "The base model cannot be unloaded; name a soft prompt."
    assert [entry.name for entry in running.catalog.entries()] == ["tiny", "film", "nli", "sst2", "write"]


def until(condition: Any) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.mark.parametrize("only", [None, ("write", "new")])
def test_watching_follows_the_store(
    store: Store, monkeypatch: pytest.MonkeyPatch, only: tuple[str, ...] | None
) -> None:
    monkeypatch.setattr(server, "WATCH_SECONDS", 0.02)
    files = None if only is None else {name: store.path(name) for name in only}
    with serving(store.home, watch=True, files=files, allow_loading=True) as running:

        def names() -> list[str]:
            return [entry.name for entry in running.catalog.entries()]

        first = running.catalog.get("write").content
        store.save(soft_prompt(running.lm, "write", "{soft_prompt}{input} {target}", seed=5), overwrite=True)
        until(lambda: running.catalog.get("write").content != first)
        assert answer_of(running)["choices"][0]["text"] == expected_of(running, store.path("write"))
        store.save(soft_prompt(running.lm, "other", "{soft_prompt}{input} {target}"))
        store.save(soft_prompt(running.lm, "new", "{soft_prompt}{input} {target}"))
        wanted = {"new"} if only else {"new", "other"}  # they come one after the other
        until(lambda: wanted <= set(names()))
        assert ("other" in names()) == (only is None)
        second = running.catalog.get("write").content
        store.path("write").write_bytes(b"half a file")  # not by us: the last sound one stays
        time.sleep(0.1)
        assert running.catalog.get("write").content == second
        running.post("/v1/unload_soft_prompt", {"name": "new"})
        time.sleep(0.1)
        assert "new" not in names()  # until its file changes
        store.remove("film")
        until(lambda: "film" not in names())


def test_watching_leaves_alone_what_was_loaded_from_elsewhere(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "WATCH_SECONDS", 0.02)
    other = tmp_path / "elsewhere.safetensors"
    with serving(store.home, watch=True, allow_loading=True) as running:
        lm, template = running.lm, "{soft_prompt}{input} {target}"
        soft_prompt(lm, "write", template, seed=6).save(other)
        card = running.post("/v1/load_soft_prompt", {"name": "write", "path": str(other), "load_inplace": True})
        store.save(soft_prompt(lm, "write", template, seed=7), overwrite=True)
        store.save(soft_prompt(lm, "sign", template, seed=8))  # loaded after it was looked at
        until(lambda: "sign" in [entry.name for entry in running.catalog.entries()])
        assert running.http.get("/v1/models/write").json() == card
        soft_prompt(lm, "write", template, seed=9).save(other)
        until(lambda: running.http.get("/v1/models/write").json() != card)
        assert answer_of(running)["choices"][0]["text"] == expected_of(running, other)
        running.post("/v1/unload_soft_prompt", {"name": "write"})
        store.save(soft_prompt(lm, "sign-2", template, seed=8))
        until(lambda: "sign-2" in [entry.name for entry in running.catalog.entries()])
        assert running.http.get("/v1/models/write").status_code == 404


def test_the_catalog_is_used_from_one_thread(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is changed while others ask what there is: all of it must take turns."""
    used: dict[str, set[str]] = {}

    def watched(name: str) -> None:
        whole = getattr(Catalog, name)

        def noting(*arguments: Any, **options: Any) -> Any:
            used.setdefault(name, set()).add(threading.current_thread().name)
            return whole(*arguments, **options)

        monkeypatch.setattr(Catalog, name, noting)

    with serving(store.home, watch=True, allow_loading=True) as running:
        for name in ("entries", "entry", "get", "load", "unload", "sync"):
            watched(name)
        monkeypatch.setattr(server, "WATCH_SECONDS", 0.02)
        running.http.get("/v1/models")
        running.http.get("/v1/models/write")
        running.http.get("/v1/soft_prompts/write/inspection")
        running.post("/v1/completions", WRITE)
        running.post("/v1/classify", {"model": "sst2", "input": TEXT})
        running.post("/v1/unload_soft_prompt", {"name": "write"})
        running.post("/v1/load_soft_prompt", {"name": "write"})
        until(lambda: "sync" in used)
    assert set(used) == {"entries", "entry", "get", "load", "unload", "sync"}
    assert len(set.union(*used.values())) == 1


def test_answers_under_way_are_the_old_soft_prompts(store: Store) -> None:
    """While it is loaded again and again, every answer is of one content, and says of which."""
    with serving(store.home, allow_loading=True, limits=Limits(rows=4)) as running:
        versions = []
        for seed in (101, 102):
            store.save(soft_prompt(running.lm, "write", "{soft_prompt}{input} {target}", seed=seed), overwrite=True)
            card = running.post("/v1/load_soft_prompt", {"name": "write", "load_inplace": True})
            versions.append((card["content_hash"][:12], expected_of(running, store.path("write")), seed))
        assert versions[0][1] != versions[1][1]
        texts = dict(version[:2] for version in versions)
        with ThreadPoolExecutor(6) as pool:
            answers = [pool.submit(answer_of, running) for _ in range(40)]
            for turn in range(8):
                seed = versions[turn % 2][2]
                store.save(soft_prompt(running.lm, "write", "{soft_prompt}{input} {target}", seed=seed), overwrite=True)
                running.post("/v1/load_soft_prompt", {"name": "write", "load_inplace": True})
            found = [answer.result(60) for answer in answers]
        for answer in found:
            assert answer["choices"][0]["text"] == texts[answer["system_fingerprint"].removeprefix("sp-")]


# --- clients that go, and too many of them ------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_rows(running: Running, stream: bool) -> None:
    body = json.dumps({**WRITE, "max_tokens": 110, "n": 3, "stream": stream})
    with slowed(running.engine.lm, 0.05):
        connection = http.client.HTTPConnection(running.url.removeprefix("http://"), timeout=30)
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        until(lambda: running.engine.running == 3)
        if stream:
            assert connection.getresponse().read(10)
        connection.close()
        if connection.sock is not None:
            connection.sock.close()
        began = time.monotonic()
        until(lambda: running.engine.running == 0)
        assert time.monotonic() - began < 2.5  # all 110 tokens take more than 5 s
    until(lambda: 'finished_reason="abort",model_name="write"} 3.0' in running.http.get("/metrics").text)


def test_a_client_that_goes_away_while_it_waits_gives_up_its_turn(store: Store) -> None:
    limits = Limits(rows=1)
    with serving(store.home, limits=limits) as running, slowed(running.engine.lm, 0.02), ThreadPoolExecutor(1) as pool:
        first = pool.submit(running.post, "/v1/completions", {**WRITE, "max_tokens": 40})
        until(lambda: running.engine.running == 1)
        connection = http.client.HTTPConnection(running.url.removeprefix("http://"), timeout=30)
        body = json.dumps({**WRITE, "stream": True})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        until(lambda: running.engine.waiting == 1)
        connection.close()
        until(lambda: running.engine.waiting == 0)
        assert not first.done()
        first.result(60)


def test_more_requests_than_may_wait_are_sent_away(store: Store) -> None:
    limits = Limits(rows=1, waiting=2)
    with serving(store.home, limits=limits) as running, slowed(running.engine.lm, 0.02), ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(running.post, "/v1/completions", {**WRITE, "max_tokens": 30})]
        until(lambda: running.engine.running == 1)
        answers += [pool.submit(running.post, "/v1/completions", WRITE) for _ in range(2)]
        until(lambda: running.engine.waiting == 2)
        for path, body in (("completions", WRITE), ("classify", {"model": "sst2", "input": TEXT})):
            refused = running.http.post(f"/v1/{path}", json=body)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert refused.json()["error"] == {
                "message": "2 requests wait already, of 2 that may; try again in a moment.",
                "type": "server_error",
                "param": None,
                "code": "overloaded",
            }
        for answer in answers:
            answer.result(60)


def test_an_answer_that_takes_too_long_is_given_up(store: Store) -> None:
    limits = Limits(seconds=0.5)
    error = {
        "message": "The request took longer than 0.5 s; ask for less, or try again later.",
        "type": "server_error",
        "param": None,
        "code": "timeout",
    }
    body = {**WRITE, "max_tokens": 100}
    with serving(store.home, limits=limits) as running, slowed(running.engine.lm, 0.05):
        assert running.post("/v1/completions", body, 504) == {"error": error}
        chunks = running.stream("/v1/completions", body)
        assert chunks[-1] == {"error": error}
        assert "choices" in chunks[0]
        with pytest.raises(openai.APIError) as raised:
            list(running.openai.completions.create(model="write", prompt=TEXT, max_tokens=100, stream=True))
        assert raised.value.code == "timeout"
        running.settle()


# --- what it says of itself ---------------------------------------------------------------------------------------


def samples(text: str) -> dict[str, float]:
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines}


def test_metrics_count_what_was_done(running: Running) -> None:
    for _ in range(2):
        running.post("/v1/completions", WRITE)
    running.stream("/v1/completions", {**WRITE, "model": "tiny", "n": 2})
    running.post("/v1/classify", {"model": ["sst2", "film"], "input": [TEXT, "dull"]})
    answer = running.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = samples(answer.text)
    length = len(running.lm.tokenizer(TEXT, add_special_tokens=False).input_ids)
    expected = {
        'softprompt:num_requests_running{model_name="tiny"}': 0,
        'softprompt:num_requests_waiting{model_name="tiny"}': 0,
        'softprompt:prompt_tokens_total{model_name="tiny"}': 2 * length,
        'softprompt:prompt_tokens_total{model_name="write"}': 2 * (9 + length),
        'softprompt:generation_tokens_total{model_name="write"}': 8,
        'softprompt:generation_tokens_total{model_name="tiny"}': 8,
        'softprompt:generation_tokens_total{model_name="sst2"}': 0,
        'softprompt:request_success_total{finished_reason="length",model_name="write"}': 2,
        'softprompt:request_success_total{finished_reason="length",model_name="tiny"}': 2,
        'softprompt:request_success_total{finished_reason="scored",model_name="sst2"}': 2,
        'softprompt:prefix_cache_hits_total{model_name="tiny"}': 9,
        'softprompt:time_to_first_token_seconds_count{model_name="tiny"}': 8,
        'softprompt:e2e_request_latency_seconds_count{model_name="tiny"}': 8,
        'softprompt:request_queue_time_seconds_count{model_name="tiny"}': 8,
        'softprompt:request_time_per_output_token_seconds_count{model_name="tiny"}': 4,
    }
    review = len(running.lm.tokenizer("Review :", add_special_tokens=False).input_ids)
    expected['softprompt:prefix_cache_queries_total{model_name="tiny"}'] = 2 * 9 + 7 + (5 + review)
    assert {key: found[key] for key in expected} == expected
    bytes_of_a_token = 3 * 2 * 2 * 8 * 4  # layers, keys and values, heads, width, bytes
    assert found['softprompt:prefix_cache_bytes{model_name="tiny"}'] == (9 + 7 + 5 + review) * bytes_of_a_token


def test_the_log_has_a_line_a_request_without_its_text(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="softprompt"):
        running.http.post("/v1/completions", json=WRITE, headers={"X-Request-Id": "one"})
        running.http.post("/v1/completions", json={**WRITE, "model": "none"}, headers={"X-Request-Id": "two"})
        running.http.get("/health")
        running.settle()
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records if record.name == "softprompt.server"]
    one, two = (line for line in lines if line["event"] == "request")
    assert one.pop("ms") > 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", one.pop("time"))
    length = len(running.lm.tokenizer(TEXT, add_special_tokens=False).input_ids)
    assert one == {
        "level": "info",
        "logger": "softprompt.server",
        "event": "request",
        "request_id": "one",
        "method": "POST",
        "path": "/v1/completions",
        "status": 200,
        "model": "write",
        "jobs": 1,
        "prompt_tokens": 9 + length,
        "completion_tokens": 4,
    }
    assert (two["request_id"], two["status"]) == ("two", 404)
    assert "stirring" not in caplog.text


def test_a_log_line_is_one_json_object_whatever_is_in_it() -> None:
    try:
        raise ValueError("line one\nline two")
    except ValueError as error:
        record = logging.LogRecord("softprompt", logging.ERROR, "", 0, "a %s\n", ("b",), (ValueError, error, None))
    record.fields = {"path": "/é\n{", "object": object}
    line = JsonLines().format(record)
    assert "\n" not in line
    found = json.loads(line)
    assert found["event"] == "a b\n"
    assert found["path"] == "/é\n{"
    assert "line two" in found["error"]


def test_shutting_down_finishes_what_has_begun(store: Store) -> None:
    """The listener is closed at once; what was taken, running or waiting, is answered whole."""
    with serving(store.home, limits=Limits(rows=1)) as running, ThreadPoolExecutor(2) as pool:
        body = {**WRITE, "max_tokens": 30}
        expected = running.post("/v1/completions", body)["choices"]
        with slowed(running.engine.lm, 0.02):
            answers = [pool.submit(running.post, "/v1/completions", body) for _ in range(2)]
            until(lambda: running.engine.running and running.engine.waiting)
            running.stop()
        assert [answer.result(1)["choices"] for answer in answers] == [expected, expected]
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{running.url}/health")
