"""A local server that speaks as much of the hub's protocol as huggingface_hub, transformers and datasets use.

A repository is a folder: FOLDER/models/owner/name or FOLDER/datasets/owner/name, with the files as on the hub.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = r"(?:(?P<kind>models|datasets)/)?(?P<name>[^/]+/[^/]+)"
ANSWERS = {
    "info": re.compile(rf"/api/{REPOSITORY}(?:/revision/[^/]+)?"),
    "tree": re.compile(rf"/api/{REPOSITORY}/tree/[^/]+(?P<path>/.*)?"),
    "paths": re.compile(rf"/api/{REPOSITORY}/paths-info/[^/]+"),
    "refs": re.compile(rf"/api/{REPOSITORY}/refs"),
    "file": re.compile(rf"/{REPOSITORY}/resolve/[^/]+/(?P<path>.+)"),
}


class Hub(ThreadingHTTPServer):
    """Serve a folder of repositories on a free port, inside a `with`.

    folder: of the repositories.
    """

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.sent: Counter[str] = Counter()  # bytes of each file that were sent

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def environment(self, cache: Path) -> dict[str, str]:
        """What a process needs to take this server for the hub."""
        names = {"HF_ENDPOINT": self.address, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        return names | {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

    def __enter__(self) -> Hub:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        for name in ("paths", "refs", "tree", "file", "info"):
            if found := ANSWERS[name].fullmatch(path):
                kind = found["kind"] or "models"
                repository = self.server.folder / kind / found["name"]
                if not repository.is_dir():
                    return self._error("RepoNotFound", f"no repository {kind}/{found['name']}")
                rest = (found["path"] or "").strip("/") if "path" in found.groupdict() else ""
                return getattr(self, f"_{name}")(repository, kind, found["name"], rest, body)
        return self._error("EntryNotFound", f"no page {path}")

    def _info(self, repository: Path, kind: str, name: str, rest: str, body: bytes) -> None:
        files = [{"rfilename": entry["path"], "size": entry["size"]} for entry in entries(repository)]
        known = {"id": name, "sha": COMMIT, "private": False, "gated": False, "disabled": False, "tags": []}
        self._json(
            known | {"siblings": files, "downloads": 0, "likes": 0} | ({"modelId": name} if kind == "models" else {})
        )

    def _tree(self, repository: Path, kind: str, name: str, rest: str, body: bytes) -> None:
        deep = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() in ("true", "1")
        if rest and not (repository / rest).is_dir():
            return self._error("EntryNotFound", f"{rest} is no folder")
        inside = [each for each in entries(repository) if not rest or each["path"].startswith(f"{rest}/")]
        if not deep:
            depth = rest.count("/") + 1 if rest else 0
            folders = {
                "/".join(each["path"].split("/")[: depth + 1]) for each in inside if each["path"].count("/") > depth
            }
            inside = [each for each in inside if each["path"].count("/") == depth]
            inside += [{"type": "directory", "path": folder, "oid": COMMIT, "size": 0} for folder in sorted(folders)]
        self._json(inside)

    def _paths(self, repository: Path, kind: str, name: str, rest: str, body: bytes) -> None:
        given = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode())["paths"]
        found = [each for each in entries(repository) if each["path"] in given]
        folders = [path for path in given if path and (repository / path).is_dir()]
        self._json(found + [{"type": "directory", "path": path, "oid": COMMIT, "size": 0} for path in folders])

    def _refs(self, repository: Path, kind: str, name: str, rest: str, body: bytes) -> None:
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": COMMIT}
        self._json({"branches": [main], "tags": [], "converts": []})

    def _file(self, repository: Path, kind: str, name: str, rest: str, body: bytes) -> None:
        file = repository / rest
        if not file.is_file():
            return self._error("EntryNotFound", f"{name} has no file {rest}")
        size, start, status = file.stat().st_size, 0, 200
        stop = size
        if asked := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            start = int(asked[1]) if asked[1] else size - int(asked[2])
            stop = min(size, int(asked[2]) + 1) if asked[1] and asked[2] else size
            status = 206
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        for header, value in {
            "Content-Length": stop - start, "Accept-Ranges": "bytes", "ETag": f'"{oid(file)}"', "X-Repo-Commit": COMMIT,
            "X-Linked-Size": size, "Content-Type": "application/octet-stream",
        }.items():  # fmt: skip
            self.send_header(header, str(value))
        self.end_headers()
        if self.command == "GET":
            with file.open("rb") as opened:
                opened.seek(start)
                self.wfile.write(opened.read(stop - start))
            self.server.sent[f"{kind}/{name}/{rest}"] += stop - start

    def _json(self, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _error(self, code: str, message: str) -> None:
        data = json.dumps({"error": message}).encode()
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        if code == "EntryNotFound":
            self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def entries(repository: Path) -> list[dict]:
    """The files of a repository, as the hub lists them."""
    return [
        {"type": "file", "path": file.relative_to(repository).as_posix(), "size": file.stat().st_size, "oid": oid(file)}
        for file in sorted(repository.rglob("*"))
        if file.is_file()
    ]


def oid(file: Path) -> str:
    return hashlib.sha1(f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}".encode()).hexdigest()
