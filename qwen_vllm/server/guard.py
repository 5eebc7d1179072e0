"""ASGI middleware that checks the API key, and refuses bodies that the engine cannot take.

vLLM validates the fields of a request, but passes on some values that its engine cannot take. Such a request would hold
its place in the queue for ever, or stop the others. It is refused here.
"""

import asyncio
import base64
import json
import math
import os
import re
import secrets
from argparse import Namespace
from io import BytesIO
from typing import Any

from PIL import Image
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen_vllm.hardware import MAX_PIXELS
from qwen_vllm.protocol import INT32_MAX, INT64_MAX, ChatError
from qwen_vllm.server.keys import KeyRing
from qwen_vllm.tool_calls import FORMS
from qwen_vllm.vllm_plugin.engines import preferred_engine

OPEN_PATHS = {"/health", "/ready", "/ping"}
DOCS_PATHS = {"/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"}
"""Open too, unless --disable-fastapi-docs: a browser cannot send the key."""
MAX_DEPTH = 64
"""Levels of lists and objects within each other."""
MAX_ANSWERS = 32
"""Answers to one request of the OpenAI routes (`n`)."""
MAX_GRAMMAR = 2**15
"""Bytes of a grammar or schema: the work to compile it grows with its size."""
CONVERSATIONS = {"messages", "input"}
UNBOUNDED = {*CONVERSATIONS, "system"}
"""Texts, and calls with their arguments: no grammar is compiled from them, and the engine sees no number of them."""
MEDIA = {"image_url", "audio_url", "video_url"}
GRAMMARS = {"structured_outputs", "response_format", "text"}
COUNTS = {f"{bound}{what}" for bound in ("min", "max") for what in ("Items", "Contains", "Properties", "Length")}
MAX_COUNT = 10_000
"""Largest number for a schema's COUNTS: the memory to compile it can grow with them."""
UINT64_MAX = 2**64 - 1
INTEGERS = {"n": MAX_ANSWERS, "best_of": MAX_ANSWERS, "seed": INT64_MAX}
"""Largest integer a field may hold, where that is not INT32_MAX; what a field nests deeper, such as a schema's
bounds, may be up to INT64_MAX, and where nothing is bounded, up to UINT64_MAX."""
NUMBERS = {
    *INTEGERS, "max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens", "thinking_token_budget",
    "top_k", "logprobs", "top_logprobs", "prompt_logprobs", "stop_token_ids", "allowed_token_ids", "priority",
    "truncate_prompt_tokens",
}  # fmt: skip
"""Fields that vLLM would read from text too, past the check of their size."""


ANTHROPIC_ROUTES = "/v1/messages"
ENGINE_HEADER = b"x-data-parallel-rank"
ANTHROPIC_ERRORS = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 408: "timeout_error",
    413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error",
}  # fmt: skip


