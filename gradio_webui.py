"""Serves a page to chat in the browser, for many people at once.

python gradio_webui.py --server-url http://127.0.0.1:8000
"""

import argparse
import asyncio
import html
import json
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any
from uuid import uuid4

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen_vllm.flags import Help
from qwen_vllm.network import THIS_MACHINE, address, listen
from qwen_vllm.protocol import DEFAULT_SYSTEM, ChatError, Sampling, ServerInfo
from qwen_vllm.webui import UNQUEUED, mended
from qwen_vllm.webui import gradio as gr
from qwen_vllm.webui.answering import AnswerStreams, Reply, WaitingLine, settings_of
from qwen_vllm.webui.chat_list import ChatList
from qwen_vllm.webui.conversation import (
    Messages,
    as_json,
    as_markdown,
    asked_text_of,
    documents_of,
    images_of,
    question,
    size_of,
    unframed,
)
from qwen_vllm.webui.documents import DocumentFields, Documents
from qwen_vllm.webui.markdown import LATEX, written
from qwen_vllm.words import WORDS, Words, choose_language, say, words_for
from vllm_client import DEFAULT_URL, server_info_async

REDRAW = 0.05
"""Seconds between two drawings of a growing answer while it is short."""
QUICKLY_DRAWN = 20_000
"""Characters. Gradio reads the whole answer for each drawing: one longer by this is drawn half as often."""
LONGEST_DRAWING = 10.0
"""Seconds that a drawing waits for the browser to be done with the one before: a slow one would lag more and more."""
SCRIPTS = ("mended.js", "branches.js", "store.js", "page.js", "versions.js", "transfer.js", "documents.js")
DEPTH = ("reasoning_effort", "thinking_budget")
"""The sampling parameters whose fields stand before the others."""
CLOSE_TIMEOUT = 5
"""Seconds that open connections have when the page's server ends."""
BUSY_BOX: dict[str, Any] = {"interactive": False, "submit_btn": False, "stop_btn": True}


class Components:
    """The page's components, in the order in which they stand on it. Made inside `gr.Blocks`, which adds them."""

    def __init__(self, say: Callable[[str], Any]) -> None:
        self.chats = ChatList(say)
        with gr.Sidebar(elem_id="settings", position="right", open=False):
            self.system = gr.Textbox(DEFAULT_SYSTEM, label=say("system"), lines=3, elem_id="system")
            fields = {name: _field(name, say) for name in dict.fromkeys((*DEPTH, *Sampling.model_fields))}
            self.sampling = [fields[name] for name in Sampling.model_fields]
        # All of them as one input: Gradio handles the state of each input at each step of an event.
        self.settings = gr.Textbox(visible="hidden")
        self.heading = gr.HTML(elem_id="heading")
        gr.HTML("<div role=alert></div>", elem_id="notice")
        self.chat_id = gr.Textbox(visible="hidden", elem_id="chat-id")
        self.turn_id = gr.Textbox(visible="hidden")
        self.exported = gr.Textbox(visible="hidden")
        look: dict[str, Any] = {
            "show_label": False,
            "height": None,
            "feedback_options": None,
            "latex_delimiters": LATEX,
            "autoscroll": False,  # `#talk` scrolls, and stays at its end by itself
        }
        look |= {"group_consecutive_messages": False}  # an answer is copied without the reasoning before it
        with gr.Column(scale=1, elem_id="talk"), gr.Column():
            self.more = gr.Button(say("more"), size="sm", elem_id="more")
            self.chat = gr.Chatbot(
                elem_id="chat", editable="user", buttons=["copy"], placeholder=say("welcome"), **look
            )
            # Gradio reads all of a chatbot's messages for each drawing: the turn on its way has one of its own.
            self.running = gr.Chatbot(elem_id="running", buttons=[], **look)
        self.figures = gr.Markdown(elem_id="figures")
        self.documents = DocumentFields()
        self.box = gr.MultimodalTextbox(
            show_label=False,
            elem_id="box",
            placeholder=say("ask"),
            sources=["upload"],
            file_count="multiple",
            max_plain_text_length=10**9,  # a long paste stays text; by default Gradio makes a file of it
            interactive=False,  # until the browser has restored its chat: a question before that would be lost
        )


def _field(name: str, say: Callable[[str], Any]) -> gr.components.Component:
    """Return the settings' field for a sampling parameter. An empty field leaves the value to the server."""
    look: dict[str, Any] = {"label": name, "info": say(f"{name}_info"), "elem_id": name}
    match name:
        case "stop":
            return gr.Textbox(lines=2, **look)
        case "model" | "reasoning_effort":
            return gr.Dropdown([], value="", allow_custom_value=True, visible=False, **look)
        case "enable_thinking":
            return gr.Textbox(visible=False, **look)  # the menu of `reasoning_effort` has it
    return gr.Textbox(placeholder=say("default"), max_lines=1, **look)


