"""The guard before every route, with an app behind it that echoes what reaches it."""

import asyncio
import base64
import json
import struct
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import httpx
import pytest
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from qwen_vllm.protocol import INT32_MAX, INT64_MAX, ChatError
from qwen_vllm.server.guard import MAX_ANSWERS, MAX_COUNT, MAX_DEPTH, MAX_GRAMMAR, Guard, check_json
from tests.support.guard_args import MAX_BODY, guard_args

KEYS = ["right", "other"]
PATHS = ["/chat", "/v1/models", "//v1/models", "/v1/../chat", "/docs/", "/metrics", "/tokenize", "/health/", "/"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer", "Bearer ", "right", "Basic right", "Bearer right "])
def test_without_a_key_nothing_is_served(path: str, header: str | None) -> None:
    headers = {"Authorization": header} if header else {}
    response = asyncio.run(guarded(path, headers))
    assert response.status_code == 401
    assert response.json()["error"]["type"] == "unauthorized"
    assert "right" not in response.text


async def guarded(
    path: str, headers: dict[str, str], method: str = "GET", root_path: str = "", content: bytes = b"", **flags: Any
) -> httpx.Response:
    """The answer of an app that serves every path, behind the guard."""
    app = FastAPI(docs_url=None, openapi_url=None, root_path=root_path)
    app.add_middleware(Guard)
    app.add_api_route("/{path:path}", _serve, methods=["GET", "POST"])
    app.state.args, app.state.lifecycle = guard_args(api_key=KEYS, **flags), SimpleNamespace(stopping=False)
    app.state.team = None
    engines = SimpleNamespace(data_parallel_size=app.state.args.data_parallel_size, local_engines_only=False)
    app.state.engine_client = SimpleNamespace(vllm_config=SimpleNamespace(parallel_config=engines))
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        request = client.build_request(method, "http://server", headers=headers, content=content)
        request.url = request.url.copy_with(raw_path=path.encode())
        return await client.send(request)


async def _serve(path: str, request: Request) -> Response:
    fails = {
        "busy": JSONResponse({"error": {"message": "busy"}}, 503, {"Retry-After": "1"}),
        "text": Response("No.", 500),
    }
    shown = {"was-authorized-by": "authorization", "went-to-engine": "x-data-parallel-rank"}
    served = JSONResponse("served", headers={name: request.headers.get(asked, "") for name, asked in shown.items()})
    return fails.get(request.headers.get("fails"), served)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("header", ["Bearer right", "Bearer other", "bearer right"])
def test_with_a_key_all_is_served(path: str, header: str) -> None:
    assert asyncio.run(guarded(path, {"Authorization": header})).json() == "served"


@pytest.mark.parametrize(("key", "status"), [("right", 200), ("wrong", 401), ("", 401)])
@pytest.mark.parametrize("bearer", [{}, {"Authorization": "Bearer other-key"}])
def test_anthropics_header_has_the_key_too(key: str, status: int, bearer: dict[str, str]) -> None:
    """And vLLM's own check, which is behind the guard, finds it where it looks."""
    response = asyncio.run(guarded("/v1/messages", {"x-api-key": key, **bearer}))
    assert response.status_code == status
    if status == 200:
        assert response.headers["was-authorized-by"] == f"Bearer {key}"


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/v1/chat/completions", {}, 401),
        ("/v1/messages", {}, 401),
        ("/chat", {"Authorization": "Bearer right", "Content-Type": "application/json"}, 400),
        ("/chat", {"Authorization": "Bearer right"}, 413),
    ],
)
def test_a_browser_is_shown_what_the_guard_refuses(path: str, headers: dict[str, str], status: int) -> None:
    headers = {"Origin": "https://app.example", **headers}
    body = b"x" * (MAX_BODY + 1) if status == 413 else b"{"
    response = asyncio.run(guarded(path, headers, "POST", content=body))
    assert response.status_code == status
    assert response.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize(
    ("asked", "status", "kind"),
    [
        ({}, 401, "authentication_error"),
        ({"content": b"x" * (MAX_BODY + 1)}, 413, "request_too_large"),
        ({"content": b"{", "json": True}, 400, "invalid_request_error"),
        ({"fails": "busy"}, 503, "overloaded_error"),
        ({"fails": "text"}, 500, "api_error"),
    ],
)
def test_anthropics_routes_have_its_shape_of_errors(asked: dict[str, Any], status: int, kind: str) -> None:
    headers = {"Authorization": "Bearer right"} if asked else {}
    if asked.pop("json", False):
        headers["Content-Type"] = "application/json"
    response = asyncio.run(guarded("/v1/messages", {**headers, "fails": asked.pop("fails", "")}, "POST", **asked))
    assert response.status_code == status
    assert response.json().keys() == {"type", "error"}
    assert response.json()["type"] == "error"
    assert response.json()["error"].keys() == {"type", "message"}
    assert response.json()["error"]["type"] == kind
    assert response.headers.get("retry-after") == ("1" if status == 503 else None)


