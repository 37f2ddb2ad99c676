"""``softprompt serve``: options → engine, catalog and server, until a signal ends it."""

from __future__ import annotations

import logging
import re
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

from softprompt.cli.options import Device, Dtype, Trust, flag, load_base_model, model_option, option
from softprompt.data.packages import DEFAULT_BASE
from softprompt.errors import ConfigError
from softprompt.serving import listening
from softprompt.serving.engine import Engine
from softprompt.serving.jobs import Backend, Limits
from softprompt.soft_prompts import artifact
from softprompt.soft_prompts.store import Store
from softprompt.terminal.console import stdout

_L = Limits()
_door = partial(option, panel="Who may ask")
_limit = partial(option, panel="Limits")
_upstream = partial(option, panel="Servers elsewhere")

log = logging.getLogger("softprompt.server")


def serve_command(
    prompts: Annotated[
        list[str] | None, option("Names in the store or paths; all: the store's of this base model.", "all")
    ] = None,
    watch: Annotated[bool, flag("--watch", "Follow the files that are served, and with all the whole store.")] = False,
    host: Annotated[str, _door("The address to listen on.", "127.0.0.1")] = "127.0.0.1",
    port: Annotated[int, _door("0: any that is free.", 8000, min=0, max=65535, metavar="<int>")] = 8000,
    api_key: Annotated[
        str | None,
        _door(
            "What clients must send as Bearer token; better given as $SOFTPROMPT_API_KEY.", envvar="SOFTPROMPT_API_KEY"
        ),
    ] = None,
    allow_loading: Annotated[
        bool, flag("--allow-loading", "Let clients load and unload soft prompts.", panel="Who may ask")
    ] = False,
    max_rows: Annotated[int, _limit("The most requests in one forward pass, or at one upstream.", _L.rows)] = _L.rows,
    max_tokens: Annotated[
        int, _limit("Tokens of keys and values: rows times the longest; one request's most.", _L.tokens)
    ] = _L.tokens,
    max_waiting: Annotated[int, _limit("Requests that wait; more get 503.", _L.waiting)] = _L.waiting,
    time_limit: Annotated[float, _limit("Seconds that a request may take.", _L.seconds)] = _L.seconds,
    prefix_cache: Annotated[int, _limit("MiB of computed prefixes to keep.", _L.prefix_bytes >> 20)] = (
        _L.prefix_bytes >> 20
    ),
    base: Annotated[
        str | None, model_option("The frozen model.", f"that of the first of --prompts, else {DEFAULT_BASE}")
    ] = None,
    backend: Annotated[str, _upstream("What computes: local, or vllm for servers elsewhere.", "local")] = "local",
    upstream: Annotated[
        list[str] | None, _upstream("URLs of vLLM servers of the base model, started with --enable-prompt-embeds.")
    ] = None,
    upstream_api_key: Annotated[
        str | None,
        _upstream(
            "What they want as Bearer token; better given as $SOFTPROMPT_UPSTREAM_API_KEY.",
            envvar="SOFTPROMPT_UPSTREAM_API_KEY",
        ),
    ] = None,
    block_size: Annotated[
        int, _upstream("Their --block-size: a warning says which soft prompts do not fill it.", 16, min=1)
    ] = 16,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Serve the base model and soft prompts on it over OpenAI's API; a request's model names the soft prompt.

    Requests of different soft prompts share each forward pass. SIGTERM: what has begun is finished.

    \b
    softprompt serve
    softprompt serve --prompts sst2 news --port 8080 --watch
    softprompt serve --backend vllm --upstream http://gpu1:8000 http://gpu2:8000
    curl localhost:8000/v1/classify -H 'Content-Type: application/json' \\
        -d '{"model": "sst2", "input": "a stirring film"}'
    """
    try:
        import uvicorn  # noqa: F401

        from softprompt.serving import server, telemetry
        from softprompt.serving.catalog import Catalog

        if backend == "vllm":
            from softprompt.serving.upstream import Upstreams, check_model
    except ImportError as error:
        raise ConfigError(
            f'Serving needs the library {error.name}, which is not installed; pip install "softprompt[serve]".'
        ) from error
    limits = Limits(
        rows=max_rows, tokens=max_tokens, waiting=max_waiting, seconds=time_limit, prefix_bytes=prefix_cache << 20
    )
    if api_key is not None and not api_key.strip():
        raise ConfigError("The API key is blank; give another one, or none to let anyone ask.")
    _check_upstreams(backend, upstream)
    store = Store()
    everything = prompts is None or "all" in prompts
    chosen = _chosen(store, [one for one in prompts or () if one != "all"], everything)
    first = next(iter(chosen.values()), None)
    listener = listening.bound(host, port)
    if backend == "vllm":  # only embeds: vLLM rounds to its own dtype, and twice would be once too often
        dtype, device = ("fp32" if dtype == "auto" else dtype), "cpu"
    lm = load_base_model(
        base or (artifact.load(first).base if first else DEFAULT_BASE), dtype, device, trust_remote_code
    )

    telemetry.log_as_json()
    upstreams: Backend | None = None
    if backend == "vllm":
        lm.keep_embedding_only()
        upstreams = Upstreams(lm, upstream or (), limits, api_key=upstream_api_key)
        catalog = Catalog(lm, store, upstreams.window, check=partial(check_model, block_size))
    else:
        catalog = Catalog(lm, store, limits.window(lm))
    for name, path in chosen.items():
        catalog.load(name, path)
    if everything:
        server.report(catalog.sync())
    if api_key is None and not listening.is_local(host):
        log.warning(f"no API key: anyone who reaches {host} may use this server; set one with --api-key")
    app = server.create_app(
        upstreams or Engine(lm, limits),
        catalog,
        api_key=api_key,
        allow_loading=allow_loading,
        watch=watch,
        files=None if everything else chosen,
    )
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
