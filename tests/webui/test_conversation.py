"""The page's conversation: what is shown, what the server is asked, and what is saved."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from qwen_vllm.protocol import ChatRequest, Question, text_turns, validated
from qwen_vllm.webui.conversation import as_json, as_markdown, question_of, remark, turns
from tests.support.chat_messages import KEPT_THOUGHT, TALK, THOUGHT, assistant, user
from vllm_client import openai_messages

KEEPING = [user("a"), KEPT_THOUGHT, assistant("b"), *TALK]
KEPT_TURNS = [(Question("a"), "b", "Hm, a <b>."), (Question("a"), "b", ""), (Question("d"), "half", "")]


def test_reasoning_goes_along_where_it_is_kept() -> None:
    assert turns(KEEPING) == KEPT_TURNS
    assert turns([user("a"), KEPT_THOUGHT]) == []
    loaded = validated(ChatRequest, json.dumps({"query": "-", **json.loads(as_json(KEEPING, "S"))}).encode())
    assert loaded.history == text_turns(KEPT_TURNS)
    assert "Hm" not in as_markdown(KEEPING, "S")


def test_other_reasoning_and_failed_turns_are_no_history() -> None:
    assert turns(TALK) == KEPT_TURNS[1:]
    assert turns([user("a"), assistant("half"), remark("No answer", "broke off")]) == []
    assert turns([user("a"), THOUGHT]) == []


def test_exports_hold_the_conversation() -> None:
    exported = json.loads(as_json(TALK, "Be brief."))
    loaded = validated(ChatRequest, json.dumps({"query": "-", **exported}).encode())  # as the terminals do
    assert (loaded.system, loaded.history) == ("Be brief.", [("a", "b"), ("d", "half")])
    assert as_markdown(TALK[:3], "Be brief.") == "## System\n\nBe brief.\n\n## User\n\na\n\n## Assistant\n\nb\n"


def file_part(file: Path) -> dict[str, Any]:
    return {"type": "file", "file": {"path": str(file)}}


def test_images_go_along_as_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    (tmp_path / "dot.png").write_bytes(b"png")
    question = {"role": "user", "content": [file_part(tmp_path / "dot.png"), {"type": "text", "text": "What?"}]}
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(b'png').decode()}"}}
    _, *earlier, now = openai_messages(question_of(question), turns(TALK[:3]), "Be brief.")
    text = [{"type": "text", "text": "a"}]
    assert earlier == [{"role": "user", "content": text}, {"role": "assistant", "content": "b"}]
    assert now["content"] == [image, {"type": "text", "text": "What?"}]


def test_an_export_has_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    (tmp_path / "dot.png").write_bytes(b"png")
    question = {"role": "user", "content": [file_part(tmp_path / "dot.png"), *TALK[0]["content"]]}
    exported = json.loads(as_json([question, *TALK[1:]], "Be brief."))
    assert exported["images"] == [[f"data:image/png;base64,{base64.b64encode(b'png').decode()}"], []]
    assert exported["history"] == [["a", "b"], ["d", "half"]]


@pytest.mark.parametrize("path", ["up/gone.png", "up/notes.txt", "secret.png", "up/../secret.png", "up/link.png"])
def test_no_other_file_goes_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    uploads = tmp_path / "up"
    uploads.mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(uploads))
    (uploads / "notes.txt").write_text("secret")
    (tmp_path / "secret.png").write_text("secret")
    (uploads / "link.png").symlink_to(tmp_path / "secret.png")
    question = question_of({"role": "user", "content": [file_part(tmp_path / path)]})
    assert openai_messages(question, [], "Be brief.")[1]["content"] == [
        {"type": "text", "text": "(an image that is not kept any more)"}
    ]
