"""Talks to a server: `stream_chat` for programs, its twins on asyncio, and a chat in the terminal.

python vllm_client.py --url http://127.0.0.1:8000
python vllm_client.py --url http://127.0.0.1:8000 --test-message
"""

import argparse
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import requests
from urllib3.exceptions import NewConnectionError, ReadTimeoutError

from qwen_vllm import console
from qwen_vllm.protocol import (
    DEFAULT_SYSTEM,
    AskedTurn,
    ChatError,
    ChatResult,
    Part,
    Question,
    Reasoning,
    Sampling,
    ServerInfo,
    Turn,
    text_turns,
)

DEFAULT_URL = "http://127.0.0.1:8000"
CONNECT_TIMEOUT, READ_TIMEOUT = 5.0, 300.0
"""Seconds to wait for a connection, and for each further piece of an answer."""
MODELS_TIMEOUT = (CONNECT_TIMEOUT, 10.0)
OPENAI_CHAT = "/v1/chat/completions"
TEST_MESSAGE = "What is the capital of France?"


def stream_chat(
    url: str,
    query: str,
    history: Sequence[Turn] = (),
    system: str = DEFAULT_SYSTEM,
    sampling: Sampling | None = None,
    api_key: str | None = None,
    timeout: tuple[float, float] = (CONNECT_TIMEOUT, READ_TIMEOUT),
) -> Iterator[Part]:
    """Asks the server at `url` and yields the answer: pieces of what the model thinks and of the text, as they come,
    then one `ChatResult`.

    Closing the generator closes the connection, which stops the answer in the engine.

    Raises:
        ChatError: the server refused the request, failed, cannot be reached, or the answer broke off.
    """
    body = _body(query, history, system, sampling)
    return _stream(url, "/chat", body, _Answer(query, history), api_key, timeout)


def stream_messages(
    url: str,
    messages: Sequence[dict[str, Any]],
    sampling: Sampling | None = None,
    api_key: str | None = None,
    timeout: tuple[float, float] = (CONNECT_TIMEOUT, READ_TIMEOUT),
) -> Iterator[Part]:
    """`stream_chat` for conversations with images: `messages` is in OpenAI's form and goes to OpenAI's route.

    Of the result `history` is empty and `dropped_turns` 0: that route takes all of a conversation or refuses it.

    Raises:
        ChatError: as in `stream_chat`.
    """
    return _stream(url, OPENAI_CHAT, _openai_body(messages, sampling), _OpenAIAnswer(), api_key, timeout)


def stream_chat_async(
    url: str,
    query: str,
    history: Sequence[Turn] = (),
    system: str = DEFAULT_SYSTEM,
    sampling: Sampling | None = None,
    api_key: str | None = None,
    timeout: tuple[float, float] = (CONNECT_TIMEOUT, READ_TIMEOUT),
) -> AsyncIterator[Part]:
    """`stream_chat` on asyncio. Cancelling the task that waits for the next piece stops the answer in the engine, too.

    Raises:
        ChatError: as in `stream_chat`.
    """
    body = _body(query, history, system, sampling)
    return _stream_async(url, "/chat", body, _Answer(query, history), api_key, timeout)


def stream_messages_async(
    url: str,
    messages: Sequence[dict[str, Any]],
    sampling: Sampling | None = None,
    api_key: str | None = None,
    timeout: tuple[float, float] = (CONNECT_TIMEOUT, READ_TIMEOUT),
) -> AsyncIterator[Part]:
    """`stream_messages` on asyncio, as `stream_chat_async`.

    Raises:
        ChatError: as in `stream_chat`.
    """
    return _stream_async(url, OPENAI_CHAT, _openai_body(messages, sampling), _OpenAIAnswer(), api_key, timeout)


