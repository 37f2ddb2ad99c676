"""Words of the sentences about data: names in quotes, lists that stay short, kinds of values."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any


def quoted(text: str) -> str:
    """The text in double quotes on one line, shortened to 60 characters."""
    return json.dumps(text if len(text) <= 60 else text[:59] + "…", ensure_ascii=False)


def listed(names: Sequence[str]) -> str:
    """The names in quotes, the first 10 of them."""
    if not names:
        return "none"
    rest = f", … ({len(names)} in all)" if len(names) > 10 else ""
    return ", ".join(map(quoted, names[:10])) + rest


def counted(number: int, one: str, several: str = "") -> str:
    """``1 row``, ``1,200 rows``."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def and_more(bad: Sequence[object]) -> str:
    """What follows "this row" where several are bad."""
    more = len(bad) - 1
    return "" if more == 0 else f" and {counted(more, 'more bad row')}"


def kind(value: Any) -> str:
    """What a cell holds, in words."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, str):
        return "text" if value.strip() else "only blanks" if value else "nothing"
    if isinstance(value, bool):
        return "a boolean"
    if is_image(value):
        return "an image"
    kinds = {type(None): "null", dict: "an object", list: "a list", int: "a number", float: "a number"}
    return kinds.get(type(value), f"a value of type {type(value).__name__}")


def is_image(value: Any) -> bool:
    """Whether a cell holds an image: one of PIL, or as ``datasets`` writes it, bytes with a path."""
    if isinstance(value, dict):
        return set(value) == {"bytes", "path"} and isinstance(value["bytes"] or value["path"], bytes | str)
    return any(kind.__module__.startswith("PIL.") for kind in type(value).__mro__)


def first_line(error: BaseException) -> str:
    """The first line of what an error of another library says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
