"""An encoder–decoder behind the server: rows of several soft prompts, and inputs as long as the window."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from softprompt.data.example import Example
from softprompt.generation.decoder import generate
from softprompt.model.frozen import FrozenLM
from softprompt.model.request import Sampling
from softprompt.tasks.predict import Query, predict
from softprompt.tasks.task import Task
from tests.encoder_decoders import encoder_decoder, make_encoder_decoder, tokenizer_of
from tests.servers import Running, serving

TEXTS = ("the plot is thin", "a dull , badly written mess with no ideas", "great")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    def load() -> FrozenLM:
        return FrozenLM(make_encoder_decoder("bart"), tokenizer_of("bart"), name="tiny-bart", dtype="fp32")

    with serving(tmp_path_factory.mktemp("store"), load=load) as running:
        yield running


def test_texts_and_labels_at_once_are_those_of_each_alone(server: Running) -> None:
    lm, store = encoder_decoder("bart"), server.catalog.store
    writes, labels = store.load("write"), store.load("sst2")
    task = Task.of(lm, writes)
    requests = [task.open_request(Example({"input": text}, None), 1) for text in TEXTS]
    sampling = Sampling(max_new_tokens=12)
    wanted = [generate(lm, [request], [writes.vectors], sampling)[0].text for request in requests]
    classified = predict([Query(Task.of(lm, labels), Example({"input": text}, None), labels.vectors) for text in TEXTS])
    with ThreadPoolExecutor(6) as pool:
        bodies = [{"model": "write", "prompt": text, "max_tokens": 12} for text in TEXTS]
        written = [pool.submit(server.post, "/v1/completions", body) for body in bodies]
        body = {"model": "sst2", "input": list(TEXTS)}
        found = pool.submit(server.post, "/v1/classify", body).result()["data"]
        texts = [one.result()["choices"][0]["text"] for one in written]
    assert texts == wanted
    assert len(set(texts)) > 1
    assert [row["label"] for row in found] == [one.text for one in classified]


def test_an_input_as_long_as_the_window_leaves_the_decoder_its_room(server: Running) -> None:
    ids = [40 + i % 7 for i in range(127)]
    answer = server.post("/v1/completions", {"model": "tiny-bart", "prompt": ids, "max_tokens": 9})
    assert answer["usage"]["prompt_tokens"] == 127
    assert 1 < answer["usage"]["completion_tokens"] <= 9
    longest = server.post("/v1/completions", {"model": "tiny-bart", "prompt": ids, "max_tokens": 1000})
    assert longest["usage"]["completion_tokens"] <= 128 - 2
