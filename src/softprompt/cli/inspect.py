"""``softprompt inspect`` and ``softprompt harden``: options → data, checked before a model is loaded → views."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.cells import cell_len
from rich.table import Table

from softprompt.cli.compare import seconds
from softprompt.cli.options import (
    Base,
    Device,
    Dtype,
    Encoding,
    InputField,
    Json,
    Name,
    TargetField,
    Trust,
    data_option,
    flag,
    in_utf8,
    load_base_model,
    option,
)
from softprompt.compare.plan import cut
from softprompt.compare.summary import short_names
from softprompt.data.example import Dataset, check_targets
from softprompt.data.reading import read_dataset
from softprompt.drawing.words import duration, number, share, shortened, shown, simple_table
from softprompt.errors import ConfigError, DataError, StoreError
from softprompt.inspection import page
from softprompt.inspection.drift import Way, way_of
from softprompt.inspection.harden import Hardened, harden
from softprompt.inspection.nearest import WAYWARD
from softprompt.inspection.page import pairs_table
from softprompt.inspection.report import Report, answers, inspect, require_vectors
from softprompt.inspection.similarity import Similarity, similarity
from softprompt.inspection.start import starting_vectors
from softprompt.inspection.tables import DRIFT, continuation_table, drift_table, matters_table, readings_table
from softprompt.inspection.vocabulary import Vocabulary
from softprompt.inspection.words import nats
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.soft_prompts.store import Store
from softprompt.tasks.task import Task
from softprompt.terminal.console import rows_bar, stderr, stdout
from softprompt.text.template import Template
from softprompt.tuning.history import FILE as HISTORY

WIDTH = 100
"""Columns that the terminal view fits into."""
MOST_LINES = 100
NO_WAY = (
    "the run folder of its training was not found, which keeps the vectors of each validation; where there is one, "
    "name it with --run"
)

Rows = Annotated[int, data_option("The most rows to score, a seeded choice.", 200, min=2)]


def inspect_command(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[N…]", help="Names or paths: one to look at, several to compare.", show_default=False),
    ] = None,
    every: Annotated[bool, flag("--all", "Compare all soft prompts of the store.")] = False,
    data: Annotated[str | None, data_option("Rows with targets, for all that needs the model.")] = None,
    rows: Rows = 200,
    text: Annotated[list[str] | None, option("Show what follows these input texts; -- ends them.")] = None,
    run: Annotated[
        Path | None, data_option("The run folder of its training, for the way it took.", "the store's")
    ] = None,
    out: Annotated[Path | None, option("Write report.html, card.md, report.json and figures to this folder.")] = None,
    input_field: InputField = None,
    target_field: TargetField = "target",
    encoding: Encoding = None,
    base: Base = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: Trust = False,
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
    store, model = Store(), (dtype, device, trust_remote_code)
    if not names and not every:
        _show_store(store, as_json)
        return
    if names and every:
        raise ConfigError("Either names or --all can be given to inspect, not both; leave one out.")
    chosen = _of_one_base(store) if every else {name: store.load(name) for name in dict.fromkeys(names or ())}
    for soft_prompt in chosen.values():
        require_vectors(soft_prompt)
    if len(chosen) > 1:
        if data is not None or text or run is not None:
            raise ConfigError("--data, --text and --run go with a single soft prompt; name one, or leave them out.")
        _compare(chosen, base, model, out, as_json)
        return
    ((name, soft_prompt),) = chosen.items()
    way = _way(store, name, soft_prompt, run)
    dataset = None if data is None else _read(soft_prompt, data, rows, input_field, target_field, encoding)
    texts = tuple(map(in_utf8, text or ()))
    lm = load_base_model(base or soft_prompt.base, *model)
    with stderr.status("looking"):
        report = inspect(soft_prompt, Task.of(lm, soft_prompt), dataset, texts, rows_bar, way, NO_WAY)
    if out is not None:
        written = page.write(report, out)
        stderr.print(f"written: {', '.join(map(str, written[:2]))} and {len(written) - 2} more")
    if as_json:
        print(json.dumps(report.as_dict(), allow_nan=False))
    else:
        _show(report)


def _way(store: Store, name: str, soft_prompt: SoftPrompt, run: Path | None) -> Way | None:
    """The soft prompt's way over its training, from the folder given, or the one where the training kept it."""
    if run is not None:
        return way_of(soft_prompt, run)
    path = store.find(name)
    stored_as = store.name_of(path)
    folder = Path(f"{path}.run") if stored_as is None else store.run_folder(stored_as)
    if not (folder / HISTORY).is_file():
        return None
    try:
        return way_of(soft_prompt, folder)
    except StoreError as error:
        stderr.print(f"warning: {error}")
        return None


