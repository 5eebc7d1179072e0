"""A team's keys on the engine and two front ends: all routes count, limits hold over both, a kill loses nothing."""

import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import requests

from qwen_vllm.with_server import running_server
from tests.support.demo import MODEL
from tests.support.probes import server_process

pytestmark = pytest.mark.long
KEYS = {"ann": "", "bob": "requests_per_minute = 1", "cleo": "tokens_per_day = 5", "dan": "", "me": "admin = true"}
HELLO = [{"role": "user", "content": "Hello"}]
ROUTES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/chat", {"query": "Hello", "max_tokens": 5}),
    "two answers": ("/v1/chat/completions", {"messages": HELLO, "max_tokens": 5, "n": 2, "ignore_eos": True}),
    "three prompts": ("/v1/completions", {"prompt": ["One", "Two", "Three"], "max_tokens": 5, "ignore_eos": True}),
    "Anthropic": ("/v1/messages", {"messages": HELLO, "max_tokens": 5}),
    "Responses": ("/v1/responses", {"input": "Hello", "max_output_tokens": 5}),
}


def secret(name: str) -> str:
    return f"{name}-0123456789abcdef"


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    folder = tmp_path_factory.mktemp("team")
    keys = folder / "keys.toml"
    keys.touch(0o600)
    keys.write_text("".join(f'[{name}]\nkey = "{secret(name)}"\n{line}\n' for name, line in KEYS.items()))
    flags = ["--api-server-count", "2", "--key-file", str(keys), "--usage-file", str(folder / "usage.db")]
    with running_server(flags, folder / "log") as url:
        yield SimpleNamespace(url=url, usage=folder / "usage.db", log=folder / "log")


def post(team: SimpleNamespace, name: str, path: str, body: dict[str, Any]) -> requests.Response:
    fields = body if path == "/chat" else {"model": MODEL, **body}
    return requests.post(f"{team.url}{path}", json=fields, headers={"x-api-key": secret(name)}, timeout=120)


def used(team: SimpleNamespace, name: str) -> tuple[int, int]:
    """The tokens of prompts and answers that the usage file has."""
    sums = "SELECT total(prompt_tokens), total(completion_tokens) FROM usage WHERE name = ?"
    return sqlite3.connect(team.usage).execute(sums, (name,)).fetchone()


def wait_until(true: Callable[[], bool]) -> None:
    """Wait for what the server writes each second."""
    until = time.monotonic() + 20
    while not true():
        assert time.monotonic() < until
        time.sleep(0.1)


def test_all_routes_count_what_they_tell_their_clients(team: SimpleNamespace) -> None:
    told = [0, 0]
    for path, body in ROUTES.values():
        usage = post(team, "ann", path, body).json()["usage"]
        told[0] += usage.get("prompt_tokens") or usage["input_tokens"]
        told[1] += usage.get("completion_tokens") or usage["output_tokens"]
    wait_until(lambda: used(team, "ann") == tuple(told))


def test_limits_hold_over_both_front_ends(team: SimpleNamespace) -> None:
    with ThreadPoolExecutor(12) as pool:
        answers = [*pool.map(lambda _: post(team, "bob", *ROUTES["chat"]), range(12))]
    assert sorted(answer.status_code for answer in answers) == [200] + [429] * 11
    over = post(team, "bob", *ROUTES["Anthropic"])
    assert over.status_code == 429 and int(over.headers["Retry-After"]) <= 60
    assert over.json()["error"]["type"] == "rate_limit_error" and "requests_per_minute" in over.text
    headers = {"Authorization": f"Bearer {secret('me')}"}
    metrics = requests.get(f"{team.url}/metrics", headers=headers, timeout=30).text
    assert 'qwen_refused_total{key="bob",limit="requests_per_minute"} 12.0' in metrics
    assert "0123456789abcdef" not in metrics + team.log.read_text()


def test_a_key_that_has_used_its_tokens_waits_for_the_next_day(team: SimpleNamespace) -> None:
    assert post(team, "cleo", *ROUTES["chat"]).status_code == 200
    wait_until(lambda: used(team, "cleo")[1] == 5)
    over = post(team, "cleo", *ROUTES["two answers"])
    assert over.status_code == 429 and over.json()["error"]["param"] == "tokens_per_day"
    assert 0 < int(over.headers["Retry-After"]) <= 86_400


@pytest.mark.last
def test_of_a_killed_server_the_tokens_of_its_running_answers_are_kept(team: SimpleNamespace) -> None:
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 1500, "ignore_eos": True, "stream": True}
    address, headers = f"{team.url}/v1/chat/completions", {"x-api-key": secret("dan")}
    with requests.post(address, json=body, headers=headers, stream=True, timeout=60) as answer:
        assert answer.status_code == 200
        wait_until(lambda: used(team, "dan")[1] > 1)
        server = server_process(team.url)
        for process in [*server.children(recursive=True), server]:
            process.kill()
    assert used(team, "dan")[0] > 10 and used(team, "dan")[1] > 1
