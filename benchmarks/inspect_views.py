"""Seconds that the views of a soft prompt's vectors take, without a model: neighbours with their null, norms, map.

    python benchmarks/inspect_views.py --num-virtual-tokens 100 --vocabulary 150000 --json

The embedding table and the virtual tokens are seeded random numbers; medians of three.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from softprompt.inspection.nearest import neighbours
from softprompt.inspection.plane import plane
from softprompt.inspection.start import norms
from softprompt.inspection.vocabulary import Vocabulary


def main() -> None:
    """Prints the seconds of all views together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-virtual-tokens", type=int, default=100)
    parser.add_argument("--vocabulary", type=int, default=150_000)
    parser.add_argument("--hidden-size", type=int, default=576)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    draw = torch.Generator().manual_seed(0)
    shape = (options.vocabulary, options.hidden_size)
    table = 0.1 * torch.randn(shape, generator=draw) + 0.03 * torch.randn(shape[1], generator=draw)
    start, end = (table[torch.randint(0, shape[0], (options.num_virtual_tokens,), generator=draw)] for _ in range(2))
    end = end + 0.05 * torch.randn(end.shape, generator=draw)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        vocabulary = Vocabulary(table, str)
        neighbours(vocabulary, end, start)
        norms(end, vocabulary, start)
        plane(end, vocabulary, start)
        seconds.append(time.perf_counter() - began)
    found = {"seconds": round(statistics.median(seconds), 2), "threads": torch.get_num_threads()}
    print(json.dumps(found) if options.json else f"{found['seconds']} s on {found['threads']} threads")


if __name__ == "__main__":
    main()
