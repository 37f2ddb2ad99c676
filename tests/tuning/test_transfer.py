"""The choice of a start against trainings alone from each of the candidates."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from softprompt.data.example import Dataset
from softprompt.errors import ConfigError, DataError
from softprompt.evaluation.validation import validator
from softprompt.model.frozen import FrozenLM
from softprompt.tuning.training import Training
from softprompt.tuning.transfer import DEFAULT_START, find_start
from tests.conftest import Run, toy, toy_task, train_settings
from tests.servers import soft_prompt

FORM = "{soft_prompt}{input} {target}"


def part(rows: Dataset, first: int) -> Dataset:
    return replace(rows, examples=rows.examples[first::2])


def test_the_trial_is_that_of_trainings_alone(llama: FrozenLM) -> None:
    """Same steps, rows and seed; the choice is by the even validation rows, values and gains are of the odd ones."""
    rows, held_out = toy(40, 1), toy(24, 2)
    task, config = toy_task(llama, rows), train_settings(seed=3)
    sources = {name: soft_prompt(llama, name, FORM, length=6, seed=seed) for name, seed in (("a", 1), ("b", 2))}
    found = find_start(task, rows, held_out, config, sources, steps=6)
    assert found.rows == 12
    scores, values, vectors = {}, {}, {}
    for name, start in ((DEFAULT_START, None), *((name, one.vectors) for name, one in sources.items())):
        short = replace(config, steps=6, eval_every=6)
        alone = Training(task, rows, part(held_out, 0), short, start=start)
        list(alone)
        vectors[name] = alone.result().vectors
        scores[name] = validator(task, part(held_out, 0).examples)(vectors[name])["score"]
        values[name] = validator(task, part(held_out, 1).examples)(vectors[name])["value"]
    assert [one.name for one in found.candidates] == sorted(scores, key=lambda name: -scores[name])
    for one in found.candidates:
        assert one.score == pytest.approx(scores[one.name], abs=1e-4)
        assert one.value == pytest.approx(values[one.name], abs=1e-6)
        if one.name == DEFAULT_START:
            assert (one.gain, one.similarity) == (None, None)
            continue
        assert one.gain is not None
        assert one.gain[0] == pytest.approx(values[one.name] - values[DEFAULT_START], abs=1e-6)
        assert one.gain[1] <= one.gain[0] <= one.gain[2]
        means = [each.mean(dim=0) for each in (sources[one.name].vectors, vectors[DEFAULT_START])]
        assert one.similarity == pytest.approx(float(torch.cosine_similarity(*means, dim=0)), abs=1e-4)


def test_a_source_that_knows_the_task_is_chosen(llama: FrozenLM) -> None:
    rows = toy(60, 1)
    task = toy_task(llama, rows)
    taught = Training(task, rows, toy(20, 3), train_settings(steps=60, eval_every=60, batch_size=16))
    list(taught)
    sources = {"taught": taught.result(), "noise": soft_prompt(llama, "noise", FORM, length=6, seed=9)}
    found = find_start(task, rows, toy(40, 2), train_settings(seed=5, lr=0.03), sources, steps=3)
    assert found.candidates[0].name == "taught"
    assert found.start is sources["taught"]


def test_what_makes_no_trial_is_refused(llama: FrozenLM) -> None:
    rows = toy(20, 1)
    task, one = toy_task(llama, rows), soft_prompt(llama, "a", FORM, length=6)
    with pytest.raises(DataError, match="at least 4 validation rows"):
        find_start(task, rows, toy(3, 2), train_settings(), {"a": one}, steps=2)
    short = soft_prompt(llama, "short", FORM, length=4)
    with pytest.raises(ConfigError, match="num_virtual_tokens"):
        find_start(task, rows, toy(8, 2), train_settings(), {"short": short}, steps=2)


def test_the_command_goes_on_as_train_with_that_init(train: Run, run: Run, base: str) -> None:
    for seed, length in (("1", "4"), ("2", "4"), ("3", "6")):
        assert train("train.jsonl", "--name", f"s{seed}", "--seed", seed, "--num-virtual-tokens", length).code == 0
    quick = ("--base", base, "--dtype", "fp32", "--device", "cpu", "--steps", "4", "--eval-every", "4")
    ran = run(
        "transfer", "train.jsonl", "--validation", "test.jsonl", "--name", "new", "--trial-steps", "2", *quick, "--json"
    )
    found = ran.json["transfer"]
    assert {one["name"] for one in found["candidates"]} == {DEFAULT_START, "s1", "s2"}
    assert "s3" in ran.err  # of another length
    assert found["start"] == found["candidates"][0]["name"]
    init = ("--num-virtual-tokens", "4") if found["start"] == DEFAULT_START else ("--init", found["start"])
    run("train", "train.jsonl", "--validation", "test.jsonl", "--name", "same", *init, *quick)
    shown = [run("show", name, "--json").json for name in ("new", "same")]
    assert shown[0]["metrics"] == shown[1]["metrics"]
    assert shown[0]["training"]["loss"] == pytest.approx(shown[1]["training"]["loss"], abs=1e-6)

    for options, words in (
        (("--sources", "s1", "s3"), "'s3'"),
        (("--init", "s1"), "--init s1"),
        (("--starts", "2"), "--starts"),
        (("--num-virtual-tokens", "9"), "of 9 virtual tokens"),
    ):
        refused = run("transfer", "train.jsonl", "--name", "none", *quick, *options)
        assert refused.code == 2
        assert words in refused.err
