"""``softprompt push`` and ``pull`` with a stand-in of the Hugging Face Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model

from softprompt.soft_prompts.soft_prompt import SoftPrompt
from tests.conftest import Ran, Run, make_model
from tests.fake_hub import TOKEN, FakeHub, Handler, running

PLACE = ("--device", "cpu", "--dtype", "fp32")
REPO = "me/films"
OWN = "soft_prompt.safetensors"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with running(monkeypatch) as found:
        yield found


def refused(ran: Ran, words: str) -> None:
    """One sentence, nothing on stdout, and not a word of the login."""
    assert (ran.code, ran.out) == (2, "")
    sentence = ran.err.splitlines()[-1]
    assert sentence.startswith("error: ")
    assert words in sentence
    assert "Traceback" not in ran.err
    assert TOKEN not in ran.err


def test_a_tuned_soft_prompt_is_pushed_and_pulled(run: Run, train: Run, home: Path, hub: FakeHub, base: str) -> None:
    train("train.jsonl", "--name", "films")
    ran = run("push", "films", REPO, "--private", "--json", *PLACE)
    assert ran.json["files"].keys() == {OWN, "adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert ran.json["check"]["passed"]
    assert ran.json["private"]
    assert ran.json["base_model"] is None
    assert TOKEN not in ran.out + ran.err
    card = hub.repos[REPO].branches["main"]["README.md"].decode()
    assert base not in card
    assert "held out of train.jsonl" not in card
    assert "accuracy" in card
    back = run("pull", REPO, "--name", "again", "--json")
    ours, again = (SoftPrompt.load(home / f"{name}.safetensors") for name in ("films", "again"))
    assert torch.equal(ours.vectors, again.vectors)
    assert (back.json["kind"], back.json["base"], back.json["commit"]) == ("softprompt", base, ran.json["commit"])
    assert TOKEN not in back.out + back.err
    assert base.encode() not in hub.repos[REPO].branches["main"][OWN]  # the store knows where this base model is
    answers = [run("predict", name, "a dull film", "--json", *PLACE).json["predictions"] for name in ("films", "again")]
    assert answers[0] == answers[1]


def test_a_base_model_at_another_place_is_given_by_hand(
    run: Run, train: Run, home: Path, hub: FakeHub, base: str
) -> None:
    train("train.jsonl", "--name", "films")
    run("push", "films", REPO, "--no-check", "--json", *PLACE)
    (home / "films.safetensors").unlink()
    assert run("pull", REPO, "--json").json["base"] == "path/to/tiny"
    refused(run("predict", "films", "a dull film", *PLACE), "path/to/tiny")
    assert run("predict", "films", "a dull film", "--base", base, *PLACE).code == 0
    assert run("pull", REPO, "--name", "mine", "--base", base, "--json", *PLACE).json["base"] == base
    assert run("predict", "mine", "a dull film", *PLACE).code == 0


@pytest.mark.usefixtures("no_model")
def test_pull_loads_no_model_and_says_which_one_is_needed(
    run: Run, stored: SoftPrompt, home: Path, hub: FakeHub
) -> None:
    content = (home / "films.safetensors").read_bytes()
    hub.hold(REPO, {OWN: content})
    refused(run("pull", REPO), "taken")
    assert hub.asked == []
    ran = run("pull", REPO, "--overwrite")
    assert ran.code == 0
    assert "some-base" in ran.out
    assert (home / "films.safetensors").read_bytes() == content
    refused(run("pull", REPO, "--name", "../x"), "'../x'")
    refused(run("pull", REPO, "--name", ".x"), "'.x'")
    refused(run("pull", REPO, "--name", "x", "--template", "{soft_prompt}{input}{target}"), "Leave them out")
    assert {path.name for path in home.glob("*.safetensors")} == {"films.safetensors"}


@pytest.mark.usefixtures("no_model")
def test_what_cannot_be_is_said_before_a_model_is_loaded(
    run: Run, stored: SoftPrompt, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(run("push", "films", "films"), "USER/REPO")
    refused(run("push", "no-such", REPO), "'no-such'")
    monkeypatch.delenv("HF_TOKEN")
    refused(run("push", "films", REPO), "hf auth login")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(run("push", "films", REPO), "HF_HUB_OFFLINE")
    refused(run("pull", REPO, "--name", "x"), "HF_HUB_OFFLINE")
    assert hub.asked == []


@pytest.mark.usefixtures("no_model")
def test_nothing_is_stored_of_what_is_refused(run: Run, home: Path, hub: FakeHub) -> None:
    def endless(handler: Handler) -> None:
        handler.endless(b"x" * 65536)

    hub.answers[f"/api/models/{REPO}"] = endless
    refused(run("pull", REPO), "at most 4,194,304 bytes")
    hub.answers = {}
    for files, words in (
        ({OWN: b"x" * 100}, OWN),
        ({"pytorch_model.bin": b""}, "a pickle"),
        ({"../../x.safetensors": b""}, "../../x.safetensors"),
        ({}, "no files"),
    ):
        hub.hold(REPO, files)
        refused(run("pull", REPO), words)
    refused(run("pull", "me/other"), "no repository me/other")
    assert not list(home.glob("**/*.safetensors"))


def test_an_adapter_of_peft_is_pulled(run: Run, home: Path, hub: FakeHub, base: str, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    model = get_peft_model(make_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    model.save_pretrained(str(folder))
    hub.hold(
        REPO, {name: (folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}
    )
    refused(run("pull", REPO), "--base")
    ran = run("pull", REPO, "--base", base, "--template", "{soft_prompt}{input}\\nLabel: {target}", "--json", *PLACE)
    assert ran.json["kind"] == "PROMPT_TUNING"
    assert ran.json["check"]["passed"]
    assert SoftPrompt.load(home / "films.safetensors").template == "{soft_prompt}{input}\nLabel: {target}"
    assert json.loads(run("list", "--json").out)["soft_prompts"][0]["base"] == base
