"""What is pulled from the Hugging Face Hub is untrusted: hostile answers of a stand-in are refused, unread."""

from __future__ import annotations

import gzip
import json
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import get_session
from peft import PromptTuningConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save

import softprompt as sp
from softprompt.errors import ArtifactError, ConfigError, HubError, SoftPromptError
from softprompt.exchange import hub as hub_module
from softprompt.exchange import hub_http
from softprompt.model.frozen import FrozenLM
from tests.conftest import make_model
from tests.exchange.pushed import METRIC, OWN, REPO, TEMPLATE, made
from tests.fake_hub import FakeHub, Handler

LONG = b"x" * 65536


def own(lm: FrozenLM) -> bytes:
    return made(lm).encoded()


def listed(hub: FakeHub, files: object) -> None:
    """The Hub says this of the files."""
    document = {"sha": "a" * 40, "private": False, "siblings": files}
    hub.answers[f"/api/models/{REPO}"] = lambda handler: handler.send(200, document)


def sends(hub: FakeHub, name: str, answer: Callable[[Handler], None]) -> None:
    hub.answers[f"/{REPO}/resolve/{'a' * 40}/{name}"] = answer


def refused(words: str, kind: type[SoftPromptError] = HubError, **options: Any) -> None:
    with pytest.raises(kind) as told:
        sp.pull(REPO, **options)
    assert words in str(told.value)
    assert REPO in str(told.value)
    assert "\n" not in str(told.value)
    assert "softprompt-" not in str(told.value)  # no name of a temporary folder


def test_an_endless_list_of_files(hub: FakeHub) -> None:
    hub.answers[f"/api/models/{REPO}"] = lambda handler: handler.endless(LONG)
    refused("at most 4,194,304 bytes")
    assert hub.sent < 64 << 20  # what was under way already


@pytest.mark.parametrize("stated", [{}, {"Content_Length": 1568}, {"Content_Length": 10**15}])
def test_an_endless_file(hub: FakeHub, lm: FrozenLM, stated: dict[str, int]) -> None:
    content = own(lm)
    if stated.get("Content_Length") == 1568:
        stated = {"Content_Length": len(content)}
    listed(hub, [{"rfilename": OWN, "size": len(content) - 1}])
    sends(hub, OWN, lambda handler: handler.endless(LONG, **stated))
    refused(f"{len(content) - 1:,} bytes")
    assert hub.sent < 64 << 20


def test_an_endless_file_of_an_unknown_size(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "MAX_BYTES", 1 << 20)
    start = struct.pack("<Q", 46) + b'{"__metadata__":{"softprompt":"{}"},"a":null }'
    listed(hub, [{"rfilename": OWN}])
    sends(hub, OWN, lambda handler: handler.endless(start + LONG))
    with pytest.raises(SoftPromptError):
        sp.pull(REPO)
    assert hub.sent < 64 << 20


def test_an_endless_refusal_and_an_endless_redirect(hub: FakeHub) -> None:
    path = f"/api/models/{REPO}"
    hub.answers[path] = lambda handler: handler.endless(LONG, status=404)
    refused("no repository")
    hub.answers[path] = lambda handler: handler.endless(LONG, status=302, Location=path)
    refused("redirects without an end")
    assert hub.sent < 256 << 20


