"""Parametrisations against their formulas in numpy, the KV prefix against transformers' own cache."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from softprompt.data.example import Example
from softprompt.errors import ConfigError
from softprompt.evaluation.evaluate import evaluate
from softprompt.generation.decoder import generate
from softprompt.model.frozen import FrozenLM
from softprompt.model.request import Request, Sampling
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tasks.predict import Query, predict
from softprompt.tasks.task import Task
from softprompt.text.template import Template
from softprompt.text.tokens import SOFT, frequent_tokens
from softprompt.tuning.config import PARAMETRISATIONS
from softprompt.tuning.parametrisation import SAMPLED, Parametrisation, parametrise, prefix_of
from softprompt.tuning.start import initial_vectors
from softprompt.tuning.training import Training
from tests.conftest import (
    SHARED,
    TOY_LABELS,
    TOY_TEMPLATE,
    Run,
    plain,
    plain_score,
    scripted,
    tiny,
    toy,
    toy_task,
    train_settings,
)

FOLDING = ("plain", "residual", "superpos", "mlp")
TEMPLATES = ("{soft_prompt}{input} {target}", "Review :{soft_prompt} is it good ? {input} {target}")
TEXTS = ("a stirring film", "dull", "one of the best movies of the year , and a very funny one")


SCALE = 4.0


def form_of(kind: str, start: torch.Tensor, seed: int = 0) -> Parametrisation:
    return parametrise(tiny("llama"), kind, start, seed=seed, scale=SCALE, before=())


def text_start(length: int = 6) -> torch.Tensor:
    """Vectors of embeddings' length."""
    text = " the acting of"
    ids = tiny("llama").tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) == length - 2
    return initial_vectors(tiny("llama"), length, init="text", seed=0, text=text)


