"""``softprompt demo``: the whole way on real data, in minutes on a laptop's processor.

Film critics' verdicts, "fresh" or "rotten", are to be told from a sentence of their reviews. A frozen language model
can hardly do that as it is; with 150 kilobytes of learned vectors in front, it can.
"""

from __future__ import annotations

import bz2
import csv
import io
import json
import random
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.rule import Rule

from softprompt import files
from softprompt.cli.options import Loading
from softprompt.data.example import Dataset, Example
from softprompt.data.packages import DEFAULT_BASE, ROTTEN_TOMATOES
from softprompt.data.reading import read_dataset
from softprompt.drawing.words import duration, number, simple_table
from softprompt.errors import StoreError
from softprompt.evaluation.evaluate import Evaluation, evaluate
from softprompt.files import atomic_writer, local_path
from softprompt.model.frozen import FrozenLM
from softprompt.model.quantized import bytes_of
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.soft_prompts.store import Store
from softprompt.tasks.predict import Prediction, Query, predict
from softprompt.tasks.task import Task
from softprompt.terminal.console import print_json, rows_bar, stderr, stdout, warn_truncated
from softprompt.terminal.training import say_alarms, watch
from softprompt.text.template import default_template
from softprompt.text.tokens import SOFT
from softprompt.tuning.config import TrainConfig
from softprompt.tuning.run_folder import RunFolder
from softprompt.tuning.training import Training

VERDICTS = ("fresh", "rotten")

TEST_ROWS, VALIDATION_ROWS = 500, 200

SENTENCES = (
    "An absolute delight from the first scene to the last.",
    "Two hours of my life that I will never get back.",
    "Charming cast, but the story never finds its feet.",
    "No masterpiece, yet I laughed all the way through.",
)


@dataclass(frozen=True)
class Review:
    """A sentence or two by a critic.

    Attributes:
        text: what was written.
        verdict: ``fresh`` or ``rotten``.
        film: which film it is about.
    """

    text: str
    verdict: str
    film: str


def read_reviews(path: Path) -> list[Review]:
    """Reads ``rotten_tomatoes_corpus.csv.bz2``: its reviews, each text once, without its summaries of plots."""
    rows = csv.DictReader(io.StringIO(bz2.decompress(path.read_bytes()).decode("utf-8"), newline=""))
    reviews = (Review(row["text"].strip(), row["category"], row["movie_name"]) for row in rows)
    return list({review.text: review for review in reviews if review.verdict in VERDICTS and review.text}.values())


