"""The server: vLLM's own, with our defaults and one more endpoint, POST /chat.

`python vllm_server.py` resolves the model, fills in defaults and starts `vllm serve`, which loads `ChatEndpoint` as
an endpoint plugin in every front-end process (see `pyproject.toml`). vLLM gives the OpenAI routes and all its flags.
"""

import asyncio
import json
import os
import signal
import socket
import sys
from argparse import Namespace
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
from fastapi import FastAPI
from starlette.datastructures import State
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from prompt_utils import Prompt
from qwen_vllm.hardware import (
    engine_defaults,
    environment_defaults,
    fill_in,
    graph_defaults,
    server_defaults,
    set_environment,
    table,
    values,
)
from qwen_vllm.models.resolve import (
    HUBS,
    ModelUnavailable,
    RequestBuilder,
    check_adapters,
    check_loadable,
    number_format,
    read_chat_template,
    resolve_model,
)
from qwen_vllm.protocol import ChatError, ChatRequest, reason_of, validated
from qwen_vllm.reasoning import ThoughtSplitter, parser_for_folder
from qwen_vllm.server.guard import Guard, error_response
from qwen_vllm.server.lifecycle import Lifecycle

if TYPE_CHECKING:
    from vllm import RequestOutput
    from vllm.engine.protocol import EngineClient
    from vllm.exceptions import GracefulHTTPError
    from vllm.lora.request import LoRARequest

PLUGIN = "qwen_chat"
LIMITS = (
    ("--max-body-size", int, 2**20, "largest body of a request in bytes; more for images"),
    ("--header-timeout", float, 10.0, "seconds in which the head of a request must have come"),
    ("--body-timeout", float, 30.0, "seconds in which its body must have come"),
    ("--write-timeout", float, 30.0, "seconds after which a client that takes nothing is cut off"),
    ("--stall-timeout", float, 300.0, "seconds that one step of the engine may take before the server ends; 0: any"),
)
LONG_TEXT = 8192
"""From this many characters a prompt is built on a thread, so that other streams do not wait for it."""


class ChatEndpoint:
    """`POST /chat`, as a vLLM endpoint plugin."""

    name = PLUGIN
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Adds the routes and what they accept to the API's description; gives errors of all routes our shape."""
        from vllm.entrypoints.serve.exception_handling.handlers.http import http_exception_handler
        from vllm.exceptions import GracefulHTTPError

        app.exception_handler(HTTPException)(http_exception_handler)
        app.exception_handler(GracefulHTTPError)(_busy)
        self._vllm_lifespan, app.router.lifespan_context = app.router.lifespan_context, self._lifespan
        schema = ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        described = {"methods": ["POST"], "response_model": None, "openapi_extra": {"requestBody": body}}
        app.add_api_route("/chat", self.chat, **described)
        # This one answers. It goes first: the router and the metrics both try one route after the other, and vLLM has
        # many. And it is a plain one: FastAPI's would look for parameters that there are not.
        app.router.routes.insert(0, Route("/chat", self.chat, methods=["POST"]))
        app.add_api_route("/chat/info", self.info, methods=["GET"])

        app.add_api_route("/ready", lambda: self._lifecycle.readiness(), methods=["GET"], response_model=None)

    async def init_state(self, engine_client: "EngineClient", state: State, args: Namespace) -> None:
        """Takes hold of the running engine; called by vLLM before the server listens."""
        from vllm.envs import enable_envs_cache

        enable_envs_cache()  # as the engine's process does: else a variable is looked up for each token
        self._engine = engine_client
        self._models = state.openai_serving_models
        self._requests, self._no_chat = None, None
        try:
            self._requests = RequestBuilder(
                engine_client.model_config,
                engine_client.get_tokenizer(),
                read_chat_template(args.chat_template),
                args.default_chat_template_kwargs or {},
                args.reasoning_parser,
            )
        except ChatError as reason:
            self._no_chat = reason
            print(f"/chat is off: {reason.message}", file=sys.stderr)
        self._lifecycle = Lifecycle(engine_client, state, args)
        self._state, self._args = state, args

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """vLLM's own lifespan, and in it what has to be set between building the server and listening."""
        async with self._vllm_lifespan(app):
            self._lifecycle.begin()
            if self._state.vllm_config.parallel_config._api_process_rank <= 0:
                self._announcing = asyncio.create_task(self._announce())
            yield

    async def _announce(self) -> None:
        while not self._state.server.started:
            await asyncio.sleep(0.01)
        announce(self._state, self._args)

    async def chat(self, request: Request) -> Response:
        """Answers a query in the light of its history, whole or streamed as newline-delimited JSON."""
        try:
            if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                raise ChatError("send the request as Content-Type: application/json", status=415)
            chat: ChatRequest = validated(ChatRequest, await request.body())
            if self._no_chat:
                raise self._no_chat
            adapter = self._adapter(chat.model)
            length = len(chat.system) + len(chat.query) + sum(len(user) + len(answer) for user, answer in chat.history)
            if length < LONG_TEXT:
                prompt, params = self._requests.build(chat, chat.stream)
            else:
                prompt, params = await asyncio.to_thread(self._requests.build, chat, chat.stream)
        except ChatError as error:
            return error_response(error)
        from vllm.inputs.engine import tokens_input

        # What has a type goes to the engine at once; vLLM sends anything else through a thread first.
        outputs = self._engine.generate(
            tokens_input(prompt.token_ids), params, f"chat-{os.urandom(16).hex()}", lora_request=adapter
        )
        return Answer(outputs, chat.stream, prompt, self._requests.splitter(prompt))

    async def info(self) -> dict[str, Any]:
        """What a client may want to show before it asks: models, context in tokens, defaults of `/chat`, limits."""
        config = self._engine.model_config
        return {
            "models": self._names(),
            "context": config.max_model_len,
            "images": config.is_multimodal_model,
            "defaults": self._requests.defaults if self._requests else {},
            "max_body_size": self._args.max_body_size,
        }

    def _names(self) -> list[str]:
        return [*(path.name for path in self._models.base_model_paths), *self._models.lora_requests]

    def _adapter(self, name: str | None) -> "LoRARequest | None":
        """The LoRA adapter called `name`; None for the model itself."""
        adapters = self._models.lora_requests
        if name is None or self._models.is_base_model(name):
            return None
        if name not in adapters:
            names = ", ".join(self._names())
            raise ChatError(f"model: there is no such model here, only {names}", param="model", status=404)
        return adapters[name]


