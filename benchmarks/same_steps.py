"""PEFT's prompt tuning against ours in the same number of steps, on the same rows, with the same number of virtual
tokens and the same batch size.

    python benchmarks/same_steps.py TRAIN VALIDATION TEST --minutes 8 --test-rows 1000

PEFT goes first, with its defaults and the learning rate of its example, as many steps as fit into the time; then a soft
prompt with our defaults does as many. Prints a JSON object: the scores on the test rows and their paired difference.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial

from softprompt.base import DEFAULT_BASE
from softprompt.compare import cut
from softprompt.config import TrainConfig
from softprompt.data import infer_labels, read_dataset
from softprompt.evaluate import Query, headline, headline_difference, headline_metric, predict
from softprompt.finetune import peft_prompt_tuning
from softprompt.frozen import FrozenLM
from softprompt.methods import Problem
from softprompt.task import Task
from softprompt.template import Verbalizer, default_template
from softprompt.train import Training


def main() -> None:
    """Runs both and prints what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("train")
    parser.add_argument("validation")
    parser.add_argument("test")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--test-rows", type=int, default=1000)
    parser.add_argument("--base", default=DEFAULT_BASE)
    options = parser.parse_args()

    train, validation, test = (
        read_dataset(path, fields=("input",)) for path in (options.train, options.validation, options.test)
    )
    test = cut(test, options.test_rows)
    labels = infer_labels(train)
    verbalizer = None if labels is None else Verbalizer.from_labels(labels)
    lm = FrozenLM.load(options.base)
    problem = Problem(
        lm=lm,
        fresh=partial(FrozenLM.load, options.base),
        template=default_template(verbalizer is not None),
        verbalizer=verbalizer,
        train=train,
        validation=validation,
        seed=0,
        budget=60 * options.minutes,
    )
    peft = peft_prompt_tuning(problem)
    peft_seconds = time.perf_counter() - problem.began
    theirs = peft.answer(test.examples, None)

    config = TrainConfig(steps=peft.chosen["steps"])
    task = Task.for_data(lm, train, problem.template, verbalizer=verbalizer)
    training = Training(task, train, validation, config)
    for _ in training:
        pass
    found = training.result()
    ours = predict([Query(task, example, found.vectors) for example in test.examples])

    metric = headline_metric(train, labels or ())
    value, low, high = headline_difference(metric, test, [one.text for one in ours], [one.text for one in theirs])
    print(
        json.dumps(
            {
                "steps": config.steps,
                "test_rows": len(test.examples),
                "num_virtual_tokens": task.num_virtual_tokens,
                "metric": metric,
                "ours": headline(metric, test, ours).value,
                "peft": headline(metric, test, theirs).value,
                "difference": {"value": value, "low": low, "high": high},
                "seconds": training.seconds,
                "seconds_of_peft": peft_seconds,
            }
        )
    )


if __name__ == "__main__":
    main()
