"""Processes that are forked early: what they begin with, and when the one that they are forked from ends."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from qwen_vllm.vllm_plugin import early

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


LIBRARIES = """
import os
import sys

from qwen_vllm.vllm_plugin import early


def front_end(queue, name):
    import prometheus_client
    import torch

    prometheus_client.Counter(name, "Counts.").inc()
    queue.put([torch.get_num_threads(), *os.listdir(os.environ["PROMETHEUS_MULTIPROC_DIR"])])


if __name__ == "__main__":
    early.MODULES = (*early.MODULES[:1], "prometheus_client", "torch")
    early.begin()
    os.environ |= {"OMP_NUM_THREADS": "1", "PROMETHEUS_MULTIPROC_DIR": sys.argv[1]}
    context = early.EarlyContext()
    queue = context.Queue()
    context.Process(target=front_end, args=(queue, "some")).start()
    print(*queue.get())
"""


def test_libraries_that_read_the_environment_as_they_are_imported_know_it(tmp_path: Path) -> None:
    script = tmp_path / "server.py"
    script.write_text(LIBRARIES)
    (tmp_path / "metrics").mkdir()
    command = (sys.executable, script, tmp_path / "metrics")
    threads, *files = subprocess.check_output(command, text=True, cwd=Path.cwd(), timeout=60).split()
    assert threads == "1"
    assert [file.partition("_")[0] for file in files] == ["counter"]


def test_files_of_the_current_folder_do_not_take_the_place_of_libraries(tmp_path: Path) -> None:
    script, folder = tmp_path / "server.py", tmp_path / "folder"
    folder.mkdir()
    script.write_text(SERVER)
    (folder / "setproctitle.py").write_text("raise RuntimeError('this is no library')")
    command = (sys.executable, script)
    shown = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert shown.stdout.split()[:1] == ["hello"]
    assert "no library" not in shown.stderr


def test_processes_are_spawned_where_vllm_or_the_user_wants_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD", raising=False)
    assert early.is_possible()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["vllm_server.py", "--numa-bind"])
        assert not early.is_possible()
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    assert not early.is_possible()
