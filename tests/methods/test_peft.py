"""LoRA against sums of low rank made by hand, PEFT's prompt tuning against PEFT, and what PEFT says."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Any

import pytest
import torch
from tokenizers import processors

from softprompt.data.example import Dataset
from softprompt.errors import ConfigError
from softprompt.methods import peft as by_peft
from softprompt.methods.problem import Learned, Problem
from softprompt.methods.registry import METHODS
from softprompt.model.frozen import FrozenLM
from softprompt.model.request import Request
from softprompt.tasks.length import VIRTUAL_TOKENS
from softprompt.tasks.predict import Query, predict
from softprompt.text.template import Template
from softprompt.text.tokens import SOFT
from softprompt.tuning.config import DEFAULT_STEPS
from tests.conftest import TOY_LABELS, TOY_TEMPLATE, plain_score, toy
from tests.methods.trained import (
    PATHS,
    Clock,
    another,
    label_loss,
    plain_copy,
    problem,
    quick,
    rates,
    spied,
)


@pytest.mark.parametrize("kind", PATHS)
def test_lora_is_the_base_model_with_low_rank_sums(kind: str, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """W + 32 / 16 · B A, put by hand into a plain model, gives the answers of the adapted one."""
    quick(monkeypatch)
    learned = METHODS["lora"].run(problem(kind, budget=20.0, began=clock.now))
    assert learned.adapted is not None
    adapted, merged = learned.adapted.model, plain_copy(kind)
    changed = 0
    for name, module in adapted.named_modules():
        if hasattr(module, "lora_A"):
            product = module.lora_B["default"].weight @ module.lora_A["default"].weight
            weight = merged.get_submodule(name).weight
            assert torch.equal(module.base_layer.weight, weight)
            weight.data += 2 * (product if product.shape == weight.shape and kind != "gpt2" else product.T)
            changed += bool(product.abs().max() > 0)
    assert changed == sum(hasattr(module, "lora_A") for module in adapted.modules()) > 0
    task, test = problem(kind).task(), toy(6, 3)
    for example, answer in zip(test.examples, learned.answer(test.examples, None), strict=True):
        loss = label_loss(merged, task, Dataset((example,), "", ""))
        assert (answer.logprobs or {})[str(example.target)] == pytest.approx(-float(loss), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(("name", "purpose"), [("lora", "LoRA"), ("peft-prompt-tuning", "PEFT's prompt tuning")])
def test_without_peft(name: str, purpose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError) as error:
        METHODS[name].run(problem())
    assert str(error.value) == (
        f'{purpose} needs the library peft, which is not installed; pip install "softprompt[compare]".'
    )


def test_what_peft_says_is_heard_but_for_noise(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of GPT-2's layers PEFT says what it sets right by itself; anything else is for the user."""
    import peft

    quick(monkeypatch)
    adapt = peft.get_peft_model
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        adapt(plain_copy("gpt2"), settings)

    def told(*arguments: Any) -> Any:
        warnings.warn("some weights are not what they should be", UserWarning, stacklevel=1)
        logging.getLogger("peft.tuners").warning("a layer was left out.")
        return adapt(*arguments)

    monkeypatch.setattr(peft, "get_peft_model", told)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        METHODS["lora"].run(problem("gpt2", budget=1.0, began=clock.now))
    assert [str(each.message) for each in caught if issubclass(each.category, UserWarning)] == [
        "some weights are not what they should be",
        "peft says: a layer was left out",
    ]


# --- PEFT's prompt tuning -----------------------------------------------------------------------------------


def with_bos(lm: FrozenLM) -> FrozenLM:
    """Its tokenizer puts a beginning-of-sequence token first, as Llama's does."""
    made: Any = processors.TemplateProcessing
    lm.tokenizer.backend_tokenizer.post_processor = made(single="</s> $A", special_tokens=[("</s>", 1)])
    return lm


def peft_run(ours: Problem, monkeypatch: pytest.MonkeyPatch) -> tuple[Learned, Any]:
    """What the method learned, and PEFT's own model after it."""
    import peft

    models = spied(monkeypatch, peft, "get_peft_model")
    return METHODS["peft-prompt-tuning"].run(ours), models[-1].eval()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "stablelm"])
