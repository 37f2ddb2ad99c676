"""Made-up cells of the shape of ``results.json``, and what is made of them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from softprompt.compare import report, summary
from softprompt.compare.summary import Row
from softprompt.drawing import style
from softprompt.evaluation.metrics import accuracy, paired_bootstrap

METHODS: dict[str, tuple[float, int, int, float, float, float, float]] = {
    # accuracy on sst2, trained parameters, bytes, seconds, peak memory, latency in ms, forgetting
    "majority-class": (0.511, 0, 8, 0.0, 0.6e9, 0.0, 1.0),
    "zero-shot": (0.802, 0, 0, 0.0, 0.6e9, 28.0, 1.0),
    "zero-shot-calibrated": (0.821, 0, 16, 0.4, 0.6e9, 28.4, 1.0),
    "instruction": (0.773, 0, 84, 21.0, 0.6e9, 33.0, 1.0),
    "instruction-calibrated": (0.811, 0, 100, 22.0, 0.6e9, 33.5, 1.0),
    "few-shot": (0.683, 0, 1200, 95.0, 0.9e9, 61.0, 1.0),
    "few-shot-calibrated": (0.796, 0, 1216, 96.0, 0.9e9, 61.4, 1.0),
    "few-shot-nearest": (0.846, 0, 480_000, 140.0, 1.1e9, 88.0, 1.0),
    "few-shot-nearest-calibrated": (0.851, 0, 480_016, 141.0, 1.1e9, 88.2, 1.0),
    "tf-idf": (0.812, 14_822, 402_000, 1.3, 0.2e9, 0.4, 1.0),
    "peft-prompt-tuning": (0.712, 11_520, 46_600, 600.4, 4.1e9, 34.0, 1.0),
    "soft-prompt": (0.907, 11_520, 47_952, 402.1, 1.2e9, 31.0, 1.0),
    "soft-prompt-ensemble": (0.914, 34_560, 143_856, 1206.0, 1.2e9, 74.0, 1.0),
    "prefix": (0.921, 230_400, 926_000, 455.0, 1.3e9, 30.0, 1.0),
    "lora": (0.932, 921_600, 3_700_000, 590.0, 3.9e9, 29.0, 1.09),
    "full-fine-tuning": (0.938, 134_515_008, 269_000_000, 597.0, 5.2e9, 28.0, 1.62),
}

FREE_TEXT = [method for method in METHODS if method not in ("majority-class", "tf-idf")]

LEARNED = ("peft-prompt-tuning", "soft-prompt", "prefix", "lora", "full-fine-tuning")

SIZES = {"smollm2-135m": 134_515_008, "smollm2-360m": 361_821_120, "smollm2-1.7b": 1_711_376_384}


def make_cells(
    task: str = "sst2", base: str = "smollm2-135m", seeds: int = 1, shift: float = 0.0, gain: float = 0.0
) -> list[dict[str, Any]]:
    """A cell for every method: accuracies ``shift`` higher than on SST-2, and hard prompts ``gain`` more."""
    return [
        make_cell(method, task, base, seed, shift + (gain if numbers[1] == 0 else 0.0))
        for method, numbers in METHODS.items()
        for seed in range(seeds if method in LEARNED else 1)
    ]


def make_cell(method: str, task: str, base: str, seed: int, shift: float, bleu: bool = False) -> dict[str, Any]:
    accuracy, parameters, kept, seconds, memory, latency, forgetting = METHODS[method]
    n = 1821
    value = round(min(accuracy + shift + 0.004 * (seed - 1) * (seed > 0), 0.99), 4)
    ours = round(METHODS["soft-prompt"][0] + shift, 4)
    stderr = (value * (1 - value) / n) ** 0.5
    top = 40.0 if bleu else 1.0
    difference = {"value": value - ours, "low": value - ours - 0.013, "high": value - ours + 0.012}
    scaled = {key: top * number for key, number in difference.items()}
    curve = [
        {"seconds": seconds * i / 8, "step": 50 * i, "value": top * (value - 0.35 * 0.5**i), "loss": 2 * 0.7**i}
        for i in range(1, 9)
    ]
    return {
        "task": task,
        "method": method,
        "base": base,
        "base_parameters": SIZES[base],
        "seed": seed,
        "status": "done",
        "reason": None,
        "metric": "bleu" if bleu else "accuracy",
        "value": top * value,
        "stderr": top * stderr,
        "low": top * (value - 2 * stderr),
        "high": top * (value + 1.9 * stderr),
        "n": n,
        "metrics": [] if bleu else [made_metric("macro_f1", value - 0.02), made_metric("mcc", 2 * value - 1)],
        "most_frequent_answer": made_answer("positive", 1.0 if method == "majority-class" else 0.52, 0.511),
        "trainable_parameters": parameters,
        "bytes": kept,
        "train_seconds": seconds,
        "peak_memory_bytes": memory,
        "latency_ms": latency,
        "forgetting": {"before": 19.1, "after": 19.1 * forgetting, "ratio": forgetting},
        "validation": top * value,
        "chosen": {"lr": 3e-5} if method in LEARNED else {},
        "curve": curve if method in LEARNED else [],
        "difference": None if method == "soft-prompt" else scaled,
        "budget_seconds": 600.0,
        "versions": {"torch": "2.13.0", "softprompt": "0.1.0"},
    }


def made_metric(name: str, value: float) -> dict[str, Any]:
    return {"metric": name, "value": value, "stderr": 0.01, "low": value - 0.02, "high": value + 0.02, "n": 1821}


def made_answer(label: str, share: float, gold_share: float) -> dict[str, Any]:
    telling = share >= 0.95 and gold_share < 0.9
    return {"label": label, "share": share, "gold_share": gold_share, "one_answer": telling}


def make_failed(method: str, seed: int = 0, task: str = "sst2") -> dict[str, Any]:
    return {
        "task": task,
        "method": method,
        "base": "smollm2-135m",
        "seed": seed,
        "status": "failed",
        "reason": "The model's memory is <full>; use a smaller batch.",
        "value": None,
        "difference": None,
        "budget_seconds": 600.0,
        "versions": {"torch": "2.13.0", "softprompt": "0.1.0"},
    }


def several_tasks() -> list[dict[str, Any]]:
    free_text = [make_cell(method, "e2e_nlg", "smollm2-135m", 0, -0.2, bleu=True) for method in FREE_TEXT]
    return [
        *make_cells("sst2", seeds=3),
        *make_cells("trec6", shift=-0.02, gain=-0.3),
        *make_cells("rte", shift=-0.3, gain=0.15),
        *free_text,
        make_failed("lora", seed=1, task="trec6"),
    ]


def several_bases(tasks: Sequence[str] = ("sst2",)) -> list[dict[str, Any]]:
    bases = (("smollm2-1.7b", 0.05, 0.06), ("smollm2-135m", 0.0, 0.0), ("smollm2-360m", 0.02, 0.03))
    return [
        cell for base, shift, gain in bases for task in tasks for cell in make_cells(task, base, shift=shift, gain=gain)
    ]


def row_of(cells: Sequence[dict[str, Any]], method: str, task: str = "sst2") -> Row:
    (row,) = (row for row in summary.summary(cells) if (row.method, row.task) == (method, task))
    return row


def printed(cells: Sequence[dict[str, Any]], width: int = 120) -> list[str]:
    console = Console(file=io.StringIO(), width=width, soft_wrap=True, markup=False, highlight=False)
    console.print(report.table(cells))
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def cells_of_answers(seeds: int, ours: Sequence[bool], theirs: Sequence[bool]) -> list[dict[str, Any]]:
    """LoRA and the soft prompt, the same answers for each seed: hits of the same rows."""
    value, low, high = paired_bootstrap([float(hit) for hit in theirs], [float(hit) for hit in ours])
    cells = []
    for method, hits in (("soft-prompt", ours), ("lora", theirs)):
        found = accuracy(["a" if hit else "b" for hit in hits], ["a"] * len(hits)).as_dict()
        for seed in range(seeds):
            cell = make_cell(method, "sst2", "smollm2-135m", seed, 0.0) | found
            cell["difference"] = {"value": value, "low": low, "high": high} if method == "lora" else None
            cells.append(cell)
    return cells


def panels_of(cells: Sequence[dict[str, Any]]) -> dict[str, list[Row]]:
    return summary.grouped(summary.summary(cells))


def drawn(figure: Figure | None) -> Figure:
    assert figure is not None
    with style.style():
        figure.draw_without_rendering()
    return figure
