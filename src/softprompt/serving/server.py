"""HTTP over the engine: OpenAI's API, classification, loading and unloading, health and metrics."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib.resources import files as resources
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic_core import from_json
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from softprompt.errors import SoftPromptError
from softprompt.files import local_path
from softprompt.serving import openai_api as api
from softprompt.serving.answers import Answers, ClientGone, EventStream, chunks, while_connected
from softprompt.serving.catalog import Catalog
from softprompt.serving.gate import Gate
from softprompt.serving.inspector import Inspector
from softprompt.serving.jobs import Backend, Job, Piece, Refused, Scores
from softprompt.serving.openai_api import ApiError
from softprompt.serving.served import Model, Order, Wish
from softprompt.serving.telemetry import Metrics

log = logging.getLogger("softprompt.server")

MAX_BODY_BYTES = 2 << 20
"""The largest body of a request."""

WATCH_SECONDS = 1.0
"""How often files are looked at."""

_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_Result = TypeVar("_Result")

Endpoint = Callable[[Request], Awaitable[Response]]


def create_app(
    engine: Backend,
    catalog: Catalog,
    *,
    api_key: str | None = None,
    allow_loading: bool = False,
    watch: bool = False,
    files: Mapping[str, Path] | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
) -> ASGIApp:
    """The server as an ASGI application; the engine is closed when it shuts down.

    Args:
        engine: does the work.
        catalog: what is served.
        api_key: what clients must send as Bearer token; None: anyone may ask.
        allow_loading: whether clients may load and unload soft prompts.
        watch: whether to follow changes in files, as ``Catalog.sync`` does.
        files: with ``watch``, what to serve from which files; None: all of the store.
        max_body_bytes: the largest body of a request.
    """
    server = Server(engine, catalog, allow_loading)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        watching = asyncio.create_task(server.watch(files)) if watch else None
        yield
        if watching is not None:
            watching.cancel()
        await server.close()

    def post(path: str, endpoint: Endpoint) -> Route:
        return Route(path, endpoint, methods=["POST"])

    app = Starlette(
        routes=[
            post("/v1/completions", server.completions),
            post("/v1/chat/completions", server.chat),
            post("/v1/classify", server.classify),
            post("/v1/load_soft_prompt", server.load),
            post("/v1/unload_soft_prompt", server.unload),
            Route("/", server.page),
            Route("/health", server.health),
            Route("/metrics", server.metrics_text),
            Route("/v1/models", server.models),
            Route("/v1/models/{name:path}", server.model),
            Route("/v1/soft_prompts/{name:path}/inspection", server.inspection),
        ],
        exception_handlers={
            ApiError: _answer_error,
            HTTPException: _answer_error,
            Exception: _answer_error,
            ClientGone: lambda request, error: Response(status_code=499),
        },
        lifespan=lifespan,
    )
    return Gate(app, api_key, max_body_bytes)


class Server:
    """The endpoints."""

    def __init__(self, engine: Backend, catalog: Catalog, allow_loading: bool) -> None:
        self._engine = engine
        self._catalog = catalog
        self._allow_loading = allow_loading
        self._metrics = Metrics(engine, catalog.base.name)
        # The catalog is for one thread at a time, and long inputs must not hold up the event loop.
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reader")
        self._inspector = Inspector(catalog.base.lm)

    async def close(self) -> None:
        """Finishes what was taken."""
        await asyncio.get_running_loop().run_in_executor(None, self._engine.close)
        self._reader.shutdown()
        self._inspector.close()

    async def watch(self, files: Mapping[str, Path] | None) -> None:
        """Follows files until it is cancelled."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            try:
                report(await self._read(lambda: self._catalog.sync(files)))
            except SoftPromptError as error:
                log.warning(str(error))
            except Exception as error:  # whatever it is, the next look may find things in order
                log.error("the files could not be followed", exc_info=error)

    # --- looking ----------------------------------------------------------------------------------

    async def page(self, request: Request) -> Response:
        """The playground."""
        page = resources("softprompt.serving") / "playground.html"
        if not page.is_file():
            raise ApiError(404, "There is no page here; the API is at /v1.")
        return HTMLResponse(
            page.read_text(encoding="utf-8"),
            headers={"Content-Security-Policy": _PAGE_POLICY, "X-Content-Type-Options": "nosniff"},
        )

    async def health(self, request: Request) -> Response:
        """200 while requests are taken."""
        try:
            self._engine.check()
        except Refused as error:
            raise ApiError(503, str(error), code=error.code) from error
        return JSONResponse({"status": "ok"})

    async def metrics_text(self, request: Request) -> Response:
        """For Prometheus."""
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        """The base model and every soft prompt, and whether clients may load more of them."""
        entries = await self._read(self._catalog.entries)
        listed = api.model_list([entry.card for entry in entries])
        return JSONResponse({**listed, "allow_loading": self._allow_loading})

    async def model(self, request: Request) -> Response:
        """One of them."""
        name = request.path_params["name"]
        entry = await self._read(lambda: self._catalog.entry(name))
        return JSONResponse(entry.card)

    async def inspection(self, request: Request) -> Response:
        """What the vectors of a soft prompt show with the embedding table alone."""
        name = request.path_params["name"]
        entry = await self._read(lambda: self._catalog.entry(name))
        return JSONResponse(await self._inspector.views(entry))

    # --- writing ----------------------------------------------------------------------------------

    async def completions(self, request: Request) -> Response:
        """``POST /v1/completions``."""
        body = api.parse(api.CompletionRequest, await _document(request))
        model = await self._model(body.model)
        wish = _wish(body, body.max_tokens, body.logprobs)
        orders = await self._read(lambda: _completion_orders(model, body, wish))
        return await self._write(request, body, wish, model, orders, api.COMPLETION)

    async def chat(self, request: Request) -> Response:
        """``POST /v1/chat/completions``."""
        body = api.parse(api.ChatRequest, await _document(request))
        model = await self._model(body.model)
        if body.messages[-1].role != "user":
            raise ApiError(
                400,
                f"Expected a last message of the user, found one of the {body.messages[-1].role}; append one.",
                param="messages",
            )
        top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
        wish = _wish(body, body.max_completion_tokens or body.max_tokens, top_logprobs)
        order = await self._read(lambda: self._chat_order(model, body, wish))
        ignored = 0 if model.task is None or _converses(model, body) else len(body.messages) - 1
        return await self._write(request, body, wish, model, [order], api.CHAT, ignored_messages=ignored)

    async def _write(
        self,
        request: Request,
        body: api.CompletionRequest | api.ChatRequest,
        wish: Wish,
        model: Model,
        orders: Sequence[Order],
        form: api.Form,
        **more: object,
    ) -> Response:
        jobs = [order.choice(number) for order in orders for number in range(body.n or 1)]
        answers = self._submit(request, jobs, model.name)
        if model.content:
            more["system_fingerprint"] = f"sp-{model.content[:12]}"
        more["truncated"] = any(order.truncated for order in orders)
        id = form.prefix + request.scope["request_id"]
        noted = wish.top_logprobs is not None
        if body.stream:
            head = api.envelope(form.chunk_kind, id, model.name, **more)
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            return EventStream(chunks(answers, head, form, noted, body.n or 1, with_usage), answers)

        async def whole() -> Response:
            choices: dict[int, dict[str, Any]] = {}
            async for index, piece in answers.events():
                assert isinstance(piece, Piece)
                choices[index] = form.choice(index, piece.text, piece.tokens if noted else None, piece.finish)
            document = api.envelope(form.kind, id, model.name, **more)
            document["choices"] = [choice for _, choice in sorted(choices.items())]
            return JSONResponse({**document, "usage": answers.usage(body.n or 1)})

        try:
            return await while_connected(request.receive, whole())
        finally:
            answers.cancel()

    def _chat_order(self, model: Model, body: api.ChatRequest, wish: Wish) -> Order:
        if model.task is None:
            _refuse_own(body, model)
            return self._catalog.converse(model, body.messages, wish)
        if _converses(model, body):
            return self._catalog.converse(model, body.messages, wish, base_only=body.base_only)
        text = None if body.fields is not None else body.messages[-1].text
        return model.write(model.fields_of(text, body.fields, param="messages"), wish, base_only=body.base_only)

    # --- labels -----------------------------------------------------------------------------------

    async def classify(self, request: Request) -> Response:
        """``POST /v1/classify``: each input by each model, in the order of the inputs, then of the models."""
        body = api.parse(api.ClassifyRequest, await _document(request))
        models = [await self._model(name) for name in body.models]
        inputs = _inputs(body)
        asked = [(number, model) for number in range(len(inputs)) for model in models]

        def order(number: int, model: Model) -> Order:
            if model.task is None:
                raise ApiError(
                    400,
                    f"Expected soft prompts, found the base model {model.name!r}, which has no labels; name a soft "
                    f"prompt, with base_only to leave its numbers out.",
                    param="model",
                )
            fields = model.fields_of(*inputs[number], param="input")
            return model.label(fields, truncate=body.truncate, base_only=body.base_only)

        orders = await self._read(lambda: [order(*place) for place in asked])
        answers = self._submit(request, [order.job for order in orders], ",".join(body.models)[:200])

        async def whole() -> Response:
            found: dict[int, dict[str, Any]] = {}
            async for index, event in answers.events():
                assert isinstance(event, Scores)
                number, model = asked[index]
                found[index] = {
                    "index": number,
                    "model": model.name,
                    **_labelled(model, event, body.normalise_length),
                    "truncated": orders[index].truncated,
                    "content_hash": model.content,
                    "latency_ms": answers.latency_ms(index),
                }
            document = api.envelope("list", f"classify-{request.scope['request_id']}", body.models[0])
            document["data"] = [entry for _, entry in sorted(found.items())]
            return JSONResponse({**document, "usage": answers.usage(1)})

        try:
            return await while_connected(request.receive, whole())
        finally:
            answers.cancel()

    # --- loading ----------------------------------------------------------------------------------

    async def load(self, request: Request) -> Response:
        """``POST /v1/load_soft_prompt``: one of the store by name, or of a file."""
        self._require_loading()
        body = api.parse(api.LoadRequest, await _document(request))
        model = await self._read(lambda: self._loaded(body))
        report([(f"loaded {body.name}", None)])
        return JSONResponse(model.card)

    def _loaded(self, body: api.LoadRequest) -> Model:
        catalog = self._catalog
        if not body.load_inplace and body.name in {entry.name for entry in catalog.entries() if entry.path}:
            raise ApiError(
                400,
                f"The name {body.name!r} is served already; unload it first, or replace it with load_inplace.",
                param="name",
                code="already_loaded",
            )
        try:
            path = catalog.store.path(body.name)  # also refuses what is no name
            if body.path is not None:
                path = local_path(body.path)
            if not path.is_file():
                raise ApiError(404, f"There is no soft prompt at {path}; check name and path.", code="not_found")
            return catalog.load(body.name, path)
        except SoftPromptError as error:
            raise ApiError(400, str(error), param="name" if body.path is None else "path") from error

    async def unload(self, request: Request) -> Response:
        """``POST /v1/unload_soft_prompt``."""
        self._require_loading()
        body = api.parse(api.UnloadRequest, await _document(request))
        await self._read(lambda: self._catalog.unload(body.name))
        report([(f"unloaded {body.name}", None)])
        return JSONResponse({"id": body.name, "object": "model", "deleted": True})

    def _require_loading(self) -> None:
        if not self._allow_loading:
            raise ApiError(
                403,
                "Loading and unloading are off; start the server with --allow-loading if you trust all its clients.",
                code="loading_off",
            )

    # --- the way to the engine --------------------------------------------------------------------

    async def _model(self, name: str) -> Model:
        return await self._read(lambda: self._catalog.get(name))

    async def _read(self, work: Callable[[], _Result]) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._reader, work)

    def _submit(self, request: Request, jobs: Sequence[Job], name: str) -> Answers:
        answers = Answers(self._engine, self._metrics, jobs)
        tokens = sum(job.prompt_tokens for job in jobs)
        request.scope["log"].update(model=name, jobs=len(jobs), prompt_tokens=tokens, answers=answers)
        return answers


