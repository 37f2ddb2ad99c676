"""PEFT's prompt tuning against ours in the same number of steps, on the same rows, with the same number of virtual
tokens and the same batch size.

    python benchmarks/same_steps.py TRAIN VALIDATION TEST --minutes 8 --test-rows 1000
    python benchmarks/same_steps.py TRAIN VALIDATION TEST --steps 1121

PEFT goes first, with its defaults and the learning rate of its example, as many steps as fit into the time; then a soft
prompt with our defaults does as many. With ``--steps`` our engine does PEFT's part, too: its start, optimizer and
schedule, whose gradients are the same (``tests/model/test_frozen.py``), in a tenth to a quarter of the time. There PEFT
may have what its example gives in place of our number of virtual tokens and of its default, a random start:
``--peft-virtual-tokens 8`` and ``--peft-text TEXT``. Prints a JSON object: the scores on the test rows and their paired
difference.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PromptTuningConfig, PromptTuningInit, get_peft_model

from softprompt.compare.plan import cut
from softprompt.data.example import infer_labels
from softprompt.data.packages import DEFAULT_BASE
from softprompt.data.reading import read_dataset
from softprompt.evaluation.evaluate import headline, headline_difference, headline_metric
from softprompt.methods.peft import PEFT_LR, PeftTask, peft_prompt_tuning
from softprompt.methods.problem import Problem
from softprompt.model.frozen import FrozenLM
from softprompt.tasks.predict import Prediction, Query, predict
from softprompt.tasks.task import Task
from softprompt.text.template import default_template
from softprompt.text.verbalizer import Verbalizer
from softprompt.tuning.config import TrainConfig
from softprompt.tuning.gradients import Gradients
from softprompt.tuning.objective import Objective
from softprompt.tuning.optimizer import learning_rate
from softprompt.tuning.rows import RowOrder
from softprompt.tuning.training import Training


def by_our_engine(problem: Problem, steps: int, length: int, text: str | None) -> tuple[PeftTask, torch.Tensor]:
    """What ``peft_prompt_tuning`` learns in so many steps with so many virtual tokens, from a text if there is one, and
    its task."""
    lm = problem.lm
    task = PeftTask(lm, problem.template, problem.verbalizer, length, lm.window)
    requests = [task.target_request(example) for example in problem.train.examples]
    torch.manual_seed(problem.seed)
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length)
    with TemporaryDirectory() as folder:
        if text:
            lm.tokenizer.save_pretrained(folder)
            settings.prompt_tuning_init, settings.prompt_tuning_init_text = PromptTuningInit.TEXT, text
            settings.tokenizer_name_or_path = folder
        model: Any = get_peft_model(problem.fresh().model, settings)
    vectors = model.prompt_encoder["default"].embedding.weight.detach().float().clone().requires_grad_()
    del model
    config = TrainConfig(lr=PEFT_LR, warmup=0.0, schedule="linear", seed=problem.seed)
    order, gradients = RowOrder([None] * len(requests)), Gradients(lm)
    optimizer = torch.optim.AdamW([vectors], lr=PEFT_LR)
    lm.layers.set(compiled=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate(config, step, steps)
        optimizer.zero_grad()
        batch = [requests[i] for i in order.batch(config.seed, step, config.batch_size)]
        gradients.backward(Objective(), batch, [0] * len(batch), vectors)
        optimizer.step()
    lm.layers.set(compiled=False)
    return task, vectors.detach()


def main() -> None:
    """Runs both and prints what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("train")
    parser.add_argument("validation")
    parser.add_argument("test")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--peft-virtual-tokens", type=int, help="with --steps; as many as ours without it")
    parser.add_argument("--peft-text", metavar="TEXT", help="with --steps; PEFT's random start without it")
    parser.add_argument("--test-rows", type=int, default=1000)
    parser.add_argument("--base", default=DEFAULT_BASE)
    options = parser.parse_args()
    if (options.peft_virtual_tokens or options.peft_text) and not options.steps:
        parser.error("--peft-virtual-tokens and --peft-text need --steps.")

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

    def answers(task: Task, vectors: torch.Tensor) -> list[Prediction]:
        return predict([Query(task, example, vectors) for example in test.examples])

    if options.steps:
        steps = options.steps
        length = options.peft_virtual_tokens or problem.num_virtual_tokens
        theirs = answers(*by_our_engine(problem, steps, length, options.peft_text))
    else:
        peft = peft_prompt_tuning(problem)
        steps, length = peft.chosen["steps"], problem.num_virtual_tokens
        theirs = peft.answer(test.examples, None)
    peft_seconds = time.perf_counter() - problem.began

    config = TrainConfig(steps=steps)
    task = Task.for_data(lm, train, problem.template, verbalizer=verbalizer)
    training = Training(task, train, validation, config)
    for _ in training:
        pass
    ours = answers(task, training.result().vectors)

    metric = headline_metric(train, labels or ())
    value, low, high = headline_difference(metric, test, [one.text for one in ours], [one.text for one in theirs])
    print(
        json.dumps(
            {
                "steps": config.steps,
                "test_rows": len(test.examples),
                "num_virtual_tokens": {"ours": task.num_virtual_tokens, "peft": length},
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
