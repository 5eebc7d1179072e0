"""Both model hubs on loopback, as far as their own clients ask: a model's files, and what goes wrong on their way."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

NAME = "owner/Tiny-1.5"
NO_SUCH_FILE = {"Code": 10010205001, "Message": "not found", "Success": False}
PIECE = 2**14


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """ModelScope's routes begin with /api/v1; the others are Hugging Face's."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        match parts:
            case ["api", "v1", "models", owner, name, "repo", "files"]:
                self._list_modelscope(self._repository(owner, name, query["Revision"]))
            case ["api", "v1", "models", owner, name, "repo"]:
                self._file(self._repository(owner, name, query["Revision"]), query["FilePath"])
            case ["api", "models", owner, name, *rest]:
                self._describe_huggingface(owner, name, rest)
            case [owner, name, "resolve", revision, *path]:
                self._file(self._repository(owner, name, revision), "/".join(path))
            case _:
                self._json({"Data": {}})

    do_HEAD = do_GET

    def _repository(self, owner: str, name: str, revision: str) -> dict[str, bytes] | None:
        hub: Hub = self.server
        if f"{owner}/{name}" != NAME:
            return None
        names = {hub.commit(name): name for name in hub.revisions}
        return hub.revisions.get("master" if revision == "main" else names.get(revision, revision))

    def _list_modelscope(self, files: dict[str, bytes] | None) -> None:
        self.server.asked.append(("", None))
        if files is None:
            return self._json(NO_SUCH_FILE, 404)
        listed = [
            {"Path": path, "Type": "blob", "Size": len(data), "Sha256": sha256(data)} for path, data in files.items()
        ]
        return self._json({"Code": 200, "Success": True, "Data": {"Files": listed}})

    def _describe_huggingface(self, owner: str, name: str, rest: list[str]) -> None:
        self.server.asked.append(("", None))
        revision = rest[1] if rest else "main"
        files = self._repository(owner, name, revision)
        if files is None:
            return self._json({"error": "not found"}, 404, **{"X-Error-Code": "RepoNotFound"})
        sizes = {path: len(data) for path, data in files.items()}
        large = {path: sha256(files[path]) for path in files if path.endswith(".safetensors")}
        if rest[:1] == ["tree"]:
            lfs = {path: {"lfs": {"oid": sha, "size": sizes[path], "pointerSize": 1}} for path, sha in large.items()}
            listed = [{"path": path, "size": sizes[path], "oid": git_sha1(files[path])} for path in files]
            return self._json([{"type": "file", **file, **lfs.get(file["path"], {})} for file in listed])
        lfs = {path: {"lfs": {"sha256": sha, "size": sizes[path], "pointerSize": 1}} for path, sha in large.items()}
        listed = [{"rfilename": path, "size": sizes[path], "blobId": git_sha1(files[path])} for path in files]
        siblings = [{**file, **lfs.get(file["rfilename"], {})} for file in listed]
        commit = self.server.commit_of(files)
        return self._json({"id": NAME, "sha": commit, "siblings": siblings})

    def _file(self, files: dict[str, bytes] | None, path: str) -> None:
        hub: Hub = self.server
        asked = self.headers["Range"]
        if self.command == "GET":
            hub.asked.append((path, asked))
        if files is None or path not in files or path in hub.gone:
            return self._json(NO_SUCH_FILE, 404, **{"X-Error-Code": "EntryNotFound"})
        data = files[path]
        start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(data) - start))
        digest = sha256 if path.endswith(".safetensors") else git_sha1
        self.send_header("ETag", f'"{digest(data)}"')
        self.send_header("X-Repo-Commit", hub.commit_of(files))
        self.send_header("Accept-Ranges", "bytes")
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "GET":
            self._send(path, bytes(len(data)) if path in hub.corrupt else data, start)

    def _send(self, path: str, data: bytes, start: int) -> None:
        hub: Hub = self.server
        hub.held.wait(30)
        cuts = hub.cuts.get(path)
        end = min(start + cuts.pop(0), len(data)) if cuts else len(data)
        try:
            for at in range(start, end, PIECE):
                self.wfile.write(data[at : min(at + PIECE, end)])
                time.sleep(hub.seconds_a_piece.get(path, 0))
        except OSError:  # the client has left
            end = 0
        self.close_connection |= end < len(data)

    def _json(self, body: Any, status: int = 200, **headers: str) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(text)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


class Hub(ThreadingHTTPServer):
    """A hub with one model, NAME.

    Attributes:
        revisions: its files by revision; `master` is Hugging Face's `main` too.
        gone: paths that are listed and not there.
        corrupt: paths of which other bytes come than their checksum says.
        cuts: after how many bytes the next answers for a path break off.
        seconds_a_piece: how slowly a path comes, by the pause after each PIECE.
        held: an event without which no file comes.
        asked: (path, range) of every request for a file; ("", None): for the list of files.
    """

    request_queue_size = 128

    def __init__(self, port: int, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.revisions = {"master": files}
        self.gone: set[str] = set()
        self.corrupt: set[str] = set()
        self.cuts: dict[str, list[int]] = {}
        self.seconds_a_piece: dict[str, float] = {}
        self.held = threading.Event()
        self.held.set()
        self.asked: list[tuple[str, str | None]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def files(self) -> dict[str, bytes]:
        return self.revisions["master"]

    @property
    def fetched(self) -> list[str]:
        """The paths that were asked for, in order."""
        return sorted(path for path, _ in self.asked if path)

    def commit(self, revision: str) -> str:
        return self.commit_of(self.revisions[revision])

    def commit_of(self, files: dict[str, bytes]) -> str:
        return hashlib.sha1(b"".join(files.values())).hexdigest()


@contextmanager
def scripted_hub(files: dict[str, bytes], port: int = 0) -> Iterator[Hub]:
    """A hub that is up inside."""
    with Hub(port, files) as hub:
        thread = threading.Thread(target=hub.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield hub
        finally:
            hub.held.set()
            hub.shutdown()
            thread.join()