def report(done: Sequence[tuple[str, SoftPromptError | None]]) -> None:
    """Logs what became of soft prompts; see ``Catalog.sync``."""
    for what, error in done:
        if error is None:
            log.info(what)
        else:
            log.warning(str(error), extra={"fields": {"soft_prompt": what}})


# --- requests → orders -----------------------------------------------------------------------------------------------


def _wish(body: api.CompletionRequest | api.ChatRequest, max_tokens: int | None, top_logprobs: int | None) -> Wish:
    return Wish(
        max_tokens=max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        stop=body.stops,
        seed=body.seed,
        top_logprobs=top_logprobs,
        stream=bool(body.stream),
        truncate=body.truncate,
    )


def _completion_orders(model: Model, body: api.CompletionRequest, wish: Wish) -> list[Order]:
    prompts = body.prompt
    if model.task is None or body.raw:
        _refuse_own(body, model)
        if prompts is None:
            raise ApiError(400, "Expected a prompt, found none; give one.", param="prompt")
        if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
            return [model.write_raw(prompts, wish)]
        return [model.write_raw(prompt, wish) for prompt in _some(prompts)]  # type: ignore[arg-type]
    texts = _some(prompts) if isinstance(prompts, list) else [prompts]
    if not all(text is None or isinstance(text, str) for text in texts):
        raise ApiError(
            400, "Expected text for the template, found token ids; send text, or token ids with raw.", param="prompt"
        )
    fields = [model.fields_of(text, body.fields, param="prompt") for text in texts]  # type: ignore[arg-type]
    return [model.write(of_one, wish, base_only=body.base_only) for of_one in fields]


