"""The pages keep to the code: links, commands, sentences and figures."""

from __future__ import annotations

import json
import re
import shlex
import statistics
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path

import click
import pytest

import softprompt
from docs.reference_pages import pages
from softprompt.cli.arguments import spread
from softprompt.model.architecture import FAMILIES, WHOLE
from softprompt.tuning.config import TrainConfig
from tests.test_sentences import GROUP, SOURCES, texts

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PACKAGE = Path(softprompt.__file__).parent
GENERATED = ("architectures.md", "commands.md", "python.md", "train_config.md")
WRITTEN = [page for page in sorted(DOCS.rglob("*.md")) if page.name not in GENERATED]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *WRITTEN]
TOLD = [page for page in PAGES if "study" not in page.parts]
"""All but the notebooks, whose commands are of their time."""


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


# --- links ---------------------------------------------------------------------------------------


@cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)|[`*]", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in plain}


def dead(page: Path) -> Iterator[str]:
    """The links and pictures of a page that lead nowhere in the repository; those to elsewhere are not looked at."""
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = link.partition("#")
        if "://" in link or Path(path).name in GENERATED:
            continue
        there = (page.parent / path).resolve() if path else page
        if not there.is_file() or (anchor and anchor not in anchors(there)):
            yield link


def test_it_finds_dead_links(tmp_path: Path) -> None:
    page = tmp_path / "a.md"
    page.write_text("# One `two`, three\n[a](#one-two-three) [b](#four) [c](b.md)\n![d](d.png) [e](https://x.y/z)\n")
    assert list(dead(page)) == ["#four", "b.md", "d.png"]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    assert list(dead(page)) == []


@pytest.mark.parametrize("page", TOLD, ids=name)
def test_files_that_are_named_are_there(page: Path) -> None:
    named = re.findall(r"`((?:\w+/)+[\w.]+\.(?:py|sh|html|toml))`", prose(page))
    assert [file for file in named if not any((root / file).is_file() for root in (ROOT, PACKAGE))] == []


def test_the_site_has_every_page() -> None:
    listed = re.findall(r'= "([\w/]+\.md)"', (ROOT / "zensical.toml").read_text(encoding="utf-8"))
    written = {page.relative_to(DOCS).as_posix() for page in WRITTEN}
    assert sorted(listed) == sorted(written | {f"reference/{name}" for name in GENERATED})


def test_the_front_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


# --- commands ------------------------------------------------------------------------------------


def commands(page: Path) -> Iterator[list[str]]:
    """The words behind ``softprompt`` of every command in a page's blocks of shell."""
    for block in re.findall(r"^```sh\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.match(r"\w+=", words[0]):
                words = words[1:]
            if words[:1] == ["softprompt"]:
                yield words[1:]


@pytest.mark.parametrize("page", TOLD, ids=name)
def test_commands_are_understood(page: Path) -> None:
    for words in commands(page):
        if words[0].startswith("--"):
            continue
        try:
            GROUP.commands[words[0]].make_context(words[0], spread(GROUP, words)[1:])
        except click.ClickException as error:
            pytest.fail(f"softprompt {' '.join(words)}: {error.format_message()}")


def test_there_are_commands_to_look_at() -> None:
    assert {words[0] for page in TOLD for words in commands(page)} >= {*GROUP.commands, "train"}


# --- sentences -----------------------------------------------------------------------------------


def missing(symptoms: list[str]) -> list[str]:
    """The pieces of sentences, between ``…``, that no sentence of the code has."""
    said = [" ".join(text.split()) for source in SOURCES for _, text in texts(source)]
    return [
        piece
        for symptom in symptoms
        for piece in re.split(r"\s*…\s*", symptom)
        if piece.strip(" ,;.") and not any(piece.strip() in sentence for sentence in said)
    ]


def test_symptoms_are_sentences_of_the_code() -> None:
    headings = re.findall(r"^### (.*)$", (DOCS / "guides" / "troubleshooting.md").read_text(encoding="utf-8"), re.M)
    symptoms = [symptom for heading in headings for symptom in re.findall(r"`([^`]+)`", heading) if "…" in symptom]
    assert missing(symptoms) == []
    assert len(symptoms) > 30


def test_every_alarm_is_told_in_its_own_words() -> None:
    page = (DOCS / "guides" / "alarms.md").read_text(encoding="utf-8")
    said, ruins = (section.split("\n## ")[0] for section in page.split("\n## ")[1:3])
    rows = [line.strip("| ").split(" | ") for line in said.splitlines() if line.startswith("| `")]
    source = (PACKAGE / "tuning" / "alarms.py").read_text(encoding="utf-8")
    assert sorted(row[0].strip("`") for row in rows) == sorted(set(re.findall(r'Alarm\(\s*"(\w+)"', source)))
    told = [row[1].strip("`") for row in rows]
    told += [text for text in re.findall(r"`([^`]+)`", ruins) if "…" in text]
    assert missing([part for sentence in told for part in sentence.split("; ") if part.strip("… ")]) == []


def test_every_family_is_in_the_table_with_its_path() -> None:
    rows = [line.strip("| ").split(" | ") for line in pages()["architectures.md"].splitlines() if line[0:1] == "|"]
    paths = {kind: row[2] for row in rows for kind in re.findall(r"`(\w+)`", row[1])}
    told = {kind: "fast" for family in FAMILIES for kind in family.model_types} | dict.fromkeys(
        WHOLE, "whole sequences"
    )
    assert {kind: path for kind, path in paths.items() if path != "refused"} == told
    fast = [row for row in rows[2:] if row[2] == "fast"]
    assert {row[0]: row[3] for row in fast} == {f.name: f.leaves for f in FAMILIES}
    assert {(row[2], row[4]) for row in rows[2:]} == {("fast", "yes"), ("whole sequences", "no"), ("refused", "")}


# --- figures -------------------------------------------------------------------------------------

SETS = {
    "SST-2": "sst2",
    "TREC-6": "trec6",
    "CR": "cr",
    "Subj": "subj",
    "AG News": "agnews",
    "SICK": "sick",
    "sentiment140": "ni_sentiment140",
    "banking77": "banking77",
}
METHODS = {
    "TF-IDF": "tf-idf",
    "soft prompt": "soft-prompt",
    "KV prefix": "prefix",
    "LoRA": "lora",
    "full fine-tuning": "full-fine-tuning",
}


def scores(data_set: str) -> dict[str, float]:
    """The mean accuracy of each method in percent, from the study's cells."""
    cells = json.loads((DOCS / "study" / f"{data_set}.json").read_text(encoding="utf-8"))
    found: dict[str, list[float]] = {}
    for cell in cells:
        found.setdefault(cell["method"], []).append(100 * cell["value"])
    return {method: statistics.mean(values) for method, values in found.items()}


def best_hard_prompt(found: dict[str, float]) -> float:
    return max(value for method, value in found.items() if method.startswith(("zero-shot", "instruction", "few-shot")))


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "results" / "quality.md"], ids=name)
def test_the_table_is_what_was_measured(page: Path) -> None:
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    start = next(i for i, line in enumerate(lines) if "full fine-tuning" in line)
    head, _, *rows = ([cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines[start : start + 11])
    assert head == ["", "best hard prompt", *METHODS]
    of_set = [
        [best_hard_prompt(found), *map(found.__getitem__, METHODS.values())] for found in map(scores, SETS.values())
    ]
    of_set.append([statistics.mean(column) for column in zip(*of_set, strict=True)])
    wanted = zip((*SETS, "mean"), of_set, strict=True)
    assert rows == [[label, *(f"{value:.1f}" for value in values)] for label, values in wanted]


# --- the generated reference ---------------------------------------------------------------------


def test_the_reference_has_every_command_option_name_and_field() -> None:
    made = pages()
    assert sorted(made) == sorted(GENERATED)
    for command in GROUP.commands.values():
        section = made["commands.md"].split(f"\n## softprompt {command.name}\n")[1].split("\n## ")[0]
        for parameter in command.params:
            if parameter.param_type_name == "option" and parameter.name != "help":
                assert f"`{parameter.opts[0]}`" in section
    public = [name for name in softprompt.__all__ if not name.startswith("_")]
    assert [name for name in public if f"\n### {name}\n" not in made["python.md"]] == []
    rows = re.findall(r"^\| `(\w+)` \| .* \| .* \| (.+) \|$", made["train_config.md"], re.MULTILINE)
    assert [row for row, _ in rows] == [field.name for field in fields(TrainConfig)]
    assert all(meaning.strip() for _, meaning in rows)