class Guard:
    """Checks the key and the body of each request, and hands the request on.

    With --api-key or $VLLM_API_KEY set, every path but the open ones wants one of the keys. vLLM's own check covers
    only paths that begin with /v1 and a few others. With --key-file, the team admits each request by its key's limits.
    Bodies are read once.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        state = scope["app"].state
        args = state.args
        if _path(scope).startswith(ANTHROPIC_ROUTES):
            send = _errors_for_anthropic(scope, receive, send)
        team, ticket = state.team, None
        try:
            scope = _with_checked_key(scope, args, team and team.ring)
            if scope.get("method") in ("POST", "PUT", "PATCH"):
                if state.lifecycle.stopping:
                    message = "the server is stopping: try again in a moment"
                    raise ChatError(message, "overloaded", status=503, retry_after=5)
                body = await _read(receive, args.max_body_size, args.body_timeout)
                request = None
                if b"json" in _header(scope, b"content-type").lower():
                    request = check_json(body, args.tool_call_parser not in (None, *FORMS))
                    if args.data_parallel_size > 1:
                        scope = _with_engine(scope, request, state.engine_client.vllm_config.parallel_config)
                receive = _replayed(body, receive)
                if team and (key := scope.get("key")):
                    ticket = await team.admit(key, request)
        except ChatError as error:
            # A browser shows its page no answer without these headers. vLLM's middleware for them is further in.
            refusal = CORSMiddleware(
                error_response(error),
                allow_origins=args.allowed_origins,
                allow_credentials=args.allow_credentials,
                allow_methods=args.allowed_methods,
                allow_headers=args.allowed_headers,
            )
            return await refusal(scope, receive, send)
        if ticket:
            return await ticket.serve(self._app, scope, receive, send)
        await self._app(scope, receive, send)


def error_response(error: ChatError) -> JSONResponse:
    """Make the response of an error; one that names no seconds asks the client of a busy server to wait for one."""
    busy = {"Retry-After": str(error.retry_after or 1)}
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: busy, 503: busy}.get(error.status)
    return JSONResponse(error.as_dict(), error.status, headers)


def wants_key(args: Namespace) -> bool:
    """Tell whether clients need a key."""
    return bool(args.api_key or args.key_file or os.environ.get("VLLM_API_KEY"))


def body_limit(context: int, images: bool) -> int:
    """Return the largest body, in bytes, that a model with a `context` of so many tokens needs, and one with images."""
    return 2**20 + 16 * context + (2**25 if images else 0)


def check_json(body: bytes, compiles_tools: bool = False) -> Any:
    """Return the JSON of a body; refuse what is broken, too deep, or holds what the engine cannot take.

    Args:
        compiles_tools: any tool's schema may become a grammar; else only that of a strict tool does.

    Raises:
        ChatError: naming the field.
    """
    try:
        # The digits of an integer are cut where it is too large in any case: Python would refuse to read it at all.
        whole = value = json.loads(body.decode(), parse_int=lambda digits: int(digits[:21]))
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        raise ChatError(f"the body is no JSON: {str(error)[:200]}") from None
    # Only \u escapes can spell half a character.
    surrogates = bool(re.search(rb"\\u[dD][89a-fA-F]", body))
    if isinstance(value, dict):
        _check_named_tool(value)
        if isinstance(tools := value.get("tools"), list):
            strict = [tool for tool in tools if _is_strict(tool)]
            if len(json.dumps(strict)) > MAX_GRAMMAR:
                raise ChatError(f"tools: the strict ones are over the limit of {MAX_GRAMMAR} bytes", param="tools")
            if not compiles_tools:
                _check(tools, "tools", 1, surrogates, bounded=False)
                value = {**value, "tools": strict}
        for field in GRAMMARS & value.keys():
            if len(json.dumps(value[field])) > MAX_GRAMMAR:
                raise ChatError(f"{field}: is over the limit of {MAX_GRAMMAR} bytes", param=field)
    _check(value, None, 0, surrogates)
    for field in CONVERSATIONS & value.keys() if isinstance(value, dict) else ():
        if "previous_response_id" not in value:
            _check_results(value[field], field)
        if _image_pixels(value[field], field) > MAX_PIXELS:
            raise ChatError(f"{field}: the images have over {MAX_PIXELS} pixels: send smaller ones", param=field)
    return whole


def _check(value: Any, field: str | None, depth: int, surrogates: bool, bounded: bool = True) -> None:
    if depth > MAX_DEPTH:
        raise _too_deep()
    match value:
        case dict():
            for name, item in value.items():
                if surrogates:
                    _check_text(name, field)
                if bounded and name in COUNTS and isinstance(item, int | float) and item > MAX_COUNT:
                    raise ChatError(f"{field}: {name} is at most {MAX_COUNT}", param=field)
                inner = name[:64] if field in (None, "sampling_params") else field
                _check(item, inner, depth + 1, surrogates, bounded and inner not in UNBOUNDED)
        case list():
            for item in value:
                _check(item, field, depth + 1, surrogates, bounded)
        case int() if abs(value) > (limit := _integer_limit(field, depth) if bounded else UINT64_MAX):
            raise ChatError(f"{field}: an integer here is at most {limit}", param=field)
        case float() if not math.isfinite(value):
            raise ChatError(f"{field}: must be a finite number", param=field)
        case str() if field in NUMBERS:
            raise ChatError(f"{field}: must be a number, not text", param=field)
        case str():
            if surrogates:
                _check_text(value, field)
            if field in GRAMMARS:
                _check_grammar(value, field, depth)


def _integer_limit(field: str | None, depth: int) -> int:
    return INTEGERS.get(field or "", INT32_MAX) if depth <= 2 else INT64_MAX


def _check_named_tool(body: dict[str, Any]) -> None:
    """Refuse a choice without tools, and tools of a wrong shape, where vLLM does not look before it uses them."""
    match body:
        case {"tool_choice": {"type": "any" | "tool"}} if not body.get("tools"):  # Anthropic's form
            raise ChatError("tool_choice: there are no tools", param="tool_choice")
        case {"tools": tools, "tool_choice": {"function": _}} if tools is not None:
            if not (isinstance(tools, list) and all(map(_has_function, tools))):
                raise ChatError("tools: a list of objects with type and function, which has a name", param="tools")


def _has_function(tool: Any) -> bool:
    match tool:
        case {"function": {"name": str()}}:
            return True
    return False


def _is_strict(tool: Any) -> bool:
    """Tell whether a tool's schema may become a grammar though no flag says so: it or a tool in it is `strict`."""
    match tool:
        case {"tools": list(inner)}:
            return any(map(_is_strict, inner))
        case {"function": dict(function)} if function.get("strict"):
            return True
        case dict():
            return bool(tool.get("strict"))
    return True


