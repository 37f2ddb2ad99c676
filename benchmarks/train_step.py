"""One optimizer step of prompt tuning, ours against PEFT's: same base model, rows, template, loss and dtype,
alternating in one process.

    python benchmarks/train_step.py --against peft --data sst2/train.jsonl --num-virtual-tokens 100 --batch-size 32
    --dtype bf16 --json

Prints medians in seconds, the ratio (above 1: ours is faster), what each side's gradient and loss are on the first
batch, peak memory above the loaded model (each side in a process of its own) and the share of the measured
matrix-product peak that our useful operations reach. ``--device cuda`` runs both sides on a GPU. With
``--random-weights`` the base is a folder with a model's config.json and tokenizer only: what the weights are changes
neither time nor memory.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from softprompt.base import DTYPES
from softprompt.batch import Row
from softprompt.data import read_dataset
from softprompt.finetune import PeftTask
from softprompt.frozen import FrozenLM, Request
from softprompt.objective import Objective
from softprompt.prompt import initial_vectors
from softprompt.template import DEFAULT_TEMPLATE, SOFT, Template

Batches = list[list[Request]]


def load_base(options: argparse.Namespace) -> FrozenLM:
    """The base model on the device."""
    if not options.random_weights:
        return FrozenLM.load(options.base, dtype=options.dtype, device=options.device)
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    models: Any = AutoModelForCausalLM
    torch.manual_seed(0)
    with torch.device(options.device):
        model = models.from_config(AutoConfig.from_pretrained(options.base), dtype=DTYPES[options.dtype])
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    return FrozenLM(model, tokenizer, name=options.base, dtype=options.dtype, device=options.device)


def load(options: argparse.Namespace) -> tuple[FrozenLM, Batches]:
    """The base model and seeded batches of requests whose only word is the target (plain cross-entropy of the
    target)."""
    lm = load_base(options)
    data = read_dataset(options.data, fields=("input",))
    template = Template(DEFAULT_TEMPLATE)
    task = PeftTask.for_data(lm, data, template, num_virtual_tokens=options.num_virtual_tokens)
    requests = [task.target_request(example) for example in data.examples]
    random.Random(0).shuffle(requests)
    count = options.warmup + options.steps
    size = options.batch_size
    return lm, [requests[i * size : (i + 1) * size] for i in range(count)]


def start(lm: FrozenLM, options: argparse.Namespace) -> torch.Tensor:
    """The same initial vectors for both sides, float32 ``[P, H]``."""
    return initial_vectors(lm, options.num_virtual_tokens, init="vocab", seed=0)


def our_step(lm: FrozenLM, options: argparse.Namespace) -> Callable[[list[Request]], tuple[float, torch.Tensor]]:
    """A step that returns loss and gradient."""
    vectors = start(lm, options).to(lm.device).requires_grad_()
    optimizer = torch.optim.AdamW([vectors], lr=1e-6)
    objective = Objective(lm, max_tokens=options.max_tokens)
    if options.compile == "on":
        lm.compile_layers()

    def step(batch: list[Request]) -> tuple[float, torch.Tensor]:
        optimizer.zero_grad()
        loss, _ = objective.backward(batch, [0] * len(batch), vectors)
        assert vectors.grad is not None
        gradient = vectors.grad.clone()
        optimizer.step()
        return loss, gradient

    return step


def peft_step(options: argparse.Namespace) -> Callable[[list[Request]], tuple[float, torch.Tensor]]:
    """The same step by PEFT, as its examples do it: padded ids, labels of -100 outside the target."""
    from peft import PromptTuningConfig, get_peft_model

    lm = load_base(options)
    lm.model.set_attn_implementation("sdpa")
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=options.num_virtual_tokens)
    model: Any = get_peft_model(lm.model, config)
    weight = model.prompt_encoder.default.embedding.weight
    with torch.no_grad():
        weight.copy_(start(lm, options))
    optimizer = torch.optim.AdamW([weight], lr=1e-6)
    pad = lm.tokenizer.pad_token_id

    def step(batch: list[Request]) -> tuple[float, torch.Tensor]:
        rows = [[t for t in r.ids if t != SOFT] for r in batch]
        full = [row + list(r.words[0]) for row, r in zip(rows, batch, strict=True)]
        width = max(map(len, full))
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in full])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in full])
        labels = ids.clone()
        for i, row in enumerate(rows):
            labels[i, : len(row)] = -100
            labels[i, len(full[i]) :] = -100
        ids, mask, labels = (tensor.to(lm.device) for tensor in (ids, mask, labels))
        optimizer.zero_grad()
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        gradient = weight.grad.clone()
        optimizer.step()
        return float(loss.detach()), gradient

    return step


def wait(device: str) -> None:
    """Until the device has done all that it was asked for."""
    if device == "cuda":
        torch.cuda.synchronize()


def matrix_peak(dtype: torch.dtype, device: str) -> float:
    """Floating-point operations a second of a large square matrix product, the best of several."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    times = []
    for _ in range(8):
        wait(device)
        began = time.perf_counter()
        torch.mm(a, b)
        wait(device)
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times)


