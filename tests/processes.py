"""Several processes that share work, as ``torchrun`` starts them, for tests."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

SECONDS = 120


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def become(rank: int, size: int, port: int) -> None:
    """The environment that ``torchrun`` gives a process."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, **where, "GLOO_SOCKET_IFNAME": "lo"}
    os.environ.update({name: str(value) for name, value in given.items()})


def _one(
    rank: int, size: int, port: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    become(rank, size, port)
    import torch

    torch.set_num_threads(1)
    try:
        found: Any = function(*arguments)
    except BaseException:
        found = traceback.format_exc()
        raise
    finally:
        Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def together(
    spawn: Callable[..., Any],
    size: int,
    folder: Path,
    function: Callable[..., Any],
    *arguments: Any,
    killed: Collection[int] = (),
) -> list[Any]:
    """What a test module's function returns in each of ``size`` processes; None for those that are killed."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    started = [spawn(_one, rank, size, port, str(folder), function, arguments) for rank in range(size)]
    for process in started:
        process.join(SECONDS)
    found: list[Any] = []
    for rank, process in enumerate(started):
        if process.exitcode is None:
            process.kill()
        if rank in killed:
            assert process.exitcode == -signal.SIGKILL
            found.append(None)
            continue
        path = folder / f"{rank}.pickle"
        value = pickle.loads(path.read_bytes()) if path.exists() else "nothing"
        assert process.exitcode == 0, f"process {rank}: {value}"
        found.append(value)
    return found
