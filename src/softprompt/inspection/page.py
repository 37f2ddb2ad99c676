"""The report of an inspection as files: a self-contained HTML page, its figures as PNGs, a part for a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprompt.drawing import style
from softprompt.drawing.page import Page
from softprompt.drawing.words import markdown, markdown_table, share, shown
from softprompt.files import StrPath, atomic_writer, local_path
from softprompt.inspection import figures
from softprompt.inspection.answers import answers, document
from softprompt.inspection.behaviour import Continuation
from softprompt.inspection.drift import Drift
from softprompt.inspection.nearest import WAYWARD
from softprompt.inspection.report import Report
from softprompt.inspection.similarity import MEASURES, Similarity
from softprompt.inspection.tables import (
    DRIFT,
    continuation_table,
    drift_table,
    matters_table,
    moved_table,
    nearest_table,
    readings_table,
    words_table,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NULL = (
    "Random vectors are drawn with the norm and the profile of the virtual tokens: the same component along the mean "
    "of the embedding table, the same energy along each of its strongest principal axes, the rest in a random "
    "direction. Excess is by how many standard deviations of that null a similarity exceeds its mean. Called "
    "significant is what keeps the false discovery rate (Benjamini and Hochberg 1995) at the stated level."
)
MEASURES_EXPLAINED: Mapping[str, str] = {
    "average_cosine": "cosine of the means",
    "token_cosine": "mean cosine of all pairs",
    "alignment": "mean cosine with the nearest",
}


def write(report: Report, folder: StrPath) -> list[Path]:
    """Writes ``report.html``, ``card.md``, ``report.json`` and the figures as PNGs.

    Returns:
        The files, the page first.

    Raises:
        ConfigError: matplotlib is not installed.
        OSError: the folder cannot be written.
    """
    pictures: dict[str, Figure] = {}
    page = _page(report, pictures)
    return _save(folder, page, pictures, {"card.md": card(report), "report.json": _json(document(report))})


def _save(folder: StrPath, page: Page, pictures: Mapping[str, Figure], texts: Mapping[str, str]) -> list[Path]:
    folder = local_path(folder)
    paths = [folder / "report.html"]
    page.save(paths[0])
    contents = {name: text.encode() for name, text in texts.items()}
    contents |= {f"{name}.png": style.png(picture) for name, picture in pictures.items()}
    for name, content in contents.items():
        with atomic_writer(folder / name) as file:
            file.write(content)
        paths.append(folder / name)
    return paths


def _json(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


# --- the page ------------------------------------------------------------------------------------


def _page(report: Report, pictures: dict[str, Figure]) -> Page:
    """The page; its figures are added to ``pictures`` under their names."""
    soft_prompt = report.soft_prompt
    rows = "" if report.matters is None else f", and {report.matters.n} rows of {report.source}"
    page = Page(
        f"Soft prompt {soft_prompt.name}",
        f"{report.num_virtual_tokens} virtual tokens for {soft_prompt.base}, looked at with its embedding table{rows}. "
        f"Virtual tokens are counted from 0. Square brackets hold 95 % intervals.",
    )

    def picture(name: str, drawn: Figure, caption: str, alt: str) -> None:
        pictures[name] = drawn
        page.figure(drawn, caption, alt)

    page.heading("In short")
    page.paragraph(WAYWARD)
    page.table(["question", "answer"], [[question, answer] for question, answer in answers(report)])
    _near(page, report, picture)
    _start(page, report, picture)
    _importance(page, report, picture)
    _text(page, report, picture)
    _behaviour(page, report, picture)
    _map(page, report, picture)
    _method(page, report)
    return page


def _near(page: Page, report: Report, picture: Any) -> None:
    near = report.near
    page.heading("What lies near")
    page.paragraph(
        f"Each virtual token's nearest tokens among {report.vocabulary_size:,}, by cosine, distance and dot product, "
        f"beside what random vectors of the same norm and profile reach (the median of their nearest). {WAYWARD}"
    )
    picture(
        "near",
        figures.near(near, report.added),
        "How far the token that stands out most in each virtual token stands above chance. In the grey zone lie "
        f"{share(1 - near.level)} of random vectors. Filled marks are significant after correction for all virtual "
        "tokens. Diamonds, where there are any: the same for the difference between the virtual token and its start.",
        "A row for each virtual token, with the excess of its nearest token and that token's text.",
    )
    tight = [reading.tightness for reading in near.readings]
    above = sum(value > near.random_tightness for value in tight)
    page.paragraph(
        f"Do its neighbours belong together? The mean cosine among a virtual token's {len(near.readings[0].cosine)} "
        f"nearest tokens is {sum(tight) / len(tight):.2f}; it is above what {share(1 - near.level)} of random vectors "
        f"reach ({near.random_tightness:.2f}, {near.tightness_draws} draws) for {above} of {len(tight)}."
    )
    page.table(*nearest_table(report))
    if report.words:
        page.heading("Label words")
        page.paragraph(
            "Each word of the verbalizer, as the template places it, in the virtual token where it stands out most. "
            "The null is a word named beforehand in as many random vectors."
        )
        page.table(*words_table(report), strong=[i for i, word in enumerate(report.words) if word.significant])


def _start(page: Page, report: Report, picture: Any) -> None:
    found = report.norms
    page.heading("Norms, and the way from the start")
    tokens = [each.start.text for each in found.moved if each.start is not None]
    reads = f"; it reads {shown(''.join(tokens), 300)}" if 0 < len(tokens) == len(found.moved) else ""
    page.paragraph(f"The start: {found.start}{reads}.")
    picture(
        "norms",
        figures.norms(found),
        f"Length of each virtual token among the lengths of embeddings. "
        f"{sum(share > 0.95 for share in found.shares)} of {len(found.shares)} are longer than 95 % of the embeddings.",
        "Norm of each virtual token, of its start, and the distance between them.",
    )
    if found.moved:
        page.paragraph(
            "Kept: the start can be told from the vector by its excess. The column beside the cosine says what a step "
            "of the same length in a random direction would leave; what was kept by no more than that, training did "
            "not hold on to. The last column reads the difference between the virtual token and its start in the same "
            "way as the virtual tokens above."
        )
        page.table(*moved_table(report))
    if report.drift is not None:
        picture(
            "drift",
            figures.drift(report.drift),
            "The way from the start. Left: how far each virtual token was, thin, and their mean. Middle: their mean "
            "cosine with the start, beside what steps of the same lengths in random directions would leave. Right: how "
            "many had the nearest token that they started with, and the one that they have in the soft prompt that was "
            "kept. The dotted line is where that one was taken.",
            "Drift, cosine with the start and nearest tokens over the steps of the training.",
        )
        page.paragraph(f"{DRIFT}{_left_out(report.drift)}")
        page.table(*drift_table(report.drift), strong=[i for i, p in enumerate(report.drift.points) if p.kept])


def _left_out(drift: Drift) -> str:
    return f" {drift.left_out} validations between them are not shown." if drift.left_out else ""


def _importance(page: Page, report: Report, picture: Any) -> None:
    matters = report.matters
    if matters is None:
        return
    page.heading("What matters")
    page.paragraph(
        "Each virtual token in turn was left out, which moves those behind it up by one place, and replaced by the "
        "mean of all, which moves nothing. The same rows were scored each time, so changes are paired by row. "
        "Where leaving out costs far more than replacing, it is the place that matters and not what stands there: the "
        "first place of a sequence draws attention whatever stands in it (Xiao et al. 2024, attention sinks). "
        f"Both ways agree with a rank correlation of {matters.agreement:.2f}."
    )
    picture(
        "matters",
        figures.matters(matters, report.names),
        "To the right of the line the loss is higher without the virtual token: it is needed. The five at the top are "
        "those whose absence costs most. The intervals are for one virtual token each.",
        "Change of the loss for each virtual token, left out and replaced, with intervals.",
    )
    page.table(*matters_table(report), strong=range(len(matters.top)))
    if report.cuts:
        full = matters.full.score or matters.full.loss
        picture(
            "cuts",
            figures.cuts(report.cuts, report.num_virtual_tokens, full),
            "With fewer virtual tokens. The best k were chosen for each half of the rows on the other half, so that "
            "choosing does not flatter them.",
            "Score against the number of virtual tokens kept, the first ones and the best ones.",
        )


def _text(page: Page, report: Report, picture: Any) -> None:
    if not report.readings:
        return
    page.heading("Read as text")
    page.paragraph(
        "What is lost when tokens take the virtual tokens' place. If the soft prompt said what its neighbours say, "
        "nothing would be. Random tokens show what any text of that length does."
    )
    picture(
        "readings",
        figures.readings(report.readings),
        "The dotted line is the soft prompt itself.",
        "Score of the soft prompt, of its nearest tokens, of its start, of none, and of random tokens.",
    )
    page.table(*readings_table(report.readings), strong=[0])
    for reading in report.readings:
        if reading.name in ("nearest tokens by cosine", "nearest tokens by distance"):
            page.paragraph(f"{reading.name[0].upper()}{reading.name[1:]}:")
            page.code(reading.text)


def _behaviour(page: Page, report: Report, picture: Any) -> None:
    labels, attention = report.labels, report.attention
    if labels is None and attention is None and not report.continuations:
        return
    page.heading("What it does")
    if labels is not None:
        page.paragraph(
            f"With the soft prompt {labels.changed} of {labels.n} answers are others than without; {labels.mended} are "
            f"mended, {labels.broken} broken. The two distributions over the labels differ by "
            f"{share(labels.distance)} on average (total variation)."
        )
        picture(
            "labels",
            figures.labels(labels),
            "Mean probability of each label, given that it is one of the labels, and the share of rows that have it.",
            "Bars for each label, with and without the soft prompt.",
        )
    for continuation in report.continuations:
        _continuation(page, continuation)
    if attention is not None:
        paid, before = (sum(map(sum, layers)) / max(len(layers), 1) for layers in (attention.by_layer, attention.start))
        page.paragraph(
            f"The place of the answer pays the soft prompt {share(paid)} of its attention on average over layers, "
            f"heads and {attention.texts} texts"
            + (f", its start {share(before)}" if attention.start else "")
            + f"; if all tokens were paid the same, it would be {share(attention.even * len(attention.by_layer[0]))}. "
            "Attention says where the model "
            "looks, not what it makes of it, and the first tokens of a sequence are paid much whatever they are."
        )
        picture(
            "attention",
            figures.attention(attention),
            "Attention from the place of the answer to each virtual token, averaged over heads and texts.",
            "Heat maps of layers and virtual tokens.",
        )


def _continuation(page: Page, found: Continuation) -> None:
    page.paragraph(f"After {shown(found.text, 200)}: divergence {found.divergence:.2f} nats (Kullback-Leibler).")
    page.table(*continuation_table(found))


def _map(page: Page, report: Report, picture: Any) -> None:
    page.heading("Map")
    named = {i: report.names[i] for i, reading in enumerate(report.near.readings) if reading.significant}
    picture(
        "map",
        figures.plane(report.map, named),
        f"All vectors at length 1, in the plane of the two strongest principal axes of virtual tokens and vocabulary "
        f"together; they are fitted to the virtual tokens, which spreads those more than the random vectors. It shows "
        f"{share(report.map.shown)} of the virtual tokens' spread and "
        f"{share(report.map.shown_vocabulary)} of the vocabulary's: what is near here need not be near.",
        "Virtual tokens among the vocabulary, their start, and random vectors like them.",
    )


def _method(page: Page, report: Report) -> None:
    near = report.near
    page.heading("How this was found")
    page.paragraph(
        f"{NULL} {near.draws:,} draws, seed {near.seed}, level {share(near.level)}; the tightness of neighbours by "
        f"{near.tightness_draws} of them. The random vectors' own excess is below {near.random_excess:.2f} for "
        f"{share(1 - near.level)}, their nearest token's cosine below {near.random_cosine:.2f}."
    )
    if report.matters is not None:
        page.paragraph(
            "Intervals of accuracies are Wilson's; those of changes are bootstrap intervals over rows. They speak of "
            "other rows of the same kind, not of other trainings."
        )


# --- the model card ------------------------------------------------------------------------------


def card(report: Report) -> str:
    """A section for a model card, in Markdown."""
    soft_prompt = report.soft_prompt
    lines = [
        f"## What is known of the soft prompt {markdown(soft_prompt.name)}",
        "",
        f"{report.num_virtual_tokens} virtual tokens for {markdown(soft_prompt.base)}, counted from 0. "
        "Square brackets hold 95 % intervals.",
        "",
        f"> {WAYWARD}",
        "",
    ]
    for question, answer in answers(report):
        lines += [f"**{question}** {markdown(answer)}", ""]
    if report.drift is not None:
        lines += [f"{DRIFT}{_left_out(report.drift)}", "", *markdown_table(*drift_table(report.drift))]
    if report.readings:
        lines += markdown_table(*readings_table(report.readings))
    if report.matters is not None:
        lines += markdown_table(*matters_table(report, most=len(report.matters.top)))
    return "\n".join([*lines, f"{NULL} {report.near.draws:,} draws, seed {report.near.seed}.", ""])


# --- several soft prompts ------------------------------------------------------------------------


def write_similarity(found: Similarity, added: Similarity | None, folder: StrPath) -> list[Path]:
    """Writes ``report.html``, ``report.json`` and the figures of a comparison.

    Args:
        found: of the soft prompts.
        added: of what training added to their starts; None if a start is not known.
        folder: where to.

    Returns:
        The files, the page first.

    Raises:
        ConfigError: matplotlib or SciPy is not installed.
        OSError: the folder cannot be written.
    """
    pictures: dict[str, Figure] = {}
    page = Page(
        f"{len(found.names)} soft prompts, how alike they are",
        "Cosines between soft prompts of one base model (Vu et al. 2022, SPoT). Soft prompts that started from the "
        "same text are alike for that alone, so what training added to the start is compared as well.",
    )
    sets = [("The soft prompts", "similarity", found)]
    if added is not None:
        sets.append(("What training added", "added", added))
    for title, name, each in sets:
        page.heading(title)
        for measure in ("average_cosine", "alignment"):
            drawn = figures.heat(each, measure, MEASURES_EXPLAINED[measure])
            pictures[f"{name}-{measure.replace('_', '-')}"] = drawn
            page.figure(
                drawn,
                "Those that are alike stand side by side; the tree joins them by the mean distance.",
                f"Heat map and tree: {MEASURES_EXPLAINED[measure]}.",
            )
        page.table(*pairs_table(each))
    page.paragraph(
        f"In round brackets: what {share(1 - found.level)} of random pairs stay below, each virtual token drawn anew "
        f"with its norm and profile ({found.draws} draws, seed {found.seed}). A star: above that at a false discovery "
        f"rate of {share(found.level)} over all pairs of the measure. {NULL}"
    )
    similar = {"similarity": found.as_dict(), "added": None if added is None else added.as_dict()}
    return _save(folder, page, pictures, {"report.json": _json(similar)})


def pairs_table(found: Similarity) -> tuple[list[str], list[list[str]]]:
    """Every pair, the most alike first; a star where it is above the null."""
    columns = ["", "", *(f">{MEASURES_EXPLAINED[measure]}" for measure in MEASURES)]
    rows = []
    for pair in sorted(found.pairs, key=lambda pair: -pair.values["average_cosine"]):
        cells = [
            f"{pair.values[m]:.2f} ({pair.random[m]:.2f}){' *' if pair.q[m] <= found.level else ''}" for m in MEASURES
        ]
        rows.append([pair.first, pair.second, *cells])
    return columns, rows
