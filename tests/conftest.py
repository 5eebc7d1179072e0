"""Hooks and fixtures; what test modules import is in support/."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace
from typing import Any

import pexpect
import pytest
import requests
from selenium import webdriver
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qwen_vllm.models.demo import demo_model
from tests.support import tokenizers
from tests.support.browser import INFO, Tab, start_browser
from tests.support.demo import CONVERSATIONS, MODEL
from tests.support.page_server import serving
from tests.support.programs import KEY, PROGRAMS, ready
from tests.support.scripted_engine import ScriptedEngine
from tests.support.scripted_server import Server, line, scripted


def pytest_configure() -> None:
    # A runner in the background has Ctrl-C ignored, and so would have what the tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        assert PROGRAMS.keys().isdisjoint(item.fixturenames) or "e2e" in item.path.parts, f"not in e2e/: {item.nodeid}"
    # What needs no server goes first: meanwhile they start.
    items.sort(key=lambda item: ("e2e" in item.path.parts, item.get_closest_marker("last") is not None))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> None:
    """Makes a skipped test a failed one in CI, where whatever a test wants has to be there."""
    if os.environ.get("CI") and call.excinfo and call.excinfo.errisinstance(pytest.skip.Exception):
        try:
            pytest.fail(f"skipped in CI: {call.excinfo.value}", pytrace=False)
        except pytest.fail.Exception as error:
            call.excinfo = pytest.ExceptionInfo.from_exception(error)


@pytest.fixture(scope="session", autouse=True)
def started(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The PROGRAMS that selected tests want; they start here, before the first test."""
    wanted = {name for item in request.session.items for name in item.fixturenames}
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(start(tmp_path_factory.mktemp(name)))
            for name, start in PROGRAMS.items()
            if name in wanted
        }


@pytest.fixture(autouse=True)
def english(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that a test runs in this process chooses a language for itself alone."""
    monkeypatch.setenv("QWEN_LANG", "en")


@pytest.fixture
def chinese(monkeypatch: pytest.MonkeyPatch, english: None) -> None:
    """The programs of this test speak Chinese."""
    monkeypatch.setenv("QWEN_LANG", "zh")


@pytest.fixture(scope="session")
def demo_server(started: dict[str, Any]) -> str:
    """The address of one server for all tests that need no flags; the last one stops it."""
    return ready(started["demo_server"]).url


@pytest.fixture(scope="session")
def small_server(started: dict[str, Any]) -> SimpleNamespace:
    """A server with little room and short deadlines; the last test stops its engine."""
    return ready(started["small_server"])


@pytest.fixture(scope="session")
def piped_chat(started: dict[str, Any]) -> subprocess.Popen:
    """`make chat`, asked FRANCE from a pipe; its processes have PIPED_CHAT in their environment."""
    return started["piped_chat"]


@pytest.fixture(scope="session")
def offline_chat(started: dict[str, Any]) -> pexpect.spawn:
    """The offline REPL in a terminal."""
    return started["offline_chat"]


@pytest.fixture(scope="session")
def said_by_vllm(demo_server: str) -> list[str]:
    """The demo model's greedy answers to the CONVERSATIONS, of 10 tokens, by vLLM's own route."""
    texts = []
    for system, history, query in CONVERSATIONS:
        turns = [message for turn in history for message in zip(("user", "assistant"), turn, strict=True)]
        messages = [{"role": role, "content": text} for role, text in [("system", system), *turns, ("user", query)]]
        body = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 10}
        headers = {"Authorization": f"Bearer {KEY}"}
        answer = requests.post(f"{demo_server}/v1/chat/completions", json=body, headers=headers, timeout=120).json()
        texts.append(answer["choices"][0]["message"]["content"])
    return texts


@pytest.fixture(scope="session")
def demo_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(demo_model())


@pytest.fixture(scope="session")
def qwen_tokenizer() -> PreTrainedTokenizerBase:
    """Qwen2.5's vocabulary, real, and its chat template."""
    return tokenizers.qwen_tokenizer()


@pytest.fixture(scope="session")
def qwen36_tokenizer() -> PreTrainedTokenizerBase:
    """Qwen3.5's and 3.6's vocabulary, real, and Qwen3's chat template."""
    return tokenizers.qwen36_tokenizer()


@pytest.fixture(scope="session")
def qwen3_tokenizer() -> PreTrainedTokenizerBase:
    """Qwen3's control tokens and chat template, on a vocabulary of single bytes."""
    return tokenizers.byte_tokenizer(tokenizers.QWEN3_TEMPLATE)


@pytest.fixture
def scripted_engine(qwen3_tokenizer: PreTrainedTokenizerBase) -> Callable[..., ScriptedEngine]:
    return partial(ScriptedEngine, qwen3_tokenizer)


@pytest.fixture
def server() -> Iterator[Server]:
    with scripted() as server:
        yield server


@pytest.fixture(scope="module")
def browsers() -> Iterator[list[webdriver.Chrome]]:
    drivers: list[webdriver.Chrome] = []
    yield drivers
    for driver in drivers:
        driver.quit()


@pytest.fixture
def person(browsers: list[webdriver.Chrome]) -> Iterator[Callable[..., Tab]]:
    """Opens the page in a browser that no other person of this test uses."""
    count = 0

    def arrive(url: str, language: str = "en") -> Tab:
        nonlocal count
        if count == len(browsers):
            browsers.append(start_browser())
        driver = browsers[count]
        agent = driver.execute_script("return navigator.userAgent")
        driver.execute_cdp_cmd("Network.setUserAgentOverride", {"userAgent": agent, "acceptLanguage": language})
        count += 1
        return Tab(driver).open(url)

    yield arrive
    for driver in browsers[:count]:
        driver.get("about:blank")
        driver.get_log("performance")


@pytest.fixture
def page(server: Server) -> Iterator[str]:
    """The page's address, in front of the scripted server."""
    server.play(line(INFO), path="/chat/info")
    with serving("--server-url", server.url) as url:
        yield url
