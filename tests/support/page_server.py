"""The page on a thread of this process."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from gradio_webui import PageServer, parse_args


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
