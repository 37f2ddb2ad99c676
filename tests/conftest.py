"""Tiny models with fixed weights, a tokenizer trained on a few sentences, a task that can be learned: no download."""

from __future__ import annotations

import gc
import json
import logging
import math
import multiprocessing
import os
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch._dynamo.exc import TorchDynamoException
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from softprompt.compare import measure
from softprompt.data.example import Dataset, Example
from softprompt.model.frozen import FrozenLM
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tasks.task import Task
from softprompt.text.template import Template
from softprompt.text.verbalizer import Verbalizer
from softprompt.tuning.config import TrainConfig

# A shell's background job ignores Ctrl-C, and so would all programs that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """What was imported stays: no collection of garbage need look through it again, and tests ask for many."""
    gc.collect()
    gc.freeze()


SENTENCES = [
    "a stirring , funny and finally transporting film",
    "the plot is thin and the acting is worse",
    "one of the best movies of the year",
    "a dull , badly written mess with no ideas",
    "Answer: positive negative very good bad great awful",
]
SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
SHARED = ("llama", "gpt2", "qwen2", "qwen3", "opt", "gpt_neox", "mistral", "mistral-sliding", "gemma3_text-sliding")
"""Architectures of the shared-prefix path; with a sliding window in all layers, and in some."""
ALL = (*SHARED, "stablelm")
"""Also one that takes the concatenation path."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 320 tokens, with an end token, a padding token and no BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    fast: Any = PreTrainedTokenizerFast
    made: PreTrainedTokenizerFast = fast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")
    return made


def make_model(kind: str, **sizes: Any) -> Any:
    """A tiny model of an architecture with seeded random weights, large enough that attention is far from uniform."""
    options = SIZES | sizes
    model_type = kind.removesuffix("-sliding")
    if kind == "gpt2":
        options = {"vocab_size": 320, "n_embd": 32, "n_inner": 48, "n_layer": 3, "n_head": 4, "n_positions": 128}
    if kind == "opt":
        options |= {"ffn_dim": 48, "word_embed_proj_dim": 32}
    if model_type in ("qwen3", "gemma3_text"):
        options |= {"head_dim": 8}
    if model_type == "gemma3_text":
        options |= {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
        options |= {"sliding_window": 12}
    if model_type == "mistral":
        options |= {"sliding_window": 6 if kind == "mistral-sliding" else None}
    config = AutoConfig.for_model(model_type, **options, pad_token_id=0, bos_token_id=1, eos_token_id=1)
    torch.manual_seed(7)
    models: Any = AutoModelForCausalLM
    model = models.from_config(config)
    return randomised(model)


def randomised(model: Any, spread: float = 0.15) -> Any:
    """The model with its matrices drawn anew: large enough that attention is far from uniform."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, spread)
    return model


@cache
def tiny(kind: str, device: str = "cpu") -> FrozenLM:
    """A frozen tiny model in fp32; made once, since nothing may change it."""
    return FrozenLM(make_model(kind), make_tokenizer(), name=f"tiny-{kind}", dtype="fp32", device=device)


@cache
def plain(kind: str) -> Any:
    """An oracle: the weights of ``tiny(kind)`` in a model of transformers alone, with its plainest attention."""
    model = make_model(kind).eval().requires_grad_(False)
    model.set_attn_implementation("eager")
    return model


def plain_logprobs(kind: str, ids: Sequence[int], soft: torch.Tensor | None = None) -> torch.Tensor:
    """Log-probabilities ``[T, V]`` by ``plain(kind)`` of one sequence, ``soft`` ``[P, H]`` where ``ids`` has -1."""
    model = plain(kind)
    lookup = model.get_input_embeddings()
    pieces: list[Any] = [lookup(torch.tensor([token])) if token >= 0 else soft for token in ids]
    logits = model(inputs_embeds=torch.cat(pieces)[None]).logits[0]
    return torch.nn.functional.log_softmax(logits, dim=-1)


def plain_score(kind: str, ids: Sequence[int], word: Sequence[int], soft: torch.Tensor | None = None) -> torch.Tensor:
    """log P(word | ids) by ``plain(kind)``, a scalar."""
    logprobs = plain_logprobs(kind, (*ids, *word[:-1]), soft)[-len(word) :]
    return logprobs[torch.arange(len(word)), torch.tensor(word)].sum()


FILLERS = ["the", "film", "plot", "of", "a", "and", "movie", "is", "year"]
TOY_TEMPLATE = Template("{soft_prompt}{input} {target}")
TOY_LABELS = Verbalizer.from_labels(["negative", "positive"])


def toy(count: int, seed: int) -> Dataset:
    """Rows whose label is decided by one word among fillers: half of them at random are positive."""
    draw = random.Random(seed)
    examples = []
    for row in range(1, count + 1):
        positive = draw.random() < 0.5
        words = draw.choices(FILLERS, k=draw.randint(1, 4))
        words.insert(draw.randint(0, len(words)), "great" if positive else "bad")
        target = "positive" if positive else "negative"
        examples.append(Example({"input": f"{row} " + " ".join(words)}, target, where=f"toy.jsonl:{row}"))
    return Dataset(tuple(examples), "toy.jsonl", f"toy-{count}-{seed}")


def toy_task(lm: FrozenLM, data: Dataset, length: int = 6) -> Task:
    """The task of ``toy``'s rows."""
    return Task.for_data(lm, data, TOY_TEMPLATE, verbalizer=TOY_LABELS, num_virtual_tokens=length)


def train_settings(**options: Any) -> TrainConfig:
    """A training of 10 steps, validated at 5 and 10, from embeddings as they are."""
    short = {"steps": 10, "eval_every": 5, "patience": 0}
    return TrainConfig(**{"num_virtual_tokens": 6, "batch_size": 4, "init_scale": 1.0} | short | options)


