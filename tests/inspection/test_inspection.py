"""Views without a forward pass: planted words are read back, random vectors are not, and numbers are plain numpy's."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from softprompt.inspection import nearest
from softprompt.inspection.nearest import neighbours, words
from softprompt.inspection.plane import plane
from softprompt.inspection.start import norms, starting_vectors
from softprompt.inspection.statistics import adjusted, plain, tail
from softprompt.inspection.vocabulary import Vocabulary
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tasks.task import Task
from softprompt.tuning.start import initial_vectors
from softprompt.tuning.training import Training
from tests.conftest import TOY_LABELS, TOY_TEMPLATE, tiny, toy, toy_task, train_settings
from tests.inspection.test_vocabulary import H, V, make_table, make_vectors


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(make_table(), lambda token: f"<{token}>")


def planted(vocabulary: Vocabulary, tokens: list[int], noise: float, seed: int = 3) -> torch.Tensor:
    """Embeddings plus noise, stretched to three times their length, as training leaves virtual tokens."""
    clean = vocabulary[tokens]
    return 3 * (clean + noise * torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed)))


# --- p-values ------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_adjusted_p_values_by_their_definition(p: list[float]) -> None:
    """Of every p-value, the least ``p_(j) m / j`` among those from its own place on."""
    ordered = sorted(p)
    rates = [each * len(p) / place for place, each in enumerate(ordered, start=1)]
    expected = [min(1.0, *rates[ordered.index(each) :]) for each in p]
    np.testing.assert_allclose(adjusted(p), expected, atol=1e-12)


def test_adjusted_p_values_of_the_paper() -> None:
    """Benjamini and Hochberg (1995), section 3.2: of 15, the four smallest count at a rate of 5 %."""
    p = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344]
    p += [0.0459, 0.3240, 0.4262, 0.5719, 0.6528, 0.7590, 1.0000]
    assert [q <= 0.05 for q in adjusted(p)] == [True] * 4 + [False] * 11
    assert adjusted([]) == []


@given(st.floats(-30, 30))
def test_the_tail_is_that_of_the_normal_distribution(deviations: float) -> None:
    assert tail(deviations) == pytest.approx(stats.norm.sf(deviations), rel=1e-9, abs=1e-300)


def test_plain_values_have_a_json_form() -> None:
    value = plain({"a": (1.0, math.nan, math.inf), 2: [nearest.Near(1, "x", 0.5), None, True, "y"]})
    assert json.loads(json.dumps(value, allow_nan=False)) == {
        "a": [1.0, None, None],
        "2": [{"token": 1, "text": "x", "value": 0.5}, None, True, "y"],
    }


# --- nearest tokens ------------------------------------------------------------------------------


def test_planted_words_are_read_back(vocabulary: Vocabulary) -> None:
    tokens = [7, 100, 7, 333]
    (found,) = neighbours(vocabulary, planted(vocabulary, tokens, 0.3), draws=400)
    assert [reading.cosine[0].token for reading in found.readings] == tokens
    assert [reading.stands_out.token for reading in found.readings] == tokens
    assert [reading.cosine[0].text for reading in found.readings] == ["<7>", "<100>", "<7>", "<333>"]
    assert found.significant == 4
    assert all(reading.p == pytest.approx(1 / 401) for reading in found.readings)
    assert (0, 2) in found.groups
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["significant"] == 4


def test_figures_are_those_of_plain_arithmetic(vocabulary: Vocabulary) -> None:
    vectors = make_vectors(3)
    (found,) = neighbours(vocabulary, vectors, k=4, draws=50, seed=9)
    values = vocabulary.nearest(vectors, 4)
    for i, reading in enumerate(found.readings):
        for name in ("cosine", "euclidean", "dot"):
            listed = getattr(reading, name)
            assert [near.token for near in listed] == values[name][1][i].tolist()
            assert [near.value for near in listed] == values[name][0][i].tolist()
        cosines = np.corrcoef(vocabulary[[near.token for near in reading.cosine]].numpy())  # shape only
        assert cosines.shape == (4, 4)
        units = torch.nn.functional.normalize(vocabulary[[near.token for near in reading.cosine]], dim=1)
        pairs = [float(units[a] @ units[b]) for a in range(4) for b in range(4) if a != b]
        assert reading.tightness == pytest.approx(np.mean(pairs), abs=1e-5)
    drawn = vocabulary.random_like(vectors, 50, 9)
    best = vocabulary.best(drawn)
    assert found.readings[1].random["cosine"] == pytest.approx(float(best["cosine"][1::3].median()))
    assert found.random_excess == pytest.approx(float(best["excess"].quantile(0.95)))
    reached = int((best["excess"] >= values["excess"][0][2, 0]).sum())
    assert found.readings[2].p == pytest.approx((1 + reached) / 51)
    assert [reading.q for reading in found.readings] == pytest.approx(
        list(stats.false_discovery_control([reading.p for reading in found.readings]))
    )


def test_sets_are_adjusted_on_their_own(vocabulary: Vocabulary) -> None:
    words_in, noise = planted(vocabulary, [1, 2], 0.2), make_vectors(6, 8)
    first, second = neighbours(vocabulary, words_in, noise, draws=200)
    assert (len(first.readings), len(second.readings)) == (2, 6)
    assert first.significant == 2
    for found in (first, second):
        p = [reading.p for reading in found.readings]
        assert [reading.q for reading in found.readings] == pytest.approx(list(stats.false_discovery_control(p)))


def meaningless(kind: str, count: int, vocabulary: Vocabulary, seed: int) -> torch.Tensor:
    """Vectors that hold no token: noise, noise with the share of the mean that all tokens have, a random direction in
    the table's own distribution."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, H, generator=generator)
    table = vocabulary.table.float()
    if kind == "noise":
        return noise
    if kind == "mean and noise":
        return 2 * table.mean(dim=0) + noise
    centred = table - table.mean(dim=0)
    root: torch.Tensor = torch.linalg.cholesky(centred.T @ centred / V)
    return table.mean(dim=0) + noise @ root.T


