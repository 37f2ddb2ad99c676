"""Learning rates and optimizers by hand, and a first step of training as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from softprompt.tuning.config import TrainConfig, preset
from softprompt.tuning.optimizer import learning_rate, make_optimizer
from softprompt.tuning.start import initial_vectors
from softprompt.tuning.training import Training
from tests.conftest import plain_score, tiny, toy, toy_task, train_settings


def test_learning_rates_by_hand() -> None:
    linear = train_settings(lr=2.0, warmup=0.2, schedule="linear")
    rates = [learning_rate(linear, step, 10) for step in range(10)]
    assert rates == pytest.approx([1.0, 2.0, 2.0, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25])
    cosine = train_settings(lr=2.0, warmup=0.0, schedule="cosine")
    assert [learning_rate(cosine, step, 4) for step in range(4)] == pytest.approx(
        [2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5)]
    )
    constant = train_settings(lr=2.0, warmup=0.5, schedule="constant")
    assert [learning_rate(constant, step, 4) for step in range(4)] == [1.0, 2.0, 2.0, 2.0]
    assert learning_rate(train_settings(lr=2.0, warmup=0.05), 0, 1) == 2.0


def hand_adafactor(vectors: torch.Tensor, gradients: Sequence[torch.Tensor], lr: float, decay: float) -> torch.Tensor:
    """Shazeer and Stern 2018, algorithms 4 and 5 with beta1 = 0, beta2_t = 1 - t^-0.8, d = 1, absolute step size."""
    row, column = torch.zeros(vectors.shape[0]), torch.zeros(vectors.shape[1])
    for t, gradient in enumerate(gradients, start=1):
        beta = 1 - t**-0.8
        square = gradient**2 + 1e-30
        row = beta * row + (1 - beta) * square.mean(dim=1)
        column = beta * column + (1 - beta) * square.mean(dim=0)
        update = gradient / (row[:, None] * column[None] / row.mean()).sqrt()
        update = update / max(1.0, float(update.square().mean().sqrt()))
        vectors = vectors - decay * lr * vectors - lr * update
    return vectors


def hand_adamw(vectors: torch.Tensor, gradients: Sequence[torch.Tensor], lr: float, decay: float) -> torch.Tensor:
    """Loshchilov and Hutter 2019, algorithm 2, with beta 0.9 and 0.999 and epsilon 1e-8."""
    first, second = torch.zeros_like(vectors), torch.zeros_like(vectors)
    for t, gradient in enumerate(gradients, start=1):
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        update = first / (1 - 0.9**t) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
        vectors = vectors - lr * decay * vectors - lr * update
    return vectors


@pytest.mark.parametrize(("name", "by_hand"), [("adamw", hand_adamw), ("adafactor", hand_adafactor)])
def test_three_steps_of_an_optimizer_by_hand(name: str, by_hand: Callable[..., torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, 7, generator=generator)
    gradients = [torch.randn(5, 7, generator=generator) * 10.0**k for k in (0, -2, 1)]
    vectors = start.clone().requires_grad_()
    optimizer = make_optimizer(train_settings(optimizer=name, lr=0.3, weight_decay=0.1), vectors)
    for gradient in gradients:
        vectors.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(vectors.detach(), by_hand(start, gradients, 0.3, 0.1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["lester2021", "adamw"])
def test_a_first_step_by_hand_in_units_of_the_start(optimizer: str) -> None:
    """The whole way: gradient by transformers, update by hand; the recipe counts in RMS of the embedding table."""
    options: dict[str, Any] = {"init": "labels", "num_virtual_tokens": 6, "batch_size": 3, "steps": 1, "seed": 4}
    options |= {"loss": "labels", "average": 0.0}
    if optimizer == "lester2021":
        config, update, lr, decay, clip = preset("lester2021", **options), hand_adafactor, 0.3 / 10.7, 1e-5, 0.0
    else:
        config = TrainConfig(**options, init_scale=3.0, lr=0.25, weight_decay=0.1, warmup=0.0, clip=0.01)
        update, lr, decay, clip = hand_adamw, 0.25, 0.1, 0.01
    data = toy(3, 0)
    training = Training(toy_task(tiny("llama"), data), data, data, config)
    (step,) = training
    lm, bound = training.task.model, training.task
    start = initial_vectors(lm, 6, init="labels", seed=4, label_words=bound.label_words)
    assert config.init_scale is not None
    start[1:] *= config.init_scale
    leaf = start.clone().requires_grad_()
    loss = torch.zeros(())
    for example in data.examples:
        request = bound.label_request(example)
        scores = torch.stack([plain_score("llama", request.ids, word, leaf) for word in request.words])
        loss = loss - scores.log_softmax(dim=0)[bound.labels.index(str(example.target))] / 3
    (gradient,) = torch.autograd.grad(loss, leaf)
    table = float(lm.embedding.square().mean().sqrt())
    unit = start.square().mean(dim=1, keepdim=True).sqrt().clamp(table, config.init_scale * table)
    assert (float(unit.std()) > 0.01) == (optimizer == "adamw")
    in_units = gradient * unit
    assert step.loss == pytest.approx(float(loss.detach()), rel=1e-5)
    assert step.grad_norm == pytest.approx(float(in_units.norm()), rel=1e-4)
    assert step.lr == lr
    if clip:
        assert float(in_units.norm()) > clip
        in_units = in_units * clip / in_units.norm()
    expected = unit * update(start / unit, [in_units], lr, decay)
    torch.testing.assert_close(training.result().vectors, expected, rtol=1e-4, atol=1e-5)
