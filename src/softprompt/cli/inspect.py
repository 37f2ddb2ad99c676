"""``softprompt inspect``: options → data, checked before a model is loaded → views."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from softprompt.cli.options import Loading, OneTargetColumns, in_utf8
from softprompt.cli.views import WIDTH, print_table, section, table, wrapped
from softprompt.compare.plan import cut
from softprompt.data.example import Dataset
from softprompt.drawing.words import number, share, short_names, shown
from softprompt.errors import ArtifactError, ConfigError, DataError, StoreError
from softprompt.inspection import page
from softprompt.inspection.answers import answers, document
from softprompt.inspection.drift import Way, way_of
from softprompt.inspection.nearest import WAYWARD
from softprompt.inspection.page import pairs_table
from softprompt.inspection.report import Report, inspect, require_vectors
from softprompt.inspection.similarity import Similarity, similarity
from softprompt.inspection.start import starting_vectors
from softprompt.inspection.tables import DRIFT, continuation_table, drift_table, matters_table, readings_table
from softprompt.inspection.vocabulary import Vocabulary
from softprompt.inspection.words import nats
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.soft_prompts.store import Store
from softprompt.tasks.reading import require_no_chat
from softprompt.tasks.task import Task
from softprompt.terminal.console import rows_bar, stderr, stdout
from softprompt.tuning.history import FILE as HISTORY

MOST_LINES = 100
NO_WAY = (
    "the run folder of its training was not found, which keeps the vectors of each validation; where there is one, "
    "name it with --run"
)


@dataclass(frozen=True)
class Question:
    """What is to be told of a single soft prompt.

    Attributes:
        data: rows with targets.
        rows: the most of them to score.
        texts: input texts, to show what follows.
        run: the run folder of its training.
        columns: what is where in ``data``.
    """

    data: str | None
    rows: int
    texts: Sequence[str]
    run: Path | None
    columns: OneTargetColumns


def inspect_stored(
    names: Sequence[str],
    every: bool,
    question: Question,
    out: Path | None,
    base: str | None,
    loading: Loading,
    as_json: bool,
) -> None:
    """Looks at one soft prompt, or compares several.

    Raises:
        SoftPromptError: a mistake of the user's, see each step.
    """
    store = Store()
    if names and every:
        raise ConfigError("Either names or --all can be given to inspect, not both; leave one out.")
    chosen = _of_one_base(store) if every else {name: store.load(name) for name in dict.fromkeys(names)}
    for soft_prompt in chosen.values():
        require_vectors(soft_prompt)
    if len(chosen) > 1:
        if question.data is not None or question.texts or question.run is not None:
            raise ConfigError("--data, --text and --run go with a single soft prompt; name one, or leave them out.")
        _compare(chosen, base, loading, out, as_json)
        return
    ((name, soft_prompt),) = chosen.items()
    way = _way(store, name, soft_prompt, question.run)
    dataset = None if question.data is None else _read(soft_prompt, question.data, question)
    texts = tuple(map(in_utf8, question.texts))
    lm = loading.load(base or soft_prompt.base)
    with stderr.status("looking"):
        report = inspect(soft_prompt, Task.of(lm, soft_prompt), dataset, texts, rows_bar, way, NO_WAY)
    if out is not None:
        written = page.write(report, out)
        stderr.print(f"written: {', '.join(map(str, written[:2]))} and {len(written) - 2} more")
    if as_json:
        print(json.dumps(document(report), allow_nan=False))
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


def _read(soft_prompt: SoftPrompt, source: str, question: Question) -> Dataset:
    """Rows of the soft prompt's task, a seeded choice of at most ``question.rows``."""
    dataset = question.columns.read(source, soft_prompt)
    require_no_chat(dataset, "inspect --data")
    if len(dataset.examples) < 2:
        raise DataError(f"Expected at least 2 rows to score with in {source}, found 1; give more.")
    return cut(dataset, question.rows)


# --- one -----------------------------------------------------------------------------------------


