"""The parts of ``benchmarks/gpu.sh``: each writes its figures as soon as it has them.

    python -m benchmarks.gpu steps --model 135M --seconds 150 --work FOLDER --out build/gpu

Appends one JSON object a line to ``gpu.jsonl`` in the folder ``--out`` and makes ``gpu.md`` there anew from all lines.
``setup`` says what the machine is and writes rows and a tokenizer into ``--work``; ``tests`` runs the CUDA tests;
``steps`` measures training steps of one model; ``answers`` scores and generates.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

from benchmarks.train_step import (
    Side,
    all_batches,
    alternate,
    gradient_difference,
    load_base,
    matrix_peak,
    of_one_bucket,
    our_step,
    sharing_weights,
    step_of,
    useful_operations,
    useful_tokens,
)
from softprompt.data.packages import SMOLLM2_GGUF
from softprompt.data.reading import read_dataset
from softprompt.errors import SoftPromptError
from softprompt.generation.decoder import generate as generate_texts
from softprompt.model.fast.graphs import Graphs
from softprompt.model.frozen import FrozenLM
from softprompt.model.loading import DTYPES
from softprompt.model.request import Sampling
from softprompt.tasks.task import Task
from softprompt.text.template import DEFAULT_TEMPLATE, Template
from softprompt.tuning.gradients import Gradients
from softprompt.tuning.start import initial_vectors

LLAMA: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5}


def shape(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, words: int, **more: Any) -> dict[str, Any]:
    """A Llama model's config.json."""
    return {
        **LLAMA,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": words,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        **more,
    }


MODELS = {
    "tiny": shape(64, 128, 2, 4, 2, 4096),
    "135M": shape(576, 1536, 30, 9, 3, 49152, rope_theta=100000.0),  # SmolLM2-135M
    "1.7B": shape(2048, 8192, 24, 32, 32, 49152, rope_theta=130000.0),  # SmolLM2-1.7B
    "8B": shape(4096, 14336, 32, 32, 8, 128256, rope_theta=500000.0, tie_word_embeddings=False),  # Llama 3.1 8B
}

OURS, EAGER, FP8 = "softprompt", "softprompt-eager", "softprompt-fp8"
"""Ours as it trains long runs, with compiled layers, as it trains short ones, and with linear layers in fp8."""

SMALL_PAIRS = (
    (EAGER, 100, "peft"),
    (OURS, 100, "peft"),
    (OURS, 100, "peft-compiled"),
    (OURS, 20, "peft"),
    (OURS, 20, "peft-compiled"),
    (OURS, 100, "peft-layers"),
)
PAIRS = {
    "tiny": ((EAGER, 100, "peft"), (FP8, 100, OURS), (OURS, 100, "peft-compiled"), (OURS, 20, "peft-layers")),
    "135M": SMALL_PAIRS,
    "1.7B": (*SMALL_PAIRS[:2], (FP8, 100, OURS), *SMALL_PAIRS[2:]),
    "8B": (
        (EAGER, 100, "peft"),
        (OURS, 100, "peft"),
        (FP8, 100, OURS),
        (OURS, 100, "peft-layers"),
        (OURS, 20, "peft"),
        (OURS, 20, "peft-layers"),
        (OURS, 100, "peft-compiled"),
    ),
}
"""Ours, number of virtual tokens and peer, in the order in which they are measured: the first gives figures before
anything is compiled. The whole of 8B takes long to compile, and its kernels are so long that launching them costs
little: its layers come first."""

NEEDS = {"peft": 15, OURS: 20, "peft-compiled": 60, "peft-layers": 25}
"""Seconds that a pair with this peer takes at least; where fewer are left, it is left out."""

MOST_SECONDS = 15
"""Of the timed steps of one pair."""


# --- what is written ---------------------------------------------------------------------------------


