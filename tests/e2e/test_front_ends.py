"""Several front-end processes, and how a server of them lives and dies; four engine starts, so by `make test-long`."""

import os
import signal
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pexpect
import psutil
import pytest
import requests

from qwen_vllm.protocol import ChatError, Sampling
from qwen_vllm.with_server import ServerFailed, free_port, running_server
from tests.support import ROOT
from tests.support.demo import FRANCE
from tests.support.probes import server_process
from vllm_client import stream_chat

pytestmark = pytest.mark.long
ROOM = 6
FLAGS = f"--api-server-count 2 --max-num-seqs 2 --max-num-queued-reqs {ROOM} --shutdown-timeout 3".split()


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture
def url(port: int, tmp_path: Path) -> Iterator[str]:
    with running_server([*FLAGS, "--port", str(port)], tmp_path / "log") as url:
        yield url


@pytest.fixture(scope="module")
def terminal(port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[pexpect.spawn]:
    """One console client for all the servers that come and go at its address."""
    chat = pexpect.spawn(
        sys.executable,
        ["vllm_client.py", "--url", f"http://127.0.0.1:{port}", "--temperature", "0"],
        cwd=ROOT,
        env={**os.environ, "XDG_STATE_HOME": str(tmp_path_factory.mktemp("state")), "PROMPT_TOOLKIT_NO_CPR": "1"},
        encoding="utf-8",
        timeout=40,
        dimensions=(40, 100),
    )
    yield chat
    chat.close()


def family(port: int) -> list[psutil.Process]:
    """The server and all that it has started; the server comes first."""
    server = server_process(f":{port}")
    return [server, *server.children(recursive=True)]


def long_answer(url: str) -> Iterator:
    answer = stream_chat(url, "Write a very long story.", sampling=Sampling(max_tokens=4000))
    next(answer)
    return answer


def asked_in(terminal: pexpect.spawn, seen: str) -> None:
    terminal.send(FRANCE + "\r")
    terminal.expect_exact(seen)


def none_left(processes: list[psutil.Process], port: int) -> None:
    assert not psutil.wait_procs(processes, timeout=15)[1]
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_the_bound_of_the_queue_is_one_for_all_front_ends(url: str) -> None:
    def ask(i: int) -> requests.Response:
        return requests.post(f"{url}/chat", json={"query": f"Count from {i}.", "max_tokens": 60}, timeout=300)

    with ThreadPoolExecutor(4 * ROOM) as pool:
        responses = list(pool.map(ask, range(4 * ROOM)))
    statuses = Counter(response.status_code for response in responses)
    assert statuses.keys() == {200, 503}
    # Front ends read each other's counts without a lock: each may let in what came at the same moment.
    assert ROOM <= statuses[200] < 2 * ROOM
    assert all(response.headers["Retry-After"] for response in responses if response.status_code == 503)


def test_a_server_that_is_stopped_gives_running_answers_their_time(
    url: str, port: int, terminal: pexpect.spawn
) -> None:
    asked_in(terminal, "The capital of France is Paris.")
    processes, answers = family(port), [long_answer(url) for _ in range(2)]
    processes[0].terminate()
    with pytest.raises(ChatError, match="the server is stopping"), suppress(requests.RequestException):
        while True:
            list(stream_chat(url, "Hi"))
    for answer in answers:
        with pytest.raises(ChatError, match="the server is stopping"):
            list(answer)
    assert processes[0].wait(15) == 0
    none_left(processes, port)
    asked_in(terminal, "Error: no server answers")


@pytest.mark.parametrize("which", [lambda name: "EngineCor" in name, lambda name: "APIServer" in name])
def test_a_server_that_loses_a_process_ends_with_explicit_errors(
    url: str, port: int, terminal: pexpect.spawn, which: Callable[[str], bool]
) -> None:
    asked_in(terminal, "The capital of France is Paris.")
    processes, answers = family(port), [long_answer(url) for _ in range(2)]
    next(process for process in processes[1:] if which(process.name())).kill()
    for answer in answers:
        with pytest.raises(ChatError, match=r"has died|is stopping|broke the answer off|without its last line"):
            list(answer)
    assert processes[0].wait(30) != 0
    none_left(processes, port)
    asked_in(terminal, "Error: no server answers")


def test_a_server_that_is_killed_leaves_no_engine_behind(url: str, port: int) -> None:
    processes = family(port)
    processes[0].kill()
    none_left(processes, port)


@pytest.mark.parametrize("seconds", [1, 4, 8])
def test_a_server_that_is_stopped_while_it_loads_leaves_nothing(port: int, tmp_path: Path, seconds: float) -> None:
    processes: list[psutil.Process] = []

    def stop(stage: str, waited: float) -> None:
        if waited > seconds and not processes:
            processes.extend(family(port))
            processes[0].send_signal(signal.SIGTERM)

    with pytest.raises(ServerFailed), running_server(["--port", str(port)], tmp_path / "log", stop):
        pass
    assert processes[0].wait(15) != 0
    none_left(processes, port)