async def server_info_async(url: str, api_key: str | None = None) -> ServerInfo:
    """`server_info` on asyncio.

    Raises:
        ChatError: as in `stream_chat`.
    """
    with _told_as_chat_errors(url, MODELS_TIMEOUT):
        async with _async_client(url, api_key, MODELS_TIMEOUT) as client:
            response = await client.get(f"{url}/chat/info")
        if response.status_code != 200:
            raise _refusal(response)
        return ServerInfo(**response.json())


def server_info(url: str, api_key: str | None = None) -> ServerInfo:
    """What the server at `url` tells of itself.

    Raises:
        ChatError: as in `stream_chat`.
    """
    with _told(url, "/chat/info", api_key) as told:
        return ServerInfo(**told)


def served_model(url: str, api_key: str | None = None) -> str:
    """The name of the model that the server at `url` serves.

    Raises:
        ChatError: as in `stream_chat`.
    """
    with _told(url, "/v1/models", api_key) as told:
        return told["data"][0]["id"]


@contextmanager
def _told(url: str, path: str, api_key: str | None) -> Iterator[Any]:
    """What the server says at `path`. That it lacks what the block reads from it is told as a ChatError, too."""
    with _told_as_chat_errors(url, MODELS_TIMEOUT), _session(url, api_key) as session:
        response = session.get(url + path, timeout=MODELS_TIMEOUT)
        if response.status_code != 200:
            raise _refusal(response)
        yield response.json()


def _body(query: str, history: Sequence[Turn], system: str, sampling: Sampling | None) -> dict[str, Any]:
    body = {"query": query, "history": list(history), "system": system, "stream": True}
    return body | (sampling.sampling() if sampling else {})


def _openai_body(messages: Sequence[dict[str, Any]], sampling: Sampling | None) -> dict[str, Any]:
    wanted = sampling.sampling() if sampling else {}
    if "enable_thinking" in wanted:
        wanted["chat_template_kwargs"] = {"enable_thinking": wanted.pop("enable_thinking")}
    return {"messages": list(messages), "stream": True, "stream_options": {"include_usage": True}, **wanted}


def with_images(query: Question, history: Sequence[AskedTurn], system: str) -> list[dict[str, Any]]:
    """A conversation in OpenAI's form, with the images of its questions."""
    messages = [{"role": "system", "content": system}]
    for question, answer in [*history, (query, None)]:
        images = [{"type": "image_url", "image_url": {"url": image}} for image in question.images]
        messages.append({"role": "user", "content": [*images, {"type": "text", "text": question.text}]})
        messages += [{"role": "assistant", "content": answer}] if answer is not None else []
    return messages


def _session(url: str, api_key: str | None) -> requests.Session:
    session = requests.Session()
    session.headers.update(_headers(api_key))
    session.trust_env = _goes_out(url)
    return session


def _async_client(url: str, api_key: str | None, timeout: tuple[float, float]) -> httpx.AsyncClient:
    # Certificates are read for https only: that takes 25 ms.
    return httpx.AsyncClient(
        headers=_headers(api_key),
        trust_env=_goes_out(url),
        verify=url.startswith("https:"),
        timeout=httpx.Timeout(timeout[1], connect=timeout[0]),
    )