TOOL = {
    "name": "f",
    "parameters": {"type": "object", "properties": {"x": {"maxLength": 524_288, "maximum": 2**64 - 1}}},
}
BIG = {"name": "f", "parameters": {"description": "x" * MAX_GRAMMAR}}


@pytest.mark.parametrize(
    "wrap", [lambda tool: {"type": "function", "function": tool}, lambda tool: tool], ids=["chat", "flat"]
)
@pytest.mark.parametrize(
    "fields", [{}, {"tool_choice": "required"}, {"messages": [{"content": {"maxItems": 99_999}}]}], ids=str
)
def test_a_tools_schema_is_bounded_only_where_it_becomes_a_grammar(wrap: Any, fields: dict) -> None:
    for tool in (TOOL, BIG):
        check_json(encoded({"tools": [wrap(tool)], **fields}))
        for strict in (True, "true", 1):
            with pytest.raises(ChatError, match="tools: "):
                check_json(encoded({"tools": [wrap(TOOL), wrap({**tool, "strict": strict})], **fields}))
    with pytest.raises(ChatError, match="tools: "):
        check_json(encoded({"tools": [wrap(TOOL)]}), compiles_tools=True)
    check_json(encoded({"tools": [wrap({**TOOL, "strict": False})]}))


def test_a_conversation_goes_on_with_the_engine_that_has_its_beginning() -> None:
    def engine_for(*texts: str, engines: int = 16, **headers: str) -> str:
        roles = ("user", "assistant") * len(texts)
        turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
        body = json.dumps({"messages": [{"role": "system", "content": "Be brief."}, *turns]}).encode()
        headers = {"Authorization": "Bearer right", "Content-Type": "application/json", **headers}
        answer = guarded("/v1/chat/completions", headers, "POST", content=body, data_parallel_size=engines)
        return asyncio.run(answer).headers["went-to-engine"]

    assert engine_for("Hi") == engine_for("Hi", "Hello!", "And now?") != ""
    assert len({engine_for(f"Question {number}") for number in range(20)}) > 5
    assert engine_for("Hi", **{"X-data-parallel-rank": "99"}) == "99"
    assert engine_for("Hi", engines=1) == ""


@pytest.mark.parametrize(("asked", "status"), [({"Access-Control-Request-Method": "POST"}, 405), ({}, 401)])
def test_only_a_browsers_preflight_needs_no_key(asked: dict[str, str], status: int) -> None:
    assert asyncio.run(guarded("/metrics", asked, "OPTIONS")).status_code == status


@pytest.mark.parametrize("path", ["/health", "/ready", "/ping", "/docs", "/openapi.json"])
def test_health_and_docs_need_no_key(path: str) -> None:
    assert asyncio.run(guarded(path, {})).json() == "served"


def test_docs_that_are_off_need_the_key_as_any_path() -> None:
    assert asyncio.run(guarded("/docs", {}, disable_fastapi_docs=True)).status_code == 401


@pytest.mark.parametrize(("path", "status"), [("/api/health", 200), ("/health", 200), ("/api/chat", 401)])
def test_open_paths_are_those_the_application_routes_on(path: str, status: int) -> None:
    assert asyncio.run(guarded(path, {}, root_path="/api")).status_code == status


def test_a_websocket_needs_the_key_too() -> None:
    sent = []

    async def connect() -> None:
        app = FastAPI()
        app.state.args, app.state.lifecycle = guard_args(api_key=KEYS), SimpleNamespace(stopping=False)
        app.state.team = None
        scope = {"type": "websocket", "path": "/v1/realtime", "headers": [], "app": app}

        async def send(message: dict) -> None:
            sent.append(message)

        await Guard(app)(scope, None, send)

    asyncio.run(connect())
    assert sent[0]["type"] == "websocket.http.response.start"
    assert sent[0]["status"] == 401


def png(width: int, height: int) -> str:
    """A PNG of next to no bytes that says it has this size."""
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for kind, chunk in ((b"IHDR", head), (b"IDAT", b""), (b"IEND", b"")):
        data += struct.pack(">I", len(chunk)) + kind + chunk + struct.pack(">I", crc32(kind + chunk))
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def images(*urls: str, **fields: str) -> dict[str, Any]:
    """A request with these images."""
    parts = [{"type": "image_url", "image_url": {"url": url}, **fields} for url in urls]
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}]}


