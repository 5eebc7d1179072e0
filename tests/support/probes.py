"""What a running server is doing, seen from outside: for tests and benchmarks on one machine."""

import re

import psutil
import requests


def server_process(url: str) -> psutil.Process:
    """The process that was started with this address's --port as its last flag."""
    flags = ["--port", url.rpartition(":")[2]]
    [server] = [
        process for process in psutil.process_iter(["cmdline"]) if (process.info["cmdline"] or [])[-2:] == flags
    ]
    return server


def unfinished(url: str, key: str = "") -> float:
    """How many requests run or wait in the engine."""
    return gauge(url, "num_requests_running", key) + gauge(url, "num_requests_waiting", key)


def gauge(url: str, name: str, key: str = "") -> float:
    """The sum of one of vLLM's figures over its labels."""
    metrics = requests.get(f"{url}/metrics", headers={"Authorization": f"Bearer {key}"}, timeout=60).text
    return sum(float(value) for value in re.findall(rf"^vllm:{name}\{{.*?\}} (.*)$", metrics, re.M))
