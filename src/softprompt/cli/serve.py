"""``softprompt serve``: options → engine, catalog and server, until a signal ends it."""

from __future__ import annotations

import logging
import re
import signal
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprompt.cli.groups import Door, Elsewhere
from softprompt.cli.options import Loading
from softprompt.data.packages import DEFAULT_BASE
from softprompt.errors import ConfigError, missing_library
from softprompt.model.embedder import Embedder
from softprompt.model.frozen import FrozenLM
from softprompt.serving import listening
from softprompt.serving.engine import Engine
from softprompt.serving.jobs import Backend
from softprompt.serving.limits import Limits
from softprompt.soft_prompts import artifact
from softprompt.soft_prompts.store import Store
from softprompt.tasks.votes import chosen_vote
from softprompt.terminal.console import stdout

if TYPE_CHECKING:
    from softprompt.serving.catalog import Catalog

log = logging.getLogger("softprompt.server")


@dataclass(frozen=True)
class Together:
    """What is answered together.

    Attributes:
        ensembles: each ``NAME=A,B,C``.
        vote: how they vote; None: by the mean.
    """

    ensembles: Sequence[str]
    vote: str | None

    def by_name(self) -> dict[str, list[str]]:
        """The members of each.

        Raises:
            ConfigError: not of that form, or two of one name, or a vote without an ensemble.
        """
        found: dict[str, list[str]] = {}
        for text in self.ensembles:
            name, _, members = text.partition("=")
            if not name or "," not in members or name in found:
                what = "two of one name" if name in found else repr(text)
                raise ConfigError(f"Expected NAME=A,B,C with at least two members as --ensemble, found {what}.")
            found[name] = [member.strip() for member in members.split(",")]
        if self.vote is not None and not found:
            raise ConfigError("--vote is for --ensemble, of which none was given; leave it out, or give one.")
        chosen_vote(self.vote, labels=True)
        return found


def serve(
    prompts: Sequence[str] | None,
    together: Together,
    watch: bool,
    door: Door,
    limits: Limits,
    base: str | None,
    elsewhere: Elsewhere,
    loading: Loading,
) -> None:
    """Serves until a signal ends it.

    Raises:
        ConfigError: a library is missing, the address is taken, or options contradict each other.
        SoftPromptError: a soft prompt or the base model cannot be loaded.
    """
    _require_libraries(elsewhere.backend)
    if door.api_key is not None and not door.api_key.strip():
        raise ConfigError("The API key is blank; give another one, or none to let anyone ask.")
    _check_upstreams(elsewhere.backend, elsewhere.upstream)
    if elsewhere.backend == "vllm" and loading.precision:
        raise ConfigError(
            "--quantize is for --backend local, where softprompt computes; leave it out, and start vLLM with a "
            "quantised model."
        )
    ensembles = together.by_name()
    store = Store()
    everything = prompts is None or "all" in prompts
    chosen = _chosen(store, [one for one in prompts or () if one != "all"], everything)
    first = next(iter(chosen.values()), None)
    listener = listening.bound(door.host, door.port)
    if elsewhere.backend == "vllm":  # only embeds: vLLM rounds to its own dtype, and twice would be once too often
        loading = replace(loading, dtype="fp32" if loading.dtype == "auto" else loading.dtype, device="cpu")
    lm = loading.load(base or (artifact.read_header(first).base if first else DEFAULT_BASE))

    from softprompt.serving import server, telemetry

    telemetry.log_as_json()
    backend, catalog = _backend(lm, store, limits, elsewhere)
    for name, path in chosen.items():
        catalog.load(name, path)
    if everything:
        server.report(catalog.sync())
    _join(catalog, ensembles, together.vote)
    if door.api_key is None and not listening.is_local(door.host):
        log.warning(f"no API key: anyone who reaches {door.host} may use this server; set one with --api-key")
    app = server.create_app(
        backend,
        catalog,
        api_key=door.api_key,
        allow_loading=door.allow_loading,
        watch=watch,
        files=None if everything else chosen,
    )
    _listen(app, listener, door.host, limits)


