"""Runs a command while a server is up: starts the server, waits for it, runs the command, stops the server.

    python with_server.py [SERVER FLAGS …] -- COMMAND …

The command finds the server's address in $QWEN_URL. The server's output goes to a log file.
"""

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import requests

from model_utils import CACHE

LOG = CACHE / "server.log"
SERVER = (sys.executable, str(Path(__file__).with_name("vllm_server.py")))
STOP_TIMEOUT = 30
"""Seconds that a server has to stop, before it is killed."""

STAGES = (
    ("", "importing vLLM"),
    ("Preparing the demo model", "preparing the demo model"),
    ("Fetching ", "fetching the model"),
    ("EngineCore pid=", "starting the engine"),
    ("Starting to load model", "loading the weights"),
    ("KV cache size", "warming up"),
    ("Starting vLLM server", "opening the port"),
)


class ServerFailed(Exception):
    """The server did not start; the message says why."""


@contextmanager
def running_server(
    flags: Sequence[str] = (),
    log: Path = LOG,
    progress: Callable[[str, float], None] = lambda stage, seconds: None,
    program: Sequence[str] = SERVER,
) -> Iterator[str]:
    """A server with these flags, on a free port unless they name one; yields its address, and stops it at the end.

    `progress` is told several times a second what the server is doing, and for how many seconds it has been starting.
    `program` is the command that runs it; any that answers /health and takes --port will do.

    Raises:
        ServerFailed: the server ended before it was ready.
    """
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    known.add_argument("--port", default=_free_port(), type=int)
    port = known.parse_known_args(flags)[0].port
    url = f"http://127.0.0.1:{port}"
    if _taken(port):
        raise ServerFailed(f"port {port} is taken by another program: name another --port")
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [*program, *flags, "--port", str(port)]
    # A session of its own: Ctrl-C in the terminal is for the command.
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, start_new_session=True
        )
    try:
        _wait(server, url, log, progress)
        yield url
    finally:
        _stop(server)


def _wait(server: subprocess.Popen, url: str, log: Path, progress: Callable[[str, float], None]) -> None:
    began = time.monotonic()
    session = requests.Session()
    session.trust_env = False
    while True:
        text = log.read_text(errors="replace")
        if server.poll() is not None:
            raise ServerFailed(f"the server did not start: {_reason(text)}\nIts log: {log}")
        progress([stage for mark, stage in STAGES if mark in text][-1], time.monotonic() - began)
        with suppress(requests.RequestException):
            if session.get(f"{url}/health", timeout=1).ok:
                return
        time.sleep(0.25)


def _reason(log: str) -> str:
    """The last line of a log that says what went wrong."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line or line.startswith("vllm_server.py:")]
    return (telling or lines or ["it printed nothing"])[-1][:300]


def _stop(server: subprocess.Popen) -> None:
    """Ends the server and all that it has started."""
    server.terminate()
    with suppress(subprocess.TimeoutExpired):
        server.wait(STOP_TIMEOUT)
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _show(stage: str, seconds: float) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[KStarting the server: {stage} … {seconds:.0f} s", end="", file=sys.stderr, flush=True)


def _run(command: Sequence[str], url: str) -> int:
    """Runs the command in the terminal's foreground, alone, so that Ctrl-C reaches it and not us."""

    def to_foreground() -> None:
        os.setpgid(0, 0)
        if os.isatty(0):
            signal.signal(signal.SIGTTOU, signal.SIG_IGN)
            os.tcsetpgrp(0, os.getpgrp())
            signal.signal(signal.SIGTTOU, signal.SIG_DFL)

    try:
        return subprocess.run(command, env={**os.environ, "QWEN_URL": url}, preexec_fn=to_foreground).returncode
    finally:
        if os.isatty(0):
            signal.signal(signal.SIGTTOU, signal.SIG_IGN)
            os.tcsetpgrp(0, os.getpgrp())


def main(argv: Sequence[str] = sys.argv[1:]) -> int:
    """Returns the command's exit status."""
    split = list(argv).index("--") if "--" in argv else len(argv)
    command = argv[split + 1 :]
    if not command:
        print(__doc__, file=sys.stderr)
        return 2
    if not shutil.which(command[0]):
        print(f"with_server.py: there is no command {command[0]}", file=sys.stderr)
        return 127
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        print(f"Starting the server; its log: {LOG}", file=sys.stderr, flush=True)
        with running_server(argv[:split], progress=_show) as url:
            if sys.stderr.isatty():
                print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            return _run(command, url)
    except ServerFailed as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
