"""A stand-in for the Hugging Face Hub on a real socket: what its library calls to push, and what is read to pull."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from huggingface_hub import close_session, constants

TOKEN = "hf_StandInTokenThatNobodyMaySee"


@dataclass
class Repo:
    """A repository: its branches, each as file → content."""

    private: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})


@dataclass
class Asked:
    """A request."""

    method: str
    path: str
    host: str
    authorization: str | None


class FakeHub:
    """The state of the stand-in.

    Attributes:
        url: its address.
        repos: ``USER/REPO`` → repository.
        asked: all requests.
        answers: path → what answers it in the place of the usual.
        sent: how many bytes of an answer in ``answers`` left the server.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.asked: list[Asked] = []
        self.answers: dict[str, Callable[[Handler], None]] = {}
        self.blobs: dict[str, bytes] = {}
        self.sent = 0
        self.url = ""

    def hold(self, repo: str, files: Mapping[str, bytes], **options: Any) -> None:
        """Makes a repository with these files."""
        self.repos[repo] = Repo(branches={"main": dict(files)}, **options)

    def commit(self, repo: str, branch: str) -> str:
        """The commit that a branch is at: a digest of its files."""
        content = sorted(self.repos[repo].branches[branch].items())
        return hashlib.sha1(repr(content).encode()).hexdigest()

    def files(self, repo: str, revision: str) -> dict[str, bytes] | None:
        """The files at a branch or commit."""
        branches = self.repos[repo].branches
        name = next((name for name in branches if revision in (name, self.commit(repo, name))), None)
        return None if name is None else branches[name]

    def posted(self) -> list[str]:
        """The paths of all requests that write."""
        return [one.path for one in self.asked if one.method in ("POST", "PUT", "DELETE")]


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def send(self, status: int, content: bytes | object = b"", **headers: object) -> None:
        """A whole answer."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def endless(self, piece: bytes, status: int = 200, **headers: object) -> None:
        """A start of an answer, and pieces until the other side hangs up."""
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        try:
            while self.hub.sent < 1 << 30:
                self.wfile.write(piece)
                self.hub.sent += len(piece)
        except OSError:
            pass

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        host = str(self.headers.get("Host")).partition(":")[0]
        self.hub.asked.append(Asked(self.command, path, host, self.headers.get("Authorization")))
        if path in self.hub.answers:
            return self.hub.answers[path](self)
        if path.startswith("/cdn/"):
            return self.send(200, self.hub.blobs[path.removeprefix("/cdn/")])
        if self.command in ("GET", "HEAD"):
            return self.read(path)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and not path.startswith("/lfs/"):
            return self.send(401, {"error": "Invalid username or password."})
        return self.write(path, body)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def read(self, path: str) -> None:
        parts = path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        repo = "/".join(parts[2:4] if api else parts[:2])
        known = self.hub.repos.get(repo)
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if known is None or (known.private and not allowed):
            return self.send(404 if allowed else 401, {"error": "no"}, X_Error_Code="RepoNotFound")
        rest = parts[4:] if api else parts[2:]
        revision = "/".join(rest[1:]) if api and rest else "main" if api else rest[1]
        files = self.hub.files(repo, revision)
        if files is None:
            return self.send(404, {"error": "no"}, X_Error_Code="RevisionNotFound")
        branch = next(name for name, held in known.branches.items() if held is files)
        commit = self.hub.commit(repo, branch)
        if api:
            siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
            listed = {"id": repo, "sha": commit, "private": known.private, "siblings": siblings, "tags": []}
            return self.send(200, listed)
        name = "/".join(rest[2:])
        if name not in files:
            return self.send(404, {"error": "no"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        content, tag = files[name], hashlib.sha256(files[name]).hexdigest()
        if not name.endswith(".safetensors"):
            return self.send(200, content, ETag=f'"{tag}"', X_Repo_Commit=commit)
        self.hub.blobs[tag] = content  # large files lie at another host
        elsewhere = self.hub.url.replace("127.0.0.1", "localhost")
        return self.send(
            302,
            b"moved",
            Location=f"{elsewhere}/cdn/{tag}",
            ETag=f'"{tag}"',
            X_Linked_Size=len(content),
            X_Linked_ETag=f'"{tag}"',
            X_Repo_Commit=commit,
        )

    def write(self, path: str, body: bytes) -> None:
        if path.startswith("/lfs/"):
            self.hub.blobs[path.removeprefix("/lfs/")] = body
            return self.send(200)
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.send(200, {"transfer": "basic", "objects": list(map(self.upload, json.loads(body)["objects"]))})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.validate(json.loads(body)["content"])
        _, _, user, name, action, *rest = path.strip("/").split("/")
        repo, revision = f"{user}/{name}", "/".join(rest)
        if repo not in self.hub.repos:
            return self.send(404, {"error": "no"}, X_Error_Code="RepoNotFound")
        branches = self.hub.repos[repo].branches
        if action == "branch":
            status = 409 if revision in branches else 201
            branches.setdefault(revision, dict(branches["main"]))
            return self.send(status, {"error": "exists"} if status == 409 else {})
        if revision not in branches:
            return self.send(404, {"error": "no"}, X_Error_Code="RevisionNotFound")
        if action == "preupload":
            large = {"lfs": True, "regular": False}
            files = [
                {
                    "path": one["path"],
                    "uploadMode": next(mode for mode in large if large[mode] == one["path"].endswith(".safetensors")),
                    "shouldIgnore": False,
                }
                for one in json.loads(body)["files"]
            ]
            return self.send(200, {"files": files})
        held = branches[revision]
        for line in body.splitlines():
            self.apply(held, json.loads(line))
        commit = self.hub.commit(repo, revision)
        return self.send(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{commit}", "commitOid": commit})

    def upload(self, one: Mapping[str, Any]) -> dict[str, Any]:
        return {**one, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}}

    def apply(self, files: dict[str, bytes], entry: Mapping[str, Any]) -> None:
        value = entry["value"]
        if entry["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif entry["key"] == "lfsFile":
            files[value["path"]] = self.hub.blobs[value["oid"]]
        elif entry["key"] == "deletedFile":
            del files[value["path"]]

    def create(self, asked: Mapping[str, Any]) -> None:
        repo = f"{asked['organization']}/{asked['name']}"
        if repo in self.hub.repos:
            return self.send(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{repo}"})
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repos[repo] = Repo(private)
        return self.send(200, {"url": f"{self.hub.url}/{repo}", "id": repo})

    def validate(self, content: str) -> None:
        """As the Hub does: the metadata must be YAML with fields of its types."""
        data = yaml.safe_load(content.split("---\n")[1])
        texts = all(isinstance(data.get(key, ""), str) for key in ("base_model", "library_name", "pipeline_tag"))
        errors = [] if texts and isinstance(data.get("tags", []), list) else [{"message": "wrong types"}]
        return self.send(400 if errors else 200, {"errors": errors, "warnings": []})


@contextmanager
def running(patch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The stand-in, asked in the place of the Hub, with a login that it knows."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    patch.setenv("HF_ENDPOINT", hub.url)
    patch.setenv("HF_TOKEN", TOKEN)
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    close_session()
    folder = TemporaryDirectory()
    patch.setattr(constants, "HF_TOKEN_PATH", str(Path(folder.name) / "token"))
    try:
        yield hub
    finally:
        close_session()
        folder.cleanup()
        server.shutdown()
        server.server_close()
        thread.join()
