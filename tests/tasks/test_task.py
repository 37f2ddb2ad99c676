"""Examples to requests, scores to labels, and the number that training chooses its best vectors by."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from softprompt.data.example import Dataset, Example
from softprompt.errors import BaseModelError, ConfigError, DataError, SoftPromptWarning, TemplateError
from softprompt.evaluation.validation import validator
from softprompt.model.frozen import FrozenLM
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tasks.length import VIRTUAL_TOKENS
from softprompt.tasks.predict import Query, predict
from softprompt.tasks.task import Task
from softprompt.text.template import Template
from softprompt.text.tokens import SOFT
from softprompt.text.verbalizer import Verbalizer
from softprompt.tuning.config import TrainConfig
from softprompt.tuning.start import initial_vectors
from softprompt.tuning.training import Training
from tests.conftest import make_model, make_tokenizer, plain_score, tiny

LABELS = Verbalizer({"good": ("very good", "great"), "bad": ("bad",)})
TEMPLATE = Template("Review :{soft_prompt} {input} ? {target}")
EXAMPLE = Example({"input": "a film"}, "bad", where="toy.jsonl:1")


def bound(lm: FrozenLM, verbalizer: Verbalizer | None = LABELS, length: int = 5, window: int = 128) -> Task:
    return Task(lm, TEMPLATE, verbalizer, length, window)


def ids_of(lm: FrozenLM, text: str) -> tuple[int, ...]:
    return tuple(lm.tokenizer(text, add_special_tokens=False).input_ids)


@pytest.fixture
def gained() -> FrozenLM:
    """A base model to whose tokenizer two tokens were added, 320 and 321, but not to its embedding table."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["worse"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    return FrozenLM(make_model("llama"), tokenizer, name="gained", dtype="fp32", device="cpu")


# --- examples to requests ------------------------------------------------------------------------------------


def test_the_requests_of_an_example(llama: FrozenLM) -> None:
    task = bound(llama)
    before = (*ids_of(llama, "Review :"), SOFT, *ids_of(llama, " a film"), *ids_of(llama, " ?"))
    very_good, great, bad = (ids_of(llama, f" {word}") for word in ("very good", "great", "bad"))
    assert task.words == (very_good, great, bad)
    assert task.label_of_word == (0, 0, 1)
    assert task.labels == ("good", "bad")
    assert task.spellings == ((very_good, great), (bad,))

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
    assert task.spellings == ()
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


# --- labels that begin with another label --------------------------------------------------------------------


def words_of(lm: FrozenLM, labels: Sequence[str]) -> Task:
    return bound(lm, Verbalizer.from_labels(labels))


def test_words_have_ends_where_one_is_the_start_of_another(llama: FrozenLM) -> None:
    task = words_of(llama, ["1", "10", "2"])
    ends = [(llama.tokenizer.eos_token_id,), ids_of(llama, "\n")]
    assert task.words == tuple((*ids_of(llama, f" {label}"), *end) for label in ("1", "10", "2") for end in ends)
    assert task.label_of_word == (0, 0, 1, 1, 2, 2)
    assert task.target_request(replace(EXAMPLE, target="1")).words == ((*ids_of(llama, " 1"), *ends[0]),)
    apart = words_of(llama, ["1", "20", "3"])
    assert apart.words == tuple(ids_of(llama, f" {label}") for label in ("1", "20", "3"))
    assert apart.target_request(replace(EXAMPLE, target="1")).words == (ids_of(llama, " 1"),)


def certain(task: Task, label: int) -> torch.Tensor:
    """Scores ``[1, W]`` of a model that at each place gives 0.98 to the next token of one label's text and its end, and
    the rest to all others alike: summed here, without the engine."""
    text = (*task.spellings[label][0], *task.encoder.ends[0])

    def logprob(word: tuple[int, ...]) -> float:
        told = [0.98 if word[: i + 1] == text[: i + 1] else 0.02 / 319 for i in range(len(word))]
        return sum(map(math.log, told))

    return torch.tensor([[logprob(word) for word in task.words]])


