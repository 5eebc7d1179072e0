"""The offline half on the real engine: `ChatModel` in this process, and the REPL in a real pseudo-terminal."""

import json
import signal
import subprocess
import sys
from copy import deepcopy

import pexpect
import pytest
from vllm import envs

import vllm_offline
from qwen_vllm.protocol import DEFAULT_SYSTEM, ChatError, Sampling
from tests.support import ROOT
from tests.support.demo import CONVERSATIONS, FRANCE
from vllm_wrapper import ChatModel

GREEDY = Sampling(temperature=0, max_tokens=20)
ROLES = ("user", "assistant")


@pytest.fixture(scope="module")
def model():
    envs.disable_envs_cache()  # tests of the server leave one, without what ChatModel sets
    return ChatModel(max_model_len=2048, dtype="float32")  # as `demo_server`


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
    assert (result.finish_reason, result.completion_tokens) == ("length", 20)


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
    assert not model.llm.llm_engine.has_unfinished_requests()
    assert "Paris" in model.chat(FRANCE, sampling=GREEDY).text


def test_old_turns_are_dropped_and_bad_requests_refused(model):
    history = [("word " * 100, "Yes.")] * 50
    room = Sampling(temperature=0, max_tokens=1700, stop=list("aeiou"))  # for a long answer, which ends at once
    assert 30 < model.chat(FRANCE, history, sampling=room).dropped_turns < 50
    with pytest.raises(ChatError, match="query"):
        model.chat("word " * 3000)
    with pytest.raises(ChatError, match="blank"):
        model.chat(" ")


def test_a_batch_answers_as_if_each_row_were_alone(model):
    rows = [
        {"query": FRANCE},
        {"query": "Tell me about the sea.", "sampling": {"max_tokens": 30}},
        {"query": "And of Italy?", "history": [[FRANCE, "The capital of France is Paris."]]},
        {"query": "Who are you?", "system": "You are a pirate called Jack.", "max_tokens": 10},
    ]
    before = deepcopy(rows)
    results = model.chat_batch(rows, GREEDY)
    assert rows == before
    for row, result in zip(rows, results, strict=True):
        length = row.get("max_tokens") or row.get("sampling", {}).get("max_tokens", 20)
        sampling = Sampling(temperature=0, max_tokens=length)
        assert result == model.chat(row["query"], row.get("history"), row.get("system", DEFAULT_SYSTEM), sampling)
    assert "Paris" in results[0].text
    assert results[1].completion_tokens == 30
    assert results[2].history == [(FRANCE, "The capital of France is Paris."), ("And of Italy?", results[2].text)]
    assert "Rome" in results[2].text
    again = model.chat_batch([{"query": "And of Italy?", "history": results[0].history}], GREEDY)
    assert "Rome" in again[0].text


def test_every_way_in_gives_the_same_answers(model, said_by_vllm):
    from vllm import SamplingParams

    greedy = Sampling(temperature=0, max_tokens=10)
    alone, messages = [], []
    for system, history, query in CONVERSATIONS:
        *deltas, result = model.stream_chat(query, history, system, greedy)
        assert "".join(deltas) == result.text == model.chat(query, history, system, greedy).text
        alone.append(result.text)
        turns = [{"role": role, "content": text} for turn in history for role, text in zip(ROLES, turn, strict=True)]
        messages.append([{"role": "system", "content": system}, *turns, {"role": "user", "content": query}])
    rows = [{"system": system, "history": history, "query": query} for system, history, query in CONVERSATIONS]
    assert [result.text for result in model.chat_batch(rows, greedy)] == alone
    outputs = model.llm.chat(messages, SamplingParams(temperature=0, max_tokens=10), use_tqdm=False)
    assert [output.outputs[0].text for output in outputs] == alone
    assert alone == said_by_vllm


def test_a_streamed_batch_grows_side_by_side_and_a_bad_row_harms_no_other(model):
    rows = [{"query": "Tell me about the sea."}, {"query": ""}, {"query": "Tell me about the sky."}]
    parts = list(model.stream_batch(rows, GREEDY))
    texts, ends = {0: "", 2: ""}, {}
    for i, part in parts:
        if isinstance(part, str):
            texts[i] += part
        else:
            ends[i] = part
    assert ends[1].param == "query"
    assert texts == {0: ends[0].text, 2: ends[2].text}
    assert "sea" in texts[0] and "sky" in texts[2]
    second_begins = next(k for k, (i, _) in enumerate(parts) if i == 2)
    assert second_begins < 5
    assert not model.llm.llm_engine.has_unfinished_requests()


