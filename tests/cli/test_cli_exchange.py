"""``softprompt export`` and ``import``, with PEFT on the other side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import softprompt as sp
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from tests.conftest import Run

PLACE = ("--device", "cpu", "--dtype", "fp32")


def test_a_tuned_soft_prompt_goes_out_and_comes_back(run: Run, train: Run, home: Path, tmp_path: Path) -> None:
    train("train.jsonl", "--name", "films")
    ran = run("export", "films", "out", "--json", *PLACE)
    assert ran.json["files"].keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert ran.json["check"]["passed"]
    assert ran.json["check"]["same_text"] == 3
    back = run(
        "import",
        "out",
        "--name",
        "again",
        "--labels",
        "negative,positive",
        "--template",
        "{soft_prompt}Text: {input}\\nLabel: {target}",
        "--json",
        *PLACE,
    )
    assert back.json["kind"] == "PROMPT_TUNING"
    assert back.json["check"]["passed"]
    ours, again = (SoftPrompt.load(home / f"{name}.safetensors") for name in ("films", "again"))
    assert torch.equal(ours.vectors, again.vectors)
    scores = [run("evaluate", name, "test.jsonl", "--json", *PLACE).json["value"] for name in ("films", "again")]
    assert scores[0] == scores[1]
    more = train("train.jsonl", "--name", "more", "--init", "again")
    assert more.code == 0
    assert run("inspect", "again").code == 0


def test_an_adapter_of_peft_is_evaluated(run: Run, home: Path, base: str, tmp_path: Path) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    model.save_pretrained("theirs")
    ran = run("import", "theirs", "--name", "theirs", *PLACE)
    assert ran.code == 0
    assert "checked with PEFT on 3 texts" in ran.out
    answer = run("predict", "theirs", "a dull film", "--max-new-tokens", "5", "--json", *PLACE).json["predictions"][0]
    lm = sp.load_model(base, dtype="fp32", device="cpu")
    ids = torch.tensor([lm.tokenizer("a dull film").input_ids])
    adapted: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "theirs").eval()
    found = adapted.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert answer["text"] == str(lm.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def test_the_same_in_python(base: str, tmp_path: Path, train: Run, home: Path) -> None:
    train("train.jsonl", "--name", "films")
    lm = sp.load_model(base, dtype="fp32", device="cpu")
    prompt = sp.Store().load("films")
    found = sp.export(lm, prompt, tmp_path / "kv", "cartridge")
    assert found is not None
    assert found.passed
    template = "{soft_prompt}Text: {input}\nLabel: {target}"
    again = sp.from_peft(lm, tmp_path / "kv", template=template, labels=["negative", "positive"])
    assert again.parametrisation == "prefix"
    one, other = sp.predict(lm, [(prompt, "a dull film"), (again, "a dull film")])
    assert one.text == other.text
    assert one.probability == pytest.approx(other.probability, abs=1e-5)
    sp.export(lm, prompt, tmp_path / "npy", "npy")
    assert torch.equal(sp.from_peft(lm, tmp_path / "npy" / "films.npy").vectors, prompt.vectors)


def test_files_that_answer_otherwise_are_not_taken_in(
    run: Run, train: Run, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("train.jsonl", "--name", "films")
    run("export", "films", "out", *PLACE)
    config = json.loads(Path("out/adapter_config.json").read_text())
    Path("out/adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": ""}))
    ran = run("import", "out", "--name", "x", *PLACE)
    assert (ran.code, ran.out) == (2, "")
    assert "give --base" in ran.err
    numbers = load_file("out/adapter_model.safetensors")["prompt_embeddings"]
    save_file({"prompt_embeddings": numbers[:, :8].contiguous()}, "out/adapter_model.safetensors")
    ran = run("import", "out", "--name", "x", "--base", str(SoftPrompt.load(home / "films.safetensors").base), *PLACE)
    assert (ran.code, ran.out) == (2, "")
    assert "32 numbers a virtual token" in ran.err
    assert not (home / "x.safetensors").exists()
    ran = run("import", "out", "--name", "films", *PLACE)
    assert "taken" in ran.err
    ran = run("export", "films", "out", *PLACE)
    assert (ran.code, ran.out) == (2, "")
    assert "empty folder" in ran.err
