"""Every way to adapt a base model, for encoder–decoders: losses, gradients and answers are those of transformers and
PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from softprompt.data.example import Example
from softprompt.methods.problem import Problem
from softprompt.methods.registry import METHODS
from softprompt.model.frozen import FrozenLM
from softprompt.tasks.length import VIRTUAL_TOKENS
from softprompt.tasks.task import Task
from softprompt.text.template import Template
from tests.conftest import toy
from tests.encoder_decoders import encoder_decoder, make_encoder_decoder, reference, tokenizer_of
from tests.methods.trained import problem, spied, tuner

TEMPLATE = Template("{soft_prompt}{input}\nAnswer: {target}")


def another(kind: str) -> FrozenLM:
    return FrozenLM(make_encoder_decoder(kind), tokenizer_of(kind), name=f"tiny-{kind}", dtype="fp32")


def of(kind: str, **options: Any) -> Problem:
    return problem(lm=encoder_decoder(kind), fresh=lambda: another(kind), template=TEMPLATE, **options)


def label_logprobs(model: Any, task: Task, example: Example) -> list[float]:
    """Log-probability of each label among the labels, by a model's own forward, which may be PEFT's."""
    request, start = task.label_request(example, None), task.lm.decoder_start
    scores = []
    for word in request.words:
        ids = torch.tensor([[*start, *word[:-1]]])
        given = torch.tensor([[token for token in request.ids if token >= 0]])
        logits = model(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            decoder_input_ids=ids,
            decoder_attention_mask=torch.ones_like(ids),
        ).logits[0, -len(word) :]
        scores.append(logits.log_softmax(-1).gather(1, torch.tensor(word)[:, None]).sum())
    return torch.stack(scores).log_softmax(0).tolist()


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_fine_tuning_has_transformers_gradient_in_every_weight(kind: str) -> None:
    ours, theirs = of(kind), make_encoder_decoder(kind).eval()
    made = tuner(ours)
    for master in made.masters:
        master.grad = None
    loss = made.backward(range(3))
    task = ours.task()
    chosen = [task.target_request(example, None) for example in ours.train.examples[:3]]
    total, start = torch.zeros(()), ours.lm.decoder_start
    for request in chosen:
        word = request.words[0]
        ids, labels = torch.tensor([[*start, *word[:-1]]]), torch.tensor([[-100] * (len(start) - 1) + list(word)])
        mask = torch.ones_like(ids)
        out = theirs(
            input_ids=torch.tensor([request.ids]), decoder_input_ids=ids, decoder_attention_mask=mask, labels=labels
        )
        total = total + out.loss * len(word)
    mean = total / sum(len(request.words[0]) for request in chosen)
    mean.backward()  # type: ignore[no-untyped-call]
    assert loss == pytest.approx(float(mean.detach()), rel=1e-5)
    for master, weight in zip(made.masters, theirs.parameters(), strict=True):
        if weight.grad is not None:
            torch.testing.assert_close(master.grad, weight.grad, atol=2e-5, rtol=1e-4)
    made.close()


def test_lora_answers_as_its_adapted_model_does() -> None:
    pytest.importorskip("peft")
    ours = of("t5-1.1", budget=0.5)
    learned = METHODS["lora"].run(ours)
    assert learned.adapted is not None
    model = learned.adapted.model
    # q, k, v and o of 6 attentions, two gates in and one out of 4 layers; rank 16
    assert learned.trainable_parameters == 16 * (24 * (32 + 32) + 12 * (32 + 48))
    for example, answer in zip(toy(4, 3).examples, learned.answer(toy(4, 3).examples, None), strict=True):
        wanted = label_logprobs(model, ours.task(), example)
        assert list((answer.logprobs or {}).values()) == pytest.approx(wanted, rel=1e-4, abs=1e-4)
        bare = label_logprobs(reference("t5-1.1"), ours.task(), example)
        assert wanted != pytest.approx(bare, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_pefts_prompt_tuning_answers_by_its_own_logits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    models, ours = spied(monkeypatch, peft, "get_peft_model"), of(kind, budget=0.2)
    learned = METHODS["peft-prompt-tuning"].run(ours)
    assert learned.trainable_parameters == 32 * VIRTUAL_TOKENS
    for example, answer in zip(toy(4, 3).examples, learned.answer(toy(4, 3).examples, None), strict=True):
        wanted = label_logprobs(models[-1].eval(), ours.task(), example)
        assert list((answer.logprobs or {}).values()) == pytest.approx(wanted, rel=1e-3, abs=1e-4)
