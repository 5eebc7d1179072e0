"""The chat in a browser, for many people at once.

python gradio_webui.py --server-url http://127.0.0.1:8000
"""

import argparse
import asyncio
import base64
import html
import json
import math
import mimetypes
import os
import re
import socket
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI
from gradio.utils import get_upload_folder
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen_vllm.protocol import (
    DEFAULT_SYSTEM,
    ChatError,
    ChatResult,
    Part,
    Reasoning,
    Sampling,
    ServerInfo,
    Turn,
    validated,
)
from qwen_vllm.retry import retry_delay
from vllm_client import DEFAULT_URL, server_info_async, stream_chat_async, stream_messages_async

Messages = list[dict[str, Any]]
"""A conversation as Gradio's chatbot holds it: `{"role", "content": [{"type", "text" or "file"}], "metadata"}`. What
has a title in its metadata is no part of the conversation: thoughts, folded away, and why there is no answer."""

REDRAW = 0.05
"""Seconds between two drawings of an answer that grows."""
NO_ANSWER = "no-answer"
"""The `id` in the metadata of a message that stands where an answer would."""
MARK = "\u2060"
"""An invisible character; behind a `<` it keeps Markdown from taking what follows for HTML."""
TAG = re.compile(r"<(?!(?:br ?/?|/?su[bp])>)(?=[a-zA-Z/!?])")
"""The `<` of HTML, but for line breaks, sub- and superscript, which models write in tables."""
CODE = re.compile(r"(```.*?(?:```|\Z)|(?<!\\)`[^`\n]*`)", re.DOTALL)
CLOSE_TIMEOUT = 5
"""Seconds that open connections have when the page's server ends."""