def useful_operations(lm: FrozenLM, batch: list[Request], num_virtual_tokens: int) -> float:
    """Forward and input gradient of every token through the decoder, and of every target through the output
    embeddings."""
    tokens = num_virtual_tokens + sum(Row(r.ids[r.shared :], r.words).length for r in batch)
    head = lm.embedding.numel() * sum(len(r.words[0]) for r in batch)
    return 4.0 * ((lm.num_parameters - lm.embedding.numel()) * tokens + head)


def peak_memory(options: argparse.Namespace, side: str) -> int:
    """Bytes of peak memory above the loaded model, in a process of its own: resident, or on a GPU allocated there."""
    command = [sys.executable, __file__, "--memory-of", side, "--data", options.data, "--base", options.base]
    command += ["--num-virtual-tokens", str(options.num_virtual_tokens), "--batch-size", str(options.batch_size)]
    command += ["--dtype", options.dtype, "--steps", "2", "--warmup", "1", "--compile", options.compile]
    command += ["--device", options.device]
    command += ["--random-weights"] if options.random_weights else []
    command += ["--max-tokens", str(options.max_tokens)] if options.max_tokens else []
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.strip().splitlines()[-1])


def resident() -> int:
    """Bytes resident now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def measure_memory(options: argparse.Namespace) -> None:
    """Prints how far the peak of memory rises above the loaded, touched model."""
    lm, batches = load(options)
    lm.weights_digest()  # touches every page of the weights
    step = our_step(lm, options) if options.memory_of == "softprompt" else peft_step(options)
    loaded = torch.cuda.memory_allocated() if options.device == "cuda" else resident()
    for batch in batches:
        step(batch)
    on_gpu = options.device == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(peak - loaded)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", choices=["peft"], default="peft")
    parser.add_argument("--data", required=True)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--num-virtual-tokens", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--random-weights", action="store_true")
    parser.add_argument("--max-tokens", type=int, help="of a micro-batch, in place of the objective's own")
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--compile", choices=["on", "off"], default="on")
    parser.add_argument("--memory-of", choices=["softprompt", "peft"], help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.memory_of:
        measure_memory(options)
        return

    memory = {side: peak_memory(options, side) for side in ("softprompt", "peft")}
    peak = matrix_peak(DTYPES[options.dtype], options.device)
    lm, batches = load(options)
    ours, theirs = our_step(lm, options), peft_step(options)
    times: dict[str, list[float]] = {"softprompt": [], "peft": []}
    first: dict[str, tuple[float, torch.Tensor]] = {}
    began = time.perf_counter()
    first["softprompt"] = ours(batches[0])
    wait(options.device)
    first_step = time.perf_counter() - began
    first["peft"] = theirs(batches[0])
    for number, batch in enumerate(batches[1:], start=1):
        for side, step in (("softprompt", ours), ("peft", theirs)):
            wait(options.device)
            began = time.perf_counter()
            step(batch)
            wait(options.device)
            if number >= options.warmup:
                times[side].append(time.perf_counter() - began)
    medians = {side: statistics.median(values) for side, values in times.items()}
    difference = first["softprompt"][1] - first["peft"][1]
    operations = statistics.mean(
        useful_operations(lm, batch, options.num_virtual_tokens) for batch in batches[options.warmup :]
    )
    found: dict[str, Any] = {
        "ratio": medians["peft"] / medians["softprompt"],
        "ratio_memory": memory["peft"] / memory["softprompt"],
        "seconds": medians,
        "seconds_range": {side: [min(values), max(values)] for side, values in times.items()},
        "memory_above_model_bytes": memory,
        "first_step_seconds": first_step,
        "loss": {side: value[0] for side, value in first.items()},
        "gradient_relative_difference": float(difference.norm() / first["peft"][1].norm()),
        "matrix_peak_gflops": peak / 1e9,
        "share_of_matrix_peak": operations / medians["softprompt"] / peak,
        "num_virtual_tokens": options.num_virtual_tokens,
        "batch_size": options.batch_size,
        "dtype": options.dtype,
        "compile": options.compile,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "steps": len(times["peft"]),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    if options.json:
        print(json.dumps(found))
    else:
        for key, value in found.items():
            print(f"{key}: {value}")


if __name__ == "__main__":
    main()
