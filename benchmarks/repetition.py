"""One stream with speculation (`--speculative-config`) and without: tokens/s where an answer repeats its prompt.

    python -m benchmarks.repetition [--method ngram] [--tokens 3 6] [--turns 3] [SERVER FLAGS …]

With `--method mtp` the model's MTP layer guesses, which needs no repetition. The servers run side by side and are asked
by turns, greedy. Prints a row a question and a server: the median, its ratio to the server without, and whether the
texts are equal.
"""

import argparse
import json
import statistics
import time
from contextlib import ExitStack

from qwen_vllm.cache import CACHE
from qwen_vllm.protocol import ChatResult, Sampling
from qwen_vllm.with_server import running_server
from vllm_client import stream_chat

TEXT = """The station was built in 1884 and opened in the spring of the year after. It has six platforms, two of them
for the trains to the coast. The roof of iron and glass is 210 metres long. In 1943 it was hit twice; the east wing was
not built again until 1958. Today 48,000 people pass through it on a working day. The city plans to move the tram stop
from the north side to the square in front of the main door, and to plant 60 trees along the street to the river."""
QUESTIONS = {
    "copy": f"Repeat this text word for word, and write nothing else:\n\n{TEXT}",
    "edit": f"Write this text again. Change only the number of platforms to eight:\n\n{TEXT}",
    "document": f"{TEXT}\n\nWhen was the station built, and how long is its roof? Quote the text in whole sentences.",
    "story": "Write a story about a lighthouse.",
}

METHODS = {"ngram": {"prompt_lookup_min": 2, "prompt_lookup_max": 4}, "mtp": {}}


def answer(url: str, text: str) -> tuple[str, float]:
    """Ask once; return the answer, and tokens/s from its first piece to its last."""
    times = list[float]()
    for part in stream_chat(url, text, sampling=Sampling(temperature=0, max_tokens=160)):
        if not isinstance(part, ChatResult):
            times.append(time.monotonic())
    assert isinstance(part, ChatResult)
    return part.text, (part.completion_tokens - 1) / (times[-1] - times[0])


def main() -> None:
    """Start the servers, ask by turns, and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="ngram")
    parser.add_argument("--tokens", type=int, nargs="+", default=[3, 6], help="guessed at once (default: 3 6)")
    parser.add_argument("--turns", type=int, default=3, help="after one that does not count (default: 3)")
    args, flags = parser.parse_known_args()
    sides = {"without": flags}
    for tokens in args.tokens:
        guesses = {"method": args.method, "num_speculative_tokens": tokens, **METHODS[args.method]}
        sides[f"{tokens} tokens"] = [*flags, "--speculative-config", json.dumps(guesses)]
    seen: dict[tuple[str, str], list[tuple[str, float]]] = {(name, side): [] for name in QUESTIONS for side in sides}
    with ExitStack() as stack:
        urls = {
            side: stack.enter_context(running_server(own, CACHE / f"repetition-{number}.log"))
            for number, (side, own) in enumerate(sides.items())
        }
        for _ in range(1 + args.turns):
            for name, side in seen:
                seen[name, side].append(answer(urls[side], QUESTIONS[name]))
    for (name, side), answers in seen.items():
        without = seen[name, "without"]
        rate, base = (statistics.median(rate for _, rate in each[1:]) for each in (answers, without))
        equal = {text for text, _ in answers} == {text for text, _ in without}
        print(f"{name:9} {side:9} {rate:7.1f} tokens/s, {rate / base:.2f} x, texts {'equal' if equal else 'DIFFER'}")


if __name__ == "__main__":
    main()
