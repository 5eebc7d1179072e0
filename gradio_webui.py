"""The chat in a browser, for many people at once.

python gradio_webui.py --server-url http://127.0.0.1:8000
"""

import argparse
import asyncio
import html
import json
import math
import os
import socket
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, suppress
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen_vllm.protocol import DEFAULT_SYSTEM, ChatError, Part, Sampling, ServerInfo, validated
from qwen_vllm.retry import retry_delay
from qwen_vllm.webui.answering import Line, Notice, Reply, _pump
from qwen_vllm.webui.conversation import Messages, _said, as_json, as_markdown, text_of, turns, with_images
from qwen_vllm.webui.words import WORDS, spoken
from vllm_client import DEFAULT_URL, server_info_async, stream_chat_async, stream_messages_async

REDRAW = 0.05
"""Seconds between two drawings of an answer that grows."""
CLOSE_TIMEOUT = 5
"""Seconds that open connections have when the page's server ends."""

LATEX = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
    {"left": "$", "right": "$", "display": False},
]
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


class Page:
    """The page's side of all conversations: asks the server at `url`, and keeps nothing of a conversation itself."""

    def __init__(self, url: str, api_key: str | None, title: str | None, language: str | None, line: Line) -> None:
        self._url, self._api_key, self._title, self._language, self._line = url, api_key, title, language, line
        self._info: ServerInfo | None = None
        self._answering: defaultdict[str, set[asyncio.Task]] = defaultdict(set)
        """By session: a tab's answers on their way."""

    def build(self) -> gr.Blocks:
        """The page's components, and what happens on each event."""
        with gr.Blocks(title=self._title or "Chat", analytics_enabled=False, fill_height=True) as page:
            self._lay_out(gr.I18n(**spoken(self._language)))
            self._connect(page)
        page.max_threads = self._line.limit + 1  # by default Gradio works on 40 events at once, and hides who waits
        return page.queue()

    def _lay_out(self, say: gr.I18n) -> None:
        with gr.Sidebar(elem_id="chats", open=False):
            self._new = gr.Button(say("new"), variant="primary", elem_id="new")
            self._earlier = gr.Radio([], label=say("earlier"), elem_id="earlier")
            with gr.Row():
                self._to_markdown = gr.Button(say("as_markdown"), size="sm", elem_id="to-markdown")
                self._to_json = gr.Button(say("as_json"), size="sm", elem_id="to-json")
            self._delete = gr.Button(say("delete"), size="sm", elem_id="delete")
        with gr.Sidebar(elem_id="settings", position="right", open=False):
            self._settings = [
                gr.Textbox(DEFAULT_SYSTEM, label=say("system"), lines=3, elem_id="system"),
                *(_field(name, say) for name in Sampling.model_fields),
            ]
        self._heading = gr.HTML(elem_id="heading")
        self._chat_id = gr.Textbox(visible="hidden", elem_id="chat-id")
        self._exported = gr.Textbox(visible="hidden")
        self._chat = gr.Chatbot(
            show_label=False,
            elem_id="chat",
            scale=1,
            editable="user",
            buttons=["copy"],
            feedback_options=None,
            group_consecutive_messages=False,  # so that an answer is copied without the thoughts before it
            placeholder=say("welcome"),
            latex_delimiters=LATEX,
        )
        self._figures = gr.Markdown(elem_id="figures")
        self._box = gr.MultimodalTextbox(
            show_label=False,
            elem_id="box",
            placeholder=say("ask"),
            sources=[],
            file_types=["image"],
            file_count="multiple",
            max_plain_text_length=10**9,  # or a long paste becomes a file
            autofocus=True,
        )

    def _connect(self, page: gr.Blocks) -> None:
        here, direct = [self._chat_id, self._chat], {"queue": False, "api_visibility": "private"}
        page.load(self.greet, None, [self._heading, self._box, *self._settings[1:]], **direct).then(
            js="() => { document.title = document.querySelector('#heading').textContent.trim(); }"
        )
        page.load(
            js="chats.restore", inputs=self._settings, outputs=[*here, self._figures, self._earlier, *self._settings]
        )
        page.unload(self.stop)
        self._chat.change(js="chats.save", inputs=here, outputs=[*here, self._figures, self._earlier])
        gr.on([setting.change for setting in self._settings], js="chats.keepSettings", inputs=self._settings)

        starts = [
            self._box.submit(begin, [self._box, self._chat], [self._box, self._chat], **direct),
            self._chat.retry(retry, self._chat, [self._box, self._chat], **direct),
            self._chat.edit(edit, self._chat, [self._box, self._chat], **direct),
        ]
        for start in starts:
            start.then(
                self.answer,
                [*here, *self._settings],
                [*here, self._figures],
                concurrency_limit=None,  # `Line` has the bounds, and tells people their places
                show_progress="hidden",
                api_visibility="private",
            ).then(ready, None, self._box, **direct).then(js="() => document.querySelector('#box textarea').focus()")
        self._box.stop(self.stop, **direct)
        self._chat.undo(undo, self._chat, [self._box, self._chat], **direct)

        shown = [*here, self._figures, self._earlier]
        self._new.click(self.stop, **direct).then(js="chats.fresh", outputs=shown)
        self._earlier.input(self.stop, **direct).then(js="chats.open", inputs=self._earlier, outputs=shown)
        self._delete.click(self.stop, **direct).then(js="chats.remove", inputs=self._chat_id, outputs=shown)
        for button, name, export in (
            (self._to_markdown, "chat.md", as_markdown),
            (self._to_json, "chat.json", as_json),
        ):
            button.click(export, [self._chat, self._settings[0]], self._exported, **direct).then(
                js=f"(text) => chats.download('{name}', text)", inputs=self._exported
            )

    async def greet(self) -> list[Any]:
        """What the server tells of itself as the page opens: its model's name, images or not, its defaults."""
        try:
            self._info = await server_info_async(self._url, self._api_key)
        except ChatError:
            self._info = None
        info = self._info or ServerInfo([])
        title = self._title or next(iter(info.models), "Chat")
        fields = [_default_shown(name, info) for name in Sampling.model_fields]
        box = gr.update(sources=["upload"] if info.images else [])
        return [f"<h1>{html.escape(title)}</h1>", box, *fields]

    async def stop(self, request: gr.Request) -> None:
        """Stops the answers to this tab, in the engine too."""
        for pump in self._answering.get(request.session_hash, ()):
            pump.cancel()

    def close(self) -> None:
        """Stops all answers."""
        for pump in set().union(*self._answering.values()):
            pump.cancel()

    async def answer(
        self, chat_id: str, messages: Messages, request: gr.Request, system: str, *sampling: str
    ) -> AsyncIterator[tuple[str, Messages, str]]:
        """Answers the question that the conversation ends with.

        Yields the chat's id, so that a late piece never ends up in another chat; the conversation as it grows; figures.
        """
        if not messages or messages[-1]["role"] != "user":
            return
        reply, arrived = Reply(self._words(request), self._info.context if self._info else None), asyncio.Queue()
        pump = asyncio.create_task(_pump(self._parts(messages, system, sampling, reply.words), arrived))
        self._answering[request.session_hash].add(pump)
        try:
            while not reply.ended:
                reply.add(*await arrived.get())
                while not arrived.empty():
                    reply.add(*arrived.get_nowait())
                yield chat_id, [*messages, *reply.messages()], reply.figures()
                await asyncio.sleep(REDRAW)
        finally:
            pump.cancel()
            self._answering[request.session_hash].discard(pump)
            if not self._answering[request.session_hash]:
                del self._answering[request.session_hash]

    async def _parts(
        self, messages: Messages, system: str, sampling: Sequence[str], words: dict[str, str]
    ) -> AsyncIterator[Notice | Part]:
        """The answer's parts; before them notices, while one stands in line or the server is busy."""
        wanted = sampling_of(sampling)
        with self._line.ticket() as ticket:
            async for place in self._line.places(ticket):
                yield Notice(words["place"].format(place=place))
            for attempt in count(1):
                try:
                    async with aclosing(self._ask(messages, system, wanted)) as parts:
                        async for part in parts:
                            yield part
                    return
                except ChatError as error:
                    delay = retry_delay(error, attempt)
                    if delay is None:
                        raise
                for seconds in range(math.ceil(delay), 0, -1):
                    yield Notice(words["busy"].format(seconds=seconds))
                    await asyncio.sleep(1)

    def _ask(self, messages: Messages, system: str, sampling: Sampling) -> AsyncIterator[Part]:
        if any(part["type"] == "file" for message in messages for part in message["content"]):
            asked = [{"role": "system", "content": system}, *with_images(messages)]
            return stream_messages_async(self._url, asked, sampling, self._api_key)
        return stream_chat_async(
            self._url, text_of(messages[-1]), turns(messages[:-1]), system, sampling, self._api_key
        )

    def _words(self, request: gr.Request) -> dict[str, str]:
        """What to say to who asks: in the language of the page, or else of the browser."""
        language = self._language or request.headers.get("accept-language", "")
        return WORDS["zh" if language.lower().startswith("zh") else "en"]


