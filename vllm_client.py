"""Streams answers from a server to programs and to a chat in the terminal.

python vllm_client.py --url http://127.0.0.1:8000
python vllm_client.py --url http://127.0.0.1:8000 --test-message
"""

import argparse
import json
import os
import sys
import time
from collections.abc import AsyncGenerator, Generator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import requests
from urllib3.exceptions import ConnectTimeoutError, NewConnectionError, ProtocolError, ReadTimeoutError

from qwen_vllm import console
from qwen_vllm.answer_readers import AnswerReader, ChatLines, OnWaiting, OpenAIEvents
from qwen_vllm.flags import Help, add_arguments, given_sampling
from qwen_vllm.network import THIS_MACHINE
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
from qwen_vllm.words import choose_language, say

__all__ = ["ChatError", "ChatResult", "Reasoning", "Sampling", "ServerInfo", "server_info", "server_info_async"]
__all__ += ["count_tokens_async", "stream_chat", "stream_chat_async", "stream_messages", "stream_messages_async"]
__all__ += ["stream_question", "stream_question_async"]

DEFAULT_URL = "http://127.0.0.1:8000"
Timeout = tuple[float, float]
"""(seconds to wait for a connection, seconds to wait for each further piece of an answer)"""
TIMEOUT: Timeout = (5.0, 300.0)
INFO_TIMEOUT: Timeout = (5.0, 10.0)
OPENAI_CHAT = "/v1/chat/completions"
TEST_MESSAGE = "What is the capital of France?"


def stream_chat(
    url: str,
    query: str,
    history: Sequence[Turn] = (),
    system: str | None = DEFAULT_SYSTEM,
    sampling: Sampling | None = None,
    api_key: str | None = None,
    timeout: Timeout = TIMEOUT,
    on_waiting: OnWaiting | None = None,
) -> Generator[Part, None, None]:
    """Ask the server at `url` and yield the answer as it comes.

    Yields pieces of the reasoning (`Reasoning`) and of the text (str), then one `ChatResult`. Closing the generator
    closes the connection, which stops the answer in the engine. While the server has not begun to answer, `on_waiting`
    is called about every 15 s.

    Raises:
        ChatError: the server refused the request or failed, no server answered, or the answer broke off.
    """
    body = _chat_body(query, history, system, sampling, on_waiting)
    return _Server(url, api_key, timeout).stream("/chat", body, ChatLines(query, history, on_waiting))


def stream_messages(
    url: str,
    messages: Sequence[dict[str, Any]],
    sampling: Sampling | None = None,
    api_key: str | None = None,
    timeout: Timeout = TIMEOUT,
    **fields: Any,
) -> Generator[Part, None, None]:
    """Stream the answer to a conversation with images or tools, from OpenAI's route.

    `messages` and further `fields`, such as `tools` and `tool_choice`, are in OpenAI's form. The route answers the
    whole conversation or refuses it, so in the result `history` is empty and `dropped_turns` is 0. `tool_calls` has the
    calls. Otherwise as `stream_chat`.
    """
    body = _openai_body(messages, sampling, fields)
    return _Server(url, api_key, timeout).stream(OPENAI_CHAT, body, OpenAIEvents())


def stream_chat_async(
    url: str,
    query: str,
    history: Sequence[Turn] = (),
    system: str | None = DEFAULT_SYSTEM,
    sampling: Sampling | None = None,
    api_key: str | None = None,
    timeout: Timeout = TIMEOUT,
    on_waiting: OnWaiting | None = None,
) -> AsyncGenerator[Part, None]:
    """Do what `stream_chat` does, on asyncio.

    Cancelling the task that waits for the next piece also stops the answer in the engine.
    """
    body = _chat_body(query, history, system, sampling, on_waiting)
    return _Server(url, api_key, timeout).stream_async("/chat", body, ChatLines(query, history, on_waiting))


def stream_messages_async(
    url: str,
    messages: Sequence[dict[str, Any]],
    sampling: Sampling | None = None,
    api_key: str | None = None,
    timeout: Timeout = TIMEOUT,
    **fields: Any,
) -> AsyncGenerator[Part, None]:
    """Do what `stream_messages` does, on asyncio."""
    body = _openai_body(messages, sampling, fields)
    return _Server(url, api_key, timeout).stream_async(OPENAI_CHAT, body, OpenAIEvents())


