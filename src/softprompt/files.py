"""Paths as users write them, and JSON that every parser reads."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