@pytest.mark.parametrize(
    "body",
    [
        images(png(8192, 8192)),
        images(*[png(2048, 2048)] * 16),
        images("data:image/png;base64,broken", "https://example.com/a.png", "HTTP://example.com/a.png"),
        {"messages": [{"content": "file:///image.png"}, {"content": [{"type": "text", "text": "file:///x"}]}, 1]},
        {"tools": [{"uuid": 1}], "messages": [{"content": "uuid", "source": "a"}]},
        {"messages": [{"content": [{"image_url": None}, {"image_url": {"url": 1}}, "text"]}], "input": "a"},
    ],
)
def test_images_that_pass(body: dict) -> None:
    check_json(encoded(body))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (images(png(8193, 8192)), "over 67108864 pixels"),
        (images(*[png(2048, 2048)] * 17), "over 67108864 pixels"),
        (images(png(14_000, 14_000)), "over 67108864 pixels"),
        ({"input": [{"content": [{"type": "input_image", "image_url": png(14_000, 14_000)}]}]}, "pixels"),
        (images("DATA:image/png;base64" + png(14_000, 14_000)[21:]), "pixels"),
        ({"messages": [{"content": [{"source": {"data": png(14_000, 14_000).partition(",")[2]}}]}]}, "pixels"),
        ({"messages": [images(*[png(2048, 2048)] * 9)["messages"]] * 2}, "pixels"),  # of /v1/chat/completions/batch
        (images("data:image/png,abc"), "as data URLs in base64"),
        (images("file:///image.png"), "as data URLs"),
        (images("/image.png"), "as data URLs"),
        (images(png(8, 8), uuid="a"), "uuid is not taken"),
    ],
)
def test_images_that_could_hurt_are_refused(body: dict, reason: str) -> None:
    with pytest.raises(ChatError, match=reason) as caught:
        check_json(encoded(body))
    assert caught.value.param in body


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}
NAMED = {"type": "function", "function": {"name": "now"}}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "!"}
ANTHROPICS_RESULT = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1"}]}


def encoded(body: str | dict) -> bytes:
    return (body if isinstance(body, str) else json.dumps(body)).encode()