def _read(
    soft_prompt: SoftPrompt, source: str, rows: int, input_field: str | None, target_field: str, encoding: str | None
) -> Dataset:
    """Rows of the soft prompt's task, a seeded choice of at most ``rows``."""
    fields = Template(soft_prompt.template).fields
    dataset = read_dataset(source, fields=fields, input_field=input_field, target_field=target_field, encoding=encoding)
    if soft_prompt.verbalizer is not None:
        check_targets(dataset, list(soft_prompt.verbalizer))
    if len(dataset.examples) < 2:
        raise DataError(f"Expected at least 2 rows to score with in {source}, found 1; give more.")
    return cut(dataset, rows)


# --- one -----------------------------------------------------------------------------------------


def _show(report: Report) -> None:
    soft_prompt = report.soft_prompt
    stdout.print(f"{soft_prompt.name}: {report.num_virtual_tokens} virtual tokens for {soft_prompt.base}")
    _wrapped(f"Note: {WAYWARD}")
    for question, answer in answers(report):
        stdout.print()
        stdout.print(question)
        _wrapped(answer, "  ")
    stdout.print()
    _print(_tokens_table(report))
    if report.drift is not None:
        _section(DRIFT)
        _print(_table(*drift_table(report.drift), {}))
    if report.matters is not None:
        _section("What matters: the change of loss and accuracy, the most costly first")
        columns, rows = matters_table(report, most=10)
        _print(_table(columns[:6], [row[:6] for row in rows], {1: 12}))
    if report.readings:
        _section("Read as text")
        _print(_table(*readings_table(report.readings), {0: 34}))
    for found in report.continuations:
        _section(f"After {shown(found.text, WIDTH - 10)}")
        _print(_table(*continuation_table(found), {0: 40, 1: 40}))


def _tokens_table(report: Report) -> Table:
    columns = ["", "nearest tokens by cosine", ">cosine", ">random", "stands out", ">excess σ", "start kept"]
    if report.matters is not None:
        columns.append(">left out")
    rows = []
    for i, reading in enumerate(report.near.readings[:MOST_LINES]):
        kept = report.norms.moved[i].kept if report.norms.moved else None
        row = [
            str(i),
            " ".join(shown(near.text, 12) for near in reading.cosine[:3]),
            f"{reading.cosine[0].value:.2f}",
            f"{reading.random['cosine']:.2f}",
            shown(reading.stands_out.text, 14) if reading.significant else "–",
            f"{reading.stands_out.value:.1f}",
            "?" if kept is None else "yes" if kept else "no",
        ]
        if report.matters is not None:
            row.append(nats(report.matters.tokens[i].left_out.loss_change).split(" [")[0])
        rows.append(row)
    return _table(columns, rows, {1: 34})


def _section(title: str) -> None:
    stdout.print()
    _wrapped(title)


def _wrapped(text: str, indent: str = "") -> None:
    stdout.print(textwrap.fill(text, WIDTH, initial_indent=indent, subsequent_indent=indent))


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], widths: dict[int, int]) -> Table:
    """A table whose columns in ``widths`` are cut to that many letters, so that no line is too long."""
    table = simple_table(*columns)
    for row in rows:
        table.add_row(*(shortened(cell, widths.get(i, WIDTH)) for i, cell in enumerate(row)))
    return table