@pytest.mark.parametrize(
    ("kind", "single", "any_of_four"),
    [("noise", 0.09, 0.12), ("mean and noise", 0.09, 0.12), ("as the table", 0.12, 0.15)],
)
def test_false_alarms_keep_to_the_stated_level(
    kind: str, single: float, any_of_four: float, vocabulary: Vocabulary
) -> None:
    """600 vectors, and 150 soft prompts of four with the false discovery rate of 5 %.

    Tolerances: single vectors at most 9 %, soft prompts with any false alarm at most 12 %: over 4 and 3.9 standard
    errors (0.9 and 1.8 points), so that a false failure has a chance below 1 in 5,000. Vectors that are distributed
    exactly as the table get 3 points more: the null takes the spectrum within a group of axes as flat.
    """
    vectors = meaningless(kind, 600, vocabulary, seed=11)
    (found,) = neighbours(vocabulary, vectors, draws=1000)
    p = np.array([reading.p for reading in found.readings])
    assert 0.01 < (p <= 0.05).mean() < single
    alarms = [min(adjusted(list(four))) <= 0.05 for four in p.reshape(150, 4)]
    assert 0 < np.mean(alarms) < any_of_four


def test_a_plain_random_direction_would_be_beaten_by_the_mean_alone(vocabulary: Vocabulary) -> None:
    """Why the null keeps the profile: noise with the tokens' common mean has far higher cosines than random directions,
    although it holds no token."""
    vectors = meaningless("mean and noise", 200, vocabulary, seed=2)
    isotropic = meaningless("noise", 1000, vocabulary, seed=3)
    threshold = vocabulary.best(isotropic)["cosine"].quantile(0.95)
    assert (vocabulary.best(vectors)["cosine"] > threshold).float().mean() > 0.9


# --- words ---------------------------------------------------------------------------------------


