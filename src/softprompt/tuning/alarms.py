"""Whether a training learns, and if not, why: one sentence for each reason, with the figure and what to do.

What is chance is told from what is not by standard errors, not by fixed thresholds. Two are 2.3 % of false alarms where
nothing is wrong, and a training that learns is far from that line. The thresholds that there are belong to what is no
chance: how far the vectors have moved, how small a gradient Adam still sees, which tokens a word has.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from softprompt.data.example import Example
from softprompt.data.wording import counted, quoted
from softprompt.errors import SoftPromptError, StoreError
from softprompt.evaluation.evaluate import OneAnswer
from softprompt.evaluation.validation import validator
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tasks.task import Task
from softprompt.tuning.config import TrainConfig
from softprompt.tuning.keeping import Keeper, scores_of
from softprompt.tuning.state import State
from softprompt.tuning.step import Alarm, Step
from softprompt.tuning.trend import LEAST_KEPT, Trend

OURS = "the soft prompt"
"""What is trained, in sentences."""
BEYOND = 2.0
"""Standard errors from which on a difference is not chance."""
UNMOVED = 0.1
"""Distance from the start, in its RMS, below which a soft prompt is still what it began with."""
SHRUNK = 0.2
"""Share of the start's RMS below which a soft prompt has nearly vanished."""
TINY = 1e-7
"""RMS of the gradient's elements, after clipping, that Adam's epsilon of 1e-8 begins to drown."""
CLIPPED, OFTEN = 30.0, 0.95
"""How many times ``clip`` the gradient is in the median, and the share of the steps it is clipped in, from which on the
clip is too low."""
HIGH = 3
"""Times the default from which on a learning rate is the first to be doubted."""
FEW_ROWS = 10
"""Rows below which a training, or a validation, says next to nothing."""
RELOADED = 4
"""Validation rows that a stored soft prompt must answer as before."""
BASE_ROWS = 100
"""The most validation rows that the base model answers alone, for comparison."""


# --- before the first step ---------------------------------------------------------------------------


def of_task(task: Task, train: Sequence[Example], validation: Sequence[Example]) -> list[Alarm]:
    """What is to be seen before a training: of the words, of the template, of the number of rows."""
    found = [*_of_words(task), *_of_template(task, train)]
    least = max(FEW_ROWS, 2 * len(task.labels))
    if len(train) < least:
        labels = f" for {len(task.labels)} labels" if task.labels else ""
        found.append(
            Alarm(
                "few_rows",
                f"{counted(len(train), 'row')} to train with{labels} {'is' if len(train) == 1 else 'are'} very few, so "
                f"that they may be learned by heart",
                f"give {least} or more, better 200",
            )
        )
    if len(validation) < FEW_ROWS:
        found.append(
            Alarm(
                "few_validation_rows",
                f"{counted(len(validation), 'validation row')} can hardly tell a good step from a bad one",
                f"give {FEW_ROWS} or more, better 100, with --validation, or more rows to hold some back from",
            )
        )
    return found


def _of_words(task: Task) -> list[Alarm]:
    if task.verbalizer is None:
        return []
    tokenizer = task.lm.tokenizer
    unknown, pieces = list[tuple[str, int]](), list[tuple[str, int]]()
    for words, spellings in zip(task.verbalizer.words.values(), task.spellings, strict=True):
        for word, ids in zip(words, spellings, strict=True):
            if tokenizer.unk_token_id in ids:
                unknown.append((word, len(ids)))
            elif _in_pieces(word, [str(tokenizer.decode([token])) for token in ids]):
                pieces.append((word, len(ids)))
    if unknown:
        return [
            Alarm(
                "unknown_word",
                f"the base model's tokenizer has no tokens for {_words(unknown)}, only its mark of what it does not "
                "know",
                "give other words with --labels label=word",
            )
        ]
    if pieces:
        word, tokens = pieces[0]
        return [
            Alarm(
                "split_word",
                f"the tokenizer splits {_words(pieces)} into letters or bytes, {quoted(word)} into {tokens} tokens, so "
                "that the base model hardly knows it as a word",
                "give words of its language with --labels label=word",
            )
        ]
    return []


def _in_pieces(word: str, tokens: Sequence[str]) -> bool:
    """Whether a word falls into letters, or letters into bytes."""
    if any("\ufffd" in token for token in tokens):
        return True
    return len(word) > 2 and word.isalpha() and len(tokens) >= len(word)


def _words(found: Sequence[tuple[str, int]]) -> str:
    word = f"the word {quoted(found[0][0])}"
    return word if len(found) == 1 else f"{word} and {len(found) - 1} more"


