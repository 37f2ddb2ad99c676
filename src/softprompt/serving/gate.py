"""What every request passes on both sides of the endpoints: an id, the key, the limit on bodies, a line in the log."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import re
import time
import uuid
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from softprompt.serving.answers import ClientGone
from softprompt.serving.openai_api import ApiError

log = logging.getLogger("softprompt.server")

_OPEN = frozenset({"/", "/health", "/metrics"})
"""What needs no key: none of them tells a task's texts or numbers, and the page at ``/`` asks for the key."""

LINGER = 2.0
"""Seconds for which the rest of a body that is too large is read and thrown away."""

_REQUEST_ID = re.compile(r"[\w.:-]{1,100}", re.ASCII)


class Gate:
    """What every request passes: an id, the key, the limit on bodies, and its line in the log."""

    def __init__(self, app: ASGIApp, api_key: str | None, max_body_bytes: int) -> None:
        self._app = app
        self._key = None if api_key is None else _hashed(api_key)
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {key.lower(): value for key, value in scope["headers"]}
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        scope["request_id"] = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        line: dict[str, Any] = {"status": 499}
        scope["log"] = line
        began = time.monotonic()

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                line["status"] = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", scope["request_id"].encode())]
            await send(message)

        try:
            refusal = self._refusal(scope["path"], headers)
            if refusal is not None:
                await _refuse(refusal, receive, tell)
            else:
                await self._app(scope, self._limited(receive), tell)
        except ClientGone:
            line["status"] = 499
        finally:
            _log_request(scope, line, began)

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> ApiError | None:
        if self._key is not None and path not in _OPEN:
            scheme, _, token = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
            if not hmac.compare_digest(_hashed(token.strip()), self._key) or scheme.lower() != "bearer":
                return ApiError(
                    401,
                    "Expected a valid API key as Bearer token, found none or another; send it.",
                    code="invalid_api_key",
                )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_body_bytes:
            return self._too_large()
        return None

    def _limited(self, receive: Receive) -> Receive:
        """``receive`` that counts: a body may come in chunks, without a length."""
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._max_body_bytes:
                raise self._too_large()
            return message

        return counted

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"Expected a body of at most {self._max_body_bytes:,} bytes, found a larger one; send less at a time."
        )


async def _refuse(refusal: ApiError, receive: Receive, tell: Send) -> None:
    """Answers without the application. A body that is too large is not waited for, but what comes of it meanwhile is
    read: to close on data that nobody has read resets the connection, and the client may never see the answer."""
    unread = refusal.status == 413
    headers = {"Connection": "close"} if unread else {"WWW-Authenticate": "Bearer"}
    answer = JSONResponse(refusal.body, refusal.status, headers)
    await tell({"type": "http.response.start", "status": answer.status_code, "headers": answer.raw_headers})
    await tell({"type": "http.response.body", "body": answer.body, "more_body": unread})
    if unread:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(_discard(receive), LINGER)
        await tell({"type": "http.response.body"})


async def _discard(receive: Receive) -> None:
    while (await receive()).get("more_body", False):
        pass


def _hashed(key: str) -> bytes:
    """Equally long whatever the key, so that comparing tells nothing of its length."""
    return hashlib.sha256(key.encode()).digest()


def _log_request(scope: Scope, line: dict[str, Any], began: float) -> None:
    answers = line.pop("answers", None)
    fields = {
        "request_id": scope["request_id"],
        "method": scope["method"],
        "path": scope["path"],
        "status": line.pop("status"),
        "ms": round(1000 * (time.monotonic() - began), 1),
        **line,
    }
    if answers is not None:
        fields["completion_tokens"] = answers.generated
    level = logging.DEBUG if scope["path"] in ("/health", "/metrics") else logging.INFO
    log.log(level, "request", extra={"fields": fields})
