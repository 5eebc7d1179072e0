"""A server with little room and short deadlines: overload, slow and silent clients, an engine that hangs."""

import base64
import io
import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace

import psutil
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from PIL import Image
from schemathesis import GenerationMode

from qwen_vllm.hardware import MAX_PIXELS
from qwen_vllm.protocol import INT32_MAX, ChatError, Sampling
from qwen_vllm.server.guard import MAX_COUNT, MAX_DEPTH, MAX_GRAMMAR
from tests.support.demo import FRANCE, MODEL, PARIS
from tests.support.probes import gauge, server_process, unfinished
from tests.support.programs import DEADLINE, ROOM
from vllm_client import stream_chat


@pytest.fixture
def url(small_server: SimpleNamespace, demo_server: str) -> Iterator[str]:
    """The address, beside another server, which is to change nothing for this one; after each test the engine has
    nothing left to do and a normal request is answered.
    """
    yield small_server.url
    wait_until(lambda: unfinished(small_server.url) == 0)
    assert chat(small_server.url, query=FRANCE).json()["text"] == PARIS


def chat(url: str, **fields: object) -> requests.Response:
    return requests.post(f"{url}/chat", json={"temperature": 0, **fields}, timeout=120)


def complete(url: str, **fields: object) -> requests.Response:
    return requests.post(f"{url}/v1/completions", json={"model": MODEL, "prompt": "Hi", **fields}, timeout=120)


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.05)


def test_more_than_fits_is_refused_by_all_routes_with_when_to_come_back(url: str) -> None:
    with ThreadPoolExecutor(3 * ROOM) as pool:
        admitted = [pool.submit(complete, url, max_tokens=60, ignore_eos=True) for _ in range(ROOM)]
        wait_until(lambda: unfinished(url) == ROOM)
        asks = [partial(chat, url, query="Hi"), partial(complete, url), partial(complete, url, stream=True)]
        refused = list(pool.map(lambda i: asks[i % 3](), range(2 * ROOM)))
        assert {answer.result().status_code for answer in admitted} == {200}
    for response in refused:
        assert response.status_code == 503
        assert int(response.headers["Retry-After"]) >= 1
        assert {"type", "message", "param"} <= set(response.json()["error"])
    assert refused[0].json()["error"]["type"] == "overloaded"


def test_what_is_admitted_at_once_is_exact(url: str) -> None:
    nonces = [str(7_919 * (i + 11)) for i in range(ROOM)]
    examples = [("Repeat: 48213", "48213"), ("Repeat: 99120", "99120"), ("Repeat: 30577", "30577")]
    with ThreadPoolExecutor(ROOM) as pool:
        answers = pool.map(lambda nonce: chat(url, query=f"Repeat: {nonce}", history=examples, max_tokens=16), nonces)
        assert [answer.json()["text"] for answer in answers] == nonces


@pytest.mark.long
def test_answers_do_not_change_where_the_cache_is_too_small_for_all(url: str) -> None:
    # Each takes 4 of the cache's 17 blocks at first, and a fifth before it has ended. The model is sure of each token:
    # between two that are as likely, how many are computed at once would choose.
    numbers = [str(7_919 * number) for number in range(13, 49)]
    lists = [" ".join(numbers[start : start + 3]) for start in range(0, len(numbers), 3)]

    def repeat(first: int) -> str:
        examples = [(f"Repeat: {text}", text) for text in lists[first : first + 2]]
        return chat(url, query=f"Repeat: {lists[first + 2]}", history=examples).json()["text"]

    preempted = gauge(url, "num_preemptions_total")
    with ThreadPoolExecutor(ROOM) as pool:
        assert list(pool.map(repeat, range(0, len(lists), 3))) == lists[2::3]
    assert gauge(url, "num_preemptions_total") > preempted


def test_an_answer_ends_where_the_context_is_full(url: str) -> None:
    messages = [{"role": "user", "content": "word " * 450}]
    body = {"model": MODEL, "messages": messages, "ignore_eos": True}
    answer = requests.post(f"{url}/v1/chat/completions", json=body, timeout=120).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == 512


def request_of(size: int) -> bytes:
    return b"POST /chat HTTP/1.1\r\nhost: s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % size