def shaken(form: Parametrisation) -> dict[str, Any]:
    """Moves every tensor by seeded noise of its own size, or of 1; returns them as float64 numpy arrays."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in form.tensors.values():
            size = float(tensor.square().mean().sqrt()) or 1.0
            tensor += 0.5 * size * torch.randn(tensor.shape, generator=generator)
    return {name: tensor.detach().double().numpy() for name, tensor in form.tensors.items()}


# --- the formulas -----------------------------------------------------------------------------------------------------


def fold_by_hand(kind: str, t: dict[str, Any], start: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """``start`` in its units."""
    lm = tiny("llama")
    parts = {"plain": 1, "superpos": 2, "residual": 3, "mlp": 1}[kind]
    t = {name: tensor / parts for name, tensor in t.items()}
    if kind == "plain":
        return t["vectors"]  # type: ignore[no-any-return]
    if kind == "superpos":
        table = lm.embedding.double().numpy() / lm.embedding_rms
        sampled = table[frequent_tokens(lm.tokenizer, len(lm.embedding), 0)[:SAMPLED]]
        assert sampled.shape == (128, 32)
        gradients = np.random.default_rng(0).standard_normal((32, 20_000))
        moved = np.sign(sampled @ gradients).T @ sampled
        unit = 1 / np.sqrt((moved**2).mean())
        return t["vectors"] + t["weights"] * unit @ sampled  # type: ignore[no-any-return]
    inputs, width = t["down"].shape
    hidden = np.maximum(t["vectors"] @ (t["down"] / inputs) + t["down_bias"], 0)
    out = hidden @ (t["up"] / width) + t["up_bias"]
    if kind == "mlp":
        return out  # type: ignore[no-any-return]
    mean, variance = out.mean(axis=1, keepdims=True), out.var(axis=1, keepdims=True)
    return t["vectors"] + (out - mean) / np.sqrt(variance + 1e-5) * t["gain"] + t["bias"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", FOLDING)
def test_the_fold_is_the_formula(kind: str) -> None:
    start = text_start() * torch.tensor([[0.5], [1], [2], [3], [4], [9]])
    form = form_of(kind, start)
    tensors = shaken(form)
    rms = tiny("llama").embedding_rms
    own = np.sqrt((start.double().numpy() ** 2).mean(axis=1, keepdims=True))
    unit = np.minimum(np.maximum(own, rms), SCALE * rms)
    assert unit[0] == rms < unit[2] < unit[3] < unit[5] == SCALE * rms
    expected = fold_by_hand(kind, tensors, start.double().numpy() / unit)
    np.testing.assert_allclose(form.unit.numpy(), unit, rtol=1e-6)
    # the unit of superpos is a mean over random gradients: of 20,000, its standard error is below 0.2 %
    tolerance = 0.01 if kind == "superpos" else 1e-5
    np.testing.assert_allclose(form.fold().detach().numpy(), expected, rtol=1e-4, atol=tolerance)
    assert not np.allclose(expected, start.numpy() / unit, atol=0.1)


@pytest.mark.parametrize("kind", FOLDING)
@pytest.mark.parametrize("init", ["text", "random", "labels"])
def test_it_starts_at_the_chosen_vectors(kind: str, init: str) -> None:
    start = text_start()
    if init != "text":
        start = initial_vectors(tiny("llama"), 6, init=init, seed=2, label_words=((70, 71), (90,)))
    form = form_of(kind, start)
    found = form.fold().detach() * form.unit
    torch.testing.assert_close(found, start, rtol=1e-4, atol=1e-5)
    if kind != "mlp":  # which starts from a least-squares solution
        torch.testing.assert_close(found, start, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", ["residual", "superpos", "mlp"])
def test_the_seed_decides_what_is_drawn(kind: str) -> None:
    def moved(seed: int) -> torch.Tensor:
        form = form_of(kind, text_start(), seed)
        shaken(form)
        return form.fold().detach()

    assert torch.equal(moved(1), moved(1))
    assert not torch.equal(moved(1), moved(2))


@pytest.mark.parametrize("kind", PARAMETRISATIONS)
def test_a_step_of_adam_moves_every_soft_prompt_alike(kind: str) -> None:
    """Of two steps against one gradient, the second moves the elements by the learning rate where they are learned
    themselves, and by a fifth to five times as much (root mean square) where they are folded."""
    form = form_of(kind, text_start())
    gradient = torch.randn(form.fold().shape, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(form.tensors.values(), lr=0.01)
    before = form.fold().detach()
    for _ in range(2):
        before = form.fold().detach().clone()
        optimizer.zero_grad()
        (form.fold() * gradient).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    moved = float((form.fold().detach() - before).square().mean().sqrt())
    if kind in ("plain", "prefix"):
        assert moved == pytest.approx(0.01, rel=1e-4)
    assert 0.002 < moved < 0.05


def test_a_step_moves_each_virtual_token_of_a_kv_prefix_by_its_own_size() -> None:
    """A tenth of the RMS of its key and of its value in each layer, as transformers' own cache has them."""
    start = text_start()
    form = form_of("prefix", start)
    cache = plain("llama")(inputs_embeds=start[None], use_cache=True).past_key_values
    for layer, states in enumerate(cache.layers):
        for which, tensor in enumerate((states.keys, states.values)):
            expected = tensor[0].square().mean(dim=(0, 2)).sqrt() / 10  # one for each token
            assert float(expected.std()) > 0  # or a size common to all would pass
            assert torch.allclose(form.unit[:, layer, which, 0, 0], expected, rtol=1e-4), (layer, which)


# --- gradients --------------------------------------------------------------------------------------------------------


def one_step(kind: str, lm: FrozenLM, template: str, **options: Any) -> tuple[Training, float]:
    """A training after its first step, without clipping, and the loss; its tensors hold the step's gradient."""
    data = toy(5, 0)
    task = Task.for_data(lm, data, Template(template), verbalizer=TOY_LABELS, num_virtual_tokens=6)
    settings = {"init": "labels", "batch_size": 5, "steps": 1, "clip": 0.0, "parametrisation": kind, "loss": "labels"}
    settings |= {"init_scale": SCALE}
    training = Training(task, data, data, train_settings(**settings | options))
    (step,) = training
    return training, step.loss


