"""`POST /chat`, `GET /chat/info` and `GET /ready`, in each of the server's front-end processes.

vLLM loads `ChatEndpoint` as an endpoint plugin (see `pyproject.toml`), once its engine runs.
"""

import asyncio
import gc
import json
import os
import sys
from argparse import Namespace
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import orjson
from fastapi import FastAPI, Query
from starlette.datastructures import State
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from vllm.entrypoints.serve.exception_handling.handlers.http import http_exception_handler
from vllm.envs import enable_envs_cache
from vllm.exceptions import GracefulHTTPError, VLLMClientError
from vllm.inputs.engine import tokens_input
from vllm.v1.engine.exceptions import EngineDeadError

from qwen_vllm.generation import RequestBuilder, RunningAnswer, hasten
from qwen_vllm.models.prepare import read_chat_template
from qwen_vllm.network import address
from qwen_vllm.protocol import ChatError, ChatRequest, one_line, validated
from qwen_vllm.server.guard import body_limit, error_response, wants_key
from qwen_vllm.server.keys import Key, KeyRing
from qwen_vllm.server.lifecycle import Lifecycle
from qwen_vllm.server.team import Team
from qwen_vllm.server.tickets import CURRENT
from qwen_vllm.server.usage import UsageFile
from qwen_vllm.vllm_plugin import patches, plugin
from qwen_vllm.vllm_plugin.engines import preferred_engine
from qwen_vllm.vllm_plugin.rendering import why_not_kept

if TYPE_CHECKING:
    from vllm import RequestOutput
    from vllm.engine.protocol import EngineClient
    from vllm.lora.request import LoRARequest

