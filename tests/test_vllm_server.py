"""POST /chat on a scripted engine: answers, errors, clients that leave, keys, and the command line."""

import asyncio
import json
import socket
from argparse import Namespace
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from vllm.exceptions import MaxQueuedTokensError, QueueOverflowError, VLLMValidationError
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from qwen_vllm import hardware
from qwen_vllm.models.checks import ModelUnavailable
from qwen_vllm.server.endpoint import announcement
from tests.support.chat_app import ADAPTER, chat_app
from tests.support.guard_args import MAX_BODY
from tests.support.tiny_checkpoints import TEXT, write_adapter, write_model
from tests.support.tool_templates import JSON_TOOLS, XML_TOOLS
from vllm_server import parse_args

Engines = Callable[..., Any]
MARKS = len("<|im_start|>system\n<|im_end|>\n<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n")


def ask(engine: Any, method: str = "POST", path: str = "/chat", **sent: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(await chat_app(engine))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.request(method, path, **sent)

    return asyncio.run(send())


def chat(engine: Any, query: str = "q", **fields: Any) -> httpx.Response:
    return ask(engine, json={"query": query, **fields})


def lines(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.text.endswith("\n")
    return [json.loads(line) for line in response.text[:-1].split("\n")]


def check_error(response: httpx.Response, status: int, type: str, param: str | None = None) -> str:
    """The error's message, where the response is that error."""
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["param"]) == (status, type, param)
    assert len(response.content) <= 1024
    return error["message"]


@pytest.mark.parametrize("finish", [("stop", None), ("stop", "END"), ("stop", 151645), ("length", None)])
@pytest.mark.parametrize("pieces", [["Hel", "lo", " 你好\n", "\u2028", "", "\x00"], [], [""]])
def test_streamed_and_whole_answers_agree(scripted_engine: Engines, pieces: list[str], finish: tuple) -> None:
    engine = scripted_engine(pieces, pieces, finish=finish)
    whole, streamed = chat(engine).json(), lines(chat(engine, stream=True))
    *deltas, last = streamed
    assert all(list(line) == ["delta"] and line["delta"] for line in deltas)
    assert {"text": "".join(line["delta"] for line in deltas), **last} == whole
    assert whole == {
        "text": "".join(pieces),
        "finish_reason": finish[0],
        "stop_reason": finish[1] if isinstance(finish[1], str) else None,
        "usage": {
            "prompt_tokens": len(engine.calls[0].token_ids),
            "completion_tokens": len(pieces) + 1,
            "reasoning_tokens": 0,
        },
        "dropped_turns": 0,
        "dropped_reasoning": 0,
        "keeps_reasoning": False,
    }
    assert not any(call.aborted for call in engine.calls)


def test_a_streamed_answer_has_a_line_a_piece_for_every_reader_of_lines(scripted_engine: Engines) -> None:
    pieces = ["<think>", "a\u2028b", "</think>", "c\u2029d", "\x85", "…，", "e\v\f\x1cf"]
    response = chat(scripted_engine(pieces), stream=True)
    answer = [json.loads(line) for line in response.text.splitlines()]
    assert answer == lines(response) == [json.loads(line) for line in response.iter_lines()]
    assert [next(iter(line.values())) for line in answer[:-1]] == ["a\u2028b", *pieces[3:]]
    assert "…，" in response.text


THOUGHT = ["<think>", "\n", "Hm", ", 你", ".\n", "</think>", "\n\n", "Hel", "lo"]
THOUGHTS = {
    "a thought": (THOUGHT, {}, ["Hm", ", 你", "."], ["Hel", "lo"], 4),
    "no thought": (["Hel", "lo"], {}, [], ["Hel", "lo"], 0),
    "cut in the thought": (THOUGHT[:4], {}, ["Hm", ", 你"], [], 4),
    "thinking turned off": (["Hel", "lo"], {"enable_thinking": False}, [], ["Hel", "lo"], 0),
    "turned off, and a mark": (
        ["<think>", " Hm", "</think>"],
        {"enable_thinking": False},
        [],
        ["<think>", " Hm", "</think>"],
        0,
    ),
    "marks in letters": (["<thi", "nk> Hm"], {}, [], ["<thi", "nk> Hm"], 0),
}


@pytest.mark.parametrize(("pieces", "fields", "thoughts", "deltas", "tokens"), THOUGHTS.values(), ids=THOUGHTS.keys())
def test_thoughts_have_lines_and_a_field_of_their_own(
    scripted_engine: Engines, pieces: list[str], fields: dict, thoughts: list[str], deltas: list[str], tokens: int
) -> None:
    engine = scripted_engine(pieces, pieces, finish=("length", None))
    whole, streamed = chat(engine, **fields).json(), lines(chat(engine, stream=True, **fields))
    expected = [{"reasoning": thought} for thought in thoughts] + [{"delta": delta} for delta in deltas]
    assert streamed[:-1] == expected
    thought = {"reasoning": "".join(thoughts)} if thoughts else {}
    assert whole == {"text": "".join(deltas), **thought, **streamed[-1]}
    assert (whole["usage"]["reasoning_tokens"], whole["usage"]["completion_tokens"]) == (tokens, len(pieces) + 1)


def test_null_is_no_system_message(scripted_engine: Engines) -> None:
    engine = scripted_engine(["a"], ["a"], ["a"])
    for system in (None, "", "S"):
        assert chat(engine, system=system).status_code == 200
    assert [call.prompt.partition("<|im_start|>user")[0] for call in engine.calls] == [
        "",
        "<|im_start|>system\n<|im_end|>\n",
        "<|im_start|>system\nS<|im_end|>\n",
    ]


STOPS = {
    "in the thought alone": (["Hm", "</think>", "think"], THOUGHT, ["Hel", "lo"], None),
    "in the text too": (["Hm", "lo"], [*THOUGHT, " Hm", "!"], ["Hel"], "lo"),
    "over two pieces": (["ello"], [*THOUGHT, "!", "?"], ["H"], "ello"),
    "the start of one": (["lot"], THOUGHT, ["Hel", "lo"], None),
    "what came to nothing": (["lots", "?"], [*THOUGHT, "t", "!", "?"], ["Hel", "lot!"], "?"),
    "what is complete first": (["elops", "lo"], [*THOUGHT, "ps"], ["H", "el"], "lo"),
    "behind the mark": (["\n\nHel"], THOUGHT, ["Hel", "lo"], None),
    "a mark in the text": (["</think>"], [*THOUGHT, "</think>", "!"], ["Hel", "lo"], "</think>"),
    "no thought": (["b"], ["a", "b", "c"], ["a"], "b"),
    "the first piece": (["a"], ["a", "b", "c"], [], "a"),
}


@pytest.mark.parametrize(("stop", "pieces", "deltas", "found"), STOPS.values(), ids=STOPS.keys())
def test_stop_words_count_in_the_text_alone(
    scripted_engine: Engines, stop: list[str], pieces: list[str], deltas: list[str], found: str | None
) -> None:
    engine = scripted_engine(pieces, pieces, finish=("length", None))
    whole, streamed = chat(engine, stop=stop).json(), lines(chat(engine, stop=stop, stream=True))
    assert "".join(line.get("delta", "") for line in streamed) == "".join(deltas) == whole["text"]
    assert whole.get("reasoning", "") == ("Hm, 你." if pieces[0] == "<think>" else "")
    assert {name: whole[name] for name in streamed[-1]} == streamed[-1]
    assert (whole["finish_reason"], whole["stop_reason"]) == (("stop", found) if found else ("length", None))
    assert all(call.params.stop == [] for call in engine.calls)
    assert [call.aborted for call in engine.calls] == [found is not None] * 2  # the engine does not write on


def test_thinking_is_off_by_default_where_the_command_line_says_so(scripted_engine: Engines) -> None:
    async def prompts() -> list[bool]:
        engine = scripted_engine(["a"], ["a"])
        app = await chat_app(engine, default_chat_template_kwargs={"enable_thinking": False})
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            for fields in ({}, {"enable_thinking": True}):
                await client.post("/chat", json={"query": "q", **fields})
        return [call.prompt.endswith("</think>\n\n") for call in engine.calls]

    assert asyncio.run(prompts()) == [True, False]


@pytest.mark.parametrize(
    ("template", "flags", "parser"),
    [
        ("{{ '</think>' }}", [], "qwen_thinking"),
        ("{{ '</think>' }}", ["--reasoning-parser", "deepseek_r1"], "deepseek_r1"),
        ("{{ '<think>' }}", ["--default-chat-template-kwargs", '{"enable_thinking": false}'], ""),
    ],
)
def test_the_reasoning_parser_suits_the_model(
    qwen3_tokenizer: Any, tmp_path: Path, template: str, flags: list[str], parser: str
) -> None:
    model = write_model(tmp_path / "model")
    qwen3_tokenizer.save_pretrained(model)
    (model / "chat_template.jinja").write_text(template)
    assert parse_args(["--model", str(model), "--port", "0", *flags]).reasoning_parser == parser


def test_the_server_tells_of_itself(scripted_engine: Engines) -> None:
    told = ask(scripted_engine(context=512, configured={"top_k": 20}), "GET", "/chat/info").json()
    defaults = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "max_tokens": 128, "enable_thinking": True}
    assert told == {
        "models": ["base", "poet"],
        "context": 512,
        "images": False,
        "defaults": defaults,
        "max_body_size": MAX_BODY,
        "reasoning_efforts": [],
    }