def _check_results(messages: Any, field: str) -> None:
    """Refuse a call of a wrong shape, and a result whose call is not before it."""
    called: list[Any] = []
    for message in messages if isinstance(messages, list) else ():
        match message:
            case {"role": "assistant", "tool_calls": calls} if calls is not None:
                if not (isinstance(calls, list) and all(_is_call(call) for call in calls)):
                    raise ChatError(f"{field}: tool_calls are objects with id, type and function", param=field)
                called += [call["id"] for call in calls]
            case {"type": "function_call", "call_id": call_id} | {"type": "custom_tool_call", "call_id": call_id}:
                called.append(call_id)
            case {"role": "tool"}:
                _check_result(message.get("tool_call_id"), called, f"{field}: tool_call_id", field)
            case {"type": "function_call_output"}:
                _check_result(message.get("call_id"), called, f"{field}: call_id", field)
            case {"content": list(blocks)}:
                for block in blocks:
                    match block:
                        case {"type": "tool_use", "id": str(call_id), "name": str()}:
                            called.append(call_id)
                        case {"type": "tool_use"}:
                            raise ChatError(f"{field}: tool_use has id, name and input", param=field)
                        case {"type": "tool_result"}:
                            _check_result(block.get("tool_use_id"), called, f"{field}: tool_use_id", field)


def _is_call(call: Any) -> bool:
    match call:
        case {"id": str(), "function": {"name": str()}}:
            return True
    return False


def _check_result(call_id: Any, called: list[Any], name: str, field: str) -> None:
    # Qwen-Agent names no id.
    if call_id not in called and not (call_id is None and called):
        raise ChatError(f"{name} {str(call_id)[:64]!r} is of no call before it", param=field)


def _image_pixels(value: Any, field: str) -> int:
    """Count the pixels of all images in the messages; refuse what vLLM should not be asked to look for."""
    match value:
        case list():
            return sum(_image_pixels(item, field) for item in value)
        case {"type": "tool_use"}:
            return 0  # Anthropic's form of a call: its arguments may have any names
        case dict() if "uuid" in value:
            # vLLM would take it for the image's key in a cache that all users share.
            raise ChatError(f"{field}: uuid is not taken, only the image itself", param=field)
        case dict():
            media = [value[name] for name in MEDIA & value.keys()]
            media += [value["source"]] if isinstance(value.get("source"), dict) else []
            return sum(_media_pixels(item, field) for item in media) + _image_pixels([*value.values()], field)
    return 0


def _media_pixels(media: Any, field: str) -> int:
    """Count the pixels of an image, given as an address or as an object with the address or the data."""
    if isinstance(media, dict):
        if isinstance(data := media.get("data"), str):
            return _pixels(data)
        media = media.get("url")
    if not isinstance(media, str) or re.match("https?://", media, re.IGNORECASE):
        return 0  # for vLLM to judge
    head, _, data = media.partition(",")
    if head[:5].lower() != "data:" or not head.endswith(";base64"):
        raise ChatError(f"{field}: images are sent as data URLs in base64", param=field)
    return _pixels(data)


def _pixels(data: str) -> int:
    """Count the pixels that an image in base64 will have when it is decoded; 0 where it is none."""
    try:
        with Image.open(BytesIO(base64.b64decode(data))) as image:
            return image.width * image.height
    except Image.DecompressionBombError:
        return MAX_PIXELS + 1
    except (OSError, ValueError, SyntaxError):
        return 0


