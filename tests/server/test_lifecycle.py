"""The server's life on a scripted engine: the watch, readiness, and how it stops."""

import asyncio
import shutil
import subprocess
from argparse import Namespace
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.engine.exceptions import EngineDeadError

from qwen_vllm.server import lifecycle
from qwen_vllm.server.lifecycle import IDLE, LATE, Lifecycle

HERE = {"local_engines_only": False, "data_parallel_size": 2, "data_parallel_size_local": 2, "nnodes": 1}
"""vLLM's configuration of two engines on this machine."""


class ScriptedEngine:
    """Answers every sign of life until told to hang; records what is asked of it."""

    def __init__(self, hangs: bool = False, unfinished: int = 0) -> None:
        self.hangs, self.unfinished, self.errored = hangs, unfinished, False
        self.aborted: list[str] = []
        self.failures: list[Exception] = []
        self.vllm_config = SimpleNamespace(shutdown_timeout=7, parallel_config=SimpleNamespace(**HERE))
        self.output_handler = SimpleNamespace(cancel=self._end)
        self.output_processor = SimpleNamespace(request_states={"a": 1, "b": 2}, propagate_error=self.failures.append)

    async def is_sleeping(self) -> bool:
        if self.hangs:
            await asyncio.Event().wait()
        return False

    def get_num_unfinished_requests(self) -> int:
        return self.unfinished

    async def abort(self, request_ids: list[str], internal: bool) -> None:
        self.aborted += request_ids
        self.unfinished = 0

    def _end(self) -> None:
        self.errored = True


def living(engine: ScriptedEngine, **flags: float) -> tuple[Lifecycle, SimpleNamespace]:
    server = SimpleNamespace(config=SimpleNamespace(), should_exit=False, force_exit=False)
    timeouts = {"header_timeout": 1, "write_timeout": 1, "stall_timeout": 300, "shutdown_timeout": 0}
    timeouts |= {"sleep_after": 0, **flags}
    return Lifecycle(engine, server, Namespace(**timeouts)), server


def run(story: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(story, 20))


async def ended(server: SimpleNamespace) -> None:
    while not server.should_exit:
        await asyncio.sleep(0.01)


@pytest.fixture
def fast_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second of the watch lasts a millisecond."""
    wait = asyncio.wait
    monkeypatch.setattr(lifecycle.asyncio, "wait", lambda tasks, timeout: wait(tasks, timeout=timeout / 1000))
    monkeypatch.setattr(lifecycle, "PING_INTERVAL", 0.001)


def engine_time(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int], float | None]) -> list[int]:
    """Makes the engine's processor time a function of how often it is read; returns the readings."""
    readings: list[int] = []

    def read(_: Lifecycle) -> float | None:
        readings.append(1)
        return seconds(len(readings))

    monkeypatch.setattr(Lifecycle, "_engine_seconds", read)
    return readings


@pytest.mark.parametrize("hanging", [lambda n: 5.0, lambda n: 5.0 + n * 0.001])
def test_an_engine_that_neither_answers_nor_computes_is_given_up(
    fast_clock: None, monkeypatch: pytest.MonkeyPatch, hanging: Callable
) -> None:
    readings = engine_time(monkeypatch, hanging)
    engine = ScriptedEngine(hangs=True)
    life, _ = living(engine)
    run(life.watch())
    assert len(readings) == IDLE + 1
    assert engine.errored
    assert [type(error) for error in engine.failures] == [EngineDeadError]
    assert engine.vllm_config.shutdown_timeout == 0
    assert life.readiness().status_code == 503


@pytest.mark.parametrize("computing", [lambda n: float(n), lambda n: None])
def test_an_engine_that_computes_has_the_stall_timeout(
    fast_clock: None, monkeypatch: pytest.MonkeyPatch, computing: Callable
) -> None:
    readings = engine_time(monkeypatch, computing)
    engine = ScriptedEngine(hangs=True)
    run(living(engine, stall_timeout=IDLE * 3)[0].watch())
    assert len(readings) == IDLE * 3 + 1
    assert engine.errored