def stream_question(
    url: str,
    query: Question,
    history: Sequence[AskedTurn],
    system: str | None,
    sampling: Sampling,
    api_key: str | None = None,
    on_waiting: OnWaiting | None = None,
) -> Generator[Part, None, None]:
    """Ask by `/chat`; by OpenAI's route where there are images, or no `/chat`, as at a switch of several models.

    Otherwise as `stream_chat`.
    """
    if not _with_images(query, history):
        earlier = text_turns(history)
        try:
            yield from stream_chat(url, query.text, earlier, system, sampling, api_key, on_waiting=on_waiting)
            return
        except ChatError as error:
            if not _lacks_chat(error):
                raise
        sampling = _with_model(sampling, server_info(url, api_key))
    yield from stream_messages(url, openai_messages(query, history, system), sampling, api_key)


async def stream_question_async(
    url: str,
    query: Question,
    history: Sequence[AskedTurn],
    system: str | None,
    sampling: Sampling,
    api_key: str | None = None,
    on_waiting: OnWaiting | None = None,
) -> AsyncGenerator[Part, None]:
    """Do what `stream_question` does, on asyncio."""
    if not _with_images(query, history):
        earlier = text_turns(history)
        asked = stream_chat_async(url, query.text, earlier, system, sampling, api_key, on_waiting=on_waiting)
        try:
            async with aclosing(asked):
                async for part in asked:
                    yield part
            return
        except ChatError as error:
            if not _lacks_chat(error):
                raise
        sampling = _with_model(sampling, await server_info_async(url, api_key))
    messages = openai_messages(query, history, system)
    async with aclosing(stream_messages_async(url, messages, sampling, api_key)) as parts:
        async for part in parts:
            yield part


def server_info(url: str, api_key: str | None = None) -> ServerInfo:
    """Ask the server at `url` for its models, its defaults and its limits.

    One without `/chat/info`, as a switch of several models, tells only the names in `/v1/models`.

    Raises:
        ChatError: as in `stream_chat`.
    """
    return _Server(url, api_key, INFO_TIMEOUT).info()


async def server_info_async(url: str, api_key: str | None = None) -> ServerInfo:
    """Do what `server_info` does, on asyncio."""
    return await _Server(url, api_key, INFO_TIMEOUT).info_async()


async def count_tokens_async(url: str, text: str, api_key: str | None = None) -> int:
    """Ask the server at `url` how many tokens a text has.

    Raises:
        ChatError: as in `stream_chat`.
    """
    return await _Server(url, api_key, INFO_TIMEOUT).count_async(text)


def openai_messages(query: Question, history: Sequence[AskedTurn], system: str | None) -> list[dict[str, Any]]:
    """Return a conversation in OpenAI's form, with the images of its questions."""
    messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    for question, answer, reasoning in [*history, (query, "", "")]:
        images = [{"type": "image_url", "image_url": {"url": image}} for image in question.images]
        text = [{"type": "text", "text": question.text}] if question.text else []
        messages.append({"role": "user", "content": images + text})
        messages.append({"role": "assistant", "content": answer, **({"reasoning": reasoning} if reasoning else {})})
    return messages[:-1]  # the query has no answer yet


def _chat_body(
    query: str,
    history: Sequence[Turn],
    system: str | None,
    sampling: Sampling | None,
    on_waiting: OnWaiting | None,
) -> dict[str, Any]:
    body = {"query": query, "history": list(history), "system": system, "stream": True}
    if on_waiting:
        body["keep_alive"] = True
    return body | (sampling.sampling() if sampling else {})


def _openai_body(
    messages: Sequence[dict[str, Any]], sampling: Sampling | None, fields: Mapping[str, Any]
) -> dict[str, Any]:
    wanted = sampling.sampling() if sampling else {}
    if "enable_thinking" in wanted:
        wanted["chat_template_kwargs"] = {"enable_thinking": wanted.pop("enable_thinking")}
    if "thinking_budget" in wanted:
        wanted["thinking_token_budget"] = wanted.pop("thinking_budget")
    return {"messages": list(messages), "stream": True, "stream_options": {"include_usage": True}, **wanted, **fields}


def _with_images(query: Question, history: Sequence[AskedTurn]) -> bool:
    return any(question.images for question in (query, *(earlier for earlier, *_ in history)))


