"""The gradient of a step, for one soft prompt or for several at once.

Three ways lead to the same numbers:

* *Stream*: one pass over ``[prefix | its rows | …]``. It launches half as much as the second way, and pads nothing.
* *Two stages*: each prefix runs once; micro-batches of rows send their gradients into its detached state, where they
  add up in fp32; one backward pass carries the sum on to the vectors. Its memory is that of one micro-batch. Where
  the prefixes of several soft prompts have more tokens than one may, they run again, some at a time, after the rows.
* *Concatenation*: the soft prompt is repeated in every row. It serves every architecture.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from softprompt.errors import ConfigError, SoftPromptWarning, TrainingError
from softprompt.model.batch import Batch, Row, collate, micro_batches, stream, without_lone_rows
from softprompt.model.distributed import noticing_loss
from softprompt.model.fast.compiled import graphs_compiled
from softprompt.model.fast.graphs import Graphs, sent
from softprompt.model.fast.measured import Gauge, Measuring
from softprompt.model.frozen import FrozenLM
from softprompt.model.joined import Joined, apart, join, picked, word_places
from softprompt.model.prefixes import PrefixOf
from softprompt.model.request import Request, can_share
from softprompt.model.state.prefix import Detached, PrefixState
from softprompt.text.tokens import SOFT, Tokens
from softprompt.tuning.objective import Objective

Layout = Literal["stream", "two stages", "concatenation"]

STREAM_TOKENS = 384
"""Tokens up to which a stream is faster on a CPU: 1.3 times with 60, 1.1 with 250, 0.8 with 800 (SmolLM2-135M), since
attention looks at all pairs of tokens there."""

SHARED_TOKENS = 1024
"""Tokens up to which a pass over the rows of several soft prompts may always go on a CPU: 256 took a sixth more time,
for half of the memory or less (``benchmarks/fit_many.py``)."""

SHORT_TEXT = 64
"""Tokens of the template before the soft prompt up to which a stream computes them anew in each step."""


@dataclass(frozen=True)
class Share:
    """The rows that one soft prompt learns from in a step.

    Attributes:
        objective: their loss.
        requests: all with the same shared part.
        gold: index of each row's word or label, as ``Objective.loss`` takes it.
        shape: of the soft prompt's numbers, ``(P, H)``, ``(P, L, 2, H_kv, D)`` or ``(N,)``.
        whole: by what the summed loss is divided, where these are some of a step's rows; None: they are all of them.
    """

    objective: Objective
    requests: Sequence[Request]
    gold: Sequence[int]
    shape: tuple[int, ...]
    whole: int | None = None

    @property
    def weight(self) -> int:
        """By what the summed loss is divided."""
        return self.objective.weight(self.requests) if self.whole is None else self.whole

    def part(self, rows: Sequence[int]) -> Share:
        """Some of the rows; their losses add up to the mean loss of all."""
        chosen = [self.requests[row] for row in rows], [self.gold[row] for row in rows]
        return Share(self.objective, *chosen, self.shape, self.weight)

    @property
    def shared(self) -> Tokens:
        """The token ids of the shared part, the soft prompt's place included."""
        return self.requests[0].ids[: self.requests[0].shared]


@dataclass(frozen=True)
class Work:
    """A step that is laid out, on the CPU.

    Attributes:
        whole: what is learned from.
        places: which of it this process has rows of.
        shares: those rows.
        layout: which way it takes.
        rows: what the rows hold, all shares' one after the other: the share, and of its requests one, or the answers of
            a conversation.
        groups: what each pass computes: indices of rows.
        batches: the same as tensors; none for the concatenation.
        prefixes: of the shares, those whose prefixes are computed together.
        idle: so many of the last passes count for nothing: other processes have rows in them.
        tokens: that each of ``whole`` computes, in all processes, the shared prefix counted once.
        saved: that each of ``whole`` does not compute, since answers of a conversation share what they begin with.
    """

    whole: Sequence[Share]
    places: Sequence[int]
    shares: Sequence[Share]
    layout: Layout
    rows: Sequence[tuple[int, Joined]]
    groups: Sequence[Sequence[int]]
    batches: Sequence[Batch]
    prefixes: Sequence[Sequence[int]]
    idle: int
    tokens: tuple[int, ...]
    saved: tuple[int, ...]


