"""Converts a conversation: Gradio's messages, the turns that the server takes, files to save."""

import base64
import json
import mimetypes
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gradio.utils import get_upload_folder

from qwen_vllm import console
from qwen_vllm.protocol import AskedTurn, Question
from qwen_vllm.webui.markdown import shown, written

Message = dict[str, Any]
"""One message of Gradio's chatbot: `{"role", "content": [{"type", "text" or "file"}], "metadata"}`. A message with a
title in its metadata is folded and no part of the conversation: reasoning, or a remark on why there is no answer."""
Messages = list[Message]

REMARK = "no-answer"
"""The `id` in the metadata of a remark."""
DOCUMENT = "<details><summary>"
"""How a document begins in a question."""
KEPT = "kept"
"""The `id` in the metadata of reasoning that goes along with later questions: the chat template reads it."""


def text_message(role: str, text: str, **metadata: str) -> Message:
    """Return a message of the chatbot that shows `text`."""
    return {"role": role, "content": [{"type": "text", "text": shown(text)}], "metadata": metadata or None}


def question(images: Sequence[str], text: str, documents: Sequence[str] = ()) -> Messages:
    """Return a question as a message, or nothing where it is empty. A document is a text that begins with DOCUMENT."""
    content: list[dict[str, Any]] = [{"path": path} for path in images]  # Gradio makes a file part of each
    content += [{"type": "text", "text": document} for document in documents]
    content += text_message("user", text)["content"] if text.strip() else []
    return [{"role": "user", "content": content}] if content else []


def remark(title: str, text: str = "", **metadata: str) -> Message:
    """Return what stands in an answer's place: a notice (`status="pending"`), or why there is no answer."""
    return text_message("assistant", text, id=REMARK, title=title, **metadata)


def _id(message: Message) -> str | None:
    return (message.get("metadata") or {}).get("id")


def is_folded(message: Message) -> bool:
    """Tell whether a message is no part of the conversation."""
    return bool((message.get("metadata") or {}).get("title"))


def text_of(message: Message) -> str:
    """Return a message's text as it was written, with its documents and without its images."""
    return "\n\n".join(written(part["text"]) for part in message["content"] if part["type"] == "text")


def asked_text_of(message: Message) -> str:
    """Return what a person wrote, without documents."""
    return text_of({"content": [part for part in message["content"] if not _is_document(part)]})


def documents_of(message: Message) -> list[str]:
    """Return a question's documents, as the page shows them."""
    return [part["text"] for part in message["content"] if _is_document(part)]


def framed(name: str, text: str) -> str:
    """Return a document as a part of a question: a folded block on the page, and Markdown to the model."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{DOCUMENT}{shown(name)}</summary>\n\n" + shown(f"{fence}\n{text}\n{fence}") + "\n\n</details>"


def unframed(message: Message) -> str:
    """Return a question's documents with their names as JSON, to be asked again."""
    frame = re.compile(f"{DOCUMENT}(.*?)</summary>\n\n(`+)\n(.*)\n\\2\n\n</details>", re.DOTALL)
    entries = []
    for n, part in enumerate(documents_of(message)):
        if found := frame.fullmatch(written(part)):
            entries.append({"id": str(n), "name": found[1], "text": found[3]})
    return json.dumps(entries)


def _is_document(part: dict[str, Any]) -> bool:
    return part.get("text", "").startswith(DOCUMENT)  # in what a person writes, `shown` breaks this up


def size_of(messages: Messages) -> int:
    """Return how many characters a conversation has on the page."""
    return sum(len(part.get("text", "")) for message in messages for part in message["content"])


def images_of(message: Message) -> list[str]:
    """Return the paths of a message's images."""
    return [part["file"]["path"] for part in message["content"] if part["type"] == "file"]


def answered_exchanges(messages: Messages) -> Iterator[tuple[Message, str, str]]:
    """Yield each (question, answer, reasoning to send along or ""). A question whose answer failed is left out."""
    exchanges: list[Messages] = []
    for message in messages:
        if message["role"] == "user":
            exchanges.append([message])
        elif exchanges:
            exchanges[-1].append(message)
    for question, *replies in exchanges:
        answer = "".join(text_of(message) for message in replies if not is_folded(message))
        if answer.strip() and not any(_id(message) == REMARK for message in replies):
            yield question, answer, "".join(text_of(message) for message in replies if _id(message) == KEPT)


def turns(messages: Messages) -> list[AskedTurn]:
    """Return the answered turns. One has its reasoning where the chat template keeps that."""
    return [(question_of(message), answer, reasoning) for message, answer, reasoning in answered_exchanges(messages)]


def question_of(message: Message) -> Question:
    """Return a user's message with its images as data URLs; for each that is gone, its text says so."""
    images = [_image(path) for path in images_of(message)]
    texts = ["(an image that is not kept any more)" for image in images if not image] + [text_of(message)]
    return Question("\n".join(filter(None, texts)), tuple(filter(None, images)))


def _image(path: str) -> str | None:
    file, kind = uploaded(path), mimetypes.guess_type(path)[0] or ""
    if not (file and kind.startswith("image/")):
        return None
    return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"


def uploaded(path: str) -> Path | None:
    """Return an uploaded file. The browser names the path: it must not lead out of the folder of uploads."""
    file, uploads = Path(path), Path(get_upload_folder()).resolve()
    return file if file.resolve().is_relative_to(uploads) and file.is_file() else None


def as_json(messages: Messages, system: str) -> str:
    """Return a chat as a JSON file that /load of the terminals' chat takes."""
    return console.saved(system, turns(messages))


def as_markdown(messages: Messages, system: str) -> str:
    """Return a chat as a Markdown file to read, without reasoning."""
    parts = [("System", system)]
    for question, answer, _ in answered_exchanges(messages):
        parts += [("User", text_of(question)), ("Assistant", answer)]
    return "\n\n".join(f"## {role}\n\n{text}" for role, text in parts) + "\n"
