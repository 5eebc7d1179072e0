"""A scripted stand-in for `ChatModel` in batches, and files of rows and answers."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qwen_vllm.protocol import ChatError, ChatResult, Sampling


class ScriptedModel:
    """Answers a query with its upper case, the last drawn of `window` first; what is in `script` is yielded or raised.

    Records the requests it drew.
    """

    def __init__(self, script: dict[str, BaseException] | None = None, window: int = 3) -> None:
        self._script, self._window = script or {}, window
        self.requests: list[dict[str, Any]] = []
        self.sampling: Sampling | None = None

    @property
    def queries(self) -> list[str]:
        return [request["query"] for request in self.requests]

    def stream_batch(
        self, rows: Iterable[dict[str, Any]], sampling: Sampling | None, deltas: bool
    ) -> Iterator[tuple[int, ChatResult | ChatError]]:
        assert not deltas
        source, running, self.sampling = enumerate(rows), [], sampling
        while True:
            while len(running) < self._window and (drawn := next(source, None)):
                running.append(drawn)
                self.requests.append(drawn[1])
            if not running:
                return
            i, request = running.pop()
            query = request["query"]
            outcome = self._script.get(query)
            if outcome and getattr(outcome, "type", "") != "invalid_request":
                raise outcome
            history = [*request.get("history", []), (query, query.upper())]
            yield i, outcome or ChatResult(query.upper(), history, "stop", None, 9, 2, 0)


def write(path: Path, *rows: dict[str, Any] | str) -> None:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def texts(path: Path) -> dict[Any, str]:
    """Answers by id, or by line where there is none; each row must have one line."""
    found = [(record["id"] or record["line"], record.get("text", "error")) for record in records(path)]
    assert len(dict(found)) == len(found)
    return dict(found)
