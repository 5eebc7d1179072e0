"""The engine's own pace, without any server: tokens/s of batches of random prompts, as `benchmarks.load` has them.

    python -m benchmarks.engine_pace --model FOLDER [--streams 1 64 256 1024] [any flag of vLLM's engine]

Settings are those that the server chooses for this hardware; the scheduler is vLLM's own.
"""

import argparse
import os
import random
import time

from qwen_vllm.hardware import engine_defaults, graph_defaults, set_environment, values

VOCABULARY = 100_000


def main() -> None:
    """Prints a row for each size of batch: the best of three, after one to warm up."""
    set_environment()
    os.environ["VLLM_PLUGINS"] = ""
    from vllm import LLM, EngineArgs, SamplingParams
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64, 256, 1024])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--words", type=int, default=50)
    EngineArgs.add_cli_args(parser)
    parser.set_defaults(**values(engine_defaults()))
    flags = parser.parse_args()
    args = EngineArgs.from_cli_args(flags)
    engine = LLM(**{**vars(args), **values(graph_defaults(args))})
    params = SamplingParams(temperature=0, max_tokens=flags.tokens, ignore_eos=True)
    for streams in flags.streams:
        rates = []
        for _ in range(4):
            ids = [[random.randrange(VOCABULARY) for _ in range(flags.words)] for _ in range(streams)]
            began = time.monotonic()
            engine.generate([{"prompt_token_ids": prompt} for prompt in ids], params, use_tqdm=False)
            rates.append(streams * flags.tokens / (time.monotonic() - began))
        print(f"engine alone, {streams:5} at once: {max(rates[1:]):9.0f} tokens/s", flush=True)


if __name__ == "__main__":
    main()
