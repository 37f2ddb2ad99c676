"""Which tokens of a vocabulary a vector lies near to, and how near a random vector of its kind would lie.

**What a null must share with a virtual token.** Token embeddings have a large part in common: in SmolLM2-135M the mean
holds 46 % of their energy. Any vector with a share of that part has high cosines with all tokens, so a random direction
is beaten too easily; a Gaussian with the table's mean and covariance, on the other hand, has cosines of 0.4 to 0.8,
which no trained vector has, since most of its energy lies where tokens have little. Our random vectors therefore have
the virtual token's own norm and *profile*: the same component along the mean, the same energy along each of the table's
strongest principal axes, and the same energy in each of a few groups of the others, all in random directions. Only what
ties the vector to single tokens is drawn anew.

**Excess.** Under that null, the similarity with a token has a known mean and deviation. What a similarity exceeds the
mean by, in deviations, is its excess. It is comparable between tokens, which cosines are not (some tokens are near to
everything), and its largest value over the vocabulary is what a virtual token is tested by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from softprompt.model.embedder import Embedder

SINGLE_AXES = 128
"""The most axes whose energies the null keeps one by one: with more, what a vector owes to its token is profile."""
GROUPS = 8
"""Groups of the axes behind them, where the spectrum is flatter."""
MEASURES = ("cosine", "euclidean", "dot", "excess")
_SAMPLE = 20_000  # tokens that the axes are estimated from
_CHUNK = 2048  # tokens at a time


class Profile(NamedTuple):
    """What a vector has in common with the vocabulary as a whole.

    Attributes:
        mean: component along the direction of the mean, float32 ``[N, 1]``.
        energies: squared length along every other axis or group of axes, float32 ``[N, G - 1]``.
    """

    mean: torch.Tensor
    energies: torch.Tensor


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Token embeddings with their words.

    Attributes:
        table: float ``[V, H]``.
        text: token id → what it writes.
        axes: float32 ``[H, H]``, orthonormal: the direction of the mean, then principal axes, strongest first.
        groups: the group of each axis, int64 ``[H]``: 0 is the mean alone; then single axes, ``SINGLE_AXES`` or at most
            a quarter of H; then ``GROUPS`` of equal size.
    """

    table: torch.Tensor
    text: Callable[[int], str]
    axes: torch.Tensor = field(init=False, repr=False)
    groups: torch.Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        count, width = self.table.shape
        sample = self.table[torch.linspace(0, count - 1, min(count, _SAMPLE)).long()].float()
        mean = sample.mean(dim=0)
        direction = mean / mean.norm().clamp_min(1e-12)
        rest = sample - mean
        rest -= (rest @ direction)[:, None] * direction
        principal = torch.linalg.eigh(rest.T @ rest).eigenvectors.T.flip(0)[: width - 1]
        single = min(SINGLE_AXES, width // 4)
        behind = torch.arange(width - single) * GROUPS // (width - single)
        object.__setattr__(self, "axes", torch.cat([direction[None], principal]))
        object.__setattr__(self, "groups", torch.cat([torch.arange(single), single + behind]))

    @classmethod
    def of(cls, lm: Embedder) -> Vocabulary:
        """The tokens that a base model's tokenizer has; rows that only pad its table are left out."""
        tokenizer = lm.tokenizer

        def text(token: int) -> str:
            written = str(tokenizer.decode([token]))
            return written if "\ufffd" not in written else str(tokenizer.convert_ids_to_tokens(token))

        return cls(lm.embedding.detach()[: len(tokenizer)].cpu(), text)

    @property
    def size(self) -> int:
        """V."""
        return int(self.table.shape[0])

    def __getitem__(self, tokens: Sequence[int]) -> torch.Tensor:
        """Embeddings float32 ``[N, H]``."""
        return self.table[list(tokens)].float()

    def norms(self) -> torch.Tensor:
        """Norm of each embedding, float32 ``[V]``."""
        return torch.cat([part.norm(dim=1) for _, part in self._parts()])

    def _parts(self) -> Iterator[tuple[slice, torch.Tensor]]:
        for start in range(0, self.size, _CHUNK):
            rows = slice(start, start + _CHUNK)
            yield rows, self.table[rows].float()

    # --- the null ---------------------------------------------------------------------------------

    def profile(self, vectors: torch.Tensor) -> Profile:
        """The profile of vectors float32 ``[N, H]``."""
        along = vectors @ self.axes.T
        return Profile(along[:, :1], self._summed(along)[:, 1:])

    def _summed(self, along: torch.Tensor) -> torch.Tensor:
        """Energies float32 ``[N, G]``, above 0, of components ``[N, H]`` along the axes."""
        members = torch.nn.functional.one_hot(self.groups).float()  # a product with it is faster than index_add
        return (along.square() @ members).clamp_min_(1e-12)

    @cached_property
    def _of_table(self) -> Profile:
        found = [self.profile(part) for _, part in self._parts()]
        return Profile(torch.cat([each.mean for each in found]), torch.cat([each.energies for each in found]))

    def random_like(self, vectors: torch.Tensor, draws: int, seed: int) -> torch.Tensor:
        """Random vectors, draw ``d`` with norm and profile of vector ``d % N``.

        Args:
            vectors: float32 ``[N, H]``.
            draws: how many.
            seed: seeds them.

        Returns:
            float32 ``[draws, H]``.
        """
        generator = np.random.default_rng(seed)  # not torch's, whose stream a random initialisation may have used
        which = torch.arange(draws) % len(vectors)
        mean, energies = self.profile(vectors)
        noise = torch.from_numpy(generator.standard_normal((draws, vectors.shape[1]), dtype=np.float32))
        wanted = torch.cat([mean.square(), energies], dim=1)[which]
        noise *= (wanted / self._summed(noise)).sqrt()[:, self.groups]
        noise[:, 0] = mean[which, 0]  # its sign stays, too
        return noise @ self.axes

    def excess(self, vectors: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """By how many deviations of its null each vector's similarity with each target exceeds the null's mean.

        Args:
            vectors: float32 ``[N, H]``.
            targets: float32 ``[M, H]``, embeddings or means of some.

        Returns:
            float32 ``[N, M]``; for a given pair close to standard normal under the null.
        """
        return self._excess(vectors @ targets.T, self.profile(vectors), self.profile(targets))

    def _excess(self, dot: torch.Tensor, ours: Profile, theirs: Profile) -> torch.Tensor:
        """The same from dot products ``[N, M]``."""
        sizes = torch.bincount(self.groups)[1:]
        deviation = ((ours.energies / sizes) @ theirs.energies.T).rsqrt_()
        return deviation.mul_(torch.addmm(dot, ours.mean, theirs.mean.T, alpha=-1))

    # --- the nearest tokens -----------------------------------------------------------------------

    def nearest(
        self, vectors: torch.Tensor, k: int, measures: Sequence[str] = MEASURES
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """The ``k`` nearest tokens of each vector.

        Args:
            vectors: float32 ``[N, H]``.
            k: how many, at most V.
            measures: of ``MEASURES``.

        Returns:
            Measure → values float32 ``[N, k]`` (distances for ``euclidean``) and tokens int64 ``[N, k]``, nearest
            first.
        """
        best: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for rows, matrices in self._scans(vectors, measures):
            for name, matrix in matrices:
                values, tokens = matrix.topk(min(k, matrix.shape[1]), dim=1)
                tokens += rows.start
                if name in best:
                    values, order = torch.cat([best[name][0], values], dim=1).topk(k, dim=1)
                    tokens = torch.cat([best[name][1], tokens], dim=1).gather(1, order)
                best[name] = values, tokens
        return {name: (self._finished(name, vectors, best[name][0]), best[name][1]) for name in measures}

    def best(self, vectors: torch.Tensor) -> dict[str, torch.Tensor]:
        """The nearest token's value alone, for many vectors: measure → float32 ``[N]``."""
        found: dict[str, torch.Tensor] = {}
        for _, matrices in self._scans(vectors, MEASURES):
            for name, matrix in matrices:
                values = matrix.amax(dim=1, keepdim=True)
                found[name] = torch.maximum(found[name], values) if name in found else values
        return {name: self._finished(name, vectors, values)[:, 0] for name, values in found.items()}

    def _scans(
        self, vectors: torch.Tensor, measures: Sequence[str]
    ) -> Iterator[tuple[slice, Iterator[tuple[str, torch.Tensor]]]]:
        """For some tokens at a time, each measure as a matrix ``[N, tokens]`` that is larger where the token is nearer,
        in as few passes as that takes; ``_finished`` makes it what it is called."""
        ours = self.profile(vectors)

        def matrix(name: str, rows: slice, part: torch.Tensor, dot: torch.Tensor) -> torch.Tensor:
            if name == "cosine":
                lengths: torch.Tensor = part.norm(dim=1)
                return dot / lengths.clamp_min(1e-12)
            if name == "euclidean":
                return torch.add(-part.square().sum(dim=1), dot, alpha=2)
            if name == "excess":
                theirs = Profile(self._of_table.mean[rows], self._of_table.energies[rows])
                return self._excess(dot, ours, theirs)
            return dot

        for rows, part in self._parts():
            dot = vectors @ part.T
            yield rows, ((name, matrix(name, rows, part, dot)) for name in measures)

    @staticmethod
    def _finished(name: str, vectors: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        norms: torch.Tensor = vectors.norm(dim=1, keepdim=True)
        if name == "cosine":
            return values / norms.clamp_min(1e-12)
        return (norms.square() - values).clamp_min(0).sqrt() if name == "euclidean" else values

    def rank(self, vectors: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Where each vector's own target stands among all tokens by cosine: 1 if no token is nearer.

        Args:
            vectors: float32 ``[N, H]``.
            targets: float32 ``[N, H]``.

        Returns:
            int64 ``[N]``.
        """
        cosine = torch.nn.functional.cosine_similarity(vectors, targets, dim=1)
        units = vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-12)
        nearer = torch.zeros(len(vectors), dtype=torch.int64)
        for _, matrices in self._scans(units, ("cosine",)):
            for _, cosines in matrices:
                nearer += (cosines > cosine[:, None] + 1e-5).sum(dim=1)  # not the target itself, rounded otherwise
        return nearer + 1
