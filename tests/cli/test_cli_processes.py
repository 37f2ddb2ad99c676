"""``softprompt`` as several processes: one speaks and writes, one that is lost ends the run, any number goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt.soft_prompts.soft_prompt import SoftPrompt
from tests.conftest import QUICK, Run, write_labels
from tests.processes import together

Spawn = Callable[..., Any]


def command(home: str, arguments: Sequence[str], dies_at: int) -> tuple[int, str, str]:
    """Runs the command line; process 1 is killed when it begins to add up gradients for the ``dies_at``-th time."""
    from softprompt.cli.main import main
    from softprompt.tuning.gradients import Gradients, Work

    os.environ["SOFTPROMPT_HOME"] = home
    os.chdir(Path(home).parent)
    add, times = Gradients.add, 0

    def dying(gradients: Gradients, work: Work, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        nonlocal times
        times += 1
        if times == dies_at and gradients.lm.world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return add(gradients, work, vectors)

    setattr(Gradients, "add", dying)  # noqa: B010 (an assignment would be refused by mypy)
    rank = os.environ["RANK"]
    with open(f"out-{rank}", "w+") as out, open(f"err-{rank}", "w+") as err:
        with redirect_stdout(out), redirect_stderr(err):
            code = main(arguments)
        return code, Path(out.name).read_text(), Path(err.name).read_text()


def several(spawn: Spawn, home: Path, size: int, *arguments: str, dies_at: int = 0) -> list[Any]:
    """Code, stdout and stderr of each process."""
    killed = (1,) if dies_at else ()
    return together(spawn, size, home.parent / "told", command, str(home), arguments, dies_at, killed=killed)


@pytest.fixture
def options(base: str) -> list[str]:
    return ["--base", base, *QUICK, "--checkpoint-every", "100"]


def test_a_lost_process_ends_the_run_and_another_number_goes_on(
    spawn: Spawn, run: Run, home: Path, options: list[str]
) -> None:
    assert run("train", "train.jsonl", "--name", "alone", *options).code == 0
    killed = several(spawn, home, 3, "train", "train.jsonl", "--name", "films", *options, dies_at=7)
    for rank in (0, 2):
        code, out, err = killed[rank]
        assert (code, out) == (2, "")
        assert ("process of this run was lost" in err and "--resume" in err) == (rank == 0)
        assert bool(err) == (rank == 0)
    assert not (home / "films.safetensors").exists()
    (code, out, err), silent = several(spawn, home, 2, "train", "train.jsonl", "--name", "films", *options, "--resume")
    assert code == 0, err
    assert "of which 6 are done" in err
    assert "soft prompt  films" in out
    assert silent == (0, "", "")
    alone, films = SoftPrompt.load(home / "alone.safetensors"), SoftPrompt.load(home / "films.safetensors")
    torch.testing.assert_close(films.vectors, alone.vectors, rtol=1e-4, atol=1e-4)
    assert films.training["tokens"] == alone.training["tokens"]
    logs = [(home / ".runs" / name / "log.jsonl").read_text().splitlines() for name in ("alone", "films")]
    steps = [[json.loads(line) for line in log] for log in logs]
    assert [one["number"] for one in steps[1]] == list(range(1, 9))
    assert [one["loss"] for one in steps[1]] == pytest.approx([one["loss"] for one in steps[0]], rel=1e-4)

    measured = run("evaluate", "films", "test.jsonl", "--json", "--dtype", "fp32").json
    shared = several(spawn, home, 2, "evaluate", "films", "test.jsonl", "--json", "--dtype", "fp32")
    assert shared[1] == (0, "", shared[1][2])
    assert shared[1][1] == ""
    found = json.loads(shared[0][1])
    assert {m["metric"]: m["value"] for m in found["metrics"]} == pytest.approx(
        {m["metric"]: m["value"] for m in measured["metrics"]}, rel=1e-4
    )


def test_a_sweep_is_that_of_one_process(spawn: Spawn, run: Run, home: Path, options: list[str]) -> None:
    settings = ["--lrs", "0.1,0.3,1", "--lengths", "4,6", "--patience", "0", "--eval-every", "1"]
    asked = ["sweep", "train.jsonl", *options, *settings, "--json"]
    alone = run(*asked, "--name", "alone")
    assert alone.code == 0, alone.err
    first, silent = several(spawn, home, 2, *asked, "--name", "films")
    assert first[0] == 0, first[2]
    assert silent == (0, "", "")
    found, expected = json.loads(first[1]), alone.json
    assert found["rungs"] == expected["rungs"]
    assert len(found["candidates"]) == 7
    for ours, theirs in zip(found["candidates"], expected["candidates"], strict=True):
        assert (ours["setting"], ours["steps"], ours["dropped_at"], ours["chosen"]) == tuple(
            theirs[key] for key in ("setting", "steps", "dropped_at", "chosen")
        )
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-4)
    vectors = [SoftPrompt.load(home / f"{name}.safetensors").vectors for name in ("films", "alone")]
    torch.testing.assert_close(*vectors, rtol=1e-4, atol=1e-4)
    assert not (home / ".runs" / "films" / "sweep").exists()


@pytest.mark.slow
def test_a_comparison_is_divided_or_done_by_the_first(spawn: Spawn, run: Run, home: Path, base: str) -> None:
    write_labels(Path("dev.jsonl"), 10)
    data = ["train.jsonl", "--validation", "dev.jsonl", "--test", "test.jsonl", "--bases", base]
    data += ["--dtype", "fp32", "--device", "cpu", "--budget", "1s", "--json"]
    methods = ["zero-shot", "few-shot", "tf-idf", "soft-prompt", "soft-prompt-ensemble", "full-fine-tuning"]
    asked = ["compare", *data, "--out", "report", "--methods", *methods, "--seeds", "2"]
    first, silent = several(spawn, home, 2, *asked)
    assert first[0] == 0, first[2]
    assert silent == (0, "", "")
    cells = json.loads(first[1])["cells"]
    assert cells == json.loads(Path("report/results.json").read_text())
    assert {cell["status"] for cell in cells} == {"done"}, [cell["reason"] for cell in cells]
    assert [(cell["method"], cell["seed"]) for cell in cells] == [
        (method, seed)
        for method in methods
        for seed in range(2 if method in ("few-shot", "soft-prompt", "full-fine-tuning") else 1)
    ]
    assert Path("report/report.html").exists()
    assert not Path("report/training").exists()
    scores = {(cell["method"], cell["seed"]): cell["value"] for cell in cells}
    (path,) = Path("report/soft-prompts").glob("*.soft-prompt.1.safetensors")
    measured = run("evaluate", str(path), "test.jsonl", "--dtype", "fp32", "--metric", "accuracy", "--json")
    assert measured.json["value"] == scores["soft-prompt", 1]
    alone = run("compare", *data, "--out", "alone", "--methods", "zero-shot", "tf-idf")
    assert [cell["value"] for cell in alone.json["cells"]] == [scores["zero-shot", 0], scores["tf-idf", 0]]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("train", "train.jsonl", "--name", "films", "--lr", "-1"), "lr"),
        (("train", "none.jsonl", "--name", "films"), "none.jsonl"),
        (("train", "train.jsonl", "--name", "taken"), "taken"),
        (("serve",), "without torchrun"),
    ],
)
def test_a_mistake_is_said_once(spawn: Spawn, home: Path, base: str, arguments: tuple[str, ...], said: str) -> None:
    home.mkdir(exist_ok=True)
    (home / "taken.safetensors").touch()
    options = () if arguments == ("serve",) else ("--base", base, *QUICK)
    first, other = several(spawn, home, 2, *arguments, *options)
    assert first[0] == 2
    assert first[1] == ""
    assert said in first[2]
    assert other == (2, "", "")


def test_several_processes_are_needed_to_divide_a_base_model(run: Run, base: str) -> None:
    ran = run("train", "train.jsonl", "--name", "films", "--base", base, "--shard", "fsdp")
    assert ran.code == 2
    assert "torchrun" in ran.err
    ran = run("train", "train.jsonl", "--name", "films", "--base", base, "--shard", "zero")
    assert ran.code == 2
    assert "none, fsdp, tp" in ran.err


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["none", "fsdp", "tp"])
def test_torchrun_ends_when_a_process_is_killed(home: Path, base: str, shard: str) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    asked = ["-m", "softprompt", "train", "train.jsonl", "--name", "films", "--base", base, "--shard", shard]
    settings = ["--dtype", "fp32", "--device", "cpu", "--eval-every", "500", "--checkpoint-every", "5"]
    begun = subprocess.Popen(
        [*torchrun, *asked, *settings, "--steps", "2000"], stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL
    )
    log = home / ".runs" / "films" / "log.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and len(log.read_text().splitlines()) > 12):
        time.sleep(0.2)
    children = Path(f"/proc/{begun.pid}/task/{begun.pid}/children").read_text().split()
    second = [child for child in children if b"\0RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes()]
    with suppress(ProcessLookupError):
        os.kill(int(second[0]), signal.SIGKILL)
    _, err = begun.communicate(timeout=60)
    assert begun.returncode != 0
    assert err.count("--resume") == 1
    assert (log.parent / "checkpoint.safetensors").exists()
