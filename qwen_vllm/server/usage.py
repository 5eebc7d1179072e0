"""The usage file: what each key has used, and what runs now, shared by all servers of this machine.

It is an SQLite database. Nothing in it knows of HTTP or of vLLM. What is committed survives the end of any process;
what the machine had not written when its power failed does not.
"""

import fcntl
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

LEASE = 10.0
"""Seconds after which what a process has said of its running requests counts no more: it has ended, or hangs."""
TURN = 0.5
"""Seconds that a request waits for other processes; then the limits hold in each process by itself."""
TABLES = """
CREATE TABLE IF NOT EXISTS usage (
    day TEXT, name TEXT, requests INTEGER, refused INTEGER, prompt_tokens INTEGER, completion_tokens INTEGER,
    PRIMARY KEY (day, name)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS rate (name TEXT PRIMARY KEY, left REAL, at REAL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS running (
    name TEXT, process TEXT, server TEXT, requests INTEGER, queued INTEGER, finish REAL, seen REAL,
    PRIMARY KEY (name, process)) WITHOUT ROWID;
"""
SAVE_RUNNING = """
INSERT INTO running VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE
SET requests = excluded.requests, queued = excluded.queued, finish = max(finish, excluded.finish), seen = excluded.seen
"""
SAVE_RATE = "INSERT INTO rate VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET left = excluded.left, at = excluded.at"
ADD_USAGE = """
INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE
SET requests = requests + excluded.requests, refused = refused + excluded.refused,
    prompt_tokens = prompt_tokens + excluded.prompt_tokens,
    completion_tokens = completion_tokens + excluded.completion_tokens
"""
FRESH = "seen BETWEEN ? AND ?"
"""Monotonic seconds: the same for all processes of a machine; after a restart of the machine, larger ones are old."""


@dataclass
class Usage:
    """Counts of one key."""

    requests: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, other: "Usage") -> None:
        """Add what another one has counted."""
        self.requests += other.requests
        self.refused += other.refused
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens


class Running(NamedTuple):
    """What runs of one key: HTTP requests, requests to the engine, and its virtual time in the queue."""

    requests: int = 0
    queued: int = 0
    finish: float = 0.0


class UsageFile:
    """The usage file at `path`, as one front end of one server sees it.

    Two threads may use it: one for requests, one for `write`.

    Raises:
        OSError, sqlite3.Error: here and in every method, where the file cannot be read or written.
    """

    def __init__(self, path: Path, server: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        self._server, self._process = server, f"{server}/{os.getpid()}"
        self._lock = os.open(f"{path}-lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        # Requests wait for no disk: the thread that writes brings the log (WAL) into the file, and waits for it.
        with self._turn():
            self._requests = self._open(path, TURN, "PRAGMA synchronous = OFF; PRAGMA wal_autocheckpoint = 0")
            self._writes = self._open(path, 5, "PRAGMA synchronous = NORMAL")
            self._writes.executescript(TABLES)

    @staticmethod
    def _open(path: Path, timeout: float, settings: str) -> sqlite3.Connection:
        connection = sqlite3.connect(path, timeout, isolation_level=None, check_same_thread=False)
        connection.executescript(f"PRAGMA journal_mode = WAL; {settings}")
        return connection

    def close(self) -> None:
        """Close the file."""
        self._requests.close()
        self._writes.close()
        os.close(self._lock)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Wait while another process is here, as long as `TURN` at most, in case that it hangs.

        SQLite by itself sleeps longer and longer between two looks at its lock, and fails where two open a new file.
        """
        until = time.monotonic() + TURN
        while time.monotonic() < until:
            with suppress(BlockingIOError):
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.0002)
        try:
            yield
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Let no other process change the counts while the block runs; an exception takes back what it changed."""
        with self._turn(), _transaction(self._requests):
            yield

    def rate(self, name: str) -> tuple[float, float] | None:
        """Return what was left of a key's requests a minute, and when (seconds of time.time)."""
        found: tuple[float, float] | None = self._requests.execute(
            "SELECT left, at FROM rate WHERE name = ?", (name,)
        ).fetchone()
        return found

    def save_rate(self, name: str, left: float, at: float) -> None:
        """Keep what `rate` returns."""
        self._requests.execute(SAVE_RATE, (name, left, at))

    def elsewhere(self, name: str) -> Running:
        """Return what other processes run of a key: all servers' requests, and the virtual time on this server."""
        rows = self._requests.execute(
            f"SELECT server, requests, finish FROM running WHERE name = ? AND process <> ? AND {FRESH}",
            (name, self._process, *_fresh()),
        ).fetchall()
        finish = max((finish for server, _, finish in rows if server == self._server), default=0.0)
        return Running(sum(requests for _, requests, _ in rows), 0, finish)

    def save_running(self, name: str, running: Running) -> None:
        """Tell the other processes what this one runs of a key."""
        row = (name, self._process, self._server, *running, time.monotonic())
        self._requests.execute(SAVE_RUNNING, row)

    def used(self, day: str, name: str | None = None) -> dict[str, Usage]:
        """Return the counts of a day (YYYY-MM-DD) by name: of one key, or of all."""
        rows = self._requests.execute(
            "SELECT name, requests, refused, prompt_tokens, completion_tokens FROM usage "
            "WHERE day = ? AND (? IS NULL OR name = ?)",
            (day, name, name),
        )
        return {name: Usage(*counts) for name, *counts in rows}

    def tokens(self, day: str, name: str) -> int:
        """Return the tokens of a key on a day."""
        row = self._requests.execute(
            "SELECT prompt_tokens + completion_tokens FROM usage WHERE day = ? AND name = ?", (day, name)
        ).fetchone()
        return row[0] if row else 0

    def write(
        self, day: str, used: Mapping[str, Usage], running: Callable[[], Iterable[tuple[str, Running]]]
    ) -> dict[str, Running]:
        """Add to the counts, say what runs here, and return what the other front ends of this server run.

        `running` is called while no request can change what is in the file.
        """
        now = time.monotonic()
        with _transaction(self._writes):
            self._writes.executemany(
                ADD_USAGE,
                [
                    (day, name, new.requests, new.refused, new.prompt_tokens, new.completion_tokens)
                    for name, new in used.items()
                ],
            )
            self._writes.execute("DELETE FROM running WHERE process = ?", (self._process,))
            rows = [(name, self._process, self._server, *row, now) for name, row in running()]
            self._writes.executemany(SAVE_RUNNING, rows)
            self._writes.execute(f"DELETE FROM running WHERE NOT {FRESH}", _fresh())
            others = self._writes.execute(
                "SELECT name, sum(requests), sum(queued), max(finish) FROM running "
                "WHERE server = ? AND process <> ? GROUP BY name",
                (self._server, self._process),
            ).fetchall()
        return {name: Running(*row) for name, *row in others}


def _fresh() -> tuple[float, float]:
    now = time.monotonic()
    return now - LEASE, now + 1


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
