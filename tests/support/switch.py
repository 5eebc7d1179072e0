"""Several servers at one address: requests go to the server of the model that they name, as at llama-swap."""

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import requests


class _Handler(BaseHTTPRequestHandler):
    """Knows the routes of OpenAI's API that chats use, and no others."""

    def do_GET(self) -> None:
        if self.path != "/v1/models":
            return self._send(404, b"404 page not found\n")
        models = [{"id": name, "object": "model"} for name in self.server.servers]
        self._send(200, json.dumps({"object": "list", "data": models}).encode())

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path != "/v1/chat/completions":
            return self._send(404, b"404 page not found\n")
        server = self.server.servers.get(json.loads(body).get("model"))
        if not server:
            return self._send(404, b'{"error": "no such model"}')
        key = {"Authorization": self.headers["Authorization"]} if "Authorization" in self.headers else {}
        with requests.post(server + self.path, data=body, headers=key, stream=True, timeout=60) as answer:
            self._send(answer.status_code)
            for chunk in answer.iter_content(chunk_size=None):
                self.wfile.write(chunk)

    def _send(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def switch(servers: Mapping[str, str]) -> Iterator[str]:
    """Yields the address of a switch in front of `servers`: the model's name → its server's address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as front:
        front.servers = servers
        thread = threading.Thread(target=front.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{front.server_address[1]}"
        finally:
            front.shutdown()
            thread.join()
