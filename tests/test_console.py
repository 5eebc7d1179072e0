"""The terminal: whole transcripts with a scripted `ask`."""

import argparse
import base64
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from qwen_vllm import console
from qwen_vllm.flags import add_arguments
from qwen_vllm.protocol import (
    DEFAULT_SYSTEM,
    AskedTurn,
    ChatError,
    ChatResult,
    Question,
    Reasoning,
    Sampling,
    ServerInfo,
    text_turns,
    turn,
)

INFO = ServerInfo(["base", "poet", "lawyer"], images=True, max_body_size=1000)
CTRL_C, CTRL_D, ALT_ENTER = "\x03", "\x04", "\x1b\r"
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


class ScriptedAsk:
    """Answers from scripts, one a question: strings are pieces, exceptions are raised; then comes the result.

    Records the questions with what came along, and how many answers were closed.
    """

    def __init__(
        self,
        *scripts: list,
        finish_reason: str = "stop",
        dropped: tuple[int, int] = (0, 0),
        keeps_reasoning: bool = False,
    ) -> None:
        self._scripts, self._finish_reason, self._dropped = list(scripts), finish_reason, dropped
        self._keeps_reasoning = keeps_reasoning
        self.calls: list[SimpleNamespace] = []
        self.closed = 0

    def __call__(
        self, query: Question, history: Sequence[AskedTurn], system: str, sampling: Sampling
    ) -> Iterator[str | ChatResult]:
        self.calls.append(
            SimpleNamespace(
                query=query.text,
                images=list(query.images),
                history=text_turns(history),
                history_images=[list(question.images) for question, *_ in history],
                system=system,
                sampling=sampling.sampling(),
            )
        )
        pieces = []
        try:
            for step in self._scripts.pop(0):
                if isinstance(step, BaseException):
                    raise step
                pieces.append(step)
                yield step
            text = "".join(piece for piece in pieces if isinstance(piece, str))
            thoughts = [piece.text for piece in pieces if isinstance(piece, Reasoning)]
            kept = "".join(thoughts) if self._keeps_reasoning else ""
            yield ChatResult(
                text=text,
                history=[*text_turns(history), turn(query.text, text, kept)],
                finish_reason=self._finish_reason,
                stop_reason=None,
                prompt_tokens=9,
                completion_tokens=len(pieces),
                dropped_turns=self._dropped[0],
                dropped_reasoning=self._dropped[1],
                reasoning="".join(thoughts),
                reasoning_tokens=len(thoughts),
            )
        finally:
            self.closed += 1


class Pipe(io.StringIO):
    def isatty(self) -> bool:
        return False


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def parsed(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(flags)


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs a chat whose questions come from a pipe."""

    def run(ask: ScriptedAsk, questions: str, *flags: str) -> int:
        monkeypatch.setattr("sys.stdin", Pipe(questions))
        return console.run(ask, "title", parsed(*flags), lambda: INFO)

    return run


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Runs a chat whose user types these lines in a terminal, and returns what is shown between them."""

    def run(ask: ScriptedAsk, *typed: str, keys: str = "", flags: Sequence[str] = (), info: ServerInfo = INFO) -> str:
        monkeypatch.setattr("sys.stdin", Terminal())
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)
        monkeypatch.setattr(console, "LINE_HISTORY", tmp_path / "state" / "lines")
        with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
            text = keys or "".join(f"{line}\r" for line in typed)
            pipe.send_bytes((text + CTRL_D).encode(errors="surrogateescape"))
            assert console.run(ask, "title", parsed(*flags), lambda: info) == 0
        shown = capsys.readouterr()
        return shown.out.split(f"Ctrl-D leaves.{PLAIN}\n", 1)[1] + shown.err

    return run


def pasted(text: str) -> str:
    return f"\x1b[200~{text}\x1b[201~"


def without_remarks(shown: str) -> str:
    return "".join(line for line in shown.splitlines(keepends=True) if not line.startswith(DIM))


def test_a_pipe_gets_answers_only(pipe: Callable, capsys: pytest.CaptureFixture) -> None:
    ask = ScriptedAsk(["Hel", "lo"], ["你好\n", "!"])
    assert pipe(ask, "one\n\n  two \n") == 0
    assert capsys.readouterr() == ("Hello\n你好\n!\n", "")
    assert [(call.query, call.history) for call in ask.calls] == [("one", []), ("two", [("one", "Hello")])]


