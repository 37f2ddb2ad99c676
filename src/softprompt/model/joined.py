"""What conversations begin with, computed once: of all of them in the shared prefix, of one for all its answers.

Answers of one conversation become a row. What they begin with is its text; behind it hangs, as a trie, what is left of
each with its words, of which only the words are scored. Tokens decide what is shared, so this is exact whatever a chat
template makes of earlier turns: where it writes them in another way, or a text was cut, the answers part.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from softprompt.model.batch import BESIDES_ATTENTION, Row
from softprompt.model.request import Request
from softprompt.text.tokens import Tokens

LONGEST = 2048
"""Tokens of the longest row that is made of several requests, unless one of them alone is longer: each of its tokens is
held against all others, which takes memory."""


@dataclass(frozen=True)
class Joined:
    """Requests that one row computes, all behind the same shared prefix.

    Attributes:
        places: where they stand in the list that they come from.
        requests: the requests; several begin with the same token.
    """

    places: tuple[int, ...]
    requests: tuple[Request, ...]

    def row(self, prefix: int = 0) -> Row:
        """The row, behind the shared prefix of that index. Its words are those of all requests, in order."""
        texts = [request.ids[request.shared :] for request in self.requests]
        if len(texts) == 1:
            return Row(texts[0], self.requests[0].words, prefix)
        common = _common(texts)
        pairs = [(text[common:], word) for text, r in zip(texts, self.requests, strict=True) for word in r.words]
        return Row(
            texts[0][:common], tuple(rest + word for rest, word in pairs), prefix, tuple(len(r) for r, _ in pairs)
        )

    def singles(self) -> list[Joined]:
        """Each request by itself."""
        return [Joined((place,), (request,)) for place, request in zip(self.places, self.requests, strict=True)]

    @property
    def saved(self) -> int:
        """Tokens that are computed once instead of several times."""
        alone = sum(Row(request.ids[request.shared :], request.words).length for request in self.requests)
        return alone - self.row().length


def share_beginnings(requests: Sequence[Request]) -> list[Request]:
    """The requests, but with all that conversations begin with in their shared part: besides the soft prompt, for
    instance, a system message that the chat template writes by itself, or tools.

    Requests of one conversation only, or of none, stay as they are.
    """
    alike: dict[tuple[Tokens, int | None], list[int]] = {}
    for place, request in enumerate(requests):
        if request.conversation and request.shares_prefix:
            alike.setdefault((request.ids[: request.shared], request.prompt), []).append(place)
    found = list(requests)
    for places in alike.values():
        if len({requests[place].conversation for place in places}) > 1:
            texts = [requests[place].ids for place in places]
            shared = min(_common(texts), min(map(len, texts)) - 1)  # at least one token is the row's own
            for place in places:
                found[place] = replace(requests[place], shared=shared)
    return found


def join(requests: Sequence[Request], most: int) -> list[Joined]:
    """Puts answers of a conversation together, where that is less to compute.

    Args:
        requests: all with ``shares_prefix`` and words. Those of one conversation are joined where their shared part and
            their soft prompt are the same, too.
        most: tokens that are computed at once; a row of several requests has as many at most, and ``LONGEST``, unless
            one of them alone is longer.

    Returns:
        Each request once; those of no conversation stand alone.
    """
    found: list[list[int]] = []
    latest: dict[tuple[str, Tokens, int | None], _Latest] = {}
    for place, request in enumerate(requests):
        if request.conversation:
            key = (request.conversation, request.ids[: request.shared], request.prompt)
            before = latest.get(key)
            if before is not None and before.take(place, request, most):
                continue
            latest[key] = _Latest(place, request)
            found.append(latest[key].places)
        else:
            found.append([place])
    return [Joined(tuple(places), tuple(requests[place] for place in places)) for places in found]


def apart(values: torch.Tensor, joined: Sequence[Joined]) -> torch.Tensor:
    """The words of each request, from those of the rows that the requests were joined in.

    Args:
        values: float or bool ``[rows, W]``, for the words of each ``Joined.row()``; differentiable.
        joined: one for each row.

    Returns:
        ``[requests, W']``, in the order of the rows and of the requests in them; ``-inf`` or False beyond a request's
        own words.
    """
    index = word_places(joined, values.shape[1], values.numel())
    return values if index is None else picked(values, index.to(values.device))


def word_places(joined: Sequence[Joined], num_words: int, absent: int) -> torch.Tensor | None:
    """Where ``picked`` finds the words of each request.

    Args:
        joined: one for each row.
        num_words: words of a row, padding included.
        absent: the place behind all words of all rows.

    Returns:
        int64 ``[requests, W']`` on the CPU; None if each row is one request.
    """
    if all(len(one.requests) == 1 for one in joined):
        return None
    width = max(len(request.words) for one in joined for request in one.requests)
    index: list[list[int]] = []
    for number, one in enumerate(joined):
        begin = number * num_words
        for request in one.requests:
            count = len(request.words)
            index.append([*range(begin, begin + count), *[absent] * (width - count)])
            begin += count
    return torch.tensor(index)


def picked(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Float or bool ``[rows, W]`` by places, int64 ``[requests, W']``; ``-inf`` or False behind the last."""
    absent = values.new_full((1,), -math.inf if values.is_floating_point() else False)
    return torch.cat([values.reshape(-1), absent])[index]


class _Latest:
    """A conversation's latest row, which may still grow.

    Attributes:
        places: of its requests.
    """

    def __init__(self, place: int, request: Request) -> None:
        self.places = [place]
        self._sequences, self._length = _added([], request)
        self._longest = self._length  # of what one of its requests would have alone

    def take(self, place: int, request: Request, most: int) -> bool:
        """Adds a request where that is less to compute: a token is held against those of other branches, too."""
        alone = _added([], request)[1]
        sequences, more = _added(self._sequences, request)
        both, longest = self._length + more, max(self._longest, alone)
        if both > max(min(most, LONGEST), longest) or _cost(both) >= _cost(self._length) + _cost(alone):
            return False
        self.places.append(place)
        self._sequences, self._length, self._longest = sequences, both, longest
        return True


def _added(known: Sequence[Tokens], request: Request) -> tuple[list[Tokens], int]:
    """Sequences in order, and those of a request with them, a sequence for each of its words, whose last token is never
    read; and how many of their beginnings were not there before: the tokens that are computed for them."""
    found, more = list(known), 0
    for word in request.words:
        sequence = request.ids[request.shared :] + word[:-1]
        place = bisect(found, sequence)  # of all that are known, its neighbours share most with it
        neighbours = found[max(0, place - 1) : place + 1]
        more += len(sequence) - max((_common([sequence, other]) for other in neighbours), default=0)
        found.insert(place, sequence)
    return found, more


def _cost(length: int) -> int:
    """What a row costs, in tokens looked at."""
    return length * (BESIDES_ATTENTION + length)


def _common(texts: Sequence[Tokens]) -> int:
    """With how many tokens all texts begin alike."""
    first, last = min(texts), max(texts)  # what these two have in common, all have
    same, end = 0, min(len(first), len(last))
    while same < end:  # tuples are compared much faster than their tokens one by one
        middle = (same + end + 1) // 2
        if first[same:middle] == last[same:middle]:
            same = middle
        else:
            end = middle - 1
    return same
