"""Answers the questions of the page: the line in front of the model server, and the replies that grow."""

import asyncio
import json
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from itertools import count
from typing import NamedTuple

from qwen_vllm.flags import typed
from qwen_vllm.protocol import ChatError, ChatResult, Part, Reasoning, Sampling, ServerInfo, validated
from qwen_vllm.retry import retry_delay
from qwen_vllm.webui.conversation import KEPT, Message, Messages, question_of, remark, text_message, turns
from qwen_vllm.words import Words
from vllm_client import stream_question_async


class WaitingLine:
    """Admits `at_once` requests; up to `waiting` more wait in order."""

    def __init__(self, at_once: int, waiting: int) -> None:
        self._at_once, self.limit = at_once, at_once + waiting
        self._tickets: list[asyncio.Event] = []

    @contextmanager
    def ticket(self) -> Iterator[asyncio.Event]:
        """Hold a place in the line. The ticket is set each time the line moves.

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
        """Yield this ticket's position, from 1, each time the line moves. End when it is admitted."""
        while (place := self._tickets.index(ticket) - self._at_once + 1) > 0:
            yield place
            await ticket.wait()
            ticket.clear()


class Reply:
    """A growing answer as the page shows it. `info` describes the server, as far as it is known."""

    def __init__(self, words: Words, info: ServerInfo) -> None:
        self.words, self.ended, self.changed = words, asyncio.Event(), asyncio.Event()
        self.drawn, self.seen_drawn = asyncio.Event(), False
        self._info, self._began = info, time.monotonic()
        self._first = self._last = self._thought = 0.0
        self._reasoning, self._text, self._notice = "", "", ""
        self._end: ChatResult | ChatError | None = None

    def notify(self, notice: str) -> None:
        """Show a notice to the person who waits, until the next part comes."""
        self._notice = notice
        self.changed.set()

    def add(self, part: Part | ChatError | None) -> None:
        """Take the next part of the answer, the reason why it ended early, or None at its end."""
        self._notice, now = "", time.monotonic()
        match part:
            case None:
                self.ended.set()
                self.drawn.set()  # the last drawing waits for none
            case Reasoning():
                self._reasoning, self._first = self._reasoning + part.text, self._first or now
                self._thought = now - self._first
            case str():
                self._text, self._first = self._text + part, self._first or now
            case _:
                self._end, self._last = part, now
        self.changed.set()

    def messages(self) -> Messages:
        """Return what stands under the question now: reasoning, the answer, a remark in its place."""
        result = self._end if isinstance(self._end, ChatResult) else None
        kept = not result or bool(result.kept_reasoning)  # a stopped answer leaves it to the server
        shown = answer_messages(self._reasoning, self._text, self.words, ended=self.ended.is_set(), kept=kept)
        if self._reasoning.strip() and (self._text or self.ended.is_set()):
            shown[0]["metadata"]["log"] = self._thought_cost(result.reasoning_tokens if result else 0)
        if self._notice:
            shown.append(remark(self._notice, status="pending"))
        elif isinstance(self._end, ChatError):
            shown.append(failure(self._end, self.words))
        elif result and result.ended_in_reasoning:
            effort = self.words["lower_effort"] if self._info.reasoning_efforts else ""
            shown.append(remark(self.words["no_answer"], self.words["ended_in_reasoning"] + effort))
        elif self.ended.is_set() and not shown:
            shown.append(remark(self.words["no_answer"], self.words["empty_answer" if self._end else "stopped_early"]))
        return shown

    def _thought_cost(self, tokens: int) -> str:
        """Return how long the model thought, and with how many tokens where they are known."""
        seconds = self.words["seconds"].format(seconds=self._thought)
        return " · ".join([seconds, *([self.words["tokens"].format(used=tokens)] if tokens else [])])

    def figures(self) -> str:
        """Return the line under the answer: its speed, its tokens, and how much of the context they may take."""
        if not isinstance(self._end, ChatResult):
            return self.words["stopped"] if self.ended.is_set() and not self._end else ""
        words, result = self.words, self._end
        seconds = max(self._last - self._first, 1e-9)
        figures = [words["first_token"].format(seconds=(self._first or self._last) - self._began)]
        if result.completion_tokens > 1:
            figures.append(words["speed"].format(speed=(result.completion_tokens - 1) / seconds))
        cost = words["cost"].format(prompt=result.prompt_tokens, answer=result.completion_tokens)
        figures.append(cost + (words["window"].format(context=self._info.context) if self._info.context else ""))
        if result.dropped_turns:
            figures.append(words["dropped"].format(turns=result.dropped_turns))
        if result.dropped_reasoning:
            figures.append(words["dropped_reasoning"].format(turns=result.dropped_reasoning))
        if result.finish_reason == "length":
            figures.append(words["cut"])
        return " · ".join(figures)