def reference(
    training: Training, score: Callable[[Request, Sequence[int], torch.Tensor], torch.Tensor]
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the first step by autograd over ``score(request, word, numbers)``, all in fp32."""
    task, config = training.task, training.config
    start = initial_vectors(task.model, 6, init="labels", seed=0, label_words=task.label_words)
    before = task.label_request(toy(5, 0).examples[0]).ids
    if config.parametrisation != "prefix":
        start[1:] *= SCALE
    before = before[: before.index(SOFT)]
    form = parametrise(task.model, config.parametrisation, start, seed=0, scale=SCALE, before=before)
    numbers = form.fold() * form.unit
    loss = torch.zeros(())
    for example in toy(5, 0).examples:
        request = task.label_request(example)
        scores = torch.stack([score(request, word, numbers) for word in request.words])
        loss = loss - scores.log_softmax(dim=0)[task.labels.index(str(example.target))] / 5
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(tensor.grad is not None for tensor in form.tensors.values())
    return float(loss.detach()), {name: tensor.grad for name, tensor in form.tensors.items() if tensor.grad is not None}


def close(found: torch.Tensor | None, expected: torch.Tensor) -> bool:
    assert found is not None
    return float((found - expected).norm()) <= 1e-4 * float(expected.norm()) + 1e-9


@pytest.mark.parametrize("kind", FOLDING)
@pytest.mark.parametrize("template", TEMPLATES)
def test_gradients_are_those_of_the_concatenated_soft_prompt(kind: str, template: str) -> None:
    training, loss = one_step(kind, tiny("llama"), template)
    expected, gradients = reference(
        training, lambda request, word, numbers: plain_score("llama", request.ids, word, numbers)
    )
    assert loss == pytest.approx(expected, rel=1e-5)
    tensors = training.learned
    assert tensors.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert close(tensors[name].grad, gradient), name


def cached_logprobs(kind: str, ids: Sequence[int], kv: torch.Tensor) -> torch.Tensor:
    """Log-probabilities ``[T, V]`` after each of the ids behind SOFT, by transformers alone, with ``kv`` ``[P, L, 2,
    H_kv, D]`` in its cache in the place of SOFT."""
    from transformers import DynamicCache

    model, place = plain(kind), tuple(ids).index(SOFT)
    cache = DynamicCache()
    if place:
        model(input_ids=torch.tensor([ids[:place]]), past_key_values=cache, use_cache=True)
    for layer in range(kv.shape[1]):
        keys, values = (kv[:, layer, which].transpose(0, 1)[None] for which in (0, 1))
        cache.update(keys, values, layer)
    rest = torch.tensor([ids[place + 1 :]])
    past = place + len(kv)
    assert cache.get_seq_length() == past
    logits = model(
        input_ids=rest,
        past_key_values=cache,
        attention_mask=torch.ones(1, past + rest.shape[1], dtype=torch.long),
        position_ids=torch.arange(past, past + rest.shape[1])[None],
    ).logits[0]
    return torch.nn.functional.log_softmax(logits, dim=-1)


def cached_score(kind: str, request: Request, word: Sequence[int], kv: torch.Tensor) -> torch.Tensor:
    """log P(word | request) by ``cached_logprobs``, a scalar."""
    logprobs = cached_logprobs(kind, (*request.ids, *word[:-1]), kv)[-len(word) :]
    return logprobs[torch.arange(len(word)), torch.tensor(word)].sum()


def some_kv(lm: FrozenLM, length: int = 6, seed: int = 0) -> torch.Tensor:
    """A KV prefix as no vectors would give it."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(length, *lm.trained.kv_shape, generator=generator)


@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_kv_prefix_is_transformers_own_cache(kind: str, template: str) -> None:
    lm = tiny(kind)
    assert lm.trained.kv_shape == (3, 2, 4 if kind in ("gpt2", "gpt_neox", "opt") else 2, 8)
    kv, task = some_kv(lm), Task(lm, Template(template), TOY_LABELS, 6, 128)
    requests = [task.label_request(Example({"input": text}, None)) for text in TEXTS]
    expected = torch.stack([torch.stack([cached_score(kind, r, word, kv) for word in r.words]) for r in requests])
    torch.testing.assert_close(lm.score(requests, [kv]), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize("template", TEMPLATES)
def test_gradients_of_a_kv_prefix_are_those_through_transformers_cache(kind: str, template: str) -> None:
    training, loss = one_step("prefix", tiny(kind), template)
    expected, gradients = reference(training, lambda request, word, numbers: cached_score(kind, request, word, numbers))
    assert loss == pytest.approx(expected, rel=1e-5)
    assert close(training.learned["kv"].grad, gradients["kv"])


# --- the KV prefix as a soft prompt -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize("template", TEMPLATES)
def test_before_training_a_kv_prefix_is_the_plain_soft_prompt(kind: str, template: str) -> None:
    lm, data = tiny(kind), toy(12, 0)
    task = Task.for_data(lm, data, Template(template), verbalizer=TOY_LABELS, num_virtual_tokens=6)
    start = initial_vectors(lm, 6, init="vocab", seed=3)
    made = {}
    for form in ("plain", "prefix"):
        training = Training(task, data, data, train_settings(init="vocab", seed=3, parametrisation=form))
        made[form] = training.vectors
    assert made["prefix"].shape == (6, *lm.trained.kv_shape)
    torch.testing.assert_close(made["plain"], start)
    requests = [task.label_request(example) for example in data.examples]
    scores = [lm.score(requests, [made[form]]) for form in ("plain", "prefix")]
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-5, atol=1e-5)


def test_a_kv_prefix_starts_from_another_soft_prompt_of_either_kind() -> None:
    lm, data = tiny("llama"), toy(12, 0)
    task = toy_task(lm, data)
    vectors, kv = initial_vectors(lm, 6, init="random", seed=3), some_kv(lm)
    config = train_settings(parametrisation="prefix")
    torch.testing.assert_close(Training(task, data, data, config, start=kv).vectors, kv)
    of_vectors = Training(task, data, data, config, start=vectors).vectors
    torch.testing.assert_close(of_vectors, prefix_of(lm, (), vectors))
    for start, settings, sentence in (
        (
            kv,
            {"parametrisation": "residual"},
            "the soft prompt to start from is a trained KV prefix, which only the parametrisation prefix can go on "
            "from, not residual; choose that, or another start",
        ),
        (
            kv[:, :2],
            {"parametrisation": "prefix"},
            "the soft prompt to start from has shape [6, 2, 2, 2, 8], but [6, 3, 2, 2, 8] is needed; "
            "set num_virtual_tokens to its length and use it with a base model of its width",
        ),
    ):
        with pytest.raises(ConfigError) as error:
            Training(task, data, data, train_settings(**settings), start=start)
        assert str(error.value) == sentence


def test_a_base_model_without_a_shared_prefix_is_refused() -> None:
    data = toy(12, 0)
    with pytest.raises(ConfigError) as error:
        Training(toy_task(tiny("stablelm"), data), data, data, train_settings(parametrisation="prefix"))
    assert "tiny-stablelm has none: it is of type stablelm" in str(error.value)
    assert str(error.value).endswith("choose another base model or parametrisation")


def test_a_soft_prompt_behind_the_input_is_refused() -> None:
    data = toy(12, 0)
    text = "{input}{soft_prompt} {target}"
    task = Task.for_data(tiny("llama"), data, Template(text), verbalizer=TOY_LABELS, num_virtual_tokens=6)
    with pytest.raises(ConfigError) as error:
        Training(task, data, data, train_settings(parametrisation="prefix"))
    assert str(error.value) == (
        "the parametrisation prefix needs {soft_prompt} before every input field, and no empty input, but the template "
        f"is {text!r}; move {{soft_prompt}} to the front, or choose another parametrisation"
    )


@pytest.mark.parametrize(
    ("kind", "request_"),
    [("llama", Request((60, SOFT), 0, ((70,),), 0)), ("stablelm", Request((SOFT, 60), 1, ((70,),), 0))],
)
def test_a_kv_prefix_where_there_is_no_shared_prefix_is_named(kind: str, request_: Request) -> None:
    lm, kv = tiny(kind), some_kv(tiny("llama"))
    calls: list[Callable[[], object]] = [
        lambda: lm.score([request_], [kv]),
        lambda: generate(lm, [request_], [kv]),
    ]
    for call in calls:
        with pytest.raises(ConfigError) as error:
            call()
        assert "must stand before all input, the input must not be empty" in str(error.value)
        assert str(error.value).endswith("use a plain soft prompt.")


def test_a_query_checks_the_shape_of_a_kv_prefix(llama: FrozenLM) -> None:
    example, kv = Example({"input": "film"}, None), some_kv(llama)
    Query(toy_task(llama, toy(2, 0)), example, kv)
    another = toy_task(tiny("stablelm"), toy(2, 0))
    for task, vectors, wanted in (
        (toy_task(llama, toy(2, 0)), kv[:5], "[6, 3, 2, 2, 8], but a soft prompt of shape [5, 3, 2, 2, 8]"),
        (toy_task(llama, toy(2, 0)), kv[..., :4], "[6, 3, 2, 2, 8], but a soft prompt of shape [6, 3, 2, 2, 4]"),
        (another, kv, "[6, 32], but a soft prompt of shape [6, 3, 2, 2, 8]"),
    ):
        with pytest.raises(ConfigError) as error:
            Query(task, example, vectors)
        assert str(error.value) == (
            f"The template '{TOY_TEMPLATE.text}' needs a soft prompt of shape {wanted} was given; "
            "use a soft prompt with its own task, and Task.without_soft_prompt() without one."
        )


def test_a_batch_mixes_kv_prefixes_vectors_and_neither(llama: FrozenLM) -> None:
    """Fact 5: answers of a mixed batch are those of one request at a time."""
    generator = torch.Generator().manual_seed(0)
    labelled = [Task(llama, Template(text), TOY_LABELS, length, 128) for text in TEMPLATES for length in (6, 3)]
    free = [Task(llama, Template(text), None, length, 128) for text in TEMPLATES for length in (6, 3)]
    queries = []
    for number, task in enumerate((*labelled, *free)):
        vectors = 0.15 * torch.randn(task.num_virtual_tokens, 32, generator=generator)
        kv = some_kv(llama, task.num_virtual_tokens, seed=number)
        for text in TEXTS:
            example = Example({"input": text}, None)
            queries += [Query(task, example, vectors), Query(task, example, kv)]
            queries.append(Query(task.without_soft_prompt(), example))
    sampling = Sampling(max_new_tokens=6)
    together = predict(queries, sampling=sampling)
    for query, answer in zip(queries, together, strict=True):
        (alone,) = predict([query], sampling=sampling)
        assert alone.text == answer.text
        if alone.logprobs is not None and answer.logprobs is not None:
            assert dict(answer.logprobs) == pytest.approx(dict(alone.logprobs), abs=1e-4)
    assert len({answer.text for answer in together}) > 4


def test_generation_after_a_kv_prefix_is_transformers_own(llama: FrozenLM) -> None:
    kv, task = some_kv(llama), Task(llama, Template(TEMPLATES[1]), None, 6, 128)
    request = task.open_request(Example({"input": TEXTS[0]}, None), 5)
    (found,) = generate(llama, [request], [kv], Sampling(max_new_tokens=5))
    ids: list[int] = []
    for _ in range(5):
        ids.append(int(cached_logprobs("llama", (*request.ids, *ids), kv)[-1].argmax()))
    assert list(found.ids) == ids[: len(found.ids)]
    assert len(found.ids) == 5 or ids[len(found.ids)] == llama.tokenizer.eos_token_id


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PARAMETRISATIONS)
def test_every_parametrisation_learns_and_changes_no_weight(kind: str, tmp_path: Path) -> None:
    """Chance is 0.5: of 100 rows, guessing gets 80 right with a probability below 1e-9."""
    lm = tiny("llama")
    before, table = lm.weights_digest(), lm.embedding.clone()
    data, validation = toy(300, 0), toy(100, 1)
    long = 160 if kind in ("mlp", "prefix") else 80  # which learn more slowly
    settings = {"batch_size": 16, "steps": long, "eval_every": long // 4, "loss": "labels"}
    config = train_settings(num_virtual_tokens=8, parametrisation=kind, **settings)
    training = Training(toy_task(lm, data, 8), data, validation, config)
    steps = list(training)
    assert sum(step.loss for step in steps[-10:]) / 10 < 0.5 * steps[0].loss
    made = training.result()
    assert lm.weights_digest() == before
    assert torch.equal(lm.embedding, table)
    assert made.parametrisation == kind
    assert made.vectors.dtype == torch.float32
    assert made.metrics[0]["value"] >= 0.8
    made.save(tmp_path / "made.safetensors")
    loaded = SoftPrompt.load(tmp_path / "made.safetensors")
    found = evaluate(Task.of(lm, loaded), loaded.vectors, validation)
    assert found.headline.value == made.metrics[0]["value"]
    count = {"plain": 256, "superpos": 256 + 8 * 128, "prefix": 8 * 3 * 2 * 2 * 8, "mlp": 256 + 2 * 32 * 32 + 2 * 32}
    assert made.training["trainable_parameters"] == count.get(kind, 256 + 2 * 32 * 32 + 4 * 32)
    json.dumps(made.training)


@pytest.mark.parametrize("kind", ["residual", "prefix"])
def test_clipping_is_over_all_tensors_together(kind: str) -> None:
    unclipped, _ = one_step(kind, tiny("llama"), TEMPLATES[1])
    clipped, _ = one_step(kind, tiny("llama"), TEMPLATES[1], clip=1e-3)

    def gradients(training: Training) -> torch.Tensor:
        tensors = training.learned.values()
        return torch.cat([tensor.grad.flatten() for tensor in tensors if tensor.grad is not None])

    whole = gradients(unclipped)
    assert float(whole.norm()) > 2e-3
    torch.testing.assert_close(gradients(clipped), whole * 1e-3 / whole.norm(), rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("kind", PARAMETRISATIONS)
def test_what_is_kept_is_folded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = scripted(monkeypatch, [(0.5, 1.0), (0.9, 1.0), (0.6, 1.0)])
    data = toy(20, 0)
    config = train_settings(steps=6, eval_every=2, parametrisation=kind)
    training = Training(toy_task(tiny("llama"), data), data, data, config)
    list(training)
    made = training.result()
    assert torch.equal(made.vectors, seen[1])
    assert made.vectors.shape[1:] == (tiny("llama").trained.kv_shape if kind == "prefix" else (32,))


def test_a_kv_prefix_on_the_command_line(run: Run, train: Run, home: Path) -> None:
    trained = train("train.jsonl", "--name", "films", "--num-virtual-tokens", "4", "--parametrisation", "prefix")
    assert trained.code == 0, trained.err
    shown = run("show", "films", "--json").json
    sizes = {"num_virtual_tokens": 4, "num_layers": 3, "num_kv_heads": 2, "head_dim": 8}
    assert {key: shown.get(key) for key in (*sizes, "hidden_size")} == sizes | {"hidden_size": None}
    assert shown["parametrisation"] == shown["training"]["parametrisation"] == "prefix"
    assert "num_layers" in run("show", "films").out
    assert [one["num_virtual_tokens"] for one in run("list", "--json").json["soft_prompts"]] == [4]
    assert "films" in run("list").out
    evaluated = run("evaluate", "films", "test.jsonl", "--dtype", "fp32", "--json").json
    predicted = run("predict", "films", "--file", "test.jsonl", "--dtype", "fp32", "--json").json["predictions"]
    gold = [json.loads(line)["target"] for line in Path("test.jsonl").read_text().splitlines()]
    assert evaluated["value"] == sum(one["text"] == target for one, target in zip(predicted, gold, strict=True)) / 12

    again = train("train.jsonl", "--name", "more", "--init", "films", "--parametrisation", "prefix")
    assert again.code == 0, again.err
    refused = train("train.jsonl", "--name", "plain", "--init", "films")
    assert (refused.code, refused.out) == (2, "")
    assert refused.err.endswith(
        "error: the soft prompt to start from is a trained KV prefix, which only the parametrisation prefix can go on "
        "from, not plain; choose that, or another start\n"
    )


# --- averages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "residual", "prefix"])
def test_an_average_is_validated_and_kept(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = toy(20, 0)
    numbers: dict[float, list[torch.Tensor]] = {}
    for average in (0.0, 0.3):
        numbers[average] = scripted(monkeypatch, [(0.1 * i, 1.0) for i in range(1, 7)])
        config = train_settings(steps=6, eval_every=1, parametrisation=kind, average=average)
        training = Training(toy_task(tiny("llama"), data), data, data, config)
        start = training.vectors
        list(training)
        assert torch.equal(training.result().vectors, numbers[average][-1])
        monkeypatch.undo()
    expected = start  # the steps are the same; the average is beside them
    for t, current in enumerate(numbers[0.0], start=1):  # from t = 3 on, it is 0.3
        decay = min(0.3, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * current
        torch.testing.assert_close(numbers[0.3][t - 1], expected, rtol=1e-5, atol=1e-6)


def test_an_unknown_kind_is_refused(llama: FrozenLM) -> None:
    with pytest.raises(ConfigError, match="must be one of plain, residual, superpos, mlp, prefix, not 'MLP'"):
        parametrise(llama, "MLP", torch.ones(2, 32), seed=0, scale=1.0, before=())
