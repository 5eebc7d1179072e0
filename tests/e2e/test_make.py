"""The main job as the README tells it."""

import os
import subprocess
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
# As in a user's terminal, and not as under `make test`, where make tells of each folder it enters.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}


def make(*arguments: str, typed: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, env=ENVIRONMENT, input=typed, capture_output=True, text=True, timeout=300
    )


def servers() -> set[int]:
    """The processes of this project's servers."""
    running = psutil.process_iter(["cmdline"])
    return {process.pid for process in running if str(ROOT / "vllm_server.py") in (process.info["cmdline"] or [])}


def test_make_chat_answers_a_question_from_a_pipe_and_leaves_nothing_running():
    before = servers()
    done = make("chat", typed="What is the capital of France?\n")
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert len(done.stdout.splitlines()) == 1
    assert servers() <= before


def test_a_server_that_cannot_start_says_why_in_one_line():
    done = make("chat", "MODEL=./nowhere", typed="Hi\n")
    assert done.returncode != 0
    assert "./nowhere is neither a folder nor a model id" in done.stderr
    assert "Traceback" not in done.stderr
