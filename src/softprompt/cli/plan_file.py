"""A plan file: several trainings and their settings, as YAML or JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from softprompt.cli.groups import Learning
from softprompt.cli.options import Loading
from softprompt.cli.task import Sources, task_name
from softprompt.data.columns import Columns
from softprompt.data.encoding import decode
from softprompt.data.wording import first_line, kind, quoted
from softprompt.errors import ConfigError, DataError
from softprompt.files import local_path
from softprompt.soft_prompts import artifact
from softprompt.tuning.config import INITS
from softprompt.tuning.job import of_job, require_known

TOP = ("base", "dtype", "device", "trust_remote_code", "defaults", "jobs")
"""What a plan may say besides its jobs."""
ENDS = (".yaml", ".yml")


@dataclass(frozen=True)
class Wanted:
    """A training that is asked for.

    Attributes:
        name: of the soft prompt; text with ``{file}`` in it stands for the file's own.
        sources, template, learning: what the options of one training say.
    """

    name: str
    sources: Sources
    template: str
    learning: Learning


@dataclass(frozen=True)
class PlanFile:
    """A plan as its file says it.

    Attributes:
        base: the base model; None: the file names none.
        loading: how it is loaded, by name, as far as the file says it.
        jobs: at least one.
    """

    base: str | None
    loading: Mapping[str, Any]
    jobs: tuple[Wanted, ...]

    def loaded_as(self, given: Loading) -> Loading:
        """How the base model is loaded: options of the command line count for more."""
        own = {field.name: getattr(given, field.name) for field in fields(Loading)}
        defaults = {field.name: field.default for field in fields(Loading)}
        return Loading(
            **{key: own[key] if own[key] != defaults[key] else self.loading.get(key, own[key]) for key in own}
        )


def is_plan(source: str) -> bool:
    """Whether a source is a plan rather than data: YAML, or a JSON object with jobs."""
    path = local_path(source)
    if source.lower().endswith(ENDS):
        return True
    if not source.lower().endswith(".json") or not path.is_file():
        return False
    try:
        found = json.loads(decode(path.read_bytes()))
    except (OSError, ValueError):
        return False  # as data, it is told what is wrong
    return isinstance(found, dict) and "jobs" in found


def read_plan(source: str, given: Mapping[str, Any]) -> PlanFile:
    """Reads a plan; paths in it are relative to it.

    Args:
        source: a file of YAML or JSON.
        given: options of the command line by their names in a plan, which count for more than what it says.

    Raises:
        DataError: the file cannot be read.
        ConfigError: it holds something else than a plan; each mistake is a line with its job's name.
    """
    path = local_path(source)
    found = _parsed(path)
    if not isinstance(found, dict):
        raise ConfigError(f"{source}: expected an object with jobs, found {kind(found)}; write jobs: and a list.")
    with _of_file(source):
        require_known(found, list(TOP), "key", "a plan has")
        top = {name: _value(name, found[name], str | None) for name in ("base", "dtype", "device") if name in found}
        if "trust_remote_code" in found:
            top["trust_remote_code"] = _value("trust_remote_code", found["trust_remote_code"], bool)
        defaults = found.get("defaults") or {}
        jobs = found.get("jobs")
        if not isinstance(defaults, dict):
            raise ConfigError(f"expected an object of settings as defaults, found {kind(defaults)}; correct it.")
        if not isinstance(jobs, list) or not jobs:
            raise ConfigError(f"expected a list of at least one job as jobs, found {kind(jobs)}; write one.")
        require_known(defaults, [name for name in _known() if name != "name"], "setting", "defaults may have")
    read, faults = [], []
    for number, job in enumerate(jobs, start=1):
        name = job.get("name", number) if isinstance(job, dict) else number
        try:
            with of_job(name if isinstance(name, str) else str(name)):
                read.append(_job(job, defaults, given, path.parent))
        except ConfigError as error:
            faults.append(f"{source}: {error}")
    if faults:
        raise ConfigError("\n".join(faults))
    base = top.pop("base", None)
    if base is not None and (path.parent / local_path(base)).exists():
        base = _beside(path.parent, base)
    return PlanFile(base, top, tuple(read))


@contextmanager
def _of_file(source: str) -> Iterator[None]:
    """Puts the file's name before what a mistake in it says."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def _parsed(path: Path) -> Any:
    """What the file holds; a key that stands twice is a mistake."""
    try:
        text = decode(path.read_bytes())
    except OSError as error:
        raise DataError(f"The plan {path} cannot be read: {error.strerror or error}; check the path.") from error
    except ValueError as error:
        raise DataError(f"Expected UTF-8 in {path}, found other bytes; save the file as UTF-8.") from error
    try:
        if path.suffix.lower() not in ENDS:
            return json.loads(text, object_pairs_hook=_once)
        import yaml

        loader: Any = type("Loader", (yaml.SafeLoader,), {})  # a copy, which may have a constructor of its own
        loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
        return yaml.load(text, loader)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({first_line(error)}); correct it.") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "yaml":
            raise
        place = getattr(error, "problem_mark", None)
        where = f", line {place.line + 1}" if place is not None else ""
        said = getattr(error, "problem", None) or first_line(error)
        raise ConfigError(f"{path}{where} is not YAML ({said}); correct it.") from error


