"""From a source to a table: files of several formats, data sets of Hugging Face, and rows that are in memory."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from softprompt.data.delimited import read_delimited
from softprompt.data.encoding import text_of
from softprompt.data.wording import first_line, kind, listed, quoted
from softprompt.errors import ConfigError, DataError, missing_library
from softprompt.files import StrPath, local_path

COMPRESSED = (".gz", ".bz2", ".xz")

SAVED_SPLITS, SAVED_ROWS = "dataset_dict.json", "state.json"
"""The file that ``save_to_disk`` of datasets writes beside several splits, and beside one."""

Source: TypeAlias = StrPath | Sequence[Mapping[str, Any]] | Any
"""Where rows come from: a path, ``hf:DATASET[/CONFIG][:SPLIT]``, a list of dicts, or a table of pandas, ``datasets``,
polars or Arrow, whose types are not named here, since none of these libraries must be installed."""


@dataclass(frozen=True)
class Table:
    """The rows of a source before they are checked.

    Attributes:
        name: how a row's place starts, such as ``train.jsonl``.
        columns: the names in order of appearance; of JSON, those of any row.
        rows: line or row number → the cells by column, or what is wrong with the row.
    """

    name: str
    columns: tuple[str, ...]
    rows: tuple[tuple[int, Mapping[str, Any] | str], ...]


def read_table(source: Source, encoding: str | None = None) -> Table:
    """The table of a file, of a Hugging Face data set or of rows in memory, see
    ``softprompt.data.reading.read_dataset``.

    Raises:
        ConfigError: a library for this source is not installed, or there is no such encoding.
        DataError: the source cannot be read.
    """
    if not isinstance(source, str | os.PathLike):
        return _read_memory(source)
    name = os.fspath(source)
    if name.startswith("hf:"):
        return _read_hub(name)
    return _read_hub(f"hf:{name}") if _is_saved(name) else _read_file(local_path(name), encoding)


def _is_saved(name: str) -> bool:
    """Whether a path, with a split behind it or none, is that of a folder that ``save_to_disk`` wrote."""
    paths = [local_path(name), *([local_path(name.partition(":")[0])] if ":" in name else [])]
    return any((path / file).is_file() for path in paths for file in (SAVED_SPLITS, SAVED_ROWS))


# Files


def _read_file(path: Path, encoding: str | None) -> Table:
    of_text: dict[str, Callable[[str, str], Table]] = {
        ".jsonl": _read_json_lines,
        ".ndjson": _read_json_lines,
        ".json": _read_json,
        ".csv": lambda text, name: Table(name, *read_delimited(text, name, ",")),
        ".tsv": lambda text, name: Table(name, *read_delimited(text, name, "\t")),
    }
    if not path.exists():
        raise DataError(f"Expected a data file at {path}, found nothing; check the path, or write hf: before a Hub id.")
    if path.is_dir():
        raise DataError(f"Expected a data file at {path}, found a folder; name one of its files, or write hf:{path}.")
    suffix = path.suffix.lower()
    if suffix in COMPRESSED:
        suffix = Path(path.stem).suffix.lower()
    elif suffix == ".parquet":
        return _read_parquet(path)
    if suffix not in of_text:
        raise DataError(
            f"Expected a data file that ends with {', '.join(of_text)} or .parquet, found {path}; "
            f"convert or rename the file."
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    text = text_of(data, path.name, encoding)
    if not text.strip():
        raise DataError(f"Expected rows of data in {path.name}, found an empty file; check the file.")
    return of_text[suffix](text, path.name)


def _unreadable(path: Path, error: OSError) -> DataError:
    reason = error.strerror or first_line(error)
    return DataError(f"Expected a readable data file at {path}, found: {reason}; check it.")


def _read_json_lines(text: str, name: str) -> Table:
    rows: list[tuple[int, Mapping[str, Any] | str]] = []
    # Not splitlines(): a JSON string may hold U+2028 and its like, which are no line ends to an editor or to JSON Lines
    for number, line in enumerate(text.split("\n" if "\n" in text else "\r"), start=1):
        if not line.strip():
            continue
        try:
            row = _parsed(line)
        except json.JSONDecodeError as error:
            row = f"expected a JSON object, found an error at column {error.colno} ({error.msg})"
        except (ValueError, RecursionError) as error:
            row = f"expected a JSON object, found an error ({error})"
        else:
            row = row if isinstance(row, dict) else f"expected a JSON object, found {kind(row)}"
        rows.append((number, row))
    return _json_table(name, rows)


def _read_json(text: str, name: str) -> Table:
    """A list of objects, an object with one such list in it, or JSON Lines by another suffix."""
    try:
        document = _parsed(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            return _read_json_lines(text, name)
        raise DataError(
            f"{name}:{error.lineno}: expected a JSON list of objects, found an error at column {error.colno} "
            f"({error.msg}); correct the file."
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"Expected a JSON list of objects in {name}, found an error ({error}); correct it.") from None
    if isinstance(document, dict):
        lists = [key for key, value in document.items() if _holds_objects(value)]
        if len(lists) > 1:
            raise DataError(
                f"Expected one list of objects in {name}, found several: {listed(lists)}; "
                f"write each to a file of its own."
            )
        document = document[lists[0]] if lists else document
    if not isinstance(document, list):
        raise DataError(
            f"Expected a JSON list of objects in {name}, found {kind(document)} without one; "
            f"write a list with an object a row, or JSON Lines."
        )
    rows: list[tuple[int, Mapping[str, Any] | str]] = [
        (number, row if isinstance(row, dict) else f"expected a JSON object, found {kind(row)}")
        for number, row in enumerate(document, start=1)
    ]
    return _json_table(name, rows)


def _holds_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _parsed(text: str) -> Any:
    """What JSON holds.

    Raises:
        ValueError: an error in it, NaN, which is not JSON, or a number of thousands of digits.
        RecursionError: a thousand nested lists.
    """

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    return json.loads(text, parse_constant=no_constant)


def _json_table(name: str, rows: Sequence[tuple[int, Mapping[str, Any] | str]]) -> Table:
    columns = dict.fromkeys(column for _, row in rows if not isinstance(row, str) for column in row)
    return Table(name, tuple(columns), tuple(rows))


def _read_parquet(path: Path) -> Table:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise _needs_library("pyarrow", "a Parquet file") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            table = file.read()
    except pyarrow.ArrowException as error:
        raise DataError(f"Expected a Parquet file at {path}, found: {first_line(error)}; check the file.") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    try:  # Parquet files of the Hub keep the names of ClassLabel columns beside Arrow's schema
        features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
        labels = {column: feature["names"] for column, feature in features.items() if "names" in feature}
    except (AttributeError, KeyError, TypeError, ValueError):
        labels = {}
    return _arrow_table(path.name, table.to_pylist(), table.column_names, labels)


def _arrow_table(
    name: str, rows: Sequence[dict[str, Any]], columns: Sequence[str], labels: Mapping[str, Sequence[str]]
) -> Table:
    """The table with the names instead of the numbers of ``ClassLabel`` columns; -1 stands for no label there."""
    for column, names in labels.items():
        for row in rows:
            number = row[column]
            row[column] = names[number] if isinstance(number, int) and 0 <= number < len(names) else None
    return Table(name, tuple(columns), tuple(enumerate(rows, start=1)))


# Data sets of Hugging Face


def _read_hub(source: str) -> Table:
    name, split = _name_and_split(source)
    try:
        import datasets
    except ImportError as error:
        raise _needs_library("datasets", "a Hugging Face data set") from error
    try:
        rows, split = _loaded(datasets, name, split)
    except Exception as error:  # the library raises errors of many kinds, its own and those of what it calls
        raise DataError(
            f"Expected a data set that datasets can load at {source}, found: {first_line(error)}; "
            f"check its name, configuration and split."
        ) from error
    return _hub_table(f"hf:{name}:{split}", rows)


def _hub_table(name: str, rows: Any) -> Table:
    """The table of a ``datasets.Dataset``."""
    import datasets

    labels = {
        column: feature.names for column, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)
    }
    return _arrow_table(name, rows.to_list(), rows.column_names, labels)


def _name_and_split(source: str) -> tuple[str, str | None]:
    """``hf:NAME[:SPLIT]`` in its parts; the split may be an expression of datasets: ``train[:100]+test[50%:]``."""
    rest = source.removeprefix("hf:")
    path = str(local_path(rest)) if rest.startswith("~") else rest
    if path and Path(path).exists():
        return path, None
    match = re.fullmatch(r"(?P<name>[^\[\]]*?[^\[\]:])(?::(?P<split>(?:[^:/\\\[\]]|\[[^\[\]/\\]*\])+))?", path)
    if match is None:
        raise DataError(f"Expected hf:DATASET[/CONFIG][:SPLIT], found {source}; name a data set, and a split after it.")
    return match["name"], match["split"]


def _loaded(datasets: Any, name: str, split: str | None) -> tuple[Any, str]:
    """A ``datasets.Dataset`` and the split it is; of ``a/b``, ``a/b`` is tried as a data set before ``b`` as a
    configuration of ``a``."""
    folder = Path(name)
    if (folder / SAVED_SPLITS).is_file():  # written by save_to_disk, which load_dataset does not take
        return _cut(datasets, dict(datasets.load_from_disk(name)), split or "train")
    if (folder / SAVED_ROWS).is_file():
        rows = datasets.load_from_disk(name)
        own = str(rows.split or "train")
        if split is None or split == own:
            return rows, own
        return _cut(datasets, {own: rows}, split)
    split = split or "train"
    dataset, _, config = name.rpartition("/")
    if folder.exists() or not dataset:
        return datasets.load_dataset(name, split=split), split
    if name.startswith((".", "/")) or Path(dataset).is_dir():  # a path
        # a folder's configurations are in its README.md; without one, datasets takes any name for the only one
        described = (Path(dataset) / "README.md").is_file()
        if not described or config not in datasets.get_dataset_config_names(dataset):
            raise ValueError(f"no folder {quoted(name)}, nor a configuration {quoted(config)} in {quoted(dataset)}")
        return datasets.load_dataset(dataset, config, split=split), split
    if "/" in dataset:
        return datasets.load_dataset(dataset, config, split=split), split
    try:
        return datasets.load_dataset(name, split=split), split
    except (FileNotFoundError, ConnectionError) as error:  # there is no such data set, or it is not in the cache
        try:
            return datasets.load_dataset(dataset, config, split=split), split
        except Exception as second:
            reasons = dict.fromkeys((first_line(error), first_line(second)))
            raise ValueError(
                f"neither {quoted(name)} nor {quoted(config)} of {quoted(dataset)} ({'; '.join(reasons)})"
            ) from second


def _cut(datasets: Any, splits: Mapping[str, Any], wanted: str) -> tuple[Any, str]:
    """The rows that an expression such as ``train[:50%]+test`` names, as ``load_dataset`` would give them."""
    if wanted in splits:
        return splits[wanted], wanted
    sizes = {name: len(rows) for name, rows in splits.items()}
    try:
        parts = datasets.ReadInstruction.from_spec(wanted).to_absolute(sizes)
    except ValueError as error:
        if re.sub(r"\[.*", "", wanted) in splits:
            raise
        raise ValueError(f"no split {quoted(wanted)} but {listed(tuple(splits))}") from error
    chosen = [
        splits[part.splitname].select(range(part.from_, part.to) if part.from_ < part.to else ()) for part in parts
    ]
    return datasets.concatenate_datasets(chosen), wanted


# Rows in memory

ROWS = "rows"
"""How the place of a row in memory starts: ``rows:3`` is the third."""


def _read_memory(source: Any) -> Table:
    if _is_of(source, "pandas", "DataFrame"):
        return _read_pandas(source)
    if _is_of(source, "datasets", "Dataset"):
        return _hub_table(ROWS, source)
    if _is_of(source, "pyarrow", "Table"):
        return _arrow_table(ROWS, source.to_pylist(), source.column_names, {})
    if _is_of(source, "polars", "DataFrame"):
        return _json_table(ROWS, tuple(enumerate(source.to_dicts(), start=1)))
    if isinstance(source, Sequence) and not isinstance(source, bytes):
        rows = ((dict(row) if isinstance(row, Mapping) else f"expected a dict, found {kind(row)}") for row in source)
        return _json_table(ROWS, [(number, _plain(row)) for number, row in enumerate(rows, start=1)])
    if isinstance(source, Mapping) and source and all(_is_of(part, "datasets", "Dataset") for part in source.values()):
        raise DataError(
            f"Expected one data set, found a dict of the splits {listed(tuple(source))}; "
            f"choose one of them by its name."
        )
    raise DataError(
        f"Expected data as a path, hf:DATASET, a list of dicts, or a table of pandas, datasets, polars or Arrow, found "
        f"{kind(source)}; make a list of dicts of it."
    )


def _is_of(value: Any, library: str, name: str) -> bool:
    """Whether a value is of a library's class, without importing the library: else nobody could have made it."""
    found = getattr(sys.modules.get(library), name, None)
    return isinstance(found, type) and isinstance(value, found)


def _read_pandas(frame: Any) -> Table:
    columns = [str(column) for column in frame.columns]
    twice = next((column for number, column in enumerate(columns) if column in columns[:number]), None)
    if twice is not None:
        raise DataError(f"Expected columns of different names in the table, found {quoted(twice)} twice; rename one.")
    values = frame.astype(object).where(frame.notna(), None).itertuples(index=False, name=None)
    rows = [(number, _plain(dict(zip(columns, row, strict=True)))) for number, row in enumerate(values, start=1)]
    return Table(ROWS, tuple(columns), tuple(rows))


def _plain(row: dict[str, Any] | str) -> dict[str, Any] | str:
    """The row with Python's own values in the place of numpy's."""
    if isinstance(row, str):
        return row
    return {str(key): cell.tolist() if _is_numpy(cell) else cell for key, cell in row.items()}


def _is_numpy(cell: Any) -> bool:
    return _is_of(cell, "numpy", "generic") or _is_of(cell, "numpy", "ndarray")


def _needs_library(library: str, purpose: str) -> ConfigError:
    return missing_library(f"Reading {purpose}", library, "softprompt[data]")