@pytest.mark.parametrize(
    "body",
    [
        {"n": MAX_ANSWERS},
        {"max_tokens": INT32_MAX, "seed": INT64_MAX},
        {"tools": [{"parameters": {"maximum": 10**15, "maxItems": 100, "minItems": {"type": "integer"}}}]},
        {"structured_outputs": {"json": '{"maxItems": 100}'}, "messages": [{"content": "maxItems: 10001 %json"}]},
        {"structured_outputs": {"regex": "[0-9]+", "choice": ["{", "[1"]}},
        '{"query": "a \\ud83d\\ude00 b \\u0000 \\uffff"}',
        '{"a": ' + "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1) + "}",
        '{"temperature": 1e-300, "stop": ["<|im_end|>"], "logit_bias": {"5": 1}}',
        '"text"',
        {"tools": [{"type": "function", "function": {"name": "now"}}], "tool_choice": NAMED},
        {"tools": [{"name": "now"}], "tool_choice": {"type": "tool", "name": "now"}},
        {"messages": [{"role": "assistant", "tool_calls": [CALL]}, RESULT, {"role": "assistant", "tool_calls": None}]},
        {"messages": [{"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "!"}]},
        {"messages": [{"content": [{"type": "tool_use", "id": "1", "name": "f"}]}, ANTHROPICS_RESULT]},
        {"input": [{"type": "function_call", "call_id": "1"}, {"type": "function_call_output", "call_id": "1"}]},
        {"input": [{"type": "function_call_output", "call_id": "1"}], "previous_response_id": "r"},
    ],
)
def test_bodies_that_pass(body: str | dict) -> None:
    check_json(encoded(body))


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"n": MAX_ANSWERS + 1}, "n"),
        ({"max_tokens": INT32_MAX + 1}, "max_tokens"),
        ({"max_completion_tokens": -INT32_MAX - 1}, "max_completion_tokens"),
        ({"top_k": INT32_MAX + 1}, "top_k"),
        ({"top_k": "5"}, "top_k"),
        ({"stop_token_ids": ["5"]}, "stop_token_ids"),
        ({"sampling_params": {"n": MAX_ANSWERS + 1}}, "n"),
        ({"seed": INT64_MAX + 1}, "seed"),
        ({"stop_token_ids": [1, INT32_MAX + 1]}, "stop_token_ids"),
        ({"tools": [{"strict": True, "parameters": {"maximum": INT64_MAX + 1}}]}, "tools"),
        ('{"seed": ' + "9" * 4301 + "}", "seed"),
        ('{"temperature": NaN}', "temperature"),
        ('{"temperature": 1e999}', "temperature"),
        ('{"temperature": -Infinity}', "temperature"),
        ('{"stop": ["a\\ud800"]}', "stop"),
        ('{"messages": [{"content": "\\udfff"}]}', "messages"),
        ('{"messages": [{"\\udfff": 1}]}', "messages"),
        ({"structured_outputs": {"json": {"items": {"maxItems": MAX_COUNT + 1}}}}, "structured_outputs"),
        ({"structured_outputs": {"json": {"items": {"maxItems": MAX_COUNT + 1.0}}}}, "structured_outputs"),
        ({"structured_outputs": {"json": '{"\\u006daxItems": 10001}'}}, "structured_outputs"),
        ({"structured_outputs": {"json": "[" * 65 + "]" * 65}}, None),
        ({"structured_outputs": {"json": "[" * 2000 + "]" * 2000}}, None),
        ({"structured_outputs": {"grammar": 'start: %json {"type": "string"}'}}, "structured_outputs"),
        ({"tools": [{"function": {"strict": True, "parameters": {"minLength": MAX_COUNT + 1}}}]}, "tools"),
        ({"structured_outputs": {"choice": ["word"] * 5000}}, "structured_outputs"),
        ({"response_format": {"json_schema": {"enum": ["x" * 40_000]}}}, "response_format"),
        ("[" * 2000 + "]" * 2000, None),
        ('{"schema": ' + '{"a":' * 65 + "1" + "}" * 66, None),
        ('{"query": ', None),
        ("", None),
        ({"messages": [RESULT]}, "messages"),
        ({"messages": [{"role": "tool", "content": "!"}]}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [CALL | {"id": "2"}]}, RESULT]}, "messages"),
        ({"messages": [{"role": "tool", "tool_call_id": [1]}]}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": "x"}]}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages"),
        *(({"tools": tools, "tool_choice": NAMED}, "tools") for tools in ("x", [1], [{}], [{"function": {"name": 1}}])),
        *(({"tool_choice": choice}, "tool_choice") for choice in ({"type": "any"}, {"type": "tool", "name": "now"})),
        ({"messages": [ANTHROPICS_RESULT]}, "messages"),
        ({"messages": [{"content": [{"type": "tool_use", "id": "1"}]}]}, "messages"),
        ({"input": [{"type": "function_call_output", "call_id": "1"}]}, "input"),
    ],
)
def test_bodies_that_are_refused(body: str | dict, field: str | None) -> None:
    with pytest.raises(ChatError) as refused:
        check_json(encoded(body))
    assert (refused.value.status, refused.value.param) == (400, field)
    assert len(refused.value.message) < 300


def test_text_that_is_no_utf8_is_refused() -> None:
    with pytest.raises(ChatError, match="utf-8"):
        check_json(b'{"query": "\xff"}')


def test_a_server_that_is_stopping_takes_no_new_work_but_answers_health() -> None:
    async def asked() -> list[httpx.Response]:
        app = FastAPI()
        app.add_middleware(Guard)
        app.add_api_route("/{path:path}", lambda path: "served", methods=["GET", "POST"])
        app.state.args, app.state.lifecycle = guard_args(), SimpleNamespace(stopping=True)
        app.state.team = None
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            return [await client.post("/chat", json={}), await client.get("/health")]

    refused, health = asyncio.run(asked())
    assert (refused.status_code, refused.json()["error"]["type"]) == (503, "overloaded")
    assert int(refused.headers["Retry-After"]) > 0
    assert health.status_code == 200


@pytest.mark.parametrize("body", [b'{"a": 1}', b'{"a": "\xe4\xbd\xa0"}'])
def test_the_body_reaches_the_route_as_it_was_sent(body: bytes) -> None:
    async def post() -> httpx.Response:
        app = FastAPI()
        app.add_middleware(Guard)

        @app.post("/echo")
        async def echo(request: Request) -> str:
            return (await request.body()).hex()

        app.state.args, app.state.lifecycle = guard_args(), SimpleNamespace(stopping=False)
        app.state.team = None
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            return await client.post("/echo", content=body, headers={"Content-Type": "application/json"})

    assert asyncio.run(post()).json() == body.hex()
