"""Streams that a running server holds: tokens/s, time to first token, time between pieces, and whether all was whole.

    python -m benchmarks.load http://127.0.0.1:8000 --api chat --streams 1 64 256 1024

Each stream asks again as soon as its answer has ended, `--rounds` times. Several processes read raw bytes and parse
only the end of each answer, so that the server is the limit. An answer is whole if it came to its last line, with a
finish reason and the number of its tokens.
"""

import argparse
import asyncio
import json
import random
import re
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import requests
import uvloop

WORDS = ("time", "person", "year", "way", "day", "thing", "man", "world", "life", "hand", "part", "child")
CONNECT_AT_ONCE = 64


@dataclass
class Seen:
    """What some streams have seen: seconds, and counts."""

    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0
    whole: int = 0
    failed: list[str] = field(default_factory=list)
    began: float = 0.0
    ended: float = 0.0


def words_of(text: Path | None) -> Sequence[str]:
    """The words that prompts are made of: those of a file, or a dozen that each tokenizer soon has in its cache."""
    return text.read_text().split() if text else WORDS


def question(api: str, model: str, words: int, tokens: int, temperature: float | None, known: Sequence[str]) -> dict:
    """The body of a request for an answer of `tokens` tokens, and a random prompt of `words` of the `known` words."""
    text = " ".join(random.choices(known, k=words))
    sampling = {"max_tokens": tokens, "stream": True} | ({} if temperature is None else {"temperature": temperature})
    if api == "chat":
        return {"query": text, **sampling}
    sampling |= {"model": model, "ignore_eos": True, "stream_options": {"include_usage": True}}
    return {"messages": [{"role": "user", "content": text}], **sampling}


PATHS = {"chat": "/chat", "openai": "/v1/chat/completions"}


def tokens_of(api: str, end: bytes) -> int:
    """The number of tokens that the end of an answer states.

    Raises:
        ValueError: it is no end of a whole answer.
    """
    lines = [line for line in re.split(rb"[\r\n]+", end) if b"{" in line or b"[DONE]" in line]
    if api == "chat":
        last = json.loads(lines[-1])
        if last.get("finish_reason") not in ("stop", "length"):
            raise ValueError(f"no finish reason: {lines[-1][:200]!r}")
    elif lines[-1] != b"data: [DONE]":
        raise ValueError(f"no [DONE]: {lines[-1][:200]!r}")
    else:
        last = json.loads(lines[-2].removeprefix(b"data: "))
    return last["usage"]["completion_tokens"]


