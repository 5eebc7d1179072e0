"""Answers the rows of a JSONL file, a line each in another file; a run that was cut goes on where it ended.

It knows files; the model is handed to it.
"""

import fcntl
import json
import os
import re
import stat
import time
from array import array
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, suppress
from io import BufferedReader, FileIO
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from pydantic_core import from_json
from tqdm import tqdm

from qwen_vllm.offline.rows import Row, digest, read_lines, read_rows
from qwen_vllm.protocol import ChatError, ChatResult, Part, Sampling, one_line
from qwen_vllm.words import SaidError, say

ARRAY = re.compile(rb"(\xef\xbb\xbf)?\s*\[\s*(\{|$)")
"""The start of a file that is one JSON array of objects; a row `[]` is only a bad one."""
BAR = "{n_fmt}/{total_fmt} rows |{bar}| {elapsed}, {remaining} left{postfix}"
BAR_OF_PIPE = "{n_fmt} rows, {elapsed}{postfix}"


class BatchError(SaidError):
    """The files cannot be used as asked; the message says why and what to do, in one line."""


class Model(Protocol):
    """What is needed of a `vllm_wrapper.ChatModel`."""

    def stream_batch(
        self, rows: Iterable[dict[str, Any]], sampling: Sampling | None, deltas: bool
    ) -> Generator[tuple[int, Part | ChatError], None, None]: ...


class Batch:
    """A file of rows and the file of their answers.

    Opening it checks both files, repairs a last line that an interrupted run left incomplete, and removes failed rows
    from the answers, so that they are tried again.

    Args:
        source: JSONL, rows as `read_rows` takes them.
        target: JSONL, where answers are added; made where there is none.
        reference: name of the rows' field that holds the right answer, to score against.

    Raises:
        BatchError: one of the files cannot be used.
    """

    def __init__(self, source: Path, target: Path, reference: str | None = None) -> None:
        self._reference, self._rows, self._scores = reference, None, None
        try:
            self._source = source.open("rb")
            if ARRAY.match(self._source.peek(1)):
                raise BatchError(
                    "{file} is a JSON array, not JSONL: write each row on a line (jq -c '.[]')", file=source
                )
            if self._source.seekable():
                self._rows = sum(1 for _ in read_lines(self._source))
                self._source.seek(0)
            if target.exists() and target.samefile(source):
                raise BatchError("{file} is the input too: name another file for the answers", file=target)
        except OSError as error:
            raise BatchError("cannot read {file}: {reason}", file=source, reason=error.strerror) from error
        if reference:
            from qwen_vllm.offline.scores import Scores

            self._scores = Scores()
        self._answers = AnswerFile(target)
        # For each line of the input, where its answer begins in the output; -1: there is none.
        self._offsets = array("q")
        self._answered = self._answered_before = self._failed = 0
        self._prompt_tokens = self._completion_tokens = 0
        self._seconds = 0.0

    def run(self, load: Callable[[], Model], system: str | None = None, sampling: Sampling | None = None) -> None:
        """Answer the rows that are not finished; `load` is called only if there are any.

        A line is handed to the operating system as soon as its row has finished, so it outlives this process; all are
        forced to the disk at the end.

        Args:
            system, sampling: for rows that do not say. Without `system`, rows in OpenAI's form get no system message.

        Raises:
            ChatError: the engine has failed.
            OSError: a file cannot be read or written any more.
        """
        unfinished = self._unfinished()
        first = next(unfinished, None)
        if first:
            self._answer(load(), chain([first], unfinished), system, sampling)
        self._answers.sync()

    def order(self) -> None:
        """Put the answers into the order of the rows; those whose row is not in the input any more come last."""
        offsets = (offset for offset in self._offsets if offset >= 0)
        self._answers.rewrite(chain(offsets, self._answers.finished.values()))

    def summary(self) -> dict[str, Any]:
        """Count the rows: answered by this run, answered before, failed, `stale` (not in the input any more).

        The tokens and seconds are this run's; the scores are those of all answers.
        """
        summary = {
            "answered": self._answered,
            "answered_before": self._answered_before,
            "failed": self._failed,
            "stale": len(self._answers.finished),
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "seconds": round(self._seconds, 1),
        }
        return summary | ({"scores": self._scores.summary()} if self._scores else {})

    def close(self) -> None:
        """Close both files."""
        self._source.close()
        self._answers.close()

    def _unfinished(self) -> Iterator[Row]:
        """Yield the rows to be answered; count those answered before, and fail those that cannot be answered."""
        lines: dict[bytes, int] = {}
        for row in read_rows(self._source, self._reference):
            self._offsets.extend([-1] * (row.line + 1 - len(self._offsets)))
            if row.id is not None and (first := lines.setdefault(digest(row.id), row.line)) != row.line:
                row.error = ChatError(f"id: line {first} has the same one; give each row its own", param="id")
            if row.error:
                self._fail(row, row.error)
            elif row.key in self._answers.finished:
                self._skip(row)
            else:
                yield row

    def _answer(self, model: Model, rows: Iterator[Row], system: str | None, sampling: Sampling | None) -> None:
        running: dict[int, Row] = {}

        def requests() -> Iterator[dict[str, Any]]:
            for i, row in enumerate(rows):
                running[i] = row
                yield {"system": row.default_system if system is None else system, **row.request}

        began = time.monotonic()
        bar: tqdm[Any] = tqdm(
            total=self._rows,
            initial=self._answered_before,
            bar_format=say(BAR if self._rows else BAR_OF_PIPE),
            smoothing=0,
            disable=None,
        )
        with bar, closing(model.stream_batch(requests(), sampling, deltas=False)) as results:
            for i, result in results:
                row = running.pop(i)
                if isinstance(result, ChatError):
                    self._fail(row, result)
                elif isinstance(result, ChatResult):
                    self._finish(row, result)
                self._seconds = time.monotonic() - began
                self._show(bar)

    def _show(self, bar: "tqdm[Any]") -> None:
        bar.initial = self._answered_before  # these took no time
        bar.set_postfix_str(say("{speed:.0f} tokens/s", speed=self._completion_tokens / self._seconds), refresh=False)
        bar.update(self._answered + self._answered_before + self._failed - bar.n)

    def _skip(self, row: Row) -> None:
        offset = self._answers.finished.pop(row.key)
        self._offsets[row.line] = offset
        self._answered_before += 1
        if self._scores and row.reference is not None:
            self._scores.add(self._answers.read(offset)["text"], row.reference)

    def _finish(self, row: Row, result: ChatResult) -> None:
        record = {
            "id": row.id,
            "line": row.line,
            "text": result.text,
            **({"reasoning": result.reasoning} if result.reasoning else {}),
            **({"tool_calls": result.tool_calls} if result.tool_calls else {}),
            "finish_reason": result.finish_reason,
            "stop_reason": result.stop_reason,
            "usage": result.usage,
            "dropped_turns": result.dropped_turns,
            "dropped_reasoning": result.dropped_reasoning,
            "history": result.history,
            "key": row.key.hex(),
        }
        self._offsets[row.line] = self._answers.append(record)
        self._answered += 1
        self._prompt_tokens += result.prompt_tokens
        self._completion_tokens += result.completion_tokens
        if self._scores and row.reference is not None:
            self._scores.add(result.text, row.reference)

    def _fail(self, row: Row, error: ChatError) -> None:
        self._offsets[row.line] = self._answers.append({"id": row.id, "line": row.line, **error.as_dict()})
        self._failed += 1


