"""The client against a local HTTP server that plays scripted bodies."""

import asyncio
import re
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest

from qwen_vllm.protocol import Question
from tests.support import ROOT
from tests.support.programs import ENVIRONMENT
from tests.support.scripted_server import LAST, Server, line, scripted
from tests.support.switch import switch
from vllm_client import (
    ChatError,
    ChatResult,
    Reasoning,
    Sampling,
    ServerInfo,
    main,
    openai_messages,
    server_info,
    server_info_async,
    stream_chat,
    stream_chat_async,
    stream_messages,
    stream_messages_async,
    stream_question_async,
)


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


Ask = Callable[..., list[str | ChatResult]]


async def all_parts(parts: AsyncIterator[str | ChatResult]) -> list[str | ChatResult]:
    return [part async for part in parts]


@pytest.fixture(params=["requests", "asyncio"])
def ask(request: pytest.FixtureRequest) -> Ask:
    """Asks with `stream_chat` or with its twin on asyncio, and returns all parts."""
    if request.param == "requests":
        return lambda *args, **options: list(stream_chat(*args, **options))
    return lambda *args, **options: asyncio.run(all_parts(stream_chat_async(*args, **options)))


def failure(ask: Ask, url: str, **options: Any) -> ChatError:
    with pytest.raises(ChatError) as caught:
        ask(url, "q", **options)
    assert "\n" not in caught.value.message
    return caught.value


def test_an_answer(ask: Ask, server: Server) -> None:
    url = server.play(line({"delta": "Hel"}), line({"delta": "lo"}), line(LAST))
    history = [("a", "b")]
    *pieces, result = ask(url, "q", history)
    assert pieces == ["Hel", "lo"]
    assert result == ChatResult("Hello", [("a", "b"), ("q", "Hello")], "stop", "END", 20, 3, 1)
    assert history == [("a", "b")]


def test_thoughts_are_no_strings(ask: Ask, server: Server) -> None:
    last = {**LAST, "usage": {**LAST["usage"], "reasoning_tokens": 2}}
    url = server.play(line({"reasoning": "H"}), line({"reasoning": "m"}), line({"delta": "Hello"}), line(last))
    *parts, result = ask(url, "q")
    assert parts == [Reasoning("H"), Reasoning("m"), "Hello"]
    assert [part for part in parts if isinstance(part, str)] == ["Hello"]
    assert result == ChatResult("Hello", [("q", "Hello")], "stop", "END", 20, 3, 1, "Hm", 2)
    assert result.usage == last["usage"]


def test_an_empty_answer(ask: Ask, server: Server) -> None:
    (result,) = ask(server.play(line(LAST)), "q")
    assert (result.text, result.history) == ("", [("q", "")])


def test_what_is_sent(ask: Ask, server: Server) -> None:
    url = server.play(line(LAST))
    sampling = Sampling(temperature=0.5, stop=["END"], enable_thinking=False)
    ask(url, "你好", [("a", "b")], "s", sampling, api_key="key")
    path, headers, body = server.requests[0]
    expected = {"query": "你好", "history": [["a", "b"]], "system": "s", "stream": True}
    expected |= {"temperature": 0.5, "stop": ["END"], "enable_thinking": False}
    assert (path, body) == ("/chat", expected)
    headers = {name.lower(): value for name, value in headers.items()}
    assert headers["content-type"] == "application/json"
    assert headers["authorization"] == "Bearer key"


def test_who_waits_is_told_the_place_or_how_much_is_read(ask: Ask, server: Server) -> None:
    signs = [line({"waiting": 3, "prompt_tokens": 7600}), line({"waiting": 0, "prompt_tokens": 7600})]
    url, told = server.play(*signs, line({"delta": "Hi"}), line(LAST)), []
    *pieces, result = ask(url, "q", on_waiting=lambda place, tokens: told.append((place, tokens)))
    assert told == [(3, 7600), (0, 7600)] and pieces == ["Hi"] and result.text == "Hi"
    assert server.requests[0][2]["keep_alive"]


def test_without_a_key_none_is_sent(ask: Ask, server: Server) -> None:
    ask(server.play(line(LAST)), "q")
    assert "authorization" not in {name.lower() for name in server.requests[0][1]}