class Answer(Response):
    """One answer on its way to its client, as an ASGI application. A client that leaves aborts the request.

    Whole: one JSON object. Streamed: lines `{"reasoning"}` while the model thinks, a line `{"delta"}` for each piece of
    text, then one last line, with the finish reason and the usage or with the error. What fails before the first token
    has a status of its own.
    """

    def __init__(
        self, outputs: AsyncGenerator["RequestOutput"], stream: bool, prompt: Prompt, splitter: ThoughtSplitter
    ) -> None:
        self.background = None
        self._outputs, self._stream, self._prompt, self._splitter = outputs, stream, prompt, splitter
        self._completion_tokens = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Not in a task of its own: of many requests at once the engine has the first before the last is read.
        answering = asyncio.current_task()
        leaving = asyncio.create_task(_disconnected(receive))
        leaving.add_done_callback(lambda left: left.cancelled() or answering.cancel())
        try:
            await self._answer(scope, receive, send)
        except asyncio.CancelledError:
            if not leaving.done():
                raise
            answering.uncancel()
        finally:
            leaving.cancel()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._outputs):
            try:
                output = await anext(self._outputs)
                reasoning, text = self._split(output)
                if output.finished:
                    ending = self._ending(output)
                    await anext(self._outputs, None)  # the engine's generator ends by itself, not as if aborted
                if not self._stream:
                    thought = {"reasoning": reasoning} if reasoning else {}
                    return await JSONResponse({"text": text, **thought, **ending})(scope, receive, send)
            except Exception as error:
                return await error_response(_explained(error))(scope, receive, send)
            await send({"type": "http.response.start", "status": 200, "headers": NDJSON_HEADERS})
            try:
                await _send_deltas(reasoning, text, send)
                async for output in self._outputs:
                    await _send_deltas(*self._split(output), send)
                last_line = self._ending(output)
            except Exception as error:
                last_line = _explained(error).as_dict()
            await _send_line(last_line, send, more_body=False)

    def _split(self, output: "RequestOutput") -> tuple[str, str]:
        """(what is new of the thought, what is new of the text)"""
        completion = output.outputs[0]
        self._completion_tokens += len(completion.token_ids)
        return self._splitter.split(completion.text, completion.token_ids, output.finished)

    def _ending(self, output: "RequestOutput") -> dict[str, Any]:
        completion = output.outputs[0]
        if completion.finish_reason not in ("stop", "length"):
            raise ChatError(
                "the server is stopping, or gave this request up: send it again", "engine_error", status=503
            )
        return {
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason if isinstance(completion.stop_reason, str) else None,
            "usage": {
                "prompt_tokens": len(self._prompt.token_ids),
                "completion_tokens": self._completion_tokens,
                "reasoning_tokens": self._splitter.tokens,
            },
            "dropped_turns": self._prompt.dropped_turns,
        }


