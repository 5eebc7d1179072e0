"""Batches against bare `LLM.generate` on the same token ids and engine: tokens/s, in alternating runs.

    python -m benchmarks.offline_batch [--rounds N] [--rows N] [any flag of vLLM's engine]

Answers have 16 to 64 tokens, so that rows finish at different times and others take their places. `chat_batch` and the
file also check, encode and, for the file, read and write the rows; bare `generate` gets token ids made before.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from statistics import median

from qwen_vllm.offline.batch import Batch
from qwen_vllm.protocol import ChatRequest
from vllm_offline import _engine_args
from vllm_wrapper import ChatModel


def rows(count: int) -> list[dict]:
    """Questions about different things, the answers to which are cut at different lengths."""
    return [
        {"query": f"Write a long story about the number {i}.", "temperature": 0, "max_tokens": 16 + i * 37 % 49}
        for i in range(count)
    ]


def bare(model: ChatModel, questions: list[dict]) -> Callable[[], int]:
    """vLLM's own `generate`."""
    built = [model._requests.build(ChatRequest(**question), stream=False) for question in questions]
    prompts = [{"prompt_token_ids": prompt.token_ids} for prompt, _ in built]
    params = [params for _, params in built]
    return lambda: sum(
        len(output.outputs[0].token_ids) for output in model.llm.generate(prompts, params, use_tqdm=False)
    )


def batch(model: ChatModel, questions: list[dict]) -> Callable[[], int]:
    """Our batch."""
    return lambda: sum(result.completion_tokens for result in model.chat_batch(questions))


def file(model: ChatModel, questions: list[dict]) -> Callable[[], int]:
    """Our batch from a file into a file."""
    folder = Path(tempfile.mkdtemp())
    source, target = folder / "rows.jsonl", folder / "answers.jsonl"
    source.write_text("".join(json.dumps(question) + "\n" for question in questions))

    def run() -> int:
        target.unlink(missing_ok=True)
        with closing(Batch(source, target)) as answers:
            answers.run(lambda: model)
            return answers.summary()["completion_tokens"]

    return run


def time_steps(model: ChatModel) -> list[float]:
    """Has the engine's steps timed; the list, one number, grows by the seconds that they take."""
    seconds, step = [0.0], model._engine.step

    def timed() -> list:
        began = time.monotonic()
        outputs = step()
        seconds[0] += time.monotonic() - began
        return outputs

    model._engine.step = timed
    return seconds


def main() -> None:
    """Prints tokens/s of each run and how much of its time passed outside the engine's steps, which is what the sides
    differ in; then the ratios: the median, and that of the best runs, which other programs disturb least.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--model")
    args, flags = parser.parse_known_args()
    model = ChatModel(args.model, **_engine_args(flags))
    questions = rows(args.rows)
    sides = {side.__name__: side(model, questions) for side in (bare, batch, file)}
    sides["bare"]()  # warms up
    rates: dict[str, list[float]] = {name: [] for name in sides}
    steps = time_steps(model)
    for round in range(args.rounds):
        for name in list(sides)[:: 1 if round % 2 else -1]:
            model.llm.reset_prefix_cache()
            steps[0], began = 0.0, time.monotonic()
            tokens = sides[name]()
            seconds = time.monotonic() - began
            rates[name].append(tokens / seconds)
            outside = f"{1 - steps[0] / seconds:.2%} outside the engine"
            print(f"{name:6} {tokens} tokens, {rates[name][-1]:.1f} tokens/s, {outside}", flush=True)
    for name in ("batch", "file"):
        ratios = [ours / theirs for ours, theirs in zip(rates[name], rates["bare"], strict=True)]
        best = max(rates[name]) / max(rates["bare"])
        print(f"{name} / bare: median {median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}), best {best:.3f}")


if __name__ == "__main__":
    main()
