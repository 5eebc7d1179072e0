"""The page on a thread of this process."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import requests

from gradio_webui import PageServer, parse_args
from tests.support.chat_messages import kept_settings, user


@contextmanager
def serving(*flags: str) -> Iterator[str]:
    """The page on a free port; yields its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    page = PageServer(parse_args(flags))
    thread = threading.Thread(target=page.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        page.should_exit = True
        thread.join()


def ask(url: str, *sessions: str, web: Any = requests) -> None:
    """Asks the page at `url`, as a browser's tabs `sessions` would; answers come at gradio_api/queue/data."""
    functions = web.get(f"{url}/config", timeout=10).json()["dependencies"]
    answer = next(function for function in functions if function["api_name"] == "answer")
    data = ["chat", [], [user("Hi")], kept_settings()]
    for session in sessions:
        asked = {"fn_index": answer["id"], "session_hash": session, "data": data}
        web.post(f"{url}/gradio_api/queue/join", json=asked, timeout=10).raise_for_status()
