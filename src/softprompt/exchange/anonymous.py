"""A soft prompt without the folders of the machine that it was made on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from softprompt.exchange.card import hub_id
from softprompt.files import local_path
from softprompt.soft_prompts.soft_prompt import SoftPrompt

_SOMEWHERE = "path/to/"
_HELD_OUT = "held out of "
_HUB = "hf:"
_FOLDERS = re.compile(r"(?:~|\.{0,2}|[A-Za-z]:)[\\/]\S")
"""How a path begins that names a folder of a machine."""


def without_folders(soft_prompt: SoftPrompt) -> SoftPrompt:
    """The soft prompt as others may see it: of every file of this machine only its name is left.

    Answers do not depend on what goes. A reader knows the base model by its fingerprint and the data by theirs. The id
    of a base model that is a file or folder becomes ``path/to/NAME``, which is no id of the Hub either.

    Args:
        soft_prompt: as it was made.
    """
    base = soft_prompt.base
    if hub_id(base) is None and (re.search(r"[\\/]", base) or local_path(base).exists()):
        base = f"{_SOMEWHERE}{_name(base)}"
    return replace(soft_prompt, base=base, data=_plain(soft_prompt.data, ""), training=_plain(soft_prompt.training, ""))


def is_somewhere(base: str) -> bool:
    """Whether the id of a base model is what :func:`without_folders` leaves of a place on another machine."""
    return base.startswith(_SOMEWHERE) and not local_path(base).exists()


def _plain(value: Any, key: str) -> Any:
    """JSON values with names in the place of paths; texts to learn from are no paths."""
    if isinstance(value, Mapping):
        return {name: _plain(inner, str(name)) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, key) for inner in value]
    if not isinstance(value, str) or "text" in key:
        return value
    if key == "source":
        return _source(value)
    return _name(value) if _FOLDERS.match(value) else value


def _source(source: str) -> str:
    """Where data came from: a file's name, or a data set of the Hub as it is."""
    if source.startswith(_HELD_OUT):
        return _HELD_OUT + _source(source.removeprefix(_HELD_OUT))
    if source.startswith(_HUB):
        place = source.removeprefix(_HUB)
        return _HUB + _name(place) if _FOLDERS.match(place) else source
    return _name(source)


def _name(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]