@pytest.mark.parametrize("template", [TOY_TEMPLATE, Template("the plot {soft_prompt}{input} : {target}")])
@pytest.mark.parametrize("bos", [False, True])
def test_the_answers_are_those_of_pefts_own_logits(
    kind: str, template: Template, bos: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load() -> FrozenLM:
        return with_bos(another(kind)) if bos else another(kind)

    ours = problem(kind, lm=load(), fresh=load, template=template, budget=0.2)
    learned, model = peft_run(ours, monkeypatch)
    assert learned.chosen["steps"] >= 1
    numbers = 32 * VIRTUAL_TOKENS
    assert (learned.trainable_parameters, learned.bytes) == (numbers, 4 * numbers)
    assert learned.adapted is None
    task, test = ours.task(), toy(5, 3)
    for example, answer in zip(test.examples, learned.answer(test.examples, None), strict=True):
        ids = task.label_request(example).ids
        text = task.lm.tokenizer.decode([t for t in ids if t != 1])
        assert text.replace(" ", "") == template.text.format(
            soft_prompt="", input=example.fields["input"], target=""
        ).replace(" ", "")
        assert (ids[0] == 1) == bos
        scores = []
        for word in task.words:
            logits = model(input_ids=torch.tensor([[*ids, *word]])).logits[0].log_softmax(-1)
            first = VIRTUAL_TOKENS + len(ids) - 1
            scores.append(sum(float(logits[first + i, token]) for i, token in enumerate(word)))
        wanted = torch.tensor(scores).log_softmax(0).tolist()
        assert list((answer.logprobs or {}).values()) == pytest.approx(wanted, rel=1e-3, abs=1e-4)


def test_pefts_loss_is_that_of_the_targets(llama: FrozenLM) -> None:
    """The mean over target tokens, each row by itself by transformers alone."""
    import peft

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with by_peft._seeded(0):
        model = peft.get_peft_model(another("llama").model, config)
    vectors = model.get_prompt_embedding_to_save("default")
    requests = [Request((SOFT, 60, 61), 1, ((70, 71, 72),), 0), Request((SOFT, 62, 63, 64, 65), 1, ((73,),), 0)]
    found = by_peft.peft_loss(model, requests)
    by_hand = sum(plain_score("llama", r.ids, r.words[0], vectors) for r in requests) / -4
    assert float(found) == pytest.approx(float(by_hand), rel=1e-5)


def test_pefts_example_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of a second in 100 seconds, the soft prompt's default number in many; the rate falls from 3e-2 to 0."""
    clock, seen = Clock(monkeypatch), rates(monkeypatch, by_peft)
    loss = torch.zeros((), requires_grad=True)
    batches = clock.charge(by_peft, "peft_loss", lambda: 1.0)
    monkeypatch.setattr(by_peft, "peft_loss", lambda model, rows, _, call=by_peft.peft_loss: call(model, rows[:1]))
    learned, _ = peft_run(problem(budget=100.0, began=clock.now), monkeypatch)
    assert learned.chosen["steps"] == len(seen) == len(batches) == 100
    assert seen[0] == 3e-2
    assert seen[1:] == pytest.approx([3e-2 * (1 - i / 100) for i in range(1, 100)])
    assert (learned.validation, learned.curve) == (None, ())
    monkeypatch.setattr(by_peft, "peft_loss", lambda *_: loss + 0)
    clock.charge(by_peft, "peft_loss", lambda: 1.0)
    learned, _ = peft_run(problem(budget=1e6, began=clock.now), monkeypatch)
    assert learned.chosen["steps"] == DEFAULT_STEPS


def test_the_seed_decides_what_peft_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = torch.random.get_rng_state()
    vectors = [
        peft_run(problem(budget=1e-9, seed=seed), monkeypatch)[1].get_prompt_embedding_to_save("default")
        for seed in (0, 0, 1)
    ]
    assert torch.equal(vectors[0], vectors[1])
    assert not torch.equal(vectors[0], vectors[2])
    assert 0.9 < float(vectors[0].std()) < 1.1  # PEFT's default: normal, deviation 1
    assert torch.equal(drawn, torch.random.get_rng_state())


def test_a_soft_prompt_behind_the_input_is_moved_to_the_front(llama: FrozenLM) -> None:
    behind = Template("the {input}{soft_prompt} : {target}")
    task = by_peft.PeftTask(llama, behind, TOY_LABELS, 20, llama.window)
    example = toy(1, 1).examples[0]
    request, plain = task.label_request(example), problem(template=behind).task().label_request(example)
    assert request.ids == (SOFT, *plain.ids)
    assert request.shared == plain.shared + 1
    assert request.ids[1 : request.shared] == plain.ids[: plain.shared]
    (answer,) = predict([Query(task, example, torch.zeros(20, 32))])
    assert answer.text in TOY_LABELS.labels
