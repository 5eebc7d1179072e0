"""Reads the rows of a JSONL file of questions: ours and OpenAI's. Knows no models and no output."""

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from typing import Any, BinaryIO, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import from_json

from qwen_vllm.protocol import DEFAULT_SYSTEM, ChatError, turn, validated

MAX_LINE = 8 * 2**20
"""Bytes in the longest row that is read."""
TOOL_FIELDS = frozenset({"tools", "tool_choice", "parallel_tool_calls", "response_format"})
"""Fields of OpenAI's that a row with `messages` may have."""


@dataclass
class Row:
    """One row. `request` has the fields of a `ChatRequest`, not yet checked; `error` says why there is none.

    `default_system` is for a request without `system`.
    """

    line: int
    id: str | int | None = None
    request: dict[str, Any] = field(default_factory=dict)
    reference: str | None = None
    default_system: str | None = DEFAULT_SYSTEM
    error: ChatError | None = None

    @cached_property
    def key(self) -> bytes:
        """Hash what tells the row from others: its request, and its id or, where it has none, its line number."""
        return digest([self.line if self.id is None else {"id": self.id}, self.request])


def digest(value: object) -> bytes:
    """Hash a JSON value to 16 bytes."""
    return blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).digest()


def read_rows(file: BinaryIO, reference: str | None = None) -> Iterator[Row]:
    """Yield the rows of a JSONL file, bad ones with their error; only one is in memory at a time.

    A row is `{"query", "history"?, "system"?, "id"?}`, or has OpenAI's `messages` instead, and any sampling parameters;
    or it is a line of OpenAI's batch files, `{"custom_id", "body": {"messages", …}}`. A byte order mark, blank lines
    and both kinds of line ends are fine. The field named `reference` is the right answer, no part of the request.
    """
    for number, line in read_lines(file):
        row = Row(number)
        try:
            _parse(row, line, reference)
        except ChatError as error:
            row.error = error
        yield row


def read_lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not blank with their numbers, from 1; of a line over MAX_LINE only the start."""
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        end = line
        while end and not end.endswith(b"\n"):
            end = file.readline(MAX_LINE)
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            yield number, line


def _parse(row: Row, line: bytes, reference: str | None) -> None:
    """Fill in a row; what was read before an error stays."""
    fields = _fields(line)
    row.id = _id(fields)
    if reference:
        row.reference = _reference(fields.pop(reference, None), reference)
    if "body" in fields:
        fields = dict(validated(_BatchLine, fields).body)
    if "messages" in fields:
        fields, row.default_system = _from_openai(fields), None
    row.request = {name: value for name, value in fields.items() if value is not None}


def _fields(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE:
        raise ChatError(f"the row is longer than {MAX_LINE} bytes")
    try:
        fields = from_json(line.decode(), allow_inf_nan=False)
    except UnicodeDecodeError:
        raise ChatError("the row is not UTF-8: save the file as UTF-8") from None
    except ValueError as error:
        raise ChatError(f"the row is not JSON: {str(error).replace(' at line 1 column', ' at column')}") from None
    if not isinstance(fields, dict):
        raise ChatError('the row is not an object such as {"query": "…"}')
    return fields


def _id(fields: dict[str, Any]) -> str | int | None:
    name = "custom_id" if "custom_id" in fields else "id"
    value = fields.pop(name, None)
    if value is not None and type(value) not in (str, int):
        raise ChatError(f"{name}: must be text or a whole number", param=name)
    return value


def _reference(value: Any, name: str) -> str | None:
    if value is not None and type(value) not in (str, int, float):
        raise ChatError(f"{name}: must be text or a number", param=name)
    return None if value is None else str(value)


class _BatchLine(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    method: Literal["POST"] = "POST"
    url: Literal["/v1/chat/completions"] = "/v1/chat/completions"
    body: dict[str, Any]


class _Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: str
    reasoning: str | None = Field(None, validation_alias=AliasChoices("reasoning", "reasoning_content"))

    @field_validator("content", mode="before")
    @classmethod
    def _joined(cls, content: Any) -> Any:
        """Join parts of text, a line each, as vLLM's own routes do."""
        if not isinstance(content, list):
            return content
        parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
        texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
        if len(texts) < len(content):
            raise ValueError("of parts only those of text can be answered here")
        return "\n".join(texts)

    @field_validator("reasoning")
    @classmethod
    def _answers_reason(cls, reasoning: str | None, message: ValidationInfo) -> str | None:
        if reasoning and message.data.get("role") != "assistant":
            raise ValueError("only an assistant's message has reasoning")
        return reasoning


class _Messages(BaseModel):
    messages: list[_Message]


def _from_openai(fields: dict[str, Any]) -> dict[str, Any]:
    """Turn OpenAI's fields into those of a `ChatRequest`; `model` is ignored, the loaded model answers."""
    for name in ("query", "history", "system"):
        if name in fields:
            raise ChatError(f"{name}: cannot stand beside messages", param=name)
    ours = {name: value for name, value in fields.items() if name != "model"}
    if "max_completion_tokens" in ours:
        ours["max_tokens"] = ours.pop("max_completion_tokens")
    if isinstance(ours.get("stop"), str):
        ours["stop"] = [ours["stop"]]
    if TOOL_FIELDS & ours.keys() or _has_calls(fields["messages"]):
        return ours  # checked by those who render them
    messages = validated(_Messages, {"messages": ours.pop("messages")}).messages
    if messages and messages[0].role in ("system", "developer"):
        ours["system"] = messages.pop(0).content
    if [message.role for message in messages] != [
        ("user", "assistant")[i % 2] for i in range(len(messages) // 2 * 2 + 1)
    ]:
        raise ChatError(
            "messages: after at most one of the system, user and assistant must take turns, the user first and last",
            param="messages",
        )
    *earlier, query = messages
    turns = zip(earlier[::2], earlier[1::2], strict=True)
    ours["history"] = [turn(user.content, answer.content, answer.reasoning or "") for user, answer in turns]
    ours["query"] = query.content
    return ours


def _has_calls(messages: Any) -> bool:
    """Tell whether there are tool calls, or results of them."""
    messages = [message for message in messages if isinstance(message, dict)] if isinstance(messages, list) else []
    return any(message.get("role") == "tool" or message.get("tool_calls") for message in messages)
