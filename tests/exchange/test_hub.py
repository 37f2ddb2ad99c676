"""Soft prompts go to a stand-in of the Hugging Face Hub over HTTP and come back; hostile answers are refused."""

from __future__ import annotations

import gzip
import json
import logging
import struct
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants, hf_api
from huggingface_hub.utils import logging as library_logging
from peft import PeftModel, PromptTuningConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save

import softprompt as sp
from softprompt.data.example import Example
from softprompt.errors import ArtifactError, BaseModelError, ConfigError, HubError, SoftPromptError, SoftPromptWarning
from softprompt.exchange import hub as hub_module
from softprompt.exchange import hub_http
from softprompt.model.frozen import FrozenLM
from softprompt.model.request import Request
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tasks.task import Task
from softprompt.text.tokens import SOFT
from tests.conftest import make_model, make_tokenizer, tiny
from tests.fake_hub import TOKEN, FakeHub, Handler, running

TEMPLATE = "Text: {soft_prompt} {input}\nLabel: {target}"
LABELS = {"negative": ("negative",), "positive": ("positive", "great")}
METRIC = {
    "split": "validation",
    "metric": "accuracy",
    "value": 0.9,
    "stderr": 0.03,
    "low": 0.8256,
    "high": 0.9448,
    "n": 100,
}
REPO = "me/films"
OWN = "soft_prompt.safetensors"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with running(monkeypatch) as found:
        yield found


@pytest.fixture(scope="module")
def lm() -> FrozenLM:
    return tiny("llama")


def made(lm: FrozenLM, **options: Any) -> SoftPrompt:
    fields: dict[str, Any] = {
        "name": "films",
        "base": "someone/tiny",
        "base_fingerprint": lm.fingerprint,
        "tokenizer_fingerprint": lm.tokenizer_fingerprint,
        "template": TEMPLATE,
        "verbalizer": LABELS,
        "metrics": (METRIC,),
        "training": {"lr": 0.3, "steps": 10},
        "data": {"validation": {"source": "/home/me/secret/dev.jsonl", "fingerprint": "ab", "rows": 100}},
        "base_settings": lm.settings,
    }
    shape = (4, *lm.kv_shape) if options.get("parametrisation") == "prefix" else (4, lm.hidden_size)
    vectors = 0.15 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return SoftPrompt(vectors=vectors, **fields | options)


def for_peft(patch: pytest.MonkeyPatch, hub: FakeHub) -> None:
    """PEFT asks the stand-in, too: the library reads its address from the environment when it is imported."""
    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(hf_api.api, "endpoint", hub.url)


def card_of(hub: FakeHub, repo: str = REPO, branch: str = "main") -> str:
    return hub.repos[repo].branches[branch]["README.md"].decode()


# --- there and back ------------------------------------------------------------------------------


