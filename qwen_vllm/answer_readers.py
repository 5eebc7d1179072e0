"""Reads answers from the bodies that `/chat` and OpenAI's route stream: chunks of bytes → `Part`s; knows no HTTP."""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from qwen_vllm.protocol import ChatError, ChatResult, Part, Reasoning, Turn, turn

OnWaiting = Callable[[int, int], None]
"""Takes the place in the queue, about, and the tokens of the prompt; place 0: the model reads them."""


class AnswerReader:
    """Reads the parts of an answer from the chunks of its body."""

    def __init__(self) -> None:
        self._unread, self._reasoning, self._text = b"", "", ""
        self.ended = False

    def parts(self, chunk: bytes) -> Iterator[Part]:
        """Yield the parts of the lines that this chunk completes."""
        *lines, self._unread = (self._unread + chunk).split(b"\n")
        for line in lines:
            for part in self._parts_of(line):
                if isinstance(part, ChatResult):
                    self.ended = True
                elif isinstance(part, Reasoning):
                    self._reasoning += part.text
                else:
                    self._text += part
                yield part

    def _parts_of(self, line: bytes) -> Iterator[Part]:
        raise NotImplementedError


class ChatLines(AnswerReader):
    """Reads the lines of `/chat`: a JSON object each."""

    def __init__(self, query: str, history: Sequence[Turn], on_waiting: OnWaiting | None) -> None:
        super().__init__()
        self._query, self._history, self._on_waiting = query, history, on_waiting

    def _parts_of(self, line: bytes) -> Iterator[Part]:
        value = json.loads(line)
        if "error" in value:
            raise ChatError(value["error"]["message"], value["error"]["type"])
        if "delta" in value:
            yield value["delta"]
        elif "reasoning" in value:
            yield Reasoning(value["reasoning"])
        elif "waiting" in value:
            if self._on_waiting:
                self._on_waiting(value["waiting"], value["prompt_tokens"])
        else:
            kept = self._reasoning if value["keeps_reasoning"] else ""
            yield ChatResult(
                text=self._text,
                history=[*self._history, turn(self._query, self._text, kept)],
                finish_reason=value["finish_reason"],
                stop_reason=value["stop_reason"],
                prompt_tokens=value["usage"]["prompt_tokens"],
                completion_tokens=value["usage"]["completion_tokens"],
                dropped_turns=value["dropped_turns"],
                reasoning=self._reasoning,
                reasoning_tokens=value["usage"]["reasoning_tokens"],
                dropped_reasoning=value["dropped_reasoning"],
            )


class OpenAIEvents(AnswerReader):
    """Reads the server-sent events of OpenAI's route; the usage comes last."""

    def __init__(self) -> None:
        super().__init__()
        self._last_choice: dict[str, Any] = {}
        self._calls: dict[int, dict[str, Any]] = {}

    def _parts_of(self, line: bytes) -> Iterator[Part]:
        data = line.removeprefix(b"data: ").strip()
        if not data or data == b"[DONE]" or data.startswith(b":"):  # a comment: a sign of life
            return
        event = json.loads(data)
        if "error" in event:
            raise ChatError(event["error"]["message"], "engine_error")
        for choice in event["choices"]:
            self._last_choice = choice
            if reasoning := choice["delta"].get("reasoning"):
                yield Reasoning(reasoning)
            if text := choice["delta"].get("content"):
                yield text
            for call in choice["delta"].get("tool_calls") or ():
                whole = self._calls.setdefault(call["index"], {"type": "function", "function": {"arguments": ""}})
                whole["id"] = call.get("id") or whole["id"]
                whole["function"]["name"] = call["function"].get("name") or whole["function"]["name"]
                whole["function"]["arguments"] += call["function"].get("arguments") or ""
        if usage := event.get("usage"):
            yield ChatResult(
                text=self._text,
                history=[],
                finish_reason=self._last_choice["finish_reason"],
                stop_reason=self._last_choice.get("stop_reason"),
                prompt_tokens=usage["prompt_tokens"],
                completion_tokens=usage["completion_tokens"],
                dropped_turns=0,
                reasoning=self._reasoning,
                reasoning_tokens=(usage.get("completion_tokens_details") or {}).get("reasoning_tokens", 0),
                tool_calls=[*self._calls.values()],
            )
