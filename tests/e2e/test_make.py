"""The main job as the README tells it."""

import subprocess

import psutil

from tests.support import ROOT
from tests.support.programs import ENVIRONMENT
from tests.support.scripted_server import LAST, Server, line


def test_make_chat_answers_a_question_from_a_pipe_and_leaves_nothing_running(piped_chat: subprocess.Popen) -> None:
    answer, told = piped_chat.communicate(timeout=300)
    assert piped_chat.returncode == 0, told
    assert "Paris" in answer
    assert len(answer.splitlines()) == 1
    environments = [process.info["environ"] or {} for process in psutil.process_iter(["environ"])]
    assert not any("PIPED_CHAT" in environment for environment in environments)


def test_make_chat_with_a_url_talks_to_the_server_that_runs_there(server: Server) -> None:
    url = server.play(line({"delta": "Paris."}), line(LAST))
    command = ["make", "chat", f"URL={url}"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, input="Hi\n", capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "Paris.\n"), done.stderr
    assert "Starting the server" not in done.stderr
    assert server.requests[-1][2]["query"] == "Hi"


def test_a_server_that_cannot_start_says_why_in_one_line() -> None:
    command = ["make", "chat", "MODEL=./nowhere"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, input="Hi\n", capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "./nowhere is neither a folder nor a model id" in done.stderr
    assert "Traceback" not in done.stderr
