"""A comparison's folder: what runs again, and what does not fit into it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt.compare import report
from softprompt.compare.plan import Key
from softprompt.errors import ConfigError
from softprompt.methods.problem import PROBE
from softprompt.methods.registry import METHODS
from softprompt.tuning.gradients import Gradients, Work
from tests.compare.made_up import RAN, MadeUp, comparison, run_all, says, stops
from tests.conftest import toy

pytestmark = pytest.mark.usefixtures("made_up")


def test_finished_cells_do_not_run_again_and_failed_ones_do(tmp_path: Path, made_up: MadeUp) -> None:
    run_all(comparison(tmp_path))
    assert RAN == [("zero-shot", 0), ("soft-prompt", 0), ("fails", 0)]
    RAN.clear()
    made_up["lora"] = says(["positive"], "lora")
    again = comparison(tmp_path, seeds=2)
    run_all(again)
    assert RAN == [("soft-prompt", 1), ("lora", 0), ("lora", 1)]
    assert [(cell["method"], cell["seed"]) for cell in again.cells] == [
        ("zero-shot", 0),
        ("soft-prompt", 0),
        ("soft-prompt", 1),
        ("lora", 0),
        ("lora", 1),
    ]
    assert {cell["status"] for cell in again.cells} == {"done"}
    assert comparison(tmp_path, seeds=2).todo() == []


def test_an_interruption_loses_the_cell_at_hand_only(tmp_path: Path, made_up: MadeUp) -> None:
    made_up["lora"] = stops
    found = comparison(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_all(found)
    assert [key.method for key in comparison(tmp_path).todo()] == ["lora"]


def real(monkeypatch: pytest.MonkeyPatch, made_up: MadeUp, steps: int = 6) -> None:
    """The soft prompt's own method, with few steps."""
    monkeypatch.setattr("softprompt.methods.prompt_tuning.most_steps", lambda rows, batch_size: steps)
    made_up.add(METHODS["soft-prompt"])


class Killed(BaseException):
    pass


def test_seeds_learn_together_and_go_on_after_a_kill(
    tmp_path: Path, made_up: MadeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    real(monkeypatch, made_up)
    add, rounds = Gradients.add, itertools.count()
    at = PROBE + 3

    def dies(gradients: Gradients, work: Work, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        assert len(vectors) == 3
        if next(rounds) == at:
            raise Killed
        return add(gradients, work, vectors)

    monkeypatch.setattr(Gradients, "add", dies)
    options: dict[str, Any] = {"methods": ("soft-prompt",), "seeds": 3, "budget": 200.0}
    with pytest.raises(Killed):
        run_all(comparison(tmp_path, **options))
    found = comparison(tmp_path, **options)
    first = found.run(found.todo()[0])
    assert next(rounds) == at + 1 + 6 - 2  # from the checkpoint of the validation at step 2
    assert found.learned == {Key("tiny", "soft-prompt", 1), Key("tiny", "soft-prompt", 2)}
    assert (tmp_path / "training").exists()
    del found  # killed again, with all learned: nothing is computed anew
    rest = run_all(comparison(tmp_path, **options))
    assert next(rounds) == at + 1 + 6 - 2 + 1
    cells = json.loads((tmp_path / "results.json").read_text())
    assert cells == [first, *rest]
    assert [cell["learned_with"] for cell in cells] == [[1, 2], [0, 2], [0, 1]]
    assert all(cell["seconds"] >= cell["train_seconds"] > 0 for cell in cells)
    report.write(cells, tmp_path)
    assert "soft-prompt learned for several seeds in shared passes" in (tmp_path / "report.html").read_text()
    assert {cell["status"] for cell in cells} == {"done"}
    assert not (tmp_path / "training").exists()


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"test": toy(31, 3)}, "test, test_rows"),
        ({"budget": 5.0}, "budget"),
        ({"task": "other", "train": toy(21, 1)}, "task, train"),
    ],
)
def test_a_folder_is_of_one_comparison(tmp_path: Path, options: dict[str, Any], what: str) -> None:
    run_all(comparison(tmp_path))
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(ConfigError) as caught:
        comparison(tmp_path, **options)
    assert str(caught.value) == (
        f"The folder {tmp_path} holds results of a comparison with other {what}; "
        f"choose another --out, or repeat that comparison's options."
    )
    assert (tmp_path / "results.json").read_bytes() == before


@pytest.mark.parametrize("content", ["", "{}", "[1]", '[{"task": "x"}]', "\udcff"])
def test_something_else_in_the_folder_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError) as caught:
        comparison(tmp_path)
    assert str(caught.value) == (
        f"Expected a comparison's results in {path}, found something else; choose another --out."
    )


def test_instructions_may_be_added_after_methods_that_do_not_read_them(tmp_path: Path, made_up: MadeUp) -> None:
    run_all(comparison(tmp_path))
    made_up["instruction"] = says(["negative"], "instruction")
    instructed = {"instructions": ("Good or bad?",)}
    later = comparison(tmp_path, methods=("instruction",), **instructed)
    run_all(later)
    assert [cell["method"] for cell in later.cells if cell["status"] == "done"] == [
        "zero-shot",
        "instruction",
        "soft-prompt",
    ]
    assert later.cells[1]["difference"] is not None
    assert comparison(tmp_path, methods=("zero-shot", "soft-prompt")).todo() == []
    with pytest.raises(ConfigError, match="with other instructions; "):
        comparison(tmp_path, methods=("instruction",), instructions=("Another one?",))
