"""How long a key waits for its first token while another key floods the server, beside what it waits alone.

    python -m benchmarks.fairness [FLAG …]

Starts a server with the flags and 8 requests at a time. The flood fills its places and its queue, and goes on asking.
"""

import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

from qwen_vllm.protocol import ChatError, Sampling
from qwen_vllm.with_server import running_server
from vllm_client import stream_chat

KEYS = {"ann": "ann-0123456789abcdef", "bob": "bob-0123456789abcdef"}
ROOM = 16
"""Places in the queue."""
FLAGS = f"--max-num-seqs 8 --max-num-queued-reqs {ROOM}".split()
TIMES = 9


def first_token(url: str, number: int) -> float:
    """Seconds that Bob waits for the first token of a short answer."""
    began = time.monotonic()
    answer = stream_chat(url, f"Count from {number} to ten.", sampling=Sampling(max_tokens=4), api_key=KEYS["bob"])
    next(answer)
    seconds = time.monotonic() - began
    list(answer)
    return seconds


def flood(url: str, ended: threading.Event, refused: list[int]) -> None:
    """Ann asks for one long answer after the other."""
    while not ended.is_set():
        try:
            list(stream_chat(url, "Tell a story.", sampling=Sampling(max_tokens=64), api_key=KEYS["ann"]))
        except ChatError as error:
            refused.append(error.status or 0)
            time.sleep(1)


def main() -> None:
    """Prints the waits in their order, and their median, alone and beside the flood."""
    folder, ended, refused = Path(tempfile.mkdtemp()), threading.Event(), []
    keys = folder / "keys.toml"
    keys.touch(0o600)
    keys.write_text("".join(f'[{name}]\nkey = "{key}"\n' for name, key in KEYS.items()))
    team = ["--key-file", str(keys), "--usage-file", str(folder / "usage.db")]
    with running_server([*FLAGS, *team, *sys.argv[1:]], folder / "log") as url:
        first_token(url, 0)
        alone = [first_token(url, number) for number in range(TIMES)]
        threads = [threading.Thread(target=flood, args=(url, ended, refused)) for _ in range(8 + ROOM)]
        for thread in threads:
            thread.start()
        time.sleep(10)
        beside = [first_token(url, number) for number in range(TIMES)]
        ended.set()
        for thread in threads:
            thread.join()
    for name, times in (("alone", alone), ("beside the flood", beside)):
        print(f"{name}: median {statistics.median(times):.2f} s of", *(f"{seconds:.2f}" for seconds in times))
    print(f"Ann was refused {len(refused)} times: {sorted(set(refused))}")


if __name__ == "__main__":
    main()
