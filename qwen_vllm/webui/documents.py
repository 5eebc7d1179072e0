"""Documents of a question: read, counted, fitted into the context, and put into the question as text.

The browser holds them until the question is asked. The page's server keeps nothing but Gradio's cache of uploads.
"""

import asyncio
import json
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from qwen_vllm.protocol import ChatError, ServerInfo
from qwen_vllm.webui import gradio as gr
from qwen_vllm.webui import reader
from qwen_vllm.webui.answering import Settings
from qwen_vllm.webui.conversation import framed, uploaded
from qwen_vllm.webui.markdown import shown
from qwen_vllm.webui.reader import Unreadable
from qwen_vllm.words import Words
from vllm_client import count_tokens_async

Entry = dict[str, Any]
"""A document in the browser: `{"id", "name"}`; once it is read, also `text` and `tokens`, or `failure`."""
MAX_DOCUMENTS = 16
READERS = 2
"""Documents that are read at once, for all people of the page."""
FRAME = 32
"""Tokens that are kept for the frame of a document, and for that of the question."""
LIMITS = reader.LIMITS | {"documents": MAX_DOCUMENTS}


class DocumentFields:
    """The page's components for documents: they stand over the box. Made inside `gr.Blocks`, which adds them."""

    def __init__(self) -> None:
        self.dropped = gr.Textbox("[]", visible="hidden")
        self.read = gr.Textbox("[]", visible="hidden")
        with gr.Column(scale=0, elem_id="documents"):
            self.cards = gr.CheckboxGroup([], show_label=False, container=False, visible=False, elem_id="cards")
            self.cut = gr.Checkbox(label="-", visible=False, container=False, elem_id="cut")
            self.told = gr.Markdown(elem_id="told")
        self.inputs = [self.dropped, self.read, self.cut]
        self.shown = [self.read, self.cards, self.cut, self.told]


@dataclass(frozen=True)
class Attached:
    """What is attached to a question: `entries` in order, and the `room` for them in tokens, or None: not known."""

    entries: list[Entry]
    room: int | None
    context: int
    is_news: bool
    """Whether a failure is among them that the person has not seen yet."""

    @property
    def documents(self) -> list[Entry]:
        """Those that could be read."""
        return [entry for entry in self.entries if "failure" not in entry]

    @property
    def tokens(self) -> int:
        """The size of all documents."""
        return sum(entry["tokens"] for entry in self.documents)

    @property
    def fits(self) -> bool:
        """Whether all of them fit into the context, beside the question and its answer."""
        return self.room is None or self.tokens <= self.room

    def updates(self, words: Words, agreed: bool = False, hint: str = "") -> list[Any]:
        """Return the updates of `DocumentFields.shown`; a `hint` comes last."""
        cards = [(words["document_card"].format(**entry), entry["id"]) for entry in self.documents]
        ids = [entry["id"] for entry in self.documents]
        failures = [entry for entry in self.entries if "failure" in entry]
        told = [f"⚠️ **{shown(entry['name'])}**: {words[entry['failure']].format(**LIMITS)}" for entry in failures]
        cut = gr.update(value=agreed, visible=False)
        if not self.fits:
            numbers = {"tokens": self.tokens, "context": self.context, "room": self.room}
            cut = gr.update(value=agreed, visible=True, label=words["documents_cut"].format(**numbers))
        text = "\n\n".join([*told, hint] if hint else told)
        return [
            json.dumps(self.entries, ensure_ascii=False),
            gr.update(choices=cards, value=ids, visible=bool(ids)),
            cut,
            text,
        ]


class Documents:
    """Reads documents and counts their tokens, by the model server at `url`."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self._url, self._api_key = url, api_key
        self._readers = asyncio.Semaphore(READERS)

    async def attached(self, dropped: str, known: str, asked: str, settings: Settings, info: ServerInfo) -> Attached:
        """Return what is attached to the question `asked`. Only what is not among the `known` entries is read."""
        wanted = json.loads(dropped)
        before = {entry["id"]: entry for entry in json.loads(known)}
        reads = [self._read(before.get(entry["id"], entry), n) for n, entry in enumerate(wanted)]
        entries = list(await asyncio.gather(*reads))
        is_news = any("failure" in entry and entry["id"] not in before for entry in entries)
        given = settings.fields["max_tokens"]
        answer = int(given) if given.isdecimal() else info.defaults.get("max_tokens", 0)
        room = info.context - answer - estimate(settings.system + asked) - FRAME * (1 + len(entries))
        return Attached(entries, max(room, 0) if info.context else None, info.context, is_news)

    async def texts(self, attached: Attached, words: Words) -> list[str]:
        """Return the documents as they stand in the question; of those that do not fit, the beginning."""
        texts, room = [], attached.room
        for entry in attached.documents:
            name, text, tokens = entry["name"], entry["text"], entry["tokens"]
            if room is not None:
                text, first = await self._first(text, tokens, room)
                if not text:
                    break
                if first < tokens:
                    name += f" ({words['document_cut'].format(first=first, tokens=tokens)})"
                room -= first
            texts.append(framed(name, text))
        return texts

    async def _first(self, text: str, tokens: int, room: int) -> tuple[str, int]:
        """Return the beginning of a text that fits into `room` tokens, and its size."""
        while tokens > room:
            text = text[: len(text) * room // tokens]
            tokens = await self._count(text) if text else 0
        return text, tokens

    async def _read(self, entry: Entry, n: int) -> Entry:
        if "failure" in entry or "tokens" in entry:
            return entry
        if n >= MAX_DOCUMENTS:
            return entry | {"failure": "document_many"}
        try:
            text = entry.get("text") or await self._text(entry["id"])
        except Unreadable as why:
            return entry | {"failure": str(why)}
        return entry | {"text": text, "tokens": await self._count(text)}

    async def _text(self, path: str) -> str:
        """Read an upload in a process of its own, so that the page goes on meanwhile."""
        if not (file := uploaded(path)):
            raise Unreadable("document_gone")
        async with self._readers:
            command = [sys.executable, "-I", reader.__file__, str(file)]
            process = await asyncio.create_subprocess_exec(
                *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
            )
            try:
                output, _ = await asyncio.wait_for(process.communicate(), reader.MAX_SECONDS)
            except TimeoutError:
                raise Unreadable("document_slow") from None
            finally:
                with suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        if process.returncode:
            raise Unreadable(output.decode() if process.returncode == reader.UNREADABLE else "document_broken")
        return output.decode()

    async def _count(self, text: str) -> int:
        """Return the model server's count of a text's tokens; an estimate where it tells none."""
        with suppress(ChatError):
            return await count_tokens_async(self._url, text, self._api_key)
        return estimate(text)


def estimate(text: str) -> int:
    """Return about how many tokens a text has: one for four bytes, so three for four Chinese characters."""
    return len(text.encode()) // 4 + 1
