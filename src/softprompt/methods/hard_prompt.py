"""Hard prompts: the base model as it is, with readable text, or nothing, in the soft prompt's place.

What a person would try before tuning anything, done with care: the instruction, the number of worked examples (shots)
and whether to have both are chosen on validation rows. Each way also comes with contextual calibration.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain, islice, zip_longest
from typing import Any

import torch

from softprompt.data.example import Dataset, Example
from softprompt.errors import ConfigError, DataError, TemplateError
from softprompt.methods.classical import fit_tf_idf, input_text, rank
from softprompt.methods.problem import Learned, Problem
from softprompt.model.request import Sampling
from softprompt.tasks.predict import Prediction, Progress, Query, default_sampling, predict
from softprompt.tasks.task import Task

CHOICE_ROWS = 200
"""The most validation rows to choose by: each is a pass through the model for every candidate."""
SHOT_TOKENS = 512
"""The most tokens of nearest shots: no two inputs share theirs, so every request pays for all of them."""
GROWTH, NEAREST_GROWTH = 2, 4
"""How many times as many shots are tried next; of nearest ones fewer numbers are tried, since each try is dear."""
NEAREST_AT_ONCE = 8
"""Rows in a batch where each has its own shots, whose keys and values are all in memory."""
CONTENT_FREE = ("N/A", "", "[MASK]")
"""Inputs that say nothing (Zhao et al. 2021, §5)."""

Answer = Callable[[Sequence[Example], Progress | None], list[Prediction]]


@dataclass(frozen=True)
class _Prompt:
    """A hard prompt, ready for use.

    Attributes:
        ask: a row → its query.
        bytes: of the instruction and the training rows that are kept for it, as UTF-8.
        chosen: what tells it from others: ``k``, ``instruction``.
        shared: whether all rows have the same text before them.
    """

    ask: Callable[[Example], Query]
    bytes: int
    chosen: Mapping[str, Any]
    shared: bool = True


@dataclass(frozen=True)
class _Tried:
    """A hard prompt and what it is worth on validation rows.

    Attributes:
        prompt, answer: the hard prompt and its predictions.
        rank: the headline metric, then minus the log loss.
        seconds: how long the rows took.
    """

    prompt: _Prompt
    answer: Answer
    rank: tuple[float, float]
    seconds: float


def zero_shot(problem: Problem, *, calibrate: bool = False) -> Learned:
    """The template with nothing in the soft prompt's place.

    Args:
        problem: what to learn, and from what.
        calibrate: contextual calibration (Zhao et al. 2021, "Calibrate Before Use", §5), here and below: each label's
            probability is divided by its mean probability for inputs without content behind the same hard text, and
            the quotients are normalised. The paper's softmax of the quotients puts the labels in the same order.

    Raises:
        ConfigError: ``calibrate`` where the targets are free text, here and below.
    """
    return _unchosen(problem, _worded(problem, None), calibrate)


def instruction(problem: Problem, *, calibrate: bool = False) -> Learned:
    """The user's instruction and a blank line in the soft prompt's place; of several, the best on validation rows.

    Raises:
        ConfigError: there is no instruction.
    """
    prompts = [_worded(problem, index) for index in range(len(problem.instructions))]
    if not prompts:
        raise ConfigError("The method instruction needs a hard prompt, but none was given; give --instruction.")
    if len(prompts) == 1:
        return _unchosen(problem, prompts[0], calibrate)
    return _chosen(_best(problem, prompts, _choice_rows(problem), calibrate))


def few_shot(problem: Problem, *, calibrate: bool = False) -> Learned:
    """k training rows as worked examples before every input: drawn by the seed, as many of each label as can be.

    k is 1, 2, 4, 8 … as long as no validation row loses input text to the window and the budget lasts. The best on
    validation rows is kept, and with it the instruction that helps it most there, if one does. Training rows that take
    more than a quarter of the window are not drawn.

    Raises:
        DataError: all training rows are that long.
    """
    sampling = default_sampling(problem.task())
    rows = _choice_rows(problem)
    whole = [example for example in rows.examples if not _is_cut(Query(problem.task(), example), sampling)]
    if not _drawn(problem, 1):
        raise DataError(
            f"Expected a training row of at most {problem.lm.window // 4} tokens, a quarter of the window of "
            f"{problem.lm.name}, as an example for few-shot, found none; leave out few-shot."
        )

    @cache
    def prompt(k: int, index: int | None) -> _Prompt:
        shots = _drawn(problem, k)
        task = _task(problem, shots, index)
        return _Prompt(
            lambda example: Query(task, example), _size(problem, shots, index), {"k": k, "instruction": index}
        )

    def fits(k: int, index: int | None) -> bool:
        enough = len(_drawn(problem, k)) == k
        return enough and not any(_is_cut(prompt(k, index).ask(example), sampling) for example in whole)

    return _few_shot(problem, prompt, fits, rows, calibrate, GROWTH)


def few_shot_nearest(problem: Problem, *, calibrate: bool = False) -> Learned:
    """As :func:`few_shot`, but each input has its own worked examples: the k nearest training rows, nearest last.

    Near is a high cosine of TF-IDF weights (KATE, Liu et al. 2022, "What Makes Good In-Context Examples for GPT-3?",
    takes sentence embeddings, which would be another model). Of the k nearest, those are left out that do not fit into
    ``SHOT_TOKENS``, or into the window beside the whole input; k, which is 1, 4, 16 …, grows while it gives some
    validation row more shots.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    bare, rows, train = problem.task(), _choice_rows(problem), problem.train.examples
    sampling = default_sampling(bare)
    nearest = _nearest(problem)
    tokens = cache(lambda index: _tokens(bare, train[index], _words(problem, train[index])))

    def shots(example: Example, k: int) -> list[Example]:
        found, room = [], SHOT_TOKENS
        for index in nearest(example, k):
            if tokens(index) <= room:
                found.append(train[index])
                room -= tokens(index)
        return found[::-1]

    def ask(k: int, index: int | None, example: Example) -> Query:
        chosen = shots(example, k)
        query = Query(_task(problem, chosen, index), example)
        while chosen and _is_cut(query, sampling):
            chosen = chosen[1:]
            query = Query(_task(problem, chosen, index), example)
        return query

    def prompt(k: int, index: int | None) -> _Prompt:
        kept = _size(problem, train, index)
        return _Prompt(partial(ask, k, index), kept, {"k": k, "instruction": index}, shared=False)

    def fits(k: int, index: int | None) -> bool:
        return any(len(shots(example, k)) > len(shots(example, k // NEAREST_GROWTH)) for example in rows.examples)

    return _few_shot(problem, prompt, fits, rows, calibrate, NEAREST_GROWTH)


# --- choosing on validation rows ----------------------------------------------------------------------------------


def _few_shot(
    problem: Problem,
    prompt: Callable[[int, int | None], _Prompt],
    fits: Callable[[int, int | None], bool],
    rows: Dataset,
    calibrate: bool,
    growth: int,
) -> Learned:
    """The best k of those that fit, 1, growth, growth², first without an instruction, then with each of them."""

    def growing() -> Iterator[_Prompt]:
        k = 1
        while k == 1 or (k <= len(problem.train.examples) and fits(k, None)):
            yield prompt(k, None)
            k *= growth

    best = _best(problem, growing(), rows, calibrate, growth=growth)
    k = best.prompt.chosen["k"]
    instructed = (prompt(k, index) for index in range(len(problem.instructions)) if fits(k, index))
    return _chosen(_best(problem, instructed, rows, calibrate, best))


def _best(
    problem: Problem,
    prompts: Iterable[_Prompt],
    rows: Dataset,
    calibrate: bool,
    best: _Tried | None = None,
    growth: float = 1,
) -> _Tried:
    """The best hard prompt, of as many as there is time for; without any time, ``best`` or the first.

    Args:
        problem: what to learn, and the budget.
        prompts: at least one, unless there is ``best``.
        rows: to choose by.
        calibrate: whether the answers are calibrated.
        best: the one to be surpassed.
        growth: how many times as long as the last one the next one is expected to take.
    """
    last = best
    for prompt in prompts:
        if last is not None and growth * last.seconds > problem.seconds_left:
            break
        parts = (f"{name} {value}" for name, value in prompt.chosen.items() if value is not None)
        problem.notice(f"trying {', '.join(parts)}")
        began = time.perf_counter()
        answer = _answer(problem, prompt, calibrate)
        found = rank(problem, rows, answer(rows.examples, None))
        last = _Tried(prompt, answer, found, problem.seconds_since(began))
        if best is None or last.rank > best.rank:
            best = last
    assert best is not None, "there is one to try"
    return best


def _choice_rows(problem: Problem) -> Dataset:
    """A seeded sample of the validation rows."""
    rows = problem.validation.examples
    if len(rows) <= CHOICE_ROWS:
        return problem.validation
    return replace(problem.validation, examples=tuple(random.Random(problem.seed).sample(rows, CHOICE_ROWS)))


def _chosen(tried: _Tried) -> Learned:
    return _learned(tried.prompt, tried.answer, tried.rank[0])


def _unchosen(problem: Problem, prompt: _Prompt, calibrate: bool) -> Learned:
    return _learned(prompt, _answer(problem, prompt, calibrate), None)


def _learned(prompt: _Prompt, answer: Answer, validation: float | None) -> Learned:
    return Learned(
        answer=answer, trainable_parameters=0, bytes=prompt.bytes, chosen=prompt.chosen, validation=validation
    )


# --- texts --------------------------------------------------------------------------------------------------------


def _lead(problem: Problem, index: int | None) -> str:
    """The instruction and a blank line, or nothing."""
    return "" if index is None else problem.instructions[index].strip() + "\n\n"


def _worded(problem: Problem, index: int | None) -> _Prompt:
    """An instruction alone, or nothing."""
    task = problem.task(_lead(problem, index))
    chosen = {} if index is None else {"instruction": index}
    return _Prompt(lambda example: Query(task, example), _size(problem, (), index), chosen)


def _task(problem: Problem, shots: Sequence[Example], index: int | None) -> Task:
    """The task behind an instruction and worked examples."""
    template = problem.template.with_shots([(example.fields, _words(problem, example)) for example in shots])
    return replace(problem, template=template).task(_lead(problem, index))


def _words(problem: Problem, example: Example) -> str:
    """The target as the template shows it: a label's first word, or free text."""
    target = str(example.target)
    return target if problem.verbalizer is None else problem.verbalizer.words[target][0]


def _size(problem: Problem, examples: Sequence[Example], index: int | None) -> int:
    """Bytes of an instruction and of rows with their targets; the template's own text is every method's."""
    texts = [_lead(problem, index)]
    for example in examples:
        texts += [*(example.fields[name] for name in problem.template.fields), _words(problem, example)]
    return sum(len(text.encode()) for text in texts)


def _tokens(task: Task, example: Example, words: str) -> int:
    """About how many tokens a worked example takes, the blank line after it included."""
    found = task.encoder.encode(
        example, num_virtual_tokens=0, max_length=sys.maxsize, target=words + "\n\n", append_eos=False
    )
    return len(found.ids) + len(found.target_ids)


def _drawn(problem: Problem, k: int) -> list[Example]:
    """k training rows, label by label in turn and then shuffled; fewer where there are not as many short ones."""
    draw, bare = random.Random(problem.seed), problem.task()
    by_label: dict[str, list[Example]] = {}
    for example in problem.train.examples:
        by_label.setdefault(str(example.target) if problem.labels else "", []).append(example)
    groups = list(by_label.values())
    for group in groups:
        draw.shuffle(group)
    draw.shuffle(groups)

    def is_short(example: Example) -> bool:
        return _tokens(bare, example, _words(problem, example)) <= problem.lm.window // 4

    turns = zip_longest(*(filter(is_short, group) for group in groups))
    shots = list(islice((example for turn in turns for example in turn if example is not None), k))
    draw.shuffle(shots)
    return shots


def _nearest(problem: Problem) -> Callable[[Example, int], list[int]]:
    """A function: an example and k → the numbers of the k nearest training rows, nearest first."""
    fields = problem.template.fields
    texts = [input_text(example, fields) for example in problem.train.examples]
    vectorizer = fit_tf_idf(texts, rare=True)
    weights = vectorizer.transform(texts)

    def nearest(example: Example, k: int) -> list[int]:
        cosines = (weights @ vectorizer.transform([input_text(example, fields)]).T).toarray()[:, 0]
        found: list[int] = (-cosines).argsort(kind="stable")[:k].tolist()
        return found

    return nearest


def _is_cut(query: Query, sampling: Sampling) -> bool:
    """Whether the window is too short for the whole input."""
    task = query.task
    try:
        if task.verbalizer is not None:
            return task.label_request(query.example).truncated
        return task.open_request(query.example, sampling.max_new_tokens).truncated
    except TemplateError:  # there is no room for any of it
        return True


# --- answers ------------------------------------------------------------------------------------------------------


def _answer(problem: Problem, prompt: _Prompt, calibrate: bool) -> Answer:
    """The predictions behind a hard prompt; free text as the bare template gives it room."""
    _check_labels(problem, calibrate)
    kept = problem.lm.kept_prefixes(1 if prompt.shared else NEAREST_AT_ONCE)
    run = partial(predict, sampling=default_sampling(problem.task()), prefix_of=kept)
    fields = problem.template.fields
    if prompt.shared:
        neutral = _content_free(prompt.ask(problem.train.examples[0]), fields) if calibrate else []
        prior = run(neutral)

        def answer(examples: Sequence[Example], progress: Progress | None) -> list[Prediction]:
            found = run([prompt.ask(example) for example in examples], progress=progress)
            return [_calibrated(one, prior) for one in found]

        return answer

    def answer_each(examples: Sequence[Example], progress: Progress | None) -> list[Prediction]:
        found: list[Prediction] = []
        for start in range(0, len(examples), NEAREST_AT_ONCE):
            queries = [prompt.ask(example) for example in examples[start : start + NEAREST_AT_ONCE]]
            neutral = [_content_free(query, fields) if calibrate else [] for query in queries]
            answers = run([*queries, *chain.from_iterable(neutral)])
            plain, priors = answers[: len(queries)], iter(answers[len(queries) :])
            found += [
                _calibrated(one, list(islice(priors, len(part)))) for one, part in zip(plain, neutral, strict=True)
            ]
            if progress is not None:
                progress(len(found), len(examples))
        return found

    return answer_each


def _check_labels(problem: Problem, calibrate: bool) -> None:
    if calibrate and not problem.labels:
        raise ConfigError(
            "Calibration needs class labels, but the targets are free text; leave out calibrated methods or give "
            "--labels."
        )


def _content_free(query: Query, fields: Sequence[str]) -> list[Query]:
    """The query with inputs that say nothing; without the empty one where it would leave no token to go on from."""
    examples = [Example(dict.fromkeys(fields, text), None) for text in CONTENT_FREE]
    return [Query(query.task, example) for example in examples if query.task.label_request(example).ids]


def _calibrated(one: Prediction, prior: Sequence[Prediction]) -> Prediction:
    """A prediction divided by the mean probabilities of ``prior``, and normalised; unchanged if that is empty."""
    if not prior:
        return one
    logprobs, *neutral = (
        torch.tensor(list((each.logprobs or {}).values()), dtype=torch.float64) for each in (one, *prior)
    )
    found = (logprobs - torch.stack(neutral).logsumexp(dim=0)).log_softmax(dim=0)
    labels = list(one.logprobs or {})
    return replace(one, text=labels[int(found.argmax())], logprobs=dict(zip(labels, found.tolist(), strict=True)))
