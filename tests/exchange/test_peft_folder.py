"""Soft prompts go to PEFT and come back with the same answers, as PEFT itself computes them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    CartridgeConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import save_file
from transformers import pipeline

from softprompt.data.example import Example
from softprompt.errors import ArtifactError, ConfigError, SoftPromptError, StoreError
from softprompt.exchange.exporting import export
from softprompt.exchange.importing import adopt, find
from softprompt.generation.decoder import generate
from softprompt.model.frozen import FrozenLM
from softprompt.model.request import Request, Sampling
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tasks.predict import Query
from softprompt.tasks.predict import predict as answer_queries
from softprompt.tasks.task import Task
from softprompt.text.encoder import recipe
from softprompt.text.tokens import SOFT
from tests.conftest import make_model, make_tokenizer, tiny
from tests.text.test_template import sentence_piece

FAMILIES = ("llama", "gpt2", "qwen2", "qwen3", "gpt_neox", "gemma3_text-sliding")
TEXTS = ("the plot is thin and the acting is worse", "a dull film", "great")
SEEDS = 20


def base(kind: str) -> Any:
    """The tiny model for PEFT, which reads settings that this family does not have if the configuration holds them."""
    model = make_model(kind)
    if kind == "gpt_neox":
        del model.config.num_key_value_heads
    return model


def made(lm: FrozenLM, seed: int, template: str, kv: bool = False) -> SoftPrompt:
    """A random soft prompt."""
    draw = torch.Generator().manual_seed(seed)
    count = 3 + seed % 5
    shape = (count, *lm.trained.kv_shape) if kv else (count, lm.hidden_size)
    return SoftPrompt(
        vectors=torch.randn(shape, generator=draw) * (0.5 if kv else 1.0) * lm.embedding_rms,
        name=f"random-{seed}",
        base=lm.name,
        base_fingerprint=lm.fingerprint,
        tokenizer_fingerprint=lm.tokenizer_fingerprint,
        template=template,
        parametrisation="prefix" if kv else "plain",
        base_settings=lm.settings,
    )


def ours(lm: FrozenLM, soft_prompt: SoftPrompt, text: str) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Log-probabilities ``[V]`` of the next token, and the tokens behind the soft prompt."""
    request = Task.of(lm, soft_prompt).open_request(Example({"input": text}, None), 1)
    words = tuple((token,) for token in range(len(lm.embedding)))
    asked = Request(request.ids, request.shared, words, 0)
    return lm.score([asked], [soft_prompt.vectors])[0], request.ids[request.ids.index(SOFT) + 1 :]


@torch.no_grad()
def theirs(model: Any, ids: tuple[int, ...], **options: Any) -> torch.Tensor:
    given = torch.tensor([ids])
    logits = model(input_ids=given, attention_mask=torch.ones_like(given), **options).logits
    return logits[0, -1].log_softmax(dim=0)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize(
    ("to", "kv"),
    [
        ("prompt-tuning", False),
        ("prefix-tuning", False),
        ("cartridge", False),
        ("prefix-tuning", True),
        ("cartridge", True),
    ],
)
def test_peft_answers_from_an_export_as_we_do(kind: str, to: str, kv: bool, tmp_path: Path) -> None:
    lm = tiny(kind)
    for seed in range(SEEDS):
        template = ("{soft_prompt}{input} {target}", "Text: {soft_prompt} {input}\nLabel: {target}")[seed % 2]
        soft_prompt = made(lm, seed, template, kv)
        folder = tmp_path / str(seed)
        export(lm, soft_prompt, to, folder, checked=False)
        model = PeftModel.from_pretrained(base(kind), str(folder)).eval()
        expected, ids = ours(lm, soft_prompt, TEXTS[seed % 3])
        torch.testing.assert_close(theirs(model, ids), expected, atol=1e-5, rtol=0)


CONFIGS: dict[str, Callable[[], Any]] = {
    "prompt tuning": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p-tuning": lambda: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8),
    "prefix tuning": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prefix tuning, projected": lambda: PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=8
    ),
    "cartridge": lambda: CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_frozen_tokens=1),
    "multitask": lambda: MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, num_tasks=3, num_ranks=2
    ),
}


