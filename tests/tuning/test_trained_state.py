"""Trained states as soft prompts: they learn, go on after a kill, lie in files, are used, or are refused with a reason.

What their numbers mean is compared with transformers in ``tests/model/test_trained.py``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from softprompt.data.example import Dataset, Example
from softprompt.errors import ArtifactError, BaseModelError, ConfigError
from softprompt.evaluation.evaluate import evaluate
from softprompt.evaluation.lm_eval import SoftPromptLM
from softprompt.exchange.embedded import embedded
from softprompt.exchange.exporting import export
from softprompt.exchange.recycling import recycle
from softprompt.inspection.report import require_vectors
from softprompt.model.embedder import tokens_of
from softprompt.model.request import Sampling
from softprompt.soft_prompts.artifact import read_header
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tasks.predict import Query, predict
from softprompt.tasks.task import Task
from softprompt.text.template import Template
from softprompt.text.tokens import SOFT
from softprompt.tuning.many import train_together
from softprompt.tuning.training import Training
from tests.conftest import Ran, Run, make_tokenizer, tiny, toy, toy_task, train_settings
from tests.model.families import BY_LAYER, frozen, make_model, whole_score

KINDS = ("qwen3_5_text", "mamba2", "lfm2", "gemma4_text-by_layer", "gemma3n_text", "deepseek_v3")
"""Gated delta layers and attention; Mamba 2 without attention; short convolutions and attention; keys and values of two
sizes, and layers that read those of others; such layers alone; latents."""

SEVERAL: dict[str, Any] = {"optimizer": "adafactor", "starts": 2, "average": 0.5}


def made(case: str, **options: Any) -> Training:
    data = toy(40, 0)
    config = train_settings(parametrisation="prefix", **options)
    return Training(toy_task(frozen(case), data), data, toy(20, 1), config, name="films")


def trained(case: str) -> SoftPrompt:
    training = made(case, steps=4, eval_every=2)
    list(training)
    return training.result()


@pytest.mark.parametrize("case", KINDS)
def test_before_training_a_state_is_the_plain_soft_prompt(case: str) -> None:
    """Where layers get more of a token than its vector, a soft prompt that is of no tokens."""
    lm, data, init = frozen(case), toy(6, 0), "labels" if case in BY_LAYER else "vocab"
    task = toy_task(lm, data)
    both = [
        Training(task, data, data, train_settings(init=init, init_scale=1.0, parametrisation=kind)).vectors
        for kind in ("plain", "prefix")
    ]
    requests = [task.label_request(example) for example in data.examples]
    plain, state = (lm.score(requests, [vectors]) for vectors in both)
    torch.testing.assert_close(state, plain, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("case", ["gemma4_text-by_layer", "gemma3n_text", "gemma4_text"])
@pytest.mark.parametrize("template", ["{soft_prompt}{input} {target}", "Read: {soft_prompt}{input} {target}"])
def test_a_state_that_starts_from_a_text_is_that_text(case: str, template: str) -> None:
    """A plain soft prompt is not, where layers get more of a token than its vector."""
    lm, data = frozen(case), toy(6, 0)
    task = replace(toy_task(lm, data), template=Template(template))
    text = " a great film of the year"
    tokens = tokens_of(lm, text)
    settings = train_settings(init="text", init_text=text, parametrisation="prefix", num_virtual_tokens=len(tokens))
    state = Training(replace(task, num_virtual_tokens=len(tokens)), data, data, settings).vectors
    for example in data.examples:
        request = task.label_request(example)
        place = request.ids.index(SOFT)
        read = replace(request, ids=(*request.ids[:place], *tokens, *request.ids[place + 1 :]), prompt=None)
        expected = torch.tensor([[whole_score(case, read, word, None) for word in request.words]])
        torch.testing.assert_close(lm.score([request], [state]), expected, rtol=1e-5, atol=2e-5)


def words(count: int) -> Dataset:
    """Rows of one word each, which decides the label."""
    known = {"great": "positive", "good": "positive", "fine": "positive"} | dict.fromkeys(
        ("bad", "poor", "dull"), "negative"
    )
    rows = tuple(Example({"input": word}, target, where="words") for word, target in known.items())
    return Dataset((rows * count)[:count], "words.jsonl", f"words-{count}")


@pytest.mark.parametrize("case", KINDS)
def test_a_state_learns_and_changes_no_weight(case: str) -> None:
    lm, validation = frozen(case), words(12)
    before = lm.weights_digest()
    settings: dict[str, Any] = {"batch_size": 12, "steps": 60, "eval_every": 30, "loss": "labels"}
    config = train_settings(parametrisation="prefix", **settings)
    training = Training(toy_task(lm, words(48)), words(48), validation, config)
    steps = list(training)
    assert steps[-1].loss < 0.3 * steps[0].loss
    found = training.result()
    assert found.metrics[0]["value"] == 1.0
    assert lm.weights_digest() == before
    assert evaluate(Task.of(lm, found), found.vectors, validation).headline.value == 1.0


@pytest.mark.parametrize(
    ("case", "options"), [*((case, {}) for case in KINDS), *((case, SEVERAL) for case in KINDS[:4])], ids=str
)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(case: str, options: dict[str, Any], tmp_path: Path) -> None:
    data, lm = toy(12, 0), frozen(case)

    def training(folder: Path) -> Training:
        settings: dict[str, Any] = {"steps": 20, "eval_every": 10, "checkpoint_every": 3, **options}
        config = train_settings(parametrisation="prefix", **settings)
        return Training(toy_task(lm, data), data, data, config, folder=folder, resume=True)

    whole, stopped = training(tmp_path / "whole"), training(tmp_path / "stopped")
    losses = [step.loss for step in whole]
    next(step for step in stopped if step.number == 12)
    again = training(tmp_path / "stopped")
    assert again.step == 12
    assert [step.loss for step in again] == losses[12:]
    assert torch.equal(again.result().vectors, whole.result().vectors)


@pytest.mark.parametrize("case", ["qwen3_5_text", "gemma4_text-by_layer", "deepseek_v3"])
def test_states_trained_together_are_those_trained_alone(case: str) -> None:
    options: tuple[dict[str, Any], ...] = ({"seed": 1}, {"seed": 2, "lr": 0.2})
    alone = [made(case, steps=3, **each) for each in options]
    together = [made(case, steps=3, **each) for each in options]
    for each in alone:
        list(each)
    list(train_together(together))
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one.result().vectors, other.result().vectors, rtol=1e-4, atol=1e-5)


# --- what it is ------------------------------------------------------------------------------------------------------


def test_places_are_counted_where_there_is_attention() -> None:
    hybrid, pure = trained("qwen3_5_text"), trained("mamba2")
    attention, state, window = 6 * 2 * 2 * 8, 4 * 8 * 8, 64 * 3
    assert hybrid.training["trainable_parameters"] == hybrid.vectors.numel() == attention + state + window
    assert pure.training["trainable_parameters"] == pure.vectors.numel() == 2 * (4 * 16 * 8 + 3 * 80)
    assert (hybrid.num_virtual_tokens, pure.num_virtual_tokens) == (6, 0)
    assert pure.training["num_virtual_tokens"] == 6  # that the start has read
    assert hybrid.extent == "a trained state of 640 numbers, 6 virtual tokens where there is attention"
    assert "mamba2: " not in repr(pure)
    assert "a trained state of 1,504 numbers on tiny-mamba2" in repr(pure)
    task = Task.of(frozen("mamba2"), pure)
    assert (task.num_virtual_tokens, task.template.has_soft_prompt) == (0, True)


@pytest.mark.parametrize("case", KINDS)
def test_a_file_holds_each_layers_tensors_by_name(case: str, tmp_path: Path) -> None:
    one, path = replace(trained(case), word_end=True), tmp_path / "films.safetensors"
    one.save(path)
    tensors = load_file(path)
    assert {name: tensor.shape for name, tensor in tensors.items()} == frozen(case).trained.shapes(6)
    found = np.concatenate([tensors[name].reshape(-1) for name in one.parts])
    assert np.array_equal(found, one.vectors.numpy())
    again = SoftPrompt.load(path)
    assert torch.equal(again.vectors, one.vectors)
    assert again.encoded() == path.read_bytes()
    assert (again.parts, again.word_end, again.kind) == (one.parts, True, "trained state")
    header = read_header(path)
    assert header.num_virtual_tokens == one.num_virtual_tokens
    assert header.sizes == {"num_virtual_tokens": one.num_virtual_tokens}


def test_numbers_that_are_not_those_of_the_parts_are_not_saved(tmp_path: Path) -> None:
    one = trained("lfm2")
    for wrong in (one.vectors[:-1], one.vectors[None], one.vectors.double()):
        with pytest.raises(ArtifactError, match=r"'films' should be float32 \[\d+\], the numbers of its parts"):
            replace(one, vectors=wrong).save(tmp_path / "x.safetensors")
    with pytest.raises(ArtifactError, match=r"a field without a JSON form .*other tensors under 'parts'"):
        replace(one, parts={"model.embed_tokens": tuple(one.vectors.shape)}).save(tmp_path / "x.safetensors")


# --- how it is used ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", KINDS)
def test_states_vectors_and_neither_answer_in_one_batch(case: str) -> None:
    lm, first, second = frozen(case), trained(case), made(case, seed=5).vectors
    task = Task.of(lm, first)
    free = replace(task, verbalizer=None)
    plain = replace(task, num_virtual_tokens=3), 0.15 * torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    queries = []
    for text in ("1 great", "a bad film of two hours"):
        example = Example({"input": text}, None)
        queries += [Query(one, example, numbers) for one in (task, free) for numbers in (first.vectors, second)]
        queries += [Query(plain[0], example, plain[1]), Query(free.without_soft_prompt(), example)]
    sampling = Sampling(max_new_tokens=5)
    for query, answer in zip(queries, predict(queries, sampling=sampling), strict=True):
        (alone,) = predict([query], sampling=sampling)
        assert alone.text == answer.text
        if alone.logprobs is not None:
            assert dict(answer.logprobs or {}) == pytest.approx(dict(alone.logprobs), abs=1e-4)
    with pytest.raises(ConfigError, match=r"needs a soft prompt of shape \[\d+\]"):
        Query(task, Example({"input": "a"}, None), first.vectors[:-1])


def test_the_harness_model_counts_places_not_numbers() -> None:
    for case, places in (("qwen3_5_text", 6), ("mamba2", 0)):
        found = SoftPromptLM(frozen(case), trained(case))
        assert found.num_virtual_tokens == places
        assert found.max_length == frozen(case).window - places


@pytest.mark.parametrize("case", ["qwen3_5_text", "mamba2", "gemma4_text-by_layer"])
def test_a_training_goes_on_from_a_state(case: str) -> None:
    one, data = trained(case), toy(12, 0)
    task, config = toy_task(frozen(case), data), train_settings(parametrisation="prefix")
    training = Training(task, data, data, config, start=one.vectors)
    torch.testing.assert_close(training.vectors, one.vectors)
    with pytest.raises(ConfigError, match="is a trained state, which only the parametrisation prefix can go on from"):
        Training(task, data, data, train_settings(), start=one.vectors)
    with pytest.raises(ConfigError, match="has shape"):
        Training(task, data, data, config, start=one.vectors[1:])


# --- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["qwen3_5_text", "gemma4_text", "deepseek_v3"])
def test_what_has_no_form_for_a_state_says_so(case: str, tmp_path: Path) -> None:
    lm, one = frozen(case), trained(case)
    for to in ("peft", "prefix-tuning", "cartridge", "prompt-tuning", "npy", "safetensors", "vllm"):
        with pytest.raises(ConfigError, match="found a trained state in 'films', for which other tools have no format"):
            export(lm, one, to, tmp_path / to)
    with pytest.raises(ConfigError, match="found a trained state, which no embeddings of an input stand for; answer"):
        embedded(lm, one, [Example({"input": "a"}, None)])
    with pytest.raises(ConfigError, match="'films' is a trained state, which cannot be carried over to another"):
        recycle(lm, tiny("llama"), one, name="other")
    with pytest.raises(ConfigError, match="'films' is a trained state, which has none; inspect one of another"):
        require_vectors(one)


def test_another_base_model_and_another_layout_are_refused() -> None:
    one = trained("lfm2")
    with pytest.raises(BaseModelError, match="was tuned on the base model 'tiny-lfm2'"):
        Task.of(frozen("qwen3_5_text"), one)
    parts = dict(one.parts)
    parts["layers.0.window"] = (16, 4)
    with pytest.raises(BaseModelError, match=r"Expected \[32, 2\] as layers.0.window .* found \[16, 4\]"):
        Task.of(frozen("lfm2"), replace(one, parts=parts))


def test_the_document_says_what_the_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "films.safetensors"
    trained("mamba2").save(path)
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    document = json.loads(header["__metadata__"]["softprompt"])
    assert (document["schema_version"], document["num_virtual_tokens"], document["word_end"]) == (3, 0, False)
    assert document["parts"][0] == ["layers.0.state", [4, 16, 8]]
    assert "hidden_size" not in document


@pytest.mark.parametrize(("case", "places"), [("qwen3_5_text", 4), ("mamba2", 0), ("gemma3n_text", 4)])
def test_a_trained_state_on_the_command_line(case: str, places: int, run: Run, home: Path, tmp_path: Path) -> None:
    folder = tmp_path / case
    make_model(case).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    rows = [{"input": one.fields["input"], "target": one.target} for one in words(48).examples]
    Path("words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    quick = ("--base", str(folder), "--parametrisation", "prefix", "--dtype", "fp32", "--eval-every", "4")

    def train(name: str, *options: str) -> Ran:
        return run("train", "words.jsonl", "--name", name, *quick, *options)

    first = train("films", "--num-virtual-tokens", "4", "--steps", "8", "--json")
    assert first.code == 0, first.err
    numbers = frozen(case).trained.shape(4)[0]
    assert (first.json["num_virtual_tokens"], first.json["numbers"]) == (places, numbers)
    shown = run("show", "films", "--json").json
    assert shown["num_virtual_tokens"] == places
    assert {name: tuple(shape) for name, shape in shown["parts"].items()} == frozen(case).trained.shapes(4)
    assert [one["num_virtual_tokens"] for one in run("list", "--json").json["soft_prompts"]] == [places]
    evaluated = run("evaluate", "films", "words.jsonl", "--dtype", "fp32", "--json").json
    predicted = run("predict", "films", "--file", "words.jsonl", "--dtype", "fp32", "--json").json["predictions"]
    right = sum(one["text"] == row.target for one, row in zip(predicted, words(48).examples, strict=True))
    assert evaluated["value"] == right / 48

    again = train("more", "--init", "films", "--steps", "4")
    assert again.code == 0, again.err
    assert f"a trained state of {numbers:,} numbers" in again.out
    assert (
        "a trained state, which only the parametrisation prefix"
        in train("x", "--init", "films", "--parametrisation", "plain").err
    )
    for command, said in (
        (("inspect", "films"), "is a trained state, which has none"),
        (("export", "films", "out", "--to", "peft"), "found a trained state in 'films', for which other tools have no"),
    ):
        refused = run(*command)
        assert (refused.code, refused.out) == (2, "")
        assert said in refused.err
    assert run("inspect", "--json").json["soft_prompts"][0]["norm"] is None