def emit(options: argparse.Namespace, **line: Any) -> None:
    """Appends a line to ``gpu.jsonl``, prints it, and makes ``gpu.md`` anew."""
    file = options.out / "gpu.jsonl"
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)
    lines = [json.loads(text) for text in file.read_text(encoding="utf-8").splitlines() if text]
    (options.out / "gpu.md").write_text("\n".join(tables(lines)) + "\n", encoding="utf-8")


STEP_COLUMNS = (
    "model",
    "P",
    "side",
    "s/step, median (shortest)",
    "steps",
    "ratio",
    "tokens/s",
    "of the matrix peak",
    "GB above the model",
    "graphs compiled (late)",
    "first step, s",
)


def tables(lines: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown of all lines."""
    for line in lines:
        if line["part"] == "setup":
            yield "* " + ", ".join(f"{key} {value}" for key, value in line.items() if key != "part")
    for line in lines:
        if line["part"] in ("tests", "skipped", "ended", "failed"):
            if "why" in line:
                yield f"* {line['part']}: {line['what']}: {line['why']}"
            else:
                yield "* tests: " + ", ".join(f"{key} {value}" for key, value in line.items() if key != "part")
    yield from ("", table_row(STEP_COLUMNS), table_row("---" for _ in STEP_COLUMNS))
    for line in lines:
        if line["part"] == "step":
            memory = line["memory_above_model_bytes"]
            yield table_row(
                (
                    line["model"],
                    line["num_virtual_tokens"],
                    line["side"] + (f" (beside {line['beside']})" if "ratio" in line else ""),
                    f"{line['seconds']:.4f} ({line['seconds_shortest']:.4f})",
                    line["steps"],
                    f"{line['ratio']:.1f}×" if "ratio" in line else "",
                    f"{line['tokens_per_second']:,.0f}",
                    f"{line['share_of_matrix_peak']:.1%}",
                    "–" if memory is None else f"{memory / 1e9:.2f}",
                    f"{line['compiled_graphs']} ({line['compiled_graphs_in_timed_steps']})",
                    f"{line['first_step_seconds']:.1f}",
                )
            )
    columns = ("model", "what", "rows at once", "a second", "seconds a call")
    yield from ("", table_row(columns), table_row("---" for _ in columns))
    for line in lines:
        if line["part"] == "answers":
            cells = (line["model"], line["what"], line["rows"], f"{line['per_second']:,.1f}", f"{line['seconds']:.4f}")
            yield table_row(cells)


def table_row(cells: Any) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


# --- setup: the machine, rows and a tokenizer ----------------------------------------------------------


def setup(options: argparse.Namespace) -> None:
    """Writes rows and a tokenizer into the folder, and says what is measured on what."""
    options.work.mkdir(parents=True, exist_ok=True)
    rows = options.work / "rows.jsonl"
    if options.data:
        read_dataset(options.data, fields=("input",))
        rows.write_bytes(Path(options.data).read_bytes())
    else:
        texts = generated_texts(4096)
        lines = [json.dumps({"input": t, "target": ("positive", "negative")[i % 2]}) for i, t in enumerate(texts)]
        rows.write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = smollm2_tokenizer()
    (tokenizer or trained_tokenizer(generated_texts(2048))).save_pretrained(options.work / "tokenizer")
    libraries = ("transformers", "peft", "triton")
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    emit(
        options,
        part="setup",
        device="cpu" if gpu is None else gpu.name,
        memory_bytes=None if gpu is None else gpu.total_memory,
        commit=commit(),
        python=sys.version.split()[0],
        torch=torch.__version__,
        **{name: version_of(name) for name in libraries},
        threads=torch.get_num_threads(),
        rows=Path(options.data).name if options.data else "generated",
        tokenizer="trained on generated text" if tokenizer is None else "SmolLM2",
    )


def generated_texts(count: int) -> list[str]:
    """Texts of made-up words with about the lengths of SST-2's sentences: median 19 words, 95 of 100 at most 35."""
    draw = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "er", "is")]
    words = ["".join(draw.choices(syllables, k=1 + min(3, int(draw.expovariate(0.8))))) for _ in range(4000)]
    weights = [1 / (rank + 3) for rank in range(len(words))]
    lengths = [min(52, max(2, round(draw.lognormvariate(math.log(19), 0.4)))) for _ in range(count)]
    return [" ".join(draw.choices(words, weights, k=length)) for length in lengths]


