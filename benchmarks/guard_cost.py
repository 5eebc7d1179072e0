"""What the guard adds to a request, in microseconds; to the pieces of an answer it adds nothing, it does not see them.

python -m benchmarks.guard_cost
"""

import asyncio
import json
import time
from argparse import Namespace

from fastapi import FastAPI

from guard import Guard

REPEATS = 2000
ARGS = Namespace(
    api_key=["key"], max_body_size=2**20, body_timeout=30.0, disable_fastapi_docs=False, enable_offline_docs=False
)


async def microseconds(app: object, body: bytes) -> float:
    """Time of one request to `app`, median."""
    state = FastAPI()
    state.state.args = ARGS
    headers = [(b"authorization", b"Bearer key"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/chat", "headers": headers, "app": state}

    async def receive() -> dict:
        return {"type": "http.request", "body": body, "more_body": False}

    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        await app(scope, receive, None)
        times.append((time.perf_counter() - began) * 1e6)
    return sorted(times)[REPEATS // 2]


async def route(scope: dict, receive: object, send: object) -> None:
    """Reads the body and does nothing."""
    await receive()


async def main() -> None:
    """Prints a row a size of conversation."""
    turn = ["And what about that other thing, if I may ask?", "Here is what I can tell you about it. " * 12]
    print(f"{'turns':>6} {'bytes':>8} {'alone':>8} {'guarded':>8}")
    for turns in (0, 10, 100, 1000):
        body = json.dumps({"query": "Why?", "history": [turn] * turns, "stream": True}).encode()
        alone, guarded = await microseconds(route, body), await microseconds(Guard(route), body)
        print(f"{turns:6} {len(body):8} {alone:8.1f} {guarded:8.1f}")


if __name__ == "__main__":
    asyncio.run(main())