def _join(catalog: Catalog, ensembles: Mapping[str, Sequence[str]], vote: str | None) -> None:
    served = {entry.name for entry in catalog.entries() if entry.path is not None}
    for name, members in ensembles.items():
        if unknown := [one for one in members if one not in served]:
            raise ConfigError(
                f"Expected names of served soft prompts in the ensemble {name!r}, found {unknown[0]!r}; add it to "
                f"--prompts, or see `softprompt list`."
            )
        catalog.join(name, members, vote)


def _require_libraries(backend: str) -> None:
    try:
        for module in ("uvicorn", "softprompt.serving.server", *["softprompt.serving.upstream"] * (backend == "vllm")):
            import_module(module)
    except ImportError as error:
        raise missing_library("Serving", error.name, "softprompt[serve]") from error


def _backend(lm: FrozenLM, store: Store, limits: Limits, elsewhere: Elsewhere) -> tuple[Backend, Catalog]:
    """What computes, and what is served with it."""
    from softprompt.serving.catalog import Catalog

    if elsewhere.backend == "local":
        return Engine(lm, limits), Catalog(lm, store, limits.window(lm))
    if lm.encoder_decoder:
        raise ConfigError(f"vLLM serves no encoder-decoders such as {lm.name}; serve it with --backend local.")
    if lm.reads_parts:
        raise ConfigError(
            f"vLLM is handed embeddings alone, and the layers of {lm.name} get more of each token; serve it with "
            "--backend local."
        )
    from softprompt.serving.upstream import Upstreams, check_model

    embedder = Embedder.of(lm, own_table=True)
    upstreams = Upstreams(embedder, elsewhere.upstream or (), limits, api_key=elsewhere.upstream_api_key)
    return upstreams, Catalog(embedder, store, upstreams.window, check=partial(check_model, elsewhere.block_size))


def _listen(app: Any, listener: socket.socket, host: str, limits: Limits) -> None:
    """Answers requests until a signal comes, and what has begun then."""
    # uvicorn drains on SIGTERM and then raises it again, which would end us with 143
    signal.signal(signal.SIGTERM, lambda *_: None)
    listener.listen(listening.WAITING_CONNECTIONS)
    stdout.print(f"listening on {listening.url_of(host, listener)}")
    stdout.file.flush()
    listening.http_server(app, limits.seconds).run(sockets=[listener])


def _check_upstreams(backend: str, upstream: Sequence[str] | None) -> None:
    if backend not in ("local", "vllm"):
        raise ConfigError(f"--backend must be local or vllm, not {backend!r}")
    if (backend == "vllm") != bool(upstream):
        found = "none" if backend == "vllm" else "some without it"
        raise ConfigError(f"Expected URLs of vLLM servers as --upstream with --backend vllm, found {found}; give both.")
    for url in upstream or ():
        if not re.fullmatch(r"https?://[^/?#\s]+(/[^?#\s]*)?", url):
            raise ConfigError(f"Expected a URL such as http://host:8000 as --upstream, found {url!r}; correct it.")


def _chosen(store: Store, prompts: Sequence[str], everything: bool) -> dict[str, Path]:
    """The files of ``--prompts`` by what they are called in requests: their names without suffix.

    Args:
        store: where names are looked up.
        prompts: names and paths.
        everything: whether all of the store is served beside them.

    Raises:
        StoreError: there is no such name in the store.
        ConfigError: two files would be called the same.
    """
    known = {name: store.path(name) for name in store.names()} if everything else {}
    chosen = {}
    for one in prompts:
        path = store.find(one)
        name = path.name.removesuffix(artifact.SUFFIX)
        other = known.setdefault(name, path)
        if path.resolve() != other.resolve():
            raise ConfigError(
                f"Expected files of different names as --prompts, found {other} and {path}, which would both be served "
                f"as {name!r}; rename one of them."
            )
        chosen[name] = other
    return chosen
