"""A team without an engine, and a front end that asks for one key's places again and again."""

import asyncio
import sqlite3
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from qwen_vllm.server.keys import KeyRing
from qwen_vllm.server.team import Team
from qwen_vllm.server.tickets import Ticket
from qwen_vllm.server.usage import UsageFile


def team_of(keys: Path, usage: Path, server: str = "server", bound: int | None = None) -> Team:
    """A team without an engine."""
    engine: Any = SimpleNamespace(output_processor=SimpleNamespace(request_states={}), errored=False)
    return Team(KeyRing(keys), UsageFile(usage, server), engine, bound, 8, ["m"])


def ask_often(keys: Path, usage: Path, times: int, together: Barrier, admitted: "SimpleQueue[int]") -> None:
    """Once all are there, asks so many times, half of them at once; tells how many requests were admitted."""

    async def ask() -> int:
        team, answers = team_of(keys, usage), list[Any]()
        (key,) = team.ring.by_name().values()
        together.wait(60)
        for at_once in [times // 2, *[1] * (times - times // 2)]:
            answers += await asyncio.gather(*[team.admit(key, {}) for _ in range(at_once)], return_exceptions=True)
        await team.close()
        return sum(isinstance(answer, Ticket) for answer in answers)

    admitted.put(asyncio.run(ask()))


def open_together(files: list[Path], together: Barrier, failed: "SimpleQueue[str]") -> None:
    """Opens each file at the same moment as the others, and tells what failed."""
    for file in files:
        together.wait(60)
        try:
            UsageFile(file, "server").close()
        except sqlite3.Error as error:
            failed.put(str(error))