def _headers(api_key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def _goes_out(url: str) -> bool:
    """Whether a proxy may be asked: one that is set for the internet cannot reach this machine's own servers."""
    try:
        return urlsplit(url).hostname not in ("127.0.0.1", "localhost", "::1")
    except ValueError as error:
        raise ChatError(f"{url} is no address: {error}", "unreachable") from error


def _stream(
    url: str, path: str, body: dict[str, Any], answer: "_Answer", api_key: str | None, timeout: tuple[float, float]
) -> Iterator[Part]:
    with (
        _told_as_chat_errors(url, timeout),
        _session(url, api_key) as session,
        session.post(url + path, json=body, timeout=timeout, stream=True) as response,
    ):
        if response.status_code != 200:
            raise _refusal(response)
        for chunk in response.iter_content(chunk_size=None):
            yield from answer.parts(chunk)
            if answer.ended:
                return
    raise ChatError("the answer ended without its last line", "incomplete")


async def _stream_async(
    url: str, path: str, body: dict[str, Any], answer: "_Answer", api_key: str | None, timeout: tuple[float, float]
) -> AsyncIterator[Part]:
    with _told_as_chat_errors(url, timeout):
        async with (
            _async_client(url, api_key, timeout) as client,
            client.stream("POST", url + path, json=body) as response,
        ):
            if response.status_code != 200:
                await response.aread()
                raise _refusal(response)
            async for chunk in response.aiter_bytes():
                for part in answer.parts(chunk):
                    yield part
                if answer.ended:
                    return
    raise ChatError("the answer ended without its last line", "incomplete")


class _Answer:
    """Reads the lines of an answer of `/chat` out of the chunks of its body, each as soon as it has come."""

    def __init__(self, query: str = "", history: Sequence[Turn] = ()) -> None:
        self._query, self._history = query, history
        self._pending, self._reasoning, self._text = b"", "", ""
        self.ended = False

    def parts(self, chunk: bytes) -> Iterator[Part]:
        """The parts that have come to their ends with this chunk."""
        *lines, self._pending = (self._pending + chunk).split(b"\n")
        for line in lines:
            yield from self._part(line)

    def _part(self, line: bytes) -> Iterator[Part]:
        value = json.loads(line)
        if "error" in value:
            raise ChatError(value["error"]["message"], value["error"]["type"])
        if "delta" in value:
            self._text += value["delta"]
            yield value["delta"]
        elif "reasoning" in value:
            self._reasoning += value["reasoning"]
            yield Reasoning(value["reasoning"])
        else:
            self.ended = True
            yield ChatResult(
                text=self._text,
                history=[*self._history, (self._query, self._text)],
                finish_reason=value["finish_reason"],
                stop_reason=value["stop_reason"],
                prompt_tokens=value["usage"]["prompt_tokens"],
                completion_tokens=value["usage"]["completion_tokens"],
                dropped_turns=value["dropped_turns"],
                reasoning=self._reasoning,
                reasoning_tokens=value["usage"]["reasoning_tokens"],
            )


class _OpenAIAnswer(_Answer):
    """The same for an answer of `/v1/chat/completions`: server-sent events, the finish reason before the usage."""

    def __init__(self) -> None:
        super().__init__()
        self._choice: dict[str, Any] = {}

    def _part(self, line: bytes) -> Iterator[Part]:
        data = line.removeprefix(b"data: ").strip()
        if not data or data == b"[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise ChatError(event["error"]["message"], "engine_error")
        for self._choice in event["choices"]:
            if reasoning := self._choice["delta"].get("reasoning"):
                self._reasoning += reasoning
                yield Reasoning(reasoning)
            if text := self._choice["delta"].get("content"):
                self._text += text
                yield text
        if usage := event.get("usage"):
            self.ended = True
            yield ChatResult(
                text=self._text,
                history=[],
                finish_reason=self._choice["finish_reason"],
                stop_reason=self._choice.get("stop_reason"),
                prompt_tokens=usage["prompt_tokens"],
                completion_tokens=usage["completion_tokens"],
                dropped_turns=0,
                reasoning=self._reasoning,
                reasoning_tokens=(usage.get("completion_tokens_details") or {}).get("reasoning_tokens", 0),
            )


@contextmanager
def _told_as_chat_errors(url: str, timeout: tuple[float, float]) -> Iterator[None]:
    """Turns what goes wrong in the block, with the connection or with what comes over it, into a ChatError."""
    try:
        yield
    except requests.RequestException as error:
        raise _failure(error, url, timeout) from error
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise _failure_async(error, url, timeout) from error
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
        return _silent(timeout)
    if isinstance(error, requests.ConnectTimeout) or isinstance(getattr(cause, "reason", None), NewConnectionError):
        return _unreachable(url)
    if isinstance(error, requests.ConnectionError | requests.exceptions.ChunkedEncodingError):
        return _broken_off()
    return ChatError(f"cannot ask {url}: {error}", "unreachable")


def _failure_async(error: Exception, url: str, timeout: tuple[float, float]) -> ChatError:
    match error:
        case httpx.ReadTimeout():
            return _silent(timeout)
        case httpx.ConnectError() | httpx.ConnectTimeout():
            return _unreachable(url)
        case httpx.NetworkError() | httpx.RemoteProtocolError():
            return _broken_off()
    return ChatError(f"cannot ask {url}: {error}", "unreachable")


def _unreachable(url: str) -> ChatError:
    return ChatError(f"no server answers at {url}: is it running? (make serve)", "unreachable")


def _silent(timeout: tuple[float, float]) -> ChatError:
    return ChatError(f"the server sent nothing for {timeout[1]:.0f} s", "incomplete")


def _broken_off() -> ChatError:
    return ChatError("the server broke the answer off", "incomplete")


def _refusal(response: requests.Response | httpx.Response) -> ChatError:
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


def send_test_message(url: str, query: str, system: str, sampling: Sampling, api_key: str | None = None) -> None:
    """Sends one message, to see whether a deployment works; prints the model, the answer and its figures.

    Raises:
        ChatError: as in `stream_chat`; also where the answer is empty.
    """
    name = served_model(url, api_key)
    print(f"{sampling.model or name} at {url}\n> {query}", flush=True)
    began = time.monotonic()
    parts = stream_chat(url, query, system=system, sampling=sampling, api_key=api_key)
    first_part, first = next(parts), time.monotonic()
    *_, result = first_part, *parts
    figures = console.figures_line(result, began, first)
    total = f"total {time.monotonic() - began:.2f} s · {result.prompt_tokens} prompt tokens"
    if not result.text.strip():
        cut = "; the model still thought at its token limit: raise --max-tokens" if result.reasoning else ""
        raise ChatError(f"the answer is empty{cut}", "incomplete")
    print(f"{console.without_controls(result.text)}\n{figures} · {total}")


def main(argv: list[str] | None = None) -> int:
    """The console client; returns the exit status."""
    parser = argparse.ArgumentParser(prog="vllm_client.py", description="Chat with a server in the terminal.")
    parser.add_argument("--url", default=os.environ.get("QWEN_URL", DEFAULT_URL), help="default: %(default)s")
    parser.add_argument("--api-key", default=os.environ.get("QWEN_API_KEY"), help="default: $QWEN_API_KEY")
    parser.add_argument(
        "--test-message",
        nargs="?",
        const=TEST_MESSAGE,
        metavar="TEXT",
        help="send one message, print the answer and how long it took, and leave: 0 where all went well (%(const)r)",
    )
    console.add_arguments(parser)
    args = parser.parse_args(argv)
    url = args.url.rstrip("/")
    if args.test_message is not None:
        return _run_test_message(url, args)

    def ask(query: Question, history: Sequence[AskedTurn], system: str, sampling: Sampling) -> Iterator[Part]:
        if query.images or any(question.images for question, _ in history):
            return stream_messages(url, with_images(query, history, system), sampling, args.api_key)
        return stream_chat(url, query.text, text_turns(history), system, sampling, args.api_key)

    try:
        title = f"{served_model(url, args.api_key)} at {url}"
    except ChatError as error:
        title = f"{url}: {error.message}"
    except KeyboardInterrupt:
        return 130
    return console.run(ask, title, args, lambda: server_info(url, args.api_key))


def _run_test_message(url: str, args: argparse.Namespace) -> int:
    try:
        send_test_message(url, args.test_message, args.system, console.given_sampling(args), args.api_key)
    except ChatError as error:
        print(f"Error: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