def _check_grammar(text: str, field: str, depth: int) -> None:
    """Check a schema that comes as text; refuse one within a grammar, where nothing here would find its bounds."""
    if "%json" in text:
        raise ChatError(f"{field}: %json is not taken in a grammar; send the schema as json", param=field)
    if text.lstrip()[:1] in ("{", "["):
        try:
            value = json.loads(text)
        except RecursionError:
            raise _too_deep() from None
        except ValueError:
            return  # vLLM says what is wrong with it
        _check(value, field, depth + 1, True)


def _check_text(text: str, field: str | None) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ChatError(f"{field}: the text holds half a character (a lone surrogate)", param=field) from None


def _too_deep() -> ChatError:
    return ChatError(f"the body is nested deeper than {MAX_DEPTH} levels")


def _with_checked_key(scope: Scope, args: Namespace, ring: KeyRing | None) -> Scope:
    """Check the key, and return the request with it where vLLM's own check looks, or with its table of the key file."""
    keys = [key.encode() for key in args.api_key or [os.environ.get("VLLM_API_KEY")] if key]
    # A browser asks without the key what it may send; vLLM answers that before any route.
    preflight = scope.get("method") == "OPTIONS" and _header(scope, b"access-control-request-method")
    path = _path(scope)
    opened = (
        path in OPEN_PATHS
        or (path in DOCS_PATHS and not args.disable_fastapi_docs)
        or (path.startswith("/static/") and args.enable_offline_docs)
    )
    if not (keys or ring) or preflight or opened:
        return scope
    scheme, _, given = _header(scope, b"authorization").partition(b" ")
    given = given if scheme.lower() == b"bearer" else b""
    anthropics = _header(scope, b"x-api-key")
    if ring and (key := ring.find(given) or ring.find(anthropics)):
        if path.startswith("/metrics") and not key.admin:
            raise ChatError("the metrics name all keys: they need one with admin = true", "unauthorized", status=403)
        return {**scope, "key": key}
    # All are compared, each in constant time, so that the time tells nothing of the keys.
    matches = [secrets.compare_digest(given, key) for key in keys]
    others = [secrets.compare_digest(anthropics, key) for key in keys]
    if any(matches):
        return scope
    if any(others):
        rest = [header for header in scope["headers"] if header[0] != b"authorization"]
        return {**scope, "headers": [*rest, (b"authorization", b"Bearer " + anthropics)]}
    raise ChatError("send a valid key as Authorization: Bearer KEY, or as x-api-key", "unauthorized", status=401)


def _with_engine(scope: Scope, request: Any, config: Any) -> Scope:
    """Name the engine that may have the turns before of a conversation, for vLLM's routes that take such a name."""
    match request:
        case {"messages": [*messages]} if not _header(scope, ENGINE_HEADER):
            roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
            beginning = messages[: roles.index("user") + 1] if "user" in roles else messages
            engine = preferred_engine(config, json.dumps(beginning))
            if engine is not None:
                return {**scope, "headers": [*scope["headers"], (ENGINE_HEADER, b"%d" % engine)]}
    return scope


def _path(scope: Scope) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _errors_for_anthropic(scope: Scope, receive: Receive, send: Send) -> Send:
    """Make a `send` that gives every error the shape that Anthropic's clients read."""
    start: Message = {}
    body = bytearray()

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] >= 400:
            start.update(message)
            return
        if not start:
            return await send(message)
        body.extend(message.get("body", b""))
        if not message.get("more_body"):
            status = start["status"]
            try:
                error = json.loads(body)["error"]
                text = error["message"]
            except (ValueError, LookupError, TypeError):
                text = body.decode(errors="replace")[:300]
            kind = ANTHROPIC_ERRORS.get(status, "invalid_request_error" if status < 500 else "api_error")
            response = JSONResponse({"type": "error", "error": {"type": kind, "message": text}}, status)
            replaced = {b"content-length", b"content-type"}
            response.raw_headers += [header for header in start["headers"] if header[0].lower() not in replaced]
            await response(scope, receive, send)

    return sending


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key == name), b"")


async def _read(receive: Receive, limit: int, seconds: float) -> bytes:
    """Read the whole body of a request."""
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ChatError("the body ended early")
                body += message.get("body", b"")
                if len(body) > limit:
                    raise ChatError(f"the body is over the limit of {limit} bytes", status=413)
                if not message.get("more_body"):
                    return bytes(body)
    except TimeoutError:
        raise ChatError(f"the body did not come within {seconds:g} s", status=408) from None


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Make a `receive` that gives the body that was read, then what follows."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay
