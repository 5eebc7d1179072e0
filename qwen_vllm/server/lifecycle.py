"""The server's life: when it is ready, how it stops, and what ends it when its engine no longer answers."""

import asyncio
import multiprocessing
import signal
import sys
import time
from argparse import Namespace
from contextlib import suppress
from typing import TYPE_CHECKING

import psutil
from starlette.datastructures import State
from starlette.responses import JSONResponse

from qwen_vllm.server.http_protocol import Connection

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

CLOSE_TIMEOUT = 2
"""Seconds that connections have for what is left to send when the server ends."""
PING_INTERVAL = 2
LATE = 10
"""Seconds without a sign of life after which the engine counts as not ready."""
IDLE = 20
"""Seconds without a sign of life in which the engine did not compute either, after which it is given up."""
ENGINE_NAMES = ("VLLM::EngineCor", "VLLM::Worker")
"""What vLLM calls its engine's processes; the system cuts names after 15 characters."""


class Lifecycle:
    """One front-end process of a running server, from before it listens until it has ended.

    Args:
        engine: vLLM's client of the engine.
        state: the application's; `state.draining` tells the guard to refuse new work.
        args: the command line; `args.stopped` tells `main` that the end was asked for.
    """

    def __init__(self, engine: "EngineClient", state: State, args: Namespace) -> None:
        self._engine, self._state, self._args = engine, state, args
        self._silent = 0
        state.draining = False

    def begin(self) -> None:
        """Sets deadlines, signals and the watch of the engine; called when uvicorn is about to listen."""
        config = self._state.server.config
        config.header_timeout, config.write_timeout = self._args.header_timeout, self._args.write_timeout
        config.http_protocol_class = Connection
        # vLLM sets no bound: one client that has stopped reading would keep the server from ending.
        config.timeout_graceful_shutdown = CLOSE_TIMEOUT
        # vLLM's own handlers stop the engine first, and its streams with it, without a word to their clients.
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._stop)
        self._watching = asyncio.create_task(self._watch())

    def readiness(self) -> JSONResponse:
        """The answer of GET /ready: 200 where a request would be served, else 503 with the reason."""
        reason = None
        if self._engine.errored:
            reason = "the engine has died"
        elif self._state.draining:
            reason = "the server is stopping"
        elif self._silent > LATE:
            reason = f"the engine has not answered for {self._silent} s"
        return JSONResponse({"ready": not reason, "reason": reason}, 503 if reason else 200)

    async def _watch(self) -> None:
        """Asks the engine again and again for a sign of life, which it gives between its steps; ends the server where
        none comes: after --stall-timeout seconds, or sooner where the engine does not even compute.
        """
        computed = self._engine_seconds()
        while not self._engine.errored:
            sign = asyncio.ensure_future(self._engine.is_sleeping())
            idle = 0
            # Counted, not read from a clock: a server that was itself stopped (Ctrl-Z) must not blame its engine.
            while not (await asyncio.wait((sign,), timeout=1))[0]:
                self._silent, idle = self._silent + 1, idle + 1
                seconds = self._engine_seconds()
                if seconds is None or seconds > (computed or 0) + 0.1:
                    computed, idle = seconds, 0
                if idle >= IDLE or 0 < self._args.stall_timeout <= self._silent:
                    sign.cancel()
                    return self._give_up()
            sign.exception()
            self._silent = 0
            await asyncio.sleep(PING_INTERVAL)

    def _engine_seconds(self) -> float | None:
        """Processor time that the engine has taken, in seconds; None where it runs on other machines."""
        main = multiprocessing.parent_process()  # of several front ends; a single one is the server itself
        times = []
        for child in psutil.Process(main.pid if main else None).children(recursive=True):
            with suppress(psutil.Error):
                if child.name().startswith(ENGINE_NAMES):
                    times.append(sum(child.cpu_times()[:2]))
        return sum(times) if times else None

    def _give_up(self) -> None:
        """Ends all answers with an error. From here on /health says 503, and vLLM's own watch ends the server."""
        from vllm.v1.engine.exceptions import EngineDeadError

        print(f"The engine has not answered for {self._silent} s: giving it up.", file=sys.stderr, flush=True)
        self._engine.vllm_config.shutdown_timeout = 0
        self._engine.output_processor.propagate_error(EngineDeadError())
        self._engine.output_handler.cancel()

    def _stop(self) -> None:
        """Ends the server: new requests are refused, running ones have --shutdown-timeout seconds; told twice, none."""
        if self._state.draining:
            # One Ctrl-C reaches several front ends twice, from the terminal and from their parent.
            if time.monotonic() - self._stopping > 1:
                self._state.server.should_exit = self._state.server.force_exit = True
            return
        self._stopping = time.monotonic()
        self._state.draining = self._args.stopped = True
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(self._args.shutdown_timeout):
                while self._engine.get_num_unfinished_requests():
                    await asyncio.sleep(0.05)
        await self._engine.abort(list(self._engine.output_processor.request_states), internal=True)
        # What may take its time has had it: the engine is to stop at once.
        self._engine.vllm_config.shutdown_timeout = 0
        self._state.server.should_exit = True
