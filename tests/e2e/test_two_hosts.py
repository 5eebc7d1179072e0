"""Two machines, one of them cut off: engines on both, one model over both, a server on each. For root, with `ip`."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from threading import Semaphore

import psutil
import pytest
import requests

from qwen_vllm.protocol import ChatError, ChatResult, Sampling
from qwen_vllm.with_server import SERVER, running_server
from tests.support import ROOT
from tests.support.demo import FRANCE, PARIS
from tests.support.hosts import Host, two_hosts
from tests.support.probes import gauge, server_process
from vllm_client import stream_chat

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="needs root and ip: apt install iproute2"),
]
STALL = 20
SMALL = f"--max-model-len 2048 --kv-cache-memory-bytes 256M --stall-timeout {STALL}".split()
ENGINES = """--data-parallel-size 2 --data-parallel-size-local 1 --data-parallel-address {head}
    --data-parallel-rpc-port 13345"""
STAGES = "--pipeline-parallel-size 2 --nnodes 2 --master-addr {head}"
SETUPS = {
    "engines": (f"{ENGINES} --api-server-count 1", f"{ENGINES} --data-parallel-start-rank 1 --headless"),
    "stages": (f"{STAGES} --node-rank 0", f"{STAGES} --node-rank 1 --headless"),
}
"""The flags of the server, and of what the other host runs for it."""


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as hosts:
        yield hosts


@contextmanager
def program(log: Path, command: Sequence[str | Path]) -> Iterator[subprocess.Popen]:
    """A program that runs beside the test, and ends with it."""
    with log.open("wb") as out:
        started = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
    try:
        yield started
    finally:
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()


def on(host: Host, *flags: str) -> list[str]:
    """The command of a small server on that host."""
    return [*host.runs, *SERVER, *SMALL, *flags]


def server(host: Host, port: int, log: Path, *flags: str) -> contextmanager:
    where = ("--host", host.address, "--port", str(port))
    return running_server([*SMALL, *flags, *where], log, program=(*host.runs, *SERVER))


def family(pid: int) -> list[psutil.Process]:
    """A program and all that it has started."""
    first = psutil.Process(pid)
    return [first, *first.children(recursive=True)]


def until(true: Callable[[], bool]) -> None:
    """Wait for a program to listen, or for what it says."""
    for _ in range(100):
        with suppress(requests.ConnectionError):
            if true():
                return
        time.sleep(0.2)
    pytest.fail("it did not come")


def asked(url: str) -> str:
    return requests.post(f"{url}/chat", json={"query": FRANCE, "temperature": 0}, timeout=60).json()["text"]


def streams(pool: ThreadPoolExecutor, url: str, number: int, tokens: int) -> list[Future]:
    """Long answers, each of which has begun: its last word is its finish reason or its error."""
    begun = Semaphore(0)

    def read(i: int) -> str:
        answer = stream_chat(url, f"Write a long story about number {i}.", sampling=Sampling(max_tokens=tokens))
        try:
            while not isinstance(part := next(answer), ChatResult):
                begun.release()
        except ChatError as error:
            return error.message
        return part.finish_reason

    answers = [pool.submit(read, i) for i in range(number)]
    for _ in range(3 * number):
        assert begun.acquire(timeout=60)
    return answers


@pytest.mark.parametrize("setup", SETUPS)
def test_a_host_is_cut_off_and_comes_back(hosts: tuple[Host, Host], tmp_path: Path, setup: str) -> None:
    head, other = hosts
    flags, theirs = (flags.format(head=head.address).split() for flags in SETUPS[setup])
    with (
        program(tmp_path / "other", on(other, *theirs)) as computing,
        server(head, 8000, tmp_path / "head", *flags) as url,
        ThreadPoolExecutor(8) as pool,
    ):
        assert asked(url) == PARIS
        answering = server_process(url)
        everything = family(answering.pid) + family(computing.pid)
        answers = streams(pool, url, 4, 1900)  # longer than until the server has noticed
        until(lambda: gauge(url, "num_requests_running") == 4)
        other.cut_off()
        until(lambda: requests.get(f"{url}/ready", timeout=10).status_code == 503)
        for answer in answers:
            assert "the engine has died" in answer.result(3 * STALL)
        assert answering.wait(3 * STALL) != 0
        assert computing.wait(3 * STALL) == 1
        assert not psutil.wait_procs(everything, timeout=15)[1]
    other.reconnect()
    with (
        program(tmp_path / "other again", on(other, *theirs)),
        server(head, 8000, tmp_path / "head again", *flags) as url,
    ):
        assert asked(url) == PARIS


@pytest.mark.skipif(not shutil.which("haproxy"), reason="no HAProxy: apt install haproxy")
def test_of_two_servers_one_is_cut_off_and_comes_back(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    here, other = hosts
    settings = (ROOT / "deploy/haproxy.cfg").read_text()
    for host, address in ((here, "127.0.0.1:8001"), (other, "127.0.0.1:8002")):
        settings = settings.replace(address, address.replace("127.0.0.1", host.address))
    (tmp_path / "haproxy.cfg").write_text(settings)
    far, url = f"http://{other.address}:8002", "http://127.0.0.1:8080"
    with (
        program(tmp_path / "other", on(other, "--host", other.address, "--port", "8002")),
        server(here, 8001, tmp_path / "here") as near,
        ThreadPoolExecutor(8) as pool,
    ):
        until(lambda: requests.get(f"{far}/ready", timeout=10).ok)
        # Only now, as it takes a server that does not answer yet from its list.
        with program(tmp_path / "haproxy", ["haproxy", "-f", tmp_path / "haproxy.cfg"]):
            until(lambda: requests.get(f"{url}/ready", timeout=10).ok)
            answers = streams(pool, url, 8, 150)
            running = partial(gauge, name="num_requests_running")
            until(lambda: running(near) + running(far) == 8)
            going_on, lost = running(near), running(far)
            other.cut_off()
            for i in range(6):  # of which each server would get some
                short = {"query": f"Say {i}.", "max_tokens": 3}
                assert requests.post(f"{url}/chat", json=short, timeout=60).ok
            ends = [answer.result(90) for answer in answers]
            assert sum(end in ("stop", "length") for end in ends) == going_on > 0
            assert ends.count("the server broke the answer off") == lost > 0
            other.reconnect()
            here.cut_off()
            until(lambda: requests.get(f"{url}/ready", timeout=10).ok)
            assert asked(url) == PARIS