THINKS = [Reasoning("Hm"), Reasoning(".\x1b[2J"), "Hel", "lo"]


def test_thoughts_are_dimmed_and_counted_and_not_kept(terminal: Callable) -> None:
    ask = ScriptedAsk(THINKS, ["b"])
    shown = terminal(ask, "one", "two")
    assert shown.startswith(f"{DIM}Hm{PLAIN}{DIM}.[2J{PLAIN}\n\nHello\n")
    assert "4 tokens, 2 of them thoughts" in shown
    assert "1 tokens" in shown and shown.count("thoughts") == 1
    assert ask.calls[1].history == [("one", "Hello")]


def test_thoughts_are_not_printed_on_a_pipe(pipe: Callable, capsys: pytest.CaptureFixture) -> None:
    assert pipe(ScriptedAsk(THINKS), "one\n") == 0
    assert capsys.readouterr() == ("Hello\n", "")


def test_a_thought_that_is_stopped_leaves_nothing(terminal: Callable) -> None:
    ask = ScriptedAsk([Reasoning("Hm"), KeyboardInterrupt()], ["b"])
    shown = terminal(ask, "one", "two")
    assert shown.startswith(f"{DIM}Hm{PLAIN}\n{DIM}stopped{PLAIN}\nb\n")
    assert ask.calls[1].history == []
    assert ask.closed == 2


def test_an_error_in_a_thought_has_a_line_of_its_own(terminal: Callable) -> None:
    shown = terminal(ScriptedAsk([Reasoning("Hm"), ChatError("the server is gone")]), "one")
    assert f"{DIM}Hm{PLAIN}\n" in shown
    assert "Error: the server is gone\n" in shown


def test_reasoning_that_the_model_reads_is_sent_along_also_when_answering_again(terminal: Callable) -> None:
    ask = ScriptedAsk(THINKS, THINKS, ["c"], keeps_reasoning=True)
    shown = terminal(ask, "one", "two", "/regen", "/history")
    assert ask.calls[1].history == ask.calls[2].history == [("one", "Hello", "Hm.\x1b[2J")]
    assert shown.endswith("> one\nHello\n> two\nc\n")


NO_ANSWER = "No answer: at the token limit the model was still reasoning. "
RAISE = "Raise max_tokens, or set a thinking_budget below it"


@pytest.mark.parametrize(
    ("efforts", "advice"),
    [
        ([], f"{RAISE}."),
        (["low", "xhigh"], f"{RAISE}, or choose a lower reasoning_effort (low, xhigh; in the chat /effort)."),
    ],
)
def test_an_answer_that_ends_in_its_reasoning_says_so(terminal: Callable, efforts: list[str], advice: str) -> None:
    ask = ScriptedAsk(THINKS[:2], ["b"], finish_reason="length")
    shown = terminal(ask, "one", "/regen", info=ServerInfo(["base"], reasoning_efforts=efforts))
    assert shown.endswith(f"\n{NO_ANSWER}{advice}\n")
    assert [call.query for call in ask.calls] == ["one", "one"]


def test_a_cut_answer_is_none_without_a_word(terminal: Callable) -> None:
    assert NO_ANSWER not in terminal(ScriptedAsk(THINKS, finish_reason="length"), "one")
    assert NO_ANSWER not in terminal(ScriptedAsk(THINKS[:2]), "one")


def test_a_pipe_is_told_on_stderr_that_there_is_no_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def info() -> ServerInfo:
        raise ChatError("no server answers")

    monkeypatch.setattr("sys.stdin", Pipe("one\n"))
    assert console.run(ScriptedAsk(THINKS[:2], finish_reason="length"), "title", parsed(), info) == 1
    assert capsys.readouterr() == ("\n", f"{NO_ANSWER}{RAISE}.\n")


def test_slash_lines_from_a_pipe_are_questions(pipe: Callable) -> None:
    ask = ScriptedAsk(["a"])
    pipe(ask, "/help me\n")
    assert ask.calls[0].query == "/help me"