def _lacks_chat(error: ChatError) -> bool:
    """Tell whether `/chat` was refused because there is none, and not because the server does not know the model."""
    return error.status == 404 and error.param != "model"


def _with_model(sampling: Sampling, info: ServerInfo) -> Sampling:
    """Name the model, by which a switch chooses the server."""
    return sampling if sampling.model else sampling.model_copy(update={"model": info.models[0]})


@dataclass(frozen=True)
class _Server:
    """Sends requests to the server at `url`, with requests or, on asyncio, with httpx."""

    url: str
    api_key: str | None
    timeout: Timeout

    def stream(self, path: str, body: dict[str, Any], answer: AnswerReader) -> Generator[Part, None, None]:
        with (
            self._chat_errors(),
            self._session() as session,
            session.post(self.url + path, json=body, timeout=self.timeout, stream=True) as response,
        ):
            if response.status_code != 200:
                raise _refusal(response)
            for chunk in response.iter_content(chunk_size=None):
                yield from answer.parts(chunk)
                if answer.ended:
                    return
        raise ChatError(say("the answer ended without its last line"), "incomplete")

    async def stream_async(self, path: str, body: dict[str, Any], answer: AnswerReader) -> AsyncGenerator[Part, None]:
        with self._chat_errors():
            async with self._client() as client, client.stream("POST", self.url + path, json=body) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise _refusal(response)
                async for chunk in response.aiter_bytes():
                    for part in answer.parts(chunk):
                        yield part
                    if answer.ended:
                        return
        raise ChatError(say("the answer ended without its last line"), "incomplete")

    def info(self) -> ServerInfo:
        with self._chat_errors(), self._session() as session:
            told = session.get(f"{self.url}/chat/info", timeout=self.timeout)
            if told.status_code == 404:
                told = session.get(f"{self.url}/v1/models", timeout=self.timeout)
            return _info_in(told)

    async def info_async(self) -> ServerInfo:
        with self._chat_errors():
            async with self._client() as client:
                told = await client.get(f"{self.url}/chat/info")
                if told.status_code == 404:
                    told = await client.get(f"{self.url}/v1/models")
                return _info_in(told)

    async def count_async(self, text: str) -> int:
        body = {"prompt": text, "add_special_tokens": False}
        with self._chat_errors():
            async with self._client() as client:
                response = await client.post(f"{self.url}/tokenize", json=body)
            if response.status_code != 200:
                raise _refusal(response)
            return int(json.loads(response.content)["count"])

    def _session(self) -> requests.Session:
        session = requests.Session()
        session.headers.update(self._headers())
        session.trust_env = self._may_use_proxy()
        return session

    def _client(self) -> httpx.AsyncClient:
        connect, read = self.timeout
        return httpx.AsyncClient(
            headers=self._headers(),
            trust_env=self._may_use_proxy(),
            verify=self.url.startswith("https:"),  # loading the certificates takes 25 ms
            timeout=httpx.Timeout(read, connect=connect),
        )

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def _may_use_proxy(self) -> bool:
        """Return False for servers of this machine, which a proxy cannot reach."""
        return httpx.URL(self.url).host not in THIS_MACHINE

    @contextmanager
    def _chat_errors(self) -> Iterator[None]:
        """Turn errors of the connection and of what came over it into ChatErrors."""
        try:
            yield
        except (requests.RequestException, httpx.RequestError, httpx.InvalidURL) as error:
            raise self._failure(error) from error
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ChatError(say("{url} answers, but not as a chat server does", url=self.url), "incomplete") from error

    def _failure(self, error: Exception) -> ChatError:
        """Describe to the user how the connection failed."""
        cause: object = error
        if isinstance(error, requests.RequestException) and error.args:  # it wraps urllib3's exception, which says more
            cause = getattr(error.args[0], "reason", error.args[0])
        match cause:
            case NewConnectionError() | ConnectTimeoutError() | httpx.ConnectError() | httpx.ConnectTimeout():
                told = say("no server answers at {url}: is it running? (make serve)", url=self.url)
                return ChatError(told, "unreachable")
            case ReadTimeoutError() | httpx.ReadTimeout():
                told = say("the server sent nothing for {seconds:.0f} s", seconds=self.timeout[1])
                return ChatError(told, "incomplete")
            case ProtocolError() | httpx.RemoteProtocolError() | httpx.NetworkError():
                return ChatError(say("the server broke the answer off"), "incomplete")
        return ChatError(say("cannot ask {url}: {cause}", url=self.url, cause=cause), "unreachable")


