"""Training on conversations against training on the same rows one by one: BLEU, and the tokens that are computed.

    python benchmarks/chat_set.py FOLDER [--json]
    python benchmarks/chat_set.py train.jsonl chat.jsonl

Two rows of ``input`` and ``target`` that follow each other become one conversation of two answers. Of rows that follow
each other with the same input, as data with several references have them, the first is taken.

FOLDER holds ``train.jsonl``, ``validation.jsonl`` and ``test.jsonl``. One soft prompt is tuned on the rows, in the base
model's chat template, and one on the conversations that they make, in as many steps of as many answers. Both answer the
same test rows, the second one inside their conversations. The second command only writes the conversations.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import softprompt as sp
from softprompt.data.packages import DEFAULT_BASE
from softprompt.evaluation.metrics import bleu, paired_bleu

Messages = list[dict[str, str]]


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, of those with one input that follow each other the first."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [row for before, row in zip([{}, *rows], rows, strict=False) if before.get("input") != row["input"]]


def conversations(rows: list[dict[str, Any]]) -> list[dict[str, Messages]]:
    """One for each two rows, in their order; a row that is left over is left out."""
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
        for pair in zip(rows[::2], rows[1::2], strict=False)
    ]


def beginnings(found: list[dict[str, Messages]]) -> list[dict[str, Messages]]:
    """Each conversation up to its first answer, and up to its second, so that each is answered."""
    return [{"messages": one["messages"][:end]} for one in found for end in (2, 4)]


def tuned(lm: sp.FrozenLM, train: Any, validation: Any, steps: int, seed: int) -> tuple[sp.SoftPrompt, dict[str, int]]:
    """A soft prompt, and the tokens that its training computed, with and without sharing."""
    with TemporaryDirectory() as folder:
        prompt = sp.train(
            lm,
            train,
            validation=validation,
            template="chat" if "input" in train[0] else "default",
            labels="none",
            folder=folder,
            steps=steps,
            eval_every=max(1, steps // 2),
            seed=seed,
            progress=False,
        )
        done = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    computed, saved = sum(step["tokens"] for step in done), sum(step["saved"] for step in done)
    return prompt, {"steps": len(done), "tokens": computed, "tokens_without_sharing": computed + saved}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Both trainings, as JSON values."""
    lm = sp.load_model(options.base, dtype=options.dtype)
    train, validation, test = (
        read(options.source / f"{name}.jsonl")[: most - most % 2]
        for name, most in (("train", options.rows), ("validation", 50), ("test", options.test_rows))
    )
    test = test[: len(test) - len(test) % 2]
    short = [{"input": row["input"], "target": row["target"]} for row in (*train, *validation)]
    plain, plain_counts = tuned(lm, short[: len(train)], short[len(train) :], options.steps, options.seed)
    chat, chat_counts = tuned(lm, conversations(train), conversations(validation), options.steps, options.seed)
    references = [tuple(row.get("references") or (row["target"],)) for row in test]
    with TemporaryDirectory() as folder:
        asked = Path(folder) / "test.json"
        asked.write_text(json.dumps(beginnings(conversations(test))), encoding="utf-8")
        answers = {
            "plain": [one.text for one in sp.predict(lm, plain, [row["input"] for row in test])],
            "chat": [one.text for one in sp.predict(lm, chat, asked)],
        }

    def gap(rows: slice) -> dict[str, float]:
        several = (answers["chat"][rows], answers["plain"][rows], references[rows])
        return dict(zip(("bleu", "low", "high"), paired_bleu(*several), strict=True))

    return {
        "train_rows": len(train),
        "test_rows": len(test),
        "plain": {"bleu": bleu(answers["plain"], references).as_dict(), **plain_counts},
        "chat": {"bleu": bleu(answers["chat"], references).as_dict(), **chat_counts},
        "chat_minus_plain": {
            "all answers": gap(slice(None)),
            "first answers": gap(slice(0, None, 2)),
            "second answers": gap(slice(1, None, 2)),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", type=Path, help="a folder of data; with OUT, JSON Lines with input and target")
    parser.add_argument("out", type=Path, nargs="?", help="write the conversations here, and nothing else")
    parser.add_argument("--rows", type=int, default=400, help="training rows")
    parser.add_argument("--test-rows", type=int, default=200)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base", default=DEFAULT_BASE)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.out is not None:
        written = conversations(read(options.source))
        text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in written)
        options.out.write_text(text, encoding="utf-8")
        print(f"{len(written):,} conversations: {options.out}")
        return
    found = measure(options)
    if options.json:
        print(json.dumps(found))
        return
    for name in ("plain", "chat"):
        score, of = found[name]["bleu"], found[name]
        print(
            f"{name}: BLEU {score['value']:.1f} ± {score['stderr']:.1f} (n = {score['n']}), {of['steps']} steps, "
            f"{of['tokens']:,} tokens computed, {of['tokens_without_sharing']:,} without sharing"
        )
    for what, gap in found["chat_minus_plain"].items():
        print(f"chat minus plain, {what}: BLEU {gap['bleu']:+.1f}, 95 % from {gap['low']:+.1f} to {gap['high']:+.1f}")


if __name__ == "__main__":
    main()