WORDS = {
    "en": {
        "new": "New chat",
        "earlier": "Earlier chats, kept in this browser",
        "as_markdown": "Save as Markdown",
        "as_json": "Save as JSON",
        "delete": "Delete this chat",
        "delete_sure": "Delete this chat for good?",
        "storage_full": "The browser's storage is full, so this chat is no longer kept: export it, or delete others.",
        "settings": "Settings",
        "system": "System prompt",
        "default": "the model's default",
        "on": "on",
        "off": "off",
        "stop_info": "words that end the answer, one a line",
        "ask": "Ask something (Shift-Enter: new line)",
        "welcome": "What would you like to know?",
        "thinking": "Thinking …",
        "thoughts": "Thoughts",
        "stopped": "stopped",
        "stopped_early": "Stopped before the answer began.",
        "empty_answer": "The model ended its answer without a word.",
        "no_answer": "⚠️ No answer",
        "place": "Many people are asking just now: you are number {place} in line.",
        "line_full": "Too many people are asking just now. Your question is kept here: press retry in a moment.",
        "busy": "The server is busy. Asking again in {seconds} s …",
        "unreachable": "The model server does not answer. Nothing is lost: press retry in a moment.",
        "incomplete": "The connection to the model server broke off. Press retry.",
        "engine_error": "The model server could not finish this answer. Press retry in a moment.",
        "overloaded": "The server is busy and stayed so. Your question is kept here: press retry in a moment.",
        "unauthorized": "The model server does not accept this page's key (--api-key).",
        "invalid_request": "The model server cannot answer this. Edit the question or the settings.",
        "first_token": "first token {seconds:.2f} s",
        "speed": "{speed:.1f} tokens/s",
        "window": "{used:,} of {context:,} tokens",
        "tokens": "{used:,} tokens",
        "cut": "cut at the token limit",
        "dropped": "old turns left out: {turns}",
    },
    "zh": {
        "new": "新对话",
        "earlier": "历史对话（保存在此浏览器中）",
        "as_markdown": "导出 Markdown",
        "as_json": "导出 JSON",
        "delete": "删除此对话",
        "delete_sure": "确定永久删除此对话吗？",
        "storage_full": "浏览器存储空间已满，此对话不再保存：请导出，或删除其他对话。",
        "settings": "设置",
        "system": "系统提示词",
        "default": "模型默认",
        "on": "开",
        "off": "关",
        "stop_info": "遇到这些词时结束回答，每行一个",
        "ask": "请输入问题（Shift-回车换行）",
        "welcome": "想聊点什么？",
        "thinking": "思考中……",
        "thoughts": "思考过程",
        "stopped": "已停止",
        "stopped_early": "在回答开始前已停止。",
        "empty_answer": "模型没有输出任何文字。",
        "no_answer": "⚠️ 没有回答",
        "place": "现在提问的人很多：您排在第 {place} 位。",
        "line_full": "现在提问的人太多。您的问题已保留，请稍后点击重试。",
        "busy": "服务端繁忙，{seconds} 秒后再次提问……",
        "unreachable": "模型服务端没有响应。对话不会丢失，请稍后点击重试。",
        "incomplete": "与模型服务端的连接中断，请点击重试。",
        "engine_error": "模型服务端未能完成此回答，请稍后点击重试。",
        "overloaded": "服务端一直繁忙。您的问题已保留，请稍后点击重试。",
        "unauthorized": "模型服务端不接受此页面的密钥（--api-key）。",
        "invalid_request": "模型服务端无法回答，请修改问题或设置。",
        "first_token": "首个词元 {seconds:.2f} 秒",
        "speed": "{speed:.1f} 词元/秒",
        "window": "已用 {used:,} / {context:,} 词元",
        "tokens": "{used:,} 词元",
        "cut": "达到词元上限，已截断",
        "dropped": "略去最早的 {turns} 轮",
        "max_tokens_info": "回答的最大词元数",
        "temperature_info": "随机程度；0 总是选择概率最大的词元",
        "top_p_info": "只在累计概率达到此值的词元中采样",
        "top_k_info": "只在概率最大的这些词元中采样；0 或 -1 为全部",
        "min_p_info": "词元的最小概率（相对于最大概率）",
        "repetition_penalty_info": "大于 1 时减少重复（含提示词）",
        "presence_penalty_info": "大于 0 时避免已出现的词元",
        "frequency_penalty_info": "大于 0 时按出现次数避免重复",
        "seed_info": "使采样可重复",
        "model_info": "模型或 LoRA 适配器的名字",
        "enable_thinking_info": "让能思考的模型（Qwen3）先思考",
    },
}  # fmt: skip
"""All that the page says. English descriptions of the sampling parameters come from the protocol."""
WORDS["en"] = {f"{name}_info": field.description for name, field in Sampling.model_fields.items()} | WORDS["en"]

LATEX = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
    {"left": "$", "right": "$", "display": False},
]
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
CSS = """
.gradio-container .main.app { padding: 0 .5rem; }
.gradio-container main { padding: .5rem; }
#heading, #chat, #figures, .form:has(> #box) { max-width: 60rem; width: 100%; margin: 0 auto; }
#heading h1 { font-size: 1.1rem; margin: .3rem 2rem; text-align: center; overflow-wrap: anywhere; }
#chat { border-width: 0 !important; background: none; }
#chat .bubble-wrap { background: none; }
#chat .top-panel { display: none; }
#chat .prose { contain: layout; }
#figures { font-size: .75rem; opacity: .6; min-height: 1.2em; padding: 0 .3rem; }
#figures p { font-size: inherit; }
#earlier .wrap { flex-direction: column; flex-wrap: nowrap; gap: .2rem; max-height: 60vh; overflow-y: auto; }
#earlier label { border: none; box-shadow: none; padding: .4rem .6rem; }
#earlier label span { margin: 0; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
#earlier label.selected { font-weight: 600; background: var(--background-fill-secondary); }
#earlier input { display: none; }
.sidebar:not(.open) .chevron-left { display: none; }
#chats:not(.open) .chevron::before { content: "☰"; }
#settings:not(.open) .chevron::before { content: "⚙"; }
"""