LETTERS = st.text(alphabet="01aA+ _é好", min_size=1, max_size=4).map(str.strip).filter(bool)


@given(st.lists(LETTERS, min_size=2, max_size=12, unique=True))
@settings(max_examples=100, deadline=None)
def test_every_label_of_a_set_can_be_the_most_probable(labels: list[str]) -> None:
    task = words_of(tiny("llama"), labels)
    for number, label in enumerate(labels):
        found = task.label_logprobs(certain(task, number))[0]
        assert labels[int(found.argmax())] == label
        assert float(found.exp().sum()) == pytest.approx(1)


def test_a_label_that_begins_with_another_is_learned_by_either_loss(llama: FrozenLM) -> None:
    """The words of the input alone tell the labels apart."""
    rows = [Example({"input": text}, label) for text, label in (("great", "1"), ("bad", "10"))]
    dataset = Dataset(tuple(rows * 8), "", "")
    task = Task(llama, TEMPLATE, Verbalizer.from_labels(["1", "10"]), 8, 128)
    for loss in ("lm", "labels"):
        settings: dict[str, Any] = {
            "steps": 60,
            "eval_every": 20,
            "batch_size": 12,
            "schedule": "constant",
            "average": 0.0,
        }
        config = TrainConfig(num_virtual_tokens=8, loss=loss, lr=1.0, **settings)
        training = Training(task, dataset, dataset, config)
        for _ in training:
            pass
        found = training.result()
        assert found.word_end
        queries = [Query(Task.of(llama, found), row, found.vectors) for row in rows]
        assert [answer.text for answer in predict(queries)] == ["1", "10"], loss


def test_a_soft_prompt_of_an_earlier_release_answers_as_it_did_with_a_note(llama: FrozenLM, tmp_path: Path) -> None:
    made = SoftPrompt(
        vectors=torch.randn(5, 32, generator=torch.Generator().manual_seed(0)),
        name="old",
        base=llama.name,
        base_fingerprint=llama.fingerprint,
        tokenizer_fingerprint=llama.tokenizer_fingerprint,
        template=TEMPLATE.text,
        verbalizer={"1": ("1",), "10": ("10",), "2": ("2",)},
    )
    made.save(tmp_path / "old.safetensors")
    read = SoftPrompt.load(tmp_path / "old.safetensors")
    with pytest.warns(SoftPromptWarning, match=r"'10'.*begins with '1'.*train it again"):
        task = Task.of(llama, read)
    assert task.words == tuple(ids_of(llama, f" {label}") for label in ("1", "10", "2"))
    assert task.without_soft_prompt().words == task.words
    assert task.target_request(replace(EXAMPLE, target="2")).words == (ids_of(llama, " 2"),)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Task.of(llama, replace(read, verbalizer={"1": ("1",), "2": ("2",)}))
        Task.of(llama, replace(read, word_end=True))