@pytest.mark.parametrize(
    ("where", "seconds"),
    [({}, IDLE), ({"data_parallel_size_local": 1}, IDLE * 3), ({"nnodes": 2}, IDLE * 3)],
    ids=["here", "an engine elsewhere", "a part of an engine elsewhere"],
)
def test_what_another_machine_computes_is_not_seen_so_it_has_the_stall_timeout(
    fast_clock: None, tmp_path: Path, capsys: pytest.CaptureFixture, where: dict[str, int], seconds: int
) -> None:
    idle = Path(shutil.copy("/bin/sleep", tmp_path / "VLLM::EngineCore"))
    with subprocess.Popen([idle, "60"]) as process:
        engine = ScriptedEngine(hangs=True)
        engine.vllm_config.parallel_config = SimpleNamespace(**{**HERE, **where})
        run(living(engine, stall_timeout=IDLE * 3)[0].watch())
        process.kill()
    assert f"has not answered for {seconds} s" in capsys.readouterr().err


def test_an_engine_that_answers_late_is_not_ready_and_then_ready_again(
    fast_clock: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = engine_time(monkeypatch, float)

    async def story() -> None:
        engine = ScriptedEngine(hangs=True)
        life, _ = living(engine)
        asked: list[asyncio.Event] = []

        async def answer_when_told() -> bool:
            asked.append(asyncio.Event())
            await asked[-1].wait()
            return False

        engine.is_sleeping = answer_when_told
        watching = asyncio.create_task(life.watch())
        while len(readings) <= LATE + 1:
            await asyncio.sleep(0.001)
        assert life.readiness().status_code == 503
        assert b"has not answered" in life.readiness().body
        asked[0].set()
        while len(asked) < 2:
            await asyncio.sleep(0.001)
        assert life.readiness().status_code == 200
        engine.errored = True
        asked[1].set()
        await watching

    run(story())


@pytest.mark.parametrize(("unfinished", "status"), [(0, 200), (1, 503)])
def test_an_engine_that_falls_asleep_is_ready(
    fast_clock: None, monkeypatch: pytest.MonkeyPatch, unfinished: int, status: int
) -> None:
    readings = engine_time(monkeypatch, float)

    async def story() -> None:
        life, _ = living(ScriptedEngine(hangs=True, unfinished=unfinished), sleep_after=30.0)
        watching = asyncio.create_task(life.watch())
        while len(readings) <= LATE + 1:
            await asyncio.sleep(0.001)
        assert life.readiness().status_code == status
        watching.cancel()

    run(story())


def test_a_server_that_stops_aborts_what_runs_and_ends() -> None:
    async def story() -> None:
        engine = ScriptedEngine(unfinished=2)
        life, server = living(engine)
        assert life.readiness().status_code == 200
        life.stop()
        assert life.stopping
        assert b"stopping" in life.readiness().body
        await ended(server)
        assert engine.aborted == ["a", "b"]
        assert (server.should_exit, server.force_exit) == (True, False)
        assert engine.vllm_config.shutdown_timeout == 0

    run(story())


def test_running_answers_have_the_shutdown_timeout() -> None:
    async def story() -> None:
        engine = ScriptedEngine(unfinished=1)
        life, server = living(engine, shutdown_timeout=60)
        life.stop()
        await asyncio.sleep(0.1)
        assert not server.should_exit
        engine.unfinished = 0
        await ended(server)
        assert server.should_exit

    run(story())


def test_a_second_signal_ends_at_once_but_not_an_echo_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        now = 100.0
        monkeypatch.setattr(lifecycle.time, "monotonic", lambda: now)
        life, server = living(ScriptedEngine(unfinished=1), shutdown_timeout=60)
        life.stop()
        now = 100.5
        life.stop()
        assert not server.force_exit
        now = 102.0
        life.stop()
        assert server.force_exit

    run(story())
