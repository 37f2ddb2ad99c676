"""Many soft prompts in shared passes, against the same ones trained one after the other.

    python benchmarks/fit_many.py --data sst2/train.jsonl --jobs 16 --num-virtual-tokens 20 --batch-size 8 --json

Both sides take turns, step by step, in one process: a round of ``train_together`` over all jobs, then one step of each
job alone. ``ratio`` is the time of the steps alone over that of the round: above 1, together is faster. Memory is the
peak above the loaded model, each side in a process of its own; ``ratio_memory`` is that of all together over that of
one job.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch

from benchmarks.train_step import all_batches, matrix_peak, resident, start, useful_operations
from softprompt.data.reading import read_dataset
from softprompt.model.frozen import FrozenLM
from softprompt.model.loading import DTYPES
from softprompt.tuning.gradients import Gradients, Share
from softprompt.tuning.objective import Objective


class Side:
    """All jobs' steps, together or one after the other."""

    def __init__(self, lm: FrozenLM, options: argparse.Namespace, jobs: int) -> None:
        self.lm, self.gradients = lm, Gradients(lm)
        self.vectors = [start(lm, options).to(lm.device).requires_grad_() for _ in range(jobs)]
        self.optimizers = [torch.optim.AdamW([own], lr=1e-6) for own in self.vectors]
        self.losses: list[float] = []

    def step(self, shares: list[Share], *, together: bool) -> float:
        """Seconds that a step of each job takes."""
        began = time.perf_counter()
        groups = [range(len(shares))] if together else [range(i, i + 1) for i in range(len(shares))]
        self.losses = []
        for group in groups:
            work = self.gradients.prepare([shares[i] for i in group])
            for i in group:
                self.optimizers[i].zero_grad()
            self.losses += self.gradients.add(work, [self.vectors[i] for i in group]).tolist()
            for i in group:
                self.optimizers[i].step()
        return time.perf_counter() - began


def rounds(lm: FrozenLM, options: argparse.Namespace) -> list[list[Share]]:
    """For each round, a batch for each job."""
    data = read_dataset(options.data, fields=("input",))
    batches = all_batches(lm, data, options.num_virtual_tokens, options.batch_size)
    shape = (options.num_virtual_tokens, lm.hidden_size)
    shares = [Share(Objective(), batch, [0] * len(batch), shape) for batch in batches]
    return [shares[i : i + options.jobs] for i in range(0, len(shares) - options.jobs + 1, options.jobs)]


def peak_memory(options: argparse.Namespace, side: str) -> int:
    """Bytes of peak memory above the loaded model, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.fit_many", *sys.argv[1:], "--memory-of", side]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.strip().splitlines()[-1])


def measure_memory(options: argparse.Namespace) -> None:
    lm = FrozenLM.load(options.base, dtype=options.dtype, device=options.device)
    lm.weights_digest()  # touches every page of the weights
    all_rounds = rounds(lm, options)[:2]
    jobs = options.jobs if options.memory_of == "together" else 1
    side = Side(lm, options, jobs)
    on_gpu = options.device == "cuda"
    loaded = torch.cuda.memory_allocated() if on_gpu else resident()
    for shares in all_rounds:
        side.step(shares[:jobs], together=True)
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(peak - loaded)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--jobs", type=int, default=16)
    parser.add_argument("--num-virtual-tokens", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--compile", choices=["on", "off"], default="on")
    parser.add_argument("--memory-of", choices=("together", "alone"), help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.memory_of:
        measure_memory(options)
        return

    memory = {side: peak_memory(options, side) for side in ("together", "alone")}
    peak = matrix_peak(DTYPES[options.dtype], options.device)
    lm = FrozenLM.load(options.base, dtype=options.dtype, device=options.device)
    if options.compile == "on":
        lm.layers.set(compiled=True)
    seconds: dict[str, list[float]] = {"together": [], "alone": []}
    sides = {name: Side(lm, options, options.jobs) for name in seconds}
    operations, difference = [], 0.0
    for number, shares in enumerate(rounds(lm, options)[: options.warmup + options.steps]):
        for name, side in sides.items():
            took = side.step(shares, together=name == "together")
            if number >= options.warmup:
                seconds[name].append(took)
        pairs = zip(sides["together"].losses, sides["alone"].losses, strict=True)
        difference = max(difference, *(abs(ours - theirs) for ours, theirs in pairs))
        operations.append(
            sum(useful_operations(lm, list(share.requests), options.num_virtual_tokens) for share in shares)
        )
    medians = {name: statistics.median(took) for name, took in seconds.items()}
    found = {
        "ratio": medians["alone"] / medians["together"],
        "ratio_memory": memory["together"] / memory["alone"],
        "seconds": medians,
        "memory_above_model_bytes": memory,
        "largest_difference_of_a_loss": difference,
        "share_of_matrix_peak": {
            name: statistics.mean(operations[options.warmup :]) / took / peak for name, took in medians.items()
        },
        "jobs": options.jobs,
        "num_virtual_tokens": options.num_virtual_tokens,
        "batch_size": options.batch_size,
        "dtype": options.dtype,
        "compile": options.compile,
        "device": options.device,
        "steps": len(seconds["alone"]),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(found) if options.json else "\n".join(f"{key}: {value}" for key, value in found.items()))


if __name__ == "__main__":
    main()