def _some(prompts: Sequence[_Result]) -> Sequence[_Result]:
    if not prompts:
        raise ApiError(400, "Expected at least one prompt, found an empty list; give one.", param="prompt")
    return prompts


def _converses(model: Model, body: api.ChatRequest) -> bool:
    """Whether a soft prompt continues the whole conversation, and not its last message in its own template."""
    return model.task is not None and model.chats and body.fields is None and len(body.messages) > 1


def _refuse_own(body: api.CompletionRequest | api.ChatRequest, model: Model) -> None:
    """Refuses what only means something to a soft prompt's own template."""
    for name in ("fields", "base_only"):
        if getattr(body, name):
            raise ApiError(
                400,
                f"Expected no {name} where no soft prompt's template is used, found it for {model.name!r}; "
                f"leave it out.",
                param=name,
            )


def _inputs(body: api.ClassifyRequest) -> list[tuple[str | None, dict[str, str] | None]]:
    if (body.input is None) == (body.fields is None):
        found = "neither" if body.input is None else "both"
        raise ApiError(400, f"Expected either input or fields, found {found}; give one of them.", param="input")
    if not body.models or body.input == [] or body.fields == []:
        raise ApiError(400, "Expected at least one model and one input, found an empty list; give one.", param="input")
    if body.fields is not None:
        return [(None, fields) for fields in (body.fields if isinstance(body.fields, list) else [body.fields])]
    return [(text, None) for text in (body.input if isinstance(body.input, list) else [str(body.input)])]


