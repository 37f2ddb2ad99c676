"""``softprompt serve`` as a process, and the mistakes that it refuses before it serves."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from softprompt.cli.main import main
from softprompt.errors import ConfigError
from softprompt.model.frozen import FrozenLM
from softprompt.serving import server
from softprompt.soft_prompts.store import Store
from tests.conftest import make_model, make_tokenizer
from tests.servers import fill, soft_prompt


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base model on disk."""
    folder = tmp_path_factory.mktemp("bases") / "tiny"
    make_model("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def store(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("SOFTPROMPT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SOFTPROMPT_API_KEY", raising=False)
    store = Store()
    lm = FrozenLM.load(str(base), dtype="fp32", device="cpu")
    fill(store, lm)
    store.save(soft_prompt(lm, "foreign", "{soft_prompt}{input}{target}", base="other", base_fingerprint="f" * 64))
    return store


def test_the_process_serves_and_finishes_what_has_begun_when_it_is_asked_to_end(store: Store, base: Path) -> None:
    command = [sys.executable, "-m", "softprompt", "serve", "--base", str(base), "--dtype", "fp32", "--port", "0"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "SOFTPROMPT_API_KEY": "sesame", "OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("listening on http://127.0.0.1:"), process.communicate()[1]
        url = line.removeprefix("listening on ").strip()
        assert httpx.get(f"{url}/v1/models", timeout=60).status_code == 401
        with OpenAI(base_url=f"{url}/v1", api_key="sesame", max_retries=0, timeout=60) as client:
            assert [model.id for model in client.models.list()] == ["tiny", "film", "nli", "sst2", "write"]
            text, reasons = ["" for _ in range(32)], {}
            options: Any = {"model": "write", "prompt": "the film", "max_tokens": 100, "n": 32, "seed": 1}
            stream = client.completions.create(**options, temperature=1, stream=True)
            for number, chunk in enumerate(stream):
                if number == 0:
                    process.send_signal(signal.SIGTERM)
                text[chunk.choices[0].index] += chunk.choices[0].text
                if chunk.choices[0].finish_reason:
                    reasons[chunk.choices[0].index] = chunk.choices[0].finish_reason
        assert set(reasons) == set(range(32))
        assert all(text)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert out == ""
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")
    lines = [json.loads(line) for line in err.splitlines()]
    assert [line["event"] for line in lines[:4] if line["level"] == "info"] == [
        "loaded film",
        "loaded nli",
        "loaded sst2",
    ]
    warning = (
        "The soft prompt 'foreign' was tuned on the base model 'other' (fingerprint ffffffffffff), but the one loaded"
    )
    assert lines[1]["event"].startswith(f"{warning} is '{base}' (fingerprint ")
    assert (lines[1]["level"], lines[1]["soft_prompt"]) == ("warning", "foreign")
    assert [line["status"] for line in lines if line["event"] == "request"] == [401, 200, 200]


def test_files_of_one_name_are_refused_before_a_model_is_loaded(
    store: Store, no_model: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = (tmp_path / folder / "film.safetensors" for folder in ("a", "b"))
    for path in (one, other):
        path.parent.mkdir()
        path.write_bytes(store.path("film").read_bytes())
    for prompts in ([one, other], ["film", other], [one, "film"], ["all", other], [other, "all"], ["sst2", one, other]):
        assert main(["serve", "--port", "0", "--prompts", *map(str, prompts)]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert "'film'" in shown.err
        assert "rename" in shown.err
        assert str(other if other in prompts else one) in shown.err


def test_what_was_chosen_is_served_and_followed(
    store: Store, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path beside a name, twice, in any spelling; and beside all of the store."""
    path = tmp_path / "a" / "mine.safetensors"
    path.parent.mkdir()
    path.write_bytes(store.path("write").read_bytes())
    made: dict[str, Any] = {}

    def create_app(engine: Any, catalog: Any, **options: Any) -> Any:
        made.update(options, names=[entry.name for entry in catalog.entries()])
        engine.close()
        raise ConfigError("enough")

    monkeypatch.setattr(server, "create_app", create_app)
    options = ["serve", "--base", str(base), "--port", "0", "--dtype", "fp32", "--watch", "--prompts"]
    spelt = f"{tmp_path}/a/../a/mine.safetensors"
    assert main([*options, "film", str(path), spelt, "film"]) == 2
    assert made["names"] == ["tiny", "film", "mine"]
    assert made["files"] == {"film": store.path("film"), "mine": path}
    assert main([*options, "all", str(path)]) == 2
    assert made["names"] == ["tiny", "film", "mine", "nli", "sst2", "write"]
    assert made["files"] is None
    path.rename(path.with_name("tiny.safetensors"))
    assert main([*options, str(path.with_name("tiny.safetensors"))]) == 2


def test_mistakes_are_one_sentence_before_anything_is_served(
    store: Store, base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    port = str(taken.getsockname()[1])
    for options, sentence in (
        (
            ["--port", port],
            f"Expected a free address, found 127.0.0.1:{port}, which cannot be listened on: Address already in use; "
            f"choose another --host or --port.",
        ),
        (
            ["--host", "host.invalid"],
            "Expected a free address, found host.invalid:8000, which cannot be listened on: Name or service not known; "
            "choose another --host or --port.",
        ),
        (
            ["--prompts", "sst", "film"],
            f"There is no soft prompt 'sst' in {store.home}: similar names are 'sst2'; see `softprompt list`.",
        ),
        (
            ["--backend", "vllm", "--upstream", "http://localhost:1", "--quantize", "int8"],
            "--quantize is for --backend local, where softprompt computes; leave it out, and start vLLM with a "
            "quantised model.",
        ),
        (["--api-key", " "], "The API key is blank; give another one, or none to let anyone ask."),
        (["--max-rows", "0"], "The server's limit on rows must be at least 1, not 0."),
        (["--time-limit", "0"], "The server's limit on seconds must be above 0, not 0.0."),
    ):
        assert main(["serve", *options]) == 2
        shown = capsys.readouterr()
        assert (shown.out, shown.err) == ("", f"error: {sentence}\n")
    assert main(["serve", "--base", str(base), "--port", "0", "--dtype", "fp32", "--prompts", "foreign"]) == 2
    assert "The soft prompt 'foreign' was tuned on the base model 'other'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve"]) == 2
    sentence = 'Serving needs the library uvicorn, which is not installed; pip install "softprompt[serve]".'
    assert capsys.readouterr().err == f"error: {sentence}\n"
    taken.close()