def answer_messages(reasoning: str, text: str, words: Words, ended: bool = False, kept: bool = True) -> Messages:
    """Return an answer, whole or so far, as messages: the reasoning folded, and marked where it is kept; the text."""
    messages = []
    if reasoning.strip():
        status = "done" if text or ended else "pending"
        metadata = {"title": words[f"reasoning_{status}"], "status": status} | ({"id": KEPT} if kept else {})
        messages.append(text_message("assistant", reasoning.strip(), **metadata))
        text = text.lstrip("\n")  # `/v1` leaves line breaks between the two
    if text:
        messages.append(text_message("assistant", text))
    return messages


def failure(error: ChatError, words: Words) -> Message:
    """Return the remark that says why there is no answer, or no whole one, and what to do."""
    text = words.get(error.type, error.message)
    if error.type in ("invalid_request", "engine_error"):
        text += f"\n\n{error.message}"
    return remark(words["no_answer"], text)


class Settings(NamedTuple):
    """The page's settings. An empty field leaves the value to the server."""

    system: str
    """the system prompt"""
    fields: dict[str, str]
    """what stands in the field of each sampling parameter, by name"""


def settings_of(kept: str) -> Settings:
    """Return the settings as the browser keeps them: a JSON list, in the protocol's order."""
    system, *fields = json.loads(kept)
    return Settings(system, dict(zip(Sampling.model_fields, fields, strict=True)))


def sampling_of(fields: dict[str, str]) -> Sampling:
    """Return the sampling parameters from the page's fields.

    Raises:
        ChatError: naming the parameter whose value is not allowed.
    """
    filled = {name: value for name, value in fields.items() if value}
    given = {name: typed(name, value) for name, value in filled.items()}
    if (depth := filled.get("reasoning_effort")) in ("off", "on"):  # the menu's words for a model without levels
        del given["reasoning_effort"]
        given["enable_thinking"] = depth == "on"
    if "stop" in filled:  # here a word is a line
        given["stop"] = [word for word in filled["stop"].splitlines() if word]
    return validated(Sampling, given)


class AnswerStreams:
    """The answers that stream to the page's tabs. Each comes from the model server at `url`, in turn by `line`."""

    def __init__(self, url: str, api_key: str | None, line: WaitingLine) -> None:
        self._url, self._api_key, self.line = url, api_key, line
        self._readers: dict[asyncio.Task[None], tuple[str, Reply]] = {}
        """The tasks that read answers from the server, each with its tab and its reply."""

    @contextmanager
    def grow(self, reply: Reply, tab: str, messages: Messages, settings: Settings) -> Iterator[None]:
        """Let the reply grow with the answer to the conversation's last question; stop where the block is left."""
        reader = asyncio.create_task(self._read(reply, messages, settings))
        reader.add_done_callback(lambda _: reply.add(None))
        self._readers[reader] = tab, reply
        try:
            yield
        finally:
            reader.cancel()
            del self._readers[reader]

    def stop(self, tab: str | None = None) -> None:
        """Stop the answers to one tab, or to all tabs, in the engine too."""
        for reader, (owner, _) in self._readers.items():
            if tab in (None, owner):
                reader.cancel()

    def drawn(self, tab: str) -> None:
        """Let the replies to one tab be drawn again: the tab is done with what it got."""
        for owner, reply in self._readers.values():
            if tab == owner:
                reply.seen_drawn = True
                reply.drawn.set()

    async def _read(self, reply: Reply, messages: Messages, settings: Settings) -> None:
        """Wait in line, ask, and ask again while the server is busy."""
        try:
            sampling = sampling_of(settings.fields)
            with self.line.ticket() as ticket:
                async for place in self.line.places(ticket):
                    reply.notify(reply.words["place"].format(place=place))
                for attempt in count(1):
                    try:
                        async with aclosing(self._ask(reply, messages, settings.system, sampling)) as parts:
                            async for part in parts:
                                reply.add(part)
                        return
                    except ChatError as error:
                        delay = retry_delay(error, attempt)
                    for seconds in range(math.ceil(delay), 0, -1):
                        reply.notify(reply.words["busy"].format(seconds=seconds))
                        await asyncio.sleep(1)
        except ChatError as error:
            reply.add(error)

    def _ask(self, reply: Reply, messages: Messages, system: str, sampling: Sampling) -> AsyncGenerator[Part, None]:
        def show(place: int, tokens: int) -> None:
            words = reply.words
            reply.notify(words["place"].format(place=place) if place else words["reading"].format(tokens=tokens))

        query, history = question_of(messages[-1]), turns(messages[:-1])
        return stream_question_async(self._url, query, history, system, sampling, self._api_key, show)
