"""Files of rows and of answers, with a scripted model: what is done stays done, whatever happens."""

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwen_vllm.offline.batch import Batch, BatchError
from qwen_vllm.protocol import DEFAULT_SYSTEM, ChatError, ChatResult, Sampling
from tests.support import ROOT
from tests.support.scripted_model import ScriptedModel, records, texts, write


@pytest.fixture
def files(tmp_path):
    return tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"


def no_model() -> ScriptedModel:
    pytest.fail("loaded a model")


def answer(
    files: tuple[Path, Path],
    model: ScriptedModel | Callable[[], ScriptedModel] = ScriptedModel,
    ordered=False,
    **kwargs,
) -> dict[str, Any]:
    with closing(Batch(*files, kwargs.pop("reference", None))) as batch:
        batch.run(model if callable(model) else lambda: model, **kwargs)
        if ordered:
            batch.order()
        return batch.summary()


def counts(summary: dict[str, Any]) -> tuple[int, int, int]:
    return summary["answered"], summary["answered_before"], summary["failed"]


def test_each_row_gets_a_line(files):
    write(files[0], {"query": "a", "history": [["1", "2"]]}, {"id": "x", "query": "b", "system": "S", "seed": 1})
    model, sampling = ScriptedModel(), Sampling(max_tokens=5)
    summary = answer(files, model, system="D", sampling=sampling)
    assert counts(summary) == (2, 0, 0)
    assert (summary["prompt_tokens"], summary["completion_tokens"]) == (18, 4)
    assert model.requests == [
        {"system": "D", "query": "a", "history": [["1", "2"]]},
        {"system": "S", "query": "b", "seed": 1},
    ]
    assert model.sampling is sampling
    last, first = records(files[1])
    assert len(first.pop("key")) == 32
    assert first == {
        "id": None,
        "line": 1,
        "text": "A",
        "finish_reason": "stop",
        "stop_reason": None,
        "usage": {"prompt_tokens": 9, "completion_tokens": 2, "reasoning_tokens": 0},
        "dropped_turns": 0,
        "dropped_reasoning": 0,
        "history": [["1", "2"], ["a", "A"]],
    }
    assert (last["id"], last["line"], last["text"]) == ("x", 2, "B")


def test_rows_in_openais_form_get_a_system_prompt_only_if_it_is_asked_for(files):
    message = {"role": "user", "content": "a"}
    write(
        files[0], {"query": "b"}, {"messages": [message]}, {"messages": [{"role": "system", "content": "S"}, message]}
    )
    for given, expected in ((None, [DEFAULT_SYSTEM, None, "S"]), ("D", ["D", "D", "S"])):
        model = ScriptedModel(window=1)
        answer((files[0], files[1].with_name(f"{given}.jsonl")), model, system=given)
        assert [request["system"] for request in model.requests] == expected


@pytest.mark.parametrize("text", ['[{"query": "a"}]', '\ufeff\n [\n{"query": "a"},\n{"query": "b"}\n]\n'])
def test_a_json_array_is_no_file_of_rows(files, text):
    files[0].write_text(text)
    with pytest.raises(BatchError, match=r"rows.jsonl is a JSON array, not JSONL"):
        Batch(*files)
    assert not files[1].exists()


def test_no_reader_of_lines_breaks_an_answer(files):
    write(
        files[0], {"id": "\u2028", "query": "a\u2028b\u2029c\x85d 你好"}, {"id": "\u2029", "query": "b", "messages": []}
    )
    summary = answer(files)
    assert counts(summary) == (1, 0, 1)
    answered, failed = sorted(map(json.loads, files[1].read_text().splitlines()), key=lambda line: line["line"])
    assert (answered["id"], answered["text"], failed["id"]) == ("\u2028", "A\u2028B\u2029C\x85D 你好", "\u2029")
    assert "你好" in files[1].read_text()
    assert counts(answer(files)) == (0, 1, 1)


