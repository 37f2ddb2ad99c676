"""Requests to the Hugging Face Hub: what comes is untrusted and bounded, what goes wrong is one sentence, and no
sentence holds a token.

What is read goes through :func:`chunks` and not through the library's own downloads, which read whatever a server
sends. What is written goes through the library, inside :func:`asking` and :func:`bounded_writes`.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from huggingface_hub import get_session, get_token
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, validate_repo_id  # type: ignore[attr-defined]

from softprompt.errors import HubError, SoftPromptError

ENDPOINT = "https://huggingface.co"
"""Where the Hub is, unless ``$HF_ENDPOINT`` names another place."""

MAX_LISTING_BYTES = 4 << 20
"""The most that is read of what the Hub says of a repository."""

SECONDS = 30.0
"""How long the Hub may be silent."""

WRITE_SECONDS = 120.0
"""How long it may be silent while something is written there: it looks at the files before it answers."""

PATIENCE = 60.0
"""How many seconds more than at the slowest speed something may take."""

SLOWEST = 1000
"""The least bytes a second: a server that drips would never end."""

_REDIRECTS = 5
_COMMIT = re.compile(r"[0-9a-f]{7,64}")
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def endpoint() -> str:
    """The Hub's address, from ``$HF_ENDPOINT`` at this moment: the library looks only when it is imported.

    Raises:
        HubError: it is no address of the web.
    """
    address = (os.environ.get("HF_ENDPOINT") or ENDPOINT).rstrip("/")
    if urlsplit(address).scheme not in ("http", "https") or not urlsplit(address).hostname:
        raise HubError("Expected an address such as https://huggingface.co in HF_ENDPOINT, found another; correct it.")
    return address


def page_of(repo: str) -> str:
    """The address of a repository for people."""
    parts = urlsplit(endpoint())
    return f"{parts.scheme}://{_host(endpoint())}{parts.path}/{repo}"


def require_repo(repo: str) -> None:
    """Refuses what is no ``USER/REPO``.

    Raises:
        HubError: that.
    """
    try:
        validate_repo_id(repo)
        sound = repo.isascii() and repo.count("/") == 1
    except HFValidationError:
        sound = False
    if not sound:
        raise HubError(
            f"Expected a repository of the Hub as USER/REPO, of letters, digits, '-', '_' and '.', found "
            f"{repo[:100]!r}; correct it."
        )


def require_login() -> None:
    """Refuses to begin what needs the Hub and a login where one of them is missing.

    Raises:
        HubError: that.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise _offline()
    if not _token():
        raise HubError(f"Expected a login of the Hub that may write, found none; {_LOG_IN}.")


def _token() -> str | None:
    """The login, if there is one; what cannot be sent would be shown by the library that refuses to send it."""
    token = get_token()
    if token and not re.fullmatch(r"[!-~]+", token):
        raise HubError(f"Expected a login of the Hub of letters, digits and '_', found another; {_LOG_IN}.")
    return token