def _offered(name: str, info: ServerInfo, words: Words) -> dict[str, Any]:
    """Return the update of a field: a menu's choices, or what the server does where the field is empty."""
    match name:
        case "model":
            return _menu(info.models if len(info.models) > 1 else [])
        case "reasoning_effort":
            may_choose = "enable_thinking" in info.defaults
            levels = [(level, level) for level in info.reasoning_efforts] or [(words["on"], "on")] * may_choose
            depths = [(words["off"], "off")] * may_choose + levels
            return _menu([(words["default"], ""), *depths] if depths else [])
        case "enable_thinking":
            return gr.update(value="")
    return gr.update(placeholder=str(info.defaults[name])) if name in info.defaults else gr.skip()


def _menu(choices: list[Any]) -> dict[str, Any]:
    """Return the update of a menu. One without choices is hidden, and forgets the choice for another server."""
    return gr.update(choices=choices, visible=True) if choices else gr.update(value="", visible=False)


class Page:
    """The page in front of the model server at `url`. It keeps nothing of a conversation itself."""

    def __init__(
        self, url: str, api_key: str | None, title: str | None, language: str | None, line: WaitingLine
    ) -> None:
        self._url, self._api_key, self._title, self._language = url, api_key, title, language
        self.streams, self._documents = AnswerStreams(url, api_key, line), Documents(url, api_key)
        self._info = ServerInfo([])

    def build(self) -> gr.Blocks:
        """Return the page's components, with what happens on each event."""
        with gr.Blocks(title=self._title or "Chat", analytics_enabled=False, fill_height=True) as page:
            self._connect(page, Components(gr.I18n(**words_for(self._language))))
        # By default Gradio works on 40 events at once, and hides who waits.
        page.max_threads = self.streams.line.limit + 1
        return page.queue()

    def _connect(self, page: gr.Blocks, on: Components) -> None:
        settings, asking = [on.system, *on.sampling], [on.box, on.chat, on.running, on.turn_id]
        documents = on.documents
        attaching, attached = [on.box, *documents.inputs, on.settings], documents.shown
        here = [on.chat_id, on.chat, on.running]
        shown = [*here, on.figures, on.chats.earlier]
        restored = page.load(js="chats.restore", inputs=settings, outputs=[*shown, *settings, on.settings])
        restored.then(ready, None, on.box, **UNQUEUED).then(js="focusBox")
        restored.then(self.greet, None, [on.heading, *on.sampling], **UNQUEUED).then(js="showTitle")
        page.unload(self.stop)
        on.chat.change(js="chats.save", inputs=here[:2], outputs=shown)
        on.running.change(js="chats.grow", inputs=[on.chat_id, on.running])  # outputs would be copied for each piece
        on.running.change(self.drawn, js="painted", **UNQUEUED)
        gr.on([setting.change for setting in settings], js="chats.keepSettings", inputs=settings, outputs=on.settings)

        begun = [on.box, on.running, on.turn_id, documents.dropped, *attached]
        on.box.submit(self.begin, attaching, begun, **UNQUEUED)
        on.chat.retry(retry, on.chat, asking, **UNQUEUED)
        on.chat.edit(edit, on.chat, asking, js="chats.edited", **UNQUEUED)
        # Not `.then` of these: what follows a refused question would still be under way as the next one is asked.
        on.turn_id.change(
            self.answer,
            [*here, on.settings],
            [on.chat_id, on.running, on.figures],
            js="(id, messages, ...rest) => [id, chats.withEarlier(messages), ...rest]",
            concurrency_limit=None,  # `WaitingLine` has the bounds, and tells people their places
            show_progress_on=(),  # else Gradio handles the state of each output for each piece
            api_visibility="private",
        ).then(js="chats.finish", inputs=[*here, on.figures], outputs=here[1:]).then(
            ready, None, on.box, **UNQUEUED
        ).then(js="focusBox")
        on.box.stop(self.stop, **UNQUEUED)
        on.more.click(js="chats.more", outputs=on.chat)
        on.chat.undo(undo, on.chat, [on.box, on.chat, documents.dropped], **UNQUEUED)
        taken = [on.box, documents.dropped, documents.told]
        on.box.change(js="documents.take", inputs=taken[:2], outputs=taken)
        documents.cards.input(js="documents.keep", inputs=[documents.cards, taken[1]], outputs=taken[1])
        documents.dropped.change(self.attach, attaching, attached, **UNQUEUED)

        on.chats.connect(shown, self.stop)
        for button, export, save in (
            (on.chats.to_markdown, as_markdown, "chats.saveMarkdown"),
            (on.chats.to_json, as_json, "chats.saveJson"),
        ):
            whole = "(messages, system) => [chats.withEarlier(messages), system]"
            exported = button.click(export, [on.chat, on.system], on.exported, js=whole, **UNQUEUED)
            exported.then(js=save, inputs=on.exported)

    async def greet(self, request: gr.Request) -> list[Any]:
        """Return what the server tells of itself as the page opens: its model's name, images or not, its defaults."""
        try:
            self._info = await server_info_async(self._url, self._api_key)
        except ChatError:
            self._info = ServerInfo([])
        info = self._info
        title = self._title or next(iter(info.models), "Chat")
        words = self._words(request)
        fields = [_offered(name, info, words) if info.models else gr.skip() for name in Sampling.model_fields]
        return [f"<h1{' data-images' * info.images}>{html.escape(title)}</h1>", *fields]

    async def attach(
        self,
        asked: dict[str, Any],
        dropped: str,
        known: str,
        agreed: bool,
        settings: str,
        request: gr.Request,
    ) -> list[Any]:
        """Read the documents that were dropped, and show them."""
        attached = await self._documents.attached(dropped, known, asked["text"], settings_of(settings), self._info)
        return attached.updates(self._words(request))

    async def begin(
        self,
        asked: dict[str, Any],
        dropped: str,
        known: str,
        agreed: bool,
        settings: str,
        request: gr.Request,
    ) -> list[Any]:
        """Move the question and its documents into the turn that begins, unless they do not fit, or are not read."""
        words = self._words(request)
        attached = await self._documents.attached(dropped, known, asked["text"], settings_of(settings), self._info)
        if attached.is_news or not (attached.fits or (agreed and attached.room)):
            hint = "" if attached.fits else words["documents_unsent"]
            return [*[gr.skip()] * 4, *attached.updates(words, agreed, hint)]
        texts = await self._documents.texts(attached, words)
        turn = question(asked["files"], asked["text"], texts)
        return [gr.update(value=None, **BUSY_BOX), turn, uuid4().hex, "[]", *[gr.skip()] * 4]

    async def answer(
        self,
        chat_id: str,
        earlier: Messages,
        asked: Messages,
        settings: str,
        request: gr.Request,
    ) -> AsyncIterator[tuple[str, Messages, str]]:
        """Answer the question, if one is asked.

        Yields the chat's id, so that a late piece never ends up in another chat; the turn as it grows; figures.
        """
        if not asked:
            return
        reply = Reply(self._words(request), self._info)
        with self.streams.grow(reply, str(request.session_hash), [*earlier, *asked], settings_of(settings)):
            while reply.changed.is_set() or not reply.ended.is_set():  # the end may come while this pauses
                await reply.changed.wait()
                if reply.seen_drawn:
                    with suppress(TimeoutError):
                        await asyncio.wait_for(reply.drawn.wait(), LONGEST_DRAWING)
                reply.changed.clear()
                reply.drawn.clear()
                running = [*asked, *reply.messages()]
                yield chat_id, running, reply.figures()
                with suppress(TimeoutError):
                    await asyncio.wait_for(reply.ended.wait(), REDRAW * (1 + size_of(running) / QUICKLY_DRAWN))

    def _words(self, request: gr.Request) -> Words:
        """Return the words in the language of the page, or of the person's browser."""
        language = self._language or request.headers.get("accept-language", "")
        return WORDS["zh" if language.lower().startswith("zh") else "en"]

    async def stop(self, request: gr.Request) -> None:
        """Stop the answers to this tab, in the engine too."""
        self.streams.stop(str(request.session_hash))

    async def drawn(self, request: gr.Request) -> None:
        """Take note that this tab is done with a drawing."""
        self.streams.drawn(str(request.session_hash))


