"""A local server that answers as the hub does, for one repository that is a folder."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """`folder` is served as the repository `repo_id`, at its branch main and at COMMIT."""

    repo_id: str
    folder: Path
    endpoint: str = ""
    gated: bool = False
    token: str | None = None
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Method, file and range of what was asked of the files."""
    at_branch: list[str] = field(default_factory=list)
    """The paths that were asked for at main, which may move, and not at a commit."""

    def downloads(self) -> set[str]:
        """The files that were asked for in whole."""
        return {file for method, file, part in self.requests if method == "GET" and part is None}


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = self.path.split("?")[0]
            if not re.match(rf"/(api/models/)?{re.escape(hub.repo_id)}(/|$)", path):
                return self.refuse(401, "RepoNotFound", "Repository not found")
            if hub.gated:
                return self.refuse(403, "GatedRepo", "Access to model is restricted")
            if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self.refuse(401, "RepoNotFound", "Repository not found")
            revision = re.search(r"/(?:resolve|revision|tree)/([^/]+)", path)
            if revision and revision[1] not in ("main", COMMIT):
                return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision[1]}")
            if revision is None or revision[1] == "main":
                hub.at_branch.append(path)
            if path.startswith("/api/"):
                return self.list_files("tree" if "/tree/" in path else "revision")
            self.send_file(path.split(f"{revision[1]}/", 1)[1])

        def list_files(self, kind: str) -> None:
            files = sorted(path for path in hub.folder.iterdir() if path.is_file())
            if kind == "tree":
                entries = [
                    {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": _etag(f)}
                    for f in files
                ]
                body = json.dumps(entries)
            else:
                siblings = [{"rfilename": f.name} for f in files]
                body = json.dumps({"id": hub.repo_id, "sha": COMMIT, "siblings": siblings})
            self.send(200, body.encode(), {"Content-Type": "application/json"})

        def send_file(self, name: str) -> None:
            path = hub.folder / name
            part = self.headers.get("Range")
            hub.requests.append((self.command, name, part))
            if not path.is_file():
                return self.refuse(404, "EntryNotFound", f"Entry {name} not found")
            body = path.read_bytes()
            headers = {
                "ETag": f'"{_etag(path)}"',
                "X-Repo-Commit": COMMIT,
                "Accept-Ranges": "bytes",
            }
            status = 200
            if part:
                first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", part).groups()
                end = min(int(last or len(body)) + 1, len(body))
                headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(body)}"
                body, status = body[int(first) : end], 206
            self.send(status, body, headers)

        def refuse(self, status: int, code: str, message: str) -> None:
            headers = {"X-Error-Code": code, "X-Error-Message": message}
            self.send(status, json.dumps({"error": message}).encode(), headers)

        def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
