"""A Hugging Face Hub on the loopback device: the few endpoints that huggingface_hub uses, and a log of requests."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants


def commit_of(text: str) -> str:
    """A commit's name: 40 hex digits."""
    return hashlib.sha1(text.encode()).hexdigest()


class FakeHub:
    """Serves folders as repositories while it is entered."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Path]] = {}
        self.log: list[str] = []
        """``METHOD path`` of every request, with the range asked for."""
        self.gated: set[str] = set()
        self.closed: dict[str, int] = {}
        """Repositories that every request for is answered with this status."""
        self.failing: set[str] = set()
        """Files that cannot be had: HTTP 500."""
        self.cut: dict[str, int] = {}
        """Files whose next answer breaks off after so many bytes."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, repo: str, folder: Path, revision: str = "main") -> None:
        self.repos.setdefault(repo, {})[revision] = folder

    def connect(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        """Make it the Hub of this process, with a cache of its own in ``folder`` and no token."""
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "ENDPOINT", self.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub cache"))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no token"))

    def fetched(self) -> set[str]:
        """Names of the files whose bytes were asked for."""
        gets = (line.split()[1] for line in self.log if line.startswith("GET ") and "/resolve/" in line)
        return {path.split("/", 5)[5] for path in gets}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append(" ".join(filter(None, (self.command, path, self.headers.get("Range")))))
        words = path.strip("/").split("/")
        api = words[:2] == ["api", "models"]
        words = words[2:] if api else words
        repo, rest = "/".join(words[:2]), words[2:]
        if repo in self.hub.closed:
            return self._fail(self.hub.closed[repo], "")
        if repo not in self.hub.repos:
            return self._fail(404, "RepoNotFound")
        revisions = self.hub.repos[repo]
        if rest == ["refs"]:
            refs = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit_of(name)} for name in revisions]
            return self._json({"branches": refs, "tags": [], "converts": []})
        asked = rest[1] if len(rest) > 1 else "main"
        named = [name for name in revisions if asked in (name, commit_of(name))]
        if not named:
            return self._fail(404, "RevisionNotFound")
        (revision,), folder = named, revisions[named[0]]
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        if api and rest[:1] in ([], ["revision"]):
            siblings = [{"rfilename": f.relative_to(folder).as_posix(), "size": f.stat().st_size} for f in files]
            return self._json({"id": repo, "sha": commit_of(revision), "siblings": siblings})
        if api and rest[0] == "tree":
            return self._json([
                {
                    "type": "file",
                    "path": file.relative_to(folder).as_posix(),
                    "size": file.stat().st_size,
                    "oid": commit_of(str(file)),
                }
                for file in files
            ])  # fmt: skip
        if repo in self.hub.gated:
            return self._fail(403, "GatedRepo")
        name = "/".join(rest[2:])
        if not (folder / name).is_file():
            return self._fail(404, "EntryNotFound")
        if self.command == "GET" and name in self.hub.failing:
            return self._fail(500, "")
        return self._file(folder / name, name, commit_of(revision))

    def _file(self, path: Path, name: str, commit: str) -> None:
        data = path.read_bytes()
        begin = int(self.headers["Range"].removeprefix("bytes=").partition("-")[0]) if "Range" in self.headers else 0
        self.send_response(206 if begin else 200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(data) - begin))
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        end = self.hub.cut.pop(name, None)
        self.wfile.write(data[begin:end])
        if end is not None:
            self.close_connection = True

    def _json(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _fail(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()
