"""Files of data to read, and the sentence that reading them ends in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from softprompt.data.reading import read_dataset
from softprompt.errors import DataError


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def failure(path: str | Path, **options: Any) -> str:
    """The sentence that reading the file ends in."""
    with pytest.raises(DataError) as caught:
        read_dataset(path, **{"fields": ["input"], **options})
    return str(caught.value)


def read_pairs(path: str | Path, **options: Any) -> list[tuple[str, str | None]]:
    return [
        (example.fields["input"], example.target)
        for example in read_dataset(path, fields=["input"], **options).examples
    ]
