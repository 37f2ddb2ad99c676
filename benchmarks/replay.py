"""Rules for which validation of a run is kept, and when the run ends, replayed over recorded runs.

    python benchmarks/replay.py RUN_FOLDER…

A run folder's ``log.jsonl`` has the loss and the correctness of each validation row at each validation. A rule chooses
on a random half of the rows and is measured on the other half, ``SPLITS`` times; no test row is looked at. Record runs
with ``softprompt train … --patience 0``, which trains to the end, so that every rule has all it may ask for.

The table has a line for each rule and a column for each run: the points of accuracy that it gains over the first rule,
the mean over the splits, the middle 95 % of them in brackets, and the share of the steps that it runs. The last columns
are the mean over the runs with its standard error, and the mean share.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from softprompt.tuning.config import TrainConfig
from softprompt.tuning.keeping import Keeper

SPLITS = 400
Array = NDArray[np.float64]
"""Loss or correctness, float64 ``[validations, rows]``."""
Rule = Callable[[Array, Array], tuple[int, int]]
"""Loss and correctness → the place of the validation that is kept, and how many were made."""


@dataclass(frozen=True)
class Run:
    """The validations of a run, and after how many steps each was made."""

    name: str
    steps: tuple[int, ...]
    loss: Array
    correct: Array

    @classmethod
    def read(cls, folder: Path) -> Run:
        """The run whose folder this is."""
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]
        found = [line["validation"] for line in lines if line.get("validation")]
        return cls(
            folder.name.removesuffix(".run").removesuffix(".safetensors"),
            tuple(one["step"] for one in found),
            np.array([one["rows"]["loss"] for one in found], dtype=np.float64),
            np.array([one["rows"]["correct"] for one in found], dtype=np.float64),
        )


def error(difference: Array) -> float:
    """Standard error of the mean of one difference a row."""
    return float(difference.std(ddof=1) / np.sqrt(len(difference)))


def best_of(means: Array, deviations: float = 0.0) -> int:
    """The highest mean; or the last, unless that is better by more than so many standard errors."""
    best = int(means.mean(1).round(9).argmax())
    gain = means[best] - means[-1]
    return best if gain.mean() > deviations * error(gain) else len(means) - 1


def trailing(figure: Array, window: int) -> Array:
    """Each validation's mean with up to ``window - 1`` before it."""
    return np.stack([figure[max(0, i - window + 1) : i + 1].mean(0) for i in range(len(figure))])


def highest_accuracy(patience: int) -> Rule:
    """Of equals the lowest loss; it ends after ``patience`` validations without a new one, 0: never."""

    def rule(loss: Array, correct: Array) -> tuple[int, int]:
        best, figures = 0, list(zip(correct.mean(1).round(9), -loss.mean(1), strict=True))
        for place, figure in enumerate(figures):
            best = place if figure > figures[best] else best
            if place - best >= patience > 0:
                return best, place + 1
        return best, len(figures)

    return rule


def accuracy(window: int, deviations: float = 0.0) -> Rule:
    """The highest mean accuracy of ``window`` validations in a row, the last of which is kept."""
    return lambda loss, correct: (best_of(trailing(correct, window), deviations), len(loss))


def probability(window: int, deviations: float = 0.0) -> Rule:
    """The same of the mean probability of the right label."""
    return lambda loss, correct: (best_of(trailing(np.exp(-loss), window), deviations), len(loss))


def ours(patience: int) -> Rule:
    """What the package does (``softprompt.tuning.keeping``)."""

    def rule(loss: Array, correct: Array) -> tuple[int, int]:
        keeper = Keeper(patience)
        for place in range(len(loss)):
            rows = {"loss": loss[place], "correct": correct[place]}
            score = float(np.exp(-loss[place]).mean())
            keeper.add({"step": place, "score": score, "loss": float(loss[place].mean()), "rows": rows})
            if keeper.over:
                break
        assert keeper.best is not None
        return int(keeper.best["step"]), place + 1

    return rule


RULES: dict[str, Rule] = {
    "highest accuracy, patience 8 (before)": highest_accuracy(8),
    "highest accuracy": highest_accuracy(0),
    "last": lambda loss, correct: (len(loss) - 1, len(loss)),
    "lowest loss": lambda loss, correct: (best_of(-loss), len(loss)),
    "lowest loss, mean of 3": lambda loss, correct: (best_of(trailing(-loss, 3)), len(loss)),
    "last, unless accuracy better by 1 error": accuracy(1, 1),
    "last, unless accuracy better by 2 errors": accuracy(1, 2),
    "accuracy, mean of 3": accuracy(3),
    "accuracy, mean of 3, by 1 error": accuracy(3, 1),
    "probability": probability(1),
    "probability, by 1 error": probability(1, 1),
    "probability, mean of 3": probability(3),
    "probability, mean of 3, by 1 error": probability(3, 1),
    **{f"probability, mean of 3, patience {patience}": ours(patience) for patience in (2, 3, 4, 6)},
}


def replay(run: Run, rule: Rule, splits: int = SPLITS) -> tuple[Array, Array]:
    """Accuracy on the halves that did not choose, in percent, and the share of the steps run: ``[splits]`` each."""
    rng, rows = np.random.default_rng(0), run.loss.shape[1]
    accuracies, shares = np.empty(splits), np.empty(splits)
    for split in range(splits):
        order = rng.permutation(rows)
        chosen, measured = order[: rows // 2], order[rows // 2 :]
        kept, made = rule(run.loss[:, chosen], run.correct[:, chosen])
        accuracies[split] = 100 * run.correct[kept, measured].mean()
        shares[split] = run.steps[made - 1] / run.steps[-1]
    return accuracies, shares


def table(runs: Sequence[Run]) -> str:
    """Markdown."""
    before = [replay(run, next(iter(RULES.values())))[0] for run in runs]
    names = [f"{run.name}, {run.loss.shape[1]} rows" for run in runs]
    lines = [["rule", *names, "mean", "steps"], ["---"] * (len(runs) + 3)]
    for name, rule in RULES.items():
        found = [replay(run, rule) for run in runs]
        gains = [accuracies - base for (accuracies, _), base in zip(found, before, strict=True)]
        cells = [
            f"{gain.mean():+.2f} [{np.quantile(gain, 0.025):+.1f}, {np.quantile(gain, 0.975):+.1f}] {share.mean():.0%}"
            for gain, (_, share) in zip(gains, found, strict=True)
        ]
        means = np.array([gain.mean() for gain in gains])
        spread = f" ± {error(means):.2f}" if len(runs) > 1 else ""
        steps = np.mean([share.mean() for _, share in found])
        lines.append([name, *cells, f"{means.mean():+.2f}{spread}", f"{steps:.0%}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(f"patience of a default run: {TrainConfig().patience}\n")
    print(table([Run.read(Path(folder)) for folder in sys.argv[1:]]))
