"""A server without a front end, and the head that it works for."""

import socket
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator

import pytest

from qwen_vllm.server import headless

ARGS = Namespace(data_parallel_address=None, master_addr="127.0.0.1", stall_timeout=0)
ENGINE = "import socket, sys; taken = socket.create_connection(('127.0.0.1', int(sys.argv[1]))); input()"


@pytest.fixture
def head() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as head:
        yield head


@pytest.fixture
def engine(head: socket.socket, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen]:
    """A process that is connected with the head, and does nothing."""
    monkeypatch.setattr(headless, "INTERVAL", 0.05)
    monkeypatch.setattr(headless, "LATE", 0.3)
    port = str(head.getsockname()[1])
    with subprocess.Popen([sys.executable, "-c", ENGINE, port], stdin=subprocess.PIPE) as engine:
        yield engine
        engine.kill()


def test_the_engine_ends_when_the_head_has_ended(
    head: socket.socket, engine: subprocess.Popen, capsys: pytest.CaptureFixture
) -> None:
    headless.end_with_head(ARGS)
    taken = head.accept()[0]
    with pytest.raises(subprocess.TimeoutExpired):
        engine.wait(1)
    head.close()
    taken.close()
    assert engine.wait(20) == -9
    assert "127.0.0.1 has not answered" in capsys.readouterr().err


def test_a_head_that_takes_no_connection_any_more_has_the_stall_timeout(
    head: socket.socket, engine: subprocess.Popen, capsys: pytest.CaptureFixture
) -> None:
    headless.end_with_head(Namespace(**{**vars(ARGS), "stall_timeout": 1}))
    taken = head.accept()[0]  # stays open, as where the cable is out
    head.close()
    assert engine.wait(20) == -9
    assert "127.0.0.1 has not answered for 1 s" in capsys.readouterr().err
    taken.close()
