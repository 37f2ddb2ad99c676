"""One optimizer step of prompt tuning, ours against PEFT's: same base model, rows, template, loss and dtype,
alternating in one process.

    python benchmarks/train_step.py --against peft --data sst2/train.jsonl --num-virtual-tokens 100 --batch-size 32
    --dtype bf16 --json

Prints medians in seconds, the ratio (above 1: ours is faster), what each side's gradient and loss are on the first
batch, peak memory above the loaded model (each side in a process of its own), how many graphs were compiled, and the
share of the measured matrix-product peak that our useful operations reach. ``--device cuda`` runs both sides on a GPU.
With ``--random-weights`` the base is a folder with a model's config.json and tokenizer only: what the weights are
changes neither time nor memory.

``--against peft`` is PEFT as its examples have it. A user who takes care pads to buckets, has no cache made and
compiles: the whole model, with CUDA graphs on a GPU (``peft-compiled``), or each decoder layer, which compiles in a
fraction of the time (``peft-layers``).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._dynamo.utils import counters

from softprompt.data.example import Dataset
from softprompt.data.reading import read_dataset
from softprompt.methods.peft import PeftTask
from softprompt.model.architecture import decoder_layers
from softprompt.model.batch import Row
from softprompt.model.frozen import FrozenLM
from softprompt.model.loading import DTYPES
from softprompt.model.loading import load_base as load_model
from softprompt.model.request import Request
from softprompt.text.template import DEFAULT_TEMPLATE, Template
from softprompt.text.tokens import SOFT
from softprompt.tuning.gradients import Gradients
from softprompt.tuning.objective import Objective
from softprompt.tuning.start import initial_vectors

Batches = list[list[Request]]
Step = Callable[[list[Request]], tuple[float, torch.Tensor]]
"""A step on a batch: its loss and the gradient ``[P, H]``."""

PEERS = ("peft", "peft-compiled", "peft-layers")
BUCKET = 16
"""Compiled peers pad to a multiple of this many tokens, so that few shapes are compiled."""


def load_base(options: argparse.Namespace) -> tuple[FrozenLM, Any]:
    """The base model on the device, and transformers' own model with the same weights in memory, for the peers."""
    if options.random_weights:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        models: Any = AutoModelForCausalLM
        torch.manual_seed(0)
        with torch.device(options.device):
            model = models.from_config(AutoConfig.from_pretrained(options.base), dtype=DTYPES[options.dtype])
        tokenizer: Any = AutoTokenizer.from_pretrained(options.base)
    else:
        model, tokenizer = load_model(options.base)
    plain = sharing_weights(model)
    lm = FrozenLM(model, tokenizer, name=options.base, dtype=options.dtype, device=options.device)
    return lm, plain.to(lm.device).eval()


