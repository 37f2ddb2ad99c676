"""The worth of joint answers, and of confidences, against arithmetic done apart."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

import softprompt as sp
from softprompt.data.example import Dataset, Example
from softprompt.errors import ConfigError, DataError
from softprompt.evaluation import metrics
from softprompt.evaluation.ensemble import JointEvaluation, evaluate_ensemble
from softprompt.evaluation.figures import reliability_diagram, require_form, save_figure
from softprompt.model.frozen import FrozenLM
from softprompt.tasks.ensemble import Ensemble
from tests.servers import soft_prompt
from tests.tasks.test_ensemble import alone, members

TEXTS = ("a stirring film", "the plot is thin", "dull", "the best")
GOLD = Dataset(
    tuple(
        Example({"input": text}, target, where=f"t:{i}")
        for i, (text, target) in enumerate(zip(TEXTS, ("good", "bad", "bad", "good"), strict=True), start=1)
    ),
    "t.jsonl",
    "0" * 64,
)


def test_the_calibration_error_by_hand() -> None:
    """Two bins of 0.5: below 2 rows, one right, mean confidence 0.3; above 3 rows, all right, mean 0.8."""
    sure, hits = [0.2, 0.4, 0.7, 0.8, 0.9], [True, False, True, True, True]
    found = metrics.calibration_error(sure, hits, bins=2)
    assert found.value == pytest.approx(2 / 5 * 0.2 + 3 / 5 * 0.2)
    low, high = metrics.reliability(sure, hits, bins=2)
    assert (low.low, low.high, low.n, low.accuracy) == (0.0, 0.5, 2, 0.5)
    assert (high.n, high.accuracy) == (3, 1.0)
    assert (low.confidence, high.confidence) == (pytest.approx(0.3), pytest.approx(0.8))


def test_a_confidence_on_the_edge_belongs_below_and_zero_to_the_first_bin() -> None:
    found = metrics.reliability([0.0, 0.5, 1.0], [True] * 3, bins=2)
    assert [(one.high, one.n) for one in found] == [(0.5, 2), (1.0, 1)]


def test_honest_confidences_have_a_small_error_and_boasting_ones_a_large_one() -> None:
    """Right with the probability that they give: the error falls with the rows. 20 points off: it does not."""
    draw = random.Random(3)
    sure = [draw.uniform(0.5, 1) for _ in range(4000)]
    hits = [draw.random() < one for one in sure]
    honest = metrics.calibration_error(sure, hits)
    boasting = metrics.calibration_error(sure, [draw.random() < one - 0.2 for one in sure])
    assert honest.value < 0.04
    assert boasting.value == pytest.approx(0.2, abs=0.04)
    assert boasting.low < 0.2 < boasting.high + 0.03
    assert 0 < boasting.stderr < 0.02


def test_the_spread_of_the_calibration_error_is_that_of_resampled_rows() -> None:
    draw = np.random.default_rng(1)
    sure = draw.uniform(0.4, 1, 300)
    hits = draw.random(300) < sure - 0.15
    found = metrics.calibration_error(sure.tolist(), hits.tolist())
    again = []
    for _ in range(400):
        rows = draw.integers(300, size=300)
        again.append(metrics.calibration_error(sure[rows].tolist(), hits[rows].tolist(), bins=15).value)
        if len(again) == 60:
            break
    assert found.stderr == pytest.approx(np.std(again), rel=0.35)


def test_confidences_that_are_none_are_refused() -> None:
    with pytest.raises(DataError, match=r"from 0 to 1, found 1\.5 in row 2 of 2"):
        metrics.calibration_error([0.5, 1.5], [True, True])
    with pytest.raises(DataError, match="at least 1 row"):
        metrics.reliability([], [])


@pytest.mark.filterwarnings("ignore:.*% of the rows")
@pytest.mark.parametrize("vote", ["mean", "majority"])
@pytest.mark.parametrize("places", [(0, 1, 2), (0, 2)])
def test_an_ensemble_is_measured_beside_its_members(llama: FrozenLM, vote: str, places: tuple[int, ...]) -> None:
    several = [members(llama)[place] for place in places]
    found = sp.evaluate(llama, several, GOLD, vote=vote, progress=False)
    assert isinstance(found, JointEvaluation)
    gold = ["good", "bad", "bad", "good"]
    each = [[answer.text for answer in alone(llama, one)] for one in several]
    scores = [sum(map(str.__eq__, answers, gold)) / 4 for answers in each]
    assert [one.headline.value for one in found.members] == scores
    assert found.mean == pytest.approx(sum(scores) / len(places))
    assert scores[found.best] == max(scores)
    differing = [len(set(answers)) > 1 for answers in zip(*each, strict=True)]
    assert found.disagreement is not None
    assert found.disagreement.value == sum(differing) / 4
    right = [one.text == target for one, target in zip(found.predictions, gold, strict=True)]
    assert found.headline.value == sum(right) / 4
    for metric, wanted in ((found.agreeing, False), (found.differing, True)):
        rows = [hit for hit, differs in zip(right, differing, strict=True) if differs == wanted]
        assert (metric.value if metric else None) == (sum(rows) / len(rows) if rows else None)
    document = found.as_dict()
    assert [one["name"] for one in document["members"]] == [f"seed{place}" for place in places]
    assert document["best_member"] == several[found.best].name
    one = sp.predict(llama, several, list(TEXTS), vote=vote)
    assert [answer.text for answer in one] == [answer.text for answer in found.predictions]


def test_the_best_has_the_least_loss(llama: FrozenLM) -> None:
    found = evaluate_ensemble(Ensemble.of(llama, members(llama)), GOLD, metrics=["log_loss"])
    values = [one.headline.value for one in found.members]
    assert values[found.best] == min(values)


def test_texts_of_several_have_no_perplexity(llama: FrozenLM) -> None:
    several = [soft_prompt(llama, f"w{i}", "{soft_prompt}{input} {target}", length=4, seed=i) for i in range(2)]
    found = evaluate_ensemble(Ensemble.of(llama, several), GOLD)
    assert [metric.name for metric in found.metrics] == ["bleu", "rouge_l", "exact_match", "token_f1"]
    assert found.agreeing is None
    with pytest.raises(ConfigError, match=r"several soft prompts must be one of .* not 'perplexity'"):
        evaluate_ensemble(Ensemble.of(llama, several), GOLD, metrics=["perplexity"])


def test_what_cannot_be_asked_of_several_is_refused(llama: FrozenLM) -> None:
    several = members(llama)
    with pytest.raises(ConfigError, match="base_only"):
        sp.evaluate(llama, several, GOLD, base_only=True, progress=False)
    with pytest.raises(ConfigError, match="give a list of them"):
        sp.evaluate(llama, several[0], GOLD, vote="mean", progress=False)
    with pytest.raises(ConfigError, match="needs inputs"):
        sp.predict(llama, several)


def test_the_diagram_shows_the_bins(tmp_path: Path) -> None:
    sure, hits = [0.2, 0.4, 0.7, 0.8, 0.95], [True, False, True, True, True]
    figure = reliability_diagram("films", (sure, hits), [(sure, [True] * 5)])
    top, below = figure.axes
    assert [bar.get_height() for bar in below.patches] == [1, 1, 1, 1, 1]
    drawn = [line.get_xydata().tolist() for line in top.get_lines() if line.get_xydata().shape == (5, 2)]
    assert [[x, float(hit)] for x, hit in zip(sure, hits, strict=True)] in [
        [[pytest.approx(x), y] for x, y in one] for one in drawn
    ]
    for name in ("a.png", "b.svg"):
        save_figure(figure, require_form(tmp_path / name))
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"\.png or \.svg"):
        require_form(tmp_path / "plot.pdf")
