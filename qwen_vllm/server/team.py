"""A team's keys on a running server: holds each key to its limits, gives turns, and writes what was used."""

import asyncio
import math
import sqlite3
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter
from vllm.v1.engine.exceptions import EngineDeadError

from qwen_vllm.protocol import ChatError
from qwen_vllm.server.keys import Key, KeyFileError, KeyRing
from qwen_vllm.server.tickets import Account, Ticket
from qwen_vllm.server.usage import Running, Usage, UsageFile

TICK = 1.0
"""Seconds between two looks at the key file and at the answers that run, and between two writes of their counts."""
KEPT_FREE = 16
"""One key takes all but a 16th of the places in the engine: another key's request finds one at once."""
REQUESTS = Counter("qwen_requests", "Requests that were admitted", ["key"])
REFUSED = Counter("qwen_refused", "Requests over a limit of their key", ["key", "limit"])
PROMPT = Counter("qwen_prompt_tokens", "Tokens of prompts", ["key"])
COMPLETION = Counter("qwen_completion_tokens", "Tokens of answers", ["key"])


@dataclass(eq=False)
class Asked:
    """An HTTP request with so many requests to the engine, until it is admitted or refused."""

    key: Key
    size: int
    ticket: asyncio.Future[Ticket]


class Team:
    """The keys, their accounts and their limits.

    Args:
        ring: the key file.
        file: the usage file.
        engine: vLLM's client of the engine.
        bound: most requests in the queue; None: any number. A key under its share of them is taken even so.
        places: requests that the engines run at once.
        models: the names of the model itself.
    """

    def __init__(
        self, ring: KeyRing, file: UsageFile, engine: Any, bound: int | None, places: int, models: list[str]
    ) -> None:
        self.ring, self.virtual, self.tickets = ring, 0.0, set[Ticket]()
        self._file, self._engine, self._models = file, engine, models
        self._bound, self._places = bound, max(1, places - max(1, places // KEPT_FREE))
        self._accounts: dict[str, Account] = {}
        self._queued = self._weight = 0
        self._others: dict[str, Running] = {}
        """What other front ends of this server run, as of the last tick."""
        self._others_queued = self._others_weight = 0
        self._writable, self._was_active = True, False
        self._ticking, self._closed = asyncio.Lock(), False
        self._asked, self._ended = list[Asked](), set[Account]()

    def account(self, key: Key) -> Account:
        """Return the account of a key, with the limits that the key has now."""
        account = self._accounts.setdefault(key.name, Account(key))
        account.key = key
        return account

    async def admit(self, key: Key, request: Any) -> Ticket:
        """Admit an HTTP request with the JSON `request`.

        Raises:
            ChatError: the key may not use the model, a limit is reached, or the queue is full.
        """
        fields = request if isinstance(request, dict) else {}
        if key.models is not None and (fields.get("model") or self._models[0]) not in key.models:
            message = f"model: this key is for {', '.join(key.models)}"
            raise ChatError(message, "unauthorized", param="model", status=403)
        account, size = self.account(key), _size(fields)
        if self.is_full_for(account, size):
            self.refuse(account, "queue")
            raise ChatError("the server is busy", "overloaded", status=503)
        asked = Asked(key, size, asyncio.get_running_loop().create_future())
        self._settle_soon()
        self._asked.append(asked)
        try:
            return await asked.ticket
        except asyncio.CancelledError:
            if not asked.ticket.cancelled() and not asked.ticket.exception():
                self.end(asked.ticket.result())  # admitted, and left in the same moment
            raise

    def refuse(self, account: Account, limit: str) -> None:
        """Count a request that is refused."""
        account.new.refused += 1
        REFUSED.labels(account.key.name, limit).inc()

    def _settle_soon(self) -> None:
        if not (self._asked or self._ended):
            asyncio.get_running_loop().call_soon(self._settle)

    def _settle(self) -> None:
        """Answer all that have asked, by the limits, and say what has ended.

        Once for all that came together: each transaction waits for those of the other processes. All of these see the
        same counts while the usage file can be written.
        """
        asked, ended = [one for one in self._asked if not one.ticket.done()], self._ended
        self._asked, self._ended = [], set()
        try:
            self._settle_all(asked, ended)
        except Exception as error:
            for one in asked:
                if not one.ticket.done():
                    one.ticket.set_exception(error)
            raise

    def _settle_all(self, asked: Collection[Asked], ended: Set[Account]) -> None:
        accounts, answered = {self.account(one.key) for one in asked}, False
        if self._writable:
            try:
                with self._file.transaction():
                    self._look(accounts, self._file)
                    self._answer(asked)
                    answered = True
                    for account in accounts:
                        if account.key.requests_per_minute:
                            self._file.save_rate(account.key.name, account.left, account.at)
                    for account in accounts | ended:
                        self._file.save_running(account.key.name, account.state())
            except (OSError, sqlite3.Error) as error:
                self._lost(error)
        if not answered:
            self._look(accounts, None)
            self._answer(asked)

    def _look(self, accounts: Iterable[Account], file: UsageFile | None) -> None:
        """Bring the accounts up to date by the usage file or, without it, by what this process knows."""
        now, today = time.time(), _day()
        for account in accounts:
            key = account.key
            account.elsewhere = file.elsewhere(key.name) if file else Running()
            if most := key.requests_per_minute:
                left, at = (file and file.rate(key.name)) or (account.left, account.at)
                # A clock that goes back gives nothing, and takes nothing.
                account.left, account.at = min(most, left + max(0.0, now - at) * most / 60), now
            if key.tokens_per_day:
                if file:
                    account.tokens = file.tokens(today, key.name)
                elif account.day != today:
                    account.tokens = 0
                account.day = today

    def _answer(self, asked: Iterable[Asked]) -> None:
        """Give those that asked a turn, or say why not."""
        for one in asked:
            account = self.account(one.key)
            if refusal := _refusal(account):
                self.refuse(account, refusal.param or "")
                one.ticket.set_exception(refusal)
                continue
            account.left -= 1
            start = max(self.virtual, account.finish, account.elsewhere.finish)
            account.finish = start + one.size / account.key.priority
            account.running += 1
            account.new.requests += 1
            ticket = Ticket(self, account, start)
            self.tickets.add(ticket)
            one.ticket.set_result(ticket)

    def count(self, ticket: Ticket) -> None:
        """Count what has come of a request."""
        ticket.count(self._engine.output_processor.request_states)

    def end(self, ticket: Ticket) -> None:
        """Forget a ticket of which nothing runs any more."""
        self.tickets.remove(ticket)
        ticket.account.running -= 1
        if ticket.account.key.requests_at_once:
            self._settle_soon()
            self._ended.add(ticket.account)

    def resume(self, ticket: Ticket) -> None:
        """Take a ticket back that has ended: a request in the background goes on after its HTTP answer."""
        ticket.account = self.account(ticket.account.key)
        ticket.account.running += 1
        self.tickets.add(ticket)

    @property
    def holds(self) -> bool:
        """Whether requests wait here for their turn."""
        return any(account.held for account in self._accounts.values())

    def end_held(self, reason: Exception) -> None:
        """End the requests that wait here for their turn."""
        for account in self._accounts.values():
            for place in account.held:
                if not place.granted.done():
                    place.granted.set_exception(reason)

    def queue(self, account: Account, size: int) -> None:
        """Count so many more of a key's requests to the engine, or fewer, and let go on what has room now."""
        self._queued += size
        account.queued += size
        weight = account.key.priority if account.queued else 0
        self._weight += weight - account.weight
        account.weight = weight
        while account.held and self.has_room(account, account.held[0].size):
            place = account.held.popleft()
            account.in_engine += place.size
            if not place.granted.done():
                place.granted.set_result(None)

    def is_full_for(self, account: Account, size: int) -> bool:
        """Tell whether the queue is full, and the key has its share of it; its first request is always taken."""
        if self._bound is None or self._queued + self._others_queued + size <= self._bound:
            return False
        own = account.queued + self._others.get(account.key.name, Running()).queued
        weights = max(account.key.priority, self._weight + self._others_weight)
        return own > 0 and own + size > self._bound * account.key.priority / weights

    def has_room(self, account: Account, size: int) -> bool:
        """Tell whether a key may have so many more requests in the engine; of one key's, some places are kept free.

        The front ends of a server share what a key may have by what is queued in each.
        """
        elsewhere = self._others.get(account.key.name, Running()).queued
        places = math.ceil(self._places * account.queued / (account.queued + elsewhere)) if elsewhere else self._places
        return account.in_engine + size <= places or not account.in_engine

    def usage(self, key: Key | None, day: str | None = None) -> list[dict[str, Any]]:
        """Return the counts of a key on a day, today if None; of all keys if the key is None.

        Raises:
            ChatError: the usage file cannot be read.
        """
        try:
            used = self._file.used(day or _day(), key.name if key else None)
        except sqlite3.Error:
            raise ChatError("the usage file cannot be read", "engine_error", status=500) from None
        keys = self.ring.by_name() if key is None else {key.name: key}
        rows = []
        for name in sorted({*keys, *used}):
            account, total = self._accounts.get(name), used.get(name, Usage())
            if account and day in (None, _day()):
                total.add(account.new)
            limits = keys[name].limits() if name in keys else {}
            rows.append({"name": name, "day": day or _day(), **vars(total), "limits": limits})
        return rows

    async def tick(self) -> None:
        """Look at the key file, count the tokens of the answers that run, and write the counts."""
        async with self._ticking:
            if not self._closed:
                await self._tick()

    async def _tick(self) -> None:
        if self.ring.has_changed():
            await self.reread()
        for ticket in [*self.tickets]:
            self.count(ticket)
        if self._engine.errored:
            self.end_held(EngineDeadError())
        written = {name: account.new for name, account in self._accounts.items() if account.new != Usage()}
        for name in written:
            self._accounts[name].new = Usage()
        if not (self._accounts or self._was_active):
            return
        self._was_active = bool(self._accounts)
        try:
            self._others = await asyncio.to_thread(self._file.write, _day(), written, self._running)
        except sqlite3.Error as error:
            self._lost(error)
            for name, used in written.items():
                self._accounts[name].new.add(used)
            return
        for name, used in written.items():
            REQUESTS.labels(name).inc(used.requests)
            PROMPT.labels(name).inc(used.prompt_tokens)
            COMPLETION.labels(name).inc(used.completion_tokens)
        self.virtual = max(self.virtual, self._others.pop("", Running()).finish)
        self._look_at_others()
        if not self._writable:
            self._writable = True
            _say("the usage file is written again; nothing was lost")

    def _look_at_others(self) -> None:
        """Take what the other front ends of this server run, and forget the keys of which nothing runs here."""
        keys, waiting = self.ring.by_name(), {name: row.queued for name, row in self._others.items() if row.queued}
        self._others_queued = sum(waiting.values())
        here = {name for name, account in self._accounts.items() if account.queued}
        self._others_weight = sum(keys[name].priority for name in waiting.keys() - here if name in keys)
        idle = [name for name, account in self._accounts.items() if not account.running and account.new == Usage()]
        for name in idle:
            del self._accounts[name]
        for account in self._accounts.values():
            self.queue(account, 0)

    async def reread(self) -> None:
        """Read the key file again; where it cannot be used, the keys stay as they are."""
        try:
            await asyncio.to_thread(self.ring.reread)
            _say("the key file was read again")
        except KeyFileError as error:
            _say(f"the keys stay as they were: {error}")

    async def run(self) -> None:
        """Do `tick` again and again, until closed."""
        while not self._closed:
            await self.tick()
            await asyncio.sleep(TICK)

    async def close(self) -> None:
        """Write what is not written yet."""
        await self.tick()
        self._closed, self._writable = True, False
        self._file.close()

    def _running(self) -> list[tuple[str, Running]]:
        """For the thread that writes: the event loop may change the accounts meanwhile."""
        rows = [(account.key.name, account.state()) for account in [*self._accounts.values()] if account.running]
        return [*rows, ("", Running(finish=self.virtual))]

    def _lost(self, error: Exception) -> None:
        """Go on by what this process knows, until the file can be written again."""
        if self._writable:
            self._writable = False
            _say(f"the usage file cannot be written ({error}): counts are kept in memory, limits hold for each process")


def _size(fields: Mapping[str, Any]) -> int:
    """Count the requests to the engine that one of HTTP makes."""
    answers, prompts = fields.get("n"), fields.get("prompt")
    size = answers if isinstance(answers, int) and answers > 0 else 1
    if isinstance(prompts, list) and prompts and isinstance(prompts[0], str | list):
        return size * len(prompts)
    return size


def _refusal(account: Account) -> ChatError | None:
    """Tell which limit a key's next request would break."""
    key, new = account.key, account.new
    if key.requests_per_minute and account.left < 1:
        return _over(key, "requests_per_minute", math.ceil((1 - account.left) * 60 / key.requests_per_minute))
    if key.requests_at_once and account.running + account.elsewhere.requests >= key.requests_at_once:
        return _over(key, "requests_at_once", 1)
    if key.tokens_per_day and account.tokens + new.prompt_tokens + new.completion_tokens >= key.tokens_per_day:
        return _over(key, "tokens_per_day", _seconds_left_of_day())
    return None


def _over(key: Key, limit: str, seconds: int) -> ChatError:
    message = f"{limit}: this key's limit of {getattr(key, limit)} is reached; try again in {seconds} s"
    return ChatError(message, "limited", param=limit, status=429, retry_after=seconds)


def _day() -> str:
    return time.strftime("%Y-%m-%d")


def _seconds_left_of_day() -> int:
    now = time.localtime()
    return 86400 - now.tm_hour * 3600 - now.tm_min * 60 - now.tm_sec


def _say(text: str) -> None:
    print(f"Keys: {text}", file=sys.stderr, flush=True)
