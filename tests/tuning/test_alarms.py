"""What is said of a training that does not learn: ways to ruin one, each with its alarm, and sound ones without any."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from softprompt.api import train
from softprompt.data.checks import doubts
from softprompt.data.example import Dataset, Example
from softprompt.errors import ConfigError, DataError, SoftPromptError, SoftPromptWarning, StoreError, TemplateError
from softprompt.model.frozen import FrozenLM
from softprompt.tasks.reading import read_task
from softprompt.tasks.task import Task
from softprompt.text.template import Template
from softprompt.text.verbalizer import Verbalizer
from softprompt.tuning.alarms import of_answers, of_comparison, of_steps, of_task
from softprompt.tuning.config import PARAMETRISATIONS, TrainConfig
from softprompt.tuning.training import Training
from softprompt.tuning.trend import Trend
from tests.conftest import FILLERS, TOY_LABELS, TOY_TEMPLATE, Run, make_model, tiny, toy, write_labels
from tests.encoder_decoders import encoder_decoder

RIGHT: dict[str, Any] = {
    "num_virtual_tokens": 8,
    "batch_size": 16,
    "steps": 20,
    "eval_every": 10,
    "lr": 0.3,
    "init_scale": 1.0,
}
"""A training of ``toy``'s rows that learns them; the base model has random weights."""


def ended(
    data: Dataset,
    validation: Dataset,
    *,
    template: Template = TOY_TEMPLATE,
    words: Verbalizer | None = TOY_LABELS,
    kind: str = "llama",
    **settings: Any,
) -> Training:
    config = TrainConfig(**{**RIGHT, "loss": "lm" if words is None else "labels", **settings})
    task = Task(tiny(kind), template, words, config.longest, config.max_length or tiny(kind).window)
    training = Training(task, data, validation, config)
    for _ in training:
        pass
    return training


def kinds(training: Training) -> set[str]:
    return {alarm.kind for alarm in training.alarms}


def shuffled(data: Dataset) -> Dataset:
    targets = [example.target for example in data.examples]
    random.Random(0).shuffle(targets)
    rows = zip(data.examples, targets, strict=True)
    return replace(data, examples=tuple(replace(example, target=target) for example, target in rows))


def opposite(data: Dataset) -> Dataset:
    other = {"positive": "negative", "negative": "positive"}
    rows = (replace(example, target=other[str(example.target)]) for example in data.examples)
    return replace(data, examples=tuple(rows))


def one_class(data: Dataset) -> Dataset:
    return replace(data, examples=tuple(example for example in data.examples if example.target == "positive"))


def few(data: Dataset, rows: int) -> Dataset:
    return replace(data, examples=data.examples[:rows])


# --- a sound training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"parametrisation": "prefix", "steps": 40}, {"average": 0.999}], ids=str)
def test_a_training_that_learns_raises_none(options: dict[str, Any]) -> None:
    training = ended(toy(120, 0), toy(40, 1), **options)
    best = training.result()
    assert best.metrics[0]["value"] > 0.7
    assert training.alarms == ()
    assert best.training["alarms"] == []


# --- ways to ruin one -----------------------------------------------------------------------------------------

PLAIN = Verbalizer({"positive": ("the",), "negative": ("of",)})
UNKNOWN = Verbalizer({"positive": ("good",), "negative": ("schlecht",)})
LABELS_AS_LETTERS = Verbalizer({"positive": ("zqxj",), "negative": ("wvkq",)})