def test_an_empty_pipe_is_no_failure(pipe: Callable, capsys: pytest.CaptureFixture) -> None:
    assert pipe(ScriptedAsk(), "\n") == 0
    assert capsys.readouterr() == ("", "")


def test_a_failed_question_from_a_pipe_is_told_and_left_out(pipe: Callable, capsys: pytest.CaptureFixture) -> None:
    ask = ScriptedAsk(["a"], ["part", ChatError("the server is busy")], ["c"])
    assert pipe(ask, "one\ntwo\nthree\n") == 1
    assert capsys.readouterr() == ("a\npart\nc\n", "Error: the server is busy\n")
    assert ask.calls[2].history == [("one", "a")]
    assert ask.closed == 3


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        ([], [0, 1, 2, 3, 4, 5, 4, 5]),
        (["--history-max", "2"], [0, 1, 2, 2, 2, 2, 2, 2]),
        (["--history-max", "0"], [0] * 8),
    ],
)
def test_history_max(pipe: Callable, flags: list[str], kept: list[int]) -> None:
    ask = ScriptedAsk(*[[f"answer {n}"] for n in range(8)])
    pipe(ask, "".join(f"question {n}\n" for n in range(8)), *flags)
    turns = [(f"question {n}", f"answer {n}") for n in range(8)]
    assert [call.history for call in ask.calls] == [turns[n - kept[n] : n] for n in range(8)]


def test_flags_reach_the_model(pipe: Callable) -> None:
    ask = ScriptedAsk(["a"])
    flags = [
        "--temperature",
        "0",
        "--top-p",
        "0.5",
        "--max-tokens",
        "9",
        "--seed",
        "7",
        "--model",
        "7",
        "--stop",
        "END",
        "--reasoning-effort",
        "low",
        "--thinking-budget",
        "8",
    ]
    pipe(ask, "q\n", *flags, "--stop", "1", "--no-enable-thinking", "--system", "Be brief.")
    assert ask.calls[0].system == "Be brief."
    assert ask.calls[0].sampling == {
        "temperature": 0,
        "top_p": 0.5,
        "max_tokens": 9,
        "seed": 7,
        "model": "7",
        "stop": ["END", "1"],
        "enable_thinking": False,
        "reasoning_effort": "low",
        "thinking_budget": 8,
    }


def test_without_flags_the_model_decides(pipe: Callable) -> None:
    ask = ScriptedAsk(["a"])
    pipe(ask, "q\n")
    assert (ask.calls[0].system, ask.calls[0].sampling) == (DEFAULT_SYSTEM, {})


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--temperature", "3"),
        ("--temperature", "hot"),
        ("--temperature", "NaN"),
        ("--top-p", "0"),
        ("--max-tokens", "1.5"),
        ("--max-tokens", "99999999999999999999999"),
        ("--seed", "9" * 5000),
        ("--stop", ""),
        ("--model", ""),
        ("--reasoning-effort", ""),
        ("--thinking-budget", "0"),
        ("--history-max", "-1"),
        ("--history-max", "many"),
        ("--history-max", "²"),
    ],
)
def test_a_wrong_flag_ends_with_status_2_and_its_name(
    pipe: Callable, capsys: pytest.CaptureFixture, flag: str, value: str
) -> None:
    ask = ScriptedAsk()
    try:
        status = pipe(ask, "q\n", flag, value)
    except SystemExit as end:
        status = end.code
    assert status == 2
    shown = capsys.readouterr()
    assert flag.removeprefix("--").replace("-", "_") in shown.err.replace("-", "_")
    assert (shown.out, ask.calls) == ("", [])


def test_a_conversation_in_a_terminal(terminal: Callable) -> None:
    ask = ScriptedAsk(["Hel", "lo"], ["Bye"])
    shown = terminal(ask, "one", "", "two", "/exit", "never")
    assert without_remarks(shown) == "Hello\nBye\n"
    assert [(call.query, call.history) for call in ask.calls] == [("one", []), ("two", [("one", "Hello")])]


