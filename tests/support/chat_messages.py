"""Messages as the page's chatbot holds them, and settings as its browser keeps them."""

import json
from typing import Any

from qwen_vllm.protocol import Sampling
from qwen_vllm.webui.conversation import KEPT, remark


def said(role: str, text: str, **metadata: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}], "metadata": metadata or None}


def user(text: str) -> dict[str, Any]:
    return said("user", text)


def assistant(text: str, **metadata: str) -> dict[str, Any]:
    return said("assistant", text, **metadata)


def shown(messages: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(title, text) of each message under a question."""
    replies = [message for message in messages if message["role"] == "assistant"]
    return [((m.get("metadata") or {}).get("title", ""), m["content"][0]["text"]) for m in replies]


def kept_settings(system: str = "system", **fields: str) -> str:
    """The page's settings, of which those that are not named are empty."""
    return json.dumps([system, *(fields.get(name, "") for name in Sampling.model_fields)])


THOUGHT = assistant("Hm.", title="Thoughts", status="done")
KEPT_THOUGHT = assistant("Hm, a <\u2060b>.", title="Thoughts", status="done", id=KEPT)
TALK = [user("a"), THOUGHT, assistant("b"), user("c"), remark("No answer", "busy"), user("d"), assistant("half")]
