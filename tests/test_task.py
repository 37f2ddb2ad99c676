"""Examples to requests, scores to labels, and the number that training chooses its best vectors by."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from conftest import plain_score, tiny
from softprompt.config import TrainConfig
from softprompt.data import Dataset, Example
from softprompt.errors import BaseModelError, ConfigError, DataError
from softprompt.frozen import FrozenLM
from softprompt.prompt import VIRTUAL_TOKENS, SoftPrompt
from softprompt.task import Task
from softprompt.template import SOFT, Template, Verbalizer
from softprompt.train import Training

LABELS = Verbalizer({"good": ("very good", "great"), "bad": ("bad",)})
TEMPLATE = Template("Review :{soft_prompt} {input} ? {target}")
EXAMPLE = Example({"input": "a film"}, "bad", where="toy.jsonl:1")


def bound(lm: FrozenLM, verbalizer: Verbalizer | None = LABELS, length: int = 5, window: int = 128) -> Task:
    return Task(lm, TEMPLATE, verbalizer, length, window)


def ids_of(lm: FrozenLM, text: str) -> tuple[int, ...]:
    return tuple(lm.tokenizer(text, add_special_tokens=False).input_ids)


# --- examples to requests ------------------------------------------------------------------------------------


def test_the_requests_of_an_example(llama: FrozenLM) -> None:
    task = bound(llama)
    before = (*ids_of(llama, "Review :"), SOFT, *ids_of(llama, " a film"), *ids_of(llama, " ?"))
    very_good, great, bad = (ids_of(llama, f" {word}") for word in ("very good", "great", "bad"))
    assert task.words == (very_good, great, bad)
    assert task.label_of_word == (0, 0, 1)
    assert task.labels == ("good", "bad")
    assert task.label_words() == [very_good, bad]

    labels = task.label_request(EXAMPLE, prompt=3)
    assert (labels.ids, labels.words, labels.prompt, labels.truncated) == (before, task.words, 3, False)
    assert labels.shared == len(ids_of(llama, "Review :")) + 1
    assert labels.shares_prefix
    assert task.target_request(EXAMPLE) == replace(labels, words=(bad,), prompt=0)
    assert task.open_request(EXAMPLE, 9) == replace(labels, words=(), prompt=0)


def test_free_text_targets_end_with_the_end_token(llama: FrozenLM) -> None:
    task = bound(llama, None)
    assert task.target_request(EXAMPLE).words == ((*ids_of(llama, " bad"), llama.tokenizer.eos_token_id),)
    assert task.labels == ()
    assert task.label_words() == []
    with pytest.raises(DataError) as error:
        task.target_request(Example({"input": "a film"}, None, where="toy.jsonl:4"))
    assert str(error.value) == "toy.jsonl:4: expected a target, found none; add one."


def test_long_inputs_leave_room_for_the_longest_word(llama: FrozenLM) -> None:
    long = Example({"input": "film " * 40}, "bad")
    task = bound(llama, window=30)
    fixed = len(ids_of(llama, "Review :")) + 5 + len(ids_of(llama, " ?"))
    longest = max(map(len, task.words))
    for request, reserved in (
        (task.label_request(long), longest),
        (task.target_request(long), len(task.words[2])),
        (task.open_request(long, 9), 9),
    ):
        assert request.truncated
        own = len(request.ids) - len(ids_of(llama, "Review :")) - 1 - len(ids_of(llama, " ?"))
        assert fixed + own + reserved == 30


def test_hard_text_in_the_place_of_the_soft_prompt(llama: FrozenLM) -> None:
    hard = bound(llama).without_soft_prompt(" the plot {of")
    request = hard.label_request(EXAMPLE)
    assert request.ids == (*ids_of(llama, "Review : the plot {of"), *ids_of(llama, " a film"), *ids_of(llama, " ?"))
    assert request.prompt is None
    assert (hard.verbalizer, hard.max_length, hard.num_virtual_tokens) == (LABELS, 128, 0)
    assert bound(llama).without_soft_prompt().label_request(EXAMPLE).ids == tuple(
        token for token in bound(llama).label_request(EXAMPLE).ids if token != SOFT
    )


def test_a_window_beyond_the_models_is_refused(llama: FrozenLM) -> None:
    with pytest.raises(ConfigError) as error:
        bound(llama, window=129)
    assert str(error.value) == (
        "The sequences may be at most 128 tokens long, the window of tiny-llama, but max_length is 129; "
        "give a smaller one."
    )


# --- the task of a data set, and of a soft prompt ------------------------------------------------------------


def data(*targets: str) -> Dataset:
    return Dataset(
        tuple(Example({"input": "film"}, t, where=f"toy.jsonl:{i}") for i, t in enumerate(targets, 1)), "", ""
    )


def test_labels_are_inferred_or_given(llama: FrozenLM) -> None:
    labelled = data(*["b", "a"] * 5)
    inferred = Task.for_data(llama, labelled, TEMPLATE)
    assert inferred.labels == ("a", "b")
    assert inferred.num_virtual_tokens == VIRTUAL_TOKENS
    assert inferred.max_length == 128
    assert Task.for_data(llama, data("b", "a"), TEMPLATE).verbalizer is None
    given = Task.for_data(llama, labelled, TEMPLATE, verbalizer=Verbalizer.from_labels(["b", "a", "c"]), max_length=64)
    assert (given.labels, given.max_length) == (("b", "a", "c"), 64)
    with pytest.raises(DataError) as error:
        Task.for_data(llama, labelled, TEMPLATE, verbalizer=LABELS)
    assert str(error.value) == (
        'toy.jsonl:1: expected one of the labels "good", "bad", found "b"; '
        "correct this row and 9 more bad rows, or give all labels with --labels."
    )


def test_a_soft_prompt_brings_its_task(llama: FrozenLM) -> None:
    rows = data(*["good", "bad"] * 5)
    task = Task.for_data(llama, rows, TEMPLATE, verbalizer=LABELS, num_virtual_tokens=3, max_length=50)
    config = TrainConfig(num_virtual_tokens=3, steps=1, max_length=50)
    training = Training(task, rows, rows, config, name="mine")
    list(training)
    made: SoftPrompt = training.result()
    again = Task.of(llama, made)
    assert (again.template, again.verbalizer, again.num_virtual_tokens) == (TEMPLATE, LABELS, 3)
    assert again.max_length == 50
    assert again.label_request(EXAMPLE) == task.label_request(EXAMPLE)
    with pytest.raises(BaseModelError) as error:
        Task.of(tiny("gpt2"), made)
    assert str(error.value) == (
        f"The soft prompt 'mine' was tuned on the base model 'tiny-llama' (fingerprint {llama.fingerprint[:12]}), but "
        f"the one loaded is 'tiny-gpt2' (fingerprint {tiny('gpt2').fingerprint[:12]}); load 'tiny-llama', or tune a "
        f"new soft prompt on 'tiny-gpt2'."
    )


# --- scores to labels ----------------------------------------------------------------------------------------


def test_the_words_of_a_label_add_up(llama: FrozenLM) -> None:
    """P(good) = (0.1 + 0.3) / (0.1 + 0.3 + 0.2)."""
    found = bound(llama).label_logprobs(torch.tensor([[0.1, 0.3, 0.2]]).log())
    torch.testing.assert_close(found.exp(), torch.tensor([[2 / 3, 1 / 3]]))


def test_normalised_scores_are_means_over_a_words_tokens(llama: FrozenLM) -> None:
    task = bound(llama)
    assert [len(word) for word in task.words] == [5, 3, 1]
    good = math.exp(-10 / 5) + math.exp(-6 / 3)
    bad = math.exp(-1 / 1)
    found = task.label_logprobs(torch.tensor([[-10.0, -6.0, -1.0]]), normalise=True)
    torch.testing.assert_close(found.exp(), torch.tensor([[good / (good + bad), bad / (good + bad)]]))


# --- validation ----------------------------------------------------------------------------------------------


def test_validation_by_accuracy_and_then_loss(llama: FrozenLM) -> None:
    task, vectors = bound(llama), 0.1 * torch.ones(5, 32)
    targets = ("good", "bad", "bad")
    examples = [Example({"input": text}, t) for text, t in zip(("a film", "dull", "mess of"), targets, strict=True)]
    right, losses = 0, []
    for example in examples:
        request = task.label_request(example)
        words = [float(plain_score("llama", request.ids, word, vectors)) for word in request.words]
        label = torch.tensor([math.log(math.exp(words[0]) + math.exp(words[1])), words[2]]).log_softmax(dim=0)
        gold = task.labels.index(str(example.target))
        right += int(label.argmax()) == gold
        losses.append(-float(label[gold]))
    found = task.validator(examples)(vectors)
    assert found["value"] == pytest.approx(right / 3)
    assert found["loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert [metric["metric"] for metric in found["metrics"]] == ["accuracy"]
    assert found["metrics"][0]["n"] == 3
    assert found["metrics"][0]["stderr"] is not None


def test_validation_of_free_text_by_the_loss_of_a_token(llama: FrozenLM) -> None:
    task, vectors = bound(llama, None), 0.1 * torch.ones(5, 32)
    examples = [Example({"input": "a film"}, "great"), Example({"input": "dull"}, "a badly written mess")]
    requests = [task.target_request(example) for example in examples]
    scores = [float(plain_score("llama", r.ids, r.words[0], vectors)) for r in requests]
    loss = -sum(scores) / sum(len(r.words[0]) for r in requests)
    found = task.validator(examples)(vectors)
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["value"] == -found["loss"]
    assert found["metrics"][0]["metric"] == "perplexity"
    assert found["metrics"][0]["value"] == pytest.approx(math.exp(loss), rel=1e-4)


def test_validation_survives_vectors_that_are_not_finite(llama: FrozenLM) -> None:
    vectors = torch.full((5, 32), math.nan)
    for verbalizer in (LABELS, None):
        found = bound(llama, verbalizer).validator([EXAMPLE])(vectors)
        assert math.isnan(found["loss"])
