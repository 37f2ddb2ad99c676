"""What an inspection says, as questions and answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from softprompt.drawing.words import share, shown
from softprompt.inspection import ablation
from softprompt.inspection.nearest import WAYWARD
from softprompt.inspection.report import Report
from softprompt.inspection.statistics import plain
from softprompt.inspection.words import chance, lost, nats, percent, points, value


def document(report: Report) -> dict[str, Any]:
    """All of a report with its answers, as JSON values."""
    return {
        "name": report.soft_prompt.name,
        "base": report.soft_prompt.base,
        "num_virtual_tokens": report.num_virtual_tokens,
        "warning": WAYWARD,
        "answers": [{"question": question, "answer": answer} for question, answer in answers(report)],
        "nearest": report.near.as_dict(),
        "added": None if report.added is None else report.added.as_dict(),
        "words": plain(report.words),
        "norms": report.norms.as_dict(),
        "map": report.map.as_dict(),
        "drift": None if report.drift is None else report.drift.as_dict(),
        "source": report.source,
        "matters": None if report.matters is None else report.matters.as_dict(),
        "cuts": plain(report.cuts),
        "readings": plain(report.readings),
        "labels": plain(report.labels),
        "attention": plain(report.attention),
        "continuations": plain(report.continuations),
    }


def _and(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)


def answers(report: Report) -> list[tuple[str, str]]:
    """What the inspection says, as questions and answers with numbers, intervals and nulls."""
    found = [
        ("Does it lie near words?", _near_words(report)),
        ("Do the label words persist?", _label_words_persist(report)),
        ("What is left of the start, and what did training add?", _since_start(report)),
        ("How did it get there?", _way(report)),
        ("Which virtual tokens matter most?", _most_important(report)),
        ("How many of them are needed?", _needed(report)),
        ("What is lost when it is read as text?", _lost_as_text(report)),
        ("What does it change?", _changes(report)),
    ]
    return [(question, answer) for question, answer in found if answer]


def _near_words(report: Report) -> str:
    near = report.near
    answer = (
        f"{near.significant} of {report.num_virtual_tokens} virtual tokens lie nearer to a token of the vocabulary "
        f"than random vectors of the same norm and profile do (false discovery rate {share(near.level)}, "
        f"{near.draws:,} draws)."
    )
    if near.groups:
        groups = "; ".join(
            f"{', '.join(map(str, group))} around {shown(report.names[group[0]])}" for group in near.groups
        )
        answer += f" Those that share most of their neighbours: {groups}."
    return answer


def _label_words_persist(report: Report) -> str:
    if not report.words:
        return ""
    there = [word for word in report.words if word.significant]
    answer = f"{len(there)} of {len(report.words)} label words stand out in a virtual token above the null"
    if there:
        best = sorted(there, key=lambda word: -word.excess)[:6]
        parts = [
            f"{shown(word.text)} in virtual token {word.virtual_token} (neighbour no. {word.rank:,} of "
            f"{report.vocabulary_size:,}, excess {word.excess:.1f} σ, {chance(word.q)})"
            for word in best
        ]
        answer += f": {_and(parts)}" + (", to name the strongest." if len(there) > len(best) else ".")
    else:
        answer += "."
    begun = [word for word in there if word.at_start]
    if any(word.at_start is not None for word in there):
        answer += (
            f" Of these, {len(begun)} stand where training started from the same word: it was kept, not found."
            if begun
            else " None stands where training started from it."
        )
    return answer


def _since_start(report: Report) -> str:
    moved, added = report.norms.moved, report.added
    if added is None:
        return f"Not known: {report.norms.start}."
    kept = sum(each.kept for each in moved)
    first = sum(each.rank == 1 for each in moved)
    mean = sum(each.cosine for each in moved) / len(moved)
    random = sum(each.random_cosine for each in moved) / len(moved)
    answer = (
        f"The start can still be told from {kept} of {len(moved)} virtual tokens, and is the nearest token of {first}. "
        f"Their mean cosine with it is {mean:.2f}; steps of the same lengths in random directions would leave "
        f"{random:.2f}."
    )
    towards = [reading.stands_out.text for reading in added.readings if reading.significant]
    answer += f" What training added lies near a token in {len(towards)} of {len(moved)}"
    return answer + (f": {', '.join(map(shown, dict.fromkeys(towards)))}." if towards else ".")


def _way(report: Report) -> str:
    if report.drift is None:
        return f"Not known: {report.about_drift}." if report.about_drift else ""
    points, kept, count = report.drift.points, report.drift.kept, report.num_virtual_tokens
    until = points[: points.index(kept) + 1]
    half = next(point.step for point in until if point.mean_drift >= kept.mean_drift / 2)
    changing = [i for i, point in enumerate(until) if point.as_kept < count]
    settled = until[changing[-1] + 1 if changing else 0].step
    return (
        f"The vectors that were kept, those after step {kept.step:,}, are on average {kept.mean_drift:.2f} RMS of the "
        f"embedding table from their start, the farthest {kept.largest_drift:.2f}; half of that was reached by step "
        f"{half:,}. The nearest token is that of the start for {kept.as_at_start} of {count}; from step {settled:,} "
        f"to there it did not change any more."
    )


def _most_important(report: Report) -> str:
    matters = report.matters
    if matters is None:
        return ""
    parts = [
        f"{i} near {shown(report.names[i])} ({nats(matters.tokens[i].left_out.loss_change)}; replaced by the mean "
        f"{nats(matters.tokens[i].replaced.loss_change)}; among the first {ablation.TOP} in "
        f"{share(matters.tokens[i].top_share)} of resamples)"
        for i in matters.top
    ]
    count = sum(token.significant for token in matters.tokens)
    return (
        f"By the loss without them: {_and(parts)}. On {matters.n} rows the loss changes significantly without {count} "
        f"of {report.num_virtual_tokens} (false discovery rate {share(matters.level)})."
    )


def _needed(report: Report) -> str:
    if report.matters is None or not report.cuts:
        return ""
    parts = [f"{cut.k}: {value(cut.best)} and {value(cut.first)}" for cut in report.cuts]
    return (
        f"With only the k that matter most, and with only the first k, it reaches: for k = {'; '.join(parts)}; "
        f"with all {report.num_virtual_tokens}: {value(report.matters.full)}."
    )


def _lost_as_text(report: Report) -> str:
    if not report.readings:
        return ""
    of_name = {reading.name: reading.change for reading in report.readings}
    typed = next(reading for reading in report.readings if reading.name.endswith("typed as text"))
    random = [reading.change for reading in report.readings if reading.name.startswith("random")]
    bare = of_name["no soft prompt"]
    return (
        f"The soft prompt reaches {value(of_name['soft prompt'])}; its nearest tokens typed as text reach "
        f"{value(typed.change)}, a change of {lost(typed.change)}. For comparison: no soft prompt {value(bare)}; "
        f"random tokens {'; '.join(value(change) for change in random)}. The text is {shown(typed.text, 300)}."
    )


def _changes(report: Report) -> str:
    labels = report.labels
    if labels is None:
        return ""
    largest = max(labels.with_it, key=lambda label: abs(labels.with_it[label] - labels.without[label]))
    return (
        f"Accuracy goes from {percent(labels.accuracy_without)} to {percent(labels.accuracy_with)}, "
        f"{points(labels.gained)}: {labels.changed} of {labels.n} answers change, {labels.mended} are mended and "
        f"{labels.broken} broken. The mean probability of {shown(largest)} goes from {labels.without[largest]:.2f} to "
        f"{labels.with_it[largest]:.2f}; its true share is {labels.gold[largest]:.2f}."
    )
