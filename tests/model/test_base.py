"""Finding, unpacking and identifying a base model: every refusal has its sentence, and nothing half-made stays."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from softprompt.errors import BaseModelError, ConfigError, SoftPromptWarning
from softprompt.model import loading
from softprompt.model.fingerprint import fingerprint_model, fingerprint_tokenizer
from softprompt.model.frozen import FrozenLM
from softprompt.model.loading import load_base, pick_device, pick_dtype
from softprompt.model.request import Request
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tasks.task import Task
from tests.conftest import make_model, make_tokenizer
from tests.models_on_disk import ADVICE, POINTER, changed, refusal, saved, write_gguf


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# --- devices and dtypes --------------------------------------------------------------------------------------


def test_devices_and_dtypes_by_name() -> None:
    cpu = torch.device("cpu")
    assert pick_device("cpu") == cpu
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    assert [pick_dtype(name, cpu) for name in ("fp32", "bf16", "fp16")] == [
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ]


@pytest.mark.parametrize(
    ("flags", "expected"), [("", "float32"), ("avx512_bf16", "bfloat16"), ("amx_tile", "bfloat16")]
)
def test_bf16_by_default_where_the_processor_has_it(flags: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda name=name: name == flags)
    assert pick_dtype("auto", torch.device("cpu")) == getattr(torch, expected)


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "", "privateuseone", "meta"])
def test_a_device_that_is_not_here(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        pick_device(name)
    assert str(error.value) == f"--device must be auto, cpu, cuda or mps and be on this machine; {name!r} is not"


def test_an_unknown_dtype_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError) as error:
        FrozenLM.load("nobody/nothing", dtype="int8")
    assert str(error.value) == "--dtype must be auto, fp32, bf16 or fp16, not 'int8'"


# --- folders and hub ids -------------------------------------------------------------------------------------


def test_a_folder_saved_by_transformers(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    lm = FrozenLM.load(str(folder), dtype="fp32", device="cpu")
    assert lm.name == str(folder)
    for name, weight in make_model("llama").state_dict().items():
        assert torch.equal(lm.model.state_dict()[name], weight)
    assert lm.tokenizer("a stirring film").input_ids == make_tokenizer()("a stirring film").input_ids
    assert FrozenLM.load(str(folder), dtype="bf16", device="cpu").dtype == torch.bfloat16


def test_a_hub_id_that_does_not_exist() -> None:
    message = refusal("nobody/nothing")
    start = "the base model 'nobody/nothing' could not be loaded as a language model in safetensors or GGUF: "
    assert message.startswith(start)
    assert message.endswith(f"; {ADVICE}")
    assert 0 < len(message) - len(start) - len(ADVICE) <= 202  # transformers' own words, one sentence of them


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    assert ADVICE in refusal(folder)
    assert not (tmp_path / "ran").exists()


# --- what is said ----------------------------------------------------------------------------------


def notes_of(folder: Path) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_base(str(folder))
    assert all(issubclass(each.category, SoftPromptWarning) for each in caught)
    return [str(each.message) for each in caught]


def test_weights_without_a_place_are_said(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # of older releases, computed anew
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert notes_of(folder) == []
    weights["model.layers.0.self_attn.q_norm.weight"] = torch.ones(8)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (note,) = notes_of(folder)
    assert "hold 1 that its architecture has no place for, such as model.layers.0.self_attn.q_norm.weight" in note


def test_what_transformers_says_of_a_model_is_said_once(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "speed": 3}
    (note,) = notes_of(changed(saved(tmp_path / "model"), rope_parameters=rope))
    assert note == "transformers says: Unrecognized keys in `rope_parameters` for 'rope_type'='default': {'speed'}"


def test_tokens_that_the_embedding_table_lacks_are_said(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})  # never comes from a text
    tokenizer.save_pretrained(folder)
    assert notes_of(folder) == []
    tokenizer.add_tokens(["worse", "better"])
    tokenizer.save_pretrained(folder)
    (note,) = notes_of(folder)
    assert "has 2 tokens, such as 'worse', for which the embedding table of 320 rows has none" in note


def test_loading_is_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = saved(tmp_path / "model")
    write_gguf(tmp_path / "tiny.gguf")
    capfd.readouterr()
    load_base(str(folder))
    load_base(str(tmp_path / "tiny.gguf"))
    assert capfd.readouterr() == ("", "")


# --- GGUF ----------------------------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, bytes]:
    """Path → content of everything but lock files."""
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix != ".lock"}


def test_a_gguf_file_becomes_the_model_that_it_stands_for(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "tiny.gguf"
    weights = write_gguf(path)
    lm = FrozenLM.load(str(path), dtype="fp32", device="cpu")
    state = lm.model.state_dict()
    assert set(state) == set(weights)
    for name, weight in weights.items():
        assert torch.equal(state[name], weight), name
    assert lm.shares_prefix
    assert lm.window == 128
    text = "a stirring , funny film"
    assert lm.tokenizer(text).input_ids == make_tokenizer()(text).input_ids
    assert lm.tokenizer.eos_token_id == 1
    assert bool(lm.score([Request((60, 61), 0, ((70, 71),))]).isfinite().all())
    (folder,) = [p for p in (cache / "base").iterdir() if p.is_dir()]
    assert folder.name.startswith("tiny-")


def test_a_gguf_file_is_unpacked_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    load_base(str(path))
    before = files(cache)
    monkeypatch.setattr(loading, "_convert", lambda *_: pytest.fail("it was unpacked again"))
    load_base(str(path))
    assert files(cache) == before


def test_another_file_of_the_same_name_is_another_model(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    load_base(str(path))
    os.utime(path, ns=(1, 1))  # replaced by another file
    load_base(str(path))
    assert len([p for p in (cache / "base").iterdir() if p.is_dir()]) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: os.truncate(folder / "model.safetensors", 1000),
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: (folder / "sizes.json").unlink(),
        lambda folder: (folder / "sizes.json").write_text("{}"),
        lambda folder: (folder / "sizes.json").write_text("["),
        shutil.rmtree,
    ],
)
def test_an_incomplete_folder_is_made_again(damage: Callable[[Path], object], tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    load_base(str(path))
    before = files(cache)
    (folder,) = [p for p in (cache / "base").iterdir() if p.is_dir()]
    damage(folder)
    assert files(cache) != before
    load_base(str(path))
    assert files(cache) == before


def test_a_failure_while_unpacking_leaves_nothing(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert refusal(path) == (
            f"the base model tiny.gguf could not be unpacked into {cache / 'base'}: No space left on device; "
            "free some space there or set SOFTPROMPT_CACHE to another folder"
        )
    assert files(cache) == {}
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            load_base(str(path))
    assert files(cache) == {}
    load_base(str(path))
    assert files(cache) != {}


def test_a_cache_that_is_no_folder(tmp_path: Path, cache: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    cache.write_text("")
    assert refusal(tmp_path / "tiny.gguf") == (
        f"the base model tiny.gguf could not be unpacked into {cache / 'base'}: Not a directory; "
        "free some space there or set SOFTPROMPT_CACHE to another folder"
    )


@pytest.mark.parametrize("name", ["tiny.GGUF", "tiny.Q8_0", "sha256-4d7a"])
def test_a_gguf_file_by_any_name(tmp_path: Path, name: str) -> None:
    weights = write_gguf(tmp_path / name)
    state = load_base(str(tmp_path / name))[0].state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in weights.items())


def test_gguf_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "missing.gguf"
    assert f"{path} was not found" in refusal(path)
    for content, found in ((b"no GGUF", "it begins with b'no G'"), (b"", "it is empty"), (b"GGUF\3", "error")):
        path.write_bytes(content)
        message = refusal(path)
        assert message.startswith(f"{path} is no GGUF file that transformers can read ({found}")
        assert message.endswith("give another")
    path.write_bytes(POINTER)
    assert "run `git lfs pull`" in refusal(path)
    write_gguf(path)
    os.truncate(path, path.stat().st_size // 2)
    assert "it may be cut off: download it again" in refusal(path)
    write_gguf(part := tmp_path / "tiny-00001-of-00003.gguf")
    assert f"{part} is one of 3 parts of a GGUF file; join them" in refusal(part)
    write_gguf(path, leave_out="model.layers.1.mlp.up_proj.weight")
    assert refusal(path) == (
        f"the base model '{path}' should hold every weight of its architecture, but 1 of them, such as "
        f"model.layers.1.mlp.up_proj.weight, are not there; give a complete language model"
    )


def unpack(path: Path, cache: Path, barrier: Any) -> None:
    """In a process of its own: loads a GGUF file slowly, and writes down that it unpacked it."""
    os.environ["SOFTPROMPT_CACHE"] = str(cache)
    convert = loading._convert

    def slowly(gguf: Path, folder: Path) -> None:
        with open(cache / "log", "a") as log:
            log.write("unpacked\n")
        time.sleep(0.3)
        convert(gguf, folder)

    loading._convert = slowly
    barrier.wait(60)
    load_base(str(path))


def test_two_processes_at_once_unpack_it_once(tmp_path: Path, cache: Path, spawn: Callable[..., Any]) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    cache.mkdir()
    barrier = multiprocessing.get_context("forkserver").Barrier(2)
    processes = [spawn(unpack, tmp_path / "tiny.gguf", cache, barrier) for _ in range(2)]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert (cache / "log").read_text() == "unpacked\n"


def unpack_on_a_full_disk(path: Path, cache: Path) -> None:
    """In a process of its own: no file may grow beyond 50 kB; the weights need 175 kB."""
    os.environ["SOFTPROMPT_CACHE"] = str(cache)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    try:
        load_base(str(path))
    except BaseModelError as error:
        (cache / "error").write_text(str(error))


def unpack_and_hang(path: Path, cache: Path) -> None:
    """In a process of its own: everything is unpacked, but the folder never gets its name."""
    os.environ["SOFTPROMPT_CACHE"] = str(cache)
    os.replace = lambda *_: time.sleep(600)
    load_base(str(path))


def test_a_full_disk_is_one_sentence(tmp_path: Path, cache: Path, spawn: Callable[..., Any]) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    process = spawn(unpack_on_a_full_disk, tmp_path / "tiny.gguf", cache)
    process.join(120)
    assert process.exitcode == 0
    message = (cache / "error").read_text()
    assert message.startswith(f"the base model tiny.gguf could not be unpacked into {cache / 'base'}: ")
    assert message.endswith("; free some space there or set SOFTPROMPT_CACHE to another folder")
    assert "File too large" in message
    assert list(files(cache)) == [str(cache / "error")]


def test_what_a_killed_process_leaves_is_cleared_away(tmp_path: Path, cache: Path, spawn: Callable[..., Any]) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    process = spawn(unpack_and_hang, tmp_path / "tiny.gguf", cache)
    deadline = time.monotonic() + 60
    while not list(cache.rglob("sizes.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.join(60)
    assert len(files(cache)) > 1
    load_base(str(tmp_path / "tiny.gguf"))
    (folder,) = [p for p in (cache / "base").iterdir() if p.is_dir()]
    assert not folder.name.startswith(".")


def test_the_embedded_base_model_is_that_of_its_package(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "tiny.gguf")

    class Package:
        sha256 = "0123456789abcdef" * 4

        def path(self) -> Path:
            return tmp_path / "tiny.gguf"

    monkeypatch.setattr(loading, "SMOLLM2_GGUF", Package())
    assert FrozenLM.load().name == "smollm2-135m"
    assert (cache / "base" / "tiny-0123456789abcdef" / "model.safetensors").is_file()


# --- fingerprints --------------------------------------------------------------------------------------------


def test_another_configuration_is_another_base_model(tmp_path: Path) -> None:
    lm = FrozenLM.load(str(saved(tmp_path / "model")), dtype="fp32", device="cpu")
    soft_prompt = SoftPrompt(
        vectors=torch.ones(2, 32),
        name="films",
        base=lm.name,
        base_fingerprint=lm.fingerprint,
        tokenizer_fingerprint=lm.tokenizer_fingerprint,
        template="{soft_prompt}{input} {target}",
        base_settings=lm.settings,
    )
    soft_prompt.save(tmp_path / "films.safetensors")
    stored = SoftPrompt.load(tmp_path / "films.safetensors")
    Task.of(lm, stored)
    changed(tmp_path / "model", rope_parameters={"rope_type": "default", "rope_theta": 77.0})
    other = FrozenLM.load(lm.name, dtype="fp32", device="cpu")
    ids = Request((60, 61, 62), 0, ((70, 71),))
    assert not torch.allclose(lm.score([ids]), other.score([ids]))
    with pytest.raises(BaseModelError) as error:
        Task.of(other, stored)
    assert "(rope_parameters.rope_theta 10000.0)" in str(error.value)
    assert "(rope_parameters.rope_theta 77.0)" in str(error.value)


def test_a_models_fingerprint_does_not_depend_on_the_dtype_it_is_used_in(tmp_path: Path) -> None:
    folder = str(saved(tmp_path / "model"))
    found = {FrozenLM.load(folder, dtype=dtype, device="cpu").fingerprint for dtype in ("fp32", "bf16", "fp16")}
    assert found == {fingerprint_model(make_model("llama"))}


def test_a_models_fingerprint_tells_models_apart() -> None:
    known = {fingerprint_model(make_model(kind)) for kind in ("llama", "gpt2", "qwen3")}
    assert len(known) == 3
    model = make_model("llama")
    for name, weight in model.named_parameters():
        with torch.no_grad():
            weight.mul_(1.001)
        found = fingerprint_model(model)
        assert found not in known, name
        known.add(found)


def test_a_tokenizers_fingerprint_is_what_it_does_to_text() -> None:
    tokenizer = make_tokenizer()
    before = fingerprint_tokenizer(tokenizer)
    assert fingerprint_tokenizer(make_tokenizer()) == before
    tokenizer(["a film", "film"], padding=True, truncation=True, max_length=1)
    tokenizer.padding_side = "left"
    assert fingerprint_tokenizer(tokenizer) == before
    tokenizer.add_tokens(["transporting film"])
    added = fingerprint_tokenizer(tokenizer)
    assert added != before
    other = make_tokenizer()
    other.pad_token = "</s>"
    assert fingerprint_tokenizer(other) not in (before, added)