def saved(kind: str, config: Any, folder: Path, seed: int) -> Any:
    """A PEFT model with random numbers, saved and read again by PEFT."""
    torch.manual_seed(seed)
    model = get_peft_model(base(kind), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "prompt_encoder" in name:
                weight.normal_(std=0.3)
    model.save_pretrained(str(folder))
    return PeftModel.from_pretrained(base(kind), str(folder)).eval()


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("method", CONFIGS)
def test_we_answer_from_an_import_as_peft_does(kind: str, method: str, tmp_path: Path) -> None:
    lm = tiny(kind)
    for seed in range(SEEDS if kind == "llama" else 3):
        task = seed % 3 if method == "multitask" else None
        model = saved(kind, CONFIGS[method](), tmp_path / str(seed), seed)
        soft_prompt, _ = adopt(lm, find(tmp_path / str(seed), task), name="theirs", checked=False)
        text = TEXTS[seed % 3]
        expected, _ = ours(lm, soft_prompt, text)
        options = {} if task is None else {"task_ids": torch.tensor([task])}
        # as a user of PEFT tokenises: the tokenizer's own beginning of a sequence behind the virtual tokens
        found = theirs(model, tuple(lm.tokenizer(text).input_ids), **options)
        torch.testing.assert_close(expected, found, atol=1e-5, rtol=0)


# --- tokenizers that begin a sequence themselves -------------------------------------------------


@pytest.fixture(scope="module")
def pieces() -> FrozenLM:
    """A base model whose tokenizer puts a token and a space before every text."""
    return FrozenLM(make_model("llama"), sentence_piece(), name="pieces", dtype="fp32", device="cpu")


@pytest.mark.parametrize("template", ["{soft_prompt}{input}{target}", "{soft_prompt}Review: {input}\nAnswer: {target}"])
def test_the_beginning_of_a_sequence_goes_behind_an_imported_soft_prompt(
    pieces: FrozenLM, template: str, tmp_path: Path
) -> None:
    model = saved("llama", CONFIGS["prompt tuning"](), tmp_path / "theirs", 1)
    soft_prompt, _ = adopt(pieces, find(tmp_path / "theirs"), name="theirs", template=template, checked=False)
    expected, ids = ours(pieces, soft_prompt, "a good film")
    whole = template.removeprefix("{soft_prompt}").removesuffix(" {target}").removesuffix("{target}")
    assert ids == tuple(pieces.tokenizer(whole.format(input="a good film")).input_ids)
    torch.testing.assert_close(expected, theirs(model, ids), atol=1e-5, rtol=0)
    again = tmp_path / "ours"
    export(pieces, soft_prompt, "peft", again, checked=False)
    back, _ = adopt(pieces, find(again), name="theirs", template=template, checked=False)
    assert torch.equal(back.vectors, soft_prompt.vectors)
    assert back.template == soft_prompt.template


@pytest.mark.parametrize(
    "template",
    [
        "{soft_prompt}{input} {target}",
        "Review: {soft_prompt}{input}\nAnswer: {target}",
        "{soft_prompt} {input}: {input}.\n {target}",
        "{soft_prompt}({input}) {{ }} {target}",
    ],
)
@pytest.mark.parametrize("text", ["a good film", " a space before", "good\nbad", "<s> is text", ""])
def test_the_recipe_of_a_readme_gives_our_tokens(pieces: FrozenLM, template: str, text: str, tmp_path: Path) -> None:
    for lm in (pieces, tiny("llama")):
        soft_prompt = made(lm, 1, template)
        task = Task.of(lm, soft_prompt)
        request = task.open_request(Example({"input": text}, None), 1)
        scope: dict[str, Any] = {"tokenizer": lm.tokenizer}
        exec(recipe(task.encoder), scope)
        if text != "<s> is text" or lm is not pieces:  # a Unigram model takes it for its own token
            assert tuple(scope["tokens"](text)) == request.ids[request.ids.index(SOFT) + 1 :]


def test_the_code_of_a_readme_writes_what_we_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    base_folder = tmp_path / "base"
    make_model("llama").save_pretrained(base_folder)
    make_tokenizer().save_pretrained(base_folder)
    lm = FrozenLM.load(base_folder, dtype="fp32", device="cpu")
    soft_prompt = made(lm, 2, "Text: {soft_prompt}{input}\n{target}")
    text = answer_queries(
        [Query(Task.of(lm, soft_prompt), Example({"input": "A text."}, None), soft_prompt.vectors)],
        sampling=Sampling(max_new_tokens=32),
    )[0].text
    for to in ("peft", "cartridge", "npy", "safetensors"):
        folder = tmp_path / to
        found = export(lm, soft_prompt, to, folder)
        assert found is not None
        assert found.passed
        assert found.same_text == found.texts == 3
        assert found.difference < 1e-5
        page = (folder / "README.md").read_text()
        assert str(found) in page
        monkeypatch.chdir(folder)
        capsys.readouterr()
        exec(page.partition("```python\n")[2].partition("```")[0], {})
        assert capsys.readouterr().out.strip() == text.strip()


@pytest.mark.parametrize("to", ["prompt-tuning", "cartridge"])
@pytest.mark.parametrize(
    ("template", "behind"),
    [("{soft_prompt}{input} {target}", ""), ("Text: {soft_prompt}{input}\nLabel: {target}", "\nLabel:")],
)
def test_a_pipeline_writes_what_we_write(
    template: str, behind: str, to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the folder as PEFT loads it, and with the code of the README."""
    make_model("llama").save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    lm = FrozenLM.load(str(tmp_path / "base"), dtype="fp32", device="cpu")
    soft_prompt = made(lm, 4, template)
    export(lm, soft_prompt, to, tmp_path / "out", checked=False)
    model: Any = PeftModel.from_pretrained(make_model("llama"), str(tmp_path / "out"))
    pipe: Any = pipeline("text-generation", model=model, tokenizer=make_tokenizer(), device="cpu")
    task, sampling = Task.of(lm, soft_prompt), Sampling(max_new_tokens=12)
    options = {"add_special_tokens": False, "return_full_text": False, "do_sample": False}
    for text in (*TEXTS, "A text."):
        request = task.open_request(Example({"input": text}, None), 12)
        assert tuple(lm.tokenizer(text + behind).input_ids) == request.ids[request.ids.index(SOFT) + 1 :]
        [written] = pipe(text + behind, max_new_tokens=12, **options)
        [expected] = generate(lm, [request], [soft_prompt.vectors], sampling)
        assert written["generated_text"] == expected.text
        assert len(expected.ids) > 3
    monkeypatch.chdir(tmp_path / "out")
    load, use = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    printed: list[str] = []
    exec(load + use, {"print": printed.append})
    assert len(set(printed)) == 1
    assert printed[0].startswith(expected.text)


def test_what_a_pipeline_would_tokenize_in_another_way_is_said(pieces: FrozenLM, tmp_path: Path) -> None:
    soft_prompt = made(pieces, 1, "{soft_prompt}{input}  \n{target}")
    ids = Task.of(pieces, soft_prompt).open_request(Example({"input": "A text."}, None), 1).ids
    assert tuple(pieces.tokenizer("A text.  \n", add_special_tokens=False).input_ids) != ids[ids.index(SOFT) + 1 :]
    export(pieces, soft_prompt, "peft", tmp_path / "out", checked=False)
    page = (tmp_path / "out" / "README.md").read_text()
    assert "gives other tokens here" in page
    assert "pipe(" not in page


# --- what is refused -----------------------------------------------------------------------------


def refusal(kind: type[SoftPromptError], call: Callable[[], Any]) -> str:
    with pytest.raises(kind) as error:
        call()
    return str(error.value)


def test_what_has_no_exact_form_is_refused(tmp_path: Path) -> None:
    lm, phi, folder = tiny("llama"), tiny("stablelm"), tmp_path / "out"
    behind = made(lm, 1, "{input}{soft_prompt} {target}")
    assert "before all input" in refusal(ConfigError, lambda: export(lm, behind, "peft", folder))
    kv = made(lm, 1, "{soft_prompt}{input}{target}", kv=True)
    assert "prefix-tuning" in refusal(ConfigError, lambda: export(lm, kv, "npy", folder))
    plain = made(phi, 1, "{soft_prompt}{input}{target}")
    assert "keys and values" in refusal(ConfigError, lambda: export(phi, plain, "cartridge", folder))
    assert "peft" in refusal(ConfigError, lambda: export(phi, plain, "onnx", folder))
    assert not folder.exists()
    folder.mkdir()
    (folder / "mine.txt").write_text("keep")
    assert "empty folder" in refusal(StoreError, lambda: export(phi, plain, "peft", folder))
    assert (folder / "mine.txt").read_text() == "keep"


def test_a_prompt_of_another_base_model_is_refused(tmp_path: Path) -> None:
    saved("llama", CONFIGS["prefix tuning"](), tmp_path, 1)
    message = refusal(ArtifactError, lambda: adopt(tiny("gpt2"), find(tmp_path), name="x"))
    assert "192 numbers a virtual token" in message
    assert "--base" in message
    phi = tiny("stablelm")
    assert "keys and values" in refusal(ConfigError, lambda: adopt(phi, find(tmp_path), name="x"))


def test_a_check_tells_what_differs(tmp_path: Path) -> None:
    lm = tiny("llama")
    saved("llama", CONFIGS["prompt tuning"](), tmp_path, 1)
    _, right = adopt(lm, find(tmp_path), name="x")
    assert right is not None
    assert right.passed
    assert "within" in str(right)
    found = find(tmp_path)
    moved = type(found)(found.path, found.numbers + 0.5, found.base, found.peft)
    _, wrong = adopt(lm, moved, name="x")
    assert wrong is not None
    assert not wrong.passed
    assert str(wrong).startswith("NOT the same")


MULTITASK = {"peft_type": "MULTITASK_PROMPT_TUNING", "num_virtual_tokens": 2}
GOOD = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}
NUMBERS = {"prompt_embeddings": torch.zeros(2, 32)}


@pytest.mark.parametrize(
    ("config", "tensors", "said"),
    [
        (None, NUMBERS, "adapter_config.json"),
        (b"{", NUMBERS, "JSON"),
        (b"[]", NUMBERS, "JSON object"),
        (b"[" * 100_000, NUMBERS, "JSON"),
        (b" " * (2 << 20), NUMBERS, "larger"),
        ({}, NUMBERS, "PROMPT_TUNING"),
        ({"peft_type": "LORA"}, NUMBERS, "changes weights"),
        ({**GOOD, "peft_type": ["x"]}, NUMBERS, "PROMPT_TUNING"),
        ({**GOOD, "num_transformer_submodules": 2}, NUMBERS, "decoder"),
        (GOOD, None, "adapter_model.safetensors"),
        (GOOD, b"\x80\x04pickle", "safetensors"),
        (GOOD, b"\xff" * 16, "safetensors"),
        (GOOD, {}, "prompt_embeddings"),
        (GOOD, {"weight": torch.zeros(2, 32)}, "found weight"),
        (GOOD, {"prompt_embeddings": torch.zeros(64)}, "[64]"),
        (GOOD, {"prompt_embeddings": torch.zeros(0, 32)}, "[0, 32]"),
        (GOOD, {"prompt_embeddings": torch.zeros(2, 32, dtype=torch.int64)}, "int64"),
        (GOOD, {"prompt_embeddings": torch.full((2, 32), torch.nan)}, "NaN"),
        (GOOD, {"prompt_embeddings": torch.zeros(3, 32)}, "found 3"),
        ({"peft_type": "PROMPT_TUNING"}, NUMBERS, "None"),
        (MULTITASK, NUMBERS, "prefix_task_cols"),
        (
            MULTITASK,
            {**NUMBERS, "prefix_task_cols": torch.zeros(3, 2, 1), "prefix_task_rows": torch.zeros(3, 1, 8)},
            "[3, 1, 8]",
        ),
    ],
)
def test_a_folder_that_is_not_sound_is_refused(config: Any, tensors: Any, said: str, tmp_path: Path) -> None:
    if config is not None:
        content = config if isinstance(config, bytes) else json.dumps(config).encode()
        (tmp_path / "adapter_config.json").write_bytes(content)
    if isinstance(tensors, bytes):
        (tmp_path / "adapter_model.safetensors").write_bytes(tensors)
    elif tensors is not None:
        save_file(tensors, tmp_path / "adapter_model.safetensors")
    task = 0 if config == MULTITASK else None
    assert said in refusal(ArtifactError, lambda: find(tmp_path, task))


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(GOOD))
    (tmp_path / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    assert "pickle" in refusal(ArtifactError, lambda: find(tmp_path))


def test_a_task_of_a_multitask_prompt_must_be_chosen(tmp_path: Path) -> None:
    saved("llama", CONFIGS["multitask"](), tmp_path, 1)
    assert "0 to 2" in refusal(ArtifactError, lambda: find(tmp_path))
    assert "found 3" in refusal(ArtifactError, lambda: find(tmp_path, 3))
    single = tmp_path / "single"
    saved("llama", CONFIGS["prompt tuning"](), single, 1)
    assert "leave it out" in refusal(ArtifactError, lambda: find(single, 0))
