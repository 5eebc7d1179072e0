"""Talks to a server: `stream_chat` for programs, and a chat in the terminal.

python vllm_client.py --url http://127.0.0.1:8000
"""

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import requests
from urllib3.exceptions import NewConnectionError, ReadTimeoutError

import console
from protocol import DEFAULT_SYSTEM, ChatError, ChatResult, Sampling, Turn

DEFAULT_URL = "http://127.0.0.1:8000"
CONNECT_TIMEOUT, READ_TIMEOUT = 5.0, 300.0
"""Seconds to wait for a connection, and for each further piece of an answer."""
MODELS_TIMEOUT = (CONNECT_TIMEOUT, 10.0)


def stream_chat(
    url: str,
    query: str,
    history: Sequence[Turn] = (),
    system: str = DEFAULT_SYSTEM,
    sampling: Sampling | None = None,
    api_key: str | None = None,
    timeout: tuple[float, float] = (CONNECT_TIMEOUT, READ_TIMEOUT),
) -> Iterator[str | ChatResult]:
    """Asks the server at `url` and yields the answer: pieces of text as they come, then one `ChatResult`.

    Closing the generator closes the connection, which stops the answer in the engine.

    Raises:
        ChatError: the server refused the request, failed, cannot be reached, or the answer broke off.
    """
    body = {"query": query, "history": list(history), "system": system, "stream": True}
    if sampling:
        body |= sampling.sampling()
    with (
        _told_as_chat_errors(url, timeout),
        _session(url, api_key) as session,
        session.post(f"{url}/chat", json=body, timeout=timeout, stream=True) as response,
    ):
        if response.status_code != 200:
            raise _refusal(response)
        text = ""
        for line in _lines(response):
            if "error" in line:
                raise ChatError(line["error"]["message"], line["error"]["type"])
            if "delta" not in line:
                yield _result(line, text, [*history, (query, text)])
                return
            text += line["delta"]
            yield line["delta"]
    raise ChatError("the answer ended without its last line", "incomplete")


def served_model(url: str, api_key: str | None = None) -> str:
    """The name of the model that the server at `url` serves.

    Raises:
        ChatError: as in `stream_chat`.
    """
    with _told_as_chat_errors(url, MODELS_TIMEOUT), _session(url, api_key) as session:
        response = session.get(f"{url}/v1/models", timeout=MODELS_TIMEOUT)
        if response.status_code != 200:
            raise _refusal(response)
        return response.json()["data"][0]["id"]


def _session(url: str, api_key: str | None) -> requests.Session:
    session = requests.Session()
    if api_key:
        session.headers["Authorization"] = f"Bearer {api_key}"
    # A proxy that is set for the internet cannot reach this machine's own servers.
    try:
        session.trust_env = urlsplit(url).hostname not in ("127.0.0.1", "localhost", "::1")
    except ValueError as error:
        raise ChatError(f"{url} is no address: {error}", "unreachable") from error
    return session


def _lines(response: requests.Response) -> Iterator[dict[str, Any]]:
    """The JSON lines of a body, each as soon as it has come (`iter_lines` would hold some back)."""
    pending = b""
    for chunk in response.iter_content(chunk_size=None):
        *lines, pending = (pending + chunk).split(b"\n")
        yield from map(json.loads, lines)


@contextmanager
def _told_as_chat_errors(url: str, timeout: tuple[float, float]) -> Iterator[None]:
    """Turns what goes wrong in the block, with the connection or with what comes over it, into a ChatError."""
    try:
        yield
    except requests.RequestException as error:
        raise _failure(error, url, timeout) from error
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise _no_chat_server(url) from error


def _no_chat_server(url: str) -> ChatError:
    return ChatError(f"{url} answers, but not as a chat server does", "incomplete")


def _failure(error: requests.RequestException, url: str, timeout: tuple[float, float]) -> ChatError:
    """What the user is told where the connection failed. requests wraps much of it: the cause tells more."""
    if isinstance(error, requests.JSONDecodeError):
        return _no_chat_server(url)
    cause = error.args[0] if error.args else None
    if isinstance(error, requests.ReadTimeout) or isinstance(cause, ReadTimeoutError):
        return ChatError(f"the server sent nothing for {timeout[1]:.0f} s", "incomplete")
    if isinstance(error, requests.ConnectTimeout) or isinstance(getattr(cause, "reason", None), NewConnectionError):
        return ChatError(f"no server answers at {url}: is it running? (make serve)", "unreachable")
    if isinstance(error, requests.ConnectionError | requests.exceptions.ChunkedEncodingError):
        return ChatError("the server broke the answer off", "incomplete")
    return ChatError(f"cannot ask {url}: {error}", "unreachable")


def _refusal(response: requests.Response) -> ChatError:
    status, seconds = response.status_code, response.headers.get("Retry-After", "")
    retry_after = int(seconds) if status == 503 and seconds.isdecimal() else None
    try:
        error = response.json()["error"]
        if isinstance(error, dict):
            return ChatError(error["message"], error["type"], error.get("param"), status, retry_after)
        message = str(error)
    except (ValueError, KeyError, TypeError):
        message = "this is no answer of a chat server"
    return ChatError(f"{message} (HTTP {status})", status=status, retry_after=retry_after)


def _result(line: dict[str, Any], text: str, history: list[Turn]) -> ChatResult:
    return ChatResult(
        text=text,
        history=history,
        finish_reason=line["finish_reason"],
        stop_reason=line["stop_reason"],
        prompt_tokens=line["usage"]["prompt_tokens"],
        completion_tokens=line["usage"]["completion_tokens"],
        dropped_turns=line["dropped_turns"],
    )


def main(argv: list[str] | None = None) -> int:
    """The console client; returns the exit status."""
    parser = argparse.ArgumentParser(prog="vllm_client.py", description="Chat with a server in the terminal.")
    parser.add_argument("--url", default=os.environ.get("QWEN_URL", DEFAULT_URL), help="default: %(default)s")
    parser.add_argument("--api-key", default=os.environ.get("QWEN_API_KEY"), help="default: $QWEN_API_KEY")
    console.add_arguments(parser)
    args = parser.parse_args(argv)
    url = args.url.rstrip("/")

    def ask(query: str, history: Sequence[Turn], system: str, sampling: Sampling) -> Iterator[str | ChatResult]:
        return stream_chat(url, query, history, system, sampling, args.api_key)

    try:
        title = f"{served_model(url, args.api_key)} at {url}"
    except ChatError as error:
        title = f"{url}: {error.message}"
    except KeyboardInterrupt:
        return 130
    return console.run(ask, title, args)


if __name__ == "__main__":
    raise SystemExit(main())
