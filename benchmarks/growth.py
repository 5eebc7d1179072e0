"""What turn N of a conversation costs as it grows: building its prompt, and reading it up to the first token.

    python -m benchmarks.growth [--model FOLDER] [--max-model-len 8192] [--reasoning]

`first`: nothing of the conversation was seen before; `next`: all but the last turn was, as while people chat. With
`--reasoning` each turn has some, as where the chat template keeps it (Qwen3.8).
"""

import argparse
import time
from statistics import median

from prompt_utils import PromptBuilder
from qwen_vllm.protocol import DEFAULT_SYSTEM, Sampling, Turn, turn
from vllm_wrapper import ChatModel

TURNS = (1, 10, 100, 1000)
REPEATS = 200
REASONING = "The user asks about a number. I say what I know about it, in two sentences."
ANSWER = "Certainly. Here is what I can tell you about it, in two sentences of the usual length. "
ONE_TOKEN = Sampling(max_tokens=1)


def conversation(name: str, turns: int, reasoning: str) -> list[Turn]:
    """A conversation that shares no beginning with one of another name."""
    asked = "and what about the number {}, if I may ask?"
    return [turn(f"{name}: {asked.format(i)}", f"{i}: {ANSWER}", reasoning) for i in range(turns)]


def build_times(builder: PromptBuilder, history: list[Turn], budget: int) -> list[float]:
    """Microseconds that building the prompt took: the first time, then with the earlier turns remembered."""
    times = []
    for i in range(REPEATS):
        began = time.perf_counter()
        builder.build(DEFAULT_SYSTEM, history, f"Question {i}?", budget)
        times.append((time.perf_counter() - began) * 1e6)
    return times


def answer_time(model: ChatModel, history: list[Turn]) -> tuple[float, int]:
    """Seconds to the first token of the turn after `history`, and the tokens of its prompt."""
    began = time.perf_counter()
    result = model.chat("And now?", history, sampling=ONE_TOKEN)
    return time.perf_counter() - began, result.prompt_tokens


def main() -> None:
    """Prints a row a turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--max-model-len", type=int, default=8192)
    parser.add_argument("--reasoning", action="store_const", const=REASONING, default="")
    args = parser.parse_args()
    model = ChatModel(args.model, max_model_len=args.max_model_len)
    model.chat("Warm up.", sampling=ONE_TOKEN)
    tokenizer = model.llm.get_tokenizer()
    print(f"{'turn':>6} {'tokens':>7} {'build first':>12} {'next':>8} {'token first':>12} {'next':>8}")
    for turns in TURNS:
        built = build_times(PromptBuilder(tokenizer), conversation("a", turns - 1, args.reasoning), args.max_model_len)
        first, following = [], []
        for name in "bcd":
            history = conversation(name, turns, args.reasoning)
            first.append(answer_time(model, history[:-1])[0])
            seconds, tokens = answer_time(model, history)
            following.append(seconds)
        build_next, token_first, token_next = median(built[1:]), median(first), median(following)
        print(
            f"{turns:6} {tokens:7} {built[0]:9.0f} µs {build_next:5.0f} µs {token_first:10.2f} s {token_next:6.2f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
