"""The main job as the README tells it."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_make_chat_answers_a_question_from_a_pipe_and_leaves_nothing_running():
    done = subprocess.run(
        ["make", "chat"],
        cwd=ROOT,
        input="What is the capital of France?\n",
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert len(done.stdout.splitlines()) == 1
    assert (
        str(ROOT / "vllm_server.py")
        not in subprocess.run(["ps", "ax", "-o", "args"], capture_output=True, text=True).stdout
    )


def test_a_server_that_cannot_start_says_why_in_one_line():
    done = subprocess.run(
        ["make", "chat", "MODEL=./nowhere"], cwd=ROOT, input="Hi\n", capture_output=True, text=True, timeout=300
    )
    assert done.returncode != 0
    assert "./nowhere is neither a folder nor a model id" in done.stderr
    assert "Traceback" not in done.stderr
