"""A hub on this machine: the part of its HTTP API that creating a repository and committing to it uses."""

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "t" * 34


class FakeHub(ThreadingHTTPServer):
    """A hub with one user, `me`.

    Attributes:
        repositories: name -> path -> content.
        private: names of private repositories.
        commits: (repository, summary, paths added, paths deleted) of each commit.
        fails: (method, end of the path) -> status that is answered instead.
        locked: repositories that the user may not write.
        role: of the user's token.
        requests: method and path of every request.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.commits: list[tuple[str, str, list[str], list[str]]] = []
        self.fails: dict[tuple[str, str], int] = {}
        self.locked: set[str] = set()
        self.role = "write"
        self.requests: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def written(self) -> list[str]:
        """The requests that change something."""
        return [one for one in self.requests if one.endswith("/create") or "/commit/" in one]


@contextmanager
def serving() -> Iterator[FakeHub]:
    """Serve a fake hub while the block runs."""
    hub = FakeHub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name in http.server
        pass

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    def _answer(self, body: bytes | None) -> None:
        path = self.path.partition("?")[0]
        self.server.requests.append(f"{self.command} {path}")
        for (method, end), status in self.server.fails.items():
            if method == self.command and path.endswith(end):
                return self._send({"error": "out of order"}, status)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send({"error": "Invalid credentials"}, 401)
        if path == "/api/whoami-v2":
            token = {"displayName": "test", "role": self.server.role}
            return self._send({"type": "user", "name": "me", "orgs": [], "auth": {"accessToken": token}})
        if path == "/api/validate-yaml":
            return self._send({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body or b"{}"))
        found = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/(.*))?", path)
        return self._of_repository(found[1], found[2] or "", body) if found else self._send({"error": "not found"}, 404)

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if name in self.server.locked or not name.startswith("me/"):
            return self._send({"error": "You don't have the rights to create a model under this namespace"}, 403)
        status = 409 if name in self.server.repositories else 200
        self.server.repositories.setdefault(name, {})
        return self._send({"url": f"{self.server.address}/{name}"}, status)

    def _of_repository(self, name: str, what: str, body: bytes | None) -> None:
        files = self.server.repositories.get(name)
        if files is None:
            return self._send({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        if what == "auth-check/write":
            status = 403 if name in self.server.locked else 200
            return self._send({"error": "no write access"} if status == 403 else {}, status)
        if what.startswith("preupload/"):
            asked = json.loads(body or b"{}")["files"]
            modes = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in asked]
            return self._send({"files": modes})
        if what.startswith("commit/"):
            return self._commit(name, [json.loads(line) for line in (body or b"").splitlines()])
        if what.startswith("tree/"):
            return self._send(
                [{"type": "file", "path": path, "size": len(files[path]), "oid": "2" * 40} for path in files]
            )
        siblings = [{"rfilename": path} for path in files]
        about = {"id": name, "private": name in self.server.private, "sha": "0" * 40, "siblings": siblings}
        return self._send(about)

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        files = self.server.repositories[name]
        added, deleted, summary = [], [], ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                summary = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                added.append(value["path"])
            else:
                assert line["key"] == "deletedFile"
                del files[value["path"]]
                deleted.append(value["path"])
        self.server.commits.append((name, summary, added, deleted))
        self._send({"commitUrl": f"{self.server.address}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40})

    def _send(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
