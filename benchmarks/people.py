"""Conversations instead of streams: people who come by chance, read, think and ask again, on one GPU.

    python -m benchmarks.people --model FOLDER [--people 200] [--questions 8] [--turns 3] [--flags …]

All have one system prompt of about 1,000 tokens. Answers have 50 to 400 tokens and become part of the next prompt, as
in a chat. Sides and flags are those of `benchmarks.serving`. The same people come to each route at the same times, with
texts of the same lengths; /chat is told other words, so that it finds nothing of /v1's in the prefix cache. Prints
tokens/s, time to first token and gaps between pieces. Ends with status 1 where an answer was not whole.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from urllib.parse import urlsplit

import requests
import uvloop

from benchmarks.load import HEAD, PATHS, WORDS, Seen, row
from benchmarks.serving import add_side_flags, routes, start

SYSTEM_WORDS, QUESTION_WORDS, ANSWER_TOKENS = 1000, (10, 60), (50, 400)
THINKING = 5.0
"""Seconds that a person reads and thinks before the next question, on average."""


class Person:
    """One conversation: its times and lengths follow from `seed`, its words from the route too."""

    def __init__(self, api: str, model: str, system: str, questions: int, seed: str) -> None:
        chance, words = random.Random(seed), random.Random(f"{seed} {api}")
        self.api, self._model, self._system = api, model, system
        self.come_after = chance.uniform(0, 2 * THINKING)
        self.thinks = [chance.expovariate(1 / THINKING) for _ in range(questions)]
        self._asked = [" ".join(words.choices(WORDS, k=chance.randint(*QUESTION_WORDS))) for _ in range(questions)]
        self._tokens = [chance.randint(*ANSWER_TOKENS) for _ in range(questions)]
        self._answers: list[str] = []

    def question(self) -> bytes:
        """The body of the next request, with the conversation so far."""
        turn = len(self._answers)
        past = list(zip(self._asked, self._answers, strict=False))
        sampling = {"max_tokens": self._tokens[turn], "stream": True, "temperature": 0}
        if self.api == "chat":
            return json.dumps(
                {"system": self._system, "history": past, "query": self._asked[turn], **sampling}
            ).encode()
        messages = [{"role": "system", "content": self._system}]
        for asked, answer in past:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        messages.append({"role": "user", "content": self._asked[turn]})
        options = {"model": self._model, "stream_options": {"include_usage": True}}
        return json.dumps({"messages": messages, **options, **sampling}).encode()

    def hear(self, answer: str) -> None:
        """The answer becomes part of the conversation."""
        self._answers.append(answer)


def piece(api: str, line: bytes) -> tuple[str, int]:
    """The text of a line of an answer, and the answer's tokens where it is the last line with them."""
    if api == "chat":
        value = json.loads(line)
        return value.get("delta", ""), (value.get("usage") or {}).get("completion_tokens", 0)
    value = json.loads(line.removeprefix(b"data: "))
    text = value["choices"][0]["delta"].get("content") if value["choices"] else ""
    return text or "", (value.get("usage") or {}).get("completion_tokens", 0)


async def _converse(person: Person, url: str, seen: Seen, began: float) -> None:
    address = urlsplit(url)
    head = f"POST {PATHS[person.api]} HTTP/1.1\r\nhost: {address.netloc}\r\ncontent-type: application/json\r\n".encode()
    begins = b"{" if person.api == "chat" else b"data: {"
    await asyncio.sleep(began + person.come_after - time.time())
    for think in person.thinks:
        body = person.question()
        asked, last, answer, tokens = time.perf_counter(), 0.0, [], 0
        # Servers close a connection on which nothing came for a few seconds.
        reader, writer = await asyncio.open_connection(address.hostname, address.port, limit=2**20)
        writer.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        while (line := await reader.readline()) not in (b"0\r\n", b""):
            if not line.startswith(begins):
                continue
            text, counted = piece(person.api, line)
            tokens = counted or tokens
            if text:
                now = time.perf_counter()
                (seen.gaps if last else seen.first).append(now - (last or asked))
                last = now
                answer.append(text)
        writer.close()
        if not tokens:
            seen.failed.append("an answer was not whole")
            break
        seen.tokens += tokens
        seen.whole += 1
        person.hear("".join(answer))
        await asyncio.sleep(think)


async def _part(url: str, people: list[Person], began: float) -> Seen:
    seen = Seen(began=began)
    await asyncio.gather(*(_converse(person, url, seen, began) for person in people))
    seen.ended = time.time()
    return seen


def _run(*arguments: object) -> Seen:
    return uvloop.run(_part(*arguments))


def talk(url: str, api: str, people: int, questions: int, seed: int, processes: int) -> Seen:
    """What `people` people have seen together; `seed` decides on what they ask, and when."""
    model = requests.get(f"{url}/v1/models", timeout=60).json()["data"][0]["id"]
    system = " ".join(random.Random(f"{seed} {api}").choices(WORDS, k=SYSTEM_WORDS))
    all_people = [Person(api, model, system, questions, f"{seed} {number}") for number in range(people)]
    shares = [share for number in range(processes) if (share := all_people[number::processes])]
    began = time.time() + 2
    with ProcessPoolExecutor(len(shares)) as pool:
        parts = list(pool.map(_run, *zip(*((url, share, began) for share in shares), strict=True)))
    whole = Seen(began=began, ended=max(part.ended for part in parts))
    for part in parts:
        for name in ("first", "gaps", "failed", "tokens", "whole"):
            setattr(whole, name, getattr(whole, name) + getattr(part, name))
    return whole


def main() -> int:
    """Prints a row for each side and turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_side_flags(parser)
    parser.add_argument("--people", type=int, default=200)
    parser.add_argument("--questions", type=int, default=8, help="of each person (default: 8)")
    parser.add_argument("--processes", type=int, default=8, help="at most, on this side (default: 8)")
    args = parser.parse_args()
    failed = []
    with ExitStack() as stack:
        flags = ["--model", args.model, *args.flags]
        urls = {side: start(stack, number, side, flags) for number, side in enumerate(args.sides)}
        print(f"{'':45} {HEAD}")
        for turn in range(args.turns):
            for side, url in urls.items():
                for api in routes(side):
                    seen = talk(url, api, args.people, args.questions, turn, args.processes)
                    print(f"{side[:24]:24} {PATHS[api]:20} {row(args.people, seen)}", flush=True)
                    failed += seen.failed
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