def _labelled(model: Model, scores: Scores, normalise: bool) -> dict[str, Any]:
    logprobs = model.label_logprobs(scores, normalise=normalise)
    values = torch.tensor(list(logprobs.values())).double().exp().tolist()
    probabilities = dict(zip(logprobs, values, strict=True))
    found = {"label": max(probabilities, key=probabilities.__getitem__), "probabilities": probabilities}
    if not model.members:
        return found
    each = zip(model.members, (scores.logprobs, *scores.others), strict=True)
    alone = {one.name: one.label_logprobs(Scores(of_words), normalise=normalise) for one, of_words in each}
    labels = {name: max(of_one, key=of_one.__getitem__) for name, of_one in alone.items()}
    differ = sum(label != found["label"] for label in labels.values())
    return {**found, "members": labels, "disagreement": differ / len(labels)}


async def _document(request: Request) -> object:
    """The JSON document of a request.

    The content type is required since a web page of another origin may send any other without asking first.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            400, f"Expected the content type application/json, found {kind[:60] or 'none'}; send JSON.", code="not_json"
        )
    try:
        return from_json(await request.body(), allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"Expected a JSON document as body, found an error ({error}); correct it.") from None


async def _answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        there = [f"{'/'.join(route.methods - {'HEAD'})} {route.path}" for route in request.app.routes]
        expected = ", ".join(there).replace("{name:path}", "NAME")
        found = f"{request.method} {request.url.path[:100]}"
        sentence = f"Expected one of {expected}, found {found} ({error.detail}); correct the address."
        error = ApiError(error.status_code, sentence)
    elif not isinstance(error, ApiError):
        error = ApiError(500, "The server failed; its log says why.")
    headers = {"Retry-After": "1"} if error.status == 503 else {}
    return JSONResponse(error.body, error.status, headers)
