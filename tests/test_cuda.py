"""On a GPU everything gives what it gives on the CPU, in fp32; the CPU's answers are checked against others elsewhere.

Skipped where there is no CUDA device.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from softprompt.data.example import Example
from softprompt.generation.decoder import generate
from softprompt.model.coded import CodedLinear
from softprompt.model.fast import fp8
from softprompt.model.fast.compiled import graphs_compiled
from softprompt.model.frozen import FrozenLM
from softprompt.model.memory import GPU_SHARE, MAX_TOKENS, MOST_TOKENS
from softprompt.model.request import Request, Sampling
from softprompt.tasks.task import Task
from softprompt.text.template import Template
from softprompt.text.tokens import SOFT
from softprompt.text.verbalizer import Verbalizer
from softprompt.tuning.compilation import PAYS_FROM_STEPS, can_compile
from softprompt.tuning.config import PARAMETRISATIONS, TrainConfig
from softprompt.tuning.gradients import Gradients, Layout, Share
from softprompt.tuning.objective import Objective
from softprompt.tuning.training import Training
from tests.conftest import (
    ALL,
    SHARED,
    Run,
    make_model,
    make_tokenizer,
    tiny,
    toy,
    toy_task,
    train_settings,
    write_labels,
)
from tests.servers import make_lm, serving

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

DEVICE = "cuda"
ON_GPU = ("--dtype", "fp32", "--device", DEVICE)
TEXTS = ("a stirring film", "dull", "one of the best movies of the year , and a very funny one")
LABELS = Verbalizer({"good": ("very good", "great", "good"), "bad": ("very bad", "awful"), "so": ("very",)})
TOLERANCE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}


def soft(length: int, seed: int) -> torch.Tensor:
    """Vectors ``[length, 32]`` of the size of the tiny models' embeddings, on the CPU."""
    return 0.15 * torch.randn(length, 32, generator=torch.Generator().manual_seed(seed))


PROMPTS = (soft(7, 0), soft(3, 1))


def requests(lm: FrozenLM, way: str) -> list[Request]:
    """Requests of two soft prompts of other lengths, in one batch."""
    made = []
    for i, text in enumerate(TEXTS):
        task = Task(lm, Template("Review :{soft_prompt} {input} {target}"), LABELS, len(PROMPTS[i % 2]), 128)
        example = Example({"input": text}, "good")
        made.append(task.label_request(example, i % 2) if way == "labels" else task.open_request(example, 8, i % 2))
    return made


@pytest.mark.parametrize("kind", ALL)
def test_scores(kind: str) -> None:
    gpu, cpu = tiny(kind, DEVICE), tiny(kind)
    assert gpu.device.type == DEVICE
    assert gpu.fingerprint == cpu.fingerprint
    found = gpu.score(requests(gpu, "labels"), PROMPTS)
    assert found.device.type == "cpu"
    torch.testing.assert_close(found, cpu.score(requests(cpu, "labels"), PROMPTS), **TOLERANCE)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_texts(kind: str, temperature: float) -> None:
    gpu, cpu = tiny(kind, DEVICE), tiny(kind)
    sampling = Sampling(max_new_tokens=12, temperature=temperature, seed=5)
    found = generate(gpu, requests(gpu, "open"), PROMPTS, sampling)
    assert found == generate(cpu, requests(cpu, "open"), PROMPTS, sampling)
    assert len({one.ids for one in found}) > 1
    if kind in SHARED:
        assert gpu.fixed_rows.graphs.failed == ""
        assert gpu.fixed_rows.graphs.captured >= 1


def test_rows_continued_again_capture_nothing_more() -> None:
    gpu = tiny("llama", DEVICE)
    for _ in range(2):  # the second time, the memory is large enough
        generate(gpu, requests(gpu, "open"), PROMPTS, Sampling(max_new_tokens=12))
    before = gpu.fixed_rows.graphs.captured
    generate(gpu, requests(gpu, "open")[::-1], PROMPTS, Sampling(max_new_tokens=12))
    assert gpu.fixed_rows.graphs.captured == before