def test_thoughts_have_a_field_of_their_own(files):
    class Thinker(ScriptedModel):
        def stream_batch(self, rows, sampling, deltas):
            for i, result in super().stream_batch(rows, sampling, deltas):
                history = [*result.history[:-1], (*result.history[-1], "Hm.")]
                yield i, replace(result, reasoning="Hm.", reasoning_tokens=1, history=history, dropped_reasoning=1)

    write(files[0], {"query": "a", "history": [["1", "2", "3"]]})
    answer(files, model := Thinker())
    assert model.requests[0]["history"] == [["1", "2", "3"]]
    (record,) = records(files[1])
    assert (record["text"], record["reasoning"]) == ("A", "Hm.")
    assert record["history"] == [["1", "2", "3"], ["a", "A", "Hm."]]
    assert (record["usage"]["reasoning_tokens"], record["dropped_reasoning"]) == (1, 1)


def test_an_answer_has_its_tool_calls(files):
    call = {"id": "1", "type": "function", "function": {"name": "now", "arguments": "{}"}}

    class Caller(ScriptedModel):
        def stream_batch(self, rows, sampling, deltas):
            for i, row in enumerate(rows):
                self.requests.append(row)
                calls = [call] if "tools" in row else []
                yield i, ChatResult("", [], "tool_calls" if calls else "stop", None, 9, 2, 0, tool_calls=calls)

    asked = [{"role": "user", "content": "?"}]
    write(files[0], {"messages": asked, "tools": [{}]}, {"messages": asked})
    answer(files, model := Caller())
    assert model.requests[0] == {"system": None, "messages": asked, "tools": [{}]}
    called, plain = records(files[1])
    assert (called["tool_calls"], called["finish_reason"]) == ([call], "tool_calls")
    assert "tool_calls" not in plain


def test_no_rows_need_no_model(files):
    files[0].write_bytes(b"\xef\xbb\xbf\r\n")
    assert counts(answer(files, no_model)) == (0, 0, 0)
    assert files[1].read_bytes() == b""


@pytest.mark.parametrize("position", [0, 1, 2, 6])
@pytest.mark.parametrize("bad", ["{", "[]", '{"query": "long"}', '{"id": {}, "query": "a"}'])
def test_a_bad_row_is_named_and_the_rest_goes_on(files, position, bad):
    rows: list[Any] = [{"query": f"q{i}"} for i in range(6)]
    rows.insert(position, bad)
    write(files[0], *rows)
    model = ScriptedModel({"long": ChatError("query: too long", param="query")})
    assert counts(answer(files, model)) == (6, 0, 1)
    found = {record["line"]: record for record in records(files[1])}
    assert sorted(found) == [1, 2, 3, 4, 5, 6, 7]
    assert found[position + 1].keys() == {"id", "line", "error"}
    assert found[position + 1]["error"]["message"]
    assert "long" not in bad or "too long" in found[position + 1]["error"]["message"]


def test_finished_rows_are_skipped_without_loading_the_model(files):
    write(files[0], {"query": "a"}, {"id": 1, "query": "b"})
    answer(files)
    before = files[1].read_bytes()
    assert counts(answer(files, no_model)) == (0, 2, 0)
    assert files[1].read_bytes() == before


def test_an_output_cut_anywhere_is_completed_and_nothing_doubled(files):
    write(files[0], {"query": "a"}, "{", {"id": "北京", "query": "é", "history": [["1", "2"]]}, {"query": "c"})
    answer(files)
    whole, complete = texts(files[1]), files[1].read_bytes()
    for end in range(0, len(complete), 3):
        files[1].write_bytes(complete[:end])
        answered, before, failed = counts(answer(files))
        assert answered + before == 3 and failed == 1
        assert texts(files[1]) == whole


def test_an_answer_that_lacks_only_its_line_end_is_kept(files):
    write(files[0], {"query": "a"}, {"query": "b"})
    answer(files)
    files[1].write_bytes(files[1].read_bytes()[:-1])
    assert counts(answer(files)) == (0, 2, 0)


def test_edited_rows_are_answered_again(files):
    write(files[0], {"query": "a"}, {"id": 1, "query": "b"}, {"query": "c"})
    answer(files)
    write(files[0], {"query": "a"}, {"id": 1, "query": "B?"}, {"query": "c?"}, {"query": "c"})
    model = ScriptedModel()
    summary = answer(files, model)
    assert model.queries == ["B?", "c?", "c"]  # the last moved to another line, and has no id
    assert (counts(summary), summary["stale"]) == ((3, 1, 0), 2)


