"""Where a server listens, and the server that answers there."""

from __future__ import annotations

import socket
import threading
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import TYPE_CHECKING

from softprompt.errors import ConfigError

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp

WAITING_CONNECTIONS = 2048


def bound(host: str, port: int) -> socket.socket:
    """A socket of this address that does not listen yet; ask for it before loading a model, so that a port that is
    taken is known at once.

    Args:
        host: a name or address of this machine.
        port: 0 to 65535; 0: any that is free.

    Raises:
        ConfigError: the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ConfigError(
            f"Expected a free address, found {host}:{port}, which cannot be listened on: {error.strerror or error}; "
            f"choose another --host or --port."
        ) from error
    return listener


def url_of(host: str, listener: socket.socket) -> str:
    """The address as a browser takes it."""
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.getsockname()[1]}"


def is_local(host: str) -> bool:
    """Whether only this machine reaches an address."""
    return host == "localhost" or host == "::1" or host.startswith("127.")


def http_server(app: ASGIApp, seconds: float) -> uvicorn.Server:
    """What answers: uvicorn, without its own log, which waits for requests that have begun.

    Args:
        app: the application.
        seconds: the most that a request may take.
    """
    import uvicorn

    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="on",
        ws="none",
        timeout_graceful_shutdown=int(seconds) + 5,
    )
    return uvicorn.Server(config)


class RunningServer:
    """A server that answers in a thread of its own until it is closed; also a context manager that closes it.

    Attributes:
        url: its address, such as ``http://127.0.0.1:8000``.
    """

    def __init__(
        self, app: ASGIApp, listener: socket.socket, host: str, seconds: float, files: TemporaryDirectory[str]
    ) -> None:
        self.url = url_of(host, listener)
        self._files = files
        self._server = http_server(app, seconds)
        listener.listen(WAITING_CONNECTIONS)
        self._thread = threading.Thread(
            target=self._server.run, args=([listener],), name="softprompt-server", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Waits until the server ends; Ctrl-C closes it."""
        try:
            while self._thread.is_alive():
                self._thread.join(0.5)  # a join without an end would not hear Ctrl-C on every system
        except KeyboardInterrupt:
            pass
        self.close()

    def close(self) -> None:
        """Ends the server when the requests that have begun are answered."""
        self._server.should_exit = True
        self._thread.join()
        self._files.cleanup()

    def __enter__(self) -> RunningServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<RunningServer {self.url}>"