@contextmanager
def asking(repo: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes one sentence; the library raises many things at an answer that is not what it
    expects.

    Raises:
        HubError: the Hub cannot be reached, refuses, or answers nonsense.
    """
    try:
        yield
    except SoftPromptError:
        raise
    except Exception as error:  # and without the chain of causes, which may hold a token
        raise _sentence(repo, error) from None


@contextmanager
def bounded_writes() -> Iterator[None]:
    """The library's own requests inside end after ``WRITE_SECONDS`` of silence; by themselves they would wait forever.
    What it asks elsewhere in the process keeps the timeout that it has."""
    session: Any = get_session()
    before, session.timeout = session.timeout, WRITE_SECONDS
    try:
        yield
    finally:
        session.timeout = before


def listing(repo: str, revision: str | None = None) -> dict[str, Any]:
    """What the Hub says of a repository.

    Args:
        repo: ``USER/REPO``.
        revision: a branch, tag or commit; None: the main branch.

    Returns:
        ``commit``: its commit, or None in an empty repository; ``private``; ``files``: name → bytes, None where the Hub
        does not say.

    Raises:
        HubError: there is no such repository or revision, or the answer is not what the Hub says.
    """
    place = f"/api/models/{repo}" + ("" if revision is None else f"/revision/{quote(revision, safe='')}")
    with closing(chunks(repo, f"{place}?blobs=true", f"the list of files of {repo}", most=MAX_LISTING_BYTES)) as body:
        content = b"".join(body)
    try:
        document = json.loads(content)
        commit, private = document.get("sha"), document.get("private", False)
        files = {entry["rfilename"]: entry.get("size") for entry in document.get("siblings") or ()}
        sound = isinstance(private, bool) and all(
            isinstance(name, str) and (size is None or (type(size) is int and size >= 0))
            for name, size in files.items()
        )
        if not sound or not (commit is None or _COMMIT.fullmatch(commit)):
            raise ValueError("fields of other types")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise HubError(
            f"Expected a list of the files of {repo}, found another answer of {_host(endpoint())}; check HF_ENDPOINT, "
            f"or try again later."
        ) from None
    return {"commit": commit, "private": private, "files": files}


def chunks(repo: str, path: str, what: str, *, most: int, size: int | None = None) -> Generator[bytes, None, None]:
    """The content at a path of the Hub, piece by piece; close the iterator to stop early.

    A login goes to the Hub's own host only, and redirects are followed here: the library's client would read what comes
    with one, however long it is.

    Args:
        repo: whose it is, for an error.
        path: behind the Hub's address.
        what: it is, for an error.
        most: the most bytes that are taken.
        size: how many it must be, if that is known.

    Raises:
        HubError: the Hub refuses, sends more than it may or other than it said, or packs it.
    """
    with asking(repo):
        _token()
        address, headers = endpoint() + path, build_hf_headers(library_name="softprompt")
        for _ in range(_REDIRECTS):
            with get_session().stream(
                "GET",
                address,
                headers={**headers, "accept-encoding": "identity"},
                follow_redirects=False,
                timeout=SECONDS,
            ) as answer:
                if answer.status_code // 100 == 3 and answer.headers.get("location"):
                    address, headers = _redirected(repo, address, answer.headers["location"], headers)
                    continue
                if answer.status_code != 200:
                    raise _refusal(repo, answer.status_code, answer.headers.get("x-error-message"))
                yield from _bounded(what, answer, most, size)
                return
        raise HubError(f"Expected an answer of the Hub for {repo}, found redirects without an end; try again later.")


def _bounded(what: str, answer: Any, most: int, size: int | None) -> Iterator[bytes]:
    packed = answer.headers.get("content-encoding", "identity")
    if packed.lower() != "identity":
        raise HubError(f"Expected {what} as it is, found it packed as {printable(packed)[:20]!r}; check HF_ENDPOINT.")
    stated = answer.headers.get("content-length", "")
    expected = size if size is not None else int(stated) if stated.isascii() and stated.isdigit() else None
    if expected is not None and expected > most:
        raise HubError(f"Expected at most {most:,} bytes of {what}, found {expected:,}; it is no soft prompt's.")
    if size is not None and stated and stated != str(size):
        raise HubError(
            f"Expected {size:,} bytes of {what}, as its repository says, found {printable(stated)[:20]} announced."
        )
    found, began = 0, time.monotonic()
    for chunk in answer.iter_raw():
        found += len(chunk)
        if time.monotonic() - began > PATIENCE + found / SLOWEST:
            raise HubError(f"Expected at least {SLOWEST:,} bytes of {what} a second, found {found:,} bytes; try again.")
        if found > (most if expected is None else expected):
            raise HubError(f"Expected at most {most if expected is None else expected:,} bytes of {what}, found more.")
        yield chunk
    if expected is not None and found < expected:
        raise HubError(f"Expected {expected:,} bytes of {what}, found {found:,}; the transfer broke off, try again.")


def _redirected(repo: str, address: str, location: str, headers: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """Where a redirect leads, and the headers for there: without the login at another host."""
    target = urljoin(address, location)
    old, new = urlsplit(address), urlsplit(target)
    if new.scheme not in ("http", "https") or not new.hostname or (old.scheme == "https" and new.scheme == "http"):
        raise HubError(f"Expected a redirect to a safe address for {repo}, found another; check HF_ENDPOINT.")
    if (old.scheme, old.netloc) == (new.scheme, new.netloc):
        return target, dict(headers)
    return target, {key: value for key, value in headers.items() if key.lower() != "authorization"}


def _sentence(repo: str, error: Exception) -> HubError:
    if isinstance(error, OfflineModeIsEnabled):
        return _offline()
    answer = getattr(error, "response", None)
    if answer is not None:
        return _refusal(repo, answer.status_code, getattr(error, "server_message", None))
    if type(error).__module__.partition(".")[0] in ("httpx", "httpx2"):
        return HubError(
            f"The Hub at {_host(endpoint())} cannot be reached for {repo}, or broke off: "
            f"{printable(error) or type(error).__name__}; check the network, and HF_ENDPOINT if it is set."
        )
    return HubError(
        f"Expected an answer of the Hub for {repo}, found one that cannot be used ({type(error).__name__}: "
        f"{printable(error)}); try again later."
    )


def _refusal(repo: str, status: int, reason: object) -> HubError:
    said = f"; it says: {printable(reason)}" if reason and printable(reason) else ""
    if status == 401:
        return HubError(
            f"The Hub does not let this login at {repo} (401){said}; check the name, and {_LOG_IN} with access to it."
        )
    if status == 403:
        return HubError(f"The Hub forbids it for {repo} (403){said}; use a login that may do it: {_LOG_IN}.")
    if status == 404:
        return HubError(
            f"There is no repository {repo} on the Hub, or not this revision or file of it, or it is private (404)"
            f"{said}; check the names, or {_LOG_IN}."
        )
    remedy = "wait a while" if status == 429 else "try again later" if status >= 500 else "check the repository"
    return HubError(f"The Hub answered with {status} for {repo}{said}; {remedy}.")


def _offline() -> HubError:
    return HubError("The Hub is not asked while HF_HUB_OFFLINE is set; unset it.")


def _host(address: str) -> str:
    """Host and port: an address may hold a password."""
    parts = urlsplit(address)
    return f"{parts.hostname}:{parts.port}" if parts.port else str(parts.hostname)


def printable(text: object) -> str:
    """The first line of a text of somebody else, short, printable and without the token."""
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    line = lines[0] if lines else ""
    token = get_token()
    if token:
        line = line.replace(token, "…")
    line = re.sub(r"Bearer \S+", "Bearer …", line)
    return "".join(letter for letter in line if letter.isprintable())[:150].rstrip(".;, ")
