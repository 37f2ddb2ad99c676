"""The demo's data, and the whole of it on a tiny model."""

from __future__ import annotations

import bz2
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softprompt.cli.demo import SENTENCES, Review, read_reviews, split_by_film
from softprompt.cli.main import main
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from tests.conftest import make_model, make_tokenizer

CSV = """category,filename,text,movie_name
plot,a.html,"A man walks, and walks.",walking
fresh,b.html," A stirring, funny film ",walking
rotten,c.html,"Two lines
of boredom",running
rotten,d.html,A stirring,running
fresh,e.html,A stirring,walking
fresh,f.html,"  ",walking
"""


def test_reviews_are_read_once_and_without_plots(tmp_path: Path) -> None:
    path = tmp_path / "reviews.csv.bz2"
    path.write_bytes(bz2.compress(CSV.encode()))
    assert read_reviews(path) == [
        Review("A stirring, funny film", "fresh", "walking"),
        Review("Two lines\nof boredom", "rotten", "running"),
        Review("A stirring", "fresh", "walking"),
    ]


def reviews(films: int, fresh: int, rotten: int) -> list[Review]:
    verdicts = ["fresh"] * fresh + ["rotten"] * rotten
    return [
        Review(f"{verdict} {film} {i}", verdict, f"{film}")
        for film in range(films)
        for i, verdict in enumerate(verdicts)
    ]


@given(st.integers(20, 40), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32))
def test_no_film_is_in_two_parts(films: int, fresh: int, rotten: int, seed: int) -> None:
    every = reviews(films, fresh, rotten)
    parts = split_by_film(every, seed=seed, test=10, validation=6)
    assert parts == split_by_film(every, seed=seed, test=10, validation=6)
    of_part = {name: {review.film for review in part} for name, part in parts.items()}
    assert not of_part["train"] & of_part["test"]
    assert not of_part["train"] & of_part["validation"]
    assert not of_part["test"] & of_part["validation"]
    for name, rows in (("test", 10), ("validation", 6)):
        assert Counter(review.verdict for review in parts[name]) == {"fresh": rows // 2, "rotten": rows // 2}
    assert sorted(parts["train"], key=str) == sorted((r for r in every if r.film in of_part["train"]), key=str)


def test_the_seed_decides_the_parts() -> None:
    every = reviews(30, 3, 3)
    assert split_by_film(every, seed=0, test=10, validation=6) != split_by_film(every, seed=1, test=10, validation=6)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store, a tiny base model in place of the real one, and made-up reviews in place of the real ones."""
    monkeypatch.setenv("SOFTPROMPT_HOME", str(tmp_path / "home"))
    make_model("llama").save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    monkeypatch.setattr("softprompt.cli.demo.DEFAULT_BASE", str(tmp_path / "base"))
    rows = [f"{r.verdict},x.html,{r.text},{r.film}" for r in reviews(60, 10, 10)]
    path = tmp_path / "reviews.csv.bz2"
    path.write_bytes(bz2.compress("\n".join(["category,filename,text,movie_name", *rows]).encode()))
    monkeypatch.setattr("softprompt.cli.demo.ROTTEN_TOMATOES", SimpleNamespace(path=lambda: path))
    return tmp_path / "home"


def test_the_whole_demo(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["demo", "--steps", "3", "--dtype", "fp32", "--out", str(tmp_path / "out")]
    assert main([*options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    path = home / "demo.safetensors"
    assert (found["path"], found["bytes"]) == (str(path), path.stat().st_size)
    assert found["base_unchanged"] is True
    assert found["base_digest_before"] == found["base_digest_after"]
    assert (found["zero_shot"]["n"], found["tuned"]["n"]) == (500, 500)
    assert [answer["input"] for answer in found["answers"]] == list(SENTENCES)
    assert all(sum(answer["tuned"].values()) == pytest.approx(1) for answer in found["answers"])
    assert all(answer["tuned"] != answer["untuned"] for answer in found["answers"])
    assert {metric["split"] for metric in SoftPrompt.load(path).metrics} == {"validation", "test"}
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "demo.safetensors",
        "results.json",
        "test.jsonl",
        "train.jsonl",
        "validation.jsonl",
    ]
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == found

    assert main(options) == 0  # it may replace what it stored itself
    captured = capsys.readouterr()
    assert max(map(len, captured.out.splitlines())) <= 80 + len(str(path))
    assert f"{path.stat().st_size:,}" in captured.out
    assert "not one of its bits has changed" in captured.out
    assert "4/4  asking the base model with the soft prompt" in captured.err

    test = str(home / ".runs" / "demo" / "test.jsonl")
    assert main(["evaluate", "demo", test, "--dtype", "fp32", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["value"] == pytest.approx(found["tuned"]["value"])


def test_the_demo_replaces_nobody_elses_soft_prompt(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home.mkdir()
    path = home / "demo.safetensors"
    path.write_text("mine")
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == (
        f"error: The name 'demo' is taken by a soft prompt that is not the demo's, {path}; rename or remove it first.\n"
    )
    assert path.read_text() == "mine"
