"""Two runs under one name or path, at any distance in time; and which soft prompt a run may replace."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from softprompt.errors import StoreError
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.soft_prompts.store import Store
from softprompt.tuning import checkpoint
from softprompt.tuning.gradients import Gradients
from softprompt.tuning.run_folder import RunFolder
from softprompt.tuning.training import Training
from tests.conftest import Ran, Run, tiny, toy, toy_task, train_settings


def hold(folder: Path, name: str) -> None:
    """In a process of its own: holds a run folder with a checkpoint, as a training in the making does."""
    with RunFolder(folder, name):
        (folder / checkpoint.FILE).write_text("theirs")
        (folder / "ready").touch()
        time.sleep(60)


@pytest.fixture
def holder(spawn: Callable[..., Any]) -> Iterator[Callable[[Path, str], Any]]:
    """Starts a process that holds a folder; it is killed at the end."""
    started = []

    def start(folder: Path, name: str) -> Any:
        process = spawn(hold, folder, name)
        started.append(process)
        deadline = time.monotonic() + 60
        while not (folder / "ready").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return process

    yield start
    for process in started:
        process.kill()
        process.join(60)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("option", [(), ("--resume",), ("--overwrite",), ("--resume", "--overwrite")], ids=str)
@pytest.mark.parametrize("out", [False, True])
def test_the_second_of_two_at_once_is_told_before_a_model_is_loaded(
    option: tuple[str, ...], out: bool, run: Run, home: Path, holder: Callable[..., Any], no_model: None
) -> None:
    folder = Path("kept/same.safetensors.run") if out else home / ".runs" / "same"
    process = holder(folder.absolute(), "same")
    before = content(folder)
    place = ("--out", "./kept/../kept/same.safetensors") if out else ("--name", "same")
    ran = run("train", "train.jsonl", *place, *option)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith(f"error: A training of 'same' is running (process {process.pid}), see ")
    assert "wait until it has ended" in ran.err
    assert content(folder) == before


def test_a_path_in_the_store_and_a_name_are_one_place(
    run: Run, home: Path, holder: Callable[..., Any], no_model: None
) -> None:
    holder(home / ".runs" / "same", "same")
    ran = run("train", "train.jsonl", "--name", "other", "--out", str(home / "same.safetensors"))
    assert "A training of 'same' is running" in ran.err


def test_killed_it_is_free_at_once(train: Run, home: Path, holder: Callable[..., Any]) -> None:
    process = holder(home / ".runs" / "same", "same")
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert "add --resume to go on with it" in train("train.jsonl", "--name", "same").err
    assert train("train.jsonl", "--name", "same", "--overwrite").code == 0
    assert not [path for path in (home / ".runs" / "same").iterdir() if path.name.startswith(".")]


def test_rm_leaves_a_running_one_alone(run: Run, home: Path, stored: SoftPrompt, holder: Callable[..., Any]) -> None:
    holder(home / ".runs" / "same", "same")
    ran = run("rm", "films", "same")
    assert (ran.code, ran.out) == (2, "")
    assert "A training of 'same' is running" in ran.err
    assert (home / ".runs" / "same" / checkpoint.FILE).exists()
    assert (home / "films.safetensors").exists()


def test_a_second_demo_is_told(run: Run, home: Path, holder: Callable[..., Any], no_model: None) -> None:
    holder(home / ".runs" / "demo", "demo")
    ran = run("demo")
    assert ran.code == 2
    assert "A training of 'demo' is running" in ran.err


def test_a_second_comparison_in_one_folder_is_told(
    run: Run, home: Path, holder: Callable[..., Any], no_model: None
) -> None:
    holder(home.parent / "report", "other")
    data = ("--validation", "test.jsonl", "--test", "test.jsonl")
    ran = run("compare", "train.jsonl", *data, "--out", "report")
    assert ran.code == 2
    assert "A comparison of" in ran.err
    assert "is running (process" in ran.err


def test_a_place_is_checked_again_once_it_is_held(
    train: Run, home: Path, stored: SoftPrompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another training may end between the look and the hold."""
    films = (home / "films.safetensors").read_bytes()
    (home / "films.safetensors").rename(home / "later.safetensors")
    real = RunFolder.hold

    def late(self: RunFolder) -> None:
        real(self)
        (home / "films.safetensors").write_bytes(films)

    monkeypatch.setattr(RunFolder, "hold", late)
    assert "is taken" in train("train.jsonl", "--name", "films").err
    assert (home / "films.safetensors").read_bytes() == films


