"""An HTTP request of a key on its way through the engine: it waits for its turn, and its tokens are counted.

`Team` gives a `Ticket` for each request. Two patches of vLLM (`patches.TEAM`) find it where the request comes to the
engine, on every route.
"""

import asyncio
import math
from collections import deque
from collections.abc import Callable, Mapping
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
        elsewhere: what other processes run of it, as it was last read.
    """

    key: Key
    running: int = 0
    in_engine: int = 0
    held: deque["Place"] = field(default_factory=deque)
    queued: int = 0
    weight: int = 0
    finish: float = 0.0
    new: Usage = field(default_factory=Usage)
    left: float = math.inf
    at: float = 0.0
    tokens: int = 0
    day: str = ""
    elsewhere: Running = field(default_factory=Running)

    def state(self) -> Running:
        """Return what other processes should know."""
        return Running(self.running, self.queued, self.finish)


@dataclass(eq=False)
class Place:
    """Room for `size` requests of a ticket in the engine, as soon as it is granted."""

    ticket: "Ticket"
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

    async def turn(self, size: int) -> Place:
        """Wait until the key may have so many more requests in the engine.

        Raises:
            QueueOverflowError: the queue is full, and the key has its share of it.
        """
        if self not in self.team.tickets:
            self.team.resume(self)
        if self.team.is_full_for(self.account, size):
            self.team.refuse(self.account, "queue")
            raise QueueOverflowError()
        place = Place(self, size, asyncio.get_running_loop().create_future())
        self.account.held.append(place)
        self.team.queue(self.account, size)
        try:
            await place.granted
        except BaseException:
            if place in self.account.held:
                self.account.held.remove(place)
                self.team.queue(self.account, -size)
            else:
                self.leave(size)  # granted, and left in the same moment
            raise
        return place

    def leave(self, size: int) -> None:
        """Give room in the engine back."""
        self.account.in_engine -= size
        self.team.queue(self.account, -size)

    def place_held(self) -> int:
        """Return the place among the key's requests that wait here for their turn, from 1; 0: it does not wait here."""
        return next((number for number, place in enumerate(self.account.held, 1) if place.ticket is self), 0)

    def add(self, state: Any) -> None:
        """Take a request that has come to the engine, as vLLM's output processor keeps it."""
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
            self.leave(ended)
        if self.answered and not running:
            self.team.end(self)


CURRENT: ContextVar[Ticket | None] = ContextVar("ticket", default=None)
"""The ticket of the HTTP request that runs in this context."""
PLACE: ContextVar[Place | None] = ContextVar("place", default=None)
"""The room that the request has which this context brings to the engine."""


def in_turn(add_request: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `AsyncLLM.add_request`: a request with a ticket waits for its turn, and has the ticket's priority."""

    async def add_in_turn(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **given: Any) -> Any:
        if not (ticket := CURRENT.get()):
            return await add_request(self, request_id, prompt, params, *args, **given)
        place = await ticket.turn(getattr(params, "n", 1))
        given["priority"] = ticket.priority
        before = PLACE.set(place)
        try:
            return await add_request(self, request_id, prompt, params, *args, **given)
        finally:
            PLACE.reset(before)
            if place.size:
                ticket.leave(place.size)

    return add_in_turn


def counted(add_request: Callable[..., None]) -> Callable[..., None]:
    """Wrap `OutputProcessor.add_request`: the ticket takes the state of its request, which now has its place."""

    def add_counted(self: Any, request: Any, *args: Any, **given: Any) -> None:
        add_request(self, request, *args, **given)
        if place := PLACE.get():
            place.ticket.add(self.request_states[request.request_id])
            place.size -= 1

    return add_counted


def _tokens(state: Any) -> int:
    return state.detokenizer.num_output_tokens() if state.detokenizer else 0