def test_the_line_of_figures(terminal: Callable) -> None:
    shown = terminal(ScriptedAsk(["a", "b", "c"], finish_reason="length", dropped=(2, 3)), "one")
    remark = next(line for line in shown.splitlines() if line.startswith(DIM))
    for figure in ("first token ", "tokens/s", "3 tokens", "cut at the token limit", "· 2 old turns left out"):
        assert figure in remark
    assert "· reasoning of 3 old turns left out" in remark


def test_keys(terminal: Callable) -> None:
    ask = ScriptedAsk(["a"], ["b"], ["c"])
    paste = pasted("three\nfour")
    terminal(ask, keys=f"one{ALT_ENTER}two\r{paste}\rdropped{CTRL_C}five\r{CTRL_D}")
    assert [call.query for call in ask.calls] == ["one\ntwo", "three\nfour", "five"]


def test_lines_are_remembered(terminal: Callable) -> None:
    terminal(ScriptedAsk(["a"]), "one")
    ask = ScriptedAsk(["b"])
    terminal(ask, keys=f"\x1b[A\r{CTRL_D}")
    assert ask.calls[0].query == "one"


def test_a_failed_turn_changes_nothing(terminal: Callable) -> None:
    ask = ScriptedAsk(["a"], [ChatError("no server answers")], ["par", "t", ChatError("broke off")], ["d"])
    shown = terminal(ask, "one", "two", "three", "four", "/history")
    assert "Error: no server answers\n" in shown
    assert "Error: broke off\n" in shown
    assert ask.calls[3].history == [("one", "a")]
    assert "> one\na\n> four\nd\n" in shown


def test_ctrl_c_keeps_what_has_arrived(terminal: Callable) -> None:
    ask = ScriptedAsk(["par", "t", KeyboardInterrupt()], ["b"])
    shown = terminal(ask, "one", "two")
    assert f"part\n{DIM}stopped{PLAIN}\n" in shown
    assert ask.calls[1].history == [("one", "part")]
    assert ask.closed == 2


def test_ctrl_c_keeps_the_piece_that_was_just_shown(terminal: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*values: str, **options: object) -> None:
        print(*values, **options)
        if values == ("t",):
            raise KeyboardInterrupt

    monkeypatch.setattr(console, "print", interrupted, raising=False)
    ask = ScriptedAsk(["par", "t"], ["b"])
    terminal(ask, "one", "two")
    assert ask.calls[1].history == [("one", "part")]


def test_ctrl_c_before_the_first_token_keeps_nothing(terminal: Callable) -> None:
    ask = ScriptedAsk([KeyboardInterrupt()], ["b"])
    terminal(ask, "one", "two")
    assert ask.calls[1].history == []


