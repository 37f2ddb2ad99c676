"""What lies at a base model's path: what can be loaded is loaded as it is, anything else is refused in a sentence."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from softprompt.errors import SoftPromptWarning
from softprompt.model.loading import load_base
from tests.conftest import make_model, make_tokenizer
from tests.models_on_disk import ADVICE, POINTER, changed, refusal, saved, write_gguf


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache folder."""
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "cache"))


# --- folders and files -----------------------------------------------------------------------------


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    assert refusal(tmp_path).startswith(f"the folder {tmp_path} is empty; give a folder saved by transformers")
    saved(tmp_path / "run" / "checkpoint-500")
    assert refusal(tmp_path / "run").endswith(
        f"no config.json, but {tmp_path / 'run' / 'checkpoint-500'} does; give that"
    )
    (tmp_path / "notes.txt").write_text("")
    assert refusal(tmp_path).startswith(f"the folder {tmp_path} holds no config.json; give a folder")


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    bomb = tmp_path / "exploded"

    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(bomb),)

    torch.save({"model.embed_tokens.weight": Bomb()}, folder / "pytorch_model.bin")
    for given in (folder, folder / "pytorch_model.bin"):
        message = refusal(given)
        assert "pytorch_model.bin" in message
        assert "a pickle, which could run any code and is never read" in message
        assert "save it as safetensors (model.save_pretrained" in message
    assert not bomb.exists()


def test_missing_weights_are_not_filled_with_random_numbers(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    for layer in (2, 1):
        del weights[f"model.layers.{layer}.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert refusal(folder) == (
        f"the base model '{folder}' should hold every weight of its architecture, but 2 of them, such as "
        f"model.layers.1.mlp.up_proj.weight, are not there; give a complete language model"
    )


def without_tokenizer(folder: Path, name: str | None) -> None:
    (folder / "tokenizer.json").unlink()
    settings = folder / "tokenizer_config.json"
    settings.unlink() if name is None else settings.write_text(json.dumps({"tokenizer_class": name}))


@pytest.mark.parametrize(
    ("damage", "found", "remedy"),
    [
        (lambda f: (f / "config.json").write_text("{"), "config.json is not a valid JSON file", "download it again"),
        (
            lambda f: (f / "config.json").write_bytes(b"\xff"),
            "config.json is not a valid JSON file",
            "download it again",
        ),
        (lambda f: (f / "config.json").write_text("[]"), "config.json is no JSON object", "download it again"),
        (lambda f: (f / "config.json").write_text('{"model_type": "odd"}'), "does not recognize", ADVICE),
        (lambda f: (f / "config.json").write_bytes(POINTER), "config.json is a pointer of Git LFS", "git lfs pull"),
        (lambda f: (f / "tokenizer.json").write_bytes(POINTER), "tokenizer.json is a pointer", "git lfs pull"),
        (lambda f: (f / "model.safetensors").write_bytes(POINTER), "model.safetensors is a pointer", "git lfs pull"),
        (lambda f: os.truncate(f / "model.safetensors", 20_000), "incomplete metadata", "download it again"),
        (lambda f: os.truncate(f / "model.safetensors", 0), "model.safetensors is no whole", "download it again"),
        (lambda f: (f / "model.safetensors").unlink(), "holds no model.safetensors", "download the weights, too"),
        (lambda f: (f / "model.safetensors").rename(f / "a.safetensors"), "but a.safetensors", "call it model.safet"),
        (lambda f: (f / "model.safetensors").rename(f / "a.gguf"), "but GGUF files", "a.gguf"),
        (
            lambda f: without_tokenizer(f, "PreTrainedTokenizerFast"),
            "the tokenizer of the base model",
            "save_pretrained",
        ),
        (lambda f: without_tokenizer(f, None), "the tokenizer of the base model", "save_pretrained"),
        (lambda f: without_tokenizer(f, "LlamaTokenizer"), "no vocabulary was found", "save_pretrained"),
        (lambda f: without_tokenizer(f, "GPT2Tokenizer"), "no vocabulary was found", "save_pretrained"),
    ],
)
def test_a_damaged_folder_is_one_sentence(
    damage: Callable[[Path], object], found: str, remedy: str, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "model")
    damage(folder)
    message = refusal(folder)
    assert str(folder) in message
    assert found in message.partition("; ")[0]
    assert remedy in message.partition("; ")[2]


def test_pointers_that_are_not_read_do_not_matter(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    for name in ("consolidated.safetensors", "pytorch_model.bin", "tokenizer.model", "adapter_model.safetensors"):
        (folder / name).write_bytes(POINTER)
    load_base(str(folder))


def test_a_model_in_several_files(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make_model("llama").save_pretrained(folder, max_shard_size="60KB")
    make_tokenizer().save_pretrained(folder)
    shards = sorted(folder.glob("model-*"))
    assert len(shards) > 2
    state = load_base(str(folder))[0].state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in make_model("llama").state_dict().items())
    shards[1].unlink()
    assert f"1 of them, such as {shards[1].name}, are not there; copy or download" in refusal(folder)
    (folder / "model.safetensors.index.json").write_text("{")
    assert "index.json is not a valid JSON file" in refusal(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_of_a_folder_stands_for_the_folder(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path / "model")
    state = load_base(str(folder / name))[0].state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in make_model("llama").state_dict().items())


def test_the_users_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    saved(tmp_path / "model")
    load_base("~/model")


@pytest.mark.parametrize(
    ("name", "found", "remedy"),
    [
        ("part.safetensors", "no base model by itself", "a folder with config.json"),
        ("model.pt", "a pickle", "save it as safetensors"),
        ("model.ckpt", "a pickle", "save it as safetensors"),
        ("model.h5", "a file of another kind", "give a folder"),
        ("no.gguf", "no GGUF file", "give another"),
    ],
)
def test_a_file_that_is_no_model(tmp_path: Path, name: str, found: str, remedy: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"anything")
    message = refusal(path)
    assert message.startswith(f"{path} is {found}")
    assert remedy in message.partition("; ")[2] or remedy in message


@pytest.mark.parametrize("path", ["./nowhere", "/no/where", "~/no/where", "a/b/c", "weights.GGUF", "model.safetensors"])
def test_a_path_that_is_not_there_is_no_hub_id(path: str) -> None:
    assert "there is no such file or folder" in refusal(path)


def test_weights_of_another_shape_than_the_configuration_says(tmp_path: Path) -> None:
    folder = changed(saved(tmp_path / "model"), vocab_size=400)
    message = refusal(folder)
    assert "lm_head.weight as [400, 32] by its configuration, but it is [320, 32]" in message
    assert "give the config.json" in message


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (
            {"model_type": "whisper", "is_encoder_decoder": True},
            "transformers has no encoder-decoder of text",
        ),
        ({"model_type": "deberta-v2"}, "of type deberta-v2, for which transformers has no causal language model"),
    ],
)
def test_a_type_that_is_no_language_model(tmp_path: Path, options: dict[str, Any], found: str) -> None:
    message = refusal(changed(saved(tmp_path / "model"), **options))
    assert found in message
    assert "give a causal language model" in message


