"""A conversation as Gradio holds it, as the server is asked, and as a file."""

import base64
import json
import mimetypes
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradio.utils import get_upload_folder

from qwen_vllm.protocol import Turn

Messages = list[dict[str, Any]]
"""A conversation as Gradio's chatbot holds it: `{"role", "content": [{"type", "text" or "file"}], "metadata"}`. What
has a title in its metadata is no part of the conversation: thoughts, folded away, and why there is no answer."""

NO_ANSWER = "no-answer"
"""The `id` in the metadata of a message that stands where an answer would."""
MARK = "\u2060"
"""An invisible character; behind a `<` it keeps Markdown from taking what follows for HTML."""
TAG = re.compile(r"<(?!(?:br ?/?|/?su[bp])>)(?=[a-zA-Z/!?])")
"""The `<` of HTML, but for line breaks, sub- and superscript, which models write in tables."""
CODE = re.compile(r"(```.*?(?:```|\Z)|(?<!\\)`[^`\n]*`)", re.DOTALL)


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
