"""The engine's process on a CPU: what it begins with, and when the one that it is forked from ends."""

import subprocess
import sys
from pathlib import Path

import psutil

SERVER = """
import os
import sys

import psutil

from qwen_vllm.vllm_plugin import early


def engine(queue, word):
    here = psutil.Process()
    queue.put([word, os.environ["SET_LATER"], "GONE" in os.environ, here.parent().name(), here.parent().pid])


if __name__ == "__main__":
    os.environ["GONE"] = "1"
    early.MODULES = early.MODULES[:1]
    early.begin()
    os.environ["SET_LATER"] = "set"
    del os.environ["GONE"]
    context = early.EarlyContext()
    queue = context.Queue()
    process = context.Process(target=engine, name="EngineCore", kwargs={"queue": queue, "word": "hello"})
    process.start()
    print(*queue.get(), sep="\\n", flush=True)
    process.join()
    print(process.exitcode, flush=True)
    sys.stdin.read()
"""


def test_it_has_the_servers_environment_and_its_origin_ends_with_the_server(tmp_path: Path) -> None:
    script = tmp_path / "server.py"
    script.write_text(SERVER)
    with subprocess.Popen(
        (sys.executable, script), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    ) as server:
        assert server.stdout
        word, later, gone, name, pid, status = [server.stdout.readline().strip() for _ in range(6)]
        assert (word, later, gone, status) == ("hello", "set", "False", "0")
        assert name == "VLLM::Imports"[:15]
        origin = psutil.Process(int(pid))
        server.kill()
        assert psutil.wait_procs([origin], timeout=30)[0]
