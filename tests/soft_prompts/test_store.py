"""Names, the folder behind them, and what happens where it is missing, damaged, full or unwritable."""

from __future__ import annotations

import errno
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import platformdirs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softprompt.errors import ArtifactError, SoftPromptError, StoreError
from softprompt.soft_prompts.metadata import Header
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.soft_prompts.store import Store
from tests.conftest import Run


def make(name: str = "sst2", value: float = 1.0) -> SoftPrompt:
    return SoftPrompt(
        vectors=torch.full((2, 4), value),
        name=name,
        base="smollm2-135m",
        base_fingerprint="ab" * 32,
        tokenizer_fingerprint="cd" * 32,
        template="{soft_prompt}{input}{target}",
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


def test_save_load_list_remove(store: Store) -> None:
    assert store.names() == ()
    assert store.entries() == ()
    path = store.save(make("b"))
    store.save(make("a", 2.0))
    assert path == store.path("b") == store.home / "b.safetensors"
    assert store.names() == ("a", "b")
    assert store.load("a").vectors.equal(torch.full((2, 4), 2.0))
    assert [(entry.name, entry.path, entry.bytes) for entry in store.entries()] == [
        (name, store.path(name), store.path(name).stat().st_size) for name in ("a", "b")
    ]
    store.remove("b")
    assert store.names() == ("a",)


def test_home_comes_from_the_argument_the_environment_or_the_platform(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOFTPROMPT_HOME", str(tmp_path / "environment"))
    assert Store(tmp_path / "given").home == tmp_path / "given"
    assert Store().home == tmp_path / "environment"
    monkeypatch.setenv("SOFTPROMPT_HOME", "")
    assert Store().home == Path(platformdirs.user_data_dir("softprompt"))
    monkeypatch.delenv("SOFTPROMPT_HOME")
    assert Store().home == Path(platformdirs.user_data_dir("softprompt"))


def test_a_path_is_loaded_from_where_it_points(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = store.save(make()).rename(tmp_path / "moved.safetensors")
    monkeypatch.chdir(tmp_path)
    for path in (elsewhere, str(elsewhere), "moved.safetensors", "./moved.safetensors", Path("moved.safetensors")):
        assert store.load(path).name == "sst2"
    elsewhere.rename(tmp_path / "bare")
    assert store.load("./bare").name == store.load(Path("bare")).name == "sst2"
    with pytest.raises(ArtifactError) as caught:
        store.load("./none")
    assert str(caught.value) == (
        "There is no soft prompt at none; check the path, or see the stored ones with `softprompt list`."
    )


def test_run_folder_is_a_path_only(store: Store) -> None:
    assert store.run_folder("sst2.v1") == store.home / ".runs" / "sst2.v1"
    assert not store.home.exists()


def test_a_taken_name_keeps_its_soft_prompt(store: Store) -> None:
    path = store.save(make(value=1.0))
    expected = (
        f"The name 'sst2' is taken by the soft prompt {path}; "
        f"choose another name, or remove that one first with `softprompt rm sst2`."
    )
    with pytest.raises(StoreError) as caught:
        store.save(make(value=2.0))
    assert str(caught.value) == expected
    with pytest.raises(StoreError) as caught:
        store.require_free("sst2")
    assert str(caught.value) == expected
    assert store.load("sst2").vectors.equal(torch.full((2, 4), 1.0))
    store.save(make(value=2.0), overwrite=True)
    assert store.load("sst2").vectors.equal(torch.full((2, 4), 2.0))


def test_require_free_gives_the_path_and_makes_the_folder(store: Store) -> None:
    assert store.require_free("new") == store.path("new")
    assert store.home.is_dir()
    assert store.names() == ()


def test_of_four_that_save_one_name_at_once_one_succeeds(store: Store) -> None:
    def attempt(value: float) -> float | None:
        try:
            Store(store.home).save(make(value=value))
        except StoreError:
            return None
        return value

    with ThreadPoolExecutor(4) as pool:
        winners = [value for value in pool.map(attempt, [1.0, 2.0, 3.0, 4.0]) if value is not None]
    assert len(winners) == 1
    assert store.load("sst2").vectors.equal(torch.full((2, 4), winners[0]))


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "SST-2", "v1.2", "_x", "-", "0", "a" * 100, "x.safetensor"])
def test_good_names(store: Store, name: str) -> None:
    store.save(make(name))
    assert store.names() == (name,)
    assert store.load(name).name == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "a b", "a/b", "../a", "a\\b", "a\n", "é", "a" * 101, "x.safetensors", "a\0"]
)
def test_bad_names(store: Store, name: str) -> None:
    expected = (
        "A soft prompt's name is 1 to 100 letters a-z, digits, '-', '_' and '.', without a dot in front or "
        f"'.safetensors' at the end, but {name!r} was given; choose another name."
    )
    for use in (store.path, store.run_folder, store.require_free, store.remove, lambda name: store.save(make(name))):
        with pytest.raises(StoreError) as caught:
            use(name)
        assert str(caught.value) == expected
    assert not store.home.exists()


@given(name=st.text(max_size=12))
def test_no_name_leads_out_of_the_folder(name: str) -> None:
    home = Path("/home/of/soft/prompts")
    try:
        path = Store(home).path(name)
    except StoreError:
        return
    assert path.parent == home
    assert Path(os.path.normpath(path)) == path
    assert re.fullmatch(r"[\w.-]+", name, re.ASCII)


