"""This server against `vllm serve`, all on one GPU and asked by turns: tokens/s and time to first token.

    python -m benchmarks.serving --model FOLDER [--turns 3] [--streams 1 64 256 1024] [--flags=--load-format=dummy …]

Sides: `vllm` (as it comes, without our plugins), `rust` (the same with its Rust front end), `ours` (as it comes: /chat,
and /v1/chat/completions), and `NAME:FLAG,FLAG…` for ours with flags. `--flags` go to all. They share the GPU's memory,
and one waits while another is asked. Figures are medians of the turns, with the lowest and the highest. Ends with
status 1 where an answer was not whole.
"""

import argparse
import math
import re
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack

from benchmarks.load import HEAD, PATHS, Seen, add_flags, load, rate, row
from qwen_vllm.cache import CACHE
from qwen_vllm.with_server import SERVER, running_server

VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main", "serve")
PROGRAMS = {"vllm": VLLM, "rust": ("env", "VLLM_USE_RUST_FRONTEND=1", *VLLM)}


def start(stack: ExitStack, number: int, side: str, flags: list[str]) -> str:
    """Starts a side's server, which ends with the stack; returns its address."""
    began = time.monotonic()
    own = side.partition(":")[2]
    flags = [*flags, *re.split(",(?=--)", own)] if own else flags
    log = CACHE / f"benchmark-{number}.log"
    url = stack.enter_context(running_server(flags, log, program=PROGRAMS.get(side, SERVER)))
    print(f"{side}: up after {time.monotonic() - began:.0f} s", flush=True)
    return url


def add_side_flags(parser: argparse.ArgumentParser, sides: Sequence[str] = ("rust", "ours"), turns: int = 3) -> None:
    """The flags that say which servers are compared, how they are started, and how often each has its turn."""
    parser.add_argument("--model", required=True)
    parser.add_argument("--flags", action="append", default=[], help="of the server, on all sides; repeatable")
    parser.add_argument("--sides", nargs="+", default=sides)
    parser.add_argument("--turns", type=int, default=turns, help=f"of each side (default: {turns})")


def routes(side: str) -> list[str]:
    """What of a side is measured."""
    return ["openai"] if side in PROGRAMS else ["chat"] if ":" in side else ["chat", "openai"]


def first(seen: Seen) -> float:
    """Median time to first token in ms."""
    return statistics.median(seen.first or [math.nan]) * 1000


def spread(values: list[float], digits: int = 0) -> str:
    """The median, and the lowest and highest where there are several."""
    low, high = (f"{value:,.{digits}f}" for value in (min(values), max(values)))
    return f"{statistics.median(values):,.{digits}f}" + (f" ({low} to {high})" if len(values) > 1 else "")


def main() -> int:
    """Prints a row a turn, then the medians, then the ratios to `vllm` and `rust`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_side_flags(parser, ["vllm", "rust", "ours"])
    add_flags(parser)
    args = vars(parser.parse_args())
    sides, streams, turns = args.pop("sides"), args.pop("streams"), args.pop("turns")
    share = f"--gpu-memory-utilization={0.9 / len(sides):.2f}"
    flags = ["--model", args.pop("model"), share, *args.pop("flags")]
    seen: dict[tuple[str, str, int], list[Seen]] = {}
    with ExitStack() as stack:
        urls = {side: start(stack, number, side, flags) for number, side in enumerate(sides)}
        for side, url in urls.items():
            for api in routes(side):
                load(url, api, max(streams), **{**args, "rounds": 1, "tokens": 32})
        print(f"{'':45} {HEAD}")
        for _ in range(turns):
            for number in streams:
                for side, url in urls.items():
                    for api in routes(side):
                        one = load(url, api, number, **{**args, "rounds": max(args["rounds"], 16 // number)})
                        seen.setdefault((side, api, number), []).append(one)
                        print(f"{side[:24]:24} {PATHS[api]:20} {row(number, one)}", flush=True)
    for (side, api, number), ours in seen.items():
        name = f"{side[:24]} {PATHS[api]} at {number}"
        print(f"{name}: {spread([*map(rate, ours)])} tokens/s, first token after {spread([*map(first, ours)])} ms")
        for other in PROGRAMS.keys() & set(sides) - {side} if side not in PROGRAMS else ():
            theirs = seen[other, "openai", number]
            faster = [rate(one) / rate(two) for one, two in zip(ours, theirs, strict=True)]
            later = [first(one) / first(two) for one, two in zip(ours, theirs, strict=True)]
            print(f"{name}: {spread(faster, 2)} x {other}, first token {spread(later, 2)} x")
    return 1 if any(one.failed for each in seen.values() for one in each) else 0


if __name__ == "__main__":
    sys.exit(main())
