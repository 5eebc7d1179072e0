"""What is kept in the user's cache folder, models made once and logs, and where what must last is kept."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen-vllm"
STATE = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "qwen-vllm"
_copying: list[subprocess.Popen[str]] = []  # kept: a Popen that is dropped while it runs warns


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Return `folder`, filled by `make` unless it is there.

    The folder appears whole or not at all. Several processes may ask for it at once: one makes it, the others wait.

    Raises:
        OSError: the folder cannot be written.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(folder.parent):
        if folder.is_dir():
            return folder
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            make(unfinished)
            try:
                unfinished.rename(folder)
            except OSError:
                if not folder.is_dir():  # without locks, another process can have finished first
                    raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def fingerprint(code: Path, *files: Path) -> str:
    """Hash the text of a module and the state of the files that it reads, as far as they are there."""
    seen = hashlib.sha256(code.read_bytes())
    for file in files:
        if file.exists():
            state = file.stat()
            seen.update(f"{file.resolve()} {state.st_size} {state.st_mtime_ns}\n".encode())
    return seen.hexdigest()[:16]


@contextmanager
def exclusive(folder: Path, waiting: str = "") -> Iterator[None]:
    """Wait until no other process is inside, where the file system has locks; `waiting`: said before a wait."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if waiting:
                    print(waiting, file=sys.stderr, flush=True)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def open_log(path: Path, shown: bool) -> IO[str]:
    """Open a new log file, line-buffered; `shown`: copy what is written to stderr."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log = path.open("w", buffering=1, encoding="utf-8")
    if not shown:
        return log
    log.close()  # the file exists now, also before tee has started
    # -i: Ctrl-C stops the answer; it must not stop the log.
    tee = subprocess.Popen(["tee", "-i", str(path)], stdin=subprocess.PIPE, stdout=2, text=True, bufsize=1)
    _copying.append(tee)
    assert tee.stdin
    return tee.stdin