def test_words_are_found_where_they_were_planted(vocabulary: Vocabulary) -> None:
    tokens = [40, 41, 42, 43]
    vectors, start = planted(vocabulary, tokens, 0.2), vocabulary[[40, 99, 42, 43]]
    start[0] *= 19
    found = words(vectors, vocabulary, {"b": [41], "a": [40], "far": [200, 201], "mean": [42]}, start=start)
    assert [(word.text, word.virtual_token, word.rank) for word in found[:2]] == [("b", 1, 1), ("a", 0, 1)]
    assert [word.significant for word in found] == [True, True, False, True]
    assert [word.at_start for word in found[:2]] == [False, True]
    targets = torch.stack([vocabulary.table[41], vocabulary.table[40], vocabulary.table[[200, 201]].mean(0)])
    excess = vocabulary.excess(vectors, targets).amax(dim=0).tolist()
    assert [word.excess for word in found[:3]] == pytest.approx(excess, rel=1e-5)
    assert found[2].p == pytest.approx(1 - (1 - stats.norm.sf(excess[2])) ** 4, rel=1e-4)
    cosine = torch.nn.functional.cosine_similarity(vectors[1], vocabulary.table[41], dim=0)
    assert found[0].cosine == pytest.approx(float(cosine), rel=1e-4)
    assert words(vectors, vocabulary, {}) == ()
    assert words(vectors, vocabulary, {"b": [41]})[0].at_start is None


def test_words_named_beforehand_raise_few_false_alarms(vocabulary: Vocabulary) -> None:
    """2,000 words in soft prompts of 8 random vectors: 5 % ± 2.5 points is over 5 standard errors (0.5 points)."""
    vectors = meaningless("mean and noise", 8 * 20, vocabulary, seed=5)
    p = [
        word.p
        for i in range(20)
        for word in words(vectors[8 * i : 8 * i + 8], vocabulary, {str(token): [token] for token in range(100)})
    ]
    assert abs(np.mean(np.array(p) <= 0.05) - 0.05) < 0.025


# --- norms and drift -----------------------------------------------------------------------------


def test_norms_and_drift_are_plain_arithmetic(vocabulary: Vocabulary) -> None:
    start = torch.cat([vocabulary[[5, 6]], make_vectors(1, 20)])
    vectors = start + torch.stack([0.1 * make_vectors(1, 21)[0], 40 * make_vectors(1, 22)[0], torch.zeros(H)])
    found = norms(vectors, vocabulary, start, about_start="made up")
    table = np.linalg.norm(vocabulary.table.numpy(), axis=1)
    assert list(found.norms) == pytest.approx(np.linalg.norm(vectors.numpy(), axis=1), rel=1e-5)
    assert list(found.shares) == pytest.approx([(table < norm).mean() for norm in found.norms], abs=1e-6)
    assert found.table[0.0] == pytest.approx(table.min(), rel=1e-5)
    assert found.table[1.0] == pytest.approx(table.max(), rel=1e-5)
    assert found.table[0.5] == pytest.approx(np.median(table), rel=0.01)
    near, far, still = found.moved
    assert near.start is not None
    assert near.start.text == "<5>"
    assert still.start is None
    assert (near.rank, near.kept, far.kept) == (1, True, False)
    assert far.distance == pytest.approx(float((vectors[1] - start[1]).norm()), rel=1e-4)
    assert far.random_cosine == pytest.approx(far.start_norm / math.hypot(far.start_norm, far.distance))
    assert (still.distance, still.cosine) == pytest.approx((0, 1), abs=1e-5)
    assert found.start == "made up"
    assert norms(vectors, vocabulary).moved == ()