def test_a_command_that_fails_leaves_no_folder_behind(run: Run, home: Path) -> None:
    for place in (("--name", "a"), ("--out", "kept/a.safetensors")):
        assert run("train", "train.jsonl", *place, "--base", "./no-such-model").code == 2
    assert not (home / ".runs" / "a").exists()
    assert not Path("kept/a.safetensors.run").exists()


# --- in Python -------------------------------------------------------------------------------------


def made(folder: Path, **options: Any) -> Training:
    data = toy(15, 0)
    config = train_settings(steps=4, eval_every=2, checkpoint_every=1)
    return Training(toy_task(tiny("llama"), data), data, data, config, name="mine", folder=folder, **options)


def test_a_training_holds_its_folder_until_its_iteration_ends(tmp_path: Path) -> None:
    first = made(tmp_path)
    with pytest.raises(StoreError, match=r"A training of 'mine' is running \(this process\)"):
        made(tmp_path)
    steps = iter(first)
    next(steps)
    for options in ({}, {"resume": True}):
        with pytest.raises(StoreError, match="is running"):
            made(tmp_path, **options)
    assert (tmp_path / checkpoint.FILE).exists()
    list(steps)
    assert made(tmp_path, resume=True).step == 4


def test_a_training_gives_its_folder_back(tmp_path: Path) -> None:
    for step in made(tmp_path):  # by a loop that is left
        if step.number == 2:
            break
    again = made(tmp_path, resume=True)
    assert again.step == 2
    del again  # by being deleted
    again = made(tmp_path, resume=True)
    again.result()  # by its result
    ended = made(tmp_path, resume=True)
    ended.itself = ended  # type: ignore[attr-defined]
    del ended  # only the garbage collector sees that nobody refers to it
    assert made(tmp_path, resume=True).step == 2


def test_a_training_that_cannot_begin_holds_nothing(tmp_path: Path) -> None:
    for step in made(tmp_path):
        if step.number == 2:
            break
    path = tmp_path / checkpoint.FILE
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    with pytest.raises(StoreError, match="damaged"):
        made(tmp_path, resume=True)
    path.write_bytes(whole)
    assert made(tmp_path, resume=True).step == 2


# --- what may be replaced --------------------------------------------------------------------------


