"""A user's mistakes on the command line: one sentence, exit code 2, told before a model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from softprompt.soft_prompts.soft_prompt import SoftPrompt
from tests.conftest import Ran, Run, is_refused

NAMES = ", ".join(("auto", "random", "vocab", "text", "labels"))
MISTAKES: dict[tuple[str, ...], str] = {
    ("train", "train.jsonl"): ("A soft prompt needs a name to be stored under; give --name, or --out with a path."),
    ("train", "train.jsonl", "--name", "a/b"): (
        "A soft prompt's name is 1 to 100 letters a-z, digits, '-', '_' and '.', without a dot in front or "
        "'.safetensors' at the end, but 'a/b' was given; choose another name."
    ),
    ("train", "train.jsonl", "--out", "films.bin"): (
        "--out needs the path of a file that ends with .safetensors, not films.bin."
    ),
    ("train", "train.jsonl", "--name", "x", "--steps", "3", "--epochs", "2", "--lr", "0"): (
        "lr must be above 0 and below 1000 RMS of the start, not 0.0; "
        "steps and epochs exclude each other; give one of them"
    ),
    ("train", "train.jsonl", "--name", "x", "--preset", "best"): "the preset must be one of lester2021, not 'best'",
    ("train", "train.jsonl", "--name", "x", "--loss", "mse"): "loss must be one of lm, labels, not 'mse'",
    ("train", "train.jsonl", "--name", "x", "--init", "best"): (
        f"--init must be one of {NAMES}, or a soft prompt's name or path, not 'best'; see `softprompt list`."
    ),
    ("train", "train.jsonl", "--name", "x", "--init", "./best.safetensors"): (
        "There is no soft prompt at best.safetensors; check the path, or see the stored ones with `softprompt list`."
    ),
    ("train", "train.jsonl", "--name", "x", "--template", "{input} {target}"): (
        "Expected {soft_prompt} in the template, found none in '{input} {target}'; put it where the soft prompt shall "
        "stand."
    ),
    ("train", "train.jsonl", "--name", "x", "--template", "{soft_prompt}{input}"): (
        "Expected {target} at the end of the template, found none in '{soft_prompt}{input}'; append it."
    ),
    ("train", "missing.jsonl", "--name", "x"): (
        "Expected a data file at missing.jsonl, found nothing; check the path, or write hf: before a Hub id."
    ),
    ("train", "empty.jsonl", "--name", "x"): (
        "Expected rows of data in empty.jsonl, found an empty file; check the file."
    ),
    ("train", "broken.jsonl", "--name", "x"): (
        "broken.jsonl:2: expected a JSON object, found an error at column 11 (Expecting value); "
        "correct or remove this row."
    ),
    ("train", "train.jsonl", "--name", "x", "--input-field", "text"): (
        'Expected the column "text" in train.jsonl, found "input", "target"; choose a column with --input-field, '
        "or rename the column or the template's field."
    ),
    ("train", "train.jsonl", "--name", "x", "--target-field", "label"): (
        'Expected the column "label" in train.jsonl, found "input", "target"; choose a column with --target-field, '
        "or rename the column or the template's field."
    ),
    ("train", "train.jsonl", "--name", "x", "--labels", "positive,neutral"): (
        'train.jsonl:2: expected one of the labels "positive", "neutral", found "negative"; correct this row and 19 '
        "more bad rows, or give all labels with --labels."
    ),
    ("train", "train.jsonl", "--name", "x", "--labels", "positive"): (
        "Expected at least 2 labels in the verbalizer, found positive; give all labels."
    ),
    ("train", "train.jsonl", "--name", "x", "--validation", "foreign.jsonl"): (
        'foreign.jsonl:1: expected one of the labels "negative", "positive", found "neutral"; correct this row, '
        "or give all labels with --labels."
    ),
    ("train", "train.jsonl", "--name", "x", "--lengths", "5,many"): (
        "--lengths must be whole numbers with commas between them, for instance 5,50, not '5,many'."
    ),
    ("evaluate", "nothing", "test.jsonl"): (
        "There is no soft prompt 'nothing' in HOME: the first names are 'films'; see `softprompt list`."
    ),
    ("evaluate", "film", "test.jsonl"): (
        "There is no soft prompt 'film' in HOME: similar names are 'films'; see `softprompt list`."
    ),
    ("evaluate", "films", "foreign.jsonl"): (
        'foreign.jsonl:1: expected one of the labels "negative", "positive", found "neutral"; correct this row, '
        "or give all labels with --labels."
    ),
    ("evaluate", "films", "test.jsonl", "--metric", "bleu"): (
        "The metric for labels must be one of accuracy, macro_f1, mcc, log_loss, calibration_error, not 'bleu'; "
        "choose one."
    ),
    ("evaluate", "films", "test.jsonl", "--top-p", "0"): "top_p must be above 0 and at most 1, not 0.0",
    ("predict", "films"): (
        "Either texts or --file are needed to predict, not both; give TEXT, - for stdin, or --file."
    ),
    ("predict", "films", "a film", "--file", "test.jsonl"): (
        "Either texts or --file are needed to predict, not both; give TEXT, - for stdin, or --file."
    ),
    ("predict", "films", "a film", " "): "text 2: expected text for {input}, found only blanks; write some.",
    ("predict", "films", "a \udcff film"): "text 1: expected UTF-8 for {input}, found other bytes; convert it.",
    ("train", "train.jsonl", "--name", "x", "--init-text", "a \udcff"): (
        "Expected UTF-8 in the text 'a \\udcff', found other bytes; convert it."
    ),
    ("train", "train.jsonl", "--name", "x", "--template", "\udcff{soft_prompt}{input} {target}"): (
        "Expected UTF-8 in the text '\\udcff{soft_prompt}{input} {target}', found other bytes; convert it."
    ),
    ("train", "train.jsonl", "--name", "x", "--labels", "positive,\udcff"): (
        "Expected UTF-8 in the labels, found other bytes in '\\udcff'; convert them."
    ),
    ("train", "train.jsonl", "--name", "x", "--encoding", "klingon"): (
        "--encoding must be an encoding of text such as utf-8, latin-1, cp1252 or gb18030, not 'klingon'."
    ),
    (
        "show",
        "nothing",
    ): "There is no soft prompt 'nothing' in HOME: the first names are 'films'; see `softprompt list`.",
    ("rm", "films", "nothing"): (
        "There is no soft prompt 'nothing' in HOME: the first names are 'films'; see `softprompt list`."
    ),
    ("rm", "../films"): (
        "A soft prompt's name is 1 to 100 letters a-z, digits, '-', '_' and '.', without a dot in front or "
        "'.safetensors' at the end, but '../films' was given; choose another name."
    ),
    ("train", "train.jsonl", "--name", "films"): (
        "The name 'films' is taken by the soft prompt HOME/films.safetensors; choose another name, "
        "or remove that one first with `softprompt rm films`."
    ),
}


@pytest.mark.parametrize("arguments", MISTAKES, ids=" ".join)
def test_a_mistake_is_one_sentence_before_a_model_is_loaded(
    arguments: tuple[str, ...], run: Run, home: Path, stored: SoftPrompt, no_model: None
) -> None:
    (home.parent / "empty.jsonl").write_text("\n")
    (home.parent / "broken.jsonl").write_text('{"input": "a", "target": "b"}\n{"input": ,\n')
    (home.parent / "foreign.jsonl").write_text('{"input": "a", "target": "neutral"}\n')
    is_refused(run(*arguments), MISTAKES[arguments].replace("HOME", str(home)))
    assert SoftPrompt.load(home / "films.safetensors").name == "films"


@pytest.mark.parametrize(
    "arguments", [("--nonsense",), ("train",), ("train", "train.jsonl", "--steps", "many"), ("fly",), ("rm",)]
)
def test_unknown_or_missing_options_are_mistakes_too(arguments: tuple[str, ...], run: Run) -> None:
    ran = run(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert "Usage: softprompt" in ran.err


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("--dtype", "fp8", "--dtype must be auto, fp32, bf16 or fp16, not 'fp8'"),
        ("--device", "tpu", "--device must be auto, cpu, cuda or mps and be on this machine; 'tpu' is not"),
    ],
)
def test_a_device_or_dtype_that_is_not_there(option: str, value: str, sentence: str, run: Run, base: str) -> None:
    is_refused(run("train", "train.jsonl", "--name", "x", "--base", base, option, value), sentence)


def test_a_base_model_that_is_not_there(run: Run, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    is_refused(
        run("train", "train.jsonl", "--name", "x", "--base", str(empty)),
        f"the folder {empty} is empty; give a folder saved by transformers, or a .gguf file",
    )


def test_the_window_is_the_models(train: Run, base: str) -> None:
    is_refused(
        train("train.jsonl", "--name", "x", "--max-length", "129"),
        f"The sequences may be at most 128 tokens long, the window of {base}, but max_length is 129; "
        f"give a smaller one.",
    )


def test_a_wrong_base_model_is_refused_by_name(run: Run, stored: SoftPrompt, base: str) -> None:
    for arguments in (("evaluate", "films", "test.jsonl"), ("predict", "films", "a film")):
        is_refused(
            run(*arguments, "--base", base),
            f"The soft prompt 'films' was tuned on the base model 'some-base' (width 4), but the one loaded is "
            f"'{base}' (width 32); load 'some-base', or tune a new soft prompt on '{base}'.",
        )


def test_a_damaged_soft_prompt_is_refused_and_listed(run: Run, stored: SoftPrompt, home: Path) -> None:
    path = home / "films.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    shown = run("show", "films")
    assert (shown.code, shown.out) == (2, "")
    assert shown.err.startswith(f"error: {path} is not a sound soft prompt: expected a whole safetensors file, found ")
    assert shown.err.endswith("; restore it from a copy, or tune it again.\n")
    sentence = shown.err.removeprefix("error: ").rstrip("\n")
    listed = run("list")
    assert (listed.code, listed.err) == (0, f"warning: {sentence}\n")
    assert "(unreadable)" in listed.out
    assert run("list", "--json").json["soft_prompts"][0]["error"] == sentence
    assert run("rm", "films").code == 0


def test_an_empty_store(run: Run, home: Path) -> None:
    assert run("list") == Ran(0, "", f"the store {home} is empty; see `softprompt train --help` or `softprompt demo`\n")