def _info_in(response: requests.Response | httpx.Response) -> ServerInfo:
    if response.status_code != 200:
        raise _refusal(response)
    told = json.loads(response.content)
    info = ServerInfo([model["id"] for model in told["data"]]) if "data" in told else ServerInfo(**told)
    if not info.models:
        raise ValueError("the server names no model")
    return info


def _refusal(response: requests.Response | httpx.Response) -> ChatError:
    """Read the error from a response whose status is not 200."""
    status, seconds = response.status_code, response.headers.get("Retry-After", "")
    retry_after = int(seconds) if status == 503 and seconds.isdecimal() else None
    try:
        error = json.loads(response.content)["error"]
        if isinstance(error, dict):
            return ChatError(error["message"], error["type"], error.get("param"), status, retry_after)
        message = str(error)
    except (ValueError, KeyError, TypeError):
        message = say("this is no answer of a chat server")
    return ChatError(f"{message} (HTTP {status})", status=status, retry_after=retry_after)


def send_test_message(url: str, query: str, system: str, sampling: Sampling, api_key: str | None = None) -> None:
    """Send one message to check a deployment; print the answer and its figures.

    Raises:
        ChatError: as in `stream_chat`; also where the answer is empty.
    """
    info = server_info(url, api_key)
    title = say("{model} at {url}", model=sampling.model or info.models[0], url=url)
    print(f"{title}\n> {query}", flush=True)
    began = time.monotonic()
    parts = stream_question(url, Question(query), [], system, sampling, api_key)
    first_part, first = next(parts), time.monotonic()
    result = [first_part, *parts][-1]
    assert isinstance(result, ChatResult)
    figures = console.figures_line(result, began, first)
    total = say("total {seconds:.2f} s", seconds=time.monotonic() - began)
    prompt = say("{number} prompt tokens", number=result.prompt_tokens)
    if result.ended_in_reasoning:
        raise ChatError(console.only_reasoning(lambda: info), "incomplete")
    if not result.text.strip():
        raise ChatError(say("the answer is empty"), "incomplete")
    print(f"{console.without_controls(result.text)}\n{figures} · {total} · {prompt}")


def main(argv: list[str] | None = None) -> int:
    """Run the console client; return the exit status."""
    choose_language(argv)
    parser = argparse.ArgumentParser(
        "vllm_client.py", description="Chat with a server in the terminal.", formatter_class=Help
    )
    url, key = os.environ.get("QWEN_URL", DEFAULT_URL), os.environ.get("QWEN_API_KEY")
    parser.add_argument("--url", default=url, help="address of the server (default: %(default)s)")
    parser.add_argument("--api-key", default=key, help="its key; default: $QWEN_API_KEY")
    parser.add_argument(
        "--test-message",
        nargs="?",
        const=TEST_MESSAGE,
        metavar="TEXT",
        help="send one message, print the answer and how long it took, and leave: 0 where all went well (%(const)r)",
    )
    add_arguments(parser)
    args = parser.parse_args(argv)
    url, key = args.url.rstrip("/"), args.api_key

    def ask(query: Question, history: Sequence[AskedTurn], system: str | None, sampling: Sampling) -> Iterator[Part]:
        return stream_question(url, query, history, system, sampling, key, _tell_waiting)

    try:
        if args.test_message is not None:
            send_test_message(url, args.test_message, args.system, given_sampling(args), key)
            return 0
        return console.run(ask, _title(url, key), args, lambda: server_info(url, key))
    except ChatError as error:
        print(say("Error: {message}", message=error.message), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _tell_waiting(place: int, prompt_tokens: int) -> None:
    if sys.stderr.isatty():
        text = say("number {place} in line") if place else say("reading {tokens:,} tokens")
        print(text.format(place=place, tokens=prompt_tokens), file=sys.stderr, flush=True)


def _title(url: str, api_key: str | None) -> str:
    try:
        return say("{model} at {url}", model=server_info(url, api_key).models[0], url=url)
    except ChatError as error:
        return f"{url}: {error.message}"


if __name__ == "__main__":
    raise SystemExit(main())
