"""The study's tables in Markdown and its figures, ``tables.md``, ``scores.png`` and ``bases.png``, from the cells in
``docs/study``; those of other base models than the study's lie in its folder ``bases``, those of data sets that were
not there while the defaults were chosen in ``unseen``, those with 200 training rows in ``few``.

    python benchmarks/study.py

First an overview, a line for each data set, with means over the seeds that were run, one of the unseen sets, and one
of few rows; then a table for each set with every cell. Differences are a method's score minus the soft prompt's, with
their 95 % interval.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from matplotlib.figure import Figure

from softprompt.compare.figures import score_against_size
from softprompt.compare.summary import Cell, Row, summary, times
from softprompt.drawing.style import GREY, PALETTE, png, style
from softprompt.files import atomic_writer
from softprompt.methods.registry import METHODS, OURS

HARD = tuple(name for name, method in METHODS.items() if method.kind == "hard prompt")
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


def by_method(cells: list[Cell]) -> tuple[dict[str, Row], Row | None]:
    """What the seeds of each method come to, and the best hard prompt among them."""
    rows = {row.method: row for row in summary(cells)}
    hard = [row for method, row in rows.items() if method in HARD]
    return rows, max(hard, key=lambda row: row.score.value if row.score else -1.0, default=None)


def standing(row: Row | None) -> str:
    """The score in points, its standard error and the method's seeds, if several."""
    if row is None or row.score is None or row.stderr is None:
        return ""
    return f"{row.factor * row.score.value:.1f} ± {row.factor * row.stderr:.1f}" + several(row)


def gap(row: Row | None) -> str:
    """The difference to the soft prompt in points, its interval and the method's seeds, if several."""
    if row is None or row.difference is None or row.difference.low is None or row.difference.high is None:
        return ""
    value, low, high = (row.factor * end for end in (row.difference.value, row.difference.low, row.difference.high))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]" + several(row)


def several(row: Row) -> str:
    """How many seeds, if more than one."""
    return f" ({row.seeds} seeds)" if row.seeds > 1 else ""


def overview(sets: dict[str, list[Cell]]) -> str:
    """A line for each set: the soft prompt, the best hard prompt, and the rest with their differences."""
    lines, gaps = [], dict[str, list[float]]()
    for name, cells in sets.items():
        rows, best = by_method(cells)
        line = [name, standing(rows.get(OURS)), f"{best.method} {gap(best)}" if best else ""]
        for method in SHOWN:
            row = rows.get(method)
            line.append(gap(row))
            if row is not None and row.difference is not None and row.metric == "accuracy":
                gaps.setdefault(method, []).append(100 * row.difference.value)
        lines.append(line)
    means = [f"{statistics.mean(gaps[m]):+.1f} (of {len(gaps[m])})" if m in gaps else "" for m in SHOWN]
    lines.append(["mean of the sets with labels", "", "", *means])
    return table(["set", "soft prompt", "best hard prompt", *SHOWN], lines)


def details(cells: list[Cell]) -> str:
    """A line for each cell of a set."""
    rows = []
    for cell in cells:
        kept = {key: value for key, value in cell["chosen"].items() if value is not None and key != "instruction_text"}
        chosen = ", ".join(f"{key} {value}" for key, value in kept.items())
        rows.append(
            [
                f"**{cell['method']}**" if cell["method"] == OURS else cell["method"],
                str(cell["seed"]),
                score(cell),
                difference(cell),
                f"{cell['trainable_parameters']:,}",
                size(cell["bytes"]),
                f"{cell['train_seconds'] / 60:.1f}",
                f"{cell['peak_memory_bytes'] / 1e9:.1f}",
                times(cell["forgetting"]["ratio"]),
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
                rows, best = by_method(cells)
                row = best if method == "best hard prompt" else rows.get(method)
                if row is not None and row.score is not None:
                    points.append((100 * row.score.value, -line))
            if points:
                x, y = zip(*points, strict=True)
                panel.plot(x, y, marker, color=colour, markersize=size, label=method, clip_on=False)
        panel.set_yticks([-line for line in range(len(shown))], list(shown))
        panel.set_xlabel("accuracy on test rows, percent")
        panel.legend(loc="center left", bbox_to_anchor=(1.03, 0.5))
    return drawn


def read(folder: Path) -> dict[str, list[Cell]]:
    """The finished cells of each data set."""
    return {
        path.stem: [cell for cell in json.loads(path.read_text("utf-8")) if cell["status"] == "done"]
        for path in sorted(folder.glob("*.json"))
    }


def main() -> None:
    """Writes the tables and the figure beside the cells."""
    folder = Path(__file__).parent.parent / "docs" / "study"
    sets, unseen, others = read(folder), read(folder / "unseen"), read(folder / "bases")
    few = {f"{name}, 200 training rows": cells for name, cells in read(folder / "few").items()}
    text = "# Every cell of the study\n\nMade by `benchmarks/study.py`. [quality.md](quality.md) explains it.\n\n"
    text += overview(sets) + "\n\nData sets that were not there while the defaults were chosen:\n\n"
    text += overview(unseen) + "\n\nFew rows to learn from, 100 for validation:\n\n" + overview(few) + "\n"
    for name, cells in (*sets.items(), *unseen.items(), *few.items()):
        text += f"\n## {name}\n\n{cells[0]['n']:,} test rows, {cells[0]['metric']}.\n\n{details(cells)}\n"
    for name, cells in others.items():
        for base in dict.fromkeys(cell["base"] for cell in cells):
            text += f"\n## {name}, {base}\n\n{details([cell for cell in cells if cell['base'] == base])}\n"
    shared = {name: {cell["method"] for cell in cells} for name, cells in others.items()}
    both = {
        name: summary([cell for cell in (*sets[name], *cells) if cell["method"] in shared[name]])
        for name, cells in others.items()
    }
    sizes = score_against_size(both)
    assert sizes is not None, "there are several base models"
    for name, content in {
        "tables.md": text.encode(),
        "scores.png": png(figure(sets)),
        "bases.png": png(sizes),
    }.items():
        with atomic_writer(folder / name) as file:
            file.write(content)


if __name__ == "__main__":
    main()