@pytest.mark.parametrize(("limits", "images"), [({}, True), ({"limit_per_prompt": {"image": 0}}, False)])
def test_a_server_that_loads_no_vision_tower_takes_no_images(
    scripted_engine: Engines, limits: dict[str, Any], images: bool
) -> None:
    from vllm.config import MultiModalConfig

    engine = scripted_engine()
    engine.model_config.multimodal_config = MultiModalConfig(**limits)
    assert ask(engine, "GET", "/chat/info").json()["images"] == images


def test_headers_of_a_stream(scripted_engine: Engines) -> None:
    response = chat(scripted_engine(["a"]), stream=True)
    assert response.headers["content-type"] == "application/x-ndjson"
    assert response.headers["cache-control"] == "no-cache"


def test_the_prompt_is_the_conversation(scripted_engine: Engines) -> None:
    engine = scripted_engine(["c"])
    chat(engine, "<|im_end|>?", history=[["a", "b"]], system="s", enable_thinking=False)
    assert engine.calls[0].prompt == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\n<|im_end|>?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert engine.calls[0].token_ids.count(engine.get_tokenizer().eos_token_id) == 4


def test_every_request_has_an_id_of_its_own(scripted_engine: Engines) -> None:
    engine = scripted_engine(["a"], ["a"])
    chat(engine)
    chat(engine)
    assert engine.calls[0].request_id != engine.calls[1].request_id


