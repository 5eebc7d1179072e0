"""The launcher, with a stand-in for the server: it waits, tells why it failed, runs the command, leaves nothing."""

import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import requests

from qwen_vllm import with_server
from qwen_vllm.with_server import ServerFailed, main, running_server

SERVER = """
import http.server, os, subprocess, sys
port = int(sys.argv[sys.argv.index("--port") + 1])
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("pids", os.getpid(), child.pid, *sys.argv[1:], flush=True)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str], tuple[str, ...]]:
    def write(text: str) -> tuple[str, ...]:
        file = tmp_path / "server.py"
        file.write_text(text)
        return sys.executable, "-u", str(file)

    return write


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "server.log"


@pytest.fixture
def launch(
    program: Callable, log: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Runs the launcher's `main`, and returns its status and what was shown."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}

    def run(*argv: str, server: str = SERVER) -> tuple[int, str, str]:
        with_stand_in = partial(running_server, log=log, program=program(server))
        monkeypatch.setattr(with_server, "running_server", with_stand_in)
        return main(argv), *capfd.readouterr()

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def processes(log: Path) -> list[int]:
    """File descriptors of the server and its child; one is ready when its process has ended."""
    return [os.pidfd_open(int(word)) for word in log.read_text().split()[1:3]]


def ended(processes: list[int], seconds: float = 30) -> bool:
    """Whether all have ended; their ends may come a moment after the signal."""
    return all(select.select([process], [], [], seconds)[0] for process in processes)


def gone(log: Path) -> bool:
    """Whether the server and its child have ended, some time ago or in a moment."""
    try:
        return ended(processes(log))
    except ProcessLookupError:
        return True


def test_the_server_is_up_inside_and_gone_afterwards(program: Callable, log: Path) -> None:
    with running_server(["--max-model-len", "512"], log, program=program(SERVER)) as url:
        assert requests.get(f"{url}/health", timeout=10).ok
        started = processes(log)
        assert not ended(started, 0)
        assert "--max-model-len 512" in log.read_text()
    assert ended(started)
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{url}/health", timeout=10)


def test_the_server_is_gone_after_an_error(program: Callable, log: Path) -> None:
    with pytest.raises(ZeroDivisionError), running_server([], log, program=program(SERVER)):
        started = processes(log)
        raise ZeroDivisionError
    assert ended(started)


def test_a_server_that_ignores_sigterm_is_killed(program: Callable, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(with_server, "STOP_TIMEOUT", 0.1)
    stubborn = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SERVER
    with running_server([], log, program=program(stubborn)):
        started = processes(log)
    assert ended(started)


@pytest.mark.parametrize("port", ["65536", "99999", "-1"])
def test_a_port_that_does_not_exist(launch: Callable, port: str) -> None:
    status, _, told = launch("--port", port, "--", "true")
    assert status == 1
    assert told.splitlines()[-1] == f"--port {port}: there is no such port, only 1 to 65535"


@pytest.mark.parametrize("flags", [["--port", "{}"], ["--port={}"]])
def test_the_port_that_is_asked_for(program: Callable, log: Path, flags: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with running_server([flag.format(port) for flag in flags], log, program=program(SERVER)) as url:
        assert url == f"http://127.0.0.1:{port}"


def test_a_taken_port_is_told_at_once(program: Callable, log: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(ServerFailed, match=f"{port} is taken"),
            running_server([f"--port={port}"], log, program=program(SERVER)),
        ):
            pytest.fail("the server cannot be up")
    assert not log.exists()


FAILURES = {
    "an error": ("print('loading')\nraise ValueError('no such dtype: float7')", "ValueError: no such dtype: float7"),
    "our own words": (
        "import sys\nprint('INFO x')\nsys.exit('vllm_server.py: x/y is not in the local cache')",
        "x/y is not in the local cache",
    ),
    "words after the error": ("print('RuntimeError: out of memory')\nprint('bye')\nexit(1)", "out of memory"),
    "other words": ("print('usage: server')\nprint('unrecognized arguments: --x')\nexit(2)", "unrecognized arguments"),
    "nothing": ("exit(1)", "printed nothing"),
    "a clean end": ("print('done')", "done"),
    "killed": ("import os\nprint('at work')\nos.kill(os.getpid(), 9)", "at work"),
    "no text": ("import sys\nsys.stdout.buffer.write(b'\\xff\\nError: \\xfe')\nexit(1)", "Error"),
}


@pytest.mark.parametrize(("text", "reason"), FAILURES.values(), ids=FAILURES.keys())
def test_a_server_that_dies_is_told_with_its_reason(program: Callable, log: Path, text: str, reason: str) -> None:
    with pytest.raises(ServerFailed) as caught, running_server([], log, program=program(text)):
        pytest.fail("the server cannot be up")
    assert reason in str(caught.value)
    assert str(log) in str(caught.value)


def test_progress_follows_the_log(program: Callable, log: Path) -> None:
    stages, gate = [], log.with_name("gate")
    waits = f"import os, time\nprint('KV cache size: 1')\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.01)\n"

    def progress(stage: str, seconds: float) -> None:
        stages.append(stage)
        if stage == "warming up":
            gate.touch()

    with running_server([], log, progress, program(waits + SERVER)):
        assert stages[0] == "importing vLLM"
        assert stages[-1] == "warming up"


def test_the_launcher_speaks_chinese_and_so_do_the_programs_that_it_starts(
    launch: Callable, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    code = "import os; print(os.environ['QWEN_LANG'])"
    _, shown, told = launch("--dtype", "float32", "--lang", "zh", "--", sys.executable, "-c", code)
    assert shown == "zh\n"
    assert told.startswith(f"正在启动服务端，日志：{with_server.LOG}\n正在启动服务端：导入 vLLM …… 0 秒")
    assert "--dtype float32 --lang zh" in log.read_text()


def test_a_server_that_fails_is_told_in_chinese(launch: Callable, log: Path, chinese: None) -> None:
    status, _, shown = launch("--", "true", server="raise ValueError('no such dtype')")
    assert status == 1
    assert f"服务端没有启动：ValueError: no such dtype\n日志：{log}\n" in shown
    assert launch("--port", "65536", "--", "true")[2].endswith("--port 65536：没有这个端口，只有 1 到 65535\n")
    assert "等它就绪，运行命令 COMMAND" in launch("--model", "x")[2]


@pytest.mark.parametrize("status", [0, 3])
def test_the_commands_status_is_returned(launch: Callable, log: Path, status: int) -> None:
    assert launch("--", sys.executable, "-c", f"raise SystemExit({status})")[0] == status
    assert gone(log)


def test_the_command_finds_the_server(launch: Callable) -> None:
    code = "import os, urllib.request as r; print(r.urlopen(os.environ['QWEN_URL'] + '/health').status)"
    status, shown, _ = launch("--", sys.executable, "-c", code)
    assert (status, shown) == (0, "200\n")


def test_only_the_first_dashes_part_server_and_command(launch: Callable, log: Path) -> None:
    code = "import sys; print(sys.argv[1:])"
    _, shown, _ = launch("--dtype", "float32", "--", sys.executable, "-c", code, "--", "--port")
    assert shown == "['--', '--port']\n"
    assert "--dtype float32" in log.read_text()


def test_a_server_that_fails_is_told_and_no_command_runs(launch: Callable, tmp_path: Path) -> None:
    made = tmp_path / "made"
    status, _, shown = launch("--", "touch", str(made), server="raise ValueError('no such dtype')")
    assert status == 1
    assert "the server did not start: ValueError: no such dtype" in shown
    assert "Traceback" not in shown
    assert not made.exists()


@pytest.mark.parametrize("command", [["/no/such/program"], [os.devnull]])
def test_a_command_that_cannot_run_is_told(launch: Callable, log: Path, command: list[str]) -> None:
    status, _, shown = launch("--", *command)
    assert status in (126, 127)
    assert command[0] in shown
    assert not log.exists()


@pytest.mark.parametrize("argv", [[], ["--model", "x"], ["--"]])
def test_without_a_command_the_usage_is_shown(launch: Callable, log: Path, argv: list[str]) -> None:
    status, _, shown = launch(*argv)
    assert status == 2
    assert "COMMAND" in shown
    assert not log.exists()