def test_pieces_come_while_the_answer_goes_on(server: Server) -> None:
    seen = threading.Event()
    pieces = stream_chat(server.play(line({"delta": "Hel"}), seen, line({"delta": "lo"}), line(LAST)), "q")
    assert next(pieces) == "Hel"
    seen.set()
    assert next(pieces) == "lo"
    assert next(pieces).text == "Hello"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 1000])
def test_chunks_may_be_cut_anywhere(ask: Ask, server: Server, size: int) -> None:
    body = line({"delta": "你好"}) + line({"delta": "👩‍👩‍👧‍👦\u2028\r"}) + line(LAST)
    url = server.play(*[body[start : start + size] for start in range(0, len(body), size)])
    *pieces, result = ask(url, "q")
    assert pieces == ["你好", "👩‍👩‍👧‍👦\u2028\r"]
    assert result.text == "".join(pieces)


def test_an_error_line_is_raised(server: Server) -> None:
    error = {"error": {"type": "engine_error", "message": "the engine has died", "param": None}}
    pieces = stream_chat(server.play(line({"delta": "Hel"}), line(error)), "q")
    assert next(pieces) == "Hel"
    with pytest.raises(ChatError, match="the engine has died") as caught:
        next(pieces)
    assert caught.value.type == "engine_error"


CUT = {
    "no last line": [line({"delta": "Hel"})],
    "nothing": [],
    "half a line": [line({"delta": "Hel"}), b'{"finish_reason": "st'],
    "connection lost": [line({"delta": "Hel"}), None],
    "connection lost in a character": [line({"delta": "Hel"}), '{"delta": "你'.encode()[:-1], None],
}


@pytest.mark.parametrize("script", CUT.values(), ids=CUT.keys())
def test_an_answer_that_breaks_off_is_incomplete(ask: Ask, server: Server, script: list) -> None:
    assert failure(ask, server.play(*script)).type == "incomplete"


def test_a_connection_lost_before_the_headers_is_incomplete(ask: Ask, server: Server) -> None:
    error = failure(ask, server.play(None, status=0))
    assert (error.type, error.message) == ("incomplete", "the server broke the answer off")


@pytest.mark.parametrize("script", [[...], [line({"delta": "Hel"}), ...]])
def test_a_server_that_falls_silent_is_given_up(ask: Ask, server: Server, script: list) -> None:
    error = failure(ask, server.play(*script), timeout=(5, 0.2))
    assert error.type == "incomplete"
    assert "sent nothing" in error.message


def test_no_server(ask: Ask) -> None:
    url = f"http://127.0.0.1:{closed_port()}"
    error = failure(ask, url)
    assert error.type == "unreachable"
    assert error.message == f"no server answers at {url}: is it running? (make serve)"


def test_a_server_without_tls_is_not_asked_over_https(ask: Ask, server: Server) -> None:
    assert failure(ask, server.url.replace("http:", "https:")).type == "unreachable"


@pytest.mark.parametrize(
    "url", ["http://no-such-host.invalid:1", "127.0.0.1:8000", "http://", "http://[::1", "ftp://x"]
)
def test_a_wrong_address(ask: Ask, url: str) -> None:
    assert failure(ask, url).type == "unreachable"


REFUSALS = {
    "ours": (
        400,
        line({"error": {"type": "invalid_request", "message": "query: blank", "param": "query"}}),
        "query: blank",
    ),
    "overloaded": (503, line({"error": {"type": "overloaded", "message": "busy", "param": None}}), "busy"),
    "vLLM's": (401, line({"error": "Unauthorized"}), "Unauthorized (HTTP 401)"),
    "FastAPI's": (404, line({"detail": "Not Found"}), "(HTTP 404)"),
    "a list": (500, b"[]", "(HTTP 500)"),
    "a proxy's": (502, b"<html>\n<h1>Bad Gateway</h1></html>", "(HTTP 502)"),
    "empty": (500, b"", "(HTTP 500)"),
    "an error without fields": (500, line({"error": {}}), "(HTTP 500)"),
}