@pytest.fixture
def interrupted(train: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """``train`` with Ctrl-C in the fourth step."""

    def ran(*arguments: str) -> Ran:
        add, calls = Gradients.add, list[int]()

        def stop(*values: Any) -> Any:
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return add(*values)

        with monkeypatch.context() as patch:
            patch.setattr(Gradients, "add", stop)
            found = train(*arguments)
        assert found.code == 130
        return found

    return ran


def killed(train: Run, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """``train`` that dies without storing anything, after some checkpoints."""
    add, calls = Gradients.add, list[int]()

    def die(*values: Any) -> Any:
        calls.append(1)
        if len(calls) == 7:
            raise ZeroDivisionError
        return add(*values)

    with monkeypatch.context() as patch:
        patch.setattr(Gradients, "add", die)
        with pytest.raises(ZeroDivisionError):
            train(*arguments)


PLACES = [("--name", "films"), ("--out", "kept/films.safetensors")]


def file_of(home: Path, place: tuple[str, str]) -> Path:
    return home / "films.safetensors" if place[0] == "--name" else Path(place[1])


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_a_run_replaces_what_it_stored_itself(place: tuple[str, str], train: Run, home: Path, interrupted: Run) -> None:
    interrupted("train.jsonl", *place)
    assert SoftPrompt.load(file_of(home, place)).training["steps_done"] == 3
    interrupted("train.jsonl", *place, "--resume")
    assert train("train.jsonl", *place, "--resume", "--json").json["steps"] == 8
    assert SoftPrompt.load(file_of(home, place)).training["steps_done"] == 8


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_resume_does_not_replace_a_soft_prompt_of_another_run(
    place: tuple[str, str], train: Run, home: Path, stored: SoftPrompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = (home / "films.safetensors").read_bytes()
    (home / "films.safetensors").unlink()
    path = file_of(home, place)
    killed(train, monkeypatch, "train.jsonl", *place)
    path.write_bytes(other)
    ran = train("train.jsonl", *place, "--resume")
    assert ran.code == 2
    assert "is not of the training that was stopped" in ran.err
    assert path.read_bytes() == other
    ran = train("train.jsonl", *place, "--resume", "--overwrite", "--json")  # as it advises
    assert (ran.code, ran.json["steps"]) == (0, 8)
    assert path.read_bytes() != other


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_what_overwrite_gave_up_may_be_replaced_after_a_kill(
    place: tuple[str, str], train: Run, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train("train.jsonl", *place).code == 0
    killed(train, monkeypatch, "train.jsonl", *place, "--seed", "1", "--overwrite")
    assert train("train.jsonl", *place, "--seed", "1", "--resume").code == 0
    assert SoftPrompt.load(file_of(home, place)).training["seed"] == 1


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_what_was_put_there_meanwhile_is_kept_and_the_advice_is_right(
    place: tuple[str, str], overwrite: bool, train: Run, home: Path, stored: SoftPrompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = (home / "films.safetensors").read_bytes()
    (home / "films.safetensors").unlink()
    path = file_of(home, place)
    if overwrite:
        assert train("train.jsonl", *place).code == 0
    add = Gradients.add

    def meanwhile(*values: Any) -> Any:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(other)
        return add(*values)

    with monkeypatch.context() as patch:
        patch.setattr(Gradients, "add", meanwhile)
        ran = train("train.jsonl", *place, "--seed", "1", *["--overwrite"] * overwrite)
    assert ran.code == 2
    assert "the training is not lost" in ran.err
    assert path.read_bytes() == other
    path.rename("mine.safetensors")  # as it advises
    ran = train("train.jsonl", *place, "--seed", "1", "--resume")
    assert ran.code == 0
    assert "plan:" not in ran.err  # nothing was left to do but to write
    assert SoftPrompt.load(path).training["seed"] == 1


@pytest.mark.parametrize("name", [None, "a", "b", "c"])
@pytest.mark.parametrize("out", [None, "{home}/b.safetensors", "home/b.safetensors", "./home/../home/b.safetensors"])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_only_the_file_that_was_looked_at_is_replaced(
    name: str | None, out: str | None, elsewhere: bool, home: Path, stored: SoftPrompt
) -> None:
    """In every combination of name and path, before and after a training."""
    from softprompt.cli.place import Place

    if name is None and out is None:
        return
    for other in ("a", "b"):
        Store().save(stored.__class__(**{**vars(stored), "name": other}))
    (home.parent / "other").mkdir()
    path = (
        None
        if out is None
        else Path(out.format(home=home).replace("home", "other") if elsewhere else out.format(home=home))
    )
    if elsewhere and path is not None:
        (home.parent / "other" / "b.safetensors").write_bytes((home / "b.safetensors").read_bytes())
    target = (
        home.parent / "other" / "b.safetensors" if elsewhere and out else home / f"{'b' if out else name}.safetensors"
    )
    before = content(home.parent)
    if target.exists():
        with pytest.raises(StoreError):
            Place.of(name, path, overwrite=False, resume=False)
    place = Place.of(name, path, overwrite=True, resume=False)
    with place.claimed():
        place.save(stored.__class__(**{**vars(stored), "name": place.name, "base": "new"}))
    after = content(home.parent)
    changed = {file for file in after if before.get(file) != after[file] and file.endswith(".safetensors")}
    assert changed == {str(target)}
    assert not [file for file in before if file not in after]
    assert SoftPrompt.load(target).base == "new"