def retry(messages: Messages, data: gr.RetryData) -> tuple[Any, Messages, Messages, str]:
    """Begin a turn with the question that is to be answered again; cut the conversation before it."""
    return gr.update(**BUSY_BOX), messages[: data.index], [messages[data.index]], uuid4().hex


def edit(messages: Messages, data: gr.EditData) -> tuple[Any, Messages, Messages, str]:
    """Begin a turn with the edited question, which keeps its images and documents; cut the conversation before it."""
    asked = messages[data.index]
    edited = question(images_of(asked), written(data.value), documents_of(asked))
    return gr.update(**BUSY_BOX), messages[: data.index] if edited else messages, edited, uuid4().hex


def undo(messages: Messages, data: gr.UndoData) -> tuple[Any, Messages, str]:
    """Move the last question back into the box, with what was attached to it; drop its answer."""
    asked = messages[data.index]
    box = gr.update(value={"text": asked_text_of(asked), "files": images_of(asked)})
    return box, messages[: data.index], unframed(asked)


def ready() -> Any:
    """Return the update of the box for a page that waits for a question."""
    return gr.update(interactive=True, submit_btn=True, stop_btn=False)


class LocalOnly:
    """ASGI middleware with a policy that the browser enforces: the page talks to its own server only."""

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
    """Return the program's flags. `auth` holds (user, password) pairs."""
    choose_language(argv)
    parser = argparse.ArgumentParser(
        "gradio_webui.py", description="Chat with a server in the browser.", formatter_class=Help
    )
    default = os.environ.get("QWEN_URL", DEFAULT_URL)
    parser.add_argument("--server-url", default=default, help="address of the server (default: %(default)s)")
    parser.add_argument("--api-key", default=os.environ.get("QWEN_API_KEY"), help="its key; default: $QWEN_API_KEY")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on (default: %(default)s)")
    parser.add_argument(
        "--root-path", default="", help="path under which a proxy serves the page, such as /qwen, or its whole URL"
    )
    parser.add_argument("--ssl-certfile", help="certificate, for https")
    parser.add_argument("--ssl-keyfile", help="its private key")
    parser.add_argument(
        "--auth", action="append", default=[], metavar="USER:PASSWORD", help="who may enter; repeatable"
    )
    parser.add_argument("--auth-file", type=Path, help="the same, a line each")
    parser.add_argument("--title", help="title of the page (default: the model's name)")
    parser.add_argument("--lang", choices=tuple(WORDS), help="language of the page (default: the browser's)")
    parser.add_argument("--concurrency", type=int, default=64, help="answers at once (default: %(default)s)")
    parser.add_argument("--queue", type=int, default=256, help="people who may wait in line (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.concurrency < 1 or args.queue < 0:
        parser.error(say("--concurrency must be at least 1, --queue at least 0"))
    try:
        lines = args.auth + (args.auth_file.read_text().split("\n") if args.auth_file else [])
    except OSError as error:
        parser.error(f"--auth-file: {args.auth_file}: {error.strerror}")
    args.auth = [tuple(line.strip().partition(":")[::2]) for line in lines if line.strip()]
    if not all(user and password for user, password in args.auth):
        parser.error(say("--auth and the lines of --auth-file have the form USER:PASSWORD"))
    for flag, file in (("--ssl-certfile", args.ssl_certfile), ("--ssl-keyfile", args.ssl_keyfile)):
        if file and not Path(file).is_file():
            parser.error(say("{flag}: there is no file {file}", flag=flag, file=file))
    args.server_url = args.server_url.rstrip("/")
    args.root_path = args.root_path.rstrip("/")
    return args


def build_app(page: Page, args: argparse.Namespace) -> FastAPI:
    """Return the page as an ASGI application."""
    folder = files("qwen_vllm.webui")
    style, *scripts = (folder.joinpath(name).read_text("utf-8") for name in ("page.css", *SCRIPTS))
    script = "\n".join(scripts)
    words = words_for(args.lang)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(LocalOnly)
    mended.mend(app)
    return gr.mount_gradio_app(
        app,
        page.build(),
        path="/",
        auth=args.auth or None,
        root_path=args.root_path,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        show_error=False,
        max_file_size="20mb",
        i18n=gr.I18n(**words),
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=style,
        head=f"<script>const WORDS = {json.dumps(words)};\n{script}</script>",
    )


class PageServer(uvicorn.Server):
    """uvicorn with the page. The streams to open tabs would keep it from ending, so it ends them first."""

    def __init__(self, args: argparse.Namespace) -> None:
        line = WaitingLine(args.concurrency, args.queue)
        self._page = Page(args.server_url, args.api_key, args.title, args.lang, line)
        self._app = build_app(self._page, args)
        tls: dict[str, Any] = {"ssl_certfile": args.ssl_certfile, "ssl_keyfile": args.ssl_keyfile}
        super().__init__(uvicorn.Config(self._app, log_level="warning", timeout_graceful_shutdown=CLOSE_TIMEOUT, **tls))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop the answers on their way, so that they end in order, then the server."""
        self._page.streams.stop()
        mounted: Any = self._app.routes[-1]
        mounted.app.stop_event.set()  # Gradio's heartbeats
        await super().shutdown(sockets)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve the page until Ctrl-C. Return the exit status."""
    args = parse_args(argv)
    listener = listen("gradio_webui.py", args.host, args.port)
    server = PageServer(args)
    if args.host not in THIS_MACHINE and not args.auth:
        host, flag = args.host, "--auth"
        warning = say("Warning: {host} can be reached from other machines, and no {flag} is set.", host=host, flag=flag)
        print(warning, file=sys.stderr)
    url = address(args.host, listener.getsockname()[1], bool(args.ssl_certfile))
    where = args.root_path if "://" in args.root_path else url + args.root_path
    print(say("The page is at {url}  (Ctrl-C ends it)", url=where), flush=True)
    with suppress(KeyboardInterrupt):  # uvicorn raises it again when it has ended
        server.run(sockets=[listener])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
