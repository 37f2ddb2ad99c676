"""What an inspection found, as tables."""

from __future__ import annotations

from collections.abc import Sequence

from softprompt.drawing.words import share, shown
from softprompt.inspection import ablation
from softprompt.inspection.ablation import AsText
from softprompt.inspection.behaviour import Continuation
from softprompt.inspection.drift import Drift
from softprompt.inspection.report import Report
from softprompt.inspection.words import chance, lost, nats, points, value

DRIFT = (
    "Over the validations of the training: the RMS of the difference from the start, in RMS of the embedding table, on "
    "average over virtual tokens and the largest; their mean norm; their mean cosine with the start, and what steps of "
    "the same lengths in random directions would leave; and how many have the nearest token that they had at the "
    "start, and that they have in the soft prompt that was kept."
)


def _small(q: float) -> str:
    """The same in a table."""
    return f"{q:.3f}" if q >= 0.001 else "< 0.001"


def nearest_table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Each virtual token's neighbours beside the null's."""
    columns = ["", "nearest by cosine", ">cosine", ">random", "by distance", "by dot product", "stands out"]
    columns += [">excess σ", ">q"]
    rows = []
    for i, reading in enumerate(report.near.readings):
        out = reading.stands_out
        rows.append(
            [
                str(i),
                " ".join(shown(near.text, 16) for near in reading.cosine),
                f"{reading.cosine[0].value:.2f}",
                f"{reading.random['cosine']:.2f}",
                f"{shown(reading.euclidean[0].text, 16)} {reading.euclidean[0].value:.2f} "
                f"(random {reading.random['euclidean']:.2f})",
                f"{shown(reading.dot[0].text, 16)} {reading.dot[0].value:.1f} (random {reading.random['dot']:.1f})",
                shown(out.text, 16) if reading.significant else "–",
                f"{out.value:.1f}",
                _small(reading.q),
            ]
        )
    return columns, rows


def words_table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Where each label word is found."""
    columns = [
        "word",
        ">virtual token",
        ">cosine",
        ">neighbour no.",
        ">excess σ",
        ">q",
        "above the null",
        "started there",
    ]
    rows = [
        [
            shown(word.text),
            str(word.virtual_token),
            f"{word.cosine:.2f}",
            f"{word.rank:,}",
            f"{word.excess:.1f}",
            _small(word.q),
            _yes(word.significant),
            "not known" if word.at_start is None else _yes(word.at_start),
        ]
        for word in report.words
    ]
    return columns, rows


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"


def moved_table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Norm and drift of each virtual token."""
    columns = ["", "start", ">norm at start", ">norm", ">distance", ">cosine with start", ">by a random step"]
    columns += [">neighbour no.", "kept", "moved towards"]
    rows = []
    for i, moved in enumerate(report.norms.moved):
        assert report.added is not None  # both need the start
        towards = report.added.readings[i]
        rows.append(
            [
                str(i),
                "no token" if moved.start is None else shown(moved.start.text, 16),
                f"{moved.start_norm:.2f}",
                f"{report.norms.norms[i]:.2f}",
                f"{moved.distance:.2f}",
                f"{moved.cosine:.2f}",
                f"{moved.random_cosine:.2f}",
                f"{moved.rank:,}",
                _yes(moved.kept),
                f"{shown(towards.stands_out.text, 16)} {chance(towards.q)}" if towards.significant else "–",
            ]
        )
    return columns, rows


def drift_table(found: Drift) -> tuple[list[str], list[list[str]]]:
    """The way from the start, a row for each validation."""
    columns = [">step", ">drift", ">largest", ">norm", ">cosine", ">random", ">token as at start", ">as kept", ""]
    rows = [
        [
            f"{point.step:,}",
            f"{point.mean_drift:.2f}",
            f"{point.largest_drift:.2f}",
            f"{point.norm:.2f}",
            f"{point.cosine:.2f}",
            f"{point.random_cosine:.2f}",
            str(point.as_at_start),
            str(point.as_kept),
            "kept" if point.kept else "start" if i == 0 else "",
        ]
        for i, point in enumerate(found.points)
    ]
    return columns, rows


def matters_table(report: Report, most: int | None = None) -> tuple[list[str], list[list[str]]]:
    """What each virtual token is worth, the most costly first."""
    assert report.matters is not None
    columns = ["", "near", ">loss: left out", ">q", f">top {ablation.TOP}", ">accuracy: left out"]
    columns += [">loss: the mean in its place"]
    rows = []
    for i in report.matters.order[:most]:
        token = report.matters.tokens[i]
        score = token.left_out.score_change
        rows.append(
            [
                str(i),
                shown(report.names[i], 16),
                nats(token.left_out.loss_change),
                _small(token.q),
                f"{share(token.top_share)}",
                "–" if score is None else points(score),
                nats(token.replaced.loss_change),
            ]
        )
    return columns, rows


def readings_table(readings: Sequence[AsText]) -> tuple[list[str], list[list[str]]]:
    """What the soft prompt reads as is worth."""
    columns = ["", ">score [95 %]", ">change [95 %]"]
    rows = [[each.name, value(each.change), lost(each.change) if i else ""] for i, each in enumerate(readings)]
    if readings[0].change.score is not None:  # else the loss is the score
        columns.append(">loss, nats")
        rows = [[*row, f"{each.change.loss.value:.3f}"] for row, each in zip(rows, readings, strict=True)]
    return columns, rows


def continuation_table(found: Continuation) -> tuple[list[str], list[list[str]]]:
    """The next tokens after a text, and the labels' probabilities."""
    rows = [
        [f"{shown(a, 20)} {p:.3f}", f"{shown(b, 20)} {q:.3f}"]
        for (a, p), (b, q) in zip(found.with_it, found.without, strict=True)
    ]
    if found.labels_with is not None and found.labels_without is not None:
        for label, probability in found.labels_with.items():
            rows.append([f"label {label}: {probability:.3f}", f"label {label}: {found.labels_without[label]:.3f}"])
        rows.append([f"any label word: {found.on_labels_with:.3f}", f"any label word: {found.on_labels_without:.3f}"])
    return ["next token with the soft prompt", "without"], rows
