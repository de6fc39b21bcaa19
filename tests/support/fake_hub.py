"""A stand-in for the hub's HTTP API on the loopback address: repositories in memory, for the client's real requests.

It knows what the client asks when it fetches single files and when it commits a folder: metadata, downloads, creating
a repository, listing it, preparing an upload, Git LFS, and the commit itself.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_test"


class Handler(BaseHTTPRequestHandler):
    server: FakeHub  # type: ignore[assignment]
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def _serve(self) -> None:
        hub, body = self.server, self._body()
        path = self.path.split("?")[0].strip("/")
        hub.log.append(f"{self.command} /{path}")
        if self.command == "PUT" and path.startswith("lfs/"):
            hub.objects[path.removeprefix("lfs/")] = body
            return self._answer(200, b"")
        if path == "api/repos/create":
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self._answer(401, b"{}", **{"X-Error-Message": "Invalid credentials"})
            wanted = json.loads(body)
            repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            hub.repos.setdefault(repo, {})
            return self._json({"url": hub.url(repo), "name": repo})
        if path == "api/validate-yaml":
            hub.cards.append(json.loads(body)["content"])
            return self._json({"errors": [], "warnings": []})
        if path.startswith("api/models/"):
            return self._api(path.removeprefix("api/models/"), body)
        if path.endswith(".git/info/lfs/objects/batch"):
            asked = json.loads(body)["objects"]
            hub.uploaded += [entry["oid"] for entry in asked]
            objects = [
                {**entry, "actions": {"upload": {"href": hub.url(f"lfs/{entry['oid']}"), "header": {}}}}
                for entry in asked
            ]
            return self._json({"transfer": "basic", "objects": objects})
        if "/resolve/" in path:
            repo, _, rest = path.partition("/resolve/")
            return self._file(repo, rest.partition("/")[2])
        return self._answer(200, b"") if path == "" else self._answer(404, b"")

    def _api(self, path: str, body: bytes) -> None:
        hub = self.server
        parts = path.split("/")
        repo, action = "/".join(parts[:2]), parts[2] if len(parts) > 2 else ""
        if repo not in hub.repos:
            return self._answer(404, b"{}", **{"X-Error-Code": "RepoNotFound", "X-Error-Message": "no such repository"})
        if action == "preupload":
            files = [
                {"path": entry["path"], "uploadMode": "lfs" if entry["path"].endswith(".safetensors") else "regular"}
                for entry in json.loads(body)["files"]
            ]
            return self._json({"files": [{**entry, "shouldIgnore": False} for entry in files]})
        if action == "commit":
            for line in body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    hub.repos[repo][value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    hub.repos[repo][value["path"]] = hub.objects[value["oid"]]
            return self._json({"commitUrl": hub.url(f"{repo}/commit/{COMMIT}"), "commitOid": COMMIT, "success": True})
        files = [{"rfilename": name, "path": name, "type": "file", "size": 1, "oid": "0"} for name in hub.repos[repo]]
        if action == "tree":
            return self._json(files)
        info: dict[str, Any] = {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": files, "tags": []}
        return self._json({**info, "private": False, "downloads": 0, "likes": 0})

    def _file(self, repo: str, name: str) -> None:
        content = self.server.repos.get(repo, {}).get(name)
        if repo not in self.server.repos:
            return self._answer(404, b"", **{"X-Error-Code": "RepoNotFound", "X-Error-Message": "no such repository"})
        if content is None:
            return self._answer(404, b"", **{"X-Error-Code": "EntryNotFound", "X-Error-Message": "no such file"})
        etag = hashlib.sha256(content).hexdigest()
        return self._answer(200, content, **{"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), **{"Content-Type": "application/json"})

    def _answer(self, code: int, body: bytes, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class FakeHub(ThreadingHTTPServer):
    """repos: files by name, by id; log: every request; uploaded: what went through Git LFS; cards: those it checked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.uploaded: list[str] = []
        self.cards: list[str] = []
        self.log: list[str] = []

    def url(self, path: str = "") -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}".rstrip("/")


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


def hub_environment(hub: FakeHub, home: Any, **more: str) -> dict[str, str]:
    """Environment variables under which the hub's client talks to this stand-in, with a cache of its own in `home`."""
    return {
        "HF_ENDPOINT": hub.url(),
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        **more,
    }
