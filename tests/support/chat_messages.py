"""Messages as the page's chatbot holds them."""

from typing import Any

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


THOUGHT = assistant("Hm.", title="Thoughts", status="done")
KEPT_THOUGHT = assistant("Hm, a <\u2060b>.", title="Thoughts", status="done", id=KEPT)
TALK = [user("a"), THOUGHT, assistant("b"), user("c"), remark("No answer", "busy"), user("d"), assistant("half")]
