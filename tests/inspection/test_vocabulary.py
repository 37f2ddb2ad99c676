"""Nearest tokens against plain numpy, and the null: what it keeps, and that excess is standard normal under it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from softprompt.inspection import vocabulary as module
from softprompt.inspection.vocabulary import GROUPS, SINGLE_AXES, Vocabulary
from tests.conftest import make_tokenizer, tiny

V, H = 500, 64


def make_table(seed: int = 0) -> torch.Tensor:
    """Embeddings with a large mean and a few strong axes, as language models have them."""
    generator = torch.Generator().manual_seed(seed)
    strong = torch.linspace(1.5, 0.4, H)
    return 1.2 + torch.randn(V, H, generator=generator) * strong


def make_vectors(count: int, seed: int = 1) -> torch.Tensor:
    return 0.3 + torch.randn(count, H, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def vocabulary() -> Vocabulary:
    return Vocabulary(make_table(), lambda token: f"<{token}>")


@pytest.mark.parametrize("chunk", [7, 128, V])
def test_the_nearest_tokens_are_those_of_plain_arithmetic(
    vocabulary: Vocabulary, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK", chunk)
    vectors = make_vectors(6)
    w, t = vectors.double().numpy(), vocabulary.table.double().numpy()
    dot = w @ t.T
    matrices = {
        "cosine": dot / np.linalg.norm(w, axis=1)[:, None] / np.linalg.norm(t, axis=1),
        "euclidean": -np.linalg.norm(w[:, None] - t[None], axis=2),
        "dot": dot,
        "excess": vocabulary.excess(vectors, vocabulary.table).double().numpy(),
    }
    found, best = vocabulary.nearest(vectors, 9), vocabulary.best(vectors)
    for name, matrix in matrices.items():
        order = np.argsort(-matrix, axis=1)[:, :9]
        values = np.take_along_axis(matrix, order, axis=1) * (-1 if name == "euclidean" else 1)
        assert found[name][1].tolist() == order.tolist(), name
        np.testing.assert_allclose(found[name][0].numpy(), values, rtol=2e-4, atol=2e-4)
        np.testing.assert_allclose(best[name].numpy(), values[:, 0], rtol=2e-4, atol=2e-4)
    assert list(vocabulary.nearest(vectors, 2, ("dot",))) == ["dot"]


def test_excess_is_the_deviation_from_the_mean_of_the_null(vocabulary: Vocabulary) -> None:
    """By the definition, in float64: directions within a group are uniform, so the product of two vectors' parts there
    has mean 0 and variance ``|w|² |t|² / size``."""
    vectors, targets = make_vectors(3), make_table(5)[:4]
    axes, groups = vocabulary.axes.double().numpy(), vocabulary.groups.numpy()
    w, t = vectors.double().numpy() @ axes.T, targets.double().numpy() @ axes.T
    for i in range(3):
        for j in range(4):
            variance = 0.0
            for group in range(1, groups.max() + 1):
                inside = groups == group
                variance += np.sum(w[i, inside] ** 2) * np.sum(t[j, inside] ** 2) / inside.sum()
            expected = (w[i] @ t[j] - w[i, 0] * t[j, 0]) / np.sqrt(variance)
            assert float(vocabulary.excess(vectors, targets)[i, j]) == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_axes_are_the_mean_and_the_principal_axes(vocabulary: Vocabulary) -> None:
    table, axes = vocabulary.table.double().numpy(), vocabulary.axes.double().numpy()
    np.testing.assert_allclose(axes @ axes.T, np.eye(H), atol=1e-5)
    mean = table.mean(axis=0)
    np.testing.assert_allclose(axes[0], mean / np.linalg.norm(mean), atol=1e-5)
    rest = table - mean
    rest -= np.outer(rest @ axes[0], axes[0])
    strongest = np.linalg.svd(rest, full_matrices=False)[2][: H // 4]
    np.testing.assert_allclose(np.abs(np.sum(axes[1 : H // 4 + 1] * strongest, axis=1)), 1, atol=1e-3)
    assert vocabulary.groups.tolist() == [*range(H // 4), *(H // 4 + i // 6 for i in range(48))]
    wide = torch.randn(40, 4 * SINGLE_AXES + 80, generator=torch.Generator().manual_seed(1))
    assert Vocabulary(wide, str).groups.bincount().tolist() == [1] * SINGLE_AXES + [58] * GROUPS


def test_random_vectors_keep_norm_and_profile(vocabulary: Vocabulary) -> None:
    vectors = make_vectors(3)
    drawn = vocabulary.random_like(vectors, 7, seed=4)
    assert torch.equal(drawn, vocabulary.random_like(vectors, 7, seed=4))
    assert not torch.equal(drawn, vocabulary.random_like(vectors, 7, seed=5))
    model = vectors[torch.arange(7) % 3]
    torch.testing.assert_close(drawn.norm(dim=1), model.norm(dim=1))
    along, of_model = (each @ vocabulary.axes.T for each in (drawn, model))
    torch.testing.assert_close(along[:, 0], of_model[:, 0], rtol=1e-4, atol=1e-4)
    for group in range(1, int(vocabulary.groups.max()) + 1):
        inside = vocabulary.groups == group
        torch.testing.assert_close(along[:, inside].norm(dim=1), of_model[:, inside].norm(dim=1), rtol=1e-3, atol=1e-3)
    assert torch.nn.functional.cosine_similarity(drawn, model).abs().max() < 0.9


def test_excess_is_standard_normal_under_the_null(vocabulary: Vocabulary) -> None:
    """4,000 draws for each of 20 tokens: mean 0 ± 0.1 and deviation 1 ± 0.1 are over 6 standard errors, and 5 % above
    1.645 ± 2 points is over 5: false failures below 1 in 100,000."""
    drawn = vocabulary.random_like(make_vectors(1), 4000, seed=0)
    excess = vocabulary.excess(drawn, vocabulary.table[:20])
    assert excess.mean(dim=0).abs().max() < 0.1
    assert (excess.std(dim=0) - 1).abs().max() < 0.1
    assert ((excess > 1.645).float().mean(dim=0) - 0.05).abs().max() < 0.02


def test_the_rank_counts_nearer_tokens(vocabulary: Vocabulary) -> None:
    vectors = make_vectors(4)
    targets = torch.stack(
        [vocabulary.table[3], vocabulary.table[9], make_vectors(1, 7)[0], vocabulary.table[:2].mean(0)]
    )
    cosine = torch.nn.functional.cosine_similarity(vectors, targets)
    all_cosines = torch.nn.functional.cosine_similarity(vectors[:, None], vocabulary.table[None], dim=2)
    expected = [1 + int((all_cosines[i] > cosine[i] + 1e-5).sum()) for i in range(4)]
    assert vocabulary.rank(vectors, targets).tolist() == expected
    assert vocabulary.rank(vocabulary.table[[3, 9]], vocabulary.table[[3, 9]]).tolist() == [1, 1]


def test_the_vocabulary_of_a_model_has_its_words_and_no_padding() -> None:
    lm = tiny("llama")
    found, tokenizer = Vocabulary.of(lm), make_tokenizer()
    assert found.size == len(tokenizer) <= lm.embedding.shape[0]
    torch.testing.assert_close(found[[2, 5]], lm.embedding[[2, 5]].float())
    torch.testing.assert_close(found.norms(), lm.embedding[: found.size].float().norm(dim=1))
    film = tokenizer(" film", add_special_tokens=False).input_ids
    assert "".join(map(found.text, film)) == " film"
    half = tokenizer("é", add_special_tokens=False).input_ids[0]  # one byte of two is no letter
    assert found.text(half) == tokenizer.convert_ids_to_tokens(half)
