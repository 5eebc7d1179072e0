"""This server against `vllm serve`, one after the other in one run: tokens/s and time to first token.

    python -m benchmarks.serving --model FOLDER [--streams 1 64 256 1024] [--flags=--load-format=dummy …]

Sides: `vllm` (as it comes, without our plugins), `rust` (the same with its Rust front end), `ours` (as it comes: /chat,
and /v1/chat/completions), and `NAME:FLAG,FLAG…` for ours with flags. `--flags` go to all. Ends with status 1 where an
answer was not whole.
"""

import argparse
import os
import sys
import time
from unittest.mock import patch

from benchmarks.load import HEAD, PATHS, Seen, add_flags, load, rate, row
from model_utils import CACHE
from with_server import SERVER, running_server

VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main", "serve")


def measure(side: str, flags: list[str], streams: list[int], options: dict) -> dict[tuple[str, int], Seen]:
    """Starts a side's server and puts load on it, warmed up; prints a row for each route and number of streams."""
    name, _, own = side.partition(":")
    environment, program, routes = {}, SERVER, ["chat"] if own else ["chat", "openai"]
    if name in ("vllm", "rust"):
        program, routes = VLLM, ["openai"]
        environment = {"VLLM_PLUGINS": "", "VLLM_USE_RUST_FRONTEND": str(int(name == "rust"))}
    seen = {}
    began = time.monotonic()
    log = CACHE / f"benchmark-{name}.log"
    with (
        patch.dict(os.environ, environment),
        running_server([*flags, *own.split(",")] if own else flags, log, program=program) as url,
    ):
        print(f"{side}: up after {time.monotonic() - began:.0f} s", flush=True)
        for api in routes:
            load(url, api, max(streams), **{**options, "rounds": 1, "tokens": 32})
            for number in streams:
                rounds = max(options["rounds"], 16 // number)
                seen[api, number] = load(url, api, number, **{**options, "rounds": rounds})
                print(f"{side[:24]:24} {PATHS[api]:20} {row(number, seen[api, number])}", flush=True)
    return seen


def main() -> int:
    """Prints the tables and the ratios to `vllm` and `rust`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--flags", action="append", default=[], help="of the server, on all sides; repeatable")
    parser.add_argument("--sides", nargs="+", default=["vllm", "rust", "ours"])
    add_flags(parser)
    args = vars(parser.parse_args())
    sides, streams = args.pop("sides"), args.pop("streams")
    flags = ["--model", args.pop("model"), *args.pop("flags")]
    print(f"{'':45} {HEAD}")
    seen = {side: measure(side, flags, streams, args) for side in sides}
    for other in {"vllm", "rust"} & set(sides):
        for side in set(sides) - {"vllm", "rust"}:
            for (api, number), ours in seen[side].items():
                ratio = rate(ours) / rate(seen[other]["openai", number])
                print(f"{side[:24]} {PATHS[api]} at {number}: {ratio:.2f} x {other}")
    return 1 if any(one.failed for routes in seen.values() for one in routes.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
