"""A front end of its own that asks for a key again and again: `python -m tests.support.counting KEYS USAGE TIMES`."""

import asyncio
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from qwen_vllm.protocol import ChatError
from qwen_vllm.server.keys import KeyRing
from qwen_vllm.server.team import Team
from qwen_vllm.server.usage import UsageFile


def team_of(keys: Path, usage: Path, server: str = "server", bound: int | None = None) -> Team:
    """A team without an engine."""
    engine: Any = SimpleNamespace(output_processor=SimpleNamespace(request_states={}), errored=False)
    return Team(KeyRing(keys), UsageFile(usage, server), engine, bound, 8, ["m"])


async def main() -> None:
    """Prints how many requests were admitted."""
    keys, usage, times = sys.argv[1:]
    team, admitted = team_of(Path(keys), Path(usage)), 0
    (key,) = team.ring.by_name().values()
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(int(times)):
        try:
            team.admit(key, {})
            admitted += 1
        except ChatError:
            pass
    await team.close()
    print(admitted)


if __name__ == "__main__":
    asyncio.run(main())