def test_a_conversation_goes_on_with_the_engine_that_has_its_beginning(scripted_engine: Engines) -> None:
    engine = scripted_engine(*[["a"]] * 40, engines=4)
    for n in range(20):
        chat(engine, query=f"question {n}")
        chat(engine, query="more", history=[[f"question {n}", "a"], ["b", "c"]])
    engines = [call.engine for call in engine.calls]
    assert engines[::2] == engines[1::2]
    assert {*engines} == {0, 1, 2, 3}


def test_sampling_of_a_silent_request(scripted_engine: Engines) -> None:
    engine = scripted_engine(["a"])
    chat(engine)
    params = engine.calls[0].params
    assert (params.temperature, params.top_p, params.max_tokens) == (0.7, 0.8, 512)
    assert params.stop_token_ids == [engine.get_tokenizer().eos_token_id]
    assert params.stop == []


def test_the_configured_goes_over_ours_and_the_request_over_both(scripted_engine: Engines) -> None:
    configured = {"temperature": 0.2, "top_k": 20, "max_tokens": 100, "repetition_penalty": 1.05}
    engine = scripted_engine(["a"], configured=configured)
    chat(engine, temperature=0.9, top_k=7, seed=5)
    params = engine.calls[0].params
    assert (params.temperature, params.top_k, params.seed) == (0.9, 7, 5)
    assert (params.top_p, params.max_tokens, params.repetition_penalty) == (0.8, 100, 1.05)


def test_what_a_client_reads_is_english_whatever_the_servers_terminal_speaks(
    scripted_engine: Engines, chinese: None
) -> None:
    refused = chat(scripted_engine(), query=" ")
    assert check_error(refused, 400, "invalid_request", "query") == "query: must not be blank"


@pytest.mark.parametrize("field", ["stop", "user_stop_words"])
def test_stop_words_are_passed_on_where_no_thought_may_come(scripted_engine: Engines, field: str) -> None:
    engine = scripted_engine(["a"])
    chat(engine, enable_thinking=False, **{field: ["END", "结束"]})
    params = engine.calls[0].params
    assert (params.stop, params.include_stop_str_in_output) == (["END", "结束"], False)


@pytest.mark.parametrize("stream", [False, True])
def test_dropped_turns_are_told(scripted_engine: Engines, stream: bool) -> None:
    engine = scripted_engine(["a"])
    turn = ["u" * 400, "a" * 100]
    response = chat(engine, history=[turn] * 4, system="s", max_tokens=500, stream=stream)
    assert lines(response)[-1]["dropped_turns"] == 2 if stream else response.json()["dropped_turns"] == 2
    assert len(engine.calls[0].token_ids) <= 1548


def test_a_long_conversation_is_answered(scripted_engine: Engines) -> None:
    engine = scripted_engine(["a"])
    answer = chat(engine, history=[["question", "answer"]] * 10_000).json()
    assert answer["text"] == "a"
    assert answer["dropped_turns"] > 9_900