def _of_template(task: Task, train: Sequence[Example]) -> list[Alarm]:
    """A target that goes on without a space where running text has one."""
    parts = task.template.parts
    if len(parts) < 2 or train[0].conversation is not None or task.lm.encoder_decoder:
        return []
    before = parts[-2].value if parts[-2].kind == "text" else "x" if parts[-2].kind == "field" else ""
    target = task.verbalizer.words[task.labels[0]][0] if task.verbalizer else str(train[0].target)
    ends, begins = before[-1:], target[:1]
    goes_on = ends.isascii() and (ends.isalnum() or ends in ":?!.,;=") and begins.isascii() and begins.isalpha()
    if not ends or not goes_on or _joins(task, before, target):
        return []
    cue = f"the text {quoted(before[-20:])}" if parts[-2].kind == "text" else f"the field {{{parts[-2].value}}}"
    return [
        Alarm(
            "joined_target",
            f"in the template {{target}} follows {cue} without a space, so that {quoted(target)} has other tokens than "
            "in running text",
            "write a space before {target}",
        )
    ]


def _joins(task: Task, before: str, target: str) -> bool:
    """Whether the tokens of a target are the same with and without a space before it."""
    tokenizer = task.lm.tokenizer
    spaced = tokenizer(f"{before} {target}", add_special_tokens=False)["input_ids"]
    ids = list(task.encoder.target_ids(target))
    return list(spaced[-len(ids) :]) == ids


# --- while it runs -------------------------------------------------------------------------------------


def one_answer(validations: Sequence[Mapping[str, Any]]) -> list[Alarm]:
    """That nearly all validation rows were given one answer: at the second such validation in a row, when the start is
    behind it, and again each time after another answer was seen."""
    if len(validations) < 2 or not all(found.get("one_answer") for found in validations[-2:]):
        return []
    if len(validations) > 2 and validations[-3].get("one_answer"):
        return []
    return [_one_answer(validations[-1], OURS, " so far", "if that stays so, ")]


def _one_answer(validation: Mapping[str, Any], who: str, so_far: str = "", condition: str = "") -> Alarm:
    found = validation["one_answer"]
    said = OneAnswer(found["label"], found["share"], found["gold_share"])
    return Alarm(
        "one_answer",
        f"{who} {said}: it does not tell the labels apart{so_far}",
        f"{condition}try more steps or --parametrisation prefix, and look at full fine-tuning with "
        f"`softprompt compare`",
    )


def of_steps(trend: Trend, config: TrainConfig, parameters: int) -> list[Alarm]:
    """What the steps so far say: a loss that rises, a gradient that is clipped away or too small.

    Args:
        trend: of the steps.
        config: their settings.
        parameters: how many numbers are learned.
    """
    found = list[Alarm]()
    if len(trend.first) + len(trend.last) <= trend.steps and len(trend.first) >= LEAST_KEPT:
        lost, error = _difference(trend.last, trend.first)
        if lost > BEYOND * error:
            found.append(
                Alarm(
                    "rising_loss",
                    f"the loss has risen from {statistics.fmean(trend.first):.3f} in the first "
                    f"{counted(len(trend.first), 'step')} to {statistics.fmean(trend.last):.3f} in the last",
                    f"give a lower --lr than {config.lr:g}, or leave it at its default of {TrainConfig.lr:g}",
                )
            )
    norm = statistics.median(trend.norms) if trend.norms else math.inf
    seen = min(norm, config.clip) if config.clip else norm
    if config.optimizer == "adamw" and seen / math.sqrt(parameters) < TINY:
        what = f"clipped to a norm of {config.clip:g}" if seen < norm else f"of a norm of {norm:.1e} in the median"
        remedy = f"give a higher --clip; its default is {TrainConfig.clip:g}" if seen < norm else "try --dtype fp32"
        found.append(Alarm("tiny_gradient", f"the gradient is {what}, too small for the optimizer to see", remedy))
    elif config.clip and trend.clipped >= OFTEN * trend.steps and norm > CLIPPED * config.clip:
        found.append(
            Alarm(
                "always_clipped",
                f"the gradient was clipped in {trend.clipped:,} of {counted(trend.steps, 'step')}, from a norm of "
                f"{norm:.3g} in the median to {config.clip:g}, so that large and small ones count alike",
                "give a higher --clip, or a lower --lr",
            )
        )
    return found


def _difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """The mean of ``a`` above that of ``b``, and its standard error."""
    error = math.sqrt(statistics.variance(a) / len(a) + statistics.variance(b) / len(b))
    return statistics.fmean(a) - statistics.fmean(b), error