SCRIPT = """
const words = Object.entries(WORDS).find(([language]) => navigator.language.startsWith(language))?.[1] ?? WORDS.en;

// A chat is kept under its id: its messages, and apart from them what the list shows, so that listing stays cheap.
const chats = {
  key: (id) => `qwen-vllm/chat/${id}`,
  card: (id) => `qwen-vllm/card/${id}`,

  list(open) {
    const cards = Object.keys(localStorage).filter((key) => key.startsWith(chats.card("")))
      .map((key) => JSON.parse(localStorage[key])).sort((a, b) => b.saved - a.saved);
    return {__type__: "update", choices: cards.map(({title, id}) => [title, id]), value: open};
  },
  open(id) {
    sessionStorage["qwen-vllm/open"] = id;
    if (innerWidth < 768) document.querySelector("#chats.open .toggle-button")?.click();  // it covers a phone's page
    return [id, JSON.parse(localStorage[chats.key(id)] ?? "[]"), "", chats.list(id)];
  },
  fresh: () => chats.open(Date.now().toString(36) + Math.random().toString(36).slice(2)),
  remove(id) {
    if (!confirm(words.delete_sure)) return [];
    chats.forget(id);
    return chats.fresh();
  },
  forget(id) {
    localStorage.removeItem(chats.key(id));
    localStorage.removeItem(chats.card(id));
  },

  save(id, messages) {
    const key = chats.key(id), text = JSON.stringify(messages), open = sessionStorage["qwen-vllm/open"];
    if (!open) return [];
    if (!messages?.length) chats.forget(id);
    else if (localStorage[key] !== text) {
      const question = written(messages[0].content.map((part) => part.text ?? "").join(" ")).trim();
      const card = {id, title: question.slice(0, 60) || "🖼", saved: Date.now()};
      try {
        localStorage[key] = text;
        localStorage[chats.card(id)] = JSON.stringify(card);
      } catch {
        if (!chats.warned) alert(words.storage_full);
        chats.warned = true;
      }
    }
    // A last piece of an answer may come when another chat has been opened: that one is what stays on the page.
    return id === open ? [undefined, undefined, undefined, chats.list(id)] : chats.open(open);
  },

  keepSettings: (...settings) => { localStorage["qwen-vllm/settings"] = JSON.stringify(settings); },
  restore(...settings) {
    const open = sessionStorage["qwen-vllm/open"], kept = JSON.parse(localStorage["qwen-vllm/settings"] ?? "[]");
    const shown = open ? chats.open(open) : chats.fresh();
    return [...shown, ...settings.map((setting, n) => kept[n] ?? setting)];
  },
  download(name, text) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text]));
    link.download = name;
    link.click();
    URL.revokeObjectURL(link.href);
  },
};

// What is copied is what was written, without the marks that keep its HTML from being rendered.
const written = (text) => text.replaceAll("\\u2060", "");
const clipboard = navigator.clipboard, copy = clipboard?.writeText.bind(clipboard);
if (copy) clipboard.writeText = (text) => copy(written(text));
addEventListener("copy", (event) => {
  const text = String(getSelection());
  if (text === written(text)) return;
  event.clipboardData.setData("text/plain", written(text));
  event.preventDefault();
});
"""


class Line:
    """The people who ask: the first `at_once` of them are answered, up to `waiting` more stand in line."""

    def __init__(self, at_once: int, waiting: int) -> None:
        self._at_once, self.limit = at_once, at_once + waiting
        self._tickets: list[asyncio.Event] = []

    @contextmanager
    def ticket(self) -> Iterator[asyncio.Event]:
        """One's place in the line; it is set when the line has moved.

        Raises:
            ChatError: the line is full.
        """
        if len(self._tickets) >= self.limit:
            raise ChatError("too many people are asking", "line_full", status=503)
        ticket = asyncio.Event()
        self._tickets.append(ticket)
        try:
            yield ticket
        finally:
            self._tickets.remove(ticket)
            for other in self._tickets:
                other.set()

    async def places(self, ticket: asyncio.Event) -> AsyncIterator[int]:
        """How many are to be let in up to oneself, each time the line has moved; ends when it is one's turn."""
        while (place := self._tickets.index(ticket) - self._at_once + 1) > 0:
            yield place
            await ticket.wait()
            ticket.clear()