class AnswerFile:
    """The output file: a line for each answer or failed row, written by one run at a time.

    Attributes:
        finished: where the line of an answer begins, by the key of its row.

    Raises:
        BatchError: it cannot be written, another run writes it, or it holds something else.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.resolve()
        try:
            self._file = self._path.open("ab+", buffering=0)
            self._lock()
            self.finished, failed = self._scan()
            if failed:
                self.rewrite(self.finished.values())
                self.finished, _ = self._scan()
        except OSError as error:
            raise BatchError("cannot write {file}: {reason}", file=path, reason=error.strerror) from error

    def append(self, record: dict[str, Any]) -> int:
        """Add a line and return where it begins."""
        offset = self._file.seek(0, os.SEEK_END)
        self._write(one_line(json.dumps(record, ensure_ascii=False).encode()) + b"\n")
        return offset

    def read(self, offset: int) -> dict[str, Any]:
        """Read the record whose line begins at `offset`."""
        with self._lines() as lines:
            lines.seek(offset)
            return from_json(lines.readline())

    def rewrite(self, offsets: Iterable[int]) -> None:
        """Keep only the lines that begin at `offsets`, in their order; until that is done, all stay."""
        temporary = self._path.with_name(f".{self._path.name}.new")
        file = temporary.open("wb+")
        try:
            # Lock it before the rename, so that no other run can lock it first.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with self._lines() as lines:
                for offset in offsets:
                    lines.seek(offset)
                    file.write(lines.readline())
            file.flush()
            os.fchmod(file.fileno(), stat.S_IMODE(os.fstat(self._file.fileno()).st_mode))
            os.fsync(file.fileno())
            temporary.rename(self._path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        self._file.close()
        self._file = cast(FileIO, file.detach())

    def sync(self) -> None:
        """Force all lines to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; other runs may write it now."""
        self._file.close()

    def _lines(self) -> BinaryIO:
        """Open the whole file to read, on the same descriptor: closing a second one would lose the lock."""
        lines = BufferedReader(FileIO(self._file.fileno(), closefd=False))
        lines.seek(0)
        return lines

    def _write(self, data: bytes) -> None:
        while data:
            data = data[self._file.write(data) :]

    def _lock(self) -> None:
        if not self._path.is_file():
            raise BatchError("{file} is not a file: name one for the answers", file=self._path)
        with suppress(BlockingIOError, PermissionError):
            # Unlike `flock`, not shared with the engine's processes, which may outlive a killed run.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(self._file.fileno()), self._path.stat()):
                return
        raise BatchError("another run writes {file}: wait for its end, or name another file", file=self._path)

    def _scan(self) -> tuple[dict[bytes, int], int]:
        """Return where the answers begin, and the number of failed rows; repair an incomplete last line."""
        finished, failed, offset = {}, 0, 0
        with self._lines() as lines:
            for number, line in enumerate(lines, start=1):
                key = _key(line)
                if key is None and _is_torn(line):
                    self._file.truncate(offset)
                    break
                if key is None:
                    raise BatchError(
                        "{file} holds other things (line {number}): name a new file for the answers",
                        file=self._path,
                        number=number,
                    )
                if not line.endswith(b"\n"):
                    self._write(b"\n")
                if key:
                    finished[key] = offset
                failed += not key
                offset += len(line)
        return finished, failed


def _key(line: bytes) -> bytes | None:
    """Read the key of an answer's line; empty: a failed row's; None: the line is neither."""
    try:
        record = from_json(line)
        return b"" if record.keys() == {"id", "line", "error"} else bytes.fromhex(record["key"])
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _is_torn(line: bytes) -> bool:
    """Tell whether this is the start of a line of ours whose rest was never written."""
    start = b'{"id": '
    with suppress(ValueError):
        from_json(line)
        return False
    return not line.endswith(b"\n") and (line.startswith(start) or start.startswith(line))