LONG_TEXT = 8192
"""From this many characters a prompt is built on a thread, so that other streams do not wait for it."""
GARBAGE = 50_000, 10, 10
"""After so many new objects Python looks for garbage among them; after so many looks, among older ones, and all."""
DAY = r"^\d{4}-\d\d-\d\d$"
NDJSON_HEADERS = [
    (b"content-type", b"application/x-ndjson"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # or nginx holds the lines back
]


class ChatEndpoint:
    """vLLM's endpoint plugin: it adds the routes, and makes the `ChatService` that answers them."""

    name = plugin.NAME
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes, describe them in the API's description, and give errors of all routes our shape."""
        app.exception_handler(HTTPException)(http_exception_handler)
        app.exception_handler(GracefulHTTPError)(_busy)
        app.router.lifespan_context = _lifespan_around(app.router.lifespan_context)
        schema = ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        described: dict[str, Any] = {"response_model": None, "openapi_extra": {"requestBody": body}}
        app.add_api_route("/chat", _chat, methods=["POST"], **described)
        # The FastAPI route above only documents /chat. This plain Starlette route serves it. It is inserted first
        # because the router and the metrics middleware scan routes in order, and it skips FastAPI's parameter parsing.
        app.router.routes.insert(0, Route("/chat", _chat, methods=["POST"]))
        app.add_api_route("/chat/info", _info, methods=["GET"])
        app.add_api_route("/ready", _ready, methods=["GET"], response_model=None)
        app.add_api_route("/usage", _usage, methods=["GET"], response_model=None)

    async def init_state(self, engine_client: "EngineClient", state: State, args: Namespace) -> None:
        """Make the service for the running engine; vLLM calls this before the server listens."""
        config = engine_client.model_config
        if args.max_body_size is None:
            args.max_body_size = body_limit(config.max_model_len, takes_images(config))
        enable_envs_cache()  # as the engine's process does: else a variable is looked up for each token
        tokenizer = engine_client.get_tokenizer()
        vars(tokenizer)["eos_token_id"] = tokenizer.eos_token_id  # vLLM asks for it with each request
        requests: RequestBuilder | ChatError
        try:
            requests = RequestBuilder(
                config,
                tokenizer,
                read_chat_template(args.chat_template, Path(args.tokenizer or args.model)),
                args.default_chat_template_kwargs or {},
                args.reasoning_parser,
            )
        except ChatError as reason:
            requests = reason
            print(f"/chat is off: {reason.message}", file=sys.stderr)
        hasten(tokenizer)
        if why := why_not_kept(tokenizer):
            print(f"Control tokens in messages to /v1 are taken as such: {why}", file=sys.stderr)
        state.team = _team(engine_client, args) if args.key_file else None
        state.chat = ChatService(
            engine_client, state.openai_serving_models, requests, args.max_body_size, args.sse_keep_alive_interval
        )
        # Garbage is looked for among what comes from now on, and less often: a burst of requests is none.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GARBAGE)


def _lifespan_around(vllm_lifespan: Any) -> Any:
    """Wrap vLLM's lifespan: configure uvicorn after the server object exists and before it listens."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with vllm_lifespan(app):
            state = app.state
            engine = state.engine_client
            state.lifecycle = Lifecycle(engine, state.server, state.args, state.team)
            state.lifecycle.begin()
            is_first = engine.vllm_config.parallel_config._api_process_rank <= 0
            announcing = asyncio.create_task(_announce(state)) if is_first else None
            yield
            if announcing:
                announcing.cancel()
            if state.team:
                await state.team.close()

    return lifespan


async def _chat(request: Request) -> Response:
    """Answers a query in the light of its history, whole or streamed as newline-delimited JSON."""
    service: ChatService = request.app.state.chat
    return await service.chat(request)


async def _info(request: Request) -> dict[str, Any]:
    """What a client may want to show before it asks: models, context in tokens, defaults of `/chat`, limits."""
    service: ChatService = request.app.state.chat
    return service.info()


async def _ready(request: Request) -> Response:
    """Whether a request would be served now."""
    lifecycle: Lifecycle = request.app.state.lifecycle
    return lifecycle.readiness()


async def _usage(request: Request, day: Annotated[str | None, Query(pattern=DAY)] = None) -> Response:
    """What a key of the key file has used on a day (YYYY-MM-DD, else today); for an admin key, what each has."""
    team: Team | None = request.app.state.team
    if not team:
        return error_response(ChatError("usage is counted with --key-file", status=404))
    key: Key = request.scope["key"]
    try:
        keys = team.usage(None if key.admin else key, day)
    except ChatError as error:
        return error_response(error)
    return JSONResponse({"keys": keys} if key.admin else keys[0])


class ChatService:
    """Answers chat requests with a running engine.

    Args:
        engine: vLLM's client of the engine.
        models: vLLM's list of the model and its LoRA adapters.
        requests: makes what the engine takes; or why the model has no chat.
        max_body_size: largest request, in bytes.
        interval: seconds between two signs of life in a stream that waits; 0: none.
    """

    def __init__(
        self,
        engine: "EngineClient",
        models: Any,
        requests: RequestBuilder | ChatError,
        max_body_size: int,
        interval: float,
    ) -> None:
        self._engine, self._models, self._requests = engine, models, requests
        self._max_body_size, self._interval = max_body_size, interval

    async def chat(self, request: Request) -> Response:
        """Validate a request, build its prompt and begin its answer."""
        try:
            if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                raise ChatError("send the request as Content-Type: application/json", status=415)
            chat: ChatRequest = validated(ChatRequest, await request.body())
            requests = self._requests
            if isinstance(requests, ChatError):
                raise requests
            adapter = self._adapter(chat.model)
            length = sum(map(len, chain([chat.system or "", chat.query], *chat.history)))
            if length < LONG_TEXT:
                prompt, params = requests.build(chat, chat.stream)
            else:
                prompt, params = await asyncio.to_thread(requests.build, chat, chat.stream)
        except ChatError as error:
            return error_response(error)
        # `tokens_input` marks the prompt as already tokenized. vLLM would render any other prompt in a thread pool.
        request_id = f"chat-{os.urandom(16).hex()}"
        beginning = f"{chat.system}\n{chat.history[0][0] if chat.history else chat.query}"
        outputs = self._engine.generate(
            tokens_input(prompt.token_ids),
            params,
            request_id,
            lora_request=adapter,
            data_parallel_rank=preferred_engine(self._engine.vllm_config.parallel_config, beginning),
        )
        response = AnswerResponse(outputs, chat.stream, requests.answer(prompt, chat))
        if chat.stream and chat.keep_alive and self._interval:
            response.sign_of_life(self._interval, lambda: self._waiting(request_id, len(prompt.token_ids)))
        return response

    def _waiting(self, request_id: str, prompt_tokens: int) -> dict[str, Any]:
        """Tell a request's place in the queue, about; 0: its prompt is being read."""
        if (ticket := CURRENT.get()) and (held := ticket.place_held()):
            place = held
        else:
            config, states = self._engine.vllm_config, self._engine.output_processor.request_states
            at_once = config.scheduler_config.max_num_seqs * config.parallel_config.data_parallel_size
            ids = [state.external_req_id for state in states.values()]  # in the order in which they came
            before = ids.index(request_id) if request_id in ids else len(ids)
            place = max(0, before + 1 - at_once // self._engine.engine_core.client_count)
        return {"waiting": place, "prompt_tokens": prompt_tokens}

    def info(self) -> dict[str, Any]:
        """Tell what the server has, in the wire form of `protocol.ServerInfo`."""
        config = self._engine.model_config
        return {
            "models": self._names(),
            "context": config.max_model_len,
            "images": takes_images(config),
            "defaults": {} if isinstance(self._requests, ChatError) else self._requests.told_defaults,
            "max_body_size": self._max_body_size,
            "reasoning_efforts": [] if isinstance(self._requests, ChatError) else self._requests.prompts.efforts,
        }

    def _names(self) -> list[str]:
        return [*(path.name for path in self._models.base_model_paths), *self._models.lora_requests]

    def _adapter(self, name: str | None) -> "LoRARequest | None":
        """Find the LoRA adapter called `name`; None for the model itself."""
        adapters: dict[str, LoRARequest] = self._models.lora_requests
        if name is None or self._models.is_base_model(name):
            return None
        if name not in adapters:
            names = ", ".join(self._names())
            raise ChatError(f"model: there is no such model here, only {names}", param="model", status=404)
        return adapters[name]


def takes_images(config: Any) -> bool:
    """Tell whether a model with this configuration of vLLM's has a vision tower loaded."""
    return bool(config.multimodal_config and config.multimodal_config.get_limit_per_prompt("image"))


class AnswerResponse(Response):
    """One answer on its way to its client, as an ASGI application. A client that leaves aborts the request.

    Whole: one JSON object. Streamed: lines `{"reasoning"}` while the model thinks, a line `{"delta"}` for each piece of
    text, then one last line, with the finish reason and the usage or with the error. What fails before the first token
    has a status of its own.

    Args:
        outputs: of the engine.
        stream: whether the answer goes out piece by piece.
        answer: adds up the outputs.
    """

    def __init__(self, outputs: AsyncGenerator["RequestOutput"], stream: bool, answer: RunningAnswer) -> None:
        self.background = None
        self._outputs, self._stream, self._answer = outputs, stream, answer
        self._interval: float | None = None
        self._waiting: Callable[[], dict[str, Any]] = dict
        self._started = False

    def sign_of_life(self, interval: float, waiting: Callable[[], dict[str, Any]]) -> None:
        """Send a line each `interval` seconds until the first token: what `waiting` returns then."""
        self._interval, self._waiting = interval, waiting

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Answer in the current task. With a new task per request, a burst would be read completely before the first
        # request reaches the engine.
        answering = asyncio.current_task()
        assert answering

        def stop_answering(left: asyncio.Task[None]) -> None:
            if not left.cancelled():
                answering.cancel()

        leaving = asyncio.create_task(_disconnected(receive))
        leaving.add_done_callback(stop_answering)
        try:
            await self._send_answer(scope, receive, send)
        except asyncio.CancelledError:
            if not leaving.done():
                raise
            answering.uncancel()
        finally:
            leaving.cancel()

    async def _send_answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._outputs):
            try:
                output = await self._first_output(send)
                parts = [self._answer.add(output.outputs[0])]
                while not (self._stream or self._answer.finish_reason):
                    output = await anext(self._outputs)
                    parts.append(self._answer.add(output.outputs[0]))
                if output.finished:
                    await anext(self._outputs, None)  # the engine's generator ends by itself, not as if aborted
                reasoning, text = map("".join, zip(*parts, strict=True))
                if not self._stream:
                    whole = {"text": text, **({"reasoning": reasoning} if reasoning else {}), **self._answer.ending()}
                    return await JSONResponse(whole)(scope, receive, send)
            except Exception as error:
                if self._started:
                    return await _send_line(_to_chat_error(error).as_dict(), send, more_body=False)
                return await error_response(_to_chat_error(error))(scope, receive, send)
            await self._start(send)
            try:
                await _send_deltas(reasoning, text, send)
                while not self._answer.stopped and (output := await anext(self._outputs, None)):
                    await _send_deltas(*self._answer.add(output.outputs[0]), send)
                last_line = self._answer.ending()
            except Exception as error:
                last_line = _to_chat_error(error).as_dict()
            await _send_line(last_line, send, more_body=False)

    async def _first_output(self, send: Send) -> "RequestOutput":
        if self._interval is None:
            return await anext(self._outputs)
        coming = asyncio.ensure_future(anext(self._outputs))
        try:
            while not (await asyncio.wait((coming,), timeout=self._interval))[0]:
                await self._start(send)
                await _send_line(self._waiting(), send, more_body=True)
            return coming.result()
        finally:
            coming.cancel()
            await asyncio.wait((coming,))  # the generator can be closed only when it does not run

    async def _start(self, send: Send) -> None:
        if not self._started:
            self._started = True
            await send({"type": "http.response.start", "status": 200, "headers": NDJSON_HEADERS})


async def _send_deltas(reasoning: str, text: str, send: Send) -> None:
    if reasoning:
        await _send_line({"reasoning": reasoning}, send, more_body=True)
    if text:
        await _send_line({"delta": text}, send, more_body=True)


async def _send_line(line: dict[str, Any], send: Send, more_body: bool) -> None:
    body = one_line(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
    await send({"type": "http.response.body", "body": body, "more_body": more_body})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _to_chat_error(error: Exception) -> ChatError:
    """Tell a client the reason of an exception from the engine, never its internals."""
    match error:
        case ChatError():
            return error
        case GracefulHTTPError():
            return ChatError("the server is busy", "overloaded", status=error.http_status)
        case EngineDeadError():
            return ChatError("the engine has died; the server is stopping", "engine_error", status=503)
        case VLLMClientError():
            return ChatError(str(error)[:300])
    return ChatError("the engine failed on this request", "engine_error", status=500)


async def _busy(request: Request, error: GracefulHTTPError) -> Response:
    return error_response(_to_chat_error(error))


def _team(engine: "EngineClient", args: Namespace) -> Team:
    if not patches.TEAM.apply():
        raise RuntimeError("--key-file needs the version of vLLM that this project has pinned: see the log above")
    config = engine.vllm_config
    places = config.scheduler_config.max_num_seqs * config.parallel_config.data_parallel_size
    file = UsageFile(Path(args.usage_file), args.server_id)
    return Team(KeyRing(Path(args.key_file)), file, engine, args.queue_bound, places, args.served_model_name)


async def _announce(state: State) -> None:
    while not state.server.started:
        await asyncio.sleep(0.01)
    print(announcement(state.openai_serving_models.base_model_paths[0].name, state.args), file=sys.stderr, flush=True)


def announcement(name: str, args: Namespace) -> str:
    """Say how to use the server of the model `name`."""
    url = address(args.host or "", args.port, bool(args.ssl_certfile))
    ask = json.dumps({"query": "What is the capital of France?", "stream": True})
    openai = json.dumps({"model": name, "messages": [{"role": "user", "content": "Hello"}]})
    key = ' -H "Authorization: Bearer $QWEN_API_KEY"' if wants_key(args) else ""
    header = f"-H 'Content-Type: application/json'{key}"
    lines = [
        f"{name} is ready at {url}  (API: {url}/docs)",
        f"  curl -N {url}/chat {header} -d '{ask}'",
        f"  curl -N {url}/v1/chat/completions {header} -d '{openai}'",
        f"  python vllm_client.py --url {url}",
    ]
    return "\n".join(["", *lines, ""])