def test_conversations_in_a_captured_stream() -> None:
    talk = [
        Request((3, SOFT, 60, *said), 2, ((70, 71, 72),), 0, conversation="one")
        for said in ((), (70, 71, 5), (70, 71, 5, 70, 71, 9))
    ]
    rows, found = [*talk, Request((3, SOFT, 61, 62), 2, ((7, 8),), 0)], []
    for lm in (tiny("llama", DEVICE), tiny("llama")):
        ways = Gradients(lm)
        vectors = PROMPTS[0].to(lm.device, copy=True).requires_grad_()
        loss, _ = ways.backward(Objective(), rows, [0] * 4, vectors)
        assert ways.graphs.failed == ""
        assert ways.graphs.captured == (lm.device.type == DEVICE)
        assert vectors.grad is not None
        found.append((loss, vectors.grad.cpu()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)


def test_the_micro_batch_is_found_in_the_first_steps() -> None:
    lm = FrozenLM(make_model("llama"), make_tokenizer(), name="measured", dtype="fp32", device=DEVICE)
    data = toy(40, 0)
    training = Training(toy_task(lm, data), data, toy(8, 1), train_settings())
    for _ in training:
        pass
    assert training.micro_batch is not None
    assert training.micro_batch.tokens == lm.tokens_at_once == MOST_TOKENS
    assert not training.micro_batch.recomputed
    assert training.micro_batch.bytes_a_token > 1


def test_codes_in_fp8_are_multiplied() -> None:
    if not fp8.multiplies_fp8(torch.device(DEVICE)):
        pytest.skip("this GPU does not multiply fp8")
    generator = torch.Generator().manual_seed(0)
    layer = CodedLinear(torch.randn(2048, 4096, generator=generator).to(DEVICE), None, "fp8")
    assert layer.by_codes
    for rows in (1, 3, 200):
        inputs = torch.randn(rows, 4096, generator=generator).to(DEVICE, torch.bfloat16).requires_grad_()
        gradient = torch.randn(rows, 2048, generator=generator).to(DEVICE, torch.bfloat16)
        found = layer(inputs)
        (passed,) = torch.autograd.grad(found, inputs, gradient)
        weight = layer.decoded(torch.float32)
        for ours, exact in ((found, inputs.float() @ weight.T), (passed, gradient.float() @ weight)):
            assert float((ours.float() - exact).norm() / exact.norm()) < 0.04


@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize("loss", ["lm", "labels"])
@pytest.mark.parametrize("layout", ["stream", "two stages"])
def test_loss_and_gradient(kind: str, loss: str, layout: Layout) -> None:
    found = []
    for lm in (tiny(kind, DEVICE), tiny(kind)):
        data = toy(9, 0)
        task = toy_task(lm, data, 7)
        labels = task.label_of_word if loss == "labels" else None
        rows = [task.label_request(e) if loss == "labels" else task.target_request(e) for e in data.examples]
        gold = [task.labels.index(str(e.target)) if loss == "labels" else 0 for e in data.examples]
        vectors = PROMPTS[0].to(lm.device, copy=True).requires_grad_()
        value, _ = Gradients(lm, layout=layout, max_tokens=40).backward(Objective(labels), rows, gold, vectors)
        assert vectors.grad is not None
        found.append((value, vectors.grad.cpu()))
    (ours, gradient), (theirs, expected) = found
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert float((gradient - expected).norm() / expected.norm()) < 1e-4


def test_streams_of_one_shape_replay_one_graph_and_compile_nothing_more() -> None:
    """Batches of other texts and lengths; each has the gradient of two stages, which are not captured."""
    lm = tiny("llama", DEVICE)
    ways, oracle = Gradients(lm), Gradients(lm, layout="two stages")
    compiled = None
    for shift in range(6):
        requests = [
            Request((SOFT, *range(10 + shift, 10 + shift + length)), 1, ((7, 8 + shift),))
            for length in (3, 9 + shift, 20)
        ]
        found = []
        for each in (ways, oracle):
            vectors = PROMPTS[0].to(DEVICE, copy=True).requires_grad_()
            loss, _ = each.backward(Objective(), requests, [0, 0, 0], vectors)
            assert vectors.grad is not None
            found.append((loss, vectors.grad))
        assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
        torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)
        assert ways.graphs.failed == ""
        assert ways.graphs.captured == 1
        assert oracle.graphs.captured == 0
        compiled = compiled or graphs_compiled()
        assert graphs_compiled() == compiled