@dataclass(frozen=True)
class Notice:
    """What a person is told who waits for an answer."""

    text: str


class Reply:
    """An answer on its way, as the page shows it. `context`: the model's window in tokens, where it is known."""

    def __init__(self, words: dict[str, str], context: int | None) -> None:
        self.words, self.ended = words, False
        self._context, self._began = context, time.monotonic()
        self._first = self._last = 0.0
        self._thought, self._text, self._notice = "", "", ""
        self._end: ChatResult | ChatError | None = None

    def add(self, part: Notice | Part | ChatError | None, arrived: float) -> None:
        """Takes the next part, and when it came (by `time.monotonic`); None: there are no more."""
        self._notice = ""
        match part:
            case None:
                self.ended = True
            case Notice():
                self._notice = part.text
            case Reasoning():
                self._thought, self._first = self._thought + part.text, self._first or arrived
            case str():
                self._text, self._first = self._text + part, self._first or arrived
            case _:
                self._end, self._last = part, arrived

    def messages(self) -> Messages:
        """What stands under the question now: what the model thought, its answer, a remark in its place."""
        shown = answer_messages(self._thought, self._text, self.words, ended=self.ended)
        if self._notice:
            shown.append(remark(self._notice, status="pending"))
        elif isinstance(self._end, ChatError):
            shown.append(failure(self._end, self.words))
        elif self.ended and not shown:
            shown.append(remark(self.words["no_answer"], self.words["empty_answer" if self._end else "stopped_early"]))
        return shown

    def figures(self) -> str:
        """The line under the answer: how fast it came, and how much of the model's window the conversation takes."""
        if not isinstance(self._end, ChatResult):
            return self.words["stopped"] if self.ended and not self._end else ""
        words, result = self.words, self._end
        seconds, used = max(self._last - self._first, 1e-9), result.prompt_tokens + result.completion_tokens
        figures = [words["first_token"].format(seconds=(self._first or self._last) - self._began)]
        if result.completion_tokens > 1:
            figures.append(words["speed"].format(speed=(result.completion_tokens - 1) / seconds))
        window = words["window"] if self._context else words["tokens"]
        figures.append(window.format(used=used, context=self._context))
        if result.dropped_turns:
            figures.append(words["dropped"].format(turns=result.dropped_turns))
        if result.finish_reason == "length":
            figures.append(words["cut"])
        return " · ".join(figures)


async def _pump(parts: AsyncIterator[Any], arrived: asyncio.Queue) -> None:
    """Puts the parts into the queue, each with its time, then why they ended early if they did, and None."""
    try:
        async with aclosing(parts):
            async for part in parts:
                arrived.put_nowait((part, time.monotonic()))
    except ChatError as error:
        arrived.put_nowait((error, time.monotonic()))
    finally:
        arrived.put_nowait((None, time.monotonic()))


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


def answer_messages(thought: str, text: str, words: dict[str, str], ended: bool = False) -> Messages:
    """An answer, whole or so far, as the page shows it: what the model thought folded away, then the rest."""
    messages = []
    if thought.strip():
        state = ("thoughts", "done") if text or ended else ("thinking", "pending")
        metadata = {"title": words[state[0]], "status": state[1]}
        messages.append(_said("assistant", thought.strip()) | {"metadata": metadata})
        text = text.lstrip("\n")  # which `/v1` leaves between the two
    if text:
        messages.append(_said("assistant", text))
    return messages


def remark(title: str, text: str = "", **metadata: str) -> dict[str, Any]:
    """What stands in an answer's place: a notice (`status="pending"`), or why there is none."""
    return _said("assistant", text) | {"metadata": {"id": NO_ANSWER, "title": title, **metadata}}