def _mapping(loader: Any, node: Any) -> dict[Any, Any]:
    return _once(
        [(loader.construct_object(k, deep=True), loader.construct_object(v, deep=True)) for k, v in node.value]
    )


def _once(pairs: Sequence[tuple[Any, ...]]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if not isinstance(key, str):
            raise ConfigError(
                f"expected a name before each colon, found {kind(key)}; write names, in quotes if need be."
            )
        if key in found:
            raise ConfigError(f"the key {key!r} stands twice; remove one of them.")
        found[key] = value
    return found


# --- jobs -----------------------------------------------------------------------------------------


def _known() -> dict[str, Any]:
    """What a job may say: name → type."""
    own = {"name": str, "train": str, "validation": str | None, "template": str, "labels": Any}
    hints = {**get_type_hints(Columns), **get_type_hints(Learning)}
    options = {field.name: hints[field.name] for group in (Columns, Learning) for field in fields(group)}
    return {**own, **options}


def _job(job: Any, defaults: Mapping[str, Any], given: Mapping[str, Any], folder: Path) -> Wanted:
    if not isinstance(job, dict):
        raise ConfigError(f"expected an object with a name and train, found {kind(job)}; correct it.")
    known = _known()
    require_known(job, list(known), "setting", "a job may have")
    values = {name: _value(name, value, known[name]) for name, value in {**defaults, **job}.items()}
    for name in ("train", "validation"):
        if values.get(name) is not None:
            values[name] = _beside(folder, values[name])
    if isinstance(values.get("labels"), str) and values["labels"].lower().endswith((".json", ".txt")):
        values["labels"] = _beside(folder, values["labels"])
    init = values.get("init")
    if init is not None and init not in INITS and (os.sep in init or init.endswith(artifact.SUFFIX)):
        values["init"] = _beside(folder, init)
    values |= given
    if values.get("train") is None:
        raise ConfigError("expected data to train on, found none; give the path of a file as train.")
    columns = {field.name: values[field.name] for field in fields(Columns) if field.name in values}
    learning = {field.name: values[field.name] for field in fields(Learning) if field.name in values}
    return Wanted(
        values.get("name") or task_name(values["train"]),
        Sources(values["train"], values.get("validation"), values.get("labels"), Columns(**columns)),
        values.get("template", "default"),
        replace(Learning(), **learning),
    )


def _beside(folder: Path, path: str) -> str:
    """A path of a plan, which is relative to the plan's folder; an id of the Hub stays as it is."""
    return path if path.startswith("hf:") else str(folder / local_path(path))


def _value(name: str, value: Any, type_: Any) -> Any:
    """A value of the type that a setting has.

    Raises:
        ConfigError: it is of another.
    """
    if type_ is Any:
        return _labels(value)
    kinds = get_args(type_) or (type_,)
    if name == "lengths" and isinstance(value, list) and value and all(type(each) is int for each in value):
        return ",".join(map(str, value))
    if value is None and type(None) in kinds:
        return None
    if isinstance(value, bool):  # in YAML, on and off are truth values
        if bool in kinds:
            return value
        if name in ("compile", "activation_checkpointing"):
            return "on" if value else "off"
    elif (isinstance(value, str) and str in kinds) or (isinstance(value, int) and int in kinds):
        return value
    elif float in kinds and (number := _float(value)) is not None:
        return number
    wanted = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    says = next(wanted[each] for each in kinds if each is not type(None))
    found = kind(value) if not isinstance(value, str | int | float) or isinstance(value, bool) else quoted(str(value))
    quotes = ", in quotes" if str in kinds else ""
    raise ConfigError(f"expected {says} as {name}, found {found}; write {says}{quotes}.")


def _float(value: Any) -> float | None:
    """A number; YAML takes ``1e-3`` for text."""
    convert: Callable[[Any], float] = float
    try:
        return convert(value) if isinstance(value, str | int | float) else None
    except ValueError:
        return None


def _labels(value: Any) -> Any:
    """Labels as text, a list, or label → its word or words."""
    several = value if isinstance(value, list) else [*value, *value.values()] if isinstance(value, dict) else [value]
    flat = [one for each in several for one in (each if isinstance(each, list) and isinstance(value, dict) else [each])]
    if value is None or not all(isinstance(one, str) for one in flat):
        bad = next((one for one in flat if not isinstance(one, str)), None)
        raise ConfigError(
            f"expected labels as text, as a list of texts, or each with its words, found {kind(bad)}; put each of "
            "them in quotes."
        )
    return value