def test_several_soft_prompts_in_one_stream() -> None:
    found = []
    for lm in (tiny("llama", DEVICE), tiny("llama")):
        vectors = [soft(length, length).to(lm.device).requires_grad_() for length in (7, 3, 5)]
        shares = [
            Share(
                Objective(),
                [Request((3, SOFT, *range(20, 20 + length), 4), 2, ((7 + length, 8),)) for length in (2, 11)],
                [0, 0],
                tuple(own.shape),
            )
            for own in vectors
        ]
        ways = Gradients(lm, layout="stream")
        losses = ways.add(ways.prepare(shares), vectors)
        found.append((losses.cpu(), [own.grad.cpu() for own in vectors if own.grad is not None]))
    torch.testing.assert_close(*found, **TOLERANCE)


def test_activation_checkpointing_takes_less_memory() -> None:
    lm = tiny("llama", DEVICE)
    requests = [Request((SOFT, *(10 + i % 300 for i in range(100))), 1, ((5,),))] * 40
    used, found = [], []
    for recomputed in (False, True):
        lm.layers.set(recomputed=recomputed)
        try:
            vectors = PROMPTS[0].to(DEVICE, copy=True).requires_grad_()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            Gradients(lm, layout="two stages").backward(Objective(), requests, [0] * 40, vectors)
            used.append(torch.cuda.max_memory_allocated() - before)
            assert vectors.grad is not None
            found.append(vectors.grad)
        finally:
            lm.layers.set(recomputed=False)
    assert used[1] < used[0]
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def trained(lm: FrozenLM, config: TrainConfig, steps: int | None = None, **options: Any) -> Training:
    """A training on toy data, interrupted after ``steps`` if they are given."""
    data = toy(30, 0)
    training = Training(toy_task(lm, data, config.longest), data, toy(20, 1), config, **options)
    for step in training:
        if step.number == steps:
            break
    return training


@pytest.mark.parametrize("parametrisation", PARAMETRISATIONS)
def test_training(parametrisation: str) -> None:
    gpu, cpu = tiny("llama", DEVICE), tiny("llama")
    before = gpu.weights_digest()
    config = train_settings(parametrisation=parametrisation, average=0.5, loss="labels")
    found, expected = (trained(lm, config).result() for lm in (gpu, cpu))
    assert found.training["device"] == DEVICE
    assert found.vectors.device.type == "cpu"
    torch.testing.assert_close(found.vectors, expected.vectors, rtol=1e-3, atol=1e-4)
    assert found.metrics == expected.metrics
    assert gpu.weights_digest() == before


@pytest.mark.parametrize("options", [{}, {"starts": 2, "steps": 20}])
def test_a_resumed_training_is_the_uninterrupted_one(options: dict[str, Any], tmp_path: Path) -> None:
    lm, config = tiny("llama", DEVICE), train_settings(checkpoint_every=1, **options)
    whole = trained(lm, config, folder=tmp_path / "whole").result()
    trained(lm, config, 3, folder=tmp_path / "parts")
    resumed = trained(lm, config, folder=tmp_path / "parts", resume=True).result()
    torch.testing.assert_close(resumed.vectors, whole.vectors, rtol=1e-6, atol=1e-6)


def test_bf16_learns() -> None:
    lm = FrozenLM(make_model("llama"), make_tokenizer(), name="bf16", dtype="bf16", device=DEVICE)
    data = toy(300, 0)
    config = train_settings(num_virtual_tokens=8, batch_size=16, steps=80, eval_every=10, lr=0.3, loss="labels")
    losses = [step.loss for step in Training(toy_task(lm, data, 8), data, toy(50, 1), config)]
    assert sum(losses[-10:]) / 10 < 0.5 * losses[0]


def test_long_runs_are_compiled() -> None:
    data = toy(10, 0)
    lm = tiny("llama", DEVICE)
    for steps, compiled in ((PAYS_FROM_STEPS - 1, False), (PAYS_FROM_STEPS, can_compile(lm))):
        assert Training(toy_task(lm, data), data, data, train_settings(steps=steps)).compiled is compiled