def scripted(monkeypatch: pytest.MonkeyPatch, script: Sequence[tuple[float, float]]) -> list[torch.Tensor]:
    """Replaces validation by ``(score, loss)`` in turn, a probability that every row has alike; returns the list of the
    vectors that it sees."""
    seen: list[torch.Tensor] = []

    def validator(task: Task, examples: Sequence[Example]) -> Callable[[torch.Tensor], dict[str, Any]]:
        def validate(vectors: torch.Tensor) -> dict[str, Any]:
            value, loss = script[len(seen)]
            seen.append(vectors.clone())
            metrics = [{"metric": "scripted", "value": value}]
            rows = {"loss": [-math.log(value)] * len(examples), "correct": [1] * len(examples)}
            return {"value": value, "score": value, "loss": loss, "metrics": metrics, "rows": rows}

        return validate

    monkeypatch.setattr("softprompt.tuning.training.validator", validator)
    monkeypatch.setattr("softprompt.methods.fine_tuning.validator", validator)
    return seen


@pytest.fixture(params=ALL)
def kind(request: pytest.FixtureRequest) -> str:
    """Each architecture's name in turn."""
    return str(request.param)


@pytest.fixture
def lm(kind: str) -> FrozenLM:
    """Each architecture in turn."""
    return tiny(kind)


@pytest.fixture
def llama() -> FrozenLM:
    """The architecture of the embedded base model."""
    return tiny("llama")


@pytest.fixture(scope="session", autouse=True)
def short_plain_text() -> Iterator[None]:
    """Forgetting is measured on some pages: a tokenizer takes a second or two for all of Python's manual."""
    some = measure.plain_text()[:20_000]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "plain_text", lambda: some)
        yield


@pytest.fixture(autouse=True)
def own_stderr() -> Iterator[None]:
    """``softprompt serve`` in process logs to the stderr of its test, which is closed when the next one logs."""
    yield
    for name in ("softprompt", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], True
        logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def spawn() -> Iterator[Callable[..., Any]]:
    """``spawn(function, *arguments)`` runs a test module's function in a new process, and returns the process.

    A server that has already imported what takes seconds forks it; nothing of the tests' own process is in it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.conftest", "softprompt.cli.train", "transformers.models.llama.modeling_llama"]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]))

        def start(function: Callable[..., None], *arguments: Any) -> Any:
            process = context.Process(target=function, args=arguments)
            process.start()
            return process

        yield start


# --- the command line, in process, with a tiny model on disk ---------------------------------------

GOOD = ("a stirring , funny film", "one of the best movies of the year")
BAD = ("the plot is thin", "a dull , badly written mess")


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one object on stdout; anything else there fails."""
        return json.loads(self.out)


Run = Callable[..., Ran]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bases") / "tiny"
    make_model("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The store's folder; the current folder holds data files."""
    monkeypatch.setenv("SOFTPROMPT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    write_labels(tmp_path / "train.jsonl", 40)
    write_labels(tmp_path / "test.jsonl", 12)
    return tmp_path / "home"


def write_labels(path: Path, rows: int, words: tuple[str, str] = ("positive", "negative")) -> None:
    texts = [(GOOD, BAD)[i % 2][i % 3 % 2] for i in range(rows)]
    lines = [json.dumps({"input": f"{text} {i}", "target": words[i % 2]}) for i, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_texts(path: Path, rows: int) -> None:
    lines = [json.dumps({"input": f"film {i}", "target": f"it was {i} stars"}) for i in range(rows)]
    path.write_text("\n".join(lines), encoding="utf-8")


@pytest.fixture
def run(home: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str) -> Ran:
        from softprompt.cli.main import main

        capsys.readouterr()
        code = main(arguments)
        out, err = capsys.readouterr()
        return Ran(code, out, err)

    return run


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake must be told before a model is loaded."""

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(FrozenLM, "load", load)


def is_refused(ran: Ran, sentence: str) -> None:
    assert ran == Ran(2, "", f"error: {sentence}\n")


QUICK = ("--dtype", "fp32", "--device", "cpu", "--steps", "8", "--eval-every", "4", "--checkpoint-every", "2")


@pytest.fixture
def faulty_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is stored is a sound soft prompt, but not quite the one that was trained."""
    save = SoftPrompt.save
    monkeypatch.setattr(SoftPrompt, "save", lambda self, path: save(replace(self, vectors=self.vectors * 1.01), path))


@pytest.fixture
def train(run: Run, base: str) -> Run:
    """``softprompt train`` with the tiny model and few steps."""
    return lambda *arguments: run("train", *arguments, "--base", base, *QUICK)


@pytest.fixture
def broken_compiler(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A C++ compiler without Python's headers, as ``torch.compile`` tells it: at the first call. Holds an entry for
    every function that was to be compiled."""
    asked = list[str]()

    def compiled(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        def call(*_: Any, **__: Any) -> None:
            raise TorchDynamoException(
                "CppCompileError: C++ compile error\n\nx.cpp:1: fatal error: Python.h: no file\n"
            )

        asked.append(function.__name__)
        return call

    monkeypatch.setattr(torch, "compile", compiled)
    return asked


@pytest.fixture
def stored(home: Path) -> SoftPrompt:
    """A soft prompt ``films`` of some other base model."""
    soft_prompt = SoftPrompt(
        vectors=torch.ones(2, 4),
        name="films",
        base="some-base",
        base_fingerprint="ab" * 32,
        tokenizer_fingerprint="cd" * 32,
        template="{soft_prompt}{input}\nAnswer: {target}",
        verbalizer={"negative": ("negative",), "positive": ("positive",)},
    )
    soft_prompt.save(home / "films.safetensors")
    return soft_prompt
