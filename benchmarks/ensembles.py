"""An ensemble of several seeds against its members: trained in shared passes, measured on the same rows.

    python benchmarks/ensembles.py TRAIN VALIDATION TEST --seeds 5 --steps 50

Prints a JSON object: each member's score, and for both votes that of the ensemble, with its paired difference to the
mean of the members and to the best of them on these rows.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import torch

from softprompt.evaluation.ensemble import evaluate_ensemble
from softprompt.evaluation.metrics import paired_bootstrap
from softprompt.model.frozen import FrozenLM
from softprompt.tasks.ensemble import Ensemble
from softprompt.tasks.reading import form_of, read_task
from softprompt.tasks.task import Task
from softprompt.tuning.config import TrainConfig
from softprompt.tuning.many import train_together
from softprompt.tuning.training import Training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("train", "validation", "test"):
        parser.add_argument(name)
    parser.add_argument("--base", default="smollm2-135m")
    for option, default in (("seeds", 5), ("steps", 50), ("num-virtual-tokens", 20), ("batch-size", 8)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--validation-rows", type=int, default=100)
    parser.add_argument("--test-rows", type=int, default=300)
    given = parser.parse_args()
    lm = FrozenLM.load(given.base)
    rows, held_out, verbalizer = read_task(given.train, given.validation, None, None)
    test, _, _ = read_task(given.test, None, verbalizer, None)
    chosen = torch.randperm(len(test.examples), generator=torch.Generator().manual_seed(0))[: given.test_rows]
    test = replace(test, examples=tuple(test.examples[i] for i in sorted(chosen.tolist())))
    task = Task(lm, form_of(rows, lm.tokenizer, True), verbalizer, given.num_virtual_tokens, lm.window)
    config = TrainConfig(
        num_virtual_tokens=given.num_virtual_tokens,
        steps=given.steps,
        eval_every=given.steps,
        batch_size=given.batch_size,
        validation_rows=given.validation_rows,
        compile="off",
    )
    runs = [Training(task, rows, held_out, replace(config, seed=seed), name=f"{seed}") for seed in range(given.seeds)]
    for _ in train_together(runs):
        pass
    members = [run.result() for run in runs]
    gold = [str(example.target) for example in test.examples]
    document: dict[str, object] = {"steps": given.steps, "seeds": given.seeds}
    for vote in ("mean", "majority"):
        found = evaluate_ensemble(Ensemble.of(lm, members, vote), test)

        def hits(answers: list[str]) -> list[float]:
            return [float(answer == target) for answer, target in zip(answers, gold, strict=True)]

        alone = [hits([answer.text for answer in one.predictions]) for one in found.members]
        together = hits([answer.text for answer in found.predictions])
        mean = [sum(row) / len(row) for row in zip(*alone, strict=True)]
        document[vote] = {
            **found.as_dict(),
            "above_the_mean": paired_bootstrap(together, mean),
            "above_the_best": paired_bootstrap(together, alone[found.best]),
        }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
