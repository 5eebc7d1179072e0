"""Fetches whole models from a hub, and knows which of the copies in its cache are whole.

A copy is whole if it has all files of the hub's list that are loaded, each in its size. The list is kept with the
copy. So a whole copy is used at once, without the network, and without reading the weights.
"""

import errno
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import redirect_stderr
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

from qwen_vllm.cache import CACHE, exclusive
from qwen_vllm.models.checks import TOKENIZERS, ModelUnavailable, checked_config
from qwen_vllm.models.hubs import HUBS, HubFile, missing
from qwen_vllm.words import say

T = TypeVar("T")

FORMATS = ("safetensors", "bin", "pt")
"""The formats of weights that vLLM looks for, in its order."""
PLACES = re.compile(r"[^/]+|additional_chat_templates/[^/]+|([^/.][^/]*/)*[^/]+\.py")
"""Where files are loaded from. None of these paths leads out of the copy."""
NEVER_LOADED = re.compile(
    r"\..*|.*\.(md|png|jpe?g|gif|svg|webp|pdf|mp4|pth|gguf|h5|msgpack|onnx|ot|ckpt|npz|tflite)", re.IGNORECASE
)
HUB_TIMEOUT = 1.0
"""Seconds that a hub has to answer where a whole copy is there: the launcher and the server both ask."""
LOG_INTERVAL = 30.0
"""Seconds between two lines of progress where there is no terminal."""


def fetch(
    model: str, hub: str, revision: str | None = None, cache: str | None = None, with_weights: bool = True
) -> Path:
    """Return the folder with a whole copy of a model; fetch what is not there yet.

    A whole copy is used as it is. Where a `revision` is named, the hub is asked first whether it has changed.

    Args:
        model: its id on the hub.
        cache: the folder for copies; None: the hub's usual cache.
        with_weights: False: all files but the weights.

    Raises:
        ModelUnavailable: the model cannot be had; the message names what is missing.
    """
    lock = CACHE / "fetching" / hub / model.replace("/", "--")
    try:
        lock.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelUnavailable("cannot write {file}: {reason}", file=lock, reason=error.strerror) from error
    with exclusive(lock, say("Waiting for another program that fetches {model} …", model=model)):
        source = HUBS[hub](model, revision, cache)
        copy = source.copy()
        known = source.known(copy) if copy else None
        lacking = _lacking(copy, known, with_weights)
        if copy and known and not lacking and not revision:
            return copy
        try:
            listing = source.listing() if lacking else _within(HUB_TIMEOUT, source.listing)
        except Exception as failure:
            if copy and not lacking:
                logging.getLogger("modelscope_hub").setLevel(logging.CRITICAL)  # it goes on asking for a while
                told = say(
                    "{hub} cannot be asked ({reason}): using the copy in {copy}",
                    hub=hub,
                    reason=_reason(failure),
                    copy=copy,
                )
                print(told, file=sys.stderr, flush=True)
                return copy
            raise ModelUnavailable(
                "{model} cannot be fetched from {hub} ({reason}), and the local cache does not have it: it lacks "
                "{lacking}. Check the name and the network, pass a local folder, or choose another --hub",
                model=model,
                hub=hub,
                reason=_reason(failure),
                lacking=lacking,
            ) from failure
        wanted = _loaded(listing, with_weights)
        if with_weights and "config.json" not in [file.path for file in wanted]:
            raise ModelUnavailable("{model} on {hub} has no config.json: vLLM cannot load it", model=model, hub=hub)
        size = sum(file.size for file in wanted) / 1e9
        told = say(
            "Fetching {model} from {hub}: {number} files, {size:.1f} GB …",
            model=model,
            hub=hub,
            number=len(wanted),
            size=size,
        )
        print(told, file=sys.stderr, flush=True)
        try:
            with redirect_stderr(sys.stderr if sys.stderr.isatty() else _Log(sys.stderr)):
                folder = source.download(listing, wanted)
        except Exception as failure:
            raise ModelUnavailable(
                "{model} could not be fetched from {hub}: {reason}. What has come is kept: run again to go on",
                model=model,
                hub=hub,
                reason=_told(failure),
            ) from failure
        if lost := missing(folder, wanted):
            raise ModelUnavailable(
                "{model} could not be fetched from {hub}: {folder} lacks {files}",
                model=model,
                hub=hub,
                folder=folder,
                files=_names(lost),
            )
        return folder