def split_by_film(
    reviews: Sequence[Review], *, seed: int, test: int = TEST_ROWS, validation: int = VALIDATION_ROWS
) -> dict[str, list[Review]]:
    """Parts ``train``, ``validation`` and ``test`` that have no film in common, so that no title gives a verdict away.

    ``test`` and ``validation`` hold as many reviews, half of them fresh; ``train`` all reviews of the films left.
    """
    generator = random.Random(seed)
    films = sorted({review.film for review in reviews})
    generator.shuffle(films)
    parts: dict[str, list[Review]] = {}
    for name, size in (("test", test), ("validation", validation)):
        chosen: dict[str, list[Review]] = {verdict: [] for verdict in VERDICTS}
        while films and min(map(len, chosen.values())) < size // 2:
            film = films.pop()
            for review in reviews:
                if review.film == film:
                    chosen[review.verdict].append(review)
        parts[name] = [review for several in chosen.values() for review in several[: size // 2]]
        generator.shuffle(parts[name])
    left = set(films)
    parts["train"] = [review for review in reviews if review.film in left]
    return parts


def write_splits(reviews: Sequence[Review], folder: Path, *, seed: int) -> dict[str, Dataset]:
    """Writes the parts as JSON Lines and reads them back as any user's data are read.

    Raises:
        OSError: the folder cannot be written.
    """
    datasets = {}
    for name, part in split_by_film(reviews, seed=seed).items():
        path = folder / f"{name}.jsonl"
        with atomic_writer(path) as file:
            for review in part:
                row = {"input": review.text, "target": review.verdict, "film": review.film}
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        datasets[name] = read_dataset(path, fields=("input",))
    return datasets


@dataclass(frozen=True)
class Outcome:
    """What the demo found.

    Attributes:
        soft_prompt: the tuned one, with its metrics on the test rows, too.
        zero_shot, tuned: the base model alone, and with the soft prompt, on the same test rows and template.
        base_digests: of every bit of the base model before and after.
        base_bytes: bytes of its weights in memory.
        answers: for each of ``SENTENCES``, the untuned and the tuned soft prompt's answer, all from one batch.
        swap_seconds: to make another soft prompt ready, the base model being in memory.
        load_seconds: to load the base model.
        train_seconds: from the first step to the last, validations included.
    """

    soft_prompt: SoftPrompt
    zero_shot: Evaluation
    tuned: Evaluation
    base_digests: tuple[str, str]
    base_bytes: int
    answers: tuple[tuple[Prediction, Prediction], ...]
    swap_seconds: float
    load_seconds: float
    train_seconds: float

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "base": self.soft_prompt.base,
            "zero_shot": self.zero_shot.as_dict(),
            "tuned": self.tuned.as_dict(),
            "num_virtual_tokens": self.soft_prompt.num_virtual_tokens,
            "base_bytes": self.base_bytes,
            "base_digest_before": self.base_digests[0],
            "base_digest_after": self.base_digests[1],
            "base_unchanged": self.base_digests[0] == self.base_digests[1],
            "answers": [
                {"input": sentence, "untuned": untuned.probabilities, "tuned": tuned.probabilities}
                for sentence, (untuned, tuned) in zip(SENTENCES, self.answers, strict=True)
            ],
            "swap_seconds": round(self.swap_seconds, 4),
            "load_seconds": round(self.load_seconds, 3),
            "train_seconds": round(self.train_seconds, 3),
        }


def run(load: Callable[[], FrozenLM], splits: Mapping[str, Dataset], config: TrainConfig) -> Outcome:
    """Measures the base model alone, tunes a soft prompt, measures again, and swaps.

    Args:
        load: gives the base model.
        splits: ``train``, ``validation`` and ``test``.
        config: settings of the training.
    """
    stderr.print("1/4  loading the base model")
    began = time.perf_counter()
    lm = load()
    load_seconds = time.perf_counter() - began
    task = Task.for_data(lm, splits["train"], default_template(labelled=True))

    stderr.print("2/4  asking the base model alone")
    with rows_bar("rows") as progress:
        zero_shot = evaluate(task.without_soft_prompt(), None, splits["test"], progress=progress)

    stderr.print(f"3/4  tuning {task.num_virtual_tokens} virtual tokens")
    training = Training(task, splits["train"], splits["validation"], config, name="demo")
    warn_truncated(training.truncated, task.max_length)
    untuned = training.vectors
    began = time.perf_counter()
    watch(training)
    train_seconds = time.perf_counter() - began
    tuned = training.result()
    say_alarms(training.alarms)

    stderr.print("4/4  asking the base model with the soft prompt")
    with rows_bar("rows") as progress:
        after = evaluate(task, tuned.vectors, splits["test"], progress=progress)
    on_test = [{"split": "test", **metric.as_dict()} for metric in after.metrics]
    return Outcome(
        soft_prompt=replace(tuned, metrics=(*tuned.metrics, *on_test)),
        zero_shot=zero_shot,
        tuned=after,
        base_digests=(lm.digest_before, lm.weights_digest()),
        base_bytes=bytes_of(lm.model),
        answers=tuple(_answers(task, (untuned, tuned.vectors))),
        swap_seconds=_swap_seconds(lm, (untuned, tuned.vectors)),
        load_seconds=load_seconds,
        train_seconds=train_seconds,
    )


def _answers(task: Task, soft_prompts: tuple[torch.Tensor, torch.Tensor]) -> Iterator[tuple[Prediction, Prediction]]:
    """Both soft prompts' answers to ``SENTENCES``, from one batch."""
    examples = [Example({"input": sentence}, None) for sentence in SENTENCES]
    queries = [Query(task, example, vectors) for vectors in soft_prompts for example in examples]
    found = predict(queries)
    return zip(found[: len(examples)], found[len(examples) :], strict=True)


@torch.no_grad()
def _swap_seconds(lm: FrozenLM, soft_prompts: Sequence[torch.Tensor]) -> float:
    """Median time to compute a soft prompt's keys and values, which is all that a swap takes."""
    seconds = []
    for vectors in list(soft_prompts) * 5:
        began = time.perf_counter()
        lm.prefix_kv((SOFT,), vectors)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def show(outcome: Outcome, splits: Mapping[str, Dataset], path: Path) -> None:
    """Prints the outcome for people."""
    base, size = outcome.soft_prompt.base, path.stat().st_size
    rows = {name: len(dataset.examples) for name, dataset in splits.items()}

    def section(title: str) -> None:
        stdout.print()
        stdout.print(Rule(title, align="left", characters="─"))

    section(f"Accuracy on {rows['test']} reviews of films that were not trained on")
    table = simple_table("", ">accuracy", ">95 % interval", ">log-loss")
    for title, found in ((f"{base} alone", outcome.zero_shot), (f"{base} + soft prompt", outcome.tuned)):
        of_name = {metric.name: metric for metric in found.metrics}
        accuracy, loss = of_name["accuracy"], of_name["log_loss"]
        interval = f"{accuracy.low:.1%} to {accuracy.high:.1%}"
        table.add_row(title, f"{accuracy.value:.1%}", interval, number("log_loss", loss.value))
    stdout.print(table)
    stdout.print(f"tuned on {rows['train']:,} reviews in {duration(outcome.train_seconds)}")

    section("What was learned, and what was not touched")
    table = simple_table("", ">bytes", "")
    table.add_row("soft prompt", f"{size:,}", str(path))
    before, after = (digest[:12] for digest in outcome.base_digests)
    table.add_row("base model", f"{outcome.base_bytes:,}", f"SHA-256 before {before}…, after {after}…")
    stdout.print(table)
    unchanged = outcome.base_digests[0] == outcome.base_digests[1]
    times = outcome.base_bytes // size
    stdout.print(
        f"the base model is {times:,} times as large, and "
        + ("not one of its bits has changed" if unchanged else "HAS CHANGED, which must never happen: please report it")
    )

    section("Two soft prompts swapped in one batch, the model loaded once")
    table = simple_table("", "untuned", "tuned")
    for sentence, answers in zip(SENTENCES, outcome.answers, strict=True):
        table.add_row(sentence, *map(_answer, answers))
    stdout.print(table)
    stdout.print(
        f"a swap takes {outcome.swap_seconds * 1000:.0f} ms; "
        f"getting the base model ready took {duration(outcome.load_seconds)}"
    )

    section("Next")
    stdout.print('softprompt predict demo "What a film!"')
    stdout.print(f"softprompt evaluate demo {splits['test'].source}")


def _answer(prediction: Prediction) -> str:
    probabilities = prediction.probabilities or {}
    return f"{prediction.text} {probabilities[prediction.text]:.2f}"


def demo(seed: int, steps: int, out: Path | None, loading: Loading, as_json: bool) -> None:
    """Runs it, and prints what it found.

    Raises:
        StoreError: another soft prompt has its name.
        SoftPromptError: data or base model cannot be had.
    """
    config = TrainConfig(steps=steps, seed=seed)
    store = Store()
    folder = store.run_folder("demo")
    if "demo" in store.names() and not (folder / "train.jsonl").exists():
        raise StoreError(
            f"The name 'demo' is taken by a soft prompt that is not the demo's, {store.path('demo')}; "
            f"rename or remove it first."
        )
    with RunFolder(folder, "demo"):
        splits = write_splits(read_reviews(ROTTEN_TOMATOES.path()), folder, seed=seed)
        outcome = run(lambda: loading.load(DEFAULT_BASE), splits, config)
        path = store.save(outcome.soft_prompt, overwrite=True)
        document = {"name": "demo", "path": str(path), "bytes": path.stat().st_size, **outcome.as_dict()}
        if out is not None:
            with files.atomic_writer(local_path(out) / "results.json") as file:
                file.write(json.dumps(document, indent=2).encode() + b"\n")
            for source in (path, *(folder / f"{name}.jsonl" for name in splits)):
                shutil.copyfile(source, local_path(out) / source.name)
    if as_json:
        print_json(document)
    else:
        show(outcome, splits, path)
