"""Starts servers one after the other, prints the name and the address of each, and stops them when its input ends.

    python serving.py FOLDER NAME FLAGS [NAME FLAGS …]

The logs go to FOLDER. A process of its own, for tests change what threads share: the environment, the clock.
"""

import sys
from contextlib import ExitStack
from pathlib import Path

from with_server import running_server

if __name__ == "__main__":
    folder, *servers = sys.argv[1:]
    with ExitStack() as running:
        for name, flags in zip(servers[::2], servers[1::2], strict=True):
            print(name, running.enter_context(running_server(flags.split(), Path(folder) / name)), flush=True)
        sys.stdin.read()