def smollm2_tokenizer() -> Any:
    """SmolLM2's own, if the package that carries it is installed; nothing is fetched."""
    if version_of(SMOLLM2_GGUF.distribution) is None or version_of("gguf") is None:
        return None
    from transformers import AutoTokenizer

    path = SMOLLM2_GGUF.path()
    return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)


def trained_tokenizer(texts: list[str]) -> Any:
    """A byte-level BPE tokenizer with 1.2 tokens a word on such texts, as SmolLM2's has on SST-2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1250,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f"Text: {text}\nLabel: positive negative" for text in texts], trainer)
    fast: Any = PreTrainedTokenizerFast
    return fast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")


def version_of(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of this folder, if git can tell."""
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


# --- tests ---------------------------------------------------------------------------------------------


def tests(options: argparse.Namespace) -> None:
    """Runs the CUDA tests, if there is CUDA, and counts what the log says even if the time was not enough."""
    if not torch.cuda.is_available():
        emit(options, part="skipped", what="CUDA tests", why="there is no CUDA device")
        return
    command = [sys.executable, "-m", "pytest", "tests/test_cuda.py", "-v", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-n", "4"] if version_of("pytest-xdist") else []
    log = options.out / "tests.log"
    began = time.perf_counter()
    with log.open("w", encoding="utf-8") as stream:
        try:
            code: int | str = subprocess.run(
                command, stdout=stream, stderr=subprocess.STDOUT, timeout=options.seconds
            ).returncode
        except subprocess.TimeoutExpired:
            code = f"ended after {options.seconds} s"
    text = log.read_text(encoding="utf-8", errors="replace").split("short test summary")[0]
    counts = Counter(re.findall(r"\b(PASSED|FAILED|SKIPPED|ERROR)\b", text))
    seconds = time.perf_counter() - began
    emit(options, part="tests", exit_code=code, seconds=round(seconds, 1), **{k.lower(): n for k, n in counts.items()})


# --- training steps ------------------------------------------------------------------------------------


def load_model(options: argparse.Namespace, model: str) -> tuple[FrozenLM, Any]:
    """The model with random weights on the device, as ``load_base`` gives it."""
    from transformers import AutoTokenizer

    folder = options.work / model
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(MODELS[model]), encoding="utf-8")
    AutoTokenizer.from_pretrained(options.work / "tokenizer").save_pretrained(folder)
    return load_base(argparse.Namespace(**{**vars(options), "base": str(folder), "random_weights": True}))


def steps(options: argparse.Namespace) -> None:
    """Measures all pairs of one model that fit into the time."""
    end = time.perf_counter() + options.seconds
    peak = matrix_peak(DTYPES[options.dtype], options.device)
    began = time.perf_counter()
    lm, plain = load_model(options, options.model)
    emit(
        options,
        part="model",
        model=options.model,
        parameters=lm.num_parameters,
        load_seconds=round(time.perf_counter() - began, 1),
        matrix_peak_tflops=round(peak / 1e12, 2),
    )
    for ours, num_virtual_tokens, peer in PAIRS[options.model]:
        what = f"{options.model}, P={num_virtual_tokens}, {ours} and {peer}"
        left = end - time.perf_counter()
        if left < NEEDS[peer] and options.device == "cuda":
            why = f"{left:.0f} s are left, and it takes at least {NEEDS[peer]}"
            emit(options, part="skipped", what=what, why=why)
            continue
        try:
            pair(options, lm, plain, ours, num_virtual_tokens, peer, peak)
        except Exception as error:  # one side that does not work must not cost the figures of the others
            emit(options, part="failed", what=what, why=f"{type(error).__name__}: {str(error)[:400]}")
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()