def _show(report: Report) -> None:
    soft_prompt = report.soft_prompt
    stdout.print(f"{soft_prompt.name}: {report.num_virtual_tokens} virtual tokens for {soft_prompt.base}")
    wrapped(f"Note: {WAYWARD}")
    for question, answer in answers(report):
        stdout.print()
        stdout.print(question)
        wrapped(answer, "  ")
    stdout.print()
    print_table(_tokens_table(report))
    if report.drift is not None:
        section(DRIFT)
        print_table(table(*drift_table(report.drift), {}))
    if report.matters is not None:
        section("What matters: the change of loss and accuracy, the most costly first")
        columns, rows = matters_table(report, most=10)
        print_table(table(columns[:6], [row[:6] for row in rows], {1: 12}))
    if report.readings:
        section("Read as text")
        print_table(table(*readings_table(report.readings), {0: 34}))
    for found in report.continuations:
        section(f"After {shown(found.text, WIDTH - 10)}")
        print_table(table(*continuation_table(found), {0: 40, 1: 40}))


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
    return table(columns, rows, {1: 34})


# --- several, and the store ----------------------------------------------------------------------


def _of_one_base(store: Store) -> dict[str, SoftPrompt]:
    """The store's soft prompts of the base model that most of them are for; the others are named on stderr."""
    found: dict[str, SoftPrompt] = {}
    for entry in store.entries():
        if isinstance(entry.header, ArtifactError):
            stderr.print(f"warning: {entry.header}")
        elif entry.header.kind != "soft prompt":
            stderr.print(f"left out: {entry.name}, a {entry.header.kind}")
        else:
            found[entry.name] = SoftPrompt.load(entry.path)
    if not found:
        raise ConfigError(f"There is no soft prompt in {store.home} to inspect; see `softprompt train --help`.")
    most = Counter(soft_prompt.base_fingerprint for soft_prompt in found.values()).most_common(1)[0][0]
    for name, soft_prompt in found.items():
        if soft_prompt.base_fingerprint != most:
            stderr.print(f"left out: {name}, of another base model ({soft_prompt.base})")
    return {name: each for name, each in found.items() if each.base_fingerprint == most}


def _compare(
    chosen: dict[str, SoftPrompt], base: str | None, loading: Loading, out: Path | None, as_json: bool
) -> None:
    first, *rest = chosen.items()
    for name, soft_prompt in rest:
        if soft_prompt.base_fingerprint != first[1].base_fingerprint:
            raise ConfigError(
                f"Soft prompts can be compared that were tuned on one base model, but {first[0]!r} is for "
                f"{first[1].base} and {name!r} for {soft_prompt.base}; name some of the same."
            )
    lm = loading.load(base or first[1].base)
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
    print_table(table(columns, rows, {0: 16, 1: 16}))
    wrapped(
        f"In brackets what {share(1 - found.level)} of {found.draws} random pairs of the same norms and profiles stay "
        f"below; * above that, at a false discovery rate of {share(found.level)}."
    )
    for merge in found.tree:
        left, right = ("+".join(names) for names in (merge.left, merge.right))
        wrapped(f"at distance {merge.height:.2f}: {left} with {right}")


def show_store(as_json: bool) -> None:
    """A line for each soft prompt of the store, without a model."""
    store = Store()
    listed: list[dict[str, Any]] = []
    for entry in store.entries():
        if isinstance(entry.header, ArtifactError):
            stderr.print(f"warning: {entry.header}")
            continue
        soft_prompt = SoftPrompt.load(entry.path)
        lengths = None if soft_prompt.kind == "trained state" else soft_prompt.vectors.flatten(1).norm(dim=1)
        listed.append(
            {
                "name": entry.name,
                "base": soft_prompt.base,
                "num_virtual_tokens": soft_prompt.num_virtual_tokens,
                "labels": None if soft_prompt.verbalizer is None else list(soft_prompt.verbalizer),
                "init": soft_prompt.training.get("init"),
                "steps": soft_prompt.training.get("steps_done"),
                "norm": None
                if lengths is None
                else {"least": float(lengths.min()), "mean": float(lengths.mean()), "most": float(lengths.max())},
                "metrics": list(soft_prompt.metrics),
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
                f"{each['norm']['mean']:.2f}" if each["norm"] else "",
                f"{each['norm']['least']:.2f} to {each['norm']['most']:.2f}" if each["norm"] else "a trained state",
            ]
        )
    columns = ["name", "base model", ">P", "task", "validation", "init", ">mean norm", ">norms"]
    print_table(table(columns, rows, {0: 20, 1: 16, 5: 10}))
    wrapped("softprompt inspect NAME looks at one, softprompt inspect --all compares them.")