def test_a_busy_server_is_asked_again_until_it_has_room(terminal: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []
    monkeypatch.setattr("qwen_vllm.console.time.sleep", waited.append)
    busy = ChatError("the server is busy", "overloaded", status=503, retry_after=1)
    ask = ScriptedAsk([busy], [busy], [busy], ["a"], ["b"])
    shown = terminal(ask, "one", "two")
    assert re.findall(r"the server is busy; retrying in (\d+) s\n", shown) == [f"{s:.0f}" for s in waited]
    assert 1 <= waited[0] < 2 <= waited[1] < 4 <= waited[2] <= 5
    assert [call.query for call in ask.calls] == ["one"] * 4 + ["two"]
    assert ask.calls[4].history == [("one", "a")]


def test_a_server_that_stays_busy_is_given_up(terminal: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []
    monkeypatch.setattr("qwen_vllm.console.time.sleep", waited.append)
    busy = ChatError("the server is busy", "overloaded", status=503, retry_after=1)
    shown = terminal(ScriptedAsk(*[[busy]] * 7), "one", "/history")
    assert "Error: the server is busy\n" in shown
    assert 40 < sum(waited) < 70
    assert "> one" not in shown


def test_ctrl_c_ends_the_waiting_for_a_busy_server(terminal: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qwen_vllm.console.time.sleep", interrupted)
    ask = ScriptedAsk([ChatError("busy", "overloaded", status=503, retry_after=1)], ["b"])
    terminal(ask, "one", "two")
    assert [(call.query, call.history) for call in ask.calls] == [("one", []), ("two", [])]


STEERING = "\x1b[2J\x1b]0;title\x07a\x08b\rc\x7fd\x9b31me\x00"


def test_control_characters_do_not_reach_a_terminal(terminal: Callable) -> None:
    shown = terminal(ScriptedAsk([*STEERING]), "one", "/history")
    assert without_remarks(shown) == "[2J]0;titleabcd31me\n> one\n[2J]0;titleabcd31me\n"


def test_an_error_does_not_steer_a_terminal(terminal: Callable) -> None:
    shown = terminal(ScriptedAsk([ChatError(STEERING)]), "one")
    assert not set("\x1b\x07\x08\r\x7f\x9b\x00") & set(shown)


@pytest.mark.parametrize("text", ["tab\tand\nnewline", "👩‍👩‍👧‍👦 🏳️‍🌈", "नमस्ते", "\u3000全角\u00a0", "e\u0301"])
def test_text_reaches_a_terminal_as_it_is(terminal: Callable, text: str) -> None:
    assert without_remarks(terminal(ScriptedAsk([*text]), "one")) == f"{text}\n"


def test_a_pipe_gets_the_answer_as_it_is(pipe: Callable, capsys: pytest.CaptureFixture) -> None:
    pipe(ScriptedAsk(["\x1b[1ma\x00"]), "one\n")
    assert capsys.readouterr().out == "\x1b[1ma\x00\n"


def test_help_names_every_command(terminal: Callable) -> None:
    shown = terminal(ScriptedAsk(), "/help")
    for name in ("clear", "system", "history", "set", "model", "effort", "image", "regen", "save", "load", "exit"):
        assert f"/{name}" in shown


@pytest.mark.parametrize("line", ["/unknown", "/", "/help2", "/CLEAR"])
def test_an_unknown_command(terminal: Callable, line: str) -> None:
    ask = ScriptedAsk()
    assert terminal(ask, line) == f"There is no command {line}; /help lists them.\n"
    assert ask.calls == []


QUESTIONS = [
    *("/no_think What is 2 + 2?", "/home/me/notes.txt", "/home/me/my notes.txt is what?", "// comment", "//", "/ 2"),
    *("/load balancing: explain", "/save the whales", "/image of a cat?", "/help me", "/clear and simple?"),
    *("/history of China", "/exit code 1 means?", "/regen erate", "/model trains are fun", "/effort is all?"),
    *("/load ~nosuchuser of us", f"/save {'as many words as no name of a file has ' * 8}".strip()),
    pasted("/help\nme"),
]


@pytest.mark.parametrize("line", QUESTIONS)
def test_what_only_begins_like_a_command_is_a_question(terminal: Callable, line: str) -> None:
    ask = ScriptedAsk(["a"])
    assert without_remarks(terminal(ask, line)) == "a\n"
    assert [call.query for call in ask.calls] == [line.removeprefix("\x1b[200~").removesuffix("\x1b[201~")]


@pytest.mark.parametrize("line", ["/load my chat.json", "/image my cat.png", "/image ~nosuchuser", "/set theory"])
def test_a_mistyped_command_is_told(terminal: Callable, line: str) -> None:
    ask = ScriptedAsk()
    assert terminal(ask, line)
    assert ask.calls == []


@pytest.mark.parametrize("keys", [b"gbk \xc4\xe3", b"/system \xc4\xe3", b"\x1b[200~\xff\xfe\x1b[201~"])
def test_a_line_that_is_not_utf8_is_told_and_the_chat_goes_on(terminal: Callable, keys: bytes) -> None:
    ask = ScriptedAsk(["a"])
    shown = terminal(ask, keys=keys.decode(errors="surrogateescape") + "\rone\r")
    assert "Error: the question is not UTF-8: convert it first\n" in shown
    assert [call.query for call in ask.calls] == ["one"]


def test_a_pipe_that_is_not_utf8_is_told_line_by_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    ask = ScriptedAsk(["a"])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xc4\xe3\n\xe4\xbd\xa0\n"), encoding="utf-8"))
    assert console.run(ask, "title", parsed(), lambda: INFO) == 1
    assert capsys.readouterr() == ("a\n", "Error: the question is not UTF-8: convert it first\n")
    assert [call.query for call in ask.calls] == ["你"]


def test_a_chat_goes_on_where_its_lines_cannot_be_kept(terminal: Callable, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("no folder")
    ask = ScriptedAsk(["a"], ["b"])
    terminal(ask, "one", "two")
    assert [call.query for call in ask.calls] == ["one", "two"]


def test_system(terminal: Callable) -> None:
    ask = ScriptedAsk(["a"])
    shown = terminal(ask, "/system", "/system  Be brief, please. ", "one")
    assert shown.startswith(f"{DEFAULT_SYSTEM}\nBe brief, please.\na\n")
    assert ask.calls[0].system == "Be brief, please."


def test_clear(terminal: Callable) -> None:
    ask = ScriptedAsk(["a"], ["b"])
    terminal(ask, "one", "/clear", "two")
    assert ask.calls[1].history == []


def test_set(terminal: Callable) -> None:
    ask = ScriptedAsk(["a"], ["b"])
    shown = terminal(ask, "/set temperature 0.5", "/set stop END", "/set seed 7", "one", "/set seed", "/set", "two")
    assert ask.calls[0].sampling == {"temperature": 0.5, "stop": ["END"], "seed": 7}
    assert ask.calls[1].sampling == {"temperature": 0.5, "stop": ["END"]}
    assert shown.startswith("temperature = 0.5\n")


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("stop 42", ["42"]),
        ("stop null", ["null"]),
        ("stop true", ["true"]),
        ("stop 1e3", ["1e3"]),
        ("stop {}", ["{}"]),
        ('stop ["a", "b"]', ["a", "b"]),
        ("stop the end", ["the end"]),
        ('stop "\\n"', ["\n"]),
    ],
)
def test_set_stop(terminal: Callable, typed: str, value: list[str]) -> None:
    ask = ScriptedAsk(["a"])
    terminal(ask, f"/set {typed}", "one")
    assert ask.calls[0].sampling == {"stop": value}


@pytest.mark.parametrize(
    ("typed", "named"),
    [
        ("temperature 3", "temperature"),
        ("temperature hot", "temperature"),
        ("seed 0.5", "seed"),
        ("seed " + pasted("9" * 5000), "seed"),
        ("temprature 1", "temprature"),
        ("temprature", "temprature"),
        ("enable_thinking maybe", "enable_thinking"),
    ],
)
def test_a_wrong_setting_is_told_and_not_made(terminal: Callable, typed: str, named: str) -> None:
    ask = ScriptedAsk(["a"])
    shown = terminal(ask, "/set top_k 5", f"/set {typed}", "one")
    assert named in shown.splitlines()[1]
    assert ask.calls[0].sampling == {"top_k": 5}


def test_regen_answers_the_last_question_again(terminal: Callable) -> None:
    ask = ScriptedAsk(["a"], ["b"], ["c"])
    shown = terminal(ask, "one", "two", "/regen", "/history")
    assert (ask.calls[2].query, ask.calls[2].history) == ("two", [("one", "a")])
    assert shown.endswith("> one\na\n> two\nc\n")


@pytest.mark.parametrize("failure", [ChatError("busy"), KeyboardInterrupt()])
@pytest.mark.parametrize("earlier", [0, 1])
def test_a_regen_that_fails_keeps_the_old_answer(terminal: Callable, failure: BaseException, earlier: int) -> None:
    questions = ["zero", "one"][1 - earlier :]
    ask = ScriptedAsk(*[[f"answer {question}"] for question in questions], [failure])
    shown = terminal(ask, *questions, "/regen", "/history")
    assert "".join(f"> {question}\nanswer {question}\n" for question in questions) in shown


def test_regen_needs_a_question(terminal: Callable) -> None:
    assert terminal(ScriptedAsk(), "/regen") == "There is nothing to answer again.\n"


def test_a_saved_conversation_goes_on(terminal: Callable, tmp_path: Path) -> None:
    file = tmp_path / "with space.json"
    terminal(ScriptedAsk(["a\n你好"]), "/system Be brief.", "one", f"/save {file}")
    ask = ScriptedAsk(["b"])
    shown = terminal(ask, f"/load {file}", "two")
    assert shown.startswith("1 turns\n")
    assert (ask.calls[0].system, ask.calls[0].history) == ("Be brief.", [("one", "a\n你好")])
    assert json.loads(file.read_text(encoding="utf-8"))["history"] == [["one", "a\n你好"]]


def test_no_reader_of_lines_breaks_a_saved_conversation(terminal: Callable, tmp_path: Path) -> None:
    file, text = tmp_path / "chat.json", "a\u2028b\u2029c\x85d 你好"
    terminal(ScriptedAsk([text]), "one", f"/save {file}")
    saved = file.read_text()
    assert saved.splitlines() == saved[:-1].split("\n")
    assert json.loads(saved)["history"] == [["one", text]]
    assert "你好" in saved


def test_a_saved_conversation_keeps_its_reasoning(terminal: Callable, tmp_path: Path) -> None:
    file, turns = tmp_path / "chat.json", [("one", "Hello", "Hm.\x1b[2J"), ("two", "b")]
    terminal(ScriptedAsk(THINKS, ["b"], keeps_reasoning=True), "one", "two", f"/save {file}")
    assert json.loads(file.read_text(encoding="utf-8"))["history"] == [list(turn) for turn in turns]
    ask = ScriptedAsk(["c"])
    terminal(ask, f"/load {file}", "three")
    assert ask.calls[0].history == turns


def test_model_shows_and_chooses(terminal: Callable) -> None:
    ask = ScriptedAsk(["a"], ["b"])
    shown = terminal(ask, "/model", "/model poet", "one", "/model writer", "/model base", "two")
    assert shown.startswith("* base\n  poet\n  lawyer\n  base\n* poet\n  lawyer\na\n")
    assert "There is no model writer, only base, poet, lawyer.\n" in shown
    assert [call.sampling for call in ask.calls] == [{"model": "poet"}, {}]


def test_effort_shows_and_chooses(terminal: Callable) -> None:
    info = ServerInfo(["base"], reasoning_efforts=["low", "xhigh"])
    ask = ScriptedAsk(["a"], ["b"])
    shown = terminal(ask, "/effort", "/effort low", "one", "/effort high", "/effort default", "two", info=info)
    assert shown.startswith("* default\n  low\n  xhigh\n  default\n* low\n  xhigh\na\n")
    assert "There is no effort high, only default, low, xhigh.\n* default\n" in without_remarks(shown)
    assert [call.sampling for call in ask.calls] == [{"reasoning_effort": "low"}, {}]


@pytest.mark.parametrize("typed", ["/effort", "/effort low"])
def test_a_model_without_levels_of_effort_says_so(terminal: Callable, typed: str) -> None:
    ask = ScriptedAsk(["a"])
    assert terminal(ask, typed, "one").startswith("base has no levels of reasoning effort.\n")
    assert ask.calls[0].sampling == {}


PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)
PNG_URL = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with files in it."""
    files = {"a.png": PNG, "my b.jpg": b"\xff\xd8\xff", "c": b"RIFF\n\r\xffeWEBP", "d.gif": b"GIF89a"}
    for name, data in files.items() | {"note.png": b"text", "large.png": PNG * 7}.items():
        (tmp_path / name).write_bytes(data)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_images_go_along_with_the_next_question_and_with_later_ones_as_its_history(
    terminal: Callable, pictures: Path
) -> None:
    ask = ScriptedAsk(["a"], ["b"], ["c"])
    typed = ["/image", "/image a.png", "/image my b.jpg", "/image", "one", "/image", "two", "/regen", "/history"]
    shown = terminal(ask, *typed)
    nothing, attached = "No image is attached.\n", "a.png\na.png\nmy b.jpg\na.png\nmy b.jpg\n"
    assert without_remarks(shown) == f"{nothing}{attached}a\n{nothing}b\nc\n> [images: 2] one\na\n> two\nc\n"
    first, second, again = ask.calls
    assert first.images == [PNG_URL, "data:image/jpeg;base64,/9j/"]
    assert second.images == again.images == []
    assert second.history_images == again.history_images == [first.images]


def test_images_are_kept_where_a_question_fails_and_forgotten_by_clear(terminal: Callable, pictures: Path) -> None:
    ask = ScriptedAsk([ChatError("busy")], ["b"], ["c"], ["d"])
    terminal(ask, "/image c", "/image d.gif", "one", "two", "/regen", "/image a.png", "/clear", "three")
    kinds = [[url.partition(";")[0] for url in call.images] for call in ask.calls]
    assert kinds == [["data:image/webp", "data:image/gif"]] * 3 + [[]]


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("/image note.png", "note.png is no PNG, JPEG, WebP or GIF image."),
        ("/image missing.png", "/image missing.png: No such file or directory"),
        ("/image .", "/image .: Is a directory"),
        ("/image large.png", "large.png: the images of this conversation would take 1030 bytes in a request, "),
    ],
)
def test_a_file_that_cannot_be_attached(terminal: Callable, pictures: Path, typed: str, told: str) -> None:
    ask = ScriptedAsk(["a"])
    assert terminal(ask, typed, "one").startswith(told)
    assert ask.calls[0].images == []


def test_images_of_earlier_turns_count_too(terminal: Callable, pictures: Path) -> None:
    typed = [line for n in range(7) for line in ("/image a.png", f"question {n}")]
    ask = ScriptedAsk(*[["a"]] * 8)
    shown = terminal(ask, *typed, "/image", flags=["--history-max", "9"])
    size = 7 * len(PNG_URL)
    assert f"would take {size} bytes in a request, and this server's are at most 1000" in shown
    assert [len(call.images) for call in ask.calls] == [1, 1, 1, 1, 1, 1, 0]


def test_answering_again_leaves_what_is_attached_for_the_next_question(terminal: Callable, pictures: Path) -> None:
    ask = ScriptedAsk(["a"], ["b"], ["c"])
    terminal(ask, "one", "/image a.png", "/regen", "two")
    assert [call.images for call in ask.calls] == [[], [], [PNG_URL]]


def test_a_model_without_images_says_so_before_anything_is_sent(terminal: Callable, pictures: Path) -> None:
    ask = ScriptedAsk()
    assert terminal(ask, "/image a.png", info=ServerInfo(["base"])) == "base takes no images.\n"


def test_a_saved_conversation_keeps_its_images(terminal: Callable, pictures: Path) -> None:
    terminal(ScriptedAsk(["a"], ["b"]), "/image a.png", "one", "two", "/save chat.json")
    ask = ScriptedAsk(["c"])
    assert terminal(ask, "/load chat.json", "three").startswith("2 turns\n")
    assert ask.calls[0].history == [("one", "a"), ("two", "b")]
    assert ask.calls[0].history_images == [[PNG_URL], []]
    ask = ScriptedAsk(["c"])
    shown = terminal(ask, "/load chat.json", "three", info=ServerInfo(["base"]))
    assert shown.startswith("Its images are left out: base takes none.\n2 turns\n")
    assert ask.calls[0].history == [("one", "a"), ("two", "b")]
    assert ask.calls[0].history_images == [[], []]


BAD_FILES = [
    "",
    "{",
    "[]",
    '"x"',
    "null",
    '{"history": [["a"]]}',
    '{"history": [["a", "b", 1]]}',
    '{"history": "x"}',
    '{"system": 1}',
    '{"images": [["file:///"]]}',
    '{"history": [["a", "b"]], "images": [[], []]}',
    "[" * 100_000,
]


@pytest.mark.parametrize("content", [*map(str.encode, BAD_FILES), b"\xff\xfe"])
def test_a_file_that_holds_no_conversation(terminal: Callable, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "bad.json"
    file.write_bytes(content)
    ask = ScriptedAsk(["a"], ["b"])
    shown = terminal(ask, "one", f"/load {file}", "two")
    assert f"{file}" in shown or "history" in shown or "system" in shown
    assert ask.calls[1].history == [("one", "a")]


@pytest.mark.parametrize("command", ["/save", "/load"])
@pytest.mark.parametrize("path", ["", "missing/folder/file", "."])
def test_a_file_that_cannot_be_used(
    terminal: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    ask = ScriptedAsk(["a"], ["b"])
    shown = terminal(ask, "one", f"{command} {path}", "two")
    assert command in without_remarks(shown).splitlines()[1]
    assert ask.calls[1].history == [("one", "a")]
