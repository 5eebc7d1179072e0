"""Seconds from the command to a server that is ready: ours, and vLLM's with its Rust front end, alone and by turns.

    python -m benchmarks.starts --model FOLDER [--turns 4] [--sides rust ours] [--flags=--load-format=dummy …]

Sides and flags are those of `benchmarks.serving`. Each side has a cache of its own, with --cache one that is kept. The
first start stands apart: from an empty cache it compiles.
"""

import argparse
import os
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks.serving import add_side_flags, spread, start


def main() -> None:
    """Prints a line a start, then each side's first one, and the median of the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_side_flags(parser, turns=4)
    parser.add_argument("--cache", type=Path, help="folder (default: a temporary one)")
    args = parser.parse_args()
    seen: dict[str, list[float]] = {side: [] for side in args.sides}
    with ExitStack() as stack:
        cache = args.cache or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for _ in range(args.turns):
            for side in args.sides:
                os.environ["VLLM_CACHE_ROOT"] = str(cache / side.partition(":")[0])
                with ExitStack() as running:
                    began = time.monotonic()
                    start(running, 0, side, ["--model", args.model, *args.flags])
                    seen[side].append(time.monotonic() - began)
    for side, (first, *again) in seen.items():
        print(f"{side}: {first:.1f} s, again {spread(again, 1) if again else '—'} s")


if __name__ == "__main__":
    main()
