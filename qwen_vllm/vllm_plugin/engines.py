"""Several engines on one GPU, which engine takes a request, and engines that sleep while nobody asks."""

import logging
import math
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any
from zlib import crc32

LOG = logging.getLogger("vllm.qwen_vllm")
SLEEP_AFTER = "QWEN_VLLM_SLEEP_AFTER"
"""The environment variable that tells the engines of --sleep-after, in minutes."""
FIRST_ALONE = 96
"""So many requests the first of several engines on one GPU takes alone: with so few, two do no more than one."""
NEARLY_FULL = 0.9
"""Of an engine's places: beyond it a request goes where most are free, as it would wait while the other has room."""


def share_gpus(resolve: Callable[[Any], list[int] | None]) -> Callable[[Any], list[int] | None]:
    """Let --device-ids name a GPU for several engines."""

    def resolve_repeated(args: Any) -> list[int] | None:
        named = args.device_ids
        if not named or len(named) > args.data_parallel_size:
            return resolve(args)  # the GPUs of one engine must differ
        args.device_ids = [*dict.fromkeys(named)]
        physical = dict(zip(args.device_ids, resolve(args) or (), strict=True))
        args.device_ids = named
        return [physical[device] for device in named]

    return resolve_repeated


def preferred_engine(config: Any, beginning: str) -> int | None:
    """Choose one of several engines by how a conversation begins: its prefix cache may hold the turns before.

    Args:
        config: vLLM's ParallelConfig.
        beginning: the system message and the first question.
    """
    engines: int = config.data_parallel_size_local if config.local_engines_only else config.data_parallel_size
    return crc32(beginning.encode()) % engines if engines > 1 else None


def prefers(choose: Callable[[Any, Any], bytes]) -> Callable[[Any, Any], bytes]:
    """Take data_parallel_rank for a wish, which yields to load."""

    def choose_preferred(client: Any, request: Any) -> bytes:
        counts = zip(client.core_engines, client.lb_engines, strict=True)
        loads = [max(client.client_count * client.engine_inflight[name], sum(now[:2])) for name, now in counts]
        config = client.vllm_config
        gpus = config.parallel_config.assigned_physical_gpu_ids or ()
        most = min(1.25 * min(loads) + 8, NEARLY_FULL * config.scheduler_config.max_num_seqs)
        preferred = request.data_parallel_rank
        if len(gpus) > 1 and len(set(gpus)) == 1 and loads[0] < FIRST_ALONE:
            request.data_parallel_rank = 0
        elif preferred is not None and loads[preferred] > most:
            request.data_parallel_rank = None
        return choose(client, request)

    return choose_preferred


def takes_off_what_ended(process: Callable[[Any, Any], Awaitable[None]]) -> Callable[[Any, Any], Awaitable[None]]:
    """Take this client's requests that have ended off the counts of the engines' requests, which come every 100 ms.

    Until then an engine that has just ended hundreds would seem as full as the other. What this client sees is taken
    for what all see, as vLLM does where it adds what was sent.
    """

    async def process_counted(client: Any, outputs: Any) -> None:
        before = [client.engine_inflight[name] for name in client.core_engines if outputs.finished_requests]
        await process(client, outputs)
        for had, name, counts in zip(before, client.core_engines, client.lb_engines, strict=False):
            counts[1] = max(0, counts[1] - client.client_count * (had - client.engine_inflight[name]))

    return process_counted


def sleeps_when_idle(handle: Callable[[Any, Any, Any], None]) -> Callable[[Any, Any, Any], None]:
    """Put an engine to sleep when it has had nothing to do for so long, and wake it for the next request.

    The clock is the server's watch, which asks each engine every few seconds. Engines of a mixture of experts step
    together: they stay awake.
    """
    from vllm.v1.engine import EngineCoreRequestType
    from vllm.v1.engine.core import DPEngineCoreProc

    limit, last_busy = 60 * float(os.environ[SLEEP_AFTER]), math.inf  # until the watch begins, the model is loaded

    def handle_awake(engine: Any, kind: EngineCoreRequestType, request: Any) -> None:
        nonlocal last_busy
        now, asleep = time.monotonic(), engine.model_executor.is_sleeping
        if kind is EngineCoreRequestType.ADD or engine.has_work() or last_busy > now:
            last_busy = now
            if asleep:
                engine.wake_up()
                LOG.info("awake again after %.1f s", time.monotonic() - now)
        elif not asleep and now - last_busy > limit and not isinstance(engine, DPEngineCoreProc):
            # Without vLLM's clearing of the caches of images: those of the front ends would not know.
            engine.pause_scheduler(clear_cache=False)
            engine.reset_prefix_cache()
            engine.model_executor.sleep(1)
            LOG.info("asleep, as there was no request for %.0f s", now - last_busy)
        handle(engine, kind, request)

    return handle_awake