def test_a_file_that_drips(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def drip(handler: Handler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.close_connection = True
        with suppress(OSError):
            for _ in range(200):
                handler.wfile.write(b"x")
                time.sleep(0.02)

    monkeypatch.setattr(hub_http, "PATIENCE", 0.1)
    hub.answers[f"/api/models/{REPO}"] = drip
    refused("1,000 bytes of")


def test_a_redirect_leads_to_the_web_alone(hub: FakeHub) -> None:
    hub.answers[f"/api/models/{REPO}"] = lambda handler: handler.send(302, b"", Location="file:///etc/passwd")
    refused("redirect to a safe address")


@pytest.mark.parametrize("size", [(4 << 30) + 1, 10**30])
def test_a_file_that_is_too_large_is_not_asked_for(hub: FakeHub, size: int) -> None:
    listed(hub, [{"rfilename": OWN, "size": size}])
    refused("at most 4,294,967,296 bytes")
    assert len(hub.asked) == 1


def test_lengths_that_do_not_agree(hub: FakeHub, lm: FrozenLM) -> None:
    content = own(lm)
    for size, sent in ((len(content) + 5, content), (len(content), content[:-5])):
        listed(hub, [{"rfilename": OWN, "size": size}])
        sends(hub, OWN, lambda handler, sent=sent: handler.send(200, sent))  # type: ignore[misc]
        refused("announced")
    listed(hub, [{"rfilename": OWN, "size": len(content)}])
    sends(hub, OWN, lambda handler: broken(handler, content))
    refused(REPO)


def broken(handler: Handler, content: bytes) -> None:
    """Announces all and hangs up in the middle."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content[:100])
    handler.close_connection = True


def test_a_bomb_is_not_unpacked(hub: FakeHub) -> None:
    packed = gzip.compress(bytes(1 << 20))
    for path in (f"/api/models/{REPO}", f"/{REPO}/resolve/{'a' * 40}/{OWN}"):
        hub.answers = {}
        listed(hub, [{"rfilename": OWN, "size": len(packed)}])
        hub.answers[path] = lambda handler: handler.send(200, packed, Content_Encoding="gzip")
        refused("packed as 'gzip'")


@pytest.mark.parametrize(
    "document",
    [
        b"[]",
        b"nonsense",
        b"[" * 100_000,
        b'{"sha": "../../x", "siblings": []}',
        b'{"sha": "' + b"a" * 40 + b'", "siblings": [{"rfilename": 3}]}',
        b'{"sha": "' + b"a" * 40 + b'", "siblings": [{"rfilename": "soft_prompt.safetensors", "size": NaN}]}',
        b'{"sha": "' + b"a" * 40 + b'", "siblings": [{"rfilename": "soft_prompt.safetensors", "size": -1}]}',
        b'{"sha": "' + b"a" * 40 + b'", "siblings": 7}',
    ],
)
def test_a_list_of_files_that_is_none(hub: FakeHub, document: bytes) -> None:
    hub.answers[f"/api/models/{REPO}"] = lambda handler: handler.send(200, document)
    refused("list of the files")
    assert len(hub.asked) == 1


def made_file(folder: Path, content: bytes) -> Path:
    path = folder / "sound.safetensors"
    path.write_bytes(content)
    return path


def header_only(count: int, header: bytes) -> bytes:
    return struct.pack("<Q", count) + header


def test_a_header_that_is_too_long_is_not_read(hub: FakeHub) -> None:
    listed(hub, [{"rfilename": OWN, "size": 1 << 30}])
    start = header_only((4 << 20) + 1, b"{")
    sends(hub, OWN, lambda handler: handler.endless(start + LONG, Content_Length=1 << 30))
    refused("header of at most 4,194,304 bytes", ArtifactError)
    assert hub.sent < 64 << 20


def test_a_model_is_not_downloaded(hub: FakeHub) -> None:
    start = save({"weight": torch.zeros(2, 2)})
    listed(hub, [{"rfilename": "model.safetensors", "size": 1 << 30}])
    sends(hub, "model.safetensors", lambda handler: handler.endless(start + LONG, Content_Length=1 << 30))
    refused("safetensors file of something else", ArtifactError)
    assert hub.sent < 64 << 20


def test_files_that_are_not_sound(hub: FakeHub, lm: FrozenLM, tmp_path: Path) -> None:
    content = own(lm)
    length = int.from_bytes(content[:8], "little")
    infinite = content[: 8 + length] + struct.pack("<f", float("nan")) + content[12 + length :]
    with safe_open(made_file(tmp_path, content), "pt") as opened:
        half = save({"soft_prompt": opened.get_tensor("soft_prompt").half()}, metadata=opened.metadata())
    for bad in (infinite, half, content[:-1], content[:50], b"", b"PK\x03\x04" + bytes(2000), header_only(3, b"[1]")):
        hub.hold(REPO, {OWN: bad})
        with pytest.raises(SoftPromptError) as told:
            sp.pull(REPO)
        assert REPO in str(told.value)
        assert "softprompt-" not in str(told.value)
    hub.hold(REPO, {OWN: infinite})
    refused("finite numbers", ArtifactError)
    hub.hold(REPO, {OWN: half})
    refused("found F16", ArtifactError)


def test_sound_files_that_nothing_can_use(hub: FakeHub, lm: FrozenLM) -> None:
    for options in (
        {"metrics": ({"metric": 3},)},
        {"metrics": ({**METRIC, "value": "high"},)},
        {"base": "x\x1b]0;title\x07"},
        {"template": "no place for it"},
        {"verbalizer": {"one": ("one",)}},
    ):
        hub.hold(REPO, {OWN: made(lm, **options).encoded()})
        with pytest.raises(SoftPromptError):
            sp.pull(REPO)


def test_names_of_files_lead_nowhere(hub: FakeHub, lm: FrozenLM) -> None:
    names = ["../../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..\\x.safetensors", "%2e%2e.safetensors"]
    for name in names:
        hub.hold(REPO, {name: own(lm)})
        hub.asked.clear()
        refused("found")
        assert len(hub.asked) == 1


def test_a_file_that_was_put_there_by_hand(hub: FakeHub, lm: FrozenLM) -> None:
    hub.hold(REPO, {"sst2.safetensors": own(lm), "README.md": b"hello"})
    assert torch.equal(sp.pull(REPO).vectors, made(lm).vectors)
    hub.hold(REPO, {"a.safetensors": own(lm), "b.safetensors": own(lm)})
    refused("a.safetensors, b.safetensors")


def test_nothing_is_unpickled(hub: FakeHub) -> None:
    hub.hold(REPO, {"pytorch_model.bin": b"\x80\x04."})
    refused("a pickle")
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4, "base_model_name_or_path": "x/y"}
    hub.hold(REPO, {"adapter_config.json": json.dumps(config).encode(), "adapter_model.bin": b"\x80\x04."})
    refused("a pickle")
    assert not any(one.path.endswith(".bin") for one in hub.asked)
    hub.hold(REPO, {"README.md": b"hello"})
    refused("README.md")


# --- repositories of PEFT alone ------------------------------------------------------------------


def adapter(folder: Path) -> dict[str, bytes]:
    model = get_peft_model(make_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    model.save_pretrained(str(folder))
    return {name: (folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}


def test_an_adapter_of_peft_needs_its_base_model(hub: FakeHub, lm: FrozenLM, tmp_path: Path) -> None:
    files = adapter(tmp_path)
    config = {**json.loads(files["adapter_config.json"]), "base_model_name_or_path": "some/base"}
    hub.hold(REPO, {**files, "adapter_config.json": json.dumps(config).encode()})
    refused("'some/base'; give it with --base")
    assert not any(one.path.endswith("model.safetensors") for one in hub.asked)
    bare = "{soft_prompt}Text: {input}\nLabel: {target}"
    found = sp.pull(REPO, lm=lm, template=bare, labels=["negative", "positive"])
    assert (found.name, found.template, found.num_virtual_tokens) == ("films", bare, 3)
    assert list(found.verbalizer or ()) == ["negative", "positive"]


def test_other_adapters_are_refused_before_their_weights(hub: FakeHub, lm: FrozenLM) -> None:
    config = json.dumps({"peft_type": "LORA"}).encode()
    hub.hold(REPO, {"adapter_config.json": config, "adapter_model.safetensors": b"x" * 100})
    refused("'LORA'", ArtifactError, lm=lm)
    assert not any(one.path.endswith("model.safetensors") for one in hub.asked)


def test_an_endless_configuration(hub: FakeHub, lm: FrozenLM) -> None:
    listed(hub, [{"rfilename": "adapter_config.json"}, {"rfilename": "adapter_model.safetensors"}])
    sends(hub, "adapter_config.json", lambda handler: handler.endless(LONG))
    refused("at most 1,048,576 bytes", lm=lm)
    assert hub.sent < 64 << 20


def test_its_own_file_says_its_template_itself(hub: FakeHub, lm: FrozenLM) -> None:
    sp.push(lm, made(lm), REPO, check=False)
    for options in ({"template": TEMPLATE}, {"labels": ["a", "b"]}, {"task": 0}):
        refused("Leave them out", ConfigError, **options)


@pytest.mark.parametrize("place", ["/api/repos/create", f"/api/models/{REPO}/commit/main"])
def test_a_hub_that_says_nothing_while_something_is_written(
    hub: FakeHub, lm: FrozenLM, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    silent = threading.Event()

    def wait(_: Handler) -> None:
        silent.wait(20)

    hub.answers[place] = wait
    monkeypatch.setattr(hub_http, "WRITE_SECONDS", 0.2)
    began, before = time.monotonic(), get_session().timeout
    try:
        with pytest.raises(HubError, match="cannot be reached for me/films"):
            sp.push(lm, made(lm), REPO, check=False)
    finally:
        silent.set()
    assert time.monotonic() - began < 10
    assert get_session().timeout == before
