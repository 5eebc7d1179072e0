"""What /chat takes of a front end's processor, in microseconds, with vLLM's own client and a scripted engine: a request
from its parsed head to its first piece of text, the guard's check of its body, its prompt with the sampling
parameters, and each further piece of text.

    python -m benchmarks.front_end [--model FOLDER] [--without-patches] [--keys] [--pieces]

64 requests at once. --keys: as with --key-file, and a key with all limits. --pieces: only answers of 256 pieces, 256 at
once, in tokens a second of processor time. Each history is asked for again and again, with questions of 50 words that
were not seen before.
"""

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from benchmarks.load import WORDS
from qwen_vllm.protocol import ChatRequest, validated
from qwen_vllm.server.guard import check_json

ROUNDS, REQUESTS, AT_ONCE, PIECES = 6, 320, 64, 128
STREAMS, TOKENS = 256, 256
KEY = "0123456789abcdef"
TABLE = (
    f'[ann]\nkey = "{KEY}"\nrequests_per_minute = 1_000_000\nrequests_at_once = 1024\ntokens_per_day = 1_000_000_000'
)
TURN = ["And what about that other thing, if I may ask?", "Here is what I can tell you about it. " * 12]


class ScriptedCore:
    """Stands in for vLLM's engine process: all requests get one token a step, and as many as they want."""

    pauses = 0
    engine_ranks_managed, resources = (0,), SimpleNamespace(engine_dead=False)

    def __init__(self, **config: Any) -> None:
        from vllm.v1.serial_utils import MsgpackEncoder

        self._encoder, self._waiting, self._left = MsgpackEncoder(), asyncio.Event(), {}

    async def get_supported_tasks_async(self) -> tuple[str]:
        """It can only chat."""
        return ("generate",)

    async def add_request_async(self, request: Any) -> None:
        """Takes a request, encoded for another process."""
        self._encoder.encode(request)
        self._left[request.request_id] = request.sampling_params.max_tokens
        self._waiting.set()

    async def get_output_async(self) -> Any:
        """One step."""
        from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
        from vllm.v1.metrics.stats import PrefillStats

        await self._waiting.wait()
        for _ in range(self.pauses):  # in which readers take what has come; else their pieces become one
            await asyncio.sleep(0)
        self._left = {name: left - 1 for name, left in self._left.items()}
        outputs = [
            EngineCoreOutput(
                name, [1000], finish_reason=None if left else FinishReason.LENGTH, prefill_stats=PrefillStats()
            )
            for name, left in self._left.items()
        ]
        self._left = {name: left for name, left in self._left.items() if left}
        if not self._left:
            self._waiting.clear()
        return EngineCoreOutputs(outputs=outputs, timestamp=time.monotonic())

    def shutdown(self, timeout: float | None = None) -> None:
        """There is nothing to stop."""


def request_body(turns: int, tokens: int) -> bytes:
    """A request after that many turns, for so many tokens."""
    query = " ".join(random.choices(WORDS, k=50))
    fields = {"query": query, "history": [TURN] * turns, "stream": True, "temperature": 0, "max_tokens": tokens}
    return json.dumps(fields).encode()


async def send_request(app: Any, body: bytes) -> None:
    """One request, as uvicorn hands it to the application."""
    requests, sent = [{"type": "http.request", "body": body, "more_body": False}], []

    async def receive() -> dict:
        return requests.pop() if requests else await asyncio.Event().wait()

    async def send(message: dict) -> None:
        sent.append(message)

    scope = {"type": "http", "http_version": "1.1", "method": "POST", "scheme": "http", "path": "/chat"}
    headers = [
        (b"host", b"server"),
        (b"x-api-key", KEY.encode()),
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
    ]
    await app({**scope, "query_string": b"", "headers": headers, "state": {}}, receive, send)
    assert sent[0]["status"] == 200 and b'"finish_reason"' in sent[-1]["body"]


async def microseconds(
    work: Callable[[bytes], Awaitable[Any]], turns: int, tokens: int, requests: int = REQUESTS, at_once: int = AT_ONCE
) -> float:
    """Processor time of one request, in the best of several rounds: others on the machine only make it longer."""
    best = float("inf")
    for _ in range(ROUNDS):
        bodies = [request_body(turns, tokens) for _ in range(requests)]
        began = time.process_time()
        for number in range(0, requests, at_once):
            await asyncio.gather(*map(work, bodies[number : number + at_once]))
        best = min(best, (time.process_time() - began) / requests * 1e6)
    return best


def team_flags(folder: Path) -> list[str]:
    """The server's flags for a key with all limits."""
    keys = folder / "keys.toml"
    keys.touch(0o600)
    keys.write_text(TABLE)
    return ["--key-file", str(keys), "--usage-file", str(folder / "usage.db")]


async def main() -> None:
    """Prints a row a length of history, and what a piece takes."""
    from vllm import AsyncEngineArgs
    from vllm.entrypoints.launchers.app import build_app
    from vllm.v1.engine.async_llm import AsyncLLM, EngineCoreClient

    from qwen_vllm.server.endpoint import ChatEndpoint
    from qwen_vllm.vllm_plugin import plugin
    from vllm_server import parse_args

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--without-patches", action="store_true", help="vLLM's own scheduler and detokenizer")
    parser.add_argument("--keys", action="store_true", help="as with --key-file")
    parser.add_argument("--pieces", action="store_true", help="only long answers, in tokens a second of processor time")
    flags = parser.parse_args()
    model = flags.model
    if not flags.without_patches:
        plugin.begin_ours()
    team = team_flags(Path(tempfile.mkdtemp())) if flags.keys else []
    args = parse_args(
        ["--load-format", "dummy", "--max-num-seqs", str(4 * STREAMS), *team, *(["--model", model] if model else [])]
    )
    with patch.object(EngineCoreClient, "make_async_mp_client", ScriptedCore):
        engine = AsyncLLM(AsyncEngineArgs.from_cli_args(args).create_engine_config(), None, True, log_requests=False)
    app, endpoint = build_app(args, ("generate",)), ChatEndpoint()
    endpoint.attach_router(app)
    app.state.lifecycle = SimpleNamespace(stopping=False)
    app.state.openai_serving_models = SimpleNamespace(is_base_model=bool, lora_requests={})
    await endpoint.init_state(engine, app.state, args)

    async def answer(body: bytes) -> None:
        await send_request(app, body)

    async def check(body: bytes) -> None:
        check_json(body)

    async def build(body: bytes) -> None:
        app.state.chat._requests.build(validated(ChatRequest, body), True)

    if flags.keys:
        app.state.ticking = asyncio.create_task(app.state.team.run())
    if flags.pieces:
        ScriptedCore.pauses = 3
        took = await microseconds(answer, 0, TOKENS, 2 * STREAMS, STREAMS)
        print(f"{STREAMS} streams: {TOKENS / took * 1e6:.0f} tokens/s")
        return
    print(f"{'turns':>6} {'request':>8} {'check':>8} {'prompt':>8}")
    for turns in (0, 10, 100):
        request, checked, prompt = [await microseconds(part, turns, 1) for part in (answer, check, build)]
        print(f"{turns:6} {request:8.0f} {checked:8.0f} {prompt:8.0f}", flush=True)
    few, many = [await microseconds(answer, 0, 1 + pieces) for pieces in (0, PIECES)]
    print(f"a piece: {(many - few) / PIECES:.1f}")


if __name__ == "__main__":
    asyncio.run(main())
