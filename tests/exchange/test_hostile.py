"""Files that were damaged, by chance or on purpose: each is refused with a sentence, or read as what it says."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from softprompt.errors import SoftPromptError
from softprompt.exchange.importing import adopt, find
from tests.conftest import tiny

CONFIG = json.dumps({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3, "base_model_name_or_path": "tiny"}).encode()
WEIGHTS = save({"prompt_embeddings": torch.arange(96, dtype=torch.float32).reshape(3, 32)})
MUTATIONS = 300


def mutated(content: bytes, draw: random.Random) -> bytes:
    """The content with some bytes changed, cut out, put in, repeated, or with its end cut off."""
    found = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(found)) if found else 0
        kind = draw.randrange(5)
        if kind == 0 and found:
            found[place] = draw.randrange(256)
        elif kind == 1:
            del found[place : place + draw.randint(1, 8)]
        elif kind == 2:
            found[place:place] = draw.randbytes(draw.randint(1, 8))
        elif kind == 3:
            found[place:place] = found[place : place + 16] * draw.randint(1, 50)
        else:
            del found[place:]
    return bytes(found)


def values() -> Iterator[object]:
    """What a configuration may say in the place of a number or a name."""
    yield from (None, True, -1, 0, 1e308, 10**40, "", "3", [3], {"x": 3}, "../../x", "\x00", "é" * 10_000, [[]] * 100)


@pytest.mark.parametrize("seed", range(10))
def test_a_mutated_folder_is_refused_or_sound(seed: int, tmp_path: Path) -> None:
    draw, refused, said = random.Random(seed), 0, list[str]()
    for number in range(MUTATIONS // 10):
        folder = tmp_path / str(number)
        folder.mkdir()
        config, weights = (mutated(CONFIG, draw), WEIGHTS) if number % 2 else (CONFIG, mutated(WEIGHTS, draw))
        (folder / "adapter_config.json").write_bytes(config)
        (folder / "adapter_model.safetensors").write_bytes(weights)
        try:
            found = find(folder)
        except SoftPromptError as error:
            refused += 1
            said.append(str(error))
            continue
        assert found.numbers.isfinite().all()
        assert found.numbers.dim() == 2
        assert len(found.numbers) == json.loads(config)["num_virtual_tokens"]
    assert refused > MUTATIONS // 30
    assert max(map(len, said)) < 2_000


@pytest.mark.parametrize(
    "key", ["peft_type", "num_virtual_tokens", "base_model_name_or_path", "num_transformer_submodules"]
)
def test_a_configuration_of_other_values_is_refused_or_sound(key: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(WEIGHTS)
    said = [""]
    for value in values():
        (tmp_path / "adapter_config.json").write_text(json.dumps({**json.loads(CONFIG), key: value}))
        try:
            found = find(tmp_path)
        except SoftPromptError as error:
            said.append(str(error))
            continue
        assert key in ("base_model_name_or_path", "num_transformer_submodules")
        assert isinstance(found.base, str)
    assert max(map(len, said)) < 2_000


@pytest.mark.parametrize("seed", range(4))
def test_a_mutated_array_is_refused_or_sound(seed: int, tmp_path: Path) -> None:
    draw, path = random.Random(seed), tmp_path / "prompt.npy"
    np.save(path, np.ones((3, 32), dtype=np.float32))
    content, said = path.read_bytes(), [""]
    for _ in range(25):
        path.write_bytes(mutated(content, draw))
        try:
            found = find(path)
            adopt(tiny("llama"), found, name="x", checked=False)
        except SoftPromptError as error:
            said.append(str(error))
    assert 0 < max(map(len, said)) < 2_000


def test_an_array_of_objects_is_not_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (str(tmp_path / "pwned"),))

    path = tmp_path / "prompt.npy"
    np.save(path, np.array([[Trap()]], dtype=object), allow_pickle=True)
    with pytest.raises(SoftPromptError):
        find(path)
    assert not (tmp_path / "pwned").exists()


def test_an_array_that_says_it_is_huge_is_not_made(tmp_path: Path) -> None:
    path = tmp_path / "prompt.npy"
    np.save(path, np.ones((3, 32), dtype=np.float32))
    path.write_bytes(path.read_bytes().replace(b"(3, 32)", b"(9999999, 9999)"))
    with pytest.raises(SoftPromptError):
        find(path)
