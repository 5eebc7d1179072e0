"""The real programs that end-to-end tests talk to: servers and chats with the demo model.

An engine takes half a minute of two cores to start. So each program here starts once, before the first test: the
fixture `started` in conftest.py starts what the selected tests ask for by name, and nothing else.

To write a test of a server, put it into e2e/ and take a fixture: `demo_server`, which wants KEY and computes in
float32 (in bfloat16 a request alone and one beside others round differently), or `small_server`, with little room and
short deadlines. Others use it too: leave no request behind, and expect no idle machine. A test that ends the server
is marked `last`: such tests come after all others, in any order. A test that needs other flags starts its own server
by `with_server.running_server`, and is marked `long`.

To add a program, write a context manager that takes an empty folder and yields what tests need to talk to it, add it
to PROGRAMS, and add a fixture of the same name to conftest.py.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pexpect
import requests

from qwen_vllm.with_server import SERVER, free_port
from tests.support import ROOT
from tests.support.demo import FRANCE

KEY = "e2e-key"
"""The key of `demo_server`."""
ROOM, DEADLINE = 8, 2
"""Of `small_server`: requests at a time, and seconds that slow clients have."""
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("ARGS", "MAKE", "MFLAGS"))}
"""As in a user's terminal, and not as under `make test`, whose variables a `make` within it would take for its own."""


@contextmanager
def _server(flags: str, folder: Path) -> Iterator[SimpleNamespace]:
    port, path = free_port(), folder / "log"
    with path.open("wb") as log:
        command = [*SERVER, *flags.split(), "--port", str(port)]
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    yield SimpleNamespace(process=process, url=f"http://127.0.0.1:{port}", port=port, log=path)
    process.terminate()
    process.wait(30)


@contextmanager
def _piped_chat(folder: Path) -> Iterator[subprocess.Popen]:
    environment, pipe = {**ENVIRONMENT, "PIPED_CHAT": "1"}, subprocess.PIPE
    with subprocess.Popen(
        ["make", "chat"], cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True
    ) as process:
        process.stdin.write(f"{FRANCE}\n")
        process.stdin.close()
        process.stdin = None
        yield process
        process.terminate()


@contextmanager
def _offline_chat(folder: Path) -> Iterator[pexpect.spawn]:
    command = ["vllm_offline.py", "--temperature", "0", "--max-model-len", "2048"]
    environment = {**ENVIRONMENT, "XDG_STATE_HOME": str(folder), "PROMPT_TOOLKIT_NO_CPR": "1"}
    terminal = {"encoding": "utf-8", "timeout": 120, "dimensions": (40, 100)}
    chat = pexpect.spawn(sys.executable, command, cwd=ROOT, env=environment, **terminal)
    yield chat
    chat.close(force=True)


PROGRAMS = {
    "demo_server": partial(_server, f"--api-key {KEY} --dtype float32"),
    "small_server": partial(
        _server,
        f"""--max-num-seqs 4 --max-num-queued-reqs {ROOM}
        --max-model-len 512 --block-size 32 --num-gpu-blocks-override 18
        --header-timeout {DEADLINE} --body-timeout {DEADLINE} --write-timeout {DEADLINE}""",
    ),
    "piped_chat": _piped_chat,
    "offline_chat": _offline_chat,
}
"""By the fixtures that give them."""


def ready(server: SimpleNamespace) -> SimpleNamespace:
    """Waits until a server is ready."""
    while True:
        with suppress(requests.ConnectionError):
            if requests.get(f"{server.url}/ready", timeout=10).ok:
                return server
        assert server.process.poll() is None, f"the server did not start: see {server.log}"
        time.sleep(0.2)