NDJSON_HEADERS = [
    (b"content-type", b"application/x-ndjson"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # or nginx holds the lines back
]


async def _send_deltas(reasoning: str, text: str, send: Send) -> None:
    if reasoning:
        await _send_line({"reasoning": reasoning}, send, more_body=True)
    if text:
        await _send_line({"delta": text}, send, more_body=True)


async def _send_line(line: dict[str, Any], send: Send, more_body: bool) -> None:
    body = orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)
    await send({"type": "http.response.body", "body": body, "more_body": more_body})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _explained(error: Exception) -> ChatError:
    """What the client is told of an exception from the engine: the reason, never its internals."""
    from vllm.exceptions import GracefulHTTPError, VLLMClientError
    from vllm.v1.engine.exceptions import EngineDeadError

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


async def _busy(request: Request, error: "GracefulHTTPError") -> Response:
    return error_response(_explained(error))


def announce(state: State, args: Namespace) -> None:
    """Prints how to use the server."""
    host = "127.0.0.1" if args.host in (None, "", "0.0.0.0", "::") else args.host
    host = f"[{host}]" if ":" in host else host
    url = f"http{'s' if args.ssl_certfile else ''}://{host}:{args.port}"
    name = state.openai_serving_models.base_model_paths[0].name
    ask = json.dumps({"query": "What is the capital of France?", "stream": True})
    openai = json.dumps({"model": name, "messages": [{"role": "user", "content": "Hello"}]})
    key = ' -H "Authorization: Bearer $QWEN_API_KEY"' if args.api_key or os.environ.get("VLLM_API_KEY") else ""
    header = f"-H 'Content-Type: application/json'{key}"
    lines = [
        f"{name} is ready at {url}  (API: {url}/docs)",
        f"  curl -N {url}/chat {header} -d '{ask}'",
        f"  curl -N {url}/v1/chat/completions {header} -d '{openai}'",
        f"  python vllm_client.py --url {url}",
    ]
    print("\n".join(["", *lines, ""]), file=sys.stderr, flush=True)


def parse_args(argv: list[str] | None = None) -> Namespace:
    """Every flag of `vllm serve`, with our defaults, and --model_path as another name for --model."""
    from vllm.config import StructuredOutputsConfig
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(
        FlexibleArgumentParser(
            prog="vllm_server.py",
            description="Serves a chat model: POST /chat and the OpenAI API. Takes every flag of `vllm serve`.",
        )
    )
    parser.add_argument("--model-path", dest="model", help="another name for --model")
    parser.add_argument("--hub", choices=HUBS, default="modelscope", help="where a model that is no folder comes from")
    for flag, kind, default, text in LIMITS:
        parser.add_argument(flag, type=kind, default=default, help=f"{text} (default: {default})")
    parser.add_argument(
        "--show-defaults", action="store_true", help="print what is chosen for this hardware, and why, and end"
    )
    parser.set_defaults(
        # The one of vLLM's grammar engines that bounds its own work: a pattern can occupy others for ever.
        structured_outputs_config=StructuredOutputsConfig(backend="guidance"),
        # vLLM would fetch media from any address that a request names; it quotes this list where it refuses.
        allowed_media_domains=["none, unless --allowed-media-domains names some"],
        # vLLM would take 999 of each in one request.
        limit_mm_per_prompt={"image": 16, "video": 1, "audio": 1},
        model=None,
        host="127.0.0.1",
        h11_max_incomplete_event_size=2**16,
        h11_max_header_count=100,
        **values(engine_defaults()),
    )
    args = parser.parse_args(argv)
    chosen = [*engine_defaults(), *graph_defaults(args), *server_defaults(args)]
    fill_in(args, chosen)
    if args.show_defaults:
        print(table(args, [*environment_defaults(), *chosen]))
        sys.exit()
    _check_port(args)
    args.middleware = [*args.middleware, f"{Guard.__module__}.{Guard.__name__}"]
    name = args.model_tag or args.model
    args.model = args.model_tag = resolve_model(name, args.hub)
    # The name that clients see: an id as it is, of a folder no more than its last part.
    is_id = name and not Path(name).expanduser().is_dir()
    args.served_model_name = args.served_model_name or [name if is_id else Path(args.model).resolve().name]
    check_loadable(args)
    _check_adapters(args)
    args.dtype = number_format(args)
    template = read_chat_template(args.chat_template)
    validate_parsed_serve_args(args)
    args.reasoning_parser = args.reasoning_parser or parser_for_folder(
        Path(args.tokenizer or args.model),
        template,
        args.default_chat_template_kwargs or {},
        args.trust_remote_code,
    )
    return args


