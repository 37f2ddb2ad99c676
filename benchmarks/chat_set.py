"""Makes conversations of two answers each from rows of ``input`` and ``target``, to measure training on such.

    python benchmarks/chat_set.py train.jsonl chat.jsonl

Two rows that follow each other become one conversation. Of rows that follow each other with the same input, as data
with several references have them, the first is taken.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def conversations(rows: list[dict[str, str]]) -> list[dict[str, list[dict[str, str]]]]:
    """One for each two rows, in their order; a row that is left over is left out."""
    distinct = [row for before, row in zip([{}, *rows], rows, strict=False) if before.get("input") != row["input"]]
    return [
        {
            "messages": [
                message
                for row in pair
                for message in (
                    {"role": "user", "content": row["input"]},
                    {"role": "assistant", "content": row["target"]},
                )
            ]
        }
        for pair in zip(distinct[::2], distinct[1::2], strict=False)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("rows", type=Path, help="JSON Lines with input and target")
    parser.add_argument("out", type=Path, help="JSON Lines with messages")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.rows.read_text(encoding="utf-8").splitlines() if line.strip()]
    found = conversations(rows)
    text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in found)
    arguments.out.write_text(text, encoding="utf-8")
    print(f"{len(found):,} conversations of {len(rows):,} rows: {arguments.out}")


if __name__ == "__main__":
    main()