def pair(
    options: argparse.Namespace, lm: FrozenLM, plain: Any, ours: str, num_virtual_tokens: int, peer: str, peak: float
) -> None:
    """Ours and one peer in turns; two lines of figures, and one for each side's first step."""
    settings = {"num_virtual_tokens": num_virtual_tokens, "max_tokens": None}
    data = read_dataset(options.work / "rows.jsonl", fields=("input",))
    batches = of_one_bucket(all_batches(lm, data, num_virtual_tokens, options.batch_size))
    batches = batches[: options.warmup + options.steps]
    sides, graphs = [], dict[str, Graphs]()
    for name in (ours, peer):
        choices = argparse.Namespace(**vars(options), **settings, compile="on" if name == OURS else "off")
        if name in (OURS, EAGER, FP8):
            own = lm if name != FP8 else in_fp8(lm, plain)
            ways = Gradients(own)
            graphs[name] = ways.graphs
            side = Side(name, our_step(own, ways, choices), options.device)
        else:
            side = Side(name, step_of(name, lm, plain, choices), options.device)
        side.run(batches[0], timed=False)
        assert side.first_seconds is not None
        line = {"model": options.model, "num_virtual_tokens": num_virtual_tokens, "side": name}
        emit(options, part="first step", **line, seconds=round(side.first_seconds, 3), compiled_graphs=side.compiled)
        sides.append(side)
    alternate(sides, batches, options.warmup, most_seconds=MOST_SECONDS)
    count = len(sides[0].seconds)
    timed = batches[options.warmup :][:count]
    tokens = statistics.mean(useful_tokens(batch, num_virtual_tokens) for batch in timed)
    operations = statistics.mean(useful_operations(lm, batch, num_virtual_tokens) for batch in timed)
    medians = [statistics.median(side.seconds) for side in sides]
    together = {"ratio": medians[1] / medians[0], "gradient_relative_difference": gradient_difference(*sides)}
    for side, other, median in zip(sides, (peer, ours), medians, strict=True):
        emit(
            options,
            part="step",
            model=options.model,
            num_virtual_tokens=num_virtual_tokens,
            side=side.name,
            beside=other,
            seconds=median,
            seconds_shortest=min(side.seconds),
            seconds_longest=max(side.seconds),
            steps=count,
            tokens=tokens,
            tokens_per_second=tokens / median,
            share_of_matrix_peak=operations / median / peak,
            memory_above_model_bytes=side.peak_bytes if options.device == "cuda" else None,
            compiled_graphs=side.compiled,
            compiled_graphs_in_timed_steps=side.compiled_late,
            cuda_graphs_captured=graphs[side.name].captured if side.name in graphs else None,
            cuda_graphs_skipped=None if side.name in graphs else counters["inductor"]["cudagraph_skips"],
            first_step_seconds=side.first_seconds,
            loss=side.first[0] if side.first else None,
            batch_size=options.batch_size,
            dtype=options.dtype,
            **(together if side.name == ours else {}),
        )


def in_fp8(lm: FrozenLM, plain: Any) -> FrozenLM:
    """The same model with its linear layers in fp8."""
    dtype = next(name for name, dtype in DTYPES.items() if dtype == lm.dtype)
    model = sharing_weights(plain)
    return FrozenLM(model, lm.tokenizer, name=lm.name, dtype=dtype, device=str(lm.device), quantize="fp8")


# --- evaluation and decoding ---------------------------------------------------------------------------


