"""Our defaults against vLLM's on a CPU: tokens/s of 32 requests at once, and of one, with the demo model.

    python -m benchmarks.cpu_defaults

Both sides are asked through `/v1/completions` for exactly 64 tokens a request; ours through `/chat` too.
"""

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import requests

from qwen_vllm.cache import CACHE
from qwen_vllm.models.demo import demo_model
from qwen_vllm.with_server import SERVER, running_server

TOKENS, REQUESTS = 64, 32
VLLM = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")


def completion(url: str, i: int) -> int:
    """One answer of vLLM's own route; returns its number of tokens."""
    model = requests.get(f"{url}/v1/models", timeout=10).json()["data"][0]["id"]
    body = {"model": model, "prompt": f"Story number {i}. " * 8, "max_tokens": TOKENS, "ignore_eos": True}
    return requests.post(f"{url}/v1/completions", json=body, timeout=600).json()["usage"]["completion_tokens"]


def chat(url: str, i: int) -> int:
    """One streamed answer of /chat; returns its number of tokens."""
    body = {"query": f"Write a very long story, number {i}.", "max_tokens": TOKENS, "stream": True, "temperature": 1}
    last = requests.post(f"{url}/chat", json=body, timeout=600).text.splitlines()[-1]
    return json.loads(last)["usage"]["completion_tokens"]


def rate(ask: Callable[[str, int], int], url: str, requests_at_once: int) -> float:
    """Tokens a second over all requests, sent at the same time."""
    with ThreadPoolExecutor(requests_at_once) as pool:
        began = time.monotonic()
        tokens = sum(pool.map(lambda i: ask(url, i), range(requests_at_once)))
        return tokens / (time.monotonic() - began)


def measure(name: str, program: tuple[str, ...], flags: list[str], routes: dict[str, Callable]) -> dict[str, float]:
    """Starts a server, warms it up and prints a row a route; returns tokens/s at REQUESTS by route."""
    began = time.monotonic()
    rates = {}
    with running_server(flags, CACHE / "benchmark.log", program=program) as url:
        ready = time.monotonic() - began
        for route, ask in routes.items():
            rate(ask, url, REQUESTS)
            rates[route], one = rate(ask, url, REQUESTS), rate(ask, url, 1)
            print(f"{name:12} {route:16} {rates[route]:7.0f} {one:8.1f} {ready:8.0f} s", flush=True)
    return rates


def main() -> None:
    """Prints the table and the ratio."""
    print(f"{'':29} {f'{REQUESTS} at once':>7} {'one':>6} {'start':>8}")
    # vLLM wants 92 % of the memory to be free, which it is not on a machine in use.
    flags = ["--model", str(demo_model()), "--gpu-memory-utilization", "0.5"]
    theirs = measure("vLLM", VLLM, flags, {"/v1/completions": completion})
    ours = measure("this project", SERVER, [], {"/v1/completions": completion, "/chat": chat})
    print(f"ratio at {REQUESTS}: {ours['/v1/completions'] / theirs['/v1/completions']:.1f}")


if __name__ == "__main__":
    main()