def _field(name: str, say: gr.I18n) -> gr.components.Component:
    """The field of the settings for one sampling parameter; empty, it leaves the value to the server."""
    look = {"label": name, "info": say(f"{name}_info"), "elem_id": name}
    match name:
        case "stop":
            return gr.Textbox(lines=2, **look)
        case "model":
            return gr.Dropdown([], value=None, allow_custom_value=True, visible=False, **look)
        case "enable_thinking":
            return gr.Radio([(say("default"), ""), (say("on"), "true"), (say("off"), "false")], value="", **look)
    return gr.Textbox(placeholder=say("default"), max_lines=1, **look)


def _default_shown(name: str, info: ServerInfo) -> dict[str, Any]:
    """The field's update that shows what the server does where the field is empty."""
    if name == "model":
        return gr.update(choices=info.models, visible=len(info.models) > 1)
    return gr.update(placeholder=str(info.defaults[name])) if name in info.defaults else gr.skip()


def sampling_of(values: Sequence[Any]) -> Sampling:
    """The sampling parameters from the fields of the settings, in the protocol's order.

    Raises:
        ChatError: naming the parameter whose value is not allowed.
    """
    filled = {name: value for name, value in zip(Sampling.model_fields, values, strict=True) if value}
    return validated(Sampling, {name: _parsed(name, value) for name, value in filled.items()})