# --- at its end ----------------------------------------------------------------------------------------


def of_vectors(vectors: torch.Tensor, start: torch.Tensor, config: TrainConfig, steps: int) -> list[Alarm]:
    """How far a soft prompt is from its start.

    Args:
        vectors, start: float of one shape.
        config: the settings.
        steps: that were done between the two.
    """
    size = start.float().square().mean().sqrt().item()
    moved = (vectors.float() - start.float()).square().mean().sqrt().item() / max(size, 1e-30)
    left = vectors.float().square().mean().sqrt().item() / max(size, 1e-30)
    if moved < UNMOVED:
        return [
            Alarm(
                "unmoved",
                f"the soft prompt has moved by {100 * moved:.1f} % of its start's size in {counted(steps, 'step')}, so "
                "it is still what it began with",
                f"give more --steps, or a higher --lr than {config.lr:g} (the default is {TrainConfig.lr:g})",
            )
        ]
    if config.weight_decay and left < SHRUNK:
        return [
            Alarm(
                "shrunk",
                f"the soft prompt has shrunk to {100 * left:.1f} % of its start's size",
                f"give a lower --weight-decay than {config.weight_decay:g} (the default is "
                f"{TrainConfig.weight_decay:g})",
            )
        ]
    return []


def of_answers(
    scores: Sequence[float],
    value: float,
    gold: Sequence[str],
    last: Mapping[str, Any],
    lr: float = TrainConfig.lr,
    who: str = OURS,
) -> list[Alarm]:
    """Whether labels are told apart: one answer to nearly all rows, or no better than by the labels' shares.

    Args:
        scores: each validation row's probability of the right label.
        value: the accuracy on them.
        gold: their labels.
        last: the validation.
        lr: the peak learning rate.
        who: what was trained.
    """
    if last.get("one_answer"):
        return [_one_answer(last, who)]
    rows, shares = len(gold), {label: gold.count(label) / len(gold) for label in set(gold)}
    if len(shares) < 2 or rows < FEW_ROWS:
        return []
    lost = -np.log(np.maximum(np.asarray(scores), 1e-30))
    gained = np.asarray([-math.log(shares[label]) for label in gold]) - lost
    most = max(shares.values())
    by_loss = gained.mean() > BEYOND * gained.std(ddof=1) / math.sqrt(rows)
    by_accuracy = value - most > BEYOND * math.sqrt(most * (1 - most) / rows)
    if by_loss or by_accuracy:
        return []
    remedy = (
        f"give a lower --lr than {lr:g} (the default is {TrainConfig.lr:g})"
        if lr > HIGH * TrainConfig.lr
        else "check that inputs and labels belong together, then try more --steps or --parametrisation prefix, or "
        "another base model"
    )
    return [
        Alarm(
            "chance",
            f"the validation accuracy of {value:.3f} on {counted(rows, 'row')} is no better than that of the most "
            f"frequent label, {most:.3f}, by more than chance",
            remedy,
        )
    ]


def of_comparison(
    trend: Trend, ours: Sequence[float], base: Sequence[float] | None, *, labelled: bool, who: str = OURS
) -> list[Alarm]:
    """Whether anything was gained: over the start by the loss, over the base model alone on validation rows.

    Args:
        trend: of all steps.
        ours, base: for each of the same rows, the probability of the right label, or minus the loss for free text; of
            what was trained, and of the base model alone; None where that cannot be told.
        labelled: whether there are labels.
        who: what was trained.
    """
    found, gained, error = list[Alarm](), 0.0, 0.0
    enough = base is not None and len(base) >= LEAST_KEPT
    if base is not None and enough:
        difference = np.asarray(ours[: len(base)]) - np.asarray(base)
        gained, error = float(difference.mean()), float(difference.std(ddof=1)) / math.sqrt(len(base))
        means = [float(np.mean(ours[: len(base)])), float(np.mean(base))]
        if gained < -BEYOND * error:
            what = "probability of the right label" if labelled else "loss a token"
            here, there = (f"{mean if labelled else -mean:.3f}" for mean in means)
            found.append(
                Alarm(
                    "below_base",
                    f"{who} is worse than the base model alone: a mean {what} of {here} against {there} on "
                    f"{counted(len(base), 'validation row')}",
                    "check that validation rows are of the task of the training rows, then try a lower --lr, or more "
                    "--steps",
                )
            )
    comparable = len(trend.first) + len(trend.last) <= trend.steps and len(trend.first) >= LEAST_KEPT
    if comparable and not (enough and gained > BEYOND * error):
        fell, noise = _difference(trend.first, trend.last)
        if abs(fell) <= noise:
            found.append(
                Alarm(
                    "flat_loss",
                    f"the loss is where it was: {statistics.fmean(trend.first):.3f} in the first "
                    f"{counted(len(trend.first), 'step')}, {statistics.fmean(trend.last):.3f} in the last",
                    "check the template and the columns, then try a higher --lr, more --steps or another base model",
                )
            )
    return found


