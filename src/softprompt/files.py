"""Paths as users write them, and JSON that every parser reads."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import platformdirs


def cache_folder() -> Path:
    """``$SOFTPROMPT_CACHE``, or the user's cache folder for ``softprompt``; it may not exist yet."""
    return local_path(os.environ.get("SOFTPROMPT_CACHE") or platformdirs.user_cache_dir("softprompt"))


StrPath = str | os.PathLike[str]
"""What the public functions take as a path."""


def local_path(path: StrPath) -> Path:
    """The path, with the home folder for ``~`` at its start: no shell expands it in ``--out=~/x``, quotes or a
    variable. A name such as ``~x`` stays as it is where there is no user ``x``."""
    return Path(os.path.expanduser(path))


def strict_json(value: object) -> str:
    """One line of JSON; a number that is not finite, for which JSON has no form, becomes ``null``."""
    return json.dumps(finite(value), allow_nan=False)


def finite(value: Any) -> Any:
    """JSON values, with None for every number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, list | tuple) else value


@contextmanager
def atomic_writer(path: Path) -> Iterator[BinaryIO]:
    """A binary file that becomes ``path`` when the block ends, and vanishes when it fails.

    Whatever ``path`` held stays whole until then. Missing folders are made.

    Raises:
        OSError: the folder cannot be written, or is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # same folder: os.replace is atomic there
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
