"""What a command loads before it does anything: where no model is needed, no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from softprompt.cli.commands import COMMANDS
from softprompt.generation.decoder import KV_TOKENS
from softprompt.serving.limits import Limits
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.soft_prompts.store import Store

CODE = (
    "import sys\nfrom softprompt.cli.main import main\ncode = main(sys.argv[1:])\n"
    "print('loaded:', *sorted({'torch', 'transformers'} & set(sys.modules)))\nsys.exit(code)"
)


def loaded(home: Path, *arguments: str) -> tuple[str, str]:
    """What the command printed, and which of the large libraries it loaded."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "SOFTPROMPT_HOME": str(home)},
    )
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    return "\n".join(lines), last.removeprefix("loaded:").strip()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one soft prompt, one KV prefix and one damaged file."""
    store = Store(tmp_path_factory.mktemp("store"))
    for name, vectors, kind in (
        ("sst2", torch.ones(3, 8), "plain"),
        ("kv", torch.ones(3, 2, 2, 1, 4), "prefix"),
        ("hurt", torch.ones(3, 8), "plain"),
    ):
        store.save(
            SoftPrompt(
                vectors=vectors,
                name=name,
                base="smollm2-135m",
                base_fingerprint="ab",
                tokenizer_fingerprint="cd",
                template="{soft_prompt}{input}{target}",
                parametrisation=kind,
            )
        )
    path = store.path("hurt")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # in its numbers, so that all of them must have been looked at
    path.write_bytes(content)
    return store.home


def test_list_loads_no_torch_and_still_reads_every_byte(home: Path) -> None:
    shown, libraries = loaded(home, "list", "--json")
    assert libraries == ""
    hurt, kv, sst2 = json.loads(shown)["soft_prompts"]
    assert (sst2["name"], sst2["num_virtual_tokens"], kv["num_virtual_tokens"]) == ("sst2", 3, 3)
    assert "digest" in hurt["error"]


def test_show_loads_no_torch(home: Path) -> None:
    shown, libraries = loaded(home, "show", "kv", "--json")
    assert libraries == ""
    found = json.loads(shown)
    assert [found[key] for key in ("num_virtual_tokens", "num_layers", "num_kv_heads", "head_dim")] == [3, 2, 1, 4]
    assert "vectors" not in found


def test_rm_loads_no_torch_where_no_training_left_anything(tmp_path: Path, home: Path) -> None:
    (tmp_path / "sst2.safetensors").write_bytes((home / "sst2.safetensors").read_bytes())
    assert loaded(tmp_path, "rm", "sst2") == ("removed sst2", "")
    assert list(tmp_path.glob("*.safetensors")) == []


def test_help_loads_no_torch(home: Path) -> None:
    """Of all commands, one after the other in one process."""
    each = (
        "import sys\nfrom softprompt.cli.main import main\nfrom softprompt.cli.commands import COMMANDS\n"
        "for command in COMMANDS:\n"
        "    code = main([command, '--help'])\n"
        "    print('loaded:', command, code, *sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    environment = {**os.environ, "SOFTPROMPT_HOME": str(home)}
    done = subprocess.run([sys.executable, "-c", each], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("loaded:")]
    assert said == [f"loaded: {command} 0" for command in COMMANDS]
    assert done.stdout.count("Usage") == len(COMMANDS)


def test_the_limits_that_help_shows_are_those_of_generation() -> None:
    assert Limits().tokens == KV_TOKENS
