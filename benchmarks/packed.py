"""What packing the frozen weights once for oneDNN would gain on a CPU: plain against packed, alternating in a process.

    python benchmarks/packed.py --base smollm2-135m --dtype bf16 --json

PyTorch's own ``linear`` hands a CPU's bf16 product to oneDNN, which lays the weight out anew each time; packed, that is
done once, for the product and, for training, for its gradient. Prints ``{"ratio": …}``, of a decoding step of one row,
and for each setting the medians in seconds and their ratio (above 1: packed is faster): products of one layer, the
prefix pass, decoding, and a whole training step. A packed weight lies beside the plain one, whose every bit is compared
before and after a training: ``bytes`` says what the copies take.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from softprompt.generation.decoder import generate
from softprompt.model.fast.packed import PackedWeights
from softprompt.model.frozen import FrozenLM
from softprompt.model.request import Request, Sampling
from softprompt.text.tokens import SOFT
from softprompt.tuning.gradients import Gradients
from softprompt.tuning.objective import Objective

ROWS = (1, 16, 128, 832)


def packed(weight: torch.Tensor) -> torch.Tensor:
    """A weight ``[N, K]`` in oneDNN's own layout."""
    found: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
    return found


def product(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``inputs`` ``[…, K]`` times a packed weight ``[N, K]``: ``[…, N]``."""
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
    return found


class Product(torch.autograd.Function):
    """``product``, differentiable in its input."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, turned: torch.Tensor, bias: Any) -> torch.Tensor:
        ctx.turned = turned
        return product(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return product(gradient.contiguous(), ctx.turned), None, None, None


class Packing:
    """The linear layers of a model, with a packed copy of each weight and of its transpose.

    Attributes:
        nbytes: bytes of the copies, those of the transposes not included.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
        self._weights = [(packed(layer.weight), packed(layer.weight.T)) for layer in self._layers]
        self.nbytes = sum(layer.weight.nbytes for layer in self._layers)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Inside, layers compute with their copies."""
        for layer, (weight, turned) in zip(self._layers, self._weights, strict=True):
            layer.forward = forward_of(layer, weight, turned)  # type: ignore[assignment,method-assign]
        try:
            yield
        finally:
            for layer in self._layers:
                del layer.forward


def forward_of(layer: nn.Linear, weight: torch.Tensor, turned: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(inputs: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and inputs.requires_grad:
            found: torch.Tensor = Product.apply(inputs, weight, turned, layer.bias)  # type: ignore[no-untyped-call]
            return found
        return product(inputs, weight, layer.bias)

    return forward


def compared(plain: Callable[[], Any], other: Callable[[], Any], rounds: int, repeats: int = 1) -> dict[str, float]:
    """Medians of both in seconds, alternating, and the ratio."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for side, call in enumerate((plain, other)):
            began = time.perf_counter()
            for _ in range(repeats):
                call()
            if number:  # the first one warms up
                seconds[side].append((time.perf_counter() - began) / repeats)
    one, two = map(statistics.median, seconds)
    return {"plain": one, "packed": two, "ratio": one / two}


def of_layers(model: nn.Module, rounds: int) -> dict[str, Any]:
    """Each shape of linear layer once, at several numbers of rows; ``equal``: to the last bit."""
    shapes: dict[tuple[int, int], torch.Tensor] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.out_features < 10_000:
            shapes.setdefault((module.in_features, module.out_features), module.weight.detach())
    found = {}
    for (width, outputs), weight in shapes.items():
        copy = packed(weight)
        for rows in ROWS:
            inputs = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).to(weight.dtype)
            plain, other = partial(nn.functional.linear, inputs, weight), partial(product, inputs, copy)
            times = compared(plain, other, rounds, repeats=max(1, 256 // rows))
            found[f"{width} to {outputs}, {rows} rows"] = {**times, "equal": torch.equal(plain(), other())}
    return found


def jobs_of(lm: FrozenLM) -> dict[str, Callable[[], Any]]:
    """What is timed whole."""
    generator = torch.Generator().manual_seed(0)
    vectors = {length: torch.randn(length, lm.hidden_size, generator=generator) / 10 for length in (20, 64, 100)}

    def text(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(100, 40_000, (length,), generator=generator).tolist())

    def prefix() -> None:
        with torch.no_grad():
            lm.prefix_kv((SOFT,), vectors[64])

    def decoding(rows: int) -> Callable[[], Any]:
        requests = [Request((SOFT, *text(20)), 1, (), 0) for _ in range(rows)]
        return lambda: generate(lm, requests, [vectors[20]], Sampling(max_new_tokens=32))

    def step(length: int) -> Callable[[], Any]:
        leaf = vectors[length].clone().requires_grad_()
        requests = [Request((SOFT, *text(20 + 2 * row)), 1, (text(2),), 0) for row in range(16)]
        gradients = Gradients(lm)
        return lambda: gradients.backward(Objective(), requests, [0] * 16, leaf)

    return {
        "prefix of 64": prefix,
        "32 tokens, 1 row": decoding(1),
        "32 tokens, 16 rows": decoding(16),
        "training step, P=20": step(20),
        "training step, P=100": step(100),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    lm = FrozenLM.load(options.base, dtype=options.dtype, device="cpu")
    lm.packed = PackedWeights(nn.Module())  # which packs nothing: continuing takes packed weights by itself
    packing = Packing(lm.model)
    found: dict[str, Any] = {"layers": of_layers(lm.model, options.rounds), "passes": {}}
    for name, job in jobs_of(lm).items():

        def with_packed(job: Callable[[], Any] = job) -> Any:
            with packing.used():
                return job()

        found["passes"][name] = compared(job, with_packed, options.rounds)
    found["bytes"] = {"weights": sum(p.nbytes for p in lm.model.parameters()), "copies": packing.nbytes}
    found["ratio"] = found["passes"]["32 tokens, 1 row"]["ratio"]
    if options.json:
        print(json.dumps(found))
        return
    for group in ("layers", "passes"):
        for name, row in found[group].items():
            print(f"{name:28} {1e3 * row['plain']:9.3f} ms {1e3 * row['packed']:9.3f} ms {row['ratio']:6.2f}")
    print(found["bytes"])


if __name__ == "__main__":
    main()