@pytest.mark.parametrize("sent", [b"", b"POST /chat HT", request_of(100) + b'{"query": '])
def test_silent_clients_are_closed_and_others_notice_nothing(
    small_server: SimpleNamespace, url: str, sent: bytes
) -> None:
    with ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(("127.0.0.1", small_server.port))) for _ in range(100)]
        for client in silent:
            client.sendall(sent)
        assert chat(url, query=FRANCE).json()["text"] == PARIS
        for client in silent:
            client.settimeout(DEADLINE * 10)
            while client.recv(4096):
                pass


def test_clients_that_send_byte_by_byte_are_closed(small_server: SimpleNamespace, url: str) -> None:
    with ExitStack() as stack:
        slow = [stack.enter_context(socket.create_connection(("127.0.0.1", small_server.port))) for _ in range(50)]

        def all_closed() -> bool:
            for client in slow[:]:
                try:
                    client.send(b"G")
                except OSError:
                    slow.remove(client)
            return not slow

        assert chat(url, query=FRANCE).json()["text"] == PARIS
        wait_until(all_closed)


def test_a_client_that_stops_reading_is_cut_off_and_its_request_with_it(
    small_server: SimpleNamespace, url: str
) -> None:
    # The prompt comes back with each of many answers: far more than the buffers between the two hold.
    fields = {"model": MODEL, "prompt": "word " * 400, "echo": True, "n": ROOM, "max_tokens": 100, "stream": True}
    body = json.dumps({**fields, "ignore_eos": True, "logprobs": 20}).encode()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(("127.0.0.1", small_server.port))
        client.sendall(request_of(len(body)).replace(b"/chat", b"/v1/completions") + body)
        wait_until(lambda: unfinished(url) > 0)
        wait_until(lambda: unfinished(url) == 0, 60)


