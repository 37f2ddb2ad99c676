"""Full fine-tuning: gradients and steps against transformers and torch alone, its time by a clock of ours."""

from __future__ import annotations

import math
import random
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from softprompt.data.example import Dataset, Example
from softprompt.errors import DataError
from softprompt.methods import fine_tuning, prompt_tuning
from softprompt.methods import peft as by_peft
from softprompt.methods import problem as given
from softprompt.methods.fine_tuning import NOTHING, Tuner
from softprompt.methods.registry import METHODS
from softprompt.model.fast.layers import LayerModes
from softprompt.model.frozen import FrozenLM
from softprompt.tuning.config import TrainConfig
from tests.conftest import TOY_LABELS, make_tokenizer, scripted, tiny, toy
from tests.methods.trained import (
    PATHS,
    WORDS,
    Clock,
    another,
    idle,
    label_loss,
    plain_copy,
    plain_loss,
    problem,
    quick,
    rates,
    texts,
    tuner,
)

# --- gradient and step, by transformers and torch alone ------------------------------------------------------


def target_loss(model: Any, task: Any, rows: Dataset) -> Any:
    return plain_loss(model, [task.target_request(e) for e in rows.examples], [0] * len(rows.examples), None)


@pytest.mark.parametrize("targets", ["labels", "texts"])
@pytest.mark.parametrize("kind", PATHS)
def test_the_gradient_of_every_weight_is_transformers_own(kind: str, targets: str) -> None:
    rows = toy(5, 1) if targets == "labels" else texts(5)
    ours = problem(kind, train=rows, validation=rows, verbalizer=WORDS if targets == "labels" else None)
    lm = ours.fresh()
    lm.tokens_at_once = 40
    found = tuner(ours, lm).backward(range(5))
    oracle = plain_copy(kind)
    expected = target_loss(oracle, ours.task(), rows)
    expected.backward()
    assert found == pytest.approx(float(expected.detach()), rel=1e-5)
    theirs = dict(oracle.named_parameters())
    assert dict(lm.model.named_parameters()).keys() == theirs.keys()
    for name, weight in lm.model.named_parameters():
        wanted = theirs[name].grad
        assert wanted.abs().max() > 0, name
        torch.testing.assert_close(weight.grad, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()), msg=name)


