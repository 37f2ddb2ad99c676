"""A T5-shaped base model through the commands: it is tuned, measured, asked, compared, inspected, handed on, served."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from softprompt.data.example import Dataset
from softprompt.model.frozen import FrozenLM
from softprompt.soft_prompts.store import Store
from tests.conftest import Ran, Run, toy
from tests.encoder_decoders import taught, tokenizer_of, words_only
from tests.servers import serving

FP32 = ("--dtype", "fp32", "--device", "cpu")
TEMPLATE = "{soft_prompt}{input}{target}"


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bases") / "t5"
    taught().save_pretrained(folder)
    tokenizer_of("t5").save_pretrained(folder)
    return str(folder)


def write(path: Path, rows: Dataset) -> None:
    lines = [json.dumps({"input": row.fields["input"], "target": row.target}) for row in rows.examples]
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture
def rows(home: Path, tmp_path: Path) -> None:
    for name, count, seed in (("train", 64, 1), ("dev", 24, 2), ("test", 40, 3), ("few", 8, 4)):
        write(tmp_path / f"{name}.jsonl", words_only(toy(count, seed)))


def trained(run: Run, t5: str, name: str = "films", *more: str) -> Ran:
    tokens = ("--template", TEMPLATE, "--num-virtual-tokens", "4", "--init", "random", "--batch-size", "16")
    steps = ("--steps", "60", "--eval-every", "20")
    data = ("train.jsonl", "--validation", "dev.jsonl")
    return run("train", *data, "--base", t5, "--name", name, *tokens, *steps, *FP32, *more, "--json")


def test_the_whole_way(run: Run, rows: None, t5: str, tmp_path: Path) -> None:
    tuned = trained(run, t5)
    assert tuned.code == 0, tuned.err
    whole = run("evaluate", "films", "test.jsonl", *FP32, "--metric", "accuracy", "--json").json
    bare = run("evaluate", "films", "test.jsonl", *FP32, "--metric", "accuracy", "--base-only", "--json").json
    assert whole["value"] > 0.95
    assert bare["value"] < 0.8
    texts = ("the plot of a great movie", "a bad film")
    said = run("predict", "films", *texts, *FP32, "--json")
    assert said.code == 0, said.err
    assert [row["text"] for row in said.json["predictions"]] == ["positive", "negative"]

    looked = run("inspect", "films", "--data", "few.jsonl", *FP32, "--json")
    assert looked.code == 0, looked.err
    layers = looked.json["attention"]["by_layer"]
    assert [len(layer) for layer in layers] == [4]  # of the one layer of the decoder, to four virtual tokens
    assert all(0 < share < 1 for share in layers[0])

    exported = run("export", "films", "--to", "npy", "numpy", *FP32)
    assert exported.code == 0, exported.err
    assert "checked with transformers on 3 texts" in exported.out + exported.err
    numbers = np.load(tmp_path / "numpy" / "films.npy")
    assert (numbers.dtype, numbers.shape) == (np.dtype("float32"), (4, 32))
    np.save(tmp_path / "google.npy", numbers)
    labels = ("--labels", "negative,positive")
    taken = run("import", "google.npy", "--base", t5, "--name", "google", *labels, *FP32)
    assert taken.code == 0, taken.err
    again = run("evaluate", "google", "test.jsonl", *FP32, "--metric", "accuracy", "--json").json
    assert (again["value"], again["n"]) == (whole["value"], whole["n"])

    with serving(Store().path("films").parent, load=lambda: FrozenLM.load(t5, dtype="fp32", device="cpu")) as server:
        for name in ("films", "google"):
            found = server.post("/v1/classify", {"model": name, "input": list(texts)})
            assert [row["label"] for row in found["data"]] == ["positive", "negative"]
        asked = [server.post("/v1/completions", {"model": "t5", "prompt": f"very {text}"}) for text in texts]
        assert [one["choices"][0]["text"] for one in asked] == ["positive", "negative"]
        assert [one["choices"][0]["finish_reason"] for one in asked] == ["stop", "stop"]


def test_virtual_tokens_before_the_decoders_input(run: Run, rows: None, t5: str) -> None:
    tuned = trained(run, t5, "both", "--decoder-virtual-tokens", "2", "--checkpoint-every", "20")
    assert tuned.code == 0, tuned.err
    assert (tuned.json["num_virtual_tokens"], tuned.json["numbers"]) == (4, 6 * 32)
    shown = run("show", "both", "--json").json
    assert shown["parts"] == {"soft_prompt": [4, 32], "decoder_soft_prompt": [2, 32]}
    found = run("evaluate", "both", "test.jsonl", *FP32, "--metric", "accuracy", "--json").json
    assert found["value"] > 0.95
    texts = ("the plot of a great movie", "a bad film")
    said = run("predict", "both", *texts, *FP32, "--json")
    assert [row["text"] for row in said.json["predictions"]] == ["positive", "negative"]
    more = ("train", "few.jsonl", "--base", t5, "--name", "more", "--init", "both", "--steps", "1", *FP32)
    again = run(*more, "--template", TEMPLATE)
    assert again.code == 0, again.err
    assert "4 virtual tokens, and 2 before the decoder's input" in again.out
    for command, reason in (
        (("export", "both", "--to", "npy", "numpy", *FP32), "found a soft prompt of encoder and decoder in 'both'"),
        (("export", "both", "--to", "peft", "peft", *FP32), "for which other tools have no format"),
        (("inspect", "both", *FP32), "2 of 'both' stand before the decoder's"),
    ):
        refused = run(*command)
        assert (refused.code, refused.out) == (2, "")
        assert reason in refused.err
    with serving(Store().path("both").parent, load=lambda: FrozenLM.load(t5, dtype="fp32", device="cpu")) as server:
        answers = server.post("/v1/classify", {"model": "both", "input": list(texts)})["data"]
        written = [server.post("/v1/completions", {"model": "both", "prompt": text}) for text in texts]
    assert [row["label"] for row in answers] == ["positive", "negative"]
    for row, answer in zip(answers, said.json["predictions"], strict=True):
        assert row["probabilities"] == pytest.approx(answer["probabilities"], abs=1e-5)
    assert [one["choices"][0]["text"] for one in written] == ["positive", "negative"]


def test_compare(run: Run, rows: None, t5: str) -> None:
    data = ("train.jsonl", "--validation", "dev.jsonl", "--test", "test.jsonl", "--out", "report")
    options = ("--bases", t5, "--budget", "0.5s", "--template", TEMPLATE, *FP32)
    methods = ("zero-shot", "soft-prompt", "soft-prompt-decoder")
    compared = run("compare", *data, *options, "--methods", *methods, "--json")
    assert compared.code == 0, compared.err
    cells = {cell["method"]: (cell["status"], cell["trainable_parameters"]) for cell in compared.json["cells"]}
    assert cells == {"zero-shot": ("done", 0), "soft-prompt": ("done", 64 * 32), methods[2]: ("done", 80 * 32)}


def test_what_vllm_cannot_serve_is_refused(run: Run, rows: None, t5: str) -> None:
    assert trained(run, t5, "short", "--steps", "2").code == 0
    exported = run("export", "short", "--to", "vllm", "folder", *FP32)
    assert (exported.code, exported.out) == (2, "")
    assert "vLLM serves no encoder-decoders" in exported.err
    served = run("serve", "--base", t5, "--port", "0", "--backend", "vllm", "--upstream", "http://127.0.0.1:9", *FP32)
    assert served.code == 2
    assert "serve it with --backend local" in served.err
    kept = run("export", "short", "--to", "cartridge", "folder", *FP32)
    assert "whose encoder reads all of its input at once; export embeddings" in kept.err
    assert kept.code == 2
