"""One task of lm-evaluation-harness by softprompt's class and by the harness's own ``hf``, taking turns in one process.

    python benchmarks/lm_eval_time.py --data test.jsonl --dtype fp32 --limit 200 --json

The task is local: rows of ``input`` and ``target`` with few labels, of which the most probable one is chosen. Both ask
the same base model without a soft prompt, each in a copy of its own, so the scores are the same up to rounding. Prints
the ratio of the times of whole evaluations, theirs over ours (medians; above 1: ours is faster), and both scores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the task is local; nothing is to be asked for while it is timed

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from softprompt.data.example import infer_labels
from softprompt.data.packages import DEFAULT_BASE
from softprompt.data.reading import read_dataset
from softprompt.evaluation.lm_eval import SoftPromptLM
from softprompt.model.frozen import FrozenLM
from softprompt.model.loading import DTYPES, load_base, pick_device

NAME = "rows"


def write_task(folder: Path, data: str) -> None:
    """The rows as a task of the harness: a JSON file is a YAML file."""
    dataset = read_dataset(data, fields=("input",))
    labels = infer_labels(dataset)
    if labels is None:
        raise SystemExit(f"{data} holds free text; give rows with labels.")
    rows = [{"text": one.fields["input"], "gold": labels.index(str(one.target))} for one in dataset.examples]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {
        "task": NAME,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Text: {{text}}\nLabel:",
        "doc_to_choice": list(labels),
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "rows.yaml").write_text(json.dumps(task), encoding="utf-8")


def harness_model(options: argparse.Namespace, dtype: str) -> Any:
    """The harness's own class over the base model in that dtype, as transformers loads it."""
    model, tokenizer = load_base(options.base)
    for weight in model.parameters():
        if weight.is_floating_point():
            weight.data = weight.data.to(DTYPES[dtype])
    device = pick_device(options.device)
    batch_size = options.batch_size if options.batch_size.startswith("auto") else int(options.batch_size)
    return HFLM(pretrained=model.to(device).eval(), tokenizer=tokenizer, batch_size=batch_size, device=str(device))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Both in turns, as JSON values."""
    lm = FrozenLM.load(options.base, dtype=options.dtype, device=options.device)
    dtype = next(name for name, known in DTYPES.items() if known == lm.dtype)
    models = {"ours": SoftPromptLM(lm), "hf": harness_model(options, dtype)}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    scores: dict[str, dict[str, float]] = {}
    with TemporaryDirectory() as folder:
        write_task(Path(folder), options.data)
        manager = TaskManager(include_path=folder, include_defaults=False)

        def run(name: str, limit: int | None) -> Any:
            return lm_eval.simple_evaluate(
                models[name], tasks=[NAME], task_manager=manager, limit=limit, log_samples=False, bootstrap_iters=0
            )

        for name in models:
            run(name, 2)  # reads the rows, and warms up
        for _ in range(options.rounds):
            for name in models:
                began = time.perf_counter()
                found = run(name, options.limit)
                seconds[name].append(time.perf_counter() - began)
                scores[name] = {
                    "acc": float(found["results"][NAME]["acc,none"]),
                    "n": int(found["n-samples"][NAME]["effective"]),
                }
    medians = {name: statistics.median(several) for name, several in seconds.items()}
    return {
        "ratio": medians["hf"] / medians["ours"],
        "seconds": medians,
        "scores": scores,
        "dtype": dtype,
        "device": lm.device.type,
        "batch_size": options.batch_size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", required=True, help="rows of input and target, with few labels")
    parser.add_argument("--base", default=DEFAULT_BASE)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--limit", type=int, default=200, help="the first so many rows")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--batch-size", default="16", help="of the harness's class, or auto; ours makes its own batches"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with redirect_stdout(sys.stderr):  # what the harness prints
        found = measure(options)
    if options.json:
        print(json.dumps(found))
        return
    for name, of in found["scores"].items():
        print(f"{name}: {found['seconds'][name]:.2f} s, accuracy {of['acc']:.4f} (n = {of['n']})")
    print(f"ours is {found['ratio']:.2f} times as fast as hf ({found['dtype']}, {found['device']})")


if __name__ == "__main__":
    main()
