"""A chat server that plays scripted bodies, and records what it is asked."""

import json
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LAST = {
    "finish_reason": "stop",
    "stop_reason": "END",
    "usage": {"prompt_tokens": 20, "completion_tokens": 3, "reasoning_tokens": 0},
    "dropped_turns": 1,
    "dropped_reasoning": 0,
    "keeps_reasoning": False,
}


def line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


class Handler(BaseHTTPRequestHandler):
    """Sends the server's script: bytes are a chunk, an event is waited for, `...` waits for the client to leave.

    A script that ends ends the body; one that ends with None breaks the connection off.
    """

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.path, dict(self.headers), json.loads(body)))
        self._play()

    def do_GET(self) -> None:
        self.server.requests.append((self.path, dict(self.headers), None))
        self._play()

    def _play(self) -> None:
        self.close_connection = True
        scripts = self.server.scripts[self.path]
        status, script = scripts.pop(0) if len(scripts) > 1 else scripts[0]
        if status:
            self.send_response(status)
            self.send_header("Transfer-Encoding", "chunked")
            for name, value in self.server.headers.items():
                self.send_header(name, value)
            self.end_headers()
        for step in script:
            match step:
                case bytes():
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(step), step))
                case threading.Event():
                    step.wait(30)
                case None:
                    return
                case _:
                    try:
                        self.server.left.append(self.rfile.read(1) == b"")
                    except ConnectionResetError:  # it left something unread
                        self.server.left.append(True)
                    return
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    """Status 0: the connection breaks off before the headers."""

    daemon_threads = False
    request_queue_size = 128

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.scripts: defaultdict[str, list[tuple[int, tuple]]] = defaultdict(list)
        self.requests, self.left, self.headers = [], [], {}
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def play(self, *script: Any, status: int = 200, path: str = "/chat") -> str:
        """Sets what every request to `path` gets from now on."""
        self.scripts[path] = [(status, script)]
        return self.url

    def then_play(self, *script: Any, status: int = 200, path: str = "/chat") -> None:
        """Adds what comes after one request has got what was set before."""
        self.scripts[path].append((status, script))


@contextmanager
def scripted(port: int = 0) -> Iterator[Server]:
    """A scripted server that is up inside."""
    with Server(port) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:  # a thread that is left would keep a failed run from ending
            server.shutdown()
            thread.join()
