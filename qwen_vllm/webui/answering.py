"""An answer on its way to the page, and the line of those who wait for one."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any

from qwen_vllm.protocol import ChatError, ChatResult, Part, Reasoning
from qwen_vllm.webui.conversation import NO_ANSWER, Messages, _said


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