def _print(table: Table) -> None:
    for column in table.columns:  # no narrower in a pipe: cut numbers would be of no use
        column.min_width = max(cell_len(str(text)) for text in (column.header, *column.cells))
    stdout.print(table)


# --- several, and the store ----------------------------------------------------------------------


def _of_one_base(store: Store) -> dict[str, SoftPrompt]:
    """The store's soft prompts of the base model that most of them are for; the others are named on stderr."""
    found: dict[str, SoftPrompt] = {}
    for entry in store.entries():
        if not isinstance(entry.soft_prompt, SoftPrompt):
            stderr.print(f"warning: {entry.soft_prompt}")
        elif entry.soft_prompt.vectors.dim() != 2:
            stderr.print(f"left out: {entry.name}, a trained KV prefix")
        else:
            found[entry.name] = entry.soft_prompt
    if not found:
        raise ConfigError(f"There is no soft prompt in {store.home} to inspect; see `softprompt train --help`.")
    most = Counter(soft_prompt.base_fingerprint for soft_prompt in found.values()).most_common(1)[0][0]
    for name, soft_prompt in found.items():
        if soft_prompt.base_fingerprint != most:
            stderr.print(f"left out: {name}, of another base model ({soft_prompt.base})")
    return {name: each for name, each in found.items() if each.base_fingerprint == most}


def _compare(
    chosen: dict[str, SoftPrompt], base: str | None, model: tuple[str, str, bool], out: Path | None, as_json: bool
) -> None:
    first, *rest = chosen.items()
    for name, soft_prompt in rest:
        if soft_prompt.base_fingerprint != first[1].base_fingerprint:
            raise ConfigError(
                f"Soft prompts can be compared that were tuned on one base model, but {first[0]!r} is for "
                f"{first[1].base} and {name!r} for {soft_prompt.base}; name some of the same."
            )
    lm = load_base_model(base or first[1].base, *model)
    with stderr.status("comparing"):
        vocabulary = Vocabulary.of(lm)
        starts = {name: starting_vectors(Task.of(lm, each), each)[0] for name, each in chosen.items()}
        found = similarity({name: each.vectors for name, each in chosen.items()}, vocabulary)
        moved = {name: chosen[name].vectors - start for name, start in starts.items() if start is not None}
        added = similarity(moved, vocabulary) if len(moved) > 1 else None
    if out is not None:
        written = page.write_similarity(found, added, out)
        stderr.print(f"written: {written[0]} and {len(written) - 1} more")
    if as_json:
        print(json.dumps({"similarity": found.as_dict(), "added": None if added is None else added.as_dict()}))
        return
    _show_similarity("How alike the soft prompts are", found)
    if added is not None:
        stdout.print()
        _show_similarity("How alike is what training added to their starts", added)
    unknown = [name for name, start in starts.items() if start is None]
    if unknown:
        stderr.print(f"the start is not known of {', '.join(unknown)}")


def _show_similarity(title: str, found: Similarity) -> None:
    stdout.print(title)
    columns, rows = pairs_table(found)
    _print(_table(columns, rows, {0: 16, 1: 16}))
    _wrapped(
        f"In brackets what {share(1 - found.level)} of {found.draws} random pairs of the same norms and profiles stay "
        f"below; * above that, at a false discovery rate of {share(found.level)}."
    )
    for merge in found.tree:
        left, right = ("+".join(names) for names in (merge.left, merge.right))
        _wrapped(f"at distance {merge.height:.2f}: {left} with {right}")


