"""Files of several formats and encodings, and data sets of Hugging Face."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from softprompt.data.reading import read_dataset
from softprompt.errors import ConfigError, SoftPromptWarning
from tests.reading import failure, read_pairs, write

GOOD = '{"input": "a", "target": "x"}\n'

# Files


def test_json_files(tmp_path: Path) -> None:
    rows = [{"input": "a", "target": "x"}, {"target": 1, "input": "b"}]
    wanted = [("a", "x"), ("b", "1")]
    assert read_pairs(write(tmp_path, "a.json", json.dumps(rows, indent=2))) == wanted
    assert read_pairs(write(tmp_path, "b.json", json.dumps({"version": 1, "data": rows}))) == wanted
    assert read_pairs(write(tmp_path, "c.json", "\n".join(map(json.dumps, rows)))) == wanted
    assert read_pairs(write(tmp_path, "d.ndjson", "\n".join(map(json.dumps, rows)))) == wanted
    assert read_dataset(tmp_path / "a.json", fields=["input"]).examples[1].where == "a.json:2"
    assert failure(write(tmp_path, "e.json", json.dumps([*rows, 3]))).startswith("e.json:3: expected a JSON object, ")
    assert '"train", "test"' in failure(write(tmp_path, "f.json", json.dumps({"train": rows, "test": rows})))
    for content, place in (
        ('[{"input": "a",\n "target" 1}]', "g.json:2: "),
        ("[{}, NaN]", "g.json"),
        ('"a"', "g.json"),
    ):
        message = failure(write(tmp_path, "g.json", content))
        assert place in message
        assert "a JSON list of objects" in message
    assert "a list with an object a row" in failure(write(tmp_path, "h.json", '{"input": ["a"], "target": ["x"]}'))


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_compressed_files(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    for name, content in (
        ("a.csv", "input,target\na,x\n"),
        ("a.tsv", "input\ttarget\na\tx\n"),
        ("a.jsonl", GOOD),
        ("a.json", f"[{GOOD}]"),
    ):
        assert read_pairs(write(tmp_path, name + suffix, compress(content.encode()))) == [("a", "x")]
        assert read_pairs(write(tmp_path, name, compress(content.encode()))) == [("a", "x")]  # named otherwise
        assert read_pairs(write(tmp_path, name + suffix, content)) == [("a", "x")]  # a browser has unpacked it
    half = compress(GOOD.encode() * 99)[:-20]
    assert "a.jsonl" in failure(write(tmp_path, "a.jsonl" + suffix, half))
    assert "cut off" in failure(tmp_path / f"a.jsonl{suffix}")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_names_the_encoding(tmp_path: Path, encoding: str) -> None:
    for line_end in ("\n", "\r\n", "\r"):
        content = line_end.join(["input,target", "ä,x", "b,y", ""]).encode(encoding)
        assert read_pairs(write(tmp_path, "a.csv", content)) == [("ä", "x"), ("b", "y")]
        assert read_pairs(tmp_path / "a.csv", encoding="latin-1") == [("ä", "x"), ("b", "y")]
        content = line_end.join(["input\ttarget", "ä\tx", "b\ty"]).encode(encoding)
        assert read_pairs(write(tmp_path, "a.tsv", content)) == [("ä", "x"), ("b", "y")]
        lines = [json.dumps({"input": a, "target": b}, ensure_ascii=False) for a, b in (("ä", "x"), ("b", "y"))]
        assert read_pairs(write(tmp_path, "a.jsonl", line_end.join(lines).encode(encoding))) == [("ä", "x"), ("b", "y")]


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "gb18030", "utf-16-le", "UTF8"])
def test_an_encoding_is_chosen_by_name(tmp_path: Path, encoding: str) -> None:
    path = write(tmp_path, "a.csv", "input,target\nüß,é\n".encode(encoding))
    assert read_pairs(path, encoding=encoding) == [("üß", "é")]
    if encoding.startswith("utf-16"):
        assert f"--encoding, for instance {encoding}," in failure(path)
        ascii_only = write(tmp_path, "b.csv", "input,target\na,b\n".encode(encoding))
        assert f"--encoding, for instance {encoding}," in failure(ascii_only)


def test_an_encoding_that_cannot_be_right_is_told(tmp_path: Path) -> None:
    for name in ("klingon", "rot13", "base64"):
        with pytest.raises(ConfigError, match="--encoding must be an encoding of text"):
            read_dataset(write(tmp_path, "a.csv", "input,target\na,x\n"), fields=["input"], encoding=name)
    with pytest.warns(SoftPromptWarning, match="cp1252"):
        read_pairs(write(tmp_path, "a.csv", "input,target\n“a”,x\n".encode("cp1252")), encoding="latin-1")
    with pytest.warns(SoftPromptWarning, match="is valid UTF-8"):
        read_pairs(write(tmp_path, "a.csv", "input,target\nä,x\n"), encoding="cp1252")
    assert "a.csv:2: expected ascii" in failure(tmp_path / "a.csv", encoding="ascii")


# Hugging Face data sets


@pytest.fixture
def labelled() -> datasets.Dataset:
    features = datasets.Features(input=datasets.Value("string"), target=datasets.ClassLabel(names=["neg", "pos"]))
    return datasets.Dataset.from_dict({"input": ["a", "b", "c"], "target": [1, 0, 1]}, features=features)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_saved_datasets_are_read_with_label_names(tmp_path: Path, labelled: datasets.Dataset) -> None:
    datasets.DatasetDict(train=labelled, test=labelled.select([1])).save_to_disk(tmp_path / "both")
    labelled.save_to_disk(tmp_path / "one")
    whole = [("a", "pos"), ("b", "neg"), ("c", "pos")]
    assert read_pairs(f"hf:{tmp_path}/both") == whole
    assert read_pairs(f"hf:{tmp_path}/both:test") == [("b", "neg")]
    dataset = read_dataset(f"hf:{tmp_path}/one", fields=["input"])
    assert [(e.fields["input"], e.target) for e in dataset.examples] == whole
    assert dataset.examples[2].where == f"hf:{tmp_path}/one:train:3"
    assert dataset.source == f"hf:{tmp_path}/one"


@pytest.mark.parametrize("name", ["both", "both/train", "one"])
@pytest.mark.parametrize(
    ("split", "rows"),
    [
        ("train[:50%]", "ab"),
        ("train[50%:]", "cd"),
        ("train[1:3]", "bc"),
        ("train[-1:]+train[:1]", "da"),
        ("train", "abcd"),
    ],
)
def test_splits_of_a_saved_dataset_are_those_of_a_loaded_one(
    tmp_path: Path, cache: None, name: str, split: str, rows: str
) -> None:
    data = datasets.Dataset.from_dict({"input": list("abcd"), "target": list("xyxy")})
    datasets.DatasetDict(train=data, test=data.select([1])).save_to_disk(tmp_path / "both")
    data.save_to_disk(tmp_path / "one")
    data.to_parquet(tmp_path / "files" / "train.parquet")
    expected = rows.replace("*", "abcd")
    assert "".join(text for text, _ in read_pairs(f"hf:{tmp_path}/{name}:{split}")) == expected
    assert "".join(text for text, _ in read_pairs(f"hf:{tmp_path}/files:{split}")) == expected


def test_a_split_that_a_saved_dataset_has_not(tmp_path: Path, labelled: datasets.Dataset) -> None:
    labelled.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=labelled, dev=labelled.select([0])).save_to_disk(tmp_path / "both")
    split = datasets.Dataset.from_dict({"input": ["a"], "target": ["x"]}, split="test")
    split.save_to_disk(tmp_path / "tested")
    for source, wanted in (("one", "test"), ("one", "trian[:50%]"), ("both", "tset"), ("both", "train+tset")):
        message = failure(f"hf:{tmp_path}/{source}:{wanted}")
        assert f'no split "{wanted}" but "train"' in message
    assert read_pairs(f"hf:{tmp_path}/both:train+dev") == [("a", "pos"), ("b", "neg"), ("c", "pos"), ("a", "pos")]
    assert read_pairs(f"hf:{tmp_path}/tested") == read_pairs(f"hf:{tmp_path}/tested:test") == [("a", "x")]
    assert 'no split "train" but "test"' in failure(f"hf:{tmp_path}/tested:train")
    assert "train[:x]" in failure(f"hf:{tmp_path}/one:train[:x]")
    assert failure(f"hf:{tmp_path}/one:train[3:]").startswith("Expected rows of data in hf:")


@pytest.mark.usefixtures("cache")
def test_a_folder_of_data_files_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder, "train.jsonl", "".join(f'{{"input": "{n}", "target": "x"}}\n' for n in "abc"))
    write(folder, "test.jsonl", '{"input": "d", "target": "y"}\n')
    assert read_pairs(f"hf:{folder}") == [("a", "x"), ("b", "x"), ("c", "x")]
    assert read_pairs(f"hf:{folder}:train[:2]") == [("a", "x"), ("b", "x")]
    assert read_pairs(f"hf:{folder}:test") == [("d", "y")]


@pytest.mark.usefixtures("cache")
def test_a_folder_that_is_not_there_is_no_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "films"
    folder.mkdir(parents=True)
    write(folder, "train.jsonl", GOOD)
    write(tmp_path, "train.jsonl", GOOD)
    assert read_pairs("hf:data/films") == read_pairs("hf:./data/films") == [("a", "x")]
    for source in (
        "hf:data/film",
        "hf:./data/film",
        "hf:./film",
        "hf:data/films/dev",
        f"hf:{tmp_path}/data/film:train",
    ):
        assert ", found: no folder " in failure(source)
    write(folder, "README.md", "---\nconfigs:\n- config_name: short\n  data_files: train.jsonl\n---\n")
    assert read_pairs("hf:./data/films/short") == [("a", "x")]
    assert 'configuration "long"' in failure("hf:./data/films/long")


def test_an_unlabelled_row_is_named(tmp_path: Path) -> None:
    features = datasets.Features(input=datasets.Value("string"), target=datasets.ClassLabel(names=["neg", "pos"]))
    datasets.Dataset.from_dict({"input": ["a", "b"], "target": [1, -1]}, features=features).save_to_disk(tmp_path / "d")
    assert failure(f"hf:{tmp_path}/d") == (
        f'hf:{tmp_path}/d:train:2: expected text in the column "target", found null; correct or remove this row.'
    )


def test_ids_configurations_and_splits_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, labelled: datasets.Dataset
) -> None:
    calls: list[tuple[Any, ...]] = []

    def load_dataset(*arguments: str, split: str) -> datasets.Dataset:
        calls.append((*arguments, split))
        if arguments[0] in ("glue/sst2", "no/such"):
            raise datasets.exceptions.DatasetNotFoundError("Dataset doesn't exist on the Hub.\nMore lines")
        if arguments[0] == "no":
            raise ValueError("Couldn't find it.")
        if arguments[0] == "far/away" or arguments == ("far", "away"):
            raise ConnectionError(f"Couldn't reach {arguments[0]!r} on the Hub (OfflineModeIsEnabled)")
        if arguments[0] == "cached/set":  # so it is without a network, where nobody can tell whether there is one
            raise ConnectionError("Couldn't reach 'cached/set' on the Hub (OfflineModeIsEnabled)")
        return labelled

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source in ["hf:imdb", "hf:imdb:test", "hf:o/n", "hf:o/n/c:validation", "hf:glue/sst2:train[:10%]"]:
        assert len(read_pairs(source)) == 3
    assert calls == [
        ("imdb", "train"),
        ("imdb", "test"),
        ("o/n", "train"),
        ("o/n", "c", "validation"),
        ("glue/sst2", "train[:10%]"),
        ("glue", "sst2", "train[:10%]"),
    ]
    calls.clear()
    assert len(read_pairs("hf:cached/set:train[:50%]+test")) == 3
    assert calls == [("cached/set", "train[:50%]+test"), ("cached", "set", "train[:50%]+test")]
    both = failure("hf:no/such")
    assert both.startswith("Expected a data set that datasets can load at hf:no/such, found: neither ")
    assert "(Dataset doesn't exist on the Hub; Couldn't find it); check its name, configuration and split" in both
    both = failure("hf:far/away")
    assert "Couldn't reach 'far/away' on the Hub (OfflineModeIsEnabled); Couldn't reach 'far' on the Hub" in both
    for source in ("hf:", "hf:imdb:train[:10%", "hf:imdb:"):
        message = failure(source)
        assert message.startswith(f"Expected hf:DATASET[/CONFIG][:SPLIT], found {source}; ")


def test_an_unknown_split_is_named(tmp_path: Path, labelled: datasets.Dataset) -> None:
    datasets.DatasetDict(train=labelled, test=labelled).save_to_disk(tmp_path / "d")
    source = f"hf:{tmp_path}/d:dev"
    assert failure(source) == (
        f'Expected a data set that datasets can load at {source}, found: no split "dev" but "train", "test"; '
        "check its name, configuration and split."
    )


@pytest.mark.parametrize(
    ("source", "library", "purpose"),
    [("hf:imdb", "datasets", "a Hugging Face data set"), ("a.parquet", "pyarrow", "a Parquet file")],
)
def test_a_missing_library_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, library: str, purpose: str
) -> None:
    monkeypatch.chdir(write(tmp_path, "a.parquet", "").parent)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError) as caught:
        read_dataset(source, fields=["input"])
    assert str(caught.value) == (
        f'Reading {purpose} needs the library {library}, which is not installed; pip install "softprompt[data]".'
    )
