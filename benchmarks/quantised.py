"""What a quantised base model takes and costs: bytes of its weights, memory of a process, time of a training step and
of a written token, each precision in processes of its own that take turns.

    python benchmarks/quantised.py --data sst2/train.jsonl --precisions bf16 nf4 int8 fp8 int4 --json

Times are medians over all rounds; ``step_ratio`` and ``token_ratio`` are over the first precision, above 1 is slower.
Memory is above that of a process that has imported the same libraries and loaded nothing, after loading
(``loaded_bytes``) and at its peak in a step (``peak_bytes``); both hold pages of the weights' file that the system may
take back.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import psutil
import torch

from softprompt.data.reading import read_dataset
from softprompt.methods.peft import PeftTask
from softprompt.model.frozen import FrozenLM
from softprompt.model.loading import DTYPES
from softprompt.model.quantized import bytes_of
from softprompt.model.request import Sampling
from softprompt.tasks.predict import Query, predict
from softprompt.text.template import DEFAULT_TEMPLATE, Template
from softprompt.tuning.gradients import Gradients
from softprompt.tuning.objective import Objective
from softprompt.tuning.start import initial_vectors

TOKENS = 16
"""Tokens that are written to time one."""


def measure(options: argparse.Namespace, precision: str) -> dict[str, Any]:
    """One process: loads, trains some steps, and writes a text."""
    if precision == "nf4":
        __import__("bitsandbytes")
    gc.collect()
    empty = psutil.Process().memory_info().rss
    if precision in DTYPES:
        lm = FrozenLM.load(options.base, dtype=precision, device=options.device)
    else:
        lm = FrozenLM.load(options.base, dtype=options.dtype, device=options.device, quantize=precision)
    gc.collect()
    loaded = psutil.Process().memory_info().rss - empty
    data = read_dataset(options.data, fields=("input",))
    task = PeftTask.for_data(lm, data, Template(DEFAULT_TEMPLATE), num_virtual_tokens=options.num_virtual_tokens)
    requests = [task.target_request(example) for example in data.examples[: 64 * options.batch_size]]
    random.Random(0).shuffle(requests)
    vectors = initial_vectors(lm, options.num_virtual_tokens, init="vocab", seed=0).to(lm.device).requires_grad_()
    gradients, steps = Gradients(lm), []
    for number in range(options.warmup + options.steps):
        start = number * options.batch_size % (len(requests) - options.batch_size)
        batch = requests[start : start + options.batch_size]
        began = time.perf_counter()
        loss, _ = gradients.backward(Objective(), batch, [0] * len(batch), vectors)
        if lm.device.type == "cuda":
            torch.cuda.synchronize()
        if number >= options.warmup:
            steps.append(time.perf_counter() - began)
        assert loss == loss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - empty
    free = PeftTask(lm, Template(DEFAULT_TEMPLATE), None, options.num_virtual_tokens, lm.window)
    query, writes = Query(free, data.examples[0], vectors.detach().cpu()), []
    for _ in range(2):
        began = time.perf_counter()
        found = predict([query], sampling=Sampling(max_new_tokens=TOKENS))
        writes.append((time.perf_counter() - began) / TOKENS)
    assert found
    return {
        "base_bytes": bytes_of(lm.model),
        "loaded_bytes": loaded,
        "peak_bytes": peak,
        "step": steps,
        "token": writes[-1:],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--data", required=True)
    parser.add_argument("--precisions", nargs="+", default=["bf16", "nf4", "int8", "fp8", "int4"])
    parser.add_argument("--dtype", default="bf16", help="what quantised models compute in")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--num-virtual-tokens", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options, options.one)))
        return
    found: dict[str, list[dict[str, Any]]] = {precision: [] for precision in options.precisions}
    for _ in range(options.rounds):
        for precision, runs in found.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--one", precision]
            runs.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
    rows = {}
    for precision, runs in found.items():
        rows[precision] = {key: statistics.median(run[key] for run in runs) for key in runs[0] if key.endswith("bytes")}
        for key in ("step", "token"):
            rows[precision][f"{key}_seconds"] = statistics.median(one for run in runs for one in run[key])
    first = rows[options.precisions[0]]
    for row in rows.values():
        row |= {f"{key}_ratio": row[f"{key}_seconds"] / first[f"{key}_seconds"] for key in ("step", "token")}
    if options.json:
        print(json.dumps({"threads": torch.get_num_threads(), "load": psutil.getloadavg()[0], "precisions": rows}))
        return
    for precision, row in rows.items():
        sizes = ", ".join(f"{key} {row[key] / 1e6:,.0f} MB" for key in row if key.endswith("bytes"))
        print(f"{precision}: {sizes}; step × {row['step_ratio']:.2f}, token × {row['token_ratio']:.2f}")


if __name__ == "__main__":
    main()