@pytest.mark.parametrize(("status", "body", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_a_refusal_is_one_readable_line(ask: Ask, server: Server, status: int, body: bytes, message: str) -> None:
    error = failure(ask, server.play(*[body] if body else [], status=status))
    assert message in error.message
    assert error.status == status
    assert "<html>" not in error.message


def test_a_refusal_keeps_its_type_and_field(ask: Ask, server: Server) -> None:
    error = failure(ask, server.play(REFUSALS["ours"][1], status=400))
    assert (error.type, error.param) == ("invalid_request", "query")


@pytest.mark.parametrize(
    ("status", "header", "retry_after"),
    [(503, "7", 7), (503, None, None), (503, "Fri, 21 Nov", None), (500, "7", None)],
)
@pytest.mark.parametrize("body", [REFUSALS["overloaded"][1], b"<html>a proxy's</html>"])
def test_a_busy_server_says_when_to_ask_again(
    ask: Ask, server: Server, status: int, header: str | None, retry_after: int | None, body: bytes
) -> None:
    server.headers = {"Retry-After": header} if header else {}
    assert failure(ask, server.play(body, status=status)).retry_after == retry_after


@pytest.mark.parametrize("body", [b"<html>\n<h1>It works!</h1>\n</html>\n", b"[]\n", b'"x"\n', b'{"status": "ok"}\n'])
def test_another_server_at_the_address_is_an_error(ask: Ask, server: Server, body: bytes) -> None:
    assert failure(ask, server.play(body)).message


def test_closing_the_generator_closes_the_connection(server: Server) -> None:
    pieces = stream_chat(server.play(line({"delta": "Hel"}), ...), "q")
    next(pieces)
    pieces.close()
    server.server_close()  # waits for the handler
    assert server.left == [True]


def test_cancelling_the_reader_closes_the_connection_at_once(server: Server) -> None:
    url = server.play(line({"delta": "Hel"}), ...)

    async def read() -> None:
        first = asyncio.Event()

        async def reader() -> None:
            async for _ in stream_chat_async(url, "q"):
                first.set()

        reading = asyncio.create_task(reader())
        await first.wait()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading

    asyncio.run(read())
    server.server_close()  # waits for the handler
    assert server.left == [True]


EVENTS = [
    {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]},
    {"choices": [{"delta": {"content": "你"}, "finish_reason": None}]},
    {"choices": [{"delta": {"content": "好"}, "finish_reason": "stop", "stop_reason": "END"}]},
    {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2}},
]


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_conversation_with_images_goes_to_the_openai_route(server: Server, size: int) -> None:
    body = b"".join(b": keep-alive\n\ndata: " + line(event) + b"\n" for event in EVENTS) + b"data: [DONE]\n\n"
    chunks = [body[start : start + size] for start in range(0, len(body), size)]
    url = server.play(*chunks, path="/v1/chat/completions")
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}]}]
    sampling = Sampling(top_k=3, enable_thinking=False)
    for *pieces, result in (
        asyncio.run(all_parts(stream_messages_async(url, messages, sampling, "key"))),
        list(stream_messages(url, messages, sampling, "key")),
    ):
        assert pieces == ["你", "好"]
        assert result == ChatResult("你好", [], "stop", "END", 9, 2, 0)
    expected = {"messages": messages, "stream": True, "stream_options": {"include_usage": True}, "top_k": 3}
    expected |= {"chat_template_kwargs": {"enable_thinking": False}}
    assert [body for _, _, body in server.requests] == [expected, expected]


def test_questions_with_images_in_openais_form() -> None:
    first, now = Question("What?", ("data:image/png;base64,AA", "data:image/gif;base64,BB")), Question("And?")
    assert openai_messages(now, [(first, "A cat.", "Fur.")], "Be brief.") == [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}},
                {"type": "image_url", "image_url": {"url": "data:image/gif;base64,BB"}},
                {"type": "text", "text": "What?"},
            ],
        },
        {"role": "assistant", "content": "A cat.", "reasoning": "Fur."},
        {"role": "user", "content": [{"type": "text", "text": "And?"}]},
    ]


def test_thoughts_of_the_openai_route(server: Server) -> None:
    events = [
        EVENTS[0],
        {"choices": [{"delta": {"reasoning": "Hm\n"}, "finish_reason": None}]},
        {"choices": [{"delta": {"reasoning": None, "content": "Hi"}, "finish_reason": "stop", "stop_reason": None}]},
        {**EVENTS[3], "usage": {**EVENTS[3]["usage"], "completion_tokens_details": {"reasoning_tokens": 1}}},
    ]
    url = server.play(*(b"data: " + line(event) + b"\n" for event in events), path="/v1/chat/completions")
    *parts, result = asyncio.run(all_parts(stream_messages_async(url, [])))
    assert parts == [Reasoning("Hm\n"), "Hi"]
    assert (result.text, result.reasoning, result.reasoning_tokens) == ("Hi", "Hm\n", 1)


