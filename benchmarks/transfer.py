"""A soft prompt of another task as the start, against the default start: trained in shared passes, on the same rows in
the same order, measured on the same test rows.

    python benchmarks/transfer.py TRAIN VALIDATION TEST --sources sst2 other --steps 50 200 1600

Prints a JSON line for each number of steps as it is done: the accuracy of each start with its standard error, and its
paired difference to the default start with the ends of its 95 % interval. Learning rates fall to their end in each
number of steps, so each is a training of its own.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace

import torch

from softprompt.evaluation.evaluate import evaluate
from softprompt.evaluation.metrics import paired_bootstrap
from softprompt.model.frozen import FrozenLM
from softprompt.soft_prompts.store import Store
from softprompt.tasks.reading import form_of, read_task
from softprompt.tasks.task import Task
from softprompt.tuning.config import TrainConfig
from softprompt.tuning.many import train_together
from softprompt.tuning.training import Training
from softprompt.tuning.transfer import DEFAULT_START


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("train", "validation", "test"):
        parser.add_argument(name)
    parser.add_argument("--sources", nargs="+", required=True, help="soft prompts of the base model, of one length")
    parser.add_argument("--steps", nargs="+", type=int, default=[50, 200, 1600])
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validation-rows", type=int, default=100)
    parser.add_argument("--test-rows", type=int, default=300)
    given = parser.parse_args()
    lm = FrozenLM.load(given.base)
    sources = {name: Store().load(name) for name in given.sources}
    for prompt in sources.values():
        Task.of(lm, prompt)  # refuses one of another base model
    length = next(iter(sources.values())).num_virtual_tokens
    rows, held_out, verbalizer = read_task(given.train, given.validation, None, None)
    test, _, _ = read_task(given.test, None, verbalizer, None)
    chosen = torch.randperm(len(test.examples), generator=torch.Generator().manual_seed(0))[: given.test_rows]
    test = replace(test, examples=tuple(test.examples[i] for i in sorted(chosen.tolist())))
    task = Task(lm, form_of(rows, lm.tokenizer, True), verbalizer, length, lm.window)
    task.remember()
    starts: dict[str, torch.Tensor | None] = {DEFAULT_START: None}
    starts |= {name: prompt.vectors for name, prompt in sources.items()}
    gold = [str(example.target) for example in test.examples]
    for steps in given.steps:
        began = time.perf_counter()
        config = TrainConfig(
            num_virtual_tokens=length,
            steps=steps,
            eval_every=max(25, steps // 8),
            batch_size=given.batch_size,
            validation_rows=given.validation_rows,
            seed=given.seed,
        )
        runs = [Training(task, rows, held_out, config, name=name, start=start) for name, start in starts.items()]
        for _ in train_together(runs):
            pass
        prompts = {name: run.result() for name, run in zip(starts, runs, strict=True)}
        hits = {
            name: [float(answer.text == target) for answer, target in zip(found.predictions, gold, strict=True)]
            for name, found in ((name, evaluate(task, prompt.vectors, test)) for name, prompt in prompts.items())
        }
        found = dict[str, dict[str, object]]()
        for name, right in hits.items():
            share = sum(right) / len(right)
            found[name] = {"accuracy": share, "stderr": (share * (1 - share) / len(right)) ** 0.5}
            if name != DEFAULT_START:
                found[name]["gain"] = paired_bootstrap(right, hits[DEFAULT_START])
        line = {"steps": steps, "n": len(gold), "starts": found, "seconds": round(time.perf_counter() - began)}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