@pytest.mark.parametrize("fields", [{"query": "long " * 500}, {"system": "long " * 500}, {"max_tokens": 2000}])
def test_a_request_longer_than_the_context_is_refused(scripted_engine: Engines, fields: dict) -> None:
    engine = scripted_engine()
    message = check_error(chat(engine, **{"query": "q" * 40, **fields}), 400, "invalid_request", "query")
    assert any(character.isdigit() for character in message)
    assert engine.calls == []


def test_more_tokens_than_the_context_are_refused(scripted_engine: Engines) -> None:
    message = check_error(chat(scripted_engine(), max_tokens=2048), 400, "invalid_request", "max_tokens")
    assert "2048" in message


def test_a_bad_request_is_refused(scripted_engine: Engines) -> None:
    message = check_error(chat(scripted_engine(), temperature=3), 400, "invalid_request", "temperature")
    assert "2" in message


@pytest.mark.parametrize(("name", "adapter"), [(None, None), ("base", None), ("poet", ADAPTER)])
def test_models_by_name(scripted_engine: Engines, name: str | None, adapter: Any) -> None:
    engine = scripted_engine(["a"])
    assert chat(engine, model=name).status_code == 200
    assert engine.calls[0].lora_request is adapter


def test_an_unknown_model_is_refused_with_the_known_names(scripted_engine: Engines) -> None:
    message = check_error(chat(scripted_engine(), model="gpt"), 404, "invalid_request", "model")
    assert "base" in message
    assert "poet" in message


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonl"])
def test_another_content_type_is_refused(scripted_engine: Engines, kind: str | None) -> None:
    headers = {"Content-Type": kind} if kind else {}
    response = ask(scripted_engine(), content=b'{"query": "q"}', headers=headers)
    assert "application/json" in check_error(response, 415, "invalid_request")


@pytest.mark.parametrize("kind", ["application/json", "application/json; charset=utf-8", "Application/JSON"])
def test_json_is_taken(scripted_engine: Engines, kind: str) -> None:
    response = ask(scripted_engine(["a"]), content=b'{"query": "q"}', headers={"Content-Type": kind})
    assert response.json()["text"] == "a"


async def in_chunks(body: bytes) -> AsyncIterator[bytes]:
    """Without a Content-Length."""
    for start in range(0, len(body), 2**16):
        yield body[start : start + 2**16]


@pytest.mark.parametrize("send", [bytes, in_chunks])
@pytest.mark.parametrize(("size", "status"), [(MAX_BODY, 200), (MAX_BODY + 1, 413), (3 * MAX_BODY, 413)])
def test_the_limit_on_a_body(scripted_engine: Engines, send: Callable, size: int, status: int) -> None:
    body = b'{"query": "q"}'.ljust(size)
    response = ask(scripted_engine(["a"]), content=send(body), headers={"Content-Type": "application/json"})
    assert response.status_code == status
    if status == 413:
        assert str(MAX_BODY) in check_error(response, 413, "invalid_request")


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/chat", 405), ("POST", "/chatter", 404)])
def test_wrong_paths_and_methods_have_our_error_shape(
    scripted_engine: Engines, method: str, path: str, status: int
) -> None:
    response = ask(scripted_engine(), method, path, json={"query": "q"})
    assert response.status_code == status
    assert response.json()["error"].keys() >= {"type", "message", "param"}


class Unforeseen(Exception):
    pass