def test_embeddings_that_a_model_scales_are_trained_too() -> None:
    """Gemma multiplies its table by the square root of the width: the gradient, and a validation after a step."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def gemma() -> Any:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = AutoConfig.for_model(
            "gemma3_text", vocab_size=320, head_dim=8, num_key_value_heads=2, max_position_embeddings=128, **sizes
        )
        config.pad_token_id, config.eos_token_id = 0, 1
        torch.manual_seed(7)
        models: Any = AutoModelForCausalLM
        return models.from_config(config).eval()

    def load() -> FrozenLM:
        return FrozenLM(gemma(), make_tokenizer(), name="tiny-gemma", dtype="fp32", device="cpu")

    ours = problem(lm=load(), fresh=load)
    lm, oracle = ours.fresh(), gemma()
    trained = tuner(ours, lm)
    trained.backward(range(16))
    target_loss(oracle, ours.task(), ours.train).backward()
    table, wanted = lm.model.get_input_embeddings().weight, oracle.get_input_embeddings().weight.grad
    torch.testing.assert_close(table.grad, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    table.grad = None
    for weight in lm.model.parameters():
        weight.grad = None
    run, moved = trained.run(1e-2, 0.0, 1), deepcopy(lm.model)
    moved.set_attn_implementation("eager")
    with torch.no_grad():
        assert run.best["loss"] == pytest.approx(float(label_loss(moved, ours.task(), ours.validation)), rel=1e-4)


@pytest.mark.parametrize("clip", [1.0, 0.05])
def test_a_step_is_torchs_own(clip: float) -> None:
    """With as many rows as a batch has, every order of the rows gives the same step."""
    ours = problem("qwen3")
    trained = tuner(ours, lm := ours.fresh())
    trained.config = replace(trained.config, clip=clip)
    run = trained.run(0.01, 0.0, 1)
    assert run.best["step"] == 1
    oracle = plain_copy("qwen3")
    optimizer = torch.optim.AdamW(oracle.parameters(), lr=0.01, weight_decay=0.0)
    target_loss(oracle, ours.task(), ours.train).backward()
    norm = nn.utils.clip_grad_norm_(oracle.parameters(), clip)
    assert norm > 0.05
    optimizer.step()
    theirs = dict(oracle.named_parameters())
    for name, weight in lm.model.named_parameters():
        # where a gradient is near 0, rounding decides how far Adam goes
        far = theirs[name].grad.abs() > 1e-5 * float(theirs[name].grad.abs().max())
        torch.testing.assert_close(weight[far], theirs[name][far], rtol=1e-3, atol=2e-5, msg=name)


# --- weights that are not float32 ----------------------------------------------------------------------------


def test_small_steps_are_not_lost_in_bf16(clock: Clock) -> None:
    """20 steps at 1e-5 move a master by at most 2e-4, most of them by more than 1e-5; bf16 near 0.15 has a spacing
    of 1e-3, so that nearly nothing would move without masters."""
    ours = problem(dtype="bf16")
    trained = tuner(ours, lm := ours.fresh())
    before = [weight.detach().clone() for weight in lm.model.parameters()]
    assert all(weight.dtype == torch.bfloat16 for weight in before)
    optimizer = torch.optim.AdamW(trained.masters, lr=1e-5, weight_decay=0.0)
    for step in range(20):
        assert trained._step(optimizer, range(16), replace(trained.config, lr=1e-5, warmup=0.0), step, 40)
    moved = torch.cat([(m.detach() - b).abs().flatten() for m, b in zip(trained.masters, before, strict=True)])
    assert float(moved.max()) < 2.1e-4
    assert float((moved > 1e-5).float().mean()) > 0.5
    for weight, master in zip(lm.model.parameters(), trained.masters, strict=True):
        assert torch.equal(weight, master.bfloat16())


def test_gradients_of_micro_batches_add_up_in_fp32() -> None:
    ours = problem(dtype="bf16", train=toy(4, 1))
    lm = ours.fresh()
    lm.tokens_at_once = 1
    trained = tuner(ours, lm)
    sums = [torch.zeros_like(master) for master in trained.masters]
    targets = [len(ours.task().target_request(example).words[0]) for example in ours.train.examples]
    for row in range(4):
        trained.backward([row])
        for total, master in zip(sums, trained.masters, strict=True):
            assert master.grad is not None
            total += master.grad * (targets[row] / sum(targets))
            master.grad = None
    trained.backward(range(4))
    for total, master in zip(sums, trained.masters, strict=True):
        torch.testing.assert_close(master.grad, total, rtol=1e-6, atol=1e-9)
        if total.numel() > 1000:
            assert not torch.equal(total, total.bfloat16().float())


# --- the way there: rates, schedule, validation, time -------------------------------------------------------


def test_the_rate_rises_and_falls_to_the_end_of_the_time(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """43 seconds hold 40 steps of a second and 4 validations of half of one, less the one second that is lost in
    rounding: 10 % of warm-up, then a fall to 0."""
    trained, seen = tuner(problem()), rates(monkeypatch)
    run = trained.run(1e-3, 43.0, 4)
    steps = int(run.curve[-1]["step"])
    assert steps == len(seen)
    assert 38 <= steps <= 41
    assert len(run.curve) == 4
    peak = seen.index(max(seen))
    assert 2 <= peak <= 5
    assert max(seen) == 1e-3
    assert seen[:peak] == sorted(seen[:peak])
    assert seen[peak:] == pytest.approx([1e-3 * (1 - i / (steps - peak)) for i in range(steps - peak)], abs=6e-5)


@pytest.mark.parametrize("validation", [0.02, 0.5, 7.0, 100.0])
@pytest.mark.parametrize("budget", [1e-9, 3.0, 30.0, 250.0])
def test_the_budget_is_kept(budget: float, validation: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that take between 0.5 and 1.5 s, and validations that cost more or less than is guessed from them."""
    clock, draws = Clock(monkeypatch), torch.Generator().manual_seed(3)
    idle(monkeypatch, clock, lambda: 0.5 + float(torch.rand((), generator=draws)))
    monkeypatch.setattr(fine_tuning, "TrainConfig", partial(TrainConfig, patience=0))
    validations = clock.charge_validations(validation)
    learned = METHODS["full-fine-tuning"].run(problem(budget=budget, began=clock.now, validation=toy(200, 2)))
    spent = clock.now - 1000
    assert spent <= budget + 2 * 1.5 + validation  # the step that is timed, and a step and a validation
    assert len(validations) >= 1
    assert learned.chosen["steps"] >= 1
    if budget >= 30 and validation < 1:
        assert spent >= 0.85 * budget