def base_scores(task: Task, rows: Sequence[Example]) -> list[float] | None:
    """For each of the first ``BASE_ROWS`` rows, what ``scores_of`` gives for the base model without the soft prompt;
    None where the template does not stand without it."""
    try:
        found = validator(task.without_soft_prompt(), rows[:BASE_ROWS])(torch.empty(0))
    except SoftPromptError:
        return None
    return scores_of(found) if math.isfinite(found["loss"]) else None


class Watch:
    """Looks at one training.

    Attributes:
        before: what was to be seen before the first step.
    """

    def __init__(self, task: Task, train: Sequence[Example], validation: Sequence[Example]) -> None:
        self.before = tuple(of_task(task, train, validation))
        self._task, self._rows = task, validation

    def saw(self, step: Step, state: State, config: TrainConfig) -> Step:
        """The step with what it gives reason to say: after the first tenth, and after a validation. The state's trend
        takes it."""
        state.trend.add(step.loss, step.grad_norm, config.clip, step.total)
        found = one_answer(state.validations) if step.validation is not None else []
        if step.number == step.total // 10 >= 2 * LEAST_KEPT:
            found += of_steps(state.trend, config, state.parameters)
        return replace(step, alarms=tuple(found)) if found else step

    def at_end(self, state: State, start: torch.Tensor | None, config: TrainConfig) -> tuple[Alarm, ...]:
        """All that is to be said of a training that has ended.

        Args:
            state: what it has come to.
            start: what its vectors began with, of the same shape; None where it went on from another soft prompt.
            config: its settings.
        """
        found = [*self.before]
        if start is not None:
            found += of_vectors(state.learner.numbers(), start, config, state.step)
        found += of_steps(state.trend, config, state.parameters)
        return (*found, *self._of_answers(state.keeper, state.trend, config, OURS))

    def at_end_of(
        self, keeper: Keeper, trend: Trend, config: TrainConfig, parameters: int, who: str
    ) -> tuple[Alarm, ...]:
        """The same of what another loop has trained.

        Args:
            keeper: of the run's validations.
            trend: of its steps.
            config: its settings.
            parameters: how many numbers are learned.
            who: what was trained, in a sentence.
        """
        steps = of_steps(trend, config, parameters)
        return (*self.before, *steps, *self._of_answers(keeper, trend, config, who))

    def _of_answers(self, keeper: Keeper, trend: Trend, config: TrainConfig, who: str) -> list[Alarm]:
        """What the validations say, beside what the base model answers alone."""
        best, scores, task = keeper.best, keeper.scores, self._task
        if best is None or len(scores) != len(self._rows):  # never finite, or kept by an earlier release
            return []
        labelled, found = task.verbalizer is not None, list[Alarm]()
        if labelled:
            gold = [str(row.target) for row in self._rows]
            found = of_answers(scores, best["value"], gold, best, config.lr, who)
        return found + of_comparison(trend, scores, base_scores(task, self._rows), labelled=labelled, who=who)

    def require_same_answers(self, path: Path, made: SoftPrompt) -> None:
        """Reads a soft prompt that was stored and checks that it has the vectors of the one that was made, and answers
        a few validation rows alike. Of several processes all do, and the first one reads the file.

        Args:
            path: its file.
            made: the one that was stored there.

        Raises:
            StoreError: something differs.
            ArtifactError: the file cannot be read.
        """
        lm = self._task.model
        stored = lm.world.from_first(lambda: SoftPrompt.load(path))
        found = list[torch.Tensor]()
        for one in (made, stored):
            task = Task.of(lm, one)
            rows = [row for row in self._rows if self._task.asks(row)][:RELOADED]
            requests = [task.label_request(row) if task.words else task.target_request(row) for row in rows]
            found.append(lm.score(requests, [one.vectors.to(lm.device)]))
        if not (torch.equal(made.vectors, stored.vectors) and torch.equal(*found)):
            raise StoreError(
                f"The soft prompt that was stored in {path} gives other answers than the one that was trained; the "
                f"disk or another program may have changed it, so give the same command with --overwrite."
            )
