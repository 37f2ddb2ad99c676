"""Soft prompts for encoder–decoders as other tools have them: Google's arrays, PEFT's folders, transformers' own
``generate``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from softprompt.data.example import Example
from softprompt.errors import ArtifactError
from softprompt.exchange.card import card
from softprompt.exchange.embedded import embedded
from softprompt.exchange.exporting import export
from softprompt.exchange.importing import adopt, find
from softprompt.generation.decoder import generate
from softprompt.model.frozen import FrozenLM
from softprompt.model.request import Sampling
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tasks.task import Task
from tests.encoder_decoders import encoder_decoder, make_encoder_decoder, reference, tokenizer_of

TEMPLATE = "Review: {soft_prompt}{input}\nAnswer: {target}"
KINDS = ("t5", "bart", "t5gemma")
TEXTS = ("a dull film", "one of the best movies of the year", "A text.")


def made(lm: FrozenLM, template: str = TEMPLATE) -> SoftPrompt:
    return SoftPrompt(
        vectors=torch.randn(4, 32, generator=torch.Generator().manual_seed(1)),
        name="random",
        base=lm.name,
        base_fingerprint=lm.fingerprint,
        tokenizer_fingerprint=lm.tokenizer_fingerprint,
        template=template,
        base_settings=lm.settings,
    )


def written(lm: FrozenLM, soft_prompt: SoftPrompt) -> list[tuple[int, ...]]:
    task = Task.of(lm, soft_prompt)
    requests = [task.open_request(Example({"input": text}, None), 8) for text in TEXTS]
    return [one.ids for one in generate(lm, requests, [soft_prompt.vectors], Sampling(max_new_tokens=8))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to", ["npy", "peft"])
def test_what_goes_out_is_checked_by_the_other_library(kind: str, to: str, tmp_path: Path) -> None:
    lm = encoder_decoder(kind)
    if to == "peft":
        pytest.importorskip("peft")
    found = export(lm, made(lm), to, tmp_path / "out")
    assert found is not None
    assert found.passed, str(found)
    assert (found.by, found.same_text) == ("PEFT" if to == "peft" else "transformers", found.texts)


def test_googles_array_stands_before_the_encoders_input(tmp_path: Path) -> None:
    """float32 ``[P, H]``, then the tokens of the input with ``</s>`` at their end."""
    lm = encoder_decoder("t5-1.1")
    numbers = np.random.default_rng(0).standard_normal((5, 32)).astype(np.float32)
    np.save(tmp_path / "prompt.npy", numbers)
    soft_prompt, found = adopt(lm, find(tmp_path / "prompt.npy"), name="google")
    assert found is not None
    assert found.passed
    ids = torch.tensor([lm.tokenizer(TEXTS[0]).input_ids])
    given = torch.cat([torch.from_numpy(numbers)[None], reference("t5-1.1").get_input_embeddings()(ids)], dim=1)
    label = torch.tensor([lm.tokenizer(text_target="very good").input_ids])
    wanted = -reference("t5-1.1")(inputs_embeds=given, labels=label).loss * label.shape[1]
    request = Task.of(lm, soft_prompt).target_request(Example({"input": TEXTS[0]}, "very good"))
    assert float(lm.score([request], [soft_prompt.vectors])) == pytest.approx(float(wanted), rel=1e-5)
    export(lm, soft_prompt, "npy", tmp_path / "back", checked=False)
    assert np.array_equal(np.load(tmp_path / "back" / "google.npy"), numbers)


@pytest.mark.parametrize("submodules", [None, 1])
def test_pefts_folder_comes_in_with_the_half_that_peft_reads(submodules: int | None, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lm = encoder_decoder("t5")
    settings = peft.PromptTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4, num_transformer_submodules=submodules
    )
    model = peft.get_peft_model(make_encoder_decoder("t5"), settings)
    model.save_pretrained(str(tmp_path))
    soft_prompt, found = adopt(lm, find(tmp_path), name="theirs")
    assert soft_prompt.vectors.shape == (4, 32)
    assert found is not None
    assert found.passed
    assert found.by == "PEFT"


def test_a_prompt_of_several_tasks_for_the_decoder_too_is_refused(tmp_path: Path) -> None:
    config = {"peft_type": "MULTITASK_PROMPT_TUNING", "num_virtual_tokens": 4, "num_transformer_submodules": 2}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="found one for encoder and decoder"):
        find(tmp_path, 0)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_transformers_own_generate_takes_the_inputs(kind: str) -> None:
    lm = encoder_decoder(kind)
    soft_prompt = made(lm)
    inputs = embedded(lm, soft_prompt, [Example({"input": text}, None) for text in TEXTS])
    found = reference(kind).generate(**inputs, max_new_tokens=9, do_sample=False, num_beams=1)
    for theirs, ours in zip(found[:, len(lm.decoder_start) :].tolist(), written(lm, soft_prompt), strict=True):
        assert tuple(theirs[: len(ours)]) == ours
        assert len(ours) == 8 or theirs[len(ours)] == 1


@pytest.mark.parametrize("to", ["npy", "peft"])
def test_the_pages_code_gives_the_same_text(
    to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    make_encoder_decoder("t5").save_pretrained(tmp_path / "base")
    tokenizer_of("t5").save_pretrained(tmp_path / "base")
    lm = FrozenLM.load(tmp_path / "base", dtype="fp32", device="cpu")
    soft_prompt = made(lm)
    export(lm, soft_prompt, to, tmp_path / "out", checked=False)
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)
    assert "AutoModelForSeq2SeqLM" in code
    monkeypatch.chdir(tmp_path / "out")
    scope: dict[str, Any] = {}
    capsys.readouterr()
    exec(code, scope)
    request = Task.of(lm, soft_prompt).open_request(Example({"input": "A text."}, None), 32)
    (ours,) = generate(lm, [request], [soft_prompt.vectors], Sampling(max_new_tokens=32))
    assert capsys.readouterr().out.strip() == ours.text.strip()


def test_the_card_says_what_serves_it() -> None:
    lm = encoder_decoder("t5")
    page = card(Task.of(lm, made(lm)), made(lm), "me/films", None)
    assert "vLLM serves no encoder–decoders" in page
    assert "AutoModelForSeq2SeqLM.from_pretrained" in page