def failure(error: ChatError, words: dict[str, str]) -> dict[str, Any]:
    """The remark that tells a person why there is no answer, or no whole one, and what to do."""
    text = words.get(error.type, error.message)
    if error.type in ("invalid_request", "engine_error"):
        text += f"\n\n{error.message}"
    return remark(words["no_answer"], text)


def is_folded(message: dict[str, Any]) -> bool:
    """Whether a message is no part of the conversation."""
    return bool((message.get("metadata") or {}).get("title"))


def is_remark(message: dict[str, Any]) -> bool:
    """Whether a message stands in an answer's place."""
    return (message.get("metadata") or {}).get("id") == NO_ANSWER


def text_of(message: dict[str, Any]) -> str:
    """A message's text as it was written, without its images."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text").replace(MARK, "")


def _said(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": as_text(text)}]}


def as_text(text: str) -> str:
    """Markdown whose HTML shows as it is written: only line breaks, sub- and superscript are rendered."""
    pieces = CODE.split(text)  # by turns text and code, which shows as it is anyhow
    pieces[::2] = [TAG.sub(f"<{MARK}", piece) for piece in pieces[::2]]
    return "".join(pieces)


def finished(messages: Messages) -> Iterator[tuple[dict[str, Any], str]]:
    """The questions that were answered, each with its answer; one whose answer failed is left out."""
    exchanges: list[Messages] = []
    for message in messages:
        if message["role"] == "user":
            exchanges.append([message])
        elif exchanges:
            exchanges[-1].append(message)
    for question, *replies in exchanges:
        answer = "".join(text_of(message) for message in replies if not is_folded(message))
        if answer.strip() and not any(map(is_remark, replies)):
            yield question, answer


def turns(messages: Messages) -> list[Turn]:
    """A conversation as the server wants its history: without thoughts, without turns that failed."""
    return [(text_of(question), answer) for question, answer in finished(messages)]


def with_images(messages: Messages) -> list[dict[str, Any]]:
    """A conversation that ends with a question, in OpenAI's form, its images as data."""
    asked = []
    for question, answer in finished(messages[:-1]):
        asked += [{"role": "user", "content": _parts_of(question)}, {"role": "assistant", "content": answer}]
    return [*asked, {"role": "user", "content": _parts_of(messages[-1])}]


def _parts_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"type": "text", "text": text_of(message)} if part["type"] == "text" else _image(Path(part["file"]["path"]))
        for part in message["content"]
    ]


def _image(file: Path) -> dict[str, Any]:
    """An uploaded image as data. The path comes from the browser: it must not lead to any other file."""
    kind = mimetypes.guess_type(file)[0] or ""
    uploads = Path(get_upload_folder()).resolve()
    if not (file.resolve().is_relative_to(uploads) and file.is_file() and kind.startswith("image/")):
        return {"type": "text", "text": "(an image that is not kept any more)"}
    data = base64.b64encode(file.read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}}


def as_json(messages: Messages, system: str) -> str:
    """A chat as the terminals' /load takes it."""
    saved = {"system": system, "history": turns(messages)}
    images = [
        [part["image_url"]["url"] for part in _parts_of(asked) if part["type"] == "image_url"]
        for asked, _ in finished(messages)
    ]
    return json.dumps(saved | ({"images": images} if any(images) else {}), ensure_ascii=False, indent=1)


def as_markdown(messages: Messages, system: str) -> str:
    """A chat to read."""
    parts = [("System", system)]
    for question, answer in turns(messages):
        parts += [("User", question), ("Assistant", answer)]
    return "\n\n".join(f"## {role}\n\n{text}" for role, text in parts) + "\n"


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


def spoken(language: str | None) -> dict[str, dict[str, str]]:
    """What the page says, by the browser's language; with a fixed language, the same to all."""
    return {browser: WORDS[language or browser] for browser in WORDS}


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
        css=CSS,
        head=f"<script>const WORDS = {json.dumps(spoken(args.lang))};\n{SCRIPT}</script>",
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
