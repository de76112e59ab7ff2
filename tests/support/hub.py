"""A stand-in of the Hugging Face hub on this machine: repositories in memory, made, written, listed and read."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

MODEL = re.compile(r"^/api/models/([^/]+/[^/]+)(?:/(.*))?$")
FILE = re.compile(r"^/([^/]+/[^/]+)/resolve/[^/]+/(.+)$")


class Hub(ThreadingHTTPServer):
    """Repositories: name -> path -> content. token: what a request must carry, "" for none."""

    def __init__(self, token: str = "") -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.messages: list[str] = []
        self.token = token

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def hub(token: str = "") -> Iterator[Hub]:
    server = Hub(token)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Answer(BaseHTTPRequestHandler):
    """The requests that huggingface_hub makes to create, commit, list and read."""

    server: Hub

    def log_message(self, *words: Any) -> None:
        """Be quiet."""

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def reply(self, status: int, data: Any = None, content: bytes = b"", **headers: str) -> None:
        content = content or json.dumps({} if data is None else data).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def allowed(self) -> bool:
        if self.server.token and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self.reply(401, {"error": "Invalid username or password."})
            return False
        return True

    def do_POST(self) -> None:
        body = self.body()
        if not self.allowed():
            return
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.server.repositories.setdefault(name, {})
            if asked.get("private") or asked.get("visibility") == "private":
                self.server.private.add(name)
            self.reply(200, {"url": f"{self.server.address}/{name}", "name": name, "id": name})
        elif path == "/api/validate-yaml":
            self.reply(200, {"errors": [], "warnings": []})
        elif (found := MODEL.match(path)) and (found[2] or "").startswith("preupload/"):
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            self.reply(200, {"files": modes})
        elif found and (found[2] or "").startswith("commit/"):
            self.commit(found[1], [json.loads(line) for line in body.splitlines()])
        else:
            self.reply(404, {"error": path})

    def commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        files = self.server.repositories[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.server.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.reply(200, {"commitUrl": f"{self.server.address}/{name}/commit/1", "commitOid": "1" * 40, "success": True})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if not self.allowed():
            return
        path = self.path.partition("?")[0]
        if found := FILE.match(path):
            content = self.server.repositories.get(found[1], {}).get(found[2])
            if content is None:
                self.reply(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
                return
            tag = hashlib.sha256(content).hexdigest()
            self.reply(200, content=content, ETag=f'"{tag}"', X_Repo_Commit="1" * 40, Accept_Ranges="bytes")
        elif found := MODEL.match(path):
            files = self.server.repositories.get(found[1])
            if files is None:
                self.reply(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            elif (found[2] or "").startswith("tree/"):
                made = [{"type": "file", "path": p, "size": len(c), "oid": "0" * 40} for p, c in files.items()]
                self.reply(200, made)
            else:
                siblings = [{"rfilename": name} for name in files]
                self.reply(200, {"id": found[1], "modelId": found[1], "sha": "1" * 40, "siblings": siblings})
        else:
            self.reply(404, {"error": path})
