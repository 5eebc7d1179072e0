"""What turn N of a conversation costs as it grows: building its prompt, and reading it up to the first token.

    python -m benchmarks.growth [--model FOLDER] [--max-model-len 8192] [--reasoning] [--beside CHECKOUT]

`first`: nothing of the conversation was seen before; `next`: all but the last turn was, as while people chat. With
`--reasoning` each turn has some, as where the chat template keeps it (Qwen3.8).

With `--beside`: turns 1,000 to 1,019 of a conversation, with a full context, by turns with our prompts and with those
of another checkout of this repository (`git worktree add CHECKOUT COMMIT`), and the ratio of their times in all.
"""

import argparse
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from statistics import median

from prompt_utils import PromptBuilder
from qwen_vllm.protocol import DEFAULT_SYSTEM, ChatResult, Sampling, Turn, turn
from vllm_wrapper import ChatModel

TURNS = (1, 10, 100, 1000)
FULL, FULL_TURNS = 1000, 20
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


def answer_time(model: ChatModel, history: list[Turn]) -> tuple[float, ChatResult]:
    """Seconds to the first token of the turn after `history`, and the answer."""
    began = time.perf_counter()
    result = model.chat("And now?", history, sampling=ONE_TOKEN)
    return time.perf_counter() - began, result


def builder_of(checkout: Path) -> type[PromptBuilder]:
    """The prompt builder of another checkout."""
    spec = spec_from_file_location("other_prompt_utils", checkout / "prompt_utils.py")
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.PromptBuilder


def full_context(model: ChatModel, builders: dict[str, PromptBuilder], reasoning: str) -> None:
    """Prints a row for each of the turns on a full context, and the ratio of their times in all."""
    seconds: dict[str, float] = dict.fromkeys(builders, 0)
    print(f"{'turn':>6}" + "".join(f"{name:>8} {'tokens':>7} {'dropped':>8}" for name in builders))
    for number in range(FULL - 1, FULL + FULL_TURNS):
        row = f"{number:6}"
        for name, builder in builders.items():
            model._requests.prompts = builder
            took, result = answer_time(model, conversation(name, number, reasoning))
            seconds[name] += took if number >= FULL else 0  # in the turn before, the engine has seen nothing yet
            row += f"{took:6.2f} s {result.prompt_tokens:7} {result.dropped_turns:8}"
        print(row, flush=True)
    print(f"first token after {seconds['ours']:.1f} s in all beside {seconds['other']:.1f} s:", end=" ")
    print(f"{seconds['ours'] / seconds['other']:.2f} x")


def main() -> None:
    """Prints a row a turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--max-model-len", type=int, default=8192)
    parser.add_argument("--reasoning", action="store_const", const=REASONING, default="")
    parser.add_argument("--beside", type=Path, metavar="CHECKOUT")
    args = parser.parse_args()
    model = ChatModel(args.model, max_model_len=args.max_model_len)
    model.chat("Warm up.", sampling=ONE_TOKEN)
    tokenizer = model.llm.get_tokenizer()
    if args.beside:
        builders = {"other": builder_of(args.beside)(tokenizer), "ours": PromptBuilder(tokenizer)}
        return full_context(model, builders, args.reasoning)
    print(f"{'turn':>6} {'tokens':>7} {'build first':>12} {'next':>8} {'token first':>12} {'next':>8}")
    for turns in TURNS:
        built = build_times(PromptBuilder(tokenizer), conversation("a", turns - 1, args.reasoning), args.max_model_len)
        first, following = [], []
        for name in "bcd":
            history = conversation(name, turns, args.reasoning)
            first.append(answer_time(model, history[:-1])[0])
            seconds, result = answer_time(model, history)
            following.append(seconds)
        build_next, token_first, token_next = median(built[1:]), median(first), median(following)
        row = f"{turns:6} {result.prompt_tokens:7} {built[0]:9.0f} µs {build_next:5.0f} µs"
        print(f"{row} {token_first:10.2f} s {token_next:6.2f} s", flush=True)


if __name__ == "__main__":
    main()