RUINS: dict[str, tuple[Callable[[], Training], str]] = {
    "rate 100 times too low": (lambda: ended(toy(120, 0), toy(40, 1), lr=0.003), "unmoved"),
    "three steps": (lambda: ended(toy(120, 0), toy(40, 1), steps=3, lr=0.03), "unmoved"),
    "shuffled labels": (lambda: ended(shuffled(toy(120, 0)), toy(40, 1)), "chance"),
    "one class": (lambda: ended(one_class(toy(120, 0)), toy(40, 1)), "one_answer"),
    "labels exchanged in validation": (lambda: ended(toy(120, 0), opposite(toy(40, 1))), "chance"),
    "words of letters": (lambda: ended(toy(40, 0), toy(20, 1), words=LABELS_AS_LETTERS, steps=2), "split_word"),
    "no space before the target": (
        lambda: ended(
            toy(40, 0), toy(20, 1), words=PLAIN, template=Template("{soft_prompt}{input}. Answer:{target}"), steps=2
        ),
        "joined_target",
    ),
    "few rows": (lambda: ended(few(toy(40, 0), 3), toy(20, 1), steps=2), "few_rows"),
    "few validation rows": (lambda: ended(toy(40, 0), few(toy(20, 1), 2), steps=2), "few_validation_rows"),
    "weight decay": (lambda: ended(toy(120, 0), toy(40, 1), weight_decay=3.0), "shrunk"),
    "a clip of nearly nothing": (lambda: ended(toy(120, 0), toy(40, 1), clip=1e-8), "tiny_gradient"),
}


@pytest.mark.parametrize("ruin", RUINS)
def test_a_ruined_training_says_why(ruin: str) -> None:
    made, kind = RUINS[ruin]
    training = made()
    assert kind in kinds(training), training.alarms
    assert kind in training.result().training["alarms"]
    found = next(alarm.sentence for alarm in training.alarms if alarm.kind == kind)
    assert "\n" not in found
    assert any(character.isdigit() for character in found) or kind == "joined_target"