def test_rows_with_ids_may_change_places(files):
    write(files[0], {"id": "x", "query": "a"}, {"id": "y", "query": "b"})
    answer(files)
    write(files[0], {"id": "new", "query": "c"}, {"query": "b", "id": "y"}, {"id": "x", "query": "a"})
    model = ScriptedModel()
    assert counts(answer(files, model, ordered=True)) == (1, 2, 0)
    assert model.queries == ["c"]
    assert [record["id"] for record in records(files[1])] == ["new", "y", "x"]


def test_equal_rows_without_ids_are_all_answered(files):
    write(files[0], *[{"query": "a"}] * 5)
    assert counts(answer(files)) == (5, 0, 0)
    assert sorted(texts(files[1])) == [1, 2, 3, 4, 5]


def test_a_second_row_with_the_same_id_is_refused_again_and_again(files):
    write(files[0], {"id": "x", "query": "a"}, {"id": "x", "query": "b"}, {"id": "x", "query": "a"}, {"query": "c"})
    for expected in ((2, 0, 2), (0, 2, 2)):
        assert counts(answer(files, ordered=True)) == expected
        assert [record.get("text") for record in records(files[1])] == ["A", None, None, "C"]
        assert "line 1" in records(files[1])[1]["error"]["message"]


def test_failed_rows_are_tried_again(files):
    write(files[0], {"id": 1, "query": "a"}, {"id": 2, "query": "b"}, "{", "[")
    refusal = ChatError("query: too long")
    assert counts(answer(files, ScriptedModel({"a": refusal, "b": refusal}))) == (0, 0, 4)
    write(files[0], {"id": 1, "query": "a"}, {"id": 2, "query": "b"}, {"query": "corrected"}, "[")
    assert counts(answer(files, ScriptedModel({"b": refusal}))) == (2, 0, 2)
    assert texts(files[1]) == {1: "A", 2: "error", 3: "CORRECTED", 4: "error"}
    assert counts(answer(files)) == (1, 2, 1)
    assert texts(files[1]) == {1: "A", 2: "B", 3: "CORRECTED", 4: "error"}


@pytest.mark.parametrize("end", [KeyboardInterrupt(), ChatError("the engine has died", "engine_error")])
def test_what_is_done_is_kept_when_a_run_ends_early(files, end):
    write(files[0], *[{"query": f"q{i}"} for i in range(10)])
    with pytest.raises(type(end)):
        answer(files, ScriptedModel({"q6": end}))
    done = texts(files[1])
    assert 0 < len(done) < 10
    model = ScriptedModel()
    assert counts(answer(files, model)) == (10 - len(done), len(done), 0)
    assert len(texts(files[1])) == 10
    assert not {text.lower() for text in done.values()} & set(model.queries)


def test_memory_is_bounded_by_the_models_window(files):
    files[0].write_text("".join(f'{{"query": "q{i}"}}\n' for i in range(1000)))
    longest = 0

    class Watching(ScriptedModel):
        def stream_batch(self, rows, sampling, deltas):
            nonlocal longest
            for done, result in enumerate(super().stream_batch(rows, sampling, deltas)):
                longest = max(longest, len(self.requests) - done)
                yield result

    assert counts(answer(files, Watching(window=8))) == (1000, 0, 0)
    assert longest == 8


def test_ordered_keeps_answers_whose_row_has_gone(files):
    write(files[0], {"query": "old"}, *[{"query": f"q{i}"} for i in range(5)])
    answer(files)
    write(files[0], {"query": "new"}, *[{"query": f"q{i}"} for i in range(5)], "[")
    os.chmod(files[1], 0o640)
    assert answer(files, ordered=True)["stale"] == 1
    assert [record.get("text") for record in records(files[1])] == ["NEW", "Q0", "Q1", "Q2", "Q3", "Q4", None, "OLD"]
    assert files[1].stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in files[1].parent.iterdir()) == ["answers.jsonl", "rows.jsonl"]


