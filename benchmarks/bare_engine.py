"""/chat over HTTP against vLLM's bare AsyncLLM: tokens/s for the same 32 greedy answers at once, with the demo model.

    python -m benchmarks.bare_engine

Both sides have the same engine settings and stream every token; they run by turns, each time in a new process.
"""

import asyncio
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from qwen_vllm.cache import CACHE
from qwen_vllm.generation import RequestBuilder
from qwen_vllm.hardware import engine_defaults, set_environment, values
from qwen_vllm.models.demo import demo_model
from qwen_vllm.protocol import ChatRequest, Sampling
from qwen_vllm.with_server import running_server
from vllm_client import stream_chat

REQUESTS, TOKENS, REPEATS, ROUNDS = 32, 64, 4, 2
QUERIES = [f"Write a very long story, number {i}." for i in range(REQUESTS)]


async def bare() -> list[float]:
    """Tokens/s of AsyncLLM, handed prompts that are ready; the first run warms it up."""
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(model=str(demo_model()), enable_prefix_caching=False, **values(engine_defaults()))
    )
    builder = RequestBuilder(engine.model_config, engine.get_tokenizer())

    async def answer(name: str, query: str) -> int:
        request = ChatRequest(query=query, temperature=0.0, max_tokens=TOKENS, stream=True)
        prompt, params = builder.build(request, stream=True)
        tokens = 0
        async for output in engine.generate({"prompt_token_ids": prompt.token_ids}, params, name):
            tokens += len(output.outputs[0].token_ids)
        return tokens

    rates = []
    for repeat in range(REPEATS + 1):
        began = time.monotonic()
        tokens = sum(await asyncio.gather(*(answer(f"{repeat}-{query}", query) for query in QUERIES)))
        rates.append(tokens / (time.monotonic() - began))
    engine.shutdown()
    return rates[1:]


def served() -> list[float]:
    """Tokens/s of /chat, asked by 32 clients; the first run warms it up."""

    def answer(query: str) -> int:
        *_, result = stream_chat(url, query, sampling=Sampling(temperature=0, max_tokens=TOKENS))
        return result.completion_tokens

    rates = []
    with (
        running_server(["--no-enable-prefix-caching"], CACHE / "benchmark.log") as url,
        ThreadPoolExecutor(REQUESTS) as pool,
    ):
        for _ in range(REPEATS + 1):
            began = time.monotonic()
            tokens = sum(pool.map(answer, QUERIES))
            rates.append(tokens / (time.monotonic() - began))
    return rates[1:]


def main() -> None:
    """Prints the rates of both sides and the ratio of their medians."""
    if "--bare" in sys.argv:
        set_environment()
        print(json.dumps(asyncio.run(bare())))
        return
    sides: dict[str, list[float]] = {"bare AsyncLLM": [], "/chat": []}
    for _ in range(ROUNDS):
        command = [sys.executable, "-m", "benchmarks.bare_engine", "--bare"]
        with (CACHE / "benchmark.log").open("w") as log:
            sides["bare AsyncLLM"] += json.loads(subprocess.check_output(command, stderr=log).splitlines()[-1])
        sides["/chat"] += served()
    for name, rates in sides.items():
        print(f"{name:14}", *(f"{rate:6.0f}" for rate in rates), f"  median {statistics.median(rates):.0f} tokens/s")
    print(f"ratio: {statistics.median(sides['/chat']) / statistics.median(sides['bare AsyncLLM']):.2f}")


if __name__ == "__main__":
    main()