def _check_adapters(args: Namespace) -> None:
    adapters = args.lora_modules or []
    if adapters and not args.enable_lora:
        raise ModelUnavailable("--lora-modules needs --enable-lora")
    for adapter in adapters:
        adapter.path = str(Path(adapter.path).expanduser())
    check_adapters({adapter.name: adapter.path for adapter in adapters}, args)
    names = [*args.served_model_name, *(adapter.name for adapter in adapters)]
    if len(set(names)) < len(names):
        raise ModelUnavailable(f"two of these have the same name: {', '.join(names)}; choose others in --lora-modules")


def _check_port(args: Namespace) -> None:
    """Ends the program where the port is taken, before anything is fetched or loaded."""
    if args.uds or args.headless:
        return
    family = socket.AF_INET6 if ":" in (args.host or "") else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((args.host or "", args.port))
        except OSError as error:
            sys.exit(
                f"vllm_server.py: cannot listen on {args.host}:{args.port} ({error.strerror}): choose another --port"
            )


def main(argv: list[str] | None = None) -> None:
    """Starts the server and returns when it has stopped."""
    # Until the server listens: end in order, leaving no half-made model and no engine behind.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    if not entry_points(group="vllm.endpoint_plugins", name=PLUGIN):
        sys.exit("vllm_server.py is not installed here yet: run `make setup`, or `pip install --no-deps -e .`")
    set_environment()
    from vllm import envs
    from vllm.entrypoints.cli import serve
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args

    os.environ["VLLM_PLUGINS"] = ",".join([*_other_plugins(envs.VLLM_PLUGINS), PLUGIN])
    cli_env_setup()
    try:
        args = parse_args(argv)
    except ModelUnavailable as error:
        sys.exit(f"vllm_server.py: {error}")
    configure_logging_from_args(args)
    if args.host not in ("127.0.0.1", "localhost", "::1") and not (args.api_key or envs.VLLM_API_KEY):
        print(
            f"Warning: {args.host or 'all addresses'} can be reached from other machines, and no --api-key is set.",
            file=sys.stderr,
        )
    args.stopped = False
    # vLLM's own turns a signal into a KeyboardInterrupt, which is lost where it waits for the engine to load.
    serve.run_server = _run_server
    try:
        serve.ServeSubcommand.cmd(args)
    except Exception as error:
        sys.exit(f"vllm_server.py: the server could not go on: {reason_of(error)}")
    if not args.stopped:
        sys.exit("vllm_server.py: the engine has died; the log above says why")


async def _run_server(args: Namespace) -> None:
    """vLLM's server with one front end, which leaves our signal handlers as they are."""
    from vllm.entrypoints.launchers.api_server.entry import run_server_worker, setup_server

    await run_server_worker(*setup_server(args, reuse_port=False), args)


def _other_plugins(allowed: list[str] | None) -> list[str]:
    """The plugins that vLLM would load without ours: naming one shuts out all that are not named."""
    if allowed is not None:
        return allowed
    groups = ("general", "platform", "io_processor", "stat_logger")
    return sorted({plugin.name for group in groups for plugin in entry_points(group=f"vllm.{group}_plugins")})


if __name__ == "__main__":
    main()