@pytest.mark.parametrize(
    ("stored", "asked", "hint"),
    [
        (("sst2", "trec6"), "sst", "similar names are 'sst2'"),
        (("sst2", "sst-2", "trec6"), "sst_2", "similar names are 'sst2', 'sst-2'"),
        (("d", "a", "b", "c"), "xyz", "the first names are 'a', 'b', 'c'"),
        ((), "sst2", "the store is empty"),
    ],
)
def test_an_unknown_name_comes_with_the_closest(store: Store, stored: tuple[str, ...], asked: str, hint: str) -> None:
    for name in stored:
        store.save(make(name))
    for use in (store.load, store.remove):
        with pytest.raises(StoreError) as caught:
            use(asked)
        assert str(caught.value) == (
            f"There is no soft prompt '{asked}' in {store.home}: {hint}; see `softprompt list`."
        )


# --- a folder in disorder -------------------------------------------------------------------------------------------


def test_a_damaged_file_does_not_hide_the_others(store: Store) -> None:
    store.save(make("a"))
    damaged = store.save(make("b"))
    store.save(make("c"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    a, b, c = store.entries()
    assert isinstance(a.header, Header)
    assert isinstance(c.header, Header)
    assert isinstance(b.header, ArtifactError)
    assert str(b.header).startswith(f"{damaged} is not a sound soft prompt: ")
    assert b.bytes == damaged.stat().st_size
    with pytest.raises(ArtifactError):
        store.load("b")
    store.remove("b")
    assert store.names() == ("a", "c")


def test_what_is_no_soft_prompt_of_ours_is_not_listed(store: Store) -> None:
    store.save(make())
    store.run_folder("sst2").mkdir(parents=True)
    for name in ("notes.txt", ".sst2.safetensors.12345678.tmp", ".hidden.safetensors", "a name.safetensors"):
        (store.home / name).write_text("x")
    assert store.names() == ("sst2",)


def test_a_renamed_file_goes_by_its_new_name(store: Store) -> None:
    store.save(make("old")).rename(store.path("new"))
    assert store.names() == ("new",)
    assert store.load("new").name == "old"


def test_a_store_that_is_a_file(store: Store) -> None:
    store.home.write_text("a file, where the folder should be")
    for use in (store.require_free, lambda name: store.save(make(name))):
        with pytest.raises(StoreError) as caught:
            use("sst2")
        assert str(caught.value) == (
            f"The store {store.home} cannot be written: File exists; set SOFTPROMPT_HOME to a folder that can."
        )
    for read in (store.names, store.entries, lambda: store.load("sst2"), lambda: store.remove("sst2")):
        with pytest.raises(StoreError) as caught:
            read()
        assert str(caught.value) == (
            f"The store {store.home} cannot be read: Not a directory; set SOFTPROMPT_HOME to a folder that can."
        )


def test_a_store_without_permission(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The superuser may write anywhere, so the system's answer is simulated."""
    store.save(make())
    monkeypatch.setattr("os.access", lambda *_: False)
    for use in (store.require_free, lambda name: store.save(make(name))):
        with pytest.raises(StoreError) as caught:
            use("new")
        assert str(caught.value) == (
            f"The store {store.home} cannot be written: Permission denied; set SOFTPROMPT_HOME to a folder that can."
        )

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "unlink", denied)
    with pytest.raises(StoreError) as caught:
        store.remove("sst2")
    assert str(caught.value) == (
        f"The soft prompt {store.path('sst2')} cannot be removed: Permission denied; make the folder writable."
    )


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_store_that_really_lacks_permission(store: Store) -> None:
    store.save(make())
    store.home.chmod(0o500)
    with pytest.raises(StoreError) as caught:
        store.save(make("new"))
    store.home.chmod(0o700)
    assert str(caught.value) == (
        f"The store {store.home} cannot be written: Permission denied; set SOFTPROMPT_HOME to a folder that can."
    )


def test_a_full_disk_loses_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.save(make(value=1.0))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        for soft_prompt, overwrite in ((make(value=2.0), True), (make("other"), False)):
            with pytest.raises(SoftPromptError) as caught:
                store.save(soft_prompt, overwrite=overwrite)
            assert isinstance(caught.value, StoreError)
            assert "No space left on device; free " in str(caught.value)
    assert store.names() == ("sst2",)
    assert store.load("sst2").vectors.equal(torch.full((2, 4), 1.0))
    assert sorted(path.name for path in store.home.iterdir() if path.name != ".lock") == ["sst2.safetensors"]


def test_a_full_disk_on_which_not_even_the_lock_can_be_made(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("softprompt.soft_prompts.store.FileLock", full)
    with pytest.raises(StoreError) as caught:
        store.save(make())
    assert str(caught.value) == (
        f"The store {store.home} cannot be written: No space left on device; set SOFTPROMPT_HOME to a folder that can."
    )


def test_listed_base_models_of_one_name_are_told_apart(run: Run, home: Path) -> None:
    store = Store()
    for name, base in (("a", "org1/model"), ("b", "org2/model"), ("c", "/here/org2/model"), ("d", "other/one")):
        store.save(replace(make(name), base=base))
    shown = [line.split()[1] for line in run("list").out.splitlines()[1:]]
    assert shown == ["org1/model", "org2/model", "here/org2/model", "one"]