def _parsed(name: str, value: str) -> Any:
    match name:
        case "model":
            return value
        case "stop":
            return [word for word in value.splitlines() if word]
    try:
        return json.loads(value)
    except ValueError:
        return value  # which the protocol refuses in plain words


BUSY_BOX = {"interactive": False, "submit_btn": False, "stop_btn": True}


def begin(asked: dict[str, Any], messages: Messages) -> tuple[Any, Messages]:
    """Moves the question from the box into the conversation."""
    text = _said("user", asked["text"])["content"] if asked["text"].strip() else []
    content = [{"path": path} for path in asked["files"]] + text
    question = [{"role": "user", "content": content}] if content else []
    return gr.update(value=None, **BUSY_BOX), [*messages, *question]


def retry(messages: Messages, data: gr.RetryData) -> tuple[Any, Messages]:
    """The conversation up to the question that is to be answered again."""
    return gr.update(**BUSY_BOX), messages[: data.index + 1]


def edit(messages: Messages, data: gr.EditData) -> tuple[Any, Messages]:
    """The conversation up to the question that was edited, and that as it is now."""
    return gr.update(**BUSY_BOX), [*messages[: data.index], _said("user", data.value)]


def undo(messages: Messages, data: gr.UndoData) -> tuple[Any, Messages]:
    """Moves the last question back into the box; its answer goes."""
    return gr.update(value={"text": text_of(messages[data.index]), "files": []}), messages[: data.index]


def ready() -> Any:
    """The box as it is while no answer comes."""
    return gr.update(interactive=True, submit_btn=True, stop_btn=False)