def test_words_that_the_tokenizer_does_not_know() -> None:
    vocabulary = {word: number for number, word in enumerate(("<unk>", "<pad>", "</s>", "good", "a", "film"))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast: Any = PreTrainedTokenizerFast
    tokenizer = fast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>", pad_token="<pad>")
    lm = FrozenLM(make_model("llama"), tokenizer, name="words", dtype="fp32", device="cpu")
    found = of_task(Task(lm, TOY_TEMPLATE, UNKNOWN, 2, 64), toy(40, 0).examples, toy(20, 1).examples)
    assert [alarm.kind for alarm in found] == ["unknown_word"]
    assert '"schlecht"' in found[0].sentence
    assert "--labels label=word" in found[0].sentence


def test_a_rate_100_times_too_high() -> None:
    """What SmolLM2-135M gave on SST-2 after 30 steps at ``--lr 30``: 54 of 100 validation rows right, where the labels
    are 55 and 45, at probabilities near one half. The loss had fallen from 6.1 in the first steps to 0.72."""
    gold = ["positive"] * 55 + ["negative"] * 45
    found = of_answers([0.52] * 50 + [0.48] * 50, 0.54, gold, {}, lr=30.0)
    assert [alarm.kind for alarm in found] == ["chance"]
    assert "0.540" in found[0].sentence
    assert "lower --lr than 30" in found[0].sentence


# --- ways that end with an error, or that the data checks see ---------------------------------------------------


def written(path: Path, rows: Sequence[tuple[str, str]]) -> Path:
    path.write_text("\n".join(json.dumps({"input": text, "target": target}) for text, target in rows) + "\n")
    return path


def refused(data: Dataset, **options: Any) -> str:
    with pytest.raises(SoftPromptError) as error:
        ended(data, toy(20, 1), **options)
    return str(error.value)


def test_a_template_without_input_is_refused() -> None:
    with pytest.raises(TemplateError, match="add one"):
        Template("{soft_prompt}Answer: {target}")


def test_a_target_or_an_input_without_room_is_refused() -> None:
    long = Dataset((Example({"input": "a film"}, "great " * 40),) * 20, "long.jsonl", "long")
    assert "of the target" in refused(long, words=None, max_length=30)
    assert "at least 1 of the input" in refused(
        toy(20, 0), max_length=10, template=Template("{soft_prompt}{input} {target}")
    )


def test_validation_rows_of_another_task_are_refused(tmp_path: Path) -> None:
    rows = written(tmp_path / "a.jsonl", [(f"a film {i}", ("good", "bad")[i % 2]) for i in range(20)])
    other = written(tmp_path / "b.jsonl", [(f"a film {i}", ("yes", "no")[i % 2]) for i in range(20)])
    with pytest.raises(DataError, match="expected one of the labels"):
        read_task(rows, other, None, None)


def test_one_class_without_labels_is_refused(tmp_path: Path) -> None:
    rows = written(tmp_path / "a.jsonl", [(f"a film {i}", "good") for i in range(20)])
    with pytest.raises(DataError, match=r"targets that differ.*--labels"):
        read_task(rows, None, None, None)


def test_swapped_columns_are_doubted() -> None:
    right = toy(40, 0)
    rows = (Example({"input": str(e.target)}, e.fields["input"]) for e in right.examples)
    swapped = replace(right, examples=tuple(rows))
    assert "taken for each other" in " ".join(doubts(swapped, labels=None, chosen=True))
    assert "taken for each other" not in " ".join(doubts(right, labels=None, chosen=True))
    assert "taken for each other" not in " ".join(doubts(right, labels=["positive", "negative"]))


# --- the rules, on figures ------------------------------------------------------------------------------------


def trend(first: Sequence[float], last: Sequence[float], norm: float = 0.1, steps: int = 100) -> Trend:
    return Trend(list(first), list(last), [norm] * len(first), steps)


def test_a_flat_loss_is_one_within_its_noise() -> None:
    flat = trend([2.0, 2.1, 1.9, 2.0], [2.01, 1.95, 2.1, 1.96])
    fell = trend([2.0, 2.1, 1.9, 2.0], [1.5, 1.6, 1.4, 1.5])
    rows = [0.5, 0.6, 0.4, 0.5, 0.55]
    better = [p + 0.2 + 0.01 * i for i, p in enumerate(rows)]
    found = [alarm.kind for alarm in of_comparison(flat, rows, rows, labelled=True)]
    assert found == ["flat_loss"]
    assert of_comparison(fell, rows, rows, labelled=True) == []
    assert of_comparison(flat, better, rows, labelled=True) == []  # something was learned all the same
    assert [alarm.kind for alarm in of_comparison(flat, rows, None, labelled=True)] == ["flat_loss"]
    assert [alarm.kind for alarm in of_comparison(fell, rows, better, labelled=True)] == ["below_base"]


def test_a_loss_that_rises_beyond_its_noise() -> None:
    config = TrainConfig(lr=30.0)
    rose = of_steps(trend([2.0, 2.1, 1.9, 2.0], [3.5, 3.6, 3.4, 3.5]), config, 100)
    assert [alarm.kind for alarm in rose] == ["rising_loss"]
    assert "from 2.000" in rose[0].sentence
    assert "than 30" in rose[0].sentence
    assert of_steps(trend([2.0, 2.1, 1.9, 2.0], [2.3, 1.8, 2.5, 1.9]), config, 100) == []


def test_a_gradient_that_is_always_clipped_or_too_small() -> None:
    config = TrainConfig(clip=0.01)
    clipped = replace(trend([2.0] * 4, [1.0] * 4, norm=1.0), clipped=100)
    assert [alarm.kind for alarm in of_steps(clipped, config, 100)] == ["always_clipped"]
    assert of_steps(replace(clipped, clipped=90), config, 100) == []
    small = of_steps(trend([2.0] * 4, [1.0] * 4, norm=1e-9), config, 10_000)
    assert [alarm.kind for alarm in small] == ["tiny_gradient"]


def test_answers_by_chance_and_beyond() -> None:
    gold = ["a", "b"] * 50
    assert [alarm.kind for alarm in of_answers([0.5] * 100, 0.52, gold, {})] == ["chance"]
    assert of_answers([0.8, 0.7] * 50, 0.9, gold, {}) == []
    assert of_answers([0.999, 0.001] * 50, 0.8, gold, {}) == []  # often right, though too sure
    assert of_answers([0.5] * 5, 0.5, gold[:5], {}) == []  # too few to tell
    answer = {"label": "a", "share": 1.0, "gold_share": 0.5}
    assert [alarm.kind for alarm in of_answers([0.5] * 100, 0.5, gold, {"one_answer": answer})] == ["one_answer"]


# --- where it is said -----------------------------------------------------------------------------------------


def test_the_python_api_warns_and_the_soft_prompt_remembers() -> None:
    rows = [{"input": f"{' '.join(FILLERS[:3])} {i}", "target": ("positive", "negative")[i % 2]} for i in range(20)]
    with pytest.warns(SoftPromptWarning) as caught:
        made = train(tiny("llama"), rows, progress=False, lr=1e-5, steps=4, num_virtual_tokens=4)
    said = " ".join(str(warning.message) for warning in caught)
    assert "still what it began with" in said
    assert "2 validation rows can hardly tell" in said
    assert {"unmoved", "few_validation_rows"} <= set(made.training["alarms"])


def test_the_command_line_says_them_and_json_has_them(run: Run, base: str, home: Path) -> None:
    write_labels(home.parent / "train.jsonl", 40)
    options = ("--lr", "1e-5", "--steps", "4", "--dtype", "fp32", "--device", "cpu", "--base", base)
    ran = run("train", "train.jsonl", "--name", "a", "--json", *options)
    assert ran.code == 0
    found = ran.json["alarms"]
    assert {"unmoved", "few_validation_rows"} <= {alarm["kind"] for alarm in found}
    for alarm in found:
        assert ran.err.count(f"warning: {alarm['sentence']}") == 1


def test_a_run_that_was_stopped_knows_what_its_steps_were(tmp_path: Path) -> None:
    data, validation = toy(60, 0), toy(20, 1)
    config = TrainConfig(**{**RIGHT, "steps": 20, "eval_every": 10, "lr": 0.0003, "loss": "labels"})
    task = Task(tiny("llama"), TOY_TEMPLATE, TOY_LABELS, 8, 128)
    whole = Training(task, data, validation, config)
    for _ in whole:
        pass
    first = Training(task, data, validation, config, folder=tmp_path)
    for step in first:
        if step.number == 12:
            break
    del first, step
    second = Training(task, data, validation, config, folder=tmp_path, resume=True)
    for _ in second:
        pass
    assert whole.alarms == second.alarms != ()


@pytest.mark.parametrize("parametrisation", PARAMETRISATIONS)
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_soft_prompt_of_any_kind_is_read_again_as_it_was_trained(
    kind: str, parametrisation: str, tmp_path: Path
) -> None:
    lm = encoder_decoder(kind) if kind == "t5" else tiny(kind)
    task = Task(lm, TOY_TEMPLATE, TOY_LABELS, 4, lm.window)
    config = TrainConfig(**{**RIGHT, "num_virtual_tokens": 4, "steps": 2, "parametrisation": parametrisation})
    if lm.encoder_decoder and parametrisation == "prefix":
        with pytest.raises(ConfigError, match="prefix"):
            Training(task, toy(20, 0), toy(10, 1), config)
        return
    training = Training(task, toy(20, 0), toy(10, 1), config)
    for _ in training:
        pass
    made, path = training.result(), tmp_path / "a.safetensors"
    made.save(path)
    training.watch.require_same_answers(path, made)
    replace(made, vectors=made.vectors * 1.001).save(path)
    with pytest.raises(StoreError, match="other answers"):
        training.watch.require_same_answers(path, made)


def test_a_stored_soft_prompt_must_answer_as_the_trained_one(tmp_path: Path) -> None:
    training = ended(toy(40, 0), toy(20, 1), steps=2)
    made, path = training.result(), tmp_path / "a.safetensors"
    made.save(path)
    training.watch.require_same_answers(path, made)
    replace(made, vectors=made.vectors + torch.tensor(1e-3)).save(path)
    with pytest.raises(StoreError, match=r"other answers.*--overwrite"):
        training.watch.require_same_answers(path, made)
    replace(made, template="{soft_prompt}Is it good? {input} {target}").save(path)
    with pytest.raises(StoreError, match="other answers"):
        training.watch.require_same_answers(path, made)
