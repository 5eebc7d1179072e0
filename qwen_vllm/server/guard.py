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
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen_vllm.hardware import MAX_PIXELS
from qwen_vllm.protocol import INT32_MAX, INT64_MAX, ChatError

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
MEDIA = {"image_url", "audio_url", "video_url"}
GRAMMARS = {"structured_outputs", "response_format", "text"}
COUNTS = {f"{bound}{what}" for bound in ("min", "max") for what in ("Items", "Contains", "Properties", "Length")}
MAX_COUNT = 10_000
"""Largest number for a schema's COUNTS: the memory to compile it can grow with them."""
INTEGERS = {"n": MAX_ANSWERS, "best_of": MAX_ANSWERS, "seed": INT64_MAX}
"""Largest integer a field may hold, where that is not INT32_MAX; what a field nests deeper, such as a schema's
bounds, may be up to INT64_MAX."""
NUMBERS = {
    *INTEGERS, "max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens", "thinking_token_budget",
    "top_k", "logprobs", "top_logprobs", "prompt_logprobs", "stop_token_ids", "allowed_token_ids", "priority",
    "truncate_prompt_tokens",
}  # fmt: skip
"""Fields that vLLM would read from text too, past the check of their size."""


class Guard:
    """Checks the key and the body of each request, and hands the request on.

    With --api-key or $VLLM_API_KEY set, every path but the open ones wants one of the keys. vLLM's own check covers
    only paths that begin with /v1 and a few others. Bodies are read once.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        state = scope["app"].state
        args = state.args
        try:
            _check_key(scope, args)
            if scope.get("method") in ("POST", "PUT", "PATCH"):
                if state.lifecycle.stopping:
                    message = "the server is stopping: try again in a moment"
                    raise ChatError(message, "overloaded", status=503, retry_after=5)
                body = await _read(receive, args.max_body_size, args.body_timeout)
                if b"json" in _header(scope, b"content-type").lower():
                    check_json(body)
                receive = _replayed(body, receive)
        except ChatError as error:
            return await error_response(error)(scope, receive, send)
        await self._app(scope, receive, send)


def error_response(error: ChatError) -> JSONResponse:
    """Make the response of an error; a 503 that names no seconds asks the client to wait for one."""
    headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": str(error.retry_after or 1)}}.get(error.status)
    return JSONResponse(error.as_dict(), error.status, headers)


def check_json(body: bytes) -> None:
    """Refuse JSON that is broken or nested too deep, or holds a number or a string the engine cannot take.

    Raises:
        ChatError: naming the field.
    """
    try:
        # The digits of an integer are cut where it is too large in any case: Python would refuse to read it at all.
        value = json.loads(body.decode(), parse_int=lambda digits: int(digits[:21]))
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        raise ChatError(f"the body is no JSON: {str(error)[:200]}") from None
    if isinstance(value, dict):
        for field in GRAMMARS & value.keys():
            if len(json.dumps(value[field])) > MAX_GRAMMAR:
                raise ChatError(f"{field}: is over the limit of {MAX_GRAMMAR} bytes", param=field)
    # Only \u escapes can spell half a character.
    _check(value, None, 0, bool(re.search(rb"\\u[dD][89a-fA-F]", body)))
    for field in CONVERSATIONS & value.keys() if isinstance(value, dict) else ():
        if _image_pixels(value[field], field) > MAX_PIXELS:
            raise ChatError(f"{field}: the images have over {MAX_PIXELS} pixels: send smaller ones", param=field)


def _check(value: Any, field: str | None, depth: int, surrogates: bool) -> None:
    if depth > MAX_DEPTH:
        raise _too_deep()
    match value:
        case dict():
            for name, item in value.items():
                if surrogates:
                    _check_text(name, field)
                if name in COUNTS and isinstance(item, int | float) and item > MAX_COUNT:
                    raise ChatError(f"{field}: {name} is at most {MAX_COUNT}", param=field)
                _check(item, name[:64] if field in (None, "sampling_params") else field, depth + 1, surrogates)
        case list():
            for item in value:
                _check(item, field, depth + 1, surrogates)
        case int() if abs(value) > (limit := INTEGERS.get(field or "", INT32_MAX) if depth <= 2 else INT64_MAX):
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


def _image_pixels(value: Any, field: str) -> int:
    """Count the pixels of all images in the messages; refuse what vLLM should not be asked to look for."""
    match value:
        case list():
            return sum(_image_pixels(item, field) for item in value)
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


def _check_key(scope: Scope, args: Namespace) -> None:
    keys = [key.encode() for key in args.api_key or [os.environ.get("VLLM_API_KEY")] if key]
    # A browser asks without the key what it may send; vLLM answers that before any route.
    preflight = scope.get("method") == "OPTIONS" and _header(scope, b"access-control-request-method")
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    opened = (
        path in OPEN_PATHS
        or (path in DOCS_PATHS and not args.disable_fastapi_docs)
        or (path.startswith("/static/") and args.enable_offline_docs)
    )
    if not keys or preflight or opened:
        return
    scheme, _, given = _header(scope, b"authorization").partition(b" ")
    # All are compared, each in constant time, so that the time tells nothing of the keys.
    matches = [secrets.compare_digest(given, key) for key in keys]
    if scheme.lower() != b"bearer" or not any(matches):
        raise ChatError("send a valid key as Authorization: Bearer KEY", "unauthorized", status=401)


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
