"""Which alarms sound trainings raise: each data set of a folder is trained on for some steps, with the defaults else.

    python benchmarks/false_alarms.py FOLDER [--sets sst2 trec6] [--base smollm2-135m] [--steps 60] [--seeds 1]

FOLDER holds a folder for each data set, with ``train.jsonl`` and ``validation.jsonl``. A JSON line comes as each
training ends: its validation, and each alarm with its figures; the last line counts them. Whether an alarm is false, a
reader decides: a base model may really learn nothing of a set in so few steps.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from softprompt.api import load_model
from softprompt.compare.plan import cut
from softprompt.data.packages import DEFAULT_BASE
from softprompt.errors import SoftPromptError
from softprompt.model.frozen import FrozenLM
from softprompt.tuning.config import TrainConfig
from softprompt.tuning.job import Job

FILES = ("train.jsonl", "validation.jsonl")


def trained(lm: FrozenLM, folder: Path, config: TrainConfig) -> dict[str, Any]:
    """What a training on one data set came to, as JSON values."""
    began = time.perf_counter()
    train, validation = (str(folder / name) for name in FILES)
    job = Job.read(train, validation, name=folder.name, config=config)
    rows = cut(
        job.rows, (config.steps or 0) * config.batch_size, config.seed
    )  # no more are seen, and each is tokenized
    job = replace(job, rows=rows).on(lm)
    training = job.training(lm)
    meanwhile = [{"step": step.number, **alarm.as_dict()} for step in training for alarm in step.alarms]
    best = training.result()
    return {
        "set": folder.name,
        "seed": config.seed,
        "stopped": training.stopped,
        "steps": training.step,
        "metrics": [{key: metric[key] for key in ("metric", "value", "stderr", "n")} for metric in best.metrics[:1]],
        "alarms": [alarm.as_dict() for alarm in training.alarms],
        "meanwhile": meanwhile,
        "doubts": len(job.reading.doubts),
        "seconds": round(time.perf_counter() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sets", nargs="+", help="names of folders in it; by default all")
    parser.add_argument("--base", default=DEFAULT_BASE)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--validation-rows", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=1)
    given = parser.parse_args()
    folders = [one for one in sorted(given.folder.iterdir()) if all((one / name).is_file() for name in FILES)]
    if given.sets is not None:
        folders = [one for one in folders if one.name in given.sets]
    lm = load_model(given.base, dtype=given.dtype)
    kinds, trainings, silent = Counter[str](), 0, 0
    for folder in folders:
        for seed in range(given.seeds):
            config = TrainConfig(
                steps=given.steps, batch_size=given.batch_size, validation_rows=given.validation_rows, seed=seed
            )
            try:
                found = trained(lm, folder, config)
            except SoftPromptError as error:
                found = {"set": folder.name, "seed": seed, "error": str(error)}
            else:
                trainings += 1
                silent += not found["alarms"]
                kinds.update(alarm["kind"] for alarm in found["alarms"])
            print(json.dumps(found, ensure_ascii=False), flush=True)
    print(json.dumps({"trainings": trainings, "without_alarms": silent, "kinds": kinds}), flush=True)


if __name__ == "__main__":
    main()
