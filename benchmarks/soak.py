"""What the server holds on this machine with the demo model: load, clients that leave, are silent or ask too much.

    python -m benchmarks.soak [--minutes 30]

Prints a row a case, what was seen beside what is asked for, and ends with status 1 where one fell short. With --minutes
a mix of all of it follows. Every request must end once: complete and with the tokens it counts, or with an error.
"""

import argparse
import json
import random
import socket
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import psutil
import requests

from qwen_vllm.cache import CACHE
from qwen_vllm.protocol import ChatError, Sampling
from qwen_vllm.with_server import running_server
from tests.support.probes import server_process, unfinished
from vllm_client import stream_chat

RUNNING, ROOM = 32, 64
FLAGS = ["--max-num-seqs", str(RUNNING), "--max-num-queued-reqs", str(ROOM), "--write-timeout", "5"]
OVER_LIMITS = (
    {"max_tokens": 2**31},
    {"n": 33},
    {"structured_outputs": {"regex": "a" * 2**15}},
    {"structured_outputs": {"choice": ["word"] * 5000}},
    {"structured_outputs": {"json": {"type": "array", "maxItems": 10_001}}},
    {"structured_outputs": {"regex": "["}},
)
"""Fields that the server refuses: each is just over a limit, or no pattern."""

Row = tuple[str, str, str, bool]
"""Name of the case, what was seen, what is asked for, whether it holds."""


class Load:
    """Asks the server and keeps count of how requests end."""

    def __init__(self, url: str) -> None:
        self.url, self.ends = url, Counter()

    def ask(self, max_tokens: int = 8, leave_after: int | None = None, query: str | None = None) -> float:
        """One streamed answer to the end, or to its `leave_after`-th piece; returns the seconds it took."""
        number = random.randrange(10**6)
        began, pieces = time.monotonic(), []
        sampling = Sampling(temperature=0, max_tokens=max_tokens)
        answer = stream_chat(self.url, query or f"Tell me about the number {number}.", sampling=sampling)
        try:
            for part in answer:
                if isinstance(part, str):
                    pieces.append(part)
                    if len(pieces) == leave_after:
                        self.ends["left"] += 1
                        return time.monotonic() - began
            whole = part.text == "".join(pieces) and part.completion_tokens <= max_tokens
            self.ends["whole" if whole else "lost"] += 1
        except ChatError as error:
            self.ends["refused" if error.status == 503 else "lost"] += 1
        finally:
            answer.close()
        return time.monotonic() - began

    def many(self, requests_: int, at_once: int, **options: Callable[[], object]) -> list[float]:
        """Seconds that each of the requests took; an option is a function called for each."""
        with ThreadPoolExecutor(at_once) as pool:
            asked = [
                pool.submit(self.ask, **{name: value() for name, value in options.items()}) for _ in range(requests_)
            ]
            return [future.result() for future in asked]

    def seconds_until_idle(self) -> float:
        """How long it takes until the engine has nothing left to do."""
        began = time.monotonic()
        while unfinished(self.url):
            time.sleep(0.02)
        return time.monotonic() - began


@contextmanager
def probed(probe: Callable[[], float]) -> Iterator[list[float]]:
    """Calls `probe` again and again beside the block, and collects what it returns."""
    seen, over = [], threading.Event()

    def run() -> None:
        while not over.wait(0.05):
            seen.append(probe())

    thread = threading.Thread(target=run)
    thread.start()
    yield seen
    over.set()
    thread.join()


