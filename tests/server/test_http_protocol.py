"""A connection's limits and deadlines, on a real socket with a small application behind it."""

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator, Callable
from functools import partial

import pytest
import uvicorn

from qwen_vllm.server.http_protocol import HttpProtocol, Limits

HEAD = b"POST / HTTP/1.1\r\nhost: server\r\n"
SHORT = 0.3
"""Seconds: the deadline that a test runs into."""
LONG = 30
"""Seconds: the deadlines that it does not."""


async def echo(scope: dict, receive: Callable, send: Callable) -> None:
    """Answers with the size of the body; a path /early at once, without the body; /long with 64 MiB."""
    size = 0
    if scope["path"] != "/early":
        while True:
            message = await receive()
            size += len(message["body"])
            if not message["more_body"]:
                break
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(1000 if scope["path"] == "/long" else 0):
        await send({"type": "http.response.body", "body": b"x" * 2**16, "more_body": True})
    await send({"type": "http.response.body", "body": str(size).encode(), "more_body": False})


@contextlib.asynccontextmanager
async def serving(
    header_timeout: float = LONG, write_timeout: float = LONG
) -> AsyncIterator[tuple[uvicorn.Server, tuple[str, int]]]:
    config = uvicorn.Config(echo, lifespan="off", log_level="critical", timeout_graceful_shutdown=1)
    config.load()
    config.http_protocol_class = partial(HttpProtocol, limits=Limits(header_timeout, write_timeout, 2**16, 100))
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        task = asyncio.create_task(server._serve([listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        yield server, listener.getsockname()
        server.should_exit = True
        await task


def exchange(*pieces: bytes, pause: float = 0, **timeouts: float) -> tuple[bytes, float]:
    """Sends the pieces; returns all that comes back until the connection is closed, and the seconds that took."""

    async def send_and_read() -> tuple[bytes, float]:
        async with serving(**timeouts) as (_, address):
            began, answer = time.monotonic(), b""
            reader, writer = await asyncio.open_connection(*address)
            reading = asyncio.create_task(reader.read())
            with contextlib.suppress(ConnectionError):
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.wait((reading,), timeout=pause)
            with contextlib.suppress(ConnectionError):
                answer = await reading
            writer.close()
            return answer, time.monotonic() - began

    return asyncio.run(asyncio.wait_for(send_and_read(), 20))


def refusal(answer: bytes, status: bytes) -> str:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 " + status), answer
    return json.loads(body)["error"]["message"]


def test_a_request_in_time_is_answered() -> None:
    answer, _ = exchange(HEAD + b"content-length: 5\r\n", b"connection: close\r\n\r\n", b"hello", pause=0.05)
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.endswith(b"\r\n1\r\n5\r\n0\r\n\r\n")


END = b"connection: close\r\n\r\n"


@pytest.mark.parametrize(
    "rest",
    [
        b"".join(b"a%d: x\r\n" % i for i in range(98)) + END,
        b"a: " + b"x" * 65_000 + b"\r\n" + END,
        b"accept: a\r\naccept: b\r\n" + END,
        b"transfer-encoding: chunked\r\n" + END + b"0\r\n\r\n",
    ],
)
def test_a_head_within_the_limits_is_answered(rest: bytes) -> None:
    assert exchange(HEAD + rest)[0].startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("head", "limit"),
    [
        (b"".join(b"a%d: x\r\n" % i for i in range(99)) + END, "100 headers"),
        (b"a: " + b"x" * 2**16 + b"\r\n\r\n", "65536 bytes"),
        (b"a: " + b"x" * 2**20 + b"\r\n\r\n", "65536 bytes"),
        (b"a: " + b"x" * 66_000 + b"\r\n\r\n", "65536 bytes"),
        (b"".join(b"a%d: x\r\n" % i for i in range(1000)) + b"\r\n", "100 headers"),
        (b"".join(b"a%d: %s\r\n" % (i, b"x" * 1000) for i in range(99)) + b"\r\n", "65536 bytes"),
    ],
)
def test_a_head_over_the_limit_is_refused_with_the_limit(head: bytes, limit: str) -> None:
    assert limit in refusal(exchange(HEAD + head)[0], b"431")


def test_a_head_that_never_ends_is_refused_before_it_fills_the_memory() -> None:
    assert "65536 bytes" in refusal(exchange(HEAD + b"a: ", *[b"x" * 1000] * 100)[0], b"431")


@pytest.mark.parametrize(
    "request_",
    [
        b"\x16\x03\x01\r\n\r\n",
        b"GET\r\n\r\n",
        HEAD + b"content-length: -1\r\n\r\n",
        HEAD + b"content-length: one\r\n\r\n",
        HEAD + b"a b: c\r\n\r\n",
    ],
)
def test_what_is_no_request_is_refused(request_: bytes) -> None:
    refusal(exchange(request_)[0], b"400")


@pytest.mark.parametrize("pieces", [[], [b"GET / HT"], [HEAD], [bytes([byte]) for byte in HEAD * 9]])
def test_a_head_that_does_not_come_is_not_waited_for(pieces: list[bytes]) -> None:
    answer, seconds = exchange(*pieces, pause=0.02, header_timeout=SHORT)
    assert answer == b""
    assert seconds >= SHORT


def test_the_second_request_of_a_connection_has_a_deadline_too() -> None:
    answer, _ = exchange(HEAD + b"content-length: 0\r\n\r\n", b"GET", pause=0.1, header_timeout=SHORT)
    assert answer.count(b"HTTP/1.1 200") == 1


def test_a_body_may_take_longer_than_a_head() -> None:
    body = [b"x"] * 5
    answer, seconds = exchange(
        HEAD + b"connection: close\r\ncontent-length: 5\r\n\r\n", *body, pause=0.1, header_timeout=SHORT
    )
    assert answer.startswith(b"HTTP/1.1 200")
    assert seconds > SHORT


def test_what_is_still_sent_after_the_answer_is_taken_for_a_while() -> None:
    rest = [b"x" * 2**17] * 4
    head = b"POST /early HTTP/1.1\r\nhost: server\r\ncontent-length: 10000000\r\n\r\n"
    answer, seconds = exchange(head, *rest, pause=0.01, header_timeout=SHORT)
    assert answer.startswith(b"HTTP/1.1 200")
    assert seconds >= SHORT


def test_a_request_that_comes_as_the_server_ends_is_answered() -> None:
    async def ask() -> bytes:
        async with serving() as (server, address):
            reader, writer = await asyncio.open_connection(*address)
            while not server.server_state.connections:
                await asyncio.sleep(0.01)
            server.should_exit = True
            with contextlib.suppress(ConnectionError):
                while True:  # until no other is let in: the server is ending
                    (await asyncio.open_connection(*address))[1].close()
            writer.write(HEAD + b"content-length: 0\r\n\r\n")
            answer = await reader.read()
            writer.close()
            return answer

    assert asyncio.run(asyncio.wait_for(ask(), 20)).startswith(b"HTTP/1.1 200")


def test_a_reader_that_stops_is_cut_off() -> None:
    async def stall() -> None:
        async with serving(write_timeout=SHORT) as (server, address):
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
                client.setblocking(False)
                loop = asyncio.get_running_loop()
                await loop.sock_connect(client, address)
                await loop.sock_sendall(client, b"GET /long HTTP/1.1\r\nhost: server\r\n\r\n")
                while not server.server_state.connections:
                    await asyncio.sleep(0.01)
                while server.server_state.connections:
                    await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(stall(), 20))