def answers(options: argparse.Namespace) -> None:
    """Rows scored and tokens generated a second, one row at a time and ``batch_size`` together, each model in turn."""
    end = time.perf_counter() + options.seconds
    for model in options.models:
        left = end - time.perf_counter()
        if left < 8:
            emit(options, part="skipped", what=f"answers of {model}", why=f"{left:.0f} s are left")
            continue
        try:
            answers_of(options, model)
        except Exception as error:  # likewise
            emit(options, part="failed", what=f"answers of {model}", why=f"{type(error).__name__}: {str(error)[:400]}")
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()


def generated_by_transformers(lm: FrozenLM, plain: Any, rows: list[torch.Tensor], new: int) -> int:
    """Continues embedded rows ``[T, H]`` by transformers' own ``generate``, greedily, padded on the left as its guide
    says; returns how many tokens were written, those behind an end token left out."""
    width = max(map(len, rows))
    padded = torch.stack([torch.nn.functional.pad(row, (0, 0, width - len(row), 0)) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=lm.device)
    end = lm.tokenizer.eos_token_id
    with torch.no_grad():
        found = plain.generate(
            inputs_embeds=padded.to(lm.dtype),
            attention_mask=mask,
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end,
        )
    return int((found != end).sum())


def answers_of(options: argparse.Namespace, model: str) -> None:
    lm, plain = load_model(options, model)
    plain.set_attn_implementation("sdpa")
    data = read_dataset(options.work / "rows.jsonl", fields=("input",))
    task = Task.for_data(lm, data, Template(DEFAULT_TEMPLATE), num_virtual_tokens=100)
    vectors = [initial_vectors(lm, 100, init="vocab", seed=0).to(lm.device)]
    kept = lm.kept_prefixes(None)
    new = 8 if model == "tiny" else 32
    scored = [task.label_request(example) for example in data.examples]
    opened = [task.open_request(example, new) for example in data.examples]

    def score(start: int, rows: int) -> int:
        lm.score(scored[start : start + rows], vectors, prefix_of=kept)
        return rows

    def generate(start: int, rows: int) -> int:
        sampling = Sampling(max_new_tokens=new)
        texts = generate_texts(lm, opened[start : start + rows], vectors, sampling, batch_size=rows, prefix_of=kept)
        return sum(len(text.ids) for text in texts)

    def by_transformers(start: int, rows: int) -> int:
        embedded = [lm.embed(request.ids, vectors[0]) for request in opened[start : start + rows]]
        return generated_by_transformers(lm, plain, embedded, new)

    kinds: tuple[tuple[str, Callable[[int, int], int]], ...] = (
        ("rows scored", score),
        ("tokens generated", generate),
        ("tokens generated by transformers", by_transformers),
    )
    for what, work in kinds:
        for rows in (1, options.batch_size):
            times: list[float] = []
            done = 0
            work(0, rows)
            while len(times) < 3 or (sum(times) < 1.5 and len(times) < 40):
                began = time.perf_counter()
                done += work((len(times) + 1) * rows, rows)  # the answer is on the processor, so nothing is in flight
                times.append(time.perf_counter() - began)
            seconds = statistics.median(times)
            emit(
                options,
                part="answers",
                model=model,
                what=what,
                rows=rows,
                per_second=done / sum(times),
                seconds=seconds,
                calls=len(times),
                new_tokens=None if work is score else new,
                cuda_graphs_captured=lm.fixed_rows.graphs.captured if work is generate else None,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("setup", "tests", "steps", "answers", "note"))
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    parser.add_argument("--work", type=Path, required=True, help="folder for what is needed in between")
    parser.add_argument("--data", help="rows; by default they are made up")
    parser.add_argument("--seconds", type=float, default=120, help="that this part may take")
    parser.add_argument("--model", choices=MODELS, default="135M")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["135M", "1.7B", "8B"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--what", help="for note: which part did not come to its end")
    parser.add_argument("--why", help="for note: for which reason")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    parts = {"setup": setup, "tests": tests, "steps": steps, "answers": answers}
    if options.part == "note":
        emit(options, part="ended", what=options.what, why=options.why)
        return
    try:
        parts[options.part](options)
    except SoftPromptError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