def _show_store(store: Store, as_json: bool) -> None:
    """A line for each soft prompt of the store, without a model."""
    listed: list[dict[str, Any]] = []
    for entry in store.entries():
        if not isinstance(entry.soft_prompt, SoftPrompt):
            stderr.print(f"warning: {entry.soft_prompt}")
            continue
        vectors, training = entry.soft_prompt.vectors, entry.soft_prompt.training
        lengths = vectors.flatten(1).norm(dim=1)
        listed.append(
            {
                "name": entry.name,
                "base": entry.soft_prompt.base,
                "num_virtual_tokens": len(vectors),
                "labels": None if entry.soft_prompt.verbalizer is None else list(entry.soft_prompt.verbalizer),
                "init": training.get("init"),
                "steps": training.get("steps_done"),
                "norm": {"least": float(lengths.min()), "mean": float(lengths.mean()), "most": float(lengths.max())},
                "metrics": list(entry.soft_prompt.metrics),
            }
        )
    if as_json:
        print(json.dumps({"home": str(store.home), "soft_prompts": listed}, allow_nan=False))
        return
    if not listed:
        stderr.print(f"the store {store.home} holds nothing to inspect; see `softprompt train --help`")
        return
    rows = []
    names = short_names(each["base"] for each in listed)
    for each in listed:
        metric = next(iter(each["metrics"]), None)
        rows.append(
            [
                each["name"],
                names[each["base"]],
                str(each["num_virtual_tokens"]),
                "free text" if each["labels"] is None else f"{len(each['labels'])} labels",
                "" if metric is None else f"{metric['metric']} {number(metric['metric'], metric['value'])}",
                str(each["init"] or ""),
                f"{each['norm']['mean']:.2f}",
                f"{each['norm']['least']:.2f} to {each['norm']['most']:.2f}",
            ]
        )
    columns = ["name", "base model", ">P", "task", "validation", "init", ">mean norm", ">norms"]
    _print(_table(columns, rows, {0: 20, 1: 16, 5: 10}))
    _wrapped("softprompt inspect NAME looks at one, softprompt inspect --all compares them.")


# --- harden --------------------------------------------------------------------------------------


def harden_command(
    name: Name,
    validation: Annotated[str, data_option("Rows with targets: half to search with, the rest to report on.")],
    budget: Annotated[str, option("Time to search: 90s, 10m, 1h.", "2m")] = "2m",
    seed: Annotated[int, option("Seeds the split of the rows and the search.", 0, min=0)] = 0,
    input_field: InputField = None,
    target_field: TargetField = "target",
    encoding: Encoding = None,
    base: Base = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Search a readable hard prompt that does what a soft prompt does, and say how much is lost.

    It starts from the nearest readable tokens and swaps them one by one, by the gradient and by trying.

    \b
    softprompt harden sst2 --validation dev.jsonl
    softprompt harden sst2 --validation dev.jsonl --budget 10m --json
    """
    limit = seconds(budget)
    soft_prompt = Store().load(name)
    require_vectors(soft_prompt)
    fields = Template(soft_prompt.template).fields
    dataset = read_dataset(
        validation, fields=fields, input_field=input_field, target_field=target_field, encoding=encoding
    )
    if soft_prompt.verbalizer is not None:
        check_targets(dataset, list(soft_prompt.verbalizer))
    lm = load_base_model(base or soft_prompt.base, dtype, device, trust_remote_code)
    task = Task.of(lm, soft_prompt)
    with rows_bar("searching") as progress:
        found = harden(
            task,
            soft_prompt.vectors,
            Vocabulary.of(lm),
            dataset,
            budget=limit,
            seed=seed,
            progress=lambda gone, _: progress(int(gone), int(limit)),
        )
    if as_json:
        print(json.dumps({"name": soft_prompt.name, "base": lm.name, **found.as_dict()}, allow_nan=False))
        return
    _show_hardened(found)


def _show_hardened(found: Hardened) -> None:
    _print(_table(*readings_table(found.readings), {0: 34}))
    _wrapped(
        f"On {found.report_rows} rows that the search did not see; it used {found.search_rows} others, "
        f"{found.steps} steps and {duration(found.seconds)}, and changed the text {found.swaps} times (ended: "
        f"{found.stopped}). Loss there: {found.search_loss[0]:.3f} before, {found.search_loss[1]:.3f} after."
    )
    _section("The hard prompt, as a Python string")
    stdout.print(repr(found.text))
