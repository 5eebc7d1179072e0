"""What a request to /chat takes of a front end's processor, in microseconds, with an engine that answers at once: from
the parsed head to the last line, the guard's check of the body, and the prompt with its sampling parameters. Then how
long nothing else goes on while 256 requests come at once.

    python -m benchmarks.front_end [--model FOLDER]

Each history is asked for again and again, with questions of 50 words that were not seen before.
"""

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

from benchmarks.load import WORDS
from guard import check_json
from protocol import ChatRequest, validated

ROUNDS, REQUESTS, BURST = 6, 300, 256
TURN = ["And what about that other thing, if I may ask?", "Here is what I can tell you about it. " * 12]


class InstantEngine:
    """Stands in for vLLM's AsyncLLM: each answer is one piece, and its end."""

    def __init__(self, folder: str) -> None:
        from transformers import AutoTokenizer
        from vllm import EngineArgs

        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model_config = EngineArgs(folder).create_model_config()

    def get_tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self._tokenizer

    async def generate(self, *prompt: Any, **options: Any) -> AsyncIterator[SimpleNamespace]:
        """Two outputs, of a token each."""
        for text, finish_reason in (("a", None), ("b", "length")):
            completion = SimpleNamespace(text=text, token_ids=[1], finish_reason=finish_reason, stop_reason=None)
            yield SimpleNamespace(outputs=[completion], finished=finish_reason is not None)


def request_body(turns: int) -> bytes:
    """A request after that many turns."""
    query = " ".join(random.choices(WORDS, k=50))
    return json.dumps({"query": query, "history": [TURN] * turns, "stream": True, "temperature": 0}).encode()


async def send_request(app: Any, body: bytes) -> None:
    """One request, as uvicorn hands it to the application."""
    requests, sent = [{"type": "http.request", "body": body, "more_body": False}], []

    async def receive() -> dict:
        return requests.pop() if requests else await asyncio.Event().wait()

    async def send(message: dict) -> None:
        sent.append(message)

    scope = {"type": "http", "http_version": "1.1", "method": "POST", "scheme": "http", "path": "/chat"}
    headers = [(b"host", b"server"), (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await app({**scope, "query_string": b"", "headers": headers, "state": {}}, receive, send)
    assert sent[0]["status"] == 200 and b'"finish_reason"' in sent[-1]["body"]


async def microseconds(work: Callable[[bytes], Awaitable[Any]], turns: int) -> float:
    """Processor time of one request, in the best of several rounds: others on the machine only make it longer."""
    best = float("inf")
    for _ in range(ROUNDS):
        bodies = [request_body(turns) for _ in range(REQUESTS)]
        began = time.process_time()
        for body in bodies:
            await work(body)
        best = min(best, (time.process_time() - began) / REQUESTS * 1e6)
    return best


async def burst(app: Any) -> tuple[float, float]:
    """(the longest that another task had to wait while requests came at once, until all were answered), in ms."""
    waits, bodies = [], [request_body(0) for _ in range(BURST)]

    async def other_task() -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.002)
            waits.append(time.perf_counter() - before)

    other = asyncio.create_task(other_task())
    await asyncio.sleep(0)
    began = time.perf_counter()
    await asyncio.gather(*(send_request(app, body) for body in bodies))
    took = time.perf_counter() - began
    await asyncio.sleep(0.01)
    other.cancel()
    return max(waits) * 1e3, took * 1e3


async def main() -> None:
    """Prints a row a length of history, and one for the burst."""
    from vllm.entrypoints.launchers.app import build_app

    from vllm_server import ChatEndpoint, parse_args

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    model = parser.parse_args().model
    args = parse_args(["--load-format", "dummy", *(["--model", model] if model else [])])
    app, endpoint = build_app(args, ("generate",)), ChatEndpoint()
    endpoint.attach_router(app)
    app.state.openai_serving_models = SimpleNamespace(is_base_model=bool, lora_requests={})
    await endpoint.init_state(InstantEngine(args.model), app.state, args)

    async def answer(body: bytes) -> None:
        await send_request(app, body)

    async def check(body: bytes) -> None:
        check_json(body)

    async def build(body: bytes) -> None:
        endpoint._requests.build(validated(ChatRequest, body), True)

    print(f"{'turns':>6} {'request':>8} {'check':>8} {'prompt':>8}")
    for turns in (0, 10, 100):
        parts = [await microseconds(part, turns) for part in (answer, check, build)]
        print(f"{turns:6} {parts[0]:8.0f} {parts[1]:8.0f} {parts[2]:8.0f}", flush=True)
    waited, took = (
        statistics.median(column) for column in zip(*[await burst(app) for _ in range(ROUNDS)], strict=True)
    )
    print(f"{BURST} at once: another task waits for {waited:.0f} ms, all are answered after {took:.0f} ms (medians)")


if __name__ == "__main__":
    asyncio.run(main())
