"""Rows that are in memory give the same examples as a file of them."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pyarrow
import pytest

from softprompt.data.reading import read_dataset
from softprompt.errors import DataError
from tests.reading import write

ROWS = [{"input": "a fine film", "target": "good"}, {"input": "a mess", "target": "bad"}]


@pytest.mark.parametrize(
    "make",
    [list, tuple, pandas.DataFrame, datasets.Dataset.from_list, pyarrow.Table.from_pylist],
    ids=["list", "tuple", "pandas", "datasets", "arrow"],
)
def test_they_are_read_as_a_file_is(make: Callable[[Any], Any], tmp_path: Path) -> None:
    lines = '{"input": "a fine film", "target": "good"}\n{"input": "a mess", "target": "bad"}\n'
    wanted = read_dataset(write(tmp_path, "rows.jsonl", lines), fields=["input"])
    found = read_dataset(make(ROWS), fields=["input"])
    assert [(one.fields, one.target) for one in found.examples] == [(one.fields, one.target) for one in wanted.examples]
    assert found.fingerprint == wanted.fingerprint
    assert found.columns == wanted.columns
    assert [one.where for one in found.examples] == ["rows:1", "rows:2"]


def test_numbers_of_numpy_and_dates_become_text() -> None:
    day = datetime.date(2024, 2, 29)
    rows = [{"input": np.float64(1.5), "target": np.int64(3)}, {"input": day, "target": np.bool_(True)}]
    examples = read_dataset(rows, fields=["input"]).examples
    assert [(one.fields["input"], one.target) for one in examples] == [("1.5", "3"), ("2024-02-29", "true")]
    frame = pandas.DataFrame({"input": pandas.to_datetime(["2024-02-29"]), "target": [3]})
    [example] = read_dataset(frame, fields=["input"]).examples
    assert (example.fields["input"], example.target) == ("2024-02-29T00:00:00", "3")


def test_names_of_labels_are_kept() -> None:
    features = datasets.Features(
        {"input": datasets.Value("string"), "target": datasets.ClassLabel(names=["no", "yes"])}
    )
    rows = datasets.Dataset.from_dict({"input": ["a", "b"], "target": [1, 0]}, features=features)
    assert [one.target for one in read_dataset(rows, fields=["input"]).examples] == ["yes", "no"]


def test_lists_of_references_are_read_from_a_table() -> None:
    frame = pandas.DataFrame({"input": ["a"], "target": ["x"], "references": [np.array(["x", "y"], dtype=object)]})
    assert read_dataset(frame, fields=["input"]).examples[0].references == ("x", "y")


@pytest.mark.parametrize("missing", [None, np.nan, pandas.NA, pandas.NaT])
def test_an_empty_cell_of_a_table_is_named(missing: Any) -> None:
    frame = pandas.DataFrame({"input": ["a", missing], "target": ["x", "y"]})
    with pytest.raises(DataError, match=r"^rows:2: .*\"input\", found null"):
        read_dataset(frame, fields=["input"])


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (["a text"], "rows:1: expected a dict"),
        ([], "found none"),
        ({"input": ["a"], "target": ["b"]}, "a list of dicts"),
        (iter(ROWS), "a list of dicts"),
        (datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}), '"train"'),
        (datasets.Dataset.from_list(ROWS).to_iterable_dataset(), "a list of dicts"),
        (pandas.DataFrame([["a", "b"]], columns=["input", "input"]), '"input" twice'),
        ([{"text": "a", "target": "b"}], 'found "text", "target"'),
        (b"input,target", "a list of dicts"),
    ],
)
def test_what_holds_no_rows_is_refused(source: Any, said: str) -> None:
    with pytest.raises(DataError) as error:
        read_dataset(source, fields=["input"])
    assert said in str(error.value)


# Images


@pytest.mark.parametrize("form", ["bytes", "pil", "list"])
@pytest.mark.parametrize("column", ["input", "picture"])
def test_images_are_refused(form: str, column: str) -> None:
    """Also beside the text: without them, its rows may make no sense."""
    image: Any = {"bytes": b"\x89PNG", "path": None}
    if form == "pil":
        image = pytest.importorskip("PIL.Image").new("RGB", (2, 2))
    cell = [image] if form == "list" else image
    rows = [{"input": "what is this?", "target": "a cat"}, {"input": "and this?", "target": "a dog", column: cell}]
    with pytest.raises(DataError, match=f'rows:2: .*an image in the column "{column}".*remove the column'):
        read_dataset(rows, fields=["input"])


@pytest.mark.parametrize("kind", ["image", "image_url", "video"])
def test_images_in_messages_are_refused(kind: str) -> None:
    parts = [{"type": "text", "text": "what is this?"}, {"type": kind}]
    rows = [{"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "a cat"}]}]
    with pytest.raises(DataError, match=f'message 1, found a part of type "{kind}" .*images are not read'):
        read_dataset(rows, fields=None, format="messages")


def test_a_path_that_is_called_image_is_text() -> None:
    rows = [{"input": "a", "target": "b", "image": "a.png", "file": {"path": "x", "size": 3}}]
    assert len(read_dataset(rows, fields=["input"]).examples) == 1
