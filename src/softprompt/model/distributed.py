"""The processes that share a run's work, as ``torchrun`` starts them.

Every process does the same, in the same order, on its share of the rows. What they found is put together, so that all
of them go on with the same numbers. The first one alone writes. PyTorch's own engine carries it all: gloo between CPUs,
NCCL between GPUs.

Importing this module loads no torch.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from softprompt.errors import ConfigError, ProcessError, SoftPromptError

if TYPE_CHECKING:
    import torch

Shard = Literal["none", "fsdp", "tp"]
"""What each process holds of the base model: all of it, a part of each layer's weights that are put together when the
layer runs (FSDP2), or some heads and neurons of each layer (tensor parallel)."""

T = TypeVar("T")

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched() -> bool:
    """Whether this process was started as one of several."""
    return all(name in os.environ for name in _VARIABLES) and os.environ["WORLD_SIZE"] not in ("", "1")


def is_first() -> bool:
    """Whether this process is the one that writes; so is one that was started alone."""
    return not launched() or os.environ["RANK"] == "0"


@dataclass(frozen=True)
class World:
    """The processes that share the work on one base model.

    Attributes:
        rank: this process's number, from 0.
        size: how many there are.
        shard: what each holds of the base model.
    """

    rank: int = 0
    size: int = 1
    shard: Shard = "none"

    @classmethod
    def join(cls, shard: Shard = "none") -> World:
        """The processes that this one was started with; itself alone where it was not started by ``torchrun``.

        Raises:
            ConfigError: it is alone, and is to hold a part of a base model.
            ProcessError: the others cannot be reached.
        """
        if not launched():
            if shard != "none":
                raise ConfigError(
                    f"--shard {shard} divides a base model over several processes, but there is one; start them with "
                    "`torchrun --nproc-per-node N -m softprompt …`, or leave the option out."
                )
            return cls()
        from torch import distributed

        if not distributed.is_initialized():
            _connect()
        return cls(distributed.get_rank(), distributed.get_world_size(), shard)

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes files."""
        return self.rank == 0

    @property
    def divides_scoring(self) -> bool:
        """Whether rows to be scored or continued are divided. Where weights are in parts, all processes run each layer
        together, and the passes of a score or a text are not as many for some rows as for others."""
        return self.size > 1 and self.shard == "none"

    @property
    def divides_steps(self) -> bool:
        """Whether the rows of a step are divided."""
        return self.size > 1 and self.shard != "tp"

    def deal(self, lengths: Sequence[int]) -> list[list[int]]:
        """Divides rows: by number as evenly as can be, and of each length about as many to each.

        Args:
            lengths: of the rows, in tokens.

        Returns:
            For each process, the places of its rows in ascending order; the same in all processes.
        """
        dealt: list[list[int]] = [[] for _ in range(self.size)]
        for turn, row in enumerate(sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))):
            time, place = divmod(turn, self.size)
            dealt[self.size - 1 - place if time % 2 else place].append(row)
        return [sorted(rows) for rows in dealt]

    def add_up(self, tensor: torch.Tensor) -> None:
        """Makes a tensor the sum of all processes' own, the same bits in each."""
        if self.size > 1:
            from torch import distributed

            with noticing_loss():
                distributed.all_reduce(tensor)

    def follow_first(self, tensor: torch.Tensor) -> None:
        """Makes a tensor the first process's."""
        if self.size > 1:
            from torch import distributed

            with noticing_loss():
                distributed.broadcast(tensor, src=0)

    def each(self, find: Callable[[], T]) -> list[T]:
        """What each process finds, by their numbers.

        Raises:
            SoftPromptError: one of them found a mistake, which all raise.
        """
        if self.size == 1:
            return [find()]
        from torch import distributed

        found: list[Any] = [None] * self.size
        with noticing_loss():
            distributed.all_gather_object(found, _tried(find))
        for _, error in found:
            if error is not None:
                raise error
        return [value for value, _ in found]

    def from_first(self, find: Callable[[], T]) -> T:
        """What the first process finds, which alone looks: for what lies in files.

        Raises:
            SoftPromptError: it found a mistake, which all raise.
        """
        if self.size == 1:
            return find()
        from torch import distributed

        found: list[Any] = [_tried(find) if self.rank == 0 else None]
        with noticing_loss():
            distributed.broadcast_object_list(found, src=0)
        value, error = found[0]
        if error is not None:
            raise error
        return value  # type: ignore[no-any-return]

    def alone(self, find: Callable[[], T]) -> T:
        """What the first process finds while the others wait, however long that takes: for what cannot be divided.

        Raises:
            SoftPromptError: it found a mistake, which all raise.
        """
        if self.size == 1:
            return find()
        from datetime import timedelta

        from torch.distributed import distributed_c10d

        store: Any = distributed_c10d._get_default_store()
        key = f"softprompt/alone/{next(_ALONE)}"
        found: tuple[Any, SoftPromptError | None] = (None, None)
        with noticing_loss():
            if self.rank == 0:
                found = _tried(find)
                store.set(key, "done")
            while self.rank and not store.check([key]):  # what all do at once would not wait for more than minutes
                try:
                    store.wait([key], timedelta(seconds=10))
                except RuntimeError as error:
                    if "timeout" not in str(error).lower():
                        raise

        def told() -> T:
            value, error = found
            if error is not None:
                raise error
            return value  # type: ignore[no-any-return]

        return self.from_first(told)