def test_calls_of_tools_are_handed_on(server: Server) -> None:
    parts = [
        {"index": 0, "id": "a", "type": "function", "function": {"name": "now", "arguments": ""}},
        {"index": 1, "id": "b", "type": "function", "function": {"name": "weather", "arguments": '{"city": '}},
        {"index": 1, "function": {"arguments": '"北京"}'}},
    ]
    deltas = [{"role": "assistant", "content": ""}, *({"tool_calls": [part]} for part in parts), {}]
    events = [{"choices": [{"delta": delta, "finish_reason": "tool_calls"}]} for delta in deltas]
    url = server.play(*(b"data: " + line(event) + b"\n" for event in [*events, EVENTS[3]]), path="/v1/chat/completions")
    tools = [{"type": "function", "function": {"name": "now"}}]
    (result,) = stream_messages(url, [], tools=tools, tool_choice="auto")
    assert result.tool_calls == [
        {"type": "function", "id": "a", "function": {"name": "now", "arguments": ""}},
        {"type": "function", "id": "b", "function": {"name": "weather", "arguments": '{"city": "北京"}'}},
    ]
    assert result.finish_reason == "tool_calls"
    assert asyncio.run(all_parts(stream_messages_async(url, [], tools=tools))) == [result]
    assert [(body["tools"], body.get("tool_choice")) for _, _, body in server.requests] == [
        (tools, "auto"),
        (tools, None),
    ]


def test_an_error_of_the_openai_route_is_raised(server: Server) -> None:
    event = {"error": {"message": "the engine has died", "type": "InternalServerError"}}
    url = server.play(b"data: " + line(EVENTS[1]), b"data: " + line(event), path="/v1/chat/completions")
    with pytest.raises(ChatError, match="the engine has died"):
        asyncio.run(all_parts(stream_messages_async(url, [])))


def test_what_a_server_tells_of_itself(server: Server) -> None:
    told = {"models": ["base", "poet"], "context": 2048, "images": True, "defaults": {"temperature": 0.7}}
    url = server.play(line(told), path="/chat/info")
    assert asyncio.run(server_info_async(url, "key")) == server_info(url, "key") == ServerInfo(**told)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (401, b'{"error": "Unauthorized"}'),
        (200, b"<html>"),
        (200, b"{}"),
        (200, b'{"models": []}'),
        (200, b"[]"),
        (0, None),
    ],
)
def test_a_server_that_tells_nothing_of_itself(server: Server, status: int, body: bytes | None) -> None:
    with pytest.raises(ChatError):
        asyncio.run(server_info_async(server.play(body, status=status, path="/chat/info")))
    with pytest.raises(ChatError):
        server_info(server.url)


def test_the_served_model(server: Server) -> None:
    url = server.play(line({"models": ["base", "poet"]}), path="/chat/info")
    assert server_info(url, "key").models[0] == "base"
    assert server.requests[0][0] == "/chat/info"
    assert server.requests[0][1]["Authorization"] == "Bearer key"


class Pipe:
    """Standard input that holds these lines."""

    def __init__(self, *lines: str) -> None:
        self._lines = lines

    def __iter__(self) -> Iterator[str]:
        return iter(self._lines)

    def isatty(self) -> bool:
        return False