def test_the_cosine_of_a_random_step_is_what_random_steps_leave() -> None:
    """The mean over 2,000 steps in 256 dimensions; its standard error is below 0.001."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(256, generator=generator)
    steps = torch.nn.functional.normalize(torch.randn(2000, 256, generator=generator), dim=1) * 30
    cosine = torch.nn.functional.cosine_similarity(start[None], start + steps).mean()
    vocabulary = Vocabulary(torch.randn(300, 256, generator=generator), str)
    (moved,) = norms((start + steps[0])[None], vocabulary, start[None]).moved
    assert moved.random_cosine == pytest.approx(float(cosine), abs=0.01)


# --- the start -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [None, 1.0, 5.0])
@pytest.mark.parametrize("init", ["auto", "random", "vocab", "labels", "text"])
@pytest.mark.parametrize("length", [6, 40])
def test_the_start_is_made_again_from_the_record(init: str, length: int, scale: float | None) -> None:
    lm, data = tiny("llama"), toy(40, 0)
    options: dict[str, Any] = {"init_scale": scale} | ({"init_text": "good or bad film"} if init == "text" else {})
    task = toy_task(lm, data, length)
    training = Training(task, data, None, train_settings(num_virtual_tokens=length, init=init, seed=3, **options))
    untrained = training.vectors
    for _ in zip(range(2), training, strict=False):
        pass
    start, about = starting_vectors(task, training.result())
    assert start is not None
    torch.testing.assert_close(start, untrained, rtol=1e-5, atol=1e-6)
    assert about.startswith("made again from the training record: ")


def a_soft_prompt(training: dict[str, Any]) -> tuple[Task, SoftPrompt]:
    lm = tiny("llama")
    task = Task(lm, TOY_TEMPLATE, TOY_LABELS, 3, lm.window)
    made = SoftPrompt(
        vectors=torch.ones(3, lm.hidden_size),
        name="s",
        base=lm.name,
        base_fingerprint=lm.fingerprint,
        tokenizer_fingerprint=lm.tokenizer_fingerprint,
        template=TOY_TEMPLATE.text,
        verbalizer=dict(TOY_LABELS.words),
        training=training,
    )
    return task, made


RECORD: dict[str, Any] = {"num_virtual_tokens": 3, "init": "vocab", "init_text": None, "seed": 0}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({}, "its record does not say"),
        ({"init": "vocab"}, "its record of the start 'vocab' is incomplete"),
        (RECORD | {"init": "other"}, "its record names the start 'other', which is no rule"),
        (RECORD | {"starts": 3}, "its record of the start 'vocab' is incomplete"),
        (
            RECORD | {"init": "text"},
            "its record of the start 'text' cannot be followed (init text needs an init_text; give one)",
        ),
    ],
)
def test_a_start_that_cannot_be_known_is_not_claimed(record: dict[str, Any], reason: str) -> None:
    task, made = a_soft_prompt(record)
    assert starting_vectors(task, made) == (None, reason)


def test_of_several_starts_it_is_the_one_that_went_on() -> None:
    starts = []
    for number in (0, 1):
        task, made = a_soft_prompt(RECORD | {"starts": 2, "start": number})
        start, about = starting_vectors(task, made)
        assert start is not None
        assert torch.equal(start, initial_vectors(task.model, 3, init="vocab", seed=number))
        assert about == f"made again from the training record: init vocab, seed {number}"
        starts.append(start)
    assert not torch.equal(*starts)


# --- the map -------------------------------------------------------------------------------------


def test_the_map_is_a_principal_plane(vocabulary: Vocabulary) -> None:
    vectors = planted(vocabulary, [1, 2, 3, 4, 5], 0.5)
    found = plane(vectors, vocabulary, vectors[:2], sample=60, seed=4)
    assert found == plane(vectors, vocabulary, vectors[:2], sample=60, seed=4)
    assert (len(found.tokens), len(found.vocabulary), len(found.virtual), len(found.start)) == (60, 60, 5, 2)
    np.testing.assert_allclose(found.start, found.virtual[:2], atol=1e-6)
    # numpy: both groups with the same weight
    some, ours = (
        torch.nn.functional.normalize(each, dim=1).double().numpy() for each in (vocabulary[found.tokens], vectors)
    )
    middle = (some.mean(0) + ours.mean(0)) / 2
    weighted = np.vstack([(some - middle) / np.sqrt(60), (ours - middle) / np.sqrt(5)])
    axes = np.linalg.svd(weighted)[2][:2]
    np.testing.assert_allclose(np.abs(found.virtual), np.abs((ours - middle) @ axes.T), atol=1e-4)
    centred = ours - ours.mean(0)
    assert found.shown == pytest.approx(np.sum((centred @ axes.T) ** 2) / np.sum(centred**2), abs=1e-4)
    assert 0 < found.shown_vocabulary < 1
