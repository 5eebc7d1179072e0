"""The offline half on the real engine: `ChatModel` in this process, and the REPL in a real pseudo-terminal."""

import os
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest

from protocol import ChatError, Sampling
from vllm_wrapper import ChatModel

ROOT = Path(__file__).parents[2]
FRANCE = "What is the capital of France?"
GREEDY = Sampling(temperature=0, max_tokens=40)


@pytest.fixture(scope="module")
def model():
    return ChatModel(max_model_len=2048)


def test_chat_answers_and_leaves_the_callers_history_alone(model):
    history = [("Hi", "Hello!")]
    result = model.chat(FRANCE, history, sampling=GREEDY)
    assert "Paris" in result.text
    assert result.history == [("Hi", "Hello!"), (FRANCE, result.text)]
    assert history == [("Hi", "Hello!")]
    assert result.finish_reason == "stop"
    assert result.completion_tokens > 5


def test_the_streamed_answer_is_the_whole_one(model):
    *deltas, result = model.stream_chat("Tell me about the sea.", sampling=GREEDY)
    assert len(deltas) > 10
    assert "".join(deltas) == result.text == model.chat("Tell me about the sea.", sampling=GREEDY).text
    assert (result.finish_reason, result.completion_tokens) == ("length", 40)


def test_two_answers_at_a_time_do_not_mix(model):
    queries = [FRANCE, "What is the capital of Italy?"]
    alone = [model.chat(query, sampling=GREEDY).text for query in queries]
    streams = [model.stream_chat(query, sampling=GREEDY) for query in queries]
    together = [next(stream) for stream in streams]
    for i, stream in enumerate(streams):
        *deltas, result = stream
        assert "".join([together[i], *deltas]) == result.text == alone[i]


def test_a_closed_answer_leaves_the_engine_idle(model):
    answer = model.stream_chat("Count from 1 to 1000.", sampling=Sampling(max_tokens=1000))
    next(answer)
    answer.close()
    assert not model._engine.has_unfinished_requests()
    assert "Paris" in model.chat(FRANCE, sampling=GREEDY).text


def test_old_turns_are_dropped_and_bad_requests_refused(model):
    history = [("word " * 100, "Yes.")] * 50
    assert 30 < model.chat(FRANCE, history, sampling=GREEDY).dropped_turns < 50
    with pytest.raises(ChatError, match="query"):
        model.chat("word " * 3000)
    with pytest.raises(ChatError, match="blank"):
        model.chat(" ")


def test_the_repl_in_a_terminal(tmp_path):
    chat = pexpect.spawn(
        sys.executable,
        ["vllm_offline.py", "--temperature", "0", "--max-model-len", "2048"],
        cwd=ROOT,
        env={**os.environ, "XDG_STATE_HOME": str(tmp_path), "PROMPT_TOOLKIT_NO_CPR": "1"},
        encoding="utf-8",
        timeout=120,
        dimensions=(40, 100),
    )
    chat.expect_exact("Loading SmolLM2-135M-Instruct")
    chat.expect_exact("SmolLM2-135M-Instruct, offline")
    assert "INFO" not in chat.before
    chat.send(FRANCE + "\r")
    chat.expect_exact("The capital of France is Paris.")
    chat.expect("first token")
    chat.send("Write a long story about a dragon.\r")
    chat.expect_exact("Once upon a time")
    chat.sendintr()
    chat.expect_exact("stopped")
    chat.send("/clear\r")
    chat.send(FRANCE + "\r")
    chat.expect_exact("The capital of France is Paris.")
    chat.expect("first token")
    chat.expect_exact(">")
    chat.sendeof()
    chat.expect(pexpect.EOF)
    chat.close()
    assert chat.exitstatus == 0


def test_an_unknown_flag_is_named():
    command = [sys.executable, "vllm_offline.py", "--no-such-flag"]
    done = subprocess.run(command, cwd=ROOT, input="Hi\n", capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "--no-such-flag" in done.stderr