def sharing_weights(model: Any) -> Any:
    """Another model on the same weights; hooks, compiled parts and the kind of attention are its own."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


def load(options: argparse.Namespace) -> tuple[FrozenLM, Any, Batches]:
    """What ``load_base`` gives, and seeded batches of requests whose only word is the target (plain cross-entropy of
    the target); against a compiled peer those of one bucket."""
    lm, plain = load_base(options)
    data = read_dataset(options.data, fields=("input",))
    batches = all_batches(lm, data, options.num_virtual_tokens, options.batch_size)
    if options.against != "peft":
        batches = of_one_bucket(batches)
    return lm, plain, batches[: options.warmup + options.steps]


def all_batches(lm: FrozenLM, data: Dataset, num_virtual_tokens: int, batch_size: int) -> Batches:
    """All rows in seeded order; what is left over at the end is dropped."""
    task = PeftTask.for_data(lm, data, Template(DEFAULT_TEMPLATE), num_virtual_tokens=num_virtual_tokens)
    requests = [task.target_request(example) for example in data.examples]
    random.Random(0).shuffle(requests)
    return [requests[i : i + batch_size] for i in range(0, len(requests) - batch_size + 1, batch_size)]


def of_one_bucket(batches: Batches) -> Batches:
    """Those batches whose longest rows round up to the commonest length, so that a peer who pads compiles once."""
    lengths = [math.ceil(longest(batch) / BUCKET) for batch in batches]
    commonest = Counter(lengths).most_common(1)[0][0]
    return [batch for batch, length in zip(batches, lengths, strict=True) if length == commonest]


def start(lm: FrozenLM, options: argparse.Namespace) -> torch.Tensor:
    """The same initial vectors for both sides, float32 ``[P, H]``."""
    return initial_vectors(lm, options.num_virtual_tokens, init="vocab", seed=0)


def step_of(side: str, lm: FrozenLM, plain: Any, options: argparse.Namespace) -> Step:
    """The step of ``softprompt`` or of one of ``PEERS``."""
    return (
        our_step(lm, Gradients(lm, max_tokens=options.max_tokens), options)
        if side == "softprompt"
        else peft_step(lm, plain, options, side)
    )


def our_step(lm: FrozenLM, gradients: Gradients, options: argparse.Namespace) -> Step:
    """A step by the gradients that training uses."""
    vectors = start(lm, options).to(lm.device).requires_grad_()
    optimizer = torch.optim.AdamW([vectors], lr=1e-6)
    if options.compile == "on":
        lm.layers.set(compiled=True)

    def step(batch: list[Request]) -> tuple[float, torch.Tensor]:
        optimizer.zero_grad()
        loss, _ = gradients.backward(Objective(), batch, [0] * len(batch), vectors)
        assert vectors.grad is not None
        gradient = vectors.grad.clone()
        optimizer.step()
        return loss, gradient

    return step


def peft_step(lm: FrozenLM, plain: Any, options: argparse.Namespace, side: str) -> Step:
    """The same step by PEFT, as its examples do it: padded ids, labels of -100 outside the target."""
    from peft import PromptTuningConfig, get_peft_model

    base = sharing_weights(plain)
    base.set_attn_implementation("sdpa")
    if side != "peft":
        base.config.use_cache = False
    if side == "peft-layers":
        for layer in decoder_layers(base):
            layer.compile(dynamic=False)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=options.num_virtual_tokens)
    model: Any = get_peft_model(base, config)
    weight = model.prompt_encoder.default.embedding.weight
    with torch.no_grad():
        weight.copy_(start(lm, options))
    optimizer = torch.optim.AdamW([weight], lr=1e-6)
    pad = lm.tokenizer.pad_token_id
    bucket = 1 if side == "peft" else BUCKET
    if side == "peft-compiled":
        # From the CPU they would keep the whole from becoming a CUDA graph.
        model.prompt_tokens = {name: tokens.to(lm.device) for name, tokens in model.prompt_tokens.items()}
        model = torch.compile(model, dynamic=False, mode="reduce-overhead" if options.device == "cuda" else None)

    def step(batch: list[Request]) -> tuple[float, torch.Tensor]:
        rows = [[t for t in r.ids if t != SOFT] for r in batch]
        full = [row + list(r.words[0]) for row, r in zip(rows, batch, strict=True)]
        width = bucket * math.ceil(longest(batch) / bucket)
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in full])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in full])
        labels = ids.clone()
        for i, row in enumerate(rows):
            labels[i, : len(row)] = -100
            labels[i, len(full[i]) :] = -100
        ids, mask, labels = (tensor.to(lm.device) for tensor in (ids, mask, labels))
        optimizer.zero_grad()
        if side == "peft-compiled":
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        gradient = weight.grad.clone()
        optimizer.step()
        return float(loss.detach()), gradient

    return step


def longest(batch: Sequence[Request]) -> int:
    """Tokens of the longest row with its target, the soft prompt left out."""
    return max(sum(token != SOFT for token in r.ids) + len(r.words[0]) for r in batch)


@dataclass
class Side:
    """One side of the comparison, and what was measured of it.

    Attributes:
        name: what it is called.
        step: its step.
        device: ``cpu`` or ``cuda``.
        seconds: of each timed step.
        first_seconds: of the first step, compiling included; None before it.
        first: loss and gradient of the first step; None before it.
        peak_bytes: on a GPU, how far any step raised the allocated memory.
        compiled: graphs compiled in all steps.
        compiled_late: graphs compiled in timed steps.
    """

    name: str
    step: Step
    device: str
    seconds: list[float] = field(default_factory=list)
    first_seconds: float | None = None
    first: tuple[float, torch.Tensor] | None = None
    peak_bytes: int = 0
    compiled: int = 0
    compiled_late: int = 0

    def run(self, batch: list[Request], *, timed: bool) -> None:
        """Does one step and writes down what it took."""
        on_gpu = self.device == "cuda"
        wait(self.device)
        before = torch.cuda.memory_allocated() if on_gpu else 0
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        graphs = counters["stats"]["unique_graphs"]
        began = time.perf_counter()
        found = self.step(batch)
        wait(self.device)
        seconds = time.perf_counter() - began
        graphs = counters["stats"]["unique_graphs"] - graphs
        if self.first is None:
            self.first, self.first_seconds = found, seconds
        if on_gpu:
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated() - before)
        self.compiled += graphs
        if timed:
            self.seconds.append(seconds)
            self.compiled_late += graphs


def alternate(sides: Sequence[Side], batches: Batches, warmup: int, *, most_seconds: float = math.inf) -> None:
    """Steps of all sides on each batch, timed after ``warmup`` batches, until the time is over, but one at least."""
    began = time.perf_counter()
    for number, batch in enumerate(batches):
        if number > warmup and time.perf_counter() - began > most_seconds:
            return
        for side in sides:
            side.run(batch, timed=number >= warmup)


def gradient_difference(side: Side, other: Side) -> float:
    """Relative to the gradient of ``other``, on the first batch."""
    assert side.first is not None
    assert other.first is not None
    return float((side.first[1] - other.first[1]).norm() / other.first[1].norm())


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


def useful_tokens(batch: list[Request], num_virtual_tokens: int) -> int:
    """The soft prompt once, and every row once without padding."""
    return num_virtual_tokens + sum(Row(r.ids[r.shared :], r.words).length for r in batch)


def useful_operations(lm: FrozenLM, batch: list[Request], num_virtual_tokens: int) -> float:
    """Forward and input gradient of every token through the decoder, and of every target through the output
    embeddings."""
    table, head = lm.model.get_input_embeddings().weight, lm.model.get_output_embeddings().weight
    besides = table.numel() + (0 if head is table else head.numel())
    targets = sum(len(r.words[0]) for r in batch)
    tokens = useful_tokens(batch, num_virtual_tokens)
    return 4.0 * float((lm.num_parameters - besides) * tokens + head.numel() * targets)


def peak_memory(options: argparse.Namespace, side: str) -> int:
    """Bytes of peak memory above the loaded model, in a process of its own: resident, or on a GPU allocated there."""
    command = [sys.executable, __file__, "--memory-of", side, "--data", options.data, "--base", options.base]
    command += ["--num-virtual-tokens", str(options.num_virtual_tokens), "--batch-size", str(options.batch_size)]
    command += ["--dtype", options.dtype, "--steps", "2", "--warmup", "1", "--compile", options.compile]
    command += ["--device", options.device, "--against", options.against]
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
    lm, plain, batches = load(options)
    lm.weights_digest()  # touches every page of the weights
    step = step_of(options.memory_of, lm, plain, options)
    loaded = torch.cuda.memory_allocated() if options.device == "cuda" else resident()
    for batch in batches:
        step(batch)
    on_gpu = options.device == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(peak - loaded)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", choices=PEERS, default="peft")
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
    parser.add_argument("--memory-of", choices=("softprompt", *PEERS), help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.memory_of:
        measure_memory(options)
        return

    names = ("softprompt", options.against)
    memory = {name: peak_memory(options, name) for name in names}
    peak = matrix_peak(DTYPES[options.dtype], options.device)
    lm, plain, batches = load(options)
    ours, peer = (Side(name, step_of(name, lm, plain, options), options.device) for name in names)
    alternate((ours, peer), batches, options.warmup)
    medians = {side.name: statistics.median(side.seconds) for side in (ours, peer)}
    operations = statistics.mean(
        useful_operations(lm, batch, options.num_virtual_tokens) for batch in batches[options.warmup :]
    )
    found: dict[str, Any] = {
        "ratio": medians[peer.name] / medians[ours.name],
        "ratio_memory": memory[peer.name] / memory[ours.name],
        "seconds": medians,
        "seconds_range": {side.name: [min(side.seconds), max(side.seconds)] for side in (ours, peer)},
        "memory_above_model_bytes": memory,
        "first_step_seconds": {side.name: side.first_seconds for side in (ours, peer)},
        "compiled_graphs": {side.name: side.compiled for side in (ours, peer)},
        "compiled_graphs_in_timed_steps": {side.name: side.compiled_late for side in (ours, peer)},
        "loss": {side.name: side.first[0] for side in (ours, peer) if side.first},
        "gradient_relative_difference": gradient_difference(ours, peer),
        "matrix_peak_gflops": peak / 1e9,
        "share_of_matrix_peak": operations / medians[ours.name] / peak,
        "num_virtual_tokens": options.num_virtual_tokens,
        "batch_size": options.batch_size,
        "dtype": options.dtype,
        "compile": options.compile,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "steps": len(peer.seconds),
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
