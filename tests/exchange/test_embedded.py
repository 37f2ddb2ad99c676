"""A soft prompt in transformers' own generate writes what ours writes."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import softprompt as sp
from softprompt.errors import ConfigError, DataError
from softprompt.model.request import Sampling
from tests.conftest import make_model, make_tokenizer, tiny
from tests.exchange.test_peft_folder import FAMILIES, TEXTS, made


@pytest.mark.parametrize("kind", [*FAMILIES, "stablelm"])
def test_generate_writes_what_we_write(kind: str) -> None:
    lm = tiny(kind)
    prompt = made(lm, 3, "Text: {soft_prompt}{input}\nLabel:{target}")
    model: Any = make_model(kind).eval()
    ours = sp.predict(lm, prompt, TEXTS, sampling=Sampling(max_new_tokens=12))
    written = model.generate(**sp.inputs_for(lm, prompt, TEXTS), max_new_tokens=12, do_sample=False)
    assert [one.text for one in ours] == [
        str(lm.tokenizer.decode(row, skip_special_tokens=True)).strip() for row in written
    ]


def test_inputs_are_padded_on_the_left_and_may_be_a_file(tmp_path: Path) -> None:
    lm = tiny("llama")
    prompt = made(lm, 1, "{soft_prompt}{input}{target}")
    found = sp.inputs_for(lm, prompt, ["a", "a dull , badly written mess"])
    alone = sp.inputs_for(lm, prompt, "a")
    length = alone["inputs_embeds"].shape[1]
    assert found["attention_mask"].sum(dim=1).tolist() == [length, found["inputs_embeds"].shape[1]]
    assert torch.equal(found["inputs_embeds"][0, -length:], alone["inputs_embeds"][0])
    assert torch.equal(alone["inputs_embeds"][0, : len(prompt.vectors)], prompt.vectors)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"input": "a"}\n')
    assert torch.equal(sp.inputs_for(lm, prompt, path)["inputs_embeds"], alone["inputs_embeds"])


def test_what_has_no_embeddings_is_refused() -> None:
    lm = tiny("llama")
    kv = made(lm, 1, "{soft_prompt}{input}{target}", kv=True)
    with pytest.raises(ConfigError, match="cartridge"):
        sp.inputs_for(lm, kv, ["a"])
    plain = made(lm, 1, "{soft_prompt}{input}{target}")
    with pytest.raises(ConfigError, match="at least one"):
        sp.inputs_for(lm, plain, [])
    with pytest.raises(DataError, match="input 1"):
        sp.inputs_for(lm, plain, [" "])


def test_a_request_to_vllm_holds_the_sequence_that_we_compute_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model("llama").save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    lm = sp.load_model(tmp_path / "base", dtype="fp32", device="cpu")
    prompt = made(lm, 2, "Text: {soft_prompt}{input}\nLabel:{target}")
    checked = sp.export(lm, prompt, tmp_path / "out", "vllm")
    assert checked is not None
    assert checked.passed
    body = json.loads((tmp_path / "out" / "request.json").read_text())
    assert (body["model"], body["temperature"]) == (lm.name, 0)
    [ours] = sp.predict(lm, prompt, TEXT, sampling=Sampling(max_new_tokens=body["max_tokens"]))
    model: Any = make_model("llama").eval()
    sequence = tensor(body)[None]
    written = model.generate(
        inputs_embeds=sequence,
        attention_mask=torch.ones(sequence.shape[:2]),
        max_new_tokens=body["max_tokens"],
        do_sample=False,
    )
    assert str(lm.tokenizer.decode(written[0], skip_special_tokens=True)).strip() == ours.text
    monkeypatch.chdir(tmp_path / "out")
    scope: dict[str, Any] = {"__name__": "ask"}
    exec(Path("ask.py").read_text(), scope)
    assert torch.equal(tensor(scope["request"](TEXT)), sequence[0])
    assert scope["request"](TEXT).keys() == body.keys()
    wanted = sp.inputs_for(lm, prompt, "a dull film")["inputs_embeds"][0]
    assert torch.equal(tensor(scope["request"]("a dull film")), wanted)


TEXT = "A fine film, and funny throughout."


def tensor(body: dict[str, Any]) -> torch.Tensor:
    """``[T, H]`` of a request, as a server reads it."""
    found: torch.Tensor = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])), weights_only=True)
    return found