def _loaded(files: Sequence[HubFile], with_weights: bool) -> list[HubFile]:
    """Choose the files that are loaded; of the weights, those of one format."""
    ends = {file.path.rpartition(".")[2] for file in files if "/" not in file.path}
    taken = next((end for end in FORMATS if end in ends), None) if with_weights else None
    others = [f".{end}" for end in FORMATS if end != taken]
    others += [f"{end}.index.json" for end in others]
    return [
        file
        for file in files
        if PLACES.fullmatch(file.path)
        and not NEVER_LOADED.fullmatch(file.path)
        and not file.path.endswith(tuple(others))
    ]


def _lacking(copy: Path | None, known: Sequence[HubFile] | None, with_weights: bool) -> str:
    """Name what a copy lacks; empty: it is whole.

    A copy that another program has fetched may come without a list. Then it must have what every chat model has.
    """
    if not copy:
        return say("all files")
    if known:
        return _names(missing(copy, _loaded(known, with_weights)))
    if any(copy.glob("*.incomplete")):
        return say("the end of a file")
    if not any((copy / name).is_file() for name in TOKENIZERS):
        return say("a tokenizer")
    if with_weights and not (copy / "generation_config.json").is_file():
        return "generation_config.json"
    if with_weights and not any(any(copy.glob(f"*.{end}")) for end in FORMATS):
        return say("weights")
    try:
        checked_config(copy)
    except ModelUnavailable as error:
        return say("whole files ({error})", error=error)
    return ""


def _names(files: Sequence[HubFile]) -> str:
    return _first_of([file.path for file in files], ", ")


def _first_of(texts: Sequence[str], separator: str) -> str:
    return separator.join([*texts[:3], *([say("and {number} more", number=len(texts) - 3)] if len(texts) > 3 else [])])


def _told(failure: Exception) -> str:
    """Say in one line which files failed, and why."""
    failed: dict[str, Exception] = getattr(failure, "failed_files", {"": failure})
    if any(getattr(error, "errno", None) == errno.ENOSPC for error in failed.values()):
        full = os.strerror(errno.ENOSPC)
        return say("{reason}: make room, or name another --download-dir", reason=full)
    return _first_of([f"{path}: {_reason(error)}".removeprefix(": ") for path, error in failed.items()], "; ")


def _reason(failure: Exception) -> str:
    """Return what the system says is wrong, where that is the reason; else what the hub's client says."""
    causes: list[BaseException] = [failure]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    texts = [error.strerror for error in causes if isinstance(error, OSError) and error.strerror]
    return texts[-1] if texts else " ".join(str(failure).split())[:200] or type(failure).__name__


def _within(seconds: float, call: Callable[[], T]) -> T:
    """Return what `call` does; TimeoutError: it takes longer, and goes on with nobody waiting for it."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except Exception as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future.result(seconds)


class _Log:
    """Passes on what is written to `stream`; of the states of progress bars, one every LOG_INTERVAL, as a line."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._shown, self._in_line = stream, time.monotonic(), False

    def write(self, text: str) -> int:
        passed = text
        if text.startswith("\r"):
            due = text.strip() and time.monotonic() > self._shown + LOG_INTERVAL
            passed = f"{text.strip()}\n" if due else ""
            self._shown = time.monotonic() if due else self._shown
        elif not (self._in_line or text.strip("\n\x1b[A")):  # a bar moves the cursor
            passed = ""
        if passed:
            self._stream.write(passed)
            self._in_line = not passed.endswith("\n")
        return len(text)

    def isatty(self) -> bool:
        """Hugging Face's client has no bars where there is no terminal."""
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
