"""Maps between embedding spaces against rotations and combinations that are known."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from softprompt.errors import BaseModelError, ConfigError
from softprompt.exchange.recycling import COMBINED, carried, common_tokens, recycle
from softprompt.model.frozen import FrozenLM
from softprompt.tasks.task import Task
from softprompt.tuning.training import Training
from tests.conftest import Run, make_model, make_tokenizer, tiny, toy, toy_task, train_settings
from tests.servers import soft_prompt


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_least_squares_finds_a_rotation() -> None:
    """And so takes vectors that are no embeddings to where the rotation does."""
    rotation = torch.linalg.qr(noise(24, 24))[0]
    ours, vectors = noise(200, 24, seed=1), 5 * noise(7, 24, seed=2)
    assert torch.allclose(carried(vectors, ours, ours @ rotation, "least-squares"), vectors @ rotation, atol=0.15)
    direction = torch.cosine_similarity(carried(vectors, ours, ours @ rotation, "least-squares"), vectors @ rotation)
    assert direction.min() > 1 - 1e-5


def test_least_squares_goes_to_another_width() -> None:
    """Against the normal equations."""
    ours, theirs, vectors = noise(300, 16, seed=3), noise(300, 40, seed=4), noise(5, 16, seed=5)
    found = carried(vectors, ours, theirs, "least-squares")
    wanted = vectors @ torch.linalg.solve(ours.T @ ours, ours.T @ theirs)
    assert found.shape == (5, 40)
    assert torch.cosine_similarity(found, wanted).min() > 1 - 1e-4


def test_the_nearest_tokens_are_averaged() -> None:
    """Five tokens lie around one direction; all others are orthogonal to it."""
    ours, theirs = noise(60, 32, seed=6), noise(60, 20, seed=7)
    direction = torch.nn.functional.normalize(noise(32, seed=8), dim=0)
    ours -= ours @ direction[:, None] * direction
    ours[10:15] = direction + 0.01 * ours[10:15]
    found = carried(3 * direction[None], ours, theirs, "nearest")[0]
    assert torch.cosine_similarity(found, theirs[10:15].mean(dim=0), dim=0) > 1 - 1e-5


def test_a_combination_keeps_its_weights() -> None:
    """Of tokens that are independent, a sum of three is rebuilt by these three."""
    ours, theirs = torch.eye(COMBINED + 20), noise(COMBINED + 20, 30, seed=9)
    vector = 2 * ours[3] + ours[5] - 0.5 * ours[9]
    found = carried(vector[None], ours, theirs, "combination")[0]
    # the one with a negative weight is not among the nearest
    assert torch.cosine_similarity(found, 2 * theirs[3] + theirs[5], dim=0) > 1 - 1e-4


@pytest.mark.parametrize("method", ["least-squares", "nearest", "combination"])
def test_a_virtual_token_keeps_its_length_in_mean_embeddings(method: str) -> None:
    ours, theirs = noise(200, 24, seed=1), 3 * noise(200, 30, seed=2)
    vectors = noise(4, 24, seed=3) * torch.tensor([[1.0], [2.0], [5.0], [20.0]])
    found = carried(vectors, ours, theirs, method)
    ratio = found.norm(dim=1) / theirs.norm(dim=1).mean()
    assert torch.allclose(ratio, vectors.norm(dim=1) / ours.norm(dim=1).mean(), rtol=1e-4)


class Other:
    """What ``common_tokens`` asks of a base model."""

    def __init__(self, vocabulary: dict[str, int], rows: int) -> None:
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        fast: Any = PreTrainedTokenizerFast
        self.tokenizer = fast(tokenizer_object=tokenizer, unk_token="<unk>")
        self.embedding = torch.zeros(rows, 2)


def test_tokens_are_common_by_text_whatever_spells_a_blank() -> None:
    """Special tokens and those beyond the embedding table are none."""
    one = Other({"<unk>": 0, "Ġfilm": 1, "film": 2, "Ġa": 3, "Ċ": 4}, 5)
    other = Other({"<unk>": 0, "film": 1, "▁a": 2, "▁film": 3, "x": 4, "\n": 9}, 5)
    assert common_tokens(one, other) == [(1, 3), (2, 1), (3, 2)]  # type: ignore[arg-type]


def test_a_recycled_soft_prompt_is_of_the_other_base_model(llama: FrozenLM) -> None:
    other = tiny("gpt2")
    labels = {"good": ("great",), "bad": ("bad",)}
    one = soft_prompt(llama, "films", "{soft_prompt}{input} {target}", labels, length=6, seed=1)
    found = recycle(llama, other, one, name="films-2")
    assert Task.of(other, found).labels == ("good", "bad")
    with pytest.raises(BaseModelError, match="'films-2'"):
        Task.of(llama, found)
    assert found.vectors.shape == (6, other.hidden_size)
    assert found.metrics == ()  # those were of the old base model
    assert found.training["recycled_from"]["name"] == "films"
    assert found.training["common_tokens"] == 318  # of 320, two are special


def test_a_recycled_soft_prompt_names_the_precision_of_its_new_base_model(llama: FrozenLM) -> None:
    """And is used on it without a warning of another one."""
    one = soft_prompt(llama, "films", "{soft_prompt}{input}{target}", length=6, seed=1)
    other = FrozenLM(make_model("gpt2"), make_tokenizer(), name="gpt2-int8", dtype="fp32", quantize="int8")
    found = recycle(llama, other, one, name="films-2")
    assert found.quantized == "int8"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Task.of(other, found)


def test_what_cannot_be_recycled_is_refused(llama: FrozenLM) -> None:
    one = soft_prompt(llama, "films", "{soft_prompt}{input} {target}", length=6, seed=1)
    other = tiny("gpt2")
    for arguments, words in (
        ((llama, llama, one, "nearest"), "already"),
        ((llama, other, one, "guess"), "'guess'"),
        (
            (llama, other, replace(one, parametrisation="prefix", vectors=torch.ones(2, 3, 2, 2, 8)), "nearest"),
            "KV prefix",
        ),
    ):
        with pytest.raises(ConfigError, match=words):
            recycle(*arguments[:3], name="x", method=arguments[3])
    with pytest.raises(BaseModelError):
        recycle(other, llama, one, name="x")
    assert Training(
        toy_task(other, toy(20, 1)),
        toy(20, 1),
        None,
        train_settings(),
        start=recycle(llama, other, one, name="x").vectors,
    )


def test_the_command_measures_what_it_made(train: Run, run: Run, tmp_path: Path) -> None:
    other = tmp_path / "other"
    make_model("gpt2").save_pretrained(other)
    make_tokenizer().save_pretrained(other)
    assert train("train.jsonl", "--name", "films", "--num-virtual-tokens", "4").code == 0
    common = ("recycle", "films", "--base", str(other), "--dtype", "fp32")
    found = run(*common, "--name", "films-2", "--test", "test.jsonl", "--json").json
    measured = found["measured"]
    assert set(measured) == {"recycled", "the default start, untrained", "without a soft prompt"}
    for key, options in (("recycled", ()), ("without a soft prompt", ("--base-only",))):
        again = run("evaluate", "films-2", "test.jsonl", "--dtype", "fp32", "--json", *options).json
        assert again["value"] == measured[key]["value"]
    assert "films-2" in run(*common, "--name", "films-2").err  # taken
    plain = run(*common, "--name", "films-3", "--method", "nearest")
    assert plain.code == 0
    assert "not measured" in plain.err
