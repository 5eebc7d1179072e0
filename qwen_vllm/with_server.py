"""Starts a server, waits until it is ready, runs a command and stops the server."""

import argparse
import json
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

from qwen_vllm.cache import CACHE, open_log
from qwen_vllm.models.checks import ModelUnavailable
from qwen_vllm.models.resolve import resolve_model, resolve_parts
from qwen_vllm.network import address
from qwen_vllm.words import SaidError, choose_language, say

LOG = CACHE / "server.log"
SERVER = (sys.executable, str(Path(__file__).parents[1] / "vllm_server.py"))
CLEAR_LINE = "\r\x1b[K" if sys.stderr.isatty() else ""
USAGE = """\
python -m qwen_vllm.with_server [SERVER FLAGS …] -- COMMAND …

Starts a server, waits until it is ready, runs a command and stops the server. The command finds the server's address
in $QWEN_URL and its key in $QWEN_API_KEY. The server's output goes to a log file, with --verbose also to the terminal.
"""
STOP_TIMEOUT = 30
"""Seconds that a server has to stop before it is killed."""

STAGES = (
    ("", "importing vLLM"),
    ("EngineCore pid=", "starting the engine"),
    ("Starting to load model", "loading the weights"),
    ("KV cache size", "warming up"),
    ("Starting vLLM server", "opening the port"),
)
"""(what vLLM writes to its log, the stage that begins then)"""


class ServerFailed(SaidError):
    """Says why the server did not start."""


@contextmanager
def running_server(
    flags: Sequence[str] = (),
    log: Path = LOG,
    progress: Callable[[str, float], None] = lambda stage, seconds: None,
    program: Sequence[str] = SERVER,
) -> Iterator[str]:
    """Start a server with these flags, yield its address, and stop it at the end.

    It gets a free port unless the flags name one. `progress` is called with the stage of the start and the seconds so
    far, several times a second. `program` is the server's command; it must take --port and answer /health.

    Raises:
        ServerFailed: the server ended before it was ready.
    """
    known = _known_flags(flags)
    port = known.port or free_port()
    if not 0 < port < 65536:
        raise ServerFailed("--port {port}: there is no such port, only 1 to 65535", port=port)
    if known.uds or known.ssl_certfile:
        raise ServerFailed("with TLS or a socket file, start the server by itself: make serve")
    host = "127.0.0.1" if known.host in ("0.0.0.0", "::") else known.host
    url = address(host, port)
    with suppress(OSError), socket.create_connection((host, port), timeout=1):
        raise ServerFailed("port {port} is taken by another program: name another --port", port=port)
    command = [*program, *(flag for flag in flags if flag != "--verbose"), "--port", str(port)]
    # In its own session the server does not get the Ctrl-C that is for the command.
    with open_log(log, "--verbose" in flags) as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        _wait(server, url, log, progress)
        yield url
    finally:
        _stop(server)


def _wait(server: subprocess.Popen[bytes], url: str, log: Path, progress: Callable[[str, float], None]) -> None:
    """Wait until the server is healthy; raise ServerFailed where it ends before."""
    began = time.monotonic()
    session = requests.Session()
    session.trust_env = False
    while server.poll() is None:
        text = log.read_text(errors="replace")
        progress([stage for written, stage in STAGES if written in text][-1], time.monotonic() - began)
        with suppress(requests.RequestException):
            if session.get(f"{url}/health", timeout=1).ok:
                return
        time.sleep(0.25)
    reason = _reason(log.read_text(errors="replace"))
    raise ServerFailed("the server did not start: {reason}\nIts log: {log}", reason=reason, log=log)


def _reason(log: str) -> str:
    """Return the last line of a log that says what went wrong."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or line.startswith("vllm_server.py:")]
    return (errors or lines or [say("it printed nothing")])[-1][:300]


def _stop(server: subprocess.Popen[bytes]) -> None:
    """Stop the server and every process that it started."""
    server.terminate()
    try:
        with suppress(subprocess.TimeoutExpired):
            server.wait(STOP_TIMEOUT)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _known_flags(flags: Sequence[str]) -> argparse.Namespace:
    """Read the server flags that the launcher must know."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model", "--model-path", "--model_path")
    parser.add_argument("--hub", default="modelscope")
    parser.add_argument("--revision")
    parser.add_argument("--download-dir", "--download_dir")
    parser.add_argument("--tokenizer")
    parser.add_argument("--tokenizer-revision", "--tokenizer_revision")
    parser.add_argument("--speculative-config", "--speculative_config", type=json.loads)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int)
    parser.add_argument("--api-key", "--api_key", nargs="+", default=[os.environ.get("VLLM_API_KEY", "")])
    parser.add_argument("--uds")
    parser.add_argument("--ssl-certfile", "--ssl_certfile")
    return parser.parse_known_args(flags)[0]


def free_port() -> int:
    """Return a port of this machine on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _show(stage: str, seconds: float) -> None:
    if sys.stderr.isatty():
        told = say("Starting the server: {stage} … {seconds:.0f} s", stage=say(stage), seconds=seconds)
        print(f"{CLEAR_LINE}{told}", end="", file=sys.stderr, flush=True)


def _run(command: Sequence[str], **environment: str) -> int:
    """Run the command in the terminal's foreground: Ctrl-C reaches only it."""

    def start() -> None:
        os.setpgid(0, 0)
        _to_foreground()
        # Ctrl-Z would stop the command for ever: no shell waits for its process group.
        signal.signal(signal.SIGTSTP, signal.SIG_IGN)

    try:
        return subprocess.run(command, env={**os.environ, **environment}, preexec_fn=start).returncode
    finally:
        _to_foreground()


def _to_foreground() -> None:
    """Make this process's group the terminal's foreground process group, if any."""
    before = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    with suppress(OSError):
        os.tcsetpgrp(0, os.getpgrp())
    signal.signal(signal.SIGTTOU, before)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the launcher; return the command's exit status."""
    argv = sys.argv[1:] if argv is None else argv
    split = argv.index("--") if "--" in argv else len(argv)
    flags, command = argv[:split], argv[split + 1 :]
    choose_language(flags)
    if not command:
        print(say(USAGE), file=sys.stderr)
        return 2
    if not shutil.which(command[0]):
        print(f"with_server: {say('there is no command {command}', command=command[0])}", file=sys.stderr)
        return 127
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        known = _known_flags(flags)
        # Before the server does, because its progress shows here.
        resolve_model(known.model, known.hub, known.revision, known.download_dir)
        resolve_parts(vars(known), known.hub)
        print(say("Starting the server; its log: {log}", log=LOG), file=sys.stderr, flush=True)
        with running_server(flags, progress=_show) as url:
            print(CLEAR_LINE, end="", file=sys.stderr, flush=True)
            return _run(command, QWEN_URL=url, QWEN_API_KEY=known.api_key[0] or os.environ.get("QWEN_API_KEY", ""))
    except (ModelUnavailable, ServerFailed) as error:
        print(f"{CLEAR_LINE}{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
