"""Engines that sleep while nobody asks, on vLLM's own loop with a scripted executor."""

import queue
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.engine.core import EngineCoreProc

from qwen_vllm.vllm_plugin import engines
from qwen_vllm.vllm_plugin.patches import SLEEP


class Engine(EngineCoreProc):
    """vLLM's engine without a model: it notes what is asked of the parts that it lacks."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.busy, self.model_executor = (
            False,
            SimpleNamespace(is_sleeping=False, sleep=self._sleep, wake_up=self._wake),
        )
        self.model_executor.collective_rpc = self.done.append
        self.output_queue: queue.Queue[Any] = queue.Queue()
        self.scheduler = SimpleNamespace(
            set_pause_state=lambda state: self.done.append(state.name),
            finish_requests=lambda *_: [],
            reset_prefix_cache=lambda *_: bool(self.done.append("forget the prefixes") or True),
        )

    def has_work(self) -> bool:
        return self.busy

    def _reject_add_in_shutdown(self, request: Any) -> bool:
        return False

    def _reject_utility_in_shutdown(self, *_: Any) -> bool:
        return False

    def add_request(self, request: Any, wave: int = 0) -> None:
        self.done.append(f"add {request}")

    def _sleep(self, level: int) -> None:
        self.done.append(f"sleep {level}")
        self.model_executor.is_sleeping = True

    def _wake(self, tags: Any) -> None:
        self.done.append("wake")
        self.model_executor.is_sleeping = False

    def ping(self) -> Any:
        self._handle_client_request(EngineCoreRequestType.UTILITY, (0, 1, "is_sleeping", ()))
        return self.output_queue.get(timeout=10)

    def ask(self) -> None:
        self._handle_client_request(EngineCoreRequestType.ADD, ("a request", 0))


@pytest.fixture
def pass_minutes(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setenv(engines.SLEEP_AFTER, "10")
    monkeypatch.setattr(engines.time, "monotonic", lambda: clock.now)

    def pass_minutes(minutes: float) -> None:
        clock.now += 60 * minutes

    return pass_minutes


def test_an_engine_sleeps_when_nobody_asks_and_wakes_for_the_next_request(pass_minutes: Callable) -> None:
    with SLEEP.applied():
        engine = Engine()
        engine.ask()
        pass_minutes(9)
        engine.ping()
        assert engine.done == ["add a request"]
        pass_minutes(2)
        for _ in range(2):
            assert engine.ping()
        asleep = ["PAUSED_NEW", "synchronize_device", "forget the prefixes", "sleep 1"]
        assert engine.done == ["add a request", *asleep]
        pass_minutes(600)
        engine.ask()
        assert engine.done[5:] == ["wake", "UNPAUSED", "add a request"]
        pass_minutes(9)
        engine.ping()
        assert not engine.model_executor.is_sleeping


def test_loading_is_no_idleness(pass_minutes: Callable) -> None:
    with SLEEP.applied():
        engine = Engine()
        pass_minutes(60)
        engine.ping()
        pass_minutes(9)
        engine.ping()
        assert engine.done == []
        pass_minutes(2)
        engine.ping()
        assert engine.done[-1] == "sleep 1"


def test_a_long_answer_keeps_the_engine_awake(pass_minutes: Callable) -> None:
    with SLEEP.applied():
        engine = Engine()
        engine.ask()
        engine.busy = True
        pass_minutes(30)
        engine.ping()
        engine.busy = False
        pass_minutes(9)
        engine.ping()
        assert engine.done == ["add a request"]