def test_a_run_leaves_time_for_its_last_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    idle(monkeypatch, clock)
    clock.charge_validations(7.0)
    trained = tuner(problem())
    for known in (False, True):
        began = clock.now
        trained.run(1e-3, 60.5, 2)
        assert not known or 58 <= clock.now - began <= 60.5


def validation_of(step: int, value: float, loss: float) -> dict[str, Any]:
    """A validation of one row."""
    rows = {"loss": [loss], "correct": [1]}
    return {"seconds": 0.0, "step": step, "value": value, "score": value - loss, "loss": loss, "rows": rows}


@pytest.mark.parametrize(
    ("values", "losses", "place"),
    [
        ((0.6, 0.5, 0.8), (0.5, 0.4, 0.3), 2),
        ((0.8, 0.5, 0.6), (0.5, 0.4, 0.3), 0),
        ((0.5, 0.8, 0.84), (0.5, 0.4, 0.3), 1),  # of 100 rows: one standard error is 4 points
        ((0.5, 0.8, 0.85), (0.5, 0.4, 0.3), 2),
        ((0.8, 0.8, 0.8), (0.5, 0.4, 0.3), 1),
        ((0.5, -math.inf, 0.4), (0.5, math.inf, 0.3), 0),  # the middle one's loss was not finite
    ],
)
def test_the_rate_is_chosen_by_short_runs(
    values: tuple[float, ...], losses: tuple[float, ...], place: int, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fifth of 203 seconds, less the second of timing a step: three runs of 13 seconds, then one anew, of the middle
    rate if no other is better by more than a standard error."""
    idle(monkeypatch, clock)
    script = iter(zip((*values, 0.5, 0.9), (*losses, 0.9, 0.2), strict=True))
    monkeypatch.setattr(
        Tuner,
        "_validate",
        lambda self, step: validation_of(step, *next(script, (0.1, 1.0))),
    )
    runs = list[tuple[float, float, int]]()
    run = Tuner.run

    def spy(self: Tuner, lr: float, seconds: float, validations: int) -> Any:
        runs.append((lr, seconds, validations))
        return run(self, lr, seconds, validations)

    monkeypatch.setattr(Tuner, "run", spy)
    learned = METHODS["full-fine-tuning"].run(problem(budget=203.0, began=clock.now, validation=toy(100, 2)))
    rates, best = fine_tuning.FULL_RATES, fine_tuning.FULL_RATES[place]
    assert [(lr, validations) for lr, _, validations in runs] == [*((lr, 1) for lr in rates), (best, 16)]
    assert [seconds for _, seconds, _ in runs[:3]] == pytest.approx([202 / 15] * 3)
    assert runs[3][1] == pytest.approx(202 * 0.8, abs=8)  # validations take less than is guessed
    assert learned.chosen["lr"] == best
    assert learned.validation == 0.9
    assert learned.chosen["best_step"] == learned.curve[1]["step"]


def test_free_text_has_no_margin(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its value is a loss, of many tokens: the slightest gain decides."""
    ours = tuner(problem(verbalizer=None, train=texts(16), validation=texts(20), budget=250.0, began=clock.now))
    for values, place in (((-1.301, -1.300, -1.299), 2), ((-1.300, -1.300, -1.300), 1)):
        bests = iter({"step": 1, "value": value, "loss": -value} for value in values)
        monkeypatch.setattr(ours, "run", lambda *_, bests=bests: fine_tuning.Run(next(bests), ()))
        assert ours.choose(fine_tuning.FULL_RATES) == fine_tuning.FULL_RATES[place]


@pytest.mark.parametrize(
    ("name", "middle"), [("full-fine-tuning", fine_tuning.FULL_RATES[1]), ("lora", by_peft.LORA_RATES[1])]
)
def test_without_time_to_try_it_is_the_middle_rate(name: str, middle: float, clock: Clock) -> None:
    learned = METHODS[name].run(problem(budget=30.0, began=clock.now))
    assert learned.chosen["lr"] == middle
    assert learned.chosen["steps"] > 20


def test_small_data_is_not_seen_more_often_than_helps(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = rates(monkeypatch)
    idle(monkeypatch, clock)
    monkeypatch.setattr(fine_tuning, "LEAST_PLANNED", 30)
    tuner(problem(train=toy(32, 1))).run(1e-5, 1e6, 1)
    assert len(seen) == 20 * 32 / 16
    monkeypatch.setattr(fine_tuning, "LEAST_PLANNED", 70)
    seen.clear()
    tuner(problem(train=toy(32, 1))).run(1e-5, 1e6, 1)
    assert len(seen) == 70


def test_the_best_weights_are_kept_and_patience_ends(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    script = [(0.5, 0.7), (0.8, 0.5), (0.9, 0.4), *[(0.3, 0.3)] * 20]  # of three in a row 0.5, 0.65, 0.73, 0.67, 0.5
    lm, weights = another("llama"), list[list[torch.Tensor]]()
    seen = scripted(monkeypatch, script)
    trained = tuner(problem(), lm)
    trained.config = replace(trained.config, patience=3)
    validate = Tuner._validate

    def spy(self: Tuner, step: int) -> Any:
        weights.append([weight.detach().clone() for weight in lm.model.parameters()])
        return validate(self, step)

    monkeypatch.setattr(Tuner, "_validate", spy)
    run = trained.run(1e-2, 150.0, 20)
    assert len(run.curve) == len(seen) == 6
    assert [(point["value"], point["loss"]) for point in run.curve] == script[:6]
    assert run.best == run.curve[2]
    assert not torch.equal(weights[2][0], weights[3][0])
    for now, best in zip(lm.model.parameters(), weights[2], strict=True):
        assert torch.equal(now, best)


def test_every_trained_method_is_validated_on_the_rows_that_there_is_time_for() -> None:
    """The same ones: both draw as many with ``split_rows`` from the same seed."""
    asked = problem(budget=1e-9, validation=toy(40, 1), validation_rows=17)
    ours, theirs = prompt_tuning.soft_prompt(asked), METHODS["full-fine-tuning"].run(asked)
    assert ours.soft_prompt is not None
    assert ours.soft_prompt.metrics[0]["n"] == ours.validation_rows == theirs.validation_rows == 17


def test_each_run_begins_anew(clock: Clock) -> None:
    trained = tuner(problem(), lm := another("llama"))
    first = trained.run(1e-3, 12.0, 1)
    weights = [weight.detach().clone() for weight in lm.model.parameters()]
    trained.run(1e-1, 12.0, 1)
    again = trained.run(1e-3, 12.0, 1)
    assert [(p["step"], p["loss"]) for p in again.curve] == [(p["step"], p["loss"]) for p in first.curve]
    for now, before in zip(lm.model.parameters(), weights, strict=True):
        assert torch.equal(now, before)


def test_a_run_that_is_not_finite_leaves_the_weights_as_they_were(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = tuner(problem(), lm := another("llama"))
    losses, backward = iter([0.7, math.nan]), Tuner.backward
    monkeypatch.setattr(Tuner, "backward", lambda self, chosen: 0 * backward(self, chosen) + next(losses))
    run = trained.run(1e-2, 20.0, 1)
    assert next(losses, "spent") == "spent"
    assert (run.best, run.curve) == (NOTHING, ())
    assert lm.weights_digest() == tiny("llama").weights_digest()
    monkeypatch.setattr(Tuner, "backward", backward)
    scripted(monkeypatch, [(0.5, math.nan)])
    run = tuner(problem(), lm).run(1e-2, 20.0, 1)
    assert (run.best, run.curve) == (NOTHING, ())
    assert lm.weights_digest() == tiny("llama").weights_digest()
    found = {1e-3: NOTHING, 1e-2: {"step": 9, "value": 0.4, "loss": 2.0}, 1e-1: NOTHING}
    monkeypatch.setattr(Tuner, "run", lambda self, lr, seconds, validations: fine_tuning.Run(found[lr], ()))
    assert trained.choose((1e-3, 1e-2, 1e-1)) == 1e-2


# --- the methods --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), [("full-fine-tuning", "gpt2"), ("lora", "llama"), ("lora", "stablelm")])
def test_they_learn(name: str, kind: str, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 60 rows that chance gets right half of the time, 50 right by luck has a probability of 1e-7."""
    quick(monkeypatch)
    ours = problem(kind, train=toy(96, 1), budget=75.0, began=clock.now)
    digest = ours.lm.weights_digest()
    learned = METHODS[name].run(ours)
    test = toy(60, 3)
    answers = learned.answer(test.examples, None)
    assert sum(a.text == e.target for a, e in zip(answers, test.examples, strict=True)) >= 50
    assert ours.lm.weights_digest() == digest
    assert learned.adapted is not None
    assert learned.adapted.weights_digest() != digest
    assert not any(weight.requires_grad or weight.grad is not None for weight in learned.adapted.model.parameters())
    assert not any(module.training for module in learned.adapted.model.modules())
    assert learned.validation == max(point["value"] for point in learned.curve)
    assert [point["seconds"] for point in learned.curve] == sorted(point["seconds"] for point in learned.curve)
    assert 0 < learned.curve[0]["seconds"] < learned.curve[-1]["seconds"] <= 75


@pytest.mark.parametrize("name", ["full-fine-tuning", "lora", "soft-prompt", "prefix", "peft-prompt-tuning", "tf-idf"])
def test_what_cannot_be_learned_raises_an_alarm(name: str, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels that were drawn apart from the inputs. By the rule of two standard errors, about one of 40 such trainings
    would get by; the seeds are fixed."""
    quick(monkeypatch)
    monkeypatch.setattr(prompt_tuning, "most_steps", lambda rows, batch_size: 12)
    monkeypatch.setattr(by_peft, "most_steps", lambda rows, batch_size: 12)
    clock.charge(by_peft, "peft_loss", lambda: 1.0)
    rows = toy(40, 1)
    drawn = random.Random(3).choices(TOY_LABELS.labels, k=40)
    rows = replace(
        rows, examples=tuple(replace(row, target=label) for row, label in zip(rows.examples, drawn, strict=True))
    )
    ours = problem(train=rows, validation=toy(40, 2), budget=12.0, began=clock.now)
    learned = METHODS[name].run(ours)
    assert {"chance", "one_answer", "below_base"} & {alarm.kind for alarm in learned.alarms}, learned.alarms


def test_what_is_kept_is_counted(clock: Clock) -> None:
    """LoRA of rank 16 on seven matrices in three layers of widths 32, 48 and, for keys and values, 16."""
    one = METHODS["full-fine-tuning"].run(problem(dtype="bf16", budget=1.0, began=clock.now))
    assert (one.trainable_parameters, one.bytes) == (tiny("llama").num_parameters, 2 * tiny("llama").num_parameters)
    two = METHODS["lora"].run(problem(dtype="bf16", budget=1.0, began=clock.now))
    numbers = 3 * 16 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    assert (two.trainable_parameters, two.bytes) == (numbers, 4 * numbers)


def test_free_text_ends_where_it_was_taught_to(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    rows = Dataset(tuple(Example({"input": f"film {i}"}, "good\nbad", where=str(i)) for i in range(16)), "", "")
    ours = problem(train=rows, validation=rows, verbalizer=None, budget=40.0, began=clock.now)
    learned = METHODS["full-fine-tuning"].run(ours)
    (answer,) = learned.answer(rows.examples[:1], None)
    assert (answer.text, answer.finish) == ("good\nbad", "stop")
    assert learned.validation is None
    assert learned.curve[-1]["value"] == -learned.curve[-1]["loss"]


def test_long_budgets_compile(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    done = list[str]()
    monkeypatch.setattr(LayerModes, "set", lambda self, *, compiled: done.append("compiled" if compiled else "undone"))
    monkeypatch.setattr(given, "can_compile", lambda lm: lm.shares_prefix)
    monkeypatch.setattr(Tuner, "run", lambda self, lr, seconds, validations: fine_tuning.Run(NOTHING, ()))
    for kind, budget, expected in (("llama", 300.0, 2), ("llama", 299.0, 1), ("stablelm", 300.0, 1)):
        done.clear()
        METHODS["full-fine-tuning"].run(problem(kind, budget=budget, began=clock.now))
        assert done == ["compiled", "undone"][-expected:]


def test_a_foreign_target_is_refused() -> None:
    rows = Dataset((*toy(3, 1).examples, Example({"input": "film"}, "grand", where="toy.jsonl:4")), "", "")
    with pytest.raises(DataError) as error:
        METHODS["full-fine-tuning"].run(problem(train=rows))
    assert str(error.value) == (
        'toy.jsonl:4: expected one of the labels "negative", "positive", found "grand"; '
        "correct this row, or give all labels with --labels."
    )
