"""What building the prompt of turn N costs as a conversation grows, in microseconds.

python -m benchmarks.prompt_build
"""

import time

from transformers import AutoTokenizer

from model_utils import demo_model
from prompt_utils import PromptBuilder
from protocol import DEFAULT_SYSTEM

TURNS = (1, 10, 100, 1000)
CONTEXTS = (2048, 8192)
REPEATS = 200


def main() -> None:
    """Prints a row a turn: the time with the earlier turns cached, the usual case, and the first time."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    answer = "Certainly. Here is what I can tell you about it, in two or three sentences of the usual length. " * 3
    history = [(f"And what about the number {i}, if I may ask?", f"{i}: {answer}") for i in range(max(TURNS))]
    print(f"{'turn':>6} {'context':>8} {'tokens':>7} {'first':>8} {'cached':>8}")
    for context in CONTEXTS:
        for turns in TURNS:
            builder, times = PromptBuilder(tokenizer), []
            for i in range(REPEATS):
                began = time.perf_counter()
                prompt = builder.build(DEFAULT_SYSTEM, history[:turns], f"Question {i}?", context)
                times.append((time.perf_counter() - began) * 1e6)
            median = sorted(times)[REPEATS // 2]
            print(f"{turns:6} {context:8} {len(prompt.token_ids):7} {times[0]:8.0f} {median:8.0f}")


if __name__ == "__main__":
    main()