class LocalOnly:
    """ASGI middleware that lets the page load from, and send to, its own server alone, whatever an answer holds."""

    POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; form-action 'self'; base-uri 'self'"

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", self.POLICY)]
            await send(message)

        await self._app(scope, receive, guarded if scope["type"] == "http" else send)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The program's flags; `auth` holds (user, password) pairs."""
    parser = argparse.ArgumentParser(prog="gradio_webui.py", description="Chat with a server in the browser.")
    default = os.environ.get("QWEN_URL", DEFAULT_URL)
    parser.add_argument("--server-url", default=default, help="the model server (default: %(default)s)")
    parser.add_argument("--api-key", default=os.environ.get("QWEN_API_KEY"), help="its key; default: $QWEN_API_KEY")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="default: %(default)s")
    parser.add_argument("--root-path", default="", help="path under which a proxy serves the page, such as /chat")
    parser.add_argument("--ssl-certfile", help="certificate, for https")
    parser.add_argument("--ssl-keyfile", help="its private key")
    parser.add_argument(
        "--auth", action="append", default=[], metavar="USER:PASSWORD", help="who may enter; repeatable"
    )
    parser.add_argument("--auth-file", type=Path, help="the same, a line each")
    parser.add_argument("--title", help="default: the model's name")
    parser.add_argument("--lang", choices=tuple(WORDS), help="language of the page (default: the browser's)")
    parser.add_argument("--concurrency", type=int, default=64, help="answers at once (default: %(default)s)")
    parser.add_argument("--queue", type=int, default=256, help="people who may wait in line (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.concurrency < 1 or args.queue < 0:
        parser.error("--concurrency must be at least 1, --queue at least 0")
    try:
        lines = args.auth + (args.auth_file.read_text().split("\n") if args.auth_file else [])
    except OSError as error:
        parser.error(f"--auth-file: {args.auth_file}: {error.strerror}")
    args.auth = [tuple(line.strip().partition(":")[::2]) for line in lines if line.strip()]
    if not all(user and password for user, password in args.auth):
        parser.error("--auth and the lines of --auth-file have the form USER:PASSWORD")
    for flag, file in (("--ssl-certfile", args.ssl_certfile), ("--ssl-keyfile", args.ssl_keyfile)):
        if file and not Path(file).is_file():
            parser.error(f"{flag}: there is no file {file}")
    args.server_url = args.server_url.rstrip("/")
    return args


def build_app(args: argparse.Namespace) -> FastAPI:
    """The page as an ASGI application."""
    style, script = (files("qwen_vllm.webui").joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.state.page = Page(args.server_url, args.api_key, args.title, args.lang, Line(args.concurrency, args.queue))
    app.add_middleware(LocalOnly)
    return gr.mount_gradio_app(
        app,
        app.state.page.build(),
        path="/",
        auth=args.auth or None,
        root_path=args.root_path,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        show_error=False,
        max_file_size="20mb",
        i18n=gr.I18n(**spoken(args.lang)),
        theme=THEME,
        css=style,
        head=f"<script>const WORDS = {json.dumps(spoken(args.lang))};\n{script}</script>",
    )


class PageServer(uvicorn.Server):
    """uvicorn, for the app of `build_app`. Streams to open tabs would keep it from ending: they are ended first."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops the answers on their way, so that they end in order, and then the server."""
        self.config.app.state.page.close()
        self.config.app.routes[-1].app.stop_event.set()  # Gradio's heartbeats
        await super().shutdown(sockets)


def main(argv: Sequence[str] | None = None) -> int:
    """Serves the page until Ctrl-C; returns the exit status."""
    args = parse_args(argv)
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    try:
        listener = socket.create_server((args.host, args.port), family=family)
    except OSError as error:
        print(
            f"gradio_webui.py: cannot listen on {args.host}:{args.port} ({error.strerror}): choose another --port",
            file=sys.stderr,
        )
        return 1
    config = uvicorn.Config(
        build_app(args),
        log_level="warning",
        timeout_graceful_shutdown=CLOSE_TIMEOUT,
        ssl_certfile=args.ssl_certfile,
        ssl_keyfile=args.ssl_keyfile,
    )
    if args.host not in ("127.0.0.1", "localhost", "::1") and not args.auth:
        print(f"Warning: {args.host} can be reached from other machines, and no --auth is set.", file=sys.stderr)
    host = f"[{args.host}]" if ":" in args.host else args.host
    scheme, port = "https" if args.ssl_certfile else "http", listener.getsockname()[1]
    print(f"The page is at {scheme}://{host}:{port}{args.root_path}  (Ctrl-C ends it)", flush=True)
    with suppress(KeyboardInterrupt):  # which uvicorn raises again when it has ended
        PageServer(config).run(sockets=[listener])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