_ALONE = itertools.count()


def _tried(find: Callable[[], Any]) -> tuple[Any, SoftPromptError | None]:
    try:
        return find(), None
    except SoftPromptError as error:
        return None, error


ALONE = World()


def own_device(name: str) -> str:
    """The device that a process of several takes for ``auto`` and ``cuda``: the GPU of its number on this machine.

    Raises:
        ConfigError: there are fewer GPUs than processes on this machine.
    """
    if not launched() or name not in ("auto", "cuda"):
        return name
    import torch

    if not torch.cuda.is_available():
        return name
    number, there = _local_rank(), torch.cuda.device_count()
    if number >= there:
        raise ConfigError(
            f"Each process on a machine needs a GPU of its own, but there are {there} for process {number + 1}; start "
            f"torchrun with --nproc-per-node {there}, or give --device cpu."
        )
    return f"cuda:{number}"


def leave() -> None:
    """Takes leave of the others, if there are any."""
    if launched():
        from torch import distributed

        if distributed.is_initialized():
            distributed.destroy_process_group()


_MISTAKE = "softprompt/mistake"


def is_to_say(mistake: SoftPromptError) -> bool:
    """Whether this process is to say a mistake. The first one does, and lets the others know; another one does where
    the first has none but that it has lost a process."""
    if not launched():
        return True
    from datetime import timedelta

    from torch import distributed

    if not distributed.is_initialized():
        return is_first()
    from torch.distributed import distributed_c10d

    store: Any = distributed_c10d._get_default_store()
    lost = isinstance(mistake, ProcessError)
    try:
        if is_first():
            store.set(_MISTAKE, "lost" if lost else "said")
            return True
        if lost:
            return False
        store.wait([_MISTAKE], timedelta(seconds=3))
        return bool(store.get(_MISTAKE) == b"lost")
    except RuntimeError:  # the first process says nothing, or is gone
        return True


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def _connect() -> None:
    import torch
    from torch import distributed

    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        if _local_rank() < torch.cuda.device_count():
            torch.cuda.set_device(_local_rank())
    try:
        distributed.init_process_group(backend)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ProcessError(
            f"Process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} does not reach the others at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} ({reason}); check that all of them were started, "
            "with the same address, and that the port is open."
        ) from error


@contextmanager
def noticing_loss() -> Iterator[None]:
    """Inside, that another process is lost is a ``ProcessError``: what all processes do at once fails in each then."""
    try:
        yield
    except RuntimeError as error:
        if not (launched() and _LOST.search(str(error))):
            raise
        reason = str(error).splitlines()[0].split("] ")[-1].split(". ")[0][:160]
        raise ProcessError(
            f"Another process of this run was lost ({reason}), so it ends here; a training's checkpoint stays: "
            "give the same command with --resume and any number of processes."
        ) from error


_LOST = re.compile(r"\bgloo\b|\bNCCL\b|TCPStore|Connection (closed|reset|refused)|Broken pipe|Socket", re.IGNORECASE)
"""What gloo, NCCL and the store of the processes' addresses say then."""
