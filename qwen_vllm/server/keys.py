"""The key file: who may ask, and how much. It knows nothing of counts, of HTTP or of vLLM."""

import hashlib
import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from qwen_vllm.protocol import INT64_MAX, ChatError, validated
from qwen_vllm.words import SaidError, say

HASHED = "sha256:"
NAME = re.compile(r"[^\x00-\x1f\x7f]{1,64}")
Limit = Annotated[int | None, Field(ge=1, le=INT64_MAX)]


class KeyFileError(SaidError):
    """Says what is wrong with the key file; the message never holds a key."""


class Key(BaseModel):
    """Holds one table of the key file; None: no limit.

    `models` are names of the model and its adapters. `priority` is the number of turns in a full queue for each turn of
    a key with 1. The key itself is kept as its SHA-256 alone. That is enough for keys that are long and random, as
    nobody can try them all; it would not be for passwords.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: str
    digest: Annotated[bytes, Field(repr=False)]
    requests_per_minute: Limit = None
    tokens_per_day: Limit = None
    requests_at_once: Limit = None
    priority: int = Field(1, ge=1, le=100)
    models: list[Annotated[str, StringConstraints(min_length=1)]] | None = None
    admin: bool = False

    def limits(self) -> dict[str, int]:
        """Return the limits that are set, by name."""
        names = {"requests_per_minute", "tokens_per_day", "requests_at_once"}
        return self.model_dump(include=names, exclude_none=True)


class KeyRing:
    """The keys of the file at `path`.

    Raises:
        KeyFileError: at first, where the file cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.reread()

    def reread(self) -> None:
        """Read the file again.

        Raises:
            KeyFileError: it cannot be used; the keys that were there stay.
        """
        self._read_state: tuple[int, ...] | None = self._state()
        self._keys = read_keys(self._path)
        self._names = {key.name: key for key in self._keys.values()}

    def has_changed(self) -> bool:
        """Tell whether the file is another one than when it was last read."""
        return self._state() != self._read_state

    def expect_change(self) -> None:
        """Take the file for another one, whatever its state says."""
        self._read_state = None

    def find(self, given: bytes) -> Key | None:
        """Find the key that a client has given.

        The time does not depend on how much of a key is right: what is looked up is a hash.
        """
        return self._keys.get(hashlib.sha256(given).digest())

    def by_name(self) -> dict[str, Key]:
        """Return the keys by their names."""
        return self._names

    def _state(self) -> tuple[int, ...]:
        try:
            state = self._path.stat()
        except OSError:
            return ()
        return state.st_mtime_ns, state.st_ctime_ns, state.st_size, state.st_ino


def read_keys(path: Path) -> dict[bytes, Key]:
    """Read a key file: the keys by their SHA-256.

    Raises:
        KeyFileError: others may read it, it is no TOML, or a table of it is wrong.
    """
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & 0o007:
                raise KeyFileError("{path}: every user of this machine may open it: chmod o= {path}", path=path)
            tables = tomllib.load(file)
    except OSError as error:
        raise KeyFileError("{path}: {reason}", path=path, reason=error.strerror) from None
    except ValueError as error:  # also of bytes that are not UTF-8
        reason = str(error) if isinstance(error, tomllib.TOMLDecodeError) else "not UTF-8"
        raise KeyFileError("{path} is no TOML: {reason}", path=path, reason=reason) from None
    keys: dict[bytes, Key] = {}
    for name, table in tables.items():
        key = _key(path, name, table)
        if key.digest in keys:
            other = keys[key.digest].name
            raise KeyFileError("{path}: [{name}] and [{other}] have the same key", path=path, name=name, other=other)
        keys[key.digest] = key
    if not keys:
        raise KeyFileError('{path} has no key: begin with a table, [NAME], and in it key = "…"', path=path)
    return keys


def _key(path: Path, name: str, table: Any) -> Key:
    try:
        if not NAME.fullmatch(name):
            raise ChatError(say("a name has at most 64 characters, and no line break"))
        if not isinstance(table, dict):
            raise ChatError(say('a key is a table: [NAME], and in it key = "…"'))
        fields = {field: value for field, value in table.items() if field != "key"}
        if wrong := fields.keys() - Key.model_fields.keys() | fields.keys() & {"name", "digest"}:
            known = ", ".join(["key", *sorted(Key.model_fields.keys() - {"name", "digest"})])
            raise ChatError(say("there is no {wrong}, only {known}", wrong=min(wrong), known=known))
        return validated(Key, {"name": name, "digest": _digest(table.get("key")), **fields})
    except ChatError as error:
        raise KeyFileError("{path}: [{name}]: {reason}", path=path, name=name[:64], reason=error.message) from None


def _digest(key: Any) -> bytes:
    if not isinstance(key, str) or len(key) < 16:
        raise ChatError(say("key: a text of at least 16 characters; `openssl rand -hex 24` makes a good one"))
    if not key.startswith(HASHED):
        return hashlib.sha256(key.encode()).digest()
    if not re.fullmatch("[0-9a-f]{64}", key.removeprefix(HASHED)):
        raise ChatError(say("key: behind sha256: there are 64 hexadecimal digits, as sha256sum prints them"))
    return bytes.fromhex(key.removeprefix(HASHED))