@pytest.mark.parametrize("end", ["close", "reset", "half-close"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_engine(small_server: SimpleNamespace, url: str, end: str, stream: bool) -> None:
    fields = {"query": "Tell me a long story.", "max_tokens": 250, "temperature": 0}
    body = json.dumps({**fields, "stream": stream, "min_p": 0.0}).encode()
    with socket.create_connection(("127.0.0.1", small_server.port)) as client:
        client.sendall(request_of(len(body)) + body)
        wait_until(lambda: unfinished(url) == 1)
        if end == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        if end == "half-close":
            client.shutdown(socket.SHUT_WR)
        else:
            client.close()
        wait_until(lambda: unfinished(url) == 0, 2)


def an_image(width: int, height: int) -> dict:
    """The field of a request with an empty image, one bit a pixel."""
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "png")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


OVER_OUR_LIMITS = [
    ({"structured_outputs": {"regex": "a" * MAX_GRAMMAR}}, f"over the limit of {MAX_GRAMMAR} bytes"),
    ({"structured_outputs": {"grammar": 'start: "a"' + " " * MAX_GRAMMAR}}, f"over the limit of {MAX_GRAMMAR} bytes"),
    ({"structured_outputs": {"choice": ["word"] * 5000}}, f"over the limit of {MAX_GRAMMAR} bytes"),
    ({"structured_outputs": {"grammar": 'start: %json {"type": "string"}'}}, "%json is not taken"),
    ({"structured_outputs": {"json": {"minItems": MAX_COUNT + 1}}}, f"minItems is at most {MAX_COUNT}"),
    ({"structured_outputs": {"json": f'{{"maxLength": {MAX_COUNT + 1}}}'}}, f"maxLength is at most {MAX_COUNT}"),
    ({"structured_outputs": {"json": json.loads('{"items":' * 63 + "{}" + "}" * 63)}}, f"deeper than {MAX_DEPTH}"),
    ({"prompt": [INT32_MAX + 1]}, f"prompt: an integer here is at most {INT32_MAX}"),
    ({"prompt": [-INT32_MAX - 1]}, f"prompt: an integer here is at most {INT32_MAX}"),
    ({"logit_bias": {"5": INT32_MAX + 1}}, f"logit_bias: an integer here is at most {INT32_MAX}"),
    (an_image(8193, 8192), f"over {MAX_PIXELS} pixels"),
]


def test_what_is_over_our_limits_is_refused_with_the_limit_while_another_is_answered(url: str) -> None:
    beside = stream_chat(url, "Tell me a long story.", sampling=Sampling(max_tokens=20, temperature=0))
    next(beside)
    for fields, limit in OVER_OUR_LIMITS:
        response = complete(url, **{"max_tokens": 2, **fields})
        assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request"), response.text
        assert limit in response.json()["error"]["message"]
    *_, result = beside
    assert result.completion_tokens == 20


SPECIAL = {
    "choices": {"structured_outputs": {"choice": [f"{i:03}" for i in range(100)]}},
    "a broken pattern": {"structured_outputs": {"regex": "["}},
    "more logprobs than vLLM gives": {"prompt_logprobs": 1000},
    "more prompts than there is room for": {"prompt": ["a"] * 4 * ROOM},
}


@pytest.mark.parametrize("fields", SPECIAL.values(), ids=SPECIAL.keys())
def test_what_vllm_or_the_queue_limits_is_refused_or_answered_and_hurts_nobody(url: str, fields: dict) -> None:
    beside = stream_chat(url, "Tell me a long story.", sampling=Sampling(max_tokens=20, temperature=0))
    next(beside)
    response = complete(url, **{"max_tokens": 2, **fields})
    assert response.status_code in (200, 400, 422, 503)
    assert len(response.text) < 4096
    assert not re.search(r"Traceback|/site-packages", response.text)
    *_, result = beside
    assert result.completion_tokens == 20


def test_an_address_inside_the_network_is_not_asked(url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(1)
        image = {"type": "image_url", "image_url": {"url": f"http://127.0.0.1:{listener.getsockname()[1]}/secret"}}
        body = {"model": MODEL, "messages": [{"role": "user", "content": [image]}]}
        assert requests.post(f"{url}/v1/chat/completions", json=body, timeout=30).status_code == 400
        with pytest.raises(TimeoutError):
            listener.accept()


def test_a_chat_template_in_a_request_is_refused(url: str) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "chat_template": "{{ 1 }}"}
    assert requests.post(f"{url}/v1/chat/completions", json=body, timeout=30).status_code == 400


def test_ready_says_yes(url: str) -> None:
    response = requests.get(f"{url}/ready", timeout=10)
    assert (response.status_code, response.json()) == (200, {"ready": True, "reason": None})


@pytest.mark.parametrize("mode", GenerationMode, ids=lambda mode: mode.value)
def test_whatever_the_description_of_the_api_allows_or_not_is_answered_or_refused(
    url: str, mode: GenerationMode
) -> None:
    operation = schemathesis.openapi.from_url(f"{url}/openapi.json")["/chat"]["POST"]

    @given(operation.as_strategy(generation_mode=mode))
    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    def ask(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("max_tokens"), int | None):
            case.body["max_tokens"] = min(case.body.get("max_tokens") or 1, 1)
        response = case.call()
        assert response.status_code in (200, 400, 404, 405, 408, 413, 415, 503), response.text
        if response.status_code != 200:
            assert {"type", "message", "param"} <= set(response.json()["error"])
            assert len(response.content) <= 1024

    ask()


def test_an_engine_that_hangs_ends_the_server_with_explicit_errors(small_server: SimpleNamespace) -> None:
    server = server_process(small_server.url)
    answer = stream_chat(small_server.url, "Tell me a long story.", sampling=Sampling(max_tokens=250, temperature=0))
    next(answer)
    [engine] = [p for p in server.children(recursive=True) if "EngineCor" in p.name()]
    os.kill(engine.pid, signal.SIGSTOP)
    wait_until(lambda: requests.get(f"{small_server.url}/ready", timeout=10).status_code == 503)
    with pytest.raises(ChatError, match="the engine has died"):
        list(answer)
    left = [server, *server.children(recursive=True)]
    assert server.wait(30) != 0
    assert not psutil.wait_procs(left, timeout=10)[1]
    # Before --stall-timeout, since its engine did not compute; that of another server here did.
    assert int(re.findall(r"The engine has not answered for (\d+) s", small_server.log.read_text())[0]) < 60
    with socket.create_server(("127.0.0.1", small_server.port)):
        pass