def test_the_program_answers_a_question_a_line(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    model_named(server)
    url = server.play(line({"delta": "Hel"}), line({"delta": "lo"}), line(LAST))
    monkeypatch.setattr("sys.stdin", Pipe("one\n", "two\n"))
    assert main(["--url", f"{url}/", "--api-key", "key", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == "Hello\nHello\n"
    asked = [(headers["Authorization"], body) for path, headers, body in server.requests if path == "/chat"]
    assert [(key, body["query"], body["temperature"]) for key, body in asked] == [
        ("Bearer key", "one", 0),
        ("Bearer key", "two", 0),
    ]


def test_the_programs_questions_go_where_their_images_are_taken(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.play(*(b"data: " + line(event) for event in EVENTS), path="/v1/chat/completions")
    server.play(line({"models": ["base"], "images": True}), path="/chat/info")
    url, calls = server.play(line({"delta": "Hi"}), line(LAST)), []
    monkeypatch.setattr("qwen_vllm.console.run", lambda *args: calls.append(args) or 0)
    assert main(["--url", url]) == 0
    [(ask, title, _, info)] = calls
    assert title == f"base at {url}"
    assert info().images
    text, image, settings = Question("one"), Question("two", ("data:image/png;base64,AA",)), Sampling(model="poet")
    assert [part for part in ask(text, [], "S", settings) if isinstance(part, str)] == ["Hi"]
    for query, history in ((image, []), (text, [(image, "a", "")])):
        assert [part for part in ask(query, history, "S", settings) if isinstance(part, str)] == ["你", "好"]
    asked = [(path, body) for path, _, body in server.requests if body]
    assert [path for path, _ in asked] == ["/chat", "/v1/chat/completions", "/v1/chat/completions"]
    assert asked[0][1]["history"] == []
    assert [len(body["messages"]) for _, body in asked[1:]] == [2, 4]
    assert {body["model"] for _, body in asked} == {"poet"}


def test_several_models_at_one_address_are_shown_and_asked_by_their_names(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    calls = []
    monkeypatch.setattr("qwen_vllm.console.run", lambda *args: calls.append(args) or 0)
    server.play(*(b"data: " + line(event) for event in EVENTS), path="/v1/chat/completions")
    with scripted() as other, switch({"base": server.url, "poet": other.url}) as url:
        rhyme = {"choices": [{"delta": {"content": "Rose"}, "finish_reason": "stop"}]}
        other.play(*(b"data: " + line(event) for event in (rhyme, EVENTS[-1])), path="/v1/chat/completions")
        assert main(["--url", url]) == 0
        [(ask, title, _, info)] = calls
        assert (title, info().models) == (f"base at {url}", ["base", "poet"])
        turns = [(Question("one"), "a", "")]
        for settings, told in ((Sampling(temperature=0), "你好"), (Sampling(model="poet", temperature=0), "Rose")):
            *pieces, result = ask(Question("two"), turns, "S", settings)
            assert "".join(pieces) == result.text == told
            again = stream_question_async(url, Question("two"), turns, "S", settings)
            assert asyncio.run(all_parts(again)) == [*pieces, result]
        with pytest.raises(ChatError, match="no such model"):
            list(ask(Question("two"), [], "S", Sampling(model="writer")))
        assert main(["--url", url, "--test-message", "--model", "poet"]) == 0
        assert capsys.readouterr().out.splitlines()[::2] == [f"poet at {url}", "Rose"]
        for asked, model in ((server, "base"), (other, "poet")):
            bodies = [body for _, _, body in asked.requests]
            assert {body["model"] for body in bodies} == {model}
            assert bodies[0]["temperature"] == 0 and len(bodies[0]["messages"]) == 4


def test_the_program_says_that_no_server_answers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.stdin", Pipe("one\n"))
    assert main(["--url", f"http://127.0.0.1:{closed_port()}"]) == 1
    shown = capsys.readouterr()
    assert "no server answers" in shown.err
    assert shown.out == ""


def model_named(server: Server, name: str = "base") -> None:
    server.play(line({"models": [name], "reasoning_efforts": ["low", "medium"]}), path="/chat/info")


def test_a_test_message_shows_the_model_the_answer_and_its_figures(
    server: Server, capsys: pytest.CaptureFixture
) -> None:
    model_named(server)
    url = server.play(line({"delta": "Hel"}), line({"delta": "lo\x1b[2J"}), line(LAST))
    assert main(["--url", f"{url}/", "--api-key", "key", "--test-message", "--temperature", "0"]) == 0
    shown = capsys.readouterr()
    title, question, answer, figures = shown.out.splitlines()
    assert title == f"base at {url}"
    assert answer == "Hello[2J"
    pattern = r"first token 0\.\d\d s · [\d.]+ tokens/s · 3 tokens · .*total 0\.\d\d s · 20 prompt tokens"
    assert re.fullmatch(pattern, figures)
    assert shown.err == ""
    path, headers, body = server.requests[-1]
    assert (path, headers["Authorization"], body["temperature"]) == ("/chat", "Bearer key", 0)
    assert question == f"> {body['query']}"


def test_a_test_message_of_ones_own(server: Server, capsys: pytest.CaptureFixture) -> None:
    model_named(server)
    url = server.play(line({"delta": "你好"}), line(LAST))
    assert main(["--url", url, "--test-message", "你是谁？", "--model", "poet"]) == 0
    assert capsys.readouterr().out.startswith(f"poet at {url}\n> 你是谁？\n你好\n")
    assert [(path, body and body["query"]) for path, _, body in server.requests] == [
        ("/chat/info", None),
        ("/chat", "你是谁？"),
    ]


FAILED_TESTS = {
    "no model": ("/chat/info", 200, [b"<html>"], "not as a chat server"),
    "key": ("/chat/info", 401, [line({"error": "Unauthorized"})], "Unauthorized"),
    "refused": ("/chat", 503, [REFUSALS["overloaded"][1]], "busy"),
    "broken off": ("/chat", 200, [line({"delta": "Hel"}), None], "broke the answer off"),
    "no last line": ("/chat", 200, [line({"delta": "Hel"})], "without its last line"),
    "error at the end": (
        "/chat",
        200,
        [line({"delta": "H"}), line({"error": {"type": "engine_error", "message": "dead"}})],
        "dead",
    ),
    "empty": ("/chat", 200, [line({"delta": " \n"}), line(LAST)], "the answer is empty"),
    "reasoning only": (
        "/chat",
        200,
        [line({"reasoning": "Hm"}), line({**LAST, "finish_reason": "length"})],
        "No answer: at the token limit the model was still reasoning. Raise max_tokens, or set a thinking_budget below "
        "it, or choose a lower reasoning_effort (low, medium; ",
    ),
}


@pytest.mark.parametrize(("path", "status", "script", "message"), FAILED_TESTS.values(), ids=FAILED_TESTS.keys())
def test_a_test_message_that_fails_says_why_in_one_line(
    server: Server, capsys: pytest.CaptureFixture, path: str, status: int, script: list, message: str
) -> None:
    model_named(server)
    server.play(line({"delta": "Hello"}), line(LAST))
    url = server.play(*script, status=status, path=path)
    assert main(["--url", url, "--test-message"]) == 1
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert "tokens/s" not in shown.out


def test_reasoning_is_kept_where_the_template_reads_it_and_what_did_not_fit_is_told(server: Server) -> None:
    history = [("1", "2", "One and one.")]
    for keeps, kept in ((True, ("?", "Hi", "Hm")), (False, ("?", "Hi"))):
        url = server.play(
            line({"reasoning": "Hm"}),
            line({"delta": "Hi"}),
            line({**LAST, "keeps_reasoning": keeps, "dropped_reasoning": 1}),
        )
        *_, result = stream_chat(url, "?", history)
        assert (result.history, result.dropped_reasoning) == ([*history, kept], 1)
    assert server.requests[-1][2]["history"] == [["1", "2", "One and one."]]


def test_a_test_message_without_a_server_or_with_a_wrong_flag(server: Server, capsys: pytest.CaptureFixture) -> None:
    assert main(["--url", f"http://127.0.0.1:{closed_port()}", "--test-message"]) == 1
    assert "no server answers" in capsys.readouterr().err
    assert main(["--url", server.url, "--test-message", "--temperature", "hot"]) == 1
    assert "temperature" in capsys.readouterr().err
    assert server.requests == []


IN_A_TERMINAL = {
    "en_US.UTF-8": {
        "begins": ["base at {url}", "/help lists the commands, Ctrl-D leaves."],
        "waits": ["number 3 in line", "reading 7,600 tokens"],
        "figures": r"first token \d\.\d\d s · [\d.]+ tokens/s · 3 tokens, 1 of them thoughts · 1 old turns left out",
        "/help": ["/regen               answer the last question again", "Enter sends, Alt-Enter breaks the line"],
        "/nope": ["There is no command /nope; /help lists them."],
        "/model poet": ["There is no model poet, only base."],
        "/image a.png": ["base takes no images."],
        "fails": "Error: query: longer than the context",
    },
    "zh_CN.UTF-8": {
        "begins": ["base，位于 {url}", "输入 /help 列出命令，按 Ctrl-D 退出。"],
        "waits": ["排在第 3 位", "正在读 7,600 个词元"],
        "figures": r"首个词元 \d\.\d\d 秒 · [\d.]+ 词元/秒 · 3 词元（其中思考 1） · 略去最早的 1 轮",
        "/help": ["/regen               重新回答上一个问题", "回车发送，Alt-回车换行，Ctrl-C 停止回答。"],
        "/nope": ["没有命令 /nope，输入 /help 列出全部命令。"],
        "/model poet": ["没有模型 poet，只有 base。"],
        "/image a.png": ["base 不支持图片。"],
        "fails": "错误：query: longer than the context",
    },
}


@pytest.mark.parametrize("locale", IN_A_TERMINAL)
def test_a_chat_in_a_terminal_is_in_the_language_of_the_locale(server: Server, tmp_path: Path, locale: str) -> None:
    signs = [line({"waiting": 3, "prompt_tokens": 7600}), line({"waiting": 0, "prompt_tokens": 7600})]
    last = line({**LAST, "usage": {**LAST["usage"], "reasoning_tokens": 1}})
    model_named(server)
    url = server.play(*signs, line({"reasoning": "Hm"}), line({"delta": "Hello"}), last)
    refusal = {"error": {"type": "invalid_request", "message": "query: longer than the context", "param": "query"}}
    server.then_play(line(refusal), status=400)
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "QWEN_LANG"}
    environment |= {"LC_ALL": locale, "XDG_STATE_HOME": str(tmp_path), "PROMPT_TOOLKIT_NO_CPR": "1"}
    command, told = ["vllm_client.py", "--url", url], IN_A_TERMINAL[locale]
    terminal = {"encoding": "utf-8", "timeout": 30, "dimensions": (40, 100)}
    with pexpect.spawn(sys.executable, command, cwd=ROOT, env=environment, **terminal) as chat:
        for text in told["begins"]:
            chat.expect_exact(text.format(url=url))
        chat.send("你好\r")
        for text in (*told["waits"], "Hm", "Hello"):
            chat.expect_exact(text)
        chat.expect(told["figures"])
        for typed in ("/help", "/nope", "/model poet", "/image a.png"):
            chat.send(f"{typed}\r")
            for text in told[typed]:
                chat.expect_exact(text)
        chat.send("?\r")
        chat.expect_exact(told["fails"])
        chat.send("/exit\r")
        chat.expect(pexpect.EOF)
    assert chat.exitstatus == 0
    assert [body["query"] for _, _, body in server.requests if body] == ["你好", "?"]


def test_what_programs_read_is_the_same_in_each_language(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    model_named(server)
    url = server.play(line({"delta": "Hello"}), line(LAST))
    for language in ("en", "zh"):
        monkeypatch.setattr("sys.stdin", Pipe("one\n"))
        assert main(["--url", url, "--lang", language]) == 0
        assert capsys.readouterr() == ("Hello\n", "")


def test_the_clients_own_errors_are_chinese_and_the_servers_are_as_they_came(
    server: Server, capsys: pytest.CaptureFixture
) -> None:
    url = f"http://127.0.0.1:{closed_port()}"
    assert main(["--url", url, "--test-message", "--lang", "zh"]) == 1
    assert capsys.readouterr().err == f"错误：{url} 没有服务端响应：启动了吗？（make serve）\n"
    server.play(line({"error": "Unauthorized"}), status=401, path="/chat/info")
    assert main(["--url", server.url, "--test-message", "--lang", "zh"]) == 1
    assert capsys.readouterr().err == "错误：Unauthorized (HTTP 401)\n"


def test_the_figures_of_a_test_message_in_chinese(server: Server, capsys: pytest.CaptureFixture) -> None:
    model_named(server)
    url = server.play(line({"delta": "你"}), line({"delta": "好"}), line(LAST))
    assert main(["--url", url, "--test-message", "你是谁？", "--lang", "zh"]) == 0
    title, *_, figures = capsys.readouterr().out.splitlines()
    assert title == f"base，位于 {url}"
    assert re.search(r" · 总用时 0\.\d\d 秒 · 提示词 20 词元$", figures)
