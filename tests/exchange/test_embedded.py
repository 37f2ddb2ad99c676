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
from softprompt.model.frozen import FrozenLM
from softprompt.model.request import Sampling
from tests.conftest import make_model, make_tokenizer, tiny
from tests.exchange.test_peft_folder import FAMILIES, TEXTS, made
from tests.servers import CHAT


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


SYSTEM = "system:\n{soft_prompt}</s>user:\n{input}</s>assistant:\n{target}"


@pytest.mark.parametrize(
    ("template", "roles"),
    [
        (SYSTEM, ["user"]),
        ("user:\n{soft_prompt}{input}</s>assistant:\n{target}", []),
        ("system:\nbe{soft_prompt} brief</s>user:\nText: {input}</s>assistant:\n{target}", ["user"]),
    ],
)
def test_a_chat_request_to_vllm_makes_the_sequence_that_we_compute_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str, roles: list[str]
) -> None:
    lm = chat_base(tmp_path / "base")
    prompt = made(lm, 2, template)
    sp.export(lm, prompt, tmp_path / "out", "vllm")
    body = json.loads((tmp_path / "out" / "chat.json").read_text())
    assert torch.equal(spliced(lm, body), sp.inputs_for(lm, prompt, TEXT)["inputs_embeds"][0])
    assert [one["role"] for one in body["messages"] if isinstance(one["content"], str)] == roles
    page = (tmp_path / "out" / "README.md").read_text()
    for words in ("/v1/completions", "/v1/chat/completions", "@chat.json", "cache_salt"):
        assert words in page
    monkeypatch.chdir(tmp_path / "out")
    scope: dict[str, Any] = {"__name__": "ask"}
    exec(Path("ask.py").read_text(), scope)
    assert scope["chat"](TEXT) == body
    other = scope["chat"](" dull\n")
    assert torch.equal(spliced(lm, other), sp.inputs_for(lm, prompt, " dull\n")["inputs_embeds"][0])
    if roles:
        assert other["cache_salt"] == body["cache_salt"]  # so that the soft prompt is found in the cache
        for text in ("</s>", "<prompt_embeds>"):
            with pytest.raises(SystemExit, match="leave --chat out"):
                scope["chat"](text)
    assert torch.equal(tensor(scope["request"]("</s>")), sp.inputs_for(lm, prompt, "</s>")["inputs_embeds"][0])


@pytest.mark.parametrize(
    ("template", "chat", "reason"),
    [
        ("{soft_prompt}{input}\nLabel:{target}", CHAT, "does not place the soft prompt within a message"),
        ("{soft_prompt}user:\n{input}</s>assistant:\n{target}", CHAT, "does not place the soft prompt within"),
        (SYSTEM, "", "has no chat template"),
        (SYSTEM, "{{ strftime_now('%d') }}" + CHAT, "writes the day's date"),
        (SYSTEM, CHAT.replace("['content']", "['content'] | replace('f', 'ff')"), "makes other tokens of this text"),
        ("system:\n{soft_prompt}{input}</s>user:\n{more}</s>assistant:\n{target}", CHAT, "both in the soft prompt's"),
    ],
)
def test_a_chat_request_that_would_not_be_exact_is_left_out(
    tmp_path: Path, template: str, chat: str, reason: str
) -> None:
    lm = chat_base(tmp_path / "base", chat)
    sp.export(lm, made(lm, 2, template), tmp_path / "out", "vllm")
    assert not (tmp_path / "out" / "chat.json").exists()
    assert reason in (tmp_path / "out" / "README.md").read_text()
    assert "def chat" not in (tmp_path / "out" / "ask.py").read_text()


TEXT = "A fine film, and funny throughout."


def chat_base(folder: Path, chat: str = CHAT) -> FrozenLM:
    """A base model on disk whose tokenizer has a chat template."""
    make_model("llama").save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = chat or None
    tokenizer.save_pretrained(folder)
    return sp.load_model(folder, dtype="fp32", device="cpu")


def spliced(lm: FrozenLM, body: dict[str, Any]) -> torch.Tensor:
    """``[T, H]`` that vLLM computes with: the chat template around a mark, and the embeddings in its place."""
    [data] = [one["content"][0]["data"] for one in body["messages"] if not isinstance(one["content"], str)]
    messages = [
        {"role": one["role"], "content": one["content"] if isinstance(one["content"], str) else "<mark>"}
        for one in body["messages"]
    ]
    text = lm.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before, behind = (lm.tokenizer(piece, add_special_tokens=False).input_ids for piece in text.split("<mark>"))
    return torch.cat([lm.embed(before, None), tensor({"prompt_embeds": data}), lm.embed(behind, None)])


def tensor(body: dict[str, Any]) -> torch.Tensor:
    """``[T, H]`` of a request, as a server reads it."""
    found: torch.Tensor = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])), weights_only=True)
    return found
