"""Every command: its options and its help. What it does is in the module of its name, which is imported when it runs,
so that help and completion need no torch. Those that train are declared in ``train_commands``, those that bring a soft
prompt to another task or base model in ``transfer_commands``, and those that bring it to other tools and the Hub in
``exchange_commands``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from softprompt.cli.exchange_commands import export_command, import_command, pull_command, push_command
from softprompt.cli.groups import (
    Answering,
    Bounds,
    Comparing,
    Door,
    Elsewhere,
    Measured,
    Vote,
)
from softprompt.cli.options import (
    FROZEN,
    SEED_RANGE,
    SOURCE,
    Base,
    ColumnOptions,
    Device,
    Dtype,
    Encoding,
    Form,
    Format,
    InputField,
    Json,
    Labels,
    Loading,
    Name,
    Names,
    OneTargetColumns,
    Quantize,
    SharedLoading,
    TextOptions,
    Train,
    Validation,
    completed,
    data_option,
    expanded,
    flag,
    model_option,
    option,
)
from softprompt.cli.train_commands import sweep_command, train_command
from softprompt.cli.transfer_commands import recycle_command, transfer_command
from softprompt.data.packages import DEFAULT_BASE
from softprompt.tuning.config import TrainConfig

_STORED = completed((), stored=True)


# --- compare --------------------------------------------------------------------------------------


@expanded
def compare_command(
    train: Train,
    validation: Annotated[str, data_option("Rows that every method chooses by.")],
    test: Annotated[str, data_option("Rows that are reported, and looked at for nothing else.")],
    *,
    comparing: Comparing,
    template: Annotated[
        str,
        data_option(
            "default, or text with {soft_prompt}, fields and {target}; \\n: line end.", "default", choices=("default",)
        ),
    ] = "default",
    labels: Labels = None,
    columns: ColumnOptions,
    bases: Annotated[list[str] | None, model_option("Frozen models: aliases, hub ids, folders.", DEFAULT_BASE)] = None,
    loading: Loading,
    as_json: Json = False,
) -> None:
    """Measure soft prompts against prompt engineering, LoRA and fine-tuning on your own data.

    Every cell (base model, method, seed) is kept as it finishes: the same command goes on where it was stopped.
    Labels are scored by accuracy, short free answers by token F1, longer ones by BLEU.

    \b
    softprompt compare train.jsonl --validation dev.jsonl --test test.jsonl --out report
    softprompt compare train.jsonl --validation dev.jsonl --test test.jsonl --out report \\
        --methods zero-shot soft-prompt full-fine-tuning --seeds 3 --budget 15m
    """
    from softprompt.cli.compare import compare
    from softprompt.cli.task import Sources

    compare(Sources(train, validation, labels, columns), test, template, comparing, bases, loading, as_json)


# --- inspect and harden ---------------------------------------------------------------------------


@expanded
def inspect_command(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[N…]",
            help="Names or paths: one to look at, several to compare.",
            show_default=False,
            autocompletion=_STORED,
        ),
    ] = None,
    every: Annotated[bool, flag("--all", "Compare all soft prompts of the store.")] = False,
    data: Annotated[str | None, data_option("Rows with targets, for all that needs the model.")] = None,
    rows: Annotated[int, data_option("The most rows to score, a seeded choice.", 200, min=2)] = 200,
    text: Annotated[list[str] | None, option("Show what follows these input texts; -- ends them.")] = None,
    run: Annotated[
        Path | None, data_option("The run folder of its training, for the way it took.", "the store's")
    ] = None,
    out: Annotated[Path | None, option("Write report.html, card.md, report.json and figures to this folder.")] = None,
    *,
    columns: OneTargetColumns,
    base: Base = None,
    loading: Loading,
    as_json: Json = False,
) -> None:
    """See what a soft prompt says and does, each figure beside its null; or how alike several are.

    With --data the model is asked, too: which virtual tokens matter, what is lost when it is read as text. Give rows
    that the soft prompt was not trained on.

    \b
    softprompt inspect sst2
    softprompt inspect sst2 --data dev.jsonl --text "a stirring film" --out report
    softprompt inspect sst2 trec cr
    softprompt inspect --all
    """
    from softprompt.cli.inspect import Question, inspect_stored, show_store

    if names or every:
        question = Question(data, rows, tuple(text or ()), run, columns)
        inspect_stored(names or (), every, question, out, base, loading, as_json)
    else:
        show_store(as_json)


@expanded
def harden_command(
    name: Name,
    validation: Annotated[str, data_option("Rows with targets: half to search with, the rest to report on.")],
    budget: Annotated[str, option("Time to search: 90s, 10m, 1h.", "2m")] = "2m",
    seed: Annotated[int, option("Seeds the split of the rows and the search.", 0, min=0)] = 0,
    *,
    columns: OneTargetColumns,
    base: Base = None,
    loading: Loading,
    as_json: Json = False,
) -> None:
    """Search a readable hard prompt that does what a soft prompt does, and say how much is lost.

    It starts from the nearest readable tokens and swaps them one by one, by the gradient and by trying.

    \b
    softprompt harden sst2 --validation dev.jsonl
    softprompt harden sst2 --validation dev.jsonl --budget 10m --json
    """
    from softprompt.cli.harden import search

    search(name, validation, budget, seed, columns, base, loading, as_json)


# --- serve ----------------------------------------------------------------------------------------


@expanded
def serve_command(
    prompts: Annotated[
        list[str] | None,
        option(
            "Names in the store or paths; all: the store's of this base model.",
            "all",
            autocompletion=completed(("all",), stored=True),
        ),
    ] = None,
    watch: Annotated[bool, flag("--watch", "Follow the files that are served, and with all the whole store.")] = False,
    ensemble: Annotated[list[str] | None, option("NAME=A,B,C: a model NAME that A, B and C answer together.")] = None,
    vote: Vote = None,
    *,
    door: Door,
    bounds: Bounds,
    base: Annotated[
        str | None, model_option("The frozen model.", f"that of the first of --prompts, else {DEFAULT_BASE}")
    ] = None,
    elsewhere: Elsewhere,
    loading: Loading,
) -> None:
    """Serve the base model and soft prompts on it over OpenAI's API; a request's model names the soft prompt.

    Requests of different soft prompts share each forward pass. SIGTERM: what has begun is finished.

    \b
    softprompt serve
    softprompt serve --prompts sst2 news --port 8080 --watch
    softprompt serve --ensemble films=sst2-0,sst2-1,sst2-2
    softprompt serve --backend vllm --upstream http://gpu1:8000 http://gpu2:8000
    curl localhost:8000/v1/classify -H 'Content-Type: application/json' \\
        -d '{"model": "sst2", "input": "a stirring film"}'
    """
    from softprompt.cli.serve import Together, serve

    serve(prompts, Together(ensemble or (), vote), watch, door, bounds.limits(), base, elsewhere, loading)


# --- evaluate and predict -------------------------------------------------------------------------


@expanded
def evaluate_command(
    name: Names,
    test: Annotated[str, typer.Argument(metavar="TEST", help=SOURCE)],
    *,
    answering: Answering,
    measured: Measured,
    generated: TextOptions,
    columns: ColumnOptions,
    base: Base = None,
    loading: SharedLoading,
    as_json: Json = False,
) -> None:
    """Measure a soft prompt on rows with targets, or several that answer together.

    Labels: accuracy, macro_f1, mcc, log_loss, calibration_error.
    Free text: bleu, rouge_l, exact_match, token_f1, perplexity.

    \b
    softprompt evaluate sst2 test.jsonl
    softprompt evaluate sst2 test.jsonl --base-only --json
    softprompt evaluate sst2-0,sst2-1,sst2-2 test.jsonl --plot reliability.png
    softprompt evaluate qa test.csv --metric token_f1 --stop "\\n"
    softprompt evaluate sst2 test.jsonl --on nf4 int8
    """
    from softprompt.cli.evaluate import measure

    measure(
        name,
        test,
        columns,
        answering,
        measured,
        sampling=generated.given(),
        base=base,
        loading=loading,
        as_json=as_json,
    )


@expanded
def predict_command(
    name: Names,
    text: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TEXT…|-]", help="Input texts; - reads one a line from stdin.", show_default=False),
    ] = None,
    file: Annotated[str | None, data_option(f"Rows to answer: {SOURCE}")] = None,
    *,
    answering: Answering,
    generated: TextOptions,
    input_field: InputField = None,
    encoding: Encoding = None,
    format: Format = None,
    base: Base = None,
    loading: SharedLoading,
    as_json: Json = False,
) -> None:
    """Answer input texts: a label with probabilities, or generated text.

    A template with several fields takes each TEXT as a JSON object of its fields.

    \b
    softprompt predict sst2 "a stirring film" "a dull mess"
    softprompt predict sst2-0,sst2-1,sst2-2 "a stirring film"
    softprompt predict nli '{"premise": "It rains.", "hypothesis": "It is dry."}'
    softprompt predict sst2 --file reviews.csv --input-field review --json
    """
    from softprompt.cli.predict import Inputs, answer

    answer(
        name,
        Inputs(text or [], file, input_field, encoding, format),
        answering,
        sampling=generated.given(),
        base=base,
        loading=loading,
        as_json=as_json,
    )


# --- judging a base model, and the harness --------------------------------------------------------


@expanded
def judge_command(
    train: Train,
    test: Annotated[str, typer.Argument(metavar="TEST", help=SOURCE)],
    validation: Validation = None,
    template: Form = "default",
    num_virtual_tokens: Annotated[int, option("How many vectors to learn.", 10)] = 10,
    steps: Annotated[int, option("Optimizer steps.", 80)] = 80,
    seed: Annotated[int, option("Seeds start, order and held-out rows.", 0, **SEED_RANGE)] = 0,
    *,
    labels: Labels = None,
    columns: ColumnOptions,
    base: Annotated[str, FROZEN] = DEFAULT_BASE,
    loading: Loading,
    as_json: Json = False,
) -> None:
    """Judge a base model by a task: its score as it is, and with a short soft prompt that is tuned for it.

    Ten virtual tokens and 80 steps, to see through a task's form what the base model can do. Nothing is stored.

    \b
    softprompt judge train.jsonl test.jsonl
    softprompt judge train.jsonl test.jsonl --base ./my-model --json
    """
    from softprompt.cli.judge import judge
    from softprompt.cli.task import Sources

    config = TrainConfig(num_virtual_tokens=num_virtual_tokens, steps=steps, seed=seed)
    judge(Sources(train, validation, labels, columns), test, template, config, base, loading, as_json)


@expanded
def lm_eval_command(
    name: Name,
    tasks: Annotated[list[str] | None, option("Names of the harness's tasks, or YAML files.")] = None,
    data: Annotated[str | None, data_option(f"Rows of the soft prompt's own task, instead: {SOURCE}")] = None,
    num_fewshot: Annotated[int | None, option("Worked examples before each row.", "as the task says", min=0)] = None,
    limit: Annotated[float | None, option("The first rows of each task, or below 1 a share of them.", "all")] = None,
    base_only: Annotated[bool, flag("--base-only", "Leave the soft prompt out.")] = False,
    template: Annotated[bool, flag("--template", "Wrap each context in the soft prompt's template.")] = False,
    chat_template: Annotated[bool, flag("--chat-template", "Use the base model's chat template.")] = False,
    include_path: Annotated[Path | None, option("A folder with more tasks.")] = None,
    *,
    columns: OneTargetColumns,
    base: Base = None,
    loading: Loading,
    as_json: Json = False,
) -> None:
    """Run tasks of lm-evaluation-harness with a soft prompt, or with its base model alone.

    The soft prompt stands before the prompts that the tasks build. Needs pip install "softprompt\\[eval]".

    \b
    softprompt lm-eval sst2 --tasks hellaswag arc_easy --limit 100
    softprompt lm-eval sst2 --tasks hellaswag arc_easy --limit 100 --base-only
    softprompt lm-eval sst2 --data test.jsonl
    """
    from softprompt.cli.lm_eval import Asked, run

    asked = Asked(tasks or (), data, columns, include_path, num_fewshot, limit, base_only, template, chat_template)
    run(name, asked, base, loading, as_json)


# --- the store, and the demo ----------------------------------------------------------------------


def list_command(as_json: Json = False) -> None:
    """List the stored soft prompts.

    The store is the folder $SOFTPROMPT_HOME, by default in the user's data directory.

    \b
    softprompt list
    """
    from softprompt.cli.store import show_list

    show_list(as_json)


def show_command(name: Name, as_json: Json = False) -> None:
    """Show all that a soft prompt's file says, except its numbers.

    \b
    softprompt show sst2
    softprompt show ./sst2.safetensors --json
    """
    from softprompt.cli.store import show_one

    show_one(name, as_json)


def rm_command(
    names: Annotated[list[str], typer.Argument(metavar="N…", help="Names in the store.", autocompletion=_STORED)],
) -> None:
    """Delete soft prompts from the store, and what their trainings left behind.

    \b
    softprompt rm sst2 qa
    """
    from softprompt.cli.store import remove

    remove(names)


def demo_command(
    seed: Annotated[int, option("Seeds split and training.", 0, **SEED_RANGE)] = 0,
    steps: Annotated[int, option("Optimizer steps.", 300)] = 300,
    out: Annotated[Path | None, option("Copy data, soft prompt and results.json into this folder, too.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantize: Quantize = None,
    as_json: Json = False,
) -> None:
    """The whole way on real data: tune, measure, keep and swap, in minutes on two cores.

    Data (critics' sentences on films, each "fresh" or "rotten") and base model come from the package index.

    \b
    softprompt demo
    softprompt demo --steps 50 --json
    """
    from softprompt.cli.demo import demo

    demo(seed, steps, out, Loading(dtype, device, quantize=quantize), as_json)


COMMANDS: dict[str, Any] = {
    "train": train_command,
    "sweep": sweep_command,
    "transfer": transfer_command,
    "recycle": recycle_command,
    "compare": compare_command,
    "inspect": inspect_command,
    "harden": harden_command,
    "serve": serve_command,
    "evaluate": evaluate_command,
    "predict": predict_command,
    "judge": judge_command,
    "lm-eval": lm_eval_command,
    "export": export_command,
    "import": import_command,
    "push": push_command,
    "pull": pull_command,
    "list": list_command,
    "show": show_command,
    "rm": rm_command,
    "demo": demo_command,
}
"""Every command by name, in the order of the help."""
