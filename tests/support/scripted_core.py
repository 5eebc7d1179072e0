"""A scripted stand-in for vLLM's engine process, behind vLLM's own client of it: the real AsyncLLM."""

import asyncio
import heapq
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from vllm import AsyncEngineArgs
from vllm.config import VllmConfig
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.engine.async_llm import AsyncLLM, EngineCoreClient
from vllm.v1.metrics.stats import PrefillStats

from qwen_vllm.models.demo import demo_model


class ScriptedCore:
    """Runs so many requests at once, the least priority first, and gives each a token a step.

    A step is made while `open` is set. `started` has the requests in their order of start.
    """

    engine_ranks_managed, client_count = (0,), 1

    def __init__(self, at_once: int) -> None:
        self.resources, self.open, self.started = SimpleNamespace(engine_dead=False), asyncio.Event(), []
        self._at_once, self._waiting, self._running = at_once, [], {}

    async def get_supported_tasks_async(self) -> tuple[str]:
        return ("generate",)

    async def add_request_async(self, request: Any) -> None:
        heapq.heappush(self._waiting, (request.priority, request.arrival_time, request.request_id, request))

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        self._waiting = [entry for entry in self._waiting if entry[2] not in request_ids]
        heapq.heapify(self._waiting)
        for name in request_ids:
            self._running.pop(name, None)

    async def get_output_async(self) -> EngineCoreOutputs:
        while True:
            await self.open.wait()
            await asyncio.sleep(0.001)  # the front end goes first
            while self._waiting and len(self._running) < self._at_once:
                *_, request = heapq.heappop(self._waiting)
                self.started.append(request)
                self._running[request.request_id] = request.sampling_params.max_tokens
            if self._running:
                return EngineCoreOutputs(outputs=[self._token(name) for name in [*self._running]], timestamp=0.0)

    def _token(self, name: str) -> EngineCoreOutput:
        self._running[name] -= 1
        ended = not self._running[name]
        if ended:
            del self._running[name]
        reason = FinishReason.LENGTH if ended else None
        return EngineCoreOutput(name, [1000], finish_reason=reason, prefill_stats=PrefillStats())

    def shutdown(self, timeout: float | None = None) -> None:
        pass


@cache
def _config(flags: tuple[tuple[str, Any], ...]) -> VllmConfig:
    return AsyncEngineArgs(str(demo_model()), load_format="dummy", **dict(flags)).create_engine_config()


def engine_on(core: ScriptedCore, **flags: Any) -> AsyncLLM:
    """vLLM's client of `core`."""
    config = _config(tuple(flags.items()))
    with patch.object(EngineCoreClient, "make_async_mp_client", lambda **_: core):
        return AsyncLLM(config, None, log_stats=False, log_requests=False)