def percentile(values: list[float], percent: int) -> float:
    """The value that `percent` of the values do not exceed."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def steady(load: Load) -> Iterator[Row]:
    """1,000 requests, 16 at a time, with /health asked all the while."""

    def health() -> float:
        return requests.get(f"{load.url}/health", timeout=60).elapsed.total_seconds()

    load.ends.clear()
    with probed(health) as seconds:
        load.many(1000, 16)
    yield "1,000 requests, 16 at a time", f"{load.ends['whole']} whole", "1000", load.ends == {"whole": 1000}
    p99 = percentile(seconds, 99)
    yield "/health meanwhile, p99", f"{p99 * 1000:.0f} ms", "< 250 ms", p99 < 0.25


def overload(load: Load) -> Iterator[Row]:
    """200 clients at once where there is room for 64."""
    load.ends.clear()
    load.many(200, 200, max_tokens=lambda: 32)
    seen = f"{load.ends['whole']} whole, {load.ends['refused']} refused"
    yield "200 clients at once, room for 64", seen, "200 in all", load.ends["whole"] + load.ends["refused"] == 200


def leaving(load: Load) -> Iterator[Row]:
    """How soon the place of a client that leaves is free."""
    seconds = []
    for _ in range(40):
        load.ask(max_tokens=2000, leave_after=3, query="Count to 1000.")
        seconds.append(load.seconds_until_idle())
    p95 = percentile(seconds, 95)
    yield "a place is free after its client left, p95", f"{p95:.2f} s", "< 1 s", p95 < 1


def beside_long_answers(load: Load) -> Iterator[Row]:
    """A one-token request alone, and beside 8 long answers."""
    alone = statistics.median(load.ask(max_tokens=1) for _ in range(20))
    with ThreadPoolExecutor(8) as pool:
        for _ in range(8):
            pool.submit(load.ask, 400, None, "Write a very long story.")
        time.sleep(2)
        beside = statistics.median(load.ask(max_tokens=1) for _ in range(20))
    yield "one token beside 8 long answers", f"{beside / alone:.1f} x its idle time", "< 10 x", beside < 10 * alone


def over_limits(load: Load) -> Iterator[Row]:
    """The longest silence of an answer while others ask for what is over the limits, and how that ends."""
    statuses, gaps = Counter(), []

    def read() -> None:
        last = time.monotonic()
        for _ in stream_chat(load.url, "Count to 1000.", sampling=Sampling(temperature=0, max_tokens=1000)):
            now = time.monotonic()
            gaps.append(now - last)
            last = now

    reader = threading.Thread(target=read)
    reader.start()
    model = requests.get(f"{load.url}/v1/models", timeout=30).json()["data"][0]["id"]
    for extra in OVER_LIMITS * 3:
        body = {"model": model, "prompt": "x", "max_tokens": 8, **extra}
        statuses[requests.post(f"{load.url}/v1/completions", json=body, timeout=120).status_code] += 1
    reader.join()
    yield (
        "over the limits on /v1: statuses",
        json.dumps(statuses),
        "no 5xx",
        not any(status >= 500 for status in statuses),
    )
    yield "longest silence of an answer beside it", f"{max(gaps[1:]):.2f} s", "< 1 s", max(gaps[1:]) < 1


def memory(load: Load, server: psutil.Process) -> Iterator[Row]:
    """2,000 requests, 30 % of them left: memory from the 400th on, and file descriptors."""
    family = [server, *server.children(recursive=True)]

    def resident() -> int:
        return sum(process.memory_info().rss for process in family)

    def leave_after() -> int | None:
        return 2 if random.random() < 0.3 else None

    load.ends.clear()
    load.many(400, 16, leave_after=leave_after)
    load.seconds_until_idle()
    before, files = resident(), sum(process.num_fds() for process in family)
    load.many(1600, 16, leave_after=leave_after)
    load.seconds_until_idle()
    growth = resident() / before - 1
    time.sleep(6)  # connections that are kept open are closed after 5 s
    more_files = sum(process.num_fds() for process in family) - files
    yield "2,000 requests, 30 % left: none lost", f"{load.ends['lost']} lost", "0", not load.ends["lost"]
    yield "memory over the last 1,600", f"{growth:+.1%}", "< 5 %", growth < 0.05
    yield "file descriptors", f"{more_files:+d}", "not more", more_files <= 0


def mix(load: Load, minutes: float) -> Iterator[Row]:
    """All of it together for some minutes: short, long, left, too many, over limits, silent."""
    load.ends.clear()
    until = time.monotonic() + minutes * 60
    port = int(load.url.rpartition(":")[2])

    def act() -> None:
        while time.monotonic() < until:
            match random.randrange(12):
                case 0:
                    load.ask(max_tokens=300)
                case 1 | 2:
                    load.ask(max_tokens=300, leave_after=random.randrange(1, 20))
                case 3:
                    with socket.create_connection(("127.0.0.1", port)) as silent:
                        silent.send(b"POST /chat HTTP/1.1\r\n")
                        time.sleep(random.random())
                case 4:
                    body = {"query": "x", "stop": [""], **random.choice(OVER_LIMITS)}
                    load.ends["over limits"] += (
                        requests.post(f"{load.url}/chat", json=body, timeout=60).status_code == 400
                    )
                case _:
                    load.ask(max_tokens=random.randrange(1, 40))

    with ThreadPoolExecutor(ROOM + 16) as pool:
        for future in [pool.submit(act) for _ in range(ROOM + 16)]:
            future.result()
    load.seconds_until_idle()
    yield f"{minutes:g} minutes of all together", json.dumps(load.ends), "0 lost", not load.ends["lost"]


def main() -> int:
    """Prints the table; returns 1 where a row falls short."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=0, help="of all cases together, after each by itself")
    minutes = parser.parse_args().minutes
    ok = True
    with running_server(FLAGS, CACHE / "soak.log") as url:
        load = Load(url)
        load.many(4, 4)
        cases = [
            steady(load),
            overload(load),
            leaving(load),
            beside_long_answers(load),
            over_limits(load),
            memory(load, server_process(url)),
        ]
        for case in [*cases, *([mix(load, minutes)] if minutes else [])]:
            for name, seen, wanted, holds in case:
                print(f"{name:44} {seen:34} {wanted:12} {'ok' if holds else 'FELL SHORT'}", flush=True)
                ok &= holds
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
