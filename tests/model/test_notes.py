"""What other libraries say: what concerns the user is said once, noise is not, and nobody else is disturbed."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from transformers.utils import logging as of_transformers

from softprompt.errors import SoftPromptWarning
from softprompt.model.loading import load_base
from softprompt.model.notes import hear_warnings, heard, hide_noise
from tests.conftest import Run
from tests.models_on_disk import changed, saved

WRONG_PATTERN = "The tokenizer you are loading has an incorrect regex pattern.\n  It should be mended."


@pytest.fixture
def theirs() -> Iterator[io.StringIO]:
    """What transformers' own handler would write."""
    stream = io.StringIO()
    logger, handler = logging.getLogger("transformers"), logging.StreamHandler(stream)
    logger.addHandler(handler)
    yield stream
    logger.removeHandler(handler)


def test_a_warning_becomes_a_note_once(theirs: io.StringIO) -> None:
    with warnings.catch_warnings(record=True) as said, heard():
        warnings.simplefilter("always")
        for _ in range(2):
            logging.getLogger("transformers.models.llama").warning(WRONG_PATTERN)
            logging.getLogger("transformers.models.llama").info("nothing to know")
    assert theirs.getvalue() == ""
    assert {each.category for each in said} == {SoftPromptWarning}
    assert [str(each.message) for each in said] == [
        "transformers says: The tokenizer you are loading has an incorrect regex pattern. It should be mended"
    ]


def test_each_library_is_named() -> None:
    with warnings.catch_warnings(record=True) as said, heard():
        warnings.simplefilter("always")
        for number, name in enumerate(("transformers.models.llama", "peft.tuners", "huggingface_hub.file")):
            logging.getLogger(name).warning("note %d", number)
    assert [str(each.message) for each in said] == [
        "transformers says: note 0",
        "peft says: note 1",
        "huggingface_hub says: note 2",
    ]


@pytest.mark.parametrize(
    "noise",
    [
        "\x1b[1mLlamaForCausalLM LOAD REPORT\x1b[0m from: x\nKey | Status",
        "`torch_dtype` is deprecated! Use `dtype` instead!",
        "You are sending unauthenticated requests to the HF Hub. Please set a HF_TOKEN to enable higher rate limits.",
    ],
)
def test_noise_is_not_said(noise: str, theirs: io.StringIO) -> None:
    with warnings.catch_warnings(), heard():
        warnings.simplefilter("error")
        logging.getLogger("transformers.modeling_utils").warning(noise)
    assert theirs.getvalue() == ""


def test_after_the_block_all_is_as_before(theirs: io.StringIO) -> None:
    logger, verbosity = logging.getLogger("transformers"), cast(Any, of_transformers)
    before = (list(logger.handlers), [list(handler.filters) for handler in logger.handlers], logger.level)
    verbosity.set_verbosity_error()
    try:
        with pytest.raises(KeyError), heard(), heard():
            raise KeyError
        assert verbosity.get_verbosity() == logging.ERROR
    finally:
        logger.setLevel(before[2])
    assert (list(logger.handlers), [list(handler.filters) for handler in logger.handlers], logger.level) == before
    logger.warning("to all")
    assert theirs.getvalue() == "to all\n"


def test_other_threads_are_not_disturbed(theirs: io.StringIO) -> None:
    stderr, inside, done = sys.stderr, threading.Event(), threading.Event()
    log = io.StringIO()
    server, handler = logging.getLogger("softprompt.test"), logging.StreamHandler(log)
    server.addHandler(handler)

    def listen() -> None:
        with heard():
            inside.set()
            done.wait(20)

    thread = threading.Thread(target=listen)
    thread.start()
    assert inside.wait(20)
    same = sys.stderr is stderr
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        server.warning("a request came")
        logging.getLogger("transformers.generation").warning("of this thread")
    done.set()
    thread.join()
    server.removeHandler(handler)
    assert same
    assert log.getvalue() == "a request came\n"
    assert theirs.getvalue() == "of this thread\n"


def test_loading_leaves_stderr_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig

    stderr, seen = sys.stderr, list[bool]()
    read = AutoConfig.from_pretrained

    def watched(*arguments: object, **options: object) -> object:
        seen.append(sys.stderr is stderr)
        return read(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(AutoConfig, "from_pretrained", watched)
    load_base(str(saved(tmp_path / "model")))
    assert True in seen
    assert False not in seen


# --- Python's warnings -----------------------------------------------------------------------------


def shown(*told: tuple[str, type[Warning], str]) -> list[str]:
    """Those of the warnings that Python shows now."""
    with warnings.catch_warnings(record=True) as caught:
        hear_warnings()
        for number, (text, category, module) in enumerate(told):
            warnings.warn_explicit(text, category, f"{module}.py", number, module)
    return [str(each.message) for each in caught]


def test_warnings_to_users_are_shown() -> None:
    users = [
        ("weights are missing", UserWarning, "peft.utils.save_and_load"),
        ("the window is unknown", UserWarning, "transformers.modeling_utils"),
        ("ours", SoftPromptWarning, "softprompt.model.loading"),
    ]
    others = [
        ("for programmers", FutureWarning, "transformers.modeling_utils"),
        ("for programmers", DeprecationWarning, "peft"),
        ("of others", UserWarning, "torch.optim"),
        ("fan_in_fan_out is set to False but the target module is `Conv1D`.", UserWarning, "peft.tuners.lora.layer"),
    ]
    assert shown(*users, *others) == [text for text, *_ in users]


def test_noise_alone_is_hidden() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hide_noise()
        warnings.warn("\nfan_in_fan_out is set to False but the target is `Conv1D`", UserWarning, stacklevel=1)
        warnings.warn("something else", UserWarning, stacklevel=1)
    assert [str(each.message) for each in caught] == ["something else"]


def test_the_command_line_says_what_transformers_says_of_a_model(tmp_path: Path, run: Run) -> None:
    folder = saved(tmp_path / "model")
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "gears": 3}
    changed(folder, rope_parameters=rope)
    quick = ("--dtype", "fp32", "--device", "cpu", "--steps", "1", "--num-virtual-tokens", "2")
    ran = run("train", "train.jsonl", "--name", "one", "--base", str(folder), *quick)
    assert ran.code == 0
    assert ran.err.count("Note: ") == 1
    assert "Note: transformers says: Unrecognized keys in `rope_parameters` for 'rope_type'='default': {'gears'}." in (
        ran.err
    )
    del rope["gears"]
    changed(folder, rope_parameters=rope)
    ran = run("train", "train.jsonl", "--name", "two", "--base", str(folder), *quick)
    assert ran.code == 0
    assert "Note: " not in ran.err


def test_what_bitsandbytes_says_when_others_import_it_is_not_shown() -> None:
    code = (
        "import logging, warnings\n"
        "from softprompt.model.notes import hear_warnings\n"
        "with warnings.catch_warnings():\n"
        "    hear_warnings()\n"
        "own = logging.getLogger('bitsandbytes.backends.cpu.ops')\n"
        "own.warning('Failed to load CPU gemm_4bit_forward from kernels-community: none')\n"
        "own.warning('a real one')\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stderr == "a real one\n"