# --- adapters --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter of PEFT for the tiny Llama, which changes what it computes."""
    peft = pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("adapter")
    settings = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear", "init_lora_weights": False}
    model = peft.get_peft_model(make_model("llama"), peft.LoraConfig(**settings))
    model.peft_config["default"].base_model_name_or_path = "org/original"
    model.save_pretrained(folder)
    return folder


def own_weights(base: str) -> None:
    """Loads a model beside which an adapter lies, and is the tiny Llama still."""
    with pytest.warns(SoftPromptWarning, match="adapter of org/original .* is not applied") as said:
        state = load_base(base)[0].state_dict()
    assert len(said) == 1
    expected = make_model("llama").state_dict()
    assert set(state) == set(expected)
    assert all(torch.equal(state[name], weight) for name, weight in expected.items())


def test_an_adapter_beside_a_model_is_not_applied(tmp_path: Path, adapter: Path) -> None:
    folder = saved(tmp_path / "model")
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    applied: Any = AutoModelForCausalLM
    assert any("lora" in name for name in applied.from_pretrained(folder).state_dict())  # as transformers has it
    own_weights(str(folder))


def test_an_adapter_beside_a_gguf_file_is_not_applied(tmp_path: Path, adapter: Path) -> None:
    shutil.copytree(adapter, tmp_path / "model")
    weights = write_gguf(tmp_path / "model" / "tiny.gguf")
    state = load_base(str(tmp_path / "model" / "tiny.gguf"))[0].state_dict()
    assert set(state) == set(weights)
    assert all(torch.equal(state[name], weight) for name, weight in weights.items())


def test_an_adapter_alone_is_no_model(tmp_path: Path, adapter: Path) -> None:
    for given in (adapter, adapter / "adapter_model.safetensors"):
        message = refusal(given)
        assert str(given) in message
        assert "an adapter of org/original, not a whole model; give its base model, or merge" in message
    folder = saved(tmp_path / "model")
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    (folder / "model.safetensors").unlink()
    assert "an adapter of org/original, not a whole model" in refusal(folder)
    (folder / "adapter_config.json").write_text("{")  # even if it does not say of what
    assert "an adapter, not a whole model" in refusal(folder)


def test_adapters_on_the_hub(tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the hub's cache, as after a download."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    whole = saved(tmp_path / "model")
    for name, parts in {"both": (whole, adapter), "alone": (adapter,)}.items():
        repository = tmp_path / "hub" / f"models--org--{name}"
        for part in parts:
            shutil.copytree(part, repository / "snapshots" / ("a" * 40), dirs_exist_ok=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("a" * 40)
    own_weights("org/both")
    assert "'org/alone' is an adapter of org/original, not a whole model; give its base model" in refusal("org/alone")
