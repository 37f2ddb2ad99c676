"""Soft prompts go to a stand-in of the Hugging Face Hub over HTTP and come back, with a model card."""

from __future__ import annotations

import json
import logging
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants, hf_api
from huggingface_hub.utils import logging as library_logging
from peft import PeftModel

import softprompt as sp
from softprompt.data.example import Example
from softprompt.errors import BaseModelError, HubError, SoftPromptWarning
from softprompt.model.frozen import FrozenLM
from softprompt.model.request import Request
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tasks.task import Task
from softprompt.text.tokens import SOFT
from tests.conftest import make_model, make_tokenizer, tiny
from tests.exchange.pushed import METRIC, OWN, REPO, TEMPLATE, made
from tests.fake_hub import TOKEN, FakeHub, Handler


def for_peft(patch: pytest.MonkeyPatch, hub: FakeHub) -> None:
    """PEFT asks the stand-in, too: the library reads its address from the environment when it is imported."""
    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(hf_api.api, "endpoint", hub.url)


def card_of(hub: FakeHub, repo: str = REPO, branch: str = "main") -> str:
    return hub.repos[repo].branches[branch]["README.md"].decode()


def seen(soft_prompt: SoftPrompt) -> SoftPrompt:
    """A soft prompt of ``made`` as others see it: without the folders of its data."""
    return replace(soft_prompt, data={"validation": {**soft_prompt.data["validation"], "source": "dev.jsonl"}})


# --- there and back ------------------------------------------------------------------------------


def test_a_soft_prompt_comes_back_bit_for_bit(hub: FakeHub, lm: FrozenLM) -> None:
    soft_prompt = made(lm)
    done = sp.push(lm, soft_prompt, REPO)
    assert done.files.keys() == {OWN, "adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert hub.repos[REPO].branches["main"].keys() == done.files.keys()
    assert done.peft is not None
    assert done.peft.passed
    again = sp.pull(REPO)
    assert again.encoded() == seen(soft_prompt).encoded()
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
    assert sp.pull(REPO).encoded() == seen(late).encoded()


def test_a_trained_prefix_comes_back(hub: FakeHub, lm: FrozenLM) -> None:
    soft_prompt = made(lm, parametrisation="prefix")
    done = sp.push(lm, soft_prompt, REPO)
    assert done.peft is not None
    assert done.peft.passed
    assert json.loads(hub.repos[REPO].branches["main"]["adapter_config.json"])["peft_type"] == "PREFIX_TUNING"
    assert sp.pull(REPO, lm=lm).encoded() == seen(soft_prompt).encoded()


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


def test_no_file_names_a_folder_of_this_machine(
    hub: FakeHub, lm: FrozenLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").mkdir()
    sources = {
        "/home/me/secret/my rows/train.jsonl": "train.jsonl",
        "held out of ~/secret/train.jsonl": "held out of train.jsonl",
        "secret/rows.csv": "rows.csv",
        "C:\\Users\\secret\\rows.csv": "rows.csv",
        "hf:./secret/rows:train": "hf:rows:train",
        "hf:someone/data/config:train": "hf:someone/data/config:train",
        "list in memory": "list in memory",
    }
    training = {"lr": 0.3, "init_text": "/either/or", "imported_from": {"folder": "/mnt/secret/adapter", "steps": [1]}}
    bases = {
        "/mnt/secret/base": "path/to/base",
        "~/secret/base.gguf": "path/to/base.gguf",
        "secret": "path/to/secret",
        "someone/tiny": "someone/tiny",
        "smollm2-135m": "smollm2-135m",
    }
    for number, (base, written) in enumerate(bases.items()):
        data = {f"split {i}": {"source": source, "fingerprint": "ab"} for i, source in enumerate(sources)}
        soft_prompt = made(lm, base=base, data=data, training=training)
        sp.push(lm, soft_prompt, f"me/n{number}", check=False)
        found = sp.pull(f"me/n{number}", name="films")
        assert found.base == written
        assert [one["source"] for one in found.data.values()] == list(sources.values())
        assert found.training == {**training, "imported_from": {"folder": "adapter", "steps": [1]}}
        for name, content in hub.repos[f"me/n{number}"].branches["main"].items():
            for folder in (b"/mnt", b"/home", b"secret/", b"Users"):
                assert folder not in content, name
        assert Task.of(lm, found).num_virtual_tokens == 4  # it is still known by its fingerprint
        assert (
            found.encoded() == replace(soft_prompt, base=found.base, data=found.data, training=found.training).encoded()
        )


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