def test_a_compiled_step_has_the_gradient_of_an_eager_one() -> None:
    lm = FrozenLM(make_model("llama"), make_tokenizer(), name="compiled", dtype="fp32", device=DEVICE)
    if not can_compile(lm):
        pytest.skip("compiling needs a C++ compiler and Triton")
    requests = [Request((SOFT, *range(10, 10 + length)), 1, ((7, 8),)) for length in (3, 9, 20)]
    found = []
    for compile_first in (False, True):
        if compile_first:
            lm.layers.set(compiled=True)
        vectors = PROMPTS[0].to(DEVICE, copy=True).requires_grad_()
        Gradients(lm).backward(Objective(), requests, [0, 0, 0], vectors)
        assert vectors.grad is not None
        found.append(vectors.grad)
    assert lm.layers.compiled
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_a_micro_batch_takes_about_its_share_of_the_memory() -> None:
    """A model of SmolLM2-135M's shape, with few words; its attention's weights come on top of what is counted."""
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=320,
        max_position_embeddings=1024,
    )
    lm = FrozenLM(LlamaForCausalLM(config), make_tokenizer(), name="wide", dtype="bf16", device=DEVICE)
    if lm.tokens_at_once in (MAX_TOKENS, MOST_TOKENS):
        pytest.skip("this GPU's memory is not what decides")
    row = Request((SOFT, *(10 + i % 300 for i in range(200))), 1, ((5,),))
    vectors = torch.zeros(20, 576, device=DEVICE, requires_grad=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    Gradients(lm).backward(Objective(), [row] * (lm.tokens_at_once // 200), [0] * (lm.tokens_at_once // 200), vectors)
    share = GPU_SHARE * torch.cuda.get_device_properties(DEVICE).total_memory
    assert 0.5 * share < torch.cuda.max_memory_allocated() - before < 1.5 * share


@pytest.mark.usefixtures("home")
def test_the_command_line(run: Run, base: str, tmp_path: Path) -> None:
    write_labels(tmp_path / "dev.jsonl", 10)
    for command in (
        ("train", "train.jsonl", "--name", "one", "--base", base, "--steps", "8", "--eval-every", "4"),
        ("evaluate", "one", "test.jsonl"),
        ("predict", "one", "a stirring film"),
        ("inspect", "one", "--data", "test.jsonl", "--rows", "6", "--text", "a film", "--out", "report"),
        ("harden", "one", "--validation", "test.jsonl", "--budget", "1s"),
    ):
        done = run(*command, *ON_GPU)
        assert done.code == 0, done.err
    measure = ("evaluate", "one", "test.jsonl", "--json", "--dtype", "fp32", "--device")
    found, expected = (run(*measure, device).json for device in (DEVICE, "cpu"))
    assert found["value"] == expected["value"]


METHODS = (
    "zero-shot",
    "few-shot",
    "soft-prompt",
    "soft-prompt-ensemble",
    "prefix",
    "lora",
    "full-fine-tuning",
    "peft-prompt-tuning",
)


def test_compare(run: Run, base: str, tmp_path: Path) -> None:
    write_labels(tmp_path / "dev.jsonl", 10)
    data = ("train.jsonl", "--validation", "dev.jsonl", "--test", "test.jsonl", "--out", "report")
    options = ("--budget", "1s", "--seeds", "2", "--bases", base, "--json")
    done = run("compare", *data, *ON_GPU, *options, "--methods", *METHODS)
    assert done.code == 0, done.err
    cells = done.json["cells"]
    assert {cell["method"] for cell in cells} == set(METHODS)
    for cell in cells:
        assert cell["status"] == "done", cell
        if cell["trainable_parameters"]:
            assert cell["peak_memory_bytes"] > 0, cell


def test_the_server(tmp_path: Path) -> None:
    answers = []
    for device in (DEVICE, "cpu"):
        with serving(tmp_path, load=partial(make_lm, device)) as server:
            assert server.lm.device.type == device
            asked = {"prompt": ["the film", "a dull plot"], "max_tokens": 12, "temperature": 0}
            both = [server.post("/v1/completions", {**asked, "model": name}) for name in ("write", "sst2")]
            answers.append([[choice["text"] for choice in one["choices"]] for one in both])
    assert answers[0] == answers[1]
