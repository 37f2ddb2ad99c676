"""The study's tables in Markdown and its figure, ``tables.md`` and ``scores.png``, from the cells in ``docs/study``.

    python benchmarks/study.py

First an overview, a line for each data set; then a table for each set with every method. Differences are a method's
score minus the soft prompt's on the same rows, with their 95 % interval (paired bootstrap).
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from softprompt.artifact import atomic_writer
from softprompt.plots import GREY, PALETTE, png, style

HARD = ("zero-shot", "instruction", "few-shot")
"""Prompt engineering, by the beginning of a method's name."""
SHOWN = ("tf-idf", "peft-prompt-tuning", "prefix", "lora", "full-fine-tuning")
"""What else the overview has a column for."""
MARKS = {  # in the figure: name → (colour, marker, size)
    "best hard prompt": (GREY, "s", 6),
    "tf-idf": (PALETTE[6], "X", 6),
    "peft-prompt-tuning": (PALETTE[4], "v", 6),
    "lora": (PALETTE[2], "^", 6),
    "prefix": (PALETTE[3], "s", 6),
    "full-fine-tuning": (PALETTE[1], "P", 7),
    "soft-prompt": (PALETTE[0], "o", 9),
}

Cell = dict[str, Any]


def scale(cell: Cell) -> float:
    """What makes percent, or BLEU points, of the metric."""
    return 1.0 if cell["metric"] == "bleu" else 100.0


def score(cell: Cell) -> str:
    """The score and its standard error."""
    return f"{scale(cell) * cell['value']:.1f} ± {scale(cell) * cell['stderr']:.1f}"


def difference(cell: Cell) -> str:
    """The difference to the soft prompt and its interval; empty for the soft prompt itself."""
    found = cell["difference"]
    if not found:
        return ""
    value, low, high = (scale(cell) * found[key] for key in ("value", "low", "high"))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count:,} B" if count < 10_000 else f"{count / 1e3:,.0f} kB" if count < 1e6 else f"{count / 1e6:,.0f} MB"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))


def first_seed(cells: list[Cell]) -> tuple[dict[str, Cell], Cell | None]:
    """The cells of seed 0 by method, and the best hard prompt among them."""
    by_method = {cell["method"]: cell for cell in cells if cell["seed"] == 0}
    hard = [cell for method, cell in by_method.items() if method.startswith(HARD)]
    return by_method, max(hard, key=lambda cell: cell["value"], default=None)


def overview(sets: dict[str, list[Cell]]) -> str:
    """A line for each set: the soft prompt, the best hard prompt, and the rest with their differences."""
    rows, gaps = [], dict[str, list[float]]()
    for name, cells in sets.items():
        by_method, best = first_seed(cells)
        ours = by_method.get("soft-prompt")
        line = [name, score(ours) if ours else "", f"{best['method']} {difference(best)}" if best else ""]
        for method in SHOWN:
            cell = by_method.get(method)
            line.append("" if cell is None else difference(cell))
            if cell is not None and cell["difference"] and cell["metric"] == "accuracy":
                gaps.setdefault(method, []).append(100 * cell["difference"]["value"])
        rows.append(line)
    means = [f"{statistics.mean(gaps[m]):+.1f} (of {len(gaps[m])})" if m in gaps else "" for m in SHOWN]
    rows.append(["mean of the sets with labels", "", "", *means])
    return table(["set", "soft prompt", "best hard prompt", *SHOWN], rows)


def details(cells: list[Cell]) -> str:
    """A line for each cell of a set."""
    rows = []
    for cell in cells:
        chosen = ", ".join(f"{key} {value}" for key, value in cell["chosen"].items() if value is not None)
        rows.append(
            [
                f"**{cell['method']}**" if cell["method"] == "soft-prompt" else cell["method"],
                str(cell["seed"]),
                score(cell),
                difference(cell),
                f"{cell['trainable_parameters']:,}",
                size(cell["bytes"]),
                f"{cell['train_seconds'] / 60:.1f}",
                f"{cell['peak_memory_bytes'] / 1e9:.1f}",
                f"×{cell['forgetting']['ratio']:.2f}",
                chosen,
            ]
        )
    head = ["method", "seed", "score", "difference", "trained", "kept", "minutes", "GB", "forgets", "chosen"]
    return table(head, rows)


def figure(sets: dict[str, list[Cell]]) -> Figure:
    """A line for each set with labels, a mark for each method: accuracy on the test rows."""
    shown = {name: cells for name, cells in sets.items() if cells[0]["metric"] == "accuracy"}
    with style():
        drawn = Figure(figsize=(9.2, 0.8 + 0.42 * len(shown)))
        panel = drawn.add_axes((0.14, 0.14, 0.66, 0.82))
        for method, (colour, marker, size) in MARKS.items():
            points = []
            for line, cells in enumerate(shown.values()):
                by_method, best = first_seed(cells)
                if cell := best if method == "best hard prompt" else by_method.get(method):
                    points.append((100 * cell["value"], -line))
            if points:
                x, y = zip(*points, strict=True)
                panel.plot(x, y, marker, color=colour, markersize=size, label=method, clip_on=False)
        panel.set_yticks([-line for line in range(len(shown))], list(shown))
        panel.set_xlabel("accuracy on test rows, percent")
        panel.legend(loc="center left", bbox_to_anchor=(1.03, 0.5))
    return drawn


def main() -> None:
    """Writes the tables and the figure beside the cells."""
    folder = Path(__file__).parent.parent / "docs" / "study"
    sets = {}
    for path in sorted(folder.glob("*.json")):
        cells = [cell for cell in json.loads(path.read_text("utf-8")) if cell["status"] == "done"]
        sets[path.stem] = cells
    text = "# Every cell of the study\n\nMade by `benchmarks/study.py`; what it means is in ../quality.md.\n\n"
    text += overview(sets) + "\n"
    for name, cells in sets.items():
        text += f"\n## {name}\n\n{cells[0]['n']:,} test rows, {cells[0]['metric']}.\n\n{details(cells)}\n"
    for name, content in {"tables.md": text.encode(), "scores.png": png(figure(sets))}.items():
        with atomic_writer(folder / name) as file:
            file.write(content)


if __name__ == "__main__":
    main()