def test_labels_are_refused_where_nothing_can_end_them() -> None:
    lm = copy.copy(tiny("llama"))
    lm.tokenizer = copy.deepcopy(lm.tokenizer)
    lm.tokenizer.eos_token = None
    assert words_of(lm, ["1", "10"]).words[0][-1:] == ids_of(lm, "\n")
    with pytest.raises(TemplateError, match=r"begins with '1'.*rename"):
        words_of(lm, ["1", "1\n"])


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
    found = validator(task, examples)(vectors)
    assert found["value"] == pytest.approx(right / 3)
    assert found["loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert [metric["metric"] for metric in found["metrics"]] == ["accuracy", "macro_f1", "mcc"]
    assert found["rows"]["loss"] == pytest.approx(losses, abs=1e-5)
    assert sum(found["rows"]["correct"]) == right
    assert found["score"] == pytest.approx(sum(math.exp(-loss) for loss in losses) / 3, rel=1e-5)
    assert found["metrics"][0]["n"] == 3
    assert found["metrics"][0]["stderr"] is not None


def test_validation_of_free_text_by_the_loss_of_a_token(llama: FrozenLM) -> None:
    task, vectors = bound(llama, None), 0.1 * torch.ones(5, 32)
    examples = [Example({"input": "a film"}, "great"), Example({"input": "dull"}, "a badly written mess")]
    requests = [task.target_request(example) for example in examples]
    scores = [float(plain_score("llama", r.ids, r.words[0], vectors)) for r in requests]
    loss = -sum(scores) / sum(len(r.words[0]) for r in requests)
    found = validator(task, examples)(vectors)
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["value"] == found["score"] == -found["loss"]
    assert sum(found["rows"]["loss"]) / 2 == pytest.approx(loss, rel=1e-5)
    assert found["metrics"][0]["metric"] == "perplexity"
    assert found["metrics"][0]["value"] == pytest.approx(math.exp(loss), rel=1e-4)


def test_validation_survives_vectors_that_are_not_finite(llama: FrozenLM) -> None:
    vectors = torch.full((5, 32), math.nan)
    for verbalizer in (LABELS, None):
        found = validator(bound(llama, verbalizer), [EXAMPLE])(vectors)
        assert math.isnan(found["loss"])


# --- tokens without an embedding ------------------------------------------------------------------------------


def refused(error: BaseException, token: str, number: int) -> bool:
    """Whether the sentence names the token and what to do."""
    found, remedy = f"found {token!r}, number {number} of its tokenizer", "resize the table"
    return found in str(error) and "has 320 rows" in str(error) and remedy in str(error)


def test_a_token_that_the_embedding_table_lacks_is_refused_at_its_row(gained: FrozenLM) -> None:
    free, task = bound(gained, None), bound(gained)
    assert free.target_request(EXAMPLE).ids == bound(tiny("llama"), None).target_request(EXAMPLE).ids
    row = Example({"input": "it is worse than that"}, "bad", where="toy.jsonl:7")
    target = Example({"input": "a film"}, "the worse", where="toy.jsonl:7")
    asked: list[Callable[[], object]] = [
        lambda: task.label_request(row),
        lambda: free.open_request(row, 3),
        lambda: free.target_request(target),
    ]
    for ask in asked:
        with pytest.raises(DataError) as error:
            ask()
        assert str(error.value).startswith("toy.jsonl:7: expected tokens that the base model gained knows")
        assert refused(error.value, "worse", 320)


def test_a_special_token_that_the_embedding_table_lacks(gained: FrozenLM) -> None:
    plain = Example({"input": "<turn>"}, "bad", where="toy.jsonl:1")  # in data it is plain text
    assert max(bound(gained).label_request(plain).ids) < 320
    task = Task(gained, Template("<turn>{soft_prompt}{input}{target}"), None, 5, 128)
    with pytest.raises(DataError) as error:
        task.open_request(EXAMPLE, 3)
    assert refused(error.value, "<turn>", 321)


def test_a_labels_word_that_the_embedding_table_lacks(gained: FrozenLM) -> None:
    with pytest.raises(DataError) as error:
        bound(gained, Verbalizer({"good": ("good",), "bad": ("much worse",)}))
    assert refused(error.value, "worse", 320)


def test_a_text_to_start_from_that_the_embedding_table_lacks(gained: FrozenLM) -> None:
    with pytest.raises(DataError) as error:
        initial_vectors(gained, 4, init="text", seed=0, text="it is worse")
    assert refused(error.value, "worse", 320)


def test_a_padded_embedding_table_is_no_mistake() -> None:
    model = make_model("llama")
    model.resize_token_embeddings(384)
    padded = FrozenLM(model, make_tokenizer(), name="padded", dtype="fp32", device="cpu")
    assert bound(padded).label_request(EXAMPLE).ids == bound(tiny("llama")).label_request(EXAMPLE).ids