FAILURES = {
    "a full queue": (QueueOverflowError(), 503, "overloaded"),
    "too many tokens queued": (MaxQueuedTokensError(), 503, "overloaded"),
    "a dead engine": (EngineDeadError(), 503, "engine_error"),
    "a failed request": (EngineGenerateError("/home/secret"), 500, "engine_error"),
    "the unforeseen": (Unforeseen("/home/secret"), 500, "engine_error"),
    "a bad value": (VLLMValidationError("too many stop words"), 400, "invalid_request"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("failure", "status", "type"), FAILURES.values(), ids=FAILURES.keys())
def test_a_failure_before_the_first_token_is_a_status(
    scripted_engine: Engines, failure: Exception, status: int, type: str, stream: bool
) -> None:
    response = chat(scripted_engine([failure]), stream=stream)
    assert "secret" not in check_error(response, status, type)
    assert ("Retry-After" in response.headers) == (status == 503)


@pytest.mark.parametrize(("failure", "status", "type"), FAILURES.values(), ids=FAILURES.keys())
def test_a_failure_after_the_first_token_is_the_last_line(
    scripted_engine: Engines, failure: Exception, status: int, type: str
) -> None:
    response = chat(scripted_engine(["Hel", "lo", failure]), stream=True)
    *deltas, last = lines(response)
    assert response.status_code == 200
    assert deltas == [{"delta": "Hel"}, {"delta": "lo"}]
    assert last["error"]["type"] == type
    assert "secret" not in response.text


@pytest.mark.parametrize("failure", [failure for failure, _, _ in FAILURES.values()], ids=FAILURES.keys())
def test_a_failed_whole_answer_is_a_status(scripted_engine: Engines, failure: Exception) -> None:
    response = chat(scripted_engine(["Hel", failure]))
    assert response.status_code >= 400
    assert "Hel" not in response.text


@pytest.mark.parametrize("reason", ["abort", "error"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_given_up_before_its_first_token_is_a_status(
    scripted_engine: Engines, reason: str, stream: bool
) -> None:
    check_error(chat(scripted_engine([], finish=(reason, None)), stream=stream), 503, "engine_error")


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_an_answer_given_up_later_ends_with_an_error(scripted_engine: Engines, reason: str) -> None:
    *deltas, last = lines(chat(scripted_engine(["Hel"], finish=(reason, None)), stream=True))
    assert deltas == [{"delta": "Hel"}]
    assert last["error"]["type"] == "engine_error"


def test_the_next_request_after_a_failure_is_answered(scripted_engine: Engines) -> None:
    engine = scripted_engine([Unforeseen()], ["a"])
    assert [chat(engine).status_code, chat(engine).status_code] == [500, 200]


class Client:
    """Speaks ASGI to the app, and leaves once `enough` says so of what it has received."""

    def __init__(self, enough: Callable[[list[dict]], bool], body: bytes, more_body: bool = False) -> None:
        self.received: list[dict] = []
        self._enough, self._left = enough, asyncio.Event()
        self._requests = [{"type": "http.request", "body": body, "more_body": more_body}]

    async def receive(self) -> dict[str, Any]:
        if self._requests:
            return self._requests.pop()
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        self.received.append(message)
        self.look()

    def look(self) -> None:
        if self._enough(self.received):
            self._left.set()


SCOPE = {
    "type": "http",
    "asgi": {"version": "3.0"},
    "http_version": "1.1",
    "method": "POST",
    "path": "/chat",
    "raw_path": b"/chat",
    "root_path": "",
    "scheme": "http",
    "query_string": b"",
    "headers": [(b"content-type", b"application/json")],
    "client": ("127.0.0.1", 1),
    "server": ("127.0.0.1", 8000),
}


def leave(engine: Any, enough: Callable[[list[dict]], bool], **fields: Any) -> list[dict]:
    """What a client receives that leaves early; fails where the server goes on for ever."""

    async def talk() -> list[dict]:
        app = await chat_app(engine)
        client = Client(enough, json.dumps({"query": "q", **fields}).encode())
        served = asyncio.create_task(app(dict(SCOPE), client.receive, client.send))
        while not (engine.calls or served.done()):
            await asyncio.sleep(0)
        client.look()
        await asyncio.wait_for(served, 30)
        return client.received

    return asyncio.run(talk())


def test_a_client_that_leaves_mid_answer_aborts_it(scripted_engine: Engines) -> None:
    engine = scripted_engine(["Hel", "lo", ..., "never"])
    received = leave(engine, lambda messages: len(messages) == 3, stream=True)
    assert [message.get("body") for message in received] == [None, b'{"delta":"Hel"}\n', b'{"delta":"lo"}\n']
    assert engine.calls[0].aborted


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_the_queue_aborts_its_request(scripted_engine: Engines, stream: bool) -> None:
    engine = scripted_engine([...])
    assert leave(engine, lambda messages: True, stream=stream) == []
    assert engine.calls[0].aborted


def signs_of_life(engine: Any, seen: asyncio.Event, **fields: Any) -> list[dict[str, Any]]:
    """The lines of a stream that begins to answer when the client has seen two signs of life."""

    async def talk() -> list[dict]:
        app = await chat_app(engine)
        body = json.dumps({"query": "q", "stream": True, **fields}).encode()
        client = Client(lambda messages: len(messages) >= 3 and seen.set(), body)
        await asyncio.wait_for(app(dict(SCOPE), client.receive, client.send), 30)
        return client.received

    start, *messages = asyncio.run(talk())
    assert start["status"] == 200
    return [json.loads(message["body"]) for message in messages]


@pytest.mark.parametrize(("before", "place"), [(0, 0), (1, 0), (2, 1), (4, 3)])
def test_a_stream_that_waits_tells_its_place_until_the_answer_begins(
    scripted_engine: Engines, before: int, place: int
) -> None:
    seen = asyncio.Event()
    engine = scripted_engine([seen, "Hel", "lo"])  # it runs two requests at once
    states = {name: SimpleNamespace(external_req_id=f"other {name}") for name in range(before)}
    engine.output_processor.request_states = states
    answer = signs_of_life(engine, seen, keep_alive=True)
    tokens = len(engine.calls[0].token_ids)
    assert answer[:2] == [{"waiting": place, "prompt_tokens": tokens}] * 2
    assert [line for line in answer if "waiting" not in line][:2] == [{"delta": "Hel"}, {"delta": "lo"}]
    assert answer[-1]["finish_reason"] == "stop"


def test_an_error_after_a_sign_of_life_is_the_last_line(scripted_engine: Engines) -> None:
    seen = asyncio.Event()
    *signs, last = signs_of_life(scripted_engine([seen, QueueOverflowError()]), seen, keep_alive=True)
    assert {*map(str, map(list, signs))} == {"['waiting', 'prompt_tokens']"}
    assert last["error"]["type"] == "overloaded"


def test_a_client_that_leaves_after_a_sign_of_life_aborts_its_request(scripted_engine: Engines) -> None:
    engine = scripted_engine([...])
    received = leave(engine, lambda messages: len(messages) >= 2, stream=True, keep_alive=True)
    assert b'"waiting":0' in received[1]["body"]
    assert engine.calls[0].aborted


def test_a_client_that_leaves_a_whole_answer_aborts_it(scripted_engine: Engines) -> None:
    engine = scripted_engine(["Hel", ...])
    assert leave(engine, lambda messages: True) == []
    assert engine.calls[0].aborted


def test_a_server_that_is_cancelled_aborts_the_request(scripted_engine: Engines) -> None:
    engine = scripted_engine(["Hel", ...])

    async def talk() -> None:
        app = await chat_app(engine)
        client = Client(lambda messages: False, b'{"query": "q", "stream": true}')
        served = asyncio.create_task(app(dict(SCOPE), client.receive, client.send))
        while len(client.received) < 2 and not served.done():
            await asyncio.sleep(0)
        served.cancel()
        await asyncio.wait([served], timeout=30)

    asyncio.run(talk())
    assert engine.calls[0].aborted


def test_a_client_that_leaves_while_it_sends_reaches_no_engine(scripted_engine: Engines) -> None:
    engine, client = scripted_engine(), Client(lambda messages: True, b'{"que', more_body=True)
    client.look()

    async def talk() -> None:
        await (await chat_app(engine))(dict(SCOPE), client.receive, client.send)

    asyncio.run(talk())
    assert engine.calls == []
    assert all(message.get("status") != 200 for message in client.received)


def test_many_clients_get_their_own_answers(scripted_engine: Engines) -> None:
    engine = scripted_engine(*[[f"answer {n}", f" to {n}"] for n in range(50)])

    async def talk() -> list[httpx.Response]:
        transport = httpx.ASGITransport(await chat_app(engine))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            posts = [client.post("/chat", json={"query": f"{n}", "stream": n % 2 == 0}) for n in range(50)]
            return await asyncio.gather(*posts)

    answers = [
        "".join(line.get("delta", line.get("text", "")) for line in lines(response))
        if "ndjson" in response.headers["content-type"]
        else response.json()["text"]
        for response in asyncio.run(talk())
    ]
    queries = [call.prompt.split("user\n")[1].split("<")[0] for call in engine.calls]
    assert [answers[int(query)] for query in queries] == [f"answer {n} to {n}" for n in range(50)]


def test_a_model_without_a_chat_template_refuses_only_chat(
    scripted_engine: Engines, qwen3_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(qwen3_tokenizer, "chat_template", None)
    message = check_error(chat(scripted_engine()), 400, "invalid_request")
    assert "chat template" in message
    assert "/chat is off" in capsys.readouterr().err


def test_a_broken_chat_template_refuses_only_chat(
    scripted_engine: Engines, qwen3_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qwen3_tokenizer, "chat_template", "{{ raise_exception('System role not supported') }}")
    check_error(chat(scripted_engine()), 400, "invalid_request")


def test_the_description_of_the_api_has_the_request(scripted_engine: Engines) -> None:
    schema = ask(scripted_engine(), "GET", "/openapi.json").json()
    body = schema["paths"]["/chat"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"query", "history", "system", "stream", "temperature"} <= body["properties"].keys()
    assert body["required"] == ["query"]


def test_a_key_from_the_environment(scripted_engine: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "right")
    engine = scripted_engine(["a"])
    check_error(chat(engine), 401, "unauthorized")
    response = ask(engine, json={"query": "q"}, headers={"Authorization": "Bearer right"})
    assert response.json()["text"] == "a"


@pytest.mark.parametrize(
    ("host", "certificate", "url"),
    [
        ("127.0.0.1", None, "http://127.0.0.1:8123"),
        ("0.0.0.0", None, "http://127.0.0.1:8123"),
        (None, "cert.pem", "https://127.0.0.1:8123"),
    ],
)
def test_the_announcement(host: str, certificate: str | None, url: str) -> None:
    shown = announcement("base", Namespace(host=host, port=8123, ssl_certfile=certificate, api_key=None, key_file=None))
    assert f"base is ready at {url}" in shown
    assert f"curl -N {url}/chat" in shown


XGRAMMAR = ["--structured-outputs-config", '{"backend": "xgrammar"}']


@pytest.fixture
def with_tools(qwen3_tokenizer: Any, tmp_path: Path) -> Callable[[str], str]:
    def write(template: str) -> str:
        model = write_model(tmp_path / "model")
        qwen3_tokenizer.save_pretrained(model)
        (model / "chat_template.jinja").write_text(template)
        return str(model)

    return write


@pytest.mark.parametrize(
    ("template", "flags", "parser"),
    [
        (JSON_TOOLS, [], "qwen_json"),
        (XML_TOOLS, [], "qwen_xml"),
        (JSON_TOOLS, XGRAMMAR, "hermes"),
        (XML_TOOLS, [*XGRAMMAR, "--tool-strict-level", "function"], "qwen3_xml"),
        (XML_TOOLS, ["--structured-outputs-config", '{"backend": "auto"}'], "qwen_xml"),
    ],
)
def test_the_tool_parser_suits_the_model_and_the_grammar_engine(
    with_tools: Callable[[str], str], template: str, flags: list[str], parser: str
) -> None:
    args = parse_args(["--model", with_tools(template), "--port", "0", *flags])
    assert (args.tool_call_parser, args.enable_auto_tool_choice) == (parser, True)


@pytest.mark.parametrize(
    ("flags", "wrong"),
    [
        (["--tool-strict-level", "function"], "--tool-strict-level"),
        ([*XGRAMMAR, "--enable-auto-tool-choice", "--tool-call-parser", "qwen_json"], "the grammar engine xgrammar"),
    ],
)
def test_what_our_tool_parsers_do_not_go_with_is_told_at_start(
    with_tools: Callable[[str], str], flags: list[str], wrong: str
) -> None:
    with pytest.raises(ModelUnavailable, match=f"^{wrong} does not go with --tool-call-parser qwen_json"):
        parse_args(["--model", with_tools(JSON_TOOLS), "--port", "0", *flags])


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(write_model(tmp_path))


def test_a_server_is_for_this_machine_unless_told_otherwise(model: str) -> None:
    args = parse_args(["--model", model, "--port", "0"])
    assert (args.host, args.model) == ("127.0.0.1", model)


@pytest.mark.parametrize("end", ["", "/"])
def test_a_folder_is_served_under_its_last_part(model: str, end: str) -> None:
    assert parse_args(["--model", model + end, "--port", "0"]).served_model_name == [Path(model).name]


def test_an_id_is_served_as_it_is(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_vllm.models.resolve.fetch", lambda *_: Path(model))
    args = parse_args(["--model", "Qwen/Qwen3-8B", "--port", "0"])
    assert (args.model, args.served_model_name) == (model, ["Qwen/Qwen3-8B"])


@pytest.mark.parametrize("flags", [["--model"], ["--model-path"], ["--model_path"], []])
def test_the_names_of_the_model_flag(model: str, flags: list[str]) -> None:
    assert parse_args([*flags, model, "--port", "0"]).model == model


def test_vllms_own_flags_are_taken(model: str) -> None:
    args = parse_args(["--model", model, "--port=0", "--max_model_len=512", "--served-model-name", "a", "b"])
    assert (args.max_model_len, args.served_model_name) == (512, ["a", "b"])


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (
            ["poet=/no/such/folder", "--enable-lora"],
            "adapter poet cannot be used: /no/such/folder: there is no ",
        ),
        (["poet={adapter}"], "--lora-modules needs --enable-lora"),
        (["base={adapter}", "--enable-lora"], "two of these have the same name: base, base; "),
        (["poet={adapter}", "poet={adapter}", "--enable-lora"], "two of these have the same name: base, poet, poet; "),
    ],
)
def test_adapters_that_cannot_be_served(tmp_path: Path, flags: list[str], reason: str) -> None:
    model = write_model(tmp_path / "base", hidden_size=TEXT["hidden_size"], num_hidden_layers=2)
    adapter = write_adapter(tmp_path / "adapter")
    flags = [flag.format(adapter=adapter) for flag in flags]
    with pytest.raises(ModelUnavailable, match=reason):
        parse_args(["--model", str(model), "--port", "0", "--lora-modules", *flags])


def test_one_request_has_a_few_images_at_most_and_remote_ones_only_where_allowed(model: str) -> None:
    args = parse_args(["--model", model, "--port", "0"])
    assert args.limit_mm_per_prompt == {"image": 16, "video": 1, "audio": 1}
    assert not any("." in domain for domain in args.allowed_media_domains)
    flags = ["--limit-mm-per-prompt", '{"image": 2}', "--allowed-media-domains", "example.com"]
    args = parse_args(["--model", model, "--port", "0", *flags])
    assert (args.limit_mm_per_prompt, args.allowed_media_domains) == ({"image": 2}, ["example.com"])


def test_on_a_cpu_no_engine_sleeps(model: str) -> None:
    with pytest.raises(ModelUnavailable, match="--sleep-after gives back a GPU's memory"):
        parse_args(["--model", model, "--port", "0", "--sleep-after", "30"])


def test_a_small_model_on_a_large_gpu_gets_two_engines_unless_told_otherwise(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(hardware, "on_cpu", lambda: False)
    monkeypatch.setattr(hardware, "_gpu_bytes", lambda: 80 * 2**30)
    monkeypatch.setattr(hardware, "_cores", lambda: 16)
    monkeypatch.setattr(hardware, "max_num_seqs", lambda args: args.max_num_seqs or 1024)
    for name, value, _ in hardware.environment_defaults():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        parse_args(["--model", model, "--show-defaults"])
    shown = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "one engine leaves the GPU waiting" in shown["data_parallel_size"]
    assert shown["device_ids"].split()[1:3] == ["[0,", "0]"]
    assert shown["max_num_queued_reqs"].split()[1] == str(2 * 2 * 576)
    with pytest.raises(SystemExit):
        parse_args(["--model", model, "--show-defaults", "--data-parallel-size", "1"])
    assert "device_ids" not in capsys.readouterr().out


def test_the_users_dtype_goes_over_ours(model: str) -> None:
    assert parse_args(["--model", model, "--port", "0", "--dtype", "float16"]).dtype == "float16"


def test_a_taken_port_ends_the_program_before_the_model_is_looked_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(SystemExit, match=port):
            parse_args(["--model", "/does/not/exist", "--port", port])


@pytest.mark.parametrize(
    ("flags", "bound"),
    [
        (["--max-num-seqs", "8"], 16),
        (["--max-num-seqs", "8", "--max-num-queued-reqs", "9"], 9),
        (["--max-num-seqs", "8", "--data-parallel-size", "2"], 32),
    ],
)
def test_the_queue_is_bounded(model: str, flags: list[str], bound: int) -> None:
    assert parse_args(["--model", model, "--port", "0", *flags]).max_num_queued_reqs == bound


@pytest.fixture
def key_file(tmp_path: Path) -> list[str]:
    (tmp_path / "keys.toml").touch(0o600)
    (tmp_path / "keys.toml").write_text('[ann]\nkey = "0123456789abcdef"\n')
    return ["--key-file", str(tmp_path / "keys.toml"), "--usage-file", str(tmp_path / "usage.db")]


def test_with_a_key_file_the_front_ends_bound_the_queue_by_key(model: str, key_file: list[str]) -> None:
    args = parse_args(["--model", model, "--port", "0", "--max-num-queued-reqs", "7", *key_file])
    assert (args.queue_bound, args.max_num_queued_reqs, args.scheduling_policy) == (7, None, "priority")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--api-key", "k"], "leave --api-key"),
        (["--key-file", "/does/not/exist"], "No such file"),
        (["--usage-file", "/proc/usage.db"], "--usage-file /proc/usage.db"),
    ],
)
def test_a_key_file_that_cannot_be_used_ends_the_start(
    model: str, key_file: list[str], flags: list[str], said: str
) -> None:
    with pytest.raises(ModelUnavailable, match=said):
        parse_args(["--model", model, "--port", "0", *key_file, *flags])


def test_the_queue_is_bounded_where_nothing_is_said(model: str) -> None:
    assert parse_args(["--model", model, "--port", "0"]).max_num_queued_reqs >= 256


def test_a_model_that_vllm_does_not_know_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    write_model(tmp_path, architectures=["NobodysModel"])
    with pytest.raises(ModelUnavailable, match="NobodysModel"):
        parse_args(["--model", str(tmp_path), "--port", "0"])


def test_an_unknown_flag_is_refused(model: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--model", model, "--temperatur", "1"])
    assert "--temperatur" in capsys.readouterr().err
