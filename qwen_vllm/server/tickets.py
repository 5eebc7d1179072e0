"""An HTTP request of a key on its way through the engine: it waits for its turn, and its tokens are counted.

`Team` gives a `Ticket` for each request. Two patches of vLLM (`patches.TEAM`) find it where the request comes to the
engine, on every route.
"""

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.exceptions import QueueOverflowError

from qwen_vllm.server.keys import Key
from qwen_vllm.server.usage import Running, Usage

if TYPE_CHECKING:
    from qwen_vllm.server.team import Team

PRIORITY_SCALE = 1000


@dataclass(eq=False)
class Account:
    """What a front end knows of one key.

    Attributes:
        running: its HTTP requests here.
        in_engine: its requests in the engine from here; one HTTP request can be several.
        held: those that wait here for their turn.
        queued: both together.
        weight: its priority while something of it is queued, else 0.
        finish: its virtual time, in turns: where its next request would come in the queue.
        new: counts that are not in the usage file yet.
        left, at: of its requests a minute, as in the usage file.
        tokens, day: its tokens of the day, as they were last read.
    """

    key: Key
    running: int = 0
    in_engine: int = 0
    held: deque["_Place"] = field(default_factory=deque)
    queued: int = 0
    weight: int = 0
    finish: float = 0.0
    new: Usage = field(default_factory=Usage)
    left: float = math.inf
    at: float = 0.0
    tokens: int = 0
    day: str = ""

    def state(self) -> Running:
        """Return what other processes should know."""
        return Running(self.running, self.queued, self.finish)


@dataclass(eq=False)
class _Place:
    """Waits for the turn of `size` requests to the engine."""

    size: int
    granted: asyncio.Future[None]


@dataclass(eq=False)
class Ticket:
    """One admitted HTTP request; `start` is its virtual time in the queue. `states` are vLLM's, of those that run."""

    team: "Team"
    account: Account
    start: float
    states: list[Any] = field(default_factory=list)
    counted: int = 0
    answered: bool = False

    @property
    def priority(self) -> int:
        """For vLLM's scheduler: the least comes first."""
        return int(self.start * PRIORITY_SCALE)

    async def serve(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request by `app`; what `app` asks of the engine belongs to this ticket."""
        CURRENT.set(self)
        try:
            await app(scope, receive, send)
        finally:
            CURRENT.set(None)
            self.answered = True
            self.team.count(self)

    @asynccontextmanager
    async def turn(self, size: int) -> AsyncIterator[None]:
        """Wait until the key may have so many more requests in the engine; the block puts them there.

        Raises:
            QueueOverflowError: the queue is full, and the key has its share of it.
        """
        if self not in self.team.tickets:
            self.team.resume(self)
        team, account = self.team, self.account
        if team.is_full_for(account, size):
            team.refuse(account, "queue")
            raise QueueOverflowError()
        team.queue(account, size)
        try:
            if account.held or not team.has_room(account, size):
                await self._hold(size)
            else:
                account.in_engine += size
            try:
                yield
            finally:
                account.in_engine -= size  # `add` has counted those that are there now
        finally:
            team.queue(account, -size)

    async def _hold(self, size: int) -> None:
        place = _Place(size, asyncio.get_running_loop().create_future())
        self.account.held.append(place)
        try:
            await place.granted
        except asyncio.CancelledError:
            if not place.granted.cancelled():
                self.account.in_engine -= size  # granted, and left in the same moment
            raise
        finally:
            with suppress(ValueError):
                self.account.held.remove(place)

    def add(self, state: Any) -> None:
        """Take a request that has come to the engine, as vLLM's output processor keeps it."""
        self.account.in_engine += 1
        self.team.queue(self.account, 1)
        self.states.append(state)
        if state.request_index == 0:
            self.account.new.prompt_tokens += state.prompt_len

    def count(self, unfinished: Mapping[str, Any]) -> None:
        """Count the tokens that have come since the last time, and let go of what has ended."""
        self.account.new.completion_tokens += sum(map(_tokens, self.states)) - self.counted
        if any(not state.is_prefilling for state in self.states):
            self.team.virtual = max(self.team.virtual, self.start)
        running = [state for state in self.states if unfinished.get(state.request_id) is state]
        ended, self.states, self.counted = len(self.states) - len(running), running, sum(map(_tokens, running))
        if ended:
            self.account.in_engine -= ended
            self.team.queue(self.account, -ended)
        if self.answered and not running:
            self.team.end(self)


CURRENT: ContextVar[Ticket | None] = ContextVar("ticket", default=None)
"""The ticket of the HTTP request that runs in this context."""


def in_turn(add_request: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `AsyncLLM.add_request`: a request with a ticket waits for its turn, and has the ticket's priority."""

    async def add_in_turn(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **given: Any) -> Any:
        if not (ticket := CURRENT.get()):
            return await add_request(self, request_id, prompt, params, *args, **given)
        async with ticket.turn(getattr(params, "n", 1)):
            given["priority"] = ticket.priority
            return await add_request(self, request_id, prompt, params, *args, **given)

    return add_in_turn


def counted(add_request: Callable[..., None]) -> Callable[..., None]:
    """Wrap `OutputProcessor.add_request`: a ticket takes the state of its request."""

    def add_counted(self: Any, request: Any, *args: Any, **given: Any) -> None:
        is_new = request.request_id not in self.request_states
        add_request(self, request, *args, **given)
        if is_new and (ticket := CURRENT.get()):
            ticket.add(self.request_states[request.request_id])

    return add_counted


def _tokens(state: Any) -> int:
    return state.detokenizer.num_output_tokens() if state.detokenizer else 0