def test_rows_that_begin_alike_share_their_cache(model, monkeypatch):
    cached, step = [], model.llm.llm_engine.step

    def watched() -> list:
        outputs = step()
        cached.extend(output.num_cached_tokens for output in outputs if output.finished)
        return outputs

    system = "You are a very patient teacher of geography who answers children. " * 10
    model.chat(FRANCE, system=system, sampling=GREEDY)
    monkeypatch.setattr(model.llm.llm_engine, "step", watched)
    model.chat_batch([{"query": f"What is {n} + {n}?", "system": system} for n in range(3)], Sampling(max_tokens=1))
    assert len(cached) == 3
    assert min(cached) > 100


def test_raw_texts_are_completed(model):
    texts = model.complete_batch(["The capital of France is", "1, 2, 3, 4, 5,"], GREEDY)
    assert "Paris" in texts[0]
    assert "6, 7" in texts[1]


def test_a_prompt_on_the_command_line(model, monkeypatch, capsys):
    monkeypatch.setattr(vllm_offline, "_load", lambda *_: model)
    assert vllm_offline.main(["--prompt", FRANCE, "--temperature", "0"]) == 0
    assert capsys.readouterr().out == "The capital of France is Paris.\n"
    assert vllm_offline.main(["--prompt", " "]) == 1


@pytest.mark.long
def test_a_file_whose_run_is_killed_is_completed(model, tmp_path, monkeypatch, capsys):
    source, target = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    rows = [{"id": f"r{i}", "query": f"Tell me {i} things about the sea.", "max_tokens": 3 * i} for i in range(1, 10)]
    lines = [json.dumps(row).encode() for row in rows]
    lines[6:6] = [b"not JSON", b'{"query": "' + b"x" * 10 * 2**20 + b'"}', b""]
    source.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join([b"{}", *lines, b"[]"]))
    files = ["--input", str(source), "--output", str(target), "--temperature", "0"]

    run = pexpect.spawn(
        sys.executable,
        ["vllm_offline.py", *files, "--max-model-len", "2048", "--max-num-seqs", "2"],
        cwd=ROOT,
        encoding="utf-8",
        timeout=120,
        dimensions=(40, 100),
    )
    run.expect(r"[1-9]/13 rows \|.*\| 00:\d\d, 0\d:\d\d left, \d+ tokens/s")
    run.kill(signal.SIGKILL)
    run.wait()
    done = [record for record in map(json.loads, target.read_bytes().splitlines()) if "text" in record]
    assert 0 < len(done) < 9

    monkeypatch.setattr(vllm_offline, "_load", lambda *_: model)
    assert vllm_offline.main(files) == 1
    summary = json.loads(capsys.readouterr().out)
    assert (summary["answered"], summary["answered_before"], summary["failed"]) == (9 - len(done), len(done), 4)
    records = {record["line"]: record for record in map(json.loads, target.read_text().splitlines())}
    assert len(records) == len(target.read_text().splitlines()) == 13
    assert {line for line, record in records.items() if "error" in record} == {1, 8, 9, 14}
    assert "8388608 bytes" in records[9]["error"]["message"]
    answers = {record["id"]: record for record in records.values() if "text" in record}
    assert len(answers) == 9
    for row in rows:
        assert answers[row["id"]]["history"] == [[row["query"], answers[row["id"]]["text"]]]
        assert answers[row["id"]]["usage"]["completion_tokens"] <= row["max_tokens"]


def test_the_repl_in_a_terminal(offline_chat: pexpect.spawn) -> None:
    chat = offline_chat
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


@pytest.mark.long
def test_an_unknown_flag_is_named():
    command = [sys.executable, "vllm_offline.py", "--no-such-flag"]
    done = subprocess.run(command, cwd=ROOT, input="Hi\n", capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "--no-such-flag" in done.stderr