class Gradients:
    """Computes the gradients of steps on one base model.

    Attributes:
        lm: the frozen base model.
        graphs: the CUDA graphs of its streams.
        layout: the way that every step takes; None: the fastest that serves it.
        fixed: pad streams to a few shapes, so that few graphs serve all; on a GPU, and where no layer chooses
            experts.
        max_tokens: the most tokens, padding included, in one pass; by default ``lm.tokens_at_once``. A step that does
            not fit into memory is repeated in smaller passes, with the same result.
        may_recompute: whether a row that does not fit alone is tried with activations that are computed again.
        measuring: finds ``max_tokens`` and whether activations are computed again, from what the first steps take; on
            a GPU, where it is not given. The result is the same whatever it finds: gradients are sums.
    """

    def __init__(
        self,
        lm: FrozenLM,
        *,
        layout: Layout | None = None,
        max_tokens: int | None = None,
        may_recompute: bool = True,
    ) -> None:
        self.lm = lm
        self.may_recompute = may_recompute
        self.graphs = Graphs()
        self.layout = layout
        self.fixed = lm.device.type == "cuda" and lm.plain
        self.max_tokens = max_tokens
        measurable = lm.device.type == "cuda" and lm.world.size == 1 and max_tokens is None
        self.measuring = Measuring(Gauge(lm.device) if measurable else None, may_recompute=may_recompute)
        self._compiled_before = graphs_compiled()
        self._text_before: PrefixOf = lm.kept_prefixes(1)

    @property
    def costs(self) -> dict[str, int]:
        """What steps cost once: ``compiled``, how many graphs ``torch.compile`` has made since this was made, and
        ``captured``, how many CUDA graphs were captured."""
        return {"compiled": graphs_compiled() - self._compiled_before, "captured": self.graphs.captured}

    def prepare(self, shares: Sequence[Share]) -> Work:
        """Lays a step out; computes nothing on the device. Of several processes, each takes some of every share's rows.

        Raises:
            ConfigError: several soft prompts, and a base model whose weights are in parts (FSDP2).
        """
        world = self.lm.world
        shares = [_opened(share) for share in shares]
        shared = all(
            can_share(self.lm, request, self.lm.trained.length(share.shape))
            for share in shares
            for request in share.requests
        )
        shared = shared and self.layout != "concatenation"
        units = [self._units(share, shared) for share in shares]
        lengths = [[self._length(share, one, shared) for one in own] for share, own in zip(shares, units, strict=True)]
        tokens = tuple(
            sum(own) + (self._prefix_length(share) if shared else 0) for share, own in zip(shares, lengths, strict=True)
        )
        saved = tuple(sum(one.saved for one in own) if shared else 0 for own in units)
        if not world.divides_steps:
            return self._laid_out(shares, range(len(shares)), shares, shared, tokens, saved)
        dealt = [[[units[n][unit] for unit in some] for some in world.deal(own)] for n, own in enumerate(lengths)]
        if world.shard == "none":
            places = [place for place, parts in enumerate(dealt) if parts[world.rank]]
            own_shares = [shares[place].part(_places(dealt[place][world.rank])) for place in places]
            return self._laid_out(shares, places, own_shares, shared, tokens, saved)
        if len(shares) > 1:
            raise ConfigError("With --shard fsdp, soft prompts are trained one at a time; train each by itself.")
        # all processes put the layers' weights together at once, so each runs as many passes as any other
        most = self.max_tokens or self.lm.tokens_at_once
        passes = max(
            len(micro_batches([self._length(shares[0], one, shared) for one in part], most)) for part in dealt[0]
        )
        own_share = shares[0].part(_places(dealt[0][world.rank]) or [0])
        idle = not dealt[0][world.rank]
        return self._laid_out(shares, [0], [own_share], shared, tokens, saved, passes, idle=idle)

    def tokens(self, requests: Sequence[Request]) -> int:
        """Tokens that a forward pass runs behind the shared prefix."""
        if self.lm.shares_prefix and all(request.shares_prefix for request in requests):
            return sum(one.row().length for one in join(requests, self.max_tokens or self.lm.tokens_at_once))
        return sum(Row(request.ids[request.shared :], request.words).length for request in requests)

    def _units(self, share: Share, shared: bool) -> list[Joined]:
        """The requests as rows: answers of a conversation together, where a prefix runs once."""
        if shared:
            return join(share.requests, self.max_tokens or self.lm.tokens_at_once)
        return [Joined((place,), (request,)) for place, request in enumerate(share.requests)]

    def _length(self, share: Share, one: Joined, shared: bool) -> int:
        """The tokens that a row alone needs."""
        return one.row().length if shared else self.lm.tokens_of(one.requests[0], share.shape[0])

    def _prefix_length(self, share: Share) -> int:
        """Tokens of a share's prefix."""
        return len(share.shared) - 1 + self.lm.trained.length(share.shape)

    def _laid_out(
        self,
        whole: Sequence[Share],
        places: Sequence[int],
        shares: Sequence[Share],
        shared: bool,
        tokens: tuple[int, ...],
        saved: tuple[int, ...],
        passes: int = 0,
        *,
        idle: bool = False,
    ) -> Work:
        """The rows of this process, in at least so many passes, all of which are ``idle`` if it has none."""
        most = self.max_tokens or self.lm.tokens_at_once
        joined = [(number, one) for number, share in enumerate(shares) for one in self._units(share, shared)]
        rows = [one.row(number) for number, one in joined]
        layout = (self.layout or self._best(shares, rows, most)) if shared else "concatenation"
        lengths = [self._length(shares[number], one, shared) for number, one in joined]
        together = _neighbours([self._prefix_length(share) for share in shares], most)
        most = self._at_most(shares, joined, lengths, most)
        batches = list[Batch]()
        if layout == "stream" and rows:
            groups = [list(range(len(rows)))]
            prefixes = [(share.shared, share.shape[0]) for share in shares]
            requests = sum(len(one.requests) for _, one in joined)
            batches = [stream(rows, prefixes, fixed=self.fixed, least_rows=requests)]
        else:
            groups = micro_batches(lengths, most)
            if self.lm.layers.compiled:
                groups = without_lone_rows(groups)
        own = 0 if idle else len(groups)
        groups = [*groups, *[[0]] * (passes - len(groups))]
        if layout == "two stages":
            starts = [self._prefix_length(share) for share in shares]
            batches = [self._lines([rows[i] for i in group], starts) for group in groups]
        return Work(whole, places, shares, layout, joined, groups, batches, together, len(groups) - own, tokens, saved)

    def _at_most(
        self, shares: Sequence[Share], joined: Sequence[tuple[int, Joined]], lengths: Sequence[int], most: int
    ) -> int:
        """Tokens of a pass, of several shares on a CPU no more than the largest of them computes alone, if that is more
        than ``SHARED_TOKENS``: larger passes take more memory and are hardly faster there."""
        if len(shares) < 2 or self.lm.device.type == "cuda":
            return most
        own = [self._prefix_length(share) for share in shares]
        for (number, _), length in zip(joined, lengths, strict=True):
            own[number] += length
        return min(most, max(SHARED_TOKENS, *own))

    def _lines(self, rows: Sequence[Row], starts: Sequence[int]) -> Batch:
        """Rows behind prefixes of ``starts`` tokens, on the CPU."""
        cpu = torch.device("cpu")
        if self.lm.layers.compiled:  # torch.compile takes a size of 1 for a constant, so a lone line is another graph
            return collate(rows, starts, cpu, least_lines=2)
        return self.lm.collate(rows, starts, cpu)

    def _best(self, shares: Sequence[Share], rows: Sequence[Row], most: int) -> Layout:
        total = sum(self._prefix_length(share) for share in shares) + sum(row.length for row in rows)
        if self.lm.device.type != "cuda":
            most = min(most, STREAM_TOKENS)
        plain = all(len(share.shape) == 2 and share.shared.index(SOFT) <= SHORT_TEXT for share in shares)
        may_stream = plain and not self.lm.recurrent and self.lm.world.shard != "fsdp"
        return "stream" if may_stream and total <= most else "two stages"

    def add(self, work: Work, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Adds the gradient of each share's mean loss to the ``grad`` of its soft prompt's numbers.

        Args:
            work: what ``prepare`` laid out.
            vectors: of each share, float32, a leaf on the device.

        Returns:
            float32 ``[K]`` on the device, each share's mean loss. Nothing waits for it.

        Raises:
            TrainingError: a single row does not fit into memory.
            ProcessError: another of several processes is lost.
        """
        if self.lm.world.size == 1:
            return self._add_here(work, vectors)
        with noticing_loss():
            return self._add_of_all(work, vectors)

    def _add_of_all(self, work: Work, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The same of several processes: each computes its rows', and all get the sum."""
        world = self.lm.world
        before = [own.grad for own in vectors]
        for own in vectors:
            own.grad = None
        losses = torch.zeros(len(vectors), device=self.lm.device)
        if work.shares:
            losses[list(work.places)] = self._add_here(work, [vectors[place] for place in work.places])
        found = [torch.zeros_like(own) if own.grad is None else own.grad for own in vectors]
        numbers = torch.cat([losses, *(gradient.flatten() for gradient in found)])
        if world.divides_steps:
            world.add_up(numbers)
        else:
            world.follow_first(numbers)
        losses, *sums = torch.split(numbers, [len(vectors), *(own.numel() for own in vectors)])
        for own, earlier, gradient in zip(vectors, before, sums, strict=True):
            own.grad = gradient.view_as(own) if earlier is None else earlier + gradient.view_as(own)
        return losses

    def _add_here(self, work: Work, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The same for the rows of this process."""
        ways = {
            "stream": self._add_by_stream,
            "two stages": self._add_by_stages,
            "concatenation": self._add_by_concatenation,
        }
        before = [None if own.grad is None else own.grad.clone() for own in vectors]
        while True:
            try:
                self.measuring.begin()
                losses = ways[work.layout](work, vectors)
                self._measure(work)
                return losses
            except torch.OutOfMemoryError as error:
                if self.lm.world.shard != "none":  # the others are in the middle of the same layer
                    raise TrainingError(
                        f"A pass does not fit into the memory of {self.lm.device}; take --activation-checkpointing on, "
                        "more processes, shorter rows (--max-length), fewer virtual tokens, or --dtype bf16."
                    ) from error
                for own, gradient in zip(vectors, before, strict=True):
                    own.grad = gradient
                work = self._smaller(work, error)

    def _measure(self, work: Work) -> None:
        """Takes what was found in the passes of a step."""
        if work.batches:
            tokens = max(batch.ids.numel() for batch in work.batches)
            longest = max(one.row().length for _, one in work.rows)
        else:
            lengths = [self._length(work.shares[number], one, shared=False) for number, one in work.rows]
            tokens, longest = max(max(lengths[i] for i in group) * len(group) for group in work.groups), max(lengths)
        found = self.measuring.end(tokens, longest, recomputed=self.lm.layers.recomputed)
        if found is not None:
            self.max_tokens = self.lm.tokens_at_once = found.tokens
            self.lm.layers.set(recomputed=found.recomputed)

    def _smaller(self, work: Work, error: torch.OutOfMemoryError) -> Work:
        """The same step in smaller passes; where each has one row already, with activations that are computed again."""
        self.measuring.stop()
        if work.layout == "stream" or any(len(group) > 1 for group in work.groups):
            lengths = [one.row().length for _, one in work.rows]
            self.lm.take_less_at_once(max(sum(lengths[i] for i in group) for group in work.groups))
            self.max_tokens = self.lm.tokens_at_once
            return self.prepare(work.whole)
        if not self.may_recompute or self.lm.layers.recomputed:
            raise TrainingError(
                f"A single row does not fit into the memory of {self.lm.device} with what the backward pass needs; "
                "take shorter rows (--max-length), fewer virtual tokens, --dtype bf16, or "
                "--activation-checkpointing auto."
            ) from error
        self.lm.layers.set(recomputed=True)
        warnings.warn(
            f"a single row did not fit into the memory of the device ({self.lm.device}); activations are computed "
            "again in the backward pass from now on, with the same result; a step takes a third longer",
            SoftPromptWarning,
            stacklevel=3,
        )
        return work

    def backward(
        self, objective: Objective, requests: Sequence[Request], gold: Sequence[int], vectors: torch.Tensor
    ) -> tuple[float, int]:
        """One soft prompt's step: adds the gradient to ``vectors.grad``; returns the mean loss and the tokens computed.

        Args:
            objective, requests, gold: as in ``Share``.
            vectors: float32 ``[P, H]``, ``[P, L, 2, H_kv, D]`` or ``[N]``, a leaf.
        """
        work = self.prepare([Share(objective, requests, gold, tuple(vectors.shape))])
        return float(self.add(work, [vectors])[0]), work.tokens[0]

    def _add_by_stream(self, work: Work, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        laid, shares = work.batches[0], work.shares
        index = word_places([one for _, one in work.rows], laid.num_words, laid.size * laid.num_words)
        gold = [shares[number].gold[place] for number, one in work.rows for place in one.places]
        counts, lengths = [len(share.requests) for share in shares], [share.shape[0] for share in shares]
        objectives = [share.objective for share in shares]
        words = [max(len(request.words) for request in share.requests) for share in shares]
        places = torch.tensor([], dtype=torch.long) if index is None else index.flatten()
        given = [
            torch.cat([tensor.flatten() for tensor in laid.tensors.values()]),
            torch.tensor(gold),
            torch.tensor([share.weight for share in shares]),
            places,
        ]
        sizes = [len(part) for part in given]

        def run(integers: torch.Tensor, numbers: torch.Tensor) -> tuple[torch.Tensor, ...]:
            leaf = numbers.detach().requires_grad_()
            inside, right, divisors, places = torch.split(integers, sizes)
            scores = self.lm.score_stream(laid.filled(inside), leaf)
            if index is not None:
                scores = picked(scores, places.view(index.shape))
            parts = zip(objectives, torch.split(scores, counts), torch.split(right, counts), words, strict=True)
            losses = torch.stack([each.loss(own[:, :width], gold) for each, own, gold, width in parts]) / divisors
            (gradient,) = torch.autograd.grad(losses.sum(), leaf)
            return losses.detach(), gradient

        shape = (
            tuple((name, tensor.shape) for name, tensor in laid.tensors.items()),
            laid.num_words,
            None if index is None else index.shape,
            *zip(counts, lengths, words, objectives, strict=True),
        )
        numbers = torch.cat([own.detach() for own in vectors])
        both = sent(torch.cat(given), self.lm.device), numbers
        losses, gradient = self.graphs(shape, run, *both) if self.fixed else run(*both)
        for own, part in zip(vectors, torch.split(gradient, lengths), strict=True):
            own.grad = part.clone() if own.grad is None else own.grad + part
        return losses

    def _add_by_stages(self, work: Work, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The text before a single soft prompt runs in the first step only; behind a KV prefix, backward goes through
        the template's text only."""
        device, lm, parts = self.lm.device, self.lm, work.prefixes
        again = len(parts) > 1  # the graphs of all would take more memory than the rows
        with torch.set_grad_enabled(not again):
            first, *others = [self._prefixes(work, vectors, part) for part in parts]
            detached = Detached(first.stack(others))
        del first, others
        losses = torch.zeros(len(work.shares), device=device)
        for number, (group, batch) in enumerate(zip(work.groups, work.batches, strict=True)):
            scores = lm.score_batch(batch.to(device), detached.leaves())
            scores = apart(scores, [work.rows[i][1] for i in group])
            losses = losses + self._backward(work, group, scores, idle=number >= len(work.groups) - work.idle)
        for part in parts:
            state = self._prefixes(work, vectors, part) if again else None
            lm.layers.make_ready()
            detached.backward(state, part)
        return losses

    def _prefixes(self, work: Work, vectors: Sequence[torch.Tensor], part: Sequence[int]) -> PrefixState:
        """The prefixes of some shares."""
        if len(work.shares) > 1:
            return self.lm.prefixes_kv([work.shares[i].shared for i in part], [vectors[i] for i in part])
        shared = work.shares[0].shared
        place = shared.index(SOFT)
        if self.lm.recurrent and tuple(vectors[0].shape) == (1, self.lm.hidden_size) and place == len(shared) - 1:
            place = 0  # behind a state, some layers run one token alone in place, through which no gradient goes
        before = self._text_before(shared[:place], None) if place else None
        return self.lm.prefix_kv(shared[place:], vectors[0], before)

    def _add_by_concatenation(self, work: Work, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        losses = torch.zeros(len(work.shares), device=self.lm.device)
        for place, group in enumerate(work.groups):
            idle = place >= len(work.groups) - work.idle
            for number, members in _by_share(work, group):  # each has its soft prompt
                requests = [work.rows[i][1].requests[0] for i in members]
                scores = self.lm.score_concatenated(requests, [vectors[number]])
                losses = losses + self._backward(work, members, scores, idle=idle)
        return losses

    def _backward(self, work: Work, group: Sequence[int], scores: torch.Tensor, *, idle: bool) -> torch.Tensor:
        """Backward from the mean losses of some rows, float32 ``[K]``, which it returns without their graph.

        Args:
            work: the step.
            group: the rows.
            scores: of each of their requests, row after row.
            idle: they count for nothing.
        """
        losses = torch.zeros(len(work.shares), device=scores.device)
        first, parts = dict[int, int](), []
        begin = 0
        for row in group:
            first[row] = begin
            begin += len(work.rows[row][1].requests)
        for number, members in _by_share(work, group):
            share = work.shares[number]
            lines = [first[i] + k for i in members for k in range(len(work.rows[i][1].requests))]
            gold = [share.gold[place] for i in members for place in work.rows[i][1].places]
            words = max(len(request.words) for request in share.requests)
            own = scores[lines, :words]
            right = torch.tensor(gold, device=scores.device)
            loss = share.objective.loss(own, right) / share.weight * (0 if idle else 1)
            losses[number] = loss.detach()
            parts.append(loss)
        torch.stack(parts).sum().backward()  # type: ignore[no-untyped-call]
        return losses


def _neighbours(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Numbers in order, in groups of at most so much length in all; a longer one stands alone."""
    groups: list[list[int]] = []
    for number, length in enumerate(lengths):
        if groups and sum(lengths[i] for i in groups[-1]) + length <= most:
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups


def _opened(share: Share) -> Share:
    """A share in which not one token alone is shared behind a trained state: some layers would run it in place, through
    which no gradient goes. It becomes each row's own."""
    if len(share.shape) > 1 or len(share.shared) - 2 != share.shared.index(SOFT):
        return share
    requests = [replace(request, shared=request.shared - 1) for request in share.requests]
    return replace(share, requests=requests)


def _places(units: Sequence[Joined]) -> list[int]:
    """Where the requests of rows stand in their share, in order."""
    return sorted(place for one in units for place in one.places)


def _by_share(work: Work, group: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """The rows of a group, share by share."""
    for number in dict.fromkeys(work.rows[i][0] for i in group):
        yield number, [i for i in group if work.rows[i][0] == number]