class Stream(asyncio.Protocol):
    """One connection that asks one question after the other."""

    def __init__(self, seen: Seen, api: str, head: bytes, bodies: list[bytes], done: asyncio.Future) -> None:
        self._seen, self._api, self._head, self._bodies, self._done = seen, api, head, bodies, done

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Waits for `ask`."""
        self._transport = transport

    def ask(self) -> None:
        """Sends the next question."""
        body = self._bodies.pop()
        self._end, self._last = b"", None
        self._asked = time.perf_counter()
        self._transport.write(self._head + b"content-length: %d\r\n\r\n" % len(body) + body)

    def data_received(self, data: bytes) -> None:
        """Takes the time, and at the end of the answer looks whether it is whole."""
        now = time.perf_counter()
        if self._last is not None:
            self._seen.gaps.append(now - self._last)
            self._last = now
        elif b'"delta' in data or b'"content"' in data or b'"reasoning"' in data:
            self._seen.first.append(now - self._asked)
            self._last = now
        self._end = (self._end + data)[-2000:]
        if not self._end.endswith(b"0\r\n\r\n") and not (self._last is None and self._refused()):
            return
        try:
            self._seen.tokens += tokens_of(self._api, self._end)
            self._seen.whole += 1
        except (ValueError, LookupError, TypeError) as error:
            self._seen.failed.append(str(error)[:300])
        if self._bodies:
            self.ask()
        else:
            self._finish()

    def connection_lost(self, error: Exception | None) -> None:
        """A connection that ends before its answers is a failure."""
        if not self._done.done():
            self._seen.failed.append(f"connection lost: {error}")
            self._finish()

    def _refused(self) -> bool:
        """Whether an answer of another kind has come, an error, which has a length instead of chunks."""
        head, found, body = self._end.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        return bool(found and length and len(body) >= int(length[1]))

    def _finish(self) -> None:
        self._done.set_result(None)
        self._transport.close()


async def _process(url: str, api: str, key: str, streams: list[list[bytes]], start: float) -> Seen:
    """Opens the connections, waits until the moment `start` (of time.time), and lets all ask."""
    address, seen, loop = urlsplit(url), Seen(), asyncio.get_running_loop()
    fields = [f"POST {PATHS[api]} HTTP/1.1", f"host: {address.netloc}", "content-type: application/json"]
    head = "\r\n".join([*fields, f"authorization: Bearer {key}", ""]).encode()
    ends = [loop.create_future() for _ in streams]
    connected = []
    for number in range(0, len(streams), CONNECT_AT_ONCE):
        opening = [
            loop.create_connection(
                lambda bodies=bodies, end=end: Stream(seen, api, head, bodies, end), address.hostname, address.port
            )
            for bodies, end in list(zip(streams, ends, strict=True))[number : number + CONNECT_AT_ONCE]
        ]
        connected += [stream for _, stream in await asyncio.gather(*opening)]
    await asyncio.sleep(start - time.time())
    seen.began = time.time()
    for stream in connected:
        stream.ask()
    await asyncio.gather(*ends)
    seen.ended = time.time()
    return seen


def _run(*arguments: object) -> Seen:
    return uvloop.run(_process(*arguments))


def load(
    url: str,
    api: str,
    streams: int,
    rounds: int = 2,
    tokens: int = 256,
    words: int = 50,
    text: Path | None = None,
    temperature: float | None = None,
    key: str = "",
    processes: int = 8,
) -> Seen:
    """All that `streams` streams have seen together.

    Args:
        api: "chat" or "openai".
        rounds: answers a stream.
        tokens: of an answer, at most; exactly so many on "openai".
        words: of a prompt, about a token each.
        text: as for `words_of`.
        temperature: None: as the server has it.
        processes: at most so many on this side.
    """
    headers = {"authorization": f"Bearer {key}"}
    model = requests.get(f"{url}/v1/models", headers=headers, timeout=60).json()["data"][0]["id"]
    known = words_of(text)
    bodies = [
        [json.dumps(question(api, model, words, tokens, temperature, known)).encode() for _ in range(rounds)]
        for _ in range(streams)
    ]
    shares = [share for number in range(processes) if (share := bodies[number::processes])]
    start = time.time() + 1 + streams / 500
    with ProcessPoolExecutor(len(shares)) as pool:
        parts = list(pool.map(_run, *zip(*((url, api, key, share, start) for share in shares), strict=True)))
    whole = Seen(began=min(part.began for part in parts), ended=max(part.ended for part in parts))
    for part in parts:
        whole.first += part.first
        whole.gaps += part.gaps
        whole.failed += part.failed
        whole.tokens += part.tokens
        whole.whole += part.whole
    return whole


HEAD = (
    f"{'streams':>8} {'tokens/s':>9} {'first p50':>10} {'p99 ms':>8} {'gap p50':>8} {'p99 ms':>8} {'whole':>6} failed"
)


def row(streams: int, seen: Seen) -> str:
    """A line below `HEAD`."""

    def percentiles(values: list[float]) -> tuple[float, float]:
        cuts = statistics.quantiles(values or [0.0, 0.0], n=100, method="inclusive")
        return cuts[49] * 1000, cuts[98] * 1000

    first, gap = percentiles(seen.first), percentiles(seen.gaps)
    return (
        f"{streams:8} {rate(seen):9.0f} {first[0]:10.0f} {first[1]:8.0f} {gap[0]:8.1f} {gap[1]:8.1f} "
        f"{seen.whole:6} {len(seen.failed)}"
    )


def rate(seen: Seen) -> float:
    """Tokens a second, from the first question to the last answer."""
    return seen.tokens / (seen.ended - seen.began)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say how much load."""
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64, 256, 1024])
    parser.add_argument("--rounds", type=int, default=2, help="answers a stream (default: 2)")
    parser.add_argument("--tokens", type=int, default=256, help="of an answer (default: 256)")
    parser.add_argument("--words", type=int, default=50, help="of a prompt (default: 50)")
    parser.add_argument("--text", type=Path, help="whose words the prompts are made of (default: a dozen words)")
    parser.add_argument("--temperature", type=float, help="default: as the server has it")
    parser.add_argument("--processes", type=int, default=8, help="at most, on this side (default: 8)")


def main() -> int:
    """Prints a row for each number of streams; returns 1 where an answer was not whole."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--api", choices=PATHS, default="chat")
    parser.add_argument("--key", default="")
    add_flags(parser)
    args = vars(parser.parse_args())
    print(HEAD)
    failed = []
    for streams in args.pop("streams"):
        seen = load(streams=streams, **args)
        print(row(streams, seen), flush=True)
        failed += seen.failed
    for reason in sorted(set(failed))[:5]:
        print(reason, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
