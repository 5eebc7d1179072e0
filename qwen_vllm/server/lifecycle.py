"""The server's life: when it is ready, how it stops, and what ends it when its engine no longer answers."""

import asyncio
import multiprocessing
import signal
import sys
import time
from argparse import Namespace
from contextlib import suppress
from functools import partial
from typing import ClassVar

import psutil
import uvicorn
from starlette.responses import JSONResponse
from vllm.entrypoints.launchers.api_server.entry import run_server_worker, setup_server
from vllm.exceptions import QueueOverflowError
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from qwen_vllm.server.http_protocol import HttpProtocol, Limits
from qwen_vllm.server.team import Team

CLOSE_TIMEOUT = 2
"""Seconds that connections have for what is left to send when the server ends."""
PING_INTERVAL = 2
LATE = 10
"""Seconds without a reply after which the engine counts as not ready."""
IDLE = 20
"""Give the engine up after this many seconds without a reply during which it also used no CPU time."""
ENGINE_NAMES = ("VLLM::EngineCor", "VLLM::Worker")
"""What vLLM calls its engine's processes; the system cuts names after 15 characters."""


async def run_server(args: Namespace) -> None:
    """Run vLLM's server with one front end, and leave our signal handlers as they are.

    Takes the place of vLLM's function of that name (see `patches.SIGNALS`). Ends the program with status 1 where the
    server ended though nobody asked it to.
    """
    await run_server_worker(*setup_server(args, reuse_port=False), args)
    if not Lifecycle.was_asked_to_stop:
        sys.exit("vllm_server.py: the engine has died; the log above says why")


class Lifecycle:
    """One front-end process of a running server, from before it listens until it has ended.

    Args:
        engine: vLLM's client of the engine.
        server: vLLM's uvicorn server, which does not listen yet.
        args: the command line.
        team: with --key-file, whose requests may wait for their turn.

    Attributes:
        was_asked_to_stop: whether a signal has asked this process to stop.
    """

    was_asked_to_stop: ClassVar[bool] = False

    def __init__(self, engine: AsyncLLM, server: uvicorn.Server, args: Namespace, team: Team | None = None) -> None:
        self._engine, self._server, self._args, self._team = engine, server, args, team
        self._silent = 0
        self._stopping_since: float | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        """Kept, as asyncio itself keeps no task alive."""

    @property
    def stopping(self) -> bool:
        """Whether new requests are to be refused."""
        return self._stopping_since is not None

    def begin(self) -> None:
        """Set deadlines and signal handlers, and start the watch of the engine."""
        config = self._server.config
        limits = Limits(
            self._args.header_timeout,
            self._args.write_timeout,
            self._args.h11_max_incomplete_event_size,
            self._args.h11_max_header_count,
        )
        config.http_protocol_class = partial(HttpProtocol, limits=limits)  # type: ignore[assignment]
        # vLLM sets no bound: one client that has stopped reading would keep the server from ending.
        config.timeout_graceful_shutdown = CLOSE_TIMEOUT
        # vLLM's own handlers stop the engine first, and its streams with it, without a word to their clients.
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self.stop)
        if self._team:
            reread = self._team.ring.expect_change
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reread)
            self._tasks.add(asyncio.create_task(self._team.run()))
        self._tasks.add(asyncio.create_task(self.watch()))

    def readiness(self) -> JSONResponse:
        """Answer GET /ready: 200 where a request would be served, else 503 with the reason."""
        reason = None
        if self._engine.errored:
            reason = "the engine has died"
        elif self.stopping:
            reason = "the server is stopping"
        elif self._silent > LATE and not self._may_fall_asleep():
            reason = f"the engine has not answered for {self._silent} s"
        return JSONResponse({"ready": not reason, "reason": reason}, 503 if reason else 200)

    def _may_fall_asleep(self) -> bool:
        """Tell whether the engine may be silent because it brings its weights to memory: the first time takes long."""
        return bool(self._args.sleep_after) and not self._engine.get_num_unfinished_requests()

    async def watch(self) -> None:
        """Ask the engine again and again for a reply, which it gives between its steps.

        Where none comes, the server ends: after --stall-timeout seconds, or sooner where the engine does not compute.
        """
        computed = self._engine_seconds()
        while not self._engine.errored:
            reply = asyncio.ensure_future(self._engine.is_sleeping())
            idle = 0
            # Counted, not read from a clock: a server that was itself stopped (Ctrl-Z) must not blame its engine.
            while not (await asyncio.wait((reply,), timeout=1))[0]:
                self._silent, idle = self._silent + 1, idle + 1
                seconds = self._engine_seconds()
                if seconds is None or seconds > (computed or 0) + 0.1:
                    computed, idle = seconds, 0
                if idle >= IDLE or 0 < self._args.stall_timeout <= self._silent:
                    reply.cancel()
                    return self._give_up()
            reply.exception()
            self._silent = 0
            await asyncio.sleep(PING_INTERVAL)

    def _engine_seconds(self) -> float | None:
        """Return the CPU time that the engine has used, in seconds; None where some of it runs on other machines."""
        config = self._engine.vllm_config.parallel_config
        here = config.local_engines_only or config.data_parallel_size_local == config.data_parallel_size
        if config.nnodes > 1 or not here:
            return None
        main = multiprocessing.parent_process()  # of several front ends; a single one is the server itself
        times = []
        for child in psutil.Process(main.pid if main else None).children(recursive=True):
            with suppress(psutil.Error):
                if child.name().startswith(ENGINE_NAMES):
                    times.append(sum(child.cpu_times()[:2]))
        return sum(times) if times else None

    def _give_up(self) -> None:
        """End all answers with an error. From here on /health says 503, and vLLM's own watchdog ends the server."""
        print(f"The engine has not answered for {self._silent} s: giving it up.", file=sys.stderr, flush=True)
        self._engine.vllm_config.shutdown_timeout = 0
        self._engine.output_processor.propagate_error(EngineDeadError())
        self._engine.output_handler.cancel()

    def stop(self) -> None:
        """End the server: new requests are refused, running ones have --shutdown-timeout seconds; told twice, none."""
        if self._stopping_since is not None:
            # One Ctrl-C reaches several front ends twice, from the terminal and from their parent.
            if time.monotonic() - self._stopping_since > 1:
                self._server.should_exit = self._server.force_exit = True
            return
        Lifecycle.was_asked_to_stop = True
        self._stopping_since = time.monotonic()
        self._tasks.add(asyncio.create_task(self.drain()))

    async def drain(self) -> None:
        """Wait for running answers as long as they have, abort the rest, and let the server end."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._args.shutdown_timeout):
                while self._engine.get_num_unfinished_requests() or (self._team and self._team.holds):
                    await asyncio.sleep(0.05)
        if self._team:
            self._team.end_held(QueueOverflowError())
        await self._engine.abort(list(self._engine.output_processor.request_states), internal=True)
        # What may take its time has had it: the engine is to stop at once.
        self._engine.vllm_config.shutdown_timeout = 0
        self._server.should_exit = True