def test_a_soft_prompt_comes_back_bit_for_bit(hub: FakeHub, lm: FrozenLM) -> None:
    soft_prompt = made(lm)
    done = sp.push(lm, soft_prompt, REPO)
    assert done.files.keys() == {OWN, "adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert hub.repos[REPO].branches["main"].keys() == done.files.keys()
    assert done.peft is not None
    assert done.peft.passed
    again = sp.pull(REPO)
    assert again.encoded() == soft_prompt.encoded()
    other = sp.pull(REPO, name="other")
    assert other.name == "other"
    assert torch.equal(other.vectors, soft_prompt.vectors)


def test_the_login_goes_to_the_hub_alone(hub: FakeHub, lm: FrozenLM) -> None:
    sp.push(lm, made(lm), REPO, check=False)
    sp.pull(REPO)
    assert {one.host for one in hub.asked} == {"127.0.0.1", "localhost"}
    assert {one.authorization for one in hub.asked if one.host == "localhost"} == {None}
    assert f"Bearer {TOKEN}" in {one.authorization for one in hub.asked if one.host == "127.0.0.1"}


def test_peft_loads_the_repository_by_its_name(hub: FakeHub, lm: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    soft_prompt = made(lm)
    sp.push(lm, soft_prompt, REPO, check=False)
    for_peft(monkeypatch, hub)
    model: Any = PeftModel.from_pretrained(make_model("llama"), REPO).eval()
    request = Task.of(lm, soft_prompt).open_request(Example({"input": "a dull film"}, None), 1)
    words = tuple((token,) for token in range(len(lm.embedding)))
    expected = lm.score([Request(request.ids, request.shared, words, 0)], [soft_prompt.vectors])[0]
    ids = torch.tensor([request.ids[request.ids.index(SOFT) + 1 :]])
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1].log_softmax(dim=0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_the_code_of_the_card_runs(
    hub: FakeHub, lm: FrozenLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    soft_prompt = made(lm, verbalizer=None)
    sp.push(lm, soft_prompt, REPO, check=False)
    blocks = card_of(hub).split("```python\n")[1:]
    ours, peft = (block.split("\n```")[0] for block in blocks)
    for_peft(monkeypatch, hub)
    monkeypatch.setattr(sp, "load_model", lambda base: lm if base == "someone/tiny" else pytest.fail(base))
    exec(ours, {})
    written = capsys.readouterr().out
    answer = sp.predict(lm, soft_prompt, ["A text."])[0]
    assert answer.text is not None
    assert answer.text in written
    loaders = {"AutoModelForCausalLM": make_model("llama"), "AutoTokenizer": make_tokenizer()}
    for name, value in loaders.items():
        given = type("Loader", (), {"from_pretrained": staticmethod(lambda base, value=value: value)})
        monkeypatch.setattr(f"transformers.{name}", given)
    exec(peft, {})
    first = answer.text.split()[:1]
    assert capsys.readouterr().out.split()[:1] == first


def test_a_branch_is_made_and_read(hub: FakeHub, lm: FrozenLM) -> None:
    sp.push(lm, made(lm), REPO, check=False)
    other = made(lm, template="{soft_prompt}{input} {target}")
    sp.push(lm, other, REPO, revision="seed/2", check=False)
    assert sp.pull(REPO, revision="seed/2").template == other.template
    assert sp.pull(REPO).template == TEMPLATE
    assert "revision='seed/2'" in card_of(hub, branch="seed/2")
    with pytest.raises(HubError, match="not this revision"):
        sp.pull(REPO, revision="no-such")


def test_pushed_again_the_new_one_is_there_without_files_of_the_old(hub: FakeHub, lm: FrozenLM) -> None:
    sp.push(lm, made(lm), REPO, check=False)
    late = made(lm, template="{input} {soft_prompt}{target}")
    done = sp.push(lm, late, REPO, check=False)
    assert done.without_peft is not None
    assert hub.repos[REPO].branches["main"].keys() == {OWN, "README.md"}
    assert "no exact form" in card_of(hub)
    assert "PeftModel" not in card_of(hub)
    assert sp.pull(REPO).encoded() == late.encoded()


def test_a_trained_prefix_comes_back(hub: FakeHub, lm: FrozenLM) -> None:
    soft_prompt = made(lm, parametrisation="prefix")
    done = sp.push(lm, soft_prompt, REPO)
    assert done.peft is not None
    assert done.peft.passed
    assert json.loads(hub.repos[REPO].branches["main"]["adapter_config.json"])["peft_type"] == "PREFIX_TUNING"
    assert sp.pull(REPO, lm=lm).encoded() == soft_prompt.encoded()


def test_another_base_model_is_refused_where_one_is_given(hub: FakeHub, lm: FrozenLM) -> None:
    with pytest.raises(BaseModelError):
        sp.push(tiny("gpt2"), made(lm), REPO)
    assert hub.asked == []
    sp.push(lm, made(lm), REPO, check=False)
    with pytest.raises(BaseModelError, match="someone/tiny"):
        sp.pull(REPO, lm=tiny("gpt2"))


# --- the model card ------------------------------------------------------------------------------


def test_the_metadata_are_those_of_the_hub(hub: FakeHub, lm: FrozenLM) -> None:
    sp.push(lm, made(lm), REPO, check=False)
    data: Any = ModelCard(card_of(hub)).data
    assert (data.library_name, data.pipeline_tag, data.base_model) == (
        "softprompt",
        "text-classification",
        "someone/tiny",
    )
    assert {"softprompt", "peft"} <= set(data.tags)
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_split) == ("accuracy", 0.9, "validation")
    assert "n = 100" in result.metric_name
    assert "0.8256 to 0.9448" in result.metric_name
    assert "/home/me" not in card_of(hub)
    raw = yaml.safe_load(card_of(hub).split("---\n")[1])
    assert raw["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.9
    for word in ("| negative | negative |", "positive, great", "| lr | 0.3 |", TEMPLATE, "vllm serve someone/tiny"):
        assert word in card_of(hub)


def test_free_text_is_text_generation(hub: FakeHub, lm: FrozenLM) -> None:
    sp.push(lm, made(lm, verbalizer=None, metrics=({**METRIC, "value": None},)), REPO, check=False)
    data: Any = ModelCard(card_of(hub)).data
    assert (data.pipeline_tag, data.eval_results) == ("text-generation", None)


def test_the_embedded_base_model_has_its_name_on_the_hub(hub: FakeHub, lm: FrozenLM) -> None:
    done = sp.push(lm, made(lm, base="smollm2-135m"), REPO, check=False)
    data: Any = ModelCard(card_of(hub)).data
    assert done.base_model == data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "sp.load_model('smollm2-135m')" in card_of(hub)


@pytest.mark.parametrize("base", ["/home/me/secret/model", "model.gguf", "C:\\models\\x", "a-folder-there"])
def test_a_place_on_this_machine_is_no_base_model(
    hub: FakeHub, lm: FrozenLM, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a-folder-there").mkdir()
    monkeypatch.chdir(tmp_path)
    done = sp.push(lm, made(lm, base=base), REPO, check=False)
    assert done.base_model is None
    assert "base_model" not in yaml.safe_load(card_of(hub).split("---\n")[1])
    assert base not in card_of(hub)
    assert lm.fingerprint in card_of(hub)
    assert json.loads(hub.repos[REPO].branches["main"]["adapter_config.json"])["base_model_name_or_path"] is None


def test_marks_in_labels_and_template_stay_text(hub: FakeHub, lm: FrozenLM) -> None:
    template = "```\n{soft_prompt}{input}\n```\n{target}"
    sp.push(lm, made(lm, template=template, verbalizer={"a|b": ("<b>",), "c\nd": ("e",)}), REPO, check=False)
    card = card_of(hub)
    assert f"````\n{template}\n````" in card
    assert "a\\|b" in card
    assert "<b>" not in card.split("## Use")[0]


# --- what the Hub refuses ------------------------------------------------------------------------


def test_a_private_repository_stays_private(hub: FakeHub, lm: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sp.push(lm, made(lm), REPO, private=True, check=False).private
    assert hub.repos[REPO].private
    assert sp.push(lm, made(lm), REPO, check=False).private
    assert sp.pull(REPO).name == "films"
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="HF_TOKEN"):
        sp.pull(REPO)


def test_nothing_goes_to_a_public_repository_where_a_private_one_is_asked_for(hub: FakeHub, lm: FrozenLM) -> None:
    hub.hold(REPO, {})
    with pytest.raises(HubError, match="exists and is public; nothing was pushed"):
        sp.push(lm, made(lm), REPO, private=True, check=False)
    assert hub.repos[REPO].branches == {"main": {}}


def test_what_somebody_else_keeps_is_not_overwritten(hub: FakeHub, lm: FrozenLM) -> None:
    held = {"README.md": b"mine", "adapter_config.json": b"{}", "adapter_model.safetensors": b"lora"}
    hub.hold(REPO, held)
    with pytest.raises(HubError, match="found adapter_config"):
        sp.push(lm, made(lm), REPO, check=False)
    with pytest.raises(HubError, match="found adapter_config"):
        sp.push(lm, made(lm), REPO, revision="new", check=False)
    assert hub.repos[REPO].branches == {"main": held}
    hub.hold(REPO, {".gitattributes": b"", "README.md": b"---\n---\n"})
    sp.push(lm, made(lm), REPO, check=False)
    assert OWN in hub.repos[REPO].branches["main"]


@pytest.mark.parametrize(
    ("status", "words"), [(401, "HF_TOKEN"), (403, "forbids"), (404, "no repository"), (500, "try again later")]
)
def test_what_the_hub_refuses_is_one_sentence(hub: FakeHub, lm: FrozenLM, status: int, words: str) -> None:
    def refuse(handler: Handler) -> None:
        handler.send(status, {"error": f"no\nnot with {TOKEN}"}, X_Error_Message=f"no, {TOKEN}")

    for path in ("/api/repos/create", f"/api/models/{REPO}", f"/api/models/{REPO}/preupload/main"):
        if status == 500 and "preupload" in path:
            continue  # the library asks again and again
        hub.answers = {path: refuse}
        with pytest.raises(HubError) as told:
            sp.push(lm, made(lm), REPO, check=False)
        assert words in str(told.value)
        assert REPO in str(told.value)
        assert "\n" not in str(told.value)
        assert TOKEN not in "".join(traceback.format_exception(told.value))
    hub.answers = {f"/api/models/{REPO}": refuse}
    with pytest.raises(HubError) as told:
        sp.pull(REPO)
    assert words in str(told.value)
    assert TOKEN not in "".join(traceback.format_exception(told.value))


@pytest.mark.parametrize("path", ["/api/repos/create", "/api/validate-yaml", f"/api/models/{REPO}/commit/main"])
@pytest.mark.parametrize("content", [b"<html>", b"[]", b"{}"])
def test_nonsense_is_one_sentence(hub: FakeHub, lm: FrozenLM, path: str, content: bytes) -> None:
    if (path, content) == ("/api/validate-yaml", b"{}"):
        return  # no errors and no warnings
    hub.answers = {path: lambda handler: handler.send(200, content)}
    with pytest.raises(HubError, match="cannot be used"):
        sp.push(lm, made(lm), REPO, check=False)


def test_a_login_is_needed_to_push(hub: FakeHub, lm: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="hf auth login"):
        sp.push(lm, made(lm), REPO, check=False)
    assert hub.asked == []


def test_offline_nothing_is_asked(hub: FakeHub, lm: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for action in (lambda: sp.push(lm, made(lm), REPO), lambda: sp.pull(REPO)):
        with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
            action()
    assert hub.asked == []


def test_nobody_at_the_address(hub: FakeHub, lm: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://me:secret@127.0.0.1:9")
    for action in (lambda: sp.push(lm, made(lm), REPO, check=False), lambda: sp.pull(REPO)):
        with pytest.raises(HubError, match=r"Hub at 127\.0\.0\.1:9 cannot be reached") as told:
            action()
        assert "secret" not in "".join(traceback.format_exception(told.value))
    monkeypatch.setenv("HF_ENDPOINT", "file:///etc")
    with pytest.raises(HubError, match="HF_ENDPOINT"):
        sp.pull(REPO)


@pytest.mark.parametrize("repo", ["films", "me/films/x", "../../x", "me/..", "/etc/x", "me/fi lms", "me/", "mé/x", ""])
def test_only_user_and_repo_name_a_repository(hub: FakeHub, lm: FrozenLM, repo: str) -> None:
    for action in (lambda: sp.push(lm, made(lm), repo), lambda: sp.pull(repo)):
        with pytest.raises(HubError, match="USER/REPO"):
            action()
    assert hub.asked == []


def test_no_log_holds_the_login(hub: FakeHub, lm: FrozenLM, caplog: pytest.LogCaptureFixture) -> None:
    library: Any = library_logging
    library.set_verbosity_debug()
    library.enable_propagation()
    try:
        with caplog.at_level(logging.DEBUG):
            sp.push(lm, made(lm), REPO, check=False)
            sp.pull(REPO)
    finally:
        library.disable_propagation()
        library.set_verbosity_warning()
    assert caplog.text
    assert TOKEN not in caplog.text
    held = repr(hub.repos[REPO].branches)
    assert TOKEN not in held


@pytest.mark.parametrize("token", ["hf_sécret", "hf_se\ncret", "hf_\x00secret"])
def test_a_login_that_is_none_is_not_said(
    hub: FakeHub, lm: FrozenLM, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "\x00" in token:
        path = Path(str(constants.HF_TOKEN_PATH))  # no variable of the environment can hold it
        path.write_text(token)
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    for action in (lambda: sp.push(lm, made(lm), REPO, check=False), lambda: sp.pull(REPO)):
        with pytest.raises(HubError) as told:
            action()
        shown = "".join(traceback.format_exception(told.value))
        assert token not in shown
        assert "cret" not in str(told.value)


def test_the_hub_warns_of_the_card(hub: FakeHub, lm: FrozenLM) -> None:
    answer = {"errors": [], "warnings": [{"message": "the licence is missing"}]}
    hub.answers = {"/api/validate-yaml": lambda handler: handler.send(200, answer)}
    with pytest.warns(SoftPromptWarning, match="the Hub says"):
        sp.push(lm, made(lm), REPO, check=False)


# --- what is pulled is untrusted -----------------------------------------------------------------

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
