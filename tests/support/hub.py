"""A stand-in for the Hugging Face hub on this machine: the few requests by which huggingface_hub reads a repository."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

_INFO = re.compile(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?")
_FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class FakeRepo:
    """Branches and tags by name, and each commit's files."""

    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    is_gated: bool = False


@dataclass
class FakeHub:
    """What is published there, what was asked of it, and how it misbehaves."""

    endpoint: str = ""
    repos: dict[str, FakeRepo] = field(default_factory=dict)
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Method, path and Range of each request."""
    cut: set[str] = field(default_factory=set)
    """Files whose next download stops half way."""
    is_down: bool = False

    def publish(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        """A new commit of these files alone, which the branch names from now on."""
        held = self.repos.setdefault(repo, FakeRepo())
        commit = hashlib.sha1(json.dumps([branch, len(held.commits), sorted(files)]).encode()).hexdigest()
        held.commits[commit] = files
        held.refs[branch] = commit
        return commit

    def downloads(self) -> list[str]:
        """The files whose content was asked for, without the repository."""
        found = [_FILE.fullmatch(path) for method, path, _ in self.asked if method == "GET"]
        return [match[3] for match in found if match]


@contextmanager
def serving() -> Iterator[FakeHub]:
    """A hub that is up for as long as the block runs."""
    hub = FakeHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the requests are in ``asked``."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = unquote(self.path.partition("?")[0])
        self.hub.asked.append((self.command, path, self.headers["Range"]))
        if self.hub.is_down:
            self._send(503, {}, b"")
        elif match := _INFO.fullmatch(path):
            self._info(match[1], match[2] or "main")
        elif match := _FILE.fullmatch(path):
            self._file(match[1], match[2], match[3], with_body)
        else:
            self._send(404, {}, b"")

    def _commit(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit and its files; None once it was refused."""
        held = self.hub.repos.get(repo)
        if held is None:
            self._send(401, {"X-Error-Code": "RepoNotFound"}, b"")
        elif held.is_gated:
            self._send(403, {"X-Error-Code": "GatedRepo"}, b"")
        elif (commit := held.refs.get(revision, revision)) not in held.commits:
            self._send(404, {"X-Error-Code": "RevisionNotFound"}, b"")
        else:
            return commit, held.commits[commit]
        return None

    def _info(self, repo: str, revision: str) -> None:
        if found := self._commit(repo, revision):
            commit, files = found
            info = {"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
            self._send(200, {"Content-Type": "application/json"}, json.dumps(info).encode())

    def _file(self, repo: str, revision: str, name: str, with_body: bool) -> None:
        found = self._commit(repo, revision)
        if found is None:
            return
        commit, files = found
        if name not in files:
            self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b"")
            return
        content, start = files[name], int((self.headers["Range"] or "bytes=0-")[6:].rstrip("-"))
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        stop = len(content) // 2 if with_body and name in self.hub.cut else None
        self._send(206 if start else 200, headers, content[start:], with_body=with_body, stop=stop)
        if stop is not None:
            self.hub.cut.discard(name)

    def _send(
        self, status: int, headers: dict[str, str], body: bytes, *, with_body: bool = True, stop: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body[:stop])
        self.close_connection = self.close_connection or stop is not None
