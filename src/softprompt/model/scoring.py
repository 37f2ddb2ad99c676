"""Scoring any mix of requests: in batches that one path serves, in smaller ones where a batch does not fit.

Here, ``lm`` is a ``FrozenLM``, whose module imports this one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from softprompt.model.batch import Row, micro_batches
from softprompt.model.joined import Joined, apart, join, share_beginnings
from softprompt.model.prefixes import PrefixOf
from softprompt.model.reading import greedy_words, summed
from softprompt.model.request import Request, can_share, length_of, prompt_of
from softprompt.model.state.prefix import PrefixState
from softprompt.text.tokens import Tokens


def scores(
    lm: Any,
    requests: Sequence[Request],
    soft_prompts: Sequence[torch.Tensor],
    max_tokens: int | None,
    prefix_of: PrefixOf | None,
) -> torch.Tensor:
    """What ``FrozenLM.score`` gives; several processes share the work."""
    own, width = _own_rows(lm, requests), _most_words(requests)
    found = torch.zeros(len(requests), width)
    found[list(own)] = -torch.inf
    mine = [requests[i] for i in own]
    for places, part, _ in _scored(lm, mine, soft_prompts, max_tokens, prefix_of, compare=False):
        found[[own[place] for place in places.tolist()], : part.shape[1]] = part.cpu()
    if lm.world.divides_scoring:
        lm.world.add_up(found)  # the others' rows are zeros here
    return found


def scores_and_greedy(
    lm: Any, requests: Sequence[Request], soft_prompts: Sequence[torch.Tensor], prefix_of: PrefixOf | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``FrozenLM.score_and_compare`` gives."""
    width = _most_words(requests)
    found, greedy = torch.full((len(requests), width), -torch.inf), torch.zeros(len(requests), width).bool()
    for places, part, same in _scored(lm, requests, soft_prompts, None, prefix_of, compare=True):
        assert same is not None
        found[places, : part.shape[1]], greedy[places, : part.shape[1]] = part.cpu(), same.cpu()
    return found, greedy


def _most_words(requests: Sequence[Request]) -> int:
    return max((len(request.words) for request in requests), default=0)


def _own_rows(lm: Any, requests: Sequence[Request]) -> Sequence[int]:
    """The places of the requests that this process scores."""
    if not lm.world.divides_scoring:
        return range(len(requests))
    dealt: list[list[int]] = lm.world.deal([len(r.ids) + sum(map(len, r.words)) for r in requests])
    return dealt[lm.world.rank]


def _scored(
    lm: Any,
    requests: Sequence[Request],
    soft_prompts: Sequence[torch.Tensor],
    max_tokens: int | None,
    prefix_of: PrefixOf | None,
    *,
    compare: bool,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """The places of the requests of each batch, their words' scores, and with ``compare`` whether greedy decoding
    would write them."""
    prefix_of = prefix_of or lm.kept_prefixes(max(1, len(soft_prompts)))
    waiting = list(_groups(lm, share_beginnings(requests), soft_prompts, max_tokens or 2 * lm.tokens_at_once))[::-1]
    while waiting:
        group = waiting.pop()
        try:
            part, same = _scored_group(lm, group, soft_prompts, prefix_of, compare=compare)
        except torch.OutOfMemoryError:
            parts = group if len(group) > 1 else group[0].singles()
            if len(parts) == 1:
                raise
            lm.take_less_at_once(sum(len(request.ids) for one in group for request in one.requests))
            waiting += [parts[len(parts) // 2 :], parts[: len(parts) // 2]]
            continue
        yield torch.tensor([place for one in group for place in one.places]), part, same


def _scored_group(
    lm: Any,
    group: Sequence[Joined],
    soft_prompts: Sequence[torch.Tensor],
    prefix_of: PrefixOf,
    *,
    compare: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same for one batch."""
    members = [request for one in group for request in one.requests]
    with lm.eager():
        if not can_share(lm, members[0], length_of(members[0], soft_prompts)):
            found: tuple[torch.Tensor, torch.Tensor | None] = lm.concatenated(members, soft_prompts, compare=compare)
            return found
        rows, prefix = _rows(group, soft_prompts, prefix_of)
        batch = lm.collate(rows, prefix.lengths)
        if not compare:
            return apart(lm.score_batch(batch, prefix), group), None
        logits = lm.read_logits(batch, prefix)
        return apart(summed(batch, logits), group), apart(greedy_words(batch, logits), group)


def _groups(
    lm: Any, requests: Sequence[Request], soft_prompts: Sequence[torch.Tensor], max_tokens: int
) -> Iterator[list[Joined]]:
    """Batches of requests that one path serves, of similar length; the answers of a conversation are together where
    they share what they begin with."""
    possible = [can_share(lm, request, length_of(request, soft_prompts)) for request in requests]
    for shares in (True, False):
        chosen = [i for i, can in enumerate(possible) if can == shares]
        if shares:
            joined = [
                Joined(tuple(chosen[place] for place in one.places), one.requests)
                for one in join([requests[i] for i in chosen], max_tokens)
            ]
            lengths = [one.row().length for one in joined]
        else:
            joined = [Joined((i,), (requests[i],)) for i in chosen]
            lengths = [lm.tokens_of(requests[i], 1) for i in chosen]
        for group in micro_batches(lengths, max_tokens):
            yield [joined[i] for i in group]


def _rows(
    joined: Sequence[Joined], soft_prompts: Sequence[torch.Tensor], prefix_of: PrefixOf
) -> tuple[list[Row], PrefixState]:
    """Rows and the prefixes they point at, each prefix computed once."""
    index: dict[tuple[Tokens, int | None], int] = {}
    rows, prefixes = list[Row](), list[PrefixState]()
    for one in joined:
        request = one.requests[0]
        key = (request.ids[: request.shared], request.prompt)
        if key not in index:
            index[key] = len(index)
            prefixes.append(prefix_of(key[0], prompt_of(request, soft_prompts)))
        rows.append(one.row(index[key]))
    return rows, prefixes[0].stack(prefixes[1:])