def test_scores_count_the_answers_of_earlier_runs(files):
    write(files[0], {"query": "a", "answer": "A"}, {"query": "b", "answer": "no"}, {"query": "c"})
    first = answer(files, reference="answer")["scores"]
    assert (first["pairs"], first["exact_match"]) == (2, 0.5)
    again = answer(files, reference="answer")
    assert (counts(again), again["scores"]) == ((0, 3, 0), first)


def test_files_that_cannot_be_used(files, tmp_path):
    write(files[0], {"query": "a"})
    link, fifo = tmp_path / "link", tmp_path / "fifo"
    link.symlink_to(files[0])
    os.mkfifo(fifo)
    for source, target, reason in [
        (tmp_path / "none", files[1], "none: No such file"),
        (tmp_path, files[1], "Is a directory"),
        (files[0], link, "is the input too"),
        (files[0], tmp_path, "Is a directory"),
        (files[0], tmp_path / "none" / "answers", "none/answers: No such file"),
        (files[0], fifo, "is not a file"),
    ]:
        with pytest.raises(BatchError, match=reason):
            Batch(source, target)


@pytest.mark.parametrize(
    "content",
    [
        '{"query": "a"}\n',
        '{"id": 1, "query": "a"}',
        "notes",
        '{"id": 1, "line": 2}\n',
        '{"key": 5}\n',
        '{"error": "x"}\n',
    ],
)
def test_a_file_of_other_things_is_not_written_to(files, content):
    write(files[0], {"query": "a"})
    files[1].write_text(content)
    with pytest.raises(BatchError, match=r"line 1.*new file"):
        Batch(*files)
    assert files[1].read_text() == content


def run_apart(files: tuple[Path, Path], then: str, **kwargs) -> subprocess.Popen:
    """A run in a process of its own, which executes `then` after its third answer."""
    program = f"""
        import os, signal, sys, time
        from pathlib import Path
        from qwen_vllm.offline.batch import Batch
        from tests.support.scripted_model import ScriptedModel

        class Model(ScriptedModel):
            def stream_batch(self, *args, **kwargs):
                for done, result in enumerate(super().stream_batch(*args, **kwargs)):
                    if done == 3:
                        {then}
                    yield result

        try:
            Batch(Path(sys.argv[1]), Path(sys.argv[2])).run(Model)
        except Exception as error:
            sys.exit(str(error))
    """
    command = [sys.executable, "-c", textwrap.dedent(program), *map(str, files)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


def test_a_killed_run_is_completed(files):
    write(files[0], *[{"query": f"q{i}"} for i in range(10)])
    assert run_apart(files, "os.kill(os.getpid(), signal.SIGKILL)").wait(60) == -signal.SIGKILL
    assert len(texts(files[1])) == 3
    assert counts(answer(files)) == (7, 3, 0)
    assert len(texts(files[1])) == 10


def test_two_runs_do_not_write_the_same_file(files):
    write(files[0], *[{"query": f"q{i}"} for i in range(10)])
    with run_apart(files, "print('.', flush=True); sys.stdin.read()", stdin=subprocess.PIPE) as other:
        assert other.stdout.readline() == ".\n"
        with pytest.raises(BatchError, match="another run"):
            Batch(*files)
        other.stdin.close()
        assert other.wait(60) == 0
    assert counts(answer(files)) == (0, 10, 0)


def test_a_full_disk_is_said_and_what_is_done_is_kept(files):
    write(files[0], *[{"query": f"q{i}"} for i in range(10)])
    # Cuts the sixth line in its middle.
    full = run_apart(files, "pass", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1200, 1200)))
    _, errors = full.communicate(timeout=60)
    assert full.returncode == 1
    assert "File too large" in errors
    assert files[1].stat().st_size == 1200
    answered, before, failed = counts(answer(files))
    assert answered + before == 10 and before > 3 and not failed
    assert len(texts(files[1])) == 10


def test_rows_may_come_from_a_pipe(files):
    os.mkfifo(files[0])
    with subprocess.Popen([sys.executable, "-c", f"open({str(files[0])!r}, 'w').write('{{\"query\": \"a\"}}\\n' * 3)"]):
        assert counts(answer(files)) == (3, 0, 0)
