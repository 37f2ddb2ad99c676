"""What shells are told when a user presses the tabulator, by the environment that their scripts set."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CODE = (
    "import sys\nfrom softprompt.cli.main import main\ncode = main(sys.argv[1:])\n"
    "print('loaded:', *sorted({'torch', 'transformers'} & set(sys.modules)), file=sys.stderr)\nsys.exit(code)"
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of which only names are looked at."""
    home = tmp_path_factory.mktemp("store")
    for name in ("sst2", "snli", "news"):
        (home / f"{name}.safetensors").touch()
    return home


def asked(home: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "SOFTPROMPT_HOME": str(home), **environment},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == ["loaded:"]
    return done.stdout


def bash(home: Path, *words: str) -> list[str]:
    """Suggestions for the last word, as bash asks for them."""
    return asked(
        home,
        _SOFTPROMPT_COMPLETE="complete_bash",
        COMP_WORDS="\n".join(["softprompt", *words]),
        COMP_CWORD=str(len(words)),
    ).split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ev"], ["evaluate"]),
        (["s"], ["sweep", "serve", "show"]),
        (["train", "a.jsonl", "--init-"], ["--init-text", "--init-scale"]),
        (["evaluate", "s"], ["snli", "sst2"]),
        (["predict", "--dtype", "fp32", "n"], ["news"]),
        (["show", "n"], ["news"]),
        (["rm", "sst2", "n"], ["news"]),
        (["inspect", "sst2", "sn"], ["snli"]),
        (["harden", "n"], ["news"]),
        (["serve", "--prompts", "a"], ["all"]),
        (["serve", "--prompts", "all", "n"], ["news"]),
        (["train", "a.jsonl", "--preset", "lester"], ["lester2021"]),
        (["train", "a.jsonl", "--init", "n"], ["news"]),
        (["train", "a.jsonl", "--init", "v"], ["vocab"]),
        (["train", "a.jsonl", "--parametrisation", "p"], ["plain", "prefix"]),
        (["train", "a.jsonl", "--optimizer", "ada"], ["adamw", "adafactor"]),
        (["train", "a.jsonl", "--schedule", "c"], ["cosine", "constant"]),
        (["train", "a.jsonl", "--loss", "l"], ["lm", "labels"]),
        (["train", "a.jsonl", "--compile", "o"], ["on", "off"]),
        (["train", "a.jsonl", "--dtype", "b"], ["bf16"]),
        (["train", "a.jsonl", "--device", "c"], ["cpu", "cuda"]),
        (["compare", "a.jsonl", "--methods", "lo"], ["lora"]),
        (["compare", "a.jsonl", "--methods", "lora", "pre"], ["prefix"]),
        (["compare", "a.jsonl", "--methods", "lora", "--seeds", "2", "pre"], []),
    ],
    ids=" ".join,
)
def test_bash(home: Path, words: list[str], expected: list[str]) -> None:
    assert bash(home, *words) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [("ev", ["evaluate"]), ("predict s", ["snli", "sst2"]), ("train a.jsonl --loss ", ["lm", "labels"])],
)
def test_zsh(home: Path, words: str, expected: list[str]) -> None:
    found = asked(home, _SOFTPROMPT_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS=f"softprompt {words}")
    assert found.startswith("_arguments '*: :((")
    assert re.findall(r'^(?:_arguments \'\*: :\(\()?"([\w-]+)"', found, re.MULTILINE) == expected


def test_a_store_that_cannot_be_read_completes_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert bash(tmp_path / "file", "show", "s") == []


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_script_that_is_shown_is_one_for_bash(home: Path) -> None:
    code = "import sys; from softprompt.cli.main import main; sys.exit(main(['--show-completion']))"
    shell = ["bash", "-c", '"$0" -c "$1"; true', sys.executable, code]
    done = subprocess.run(shell, capture_output=True, text=True, timeout=60)
    assert "_SOFTPROMPT_COMPLETE=complete_bash" in done.stdout, done.stderr
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True, timeout=60).returncode == 0
